//! What somebody asks or reports about one job.

use jiff::Timestamp;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::{MAX_REFERENCE, MAX_WORKFLOW_TYPE, Origin, Priority, kept};
use crate::domain::{esdl, parameters};
use crate::proto::EsdlMessage;

/// What somebody asks or reports about one job.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    Submit(Submission),
    /// A submission that cannot be run; its client is told why.
    Refuse {
        reason: String,
        workflow_type: String,
        reference: Option<String>,
    },
    Cancel(Origin),
    /// A worker has begun a task.
    Start {
        task_id: String,
        message_id: Option<String>,
        redelivered: bool,
    },
    Progress {
        task_id: String,
        /// Meant to be from 0.0 to 1.0, but workers send what they like.
        fraction: f64,
        message: String,
    },
    Result(Completion),
    /// Somebody has seen that the job runs for longer than its timeout.
    TimeOut,
    /// Somebody has seen that the job has been in one state for longer than jobs are kept, or that
    /// it has been ending for too long.
    Expire,
    /// Somebody has seen that the job waits for a worker and that there is none.
    NoWorker,
    /// The workers have been asked who runs the job's task, and nobody has had it since then, nor
    /// does it wait in its queue.
    TaskLost {
        task_id: String,
        since: Timestamp,
    },
    /// Somebody has seen that the job's next task may be put on its queue: as granted at this time,
    /// or, without one, because it has waited long enough.
    TakeTurn {
        grant: Option<Timestamp>,
    },
    /// The workers have been asked who runs the task, because of its start at this time: a
    /// [`super::Suspicion`].
    Judge {
        task_id: String,
        at: Timestamp,
        /// How many executions of it the workers told of.
        alive: usize,
        /// Whether they had the time that they may need to come back to RabbitMQ.
        last: bool,
    },
    /// An event of the job that cannot be handled, and without which it would never end.
    Fail {
        reason: String,
        /// The task it came from, where that can be read.
        task_id: Option<String>,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Submission {
    pub workflow_type: String,
    pub esdl: String,
    pub params: Map<String, Value>,
    pub reference: Option<String>,
    pub priority: Priority,
    pub timeout_ms: Option<u32>,
    /// Who sent it, where the message says that.
    pub sender: Option<String>,
    /// None if its client has sent it.
    pub requested: Option<Box<Requested>>,
}

/// Who has had a job submitted, through the page or by a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requested {
    pub by: Origin,
    /// The job that it runs again.
    pub again: Option<Uuid>,
}

/// How a task has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    pub task_id: String,
    pub succeeded: bool,
    pub output_esdl: Option<String>,
    pub logs: String,
    pub esdl_messages: Vec<EsdlMessage>,
}

impl Completion {
    /// Which time series its output refers to.
    pub(super) fn esdl_id(&self) -> Option<String> {
        let output_esdl = self.output_esdl.as_deref();
        output_esdl
            .filter(|_| self.succeeded)
            .and_then(esdl::energy_system_id)
    }
}

