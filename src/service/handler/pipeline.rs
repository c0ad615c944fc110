//! One attempt at a batch: lock, load, decide, write, publish, commit, tell, settle.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use log::debug;
use uuid::Uuid;

use super::closed::{Destination, Side};
use super::failure::Trouble;
use super::item::Item;
use super::outbox::Outbox;
use super::{Handler, MAX_BATCH_BYTES, Setting, letters};
use crate::domain::job::{self, Command, Ending, Event, Publication, State, TimeSeries};
use crate::fault_point;
use crate::store::{Connection, Loaded, Series, SeriesChanges, Transition};
use crate::telemetry::metrics::Stage;
use crate::telemetry::report::{self, Subject};
use crate::wire;

impl Handler<'_> {
    pub(super) fn attempt(&mut self, batch: &mut [Item]) -> Result<(), Trouble> {
        let mut told = Outbox::default();
        for item in &mut *batch {
            item.waits_for = None;
            if item.list_workflows {
                self.setting.metrics.workflows_told();
                debug!("telling clients the workflows");
                let catalogue = self.setting.catalogue.get();
                let announcement = wire::available_workflows(catalogue.announcement());
                told.sdk.push(announcement);
            }
        }
        if batch.iter().all(|item| item.job.is_none()) {
            self.publish(&told)?;
        } else {
            self.attempt_jobs(batch, &mut told)?;
        }
        self.put_aside(batch)
    }

    fn attempt_jobs(&mut self, batch: &mut [Item], told: &mut Outbox) -> Result<(), Trouble> {
        self.watched.waits_for_postgres();
        // Dropped on any error, and closed if it was the connection's.
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.setting.store.connection()?,
        };
        let Committed {
            ending,
            waiting,
            stalled,
        } = self.transact(batch, told, &mut connection)?;
        for (place, queue) in stalled {
            batch[place].waits_for = Some(queue);
        }
        fault_point::reached("after commit");
        let mut stopwatch = self.setting.metrics.stopwatch();
        self.publish(told)?;
        stopwatch.lap(Stage::Tell);
        fault_point::reached("after telling");
        if !ending.is_empty() {
            self.watched.waits_for_postgres();
            connection.settle(&ending)?;
            self.watched.goes_on();
            stopwatch.lap(Stage::Settle);
            fault_point::reached("after settling");
        }
        self.connection = Some(connection);
        for Waits {
            place,
            wait,
            refusal,
        } in waiting
        {
            let item = &mut batch[place];
            item.wait = Some(wait);
            if let Some(logs) = refusal {
                item.is_refused(logs);
            }
        }
        Ok(())
    }

    /// Puts aside those messages of a batch that are to be; those that cannot be for now wait.
    fn put_aside(&mut self, batch: &mut [Item]) -> Result<(), Trouble> {
        let Setting {
            closed,
            metrics,
            queue_names,
            ..
        } = self.setting;
        for side in Side::ALL {
            let (mut items, letters): (Vec<_>, Vec<_>) = batch
                .iter_mut()
                .filter(|item| item.waits_for.is_none())
                .filter(|item| item.inbox().map(Side::of) == Some(side))
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
            let queue = Destination::DeadLetters(side);
            let mut outcome = vec![Some(String::new()); items.len()];
            if !closed.is_closed(&queue, Instant::now()) {
                self.watched.waits();
                outcome = letters::put_aside(self.publishers.towards(side), &letters)?;
                self.watched.goes_on();
                let refused = outcome.iter().flatten().count();
                metrics.published("confirmed", outcome.len() - refused);
                metrics.published("rejected", refused);
                let now = Instant::now();
                if outcome.contains(&None) {
                    closed.took(&queue, now);
                }
                if let Some(why) = outcome.iter().flatten().next() {
                    closed.close(self.number, &queue, why, now);
                }
            }
            for (item, why) in items.iter_mut().zip(outcome) {
                if why.is_none() {
                    item.is_put_aside(metrics);
                }
                // Where its client is to be told of its job later, it comes once more anyway.
                if item.wait.is_none() {
                    item.job = None;
                    item.list_workflows = false;
                    item.waits_for = why.map(|_| queue.clone());
                }
            }
        }
        Ok(())
    }

    /// Decides about a batch and commits that. Adds to `told` what clients are to hear of it now.
    fn transact(
        &mut self,
        batch: &[Item],
        told: &mut Outbox,
        connection: &mut Connection,
    ) -> Result<Committed, Trouble> {
        let setting = self.setting;
        let catalogue = setting.catalogue.get();
        let jobs = || {
            let items = batch.iter().enumerate();
            items.filter_map(|(place, item)| Some((place, item, item.job.as_ref()?)))
        };
        let ids: Vec<Uuid> = jobs()
            .map(|(_, _, (id, _))| *id)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();

        let mut stopwatch = setting.metrics.stopwatch();
        let mut transaction = connection.transaction()?;
        self.watched.postgres.touch();
        transaction.lock(&ids)?;
        stopwatch.lap(Stage::Lock);
        self.watched.postgres.touch();
        let Loaded {
            states: before,
            now,
            session_begun,
        } = transaction.load(&ids)?;
        self.watched.goes_on();
        stopwatch.lap(Stage::Load);

        let mut after: HashMap<Uuid, State> = HashMap::new();
        let mut ending = BTreeSet::new();
        let mut outbox = Outbox::default();
        let mut series = SeriesChanges::default();
        let mut events = Vec::new();
        let mut waiting = Vec::new();
        let mut stalled = Vec::new();
        for (place, item, (id, command)) in jobs() {
            let state = after
                .get(id)
                .or_else(|| before.get(id))
                .unwrap_or(&State::Unknown);
            let settled;
            let state = match state {
                // It will be told and settled with this batch.
                State::Ending(job) if ending.contains(id) => {
                    settled = State::Ended(job.ended.clone());
                    &settled
                }
                state => state,
            };
            let context = job::Context {
                now,
                session_begun,
                new_task_id: Uuid::new_v4(),
                catalogue: &catalogue,
                rules: setting.rules,
            };
            self.watched.decides(*id, command.name());
            fault_point::reached(command.reference());
            let decision = job::decide(*id, state, command, &context);
            if let Some(queue) = self.closed_for(&decision.publications) {
                stalled.push((place, queue));
                continue;
            }
            if !decision.wait.is_zero() {
                waiting.push(Waits::new(place, command, &decision));
            } else if !decision.announcements.is_empty() {
                ending.insert(*id);
            }
            for publication in decision.publications {
                self.write_out(publication, &mut outbox);
            }
            for announcement in decision.announcements {
                // A task is revoked at once, and so has been when the outcome's time has come.
                let is_now = match announcement.tells_outcome() {
                    true => decision.wait.is_zero(),
                    false => !item.has_waited,
                };
                if is_now {
                    self.write_out(announcement, told);
                }
            }
            if let Some(change) = decision.time_series {
                note_series(*id, change, &mut series);
            }
            let state = decision.next.as_ref().unwrap_or(state);
            let reference = match state.reference() {
                "" => command.reference(),
                reference => reference,
            };
            let workflow = state.workflow_type().or(command.workflow_type());
            let subject = Subject {
                id: *id,
                reference: reference.to_owned(),
                workflow: workflow.unwrap_or_default().to_owned(),
            };
            events.push((item, subject, decision.event, command));
            if let Some(next) = decision.next {
                after.insert(*id, next);
            }
        }

        let transitions: Vec<_> = after
            .iter()
            .map(|(id, after)| Transition {
                job_id: *id,
                before: before.get(id).unwrap_or(&State::Unknown),
                after,
            })
            .collect();
        stopwatch.lap(Stage::Decide);
        self.watched.waits_for_postgres();
        transaction.write(&transitions, &series, now)?;
        self.watched.goes_on();
        stopwatch.lap(Stage::Write);
        fault_point::reached("before publish");
        if batch.iter().map(|item| item.work.size()).sum::<usize>() > MAX_BATCH_BYTES {
            // Publishing may take more than the minute that a transaction may be idle.
            transaction.take_time()?;
        }
        // Only now, for what Postgres refuses must not have been asked of anybody. And before the
        // commit, for a task that is committed must have been published.
        self.publish(&outbox)?;
        stopwatch.lap(Stage::Publish);
        fault_point::reached("after publish");
        self.watched.waits_for_postgres();
        transaction.commit()?;
        self.watched.goes_on();
        stopwatch.lap(Stage::Commit);
        for (item, subject, event, command) in events {
            match event {
                // Its message has been counted and its end logged before it waited.
                Event::Ended(_) if item.has_waited => {}
                _ => {
                    setting.metrics.message(item.inbox(), &event);
                    report::log(&subject, &event, command);
                }
            }
            if let Event::Suspected { .. } = event {
                // Full when it has been nudged already.
                let _ = setting.inquiry.try_send(());
            }
        }
        for (id, state) in &after {
            let known = |workflow: &str| catalogue.definition(workflow).is_some();
            match (before.get(id), state) {
                // That it has ended is no news; what it is told may be another thing than before.
                (Some(State::Ending(_) | State::Ended(_)), _) => {}
                (_, State::Ending(Ending { ended, .. }) | State::Ended(ended)) => {
                    setting.metrics.job_ended(ended, known);
                }
                (_, State::Unknown | State::Live(_)) => {}
            }
        }
        Ok(Committed {
            ending: ending.into_iter().collect(),
            waiting,
            stalled,
        })
    }

    /// The task queue that takes none of these for now.
    fn closed_for(&self, publications: &[Publication<'_>]) -> Option<Destination> {
        let closed = self.setting.closed;
        if closed.is_empty() {
            return None;
        }
        let mut queues = publications.iter().filter_map(task_queue);
        queues.find(|queue| closed.is_closed(queue, Instant::now()))
    }
}

