use jiff::Timestamp;
use rstest::rstest;
use serde_json::json;
use uuid::Uuid;

use super::*;
use crate::domain::job::{JobStatus, Via};
use crate::domain::overview::{End, TurnView};
use crate::proto::WorkflowParameter;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn ended(outcome: Outcome) -> JobView {
    JobView {
        id: Uuid::from_u128(1),
        reference: "ref".to_owned(),
        workflow: Some("simulator".to_owned()),
        state: JobState::Ended(outcome),
        priority: None,
        task_id: Some("task".to_owned()),
        queue: None,
        registered_at: Some(at(0)),
        submitted_at: Some(at(0)),
        running_at: Some(at(10)),
        finished_at: Some(at(50)),
        timeout_ms: None,
        starts: 1,
        progress: None,
        result_bytes: None,
        position: None,
        estimate: None,
        too_few_runs: None,
        concern: None,
        step: None,
        turn: None,
        granted_at: None,
        ends: End::default(),
        why: None,
    }
}

/// With its task on its queue, and not taken.
fn waiting() -> JobView {
    JobView {
        state: JobState::Live(JobStatus::Submitted),
        running_at: None,
        finished_at: None,
        ..ended(Outcome::Failed)
    }
}

fn started() -> Rows {
    Rows {
        starts: vec![(at(10), Verdict::Counts)],
        ..Rows::default()
    }
}

fn attempt(step: usize, number: usize, from: i64) -> AttemptView {
    AttemptView {
        step,
        attempt: number,
        title: "Simulate".to_owned(),
        task: "simulator".to_owned(),
        task_id: Some(format!("task-{step}-{number}")),
        due_at: None,
        submitted_at: Some(at(from)),
        started_at: Some(at(from + 5)),
        finished_at: Some(at(from + 10)),
        outcome: Some(Outcome::Failed),
        starts: Some(1),
        output_bytes: None,
        why: Some("no heat".to_owned()),
        logs: None,
    }
}

fn mark(second: i64, fraction: f64, message: &str) -> Mark {
    Mark {
        at: at(second),
        fraction,
        message: message.to_owned(),
    }
}

fn seen(host: &str, task: &str, from: i64, to: i64) -> Seen {
    Seen {
        host: host.to_owned(),
        task_id: task.to_owned(),
        first_seen: at(from),
        last_seen: at(to),
    }
}

/// The events, each as `second what; fact; fact`.
fn told(job: &JobView, rows: &Rows) -> Vec<String> {
    let events = bounded(events(job, rows));
    let told = events.iter().map(|event| {
        let facts = event.evidence.iter().map(|fact| format!("; {fact}"));
        format!(
            "{} {}{}",
            event.at.as_second(),
            event.what,
            facts.collect::<String>()
        )
    });
    told.collect()
}

#[test]
fn a_plain_job_is_submitted_started_and_ends() {
    let job = JobView {
        priority: Some(Priority::High),
        timeout_ms: Some(600_000),
        result_bytes: Some(7),
        ..ended(Outcome::Succeeded)
    };
    let rows = Rows {
        seen: vec![seen("worker-simulator@one", "task", 15, 40)],
        marks: vec![mark(11, 0.0, "reads"), mark(20, 0.5, "")],
        last: Some(Progress {
            fraction: 0.9,
            message: "writes\nmuch".to_owned(),
            at: at(45),
        }),
        ..started()
    };
    let expected = [
        "0 Submitted to `simulator`, and handed over at once; its priority is high; it may run for 10 min",
        "10 Started on worker-simulator@one",
        "11 0 %: reads",
        "20 50 %",
        "45 90 %: writes\\nmuch",
        "50 Succeeded; its result has 7 bytes",
    ];
    assert_eq!(told(&job, &rows), expected);
}

fn act(second: i64, deed: Deed) -> Act {
    let by = Origin::new(Via::Page, Some("an\nna"), Some("10.0.0.7"));
    Act {
        at: at(second),
        deed,
        by: Some(by),
    }
}

#[test]
fn what_somebody_has_done_to_a_job_is_told() {
    let job = JobView {
        priority: Some(Priority::Low),
        ..ended(Outcome::Succeeded)
    };
    let prioritised = |was, priority| Deed::Prioritised { was, priority };
    let rows = Rows {
        acts: vec![
            act(0, Deed::RanAgain(Uuid::from_u128(7))),
            act(1, prioritised(Some(Priority::Medium), Priority::High)),
            act(2, Deed::Held),
            Act {
                by: None,
                ..act(3, Deed::Released)
            },
            act(4, Deed::MovedFirst),
            act(5, prioritised(Some(Priority::High), Priority::Low)),
            act(6, Deed::LetGo),
        ],
        acts_left_out: 3,
        runs: vec![Run {
            id: Uuid::from_u128(9),
            at: at(60),
            by: act(60, Deed::Submitted).by,
        }],
        ..started()
    };
    let by = "an\\nna, by the status page, from 10.0.0.7";
    let (of, again) = (Uuid::from_u128(7), Uuid::from_u128(9));
    let expected = [
        format!(
            "0 Submitted to `simulator`, and handed over at once; by {by}; runs again what job {of} was; its priority is medium"
        ),
        format!("1 Given the priority high by {by}; it was medium"),
        format!("2 Put on hold by {by}"),
        "3 Released by somebody".to_owned(),
        format!("4 Moved before all others by {by}"),
        format!("5 Given the priority low by {by}; it was high"),
        format!("6 Released by {by}; whatever its queue allows; 3 more acts are not kept"),
        "10 Started".to_owned(),
        "50 Succeeded".to_owned(),
        format!("60 Run again as job {again} by {by}"),
    ];
    assert_eq!(told(&job, &rows), expected);
    let story = Story::new(job, rows);
    assert_eq!(story.runs_again, Some(of));
    assert_eq!(story.run_again_as, [again]);
}

