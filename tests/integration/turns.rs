//! Tasks that wait for their turn: limits, fair turns, operators' commands, and that no task is lost
//! or put on its queue twice, whatever is killed.

use std::collections::BTreeSet;
use std::fs;
use std::iter;
use std::path::PathBuf;

use omotes_orchestrator::wire::{job_result::ResultType, job_status_update::JobStatus};
use rstest::rstest;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::crashes::Held;
use crate::harness::deployment::{Deployment, Server, Service, eventually};
use crate::harness::peers::{Client, Task, Worker};
use crate::harness::pooler::Pooler;

pub const TASK: &str = "workflow_1";

pub const HELD: &str = "SELECT count(*) FROM job_turn JOIN job USING (job_id)
                    WHERE granted_at IS NULL AND status = 'REGISTERED'";

/// Rows that say of turns what no job needs any more.
const LEFT: &str = "SELECT (SELECT count(*) FROM job_input) + (SELECT count(*) FROM job_turn)";

/// A client and a worker, on a deployment whose one workflow has these keys.
pub struct Scene {
    pub deployment: Deployment,
    pub client: Client,
    pub worker: Worker,
    file: PathBuf,
}

impl Scene {
    pub fn new(keys: &Value) -> Scene {
        Scene::on(Deployment::new(), keys)
    }

    pub fn on(deployment: Deployment, keys: &Value) -> Scene {
        let file = deployment.folder.join("workflows.json");
        let mut workflow = json!({
            "workflow_type_name": TASK, "workflow_type_description_name": "One",
        });
        let keys = keys.as_object().unwrap().clone();
        workflow.as_object_mut().unwrap().extend(keys);
        let other = json!({
            "workflow_type_name": "chain", "workflow_type_description_name": "Chain",
            "steps": [{"task": "first"}, {"task": TASK}],
        });
        fs::write(&file, json!([workflow, other]).to_string()).unwrap();
        Scene {
            client: Client::new(&deployment),
            worker: Worker::new(&deployment, TASK),
            file,
            deployment,
        }
    }

    pub fn variables(&self) -> [(&'static str, &str); 3] {
        [
            ("WORKFLOW_CONFIG_PATH", self.file.to_str().unwrap()),
            ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
            ("OUTCOME_DELAY_MS", "0"),
        ]
    }

    pub(crate) fn start(&self) -> Service {
        self.deployment.start_with(&self.variables())
    }

    /// What a command says, and whether it succeeds.
    fn run(&self, arguments: &[&str]) -> (bool, String) {
        let mut command = self.deployment.command(arguments);
        let output = command.envs(self.variables()).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).unwrap())
    }

    pub(crate) fn does(&self, arguments: &[&str]) -> String {
        let (succeeded, said) = self.run(arguments);
        assert!(succeeded, "{arguments:?}: {said}");
        said
    }

    /// A job whose reference says whose it is.
    pub fn submit_as(&self, owner: &str) -> Uuid {
        let (job, mut submission) = self.client.submission(TASK);
        self.client.listen(job);
        submission.job_reference = Some(format!("{owner}/a job"));
        self.client.send(&submission);
        // Handlers may take the next one first.
        let known = format!("SELECT count(*) FROM job WHERE job_id = '{job}'");
        self.deployment.comes_to(1, &known);
        job
    }

    pub fn submit(&self, count: usize) -> Vec<Uuid> {
        (0..count).map(|_| self.submit_as("owner")).collect()
    }

    pub fn held(&self, count: i64) {
        self.deployment.comes_to(count, HELD);
    }

    pub fn runs(&self) -> Task {
        let task = self.worker.take();
        self.worker.start(&task);
        task
    }

    pub fn ends(&self, task: &Task) {
        self.worker.succeed(task, "<e id='out'/>");
        assert_eq!(self.client.outcome(task.job).0, ResultType::Succeeded);
    }

    /// The task that runs has no copy, and the next one has its turn after it.
    fn both_go_through(&self, running: &Task, next: Uuid) {
        // A replica that is killed may have told it, and not know.
        let told = iter::from_fn(|| match self.client.status(running.job) {
            JobStatus::Enqueued => Some(()),
            JobStatus::Running => None,
            other => panic!("{other:?}"),
        });
        assert!((1..=2).contains(&told.count()));
        assert_eq!(self.worker.waiting(), 0);
        self.ends(running);
        let task = self.runs();
        assert_eq!(task.job, next);
        self.ends(&task);
        self.nothing_is_left();
    }

    pub fn nothing_is_left(&self) {
        self.deployment.no_jobs_left();
        self.deployment.comes_to(0, LEFT);
    }
}

