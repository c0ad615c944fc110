//! The messages as they stand on the broker: queues, exchanges and keys, and protobuf to
//! [`Command`] and back. The Celery side of a publication is in [`celery`].

use jiff::Timestamp;
use prost::{Message as _, encoding};
use prost_types::value::Kind;
use serde_json::{Map, Value};
use thiserror::Error;
use uuid::Uuid;

use crate::domain::job::{ClientStatus, Command, Completion, Priority, ResultType, Submission};
use crate::domain::text::excerpt;

mod bounds;
pub mod celery;

use crate::domain::vhost::Vhost;
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
/// Key that leads somewhere while one of the replicas holds the queue of that name.
pub const WORKFLOW_REQUESTS_HELD_KEY: &str = "omotes_orchestrator_answers_requests";
/// Key on which every client hears the workflow definitions.
pub const AVAILABLE_WORKFLOWS_KEY: &str = "available_workflows";
/// Exchange of Celery's remote control: fanout, not durable.
pub const PIDBOX_EXCHANGE: &str = "celery.pidbox";
/// Exchange through which Celery's workers answer: direct, not durable.
pub const REPLIES_EXCHANGE: &str = "reply.celery.pidbox";
/// Where messages go that cannot be handled, on the vhost they came from.
pub const DEAD_LETTERS_QUEUE: &str = "omotes_dead_letters";
/// `x-max-priority` of a task queue, as the workers declare it.
pub const TASK_QUEUE_MAX_PRIORITY: i32 = 10;

/// The queues that the orchestrator consumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Inbox {
    Submissions,
    Cancels,
    /// What comes by the exchange.
    WorkflowRequests,
    /// What is sent to the queue of this name, which one replica has.
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

