//! The table of every pair of state and command, and the laws that hold for any sequence.

use std::collections::BTreeSet;
use std::fmt::Write;

use proptest::prelude::*;
use rstest::rstest;
use serde_json::Map;

use super::*;

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

fn context(known_workflow: &dyn Fn(&str) -> bool) -> Context<'_> {
    Context {
        now: at(100),
        new_task_id: new_task(),
        known_workflow,
        delivery_limit: 2,
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
        starts: running
            .then(|| Start {
                at: at(3),
                message_id: Some("start-1".to_owned()),
            })
            .into_iter()
            .collect(),
    }
}

fn ended(outcome: Outcome) -> State {
    State::Ended(job(JobStatus::Running).ended(outcome, 7, at(50)))
}

fn submission(workflow: &str) -> Command {
    Command::Submit(Submission {
        workflow_type: workflow.to_owned(),
        esdl: "<esdl/>".to_owned(),
        params: Map::new(),
        reference: Some("ref".to_owned()),
        priority: Priority::Medium,
        timeout_ms: Some(1000),
    })
}

fn start_of(task: &str, message: &str) -> Command {
    Command::Start {
        task_id: task.to_owned(),
        message_id: Some(message.to_owned()),
        redelivered: false,
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
    Command::Result {
        task_id: task.to_owned(),
        succeeded,
        output_esdl: Some(OUTPUT.to_owned()),
        logs: "logs".to_owned(),
        esdl_messages: Vec::new(),
    }
}

fn fail_of(task: Option<&str>) -> Command {
    Command::Fail {
        reason: "broken".to_owned(),
        task_id: task.map(str::to_owned),
    }
}

fn states() -> Vec<(&'static str, State)> {
    let noted = cancel(job_id(), &State::Unknown, &context(&|_| true)).next;
    let mut crashed_once = job(JobStatus::Running);
    crashed_once.starts.push(Start {
        at: at(4),
        message_id: Some("start-2".to_owned()),
    });
    vec![
        ("unknown", State::Unknown),
        ("registered", State::Live(job(JobStatus::Registered))),
        ("submitted", State::Live(job(JobStatus::Submitted))),
        ("running", State::Live(job(JobStatus::Running))),
        ("started twice", State::Live(crashed_once)),
        ("succeeded", ended(Outcome::Succeeded)),
        ("failed", ended(Outcome::Failed)),
        ("cancelled", ended(Outcome::Cancelled)),
        ("crash loop", ended(Outcome::CrashLoop)),
        ("rejected", ended(Outcome::Rejected)),
        ("cancel noted", noted.unwrap()),
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
        ("cancel", Command::Cancel),
        ("start", start_of(TASK, "start-3")),
        ("start again delivered", start_of(TASK, "start-1")),
        ("start of other task", start_of(OTHER_TASK, "start-3")),
        ("progress", progress_of(TASK, 0.5)),
        ("progress NaN", progress_of(TASK, f64::NAN)),
        ("progress of other task", progress_of(OTHER_TASK, 0.5)),
        ("result", result_of(TASK, true)),
        ("error result", result_of(TASK, false)),
        ("result of other task", result_of(OTHER_TASK, true)),
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
        event => format!("{event:?}").replace(&new_task().to_string(), "new task"),
    };
    for publication in &decision.publications {
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
        write!(text, "; {one}").unwrap();
    }
    match &decision.time_series {
        None => {}
        Some(TimeSeries::Keep { esdl_id, .. }) => write!(text, "; keep {esdl_id}").unwrap(),
        Some(TimeSeries::RetireLate { esdl_id, .. }) => write!(text, "; retire {esdl_id}").unwrap(),
        Some(TimeSeries::Retire) => text.push_str("; retire the job's"),
    }
    match &decision.next {
        None => {}
        Some(State::Unknown) => text.push_str(" -> unknown"),
        Some(State::Live(job)) => {
            write!(text, " -> {:?}, {} starts", job.status, job.starts.len()).unwrap();
        }
        Some(State::Ended(ended)) => write!(text, " -> ended {:?}", ended.outcome).unwrap(),
    }
    text
}

#[test]
fn every_pair_of_state_and_command_has_its_decision() {
    let known = |workflow: &str| workflow == "simulator";
    let mut table = String::new();
    for (command_name, command) in commands() {
        writeln!(table, "{command_name}").unwrap();
        for (state_name, state) in states() {
            let decision = decide(job_id(), &state, &command, &context(&known));
            writeln!(table, "  {state_name}: {}", summary(&decision)).unwrap();
        }
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
    let decision = decide(job_id(), &State::Unknown, &command, &context(&|_| true));
    let expected = Job {
        workflow_type: "simulator".to_owned(),
        reference: "ref".to_owned(),
        status: JobStatus::Submitted,
        task_id: Some(new_task().to_string()),
        registered_at: at(100),
        submitted_at: Some(at(100)),
        running_at: None,
        timeout_ms: Some(1000),
        starts: Vec::new(),
    };
    assert_eq!(decision.next, Some(State::Live(expected)));
}

#[test]
fn a_job_left_registered_keeps_the_time_it_was_registered() {
    let state = State::Live(job(JobStatus::Registered));
    let command = submission("simulator");
    let decision = decide(job_id(), &state, &command, &context(&|_| true));
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
    let decision = decide(
        job_id(),
        &State::Live(running),
        &command,
        &context(&|_| true),
    );
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
    let decision = decide(job_id(), &state, &command, &context(&|_| true));
    assert_eq!(decision.next.is_some(), counts, "{decision:?}");
}

#[test]
fn the_crash_loops_text_is_what_clients_compare() {
    let mut state = job(JobStatus::Running);
    state.starts.push(state.starts[0].clone());
    let command = start_of(TASK, "start-3");
    let decision = decide(job_id(), &State::Live(state), &command, &context(&|_| true));
    let Publication::Result { logs, .. } = &decision.publications[1] else {
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
    let decision = decide(job_id(), &State::Unknown, &command, &context(&|_| false));
    let [Publication::Result { logs, .. }] = decision.publications.as_slice() else {
        panic!("{decision:?}");
    };
    assert_eq!(
        logs,
        "Workflow type no_such_workflow is unknown by orchestrator at the time this submission \
         was received."
    );
}

#[test]
fn the_history_tells_the_jobs_whole_story() {
    let command = result_of(TASK, true);
    let state = State::Live(job(JobStatus::Running));
    let decision = decide(job_id(), &state, &command, &context(&|_| true));
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
        result_bytes: i64::try_from(OUTPUT.len() + "logs".len()).unwrap(),
    };
    assert_eq!(decision.next, Some(State::Ended(expected)));
}

/// What the world does in a random story of one job.
#[derive(Debug, Clone)]
enum Happening {
    /// The submission is delivered, for the first time or again.
    Submission,
    Cancel,
    /// A worker takes the oldest task that is published and not revoked, and starts it.
    TaskTaken,
    /// An event that some task has sent is delivered again.
    Redelivered(usize),
    Progress(usize),
    Finished(usize),
    /// The orchestrator dies after it has published and before it has committed.
    CrashBeforeCommit(Box<Happening>),
}

fn happening() -> impl Strategy<Value = Happening> {
    let simple = prop_oneof![
        3 => Just(Happening::Submission),
        1 => Just(Happening::Cancel),
        4 => Just(Happening::TaskTaken),
        2 => any::<usize>().prop_map(Happening::Redelivered),
        2 => any::<usize>().prop_map(Happening::Progress),
        3 => any::<usize>().prop_map(Happening::Finished),
    ]
    .boxed();
    prop_oneof![
        4 => simple.clone(),
        1 => simple.prop_map(|inner| Happening::CrashBeforeCommit(Box::new(inner))),
    ]
}

/// The job as the database has it, and what clients and workers have been told.
#[derive(Default)]
struct World {
    state: Option<State>,
    tasks: u128,
    waiting: Vec<String>,
    taken: Vec<String>,
    revoked: BTreeSet<String>,
    sent: Vec<Command>,
    /// Results told to the client, those of decisions that were committed apart.
    results: Vec<ResultType>,
    committed_results: Vec<ResultType>,
}

impl World {
    fn run(&mut self, happening: &Happening, commit: bool) {
        let command = match happening {
            Happening::Submission => submission("simulator"),
            Happening::Cancel => Command::Cancel,
            Happening::TaskTaken => {
                if self.waiting.is_empty() {
                    return;
                }
                let task = self.waiting.remove(0);
                if self.revoked.contains(&task) {
                    return;
                }
                self.taken.push(task.clone());
                start_of(&task, &format!("start of {task}"))
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
            Happening::Redelivered(which) => {
                let Some(command) = self.sent.get(which % self.sent.len().max(1)) else {
                    return;
                };
                command.clone()
            }
            Happening::CrashBeforeCommit(inner) => {
                self.run(inner, false);
                // What was not acknowledged comes again.
                return;
            }
        };
        if !matches!(command, Command::Submit(_) | Command::Cancel) {
            self.sent.push(command.clone());
        }
        self.apply(&command, commit);
        if !commit {
            self.apply(&command, true);
        }
    }

    fn apply(&mut self, command: &Command, commit: bool) {
        self.tasks += 1;
        let known_workflow = |_: &str| true;
        let context = Context {
            now: at(100),
            new_task_id: Uuid::from_u128(self.tasks),
            known_workflow: &known_workflow,
            delivery_limit: 1,
        };
        let state = self.state.clone().unwrap_or(State::Unknown);
        let decision = decide(job_id(), &state, command, &context);
        for publication in &decision.publications {
            match publication {
                Publication::Task { task_id, .. } => self.waiting.push(task_id.to_string()),
                Publication::Revoke { task_id } => {
                    self.revoked.insert(task_id.to_string());
                }
                Publication::Result { result_type, .. } => {
                    self.results.push(*result_type);
                    if commit {
                        self.committed_results.push(*result_type);
                    }
                }
                Publication::Status { .. } | Publication::Progress { .. } => {}
            }
        }
        if commit && let Some(next) = decision.next {
            self.state = Some(next);
        }
    }

    fn current_task(&self) -> Option<&str> {
        match &self.state {
            Some(State::Live(job)) => job.task_id.as_deref(),
            Some(State::Ended(_) | State::Unknown) | None => None,
        }
    }

    /// Every task that began and is not the current one has been told to end, or has delivered.
    fn strays(&self) -> Vec<&String> {
        let delivered = match &self.state {
            Some(State::Ended(ended)) => ended.task_id.as_deref(),
            Some(State::Live(_) | State::Unknown) | None => None,
        };
        self.taken
            .iter()
            .filter(|task| {
                !self.revoked.contains(*task)
                    && self.current_task() != Some(task)
                    && delivered != Some(task)
            })
            .collect()
    }
}

proptest! {
    /// Whatever the order, however often delivered, wherever the orchestrator dies: once all is
    /// said and done the job has ended, with one outcome, and nothing runs that nobody waits for.
    #[test]
    fn any_story_ends_in_one_outcome(story in prop::collection::vec(happening(), 0..40)) {
        let mut world = World::default();
        for happening in &story {
            world.run(happening, true);
            prop_assert!(world.strays().is_empty(), "{:?} run on", world.strays());
        }
        // The rest of the story: the submission arrives, workers take what is waiting and finish.
        world.run(&Happening::Submission, true);
        while !world.waiting.is_empty() {
            world.run(&Happening::TaskTaken, true);
        }
        if let Some(task) = world.current_task().map(str::to_owned) {
            world.apply(&result_of(&task, true), true);
        }
        prop_assert!(matches!(world.state, Some(State::Ended(_))), "{:?}", world.state);
        prop_assert_eq!(world.committed_results.len(), 1);
        let outcomes: BTreeSet<_> = world.results.iter().map(|one| format!("{one:?}")).collect();
        prop_assert_eq!(outcomes.len(), 1, "{:?}", world.results);
        prop_assert!(world.strays().is_empty());
    }
}
