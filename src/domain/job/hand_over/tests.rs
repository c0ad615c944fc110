//! What follows what in a job of several steps, and the laws that hold for any sequence.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::sample::Index;
use rstest::rstest;
use serde_json::{Map, json};

use super::super::decision::TimeoutResult;
use super::super::{
    CRASH_LOOP_LOGS, ClientStatus, Command, Grant, Origin, Rules, Submission, Verdict, decide,
};
use super::*;
use crate::domain::workflow::Catalogue;
use crate::proto::EsdlMessage;

const INPUT: &str = "<esdl id='input'/>";

static RULES: Rules = Rules {
    delivery_limit: 2,
    retention: Duration::from_secs(100_000),
    outcome_lost: Duration::from_secs(300),
    outcome_delay: Duration::ZERO,
    timeout_result: TimeoutResult::Cancelled,
    reject_invalid_params: false,
    keep_logs: true,
    keep_parameters: true,
    fair_share_separator: String::new(),
};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn job_id() -> Uuid {
    Uuid::from_u128(1)
}

/// Knows the workflow `w`, with the parameters `p` and `q`, which has these steps.
fn catalogue(steps: &str) -> Catalogue {
    let file = format!(
        r#"[{{"workflow_type_name": "w", "workflow_type_description_name": "W",
             "workflow_parameters": [{{"key_name": "p", "parameter_type": "string"}},
                                     {{"key_name": "q", "parameter_type": "string"}}],
             "steps": {steps}}}]"#
    );
    Catalogue::parse(&file).unwrap()
}

/// One job, whose messages are handled one by one; each second something happens.
struct Story {
    catalogue: Catalogue,
    second: i64,
    state: State,
    /// Task queues that take nothing for now.
    closed: Vec<&'static str>,
    /// Those with limits.
    limited: Vec<&'static str>,
}

impl Story {
    fn new(steps: &str) -> Story {
        Story {
            catalogue: catalogue(steps),
            second: 100,
            state: State::Unknown,
            closed: Vec::new(),
            limited: Vec::new(),
        }
    }

    /// Handles a command and returns what is sent, one line each, and what is said of it.
    fn tell(&mut self, command: &Command) -> Vec<String> {
        self.second += 1;
        let context = Context {
            now: at(self.second),
            session_begun: None,
            new_task_id: Uuid::from_u128(self.second.unsigned_abs().into()),
            catalogue: &self.catalogue,
            is_closed: &|task| self.closed.contains(&task),
            has_limits: &|task| self.limited.contains(&task),
            rules: &RULES,
        };
        let decision = decide(job_id(), &self.state, command, &context);
        // After a crash it might be decided otherwise, and the job would have lost its task.
        let revokes = |one: &&Publication<'_>| matches!(one, Publication::Revoke { .. });
        if let Event::HandedOver { .. } | Event::Postponed { .. } = decision.event {
            assert_eq!(decision.publications.iter().find(revokes), None);
        }
        let publications = decision.publications.iter();
        let mut told: Vec<_> = publications
            .chain(&decision.announcements)
            .map(line)
            .collect();
        told.extend(decision.time_series.iter().map(|one| format!("{one:?}")));
        if let Event::Ignored(why) | Event::Revoked(why) = decision.event {
            told.push(why.to_owned());
        }
        if let Some(next) = decision.next {
            self.state = next;
        }
        told
    }

    fn submit(&mut self) -> Vec<String> {
        let params = json!({"p": "1", "q": "2"});
        self.tell(&Command::Submit(Submission {
            workflow_type: "w".to_owned(),
            esdl: INPUT.to_owned(),
            params: params.as_object().unwrap().clone(),
            reference: Some("ref".to_owned()),
            priority: Priority::High,
            timeout_ms: Some(60_000),
            sender: None,
            requested: None,
        }))
    }

    /// Grants its task a turn, with this id, and hands it over.
    fn take_turn(&mut self, id: u128) -> Vec<String> {
        let at = at(self.second);
        let task_id = Uuid::from_u128(id);
        let course = self.state.job_mut().unwrap().course.as_mut().unwrap();
        course.turn.as_mut().unwrap().grant = Some(Grant { at, task_id });
        self.tell(&Command::TakeTurn { grant: Some(at) })
    }

    fn task(&self) -> String {
        let task = self.state.job().and_then(|job| job.task_id.clone());
        task.unwrap_or_default()
    }

    fn start(&mut self) -> Vec<String> {
        let message_id = Some(format!("start at {}", self.second));
        self.tell(&Command::Start {
            task_id: self.task(),
            message_id,
            redelivered: false,
        })
    }

    fn progress(&mut self, fraction: f64) -> Vec<String> {
        self.tell(&Command::Progress {
            task_id: self.task(),
            fraction,
            message: "computing".to_owned(),
        })
    }

    fn result(&mut self, output_esdl: Option<&str>) -> Vec<String> {
        self.tell(&Command::Result(Completion {
            task_id: self.task(),
            succeeded: output_esdl.is_some(),
            output_esdl: output_esdl
                .filter(|esdl| !esdl.is_empty())
                .map(str::to_owned),
            logs: format!("logs at {}", self.second),
            esdl_messages: vec![EsdlMessage {
                technical_message: format!("message at {}", self.second),
                severity: 1,
                esdl_object_id: None,
            }],
        }))
    }