/// A message to SDK clients: as their own are, persistent, with an id and nothing else.
fn to_clients(routing_key: String, body: Vec<u8>) -> Outgoing {
    Outgoing {
        exchange: OMOTES_EXCHANGE,
        routing_key,
        mandatory: false,
        with_message_id: true,
        content_type: None,
        content_encoding: None,
        priority: 0,
        correlation_id: None,
        reply_to: None,
        headers: Map::new(),
        body,
    }
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

pub fn status_update(job_id: Uuid, status: ClientStatus) -> Outgoing {
    use job_status_update::JobStatus;
    let status = match status {
        ClientStatus::Enqueued => JobStatus::Enqueued,
        ClientStatus::Running => JobStatus::Running,
        ClientStatus::Cancelled => JobStatus::Cancelled,
    };
    let message = JobStatusUpdate {
        uuid: job_id.to_string(),
        status: status.into(),
    };
    to_clients(status_queue(job_id), message.encode_to_vec())
}

pub fn progress_update(job_id: Uuid, fraction: f64, message: &str) -> Outgoing {
    let head = JobProgressUpdate {
        uuid: job_id.to_string(),
        progress: fraction,
        message: String::new(),
    };
    let mut body = head.encode_to_vec();
    body.reserve_exact(message.len() + FIELD_HEAD);
    append_text(&mut body, 3, Some(message).filter(|text| !text.is_empty()));
    to_clients(progress_queue(job_id), body)
}

/// Most bytes that stand before a text's own in a message.
const FIELD_HEAD: usize = 10;

/// Writes a text into a message, if it is set. A generated message would want a copy of its own,
/// and a result may have a hundred megabytes.
fn append_text(body: &mut Vec<u8>, number: u32, text: Option<&str>) {
    if let Some(text) = text {
        encoding::encode_key(number, encoding::WireType::LengthDelimited, body);
        encoding::encode_varint(text.len() as u64, body);
        body.extend_from_slice(text.as_bytes());
    }
}

/// A job's result. It is mandatory: a broker restart takes the exchange's bindings, and then the
/// client's queue can only be reached by name.
pub fn job_result(
    job_id: Uuid,
    result_type: ResultType,
    output_esdl: Option<&str>,
    logs: &str,
    esdl_messages: &[EsdlMessage],
) -> Outgoing {
    let result_type = match result_type {
        ResultType::Succeeded => job_result::ResultType::Succeeded,
        ResultType::Error => job_result::ResultType::Error,
        ResultType::Cancelled => job_result::ResultType::Cancelled,
        ResultType::TimedOut => job_result::ResultType::Timeout,
    };
    let head = JobResult {
        uuid: job_id.to_string(),
        result_type: result_type.into(),
        ..JobResult::default()
    };
    let messages = encoding::message::encoded_len_repeated(5, esdl_messages);
    let texts = output_esdl.unwrap_or_default().len() + logs.len() + 2 * FIELD_HEAD;
    let mut body = head.encode_to_vec();
    body.reserve_exact(texts + messages);
    append_text(&mut body, 3, output_esdl);
    append_text(&mut body, 4, Some(logs).filter(|text| !text.is_empty()));
    encoding::message::encode_repeated(5, esdl_messages, &mut body);
    Outgoing {
        mandatory: true,
        ..to_clients(result_queue(job_id), body)
    }
}

pub fn available_workflows(message: &AvailableWorkflows) -> Outgoing {
    to_clients(AVAILABLE_WORKFLOWS_KEY.to_owned(), message.encode_to_vec())
}

/// What a client sends to submit a job.
pub fn job_submission(message: &JobSubmission) -> Outgoing {
    to_clients(SUBMISSIONS_QUEUE.to_owned(), message.encode_to_vec())
}

/// What a client sends to cancel or delete a job.
pub fn job_delete(job_id: Uuid) -> Outgoing {
    let message = JobDelete {
        uuid: job_id.to_string(),
    };
    to_clients(CANCELS_QUEUE.to_owned(), message.encode_to_vec())
}

/// A message that no queue takes, to see whether the broker takes messages.
pub fn pulse() -> Outgoing {
    Outgoing {
        exchange: "",
        ..to_clients("omotes_orchestrator_pulse".to_owned(), Vec::new())
    }
}

/// The same to clients' exchange: it comes back when no replica answers the requests that are sent
/// to their queue.
pub fn pulse_for_requests() -> Outgoing {
    Outgoing {
        mandatory: true,
        ..to_clients(WORKFLOW_REQUESTS_HELD_KEY.to_owned(), Vec::new())
    }
}

/// What a worker sends to `queue`, through the default exchange.
pub fn worker_event(queue: &str, message: &impl prost::Message) -> Outgoing {
    Outgoing {
        exchange: "",
        ..to_clients(queue.to_owned(), message.encode_to_vec())
    }
}

/// A message that could not be handled, as it was and with what is known of it in its headers.
/// `properties` are the original's, as JSON; `time` is now.
pub fn dead_letter(
    queue: &str,
    reason: &str,
    time: Timestamp,
    properties: Map<String, Value>,
    body: Vec<u8>,
) -> Outgoing {
    /// Headers have to fit into one frame, 128 KiB by RabbitMQ's default. As AMQP writes them they
    /// may be three times as long as their JSON.
    const MAX_PROPERTIES: usize = 24 * 1024;
    const MAX_REASON: usize = 2000;
    let size = serde_json::to_vec(&properties).map_or(usize::MAX, |json| json.len());
    let properties = if size <= MAX_PROPERTIES {
        Value::Object(properties)
    } else {
        format!("left out: {size} bytes").into()
    };
    let reason: String = reason.chars().take(MAX_REASON).collect();
    let headers = [
        ("queue", Value::from(queue)),
        ("reason", reason.into()),
        ("time", time.to_string().into()),
        ("properties", properties),
    ];
    Outgoing {
        exchange: "",
        headers: headers
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        // The message that it is made of is gone once it is confirmed.
        mandatory: true,
        ..to_clients(DEAD_LETTERS_QUEUE.to_owned(), body)
    }
}

/// A dead letter that the broker refuses, with the beginning of its body only; None where that is
/// all of it. `why` is what the broker said.
pub fn cut_letter(letter: &Outgoing, why: &str) -> Option<Outgoing> {
    /// Less than any limit for messages that lets jobs through.
    const KEPT: usize = 8 * 1024;
    let kept = letter.body.get(..KEPT)?;
    let mut headers = letter.headers.clone();
    let size = letter.body.len();
    let cut = format!("the first {KEPT} of {size} bytes: {why}");
    headers.insert("cut".to_owned(), cut.into());
    Some(Outgoing {
        exchange: letter.exchange,
        routing_key: letter.routing_key.clone(),
        mandatory: letter.mandatory,
        with_message_id: letter.with_message_id,
        content_type: letter.content_type,
        content_encoding: letter.content_encoding,
        priority: letter.priority,
        correlation_id: letter.correlation_id.clone(),
        reply_to: letter.reply_to.clone(),
        headers,
        body: kept.to_vec(),
    })
}

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
            job_request(&message.uuid, Command::Cancel)
        }
        Inbox::WorkflowRequests | Inbox::NamedWorkflowRequests => {
            parse::<RequestAvailableWorkflows>(body, |_| None).map(|_| Request::ListWorkflows)
        }
        Inbox::Progress => decode_progress(body, message_id, redelivered),
        Inbox::Results => decode_result(body),
    }
}

