//! The way of a message once it is here: decode, lock, load, decide, write, publish, commit, tell,
//! settle, acknowledge; a batch at a time, in one Postgres transaction each.

use std::any::Any;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, at, never, select_biased};
use jiff::Timestamp;
use log::{debug, error, info, warn};
use uuid::Uuid;

use self::item::{Item, Waiting};
pub use self::watched::Watched;
use crate::broker::{Delivered, Handled, PublishError, Publisher, Received};
use crate::celery;
use crate::fault_point;
use crate::job::{self, Command, Ending, Event, Publication, Rules, State, TimeSeries};
use crate::metrics::{Metrics, Stage};
use crate::report::{self, Subject, one_line};
use crate::store::{Connection, Loaded, Series, SeriesChanges, Store, StoreError, Transition};
use crate::wire::{self, Inbox, Outgoing};
use crate::workflow::CurrentCatalogue;

mod item;
mod watched;

/// A batch ends at whichever comes first.
pub const MAX_BATCH_MESSAGES: usize = 200;
const MAX_BATCH_BYTES: usize = 8 * 1024 * 1024;
/// Waits between attempts while Postgres does not work.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// When Postgres has not worked for so long, a replica lets go of its messages: others may have one
/// that does.
const CUT_OFF: Duration = Duration::from_secs(20);

/// Something to handle.
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all of it is messages, which should not take a detour"
)]
pub enum Work {
    /// A message, which is to be acknowledged.
    Message { inbox: Inbox, received: Received },
    /// What the service itself has found out about a job.
    Finding { job_id: Uuid, command: Command },
    /// The workflow definitions have changed, and all clients are to be told.
    Announce,
}

/// Which of `handlers` threads a job's work goes to: always the same, which keeps its order.
pub fn index(job_id: Uuid, handlers: usize) -> usize {
    // The low bits of a random id, and as good for others.
    job_id.as_u64_pair().1 as usize % handlers
}

/// What all handler threads share.
pub struct Setting<'s> {
    pub store: &'s Store,
    pub catalogue: &'s CurrentCatalogue,
    pub celery_sender: &'s celery::Sender,
    /// Lamport clock of the revokes, rising for the process's lifetime.
    pub revoke_clock: &'s AtomicI64,
    pub rules: &'s Rules,
    pub metrics: &'s Metrics,
    /// Nudges whoever asks the workers about suspected starts.
    pub inquiry: Sender<()>,
    /// The queue behind each inbox.
    pub queue_names: &'s HashMap<Inbox, String>,
}

/// The channels that one handler thread publishes on.
pub struct Publishers<'s> {
    pub sdk: Publisher<'s>,
    pub celery: Publisher<'s>,
    /// To the vhost of the workers' events, for its dead letters.
    pub task: Publisher<'s>,
}

/// One handler thread's part of the session.
pub struct Handler<'s> {
    setting: &'s Setting<'s>,
    watched: &'s Watched,
    publishers: Publishers<'s>,
    /// Where it is told what became of a message.
    done: HashMap<Inbox, Sender<Handled>>,
    waiting: Waiting,
    connection: Option<Connection>,
    /// Task queues known to exist.
    declared: HashSet<String>,
}

/// Why a batch did not go through.
enum Trouble {
    /// Postgres does not work for this replica; the same batch may go through later.
    Database(anyhow::Error),
    /// Postgres works, and somebody else holds a lock: it would be no better with another replica.
    Locked(anyhow::Error),
    /// Less of it may go through.
    TooMuch(anyhow::Error),
    /// Something in the batch is refused.
    Refused { reason: String, by: Refuser },
    /// The session is at its end.
    Session(anyhow::Error),
    /// The service is stopping, and the batch was not done.
    Stopped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refuser {
    Broker,
    Database,
    /// A panic.
    Ourselves,
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Transient(error) | StoreError::TooLong(error) => Trouble::Database(error),
            StoreError::Locked(error) => Trouble::Locked(error),
            StoreError::TooMuch(error) => Trouble::TooMuch(error),
            StoreError::Refused(reason) => Trouble::Refused {
                reason,
                by: Refuser::Database,
            },
        }
    }
}

impl From<PublishError> for Trouble {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::Lost(error) => Trouble::Session(error),
            PublishError::Refused(reason) => Trouble::Refused {
                reason,
                by: Refuser::Broker,
            },
        }
    }
}

