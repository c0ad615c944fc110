//! What comes of batches in which one message bears on another.

use std::fmt::Write;

use jiff::Timestamp;
use rstest::rstest;
use serde_json::Map;

use super::*;
use crate::domain::job::{
    Completion, Job, JobStatus, Origin, Outcome, Priority, Rules, Submission, TimeoutResult,
};
use crate::domain::workflow::Catalogue;

const OUTPUT: &str = "<esdl:EnergySystem id='network'/>";
/// Its queue takes nothing.
const CLOSED: &str = "optimiser";
/// Its tasks wait for their turn.
const LIMITED: &str = "calibrator";

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn submit(workflow: &str) -> Command {
    Command::Submit(Submission {
        workflow_type: workflow.to_owned(),
        esdl: "<esdl/>".to_owned(),
        params: Map::new(),
        reference: Some("ours".to_owned()),
        priority: Priority::Medium,
        timeout_ms: None,
        sender: None,
        requested: None,
    })
}

fn start() -> Command {
    Command::Start {
        task_id: "task".to_owned(),
        message_id: Some("start".to_owned()),
        redelivered: false,
    }
}

fn progress(fraction: f64) -> Command {
    Command::Progress {
        task_id: "task".to_owned(),
        fraction,
        message: "on".to_owned(),
    }
}

fn result() -> Command {
    Command::Result(Completion {
        task_id: "task".to_owned(),
        succeeded: true,
        output_esdl: Some(OUTPUT.to_owned()),
        logs: String::new(),
        esdl_messages: Vec::new(),
    })
}

/// A job that was submitted in that second, and waits for a worker.
fn submitted(second: i64) -> State {
    State::Live(Job {
        workflow_type: "simulator".to_owned(),
        reference: "ours".to_owned(),
        status: JobStatus::Submitted,
        task_id: Some("task".to_owned()),
        registered_at: at(second),
        submitted_at: Some(at(second)),
        running_at: None,
        timeout_ms: None,
        priority: None,
        starts: Vec::new(),
        progress: None,
        course: None,
        parameters: None,
        task_queue: None,
    })
}

