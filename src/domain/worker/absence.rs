//! Tasks of jobs that no worker has, and that are in no queue. Each doubt is in favour of the task: a worker that does not
//! answer may be computing it, and so may one that nothing is known of.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::{Seen, Worker, WorkerState};
use crate::domain::overview::Depth;

/// For how long it is absent before anybody is told.
pub const TOLD_AFTER: SignedDuration = SignedDuration::from_secs(60);
/// How old the last look at it may be: after an outage it counts anew.
const LAST_LOOK: SignedDuration = SignedDuration::from_secs(90);

/// Task queues by their names.
pub type Depths = BTreeMap<String, Depth>;

/// The current task of a job that a worker has started.
#[derive(Debug, Clone, PartialEq)]
pub struct RunningTask {
    pub job_id: Uuid,
    pub task_id: String,
    pub queue: String,
    /// 0 is the highest.
    pub priority: i32,
    /// When it was put on its queue.
    pub submitted_at: Timestamp,
    /// Its last START.
    pub started_at: Timestamp,
}

/// The current task of a job that is in its queue, as far as the database knows: no worker has begun it.
#[derive(Debug, Clone, PartialEq)]
pub struct WaitingTask {
    pub job_id: Uuid,
    pub task_id: String,
    pub queue: String,
    /// Whether that was kept. Otherwise it is what the workflow definitions say by now, and they may have said
    /// something else when it was put there.
    pub queue_is_kept: bool,
    /// When it was put there.
    pub submitted_at: Timestamp,
}

/// A task that no worker has.
#[derive(Debug, Clone, PartialEq)]
pub struct Absence {
    pub job_id: Uuid,
    pub task_id: String,
    pub since: Timestamp,
    /// When it was last found absent.
    pub confirmed_at: Timestamp,
    /// It may be in its queue or with somebody who does not say so, as when whoever had it has died and
    /// RabbitMQ gives it to another: reason enough to end nothing.
    pub may_wait: bool,
    /// The log has it.
    pub is_told: bool,
}

impl Absence {
    pub(super) fn is_of(&self, other: &Absence) -> bool {
        self.task_id == other.task_id
    }
}

pub(super) fn find(workers: &[Worker], before: &[Absence], seen: &Seen) -> Vec<Absence> {
    let mut found = begun(workers, before, seen);
    found.extend(never_begun(workers, before, seen));
    // In doubt nobody's job ends, but what was told stays so until somebody has it.
    let told = before.iter().filter(|one| one.is_told);
    let left: Vec<_> = told
        .filter(|one| !found.iter().any(|other| one.is_of(other)))
        .filter(|one| !seen.has(&one.task_id) && is_wanted(one, seen))
        .map(|one| Absence {
            may_wait: true,
            ..one.clone()
        })
        .collect();
    found.extend(left);
    found
}

/// How many more tasks are as absent as those of their queues of which somebody is told.
pub(super) fn more(workers: &[Worker], absences: &[Absence], seen: &Seen) -> i64 {
    let told = absences.iter().filter(|one| one.is_told);
    let told: BTreeSet<&str> = told.map(|one| one.task_id.as_str()).collect();
    let waiting = seen.waiting.iter();
    let of_told = waiting.filter(|task| told.contains(task.task_id.as_str()));
    let queues: BTreeSet<&str> = of_told.map(|task| task.queue.as_str()).collect();
    let more = seen.more_waiting.iter();
    more.filter(|(queue, _)| queues.contains(queue.as_str()))
        .filter(|(queue, _)| is_nowhere(queue, workers, seen).is_some())
        .map(|(_, more)| more)
        .sum()
}

/// Whether it still is the task of its job, which nobody has begun since.
fn is_wanted(absence: &Absence, seen: &Seen) -> bool {
    let mut running = seen.running.iter();
    let mut waiting = seen.waiting.iter();
    running.any(|task| task.task_id == absence.task_id && task.started_at <= absence.since)
        || waiting.any(|task| task.task_id == absence.task_id)
}

/// The absence of a task, with what is known of it since it was begun or put on its queue (`from`).
fn counted(
    (job_id, task_id, from): (Uuid, &str, Timestamp),
    may_wait: bool,
    before: &[Absence],
    seen: &Seen,
) -> Absence {
    let mut known = before.iter();
    let known = known.find(|one| one.task_id == task_id && one.since >= from);
    let fresh = known.filter(|one| seen.now.duration_since(one.confirmed_at) <= LAST_LOOK);
    // What may have waited was not absent as surely as what cannot.
    let sure = fresh.filter(|one| may_wait || !one.may_wait);
    let since = sure.map_or(seen.now, |one| one.since);
    Absence {
        job_id,
        task_id: task_id.to_owned(),
        since,
        confirmed_at: seen.now,
        may_wait,
        is_told: known.is_some_and(|one| one.is_told),
    }
}

/// Those that workers have begun.
fn begun(workers: &[Worker], before: &[Absence], seen: &Seen) -> Vec<Absence> {
    let nobody_has =
        |task: &&RunningTask| !seen.has(&task.task_id) && task.started_at < seen.asked_at;
    let absent = seen.running.iter().filter(nobody_has);
    let absent = absent.filter(|task| is_certain(task, workers, seen));
    absent
        .map(|task| {
            let which = (task.job_id, task.task_id.as_str(), task.started_at);
            let absence = counted(which, false, before, seen);
            let may_wait = may_wait(task, absence.since, workers, seen);
            let is_long = seen.now.duration_since(absence.since) >= TOLD_AFTER;
            Absence {
                may_wait,
                is_told: absence.is_told || !may_wait && is_long,
                ..absence
            }
        })
        .collect()
}

