//! Decodes what the service consumes, bytes that anybody may have sent, to [`Command`]s.

use thiserror::Error;
use uuid::Uuid;

use super::params::{Misfit, json_object};
use super::{
    Inbox, JobDelete, JobSubmission, RequestAvailableWorkflows, TaskProgressUpdate, TaskResult,
    bounds, job_submission, task_progress_update, task_result,
};
use crate::domain::job::{Command, Completion, Origin, Priority, Requested, Submission, Via};
use crate::domain::text::excerpt;

/// A received message's content: what it asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    Job {
        id: Uuid,
        command: Command,
    },
    /// Somebody wants to know the workflows.
    ListWorkflows,
}

/// A message that is not what its queue is for.
#[derive(Debug, Error, PartialEq)]
#[error("{reason}")]
pub struct Undecodable {
    pub reason: String,
    /// What to do about the job, where the message at least names it.
    pub instead: Option<Box<(Uuid, Command)>>,
}

/// Headers of a cancel or a submission that is not its client's: by which way somebody asked for it, who, and from where.
pub(super) const VIA: &str = "omotes_via";
pub(super) const WHO: &str = "omotes_who";
pub(super) const FROM: &str = "omotes_from";
/// Of a submission that runs a job again: that job, and whose it was.
pub(super) const AGAIN: &str = "omotes_again";
pub(super) const SENDER: &str = "omotes_sender";
/// Bytes of a sender that are heeded; a message's properties have no room for more.
const MAX_SENDER: usize = 255;

/// Who sent a message, as its headers say, and otherwise a client. Whoever sends one can say anything.
pub fn origin<'m>(header: impl Fn(&str) -> Option<&'m str>, sender: Option<&str>) -> Origin {
    let named = |name: &str| Via::ALL.iter().copied().find(|via| via.name() == name);
    match header(VIA).and_then(named) {
        Some(via) => Origin::new(via, header(WHO), header(FROM)),
        None => Origin::new(Via::Client, sender, None),
    }
}

/// Whose job a submission asks for, and who has had it sent.
pub fn sent_for<'m>(
    header: impl Fn(&str) -> Option<&'m str>,
    sender: Option<&str>,
) -> (Option<String>, Option<Requested>) {
    let by = origin(&header, None);
    if by.via == Via::Client {
        return (sender.map(str::to_owned), None);
    }
    let again = header(AGAIN).and_then(|id| Uuid::try_parse(id).ok());
    let sender = match again {
        Some(_) => header(SENDER).filter(|sender| sender.len() <= MAX_SENDER),
        None => sender,
    };
    (sender.map(str::to_owned), Some(Requested { by, again }))
}

/// Bytes of a task id; AMQP has no room for more. Ours are UUIDs.
const MAX_TASK_ID: usize = 255;

/// Which job a message is about, without decoding the rest of it.
pub fn job_id(body: &[u8]) -> Option<Uuid> {
    // Every message about a job names it in its first field.
    Uuid::try_parse_ascii(bounds::field(body, 1)?).ok()
}

/// A [`JobSubmission`] but for what may be large.
#[derive(Clone, PartialEq, prost::Message)]
struct SubmissionHead {
    #[prost(string, tag = "1")]
    uuid: String,
    #[prost(string, tag = "3")]
    workflow_type: String,
    #[prost(string, optional, tag = "6")]
    job_reference: Option<String>,
}

impl prost::Name for SubmissionHead {
    const NAME: &'static str = JobSubmission::NAME;
    const PACKAGE: &'static str = JobSubmission::PACKAGE;
}

/// What the message `body` from `inbox` asks for. `message_id` and `redelivered` are the
/// delivery's.
///
/// # Errors
/// The body is not the protobuf message of that queue, or names no job.
pub fn decode(
    inbox: Inbox,
    body: &[u8],
    message_id: Option<&str>,
    redelivered: bool,
) -> Result<Request, Undecodable> {
    match inbox {
        Inbox::Submissions => decode_submission(body),
        Inbox::Cancels => {
            let message = parse::<JobDelete>(body, |_| None)?;
            job_request(&message.uuid, Command::Cancel(Origin::default()))
        }
        Inbox::WorkflowRequests | Inbox::NamedWorkflowRequests => {
            parse::<RequestAvailableWorkflows>(body, |_| None).map(|_| Request::ListWorkflows)
        }
        Inbox::Progress => decode_progress(body, message_id, redelivered),
        Inbox::Results => decode_result(body),
    }
}

/// What remains to be done about a message that made the decoder panic.
pub fn unread(inbox: Inbox, body: &[u8], reason: String) -> Undecodable {
    undecodable(body, reason, |reason| match inbox {
        Inbox::Submissions => Some(refusal(reason)),
        Inbox::Results => failure(body, reason),
        Inbox::Cancels
        | Inbox::WorkflowRequests
        | Inbox::NamedWorkflowRequests
        | Inbox::Progress => None,
    })
}

