use base64::prelude::{BASE64_STANDARD, Engine};
use jiff::Timestamp;
use proptest::prelude::*;
use prost::Message as _;
use prost_types::value::Kind;
use rstest::rstest;
use serde_json::json;

use super::*;
use crate::domain::job::{
    ClientStatus, Command, Origin, Priority, Requested, ResultType, Submission, Via,
};

const JOB: &str = "ea19a9a2-f366-42c4-9d3b-815342135bc2";

fn job() -> Uuid {
    JOB.parse().unwrap()
}

fn captures() -> Value {
    serde_json::from_str(include_str!("../../tests/wire/captures.json")).unwrap()
}

/// Holds a message against a recorded one, but for its id.
fn check_recorded(ours: &Outgoing, recorded: &Value) {
    assert_eq!(ours.exchange, recorded["exchange"]);
    assert_eq!(ours.routing_key, recorded["routing_key"].as_str().unwrap());
    assert_eq!(BASE64_STANDARD.encode(&ours.body), recorded["body_b64"]);
    assert_eq!(Value::Object(ours.headers.clone()), recorded["headers"]);
    assert!(ours.with_message_id);
    assert_eq!(ours.priority, recorded["properties"]["priority"]);
    assert_eq!(
        (
            ours.content_type,
            ours.content_encoding,
            &ours.correlation_id,
            &ours.reply_to
        ),
        (None, None, &None, &None)
    );
}

#[test]
fn a_cancellation_equals_the_recorded_one() {
    let captures = captures();
    let status = status_update(job(), ClientStatus::Cancelled);
    check_recorded(&status, &captures["delete_status"][0]);
    let result = job_result(job(), ResultType::Cancelled, None, "", &[]);
    check_recorded(&result, &captures["delete_result"][0]);
}

#[test]
fn the_result_of_an_unknown_workflow_equals_the_recorded_one() {
    let capture = &captures()["unknown"];
    let logs = "Workflow type no_such_workflow is unknown by orchestrator at the time this \
                submission was received.";
    let job = capture["job_id"].as_str().unwrap().parse().unwrap();
    let result = job_result(job, ResultType::Error, None, logs, &[]);
    check_recorded(&result, &capture["result"][0]);
}

#[test]
fn a_workers_result_reaches_the_client_unchanged() {
    let messages = vec![EsdlMessage {
        technical_message: "too hot".to_owned(),
        severity: esdl_message::Severity::Warning.into(),
        esdl_object_id: Some("asset".to_owned()),
    }];
    let ours = job_result(
        job(),
        ResultType::Succeeded,
        Some("<esdl/>"),
        "logs",
        &messages,
    );
    assert!(ours.mandatory);
    let expected = JobResult {
        uuid: JOB.to_owned(),
        result_type: job_result::ResultType::Succeeded.into(),
        output_esdl: Some("<esdl/>".to_owned()),
        logs: "logs".to_owned(),
        esdl_messages: messages,
    };
    assert_eq!(JobResult::decode(ours.body.as_slice()), Ok(expected));
}

fn decoded(inbox: Inbox, message: &impl prost::Message) -> Result<Request, Undecodable> {
    decode(inbox, &message.encode_to_vec(), Some("message"), true)
}

fn full_submission() -> JobSubmission {
    JobSubmission {
        uuid: JOB.to_owned(),
        timeout_ms: Some(u32::MAX),
        workflow_type: "simulator".to_owned(),
        esdl: "<esdl/>".to_owned(),
        params_dict: Some(protobuf_struct(
            json!({"a": 1, "b": [null, true, "x", {"c": 2.5}]})
                .as_object()
                .unwrap(),
        )),
        job_reference: Some("ref".to_owned()),
        job_priority: Some(job_submission::JobPriority::High.into()),
    }
}

