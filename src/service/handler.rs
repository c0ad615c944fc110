//! A handler thread: collects a batch of messages, runs it through the pipeline, one message at a
//! time if necessary, and acknowledges what is done.

use std::any::Any;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, at, bounded, never, select_biased};
use jiff::Timestamp;
use log::{debug, warn};
use uuid::Uuid;

use self::asking::Asking;
pub use self::closed::ClosedQueues;
use self::closed::Destination;
pub use self::failure::ForWantOfPostgres;
use self::failure::{Refuser, Trouble, fault_in_ourselves};
use self::item::{Item, Waiting};
pub use self::watched::Watched;
use crate::broker::{Handled, Publisher, Received};
use crate::domain::job::Command;
use crate::domain::vhost::Vhost;
use crate::service::shared::Service;
use crate::store::{Connection, Store};
use crate::telemetry::health::Part;
use crate::threads::{Backoff, Signal};
use crate::wire::Inbox;

mod asking;
mod closed;
mod failure;
mod item;
mod letters;
mod outbox;
mod pipeline;
mod stalled;
mod watched;

/// A batch ends at whichever comes first.
pub const MAX_BATCH_MESSAGES: usize = 200;
const MAX_BATCH_BYTES: usize = 8 * 1024 * 1024;
/// How many jobs are found or forgotten at once; the others follow. A handler's queue of findings
/// has room for as many.
pub const MAX_FINDINGS: u16 = 1000;
/// Waits between attempts while Postgres does not work.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// After this long without a working Postgres a replica returns its messages: another replica may
/// have a Postgres that works.
const CUT_OFF: Duration = Duration::from_secs(20);

/// Something to handle.
pub enum Work {
    /// A message, which is to be acknowledged.
    Message {
        inbox: Inbox,
        received: Box<Received>,
    },
    /// What the service itself has found out about a job.
    Finding { job_id: Uuid, command: Command },
    /// The workflow definitions have changed, and all clients are to be told.
    WorkflowsChanged,
}

/// How the handlers hear what the service itself has found out.
#[derive(Clone)]
pub struct Findings(Vec<Sender<Work>>);

impl Findings {
    /// To as many handlers, with what each of them receives.
    pub fn new(handlers: usize) -> (Findings, Vec<Receiver<Work>>) {
        let channels = (0..handlers).map(|_| bounded(MAX_FINDINGS.into()));
        let (senders, receivers) = channels.unzip();
        (Findings(senders), receivers)
    }

    /// To the handler of a job.
    pub fn of_job(&self, job_id: Uuid) -> &Sender<Work> {
        &self.0[index(job_id, self.0.len())]
    }

    /// To the handler that puts the granted tasks of a queue on it. One for each queue, for the jobs'
    /// own handlers would not keep the order of the turns; what a job's messages and its turn may not
    /// do at once is excluded by the job's lock.
    pub fn of_turns(&self, queue: &str) -> &Sender<Work> {
        let mut hasher = DefaultHasher::new();
        queue.hash(&mut hasher);
        &self.0[hasher.finish() as usize % self.0.len()]
    }

    /// Has a granted task put on its queue, by a handler that [`Findings`] names. What that has no room
    /// for is found again as lost.
    pub fn hand_over(to: &Sender<Work>, job_id: Uuid, granted_at: Timestamp) {
        let command = Command::TakeTurn {
            grant: Some(granted_at),
        };
        let _ = to.try_send(Work::Finding { job_id, command });
    }

    pub fn senders(&self) -> &[Sender<Work>] {
        &self.0
    }
}

/// Which of `handlers` threads handles a job's messages: always the same one, which keeps their
/// order.
pub fn index(job_id: Uuid, handlers: usize) -> usize {
    // The low bits of a random id are as good as any others.
    job_id.as_u64_pair().1 as usize % handlers
}

/// What all handler threads share.
pub struct Common<'s> {
    pub service: &'s Service,
    /// Wakes the inquiry thread, which asks the workers about suspected starts.
    pub inquiry: Sender<()>,
    /// Wakes the thread that grants turns.
    pub turns: Sender<()>,
    /// What the service itself has found out, to the handlers.
    pub findings: Findings,
    /// The queue behind each inbox.
    pub queue_names: HashMap<Inbox, String>,
    pub closed: ClosedQueues,
}

/// The channels that one handler thread publishes on.
pub struct Publishers<'s> {
    pub sdk: Publisher<'s>,
    pub celery: Publisher<'s>,
    /// To the vhost of the worker events, for its dead letters.
    pub task: Publisher<'s>,
}

