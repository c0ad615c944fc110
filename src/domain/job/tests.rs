//! The table of every pair of state and command, and the laws that hold for any sequence.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::sync::LazyLock;
use std::time::Duration;

use jiff::SignedDuration;
use proptest::prelude::*;
use rstest::rstest;
use serde_json::Map;
use uuid::Uuid;

use super::decision::{cancellation, error_result};
use super::*;
use crate::domain::workflow::Catalogue;

const TASK: &str = "task-1";
const OTHER_TASK: &str = "task-2";
const OUTPUT: &str = "<esdl id='esdl-1'/>";

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn job_id() -> Uuid {
    Uuid::from_u128(1)
}

fn new_task() -> Uuid {
    Uuid::from_u128(2)
}

static RULES: Rules = Rules {
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

/// Knows one workflow, the simulator, which has these keys too.
fn catalogue(more: &str) -> Catalogue {
    let file = format!(
        r#"[{{"workflow_type_name": "simulator", "workflow_type_description_name": "S"{more}}}]"#
    );
    Catalogue::parse(&file).unwrap()
}

static CATALOGUE: LazyLock<Catalogue> = LazyLock::new(|| catalogue(""));

fn context() -> Context<'static> {
    Context {
        now: at(100),
        session_begun: Some(at(2)),
        new_task_id: new_task(),
        catalogue: &CATALOGUE,
        is_closed: &|_| false,
        has_limits: &|_| false,
        rules: &RULES,
    }
}

fn job(status: JobStatus) -> Job {
    let submitted = status != JobStatus::Registered;
    let running = status == JobStatus::Running;
    Job {
        workflow_type: "simulator".to_owned(),
        reference: "ref".to_owned(),
        status,
        task_id: submitted.then(|| TASK.to_owned()),
        registered_at: at(1),
        submitted_at: submitted.then(|| at(2)),
        running_at: running.then(|| at(3)),
        timeout_ms: None,
        priority: Some(Priority::Medium),
        starts: running
            .then(|| start_at(3, "start-1", Verdict::Counts))
            .into_iter()
            .collect(),
        progress: None,
        course: None,
        parameters: None,
        task_queue: None,
    }
}

fn start_at(second: i64, message_id: &str, verdict: Verdict) -> Start {
    Start {
        at: at(second),
        message_id: Some(message_id.to_owned()),
        verdict,
    }
}

/// A running job that was started as often as it may be, and then with these verdicts, from second
/// 5 on.
fn started_again(verdicts: &[Verdict]) -> Job {
    let mut job = job(JobStatus::Running);
    job.starts.push(start_at(4, "start-2", Verdict::Counts));
    let more = verdicts.iter().zip(5..);
    job.starts
        .extend(more.map(|(verdict, second)| start_at(second, &format!("at {second}"), *verdict)));
    job
}

fn ended(outcome: Outcome) -> State {
    State::Ended(job(JobStatus::Running).ended(outcome, 7, at(50)))
}

fn ending(job: Job, outcome: Outcome) -> State {
    ending_since(at(50), job, outcome)
}

fn ending_since(since: Timestamp, job: Job, outcome: Outcome) -> State {
    let ended = job.ended(outcome, 7, since);
    State::Ending(Ending { job, ended })
}

fn submission(workflow: &str) -> Command {
    Command::Submit(Submission {
        workflow_type: workflow.to_owned(),
        esdl: "<esdl/>".to_owned(),
        params: Map::new(),
        reference: Some("ref".to_owned()),
        priority: Priority::Medium,
        timeout_ms: Some(1000),
        sender: None,
        requested: None,
    })
}

fn start_of(task: &str, message: &str) -> Command {
    Command::Start {
        task_id: task.to_owned(),
        message_id: Some(message.to_owned()),
        redelivered: false,
    }
}

fn start_without_id(task: &str, redelivered: bool) -> Command {
    Command::Start {
        task_id: task.to_owned(),
        message_id: None,
        redelivered,
    }
}

fn judge_of(task: &str, second: i64, alive: usize, last: bool) -> Command {
    Command::Judge {
        task_id: task.to_owned(),
        at: at(second),
        alive,
        last,
    }
}

fn lost_since(task: &str, second: i64) -> Command {
    Command::TaskLost {
        task_id: task.to_owned(),
        since: at(second),
    }
}

fn progress_of(task: &str, fraction: f64) -> Command {
    Command::Progress {
        task_id: task.to_owned(),
        fraction,
        message: "working".to_owned(),
    }
}

fn result_of(task: &str, succeeded: bool) -> Command {
    Command::Result(Completion {
        task_id: task.to_owned(),
        succeeded,
        output_esdl: Some(OUTPUT.to_owned()),
        logs: "logs".to_owned(),
        esdl_messages: Vec::new(),
    })
}

fn fail_of(task: Option<&str>) -> Command {
    Command::Fail {
        reason: "broken".to_owned(),
        task_id: task.map(str::to_owned),
    }
}

