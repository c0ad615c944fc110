//! One attempt at a batch: lock, load, decide, write, publish, commit, tell, settle.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::mem;
use std::time::Instant;

use anyhow::anyhow;
use jiff::Timestamp;
use log::{debug, warn};
use uuid::Uuid;

use super::closed::Destination;
use super::failure::Trouble;
use super::item::Item;
use super::outbox::{Outbox, Unavailable};
use super::{Common, Findings, Handler, MAX_BATCH_BYTES, letters};
use crate::domain::batch::{self, Asked, Plan, Stalled, Wait};
use crate::domain::job::{Command, Context, Event, Outcome, Requested, State};
use crate::domain::overview::Delivery;
use crate::domain::vhost::Vhost;
use crate::domain::workflow::Catalogue;
use crate::fault_point;
use crate::store::{Connection, KeptResult, Loaded, Transaction};
use crate::telemetry::metrics::Stage;
use crate::telemetry::report;
use crate::wire::{self, Inbox};

impl Handler<'_> {
    pub(super) fn attempt(&mut self, batch: &mut [Item]) -> Result<(), Trouble> {
        let mut announcements = Outbox::default();
        for item in &mut *batch {
            item.stalled_on = None;
            if item.list_workflows {
                self.common.service.metrics.workflows_announced();
                debug!("telling clients the workflows");
                let catalogue = self.common.service.catalogue.get();
                let announcement = wire::available_workflows(catalogue.announcement());
                announcements.sdk.push(announcement);
            }
        }
        if batch.iter().all(|item| item.job.is_none()) {
            self.publish(&announcements)?;
        } else {
            self.attempt_jobs(batch, &mut announcements)?;
        }
        self.write_dead_letters(batch)
    }

    fn attempt_jobs(
        &mut self,
        batch: &mut [Item],
        announcements: &mut Outbox,
    ) -> Result<(), Trouble> {
        // Dropped on any error, and closed if the error was the connection's.
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.store.connection()?.for_batches()?,
        };
        let Committed {
            ending,
            with_course,
            concerns_turns,
            waits,
            stalled,
            ended_before,
            given_up,
        } = self.transact(batch, announcements, &mut connection)?;
        for Stalled { place, queue } in stalled {
            batch[place].stalled_on = Some(Destination::TaskQueue(queue));
        }
        fault_point::reached("after commit");
        let mut stopwatch = self.common.service.metrics.stopwatch();
        let unavailable = self.publish(announcements);
        if concerns_turns {
            // After the revocation of a task whose place is free now. Full when it has been woken
            // already.
            let _ = self.common.turns.try_send(());
        }
        let unavailable = unavailable?;
        stopwatch.lap(Stage::Tell);
        fault_point::reached("after telling");
        let (announced, stalled): (Vec<_>, Vec<_>) = ending
            .into_iter()
            .partition(|job_id| !unavailable.queues.contains(&wire::result_queue(*job_id)));
        let untaken = untaken(batch, &announced, &unavailable, &ended_before);
        self.keep_untaken(batch, announcements, &untaken, &given_up, &mut connection)?;
        if !announced.is_empty() {
            let keeps_logs = self.common.service.config.keep_logs;
            connection.settle(&announced, with_course, keeps_logs)?;
            stopwatch.lap(Stage::Settle);
            fault_point::reached("after settling");
        }
        self.connection = Some(connection);
        for wait in waits {
            let item = &mut batch[wait.place];
            item.wait = Some(wait.time);
            if let Some(logs) = wait.refusal {
                item.turn_into_refusal(logs);
            }
        }
        self.stall_on_clients(batch, &stalled, &unavailable);
        Ok(())
    }

    /// Keeps the outputs of these jobs that their clients have not been told of, where that is wanted, and
    /// notes what became of them; before their rows go.
    fn keep_untaken(
        &self,
        batch: &[Item],
        announcements: &Outbox,
        untaken: &[(Uuid, Delivery)],
        given_up: &[Uuid],
        connection: &mut Connection,
    ) -> Result<(), Trouble> {
        if untaken.is_empty() {
            return Ok(());
        }
        connection.note_deliveries(untaken)?;
        if self.common.service.config.keep_results.is_zero() {
            return Ok(());
        }
        let mut results = announcements.results_for(untaken);
        results.extend(batch.iter().filter_map(|item| {
            let (job_id, esdl) = (item.job.as_ref()?.0, item.untold_output.as_deref()?);
            let is_refused = untaken.contains(&(job_id, Delivery::Refused));
            let esdl = Cow::Borrowed(esdl);
            is_refused.then_some(KeptResult { job_id, esdl })
        }));
        results.retain(|result| !given_up.contains(&result.job_id));
        for job_id in connection.keep_results(&results)? {
            warn!("job {job_id}: its output ESDL is too large to be kept");
        }
        Ok(())
    }

    /// Keeps the messages that led to the outcomes of these jobs until their clients' queues are
    /// available again. A finding is made again.
    fn stall_on_clients(&self, batch: &mut [Item], jobs: &[Uuid], unavailable: &Unavailable<'_>) {
        let of_these = |item: &&mut Item| {
            let job = item.job.as_ref().map(|(job_id, _)| job_id);
            item.inbox().is_some() && job.is_some_and(|job_id| jobs.contains(job_id))
        };
        let mut some = false;
        for item in batch.iter_mut().filter(of_these) {
            item.stalled_on = Some(Destination::ClientQueues);
            // What else there is to do about it has been done.
            item.has_waited = true;
            some = true;
        }
        if some {
            let (closed, now) = (&self.common.closed, Instant::now());
            closed.close(
                self.number,
                &Destination::ClientQueues,
                &unavailable.why,
                now,
            );
        }
    }

    /// Publishes the dead letters of a batch. A message whose letter is not taken for now stalls.
    fn write_dead_letters(&mut self, batch: &mut [Item]) -> Result<(), Trouble> {
        let Common {
            service,
            queue_names,
            closed,
            ..
        } = self.common;
        let metrics = &service.metrics;
        for vhost in [Vhost::Sdk, Vhost::Task] {
            let (mut items, letters): (Vec<_>, Vec<_>) = batch
                .iter_mut()
                .filter(|item| item.stalled_on.is_none())
                .filter(|item| item.inbox().map(Inbox::vhost) == Some(vhost))
                .filter_map(|item| {
                    let (inbox, received, reason) = item.letter()?;
                    let letter = wire::dead_letter(
                        &queue_names[&inbox],
                        reason,
                        Timestamp::now(),
                        received.properties(),
                        received.body.clone(),
                    );
                    Some((item, letter))
                })
                .unzip();
            if items.is_empty() {
                continue;
            }
            let queue = Destination::DeadLetters(vhost);
            let mut outcome = vec![Some(String::new()); items.len()];
            if !closed.is_closed(&queue, Instant::now()) {
                let is_there = self.letters_taken.contains(&vhost);
                let publisher = self.publishers.towards(vhost);
                outcome = letters::publish(publisher, &letters, is_there)?;
                let refused = outcome.iter().flatten().count();
                metrics.published("confirmed", outcome.len() - refused);
                metrics.published("rejected", refused);
                let now = Instant::now();
                if outcome.contains(&None) {
                    closed.took(&queue, now);
                }
                match outcome.iter().flatten().next() {
                    None => drop(self.letters_taken.insert(vhost)),
                    Some(why) => {
                        self.letters_taken.remove(&vhost);
                        closed.close(self.number, &queue, why, now);
                    }
                }
            }
            for (item, why) in items.iter_mut().zip(outcome) {
                if why.is_none() {
                    item.note_dead_letter(metrics);
                }
                // If its client is to be told later, the message is handled once more anyway.
                if item.wait.is_none() {
                    item.job = None;
                    item.list_workflows = false;
                    item.stalled_on = why.map(|_| queue.clone());
                }
            }
        }
        Ok(())
    }

    /// Decides about a batch and commits the result. Adds to `announcements` what clients are to
    /// hear of it now.
    fn transact(
        &mut self,
        batch: &[Item],
        announcements: &mut Outbox,
        connection: &mut Connection,
    ) -> Result<Committed, Trouble> {
        let ids: BTreeSet<Uuid> = asked(batch).map(|asked| asked.job_id).collect();
        let ids = Vec::from_iter(ids);
        let mut stopwatch = self.common.service.metrics.stopwatch();
        let mut transaction = connection.transaction()?;
        transaction.lock(&ids)?;
        stopwatch.lap(Stage::Lock);
        let ending = asked(batch).filter(|asked| asked.command.may_end_a_task());
        let whole: Vec<_> = ending.map(|asked| asked.job_id).collect();
        let loaded = transaction.load(&ids, &whole)?;
        stopwatch.lap(Stage::Load);

        let catalogue = self.common.service.catalogue.get();
        let mut plan = self.decide(batch, &loaded, &catalogue);
        let ended_before = ended_before(&plan, &loaded);
        stopwatch.lap(Stage::Decide);

        let inputs = kept_inputs(&plan, &mut transaction)?;
        self.write(batch, &plan, loaded.now, &mut transaction)?;
        stopwatch.lap(Stage::Write);
        fault_point::reached("before publish");
        let taken = batch.iter().map(|item| item.work.size()).sum::<usize>();
        if taken + inputs.values().map(String::len).sum::<usize>() > MAX_BATCH_BYTES {
            // Publishing may take longer than the minute for which a transaction may be idle.
            transaction.take_time()?;
        }
        // Only now, since what Postgres refuses must not have been asked of anybody. And before the
        // commit, since a committed task must have been published.
        let mut outbox = Outbox::default();
        let accepts = plan.only_accepts();
        self.write_out(mem::take(&mut plan.publications), inputs, &mut outbox)?;
        self.has_published = true;
        match accepts {
            true => self.send_acceptances(&outbox)?,
            false => drop(self.publish(&outbox)?),
        }
        stopwatch.lap(Stage::Publish);
        fault_point::reached("after publish");
        let granted = self.grant_at_once(&plan, &catalogue, &mut transaction)?;
        transaction.commit()?;
        stopwatch.lap(Stage::Commit);
        self.report(batch, &plan, &catalogue);
        if accepts {
            self.confirm_acceptances(&outbox)?;
        }
        // By then its client has heard of it, and not after it has been told that it runs.
        for (queue, job_id, at) in granted {
            Findings::hand_over(self.common.findings.of_turns(&queue), job_id, at);
        }
        self.write_out(plan.announcements, HashMap::new(), announcements)?;
        Ok(Committed {
            concerns_turns: plan.concerns_turns,
            with_course: !plan.with_course.is_disjoint(&plan.ending),
            ending: plan.ending.into_iter().collect(),
            waits: plan.waits,
            stalled: plan.stalled,
            ended_before,
            given_up: plan.given_up,
        })
    }

    /// Writes what has become of the jobs, and what is kept of them beside that.
    fn write(
        &self,
        batch: &[Item],
        plan: &Plan<'_>,
        now: Timestamp,
        transaction: &mut Transaction<'_>,
    ) -> Result<(), Trouble> {
        transaction.write(&plan.transitions, &plan.series, now)?;
        self.keep_submissions(batch, plan, transaction)?;
        note_submissions(plan, transaction)?;
        self.forget_kept(plan, transaction)
    }

    /// Keeps what clients have submitted with this batch, where that is wanted.
    fn keep_submissions(
        &self,
        batch: &[Item],
        plan: &Plan<'_>,
        transaction: &mut Transaction<'_>,
    ) -> Result<(), Trouble> {
        if self.common.service.config.keep_inputs.is_zero() {
            return Ok(());
        }
        let accepted = plan.reports.iter().filter(|report| {
            matches!(
                report.event,
                Event::Submitted { .. } | Event::Held { what: None, .. }
            )
        });
        let messages: Vec<_> = accepted
            .filter_map(|report| {
                let sender = match report.command {
                    Command::Submit(submission) => submission.sender.as_deref(),
                    _ => None,
                };
                Some((report.subject.id, batch[report.place].body()?, sender))
            })
            .collect();
        if messages.is_empty() {
            return Ok(());
        }
        for job_id in transaction.keep_submissions(&messages)? {
            warn!("job {job_id}: what was submitted is too large to be kept");
        }
        Ok(())
    }

    /// Deletes what is kept of jobs for clients that have given them up.
    fn forget_kept(
        &self,
        plan: &Plan<'_>,
        transaction: &mut Transaction<'_>,
    ) -> Result<(), Trouble> {
        let config = &self.common.service.config;
        // Else it is forgotten anyway.
        let keeps = !config.keep_results.is_zero() || !config.keep_inputs.is_zero();
        if keeps && !plan.given_up.is_empty() {
            transaction.forget_kept(&plan.given_up)?;
        }
        Ok(())
    }

    /// Grants a task that has just begun to wait its turn where there is room and nothing else waits:
    /// its way to the queue is shorter by a thread and a commit. Last in the transaction, so that
    /// the queues are locked for the time of its commit alone.
    fn grant_at_once(
        &self,
        plan: &Plan<'_>,
        catalogue: &Catalogue,
        transaction: &mut Transaction<'_>,
    ) -> Result<Vec<(String, Uuid, Timestamp)>, Trouble> {
        let service = self.common.service;
        let mut granted = Vec::new();
        for (queue, job_id) in plan.single_newcomers() {
            // Else there may be tasks that have not waited and take room all the same.
            if service.counted.get() != service.limits.get() {
                break;
            }
            let defined = catalogue.queue_limits();
            let defined = defined.get(queue).copied().unwrap_or_default();
            if let Some(limit) = transaction.try_lock_queue(queue, job_id, defined)?
                && limit.room(&transaction.handed_over(queue)?) > 0
            {
                let turns = transaction.grant(queue, &[(job_id, Uuid::new_v4())])?;
                granted.extend(turns.into_iter().map(|(id, at)| (queue.to_owned(), id, at)));
            }
        }
        Ok(granted)
    }

    fn decide<'a>(
        &self,
        batch: &'a [Item],
        loaded: &'a Loaded,
        catalogue: &'a Catalogue,
    ) -> Plan<'a> {
        let common = self.common;
        // The watchdog and the log of a panic name the job.
        let asked = asked(batch).inspect(|asked| {
            self.watched.decides(asked.job_id, asked.command.name());
            fault_point::reached(asked.command.reference());
        });
        let is_closed = |queue: &str| {
            !common.closed.is_empty() && {
                let queue = Destination::TaskQueue(queue.to_owned());
                common.closed.is_closed(&queue, Instant::now())
            }
        };
        let limits = common.service.limits.get();
        let has_limits = |queue: &str| limits.contains_key(queue);
        let context = || Context {
            now: loaded.now,
            session_begun: loaded.session_begun,
            new_task_id: Uuid::new_v4(),
            catalogue,
            is_closed: &is_closed,
            has_limits: &has_limits,
            rules: &common.service.rules,
        };
        let plan = batch::decide(asked, &loaded.states, context);
        self.watched.goes_on();
        plan
    }

    /// Logs and counts what has been committed.
    fn report(&self, batch: &[Item], plan: &Plan<'_>, catalogue: &Catalogue) {
        let common = self.common;
        for report in &plan.reports {
            common
                .service
                .metrics
                .message(batch[report.place].inbox(), &report.event);
            report::log(report);
            if let Event::Suspected { .. } = report.event {
                // Full when it has been woken already.
                let _ = common.inquiry.try_send(());
            }
        }
        let known = |workflow: &str| catalogue.definition(workflow).is_some();
        plan.ended()
            .for_each(|ended| common.service.metrics.job_ended(ended, known));
        plan.ended_attempts().for_each(|(workflow, attempt)| {
            let metrics = &common.service.metrics;
            metrics.step_ended(workflow, attempt, known);
        });
    }
}

