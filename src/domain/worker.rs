//! Celery's workers, as they answer when they are asked what they do: which are there, which compute,
//! which are silent, and which tasks of running jobs nobody has.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use uuid::Uuid;

pub use self::absence::{Absence, Depths, RunningTask, TOLD_AFTER, WaitingTask};
pub use self::view::{InVain, LostTask, TaskEnd, TaskView, WorkerView, Workers};

mod absence;
mod view;

/// Further workers are not taken note of.
pub const MAX_KNOWN: usize = 1000;
/// How long a worker that is gone is shown.
const SHOWN_WHEN_GONE: SignedDuration = SignedDuration::from_hours(24);
/// By how much the time since when a process runs may seem to differ from answer to answer.
const SAME_BEGINNING: SignedDuration = SignedDuration::from_secs(20);
/// How many looks a worker misses before that is worth a line in the log.
const MISSES_TO_TELL: i32 = 2;
/// Between two samples of how much a worker has done, and how far they reach back.
const SAMPLE_PERIOD: SignedDuration = SignedDuration::from_mins(5);
const SAMPLED_TIME: SignedDuration = SignedDuration::from_hours(1);

/// What a worker is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WorkerState {
    Idle,
    Busy,
    /// Computes what it has, and takes nothing more.
    Draining,
    /// Has nothing and takes nothing.
    Drained,
    /// Does not answer, for the process that would is the one that computes.
    BusyAndDeaf,
    /// Does not answer, though it is connected to RabbitMQ.
    Silent,
    /// Is not connected to RabbitMQ.
    Gone,
}

impl WorkerState {
    pub const ALL: &[WorkerState] = &[
        WorkerState::Idle,
        WorkerState::Busy,
        WorkerState::Draining,
        WorkerState::Drained,
        WorkerState::BusyAndDeaf,
        WorkerState::Silent,
        WorkerState::Gone,
    ];

    /// As the database, the API and the metrics have it.
    pub fn name(self) -> &'static str {
        match self {
            WorkerState::Idle => "idle",
            WorkerState::Busy => "busy",
            WorkerState::Draining => "draining",
            WorkerState::Drained => "drained",
            WorkerState::BusyAndDeaf => "busy_unanswering",
            WorkerState::Silent => "silent",
            WorkerState::Gone => "gone",
        }
    }

    /// As operators say it.
    pub fn text(self) -> &'static str {
        match self {
            WorkerState::BusyAndDeaf => "busy, does not answer",
            WorkerState::Idle
            | WorkerState::Busy
            | WorkerState::Draining
            | WorkerState::Drained
            | WorkerState::Silent
            | WorkerState::Gone => self.name(),
        }
    }

    /// Whether it has answered.
    pub fn answers(self) -> bool {
        match self {
            WorkerState::Idle
            | WorkerState::Busy
            | WorkerState::Draining
            | WorkerState::Drained => true,
            WorkerState::BusyAndDeaf | WorkerState::Silent | WorkerState::Gone => false,
        }
    }
}

impl Serialize for WorkerState {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// What an operator wants of a worker's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    Drained,
    /// Back to its queues. Celery up to 5.3 forgets those when it loses its connection.
    Resumed,
}

impl Wish {
    pub const ALL: &[Wish] = &[Wish::Drained, Wish::Resumed];

    /// As the database has it.
    pub fn name(self) -> &'static str {
        match self {
            Wish::Drained => "DRAINED",
            Wish::Resumed => "RESUMED",
        }
    }
}

/// A worker as it is known.
#[derive(Debug, Clone, PartialEq)]
pub struct Worker {
    /// Celery's name of it.
    pub host: String,
    pub state: WorkerState,
    pub state_since: Timestamp,
    pub first_seen: Timestamp,
    pub last_seen: Timestamp,
    /// How many looks in a row it has not answered.
    pub misses: i32,
    /// Its main process, and when that began.
    pub pid: Option<i64>,
    pub began_at: Option<Timestamp>,
    /// Celery's name of the kind of its pool, and how many tasks it can compute at once.
    pub pool: Option<String>,
    pub pool_size: Option<i64>,
    /// How many tasks RabbitMQ gives it at once; 0 for any number.
    pub prefetch: Option<i64>,
    /// Celery's version.
    pub celery: Option<String>,
    /// From which it takes tasks.
    pub queues: BTreeSet<String>,
    /// From which it has since its process began.
    pub serves: BTreeSet<String>,
    pub wish: Option<Wish>,
    /// How many tasks its process says that it has begun.
    pub process_count: i64,
    /// How many it has begun in all its processes.
    pub begun: i64,
    /// What that was at times of the last hour.
    pub samples: Vec<(Timestamp, i64)>,
    pub tasks: Vec<CurrentTask>,
}