#[rstest]
#[case::failed(Outcome::Failed, "Failed; no heat")]
#[case::cancelled(Outcome::Cancelled, "Cancelled; no heat")]
#[case::crash_loop(
    Outcome::CrashLoop,
    "Ended by the orchestrator: its worker was lost, by a crash or a stop; no heat"
)]
#[case::rejected(Outcome::Rejected, "Refused by the orchestrator; no heat")]
#[case::timed_out(
    Outcome::TimedOut,
    "Ended by the orchestrator: it timed out; no heat; a timeout ends a job 5 s after it is over, to let what \
     its worker has said go first, or with the check that follows (TIMEOUT_JOB_HANDLER_RERUN_SEC)"
)]
#[case::expired(
    Outcome::Expired,
    "Given up by the orchestrator: it was unfinished for too long; no heat"
)]
#[case::lost(Outcome::Lost, "Given up by the orchestrator: it was lost; no heat")]
fn each_end_is_told(#[case] outcome: Outcome, #[case] expected: &str) {
    let mut job = ended(outcome);
    job.ends.why = Some("no heat".to_owned());
    assert_eq!(
        told(&job, &started()).last().unwrap(),
        &format!("50 {expected}")
    );
}

#[rstest]
#[case(Via::Client, None, None, "a client")]
#[case(Via::Client, Some("omotes"), None, "a client, omotes")]
#[case(
    Via::Page,
    Some("anna"),
    Some("10.0.0.7"),
    "anna, by the status page, from 10.0.0.7"
)]
#[case(
    Via::CommandLine,
    None,
    Some("a1b2c3"),
    "somebody, by the command line, from a1b2c3"
)]
#[case(
    Via::Page,
    Some("<b>\n\u{202e}x"),
    Some("\u{1b}[31m"),
    "<b>\\n\\u{202e}x, by the status page, from \\u{1b}[31m"
)]
fn whoever_cancelled_it_is_named(
    #[case] via: Via,
    #[case] who: Option<&str>,
    #[case] from: Option<&str>,
    #[case] expected: &str,
) {
    let rows = Rows {
        ended_by: Some(Origin::new(via, who, from)),
        ..started()
    };
    let told = told(&ended(Outcome::Cancelled), &rows);
    assert_eq!(told.last().unwrap(), &format!("50 Cancelled by {expected}"));
}

#[test]
fn a_task_that_is_started_again_says_why_and_where() {
    let rows = Rows {
        starts: vec![
            (at(10), Verdict::Counts),
            (at(20), Verdict::Interrupted),
            (at(30), Verdict::Copy),
            (at(40), Verdict::Counts),
        ],
        seen: vec![
            seen("one", "task", 12, 18),
            seen("two", "task", 22, 28),
            seen("three", "another task", 32, 38),
        ],
        ..Rows::default()
    };
    let expected = [
        "0 Submitted to `simulator`, and handed over at once",
        "10 Started on one",
        "20 Started again on two; a connection to RabbitMQ was lost, so it does not count",
        "30 Started again; the workers before it still run it, so it does not count",
        "40 Started again; the worker before it is taken for dead",
        "50 Failed",
    ];
    assert_eq!(told(&ended(Outcome::Failed), &rows), expected);
}