/// What follows from a committed batch; each field as in [`Plan`].
struct Committed {
    ending: Vec<Uuid>,
    /// Whether some of them have a course.
    with_course: bool,
    /// As in the plan.
    concerns_turns: bool,
    waits: Vec<Wait>,
    stalled: Vec<Stalled>,
    /// Of those of them whose outcome had been committed before, what that was.
    ended_before: HashMap<Uuid, Outcome>,
    /// As in the plan.
    given_up: Vec<Uuid>,
}

/// What became of the results of these jobs that are not in their clients' queues.
fn untaken(
    batch: &[Item],
    announced: &[Uuid],
    unavailable: &Unavailable<'_>,
    ended_before: &HashMap<Uuid, Outcome>,
) -> Vec<(Uuid, Delivery)> {
    let mut untaken = BTreeMap::new();
    for item in batch.iter().filter(|item| item.untold_output.is_some()) {
        if let Some((job_id, _)) = &item.job
            && announced.contains(job_id)
            // Else it is what a step has left, or Postgres has refused it.
            && ended_before.get(job_id) == Some(&Outcome::Succeeded)
        {
            untaken.insert(*job_id, Delivery::Refused);
        }
    }
    if unavailable.gone.is_empty() {
        return untaken.into_iter().collect();
    }
    let queues = announced.iter().map(|id| (wire::result_queue(*id), *id));
    let queues: HashMap<_, _> = queues.collect();
    // What has waited here has not been told before.
    let waited = batch.iter().filter(|item| item.has_waited);
    let waited: BTreeSet<_> = waited
        .filter_map(|item| Some(item.job.as_ref()?.0))
        .collect();
    for (queue, delivery) in &unavailable.gone {
        let Some(job_id) = queues.get(queue) else {
            continue;
        };
        let may_have_been_told = ended_before.contains_key(job_id) && !waited.contains(job_id);
        let delivery = match delivery {
            Delivery::NoQueue if may_have_been_told => Delivery::NoQueueAgain,
            other => *other,
        };
        untaken.entry(*job_id).or_insert(delivery);
    }
    untaken.into_iter().collect()
}