/// Those that no worker has begun, and that are not in their queues either.
fn never_begun(workers: &[Worker], before: &[Absence], seen: &Seen) -> Vec<Absence> {
    let nobody_has =
        |task: &&WaitingTask| !seen.has(&task.task_id) && task.submitted_at < seen.asked_at;
    let absent = seen.waiting.iter().filter(nobody_has);
    absent
        .filter_map(|task| {
            let is_certain = is_nowhere(&task.queue, workers, seen)? && task.queue_is_kept;
            let which = (task.job_id, task.task_id.as_str(), task.submitted_at);
            let absence = counted(which, !is_certain, before, seen);
            let is_long = seen.now.duration_since(absence.since) >= TOLD_AFTER;
            Some(Absence {
                is_told: absence.is_told || is_long,
                ..absence
            })
        })
        .collect()
}

/// Whether a task of this queue that no worker has named is nowhere. None if it may well be in its queue,
/// or with one that does not say so. It is not certain where somebody consumes the queue who cannot be
/// asked, but has nothing to do.
fn is_nowhere(queue: &str, workers: &[Worker], seen: &Seen) -> Option<bool> {
    let depth = seen.depths.get(queue)?;
    // One that computes may hold another: one more than its prefetch if it acknowledges what it begins.
    let holds_more = |worker: &Worker| {
        worker.state.answers() && worker.serves.contains(queue) && !worker.tasks.is_empty()
    };
    let may_have = |worker: &Worker| may_have(worker, queue, None, seen) || holds_more(worker);
    if depth.messages > 0 || workers.iter().any(may_have) {
        return None;
    }
    let consumers = usize::try_from(depth.consumers).ok()?;
    let strangers = consumers.saturating_sub(who_answer(queue, workers));
    let of_strangers = seen
        .running
        .iter()
        .filter(|task| task.queue == queue && !seen.has(&task.task_id));
    match (strangers, of_strangers.count()) {
        (0, _) => Some(true),
        (strangers, busy) => (busy < strangers).then_some(false),
    }
}

/// Whether all who may have the task have answered: all that serve its queue and are connected, and as
/// many as RabbitMQ says that consume it.
fn is_certain(task: &RunningTask, workers: &[Worker], seen: &Seen) -> bool {
    let may_have_it = |worker: &Worker| may_have(worker, &task.queue, Some(&task.task_id), seen);
    if workers.iter().any(may_have_it) {
        return false;
    }
    let Some(depth) = seen.depths.get(&task.queue) else {
        return false;
    };
    let answering = who_answer(&task.queue, workers);
    usize::try_from(depth.consumers).is_ok_and(|count| count <= answering)
}

/// Whether a worker that has not said so may have a task of this queue.
fn may_have(worker: &Worker, queue: &str, task_id: Option<&str>, seen: &Seen) -> bool {
    match worker.state {
        WorkerState::Gone => false,
        WorkerState::BusyAndDeaf | WorkerState::Silent => {
            let mut tasks = worker.tasks.iter();
            worker.serves.is_empty()
                || worker.serves.contains(queue)
                || tasks.any(|one| Some(one.id.as_str()) == task_id)
        }
        WorkerState::Idle | WorkerState::Busy | WorkerState::Draining | WorkerState::Drained => {
            // It had no time to say so.
            let answer = seen.answers.get(&worker.host);
            answer.is_none_or(|answer| answer.tasks.is_none())
        }
    }
}

/// How many of those that have answered take tasks from a queue.
fn who_answer(queue: &str, workers: &[Worker]) -> usize {
    let its = |worker: &&Worker| worker.state.answers() && worker.queues.contains(queue);
    workers.iter().filter(its).count()
}

/// Whether RabbitMQ may have given it a task beside those that it computes. (What those are could be asked,
/// but the answer would have their ESDLs.)
fn holds_more(worker: &Worker, queue: &str) -> bool {
    let tasks = i64::try_from(worker.tasks.len()).unwrap_or(i64::MAX);
    let is_served = worker.state.answers() && worker.serves.contains(queue);
    is_served && tasks > 0 && worker.prefetch.is_none_or(|most| most == 0 || most > tasks)
}

/// Whether the task may be waiting for a worker, in its queue or with one that computes another first.
fn may_wait(task: &RunningTask, since: Timestamp, workers: &[Worker], seen: &Seen) -> bool {
    let mut all = workers.iter();
    if all.any(|worker| holds_more(worker, &task.queue)) {
        return true;
    }
    // RabbitMQ gives out a task that has come back before any of its priority that came later.
    let overtaken = seen.running.iter().any(|other| {
        other.queue == task.queue
            && other.priority >= task.priority
            && other.submitted_at > since
            && other.started_at > since
    });
    let waiting = seen.depths.get(&task.queue).map(|depth| depth.messages);
    !overtaken && waiting.is_none_or(|messages| messages > 0)
}
