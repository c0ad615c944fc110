//! What Celery workers are sent: a task (message protocol version 2) and the revoking of one.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::domain::job::{Assignment, Priority};
use crate::wire::{Outgoing, PIDBOX_EXCHANGE, REPLIES_EXCHANGE};

/// How long a remote control message is valid. Celery itself says one second, which is short for
/// clocks that differ. A late revoke does no harm, since task ids are unique, and none is very
/// late: a worker's queue of them keeps nothing for more than five minutes.
const CONTROL_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// Who sends tasks: this process, for its lifetime.
#[derive(Debug, Clone)]
pub struct Sender {
    /// `gen<process id>@<host>`, as Celery names a client.
    pub origin: String,
    /// A queue for replies, which no OMOTES worker sends.
    pub reply_to: Uuid,
}

/// A task of a job with its input ESDL, for the queue of its name. It is mandatory: through the
/// default exchange a task for a queue that was deleted would vanish.
pub fn task(
    sender: &Sender,
    job_id: Uuid,
    task_id: Uuid,
    assignment: &Assignment<'_>,
    esdl: &str,
) -> Outgoing {
    let Assignment {
        task,
        reference,
        parameters,
        priority,
        input: _,
    } = assignment;
    let job = json!({"__type__": "uuid", "__value__": {"hex": job_id.simple().to_string()}});
    let args = (job, reference, esdl, parameters);
    let embed = json!({"callbacks": null, "errbacks": null, "chain": null, "chord": null});
    // Growing the buffer would take up to three times as much, and an ESDL may have a hundred
    // megabytes. Reserved memory that is not written costs nothing.
    let reference_size = reference.as_ref().map_or(0, |reference| reference.len());
    let mut body = Vec::with_capacity(2 * (esdl.len() + reference_size) + 4096);
    serde_json::to_writer(&mut body, &(args, Map::new(), embed))
        .expect("JSON values and texts always serialize");
    let task_id = task_id.to_string();
    let headers = json!({
        "lang": "py",
        "task": task,
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
        "argsrepr": format!("(UUID('{job_id}'), ..., <ESDL of {} bytes>, ...)", esdl.len()),
        "kwargsrepr": "{}",
        "origin": sender.origin,
        "ignore_result": false,
        "replaced_task_nesting": 0,
        "stamped_headers": null,
        "stamps": {},
    });
    Outgoing {
        exchange: "",
        routing_key: task.clone().into_owned(),
        mandatory: true,
        with_message_id: false,
        content_type: Some("application/json"),
        content_encoding: Some("utf-8"),
        priority: match priority {
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
/// Lamport clock, which only has to rise; `now` is its own host's time.
pub fn revoke(task_id: &str, clock: i64, now: Timestamp) -> Outgoing {
    let body = json!({
        "method": "revoke",
        "arguments": {"task_id": task_id, "terminate": true, "signal": "SIGTERM"},
        "destination": null,
        "pattern": null,
        "matcher": null,
    });
    to_all_workers(&body, clock, now)
}

/// Asks every worker that is up which tasks it runs. The answers come with `key`, which is fresh for
/// each question, through [`crate::wire::REPLIES_EXCHANGE`].
///
/// Not Celery's `query_task`, which can be asked about a single task: its answer has the task's
/// arguments, and with them the ESDL.
pub fn who_runs_what(key: &str, clock: i64, now: Timestamp) -> Outgoing {
    let body = json!({
        "method": "active",
        "arguments": {"safe": true},
        "destination": null,
        "pattern": null,
        "matcher": null,
        "ticket": key,
        "reply_to": {"exchange": REPLIES_EXCHANGE, "routing_key": key},
    });
    to_all_workers(&body, clock, now)
}

/// An execution of a task.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Execution {
    pub task_id: String,
    /// The worker's name.
    worker: String,
    /// Of the process that runs it, where the worker has several.
    process: Option<i64>,
}

/// What a worker answers to [`who_runs_what`]: an object with a list of tasks by the worker's name.
/// What is no such answer tells of none.
pub fn executions(answer: &[u8]) -> Vec<Execution> {
    let answer: Map<String, Value> = serde_json::from_slice(answer).unwrap_or_default();
    let of_worker = |(worker, tasks): (String, Value)| {
        let tasks = tasks.as_array().cloned().unwrap_or_default();
        tasks.into_iter().filter_map(move |task| {
            Some(Execution {
                task_id: task.get("id")?.as_str()?.to_owned(),
                worker: worker.clone(),
                process: task.get("worker_pid").and_then(Value::as_i64),
            })
        })
    };
    answer.into_iter().flat_map(of_worker).collect()
}

pub(super) fn to_all_workers(body: &Value, clock: i64, now: Timestamp) -> Outgoing {
    let expires = now.as_second() + CONTROL_LIFETIME.as_secs().cast_signed();
    Outgoing {
        exchange: PIDBOX_EXCHANGE,
        routing_key: String::new(),
        mandatory: false,
        with_message_id: false,
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

/// The job that a task in its queue belongs to.
pub fn job_of_task(body: &[u8]) -> Option<Uuid> {
    let (args, _, _): (Value, Value, Value) = serde_json::from_slice(body).ok()?;
    let hex = &args.get(0)?["__value__"]["hex"];
    hex.as_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::job::Submission;
    use crate::wire;
    use prost::Message as _;
    use rstest::rstest;

    fn captures() -> Value {
        serde_json::from_str(include_str!("../../tests/wire/captures.json")).unwrap()
    }

    /// A captured job as a client would have sent it.
    fn submission(capture: &Value) -> Submission {
        let body: Value = body_json(capture);
        let input = &capture["input"];
        let message = wire::JobSubmission {
            uuid: capture["job_id"].as_str().unwrap().to_owned(),
            timeout_ms: input["timeout"]
                .as_u64()
                .map(|ms| u32::try_from(ms).unwrap()),
            workflow_type: input["wf"].as_str().unwrap().to_owned(),
            esdl: body[0][2].as_str().unwrap().to_owned(),
            params_dict: input["params"].as_object().map(wire::protobuf_struct),
            job_reference: input["ref"].as_str().map(str::to_owned),
            job_priority: input["prio"]
                .as_i64()
                .map(|one| i32::try_from(one).unwrap()),
        };
        let bytes = message.encode_to_vec();
        match wire::decode(wire::Inbox::Submissions, &bytes, None, false).unwrap() {
            wire::Request::Job {
                command: crate::domain::job::Command::Submit(submission),
                ..
            } => submission,
            other => panic!("{other:?}"),
        }
    }

    fn body_json(capture: &Value) -> Value {
        serde_json::from_str(capture["task"][0]["body_text"].as_str().unwrap()).unwrap()
    }

    fn sender() -> Sender {
        Sender {
            origin: "gen1@host".to_owned(),
            reply_to: Uuid::from_u128(9),
        }
    }

    /// An outgoing message's properties as the captures write them.
    fn task_of(job_id: Uuid, task_id: Uuid, submission: &Submission) -> Outgoing {
        let assignment = submission.assignment(&submission.workflow_type);
        task(&sender(), job_id, task_id, &assignment, &submission.esdl)
    }

    fn properties(message: &Outgoing) -> Value {
        let mut properties = json!({"delivery_mode": 2, "priority": message.priority});
        for (name, value) in [
            ("content_type", message.content_type.map(str::to_owned)),
            (
                "content_encoding",
                message.content_encoding.map(str::to_owned),
            ),
            ("correlation_id", message.correlation_id.clone()),
            ("reply_to", message.reply_to.clone()),
        ] {
            if let Some(value) = value {
                properties[name] = value.into();
            }
        }
        properties
    }

    /// `value` without what differs from run to run.
    fn without(mut value: Value, keys: &[&str]) -> Value {
        for key in keys {
            assert!(
                value.as_object_mut().unwrap().remove(*key).is_some(),
                "{key} is missing in {value}"
            );
        }
        value
    }

    #[rstest]
    #[case::minimal("minimal")]
    #[case::all_kinds_of_parameters("params")]
    #[case::low_priority_and_empty_reference("low")]
    #[case::medium_priority("medium")]
    fn a_task_equals_the_recorded_one(#[case] name: &str) {
        let capture = &captures()[name];
        let recorded = &capture["task"][0];
        let task_id = Uuid::from_u128(5);
        let job_id = capture["job_id"].as_str().unwrap().parse().unwrap();
        let ours = task_of(job_id, task_id, &submission(capture));

        assert_eq!(ours.exchange, recorded["exchange"]);
        assert_eq!(ours.routing_key, recorded["routing_key"].as_str().unwrap());
        let ids = ["correlation_id", "reply_to"];
        assert_eq!(
            without(properties(&ours), &ids),
            without(recorded["properties"].clone(), &ids)
        );
        assert!(!ours.with_message_id);
        let run = ["id", "root_id", "origin", "argsrepr"];
        assert_eq!(
            without(Value::Object(ours.headers.clone()), &run),
            without(recorded["headers"].clone(), &run)
        );
        assert_eq!(
            serde_json::from_slice::<Value>(&ours.body).unwrap(),
            body_json(capture)
        );
        for id in [&ours.headers["id"], &ours.headers["root_id"]] {
            assert_eq!(*id, task_id.to_string());
        }
        assert_eq!(ours.correlation_id, Some(task_id.to_string()));
    }

    #[test]
    fn a_whole_number_stays_a_double() {
        let capture = &captures()["params"];
        let ours = task_of(Uuid::nil(), Uuid::nil(), &submission(capture));
        let body = String::from_utf8(ours.body).unwrap();
        assert!(body.contains(r#""i":3.0"#), "{body}");
    }

    #[test]
    fn the_esdl_is_not_repeated_in_the_headers() {
        let mut submission = submission(&captures()["minimal"]);
        submission.esdl = "x".repeat(200_000);
        submission.reference = Some("y".repeat(200_000));
        let ours = task_of(Uuid::nil(), Uuid::nil(), &submission);
        assert!(serde_json::to_vec(&ours.headers).unwrap().len() < 1000);
    }

    #[rstest]
    #[case::no_difference(0)]
    #[case::a_minute_ahead(60)]
    #[case::hours_ahead(12 * 60 * 60)]
    #[case::hours_behind(-12 * 60 * 60)]
    fn a_revoke_is_heard_by_a_worker_whose_clock_differs(#[case] seconds: i64) {
        let now = 1_000_000;
        let ours = revoke("task", 1, Timestamp::from_second(now).unwrap());
        assert!(ours.headers["expires"].as_i64().unwrap() > now + seconds);
    }

    #[test]
    fn a_revoke_equals_the_recorded_one() {
        let recorded = &captures()["revoke"][0];
        let body: Value = serde_json::from_str(recorded["body_text"].as_str().unwrap()).unwrap();
        let task_id = body["arguments"]["task_id"].as_str().unwrap();
        let now = Timestamp::from_second(1000).unwrap();
        let ours = revoke(task_id, 7, now);
        assert_eq!(ours.exchange, recorded["exchange"]);
        assert_eq!(ours.routing_key, recorded["routing_key"].as_str().unwrap());
        assert_eq!(properties(&ours), recorded["properties"]);
        assert_eq!(serde_json::from_slice::<Value>(&ours.body).unwrap(), body);
        assert_eq!(
            Value::Object(ours.headers),
            json!({"clock": 7, "expires": 87400})
        );
    }

    #[test]
    fn a_question_is_one_of_celerys_own() {
        let ours = who_runs_what("the key", 8, Timestamp::from_second(1000).unwrap());
        let body: Value = serde_json::from_slice(&ours.body).unwrap();
        // As `app.control.inspect().active(safe=True)` writes it.
        assert_eq!(
            body,
            json!({
                "method": "active",
                "arguments": {"safe": true},
                "destination": null,
                "pattern": null,
                "matcher": null,
                "ticket": "the key",
                "reply_to": {"exchange": "reply.celery.pidbox", "routing_key": "the key"},
            })
        );
        let revoke = revoke("task", 8, Timestamp::from_second(1000).unwrap());
        assert_eq!(
            ours,
            Outgoing {
                body: ours.body.clone(),
                ..revoke
            }
        );
    }

    #[rstest]
    #[case::of_celery_5_7(
        r#"{"worker-w@host": [{"id": "t", "name": "w", "args": "[…]", "kwargs": "{}", "type": "w",
            "hostname": "worker-w@host", "time_start": 1795574421.9, "acknowledged": false,
            "delivery_info": {"exchange": "", "routing_key": "w", "priority": 0, "redelivered": true},
            "worker_pid": 13331}]}"#,
        &[("t", "worker-w@host", Some(13331))]
    )]
    #[case::several(
        r#"{"a": [{"id": "t", "worker_pid": 1}, {"id": "u", "worker_pid": 2}], "b": [{"id": "t"}]}"#,
        &[("t", "a", Some(1)), ("u", "a", Some(2)), ("t", "b", None)]
    )]
    #[case::idle(r#"{"a": []}"#, &[])]
    #[case::nothing(r#"{"a": null}"#, &[])]
    #[case::an_error(r#"{"a": {"error": "KeyError()"}}"#, &[])]
    #[case::strange_tasks(r#"{"a": [1, null, {"id": 5}, {"worker_pid": 1}]}"#, &[])]
    #[case::no_object("[]", &[])]
    #[case::no_json("\u{80}", &[])]
    fn an_answer_tells_what_is_run(
        #[case] answer: &str,
        #[case] expected: &[(&str, &str, Option<i64>)],
    ) {
        let found = executions(answer.as_bytes());
        let found: Vec<_> = found
            .iter()
            .map(|one| (one.task_id.as_str(), one.worker.as_str(), one.process))
            .collect();
        assert_eq!(found, expected);
    }
}