fn decode_submission(body: &[u8]) -> Result<Request, Undecodable> {
    if let Err(reason) = bounds::of_submission(body) {
        let head = parse::<SubmissionHead>(body, |reason| Some(refusal(reason)))?;
        let command = Command::Refuse {
            reason,
            workflow_type: head.workflow_type,
            reference: head.job_reference,
        };
        return job_request(&head.uuid, command);
    }
    let message = parse::<JobSubmission>(body, |reason| Some(refusal(reason)))?;
    let params = message.params_dict.unwrap_or_default();
    let faults = [
        ("workflow_type", Some(message.workflow_type.as_str())),
        ("job_reference", message.job_reference.as_deref()),
    ]
    .into_iter()
    .find(|(_, text)| text.is_some_and(|text| text.contains('\0')))
    .map(|(field, _)| format!("The submission's {field} contains a NUL character."));
    let command = match (faults, json_object(params).map_err(Misfit::text)) {
        (None, Ok(params)) => Command::Submit(Submission {
            priority: match message
                .job_priority
                .map(job_submission::JobPriority::try_from)
            {
                Some(Ok(job_submission::JobPriority::Low)) => Priority::Low,
                Some(Ok(job_submission::JobPriority::High)) => Priority::High,
                // A priority of a later SDK is better run at some priority than not at all.
                Some(Ok(job_submission::JobPriority::Medium) | Err(_)) | None => Priority::Medium,
            },
            workflow_type: message.workflow_type,
            esdl: message.esdl,
            params,
            reference: message.job_reference,
            timeout_ms: message.timeout_ms,
            // It stands in the message's properties.
            sender: None,
            requested: None,
        }),
        (Some(reason), _) | (None, Err(reason)) => Command::Refuse {
            reason,
            workflow_type: message.workflow_type,
            reference: message.job_reference,
        },
    };
    job_request(&message.uuid, command)
}

fn decode_progress(
    body: &[u8],
    message_id: Option<&str>,
    redelivered: bool,
) -> Result<Request, Undecodable> {
    use task_progress_update::{ProgressStatus, ProgressType};
    let message = parse::<TaskProgressUpdate>(body, |_| None)?;
    let task_id = task_id::<TaskProgressUpdate>(message.celery_task_id)?;
    let command = match message.progress_type {
        Some(ProgressType::Status(status)) => match ProgressStatus::try_from(status) {
            Ok(ProgressStatus::Start) => Command::Start {
                task_id,
                // Postgres takes no NUL, and a worker that sends one has no ids worth keeping.
                message_id: message_id
                    .filter(|id| !id.contains('\0'))
                    .map(str::to_owned),
                redelivered,
            },
            Err(_) => {
                return Err(Undecodable {
                    reason: format!("TaskProgressUpdate: {status} is no ProgressStatus"),
                    instead: None,
                });
            }
        },
        Some(ProgressType::Progress(fraction)) => Command::Progress {
            task_id,
            fraction,
            message: message.message,
        },
        None => {
            return Err(Undecodable {
                reason: "TaskProgressUpdate: neither status nor progress is set".to_owned(),
                instead: None,
            });
        }
    };
    job_request(&message.job_id, command)
}

/// What becomes of the job whose result cannot be read.
fn failure(body: &[u8], reason: String) -> Option<Command> {
    let task_id = bounds::field(body, 2).unwrap_or_default();
    (task_id.len() <= MAX_TASK_ID).then(|| Command::Fail {
        reason,
        task_id: str::from_utf8(task_id)
            .ok()
            .filter(|task_id| !task_id.is_empty())
            .map(str::to_owned),
    })
}

fn decode_result(body: &[u8]) -> Result<Request, Undecodable> {
    let failure = |reason| failure(body, reason);
    bounds::of_result(body).map_err(|reason| undecodable(body, reason, failure))?;
    let message = parse::<TaskResult>(body, failure)?;
    let succeeded = match task_result::ResultType::try_from(message.result_type) {
        Ok(task_result::ResultType::Succeeded) => true,
        Ok(task_result::ResultType::Error) => false,
        Err(_) => {
            let reason = format!("TaskResult: {} is no ResultType", message.result_type);
            return Err(undecodable(body, reason, failure));
        }
    };
    let command = Command::Result(Completion {
        task_id: task_id::<TaskResult>(message.celery_task_id)?,
        succeeded,
        output_esdl: message.output_esdl,
        logs: message.logs,
        esdl_messages: message.esdl_messages,
    });
    job_request(&message.job_id, command)
}

/// Checks a task's id: it goes into a revoke, which all workers hear, and into the log.
fn task_id<M: prost::Name>(text: String) -> Result<String, Undecodable> {
    match text.len() {
        0..=MAX_TASK_ID => Ok(text),
        bytes => Err(Undecodable {
            reason: format!(
                "{}: a celery_task_id of {bytes} bytes is no task id",
                M::NAME
            ),
            instead: None,
        }),
    }
}

fn refusal(reason: String) -> Command {
    Command::Refuse {
        reason,
        workflow_type: String::new(),
        reference: None,
    }
}

fn parse<M: prost::Message + prost::Name + Default>(
    body: &[u8],
    instead: impl Fn(String) -> Option<Command>,
) -> Result<M, Undecodable> {
    M::decode(body).map_err(|error| undecodable(body, format!("{}: {error}", M::NAME), instead))
}

fn undecodable(
    body: &[u8],
    reason: String,
    instead: impl Fn(String) -> Option<Command>,
) -> Undecodable {
    let for_client = format!("The orchestrator could not read a message of this job: {reason}");
    Undecodable {
        instead: job_id(body).zip(instead(for_client)).map(Box::new),
        reason,
    }
}

fn job_request(job_id: &str, command: Command) -> Result<Request, Undecodable> {
    match Uuid::try_parse(job_id) {
        Ok(id) => Ok(Request::Job { id, command }),
        Err(error) => Err(Undecodable {
            reason: format!("{:?} is no job id: {error}", excerpt(job_id, 80)),
            instead: None,
        }),
    }
}