impl<'s> Handler<'s> {
    pub fn new(
        setting: &'s Setting<'s>,
        watched: &'s Watched,
        publishers: Publishers<'s>,
        done: HashMap<Inbox, Sender<Handled>>,
    ) -> Handler<'s> {
        Handler {
            setting,
            watched,
            publishers,
            done,
            waiting: Waiting::default(),
            connection: None,
            declared: HashSet::new(),
        }
    }

    /// Handles messages and findings, until `stop` is disconnected; the messages that are then
    /// still waiting go back to the broker. So do those whose outcome is committed and waits to be
    /// told: their next time here is like the one after a crash.
    ///
    /// # Errors
    /// The session is at its end.
    pub fn run(
        mut self,
        messages: &Receiver<Work>,
        findings: &Receiver<Work>,
        stop: &Receiver<Infallible>,
    ) -> anyhow::Result<()> {
        loop {
            let due = self.waiting.next_due().map_or_else(never, at);
            self.watched.waits();
            let first = select_biased! {
                recv(stop) -> _ => return Ok(()),
                // Each comes once more only, and so leaves room for others.
                recv(due) -> _ => None,
                // Few, and a long backlog is not to hold them up.
                recv(findings) -> work => Some(work),
                recv(messages) -> work => Some(work),
            };
            let mut batch = Vec::new();
            let mut bytes = 0;
            let mut take = |item: Item| {
                bytes += item.size();
                batch.push(item);
                batch.len() < MAX_BATCH_MESSAGES && bytes < MAX_BATCH_BYTES
            };
            let mut has_room = match first {
                None => true,
                Some(Ok(first)) => take(Item::new(first, self.watched)),
                // Whoever sends them is gone: the session is at its end.
                Some(Err(_)) => return Ok(()),
            };
            while has_room {
                let next = self.waiting.take_due(self.watched).or_else(|| {
                    let work = findings.try_recv().or_else(|_| messages.try_recv());
                    Some(Item::new(work.ok()?, self.watched))
                });
                let Some(next) = next else { break };
                has_room = take(next);
            }
            match self.handle(&mut batch, stop) {
                Ok(()) => {}
                Err(Trouble::Refused { reason, by }) => {
                    self.handle_one_by_one(batch, &reason, by, stop)?;
                    continue;
                }
                Err(trouble) => return trouble.end(),
            }
            self.setting.metrics.batch(batch.len());
            batch.into_iter().for_each(|item| self.finish(item));
        }
    }

    /// The way out when something in a batch is refused: each message on its own, so that the
    /// faultless ones go through and the culprit is known.
    fn handle_one_by_one(
        &mut self,
        batch: Vec<Item>,
        reason: &str,
        by: Refuser,
        stop: &Receiver<Infallible>,
    ) -> anyhow::Result<()> {
        let alone = batch.len() == 1;
        for mut item in batch {
            let mut outcome = if alone {
                Err(Trouble::Refused {
                    reason: reason.to_owned(),
                    by,
                })
            } else {
                self.handle(std::slice::from_mut(&mut item), stop)
            };
            // What can be done about its job, then only about the message itself.
            for step in [Item::give_up, Item::give_up_job] {
                match outcome {
                    Err(Trouble::Refused { reason, by }) => step(&mut item, reason, by),
                    Ok(()) | Err(_) => break,
                }
                outcome = self.handle(std::slice::from_mut(&mut item), stop);
            }
            match outcome {
                Ok(()) => {}
                Err(Trouble::Refused { reason, .. }) => error!(
                    "{}: the message of {} bytes cannot even be put aside and is dropped: {}",
                    item.label(),
                    item.work.size(),
                    one_line(&reason)
                ),
                Err(trouble) => return trouble.end(),
            }
            self.finish(item);
        }
        Ok(())
    }

    /// Takes a batch through, with as many attempts as Postgres needs.
    fn handle(&mut self, batch: &mut [Item], stop: &Receiver<Infallible>) -> Result<(), Trouble> {
        let mut pause = FIRST_RETRY;
        let mut trouble_since = None;
        loop {
            // A fault of ours that one message brings to light must not hold up the others.
            let attempt = catch_unwind(AssertUnwindSafe(|| self.attempt(batch)));
            self.watched.goes_on();
            if !matches!(attempt, Ok(Ok(()))) {
                batch.iter_mut().for_each(Item::repeat);
            }
            let trouble = match attempt {
                Ok(Err(Trouble::TooMuch(error))) if batch.len() > 1 => {
                    debug!("a batch is divided: {error:#}");
                    return self.handle_in_halves(batch, stop);
                }
                Ok(Err(Trouble::Locked(error))) => {
                    trouble_since = None;
                    error
                }
                Ok(Err(Trouble::Database(error) | Trouble::TooMuch(error))) => {
                    let since = trouble_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= CUT_OFF {
                        return Err(Trouble::Session(error.context(
                            "what is in hand is left to other replicas until Postgres works again",
                        )));
                    }
                    error
                }
                Ok(done) => {
                    self.watched.set_trouble(None);
                    return done;
                }
                Err(panic) => {
                    return Err(Trouble::Refused {
                        reason: fault_in_ourselves(&*panic),
                        by: Refuser::Ourselves,
                    });
                }
            };
            if pause == FIRST_RETRY {
                warn!("messages wait for Postgres: {trouble:?}");
            } else {
                debug!("messages still wait for Postgres: {trouble:#}");
            }
            self.watched.set_trouble(Some(format!("{trouble:#}")));
            self.watched.waits();
            match stop.recv_timeout(pause.mul_f64(0.5 + fastrand::f64())) {
                Err(RecvTimeoutError::Timeout) => pause = (pause * 2).min(LAST_RETRY),
                Err(RecvTimeoutError::Disconnected) => return Err(Trouble::Stopped),
                Ok(never) => match never {},
            }
        }
    }

    /// Takes a batch through that is too much at once, each half after the other, which keeps the
    /// order of a job's messages.
    fn handle_in_halves(
        &mut self,
        batch: &mut [Item],
        stop: &Receiver<Infallible>,
    ) -> Result<(), Trouble> {
        let (first, second) = batch.split_at_mut(batch.len() / 2);
        let outcome = match self.handle(first, stop) {
            Ok(()) => self.handle(second, stop),
            Err(trouble) => Err(trouble),
        };
        if outcome.is_err() {
            // The first half may have been committed.
            batch.iter_mut().for_each(Item::repeat);
        }
        outcome
    }

    fn attempt(&mut self, batch: &mut [Item]) -> Result<(), Trouble> {
        let mut told = Outbox::default();
        for item in &*batch {
            self.put_aside(item, &mut told);
        }
        if batch.iter().all(|item| item.job.is_none()) {
            return self.publish(&told);
        }
        self.watched.waits_for_postgres();
        // Dropped on any error, and closed if it was the connection's.
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.setting.store.connection()?,
        };
        let Committed { ending, waiting } = self.transact(batch, &mut told, &mut connection)?;
        fault_point::reached("after commit");
        let mut stopwatch = self.setting.metrics.stopwatch();
        self.publish(&told)?;
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

    /// What a message causes beside its job.
    fn put_aside(&self, item: &Item, outbox: &mut Outbox) {
        let setting = self.setting;
        if item.list_workflows {
            setting.metrics.workflows_told();
            debug!("telling clients the workflows");
            let catalogue = setting.catalogue.get();
            outbox
                .sdk
                .push(wire::available_workflows(catalogue.announcement()));
        }
        if let Some((inbox, received, reason)) = item.letter() {
            let queue = &setting.queue_names[&inbox];
            setting.metrics.dead_letter(inbox);
            warn!(
                "{}: put into {}: {}",
                item.label(),
                wire::DEAD_LETTERS_QUEUE,
                one_line(reason)
            );
            let letter = wire::dead_letter(
                queue,
                reason,
                Timestamp::now(),
                received.properties(),
                received.body.clone(),
            );
            match inbox {
                Inbox::Submissions | Inbox::Cancels | Inbox::WorkflowRequests => {
                    outbox.sdk.push(letter);
                }
                Inbox::Progress | Inbox::Results => outbox.task.push(letter),
            }
        }
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
        })
    }

    fn write_out(&self, publication: Publication<'_>, outbox: &mut Outbox) {
        match publication {
            Publication::Task {
                job_id,
                task_id,
                submission,
            } => {
                let sender = self.setting.celery_sender;
                outbox.tasks_for.insert(submission.workflow_type.clone());
                outbox
                    .celery
                    .push(celery::task(sender, job_id, task_id, submission));
            }
            Publication::Revoke { task_id } => {
                let clock = self.setting.revoke_clock.fetch_add(1, Ordering::Relaxed);
                // The workers' clocks are held against it, which Postgres's has nothing to do with.
                let revoke = celery::revoke(&task_id, clock, Timestamp::now());
                outbox.celery.push(revoke);
            }
            Publication::Status { job_id, status } => {
                outbox.sdk.push(wire::status_update(job_id, status));
            }
            Publication::Progress {
                job_id,
                fraction,
                message,
            } => outbox
                .sdk
                .push(wire::progress_update(job_id, fraction, message)),
            Publication::Result {
                job_id,
                result_type,
                output_esdl,
                logs,
                esdl_messages,
            } => outbox.sdk.push(wire::job_result(
                job_id,
                result_type,
                output_esdl,
                &logs,
                esdl_messages,
            )),
        }
    }

    fn publish(&mut self, outbox: &Outbox) -> Result<(), Trouble> {
        self.watched.waits();
        let published = self.publish_all(outbox);
        self.watched.goes_on();
        if let Err(Trouble::Refused { .. }) = published {
            let Publishers { sdk, celery, task } = &mut self.publishers;
            [sdk, celery, task].into_iter().for_each(Publisher::abandon);
        }
        if published.is_err() {
            // What follows is a rollback.
            self.watched.waits_for_postgres();
        }
        published
    }

    fn count_published<'d>(&self, outcomes: impl Iterator<Item = &'d Delivered>) {
        let [mut confirmed, mut unroutable, mut rejected] = [0; 3];
        for outcome in outcomes {
            match outcome {
                Delivered::Yes => confirmed += 1,
                Delivered::Unroutable => unroutable += 1,
                Delivered::Rejected => rejected += 1,
            }
        }
        let metrics = self.setting.metrics;
        metrics.published("confirmed", confirmed);
        metrics.published("unroutable", unroutable);
        metrics.published("rejected", rejected);
    }

    /// Publishes it all and waits for the confirms, of all connections at once.
    fn publish_all(&mut self, outbox: &Outbox) -> Result<(), Trouble> {
        for queue in &outbox.tasks_for {
            self.declare(queue)?;
        }
        let Publishers { sdk, celery, task } = &mut self.publishers;
        celery.send(&outbox.celery)?;
        sdk.send(&outbox.sdk)?;
        task.send(&outbox.task)?;
        // All of them before any is looked at, lest a confirm be taken for the next batch's.
        let (to_celery, to_sdk, to_task) = (celery.confirm(), sdk.confirm(), task.confirm());
        let (to_celery, to_sdk, to_task) = (to_celery?, to_sdk?, to_task?);
        let outcomes = [&to_celery, &to_sdk, &to_task].into_iter().flatten();
        self.count_published(outcomes);
        let to_celery = undelivered(&outbox.celery, &to_celery);
        let to_sdk = undelivered(&outbox.sdk, &to_sdk);
        let to_task = undelivered(&outbox.task, &to_task);
        if let Some(task) = to_celery
            .rejected
            .iter()
            .find(|task| task.exchange.is_empty())
        {
            return Err(Trouble::Refused {
                reason: format!("the task queue {:?} takes nothing more", task.routing_key),
                by: Refuser::Broker,
            });
        }
        if !to_celery.unroutable.is_empty() {
            self.publish_tasks_again(&to_celery.unroutable)?;
        }
        let mut results = to_sdk.unroutable;
        for message in to_sdk.rejected.into_iter().chain(to_task.rejected) {
            if message.routing_key == wire::DEAD_LETTERS_QUEUE {
                let error = anyhow!("{} takes nothing more", wire::DEAD_LETTERS_QUEUE);
                return Err(Trouble::Session(error));
            }
            warn!("a queue for {} takes nothing more", message.routing_key);
            if message.mandatory {
                results.push(message);
            }
        }
        if !results.is_empty() {
            self.publish_by_queue_name(&results)?;
        }
        Ok(())
    }

    fn declare(&mut self, queue: &str) -> Result<(), Trouble> {
        if !self.declared.contains(queue) {
            self.publishers.celery.declare_task_queue(queue)?;
            self.declared.insert(queue.to_owned());
        }
        Ok(())
    }

    /// A task comes back when somebody has deleted its queue since it was declared.
    fn publish_tasks_again(&mut self, tasks: &[Outgoing]) -> Result<(), Trouble> {
        for task in tasks {
            warn!(
                "the task queue {:?} was deleted; it is declared again",
                task.routing_key
            );
            self.declared.remove(&task.routing_key);
            self.declare(&task.routing_key)?;
        }
        let outcome = self.publishers.celery.publish(tasks)?;
        match undelivered(tasks, &outcome).unroutable.first() {
            None => Ok(()),
            Some(task) => Err(Trouble::Session(anyhow!(
                "the task queue {:?} was deleted again right after it was declared",
                task.routing_key
            ))),
        }
    }

    /// A broker restart takes the bindings of clients that are offline, while their queues stay:
    /// these can still be reached through the default exchange.
    fn publish_by_queue_name(&mut self, results: &[Outgoing]) -> Result<(), Trouble> {
        let results: Vec<_> = results
            .iter()
            .map(|result| Outgoing {
                exchange: "",
                ..result.clone()
            })
            .collect();
        let outcome = self.publishers.sdk.publish(&results)?;
        let left = undelivered(&results, &outcome);
        for result in left.unroutable {
            info!("nobody is waiting any more in {}", result.routing_key);
        }
        for result in left.rejected {
            warn!("{} takes no result", result.routing_key);
        }
        Ok(())
    }

    /// Lets go of an item that is through, or keeps it until its client may be told.
    fn finish(&mut self, item: Item) {
        let (inbox, handled) = match (item.wait, &item.work) {
            (Some(wait), _) => {
                debug!("{}: it waits for its client for {wait:?}", item.label());
                match self.waiting.add(item, wait) {
                    Some((inbox, tag)) => (inbox, Handled::Released(tag)),
                    None => return,
                }
            }
            (None, Work::Message { inbox, received }) => (*inbox, Handled::Done(received.tag)),
            (None, Work::Finding { .. } | Work::Announce) => return,
        };
        if let Some(done) = self.done.get(&inbox) {
            // The consumer is gone when the session is; then the broker delivers again.
            let _ = done.send(handled);
        }
    }
}

