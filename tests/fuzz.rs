//! Whatever somebody sends, nothing that reads it panics, and what it makes of it is of use.
//! `PROPTEST_CASES=1000000 cargo test --release --test fuzz` looks for longer.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::LazyLock;
use std::time::Duration;

use jiff::Timestamp;
use omotes_orchestrator::celery;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::esdl;
use omotes_orchestrator::job::{
    self, Command, Context, Publication, Rules, State, TimeoutResult, decide,
};
use omotes_orchestrator::report;
use omotes_orchestrator::wire::{
    self, EsdlMessage, Inbox, JobDelete, JobSubmission, Request, TaskProgressUpdate, TaskResult,
    task_progress_update::ProgressType,
};
use omotes_orchestrator::workflow::Catalogue;
use proptest::prelude::*;
use proptest::sample::Index;
use prost::Message as _;
use uuid::Uuid;

/// A message of each kind that comes in, with everything set.
static MESSAGES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let uuid = Uuid::nil().to_string();
    let params = serde_json::json!({
        "integer_example": 3, "string_example": "key1", "nested": {"list": [null, true, 1.5, "é"]},
    });
    let submission = JobSubmission {
        uuid: uuid.clone(),
        timeout_ms: Some(u32::MAX),
        workflow_type: "workflow_1".to_owned(),
        esdl: ESDL.to_owned(),
        params_dict: Some(wire::protobuf_struct(params.as_object().unwrap())),
        job_reference: Some("a reference".to_owned()),
        job_priority: Some(2),
    };
    let event = |progress_type| TaskProgressUpdate {
        job_id: uuid.clone(),
        celery_task_id: Uuid::nil().to_string(),
        message: "a message".to_owned(),
        celery_task_type: "workflow_1".to_owned(),
        progress_type: Some(progress_type),
    };
    let result = TaskResult {
        job_id: uuid.clone(),
        celery_task_id: Uuid::nil().to_string(),
        result_type: 0,
        output_esdl: Some(ESDL.to_owned()),
        logs: "logs".to_owned(),
        celery_task_type: "workflow_1".to_owned(),
        esdl_messages: vec![EsdlMessage {
            technical_message: "a remark".to_owned(),
            severity: 2,
            esdl_object_id: Some("an id".to_owned()),
        }],
    };
    vec![
        submission.encode_to_vec(),
        event(ProgressType::Status(0)).encode_to_vec(),
        event(ProgressType::Progress(0.5)).encode_to_vec(),
        result.encode_to_vec(),
        JobDelete { uuid }.encode_to_vec(),
        Vec::new(),
    ]
});

const WORKFLOWS: &str = include_str!("wire/available_workflows.config.json");
const ESDL: &str = include_str!("../examples/district.esdl");

static CATALOGUE: LazyLock<Catalogue> = LazyLock::new(|| Catalogue::parse(WORKFLOWS).unwrap());

/// One change to a text of bytes.
#[derive(Debug, Clone)]
enum Change {
    Flip(Index, u8),
    Cut(Index),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    /// A piece of itself once more, somewhere else.
    Repeat(Index, Index, usize),
}

fn change() -> impl Strategy<Value = Change> {
    let index = any::<Index>;
    prop_oneof![
        4 => (index(), any::<u8>()).prop_map(|(at, byte)| Change::Flip(at, byte)),
        1 => index().prop_map(Change::Cut),
        2 => (index(), prop::collection::vec(any::<u8>(), 1..20))
            .prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        2 => (index(), 1..40_usize).prop_map(|(at, length)| Change::Remove(at, length)),
        2 => (index(), index(), 1..200_usize)
            .prop_map(|(from, to, length)| Change::Repeat(from, to, length)),
    ]
}

fn changed(mut bytes: Vec<u8>, changes: &[Change]) -> Vec<u8> {
    for change in changes {
        // One beyond the last byte is a place as well, and there always is one.
        let at = |index: &Index, bytes: &[u8]| index.index(bytes.len() + 1);
        match change {
            Change::Flip(index, byte) => {
                let at = at(index, &bytes);
                if let Some(old) = bytes.get_mut(at) {
                    *old ^= byte;
                }
            }
            Change::Cut(index) => bytes.truncate(at(index, &bytes)),
            Change::Insert(index, new) => {
                let at = at(index, &bytes);
                bytes.splice(at..at, new.iter().copied());
            }
            Change::Remove(index, length) => {
                let at = at(index, &bytes);
                bytes.drain(at..(at + length).min(bytes.len()));
            }
            Change::Repeat(from, to, length) => {
                let from = at(from, &bytes);
                let piece = bytes[from..(from + length).min(bytes.len())].to_vec();
                let to = at(to, &bytes);
                bytes.splice(to..to, piece);
            }
        }
    }
    bytes
}

fn near(original: &'static [u8]) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(change(), 0..8)
        .prop_map(move |changes| changed(original.to_vec(), &changes))
}

/// A body: something near a recorded one, or anything.
fn body() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => (any::<Index>(), prop::collection::vec(change(), 0..8))
            .prop_map(|(which, changes)| changed(which.get(&MESSAGES).clone(), &changes)),
        1 => prop::collection::vec(any::<u8>(), 0..300),
    ]
}

