//! The pure hot spots: `cargo bench`. What they cost beside broker and database is measured by
//! `./run.sh bench`.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use jiff::Timestamp;
use omotes_orchestrator::domain::esdl;
use omotes_orchestrator::domain::job::{
    Command, Context, Rules, State, Submission, TimeoutResult, decide,
};
use omotes_orchestrator::domain::workflow::Catalogue;
use omotes_orchestrator::wire::celery::{self, Sender};
use omotes_orchestrator::wire::{self, Inbox, JobSubmission, Request, TaskResult};
use prost::Message;
use serde_json::json;
use std::time::Duration;
use uuid::Uuid;

/// Bytes of an ESDL: a sketch, a district, a city.
const SIZES: [usize; 3] = [2_000, 200_000, 5_000_000];

fn main() {
    divan::main();
}

fn esdl(bytes: usize) -> String {
    let mut esdl =
        "<?xml version='1.0' encoding='UTF-8'?>\n<esdl:EnergySystem id=\"an id\">\n".to_owned();
    while esdl.len() < bytes {
        esdl.push_str(
            "    <asset xsi:type=\"esdl:Pipe\" id=\"3f0f9a52-5a2e-4c6b-9d3c-2b6f6f0f2b11\" name=\"Pipe_1\" \
         length=\"120.5\" innerDiameter=\"0.1603\" outerDiameter=\"0.25\" diameter=\"DN150\"/>\n",
        );
    }
    esdl.push_str("</esdl:EnergySystem>\n");
    esdl
}

fn submission(bytes: usize) -> Vec<u8> {
    let params = json!({"a number": 1.5, "a text": "value", "a list": [1, 2, 3]});
    JobSubmission {
        uuid: Uuid::nil().to_string(),
        timeout_ms: None,
        workflow_type: "simulator".to_owned(),
        esdl: esdl(bytes),
        params_dict: params.as_object().map(wire::protobuf_struct),
        job_reference: Some("a reference".to_owned()),
        job_priority: None,
    }
    .encode_to_vec()
}

fn result(bytes: usize) -> Vec<u8> {
    TaskResult {
        job_id: Uuid::nil().to_string(),
        celery_task_id: Uuid::nil().to_string(),
        result_type: 0,
        output_esdl: Some(esdl(bytes)),
        logs: "logs".to_owned(),
        celery_task_type: "simulator".to_owned(),
        esdl_messages: Vec::new(),
    }
    .encode_to_vec()
}

fn decoded(inbox: Inbox, body: &[u8]) -> Command {
    match wire::decode(inbox, body, None, false).unwrap() {
        Request::Job { command, .. } => command,
        Request::ListWorkflows => unreachable!("it names a job"),
    }
}

fn submitted(bytes: usize) -> Submission {
    match decoded(Inbox::Submissions, &submission(bytes)) {
        Command::Submit(submission) => submission,
        other => unreachable!("{other:?}"),
    }
}

#[divan::bench(args = SIZES)]
fn read_a_job_id(bencher: Bencher, bytes: usize) {
    let body = submission(bytes);
    bencher.bench(|| wire::job_id(black_box(&body)));
}

#[divan::bench(args = SIZES)]
fn decode_a_submission(bencher: Bencher, bytes: usize) {
    let body = submission(bytes);
    bencher
        .counter(BytesCount::new(body.len()))
        .bench(|| decoded(Inbox::Submissions, black_box(&body)));
}

#[divan::bench(args = SIZES)]
fn decode_a_result(bencher: Bencher, bytes: usize) {
    let body = result(bytes);
    bencher
        .counter(BytesCount::new(body.len()))
        .bench(|| decoded(Inbox::Results, black_box(&body)));
}

#[divan::bench(args = SIZES)]
fn decide_about_a_submission(bencher: Bencher, bytes: usize) {
    let command = Command::Submit(submitted(bytes));
    let catalogue = Catalogue::parse(
        r#"[{"workflow_type_name": "simulator", "workflow_type_description_name": "S"}]"#,
    )
    .unwrap();
    let rules = Rules {
        delivery_limit: 2,
        retention: Duration::from_secs(1000),
        outcome_lost: Duration::from_secs(300),
        outcome_delay: Duration::from_secs(1),
        timeout_result: TimeoutResult::Cancelled,
        reject_invalid_params: false,
        keep_logs: true,
        keep_parameters: true,
        fair_share_separator: String::new(),
    };
    bencher.bench(|| {
        let context = Context {
            now: Timestamp::UNIX_EPOCH,
            session_begun: None,
            new_task_id: Uuid::nil(),
            catalogue: &catalogue,
            is_closed: &|_| false,
            has_limits: &|_| false,
            rules: &rules,
        };
        let decision = decide(Uuid::nil(), &State::Unknown, black_box(&command), &context);
        decision.publications.len()
    });
}

#[divan::bench(args = SIZES)]
fn write_a_task(bencher: Bencher, bytes: usize) {
    let submission = submitted(bytes);
    let sender = Sender {
        origin: "gen1@host".to_owned(),
        reply_to: Uuid::nil(),
    };
    bencher.counter(BytesCount::new(bytes)).bench(|| {
        let assignment = black_box(&submission).assignment(&submission.workflow_type);
        celery::task(
            &sender,
            Uuid::nil(),
            Uuid::nil(),
            &assignment,
            &submission.esdl,
        )
    });
}

#[divan::bench(args = SIZES)]
fn read_an_energy_systems_id(bencher: Bencher, bytes: usize) {
    let text = esdl(bytes);
    bencher.bench(|| esdl::energy_system_id(black_box(&text)));
}
