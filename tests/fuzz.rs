//! Whatever somebody sends, nothing that reads it panics, and what it makes of it is of use.
//! `PROPTEST_CASES=1000000 cargo test --release --test fuzz` looks for longer.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::Duration;

use allocation_counter::AllocationInfo;
use jiff::Timestamp;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::esdl;
use omotes_orchestrator::domain::job::{
    self, Command, Context, Priority, Publication, Rules, State, Submission, TimeoutResult, decide,
};
use omotes_orchestrator::domain::workflow::Catalogue;
use omotes_orchestrator::telemetry::report;
use omotes_orchestrator::wire::celery;
use omotes_orchestrator::wire::workers::Control;
use omotes_orchestrator::wire::{
    self, EsdlMessage, Inbox, JobDelete, JobSubmission, Request, TaskProgressUpdate, TaskResult,
    task_progress_update::ProgressType,
};
use proptest::prelude::*;
use proptest::sample::Index;
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint};
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
    outcome_lost: Duration::from_secs(300),
    outcome_delay: Duration::from_secs(1),
    timeout_result: TimeoutResult::Cancelled,
    reject_invalid_params: true,
    keep_logs: true,
    keep_parameters: true,
    fair_share_separator: String::new(),
};

/// A job whose task the events come from.
static RUNNING: LazyLock<State> = LazyLock::new(|| {
    let submission = Submission {
        workflow_type: "workflow_1".to_owned(),
        esdl: ESDL.to_owned(),
        params: serde_json::Map::new(),
        reference: None,
        priority: Priority::Medium,
        timeout_ms: None,
        sender: None,
        requested: None,
    };
    let submitted = take(
        Uuid::nil(),
        &State::Unknown,
        &Command::Submit(submission),
        1,
    );
    let start = Command::Start {
        task_id: Uuid::nil().to_string(),
        message_id: None,
        redelivered: false,
    };
    take(Uuid::nil(), &submitted, &start, 2)
});