fn states() -> Vec<(&'static str, State)> {
    let noted = decide(
        job_id(),
        &State::Unknown,
        &Command::Cancel(Origin::default()),
        &context(),
    )
    .next;
    let crashed_once = started_again(&[]);
    let suspected = started_again(&[Verdict::Suspected]);
    let mut interrupted = job(JobStatus::Running);
    interrupted.starts[0].at = at(1);
    let mut of_earlier_version = job(JobStatus::Running).ended(Outcome::Succeeded, 7, at(50));
    of_earlier_version.start_ids.clear();
    let overtaken = job(JobStatus::Submitted).ended(Outcome::Succeeded, 7, at(50));
    // Running since second 3, and it is second 100.
    let mut overdue = job(JobStatus::Running);
    overdue.timeout_ms = Some(97_000);
    let mut ancient = job(JobStatus::Submitted);
    ancient.submitted_at = Some(at(-900));
    let running = job(JobStatus::Running);
    let mut long_ago = running.clone();
    long_ago.registered_at = at(-300);
    vec![
        ("unknown", State::Unknown),
        ("registered", State::Live(job(JobStatus::Registered))),
        ("submitted", State::Live(job(JobStatus::Submitted))),
        ("running", State::Live(job(JobStatus::Running))),
        ("started twice", State::Live(crashed_once.clone())),
        ("interrupted", State::Live(interrupted)),
        ("suspected", State::Live(suspected.clone())),
        ("with a copy", State::Live(started_again(&[Verdict::Copy]))),
        (
            "excused too often",
            State::Live(started_again(&[Verdict::Copy; MAX_EXCUSED])),
        ),
        ("overdue", State::Live(overdue.clone())),
        ("ancient", State::Live(ancient.clone())),
        ("succeeded", ended(Outcome::Succeeded)),
        (
            "succeeded in an earlier version",
            State::Ended(of_earlier_version),
        ),
        ("succeeded before its start", State::Ended(overtaken)),
        ("failed", ended(Outcome::Failed)),
        ("cancelled", ended(Outcome::Cancelled)),
        ("crash loop", ended(Outcome::CrashLoop)),
        ("rejected", ended(Outcome::Rejected)),
        ("timed out", ended(Outcome::TimedOut)),
        ("expired", ended(Outcome::Expired)),
        ("cancel noted", noted.unwrap()),
        (
            "ending as succeeded",
            ending(running.clone(), Outcome::Succeeded),
        ),
        (
            "ending as cancelled",
            ending(running.clone(), Outcome::Cancelled),
        ),
        ("ending as rejected", ending(running, Outcome::Rejected)),
        (
            "ending as refused",
            ending(job(JobStatus::Registered), Outcome::Rejected),
        ),
        (
            "ending as cancelled before it was submitted",
            ending(job(JobStatus::Registered), Outcome::Cancelled),
        ),
        (
            "ending as timed out",
            ending(overdue.clone(), Outcome::TimedOut),
        ),
        (
            "ending as crash loop",
            ending(crashed_once.clone(), Outcome::CrashLoop),
        ),
        (
            "ending as suspected crash loop",
            ending(suspected, Outcome::CrashLoop),
        ),
        (
            "ending since long as succeeded",
            ending_since(at(-200), long_ago.clone(), Outcome::Succeeded),
        ),
        (
            "ending since long as cancelled",
            ending_since(at(-200), long_ago, Outcome::Cancelled),
        ),
        ("ending as expired", ending(ancient, Outcome::Expired)),
    ]
}

fn commands() -> Vec<(&'static str, Command)> {
    let refusal = Command::Refuse {
        reason: "bad".to_owned(),
        workflow_type: "simulator".to_owned(),
        reference: Some("ref".to_owned()),
    };
    vec![
        ("submit", submission("simulator")),
        ("submit unknown workflow", submission("nonsense")),
        ("refuse", refusal),
        ("cancel", Command::Cancel(Origin::default())),
        ("start", start_of(TASK, "start-3")),
        ("start again delivered", start_of(TASK, "start-1")),
        ("start without id", start_without_id(TASK, false)),
        (
            "start without id again delivered",
            start_without_id(TASK, true),
        ),
        ("start of other task", start_of(OTHER_TASK, "start-3")),
        ("judge: three run", judge_of(TASK, 5, 3, false)),
        ("judge: two run", judge_of(TASK, 5, 2, false)),
        ("judge: one runs", judge_of(TASK, 5, 1, false)),
        ("judge: no more than two run", judge_of(TASK, 5, 2, true)),
        ("judge: no more than one runs", judge_of(TASK, 5, 1, true)),
        ("judge another start", judge_of(TASK, 6, 0, true)),
        ("judge other task", judge_of(OTHER_TASK, 5, 0, true)),
        ("progress", progress_of(TASK, 0.5)),
        ("progress NaN", progress_of(TASK, f64::NAN)),
        ("progress of other task", progress_of(OTHER_TASK, 0.5)),
        ("result", result_of(TASK, true)),
        ("error result", result_of(TASK, false)),
        ("result of other task", result_of(OTHER_TASK, true)),
        ("time out", Command::TimeOut),
        ("expire", Command::Expire),
        ("no worker", Command::NoWorker),
        ("task lost", lost_since(TASK, 50)),
        ("task lost before its start", lost_since(TASK, 3)),
        ("lost other task", lost_since(OTHER_TASK, 50)),
        ("fail", fail_of(None)),
        ("fail of task", fail_of(Some(TASK))),
        ("fail of other task", fail_of(Some(OTHER_TASK))),
    ]
}

/// A decision on one line.
fn summary(decision: &Decision<'_>) -> String {
    let mut text = match &decision.event {
        Event::Ignored(why) => format!("ignored: {why}"),
        Event::Revoked(why) => format!("revoked: {why}"),
        Event::Submitted {
            task_id, faults, ..
        } if *task_id == new_task() => {
            format!("submitted{}", faults.concat())
        }
        event => format!("{event:?}"),
    };
    if decision.wait > Duration::ZERO {
        write!(text, "; wait {:?}", decision.wait).unwrap();
    }
    let announced = decision.announcements.iter();
    let published = decision.publications.iter().map(|one| ("", one));
    for (when, publication) in published.chain(announced.map(|one| ("then ", one))) {
        let one = match publication {
            Publication::Task { task_id, .. } if *task_id == new_task() => "task".to_owned(),
            Publication::Task { .. } => "WRONG TASK".to_owned(),
            Publication::Revoke { task_id } => format!("revoke {task_id}"),
            Publication::Status { status, .. } => format!("status {status:?}"),
            Publication::Progress { fraction, .. } => format!("progress {fraction}"),
            Publication::Result {
                result_type,
                output_esdl,
                logs,
                ..
            } => {
                let output = if output_esdl.is_some() {
                    " with ESDL"
                } else {
                    ""
                };
                format!("result {result_type:?}{output} {logs:.12?}")
            }
        };
        write!(text, "; {when}{one}").unwrap();
    }
    for change in &decision.time_series {
        match change {
            TimeSeries::Keep { esdl_id, .. } => write!(text, "; keep {esdl_id}").unwrap(),
            TimeSeries::Hold { esdl_id, .. } => write!(text, "; hold {esdl_id}").unwrap(),
            TimeSeries::RetireLate { esdl_id, .. } => write!(text, "; retire {esdl_id}").unwrap(),
            TimeSeries::Retire => text.push_str("; retire the job's"),
            TimeSeries::RetireThese(ids) => write!(text, "; retire {ids:?}").unwrap(),
        }
    }
    match &decision.next {
        None => {}
        Some(State::Unknown) => text.push_str(" -> unknown"),
        Some(State::Live(job)) => {
            write!(text, " -> {:?}, {} starts", job.status, job.starts.len()).unwrap();
            for start in &job.starts {
                if let Some(verdict) = start.verdict.name() {
                    write!(text, " {verdict}").unwrap();
                }
            }
        }
        Some(State::Ending(job)) => {
            write!(text, " -> ending {:?}", job.ended.outcome).unwrap();
            if let Some(why) = &job.ended.why {
                write!(text, " for {why:?}").unwrap();
            }
        }
        Some(State::Ended(ended)) => write!(text, " -> ended {:?}", ended.outcome).unwrap(),
    }
    text
}