    fn course(&self) -> &Course {
        self.state
            .job()
            .and_then(|job| job.course.as_deref())
            .unwrap()
    }
}

fn line(publication: &Publication<'_>) -> String {
    match publication {
        Publication::Task {
            task_id,
            assignment,
            ..
        } => {
            let Assignment {
                task,
                reference,
                parameters,
                priority,
                input,
            } = assignment;
            let parameters = json!(**parameters);
            let reference = reference.as_deref().unwrap_or_default();
            format!(
                "task {} for {task}: {parameters} {reference} {priority:?} {input:?}",
                task_id.as_u128()
            )
        }
        Publication::Revoke { task_id } => {
            let task: Uuid = task_id.parse().unwrap();
            format!("revoke {}", task.as_u128())
        }
        Publication::Status { status, .. } => format!("{status:?}"),
        Publication::Progress {
            fraction, message, ..
        } => format!("{fraction} {message}"),
        Publication::Result {
            result_type,
            output_esdl,
            logs,
            esdl_messages,
            ..
        } => {
            let messages = esdl_messages.iter();
            let messages: Vec<_> = messages.map(|one| one.technical_message.as_str()).collect();
            format!(
                "{result_type:?} {output_esdl:?}\n{logs}{}",
                messages.join("\n")
            )
        }
    }
}

const TWO: &str = r#"[{"task": "optimiser", "title": "Optimise", "parameters": ["p"], "weight": 3},
                      {"task": "simulator", "title": "Simulate", "parameters": {"x": "q"}}]"#;

#[test]
fn the_second_step_gets_the_output_of_the_first() {
    let mut story = Story::new(TWO);
    assert_eq!(
        story.submit(),
        [
            r#"task 101 for optimiser: {"p":"1"} ref High Given("<esdl id='input'/>")"#,
            "Enqueued"
        ]
    );
    assert_eq!(story.start(), ["Running"]);
    assert_eq!(story.progress(0.5), ["0.375 Optimise: computing"]);
    assert_eq!(
        story.result(Some("<esdl id='one'/>")),
        [
            r#"task 104 for simulator: {"x":"2"} ref High Given("<esdl id='one'/>")"#,
            "0.75 Simulate: waiting for a worker",
            r#"Hold { esdl_id: "one", reference: "ref" }"#
        ]
    );
    assert_eq!(story.course().input, Input::NotKept);
    assert!(story.start().is_empty());
    assert_eq!(story.progress(0.5), ["0.875 Simulate: computing"]);
    assert_eq!(
        story.result(Some("<esdl id='two'/>")),
        [
            "Succeeded Some(\"<esdl id='two'/>\")\n\
             === step 1 of 2, Optimise: succeeded ===\n\
             logs at 103\n\
             === step 2 of 2, Simulate: succeeded ===\n\
             logs at 106\n\
             Optimise: message at 103\n\
             Simulate: message at 106",
            r#"Keep { esdl_id: "two", reference: "ref" }"#
        ]
    );
    let State::Ending(ending) = &story.state else {
        panic!("{:?}", story.state);
    };
    assert_eq!(ending.ended.starts, 2);
    assert_eq!(ending.ended.outcome, Outcome::Succeeded);
}

#[test]
fn events_of_an_earlier_step_change_nothing() {
    let mut story = Story::new(TWO);
    story.submit();
    story.start();
    let first = story.task();
    story.result(Some("<esdl id='one'/>"));
    let before = story.state.clone();
    let start = Command::Start {
        task_id: first.clone(),
        message_id: Some("again".to_owned()),
        redelivered: false,
    };
    assert_eq!(
        story.tell(&start),
        ["revoke 101", "it is of an attempt that has ended"]
    );
    let progress = Command::Progress {
        task_id: first.clone(),
        fraction: 1.0,
        message: String::new(),
    };
    assert_eq!(
        story.tell(&progress),
        ["it is of an attempt that has ended"]
    );
    let result = Command::Result(Completion {
        task_id: first,
        succeeded: false,
        output_esdl: None,
        logs: String::new(),
        esdl_messages: Vec::new(),
    });
    assert_eq!(story.tell(&result), ["it is of an attempt that has ended"]);
    assert_eq!(story.state, before);
}

#[test]
fn a_failed_step_names_itself_and_gives_up_the_time_series() {
    let mut story = Story::new(TWO);
    story.submit();
    story.start();
    story.result(Some("<esdl id='one'/>"));
    story.start();
    assert_eq!(
        story.result(None),
        [
            "Error None\n\
             The job ended in step 2 of 2, Simulate.\n\
             === step 1 of 2, Optimise: succeeded ===\n\
             logs at 102\n\
             === step 2 of 2, Simulate: failed ===\n\
             logs at 104\n\
             Optimise: message at 102\n\
             Simulate: message at 104",
            "Retire"
        ]
    );
}