/// What comes of a batch that is committed.
struct Committed {
    /// The jobs that are at their end when their clients have been told.
    ending: Vec<Uuid>,
    waiting: Vec<Waits>,
    /// Messages, by their place in the batch, for which nothing was done, since a queue takes
    /// nothing for now.
    stalled: Vec<(usize, Destination)>,
}

/// An item of a batch whose outcome is not to be told yet.
struct Waits {
    /// Its place in the batch.
    place: usize,
    wait: Duration,
    /// With which logs, if it is a submission.
    refusal: Option<String>,
}

impl Waits {
    fn new(place: usize, command: &Command, decision: &job::Decision<'_>) -> Waits {
        let logs = || {
            let mut announcements = decision.announcements.iter();
            announcements.find_map(|announcement| match announcement {
                Publication::Result { logs, .. } => Some(logs.clone().into_owned()),
                Publication::Task { .. }
                | Publication::Revoke { .. }
                | Publication::Status { .. }
                | Publication::Progress { .. } => None,
            })
        };
        Waits {
            place,
            wait: decision.wait,
            refusal: matches!(command, Command::Submit(_)).then(logs).flatten(),
        }
    }
}

/// The queue that a publication is for, if it is a task.
fn task_queue(publication: &Publication<'_>) -> Option<Destination> {
    match publication {
        Publication::Task { submission, .. } => {
            Some(Destination::TaskQueue(submission.workflow_type.clone()))
        }
        Publication::Revoke { .. }
        | Publication::Status { .. }
        | Publication::Progress { .. }
        | Publication::Result { .. } => None,
    }
}

fn note_series(job_id: Uuid, change: TimeSeries<'_>, changes: &mut SeriesChanges) {
    match change {
        TimeSeries::Keep { esdl_id, reference } => changes.keep.push(Series {
            esdl_id,
            job_id,
            reference: reference.into_owned(),
        }),
        TimeSeries::RetireLate { esdl_id, reference } => changes.retire_late.push(Series {
            esdl_id,
            job_id,
            reference: reference.into_owned(),
        }),
        TimeSeries::Retire => changes.retire.push(job_id),
    }
}