#[test]
fn every_pair_of_state_and_command_has_its_decision() {
    let mut table = String::new();
    for (command_name, command) in commands() {
        writeln!(table, "{command_name}").unwrap();
        for (state_name, state) in states() {
            let decision = decide(job_id(), &state, &command, &context());
            writeln!(table, "  {state_name}: {}", summary(&decision)).unwrap();
        }
    }
    if std::env::var_os("UPDATE_DECISIONS").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/domain/job/decisions.txt");
        std::fs::write(path, &table).unwrap();
        return;
    }
    let expected = include_str!("decisions.txt");
    for (ours, expected) in table.lines().zip(expected.lines()) {
        assert_eq!(ours, expected);
    }
    assert_eq!(table.lines().count(), expected.lines().count());
}

#[test]
fn a_submission_becomes_its_row_and_its_task() {
    let command = submission("simulator");
    let decision = decide(job_id(), &State::Unknown, &command, &context());
    let expected = Job {
        workflow_type: "simulator".to_owned(),
        reference: "ref".to_owned(),
        status: JobStatus::Submitted,
        task_id: Some(new_task().to_string()),
        registered_at: at(100),
        submitted_at: Some(at(100)),
        running_at: None,
        timeout_ms: Some(1000),
        priority: Some(Priority::Medium),
        starts: Vec::new(),
        progress: None,
        course: None,
        parameters: Some("{}".to_owned()),
        task_queue: Some("simulator".to_owned()),
    };
    assert_eq!(decision.next, Some(State::Live(expected)));
}

#[test]
fn the_last_progress_is_kept_until_the_next_start() {
    let running = State::Live(job(JobStatus::Running));
    let said = Command::Progress {
        task_id: TASK.to_owned(),
        fraction: 0.25,
        message: format!("a\0b{}", "c".repeat(1000)),
    };
    let decision = decide(job_id(), &running, &said, &context());
    let Some(State::Live(job)) = &decision.next else {
        panic!("{decision:?}");
    };
    let kept = Progress {
        fraction: 0.25,
        message: format!("ab{}", "c".repeat(498)),
        at: at(100),
    };
    assert_eq!(job.progress, Some(kept));
    let again = start_of(TASK, "start-2");
    let decision = decide(
        job_id(),
        decision.next.as_ref().unwrap(),
        &again,
        &context(),
    );
    let Some(State::Live(job)) = decision.next else {
        panic!("{decision:?}");
    };
    assert_eq!(job.progress, None);
}

#[test]
fn a_job_left_registered_keeps_the_time_it_was_registered() {
    let state = State::Live(job(JobStatus::Registered));
    let command = submission("simulator");
    let decision = decide(job_id(), &state, &command, &context());
    let Some(State::Live(job)) = decision.next else {
        panic!("{decision:?}");
    };
    assert_eq!(job.registered_at, at(1));
    assert_eq!(job.submitted_at, Some(at(100)));
}

#[test]
fn a_second_start_keeps_the_first_ones_time_and_never_shares_its_own() {
    let mut running = job(JobStatus::Running);
    running.starts[0].at = at(100);
    let command = start_of(TASK, "start-2");
    let decision = decide(job_id(), &State::Live(running), &command, &context());
    let Some(State::Live(job)) = decision.next else {
        panic!("{decision:?}");
    };
    assert_eq!(job.running_at, Some(at(3)));
    assert!(job.starts[1].at > job.starts[0].at);
}

#[rstest]
#[case::first(0, false, true)]
#[case::first_and_redelivered(0, true, true)]
#[case::second(1, false, true)]
#[case::redelivered(1, true, false)]
fn without_a_message_id_the_redelivered_flag_tells(
    #[case] starts_before: usize,
    #[case] redelivered: bool,
    #[case] counts: bool,
) {
    let status = match starts_before {
        0 => JobStatus::Submitted,
        _ => JobStatus::Running,
    };
    let command = Command::Start {
        task_id: TASK.to_owned(),
        message_id: None,
        redelivered,
    };
    let state = State::Live(job(status));
    let decision = decide(job_id(), &state, &command, &context());
    assert_eq!(decision.next.is_some(), counts, "{decision:?}");
}

/// The database's clock was ahead when it was written.
#[test]
fn a_session_that_is_still_to_begin_excuses_no_start() {
    let context = context();
    let ahead = Context {
        session_begun: Some(context.now + SignedDuration::from_secs(1)),
        ..context
    };
    let job = started_again(&[]);
    let start = start_of(TASK, "another start");
    let decision = decide(job_id(), &State::Live(job), &start, &ahead);
    assert_eq!(decision.event, Event::Suspected { starts: 3 });
    let judge = judge_of(TASK, 5, 1, true);
    let suspected = State::Live(started_again(&[Verdict::Suspected]));
    let decision = decide(job_id(), &suspected, &judge, &ahead);
    assert_eq!(decision.event, Event::Ended(Outcome::CrashLoop));
}

