//! The way of a message once it is here: decode, lock, load, decide, write, publish, commit, tell,
//! settle, acknowledge; a batch at a time, in one Postgres transaction each.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::convert::Infallible;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use anyhow::bail;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, at, never, select_biased};
use jiff::Timestamp;
use log::{debug, error, info, warn};
use uuid::Uuid;

pub use self::closed::ClosedQueues;
use self::closed::{Destination, Load, Side};
use self::item::{Item, Waiting};
pub use self::watched::Watched;
use crate::broker::{Delivered, Handled, PublishError, Publisher, Received};
use crate::domain::job::{self, Command, Ending, Event, Publication, Rules, State, TimeSeries};
use crate::domain::workflow::CurrentCatalogue;
use crate::fault_point;
use crate::store::{Connection, Loaded, Series, SeriesChanges, Store, StoreError, Transition};
use crate::telemetry::metrics::{Metrics, Stage};
use crate::telemetry::report::{self, Subject, one_line};
use crate::wire::celery;
use crate::wire::{self, Inbox, Outgoing};

mod closed;
mod item;
mod letters;
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

/// Of messages that wait and are too many, so many go back to the end of their queue at once, and
/// not again before so long, nor faster than so many bytes per second.
const PUT_BACK_MESSAGES: usize = 100;
const PUT_BACK_BYTES: usize = 1024 * 1024;
const PUT_BACK_PAUSE: Duration = Duration::from_millis(100);
const PUT_BACK_BYTES_PER_SECOND: usize = 8 * 1024 * 1024;
/// How long they stay when even that does not work.
const PUT_BACK_RETRY: Duration = Duration::from_secs(5);

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
    pub closed: &'s ClosedQueues,
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
    /// Tells it from the session's others.
    number: usize,
    setting: &'s Setting<'s>,
    watched: &'s Watched,
    publishers: Publishers<'s>,
    /// Where it is told what became of a message.
    done: HashMap<Inbox, Sender<Handled>>,
    waiting: Waiting,
    connection: Option<Connection>,
    /// Task queues known to exist.
    declared: HashSet<String>,
    /// Messages that stay unacknowledged until a queue takes something again.
    stalled: BTreeMap<Destination, Vec<Item>>,
    /// When some of them may next go back to the end of their queue.
    put_back_at: Instant,
}

/// Why a batch did not go through.
enum Trouble {
    /// Postgres does not work for this replica; the same batch may go through later.
    Database(anyhow::Error),
    /// Postgres works, and somebody else holds a lock: it would be no better with another replica.
    Locked(anyhow::Error),
    /// Less of it may go through.
    TooMuch(anyhow::Error),
    /// A queue does not take a task for now. The same batch goes through without what it is for.
    Closed,
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
            PublishError::Refused(reason) | PublishError::Unavailable(reason) => Trouble::Refused {
                reason,
                by: Refuser::Broker,
            },
        }
    }
}