fn text_near(original: &'static str) -> impl Strategy<Value = String> {
    near(original.as_bytes()).prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn inbox() -> impl Strategy<Value = Inbox> {
    prop::sample::select(&Inbox::ALL[..])
}

static RULES: Rules = Rules {
    delivery_limit: 1,
    retention: Duration::from_secs(1000),
    telling: Duration::from_secs(300),
    timeout_result: TimeoutResult::Cancelled,
    reject_invalid_params: true,
};

/// Takes a command through the pipeline as far as it is pure.
fn take(id: Uuid, state: &State, command: &Command, second: i64) -> State {
    let now = Timestamp::from_second(second).unwrap();
    let sender = celery::Sender {
        origin: "gen1@host".to_owned(),
        reply_to: Uuid::nil(),
    };
    let context = Context {
        now,
        // The one that the events come from.
        new_task_id: Uuid::nil(),
        catalogue: &CATALOGUE,
        rules: &RULES,
    };
    let decision = decide(id, state, command, &context);
    for publication in decision.publications.iter().chain(&decision.announcements) {
        let message = match publication {
            Publication::Task {
                job_id,
                task_id,
                submission,
            } => celery::task(&sender, *job_id, *task_id, submission),
            Publication::Revoke { task_id } => celery::revoke(task_id, 1, now),
            Publication::Status { job_id, status } => wire::status_update(*job_id, *status),
            Publication::Progress {
                job_id,
                fraction,
                message,
            } => wire::progress_update(*job_id, *fraction, message),
            Publication::Result {
                job_id,
                result_type,
                output_esdl,
                logs,
                esdl_messages,
            } => wire::job_result(*job_id, *result_type, *output_esdl, logs, esdl_messages),
        };
        // What AMQP has no room for ends the connection, and with it everybody's messages.
        assert!(message.routing_key.len() <= 255);
        assert!(message.correlation_id.is_none_or(|id| id.len() <= 255));
        let headers = serde_json::to_vec(&message.headers).unwrap();
        assert!(
            headers.len() < 100 * 1024,
            "{} bytes of headers",
            headers.len()
        );
    }
    let line = report::job(id, command.reference());
    assert!(!line.contains(['\n', '\r', '\u{1b}']), "{line:?}");
    if let Some(job::TimeSeries::Keep { esdl_id, .. }) = &decision.time_series {
        assert!(!esdl_id.contains('\0'));
    }
    decision.next.unwrap_or_else(|| state.clone())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Any messages of one job, in whatever queues, one after the other.
    #[test]
    fn messages(deliveries in prop::collection::vec((inbox(), body(), any::<Option<String>>(), any::<bool>()), 1..6)) {
        let mut state = State::Unknown;
        for (second, (inbox, body, message_id, redelivered)) in (1..).zip(&deliveries) {
            let head = wire::job_id(body);
            let (id, command) = match wire::decode(*inbox, body, message_id.as_deref(), *redelivered) {
                Ok(Request::Job { id, command }) => {
                    prop_assert_eq!(head, Some(id), "a message goes to its job's handler");
                    (id, command)
                }
                Ok(Request::ListWorkflows) => continue,
                Err(undecodable) => {
                    prop_assert!(!undecodable.reason.is_empty());
                    match undecodable.instead {
                        Some(instead) => *instead,
                        None => continue,
                    }
                }
            };
            // All for one job: else there would hardly ever be two about the same.
            let _ = id;
            state = take(Uuid::nil(), &state, &command, second);
            for command in [command.instead("a reason".to_owned()), Some(Command::TimeOut), Some(Command::Expire)].into_iter().flatten() {
                take(Uuid::nil(), &state, &command, second);
            }
        }
    }

    #[test]
    fn dead_letters(body in body(), reason in any::<String>(), queue in "[a-z]{1,255}") {
        let letter = wire::dead_letter(&queue, &reason, Timestamp::UNIX_EPOCH, serde_json::Map::new(), body.clone());
        prop_assert_eq!(letter.body, body);
        prop_assert!(serde_json::to_vec(&letter.headers).unwrap().len() < 100 * 1024);
    }

    #[test]
    fn workflow_files(text in text_near(WORKFLOWS)) {
        if let Err(faults) = Catalogue::parse(&text) {
            prop_assert!(!faults.to_string().is_empty());
        }
    }

    #[test]
    fn esdls(text in text_near(ESDL)) {
        if let Some(id) = esdl::energy_system_id(&text) {
            prop_assert!(!id.is_empty() && !id.contains('\0'));
        }
    }

    #[test]
    fn any_text_for_an_esdl(text in any::<String>()) {
        esdl::energy_system_id(&text);
    }

    #[test]
    fn environments(value in any::<String>(), number in any::<i128>()) {
        for value in [value, number.to_string()] {
            // Whatever variable is asked for: this is its value.
            if let Err(faults) = Config::read(&|_| Some(value.clone())) {
                prop_assert!(!faults.to_string().is_empty());
            }
        }
    }

    #[test]
    fn lines_of_the_log(text in any::<String>()) {
        let line = report::one_line(&text);
        prop_assert!(line.chars().all(|character| !character.is_control()), "{line:?}");
    }
}
