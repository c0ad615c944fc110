//! The messages as they stand on the broker: queues, exchanges and keys, and protobuf to
//! [`crate::domain::job::Command`] and back. The Celery side of a publication is in [`celery`].

use serde_json::{Map, Value};
use uuid::Uuid;

use crate::domain::vhost::Vhost;

mod bounds;
pub mod celery;
mod incoming;
mod letters;
mod outgoing;
mod params;
pub mod workers;

pub use self::incoming::{Request, Undecodable, decode, job_id, origin, sent_for, unread};
pub use self::letters::{cut_letter, dead_letter};
pub use self::outgoing::{
    available_workflows, change_parameters, for_another_run, for_somebody, job_delete,
    job_delete_for, job_result, job_submission, output_of_result, progress_update, pulse,
    pulse_for_requests, status_update, submission_again, submitted_parameters, worker_event,
};
pub use self::params::protobuf_struct;
pub use crate::proto::{
    AvailableWorkflows, BooleanParameter, DateTimeParameter, DurationParameter, EsdlMessage,
    FloatParameter, IntegerParameter, JobDelete, JobProgressUpdate, JobResult, JobStatusUpdate,
    JobSubmission, RequestAvailableWorkflows, StringEnum, StringParameter, TaskProgressUpdate,
    TaskResult, Workflow, WorkflowParameter, esdl_message, job_result, job_status_update,
    job_submission, task_progress_update, task_result, workflow_parameter,
};

/// Exchange of everything between clients and the orchestrator: direct, not durable.
pub const OMOTES_EXCHANGE: &str = "omotes_exchange";
pub const SUBMISSIONS_QUEUE: &str = "job_submissions";
pub const CANCELS_QUEUE: &str = "job_deletions";
/// Key of the clients' requests for the workflow definitions, and the queue to which the TypeScript
/// SDK sends them, through the default exchange.
pub const WORKFLOW_REQUESTS_KEY: &str = "request_available_workflows";
/// Key that is bound while one of the replicas holds the queue of that name.
pub const WORKFLOW_REQUESTS_HELD_KEY: &str = "omotes_orchestrator_answers_requests";
/// Key on which every client hears the workflow definitions.
pub const AVAILABLE_WORKFLOWS_KEY: &str = "available_workflows";
/// Exchange of Celery's remote control: fanout, not durable.
pub const PIDBOX_EXCHANGE: &str = "celery.pidbox";
/// Exchange through which Celery's workers answer: direct, not durable.
pub const REPLIES_EXCHANGE: &str = "reply.celery.pidbox";
/// The dead letters of a vhost.
pub const DEAD_LETTERS_QUEUE: &str = "omotes_dead_letters";
/// `x-max-priority` of a task queue, as the workers declare it.
pub const TASK_QUEUE_MAX_PRIORITY: i32 = 10;

/// The queues that the orchestrator consumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Inbox {
    Submissions,
    Cancels,
    /// Requests that arrive through the exchange.
    WorkflowRequests,
    /// Requests that are sent to the queue of this name, which one replica holds.
    NamedWorkflowRequests,
    Progress,
    Results,
}

impl Inbox {
    pub const ALL: [Inbox; 6] = [
        Inbox::Submissions,
        Inbox::Cancels,
        Inbox::WorkflowRequests,
        Inbox::NamedWorkflowRequests,
        Inbox::Progress,
        Inbox::Results,
    ];

    /// Where its queue is.
    pub fn vhost(self) -> Vhost {
        match self {
            Inbox::Submissions
            | Inbox::Cancels
            | Inbox::WorkflowRequests
            | Inbox::NamedWorkflowRequests => Vhost::Sdk,
            Inbox::Progress | Inbox::Results => Vhost::Task,
        }
    }

    /// Short name for threads and logs.
    pub fn name(self) -> &'static str {
        match self {
            Inbox::Submissions => "submissions",
            Inbox::Cancels => "cancels",
            Inbox::WorkflowRequests | Inbox::NamedWorkflowRequests => "workflow-requests",
            Inbox::Progress => "progress",
            Inbox::Results => "results",
        }
    }
}

/// A message to publish, in terms of AMQP but of no library. All are persistent.
#[derive(Debug, Clone, PartialEq)]
pub struct Outgoing {
    /// Empty for the default exchange.
    pub exchange: &'static str,
    pub routing_key: String,
    /// The broker returns it when no queue takes it.
    pub mandatory: bool,
    /// Whether it gets a random message id when it is published.
    pub with_message_id: bool,
    pub content_type: Option<&'static str>,
    pub content_encoding: Option<&'static str>,
    pub priority: u8,
    pub correlation_id: Option<String>,
    pub reply_to: Option<String>,
    /// As JSON: null, booleans, numbers, texts, lists and objects all have an AMQP type.
    pub headers: Map<String, Value>,
    pub body: Vec<u8>,
}

/// The queue in which a client waits for a job's result; also the key that leads to it.
pub fn result_queue(job_id: Uuid) -> String {
    format!("jobs.{job_id}.result")
}

pub fn progress_queue(job_id: Uuid) -> String {
    format!("jobs.{job_id}.progress")
}

pub fn status_queue(job_id: Uuid) -> String {
    format!("jobs.{job_id}.status")
}

#[cfg(test)]
mod tests;