#[test]
fn so_many_wait_in_rabbitmq_as_the_window_has_room_for() {
    let scene = Scene::new(&json!({"window": 2}));
    let _service = scene.start();
    let jobs = scene.submit(4);
    for job in &jobs {
        assert_eq!(scene.client.status(*job), JobStatus::Enqueued);
    }
    scene.held(2);
    eventually("two tasks", || (scene.worker.waiting() == 2).then_some(()));
    let first = scene.runs();
    assert_eq!(scene.client.status(first.job), JobStatus::Running);
    scene.held(1);
    let second = scene.runs();
    scene.held(0);
    assert_eq!(
        BTreeSet::from([first.job, second.job]),
        jobs[..2].iter().copied().collect()
    );
    scene.ends(&first);
    scene.ends(&second);
    for _ in &jobs[2..] {
        let task = scene.runs();
        assert!(jobs[2..].contains(&task.job));
        scene.ends(&task);
    }
    scene.nothing_is_left();
}

#[test]
fn no_more_run_than_there_are_seats() {
    let scene = Scene::new(&json!({"max_running": 1}));
    let _services = [scene.start(), scene.start(), scene.start()];
    let jobs = scene.submit(5);
    let mut done = BTreeSet::new();
    for count in (0..jobs.len()).rev() {
        let task = scene.worker.take();
        scene.held(i64::try_from(count).unwrap());
        scene.worker.start(&task);
        assert_eq!(scene.worker.waiting(), 0);
        scene.ends(&task);
        done.insert(task.job);
    }
    assert_eq!(done, jobs.into_iter().collect());
    scene.nothing_is_left();
}

#[test]
fn a_paused_queue_keeps_all_until_it_is_resumed() {
    let scene = Scene::new(&json!({}));
    let service = scene.start();
    let before = scene.submit(1);
    let task = scene.runs();
    assert_eq!(task.job, before[0]);
    assert_eq!(
        scene.does(&["workflows", "pause", TASK]),
        "workflow_1: paused\n"
    );
    service.logged("limits of task queues: workflow_1 paused");
    let jobs = scene.submit(3);
    scene.held(3);
    // What runs goes on.
    scene.ends(&task);
    service.kill();
    let service = scene.start();
    assert_eq!(scene.worker.waiting(), 0);
    let sql = "UPDATE job_turn SET held_at = held_at - interval '3 hours' WHERE job_id = $1";
    scene.deployment.sql().execute(sql, &[&jobs[1]]).unwrap();
    let shown = scene.does(&["workflows", "limits"]);
    assert!(
        shown.contains("OLDEST WAITS") && shown.contains("  3 h"),
        "{shown}"
    );
    // By whom, and since when, follows.
    let line = shown
        .lines()
        .find(|line| line.trim().starts_with("workflow_1  paused  paused by "));
    let mut words = line.expect(&shown).split_whitespace();
    assert!(words.any(|word| word == "3"), "{shown}");
    assert_eq!(
        scene.does(&["workflows", "resume", TASK]),
        "workflow_1: unlimited\n"
    );
    for _ in &jobs {
        let task = scene.runs();
        assert!(jobs.contains(&task.job));
        scene.ends(&task);
    }
    scene.nothing_is_left();
    drop(service);
}

#[test]
fn what_was_handed_over_before_there_was_a_limit_counts() {
    let scene = Scene::new(&json!({}));
    let service = scene.start();
    scene.submit(2);
    let running = scene.runs();
    scene.does(&["workflows", "limit", TASK, "--max-running", "2"]);
    service.logged("2 running");
    eventually("both are counted", || {
        let shown = scene.does(&["workflows", "limits"]);
        let row = shown.lines().last().unwrap().to_owned();
        let figures: Vec<_> = row.split_whitespace().rev().take(4).collect();
        (figures == ["1", "1", "0", "0"]).then_some(())
    });
    scene.submit(1);
    scene.held(1);
    scene.ends(&running);
    let waiting = scene.runs();
    let held = scene.runs();
    scene.ends(&waiting);
    scene.ends(&held);
    scene.deployment.no_jobs_left();
}