/// A task that a worker computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CurrentTask {
    pub id: String,
    pub name: String,
    /// None if it is no job's that is known.
    pub job_id: Option<Uuid>,
    /// When it was first seen there.
    pub first_seen: Timestamp,
}

/// What a worker has answered; it may not have had the time for everything.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    pub stats: Option<Stats>,
    /// The tasks that it computes.
    pub tasks: Option<Vec<SaidTask>>,
    pub queues: Option<BTreeSet<String>>,
    /// Celery's version, which only new ones are asked for.
    pub celery: Option<String>,
}

/// A task that a worker says it computes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SaidTask {
    pub id: String,
    pub name: String,
    /// Its job, as far as its arguments are told: possibly that of another orchestrator.
    pub job_id: Option<Uuid>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    pub pid: Option<i64>,
    pub uptime: Option<SignedDuration>,
    pub pool: Option<String>,
    pub pool_size: Option<i64>,
    pub prefetch: Option<i64>,
    /// How many tasks its process has begun.
    pub count: i64,
}

/// What has been seen in one look.
#[derive(Debug, Default)]
pub struct Seen {
    /// When the workers were asked, and when they had answered, by the database's clock.
    pub asked_at: Timestamp,
    pub now: Timestamp,
    pub answers: BTreeMap<String, Answer>,
    /// Of those who have not answered, whom RabbitMQ knows.
    pub connected: BTreeSet<String>,
    /// The tasks of running jobs.
    pub running: Vec<RunningTask>,
    /// Tasks of jobs that wait, of those queues in which there is nothing, and those that nobody had
    /// before.
    pub waiting: Vec<WaitingTask>,
    /// How many more wait than are among those, by their queues.
    pub more_waiting: BTreeMap<String, i64>,
    /// The jobs of tasks that workers have though those do not run, as far as the database knows them.
    pub others: BTreeMap<String, Uuid>,
    /// Of the queues of tasks that nobody has.
    pub depths: Depths,
}

/// What follows from a look.
#[derive(Debug, Default, PartialEq)]
pub struct Look {
    pub workers: Vec<Worker>,
    /// Workers that are forgotten.
    pub forgotten: Vec<String>,
    pub absences: Vec<Absence>,
    /// How many more tasks are as absent as those of their queues of which somebody is told.
    pub more_absent: i64,
    pub news: Vec<News>,
    /// Queues that workers are to take tasks from again.
    pub restored: Vec<(String, String)>,
}

/// Something for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    Appeared(String),
    Restarted(String),
    Silent(String),
    Back(String),
    Gone(String),
    /// No worker has this task of a job, since then.
    Absent {
        job_id: Uuid,
        task_id: String,
        since: Timestamp,
    },
}

/// Whether a look is to ask this worker for Celery's version: for a while, if it does not tell.
pub fn is_new(
    known: &BTreeMap<String, Worker>,
    host: &str,
    answer: &Answer,
    now: Timestamp,
) -> bool {
    known.get(host).is_none_or(|worker| {
        let is_young = now.duration_since(worker.first_seen) < SAMPLE_PERIOD;
        worker.celery.is_none() && is_young || worker.is_restarted(answer, now)
    })
}

/// The jobs that workers say they compute tasks of, where those are not what is known to run: any may be
/// another orchestrator's.
pub fn unknown_jobs<'a>(
    answers: &'a BTreeMap<String, Answer>,
    running: &'a [RunningTask],
) -> impl Iterator<Item = (&'a str, Uuid)> {
    let tasks = answers.values().filter_map(|answer| answer.tasks.as_ref());
    let runs = |id: &str| running.iter().any(|task| task.task_id == id);
    let others = tasks.flatten().filter(move |task| !runs(&task.id));
    others.filter_map(|task| Some((task.id.as_str(), task.job_id?)))
}

/// Since when nobody has taken tasks from queues that workers were seen to take some from, as far as those
/// say that none does any more.
pub fn deserted(workers: &BTreeMap<String, Worker>) -> BTreeMap<String, Timestamp> {
    let mut last: BTreeMap<&str, Option<Timestamp>> = BTreeMap::new();
    for worker in workers.values() {
        let until = match worker.state {
            WorkerState::Gone => Some(worker.last_seen),
            WorkerState::Draining | WorkerState::Drained => Some(worker.state_since),
            WorkerState::Idle
            | WorkerState::Busy
            | WorkerState::BusyAndDeaf
            | WorkerState::Silent => None,
        };
        for queue in &worker.serves {
            let known = last.entry(queue).or_insert(until);
            // One that takes some outlasts all others.
            *known = until.and_then(|until| known.map(|known| known.max(until)));
        }
    }
    let last = last.into_iter();
    last.filter_map(|(queue, until)| Some((queue.to_owned(), until?)))
        .collect()
}

