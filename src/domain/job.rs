//! What happens to a job: [`decide()`], a pure and total function from a job's [`State`] and a
//! [`Command`] to a [`Decision`]. It knows no broker, database, clock or random source.
//!
//! ```text
//!            Submit               Start              Result              told
//!  Unknown ──────────> Submitted ────────> Running ─────────> Ending ─────────> Ended
//!   │  │                │   ▲                 │                ▲ ▲               ▲
//!   │  │                │   │ Submit          │                │ │               │
//!   │  │                │  Registered         └── Cancel, ... ─┘ │               │
//!   │  │                │  (only left by the                     │               │
//!   │  │                │   Python service)                      │               │
//!   │  │                └──────── Cancel, TimeOut, ... ──────────┤               │
//!   │  └── Refuse, unknown workflow, Submit after its Cancel ────┘               │
//!   └───────────────────────── Cancel before the submission ─────────────────────┘
//! ```
//!
//! The result of a step that is not the last one leaves its job as it is, with the next step's task.
//!
//! An outcome is committed before the client is told, and the row in `job` is deleted after that.
//! Whatever the service dies of in between, the command that led to the outcome is redelivered and
//! leads to the same one; no other command can.

use jiff::Timestamp;
use serde::Serialize;

use crate::domain::text;

mod command;
mod course;
mod decide;
mod decision;
mod hand_over;
mod starts;
mod submit;
mod told;

pub use self::command::{Command, Completion, Requested, Submission};
pub use self::course::{Attempt, Course, Grant, Input, Position, Report, Turn};
pub use self::decide::decide;
pub use self::decision::{
    Assignment, ClientStatus, Context, Decision, Event, Publication, ResultType, Rules, TaskInput,
    TimeSeries, TimeoutResult,
};
pub use self::starts::{MAX_EXCUSED, Start, Suspicion, Verdict};
pub use self::told::{Mark, Origin, Told, Via};

/// How many characters of a client's reference are kept. The task carries it whole, but any cancel,
/// say, loads the kept part.
pub const MAX_REFERENCE: usize = 1000;

/// The same for a workflow's name. Defined ones have no more bytes.
pub const MAX_WORKFLOW_TYPE: usize = 255;

/// Logs of the result of a job that crashed its workers; clients compare this text.
pub const CRASH_LOOP_LOGS: &str =
    "Job cannot be processed due to being retried the maximum number of times.";

/// The end of the logs of the result that a client gets in place of one that RabbitMQ has lost.
pub const LOST_LOGS: &str = "was lost when RabbitMQ was interrupted. Submit it again.";

/// What the database knows of a job.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "a batch has 200 of them at most")]
pub enum State {
    /// Neither a row nor a history: never seen, or its history has expired.
    Unknown,
    Live(Job),
    /// Its outcome is committed; whether the client has been told is not known.
    Ending(Ending),
    Ended(Ended),
}

/// A job that is ending: its unchanged row in `job`, and the one in `job_history`.
#[derive(Debug, Clone, PartialEq)]
pub struct Ending {
    pub job: Job,
    pub ended: Ended,
}

/// A job that has not ended: its row in `job` and those in `job_starts`.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub workflow_type: String,
    /// Empty when the client gave none, the first [`MAX_REFERENCE`] characters of a longer one.
    pub reference: String,
    pub status: JobStatus,
    /// The job's current Celery task; no other task's events count.
    pub task_id: Option<String>,
    pub registered_at: Timestamp,
    pub submitted_at: Option<Timestamp>,
    /// When a worker first started the job.
    pub running_at: Option<Timestamp>,
    /// How long the job may run, in milliseconds.
    pub timeout_ms: Option<i64>,
    /// None in rows of the Python service.
    pub priority: Option<Priority>,
    /// Its current task's, oldest first.
    pub starts: Vec<Start>,
    /// Its task's last progress since its last start, or the last of its whole course.
    pub progress: Option<Progress>,
    /// Its way through its workflow's steps, unless that is one plain step. Boxed, for most jobs
    /// have none.
    pub course: Option<Box<Course>>,
    /// What it was submitted with, as JSON, if that may be kept; None as loaded, for nothing is decided by
    /// it.
    pub parameters: Option<String>,
    /// On which queue its task was put, if it has no course; None as loaded, for the same reason.
    pub task_queue: Option<String>,
}