/// What comes first after a start finds the seat taken by a task that has never waited for one.
#[test]
fn a_limit_that_comes_with_a_restart_counts_what_runs() {
    let scene = Scene::new(&json!({}));
    let service = scene.start();
    scene.submit(1);
    let running = scene.runs();
    scene
        .deployment
        .comes_to(1, "SELECT count(*) FROM job WHERE status = 'RUNNING'");
    assert!(service.stop().success());
    let job = scene.client.submit(TASK);
    let mut file: Value = serde_json::from_slice(&fs::read(&scene.file).unwrap()).unwrap();
    file[0]["max_running"] = json!(1);
    fs::write(&scene.file, file.to_string()).unwrap();
    let service = scene.start();
    service.logged(&format!("job {job} (a reference): accepted, and waits"));
    scene.held(1);
    let later = scene.submit(1)[0];
    scene.held(2);
    assert_eq!(scene.worker.waiting(), 0);
    scene.ends(&running);
    for job in [job, later] {
        let task = scene.runs();
        assert_eq!(task.job, job);
        scene.ends(&task);
    }
    scene.nothing_is_left();
}

#[test]
fn a_step_waits_for_its_turn_too() {
    let scene = Scene::new(&json!({"max_running": 1}));
    let first = Worker::new(&scene.deployment, "first");
    let _service = scene.start();
    scene.submit(1);
    let plain = scene.runs();
    let job = scene.client.submit("chain");
    let task = first.take();
    first.start(&task);
    first.succeed(&task, "<e id='one'/>");
    let (fraction, message) = scene.client.progress(job);
    assert_eq!(
        (fraction, message.as_str()),
        (0.5, "workflow_1: waiting for its turn")
    );
    assert_eq!(scene.worker.waiting(), 0);
    scene.ends(&plain);
    let message = scene.worker.take_message();
    assert_eq!(message.json()[0][2], "<e id='one'/>");
    let task = Task::of(&message);
    scene.worker.start(&task);
    scene.ends(&task);
    scene.nothing_is_left();
}

#[test]
fn a_job_that_waits_for_its_turn_can_be_cancelled() {
    let scene = Scene::new(&json!({"paused": true}));
    let _service = scene.start();
    let jobs = scene.submit(2);
    scene.held(2);
    scene.client.cancel(jobs[0]);
    assert_eq!(scene.client.status(jobs[0]), JobStatus::Enqueued);
    assert_eq!(scene.client.status(jobs[0]), JobStatus::Cancelled);
    assert_eq!(scene.client.outcome(jobs[0]).0, ResultType::Cancelled);
    let asked = scene.run(&["jobs", "cancel", "--reference", "owner/", "--state", "held"]);
    assert!(!asked.0);
    assert!(asked.1.contains("1 job would be cancelled"), "{}", asked.1);
    assert!(asked.1.contains(&jobs[1].to_string()), "{}", asked.1);
    let none = scene.does(&["jobs", "cancel", "--older-than", "2h", "--yes"]);
    assert!(none.contains("no job matches"), "{none}");
    scene.does(&["jobs", "cancel", "--reference", "owner/", "--yes"]);
    assert_eq!(scene.client.outcome(jobs[1]).0, ResultType::Cancelled);
    scene.nothing_is_left();
}

/// Killed at each point at which a task that has its turn is put on its queue: with a seat for one,
/// there is never a second one.
#[rstest]
#[case::before_publish("before publish", 1)]
#[case::after_publish("after publish", 1)]
#[case::after_publish_of_three("after publish", 3)]
#[case::after_commit("after commit", 1)]
fn a_turn_survives_a_kill(#[case] point: &str, #[case] replicas: usize) {
    let scene = Scene::new(&json!({"max_running": 1}));
    let service = scene.start();
    scene.does(&["workflows", "pause", TASK]);
    service.logged("workflow_1 paused");
    let jobs = scene.submit(2);
    scene.held(2);
    assert!(service.stop().success());
    let held = Held::at(point, &scene.deployment, &scene.variables());
    scene.does(&["workflows", "resume", TASK]);
    held.reached();
    let others: Vec<_> = (1..replicas).map(|_| scene.start()).collect();
    held.kill();
    let _next = others.is_empty().then(|| scene.start());
    // No worker is free for long enough that somebody takes it for forgotten.
    scene.deployment.comes_to(
        1,
        "SELECT count(*) FROM job_turn WHERE granted_at < clock_timestamp() - interval '13 s'",
    );
    let task = scene.worker.take();
    assert_eq!(task.job, jobs[0]);
    scene.worker.start(&task);
    scene.both_go_through(&task, jobs[1]);
}