#[test]
fn the_crash_loops_text_is_what_clients_compare() {
    let state = started_again(&[Verdict::Suspected]);
    let command = judge_of(TASK, 5, 1, true);
    let decision = decide(job_id(), &State::Live(state), &command, &context());
    let Publication::Result { logs, .. } = &decision.announcements[1] else {
        panic!("{decision:?}");
    };
    assert_eq!(
        logs,
        "Job cannot be processed due to being retried the maximum number of times."
    );
}

#[test]
fn an_unknown_workflow_is_named() {
    let command = submission("no_such_workflow");
    let decision = decide(job_id(), &State::Unknown, &command, &context());
    let [Publication::Result { logs, .. }] = decision.announcements.as_slice() else {
        panic!("{decision:?}");
    };
    assert_eq!(
        logs,
        "Workflow type no_such_workflow is unknown by orchestrator at the time this submission \
         was received."
    );
}

#[rstest]
#[case::accepted("simulator")]
#[case::refused(&"w".repeat(1000))]
fn of_long_names_the_beginning_is_kept_and_the_task_has_it_all(#[case] workflow: &str) {
    let long = "é".repeat(MAX_REFERENCE + 1);
    let command = match submission(workflow) {
        Command::Submit(submission) => Command::Submit(Submission {
            reference: Some(long.clone()),
            ..submission
        }),
        other => other,
    };
    let instead = command.instead("why".to_owned(), false).unwrap();
    let cancel = Command::Cancel(Origin::default());
    let cancelled = decide(job_id(), &State::Unknown, &cancel, &context());
    let cancelled = cancelled.next.unwrap();
    for (state, command) in [
        (&State::Unknown, &command),
        (&State::Unknown, &instead),
        (&cancelled, &command),
    ] {
        let decision = decide(job_id(), state, command, &context());
        for publication in decision.publications.iter().chain(&decision.announcements) {
            match publication {
                Publication::Task { assignment, .. } => {
                    assert_eq!(assignment.reference.as_deref(), Some(long.as_str()));
                }
                Publication::Result { logs, .. } => assert!(logs.len() < 1000, "{logs}"),
                Publication::Revoke { .. }
                | Publication::Status { .. }
                | Publication::Progress { .. } => {}
            }
        }
        let next = decision.next.unwrap();
        assert_eq!(next.reference(), "é".repeat(MAX_REFERENCE));
        if let Some(name) = next.workflow_type().filter(|name| *name != workflow) {
            assert_eq!(name, "w".repeat(MAX_WORKFLOW_TYPE));
        }
    }
}

#[test]
fn the_history_tells_the_jobs_whole_story() {
    let command = result_of(TASK, true);
    let state = State::Live(job(JobStatus::Running));
    let decision = decide(job_id(), &state, &command, &context());
    let told = Told {
        logs: "logs".to_owned(),
        starts: job(JobStatus::Running).starts,
        keeps_progress: true,
        ..Told::default()
    };
    let expected = Ended {
        outcome: Outcome::Succeeded,
        workflow_type: Some("simulator".to_owned()),
        reference: Some("ref".to_owned()),
        task_id: Some(TASK.to_owned()),
        registered_at: Some(at(1)),
        submitted_at: Some(at(2)),
        running_at: Some(at(3)),
        finished_at: at(100),
        starts: 1,
        start_ids: vec!["start-1".to_owned()],
        result_bytes: i64::try_from(OUTPUT.len() + "logs".len()).unwrap(),
        why: None,
        told: Some(Box::new(told)),
    };
    let Some(State::Ending(ending)) = decision.next else {
        panic!("{decision:?}");
    };
    assert_eq!(ending.ended, expected);
    assert_eq!(State::Live(ending.job), state);
}

#[rstest]
#[case::none(None, false)]
#[case::zero_is_none(Some(0), false)]
#[case::not_yet(Some(97_001), false)]
#[case::just_now(Some(97_000), true)]
#[case::longer_than_time_itself(Some(i64::MAX), false)]
fn a_timeout_counts_from_the_first_start(#[case] timeout_ms: Option<i64>, #[case] due: bool) {
    let mut running = job(JobStatus::Running);
    running.timeout_ms = timeout_ms;
    let state = State::Live(running);
    let decision = decide(job_id(), &state, &Command::TimeOut, &context());
    assert_eq!(decision.next.is_some(), due, "{decision:?}");
}

#[test]
fn a_timeout_says_its_limit_and_is_a_timeout_where_asked_for() {
    let mut running = job(JobStatus::Running);
    running.timeout_ms = Some(90_000);
    let state = State::Live(running);
    let rules = Rules {
        timeout_result: TimeoutResult::TimedOut,
        ..RULES.clone()
    };
    let context = Context {
        rules: &rules,
        ..context()
    };
    let decision = decide(job_id(), &state, &Command::TimeOut, &context);
    let [
        Publication::Revoke { .. },
        Publication::Result {
            result_type: ResultType::TimedOut,
            logs,
            ..
        },
    ] = decision.announcements.as_slice()
    else {
        panic!("{decision:?}");
    };
    assert_eq!(
        logs,
        "The job was ended because it ran for longer than its timeout of 1m 30s."
    );
}

#[rstest]
#[case(JobStatus::Registered, "registered")]
#[case(JobStatus::Submitted, "waiting for a worker")]
#[case(JobStatus::Running, "running")]
fn what_expires_says_what_it_was_doing(#[case] status: JobStatus, #[case] doing: &str) {
    let context = Context {
        now: at(1003),
        ..context()
    };
    let state = State::Live(job(status));
    let decision = decide(job_id(), &state, &Command::Expire, &context);
    let Some(Publication::Result { logs, .. }) = decision.announcements.last() else {
        panic!("{decision:?}");
    };
    assert_eq!(
        *logs,
        format!(
            "The job was given up because it had been {doing} for longer than the 16m 40s that \
             unfinished jobs are kept."
        )
    );
}

