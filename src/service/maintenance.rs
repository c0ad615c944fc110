//! What is due because time has passed: timeouts, jobs past their retention, old history. This
//! thread only finds the jobs; what happens to them is decided where everything else is decided.
//!
//! What a worker or a client said in time counts, even if it is still on its way. Four things
//! ensure that. A timeout is enforced no sooner than `GRACE` after it has passed. Neither this
//! process nor another replica that may have messages in flight has stood still meanwhile, or has
//! gone. No handler of any replica is held up. And the queues of worker events have been read to
//! their end. When one of them does not hold, nothing counts as overdue for a while: see `Quiet`.

use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use jiff::{SignedDuration, Timestamp};
use log::{debug, info, warn};
use uuid::Uuid;

use crate::domain::job::Command;
use crate::fault_point;
use crate::service::handler::{self, MAX_FINDINGS, Work};
use crate::service::shared::Service;
use crate::store::{Around, Connection, KnownQueues, Overdue, Sign, Store, StoreError, Upkeep};
use crate::threads::Signal;

/// How often a replica checks the clock and shows the others that it is alive.
const BEAT: Duration = Duration::from_secs(1);
/// Between attempts while Postgres does not work.
const RETRY: Duration = Duration::from_secs(5);
/// A replica that is late by more than this has stood still: a stopped process, a paused machine.
const STANDSTILL: Duration = Duration::from_secs(3);
/// How long after a timeout it is enforced. Longer than [`STANDSTILL`], so that a standstill too
/// short to be noticed does no harm.
const GRACE: Duration = Duration::from_secs(5);
/// The quiet time after a standstill of any replica, if the start buffer is not longer.
const AFTER_STANDSTILL: Duration = Duration::from_secs(5);
/// After this long without a sign of a replica, RabbitMQ has redelivered its messages to others:
/// two heartbeats are at most 30 seconds. One that has lost its Postgres and nothing else shows no
/// sign either, and gives them back within that time.
const GONE: Duration = Duration::from_secs(60);

/// Whether the quiet time is over, for somebody who asks now and then: what workers have said has
/// been handled, by whatever replica.
#[derive(Debug, Default)]
pub struct Calm {
    is_wanted: AtomicBool,
    holds: AtomicBool,
}

impl Calm {
    /// Whether it was so at the last beat, since this was last asked.
    pub fn holds(&self) -> bool {
        self.is_wanted.store(true, Ordering::Relaxed);
        self.holds.swap(false, Ordering::Relaxed)
    }
}

/// Tells what may still be waiting of what workers have said.
pub struct Backlog<'b> {
    /// Whether this replica has messages in flight that it does not get to handle.
    pub held_up: &'b dyn Fn() -> bool,
    /// Whether it has outcomes that wait for their clients' queues.
    pub stalled_outcomes: &'b dyn Fn() -> bool,
    /// Whether there is something in RabbitMQ's queues.
    pub in_queues: &'b dyn Fn() -> bool,
    /// Tells others whether there is nothing.
    pub calm: &'b Calm,
}

/// Looks for what is due, once per [`crate::config::Config::timeout_check_period`] among all
/// replicas, until `stop` is given. If a replica dies after claiming a round, that round is
/// skipped.
pub fn run(
    service: &Service,
    store: &Store,
    handlers: &[Sender<Work>],
    backlog: &Backlog<'_>,
    stop: &Signal,
) {
    let mut maintenance = Maintenance {
        service,
        store,
        handlers,
        backlog,
        stop,
        connection: None,
        shown: Vec::new(),
        other_replicas: 0,
        others_have_stalled_outcomes: false,
        database_time: None,
        quiet: Quiet::new(Instant::now(), service.config.timeout_start_buffer),
        is_quiet_over: None,
        limits: Chore::default(),
        history: Chore::default(),
        last_turn: None,
        is_failing: false,
    };
    let period = service.config.timeout_check_period;
    let mut next_round = Instant::now() + period;
    let mut last_beat = Instant::now();
    // The others are to know of this one before it has messages for long.
    let mut pause = Duration::ZERO;
    loop {
        let begun = Instant::now();
        if stop.comes_within(pause) {
            break;
        }
        fault_point::reached("maintenance");
        let now = Instant::now();
        let late = (now - begun).saturating_sub(pause);
        if late > STANDSTILL {
            warn!("stood still for {late:.0?}: what has come meanwhile goes before any timeout");
        }
        let beat = Beat {
            asked: pause,
            took: now - last_beat,
        };
        last_beat = now;
        let is_round = now >= next_round;
        if is_round {
            next_round = now + period;
        }
        let done = maintenance.beat(&beat, is_round);
        pause = match done {
            // There is more to delete; the pause leaves others as much time as this takes.
            Ok(()) if maintenance.history.is_going_on() => now.elapsed().min(BEAT),
            Ok(()) => BEAT.min(period),
            Err(_) => RETRY.min(period),
        };
        maintenance.note(done);
    }
}