/// What to make of a look, when `known` was known and no worker had what is in `before`.
pub fn look(known: BTreeMap<String, Worker>, before: &[Absence], seen: &Seen) -> Look {
    let mut look = Look::default();
    let jobs: BTreeMap<&str, Uuid> = seen
        .running
        .iter()
        .map(|task| (task.task_id.as_str(), task.job_id))
        .chain(seen.others.iter().map(|(task, job)| (task.as_str(), *job)))
        .collect();
    let known_hosts: BTreeSet<String> = known.keys().cloned().collect();
    let is_crowded = known.len() > MAX_KNOWN / 2;
    for (host, worker) in known {
        let next = match seen.answers.get(&host) {
            Some(answer) => worker.answered(answer, &jobs, seen.now, &mut look),
            None => worker.missed(seen),
        };
        if next.is_over(seen.now, is_crowded) {
            look.forgotten.push(next.host);
            continue;
        }
        look.news.extend(news(&worker, &next));
        look.workers.push(next);
    }
    for (host, answer) in &seen.answers {
        if !known_hosts.contains(host) && look.workers.len() < MAX_KNOWN {
            let new = Worker::new(host, seen.now).answered(answer, &jobs, seen.now, &mut look);
            look.news.push(News::Appeared(host.clone()));
            look.workers.push(new);
        }
    }
    let absences = absence::find(&look.workers, before, seen);
    look.news.extend(absences.iter().filter_map(|absence| {
        let is_news =
            absence.is_told && !before.iter().any(|one| one.is_told && one.is_of(absence));
        is_news.then(|| News::Absent {
            job_id: absence.job_id,
            task_id: absence.task_id.clone(),
            since: absence.since,
        })
    }));
    look.more_absent = absence::more(&look.workers, &absences, seen);
    look.absences = absences;
    look
}

fn news(before: &Worker, next: &Worker) -> Option<News> {
    let host = next.host.clone();
    let was_told = before.misses >= MISSES_TO_TELL || before.state == WorkerState::Gone;
    match next.state {
        WorkerState::Gone => (before.state != WorkerState::Gone).then_some(News::Gone(host)),
        WorkerState::Silent => (next.misses == MISSES_TO_TELL).then_some(News::Silent(host)),
        WorkerState::BusyAndDeaf => None,
        WorkerState::Idle | WorkerState::Busy | WorkerState::Draining | WorkerState::Drained => {
            if (next.pid, next.began_at) != (before.pid, before.began_at) {
                Some(News::Restarted(host))
            } else {
                was_told.then_some(News::Back(host))
            }
        }
    }
}

impl Worker {
    pub(crate) fn new(host: &str, now: Timestamp) -> Worker {
        Worker {
            host: host.to_owned(),
            state: WorkerState::Idle,
            state_since: now,
            first_seen: now,
            last_seen: now,
            misses: 0,
            pid: None,
            began_at: None,
            pool: None,
            pool_size: None,
            prefetch: None,
            celery: None,
            queues: BTreeSet::new(),
            serves: BTreeSet::new(),
            wish: None,
            process_count: 0,
            begun: 0,
            samples: Vec::new(),
            tasks: Vec::new(),
        }
    }

    /// Whether its process is another one than before.
    fn is_restarted(&self, answer: &Answer, now: Timestamp) -> bool {
        let Some(stats) = &answer.stats else {
            return false;
        };
        // In containers they all have the same number.
        let began_at = began_at(stats, now);
        let differs = |a: Timestamp, b: Timestamp| a.duration_since(b).abs() > SAME_BEGINNING;
        self.pid != stats.pid
            || matches!((self.began_at, began_at), (Some(a), Some(b)) if differs(a, b))
    }

