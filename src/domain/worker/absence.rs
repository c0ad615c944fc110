//! Tasks of running jobs that no worker has. Each doubt is in favour of the task: a worker that does not
//! answer may be computing it, and so may one that nothing is known of.

use std::collections::BTreeMap;

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

/// A task that no worker has.
#[derive(Debug, Clone, PartialEq)]
pub struct Absence {
    pub job_id: Uuid,
    pub task_id: String,
    pub since: Timestamp,
    /// When it was last found absent.
    pub confirmed_at: Timestamp,
    /// It may be in its queue: whoever had it has died, and RabbitMQ gives it to another.
    pub may_wait: bool,
    /// The log has it.
    pub is_told: bool,
}

impl Absence {
    pub(super) fn is_of(&self, other: &Absence) -> bool {
        self.task_id == other.task_id && self.since == other.since
    }
}

pub(super) fn find(workers: &[Worker], before: &[Absence], seen: &Seen) -> Vec<Absence> {
    let nobody_has =
        |task: &&RunningTask| !seen.has(&task.task_id) && task.started_at < seen.asked_at;
    let absent = seen.running.iter().filter(nobody_has);
    let absent = absent.filter(|task| is_certain(task, workers, seen));
    absent
        .map(|task| {
            let known = before.iter().find(|one| {
                one.task_id == task.task_id
                    && one.since >= task.started_at
                    && seen.now.duration_since(one.confirmed_at) <= LAST_LOOK
            });
            let since = known.map_or(seen.now, |one| one.since);
            let may_wait = may_wait(task, since, workers, seen);
            Absence {
                job_id: task.job_id,
                task_id: task.task_id.clone(),
                since,
                confirmed_at: seen.now,
                may_wait,
                is_told: known.is_some_and(|one| one.is_told)
                    || !may_wait && seen.now.duration_since(since) >= TOLD_AFTER,
            }
        })
        .collect()
}

/// Whether all who may have the task have answered: all that serve its queue and are connected, and as
/// many as RabbitMQ says that consume it.
fn is_certain(task: &RunningTask, workers: &[Worker], seen: &Seen) -> bool {
    let may_have_it = |worker: &Worker| match worker.state {
        WorkerState::Gone => false,
        WorkerState::BusyAndDeaf | WorkerState::Silent => {
            worker.serves.is_empty()
                || worker.serves.contains(&task.queue)
                || worker.tasks.iter().any(|one| one.id == task.task_id)
        }
        WorkerState::Idle | WorkerState::Busy | WorkerState::Draining | WorkerState::Drained => {
            // It had no time to say so.
            let answer = seen.answers.get(&worker.host);
            answer.is_none_or(|answer| answer.tasks.is_none())
        }
    };
    if workers.iter().any(may_have_it) {
        return false;
    }
    let Some(depth) = seen.depths.get(&task.queue) else {
        return false;
    };
    let consumers = workers
        .iter()
        .filter(|worker| worker.state.answers() && worker.queues.contains(&task.queue));
    usize::try_from(depth.consumers).is_ok_and(|count| count <= consumers.count())
}

/// Whether the task may be waiting for a worker, in its queue or with one that computes another first.
fn may_wait(task: &RunningTask, since: Timestamp, workers: &[Worker], seen: &Seen) -> bool {
    let holds_more = |worker: &&Worker| {
        let tasks = i64::try_from(worker.tasks.len()).unwrap_or(i64::MAX);
        let is_served = worker.state.answers() && worker.serves.contains(&task.queue);
        is_served && tasks > 0 && worker.prefetch.is_none_or(|most| most == 0 || most > tasks)
    };
    if workers.iter().any(|worker| holds_more(&worker)) {
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
