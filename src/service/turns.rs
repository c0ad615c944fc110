//! Grants tasks their turn at queues with limits, and has them handed over.
//!
//! Handlers write what has to wait and wake this thread whenever something waits, has started or has
//! ended; operators' commands wake those of all replicas. One decision is made at a time for each
//! queue, under a lock in the database and from what is in it: so any number of replicas keep the
//! limits, and nothing has to be given back when one of them dies. A granted task is put on its
//! queue by a handler, like any other.
//!
//! A grant whose task is not on its queue, as far as the database knows, may have been published by
//! somebody who died before the commit. It is published again only when it is not in the queue and
//! nothing that a worker says of it is on its way: of a task with a seat there must not be two.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, select};
use jiff::Timestamp;
use log::{debug, info, warn};
use uuid::Uuid;

use crate::domain::turns::{self, MAX_GRANTS};
use crate::service::handler::{Findings, MAX_FINDINGS};
use crate::service::maintenance::Calm;
use crate::service::shared::Service;
use crate::store::{Connection, LostGrant, Store, StoreError};
use crate::threads::{Calls, Signal};

/// How often this looks for what nobody has told it of.
const PERIOD: Duration = Duration::from_secs(1);
/// How long a granted task may take to reach its queue before somebody else takes it on. What has been taken on goes
/// there when the queue is empty, so a handler that is slow with large inputs must not be taken for a dead one.
const HAND_OVER: Duration = Duration::from_secs(10);
/// How often a queue with limits is searched for tasks that have not waited for their turn.
const COUNT_IN: Duration = Duration::from_secs(60);
/// After a change of the limits such tasks may still be on their way for so long.
const AFTER_CHANGE: Duration = Duration::from_secs(10);

/// The thread's part of the session.
pub struct Turns<'s> {
    pub service: &'s Service,
    /// Its calls are under the watchdog.
    pub store: Store,
    pub findings: &'s Findings,
    /// Whether nothing of what workers say is on its way to their jobs.
    pub calm: &'s Calm,
    /// Whether nothing is ready in a task queue.
    pub is_empty: &'s dyn Fn(&str) -> bool,
    pub stop: Signal,
}

/// What there is to do, and who says so.
pub struct Wakes {
    /// A handler: something waits, or there may be room.
    pub handlers: Receiver<()>,
    /// An operator: limits or turns have been changed.
    pub operators: Receiver<()>,
}

/// What the thread knows from one round to the next.
struct Memory {
    connection: Option<Connection>,
    next_tick: Instant,
    /// When tasks were last counted in that have not waited.
    counted_in: Option<Instant>,
    limits: Arc<turns::Limits>,
    limits_changed: Instant,
    /// Grants that were lost at the last look and might have been published again, but for that it
    /// takes two looks: what was on its way at the first has arrived by the second.
    suspects: HashSet<Uuid>,
    is_failing: bool,
}