/// Takes a command through the pipeline as far as it is pure.
fn take(id: Uuid, state: &State, command: &Command, second: i64) -> State {
    let now = Timestamp::from_second(second).unwrap();
    let sender = celery::Sender {
        origin: "gen1@host".to_owned(),
        reply_to: Uuid::nil(),
    };
    let context = Context {
        now,
        session_begun: None,
        // The one that the events come from.
        new_task_id: Uuid::nil(),
        catalogue: &CATALOGUE,
        is_closed: &|_| false,
        has_limits: &|_| false,
        rules: &RULES,
    };
    let decision = decide(id, state, command, &context);
    for publication in decision.publications.iter().chain(&decision.announcements) {
        let message = match publication {
            Publication::Task {
                job_id,
                task_id,
                assignment,
            } => celery::task(&sender, *job_id, *task_id, assignment, "<esdl/>"),
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
    if let Some(job::TimeSeries::Keep { esdl_id, .. }) = decision.time_series.first() {
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
            for command in [command.instead("a reason".to_owned(), true), Some(Command::TimeOut), Some(Command::Expire)].into_iter().flatten() {
                take(Uuid::nil(), &state, &command, second);
            }
        }
    }

    #[test]
    fn answers_of_workers(answer in text_near(r#"{"w@host": [{"id": "t", "worker_pid": 1, "args": []}]}"#)) {
        celery::executions(answer.as_bytes());
        for question in Control::LOOK.into_iter().chain([Control::Report]) {
            question.note(answer.as_bytes(), &mut BTreeMap::new());
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
        let misleading = |character: char| {
            character.is_control()
                || matches!(
                    character,
                    '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
                        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
                        | '\u{e0000}'..='\u{e0fff}'
                )
        };
        let line = report::one_line(&text);
        prop_assert!(!line.contains(misleading), "{line:?}");
        let lines = report::readable(&text);
        prop_assert!(!lines.replace('\n', "").contains(misleading), "{lines:?}");
        prop_assert_eq!(lines.matches('\n').count(), text.matches('\n').count());
    }

    /// Directions and what is not seen are rare among all characters.
    #[test]
    fn misleading_lines(text in "[a-c\n\u{ad}\u{61c}\u{200b}-\u{200f}\u{2028}-\u{202e}\u{2060}-\u{206f}\u{e0001}]{0,40}") {
        let line = report::readable(&text).replace('\n', "");
        prop_assert!(line.is_ascii(), "{line:?}");
    }
}

/// The fields of a message, as protobuf writes them.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    /// A text, bytes or a message.
    fn with(mut self, number: u32, content: impl AsRef<[u8]>) -> Fields {
        let content = content.as_ref();
        encode_key(number, WireType::LengthDelimited, &mut self.0);
        encode_varint(content.len() as u64, &mut self.0);
        self.0.extend_from_slice(content);
        self
    }

    fn with_number(mut self, number: u32, value: u64) -> Fields {
        encode_key(number, WireType::Varint, &mut self.0);
        encode_varint(value, &mut self.0);
        self
    }

    /// What `one` writes, as often as it fits into `bytes`.
    fn with_many(mut self, bytes: usize, one: impl Fn(Fields, usize) -> Fields) -> Fields {
        let end = self.0.len() + bytes;
        let mut number = 0;
        while self.0.len() < end {
            self = one(self, number);
            number += 1;
        }
        self
    }
}

impl AsRef<[u8]> for Fields {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn fields() -> Fields {
    Fields::default()
}

/// Fields of a `google.protobuf.Value`.
mod value {
    pub(super) const NUMBER: u32 = 2;
    pub(super) const TEXT: u32 = 3;
    pub(super) const OBJECT: u32 = 5;
    pub(super) const LIST: u32 = 6;
}

fn entry(key: impl AsRef<[u8]>, value: Fields) -> Fields {
    fields().with(1, fields().with(1, key).with(2, value))
}

fn list_of(bytes: usize, item: impl AsRef<[u8]>) -> Fields {
    let items = fields().with_many(bytes, |items, _| items.with(1, item.as_ref()));
    fields().with(value::LIST, items)
}

fn nested(levels: usize, kind: u32) -> Fields {
    (0..levels).fold(fields(), |inner, _| match kind {
        value::OBJECT => fields().with(value::OBJECT, entry("k", inner)),
        kind => fields().with(kind, fields().with(1, inner)),
    })
}

fn nan() -> Fields {
    let mut number = fields();
    encode_key(value::NUMBER, WireType::SixtyFourBit, &mut number.0);
    number.0.extend_from_slice(&f64::NAN.to_le_bytes());
    number
}

fn submission_of(workflow: &str) -> Fields {
    fields()
        .with(1, Uuid::nil().to_string())
        .with(3, workflow)
        .with(4, ESDL)
}

fn params(params: impl AsRef<[u8]>) -> Fields {
    submission_of("workflow_2").with(5, params)
}

fn task(kind: Inbox) -> Fields {
    let event = fields()
        .with(1, Uuid::nil().to_string())
        .with(2, Uuid::nil().to_string());
    match kind {
        Inbox::Progress => event.with_number(6, 0),
        Inbox::Results
        | Inbox::Submissions
        | Inbox::Cancels
        | Inbox::WorkflowRequests
        | Inbox::NamedWorkflowRequests => event,
    }
}

type Shape = (&'static str, Inbox, fn(usize) -> Fields);

/// Bodies of about so many bytes that cost more than they weigh, unless somebody sees to it.
const SHAPES: &[Shape] = &[
    ("a huge key over many values", Inbox::Submissions, |n| {
        params(entry("k".repeat(n / 2), list_of(n / 2, "")))
    }),
    ("a huge key over a deep fault", Inbox::Submissions, |n| {
        let inner = fields().with(value::OBJECT, entry("k".repeat(n / 2), nan()));
        params(entry("k".repeat(n / 2), inner))
    }),
    ("many huge keys one in another", Inbox::Submissions, |n| {
        params((0..24).fold(entry("k", nan()), |inner, _| {
            entry("k".repeat(n / 25), fields().with(value::OBJECT, inner))
        }))
    }),
    ("many empty values", Inbox::Submissions, |n| {
        params(entry("k", list_of(n, "")))
    }),
    ("many empty objects", Inbox::Submissions, |n| {
        params(entry("k", list_of(n, fields().with(value::OBJECT, ""))))
    }),
    ("many small objects", Inbox::Submissions, |n| {
        let object = fields().with(value::OBJECT, entry("", fields()));
        params(entry("k", list_of(n, object)))
    }),
    ("many small lists", Inbox::Submissions, |n| {
        params(entry("k", list_of(n, nested(1, value::LIST))))
    }),
    ("many deep lists", Inbox::Submissions, |n| {
        params(entry("k", list_of(n, nested(25, value::LIST))))
    }),
    ("many deep objects", Inbox::Submissions, |n| {
        params(entry("k", list_of(n, nested(20, value::OBJECT))))
    }),
    ("many empty texts", Inbox::Submissions, |n| {
        params(entry("k", list_of(n, fields().with(value::TEXT, ""))))
    }),
    ("too deep", Inbox::Submissions, |n| {
        params(entry("k", list_of(n, nested(1000, value::LIST))))
    }),
    ("many keys", Inbox::Submissions, |n| {
        params(fields().with_many(n, |params, number| {
            let mut params = params;
            params.0.extend(entry(number.to_string(), fields()).0);
            params
        }))
    }),
    ("one key many times", Inbox::Submissions, |n| {
        let once = entry("k", fields().with(value::LIST, fields().with(1, "")));
        params(fields().with_many(n, |mut params, _| {
            params.0.extend(&once.0);
            params
        }))
    }),
    ("one entry with many values", Inbox::Submissions, |n| {
        let list = fields().with(value::LIST, fields().with(1, ""));
        params(fields().with(1, fields().with_many(n, |entry, _| entry.with(2, &list))))
    }),
    ("parameters many times", Inbox::Submissions, |n| {
        let once = entry("k", list_of(10, ""));
        submission_of("workflow_2").with_many(n, |submission, _| submission.with(5, &once))
    }),
    (
        "a huge text where a number belongs",
        Inbox::Submissions,
        |n| {
            params(entry(
                "integer_example",
                fields().with(value::TEXT, "x".repeat(n)),
            ))
        },
    ),
    (
        "a huge text of control characters",
        Inbox::Submissions,
        |n| params(entry("k", fields().with(value::TEXT, "\u{1}".repeat(n)))),
    ),
    ("an ESDL of control characters", Inbox::Submissions, |n| {
        submission_of("workflow_2").with(4, "\u{1}".repeat(n))
    }),
    ("an ESDL of quotes", Inbox::Submissions, |n| {
        submission_of("workflow_2").with(4, "\"".repeat(n))
    }),
    ("an ESDL of attributes", Inbox::Results, |n| {
        let attributes = "a='' ".repeat(n / 5);
        task(Inbox::Results).with(4, format!("<e {attributes}/>"))
    }),
    ("a huge reference", Inbox::Submissions, |n| {
        submission_of("workflow_2").with(6, "r".repeat(n))
    }),
    ("a huge reference with a NUL", Inbox::Submissions, |n| {
        submission_of("workflow_2").with(6, "r".repeat(n) + "\0")
    }),
    ("a huge workflow", Inbox::Submissions, |n| {
        submission_of(&"w".repeat(n))
    }),
    ("a workflow many times", Inbox::Submissions, |n| {
        submission_of("w").with_many(n, |submission, _| submission.with(3, "workflow_2"))
    }),
    ("a huge id", Inbox::Submissions, |n| {
        fields().with(1, "\u{1}".repeat(n))
    }),
    ("a huge id to cancel", Inbox::Cancels, |n| {
        fields().with(1, "\u{1}".repeat(n))
    }),
    ("an id many times", Inbox::Cancels, |n| {
        let id = Uuid::nil().to_string();
        fields().with_many(n, |cancel, _| cancel.with(1, &id))
    }),
    ("unknown fields", Inbox::WorkflowRequests, |n| {
        fields().with_many(n, |request, _| request.with(9, ""))
    }),
    ("a START of a huge task", Inbox::Progress, |n| {
        task(Inbox::Progress).with(2, "t".repeat(n))
    }),
    ("a huge message", Inbox::Progress, |n| {
        let mut progress = task(Inbox::Results).with(4, "m".repeat(n));
        encode_key(7, WireType::SixtyFourBit, &mut progress.0);
        progress.0.extend_from_slice(&0.5_f64.to_le_bytes());
        progress
    }),
    ("many ESDL messages", Inbox::Results, |n| {
        task(Inbox::Results).with_many(n, |result, _| result.with(7, ""))
    }),
    ("many ESDL messages with ids", Inbox::Results, |n| {
        let message = fields().with(1, "m").with(3, "i");
        task(Inbox::Results).with_many(n, |result, _| result.with(7, &message))
    }),
    ("a huge output", Inbox::Results, |n| {
        task(Inbox::Results).with(4, format!("<e id='x'>{}</e>", "\u{e9}".repeat(n / 2)))
    }),
    ("huge logs", Inbox::Results, |n| {
        task(Inbox::Results).with(5, "l".repeat(n))
    }),
    ("a result of a huge task", Inbox::Results, |n| {
        task(Inbox::Results).with(2, "t".repeat(n))
    }),
    (
        "a result of an unknown type and a huge task",
        Inbox::Results,
        |n| {
            task(Inbox::Results)
                .with(2, "t".repeat(n))
                .with_number(3, 9)
        },
    ),
];

/// Takes a message through the pipeline, for a job that is not known and for one that runs, and
/// counts what that takes of memory.
fn cost(inbox: Inbox, body: &[u8]) -> AllocationInfo {
    allocation_counter::measure(|| {
        let _ = wire::job_id(body);
        let command = match wire::decode(inbox, body, Some("id"), false) {
            Ok(Request::Job { command, .. }) => command,
            Ok(Request::ListWorkflows) => return,
            Err(undecodable) => {
                let queue = "queue";
                let time = Timestamp::UNIX_EPOCH;
                let properties = serde_json::Map::new();
                wire::dead_letter(queue, &undecodable.reason, time, properties, Vec::new());
                match undecodable.instead {
                    Some(instead) => instead.1,
                    None => return,
                }
            }
        };
        for state in [&State::Unknown, &*RUNNING] {
            let next = take(Uuid::nil(), state, &command, 9);
            assert!(next.reference().chars().count() <= job::MAX_REFERENCE);
            assert!(
                next.workflow_type()
                    .is_none_or(|name| name.chars().count() <= job::MAX_WORKFLOW_TYPE)
            );
        }
        if let Some(instead) = command.instead("a reason".to_owned(), true) {
            take(Uuid::nil(), &State::Unknown, &instead, 9);
        }
    })
}

const MIB: usize = 1024 * 1024;

/// Beside what a message weighs itself: what the most values weigh that one may hold.
const MOST_FOR_VALUES: u64 = 24 * MIB as u64;

/// What is wrong with the memory that a message takes.
fn too_much_memory(inbox: Inbox, body: &[u8]) -> Option<String> {
    let peak = cost(inbox, body).bytes_max;
    let size = body.len() as u64;
    (peak > 4 * size + MOST_FOR_VALUES).then(|| format!("{peak} bytes for {size}"))
}

#[test]
fn a_body_of_megabytes_takes_a_few_times_its_size() {
    let mut faults = Vec::new();
    for (what, inbox, shape) in SHAPES {
        let body = shape(8 * MIB).0;
        for body in [&body[..], &body[..body.len() / 2]] {
            faults.extend(too_much_memory(*inbox, body).map(|fault| format!("{what}: {fault}")));
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

/// Seconds say nothing on a busy machine. What is done for each byte nearly always ends in memory.
#[test]
fn twice_the_body_takes_no_more_than_twice_the_work() {
    let mut faults = Vec::new();
    for (what, inbox, shape) in SHAPES {
        let [once, twice] = [1, 2].map(|times| cost(*inbox, &shape(times * 64 * 1024).0));
        for (unit, once, twice) in [
            ("bytes", once.bytes_total, twice.bytes_total),
            ("allocations", once.count_total, twice.count_total),
        ] {
            // Vectors grow in powers of two.
            let most = 5 * once / 2 + 64 * 1024;
            if twice > most {
                faults.push(format!("{what}: {once} {unit}, {twice} for twice as much"));
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn hostile_bodies(
        shape in prop::sample::select(SHAPES),
        size in 1..256 * 1024_usize,
        changes in prop::collection::vec(change(), 0..8),
    ) {
        let (_, inbox, shape) = shape;
        let body = changed(shape(size).0, &changes);
        prop_assert_eq!(too_much_memory(inbox, &body), None);
        // By this a batch ends before its messages have become too large.
        let mut command = None;
        let decoding = allocation_counter::measure(|| {
            command = match wire::decode(inbox, &body, None, false) {
                Ok(Request::Job { command, .. }) => Some(command),
                Ok(Request::ListWorkflows) | Err(_) => None,
            };
        });
        let known = command.as_ref().map_or(0, Command::decoded_bytes) + body.len();
        let held = usize::try_from(decoding.bytes_current).unwrap();
        prop_assert!(held <= 2 * known + 4096, "{held} bytes, {known} known");
    }
}
