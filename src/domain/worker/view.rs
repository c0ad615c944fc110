//! What operators see of the workers.

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use uuid::Uuid;

use super::{SAMPLE_PERIOD, Worker, WorkerState};
use crate::domain::job::Outcome;
use crate::domain::overview::spoken;
use crate::domain::text::one_line;

/// How long after the end of its job, or of its attempt, a worker may have a task: it has been told to stop
/// then, or has only just sent its result.
const WINDS_UP: SignedDuration = SignedDuration::from_secs(30);

/// All workers, as of the last look.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Workers {
    /// None before the first look, or when nobody looks.
    pub looked_at: Option<Timestamp>,
    pub workers: Vec<WorkerView>,
    /// Tasks of jobs that no worker has had for a minute, and that are in no queue.
    pub lost_tasks: Vec<LostTask>,
    /// How many more are as lost, but are not looked at one by one: those are the oldest ones of a queue.
    pub more_lost_tasks: i64,
}

/// A task of a job that no worker has, and that is in no queue.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LostTask {
    pub job_id: Uuid,
    pub task_id: String,
    pub since: Timestamp,
    /// Whether no worker has ever begun it.
    pub never_begun: bool,
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
    /// How its job, or its attempt at a step, has ended: it is computed for nobody.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<TaskEnd>,
}

/// How the job of a task, or its attempt at a step, has ended.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskEnd {
    #[serde(serialize_with = "name")]
    pub outcome: Outcome,
    pub at: Timestamp,
}

fn name<S: serde::Serializer>(outcome: &Outcome, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(outcome.name())
}

impl TaskEnd {
    /// What its job did, or was done to it.
    pub fn in_words(&self) -> &'static str {
        match self.outcome {
            Outcome::Succeeded => "has succeeded",
            Outcome::Failed => "has failed",
            Outcome::Cancelled => "was cancelled",
            Outcome::CrashLoop => "was ended after the loss of its workers",
            Outcome::Rejected => "was refused",
            Outcome::TimedOut => "was ended by its timeout",
            Outcome::Expired => "was given up",
            Outcome::Lost => "was given up as lost",
        }
    }
}

/// A worker that goes on with a task though its job, or its attempt, ended a while ago.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InVain<'w> {
    pub worker: &'w WorkerView,
    pub task: &'w TaskView,
    pub job_id: Uuid,
    pub end: &'w TaskEnd,
}

impl InVain<'_> {
    /// `worker w@h computes job a first try (dd134831) that was cancelled 2 min ago`; harmless.
    pub fn in_words(&self, now: Timestamp) -> String {
        let id = self.job_id.to_string();
        let job = match &self.task.reference {
            Some(reference) => format!("{} ({})", one_line(reference), &id[..8]),
            None => id,
        };
        // The job itself may have gone on with another attempt, or another step.
        let what = match &self.task.step {
            Some(step) => format!("an attempt at {} of job {job}", one_line(step)),
            None => format!("job {job}"),
        };
        format!(
            "worker {} computes {what}, which {} {} ago",
            one_line(&self.worker.host),
            self.end.in_words(),
            spoken(now.duration_since(self.end.at))
        )
    }
}

impl WorkerView {
    /// `; it has the job first try (dd134831)`; harmless.
    pub fn jobs_in_words(&self) -> String {
        let job = |task: &TaskView| {
            let id = task.job_id?.to_string();
            Some(match &task.reference {
                Some(reference) => format!("{} ({})", one_line(reference), &id[..8]),
                None => id,
            })
        };
        let jobs: Vec<_> = self.tasks.iter().filter_map(job).collect();
        match &jobs[..] {
            [] => String::new(),
            [one] => format!("; it has the job {one}"),
            all => format!("; it has the jobs {}", all.join(", ")),
        }
    }

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

    /// Who goes on with what has ended, by the last look. What a silent one does is not known.
    pub fn in_vain(&self) -> impl Iterator<Item = InVain<'_>> {
        let answering = self.workers.iter().filter(|worker| worker.state.answers());
        let tasks =
            answering.flat_map(|worker| worker.tasks.iter().map(move |task| (worker, task)));
        tasks.filter_map(|(worker, task)| {
            let (job_id, end) = (task.job_id?, task.ended.as_ref()?);
            let time = self.looked_at?.duration_since(end.at);
            (time >= WINDS_UP).then_some(InVain {
                worker,
                task,
                job_id,
                end,
            })
        })
    }

    /// How many tasks are lost.
    pub fn count_lost(&self) -> i64 {
        let told = i64::try_from(self.lost_tasks.len()).unwrap_or(i64::MAX);
        told.saturating_add(self.more_lost_tasks)
    }

    /// Of how many lost tasks nothing is said where the first `named` are told one by one:
    /// `12 more tasks are lost: no worker has them, and they are in no queue`.
    pub fn more_lost(&self, named: usize) -> Option<String> {
        let named = i64::try_from(named.min(self.lost_tasks.len())).unwrap_or(i64::MAX);
        match self.count_lost() - named {
            ..=0 => None,
            1 => Some("1 more task is lost: no worker has it, and it is in no queue".to_owned()),
            more => Some(format!(
                "{more} more tasks are lost: no worker has them, and they are in no queue"
            )),
        }
    }

    /// How many tasks they compute, as far as they say so.
    pub fn tasks(&self) -> usize {
        let answering = self.workers.iter().filter(|worker| worker.state.answers());
        answering.map(|worker| worker.tasks.len()).sum()
    }
}