/// One handler thread's part of the session.
pub struct Handler<'s> {
    /// Distinguishes it from the session's other handlers.
    number: usize,
    common: &'s Common<'s>,
    store: Store,
    watched: &'s Watched,
    publishers: Publishers<'s>,
    /// Reports to the consumers what became of each message.
    done: HashMap<Inbox, Sender<Handled>>,
    waiting: Waiting,
    connection: Option<Connection>,
    /// Whether the current attempt at a batch has begun to publish what goes before its commit.
    has_published: bool,
    /// Task queues known to exist.
    declared: HashSet<String>,
    /// Task queues that have rejected a task since they took one.
    rejecting: HashSet<String>,
    /// The vhosts whose queue of dead letters has taken one and refused none since.
    letters_taken: HashSet<Vhost>,
    /// About which clients' queues RabbitMQ is asked.
    asking: Asking,
    /// Messages that stay unacknowledged until a queue takes something again.
    stalled: BTreeMap<Destination, Vec<Item>>,
    /// When some of them may next be returned to the end of their queue.
    put_back_at: Instant,
}

impl<'s> Handler<'s> {
    pub fn new(
        number: usize,
        common: &'s Common<'s>,
        watched: &'s Watched,
        publishers: Publishers<'s>,
        done: HashMap<Inbox, Sender<Handled>>,
    ) -> Handler<'s> {
        Handler {
            number,
            common,
            store: common.service.store.watched_by(&watched.postgres),
            watched,
            publishers,
            done,
            waiting: Waiting::default(),
            connection: None,
            has_published: false,
            declared: HashSet::new(),
            rejecting: HashSet::new(),
            letters_taken: HashSet::new(),
            asking: Asking::default(),
            stalled: BTreeMap::new(),
            put_back_at: Instant::now(),
        }
    }

    /// Handles messages and findings until `stop` is given. Messages still waiting then are
    /// returned to the broker, and so are those whose outcome is committed but not yet told: when
    /// they are redelivered, they are handled as after a crash.
    ///
    /// # Errors
    /// The session is at its end.
    pub fn run(
        mut self,
        messages: &Receiver<Work>,
        findings: &Receiver<Work>,
        stop: &Signal,
    ) -> anyhow::Result<()> {
        loop {
            let due = self.waiting.next_due().into_iter().chain(self.due());
            let due = due.min().map_or_else(never, at);
            let rest = self.watched.rests();
            let first = select_biased! {
                recv(stop.receiver()) -> _ => return Ok(()),
                // Each of these comes back only once, so they leave room for others.
                recv(due) -> _ => None,
                // There are few of these, and a long backlog must not delay them.
                recv(findings) -> work => Some(work),
                recv(messages) -> work => Some(work),
            };
            drop(rest);
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
                // The senders are gone: the session is ending.
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

    /// Runs a batch through the pipeline, one message at a time if necessary.
    fn handle_all(&mut self, mut batch: Vec<Item>, stop: &Signal) -> Result<(), Trouble> {
        if batch.is_empty() {
            return Ok(());
        }
        match self.handle(&mut batch, stop) {
            Ok(()) => {
                self.common.service.metrics.batch(batch.len());
                batch.into_iter().for_each(|item| self.finish(item));
                Ok(())
            }
            Err(Trouble::Refused { reason, by }) => {
                self.handle_one_by_one(batch, &reason, by, stop)
            }
            Err(trouble) => Err(trouble),
        }
    }

    /// The fallback when something in a batch is refused: each message on its own, so that the good
    /// ones go through and the culprit is found.
    fn handle_one_by_one(
        &mut self,
        batch: Vec<Item>,
        reason: &str,
        by: Refuser,
        stop: &Signal,
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
            // First what can still be done for its job, then only what can be done with the
            // message.
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

    /// Runs a batch through the pipeline, retrying for as long as Postgres does not work.
    fn handle(&mut self, batch: &mut [Item], stop: &Signal) -> Result<(), Trouble> {
        let mut backoff = Backoff::new(FIRST_RETRY, LAST_RETRY);
        let mut trouble_since = None;
        let mut was_refused = false;
        loop {
            // A bug of ours that one message triggers must not hold up the others.
            self.has_published = false;
            let attempt = catch_unwind(AssertUnwindSafe(|| self.attempt(batch)));
            self.watched.goes_on();
            if !matches!(attempt, Ok(Ok(()))) && self.has_published {
                batch.iter_mut().for_each(Item::repeat);
            }
            let trouble = match attempt {
                Ok(Err(Trouble::TooMuch(error))) if batch.len() > 1 => {
                    debug!("a batch is divided: {error:#}");
                    return self.handle_in_halves(batch, stop);
                }
                // The closed queue is known now, and what is meant for it is left out; or it
                // may take the tasks of another attempt.
                Ok(Err(Trouble::Closed)) => continue,
                Ok(Err(Trouble::Locked(error))) => {
                    trouble_since = None;
                    let error = self.with_holders(error);
                    self.waits(&error, &backoff, false);
                    error
                }
                Ok(Err(Trouble::Database(error) | Trouble::TooMuch(error))) => {
                    let since = trouble_since.get_or_insert_with(Instant::now);
                    self.waits(&error, &backoff, true);
                    was_refused = true;
                    if since.elapsed() >= CUT_OFF {
                        return Err(Trouble::Session(error.context(ForWantOfPostgres)));
                    }
                    error
                }
                Ok(done) => {
                    self.watched.set_trouble(None);
                    if was_refused && done.is_ok() {
                        let health = &self.common.service.health;
                        health.does_again(Part::Postgres, Timestamp::now());
                    }
                    return done;
                }
                Err(panic) => {
                    return Err(Trouble::Refused {
                        reason: fault_in_ourselves(&*panic),
                        by: Refuser::Ourselves,
                    });
                }
            };
            self.watched.set_trouble(Some(format!("{trouble:#}")));
            let _rest = self.watched.rests();
            if backoff.stopped_by(stop) {
                return Err(Trouble::Stopped);
            }
        }
    }

    /// The same, with who holds the lock, as far as Postgres tells.
    fn with_holders(&self, error: anyhow::Error) -> anyhow::Error {
        let connection = self.common.service.views.connection();
        let holders = connection.and_then(|mut connection| connection.holders());
        match holders.unwrap_or_default().as_slice() {
            [] => error,
            holders => error.context(format!("a lock is held by {}", holders.join("; and by "))),
        }
    }

    /// Tells that a batch waits for Postgres, which refuses it or has it wait for a lock; with the stack
    /// trace once in an outage.
    fn waits(&self, error: &anyhow::Error, backoff: &Backoff, is_refused: bool) {
        let health = &self.common.service.health;
        if is_refused {
            let fault = format!("{}: {error:#}", self.common.service.config.postgres);
            health.refuses(Part::Postgres, fault, Timestamp::now());
        }
        if !backoff.is_fresh() {
            debug!("messages still wait for Postgres: {error:#}");
        } else if is_refused && health.is_news(Part::Postgres) {
            warn!("messages wait for Postgres: {error:?}");
        } else {
            warn!("messages wait for Postgres: {error:#}");
        }
    }

    /// Runs a batch that is too much at once in two halves, one after the other, which keeps the
    /// order of each job's messages.
    fn handle_in_halves(&mut self, batch: &mut [Item], stop: &Signal) -> Result<(), Trouble> {
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

    /// Acknowledges an item that is done, or keeps it until its client may be told, or until a
    /// closed queue takes it.
    fn finish(&mut self, mut item: Item) {
        let message = match &item.work {
            Work::Message { inbox, received } => Some((*inbox, received.tag)),
            Work::Finding { .. } | Work::WorkflowsChanged => None,
        };
        let handled: fn(u64) -> Handled = if let Some(queue) = item.stalled_on.take() {
            // A finding is made again.
            if message.is_some() {
                self.stalled.entry(queue).or_default().push(item);
            }
            Handled::Kept
        } else if let Some(wait) = item.wait {
            debug!("{}: it waits for its client for {wait:?}", item.label());
            self.waiting.add(item, wait);
            Handled::Kept
        } else {
            // It makes room before anybody hears of it.
            drop(item);
            Handled::Done
        };
        let Some((inbox, tag)) = message else { return };
        if let Some(done) = self.done.get(&inbox) {
            // If the consumer is gone, so is the session, and the broker redelivers.
            let _ = done.send(handled(tag));
        }
    }
}

impl<'s> Publishers<'s> {
    /// To a vhost.
    fn towards(&mut self, vhost: Vhost) -> &mut Publisher<'s> {
        match vhost {
            Vhost::Sdk => &mut self.sdk,
            Vhost::Task => &mut self.task,
            Vhost::Celery => &mut self.celery,
        }
    }
}

impl Work {
    /// Bytes of its body.
    fn size(&self) -> usize {
        match self {
            Work::Message { received, .. } => received.body.len(),
            Work::Finding { .. } | Work::WorkflowsChanged => 0,
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