#[test]
fn a_submission_is_read_whole() {
    let expected = Command::Submit(Submission {
        workflow_type: "simulator".to_owned(),
        esdl: "<esdl/>".to_owned(),
        params: json!({"a": 1.0, "b": [null, true, "x", {"c": 2.5}]})
            .as_object()
            .unwrap()
            .clone(),
        reference: Some("ref".to_owned()),
        priority: Priority::High,
        timeout_ms: Some(u32::MAX),
        sender: None,
        requested: None,
    });
    assert_eq!(
        decoded(Inbox::Submissions, &full_submission()),
        Ok(Request::Job {
            id: job(),
            command: expected
        })
    );
}

#[rstest]
#[case::unset(None, Priority::Medium)]
#[case::low(Some(0), Priority::Low)]
#[case::medium(Some(1), Priority::Medium)]
#[case::high(Some(2), Priority::High)]
#[case::of_a_later_sdk(Some(3), Priority::Medium)]
fn priorities(#[case] on_the_wire: Option<i32>, #[case] expected: Priority) {
    let message = JobSubmission {
        job_priority: on_the_wire,
        ..full_submission()
    };
    match decoded(Inbox::Submissions, &message) {
        Ok(Request::Job {
            command: Command::Submit(submission),
            ..
        }) => {
            assert_eq!(submission.priority, expected);
        }
        other => panic!("{other:?}"),
    }
}

#[rstest]
#[case::braces("{EA19A9A2-F366-42C4-9D3B-815342135BC2}")]
#[case::no_hyphens("ea19a9a2f36642c49d3b815342135bc2")]
#[case::urn("urn:uuid:ea19a9a2-f366-42c4-9d3b-815342135bc2")]
fn a_job_id_is_read_as_python_reads_it(#[case] text: &str) {
    let message = JobDelete {
        uuid: text.to_owned(),
    };
    assert_eq!(
        decoded(Inbox::Cancels, &message),
        Ok(Request::Job {
            id: job(),
            command: Command::Cancel(Origin::default())
        })
    );
    assert_eq!(job_id(&message.encode_to_vec()), Some(job()));
}

fn progress(progress_type: Option<task_progress_update::ProgressType>) -> TaskProgressUpdate {
    TaskProgressUpdate {
        job_id: JOB.to_owned(),
        celery_task_id: "task".to_owned(),
        message: "half".to_owned(),
        celery_task_type: "simulator".to_owned(),
        progress_type,
    }
}

#[test]
fn a_worker_starts_and_progresses() {
    use task_progress_update::ProgressType;
    let start = Command::Start {
        task_id: "task".to_owned(),
        message_id: Some("message".to_owned()),
        redelivered: true,
    };
    let half = Command::Progress {
        task_id: "task".to_owned(),
        fraction: 0.5,
        message: "half".to_owned(),
    };
    for (on_the_wire, command) in [
        (ProgressType::Status(0), start),
        (ProgressType::Progress(0.5), half),
    ] {
        assert_eq!(
            decoded(Inbox::Progress, &progress(Some(on_the_wire))),
            Ok(Request::Job { id: job(), command })
        );
    }
}

#[test]
fn a_request_for_the_workflows_is_empty() {
    let request = decoded(Inbox::WorkflowRequests, &RequestAvailableWorkflows {});
    assert_eq!(request, Ok(Request::ListWorkflows));
}

/// What an undecodable message says and does.
fn fault(result: Result<Request, Undecodable>) -> (String, Option<(Uuid, Command)>) {
    let Undecodable { reason, instead } = result.unwrap_err();
    (reason, instead.map(|one| *one))
}

