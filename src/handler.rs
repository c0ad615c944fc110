//! The way of a message once it is here: decode, lock, load, decide, write, publish, commit, tell,
//! settle, acknowledge; a batch at a time, in one Postgres transaction each.

use std::any::Any;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, select_biased};
use jiff::Timestamp;
use log::{debug, error, info, warn};
use uuid::Uuid;

use crate::broker::{Delivered, PublishError, Publisher, Received};
use crate::busy::Busy;
use crate::celery;
use crate::fault_point;
use crate::job::{self, Command, Ending, Publication, Rules, State, TimeSeries};
use crate::metrics::{Metrics, Stage};
use crate::report::{self, Subject, one_line};
use crate::store::{Connection, Series, SeriesChanges, Store, StoreError, Transition};
use crate::wire::{self, Inbox, Outgoing, Request};
use crate::workflow::CurrentCatalogue;

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
    /// The queue behind each inbox.
    pub queue_names: &'s HashMap<Inbox, String>,
}

/// What a handler thread is waiting for, for those who watch over it.
#[derive(Debug, Default)]
pub struct Watched {
    pub sdk: Busy,
    pub celery: Busy,
    pub task: Busy,
    pub postgres: Busy,
    /// Why its batch does not get through, and is tried again.
    pub trouble: Mutex<Option<String>>,
}

/// A handler that waits for longer than this may well have messages of a while ago in hand.
const HELD_UP: Duration = Duration::from_secs(2);

impl Watched {
    /// Whether its batch has been waiting for longer than usual.
    pub fn is_held_up(&self) -> bool {
        let mut waits = [&self.sdk, &self.celery, &self.task, &self.postgres].into_iter();
        let waits_long = waits.any(|busy| busy.for_how_long().is_some_and(|wait| wait > HELD_UP));
        let trouble = self.trouble.lock();
        waits_long || trouble.unwrap_or_else(PoisonError::into_inner).is_some()
    }

    pub fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }
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
    /// Where a message's tag goes when it is done with.
    done: HashMap<Inbox, Sender<u64>>,
    connection: Option<Connection>,
    /// Task queues known to exist.
    declared: HashSet<String>,
}