impl Command {
    /// What it is, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Command::Submit(_) | Command::Refuse { .. } => "a submission",
            Command::Cancel(_) => "a cancel",
            Command::Start { .. } => "a start",
            Command::Progress { .. } => "progress",
            Command::Result { .. } | Command::Fail { .. } => "a result",
            Command::TimeOut => "a timeout",
            Command::Expire => "the end of its retention",
            Command::NoWorker => "the lack of a worker",
            Command::TaskLost { .. } => "the loss of its task",
            Command::TakeTurn { .. } => "the turn of its next attempt",
            Command::Judge { .. } => "what the workers say of a start",
        }
    }

    /// The client's own name for the job, where the command carries one.
    pub fn reference(&self) -> &str {
        match self {
            Command::Submit(submission) => submission.reference.as_deref().unwrap_or_default(),
            Command::Refuse { reference, .. } => reference.as_deref().unwrap_or_default(),
            Command::Cancel(_)
            | Command::Start { .. }
            | Command::Progress { .. }
            | Command::Result { .. }
            | Command::TimeOut
            | Command::Expire
            | Command::NoWorker
            | Command::TaskLost { .. }
            | Command::TakeTurn { .. }
            | Command::Judge { .. }
            | Command::Fail { .. } => "",
        }
    }

    /// The workflow it names.
    pub fn workflow_type(&self) -> Option<&str> {
        match self {
            Command::Submit(submission) => Some(&submission.workflow_type),
            Command::Refuse { workflow_type, .. } => Some(workflow_type),
            Command::Cancel(_)
            | Command::Start { .. }
            | Command::Progress { .. }
            | Command::Result { .. }
            | Command::TimeOut
            | Command::Expire
            | Command::NoWorker
            | Command::TaskLost { .. }
            | Command::TakeTurn { .. }
            | Command::Judge { .. }
            | Command::Fail { .. } => None,
        }
    }

    /// The Celery task it comes from.
    pub fn task_id(&self) -> Option<&str> {
        match self {
            Command::Start { task_id, .. }
            | Command::Progress { task_id, .. }
            | Command::TaskLost { task_id, .. }
            | Command::Judge { task_id, .. } => Some(task_id),
            Command::Result(completion) => Some(&completion.task_id),
            Command::Fail { task_id, .. } => task_id.as_deref(),
            Command::Submit(_)
            | Command::Refuse { .. }
            | Command::Cancel(_)
            | Command::TimeOut
            | Command::Expire
            | Command::NoWorker
            | Command::TakeTurn { .. } => None,
        }
    }

    /// About how many bytes the values decoded from its message take beside those of its texts.
    pub fn decoded_bytes(&self) -> usize {
        match self {
            Command::Submit(submission) => parameters::bytes(&submission.params),
            Command::Result(completion) => size_of_val(completion.esdl_messages.as_slice()),
            Command::Refuse { .. }
            | Command::Cancel(_)
            | Command::Start { .. }
            | Command::Progress { .. }
            | Command::TimeOut
            | Command::Expire
            | Command::NoWorker
            | Command::TaskLost { .. }
            | Command::TakeTurn { .. }
            | Command::Judge { .. }
            | Command::Fail { .. } => 0,
        }
    }

    /// Whether it may end a task, and so needs all that is known of its job's steps.
    pub fn may_end_a_task(&self) -> bool {
        match self {
            Command::Start { .. }
            | Command::Judge { .. }
            | Command::Result(_)
            | Command::Fail { .. }
            | Command::TimeOut
            | Command::Expire
            | Command::TaskLost { .. }
            | Command::TakeTurn { .. } => true,
            Command::Submit(_)
            | Command::Refuse { .. }
            | Command::Cancel(_)
            | Command::Progress { .. }
            | Command::NoWorker => false,
        }
    }

    /// What to do instead when the broker or the database refuses what this command causes; of a
    /// task it is the broker. None where the job can go on without it.
    pub fn instead(&self, reason: String, by_broker: bool) -> Option<Command> {
        match self {
            Command::Submit(submission) => Some(Command::Refuse {
                reason,
                workflow_type: kept(&submission.workflow_type, MAX_WORKFLOW_TYPE),
                reference: submission
                    .reference
                    .as_ref()
                    .map(|reference| kept(reference, MAX_REFERENCE)),
            }),
            Command::Result(completion) => Some(Command::Fail {
                reason,
                task_id: Some(completion.task_id.clone()),
            }),
            // They would be found again and again.
            Command::TakeTurn { .. } | Command::TimeOut => Some(Command::Fail {
                reason,
                task_id: None,
            }),
            Command::Judge { task_id, .. } | Command::TaskLost { task_id, .. } => {
                Some(Command::Fail {
                    reason,
                    task_id: Some(task_id.clone()),
                })
            }
            // It was one too many, and the step's fallback cannot be had.
            Command::Start { task_id, .. } if by_broker => Some(Command::Fail {
                reason,
                task_id: Some(task_id.clone()),
            }),
            Command::Refuse { .. }
            | Command::Cancel(_)
            | Command::Start { .. }
            | Command::Progress { .. }
            | Command::Expire
            | Command::NoWorker
            | Command::Fail { .. } => None,
        }
    }
}