impl<'s> Handler<'s> {
    pub fn new(
        number: usize,
        setting: &'s Setting<'s>,
        watched: &'s Watched,
        publishers: Publishers<'s>,
        done: HashMap<Inbox, Sender<Handled>>,
    ) -> Handler<'s> {
        Handler {
            number,
            setting,
            watched,
            publishers,
            done,
            waiting: Waiting::default(),
            connection: None,
            declared: HashSet::new(),
            stalled: BTreeMap::new(),
            put_back_at: Instant::now(),
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
            let due = self.waiting.next_due().into_iter().chain(self.due());
            let due = due.min().map_or_else(never, at);
            self.watched.waits();
            let first = select_biased! {
                recv(stop) -> _ => return Ok(()),
                // Each comes once more only, and so leaves room for others.
                recv(due) -> _ => None,
                // Few, and a long backlog is not to hold them up.
                recv(findings) -> work => Some(work),
                recv(messages) -> work => Some(work),
            };
            if first.is_none()
                && let Err(trouble) = self.look_after_stalled(stop)
            {
                return trouble.end();
            }
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
            if let Err(trouble) = self.handle_all(batch, stop) {
                return trouble.end();
            }
            self.count_stalled();
        }
    }

    /// Takes a batch through, one by one if need be.
    fn handle_all(
        &mut self,
        mut batch: Vec<Item>,
        stop: &Receiver<Infallible>,
    ) -> Result<(), Trouble> {
        if batch.is_empty() {
            return Ok(());
        }
        match self.handle(&mut batch, stop) {
            Ok(()) => {
                self.setting.metrics.batch(batch.len());
                batch.into_iter().for_each(|item| self.finish(item));
                Ok(())
            }
            Err(Trouble::Refused { reason, by }) => {
                self.handle_one_by_one(batch, &reason, by, stop)
            }
            Err(trouble) => Err(trouble),
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
    ) -> Result<(), Trouble> {
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
                Err(Trouble::Refused { reason, .. }) => self.hold(&mut item, &reason),
                Err(trouble) => return Err(trouble),
            }
            self.finish(item);
        }
        Ok(())
    }

    /// What cannot even be put aside is not acknowledged either.
    fn hold(&self, item: &mut Item, reason: &str) {
        let reason = one_line(reason);
        error!("{}: cannot even be put aside: {reason}", item.label());
        if let Some(inbox) = item.inbox() {
            let queue = Destination::DeadLetters(Side::of(inbox));
            let now = Instant::now();
            self.setting.closed.close(self.number, &queue, &reason, now);
            item.waits_for = Some(queue);
        }
    }

    /// Tells the other handlers what waits here.
    fn count_stalled(&mut self) {
        if self.stalled.is_empty() && self.setting.closed.is_empty() {
            return;
        }
        self.stalled.retain(|_, items| !items.is_empty());
        let mut load = Load::default();
        for (queue, items) in &self.stalled {
            load.messages.insert(queue.clone(), items.len());
            for item in items {
                load.bytes += item.held();
                if let Some(inbox) = item.inbox() {
                    *load.by_inbox.entry(inbox).or_default() += 1;
                }
            }
        }
        self.setting.closed.count(self.number, load);
    }

    /// When something has to be done about the messages that wait.
    fn due(&self) -> Option<Instant> {
        let closed = self.setting.closed;
        let retry = self.stalled.keys().map(|queue| {
            // Another handler may have found it open meanwhile.
            closed.due(queue).unwrap_or_else(Instant::now)
        });
        let put_back = match self.stalled.is_empty() || closed.excess().is_empty() {
            true => None,
            false => Some(self.put_back_at),
        };
        retry.chain(put_back).min()
    }

    /// Tries again what is due, and puts back what is too much.
    fn look_after_stalled(&mut self, stop: &Receiver<Infallible>) -> Result<(), Trouble> {
        let closed = self.setting.closed;
        let queues: Vec<_> = self.stalled.keys().cloned().collect();
        for queue in queues {
            let mut left = self.stalled.remove(&queue).unwrap_or_default();
            while !left.is_empty() && !closed.is_closed(&queue, Instant::now()) {
                let mut bytes = 0;
                let fits = |item: &&Item| {
                    bytes += item.size();
                    bytes < MAX_BATCH_BYTES
                };
                let batch = left.iter().take(MAX_BATCH_MESSAGES).take_while(fits);
                let rest = left.split_off(batch.count().max(1));
                self.handle_all(mem::replace(&mut left, rest), stop)?;
            }
            self.stalled.entry(queue).or_default().append(&mut left);
        }
        if Instant::now() >= self.put_back_at {
            self.put_back(&closed.excess())?;
        }
        self.count_stalled();
        Ok(())
    }

    /// Puts some of the messages that wait back to the end of their queues, so that others come to
    /// be handed out. Their order is of no use any more: of what is put aside none, and a
    /// submission may come after its cancel.
    fn put_back(&mut self, inboxes: &[Inbox]) -> Result<(), Trouble> {
        let (mut bytes, mut failed) = (0, false);
        for inbox in inboxes {
            let mut chosen = Vec::new();
            for (queue, items) in &mut self.stalled {
                for item in mem::take(items) {
                    let fits = chosen.len() < PUT_BACK_MESSAGES && bytes < PUT_BACK_BYTES;
                    if fits && item.inbox() == Some(*inbox) {
                        bytes += item.held();
                        chosen.push((queue.clone(), item));
                    } else {
                        items.push(item);
                    }
                }
            }
            let messages: Vec<_> = chosen
                .iter()
                .filter_map(|(_, item)| match &item.work {
                    Work::Message { received, .. } => Some(received),
                    Work::Finding { .. } | Work::Announce => None,
                })
                .collect();
            let name = &self.setting.queue_names[inbox];
            let publisher = self.publishers.towards(Side::of(*inbox));
            self.watched.waits();
            let outcome = letters::put_back(publisher, name, &messages)?;
            self.watched.goes_on();
            for ((queue, item), delivered) in chosen.into_iter().zip(outcome) {
                if delivered == Delivered::Yes {
                    self.finish(item);
                } else {
                    failed = true;
                    self.stalled.entry(queue).or_default().push(item);
                }
            }
        }
        let pause = match failed {
            true => PUT_BACK_RETRY,
            false => {
                let seconds = bytes as f64 / PUT_BACK_BYTES_PER_SECOND as f64;
                PUT_BACK_PAUSE.max(Duration::from_secs_f64(seconds))
            }
        };
        self.put_back_at = Instant::now() + pause;
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
                // It is known now, and what is for it is left out.
                Ok(Err(Trouble::Closed)) => continue,
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
        if let Err(Trouble::Refused { .. } | Trouble::Closed) = published {
            let Publishers { sdk, celery, .. } = &mut self.publishers;
            [sdk, celery].into_iter().for_each(Publisher::abandon);
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
        let Publishers { sdk, celery, .. } = &mut self.publishers;
        celery.send(&outbox.celery)?;
        sdk.send(&outbox.sdk)?;
        // Both before any is looked at, lest a confirm be taken for the next batch's.
        let (to_celery, to_sdk) = (celery.confirm(), sdk.confirm());
        let (to_celery, to_sdk) = (to_celery?, to_sdk?);
        self.count_published(to_celery.iter().chain(&to_sdk));
        let to_celery = undelivered(&outbox.celery, &to_celery);
        let to_sdk = undelivered(&outbox.sdk, &to_sdk);
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
        for message in to_sdk.rejected {
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
            match self.publishers.celery.declare_task_queue(queue) {
                Ok(()) => {}
                Err(PublishError::Unavailable(why)) => return Err(self.close(queue, &why)),
                Err(error @ (PublishError::Refused(_) | PublishError::Lost(_))) => {
                    return Err(error.into());
                }
            }
            self.declared.insert(queue.to_owned());
        }
        Ok(())
    }

    /// A task queue takes nothing for now.
    fn close(&mut self, queue: &str, why: &str) -> Trouble {
        self.declared.remove(queue);
        let (number, now) = (self.number, Instant::now());
        let queue = Destination::TaskQueue(queue.to_owned());
        self.setting.closed.close(number, &queue, why, now);
        Trouble::Closed
    }

    /// A task comes back when somebody has deleted its queue since it was declared.
    fn publish_tasks_again(&mut self, tasks: &[&Outgoing]) -> Result<(), Trouble> {
        let queues: BTreeSet<_> = tasks.iter().map(|task| &task.routing_key).collect();
        for queue in queues {
            warn!("the task queue {queue:?} was deleted, or is not there; it is declared again");
            self.declared.remove(queue);
            self.declare(queue)?;
        }
        let outcome = self.publishers.celery.publish_to_queues(tasks)?;
        match undelivered(tasks.iter().copied(), &outcome)
            .unroutable
            .first()
        {
            None => Ok(()),
            Some(task) => {
                let why = "it was deleted again right after it was declared";
                Err(self.close(&task.routing_key, why))
            }
        }
    }

    /// A broker restart takes the bindings of clients that are offline, while their queues stay:
    /// these can still be reached through the default exchange.
    fn publish_by_queue_name(&mut self, results: &[&Outgoing]) -> Result<(), Trouble> {
        let outcome = self.publishers.sdk.publish_to_queues(results)?;
        let left = undelivered(results.iter().copied(), &outcome);
        for result in left.unroutable {
            info!("nobody is waiting any more in {}", result.routing_key);
        }
        for result in left.rejected {
            warn!("{} takes no result", result.routing_key);
        }
        Ok(())
    }

    /// Lets go of an item that is through, or keeps it until its client may be told, or until a
    /// queue takes what it is for.
    fn finish(&mut self, mut item: Item) {
        if let Some(queue) = item.waits_for.take() {
            self.stalled.entry(queue).or_default().push(item);
            return;
        }
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

impl<'s> Publishers<'s> {
    /// The way to the dead letters of a vhost.
    fn towards(&mut self, side: Side) -> &mut Publisher<'s> {
        match side {
            Side::Clients => &mut self.sdk,
            Side::Workers => &mut self.task,
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
    /// The queues of the tasks among them.
    tasks_for: BTreeSet<String>,
}

/// The messages of a batch that did not arrive.
#[derive(Default)]
struct Undelivered<'m> {
    unroutable: Vec<&'m Outgoing>,
    rejected: Vec<&'m Outgoing>,
}

fn undelivered<'m>(
    messages: impl IntoIterator<Item = &'m Outgoing>,
    outcome: &[Delivered],
) -> Undelivered<'m> {
    let mut left = Undelivered::default();
    for (message, delivered) in messages.into_iter().zip(outcome) {
        match delivered {
            Delivered::Yes => {}
            Delivered::Unroutable => left.unroutable.push(message),
            Delivered::Rejected => left.rejected.push(message),
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
            Trouble::Closed => bail!("a queue takes nothing"),
            Trouble::Refused { reason, .. } => bail!(reason),
        }
    }
}
