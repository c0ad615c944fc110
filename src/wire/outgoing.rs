//! What the service publishes, and its example programs.

use prost::{DecodeError, Message as _, encoding};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::incoming::{AGAIN, FROM, SENDER, VIA, WHO};
use super::params::{json_object, protobuf_struct};
use super::{
    AVAILABLE_WORKFLOWS_KEY, AvailableWorkflows, CANCELS_QUEUE, EsdlMessage, JobDelete,
    JobProgressUpdate, JobResult, JobStatusUpdate, JobSubmission, OMOTES_EXCHANGE, Outgoing,
    SUBMISSIONS_QUEUE, WORKFLOW_REQUESTS_HELD_KEY, job_status_update, progress_queue, result_queue,
    status_queue,
};
use crate::domain::job::{ClientStatus, Origin, ResultType};
use crate::proto;

/// A message to SDK clients: as their own are, persistent, with an id and nothing else.
pub(super) fn to_clients(routing_key: String, body: Vec<u8>) -> Outgoing {
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
        ResultType::Succeeded => proto::job_result::ResultType::Succeeded,
        ResultType::Error => proto::job_result::ResultType::Error,
        ResultType::Cancelled => proto::job_result::ResultType::Cancelled,
        ResultType::TimedOut => proto::job_result::ResultType::Timeout,
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

/// The job and the output ESDL of such a message; nothing of one without.
pub fn output_of_result(body: &[u8]) -> Option<(Uuid, String)> {
    let result = JobResult::decode(body).ok()?;
    let job_id = Uuid::try_parse(&result.uuid).ok()?;
    let output_esdl = result.output_esdl.filter(|esdl| !esdl.is_empty())?;
    Some((job_id, output_esdl))
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

/// The same for somebody else.
pub fn job_delete_for(job_id: Uuid, origin: &Origin) -> Outgoing {
    for_somebody(job_delete(job_id), origin)
}

/// What a client has sent to submit a job, for another one with these parameters in place of its own.
///
/// # Errors
/// It is no such message.
pub fn submission_again(message: &[u8], job_id: Uuid) -> Result<JobSubmission, DecodeError> {
    let mut submission = JobSubmission::decode(message)?;
    submission.uuid = job_id.to_string();
    Ok(submission)
}

/// The parameters that a job is submitted with, as far as JSON has them.
pub fn submitted_parameters(submission: &JobSubmission) -> Map<String, Value> {
    let params = submission.params_dict.clone().unwrap_or_default();
    json_object(params).unwrap_or_default()
}

/// Puts these parameters in place of those that it has.
pub fn change_parameters(submission: &mut JobSubmission, parameters: &Map<String, Value>) {
    let parameters = protobuf_struct(parameters).fields;
    let all = submission.params_dict.get_or_insert_default();
    all.fields.extend(parameters);
}

/// A message that is sent for somebody; a service that does not know the headers goes without them.
pub fn for_somebody(message: Outgoing, origin: &Origin) -> Outgoing {
    let texts = [
        (VIA, Some(origin.via.name())),
        (WHO, origin.who.as_deref()),
        (FROM, origin.from.as_deref()),
    ];
    let headers = texts
        .into_iter()
        .filter_map(|(name, text)| Some((name.to_owned(), Value::from(text?))));
    Outgoing {
        headers: headers.collect(),
        ..message
    }
}

/// A submission that is sent for somebody, and runs this job again, which was the sender's.
pub fn for_another_run(message: Outgoing, of: Uuid, sender: Option<&str>) -> Outgoing {
    let of = (AGAIN.to_owned(), Value::from(of.to_string()));
    let sender = sender.map(|sender| (SENDER.to_owned(), Value::from(sender)));
    let mut message = message;
    message.headers.extend([of].into_iter().chain(sender));
    message
}

/// A message that is routed to no queue, to check that the broker takes messages.
pub fn pulse() -> Outgoing {
    Outgoing {
        exchange: "",
        ..to_clients("omotes_orchestrator_pulse".to_owned(), Vec::new())
    }
}

/// The same through the clients' exchange: it is returned if no replica holds the queue of
/// requests.
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