/// Large rows that are deleted in one statement.
const KEPT_AT_ONCE: i64 = 100;

/// What is due because time has passed.
enum Due {
    Overdue(Overdue),
    /// Jobs past their retention.
    Expired(KnownQueues),
}

/// The time from one beat to the next.
struct Beat {
    asked: Duration,
    took: Duration,
}

struct Maintenance<'s> {
    service: &'s Service,
    store: &'s Store,
    handlers: &'s [Sender<Work>],
    backlog: &'s Backlog<'s>,
    stop: &'s Signal,
    /// Shows the other replicas that this one is alive, and what else there is to know of it.
    connection: Option<Connection>,
    /// The latter.
    shown: Vec<Sign>,
    /// How many others there were at the last beat that saw them.
    other_replicas: i64,
    /// Whether some of them had outcomes then that wait for their clients' queues.
    others_have_stalled_outcomes: bool,
    /// As of the last beat.
    database_time: Option<Timestamp>,
    quiet: Quiet,
    /// Whether that is over, if this beat has looked.
    is_quiet_over: Option<bool>,
    limits: Chore,
    history: Chore,
    /// The last one of the attempts found at the last beat, if there are more.
    last_turn: Option<(Timestamp, Uuid)>,
    /// Whether the last beat has failed.
    is_failing: bool,
}

