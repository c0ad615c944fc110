//! What Celery's workers are asked of themselves, and told, by remote control, and what they answer.
//! An answer is an object with the worker's name as its only key; which question it is the answer to is
//! told by the key that it comes with. What is no answer tells of nothing.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::celery::to_all_workers;
use super::{Outgoing, REPLIES_EXCHANGE};
use crate::domain::worker::{Answer, SaidTask, Stats};

/// Longer names are nobody's.
const MAX_NAME: usize = 255;
/// How many tasks or queues of a worker are taken note of, and how many workers.
const MAX_OF_ONE: usize = 1000;
const MAX_WORKERS: usize = 10_000;

/// What workers can be asked or told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control<'a> {
    /// Of its process and its pool.
    Stats,
    /// The tasks that it computes.
    Active,
    /// The queues from which it takes tasks.
    ActiveQueues,
    /// Celery's version, among many other things.
    Report,
    /// To take no more tasks from a queue.
    CancelConsumer(&'a str),
    /// To take tasks from a queue.
    AddConsumer(&'a str),
    /// To end these tasks, or never to begin them.
    Revoke(&'a [String]),
}

impl Control<'_> {
    /// What a look asks of all workers.
    pub const LOOK: [Control<'static>; 3] =
        [Control::Active, Control::ActiveQueues, Control::Stats];

    fn method(self) -> (&'static str, Value) {
        match self {
            Control::Stats => ("stats", json!({})),
            Control::Active => ("active", json!({"safe": true})),
            Control::ActiveQueues => ("active_queues", json!({})),
            Control::Report => ("report", json!({})),
            Control::CancelConsumer(queue) => ("cancel_consumer", json!({"queue": queue})),
            Control::AddConsumer(queue) => ("add_consumer", json!({"queue": queue})),
            Control::Revoke(tasks) => {
                let arguments = json!({"task_id": tasks, "terminate": true, "signal": "SIGTERM"});
                ("revoke", arguments)
            }
        }
    }

    /// The message to these workers, or to all. Their answers come with `key`, through
    /// [`REPLIES_EXCHANGE`]. `clock` as in [`super::celery::revoke`].
    pub fn message(
        self,
        workers: Option<&[String]>,
        key: &str,
        clock: i64,
        now: Timestamp,
    ) -> Outgoing {
        let (method, arguments) = self.method();
        let body = json!({
            "method": method,
            "arguments": arguments,
            "destination": workers,
            "pattern": null,
            "matcher": null,
            "ticket": key,
            "reply_to": {"exchange": REPLIES_EXCHANGE, "routing_key": key},
        });
        to_all_workers(&body, clock, now)
    }

    /// Takes note of an answer to this.
    pub fn note(self, answer: &[u8], answers: &mut BTreeMap<String, Answer>) {
        let answer: Map<String, Value> = serde_json::from_slice(answer).unwrap_or_default();
        // A worker answers for itself.
        let [(host, said)] = &answer.iter().collect::<Vec<_>>()[..] else {
            return;
        };
        if !is_name(host) || answers.len() >= MAX_WORKERS && !answers.contains_key(*host) {
            return;
        }
        let mut noted = Answer::default();
        match self {
            Control::Stats => noted.stats = stats(said),
            Control::Active => noted.tasks = tasks(said),
            Control::ActiveQueues => noted.queues = queues(said),
            Control::Report => noted.celery = celery_version(said),
            Control::CancelConsumer(_) | Control::AddConsumer(_) | Control::Revoke(_) => {}
        }
        if noted == Answer::default() {
            return;
        }
        let known = answers.entry((*host).clone()).or_default();
        known.stats = noted.stats.or(known.stats.take());
        known.tasks = noted.tasks.or(known.tasks.take());
        known.queues = noted.queues.or(known.queues.take());
        known.celery = noted.celery.or(known.celery.take());
    }
}

/// The name of the queue in which a worker hears remote control; RabbitMQ has it as long as the worker
/// is connected.
pub fn control_queue(worker: &str) -> String {
    format!("{worker}.celery.pidbox")
}

fn is_name(text: &str) -> bool {
    (1..=MAX_NAME).contains(&text.len()) && !text.contains('\0')
}

fn name(value: &Value) -> Option<String> {
    value
        .as_str()
        .filter(|text| is_name(text))
        .map(str::to_owned)
}

fn stats(said: &Value) -> Option<Stats> {
    let pool = said.get("pool")?;
    let number = |value: &Value| value.as_i64().filter(|number| *number >= 0);
    let counts = said.get("total").and_then(Value::as_object);
    let counts = counts.into_iter().flat_map(|total| total.values());
    Some(Stats {
        pid: said.get("pid").and_then(number),
        uptime: said
            .get("uptime")
            .and_then(number)
            .map(SignedDuration::from_secs),
        pool: pool.get("implementation").and_then(name),
        pool_size: pool.get("max-concurrency").and_then(number),
        prefetch: said.get("prefetch_count").and_then(number),
        count: counts.filter_map(number).fold(0, i64::saturating_add),
    })
}

fn tasks(said: &Value) -> Option<Vec<SaidTask>> {
    let tasks = said.as_array()?.iter().take(MAX_OF_ONE);
    let task = |task: &Value| {
        Some(SaidTask {
            id: name(task.get("id")?)?,
            name: task.get("name").and_then(name).unwrap_or_default(),
            job_id: task.get("args").and_then(job_id),
        })
    };
    Some(tasks.filter_map(task).collect())
}

/// The job of `(UUID('0e9b…'), ...)`: what Celery tells of a task's arguments is what its sender has
/// written, as in [`super::celery::task`].
fn job_id(arguments: &Value) -> Option<Uuid> {
    let (_, rest) = arguments.as_str()?.split_once("(UUID('")?;
    Uuid::parse_str(rest.get(..36)?).ok()
}

fn queues(said: &Value) -> Option<BTreeSet<String>> {
    let queues = said.as_array()?.iter().take(MAX_OF_ONE);
    Some(
        queues
            .filter_map(|queue| name(queue.get("name")?))
            .collect(),
    )
}

/// `5.7.0` of `software -> celery:5.7.0 (collider) kombu:5.7.0 py:3.11.7` and what follows.
fn celery_version(said: &Value) -> Option<String> {
    let report = said.get("ok")?.as_str()?;
    let (_, rest) = report.split_once("celery:")?;
    let version = rest.split_whitespace().next()?;
    let is_version = |text: &str| text.len() <= 30 && text.is_ascii();
    is_version(version).then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn noted(question: Control<'_>, answer: &str) -> BTreeMap<String, Answer> {
        let mut answers = BTreeMap::new();
        question.note(answer.as_bytes(), &mut answers);
        answers
    }

    /// As Celery 5.3 and 5.7 answered.
    #[test]
    fn what_celery_answers_is_understood() {
        let mut answers = BTreeMap::new();
        for (question, answer) in [
            (
                Control::Stats,
                r#"{"w@h": {"total": {"steerable": 3, "other": 2}, "pid": 27550, "clock": "2",
                    "uptime": 86401, "pool": {"implementation": "celery.concurrency.prefork:TaskPool",
                    "max-concurrency": 1, "processes": [27574], "max-tasks-per-child": "N/A"},
                    "autoscaler": {"max": 1, "min": 1, "current": 1, "qty": 0}, "prefetch_count": 1}}"#,
            ),
            (
                Control::Active,
                r#"{"w@h": [{"id": "t", "name": "steerable", "kwargs": "{}",
                    "args": "(UUID('0e9b1c2d-0000-4000-8000-000000000001'), ..., <ESDL of 9 bytes>, ...)",
                    "hostname": "w@h", "time_start": 1795574421.9, "acknowledged": false,
                    "worker_pid": 13331}]}"#,
            ),
            (
                Control::ActiveQueues,
                r#"{"w@h": [{"name": "steerable", "exchange": {"name": "celery"},
                    "queue_arguments": {"x-max-priority": 10}}]}"#,
            ),
            (
                Control::Report,
                r#"{"w@h": {"ok": "\nsoftware -> celery:5.7.0 (collider) kombu:5.7.0 py:3.11.7\n"}}"#,
            ),
        ] {
            question.note(answer.as_bytes(), &mut answers);
        }
        let expected = Answer {
            stats: Some(Stats {
                pid: Some(27550),
                uptime: Some(SignedDuration::from_secs(86401)),
                pool: Some("celery.concurrency.prefork:TaskPool".to_owned()),
                pool_size: Some(1),
                prefetch: Some(1),
                count: 5,
            }),
            tasks: Some(vec![SaidTask {
                id: "t".to_owned(),
                name: "steerable".to_owned(),
                job_id: Uuid::parse_str("0e9b1c2d-0000-4000-8000-000000000001").ok(),
            }]),
            queues: Some(BTreeSet::from(["steerable".to_owned()])),
            celery: Some("5.7.0".to_owned()),
        };
        assert_eq!(answers, BTreeMap::from([("w@h".to_owned(), expected)]));
    }

    #[rstest]
    #[case::no_json("\u{80}")]
    #[case::no_object("[]")]
    #[case::nobody("{}")]
    #[case::two_at_once(r#"{"a": [], "b": []}"#)]
    #[case::an_error(r#"{"a": {"error": "KeyError()"}}"#)]
    #[case::nothing(r#"{"a": null}"#)]
    #[case::a_number(r#"{"a": 5}"#)]
    #[case::no_name(r#"{"": []}"#)]
    #[case::a_name_that_postgres_does_not_take("{\"a\\u0000\": []}")]
    fn what_is_no_answer_tells_of_nothing(#[case] answer: &str) {
        for question in [
            Control::Active,
            Control::ActiveQueues,
            Control::Stats,
            Control::Report,
        ] {
            let is_list = answer == "{\"a\": []}";
            assert!(
                !is_list && noted(question, answer).is_empty(),
                "{question:?}"
            );
        }
    }

    #[test]
    fn strange_parts_are_left_out() {
        let long = "x".repeat(300);
        let tasks = format!(
            r#"{{"a": [1, null, {{"id": 5}}, {{"id": "{long}"}}, {{"id": "t", "name": 5, "args": "(UUID('é"}}]}}"#
        );
        let answers = noted(Control::Active, &tasks);
        assert_eq!(
            answers["a"].tasks,
            Some(vec![SaidTask {
                id: "t".to_owned(),
                ..SaidTask::default()
            }])
        );
        let stats = r#"{"a": {"pool": [], "total": {"x": -5, "y": 1e300, "z": "n"}, "pid": -1, "uptime": 9e99}}"#;
        let answers = noted(Control::Stats, stats);
        assert_eq!(answers["a"].stats, Some(Stats::default()));
    }

    #[test]
    fn a_control_message_is_one_of_celerys_own() {
        let hosts = ["w@h".to_owned()];
        let message = Control::CancelConsumer("steerable").message(
            Some(&hosts),
            "key",
            3,
            Timestamp::UNIX_EPOCH,
        );
        let body: Value = serde_json::from_slice(&message.body).unwrap();
        // As `app.control.cancel_consumer("steerable", ["w@h"], reply=True)` writes it.
        assert_eq!(
            body,
            json!({
                "method": "cancel_consumer",
                "arguments": {"queue": "steerable"},
                "destination": ["w@h"],
                "pattern": null,
                "matcher": null,
                "ticket": "key",
                "reply_to": {"exchange": "reply.celery.pidbox", "routing_key": "key"},
            })
        );
    }
}