/// Decides, at second 100 with an outcome delay of 10 seconds, about commands for jobs that are
/// numbered.
fn plan(before: State, asked: &[(u128, Command)], has_waited: bool) -> String {
    let definition = |name| {
        format!(r#"{{"workflow_type_name": "{name}", "workflow_type_description_name": ""}}"#)
    };
    let file = ["simulator", CLOSED, LIMITED].map(definition).join(", ");
    let file = format!("[{file}]");
    let catalogue = Catalogue::parse(&file).unwrap();
    let rules = Rules {
        delivery_limit: 2,
        retention: Duration::from_secs(1000),
        outcome_lost: Duration::from_secs(300),
        outcome_delay: Duration::from_secs(10),
        timeout_result: TimeoutResult::Cancelled,
        reject_invalid_params: false,
        keep_logs: true,
        keep_parameters: true,
        fair_share_separator: String::new(),
    };
    let before = HashMap::from([(Uuid::from_u128(1), before)]);
    let batch = asked.iter().enumerate();
    let batch = batch.map(|(place, (job_id, command))| Asked {
        place,
        job_id: Uuid::from_u128(*job_id),
        command,
        has_waited,
    });
    let mut tasks = 0;
    let context = || {
        tasks += 1;
        Context {
            now: at(100),
            session_begun: None,
            new_task_id: Uuid::from_u128(tasks),
            catalogue: &catalogue,
            is_closed: &|queue| queue == CLOSED,
            has_limits: &|queue| queue == LIMITED,
            rules: &rules,
        }
    };
    written(&decide(batch, &before, context))
}

/// A plan in short: what is sent, what is told, how the jobs are left, and the rest where there is any.
fn written(plan: &Plan<'_>) -> String {
    let mut text = String::new();
    for publication in &plan.publications {
        write!(text, "send {}, ", publication_in_short(publication)).unwrap();
    }
    for announcement in &plan.announcements {
        write!(text, "tell {}, ", publication_in_short(announcement)).unwrap();
    }
    let mut transitions: Vec<_> = plan.transitions.iter().collect();
    transitions.sort_by_key(|transition| transition.job_id);
    for Transition { job_id, after, .. } in transitions {
        let state = match after {
            State::Unknown => "unknown".to_owned(),
            State::Live(job) => job.status.name().to_owned(),
            State::Ending(ending) => format!("ending {}", ending.ended.outcome.name()),
            State::Ended(ended) => format!("ended {}", ended.outcome.name()),
        };
        write!(text, "job {} {state}, ", job_id.as_u128()).unwrap();
    }
    for (queue, job_id) in plan.single_newcomers() {
        write!(text, "perhaps {} at once at {queue}, ", job_id.as_u128()).unwrap();
    }
    for ended in plan.ended() {
        write!(text, "ends {}, ", ended.outcome.name()).unwrap();
    }
    for job_id in &plan.ending {
        write!(text, "settle {}, ", job_id.as_u128()).unwrap();
    }
    for Wait {
        place,
        time,
        refusal,
    } in &plan.waits
    {
        let refused = if refusal.is_some() { " refused" } else { "" };
        write!(text, "{place} waits {time:?}{refused}, ").unwrap();
    }
    for Stalled { place, queue } in &plan.stalled {
        write!(text, "{place} waits for {queue}, ").unwrap();
    }
    let SeriesChanges {
        keep,
        retire_late,
        retire,
        hold: _,
        retire_these: _,
    } = &plan.series;
    for (what, rows) in [("keep", keep), ("retire late", retire_late)] {
        for row in rows {
            write!(text, "{what} {} of {}, ", row.esdl_id, row.reference).unwrap();
        }
    }
    for job_id in retire {
        write!(text, "retire {}, ", job_id.as_u128()).unwrap();
    }
    let places = plan.reports.iter().map(|report| report.place.to_string());
    let places: Vec<_> = places.collect();
    write!(text, "log {}", places.join(" ")).unwrap();
    text
}

fn publication_in_short(publication: &Publication<'_>) -> String {
    match publication {
        Publication::Task { task_id, .. } => format!("task {}", task_id.as_u128()),
        Publication::Revoke { task_id } => match Uuid::parse_str(task_id) {
            Ok(id) => format!("revoke {}", id.as_u128()),
            Err(_) => format!("revoke {task_id}"),
        },
        Publication::Status { status, .. } => format!("{status:?}"),
        Publication::Progress { fraction, .. } => format!("progress {fraction}"),
        Publication::Result { result_type, .. } => format!("result {result_type:?}"),
    }
}

#[rstest]
#[case::each_job_has_its_own_task(
    State::Unknown,
    &[(1, submit("simulator")), (2, submit("simulator"))],
    "send task 1, send Enqueued, send task 2, send Enqueued, job 1 SUBMITTED, job 2 SUBMITTED, log 0 1"
)]
#[case::a_submission_that_comes_twice(
    State::Unknown,
    &[(1, submit("simulator")), (1, submit("simulator"))],
    "send task 1, send Enqueued, job 1 SUBMITTED, log 0 1"
)]
#[case::all_that_a_worker_says(
    submitted(0),
    &[(1, start()), (1, progress(0.5)), (1, result())],
    "send Running, send progress 0.5, tell result Succeeded, job 1 ending SUCCEEDED, ends SUCCEEDED, \
     settle 1, keep network of ours, log 0 1 2"
)]
#[case::a_cancel_after_the_result_is_one_of_an_ended_job(
    submitted(0),
    &[(1, result()), (1, Command::Cancel(Origin::default()))],
    "tell result Succeeded, job 1 ending SUCCEEDED, ends SUCCEEDED, settle 1, keep network of ours, \
     retire 1, log 0 1"
)]
#[case::a_result_after_the_cancel_comes_too_late(
    submitted(0),
    &[(1, Command::Cancel(Origin::default())), (1, result())],
    "tell revoke task, tell Cancelled, tell result Cancelled, job 1 ending CANCELLED, ends CANCELLED, \
     settle 1, retire late network of ours, retire 1, log 0 1"
)]
#[case::a_cancel_before_its_submission(
    State::Unknown,
    &[(1, Command::Cancel(Origin::default())), (1, submit("simulator"))],
    "job 1 ending CANCELLED, ends CANCELLED, 1 waits 10s refused, retire 1, log 0 1"
)]
#[case::an_outcome_waits_and_the_task_does_not(
    State::Unknown,
    &[(1, submit("simulator")), (1, Command::Cancel(Origin::default()))],
    "send task 1, send Enqueued, tell revoke 1, job 1 ending CANCELLED, ends CANCELLED, 1 waits 10s, \
     retire 1, log 0 1"
)]
#[case::a_refusal_waits_with_its_reason(
    State::Unknown,
    &[(1, submit("of nobody"))],
    "job 1 ending REJECTED, ends REJECTED, 0 waits 10s refused, log 0"
)]
#[case::a_queue_that_takes_nothing_holds_up_nobody_else(
    State::Unknown,
    &[(1, submit(CLOSED)), (2, submit("simulator"))],
    "send task 2, send Enqueued, job 2 SUBMITTED, 0 waits for optimiser, log 1"
)]
#[case::a_message_that_stalls_has_not_been_there(
    State::Unknown,
    &[(1, submit(CLOSED)), (1, progress(0.5))],
    "send revoke task, 0 waits for optimiser, log 1"
)]
#[case::one_whose_turn_may_be_now(
    State::Unknown,
    &[(1, submit(LIMITED)), (2, submit("simulator"))],
    "send Enqueued, send task 2, send Enqueued, job 1 REGISTERED, job 2 SUBMITTED, \
     perhaps 1 at once at calibrator, log 0 1"
)]
#[case::of_two_the_order_is_decided_elsewhere(
    State::Unknown,
    &[(1, submit(LIMITED)), (2, submit(LIMITED))],
    "send Enqueued, send Enqueued, job 1 REGISTERED, job 2 REGISTERED, log 0 1"
)]
#[case::one_that_is_cancelled_at_once_takes_no_turn(
    State::Unknown,
    &[(1, submit(LIMITED)), (1, Command::Cancel(Origin::default()))],
    "send Enqueued, job 1 ending CANCELLED, ends CANCELLED, 1 waits 10s, retire 1, log 0 1"
)]
#[case::nothing_is_asked(State::Unknown, &[], "log ")]
fn a_batch(#[case] before: State, #[case] asked: &[(u128, Command)], #[case] expected: &str) {
    assert_eq!(plan(before, asked, false), expected);
}

#[test]
fn an_outcome_is_told_when_it_has_waited_and_is_no_news() {
    let State::Live(job) = submitted(90) else {
        panic!("it is live");
    };
    let ended = Ended {
        outcome: Outcome::Cancelled,
        workflow_type: Some(job.workflow_type.clone()),
        reference: Some(job.reference.clone()),
        task_id: job.task_id.clone(),
        registered_at: Some(job.registered_at),
        submitted_at: job.submitted_at,
        running_at: None,
        finished_at: at(91),
        starts: 0,
        start_ids: Vec::new(),
        result_bytes: 0,
        why: None,
        told: None,
    };
    let before = State::Ending(Ending { job, ended });
    assert_eq!(
        plan(before, &[(1, Command::Cancel(Origin::default()))], true),
        "tell Cancelled, tell result Cancelled, settle 1, log "
    );
}