/// What comes of a batch that is committed.
struct Committed {
    /// The jobs that are at their end when their clients have been told.
    ending: Vec<Uuid>,
    waiting: Vec<Waits>,
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

impl Work {
    /// Bytes that it holds.
    fn size(&self) -> usize {
        match self {
            Work::Message { received, .. } => received.body.len(),
            Work::Finding { .. } | Work::Announce => 0,
        }
    }
}

/// What is said of a message that has made us panic.
fn fault_in_ourselves(panic: &(dyn Any + Send)) -> String {
    format!("a fault in the orchestrator: {}", panic_text(panic))
}

/// What a panic said.
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("without a text")
}

/// What a batch publishes, by connection.
#[derive(Default)]
struct Outbox {
    sdk: Vec<Outgoing>,
    celery: Vec<Outgoing>,
    task: Vec<Outgoing>,
    /// The queues of the tasks among them.
    tasks_for: BTreeSet<String>,
}

/// The messages of a batch that did not arrive.
#[derive(Default)]
struct Undelivered {
    unroutable: Vec<Outgoing>,
    rejected: Vec<Outgoing>,
}

fn undelivered(messages: &[Outgoing], outcome: &[Delivered]) -> Undelivered {
    let mut left = Undelivered::default();
    for (message, delivered) in messages.iter().zip(outcome) {
        match delivered {
            Delivered::Yes => {}
            Delivered::Unroutable => left.unroutable.push(message.clone()),
            Delivered::Rejected => left.rejected.push(message.clone()),
        }
    }
    left
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

impl Trouble {
    /// What is left to do about trouble that no retry helps against.
    fn end(self) -> anyhow::Result<()> {
        match self {
            Trouble::Stopped => Ok(()),
            Trouble::Session(error)
            | Trouble::Database(error)
            | Trouble::Locked(error)
            | Trouble::TooMuch(error) => Err(error),
            Trouble::Refused { reason, .. } => bail!(reason),
        }
    }
}