/// The outcomes of the jobs that end now, and had been committed before.
fn ended_before(plan: &Plan<'_>, loaded: &Loaded) -> HashMap<Uuid, Outcome> {
    let ending = plan.ending.iter();
    let ended = ending.filter_map(|id| match loaded.states.get(id)? {
        State::Ending(ending) => Some((*id, ending.ended.outcome)),
        State::Unknown | State::Live(_) | State::Ended(_) => None,
    });
    ended.collect()
}

/// Notes who has had the jobs of this batch submitted that are not their clients' own.
fn note_submissions(plan: &Plan<'_>, transaction: &mut Transaction<'_>) -> Result<(), Trouble> {
    let requested = plan.reports.iter().filter_map(|report| {
        let is_news = matches!(
            report.event,
            Event::Submitted { .. } | Event::Held { .. } | Event::Ended(_)
        );
        let Requested { by, again } = requested(report.command).filter(|_| is_news)?;
        Some((report.subject.id, by, *again))
    });
    let requested: Vec<_> = requested.collect();
    match requested.is_empty() {
        true => Ok(()),
        false => Ok(transaction.note_submissions(&requested)?),
    }
}

fn requested(command: &Command) -> Option<&Requested> {
    match command {
        Command::Submit(submission) => submission.requested.as_deref(),
        _ => None,
    }
}

/// The input ESDLs that the batch's tasks need and that are in the database. So many that they
/// should not be in memory at once are too much for one batch.
fn kept_inputs(
    plan: &Plan<'_>,
    transaction: &mut Transaction<'_>,
) -> Result<HashMap<Uuid, String>, Trouble> {
    let jobs: Vec<_> = plan.jobs_that_need_their_input().collect();
    if jobs.is_empty() {
        return Ok(HashMap::new());
    }
    if jobs.len() > 1 && transaction.size_of_inputs(&jobs)? > MAX_BATCH_BYTES {
        let many = jobs.len();
        return Err(Trouble::TooMuch(anyhow!(
            "{many} steps are tried again whose ESDLs are large"
        )));
    }
    Ok(transaction.inputs(&jobs)?)
}

/// What a batch asks for.
fn asked(batch: &[Item]) -> impl Iterator<Item = Asked<'_>> {
    batch.iter().enumerate().filter_map(|(place, item)| {
        let (job_id, command) = item.job.as_ref()?;
        Some(Asked {
            place,
            job_id: *job_id,
            command,
            has_waited: item.has_waited,
        })
    })
}