/// A message of a batch with what it asks for.
struct Item {
    work: Work,
    job: Option<(Uuid, Command)>,
    list_workflows: bool,
    /// Why the message itself is put aside.
    dead_letter: Option<String>,
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
        done: HashMap<Inbox, Sender<u64>>,
    ) -> Handler<'s> {
        Handler {
            setting,
            watched,
            publishers,
            done,
            connection: None,
            declared: HashSet::new(),
        }
    }

    /// Handles messages and findings, until `stop` is disconnected; the messages that are then
    /// still waiting go back to the broker.
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
            let first = select_biased! {
                recv(stop) -> _ => return Ok(()),
                // Few, and a long backlog is not to hold them up.
                recv(findings) -> work => work,
                recv(messages) -> work => work,
            };
            // Whoever sends them is gone: the session is at its end.
            let Ok(first) = first else { return Ok(()) };
            let first = Item::new(first);
            let mut bytes = first.size();
            let mut batch = vec![first];
            while batch.len() < MAX_BATCH_MESSAGES && bytes < MAX_BATCH_BYTES {
                let Ok(work) = findings.try_recv().or_else(|_| messages.try_recv()) else {
                    break;
                };
                let item = Item::new(work);
                bytes += item.size();
                batch.push(item);
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
            batch.iter().for_each(|item| self.acknowledge(item));
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
            self.acknowledge(&item);
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
            self.watched.postgres.idle();
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
                        reason: format!("a fault in the orchestrator: {}", panic_text(&*panic)),
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

    fn attempt(&mut self, batch: &[Item]) -> Result<(), Trouble> {
        let mut told = Outbox::default();
        for item in batch {
            self.put_aside(item, &mut told);
        }
        if batch.iter().all(|item| item.job.is_none()) {
            return self.publish(&told);
        }
        self.watched.postgres.touch();
        // Dropped on any error, and closed if it was the connection's.
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.setting.store.connection()?,
        };
        let ending = self.transact(batch, &mut told, &mut connection)?;
        fault_point::reached("after commit");
        let mut stopwatch = self.setting.metrics.stopwatch();
        self.publish(&told)?;
        stopwatch.lap(Stage::Tell);
        fault_point::reached("after telling");
        if !ending.is_empty() {
            self.watched.postgres.touch();
            connection.settle(&ending)?;
            self.watched.postgres.idle();
            stopwatch.lap(Stage::Settle);
            fault_point::reached("after settling");
        }
        self.connection = Some(connection);
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
        if let (Some(reason), Work::Message { inbox, received }) = (&item.dead_letter, &item.work) {
            let queue = &setting.queue_names[inbox];
            setting.metrics.dead_letter(*inbox);
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

    /// Decides about a batch and commits that. Adds to `told` what clients are to hear of it, and
    /// returns the jobs that are at their end when they have.
    fn transact(
        &mut self,
        batch: &[Item],
        told: &mut Outbox,
        connection: &mut Connection,
    ) -> Result<Vec<Uuid>, Trouble> {
        let setting = self.setting;
        let catalogue = setting.catalogue.get();
        let jobs = || {
            let items = batch.iter();
            items.filter_map(|item| Some((item.inbox(), item.job.as_ref()?)))
        };
        let ids: Vec<Uuid> = jobs()
            .map(|(_, (id, _))| *id)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();

        let mut stopwatch = setting.metrics.stopwatch();
        let mut transaction = connection.transaction()?;
        self.watched.postgres.touch();
        transaction.lock(&ids)?;
        stopwatch.lap(Stage::Lock);
        self.watched.postgres.touch();
        let (before, now) = transaction.load(&ids)?;
        stopwatch.lap(Stage::Load);

        let mut after: HashMap<Uuid, State> = HashMap::new();
        let mut ending = BTreeSet::new();
        let mut outbox = Outbox::default();
        let mut series = SeriesChanges::default();
        let mut events = Vec::new();
        for (inbox, (id, command)) in jobs() {
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
                new_task_id: Uuid::new_v4(),
                catalogue: &catalogue,
                rules: setting.rules,
            };
            fault_point::reached(command.reference());
            let decision = job::decide(*id, state, command, &context);
            for publication in decision.publications {
                self.write_out(publication, &mut outbox);
            }
            if !decision.announcements.is_empty() {
                ending.insert(*id);
            }
            for announcement in decision.announcements {
                self.write_out(announcement, told);
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
            events.push((inbox, subject, decision.event, command));
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
        self.watched.postgres.touch();
        transaction.write(&transitions, &series, now)?;
        self.watched.postgres.idle();
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
        self.watched.postgres.touch();
        transaction.commit()?;
        self.watched.postgres.idle();
        stopwatch.lap(Stage::Commit);
        for (inbox, subject, event, command) in events {
            setting.metrics.message(inbox, &event);
            report::log(&subject, &event, command);
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
        Ok(ending.into_iter().collect())
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
        let published = self.publish_all(outbox);
        if let Err(Trouble::Refused { .. }) = published {
            let Publishers { sdk, celery, task } = &mut self.publishers;
            [sdk, celery, task].into_iter().for_each(Publisher::abandon);
        }
        if published.is_err() {
            // What follows is a rollback.
            self.watched.postgres.touch();
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

    fn acknowledge(&self, item: &Item) {
        if let Work::Message { inbox, received } = &item.work
            && let Some(done) = self.done.get(inbox)
        {
            // The consumer is gone when the session is; then the broker delivers again.
            let _ = done.send(received.tag);
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

impl Item {
    /// Where its message came from; None for what the service found itself.
    fn inbox(&self) -> Option<Inbox> {
        match &self.work {
            Work::Message { inbox, .. } => Some(*inbox),
            Work::Finding { .. } | Work::Announce => None,
        }
    }

    fn new(work: Work) -> Item {
        let mut item = Item {
            job: None,
            list_workflows: false,
            dead_letter: None,
            work,
        };
        let (inbox, received) = match &item.work {
            Work::Message { inbox, received } => (*inbox, received),
            Work::Finding { job_id, command } => {
                item.job = Some((*job_id, command.clone()));
                return item;
            }
            Work::Announce => {
                item.list_workflows = true;
                return item;
            }
        };
        let (id, redelivered) = (received.message_id(), received.redelivered);
        match wire::decode(inbox, &received.body, id, redelivered) {
            Ok(Request::Job { id, command }) => item.job = Some((id, command)),
            Ok(Request::ListWorkflows) => item.list_workflows = true,
            Err(undecodable) => {
                item.job = undecodable.instead.map(|instead| *instead);
                item.dead_letter = Some(undecodable.reason);
            }
        }
        item
    }

    /// Bytes that it holds, what has been decoded counted: a small message may be large then.
    fn size(&self) -> usize {
        let command = self.job.as_ref().map(|(_, command)| command);
        self.work.size() + command.map_or(0, Command::decoded_bytes)
    }

    /// It comes again, and may have been committed. What tells a START from its repetition is its
    /// message id or, without one, the broker's word.
    fn repeat(&mut self) {
        if let Some((_, Command::Start { redelivered, .. })) = &mut self.job {
            *redelivered = true;
        }
    }

    /// Turns a message that is refused into what can still be done about it.
    fn give_up(&mut self, reason: String, by: Refuser) {
        error!("{}: {}", self.label(), one_line(&reason));
        let instead = self.job.take().and_then(|(id, command)| {
            let reason = format!("The orchestrator could not handle this job: {reason}.");
            Some((id, command.instead(reason)?))
        });
        // What the broker refuses is most often too big for any of its queues.
        if by != Refuser::Broker || instead.is_none() {
            self.dead_letter = Some(reason);
        }
        self.job = instead;
    }

    /// Leaves the job as it is, and puts the message aside.
    fn give_up_job(&mut self, reason: String, _: Refuser) {
        error!("{}: {}", self.label(), one_line(&reason));
        self.job = None;
        self.dead_letter = Some(reason);
    }

    fn label(&self) -> String {
        let message = match &self.work {
            Work::Message { inbox, received } => {
                let id = one_line(received.message_id().unwrap_or("without id"));
                format!("message {id} from {}", inbox.name())
            }
            Work::Finding { command, .. } => command.name().to_owned(),
            Work::Announce => "the workflows".to_owned(),
        };
        match &self.job {
            Some((id, command)) => format!("{}, {message}", report::job(*id, command.reference())),
            None => message,
        }
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