/// Through a pooler replicas are told nothing, and look each second.
#[test]
fn a_turn_survives_a_kill_behind_a_pooler() {
    let scene = Scene::new(&json!({"max_running": 1}));
    let pooler = Pooler::before(&scene.deployment, 20);
    let through_it = pooler.variables();
    let through_it = through_it
        .iter()
        .map(|(name, value)| (*name, value.as_str()));
    let variables: Vec<_> = scene.variables().into_iter().chain(through_it).collect();
    let held = Held::at("after commit", &scene.deployment, &variables);
    let job = scene.client.submit(TASK);
    held.reached();
    held.kill();
    let _next = scene.deployment.start_with(&variables);
    let task = scene.runs();
    assert_eq!(task.job, job);
    scene.ends(&task);
}

/// There is room when it comes, and so its turn is granted with its submission.
#[rstest]
#[case("before publish")]
#[case("after publish")]
#[case("after commit")]
fn a_turn_at_once_survives_a_kill(#[case] point: &str) {
    let scene = Scene::new(&json!({"max_running": 1}));
    let held = Held::at(point, &scene.deployment, &scene.variables());
    let first = scene.client.submit(TASK);
    held.reached();
    held.kill();
    let _service = scene.start();
    let task = scene.worker.take();
    assert_eq!(task.job, first);
    let second = scene.submit(1)[0];
    scene.held(1);
    scene.worker.start(&task);
    scene.both_go_through(&task, second);
}

#[rstest]
fn a_turn_survives_the_loss_of_postgres(
    #[values("before publish", "after publish", "after commit")] point: &str,
) {
    let scene = Scene::on(Deployment::with_own_servers(), &json!({"max_running": 1}));
    let service = scene.start();
    scene.does(&["workflows", "pause", TASK]);
    service.logged("workflow_1 paused");
    let jobs = scene.submit(2);
    scene.held(2);
    assert!(service.stop().success());
    let held = Held::at(point, &scene.deployment, &scene.variables());
    scene.does(&["workflows", "resume", TASK]);
    held.reached();
    scene.deployment.kill_server(Server::Postgres);
    let _service = held.go_on();
    // It is running before Postgres is back.
    let early = (point == "after publish").then(|| scene.runs());
    scene.deployment.start_server(Server::Postgres);
    let task = early.unwrap_or_else(|| scene.runs());
    assert_eq!(task.job, jobs[0]);
    scene.both_go_through(&task, jobs[1]);
}

#[test]
fn a_new_owner_goes_before_the_second_half_of_a_flood() {
    let scene = Scene::new(&json!({"window": 2}));
    let _service = scene.start();
    for _ in 0..30 {
        scene.submit_as("flood");
    }
    scene.held(28);
    let flood: Vec<_> = (0..2).map(|_| scene.runs()).collect();
    scene.held(26);
    let new = scene.submit_as("new");
    scene.held(27);
    let mut running = flood;
    let place = (1..=3).find(|_| {
        let task = scene.runs();
        let is_new = task.job == new;
        running.push(task);
        is_new
    });
    assert!(place.is_some());
}