#[test]
fn a_workflow_has_its_own_limits() {
    let own = catalogue(r#", "delivery_limit": 1, "default_timeout_sec": 0.007"#);
    let own = Context {
        catalogue: &own,
        is_closed: &|_| false,
        has_limits: &|_| false,
        ..context()
    };
    let running = State::Live(job(JobStatus::Running));
    let again = start_of(TASK, "start-2");
    let decision = decide(job_id(), &running, &again, &own);
    assert_eq!(decision.event, Event::Suspected { starts: 2 });

    for (given, stored) in [(None, 7), (Some(5), 5), (Some(0), 0)] {
        let Command::Submit(mut submission) = submission("simulator") else {
            unreachable!()
        };
        submission.timeout_ms = given;
        let command = Command::Submit(submission);
        let decision = decide(job_id(), &State::Unknown, &command, &own);
        let Some(State::Live(job)) = decision.next else {
            panic!("{decision:?}");
        };
        assert_eq!(job.timeout_ms, Some(stored));
    }
}

#[test]
fn parameters_that_do_not_fit_are_noted_or_refused() {
    let strict = catalogue(
        r#", "workflow_parameters": [{"parameter_type": "float", "key_name": "x"},
                                      {"parameter_type": "float", "key_name": "y"}]"#,
    );
    let lenient = Context {
        catalogue: &strict,
        is_closed: &|_| false,
        has_limits: &|_| false,
        ..context()
    };
    let command = submission("simulator");
    let decision = decide(job_id(), &State::Unknown, &command, &lenient);
    let faults = ["x is missing".to_owned(), "y is missing".to_owned()];
    assert_eq!(
        decision.event,
        Event::Submitted {
            task_id: new_task(),
            queue: "simulator".to_owned(),
            faults: faults.to_vec()
        }
    );

    let rules = Rules {
        reject_invalid_params: true,
        fair_share_separator: String::new(),
        ..RULES.clone()
    };
    let rejecting = Context {
        rules: &rules,
        ..lenient
    };
    let decision = decide(job_id(), &State::Unknown, &command, &rejecting);
    assert_eq!(decision.event, Event::Ended(Outcome::Rejected));
    let expected = "The parameters do not fit the workflow simulator: x is missing; y is missing.";
    assert_eq!(
        decision.announcements,
        [error_result(job_id(), Cow::Borrowed(expected))]
    );
    // The values are for its client alone where parameters may not be kept.
    let rules = Rules {
        keep_parameters: false,
        ..rules.clone()
    };
    let mute = Context {
        rules: &rules,
        ..rejecting
    };
    let decision = decide(job_id(), &State::Unknown, &command, &mute);
    assert_eq!(
        decision.announcements,
        [error_result(job_id(), Cow::Borrowed(expected))]
    );
    let Some(State::Ending(Ending { ended, .. })) = decision.next else {
        panic!("{decision:?}");
    };
    let kept = "The parameters do not fit the workflow simulator: x, y.";
    assert_eq!(ended.why.as_deref(), Some(kept));
    assert_eq!(ended.told.unwrap().logs, kept);
    // Delivered again while it runs: it was fit enough when it came.
    let running = State::Live(job(JobStatus::Running));
    let decision = decide(job_id(), &running, &command, &rejecting);
    assert!(matches!(decision.event, Event::Ignored(_)), "{decision:?}");
}

#[rstest]
#[case::just_submitted(100_000, 100_000, 1000)]
#[case::a_moment_ago(99_750, 100_000, 750)]
#[case::just_due(99_000, 100_000, 0)]
#[case::long_ago(1_000, 100_000, 0)]
#[case::a_clock_was_put_back(170_000, 100_000, 1000)]
fn an_outcome_waits_from_its_submission_on(
    #[case] registered: i64,
    #[case] now: i64,
    #[case] wait: u64,
) {
    let millis = |millis| Timestamp::from_millisecond(millis).unwrap();
    let context = Context {
        now: millis(now),
        ..context()
    };
    let mut running = job(JobStatus::Running);
    running.registered_at = millis(registered);
    running.timeout_ms = Some(1);
    let ending = ending(running.clone(), Outcome::Succeeded);
    let live = State::Live(running);
    let result = result_of(TASK, true);
    for (state, command) in [
        (&live, &result),
        (&ending, &result),
        (&live, &Command::Cancel(Origin::default())),
        (&live, &Command::TimeOut),
        (&live, &fail_of(None)),
    ] {
        let decision = decide(job_id(), state, command, &context);
        let announcements = decision.announcements.iter();
        assert!(
            announcements.clone().any(Publication::tells_outcome),
            "{decision:?}"
        );
        assert_eq!(decision.wait, Duration::from_millis(wait), "{decision:?}");
    }
    // All else is told at once.
    let progress = progress_of(TASK, 0.5);
    let progressed = decide(job_id(), &live, &progress, &context);
    assert_eq!(progressed.wait, Duration::ZERO);
}

#[test]
fn a_submission_after_its_cancel_ends_as_cancelled_whenever_it_comes() {
    let context = context();
    let noted = decide(
        job_id(),
        &State::Unknown,
        &Command::Cancel(Origin::default()),
        &context,
    )
    .next
    .unwrap();
    let command = submission("simulator");
    let first = decide(job_id(), &noted, &command, &context);
    assert_eq!(first.publications, []);
    assert_eq!(first.announcements, cancellation(job_id()));
    assert_eq!(first.wait, RULES.outcome_delay);
    let Some(State::Ending(ending)) = first.next else {
        panic!("{first:?}");
    };
    assert_eq!(ending.ended.registered_at, Some(at(100)));
    // Nobody knows whether it was told; the definitions may not have the workflow any more.
    let ending = State::Ending(ending);
    for command in [
        &command,
        &submission("nonsense"),
        &Command::Cancel(Origin::default()),
    ] {
        let again = decide(job_id(), &ending, command, &context);
        assert_eq!(again.next, None);
        assert_eq!(again.announcements, cancellation(job_id()));
    }
}