    /// It has answered.
    fn answered(
        &self,
        answer: &Answer,
        jobs: &BTreeMap<&str, Uuid>,
        now: Timestamp,
        look: &mut Look,
    ) -> Worker {
        let mut next = Worker {
            last_seen: now,
            misses: 0,
            ..self.clone()
        };
        if self.is_restarted(answer, now) {
            next = Worker {
                pid: None,
                began_at: None,
                celery: None,
                queues: BTreeSet::new(),
                serves: BTreeSet::new(),
                wish: None,
                process_count: 0,
                tasks: Vec::new(),
                ..next
            };
        }
        if let Some(stats) = &answer.stats {
            next.has_stats(stats, now);
        }
        next.celery = answer.celery.clone().or(next.celery);
        if let Some(queues) = &answer.queues {
            next.queues.clone_from(queues);
            next.serves.extend(queues.iter().cloned());
            if next.wish == Some(Wish::Resumed) {
                let lost = next.serves.difference(queues);
                look.restored
                    .extend(lost.map(|queue| (next.host.clone(), queue.clone())));
            }
        }
        if let Some(tasks) = &answer.tasks {
            next.tasks = self.current(tasks, jobs, now);
        }
        let takes_nothing = next.queues.is_empty() && !next.serves.is_empty();
        let state = match (next.tasks.is_empty(), takes_nothing) {
            (true, true) => WorkerState::Drained,
            (true, false) => WorkerState::Idle,
            (false, true) => WorkerState::Draining,
            (false, false) => WorkerState::Busy,
        };
        next.in_state(state, now)
    }

    fn has_stats(&mut self, stats: &Stats, now: Timestamp) {
        // It stays what it was, lest it seem to change.
        self.began_at = self.began_at.or(began_at(stats, now));
        self.pid = stats.pid;
        self.pool.clone_from(&stats.pool);
        self.pool_size = stats.pool_size;
        self.prefetch = stats.prefetch;
        let more = stats.count.saturating_sub(self.process_count).max(0);
        // What was done before it was first seen is not of this hour.
        if self.first_seen < now {
            self.begun = self.begun.saturating_add(more);
        }
        self.process_count = stats.count;
        let begun = self.begun;
        let is_due = |(at, _): &(Timestamp, i64)| now.duration_since(*at) >= SAMPLE_PERIOD;
        if self.samples.last().is_none_or(is_due) {
            self.samples.push((now, begun));
        }
        self.samples
            .retain(|(at, _)| *at <= now && now.duration_since(*at) <= SAMPLED_TIME);
    }

    fn current(
        &self,
        tasks: &[SaidTask],
        jobs: &BTreeMap<&str, Uuid>,
        now: Timestamp,
    ) -> Vec<CurrentTask> {
        let mut ids = BTreeSet::new();
        let tasks = tasks.iter().filter(|task| ids.insert(task.id.as_str()));
        tasks
            .map(|SaidTask { id, name, .. }| {
                let before = self.tasks.iter().find(|one| one.id == *id);
                CurrentTask {
                    id: id.clone(),
                    name: name.clone(),
                    job_id: jobs
                        .get(id.as_str())
                        .copied()
                        .or(before.and_then(|one| one.job_id)),
                    first_seen: before.map_or(now, |one| one.first_seen),
                }
            })
            .collect()
    }

    /// It has not answered.
    fn missed(&self, seen: &Seen) -> Worker {
        let next = Worker {
            misses: self.misses.saturating_add(1),
            ..self.clone()
        };
        if !seen.connected.contains(&self.host) {
            return Worker {
                tasks: Vec::new(),
                ..next
            }
            .in_state(WorkerState::Gone, seen.now);
        }
        let is_solo = self
            .pool
            .as_deref()
            .is_some_and(|pool| pool.contains("solo"));
        let mut running = seen.running.iter();
        let computes = is_solo
            && running.any(|task| self.serves.contains(&task.queue) && !seen.has(&task.task_id));
        let state = match computes {
            true => WorkerState::BusyAndDeaf,
            false => WorkerState::Silent,
        };
        next.in_state(state, seen.now)
    }

    fn in_state(self, state: WorkerState, now: Timestamp) -> Worker {
        let is_new = self.state != state;
        Worker {
            state,
            state_since: if is_new { now } else { self.state_since },
            ..self
        }
    }

    /// Whether it is to be forgotten; where there are very many, at once when it is gone.
    fn is_over(&self, now: Timestamp, is_crowded: bool) -> bool {
        let is_old = now.duration_since(self.last_seen) > SHOWN_WHEN_GONE;
        self.state == WorkerState::Gone && (is_old || is_crowded)
    }
}

impl Seen {
    /// Whether somebody has answered that it computes this task.
    fn has(&self, task_id: &str) -> bool {
        self.answers.values().any(|answer| {
            let mut tasks = answer.tasks.iter().flatten();
            tasks.any(|task| task.id == task_id)
        })
    }
}

fn began_at(stats: &Stats, now: Timestamp) -> Option<Timestamp> {
    now.checked_sub(stats.uptime?).ok()
}

#[cfg(test)]
mod tests;