impl Maintenance<'_> {
    /// Does what is due now. What a round has left goes on in the next one.
    fn beat(&mut self, beat: &Beat, is_round: bool) -> Result<(), StoreError> {
        let mut presence = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let mut connection = self.store.connection()?;
                connection.show_presence()?;
                self.shown.clear();
                connection
            }
        };
        self.show(&mut presence)?;
        self.notice_standstills(&mut presence, beat)?;
        self.is_quiet_over = None;
        let calm = self.backlog.calm;
        if calm.is_wanted.swap(false, Ordering::Relaxed) {
            calm.holds.store(self.is_quiet_over(), Ordering::Relaxed);
        }
        let mut apart = match presence.shows_nothing_but_presence() {
            true => Some(self.store.connection()?),
            false => None,
        };
        let connection = apart.as_mut().unwrap_or(&mut presence);
        // Those whose queues take nothing for now must not hide the others.
        let turns = connection.due_attempts(self.last_turn, MAX_FINDINGS.into())?;
        let is_page = turns.len() == usize::from(MAX_FINDINGS);
        self.last_turn = turns.last().copied().filter(|_| is_page);
        let turns = turns
            .into_iter()
            .map(|(_, id)| (id, Command::TakeTurn { grant: None }));
        let mut findings: Vec<_> = turns.collect();
        if is_round {
            self.limits.fall_due();
            self.history.fall_due();
            findings.extend(self.notices(connection)?);
        }
        self.hand_over(findings);
        self.look_for_overdue(connection)?;
        self.forget(connection)?;
        self.connection = Some(presence);
        Ok(())
    }

    /// Shows the others what has changed since the last time.
    fn show(&mut self, connection: &mut Connection) -> Result<(), StoreError> {
        let Backlog {
            held_up,
            stalled_outcomes,
            ..
        } = self.backlog;
        for (sign, holds) in [
            (Sign::HeldUp, held_up()),
            (Sign::StalledOutcomes, stalled_outcomes()),
        ] {
            if holds != self.shown.contains(&sign) {
                connection.show(sign, holds)?;
                match holds {
                    true => self.shown.push(sign),
                    false => self.shown.retain(|shown| *shown != sign),
                }
            }
        }
        Ok(())
    }

    /// Logs a failed beat, an outage once, and forgets what was known of the database.
    fn note(&mut self, done: Result<(), StoreError>) {
        let was_failing = self.is_failing;
        self.is_failing = done.is_err();
        let Err(error) = done else {
            return;
        };
        self.connection = None;
        self.database_time = None;
        let buffer = self.service.config.timeout_start_buffer;
        self.quiet.begin(Instant::now(), buffer);
        if was_failing {
            debug!("maintenance still fails: {error:#}");
        } else {
            warn!("maintenance fails, and is tried again: {error:#}");
        }
    }

    /// Restarts the quiet time when this or another replica has not been running, or does not get
    /// to handle what it has.
    fn notice_standstills(
        &mut self,
        connection: &mut Connection,
        beat: &Beat,
    ) -> Result<(), StoreError> {
        let around = connection.look_around(STANDSTILL, GONE)?;
        // A paused machine's own clock stands still as well.
        let of_database = self.database_time.map_or(Duration::ZERO, |before| {
            let time = around.now.duration_since(before);
            Duration::try_from(time.max(SignedDuration::ZERO)).unwrap_or_default()
        });
        self.database_time = Some(around.now);
        let own = beat.took.max(of_database).saturating_sub(beat.asked);
        let buffer = self.service.config.timeout_start_buffer;
        let least = buffer.max(AFTER_STANDSTILL);
        // Also when it was Postgres or RabbitMQ that did not answer.
        if own > STANDSTILL {
            debug!("nothing was looked at for {own:.0?}");
            self.quiet.begin(Instant::now(), least);
        }
        if around.silent + around.held_up > 0 {
            let Around {
                silent, held_up, ..
            } = around;
            debug!("{silent} other replicas stand still, and {held_up} are held up");
            self.quiet.begin(Instant::now(), least);
        }
        if around.replicas < self.other_replicas {
            // It may have been stopped or killed, or have lost only its Postgres.
            debug!("a replica has gone; {} others are left", around.replicas);
            self.quiet.begin(Instant::now(), least.max(GONE));
        }
        self.other_replicas = around.replicas;
        self.others_have_stalled_outcomes = around.stalled_outcomes > 0;
        Ok(())
    }

    /// Jobs whose clients are to be told that there is no worker for them.
    fn notices(&self, connection: &mut Connection) -> Result<Vec<(Uuid, Command)>, StoreError> {
        if !self.service.config.no_worker_notice {
            return Ok(Vec::new());
        }
        let mut findings = Vec::new();
        let queues = self.service.queues.lock();
        let queues = queues.unwrap_or_else(PoisonError::into_inner).clone();
        let catalogue = self.service.catalogue.get();
        for task in queues
            .iter()
            .flat_map(|queues| queues.without_worker.keys())
        {
            let mut plain = catalogue.plain_workflows_of(task);
            // A workflow that is not defined any more was the task of its own name.
            if catalogue.definition(task).is_none() {
                plain.push(task);
            }
            let waiting = connection.waiting_without_notice(task, &plain, MAX_FINDINGS.into())?;
            findings.extend(waiting.into_iter().map(|id| (id, Command::NoWorker)));
        }
        Ok(findings)
    }

    /// Hands the findings to their handlers until one of them is full: that one gets no more in
    /// this round, lest a later finding of a job overtake an earlier one. Returns whether all were
    /// taken.
    fn hand_over(&self, findings: impl IntoIterator<Item = (Uuid, Command)>) -> bool {
        let mut full = vec![false; self.handlers.len()];
        for (job_id, command) in findings {
            let handler = handler::index(job_id, self.handlers.len());
            full[handler] = full[handler]
                || self.handlers[handler]
                    .try_send(Work::Finding { job_id, command })
                    .is_err();
        }
        !full.contains(&true)
    }

    fn is_quiet_over(&mut self) -> bool {
        let Backlog {
            held_up, in_queues, ..
        } = self.backlog;
        let quiet = &mut self.quiet;
        *self
            .is_quiet_over
            .get_or_insert_with(|| quiet.is_over(Instant::now(), || held_up() || in_queues()))
    }

    /// Finds what is overdue, unless something may still be on its way. What the handlers have no
    /// room for is found again at the next beat.
    fn look_for_overdue(&mut self, connection: &mut Connection) -> Result<(), StoreError> {
        let stalled_outcomes = self.backlog.stalled_outcomes;
        if self.limits == Chore::Done || !self.is_quiet_over() {
            return Ok(());
        }
        let config = &self.service.config;
        let period = config.timeout_check_period;
        if !self.limits.go_on(connection, Upkeep::Limits, period)? {
            return Ok(());
        }
        // Timeouts always come first: a job past both its timeout and its retention has one
        // outcome, also when it is looked at again after a crash.
        for what in [
            Due::Overdue(Overdue::Timeout { grace: GRACE }),
            Due::Overdue(Overdue::StepTimeout { grace: GRACE }),
            Due::Expired(self.known_queues()),
            Due::Overdue(Overdue::OutcomeLost(config.outcome_lost)),
        ] {
            // Which jobs' outcomes they are is known to the handlers alone that have them.
            if matches!(what, Due::Overdue(Overdue::OutcomeLost(_)))
                && (stalled_outcomes() || self.others_have_stalled_outcomes)
            {
                continue;
            }
            if !self.hand_over_pages(connection, &what)? {
                return Ok(());
            }
        }
        if self.look_for_lost(connection)? {
            self.limits = Chore::Done;
        }
        Ok(())
    }

    /// Finds all that is due in this way, page by page. Returns whether the handlers took it.
    fn hand_over_pages(&self, connection: &mut Connection, what: &Due) -> Result<bool, StoreError> {
        let retention = self.service.config.job_retention;
        let limit = MAX_FINDINGS.into();
        let mut last = None;
        loop {
            let asked = Instant::now();
            let (page, command) = match what {
                Due::Overdue(overdue @ Overdue::OutcomeLost(_)) => {
                    (connection.overdue(*overdue, last, limit)?, Command::Expire)
                }
                Due::Overdue(overdue @ (Overdue::Timeout { .. } | Overdue::StepTimeout { .. })) => {
                    (connection.overdue(*overdue, last, limit)?, Command::TimeOut)
                }
                Due::Expired(queues) => {
                    let page = connection.expired(retention, queues, last, limit)?;
                    (page, Command::Expire)
                }
            };
            if asked.elapsed() > STANDSTILL {
                // How long ago this was true is not known.
                return Ok(false);
            }
            let Some(end) = page.last().copied() else {
                return Ok(true);
            };
            last = Some(end);
            let findings = page.into_iter().map(|id| (id, command.clone()));
            if !self.hand_over(findings) || self.stop.is_given() {
                return Ok(false);
            }
        }
    }

    /// Finds jobs whose tasks no worker has. Returns whether all of them were taken.
    fn look_for_lost(&self, connection: &mut Connection) -> Result<bool, StoreError> {
        let Some(time) = self.service.config.task_lost else {
            return Ok(true);
        };
        let mut last = None;
        loop {
            let asked = Instant::now();
            let page = connection.lost_tasks(time, last, MAX_FINDINGS.into())?;
            let Some((end, ..)) = page.last() else {
                return Ok(true);
            };
            last = Some(*end);
            let findings = page
                .into_iter()
                .map(|(job_id, task_id, since)| (job_id, Command::TaskLost { task_id, since }));
            if asked.elapsed() > STANDSTILL || !self.hand_over(findings) || self.stop.is_given() {
                return Ok(false);
            }
        }
    }

    fn known_queues(&self) -> KnownQueues {
        let catalogue = self.service.catalogue.get();
        let single = catalogue.tasks_by_workflow().into_iter();
        let single = single.filter_map(|(workflow, tasks)| match tasks.as_slice() {
            [task] => Some((workflow, task.clone())),
            _ => None,
        });
        let (workflows, tasks) = single.unzip();
        let limits = self.service.limits.get();
        let paused = limits.iter().filter(|(_, limit)| limit.is_paused);
        KnownQueues {
            workflows,
            tasks,
            paused: paused.map(|(queue, _)| queue.clone()).collect(),
        }
    }

    /// Deletes some of the history that is too old.
    fn forget(&mut self, connection: &mut Connection) -> Result<(), StoreError> {
        let config = &self.service.config;
        let period = config.timeout_check_period;
        if self.history == Chore::Done
            || !self.history.go_on(connection, Upkeep::History, period)?
        {
            return Ok(());
        }
        let retention = config.history_retention;
        let forgotten = connection.forget(retention, MAX_FINDINGS.into())?;
        if forgotten > 0 {
            info!("forgot {forgotten} jobs that ended longer than {retention:?} ago");
        }
        // Also where nothing is to be kept any more.
        let results = connection.forget_results(config.keep_results, KEPT_AT_ONCE)?;
        if results > 0 {
            info!("forgot {results} output ESDLs that nobody has taken");
        }
        let inputs = connection.forget_submissions(config.keep_inputs, KEPT_AT_ONCE)?;
        if inputs > 0 {
            info!("forgot what was submitted for {inputs} jobs");
        }
        let swept = connection.sweep_courses()?;
        if swept > 0 {
            info!("forgot {swept} steps of jobs that another service has ended");
        }
        let most = results.max(inputs);
        if forgotten < MAX_FINDINGS.into() && most < KEPT_AT_ONCE.unsigned_abs() {
            self.history = Chore::Done;
        }
        Ok(())
    }
}