/// Also where both come in one batch, so that nothing of the cancel has been written yet.
#[test]
fn whoever_cancelled_before_the_submission_is_known() {
    let anna = Origin::new(Via::Page, Some("anna"), None);
    let cancel = Command::Cancel(anna.clone());
    let noted = decide(job_id(), &State::Unknown, &cancel, &context())
        .next
        .unwrap();
    for command in [submission("simulator"), submission("nonsense")] {
        let decision = decide(job_id(), &noted, &command, &context());
        let Some(State::Ending(Ending { ended, .. })) = decision.next else {
            panic!("{decision:?}");
        };
        assert_eq!(ended.told.unwrap().by, Some(anna.clone()));
    }
}

#[test]
fn an_outcome_that_waits_is_not_lost() {
    let rules = Rules {
        outcome_delay: Duration::from_secs(600),
        ..RULES.clone()
    };
    let mut running = job(JobStatus::Running);
    running.registered_at = at(0);
    let state = ending_since(at(10), running, Outcome::Succeeded);
    for (now, lost) in [(310, false), (899, false), (900, true)] {
        let context = Context {
            now: at(now),
            rules: &rules,
            ..context()
        };
        let decision = decide(job_id(), &state, &Command::Expire, &context);
        assert_eq!(decision.next.is_some(), lost, "{now}: {decision:?}");
    }
}

/// What the world does in a random story of one job.
#[derive(Debug, Clone)]
enum Happening {
    /// The submission is delivered, for the first time or again.
    Submission,
    Cancel,
    /// A worker takes the oldest task that is published and not revoked, and starts it.
    TaskTaken,
    /// RabbitMQ restarts, and what some worker runs is delivered to another one too.
    Interrupted(usize),
    /// RabbitMQ loses a worker alone, who goes on, and its task is delivered to another one too.
    Copied(usize),
    /// A worker dies, and its task is delivered to another one.
    Crashed(usize),
    /// The workers have been asked, and all have answered.
    Asked,
    /// An event that some task has sent is delivered again.
    SentAgain(usize),
    Progress(usize),
    Finished(usize),
    /// Enough for the job's timeout, and somebody notices.
    TimePasses,
    /// Enough for the retention as well; in so much of it everything is delivered.
    MuchTimePasses,
    /// The orchestrator dies over something.
    Dies(Death, Box<Happening>),
    /// What was not acknowledged when it died is delivered again.
    Redelivered(usize),
    /// The broker dies, and has forgotten it.
    Forgotten(usize),
}

/// How far it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Death {
    BeforeCommit,
    BeforeTelling,
    BeforeSettling,
    /// It lives.
    Never,
}

fn happening() -> impl Strategy<Value = Happening> {
    let simple = prop_oneof![
        3 => Just(Happening::Submission),
        1 => Just(Happening::Cancel),
        4 => Just(Happening::TaskTaken),
        2 => any::<usize>().prop_map(Happening::Interrupted),
        2 => any::<usize>().prop_map(Happening::Copied),
        1 => any::<usize>().prop_map(Happening::Crashed),
        2 => Just(Happening::Asked),
        2 => any::<usize>().prop_map(Happening::SentAgain),
        2 => any::<usize>().prop_map(Happening::Progress),
        3 => any::<usize>().prop_map(Happening::Finished),
        1 => Just(Happening::TimePasses),
        1 => Just(Happening::MuchTimePasses),
    ]
    .boxed();
    let death = prop_oneof![
        Just(Death::BeforeCommit),
        Just(Death::BeforeTelling),
        Just(Death::BeforeSettling),
    ];
    prop_oneof![
        4 => simple.clone(),
        1 => any::<usize>().prop_map(Happening::Redelivered),
        1 => any::<usize>().prop_map(Happening::Forgotten),
        1 => (death, simple).prop_map(|(death, inner)| Happening::Dies(death, Box::new(inner))),
    ]
}

/// The job as the database has it, and what clients and workers have been told.
#[derive(Default)]
struct World {
    state: Option<State>,
    seconds_passed: i64,
    /// Microseconds, one for each thing that happens.
    ticks: i64,
    session_begun: Option<Timestamp>,
    tasks: u128,
    waiting: Vec<String>,
    taken: Vec<String>,
    /// The task of each execution that has not died.
    alive: Vec<String>,
    executions: usize,
    /// The STARTs that came through, by their task and message.
    heard: BTreeSet<(String, String)>,
    revoked: BTreeSet<String>,
    sent: Vec<Command>,
    /// What was not acknowledged.
    unacknowledged: Vec<Command>,
    deaths: usize,
    /// Of workers.
    crashes: usize,
    /// A start came while the workers were being asked about another one.
    hasty: bool,
    /// Outcomes that were committed.
    outcomes: BTreeSet<&'static str>,
    /// The broker forgot something that led to the job's end.
    forgetful: bool,
    /// Results told to the client.
    results: Vec<ResultType>,
}