#[test]
fn operators_change_what_is_next() {
    let scene = Scene::new(&json!({"max_running": 1}));
    let service = scene.start();
    let running = scene.submit(1)[0];
    let task = scene.runs();
    assert_eq!(task.job, running);
    let jobs = scene.submit(4);
    scene.held(4);
    let ids: Vec<_> = jobs.iter().map(Uuid::to_string).collect();
    let said = scene.does(&["jobs", "hold", &ids[0]]);
    let held = format!("job {} is held until it is released\n", ids[0]);
    assert!(said.starts_with(&held), "{said}");
    scene.does(&["jobs", "priority", &ids[2], "high"]);
    scene.does(&["jobs", "move", &ids[3], "--first"]);
    let known = scene.run(&[
        "jobs",
        "hold",
        &running.to_string(),
        &Uuid::nil().to_string(),
    ]);
    assert!(!known.0);
    assert!(
        known.1.contains("has been handed over to RabbitMQ"),
        "{}",
        known.1
    );
    assert!(known.1.contains("is unknown"), "{}", known.1);
    scene.ends(&task);
    for job in [jobs[3], jobs[2], jobs[1]] {
        let message = scene.worker.take_message();
        let task = Task::of(&message);
        assert_eq!(task.job, job);
        let priority = if job == jobs[2] { 6 } else { 4 };
        assert_eq!(message.properties.priority(), &Some(priority));
        scene.worker.start(&task);
        scene.ends(&task);
    }
    assert_eq!(scene.worker.waiting(), 0);
    scene.does(&["jobs", "release", &ids[0]]);
    let task = scene.runs();
    assert_eq!(task.job, jobs[0]);
    scene.ends(&task);
    scene.nothing_is_left();
    drop(service);
}

/// In the list, on the page of which `/api/jobs` has the rows, and with a page of the list for each.
#[test]
fn held_jobs_are_listed_in_the_order_of_their_turns() {
    let scene = Scene::new(&json!({"max_running": 1}));
    let service = scene.start();
    let running = scene.submit(1)[0];
    assert_eq!(scene.runs().job, running);
    let jobs = scene.submit(4);
    scene.held(4);
    let ids: Vec<_> = jobs.iter().map(Uuid::to_string).collect();
    scene.does(&["jobs", "hold", &ids[0]]);
    scene.does(&["jobs", "priority", &ids[2], "high"]);
    scene.does(&["jobs", "move", &ids[3], "--first"]);
    let order = [running, jobs[3], jobs[2], jobs[1], jobs[0]].map(|job| job.to_string());
    let ids_of = |page: &Value| -> Vec<String> {
        let jobs = page["jobs"].as_array().unwrap().iter();
        jobs.map(|job| job["id"].as_str().unwrap().to_owned())
            .collect()
    };
    let list = scene.does(&["jobs", "list", "--json"]);
    let list: Value = serde_json::from_str(&list).unwrap();
    assert_eq!(ids_of(&list), order);
    let page = |query: &str| -> Value {
        let (_, body) = service.get(&format!("/api/jobs?{query}")).unwrap();
        serde_json::from_str(&body).unwrap()
    };
    eventually("the page has the same order", || {
        (ids_of(&page("")) == order).then_some(())
    });
    for (offset, id) in order.iter().enumerate() {
        let one = page(&format!("limit=1&offset={offset}"));
        assert_eq!(ids_of(&one), std::slice::from_ref(id));
        assert_eq!(one["total"], 5);
    }
    assert_eq!(ids_of(&page("limit=3&offset=2")), order[2..]);
    let (_, shown) = scene.run(&["jobs", "list"]);
    let last = shown.lines().last().unwrap();
    assert!(
        last.starts_with("the oldest that waits has waited for "),
        "{shown}"
    );
}

#[test]
fn all_is_handed_over_before_another_service_takes_over() {
    let scene = Scene::new(&json!({"paused": true}));
    let _service = scene.start();
    let jobs = scene.submit(5);
    scene.held(5);
    scene.does(&["jobs", "hold", &jobs[1].to_string()]);
    let doctor = scene.run(&["doctor", "--before-switch=back"]).1;
    assert!(
        doctor.contains("5 jobs wait for their turn in Postgres"),
        "{doctor}"
    );
    assert!(
        doctor.starts_with(
            "Not yet back to the Python service: an orchestrator runs; 5 jobs wait for their turn; "
        ),
        "{doctor}"
    );
    assert!(
        doctor.contains("in flight: 4 held, 1 on hold\n"),
        "{doctor}"
    );
    assert!(!doctor.contains("have no task"), "{doctor}");
    assert!(!doctor.contains("jobs of steps are in flight"), "{doctor}");
    let asked = scene.run(&["jobs", "release", "--all"]);
    assert!(!asked.0);
    assert!(asked.1.contains("workflow_1: 5 held"), "{}", asked.1);
    let said = scene.does(&["jobs", "release", "--all", "--yes"]);
    assert!(said.contains("5 jobs are released"), "{said}");
    eventually("all tasks", || (scene.worker.waiting() == 5).then_some(()));
    scene
        .deployment
        .comes_to(5, "SELECT count(*) FROM job WHERE status = 'SUBMITTED'");
}

