//! What Celery workers are sent: a task (message protocol version 2) and the revoking of one.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::job::{Priority, Submission};
use crate::wire::{Outgoing, PIDBOX_EXCHANGE};

/// How long a revoke is worth hearing. Celery itself says one second, which is short for clocks
/// that differ.
const REVOKE_LIFETIME: Duration = Duration::from_secs(60);

/// Who sends tasks: this process, for its lifetime.
#[derive(Debug, Clone)]
pub struct Sender {
    /// `gen<process id>@<host>`, as Celery names a client.
    pub origin: String,
    /// A queue for replies, which no OMOTES worker sends.
    pub reply_to: Uuid,
}

/// The task of a job, for the queue that is named after its workflow. It is mandatory: through the
/// default exchange a task for a queue that was deleted would vanish.
pub fn task(sender: &Sender, job_id: Uuid, task_id: Uuid, submission: &Submission) -> Outgoing {
    let job = json!({"__type__": "uuid", "__value__": {"hex": job_id.simple().to_string()}});
    let args = (
        job,
        &submission.reference,
        &submission.esdl,
        &submission.params,
    );
    let embed = json!({"callbacks": null, "errbacks": null, "chain": null, "chord": null});
    let body = serde_json::to_vec(&(args, Map::new(), embed))
        .expect("JSON values and texts always serialize");
    let task_id = task_id.to_string();
    let headers = json!({
        "lang": "py",
        "task": submission.workflow_type,
        "id": task_id,
        "shadow": null,
        "eta": null,
        "expires": null,
        "group": null,
        "group_index": null,
        "retries": 0,
        "timelimit": [null, null],
        "root_id": task_id,
        "parent_id": null,
        // For logs only, and part of a header that has to fit into one frame.
        "argsrepr": format!("(UUID('{job_id}'), ..., <ESDL of {} bytes>, ...)", submission.esdl.len()),
        "kwargsrepr": "{}",
        "origin": sender.origin,
        "ignore_result": false,
        "replaced_task_nesting": 0,
        "stamped_headers": null,
        "stamps": {},
    });
    Outgoing {
        exchange: "",
        routing_key: submission.workflow_type.clone(),
        mandatory: true,
        message_id: None,
        content_type: Some("application/json"),
        content_encoding: Some("utf-8"),
        priority: match submission.priority {
            Priority::Low => 2,
            Priority::Medium => 4,
            Priority::High => 6,
        },
        correlation_id: Some(task_id),
        reply_to: Some(sender.reply_to.to_string()),
        headers: object(headers),
        body,
    }
}

/// Tells every worker that is up to end a task, or never to begin it. `clock` is the sender's
/// Lamport clock, which only has to rise.
pub fn revoke(task_id: &str, clock: i64, now: Timestamp) -> Outgoing {
    let expires = now.as_second() + REVOKE_LIFETIME.as_secs().cast_signed();
    let body = json!({
        "method": "revoke",
        "arguments": {"task_id": task_id, "terminate": true, "signal": "SIGTERM"},
        "destination": null,
        "pattern": null,
        "matcher": null,
    });
    Outgoing {
        exchange: PIDBOX_EXCHANGE,
        routing_key: String::new(),
        mandatory: false,
        message_id: None,
        content_type: Some("application/json"),
        content_encoding: Some("utf-8"),
        priority: 0,
        correlation_id: None,
        reply_to: None,
        headers: object(json!({"clock": clock, "expires": expires})),
        body: body.to_string().into_bytes(),
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        other => unreachable!("{other} is written as an object"),
    }
}