#[test]
fn a_job_of_two_steps_tells_each_attempt() {
    let first = AttemptView {
        title: "Optimise".to_owned(),
        task: "optimiser".to_owned(),
        ..attempt(1, 1, 0)
    };
    let again = AttemptView {
        attempt: 2,
        due_at: Some(at(15)),
        outcome: Some(Outcome::Succeeded),
        why: None,
        starts: Some(3),
        ..AttemptView {
            task_id: Some("task-1-2".to_owned()),
            submitted_at: Some(at(15)),
            started_at: Some(at(20)),
            finished_at: Some(at(25)),
            ..first.clone()
        }
    };
    let held = AttemptView {
        due_at: Some(at(25)),
        ..attempt(2, 1, 30)
    };
    let rows = Rows {
        attempts: vec![first, again, held],
        seen: vec![seen("one", "task-1-2", 21, 24)],
        starts: vec![(at(35), Verdict::Counts), (at(36), Verdict::Interrupted)],
        ..Rows::default()
    };
    let expected = [
        "0 Submitted to `simulator`",
        "0 Step 1, Optimise: handed over to `optimiser`",
        "5 Step 1, Optimise: started",
        "10 Step 1, Optimise: failed; no heat",
        "10 Step 1, Optimise, attempt 2: is tried again at 1970-01-01T00:00:15Z",
        "15 Step 1, Optimise, attempt 2: handed over to `optimiser`",
        "20 Step 1, Optimise, attempt 2: started on one",
        "25 Step 1, Optimise, attempt 2: succeeded; its task was started 3 times",
        "25 Step 2, Simulate: held until it is its turn at `simulator`",
        "30 Step 2, Simulate: handed over to `simulator`",
        "35 Step 2, Simulate: started",
        "36 Started again; a connection to RabbitMQ was lost, so it does not count",
        "50 Failed",
    ];
    assert_eq!(told(&ended(Outcome::Failed), &rows), expected);
}

#[test]
fn a_job_that_was_held_tells_since_when() {
    let held = JobView {
        submitted_at: None,
        turn: Some(TurnView {
            queue: "simulator".to_owned(),
            owner: "anna".to_owned(),
            since: at(0),
            on_hold: false,
            hold: None,
        }),
        ..waiting()
    };
    let row = AttemptView {
        title: "simulator".to_owned(),
        task_id: None,
        submitted_at: None,
        started_at: None,
        finished_at: None,
        outcome: None,
        ..attempt(1, 1, 0)
    };
    let rows = Rows {
        attempts: vec![row.clone()],
        ..Rows::default()
    };
    let expected = [
        "0 Submitted to `simulator`",
        "0 Held until it is its turn at `simulator`",
    ];
    assert_eq!(told(&held, &rows), expected);
    let rows = Rows {
        attempts: vec![AttemptView {
            due_at: Some(at(0)),
            submitted_at: Some(at(7)),
            ..row
        }],
        ..Rows::default()
    };
    let told = told(&waiting(), &rows);
    assert_eq!(told[..2], expected);
    assert_eq!(told[2..], ["7 Handed over to `simulator`"]);
}

#[rstest]
#[case::waiting(waiting(), "0 Submitted to `simulator`, and handed over at once")]
#[case::at_a_queue_that_is_kept(
    JobView { queue: Some("two\nlines".to_owned()), ..waiting() },
    "0 Submitted to `simulator`, and handed over to `two\\nlines` at once"
)]
#[case::left_by_the_python_service(
    JobView { submitted_at: None, ..waiting() },
    "0 Submitted to `simulator`"
)]
#[case::cancelled_before_it_came(
    JobView { registered_at: None, submitted_at: None, running_at: None, workflow: None,
              ..ended(Outcome::Cancelled) },
    "50 Cancelled"
)]
fn what_is_little_is_told(#[case] job: JobView, #[case] expected: &str) {
    assert_eq!(told(&job, &Rows::default()), [expected]);
}

#[test]
fn a_history_of_an_earlier_version_has_its_first_start() {
    let told = told(&ended(Outcome::Failed), &Rows::default());
    assert_eq!(told[1..], ["10 Started", "50 Failed"]);
}

#[test]
fn a_story_has_an_end() {
    let mut job = ended(Outcome::Failed);
    job.finished_at = Some(at(100_000));
    let rows = Rows {
        attempts: (0..10_000)
            .map(|number| attempt(1, usize::try_from(number).unwrap() + 1, number * 10))
            .collect(),
        ..Rows::default()
    };
    let told = told(&job, &rows);
    assert_eq!(told.len(), MAX_EVENTS + 1);
    assert!(told[0].starts_with("0 Submitted"));
    assert!(told[MAX_EVENTS / 2].ends_with(" events are left out here"));
    assert_eq!(told[MAX_EVENTS], "100000 Failed");
}

#[test]
fn parameters_go_by_their_titles_in_the_order_of_their_definition() {
    let definition = |key: &str, title: Option<&str>| WorkflowParameter {
        key_name: key.to_owned(),
        title: title.map(str::to_owned),
        ..WorkflowParameter::default()
    };
    let definitions = [
        definition("z", Some("The <last>")),
        definition("b", Some("")),
    ];
    let parameters = json!({"a": [1.0], "b": "\u{202e}x\n", "z": true});
    let rows = Rows {
        parameters: parameters.as_object().cloned(),
        ..Rows::default()
    };
    let mut story = Story::new(waiting(), rows);
    story.name_parameters(&definitions);
    let parameters = story.parameters.iter();
    let shown: Vec<_> = parameters.map(|one| (one.name(), one.text())).collect();
    let expected = [
        ("The <last>", "true".to_owned()),
        ("b", "\\u{202e}x\\n".to_owned()),
        ("a", "[1.0]".to_owned()),
    ];
    assert_eq!(shown, expected);
}