#[rstest]
#[case::unknown(&["workflows", "pause", "no_such"], "no workflow has the task no_such; there are first, workflow_1")]
#[case::of_steps(&["workflows", "pause", "chain"], "chain has steps: name one of their tasks, first, workflow_1")]
#[case::negative(&["workflows", "limit", TASK, "--window=-1"], "expected a number of tasks, at least 1, unlimited or default")]
#[case::zero(&["workflows", "limit", TASK, "--max-running", "0"], "expected a number of tasks, at least 1, unlimited or default")]
#[case::nothing(&["workflows", "limit", TASK], "--window")]
#[case::not_first(&["jobs", "move", "9b2f1a54-9b35-4a5c-8b1e-6a3d7d3f3b8e"], "--first")]
#[case::age(&["jobs", "cancel", "--older-than", "old"], "expected 90min, 2h, 3d or the like")]
#[case::ended(&["jobs", "cancel", "--state", "failed"], "have ended already")]
fn a_command_says_what_is_wrong(#[case] arguments: &[&str], #[case] said: &str) {
    let scene = Scene::new(&json!({}));
    let service = scene.start();
    let (succeeded, all) = scene.run(arguments);
    assert!(!succeeded);
    assert!(all.contains(said), "{all}");
    drop(service);
}

#[test]
fn two_operators_at_once_both_get_what_they_set() {
    let scene = Scene::new(&json!({}));
    let service = scene.start();
    let setting = |key: &str, number: u32| {
        let number = number.to_string();
        let mut command = scene
            .deployment
            .command(&["workflows", "limit", TASK, key, &number]);
        command.envs(scene.variables()).spawn().unwrap()
    };
    let commands: Vec<_> = (1..=3)
        .flat_map(|number| {
            [
                setting("--window", number),
                setting("--max-running", number),
            ]
        })
        .collect();
    for mut command in commands {
        assert!(command.wait().unwrap().success());
    }
    let shown = scene.does(&["workflows", "limits"]);
    assert!(shown.contains("waiting in RabbitMQ, at most"), "{shown}");
    drop(service);
}

/// What another service has ended, or has never known of, leaves nothing.
#[test]
fn turns_of_jobs_that_are_gone_are_forgotten() {
    let scene = Scene::new(&json!({"max_running": 1}));
    let _service = scene.start();
    scene.submit(2);
    let task = scene.runs();
    scene.held(1);
    for table in ["job_starts", "job"] {
        let gone = format!("DELETE FROM {table} WHERE job_id = $1");
        scene.deployment.sql().execute(&gone, &[&task.job]).unwrap();
    }
    // Its seat is free.
    let task = scene.runs();
    scene.ends(&task);
    scene.nothing_is_left();
}

#[test]
fn a_job_whose_queue_moves_is_not_given_up() {
    let scene = Scene::new(&json!({"max_running": 1}));
    let variables = [
        ("JOB_RETENTION_SEC", "3600"),
        ("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "0"),
    ];
    let service = scene
        .deployment
        .start_with(&[&scene.variables()[..], &variables].concat());
    let jobs = scene.submit(3);
    let age = |what: &str| scene.deployment.sql().batch_execute(what).unwrap();
    scene.held(2);
    let task = scene.runs();
    scene.client.status(task.job);
    assert_eq!(scene.client.status(task.job), JobStatus::Running);
    age(
        "UPDATE job SET registered_at = registered_at - interval '2 h';
         UPDATE job_turn SET held_at = held_at - interval '2 h'",
    );
    scene.deployment.looked_for_what_is_due();
    scene.held(2);
    scene.ends(&task);
    let task = scene.runs();
    assert_eq!(task.job, jobs[1]);
    scene.client.status(task.job);
    assert_eq!(scene.client.status(task.job), JobStatus::Running);
    scene.deployment.looked_for_what_is_due();
    scene.held(1);
    // Now nothing has been started for long.
    age("UPDATE job SET running_at = running_at - interval '2 h';
         UPDATE job_step SET started_at = started_at - interval '2 h';
         UPDATE job_history SET running_at = running_at - interval '2 h'");
    let (result, logs) = scene.client.outcome(jobs[2]);
    assert_eq!(result, ResultType::Error);
    assert!(logs.contains("waiting for its turn"), "{logs}");
    drop(service);
}
