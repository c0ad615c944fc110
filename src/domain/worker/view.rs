//! What operators see of the workers.

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use uuid::Uuid;

use super::{SAMPLE_PERIOD, Worker, WorkerState};

/// All workers, as of the last look.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Workers {
    /// None before the first look, or when nobody looks.
    pub looked_at: Option<Timestamp>,
    pub workers: Vec<WorkerView>,
    /// Tasks of running jobs that no worker has had for a minute.
    pub lost_tasks: Vec<LostTask>,
}

/// A task of a running job that no worker has.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LostTask {
    pub job_id: Uuid,
    pub task_id: String,
    pub since: Timestamp,
}

/// A worker.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WorkerView {
    pub host: String,
    pub state: WorkerState,
    pub since: Timestamp,
    pub first_seen: Timestamp,
    pub last_seen: Timestamp,
    /// When its process began.
    pub began_at: Option<Timestamp>,
    /// `prefork`, `solo` or the like.
    pub pool: Option<String>,
    pub pool_size: Option<i64>,
    pub celery: Option<String>,
    /// Those from which it takes tasks or, if it takes none, from which it has.
    pub queues: Vec<String>,
    pub tasks: Vec<TaskView>,
    /// Tasks that it has begun per hour, as of the last hour; None before it was seen for a while.
    pub tasks_per_hour: Option<f64>,
    /// How many of the tasks that it was seen with have ended in the last hour, and how many of them
    /// not with a success or a cancel.
    pub ended: i64,
    pub failed: i64,
}

/// A task that a worker computes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskView {
    pub id: String,
    pub name: String,
    pub job_id: Option<Uuid>,
    pub reference: Option<String>,
    pub workflow: Option<String>,
    /// The title of the job's step, if it has several.
    pub step: Option<String>,
    /// When it was started or, if it is no job's, first seen.
    pub since: Timestamp,
}

impl WorkerView {
    /// How many tasks it computes at once, as far as it has said.
    pub fn processes(&self) -> usize {
        let pool = self.pool_size.and_then(|size| usize::try_from(size).ok());
        pool.unwrap_or(1).max(1)
    }

    pub fn new(worker: Worker, tasks: Vec<TaskView>, (ended, failed): (i64, i64)) -> WorkerView {
        let tasks_per_hour = worker.tasks_per_hour();
        let queues = match worker.queues.is_empty() {
            true => worker.serves,
            false => worker.queues,
        };
        WorkerView {
            host: worker.host,
            state: worker.state,
            since: worker.state_since,
            first_seen: worker.first_seen,
            last_seen: worker.last_seen,
            began_at: worker.began_at,
            pool: worker.pool.map(kind),
            pool_size: worker.pool_size,
            celery: worker.celery,
            queues: queues.into_iter().collect(),
            tasks,
            tasks_per_hour,
            ended,
            failed,
        }
    }
}

/// `prefork` of `celery.concurrency.prefork:TaskPool`.
fn kind(pool: String) -> String {
    let name = pool.strip_prefix("celery.concurrency.");
    let name = name.and_then(|name| name.split(':').next());
    name.map_or(pool.clone(), str::to_owned)
}

impl Worker {
    fn tasks_per_hour(&self) -> Option<f64> {
        let (from, begun) = self.samples.first()?;
        let time = self.last_seen.duration_since(*from);
        if time < SAMPLE_PERIOD {
            return None;
        }
        let hours = time.as_secs_f64() / SignedDuration::from_hours(1).as_secs_f64();
        Some((self.begun - begun) as f64 / hours)
    }
}

impl Workers {
    /// How many are in a state.
    pub fn count(&self, state: WorkerState) -> usize {
        let workers = self.workers.iter();
        workers.filter(|worker| worker.state == state).count()
    }

    /// How many tasks they compute, as far as they say so.
    pub fn tasks(&self) -> usize {
        let answering = self.workers.iter().filter(|worker| worker.state.answers());
        answering.map(|worker| worker.tasks.len()).sum()
    }
}