impl World {
    fn run(&mut self, happening: &Happening, death: Death) {
        let command = match happening {
            Happening::Submission => submission("simulator"),
            Happening::Cancel => Command::Cancel(Origin::default()),
            Happening::TimePasses => {
                self.seconds_passed += 10;
                // Nobody has to deliver it again: it is found again.
                return self.apply(&Command::TimeOut, death);
            }
            Happening::MuchTimePasses => {
                self.deliver_all();
                self.run(&Happening::Asked, Death::Never);
                self.seconds_passed += 2000;
                self.apply(&Command::TimeOut, Death::Never);
                return self.apply(&Command::Expire, death);
            }
            Happening::TaskTaken => {
                if self.waiting.is_empty() {
                    return;
                }
                let task = self.waiting.remove(0);
                if self.revoked.contains(&task) {
                    return;
                }
                self.taken.push(task.clone());
                self.execute(&task)
            }
            Happening::Interrupted(which)
            | Happening::Copied(which)
            | Happening::Crashed(which) => {
                let running = self.alive.iter().enumerate();
                let running: Vec<_> = running
                    .filter(|(_, task)| !self.revoked.contains(*task))
                    .collect();
                let Some((place, task)) = running.get(which % running.len().max(1)) else {
                    return;
                };
                let (place, task) = (*place, (*task).clone());
                match happening {
                    Happening::Interrupted(_) => self.session_begun = Some(self.now()),
                    Happening::Crashed(_) => {
                        self.crashes += 1;
                        self.alive.remove(place);
                    }
                    _ => {}
                }
                self.execute(&task)
            }
            Happening::Asked => {
                let Some((task_id, at)) = self.suspicion() else {
                    return;
                };
                let alive = self.alive.iter().filter(|task| **task == task_id);
                let judgment = Command::Judge {
                    alive: alive.count(),
                    task_id,
                    at,
                    last: true,
                };
                // As with time: nobody has to deliver it again.
                return self.apply(&judgment, death);
            }
            Happening::Progress(which) | Happening::Finished(which) => {
                let running: Vec<_> = self
                    .taken
                    .iter()
                    .filter(|task| !self.revoked.contains(*task))
                    .collect();
                let Some(task) = running.get(which % running.len().max(1)) else {
                    return;
                };
                match happening {
                    Happening::Finished(_) => result_of(task, true),
                    _ => progress_of(task, 0.5),
                }
            }
            Happening::SentAgain(which) => {
                let Some(command) = self.sent.get(which % self.sent.len().max(1)) else {
                    return;
                };
                command.clone()
            }
            Happening::Dies(death, inner) => {
                self.deaths += 1;
                return self.run(inner, *death);
            }
            Happening::Redelivered(which) => {
                if !self.unacknowledged.is_empty() {
                    let which = which % self.unacknowledged.len();
                    let command = self.unacknowledged.remove(which);
                    self.apply(&command, Death::Never);
                }
                return;
            }
            Happening::Forgotten(which) => {
                if !self.unacknowledged.is_empty() {
                    let which = which % self.unacknowledged.len();
                    self.unacknowledged.remove(which);
                    self.forgetful |= matches!(self.state, Some(State::Ending(_)));
                }
                return;
            }
        };
        if command.task_id().is_some() {
            self.sent.push(command.clone());
        }
        self.apply(&command, death);
        if death != Death::Never {
            self.unacknowledged.push(command);
        }
    }

    fn deliver_all(&mut self) {
        while !self.unacknowledged.is_empty() {
            self.run(&Happening::Redelivered(0), Death::Never);
        }
    }

    /// A worker begins a task.
    fn execute(&mut self, task: &str) -> Command {
        self.alive.push(task.to_owned());
        self.executions += 1;
        start_of(task, &format!("start {} of {task}", self.executions))
    }

    fn now(&mut self) -> Timestamp {
        self.ticks += 1;
        at(100 + self.seconds_passed) + SignedDuration::from_micros(self.ticks)
    }

    /// What the inquiry finds in the database.
    fn suspicion(&self) -> Option<(String, Timestamp)> {
        let (State::Live(job) | State::Ending(Ending { job, .. })) = self.state.as_ref()? else {
            return None;
        };
        let mut starts = job.starts.iter();
        let start = starts.find(|start| start.verdict == Verdict::Suspected)?;
        Some((job.task_id.clone()?, start.at))
    }

    fn apply(&mut self, command: &Command, death: Death) {
        self.tasks += 1;
        if let Command::Start {
            task_id,
            message_id: Some(id),
            ..
        } = command
            && death > Death::BeforeCommit
        {
            self.hasty |= self.suspicion().is_some();
            self.heard.insert((task_id.clone(), id.clone()));
        }
        let rules = Rules {
            delivery_limit: 1,
            ..RULES.clone()
        };
        let context = Context {
            now: self.now(),
            session_begun: self.session_begun,
            new_task_id: Uuid::from_u128(self.tasks),
            catalogue: &CATALOGUE,
            is_closed: &|_| false,
            has_limits: &|_| false,
            rules: &rules,
        };
        let state = self.state.clone().unwrap_or(State::Unknown);
        let decision = decide(job_id(), &state, command, &context);
        self.publish(&decision.publications);
        if death > Death::BeforeCommit
            && let Some(next) = decision.next
        {
            if let State::Ending(Ending { ended, .. }) | State::Ended(ended) = &next {
                self.outcomes.insert(ended.outcome.name());
            }
            self.state = Some(next);
        }
        if decision.announcements.is_empty() {
            return;
        }
        if death > Death::BeforeTelling {
            self.publish(&decision.announcements);
        }
        if death > Death::BeforeSettling
            && let Some(State::Ending(job)) = &self.state
        {
            self.state = Some(State::Ended(job.ended.clone()));
        }
    }