#[test]
fn a_message_that_names_no_job_says_what_it_names() {
    let message = JobDelete {
        uuid: "seven".to_owned(),
    };
    let (reason, instead) = fault(decoded(Inbox::Cancels, &message));
    assert!(reason.starts_with(r#""seven" is no job id"#), "{reason}");
    assert_eq!(instead, None);
}

#[test]
fn progress_without_a_type_and_of_an_unknown_status_are_faults() {
    use task_progress_update::ProgressType;
    let (reason, _) = fault(decoded(Inbox::Progress, &progress(None)));
    assert_eq!(
        reason,
        "TaskProgressUpdate: neither status nor progress is set"
    );
    let unknown = progress(Some(ProgressType::Status(7)));
    let (reason, _) = fault(decoded(Inbox::Progress, &unknown));
    assert_eq!(reason, "TaskProgressUpdate: 7 is no ProgressStatus");
}

#[test]
fn a_submission_cut_short_is_refused_in_its_jobs_name() {
    let mut body = full_submission().encode_to_vec();
    body.truncate(body.len() - 3);
    let (reason, instead) = fault(decode(Inbox::Submissions, &body, None, false));
    assert!(
        reason.starts_with("JobSubmission: failed to decode"),
        "{reason}"
    );
    let Some((
        id,
        Command::Refuse {
            reason: for_client, ..
        },
    )) = instead
    else {
        panic!("{instead:?}");
    };
    assert_eq!(id, job());
    assert!(for_client.ends_with(&reason), "{for_client}");
}

#[test]
fn a_result_that_cannot_be_read_fails_its_own_task_only() {
    let message = TaskResult {
        job_id: JOB.to_owned(),
        celery_task_id: "task".to_owned(),
        result_type: 9,
        ..TaskResult::default()
    };
    let (reason, instead) = fault(decoded(Inbox::Results, &message));
    assert_eq!(reason, "TaskResult: 9 is no ResultType");
    let Some((id, Command::Fail { task_id, .. })) = instead else {
        panic!("{instead:?}");
    };
    assert_eq!((id, task_id.as_deref()), (job(), Some("task")));
}

#[rstest]
#[case::nan(f64::NAN, "NaN")]
#[case::infinity(f64::INFINITY, "inf")]
fn a_parameter_that_is_no_number_is_refused_by_its_path(#[case] number: f64, #[case] name: &str) {
    let mut message = full_submission();
    let list = prost_types::ListValue {
        values: vec![prost_types::Value {
            kind: Some(Kind::NumberValue(number)),
        }],
    };
    let params = message.params_dict.as_mut().unwrap();
    params.fields.insert(
        "deep".to_owned(),
        prost_types::Value {
            kind: Some(Kind::ListValue(list)),
        },
    );
    match decoded(Inbox::Submissions, &message) {
        Ok(Request::Job {
            command: Command::Refuse { reason, .. },
            ..
        }) => assert_eq!(
            reason,
            format!("The parameter params_dict.deep[0] is {name}, which is no finite number.")
        ),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_nul_in_the_reference_is_refused() {
    let mut message = full_submission();
    message.job_reference = Some("a\0b".to_owned());
    let refusal = Command::Refuse {
        reason: "The submission's job_reference contains a NUL character.".to_owned(),
        workflow_type: "simulator".to_owned(),
        reference: Some("a\0b".to_owned()),
    };
    assert_eq!(
        decoded(Inbox::Submissions, &message),
        Ok(Request::Job {
            id: job(),
            command: refusal
        })
    );
}

/// A submission whose parameters are those of `kind`, under the key `k`.
fn submission_with(kind: Kind) -> JobSubmission {
    let value = prost_types::Value { kind: Some(kind) };
    let fields = [("k".to_owned(), value)].into();
    JobSubmission {
        params_dict: Some(prost_types::Struct { fields }),
        ..full_submission()
    }
}

fn list(items: usize) -> Kind {
    let values = vec![prost_types::Value::default(); items];
    Kind::ListValue(prost_types::ListValue { values })
}

fn object(members: usize) -> Kind {
    let member = |number: usize| (number.to_string(), prost_types::Value::default());
    let fields = (0..members).map(member).collect();
    Kind::StructValue(prost_types::Struct { fields })
}

#[rstest]
#[case::most_values(submission_with(list(99_999)), None)]
#[case::too_many_values(
    submission_with(list(100_000)),
    Some("The submission's params_dict has more than 100,000 values.")
)]
#[case::most_names(submission_with(object(9_999)), None)]
#[case::too_many_names(
    submission_with(object(10_000)),
    Some("The submission's params_dict has names for more than 10,000 values.")
)]
#[case::most_control_characters(submission_with(Kind::StringValue("\u{1}".repeat(1_000_000))), None)]
#[case::too_many_control_characters(
    submission_with(Kind::StringValue("\u{1}".repeat(1_000_001))),
    Some("The submission's texts have more than 1,000,000 control characters.")
)]
#[case::too_many_in_the_esdl(
    JobSubmission { esdl: "\0".repeat(1_000_001), ..full_submission() },
    Some("The submission's texts have more than 1,000,000 control characters.")
)]
#[case::line_breaks(JobSubmission { esdl: "\r\n".repeat(1_000_001), ..full_submission() }, None)]
fn a_submission_that_holds_too_much_is_refused(
    #[case] message: JobSubmission,
    #[case] expected: Option<&str>,
) {
    match decoded(Inbox::Submissions, &message) {
        Ok(Request::Job {
            id,
            command: Command::Submit(_),
        }) => assert_eq!((id, None), (job(), expected)),
        Ok(Request::Job {
            id,
            command:
                Command::Refuse {
                    reason,
                    workflow_type,
                    reference,
                },
        }) => {
            assert_eq!((id, Some(reason.as_str())), (job(), expected));
            let named = (workflow_type.as_str(), reference.as_deref());
            assert_eq!(named, ("simulator", Some("ref")));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn too_much_in_a_submission_of_no_job_is_a_dead_letter() {
    let message = JobSubmission {
        uuid: "seven".to_owned(),
        ..submission_with(list(100_000))
    };
    let (reason, instead) = fault(decoded(Inbox::Submissions, &message));
    assert!(reason.starts_with(r#""seven" is no job id"#), "{reason}");
    assert_eq!(instead, None);
}

#[test]
fn a_result_with_too_many_remarks_fails_its_own_task() {
    let mut message = TaskResult {
        job_id: JOB.to_owned(),
        celery_task_id: "task".to_owned(),
        esdl_messages: vec![EsdlMessage::default(); 100_000],
        ..TaskResult::default()
    };
    decoded(Inbox::Results, &message).unwrap();
    message.esdl_messages.push(EsdlMessage::default());
    let (reason, instead) = fault(decoded(Inbox::Results, &message));
    assert_eq!(
        reason,
        "TaskResult: its esdl_messages are more than 100,000"
    );
    let Some((id, Command::Fail { task_id, .. })) = instead else {
        panic!("{instead:?}");
    };
    assert_eq!((id, task_id.as_deref()), (job(), Some("task")));
}

#[test]
fn a_task_id_that_is_too_long_is_nobodys() {
    let long = "t".repeat(256);
    let event = TaskProgressUpdate {
        celery_task_id: long.clone(),
        ..progress(Some(task_progress_update::ProgressType::Status(0)))
    };
    let result = TaskResult {
        job_id: JOB.to_owned(),
        celery_task_id: long,
        ..TaskResult::default()
    };
    let unreadable = TaskResult {
        result_type: 9,
        ..result.clone()
    };
    let said = |name| format!("{name}: a celery_task_id of 256 bytes is no task id");
    for (outcome, expected) in [
        (decoded(Inbox::Progress, &event), said("TaskProgressUpdate")),
        (decoded(Inbox::Results, &result), said("TaskResult")),
        (
            decoded(Inbox::Results, &unreadable),
            "TaskResult: 9 is no ResultType".to_owned(),
        ),
    ] {
        // A job that is failed without a task's id would be failed whatever its task is.
        assert_eq!(fault(outcome), (expected, None));
    }
}

#[test]
fn what_is_said_of_a_message_is_short_whatever_it_holds() {
    let megabyte = "\u{1}".repeat(1_000_000);
    let cancel = JobDelete {
        uuid: megabyte.clone(),
    };
    let (reason, _) = fault(decoded(Inbox::Cancels, &cancel));
    assert!(reason.len() < 1000, "{} bytes", reason.len());
    let number = prost_types::Value {
        kind: Some(Kind::NumberValue(f64::NAN)),
    };
    let nested = (0..20).fold(number, |inner, _| prost_types::Value {
        kind: Some(Kind::StructValue(prost_types::Struct {
            fields: [("k".repeat(1000), inner)].into(),
        })),
    });
    let message = submission_with(nested.kind.unwrap());
    let Ok(Request::Job {
        command: Command::Refuse { reason, .. },
        ..
    }) = decoded(Inbox::Submissions, &message)
    else {
        panic!("it is not refused");
    };
    let begin = format!("The parameter params_dict.k.{}….kkk", "k".repeat(60));
    assert!(reason.starts_with(&begin), "{reason}");
    assert!(
        reason.ends_with("… is NaN, which is no finite number."),
        "{reason}"
    );
    assert!(reason.len() < 500, "{reason}");
}

proptest! {
    /// What is written field by field is the message that prost would have written.
    #[test]
    fn results_and_progress_are_what_clients_read(
        output in any::<Option<String>>(),
        logs: String,
        messages in prop::collection::vec(any::<(String, i32, Option<String>)>(), 0..3),
        fraction: f64,
    ) {
        let esdl_messages: Vec<_> = messages
            .into_iter()
            .map(|(technical_message, severity, esdl_object_id)| EsdlMessage {
                technical_message,
                severity,
                esdl_object_id,
            })
            .collect();
        let result = JobResult {
            uuid: JOB.to_owned(),
            result_type: job_result::ResultType::Error.into(),
            output_esdl: output.clone(),
            logs: logs.clone(),
            esdl_messages: esdl_messages.clone(),
        };
        let ours = job_result(job(), ResultType::Error, output.as_deref(), &logs, &esdl_messages);
        prop_assert_eq!(ours.body, result.encode_to_vec());
        let progress = JobProgressUpdate {
            uuid: JOB.to_owned(),
            progress: fraction,
            message: logs.clone(),
        };
        let ours = progress_update(job(), fraction, &logs);
        prop_assert_eq!(ours.body, progress.encode_to_vec());
    }
}

#[test]
fn a_dead_letter_tells_where_it_comes_from() {
    let properties = json!({"message_id": "m"}).as_object().unwrap().clone();
    let time = Timestamp::from_second(0).unwrap();
    let letter = dead_letter("queue", "why", time, properties, b"body".to_vec());
    assert_eq!(
        (letter.exchange, letter.routing_key.as_str()),
        ("", DEAD_LETTERS_QUEUE)
    );
    assert_eq!(letter.body, b"body");
    assert_eq!(
        Value::Object(letter.headers),
        json!({
            "queue": "queue",
            "reason": "why",
            "time": "1970-01-01T00:00:00Z",
            "properties": {"message_id": "m"},
        })
    );
}

#[test]
fn a_dead_letters_headers_fit_into_a_frame() {
    let properties = json!({"headers": {"x": "y".repeat(200_000)}})
        .as_object()
        .unwrap()
        .clone();
    let time = Timestamp::from_second(0).unwrap();
    let letter = dead_letter("queue", &"z".repeat(100_000), time, properties, Vec::new());
    assert!(serde_json::to_vec(&letter.headers).unwrap().len() < 4096);
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_or_refused(
        body in prop::collection::vec(any::<u8>(), 0..200),
        inbox in prop::sample::select(Inbox::ALL.to_vec()),
    ) {
        let _ = decode(inbox, &body, None, false);
        let _ = job_id(&body);
    }

    #[test]
    fn a_spoiled_submission_is_decoded_or_refused(place in any::<prop::sample::Index>(), byte: u8) {
        let mut body = full_submission().encode_to_vec();
        let place = place.index(body.len());
        body[place] = byte;
        let _ = decode(Inbox::Submissions, &body, None, false);
    }
}

#[test]
fn a_start_whose_message_id_no_table_can_hold_is_one_without() {
    let start = progress(Some(task_progress_update::ProgressType::Status(
        task_progress_update::ProgressStatus::Start.into(),
    )));
    let body = prost::Message::encode_to_vec(&start);
    match decode(Inbox::Progress, &body, Some("a\0b"), false) {
        Ok(Request::Job {
            command: Command::Start { message_id, .. },
            ..
        }) => assert_eq!(message_id, None),
        other => panic!("{other:?}"),
    }
}

#[rstest]
#[case(Inbox::Submissions, Some("a submission"))]
#[case(Inbox::Results, Some("a result"))]
#[case(Inbox::Progress, None)]
#[case(Inbox::Cancels, None)]
fn whose_message_nobody_can_read_is_told(#[case] inbox: Inbox, #[case] instead: Option<&str>) {
    let body = [b"\x0a\x24", job().to_string().as_bytes(), b"\xff"].concat();
    let unread = unread(inbox, &body, "a fault".to_owned());
    assert_eq!(unread.reason, "a fault");
    let named = unread.instead.map(|instead| {
        assert_eq!(instead.0, job());
        instead.1.name()
    });
    assert_eq!(named, instead);
}

#[rstest]
#[case::page(Origin::new(Via::Page, Some("anna"), Some("10.0.0.7")))]
#[case::command_line(Origin::new(Via::CommandLine, None, Some("host")))]
#[case::as_long_as_is_kept(Origin::new(Via::Page, Some(&"\u{e9}".repeat(1000)), None))]
fn a_cancel_says_for_whom_it_is(#[case] origin: Origin) {
    let outgoing = job_delete_for(job(), &origin);
    let header = |name: &str| outgoing.headers.get(name).and_then(Value::as_str);
    assert_eq!(incoming::origin(header, Some("a client")), origin);
    assert_eq!(outgoing.body, job_delete(job()).body);
}

/// Clients may say anything.
#[rstest]
#[case::nothing(&[], None, Origin::default())]
#[case::its_name(&[], Some("omotes"), Origin::new(Via::Client, Some("omotes"), None))]
#[case::no_way(
    &[("omotes_via", "god"), ("omotes_who", "zeus")],
    None,
    Origin::default()
)]
#[case::too_much(
    &[("omotes_via", "page"), ("omotes_who", " \0 "), ("omotes_from", "\0x")],
    None,
    Origin::new(Via::Page, None, Some("x"))
)]
fn a_forged_origin_is_bounded(
    #[case] headers: &[(&str, &str)],
    #[case] sender: Option<&str>,
    #[case] expected: Origin,
) {
    let header = |name: &str| {
        let mut headers = headers.iter();
        headers.find(|(one, _)| *one == name).map(|(_, text)| *text)
    };
    assert_eq!(origin(header, sender), expected);
}

#[rstest]
#[case::its_sender(Some("carol"))]
#[case::nobody(None)]
fn another_run_says_whose_it_is(#[case] sender: Option<&str>) {
    let by = Origin::new(Via::Page, Some("anna"), Some("10.0.0.7"));
    let message = for_somebody(job_submission(&full_submission()), &by);
    let outgoing = for_another_run(message, job(), sender);
    let header = |name: &str| outgoing.headers.get(name).and_then(Value::as_str);
    let (whose, requested) = sent_for(header, Some("the page's user"));
    assert_eq!(whose.as_deref(), sender);
    let again = Some(job());
    assert_eq!(requested, Some(Requested { by, again }));
}

#[test]
fn a_submission_is_its_clients_unless_it_says_otherwise() {
    let nothing = |_: &str| None;
    assert_eq!(
        sent_for(nothing, Some("a client")),
        (Some("a client".to_owned()), None)
    );
    let by = Origin::new(Via::CommandLine, Some("ben"), None);
    let outgoing = for_somebody(job_submission(&full_submission()), &by);
    let header = |name: &str| outgoing.headers.get(name).and_then(Value::as_str);
    let expected = Some(Requested { by, again: None });
    assert_eq!(sent_for(header, None), (None, expected));
    // Too long for whoever it is.
    let long = "x".repeat(256);
    let header = |name: &str| match name {
        "omotes_via" => Some("page"),
        "omotes_again" => Some("6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
        "omotes_sender" => Some(long.as_str()),
        _ => None,
    };
    let (whose, requested) = sent_for(header, Some("a client"));
    assert_eq!(whose, None);
    assert!(requested.unwrap().again.is_some());
}