/// The progress of a task that one replica does for all in each period.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Chore {
    #[default]
    Done,
    Due,
    /// Claimed by this replica.
    Claimed(Instant),
}

impl Chore {
    /// A round begins. What is claimed goes on: it may have been claimed so late in the last round
    /// that it could not be claimed again.
    fn fall_due(&mut self) {
        if *self == Chore::Done {
            *self = Chore::Due;
        }
    }

    /// Whether it is for this replica to do; if not, it is done.
    fn go_on(
        &mut self,
        connection: &mut Connection,
        task: Upkeep,
        period: Duration,
    ) -> Result<bool, StoreError> {
        *self = match *self {
            // Another replica may have started a new period by now.
            Chore::Claimed(since) if since.elapsed() < period.mul_f64(0.9) => return Ok(true),
            Chore::Due | Chore::Claimed(_) if connection.claim(task, period)? => {
                Chore::Claimed(Instant::now())
            }
            Chore::Done | Chore::Due | Chore::Claimed(_) => Chore::Done,
        };
        Ok(*self != Chore::Done)
    }

    fn is_going_on(self) -> bool {
        matches!(self, Chore::Claimed(_))
    }
}

/// The time in which nothing counts as overdue, while what has been waiting for this replica, for
/// another one, for RabbitMQ or for Postgres is still to be handled. It lasts at least a given
/// time, and until two checks in a row find the queues read to their end: what was in flight unseen
/// at the first has been handled by the second.
#[derive(Debug)]
struct Quiet {
    since: Instant,
    least: Duration,
    read_up: bool,
}