    fn publish(&mut self, publications: &[Publication<'_>]) {
        for publication in publications {
            match publication {
                Publication::Task { task_id, .. } => self.waiting.push(task_id.to_string()),
                Publication::Revoke { task_id } => {
                    self.revoked.insert(task_id.to_string());
                }
                Publication::Result { result_type, .. } => self.results.push(*result_type),
                Publication::Status { .. } | Publication::Progress { .. } => {}
            }
        }
    }

    /// What is held of a job's starts.
    fn check_starts(&self) -> Result<(), TestCaseError> {
        let Some(State::Live(job) | State::Ending(Ending { job, .. })) = &self.state else {
            return Ok(());
        };
        let of = |wanted: &[Verdict]| {
            let verdicts = job.starts.iter().map(|start| start.verdict);
            verdicts.filter(|verdict| wanted.contains(verdict)).count()
        };
        prop_assert!(of(&[Verdict::Counts]) <= 1, "{:?}", job.starts);
        prop_assert!(of(&[Verdict::Suspected]) <= 1, "{:?}", job.starts);
        prop_assert!(of(Verdict::NAMED) <= MAX_EXCUSED, "{:?}", job.starts);
        let ids: BTreeSet<_> = job.starts.iter().map(|start| &start.message_id).collect();
        prop_assert_eq!(ids.len(), job.starts.len());
        Ok(())
    }

    /// Every task that began and nobody waits for, and that has neither been told to end nor
    /// delivered.
    fn strays(&self) -> Vec<&String> {
        let expected = match &self.state {
            Some(State::Live(job) | State::Ending(Ending { job, .. })) => job.task_id.as_deref(),
            Some(State::Ended(ended)) => ended.task_id.as_deref(),
            Some(State::Unknown) | None => None,
        };
        let unheard = |task: &str| {
            let mut commands = self.unacknowledged.iter();
            commands.any(|command| command.task_id() == Some(task))
        };
        let running = self.taken.iter();
        running
            .filter(|task| {
                !self.revoked.contains(*task)
                    && expected != Some(task.as_str())
                    && !unheard(task.as_str())
            })
            .collect()
    }
}

proptest! {
    /// Whatever the order, however often delivered, wherever the orchestrator dies, and whatever
    /// comes first afterwards: once all is said and done the job has ended, with one outcome, and
    /// nothing runs that nobody waits for.
    #[test]
    fn any_story_ends_in_one_outcome(story in prop::collection::vec(happening(), 0..40)) {
        let mut world = World::default();
        for happening in &story {
            world.run(happening, Death::Never);
            prop_assert!(world.strays().is_empty(), "{:?} run on", world.strays());
            world.check_starts()?;
        }
        // The rest of the story: the submission arrives, what was not acknowledged is delivered,
        // what is due is found, workers take what is waiting and finish.
        world.run(&Happening::Submission, Death::Never);
        world.deliver_all();
        world.run(&Happening::Asked, Death::Never);
        world.apply(&Command::TimeOut, Death::Never);
        if let Some(State::Ending(job)) = &world.state {
            prop_assert!(job.ended.outcome == Outcome::Expired || world.forgetful);
            world.seconds_passed += 301;
            world.apply(&Command::Expire, Death::Never);
        }
        while !world.waiting.is_empty() {
            world.run(&Happening::TaskTaken, Death::Never);
        }
        if let Some(State::Live(job)) = &world.state
            && let Some(task) = job.task_id.clone()
        {
            world.apply(&result_of(&task, true), Death::Never);
        }
        let Some(State::Ended(ended)) = &world.state else {
            return Err(TestCaseError::fail(format!("{:?}", world.state)));
        };
        // Nobody's job ends as one that kills its workers when none has died.
        let blamed = world.outcomes.contains(Outcome::CrashLoop.name());
        prop_assert!(!blamed || world.crashes > 0 || world.hasty || world.executions > MAX_EXCUSED);
        // Nothing computes on that nobody waits for, if a second start of it was heard.
        if let Some(task) = ended.task_id.as_ref().filter(|_| ended.starts > 0) {
            let heard = world.heard.iter().filter(|(of, _)| of == task).count();
            prop_assert!(heard < 2 || world.revoked.contains(task), "{heard} of {task} run on");
        }
        prop_assert!((1..=1 + world.deaths).contains(&world.results.len()), "{:?}", world.results);
        let outcomes: BTreeSet<_> = world.results.iter().map(|one| format!("{one:?}")).collect();
        // Of what the broker has forgotten nobody knows whether the client was told.
        prop_assert!(outcomes.len() == 1 || world.forgetful, "{:?}", world.results);
        prop_assert!(world.strays().is_empty());
    }
}

/// Second 0 is when it was put on its queue.
#[rstest]
#[case::seen_nowhere_before(0, false)]
#[case::seen_nowhere_since(1, true)]
fn a_task_that_is_in_no_queue_is_lost(#[case] since: i64, #[case] is_lost: bool) {
    let mut job = job(JobStatus::Submitted);
    job.submitted_at = Some(at(0));
    // Its client was told that there is no worker.
    job.progress = Some(Progress::new(0.0, "no worker", at(60)));
    let state = State::Live(job);
    let command = lost_since(TASK, since);
    let decision = decide(job_id(), &state, &command, &context());
    let is_ended = decision.event == Event::Ended(Outcome::Lost);
    assert_eq!(is_ended, is_lost, "{decision:?}");
}

#[test]
fn a_task_whose_worker_has_reported_since_is_not_lost() {
    let mut job = job(JobStatus::Running);
    job.progress = Some(Progress::new(0.5, "half way", at(50)));
    let state = State::Live(job);
    for (since, is_lost) in [(49, false), (50, false), (51, true)] {
        let command = lost_since(TASK, since);
        let decision = decide(job_id(), &state, &command, &context());
        let is_ended = decision.event == Event::Ended(Outcome::Lost);
        assert_eq!(is_ended, is_lost, "{decision:?}");
    }
}

/// A cancel that comes again, or an operator's that meets the end, takes nothing away that could be had.
#[rstest]
#[case::its_client_gives_it_up(Via::Client, Outcome::Succeeded, true)]
#[case::its_cancel_comes_again(Via::Client, Outcome::Cancelled, false)]
#[case::an_operator_was_too_late(Via::Page, Outcome::Succeeded, false)]
fn what_is_kept_goes_when_its_client_deletes_the_job(
    #[case] via: Via,
    #[case] outcome: Outcome,
    #[case] goes: bool,
) {
    let cancel = Command::Cancel(Origin {
        via,
        ..Origin::default()
    });
    let decision = decide(job_id(), &ended(outcome), &cancel, &context());
    assert_eq!(decision.gives_up_kept, goes);
}