#[test]
fn a_success_without_an_esdl_is_an_error_of_its_step() {
    let mut story = Story::new(TWO);
    story.submit();
    story.start();
    let told = story.result(Some(""));
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0].starts_with(
            "Error None\n\
             The job ended in step 1 of 2, Optimise.\n\
             === step 1 of 2, Optimise: failed ===\n\
             Its worker reported success, but sent no ESDL.\n\
             logs at 102\n"
        ),
        "{}",
        told[0]
    );
}

#[test]
fn a_step_is_tried_again_at_once_or_after_a_while() {
    let mut story =
        Story::new(r#"[{"task": "a", "retry": {"attempts": 3, "wait_sec": 10}}, {"task": "b"}]"#);
    story.submit();
    assert_eq!(story.course().input, Input::New(Arc::from(INPUT)));
    story.start();
    story.progress(0.5);
    assert_eq!(
        story.result(None),
        ["0.25 a: it failed, and is tried again"]
    );
    assert_eq!(story.task(), "");
    assert_eq!(
        story.tell(&Command::TakeTurn { grant: None }),
        ["no step's turn has come"]
    );
    story.second += 10;
    let all = r#"{"p":"1","q":"2"}"#;
    assert_eq!(
        story.tell(&Command::TakeTurn { grant: None }),
        [
            format!(r#"task 116 for a: {all} ref High Held("<esdl id='input'/>")"#),
            "0.25 a: waiting for a worker".to_owned()
        ]
    );
    assert_eq!(
        story.tell(&Command::TakeTurn { grant: None }),
        ["no step's turn has come"]
    );
    story.start();
    story.result(None);
    story.second += 10;
    // Now it is in the database.
    if let Some(course) = story.state.job_mut().and_then(|job| job.course.as_mut()) {
        course.input = Input::Kept;
    }
    let told = story.tell(&Command::TakeTurn { grant: None });
    assert!(told[0].ends_with("Kept"), "{told:?}");
    assert_eq!(story.course().input, Input::NotKept);
    story.start();
    let told = story.result(None);
    assert!(
        told[0].starts_with("Error None\nThe job ended in step 1 of 2, a, attempt 3.\n"),
        "{told:?}"
    );
}

/// The end of the step before is certain: nothing may overtake it while the result waits.
#[test]
fn a_step_whose_queue_takes_nothing_for_now_waits_in_the_database() {
    let mut story = Story::new(TWO);
    story.submit();
    story.start();
    story.closed = vec!["simulator"];
    assert_eq!(
        story.result(Some("<esdl id='one'/>")),
        [
            "0.75 Simulate: its queue takes nothing for now",
            r#"Hold { esdl_id: "one", reference: "ref" }"#
        ]
    );
    assert_eq!(story.task(), "");
    assert_eq!(
        story.course().input,
        Input::New(Arc::from("<esdl id='one'/>"))
    );
    let waits = ["its queue takes nothing for now"];
    assert_eq!(story.tell(&Command::TakeTurn { grant: None }), waits);
    story.closed.clear();
    let told = story.tell(&Command::TakeTurn { grant: None });
    assert!(told[0].contains("for simulator"), "{told:?}");
    assert!(told[0].ends_with(r#"Held("<esdl id='one'/>")"#), "{told:?}");
    assert_eq!(story.course().input, Input::NotKept);
}

/// Its logs may be as long as a message, and there may be many attempts.
#[test]
fn of_earlier_attempts_the_end_of_the_logs_is_told() {
    let mut story = Story::new(TWO);
    story.submit();
    let long = format!("{}é{}the end", "x".repeat(1000), "y".repeat(64 * 1024 - 8));
    story.tell(&Command::Result(Completion {
        task_id: story.task(),
        succeeded: true,
        output_esdl: Some("<esdl id='one'/>".to_owned()),
        logs: long,
        esdl_messages: vec![
            EsdlMessage {
                technical_message: "z".repeat(40_000),
                severity: 1,
                esdl_object_id: None,
            };
            3
        ],
    }));
    let report = story.course().earlier[0].report.as_ref().unwrap();
    assert!(
        report.logs.starts_with("[1002 bytes are left out]\nyyy"),
        "{:.50}",
        report.logs
    );
    assert!(report.logs.ends_with("the end"));
    assert_eq!(report.esdl_messages.len(), 1);
}

/// Its queue may be full, say, which does not change by itself.
#[test]
fn an_attempt_that_cannot_be_made_ends_the_job() {
    let mut story = Story::new(r#"[{"task": "a", "retry": {"attempts": 2, "wait_sec": 10}}]"#);
    story.submit();
    story.start();
    story.result(None);
    let instead = Command::TakeTurn { grant: None }.instead("it is refused".to_owned(), true);
    let told = story.tell(&instead.unwrap());
    assert!(told[0].contains("it is refused"), "{told:?}");
    let State::Ending(ending) = &story.state else {
        panic!("{:?}", story.state);
    };
    assert_eq!(ending.ended.outcome, Outcome::Rejected);
}

/// Neither before its turn nor between that and its start.
#[test]
fn the_wait_for_a_turn_does_not_count_against_the_timeout() {
    let mut story = Story::new(r#"[{"task": "a"}, {"task": "b"}]"#);
    story.limited = vec!["b"];
    story.submit();
    story.start();
    story.result(Some("<one/>"));
    assert_eq!(
        story.tell(&Command::TakeTurn { grant: None }),
        ["its turn has not come"]
    );
    // The timeout is a minute.
    story.second += 1000;
    assert_eq!(story.tell(&Command::TimeOut), ["it is within its timeout"]);
    story.take_turn(7);
    story.second += 1000;
    assert_eq!(story.tell(&Command::TimeOut), ["it is within its timeout"]);
    story.start();
    story.second += 30;
    assert_eq!(story.tell(&Command::TimeOut), ["it is within its timeout"]);
    story.second += 40;
    assert_ne!(story.tell(&Command::TimeOut), ["it is within its timeout"]);
}

/// Whoever has a grant of another time no longer hands it over, and what a worker says of the task
/// shows that it is on its queue.
#[test]
fn a_granted_task_is_published_once() {
    let mut story = Story::new(r#"[{"task": "a"}]"#);
    story.limited = vec!["a"];
    assert_eq!(story.submit(), ["Enqueued"]);
    let earlier = Command::TakeTurn { grant: Some(at(1)) };
    let published = story.state.clone();
    story.take_turn(7);
    let task = Uuid::from_u128(7).to_string();
    assert_eq!(story.task(), task);
    // As after a crash between publication and commit.
    story.state = published;
    let course = story.state.job_mut().unwrap().course.as_mut().unwrap();
    course.turn.as_mut().unwrap().grant = Some(Grant {
        at: at(2),
        task_id: Uuid::from_u128(7),
    });
    let others = ["somebody else hands it over"];
    assert_eq!(story.tell(&earlier), others);
    assert_eq!(story.tell(&Command::TakeTurn { grant: None }), others);
    let start = Command::Start {
        task_id: task.clone(),
        message_id: Some("one".to_owned()),
        redelivered: false,
    };
    assert_eq!(story.tell(&start), ["Running"]);
    assert_eq!(story.task(), task);
    let late = Command::TakeTurn { grant: Some(at(2)) };
    assert_eq!(story.tell(&late), ["no step's turn has come"]);
}

/// The commit does not wait until the client has been told, so who is killed may have told nobody.
#[test]
fn that_a_held_submission_is_accepted_is_told_when_it_comes_again() {
    let again = ["Enqueued", "the job was submitted already"];
    let mut story = Story::new(r#"[{"task": "a"}]"#);
    story.limited = vec!["a"];
    assert_eq!(story.submit(), ["Enqueued"]);
    assert_eq!(story.submit(), again);
    story.take_turn(7);
    assert_eq!(story.submit(), again);
    // Its client is not to hear of it after that.
    assert_eq!(story.start(), ["Running"]);
    assert_eq!(story.submit(), again[1..]);
}

/// Killed before its client is told, and what was refused comes again.
#[test]
fn a_refused_hand_over_is_told_when_it_comes_again() {
    let mut story = Story::new(TWO);
    story.submit();
    let result = Command::Result(Completion {
        task_id: story.task(),
        succeeded: true,
        output_esdl: Some("<esdl id='one'/>".to_owned()),
        logs: String::new(),
        esdl_messages: Vec::new(),
    });
    story.tell(&result.instead("it is too large".to_owned(), true).unwrap());
    let told = story.tell(&result);
    assert!(
        told[1].starts_with("Error None\nThe job ended in step 1"),
        "{told:?}"
    );
    let State::Ending(ending) = &story.state else {
        panic!("{:?}", story.state);
    };
    assert_eq!(ending.ended.outcome, Outcome::Rejected);
}

#[rstest]
#[case::another_task(r#"{"fallback": {"task": "b", "title": "B"}}"#, "b", "B, attempt 2")]
#[case::the_next_step(r#""continue""#, "c", "c")]
fn after_a_failure_another_task_gets_the_same_input(
    #[case] on_error: &str,
    #[case] task: &str,
    #[case] name: &str,
    #[values("error", "crash loop", "timeout")] failure: &str,
) {
    let steps =
        format!(r#"[{{"task": "a", "on_error": {on_error}, "timeout_sec": 5}}, {{"task": "c"}}]"#);
    let mut story = Story::new(&steps);
    story.submit();
    story.start();
    let told = match failure {
        "error" => story.result(None),
        "crash loop" => {
            story.start();
            story.start();
            let suspected = story.state.job().unwrap().starts.last().unwrap().clone();
            assert_eq!(suspected.verdict, Verdict::Suspected);
            story.tell(&Command::Judge {
                task_id: story.task(),
                at: suspected.at,
                alive: 0,
                last: true,
            })
        }
        _ => {
            assert_eq!(story.tell(&Command::TimeOut), ["it is within its timeout"]);
            story.second += 5;
            story.tell(&Command::TimeOut)
        }
    };
    assert!(told[0].contains(&format!(" for {task}: ")), "{told:?}");
    assert!(
        told[0].ends_with(r#"Held("<esdl id='input'/>")"#),
        "{told:?}"
    );
    let revoked = told.contains(&"revoke 101".to_owned());
    assert_eq!(revoked, failure != "error", "{told:?}");
    let course = story.course();
    assert!(course.name(course.current.position).ends_with(name));
    assert!(story.state.job().unwrap().starts.is_empty());
}

#[rstest]
#[case::crash_loop("crash loop", Outcome::CrashLoop, CRASH_LOOP_LOGS)]
#[case::step_timeout(
    "timeout",
    Outcome::TimedOut,
    "The step Simulate was ended because it ran for longer than its timeout of 5s."
)]
fn a_step_that_ends_otherwise_ends_its_job(
    #[case] how: &str,
    #[case] outcome: Outcome,
    #[case] logs: &str,
) {
    let mut story = Story::new(
        r#"[{"task": "a"}, {"task": "b", "title": "Simulate", "timeout_sec": 5,
             "delivery_limit": 1, "retry": {"attempts": 3}}]"#,
    );
    story.submit();
    story.start();
    story.result(Some("<esdl id='one'/>"));
    story.start();
    if how == "timeout" {
        story.second += 5;
        story.tell(&Command::TimeOut);
    } else {
        story.start();
        let told = story.start();
        assert!(!told.is_empty());
    }
    let State::Ending(ending) = &story.state else {
        panic!("{:?}", story.state);
    };
    assert_eq!(ending.ended.outcome, outcome);
    let report = story.course().current.report.as_ref().unwrap();
    assert_eq!(report.outcome, outcome);
    assert_eq!(report.logs, logs);
}

#[test]
fn what_later_steps_wait_in_their_queues_does_not_count_against_the_timeout() {
    let mut story = Story::new(TWO);
    story.submit();
    story.start();
    story.second += 20;
    story.result(Some("<esdl id='one'/>"));
    story.second += 1000;
    assert_eq!(story.tell(&Command::TimeOut), ["it is within its timeout"]);
    story.start();
    story.second += 35;
    assert_eq!(story.tell(&Command::TimeOut), ["it is within its timeout"]);
    story.second += 5;
    let told = story.tell(&Command::TimeOut);
    assert_eq!(told[0], "revoke 123");
    assert_eq!(told[1], "Cancelled");
    assert!(
        told[2].contains("=== step 2 of 2, Simulate: timed out ==="),
        "{told:?}"
    );
    assert!(
        told[2].contains("longer than its timeout of 1m"),
        "{told:?}"
    );
}

#[test]
fn a_client_hears_once_for_each_step_that_nobody_takes_it() {
    let mut story = Story::new(TWO);
    let text = "Waiting: no worker for this workflow is connected.";
    story.submit();
    assert_eq!(
        story.tell(&Command::NoWorker),
        [format!("0 Optimise: {text}")]
    );
    assert_eq!(story.tell(&Command::NoWorker).len(), 1);
    story.start();
    let not = "the job does not wait, or its client knows";
    assert_eq!(story.tell(&Command::NoWorker), [not]);
    story.result(Some("<esdl id='one'/>"));
    assert_eq!(
        story.tell(&Command::NoWorker),
        [format!("0.75 Simulate: {text}")]
    );
    assert_eq!(story.tell(&Command::NoWorker), [not]);
}

#[test]
fn series_that_are_not_to_be_kept_are_retired_with_the_success() {
    let mut story = Story::new(
        r#"[{"task": "a", "keep_time_series": false}, {"task": "b", "keep_time_series": false},
            {"task": "c"}]"#,
    );
    story.submit();
    story.start();
    story.result(Some("<esdl id='one'/>"));
    story.result(Some("<esdl id='last'/>"));
    let told = story.result(Some("<esdl id='last'/>"));
    assert_eq!(
        told[1..],
        [
            r#"RetireThese(["one"])"#,
            r#"Keep { esdl_id: "last", reference: "ref" }"#
        ]
    );
}

/// Where the orchestrator dies while it handles a message.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Death {
    Never,
    /// What is published is out, and nothing is committed.
    AfterPublish,
    /// The client has not been told, and the message comes again.
    AfterCommit,
    AfterTelling,
}

#[derive(Debug, Clone)]
enum Happening {
    Submission,
    Cancel,
    /// A worker takes a task from the queues.
    Taken(Index),
    /// Its worker dies, and the task goes back.
    Died(Index),
    /// A worker ends a task.
    Done(Index, Answer),
    /// A message is handled, and is not delivered again unless the orchestrator dies or `twice`.
    Delivered(Index, Death, bool),
    Seconds(i64),
    /// Tasks have to wait for their turn from now on, or no longer.
    Limits(bool),
    /// A task that waits for its turn is granted it, and handed over.
    Granted(Death),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Answer {
    Success,
    Error,
    NoOutput,
}

fn death() -> impl Strategy<Value = Death> {
    prop_oneof![
        6 => Just(Death::Never),
        1 => Just(Death::AfterPublish),
        1 => Just(Death::AfterCommit),
        1 => Just(Death::AfterTelling),
    ]
}

fn happening() -> impl Strategy<Value = Happening> {
    let index = any::<Index>;
    let answer = prop_oneof![
        4 => Just(Answer::Success),
        3 => Just(Answer::Error),
        1 => Just(Answer::NoOutput),
    ];
    prop_oneof![
        2 => Just(Happening::Submission),
        1 => Just(Happening::Cancel),
        6 => index().prop_map(Happening::Taken),
        1 => index().prop_map(Happening::Died),
        6 => (index(), answer).prop_map(|(task, answer)| Happening::Done(task, answer)),
        12 => (index(), death(), prop::bool::weighted(0.2))
            .prop_map(|(message, death, twice)| Happening::Delivered(message, death, twice)),
        2 => (1..30_i64).prop_map(Happening::Seconds),
        1 => any::<bool>().prop_map(Happening::Limits),
        4 => death().prop_map(Happening::Granted),
    ]
}

/// The steps of the stories: each kind of what may follow a failure.
const STEPS: &str = r#"[
    {"task": "a", "retry": {"attempts": 2, "wait_sec": 5}, "on_error": "continue"},
    {"task": "b", "timeout_sec": 20, "on_error": {"fallback": {"task": "c",
        "retry": {"attempts": 2}}}},
    {"task": "d", "delivery_limit": 1}
]"#;

struct World {
    catalogue: Catalogue,
    second: i64,
    count: u128,
    state: State,
    /// The kept input in the database.
    kept: Option<String>,
    /// Messages for the orchestrator.
    messages: Vec<Command>,
    /// In the workers' queues, by task id.
    queued: Vec<String>,
    running: Vec<String>,
    revoked: BTreeSet<String>,
    /// The input of each task that was published.
    inputs: BTreeMap<String, String>,
    /// What the first attempt of each step is to get.
    expected: BTreeMap<usize, String>,
    /// The tasks that have been a job's current one, by step and fallback.
    accepted: BTreeMap<(usize, usize), BTreeSet<String>>,
    results: Vec<String>,
    last_progress: f64,
    statuses: Vec<ClientStatus>,
    deaths: usize,
    /// How often the submission has been handled.
    submissions: usize,
    limited: bool,
}

impl World {
    fn new() -> World {
        World {
            catalogue: catalogue(STEPS),
            second: 1000,
            count: 100,
            state: State::Unknown,
            kept: None,
            messages: Vec::new(),
            queued: Vec::new(),
            running: Vec::new(),
            revoked: BTreeSet::new(),
            inputs: BTreeMap::new(),
            expected: BTreeMap::from([(0, INPUT.to_owned())]),
            accepted: BTreeMap::new(),
            results: Vec::new(),
            last_progress: 0.0,
            statuses: Vec::new(),
            deaths: 0,
            submissions: 0,
            limited: false,
        }
    }

    fn run(&mut self, happening: &Happening) {
        match happening {
            Happening::Submission => self.messages.push(Command::Submit(Submission {
                workflow_type: "w".to_owned(),
                esdl: INPUT.to_owned(),
                params: Map::new(),
                reference: None,
                priority: Priority::Medium,
                timeout_ms: Some(200_000),
                sender: None,
                requested: None,
            })),
            Happening::Cancel => self.messages.push(Command::Cancel(Origin::default())),
            Happening::Taken(index) if !self.queued.is_empty() => {
                let task = self.queued.remove(index.index(self.queued.len()));
                self.take(task);
            }
            Happening::Died(index) if !self.running.is_empty() => {
                let task = self.running.remove(index.index(self.running.len()));
                self.queued.push(task);
            }
            Happening::Done(index, answer) if !self.running.is_empty() => {
                let task = self.running.remove(index.index(self.running.len()));
                self.end(task, *answer);
            }
            Happening::Delivered(index, death, twice) if !self.messages.is_empty() => {
                let message = self.messages.remove(index.index(self.messages.len()));
                if *twice || *death != Death::Never {
                    self.messages.push(message.clone());
                }
                self.handle(&message, *death);
            }
            Happening::Seconds(seconds) => {
                self.second += seconds;
                for finding in [
                    Command::TakeTurn { grant: None },
                    Command::TimeOut,
                    Command::NoWorker,
                ] {
                    self.handle(&finding, Death::Never);
                }
            }
            Happening::Limits(limited) => self.limited = *limited,
            Happening::Granted(death) => self.grant(*death),
            Happening::Taken(_)
            | Happening::Died(_)
            | Happening::Done(..)
            | Happening::Delivered(..) => {}
        }
    }

    /// What the granting thread does, and what it does about a grant that somebody died over.
    fn grant(&mut self, death: Death) {
        let at = at(self.second);
        let turn = self.state.job_mut().and_then(|job| {
            let course = job.course.as_mut()?;
            course.turn_to_come()?;
            course.turn.as_mut()
        });
        let Some(turn) = turn else {
            return;
        };
        self.count += 1;
        match &mut turn.grant {
            None => {
                let task_id = Uuid::from_u128(self.count);
                turn.grant = Some(Grant { at, task_id });
            }
            Some(grant) => {
                let task = grant.task_id.to_string();
                let says = |message: &Command| message.task_id() == Some(&task);
                let may_be_there = self.queued.contains(&task)
                    || self.running.contains(&task)
                    || self.messages.iter().any(says);
                if may_be_there {
                    return;
                }
                grant.at = at;
            }
        }
        self.handle(&Command::TakeTurn { grant: Some(at) }, death);
    }

    fn take(&mut self, task_id: String) {
        if self.revoked.contains(&task_id) {
            return;
        }
        self.count += 1;
        self.messages.push(Command::Start {
            task_id: task_id.clone(),
            message_id: Some(format!("start {}", self.count)),
            redelivered: false,
        });
        self.running.push(task_id);
    }

    fn end(&mut self, task_id: String, answer: Answer) {
        self.count += 1;
        self.messages.push(Command::Progress {
            task_id: task_id.clone(),
            fraction: 0.5,
            message: String::new(),
        });
        self.messages.push(Command::Result(Completion {
            succeeded: answer != Answer::Error,
            output_esdl: (answer == Answer::Success)
                .then(|| format!("<esdl id='{task_id} {}'/>", self.count)),
            task_id,
            logs: String::new(),
            esdl_messages: Vec::new(),
        }));
    }

    fn handle(&mut self, command: &Command, death: Death) {
        self.count += 1;
        let catalogue = self.catalogue.clone();
        let context = Context {
            now: at(self.second),
            session_begun: None,
            new_task_id: Uuid::from_u128(self.count),
            catalogue: &catalogue,
            is_closed: &|_| false,
            has_limits: &|_| self.limited,
            rules: &RULES,
        };
        self.deaths += usize::from(death != Death::Never);
        self.submissions += usize::from(matches!(command, Command::Submit(_)));
        let decision = decide(job_id(), &self.state, command, &context);
        let sent = self.publish(&decision.publications);
        if death == Death::AfterPublish {
            return;
        }
        if let Some(next) = &decision.next {
            self.commit(next.clone(), command);
        }
        let current = self.state.job().and_then(|job| job.task_id.clone());
        for task in sent {
            assert_eq!(Some(&task), current.as_ref(), "two tasks at once");
        }
        if death == Death::AfterCommit {
            return;
        }
        self.publish(&decision.announcements);
        if death != Death::AfterTelling
            && !decision.announcements.is_empty()
            && let State::Ending(ending) = &self.state
        {
            self.state = State::Ended(ending.ended.clone());
            self.kept = None;
        }
    }

    /// Returns the tasks among them.
    fn publish(&mut self, publications: &[Publication<'_>]) -> Vec<String> {
        let mut tasks = Vec::new();
        for publication in publications {
            match publication {
                Publication::Task {
                    task_id,
                    assignment,
                    ..
                } => {
                    let input = match &assignment.input {
                        TaskInput::Given(esdl) => (*esdl).to_owned(),
                        TaskInput::Held(esdl) => esdl.to_string(),
                        TaskInput::Kept => self.kept.clone().expect("an input"),
                    };
                    let task = task_id.to_string();
                    let before = self.inputs.insert(task.clone(), input);
                    // Of one that was granted nobody may know whether it is on its queue.
                    let is_known = self.queued.contains(&task) || self.running.contains(&task);
                    assert!(before.is_none() || !is_known, "one task twice");
                    self.queued.push(task.clone());
                    tasks.push(task);
                }
                Publication::Revoke { task_id } => {
                    self.revoked.insert(task_id.to_string());
                    self.running.retain(|task| task != task_id);
                }
                Publication::Status { status, .. } => self.statuses.push(*status),
                Publication::Progress { fraction, .. } => {
                    // What was told and not committed may have been more.
                    let falls = *fraction < self.last_progress;
                    assert!(!falls || self.deaths > 0, "progress falls");
                    self.last_progress = *fraction;
                }
                Publication::Result {
                    result_type, logs, ..
                } => self.results.push(format!("{result_type:?} {logs}")),
            }
        }
        tasks
    }

    fn commit(&mut self, mut next: State, command: &Command) {
        let before = self.state.job().and_then(|job| job.course.clone());
        if let Some(course) = next.job_mut().and_then(|job| job.course.as_mut()) {
            // As it is written, and read the next time.
            course.input = match &course.input {
                Input::New(esdl) => {
                    self.kept = Some(esdl.to_string());
                    Input::Kept
                }
                Input::Kept => Input::Kept,
                Input::NotKept => {
                    self.kept = None;
                    Input::NotKept
                }
            };
            self.check(before.as_deref(), course, command);
        }
        self.state = next;
    }

    fn check(&mut self, before: Option<&Course>, after: &Course, command: &Command) {
        let Position { step, fallback, .. } = after.current.position;
        if let Some(before) = before.filter(|one| one.current.position.step < step) {
            let output = match command {
                Command::Result(Completion {
                    succeeded: true,
                    output_esdl: Some(output),
                    ..
                }) => output.clone(),
                _ => self.expected[&before.current.position.step].clone(),
            };
            self.expected.insert(step, output);
        }
        if let Some(task) = &after.current.task_id {
            assert_eq!(
                self.inputs[task], self.expected[&step],
                "input of step {step}"
            );
            let accepted = self.accepted.entry((step, fallback)).or_default();
            accepted.insert(task.clone());
            let attempts = after.steps.get(step, fallback).unwrap().attempts;
            assert!(
                accepted.len() <= usize::try_from(attempts).unwrap(),
                "too many attempts"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        cases: 500,
        ..ProptestConfig::default()
    })]

    /// Whatever the order, however often delivered, wherever the orchestrator or a worker dies: one
    /// task at a time, each step the output of the one before, no more attempts than allowed, and
    /// one outcome.
    #[test]
    fn any_story_of_steps_ends_in_one_outcome(story in prop::collection::vec(happening(), 0..80)) {
        let mut world = World::new();
        for happening in &story {
            world.run(happening);
        }
        world.run(&Happening::Submission);
        // The rest of the story: all is delivered, all tasks are done.
        for _ in 0..200 {
            while let Some(message) = world.messages.pop() {
                world.handle(&message, Death::Never);
            }
            world.run(&Happening::Seconds(1));
            world.run(&Happening::Granted(Death::Never));
            while let Some(task) = world.queued.pop() {
                world.take(task);
            }
            while let Some(task) = world.running.pop() {
                world.end(task, Answer::Success);
            }
        }
        prop_assert!(matches!(world.state, State::Ended(_)), "{:?}", world.state);
        prop_assert!(world.kept.is_none());
        prop_assert!((1..=1 + world.deaths).contains(&world.results.len()), "{:?}", world.results);
        let outcomes: BTreeSet<_> = world.results.iter().collect();
        prop_assert!(outcomes.len() == 1, "{outcomes:?}");
        let count = |status| world.statuses.iter().filter(|one| **one == status).count();
        // Told once more with each submission while its task is not started.
        prop_assert!(count(ClientStatus::Enqueued) <= world.submissions);
        let mut after = world.statuses.iter().skip_while(|one| **one != ClientStatus::Running);
        prop_assert!(world.deaths > 0 || !after.any(|one| *one == ClientStatus::Enqueued));
        prop_assert!(count(ClientStatus::Running) <= 1 + world.deaths);
    }
}

#[test]
fn a_lost_task_is_an_error_of_its_step() {
    let mut story = Story::new(
        r#"[{"task": "a", "on_error": {"fallback": {"task": "b"}}}, {"task": "c", "title": "C"}]"#,
    );
    let lost = |story: &Story| Command::TaskLost {
        task_id: story.task(),
        since: Timestamp::from_second(story.second).unwrap(),
    };
    story.submit();
    let waits = lost(&story);
    assert_eq!(story.tell(&waits), ["its task was put on its queue since"]);
    story.start();
    story.second += 1;
    let gone = lost(&story);
    let told = story.tell(&gone);
    assert!(told[0].contains(" for b:"), "{told:?}");
    assert_eq!(story.tell(&gone), ["it is of an attempt that has ended"]);
    story.start();
    story.result(Some("<esdl id='one'/>"));
    story.start();
    story.second += 1;
    let gone = lost(&story);
    let told = story.tell(&gone).join(" ");
    assert!(told.contains("=== step 2 of 2, C: lost ==="), "{told}");
}

/// It was purged from its queue, say, before a worker has begun it.
#[test]
fn a_task_that_is_lost_in_its_queue_is_an_error_of_its_step() {
    let mut story = Story::new(
        r#"[{"task": "a", "on_error": {"fallback": {"task": "b"}}}, {"task": "c", "title": "C"}]"#,
    );
    let lost = |story: &Story| Command::TaskLost {
        task_id: story.task(),
        since: Timestamp::from_second(story.second).unwrap(),
    };
    story.submit();
    story.second += 1;
    let gone = lost(&story);
    let told = story.tell(&gone);
    assert!(told[0].contains(" for b:"), "{told:?}");
    assert_eq!(story.tell(&gone), ["it is of an attempt that has ended"]);
    story.start();
    story.result(Some("<esdl id='one'/>"));
    story.second += 1;
    let gone = lost(&story);
    let told = story.tell(&gone).join(" ");
    assert!(told.contains("=== step 2 of 2, C: lost ==="), "{told}");
    assert!(told.contains("lost before a worker began it"), "{told}");
}

#[rstest]
#[case::kept(true, Some("no solution"))]
#[case::not_kept(false, None)]
fn why_an_attempt_failed_is_of_all_its_logs(#[case] keep_logs: bool, #[case] why: Option<&str>) {
    let rules = Rules {
        keep_logs,
        ..RULES.clone()
    };
    let context = Context {
        now: at(1),
        session_begun: None,
        new_task_id: Uuid::nil(),
        catalogue: &catalogue(TWO),
        is_closed: &|_| false,
        has_limits: &|_| false,
        rules: &rules,
    };
    let completion = Completion {
        task_id: String::new(),
        succeeded: false,
        output_esdl: None,
        logs: format!("no solution\n{}", "and more\n".repeat(100_000)),
        esdl_messages: Vec::new(),
    };
    let report = Report::of(&completion, Outcome::Failed, 1, &context);
    assert!(!report.logs.contains("no solution"));
    assert_eq!(report.why.as_deref(), why);
}