impl Quiet {
    fn new(now: Instant, least: Duration) -> Quiet {
        Quiet {
            since: now,
            least,
            read_up: false,
        }
    }

    /// Starts over, unless the current one lasts longer.
    fn begin(&mut self, now: Instant, least: Duration) {
        let left = self.least.saturating_sub(now - self.since);
        *self = Quiet::new(now, least.max(left));
    }

    fn is_over(&mut self, now: Instant, behind: impl FnOnce() -> bool) -> bool {
        if now - self.since < self.least {
            return false;
        }
        let before = self.read_up;
        self.read_up = !behind();
        before && self.read_up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quiet_lasts_for_its_time_and_until_the_queues_are_read() {
        let start = Instant::now();
        let mut quiet = Quiet::new(start, Duration::from_secs(10));
        for (second, behind, over) in [
            (9, false, false),
            (10, false, false),
            (11, true, false),
            (12, false, false),
            (13, false, true),
            (14, false, true),
            (15, true, false),
            (16, false, false),
            (17, false, true),
        ] {
            let now = start + Duration::from_secs(second);
            assert_eq!(quiet.is_over(now, || behind), over, "after {second} s");
        }
    }

    #[test]
    fn quiet_begins_again_and_never_becomes_shorter() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let mut quiet = Quiet::new(start, Duration::from_secs(60));
        quiet.begin(at(10), Duration::from_secs(5));
        for (second, over) in [(15, false), (59, false), (60, false), (61, true)] {
            assert_eq!(quiet.is_over(at(second), || false), over, "{second} s");
        }
        quiet.begin(at(100), Duration::from_secs(5));
        for (second, over) in [(104, false), (105, false), (106, true)] {
            assert_eq!(quiet.is_over(at(second), || false), over, "{second} s");
        }
    }
}