impl Turns<'_> {
    /// Grants turns until `stop` is given.
    pub fn run(&self, wakes: &Wakes) {
        let now = Instant::now();
        let mut memory = Memory {
            connection: None,
            next_tick: now,
            counted_in: None,
            limits: self.service.limits.get(),
            limits_changed: now,
            suspects: HashSet::new(),
            is_failing: false,
        };
        // What has not waited for its turn is counted in before the first one is granted.
        let mut is_tick = true;
        loop {
            if is_tick {
                memory.next_tick = Instant::now() + PERIOD;
            }
            // What has failed is tried again at the next tick.
            if is_tick || !memory.is_failing {
                let done = self.round(&mut memory, is_tick);
                let was_failing = memory.is_failing;
                memory.is_failing = done.is_err();
                match done {
                    Ok(()) => {}
                    Err(error) if was_failing => debug!("no turns are granted yet: {error:#}"),
                    Err(error) => warn!("no turns are granted, which is tried again: {error:#}"),
                }
            }
            let pause = memory.next_tick.saturating_duration_since(Instant::now());
            is_tick = select! {
                recv(self.stop.receiver()) -> _ => return,
                recv(wakes.handlers) -> _ => false,
                recv(wakes.operators) -> _ => true,
                default(pause) => true,
            };
        }
    }

    fn round(&self, memory: &mut Memory, is_tick: bool) -> Result<(), StoreError> {
        let mut connection = match memory.connection.take() {
            Some(connection) => connection,
            None => self.store.connection()?,
        };
        if is_tick {
            self.service.read_limits(&mut connection)?;
            self.count_in(memory, &mut connection)?;
        }
        for queue in connection.queues_with_held()? {
            loop {
                match self.grant(&mut connection, &queue) {
                    Ok(true) if !self.stop.is_given() => {}
                    Ok(_) => break,
                    // Its other replica has stopped in the middle of a decision.
                    Err(StoreError::Locked(error)) => {
                        debug!("{queue}: somebody decides about it: {error:#}");
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        if is_tick {
            self.look_for_lost(memory, &mut connection)?;
        }
        memory.connection = Some(connection);
        Ok(())
    }

    /// Grants some of those that wait at a queue their turn. Returns whether there may be more to
    /// grant at once.
    fn grant(&self, connection: &mut Connection, queue: &str) -> Result<bool, StoreError> {
        let defined = self.service.catalogue.get().queue_limits();
        let defined = defined.get(queue).copied().unwrap_or_default();
        // What the handler has no room for would be found again as lost.
        let handler = self.findings.of_turns(queue);
        let capacity = handler.capacity().unwrap_or(usize::MAX);
        let most = capacity.saturating_sub(handler.len()).min(MAX_GRANTS);
        let mut transaction = connection.transaction()?;
        let now = transaction.lock_queue(queue)?;
        let mut jobs = transaction.released(queue, most)?;
        if jobs.is_empty() {
            // Not as it was a moment ago.
            let limit = transaction.limit(queue, defined)?;
            let handed_over = transaction.handed_over(queue)?;
            let room = limit.room(&handed_over).min(most);
            if room == 0 {
                return Ok(false);
            }
            let waiting = transaction.waiting(queue, room)?;
            let aging = self.service.config.priority_aging;
            jobs = turns::next(waiting, &handed_over, room, aging, now);
        }
        if jobs.is_empty() {
            return Ok(false);
        }
        let turns: Vec<_> = jobs.iter().map(|id| (*id, Uuid::new_v4())).collect();
        let granted = transaction.grant(queue, &turns)?;
        transaction.commit()?;
        debug!("{queue}: {} tasks have their turn", granted.len());
        let is_page = jobs.len() == MAX_GRANTS;
        for (job_id, at) in granted {
            Findings::hand_over(handler, job_id, at);
        }
        Ok(is_page)
    }

    /// Counts in what has reached queues with limits without waiting for its turn.
    fn count_in(&self, memory: &mut Memory, connection: &mut Connection) -> Result<(), StoreError> {
        let limits = self.service.limits.get();
        if limits != memory.limits {
            memory.limits_changed = Instant::now();
            memory.limits = Arc::clone(&limits);
        }
        let is_due = memory.limits_changed.elapsed() < AFTER_CHANGE
            || memory
                .counted_in
                .is_none_or(|last| last.elapsed() >= COUNT_IN);
        if !is_due {
            return Ok(());
        }
        let catalogue = self.service.catalogue.get();
        for queue in limits.keys() {
            let plain = catalogue.plain_workflows_of(queue);
            let found = connection.count_in(queue, &plain)?;
            if found > 0 {
                info!("{queue}: {found} tasks count that have not waited for their turn");
            }
        }
        memory.counted_in = Some(Instant::now());
        self.service.counted.replace(limits.as_ref().clone());
        Ok(())
    }

    /// Those of these whose tasks are not on their queues.
    fn not_there(&self, lost: &[LostGrant]) -> HashSet<Uuid> {
        let mut known: HashMap<&str, bool> = HashMap::new();
        let mut not_there = HashSet::new();
        for one in lost {
            let is_empty = || (self.is_empty)(&one.queue);
            if one.is_overtaken || *known.entry(&one.queue).or_insert_with(is_empty) {
                not_there.insert(one.job_id);
            }
        }
        not_there
    }

    /// Has granted tasks put on their queues that somebody else was to put there.
    fn look_for_lost(
        &self,
        memory: &mut Memory,
        connection: &mut Connection,
    ) -> Result<(), StoreError> {
        let lost = connection.lost_grants(HAND_OVER, MAX_FINDINGS.into())?;
        if lost.is_empty() {
            memory.suspects.clear();
            return Ok(());
        }
        let (lost, new): (Vec<_>, Vec<_>) = lost.into_iter().partition(|lost| lost.is_taken);
        let new: Vec<_> = new.iter().map(|lost| lost.job_id).collect();
        // From now on nobody hands them over who had them first.
        take_on(connection, &new)?;
        if lost.is_empty() || !self.calm.holds() {
            return Ok(());
        }
        let before = std::mem::replace(&mut memory.suspects, self.not_there(&lost));
        let again: Vec<_> = memory.suspects.intersection(&before).copied().collect();
        let taken = take_on(connection, &again)?;
        for (job_id, at) in taken {
            debug!("job {job_id}: its turn was granted, but nobody has handed it over");
            memory.suspects.remove(&job_id);
            // Whatever holds up the queue's handler need not hold up its own.
            Findings::hand_over(self.findings.of_job(job_id), job_id, at);
        }
        Ok(())
    }
}

/// Takes on those of these jobs that nobody works on.
fn take_on(
    connection: &mut Connection,
    jobs: &[Uuid],
) -> Result<Vec<(Uuid, Timestamp)>, StoreError> {
    if jobs.is_empty() {
        return Ok(Vec::new());
    }
    let mut transaction = connection.transaction()?;
    let jobs = transaction.try_lock(jobs)?;
    let taken = transaction.take_on(&jobs, HAND_OVER)?;
    transaction.commit()?;
    Ok(taken)
}

/// Wakes the granting thread whenever an operator changes something, until `stop` is given.
pub fn listen(store: &Store, news: &Sender<()>, stop: &Signal) {
    let mut connection: Option<Connection> = None;
    loop {
        let heard = match connection.as_mut() {
            Some(connection) => connection.heard(PERIOD),
            None => store.connection().and_then(|mut new| {
                new.listen()?;
                connection = Some(new);
                // Something may have been said before.
                Ok(true)
            }),
        };
        match heard {
            // Full when it has been woken already.
            Ok(true) => drop(news.try_send(())),
            Ok(false) => {}
            Err(error) => {
                debug!("operators' changes are seen a little later: {error:#}");
                connection = None;
                if stop.comes_within(PERIOD) {
                    return;
                }
            }
        }
        if stop.is_given() {
            return;
        }
    }
}

/// The thread's calls, for the watchdog.
#[derive(Debug, Default)]
pub struct Watched {
    pub postgres: Arc<Calls>,
    pub celery: Calls,
}