/// A task's progress.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Progress {
    /// Finite, and meant to be from 0.0 to 1.0.
    pub fraction: f64,
    /// Its beginning, if it is long.
    pub message: String,
    pub at: Timestamp,
}

impl Progress {
    /// Characters that are kept of a message.
    const MAX_MESSAGE: usize = 500;

    fn new(fraction: f64, message: &str, at: Timestamp) -> Progress {
        Progress {
            fraction,
            message: kept(message, Progress::MAX_MESSAGE),
            at,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobStatus {
    /// Known but without a task: its first task waits for its turn. The Python service leaves such
    /// rows too, without a course, when it is killed between its two writes; the broker then
    /// redelivers the submission.
    Registered,
    Submitted,
    Running,
}

impl JobStatus {
    pub const ALL: &[JobStatus] = &[
        JobStatus::Registered,
        JobStatus::Submitted,
        JobStatus::Running,
    ];

    /// As the database has it.
    pub fn name(self) -> &'static str {
        match self {
            JobStatus::Registered => "REGISTERED",
            JobStatus::Submitted => "SUBMITTED",
            JobStatus::Running => "RUNNING",
        }
    }
}

/// A job that has ended: its row in `job_history`.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    pub outcome: Outcome,
    pub workflow_type: Option<String>,
    pub reference: Option<String>,
    pub task_id: Option<String>,
    /// None when a cancel was all that ever came for this job.
    pub registered_at: Option<Timestamp>,
    pub submitted_at: Option<Timestamp>,
    pub running_at: Option<Timestamp>,
    pub finished_at: Timestamp,
    pub starts: i32,
    /// AMQP message ids of the last starts; none in rows of earlier versions.
    pub start_ids: Vec<String>,
    /// Size of the output ESDL and the logs together.
    pub result_bytes: i64,
    /// The line of what its client is told that says most of why it failed. None of a success or a
    /// cancel, and in rows of earlier versions.
    pub why: Option<String>,
    /// What else its story keeps; None as loaded.
    pub told: Option<Box<Told>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The worker delivered an output ESDL.
    Succeeded,
    /// The worker reported an error.
    Failed,
    Cancelled,
    /// Its workers died more often than the delivery limit allows.
    CrashLoop,
    /// The submission could not be run, or an event of the job could not be handled.
    Rejected,
    /// It ran for longer than its client allowed.
    TimedOut,
    /// It stayed in one state for longer than jobs are kept.
    Expired,
    /// It had ended otherwise, but that was lost before its client was told; or no worker had its task
    /// any more.
    Lost,
}

impl Outcome {
    pub const ALL: &[Outcome] = &[
        Outcome::Succeeded,
        Outcome::Failed,
        Outcome::Cancelled,
        Outcome::CrashLoop,
        Outcome::Rejected,
        Outcome::TimedOut,
        Outcome::Expired,
        Outcome::Lost,
    ];