/// What is left to do about a message that nobody could try to read to its end.
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

/// A task's id, unless it is none: it goes into a revoke, which all workers hear, and into the log.
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

/// A value of the parameters that JSON cannot express.
struct Misfit {
    found: f64,
    /// What leads to it, the last step first. Only there is one when there is a misfit: a path for
    /// each value would cost the length of all keys above it.
    path: Vec<String>,
}

impl Misfit {
    fn below(mut self, step: String) -> Misfit {
        self.path.push(step);
        self
    }

    fn text(mut self) -> String {
        self.path.reverse();
        format!(
            "The parameter params_dict{} is {}, which is no finite number.",
            excerpt(&self.path.concat(), 300),
            self.found
        )
    }
}

/// A protobuf Struct as JSON, all numbers as doubles.
///
/// # Errors
/// A number is not finite.
fn json_object(object: prost_types::Struct) -> Result<Map<String, Value>, Misfit> {
    let members = object.fields.into_iter();
    members
        .map(|(key, value)| match json_value(value) {
            Ok(value) => Ok((key, value)),
            Err(misfit) => Err(misfit.below(format!(".{}", excerpt(&key, 60)))),
        })
        .collect()
}

/// JSON as a protobuf Struct, for a client's parameters.
pub fn protobuf_struct(object: &Map<String, Value>) -> prost_types::Struct {
    prost_types::Struct {
        fields: object
            .iter()
            .map(|(key, value)| (key.clone(), protobuf_value(value)))
            .collect(),
    }
}

fn protobuf_value(value: &Value) -> prost_types::Value {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(value) => Kind::BoolValue(*value),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(items) => Kind::ListValue(prost_types::ListValue {
            values: items.iter().map(protobuf_value).collect(),
        }),
        Value::Object(object) => Kind::StructValue(protobuf_struct(object)),
    };
    prost_types::Value { kind: Some(kind) }
}

fn json_value(value: prost_types::Value) -> Result<Value, Misfit> {
    match value.kind {
        None | Some(Kind::NullValue(_)) => Ok(Value::Null),
        Some(Kind::BoolValue(value)) => Ok(Value::Bool(value)),
        Some(Kind::StringValue(value)) => Ok(Value::String(value)),
        Some(Kind::NumberValue(found)) => {
            let path = Vec::new();
            let number = serde_json::Number::from_f64(found);
            number.map(Value::Number).ok_or(Misfit { found, path })
        }
        Some(Kind::ListValue(list)) => {
            let items = list.values.into_iter().enumerate();
            items
                .map(|(index, value)| {
                    json_value(value).map_err(|misfit| misfit.below(format!("[{index}]")))
                })
                .collect::<Result<_, _>>()
                .map(Value::Array)
        }
        Some(Kind::StructValue(object)) => json_object(object).map(Value::Object),
    }
}

#[cfg(test)]
mod tests;