    /// As the database has it.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Succeeded => "SUCCEEDED",
            Outcome::Failed => "FAILED",
            Outcome::Cancelled => "CANCELLED",
            Outcome::CrashLoop => "CRASH_LOOP",
            Outcome::Rejected => "REJECTED",
            Outcome::TimedOut => "TIMED_OUT",
            Outcome::Expired => "EXPIRED",
            Outcome::Lost => "LOST",
        }
    }

    /// For clients and engineers.
    pub fn in_words(self) -> &'static str {
        match self {
            Outcome::Succeeded => "succeeded",
            Outcome::Failed => "failed",
            Outcome::Cancelled => "cancelled",
            Outcome::CrashLoop => "lost its workers",
            Outcome::Rejected => "refused",
            Outcome::TimedOut => "timed out",
            Outcome::Expired => "given up",
            Outcome::Lost => "lost",
        }
    }

    /// Whether the job's own task ended it, so that nothing is left to revoke.
    fn by_its_task(self) -> bool {
        match self {
            Outcome::Succeeded | Outcome::Failed => true,
            Outcome::Cancelled
            | Outcome::CrashLoop
            | Outcome::Rejected
            | Outcome::TimedOut
            | Outcome::Expired
            | Outcome::Lost => false,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Priority {
    Low,
    #[default]
    Medium,
    High,
}

impl Priority {
    pub const ALL: &[Priority] = &[Priority::Low, Priority::Medium, Priority::High];

    /// As the database has it.
    pub fn name(self) -> &'static str {
        match self {
            Priority::Low => "LOW",
            Priority::Medium => "MEDIUM",
            Priority::High => "HIGH",
        }
    }

    /// From 0, the lowest.
    pub fn level(self) -> u8 {
        match self {
            Priority::Low => 0,
            Priority::Medium => 1,
            Priority::High => 2,
        }
    }
}

impl Job {
    /// A job that is known and not handed to the workers.
    fn without_task(
        workflow_type: &str,
        reference: &Option<String>,
        registered_at: Timestamp,
    ) -> Job {
        Job {
            workflow_type: kept(workflow_type, MAX_WORKFLOW_TYPE),
            reference: kept_reference(reference.as_deref()),
            status: JobStatus::Registered,
            task_id: None,
            registered_at,
            submitted_at: None,
            running_at: None,
            timeout_ms: None,
            priority: None,
            starts: Vec::new(),
            progress: None,
            course: None,
            parameters: None,
            task_queue: None,
        }
    }

    /// The earliest time at which its client may be told the outcome.
    fn outcome_from(&self, context: &Context<'_>) -> Timestamp {
        // A clock that was set back must not prolong the delay.
        let submitted = self.registered_at.min(context.now);
        submitted
            .checked_add(context.rules.outcome_delay)
            .unwrap_or(Timestamp::MAX)
    }

    /// How often its tasks were started.
    fn all_starts(&self) -> i32 {
        let earlier = self
            .course
            .as_ref()
            .map_or(0, |course| course.earlier_starts());
        let current = i32::try_from(self.starts.len()).unwrap_or(i32::MAX);
        current.saturating_add(earlier)
    }

    fn ended(&self, outcome: Outcome, result_bytes: usize, now: Timestamp) -> Ended {
        Ended {
            outcome,
            workflow_type: Some(self.workflow_type.clone()),
            reference: Some(self.reference.clone()),
            task_id: self.task_id.clone(),
            registered_at: Some(self.registered_at),
            submitted_at: self.submitted_at,
            running_at: self.running_at,
            finished_at: now,
            starts: self.all_starts(),
            start_ids: self.start_ids(),
            result_bytes: to_i64(result_bytes),
            why: None,
            told: None,
        }
    }
}

impl State {
    /// The client's own name for the job, empty when it gave none.
    pub fn reference(&self) -> &str {
        match self {
            State::Unknown => "",
            State::Live(job) | State::Ending(Ending { job, .. }) => &job.reference,
            State::Ended(ended) => ended.reference.as_deref().unwrap_or_default(),
        }
    }

    /// Its row in `job`, if it has one.
    pub fn job(&self) -> Option<&Job> {
        match self {
            State::Live(job) | State::Ending(Ending { job, .. }) => Some(job),
            State::Unknown | State::Ended(_) => None,
        }
    }

    pub fn job_mut(&mut self) -> Option<&mut Job> {
        match self {
            State::Live(job) | State::Ending(Ending { job, .. }) => Some(job),
            State::Unknown | State::Ended(_) => None,
        }
    }

    pub fn workflow_type(&self) -> Option<&str> {
        match self {
            State::Unknown => None,
            State::Live(job) | State::Ending(Ending { job, .. }) => Some(&job.workflow_type),
            State::Ended(ended) => ended.workflow_type.as_deref(),
        }
    }
}

/// The part of a text that is kept: its first `characters`, without NUL, which Postgres cannot
/// store.
fn kept(text: &str, characters: usize) -> String {
    let storable = text.chars().filter(|character| *character != '\0');
    storable.take(characters).collect()
}

/// Characters that are kept of why a job failed.
const MAX_WHY: usize = 300;

/// What is kept of logs to say why a job failed.
fn kept_why(logs: &str) -> Option<String> {
    let line = kept(text::telling_line(logs), MAX_WHY);
    (!line.is_empty()).then_some(line)
}

/// The same of a worker's logs, if anything of them may be kept.
fn kept_why_of_logs(logs: &str, context: &Context<'_>) -> Option<String> {
    kept_why(logs).filter(|_| context.rules.keep_logs)
}

fn kept_reference(reference: Option<&str>) -> String {
    kept(reference.unwrap_or_default(), MAX_REFERENCE)
}

fn to_i64(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
