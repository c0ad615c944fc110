//! Jobs of several steps: from one worker's result to the next one's task, whatever is killed in
//! between, and what is kept of them.

use std::cell::Cell;
use std::fs;
use std::path::PathBuf;

use omotes_orchestrator::wire::{job_result::ResultType, job_status_update::JobStatus};
use rstest::rstest;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::crashes::Held;
use crate::harness::deployment::{Deployment, Server, Service, eventually};
use crate::harness::peers::{Client, ESDL, Task, Worker};
use crate::python::{CeleryWorker, SdkClient};

/// Rows that say of steps what no job needs any more.
const LEFT: &str = "SELECT (SELECT count(*) FROM job_input) + (SELECT count(*) FROM job_step \
                    WHERE NOT EXISTS (SELECT FROM job_history \
                                      WHERE job_history.job_id = job_step.job_id))";

/// A definition file whose workflow `chain` has these steps.
fn definitions(deployment: &Deployment, steps: &Value) -> PathBuf {
    let file = deployment.folder.join("workflows.json");
    let workflows = json!([
        {"workflow_type_name": "chain", "workflow_type_description_name": "Chain",
         "workflow_parameters": [
            {"parameter_type": "float", "key_name": "price"},
            {"parameter_type": "string", "key_name": "solver"},
         ],
         "steps": steps},
        {"workflow_type_name": "workflow_1", "workflow_type_description_name": "Plain"},
    ]);
    fs::write(&file, workflows.to_string()).unwrap();
    file
}

fn two_steps() -> Value {
    json!([
        {"task": "optimiser", "title": "Optimise", "weight": 3},
        {"task": "simulator", "title": "Simulate", "parameters": {"cost": "price"}},
    ])
}

/// A client and a worker for each of the two tasks, on a deployment with these steps.
struct Scene {
    deployment: Deployment,
    client: Client,
    first: Worker,
    second: Worker,
    file: PathBuf,
}

impl Scene {
    fn new(steps: &Value) -> Scene {
        Scene::on(Deployment::new(), steps)
    }

    fn on(deployment: Deployment, steps: &Value) -> Scene {
        Scene {
            client: Client::new(&deployment),
            first: Worker::new(&deployment, "optimiser"),
            second: Worker::new(&deployment, "simulator"),
            file: definitions(&deployment, steps),
            deployment,
        }
    }

    fn variables(&self) -> [(&'static str, &str); 3] {
        [
            ("WORKFLOW_CONFIG_PATH", self.file.to_str().unwrap()),
            ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
            ("TIMEOUT_JOB_HANDLER_START_BUFFER_SEC", "0"),
        ]
    }

    fn start(&self) -> Service {
        self.deployment.start_with(&self.variables())
    }

    fn held_at(&self, point: &str) -> Held {
        Held::at(point, &self.deployment, &self.variables())
    }

    /// A job whose first step runs.
    fn first_step_runs(&self) -> Task {
        let job = self.client.submit("chain");
        let task = self.first.take();
        assert_eq!(task.job, job);
        self.first.start(&task);
        assert_eq!(self.client.status(job), JobStatus::Enqueued);
        assert_eq!(self.client.status(job), JobStatus::Running);
        task
    }

    /// The task of the second step, which has this input.
    fn second_task(&self, input: &str) -> Task {
        let message = self.second.take_message();
        assert_eq!(message.json()[0][2], input);
        Task::of(&message)
    }

    /// The second step's way to the result, and that nothing is left.
    fn ends(&self, task: &Task) {
        self.second.start(task);
        self.second.succeed(task, "<e id='two'/>");
        let result = self.client.result(task.job);
        assert_eq!(result.result_type(), ResultType::Succeeded);
        assert_eq!(result.output_esdl.as_deref(), Some("<e id='two'/>"));
        self.nothing_is_left();
    }

    fn nothing_is_left(&self) {
        self.deployment.no_jobs_left();
        self.deployment.comes_to(0, LEFT);
    }

    fn current_task(&self, job: Uuid) -> String {
        let row = self
            .deployment
            .sql()
            .query_one("SELECT celery_id FROM job WHERE job_id = $1", &[&job])
            .unwrap();
        row.get(0)
    }
}

#[test]
fn a_job_goes_from_step_to_step_to_one_result() {
    let scene = Scene::new(&two_steps());
    let Scene {
        client,
        first,
        second,
        deployment,
        ..
    } = &scene;
    let _service = scene.start();
    let (job, mut submission) = client.submission("chain");
    client.listen(job);
    let params = json!({"price": 0.1, "solver": "exact"});
    submission.params_dict = Some(omotes_orchestrator::wire::protobuf_struct(
        params.as_object().unwrap(),
    ));
    submission.job_priority = Some(2);
    client.send(&submission);
    let message = first.take_message();
    assert_eq!(message.json()[0][2], ESDL);
    assert_eq!(message.json()[0][3], params);
    let task = Task::of(&message);
    first.start(&task);
    first.progress(&task, 0.5);
    assert_eq!(client.progress(job), (0.375, "Optimise: a message".into()));
    first.succeed(&task, "<e id='one'/>");
    assert_eq!(client.progress(job).0, 0.75);

    let message = second.take_message();
    assert_eq!(message.json()[0][1], "a reference");
    assert_eq!(message.json()[0][2], "<e id='one'/>");
    assert_eq!(message.json()[0][3], json!({"cost": 0.1}));
    assert_eq!(message.properties.priority(), &Some(6));
    let task = Task::of(&message);
    second.start(&task);
    second.progress(&task, 1.0);
    assert_eq!(client.progress(job), (1.0, "Simulate: a message".into()));
    second.succeed(&task, "<e id='two'/>");
    let result = client.result(job);
    assert_eq!(result.result_type(), ResultType::Succeeded);
    assert_eq!(result.output_esdl.as_deref(), Some("<e id='two'/>"));
    assert_eq!(
        result.logs,
        "=== step 1 of 2, Optimise: succeeded ===\nthe worker's logs\n\
         === step 2 of 2, Simulate: succeeded ===\nthe worker's logs\n"
    );
    let messages = result.esdl_messages.iter();
    let messages: Vec<_> = messages.map(|one| one.technical_message.as_str()).collect();
    assert_eq!(messages, ["Optimise: a remark", "Simulate: a remark"]);
    assert_eq!(client.status(job), JobStatus::Enqueued);
    assert_eq!(client.status(job), JobStatus::Running);
    client.heard_nothing_more(second, job);
    scene.nothing_is_left();
    deployment.comes_to(
        2,
        "SELECT count(*) FROM job_step JOIN job_history USING (job_id)
         WHERE job_step.outcome = 'SUCCEEDED' AND job_step.starts = 1 AND output_bytes = 13
           AND logs = 'the worker''s logs' AND job_history.starts = 2
           AND job_step.submitted_at IS NOT NULL",
    );
    // Both outputs may be asked for their time series.
    deployment.comes_to(
        2,
        "SELECT count(*) FROM esdl_time_series_info WHERE deactivated_at IS NULL",
    );
}

#[test]
fn a_plain_job_has_no_rows_of_steps() {
    let scene = Scene::new(&two_steps());
    let worker = Worker::new(&scene.deployment, "workflow_1");
    let _service = scene.start();
    let job = scene.client.submit("workflow_1");
    let task = worker.take();
    worker.start(&task);
    assert_eq!(scene.client.status(job), JobStatus::Enqueued);
    assert_eq!(scene.client.status(job), JobStatus::Running);
    let rows = "SELECT (SELECT count(*) FROM job_step) + (SELECT count(*) FROM job_input)";
    assert_eq!(scene.deployment.count(rows), 0);
    worker.succeed(&task, "<e id='one'/>");
    assert_eq!(scene.client.outcome(job).0, ResultType::Succeeded);
    assert_eq!(scene.deployment.count(rows), 0);
}

/// Killed at each point of the hand-over, with three replicas of which the others go on.
#[rstest]
#[case("before publish", 1)]
#[case("after publish", 2)]
#[case("after commit", 1)]
fn a_hand_over_survives_a_kill(
    #[case] point: &str,
    #[case] tasks: usize,
    #[values(1, 3)] replicas: usize,
) {
    let scene = Scene::new(&two_steps());
    let service = scene.start();
    let task = scene.first_step_runs();
    assert!(service.stop().success());
    let held = scene.held_at(point);
    scene.first.succeed(&task, "<e id='one'/>");
    held.reached();
    // They wait for the locks of the one that is to die.
    let others: Vec<_> = (1..replicas).map(|_| scene.start()).collect();
    held.kill();
    let _next = others.is_empty().then(|| scene.start());
    let tasks: Vec<_> = (0..tasks)
        .map(|_| scene.second_task("<e id='one'/>"))
        .collect();
    let current = eventually("the hand-over", || {
        let current = scene.current_task(task.job);
        (current != task.id).then_some(current)
    });
    for orphan in tasks.iter().filter(|task| task.id != current) {
        scene.second.start(orphan);
        assert_eq!(scene.second.revoked(), orphan.id);
    }
    let current = tasks.iter().find(|task| task.id == current).unwrap();
    assert_eq!(scene.second.waiting(), 0);
    scene.ends(current);
}

#[rstest]
fn a_hand_over_survives_the_loss_of_a_server(
    #[values("before publish", "after publish", "after commit")] point: &str,
    #[values(Server::RabbitMq, Server::Postgres)] server: Server,
) {
    let scene = Scene::on(Deployment::with_own_servers(), &two_steps());
    let service = scene.start();
    let task = scene.first_step_runs();
    assert!(service.stop().success());
    let held = scene.held_at(point);
    scene.first.succeed(&task, "<e id='one'/>");
    held.reached();
    scene.deployment.kill_server(server);
    let service = held.go_on();
    scene.deployment.start_server(server);
    let Scene {
        deployment, file, ..
    } = scene;
    // Peers lose their connections with RabbitMQ.
    let scene = Scene {
        client: Client::new(&deployment),
        first: Worker::new(&deployment, "optimiser"),
        second: Worker::new(&deployment, "simulator"),
        deployment,
        file,
    };
    let current = eventually("the hand-over", || {
        let current = scene.current_task(task.job);
        (current != task.id).then_some(current)
    });
    let task = loop {
        let one = scene.second_task("<e id='one'/>");
        if one.id == current {
            break one;
        }
        scene.second.start(&one);
        assert_eq!(scene.second.revoked(), one.id);
    };
    scene.ends(&task);
    drop(service);
}

#[test]
fn a_cancel_ends_a_job_in_each_step_and_between() {
    let steps = json!([
        {"task": "optimiser", "retry": {"attempts": 2, "wait_sec": 3600}},
        {"task": "simulator"},
    ]);
    let scene = Scene::new(&steps);
    let _service = scene.start();
    let cancelled = |job| {
        scene.client.cancel(job);
        assert_eq!(scene.client.status(job), JobStatus::Cancelled);
        assert_eq!(scene.client.outcome(job).0, ResultType::Cancelled);
    };
    let task = scene.first_step_runs();
    cancelled(task.job);
    assert_eq!(scene.first.revoked(), task.id);

    let task = scene.first_step_runs();
    scene.first.fail(&task);
    assert_eq!(
        scene.client.progress(task.job),
        (0.0, "optimiser: it failed, and is tried again".into())
    );
    cancelled(task.job);

    let task = scene.first_step_runs();
    scene.first.succeed(&task, "<e id='one'/>");
    let task = scene.second_task("<e id='one'/>");
    cancelled(task.job);
    assert_eq!(scene.first.revoked(), task.id);
    // It was on its way to its worker.
    scene.second.start(&task);
    assert_eq!(scene.first.revoked(), task.id);

    let task = scene.first_step_runs();
    scene.first.succeed(&task, "<e id='one'/>");
    let task = scene.second_task("<e id='one'/>");
    scene.second.start(&task);
    cancelled(task.job);
    scene.nothing_is_left();
    let retired = "SELECT count(*) FROM esdl_time_series_info WHERE deactivated_at IS NULL";
    scene.deployment.comes_to(0, retired);
}

#[test]
fn a_step_is_tried_again_after_its_wait_with_what_is_in_the_database() {
    let steps = json!([
        {"task": "optimiser"},
        {"task": "simulator", "retry": {"attempts": 2, "wait_sec": 1}},
    ]);
    let scene = Scene::new(&steps);
    let service = scene.start();
    let task = scene.first_step_runs();
    scene.first.succeed(&task, "<e id='one'/>");
    let task = scene.second_task("<e id='one'/>");
    scene.second.start(&task);
    scene.second.fail(&task);
    // The wait does not end with the service.
    scene
        .deployment
        .comes_to(1, "SELECT count(*) FROM job_step WHERE due_at IS NOT NULL");
    service.kill();
    let _next = scene.start();
    let again = scene.second_task("<e id='one'/>");
    assert_ne!(again.id, task.id);
    let inputs = "SELECT count(*) FROM job_input WHERE esdl IS NOT NULL";
    scene.deployment.comes_to(0, inputs);
    scene.ends(&again);
}

#[test]
fn another_task_gets_the_input_when_the_first_one_fails() {
    let steps = json!([
        {"task": "optimiser", "title": "Exact",
         "on_error": {"fallback": {"task": "simulator", "title": "Heuristic"}}},
    ]);
    let scene = Scene::new(&steps);
    let _service = scene.start();
    let task = scene.first_step_runs();
    scene.first.fail(&task);
    let fallback = scene.second_task(ESDL);
    scene.second.start(&fallback);
    scene.second.succeed(&fallback, "<e id='two'/>");
    let logs = scene.client.result(task.job).logs;
    assert!(
        logs.contains("=== step 1 of 1, Exact: failed ==="),
        "{logs}"
    );
    let heading = "=== step 1 of 1, Heuristic, attempt 2: succeeded ===";
    assert!(logs.contains(heading), "{logs}");
    scene.nothing_is_left();
}

#[test]
fn a_steps_timeout_counts_from_its_start_and_the_jobs_without_its_waits() {
    let steps = json!([
        {"task": "optimiser"},
        {"task": "simulator", "title": "Simulate", "timeout_sec": 1},
    ]);
    let scene = Scene::new(&steps);
    let _service = scene.start();
    let task = scene.first_step_runs();
    scene.first.succeed(&task, "<e id='one'/>");
    let task = scene.second_task("<e id='one'/>");
    let mut sql = scene.deployment.sql();
    // It has waited for an hour, of the minute that the job may run.
    sql.batch_execute(
        "UPDATE job SET timeout_after_ms = 60000, running_at = running_at - interval '1 hour';
         UPDATE job_step SET submitted_at = submitted_at - interval '1 hour',
                             finished_at = finished_at - interval '1 hour'",
    )
    .unwrap();
    scene.deployment.looked_for_what_is_due();
    scene.second.start(&task);
    let (result, logs) = scene.client.outcome(task.job);
    assert_eq!(result, ResultType::Cancelled);
    assert!(
        logs.starts_with("The job ended in step 2 of 2, Simulate.\n"),
        "{logs}"
    );
    assert!(
        logs.contains("ran for longer than its timeout of 1s"),
        "{logs}"
    );
    scene.nothing_is_left();
}

#[test]
fn a_job_keeps_the_steps_of_its_submission() {
    let scene = Scene::new(&two_steps());
    let service = scene.start();
    let task = scene.first_step_runs();
    definitions(&scene.deployment, &json!([{"task": "another"}]));
    service.signal("-HUP");
    service.logged("workflow definitions read again");
    scene.first.succeed(&task, "<e id='one'/>");
    let task = scene.second_task("<e id='one'/>");
    scene.ends(&task);
    // And a faulty file changes nothing.
    definitions(
        &scene.deployment,
        &json!([{"task": "another", "weight": 0}]),
    );
    service.signal("-HUP");
    service.logged("$[0].steps[0].weight: found 0, expected a number above 0");
    let another = Worker::new(&scene.deployment, "another");
    scene.client.submit("chain");
    another.take();
}

#[test]
fn nobody_for_the_second_step_is_told_once() {
    let scene = Scene::new(&json!([{"task": "optimiser"}, {"task": "nobody"}]));
    let notice = [("NO_WORKER_NOTICE", "true")];
    let variables = [&scene.variables()[..], &notice].concat();
    let _service = scene.deployment.start_with(&variables);
    let task = scene.first_step_runs();
    scene.first.succeed(&task, "<e id='one'/>");
    assert_eq!(
        scene.client.progress(task.job),
        (0.5, "nobody: waiting for a worker".into())
    );
    let (fraction, message) = scene.client.progress(task.job);
    assert_eq!(fraction, 0.5);
    assert!(
        message.starts_with("nobody: Waiting: no worker"),
        "{message}"
    );
}

/// As the Python service does that handles a step's result as the job's.
#[test]
fn what_another_service_has_ended_leaves_nothing() {
    let scene = Scene::new(&two_steps());
    let _service = scene.start();
    let task = scene.first_step_runs();
    let mut sql = scene.deployment.sql();
    sql.execute("DELETE FROM job_starts", &[]).unwrap();
    sql.execute("DELETE FROM job", &[]).unwrap();
    scene.nothing_is_left();
    // Its worker goes on with the first step, for nobody.
    scene.first.progress(&task, 0.5);
    assert_eq!(scene.first.revoked(), task.id);
}

/// Each step is a backlog that waits when the service starts, of which every other task fails once.
#[test]
fn large_esdls_pass_through_three_steps_in_bounded_memory() {
    const JOBS: usize = 24;
    const BYTES: usize = 5_000_000;
    let steps = json!([
        {"task": "optimiser"},
        {"task": "simulator", "retry": {"attempts": 2}},
        {"task": "costs"},
    ]);
    let scene = Scene::new(&steps);
    let third = Worker::new(&scene.deployment, "costs");
    let large = |id: &str| format!("<e id='{id}'>{}</e>", "x".repeat(BYTES));
    let peaks = Cell::new(0);
    let with_service = |work: &dyn Fn()| {
        let service = scene.start();
        work();
        peaks.set(peaks.get().max(service.peak_memory()));
        assert!(service.stop().success());
    };
    let waiting = |worker: &Worker, count: usize| {
        eventually("tasks", || {
            (worker.waiting() as usize == count).then_some(())
        });
    };
    let jobs: Vec<_> = (0..JOBS).map(|_| scene.client.submit("chain")).collect();
    with_service(&|| waiting(&scene.first, JOBS));
    for _ in 0..JOBS {
        scene.first.succeed(&scene.first.take(), &large("one"));
    }
    with_service(&|| waiting(&scene.second, JOBS));
    for number in 0..JOBS {
        let message = scene.second.take_message();
        assert_eq!(message.json()[0][2], large("one"));
        match number % 2 {
            0 => scene.second.fail(&Task::of(&message)),
            _ => scene.second.succeed(&Task::of(&message), &large("two")),
        }
    }
    with_service(&|| waiting(&scene.second, JOBS / 2));
    for _ in 0..JOBS / 2 {
        let message = scene.second.take_message();
        assert_eq!(message.json()[0][2], large("one"));
        scene.second.succeed(&Task::of(&message), &large("two"));
    }
    with_service(&|| {
        waiting(&third, JOBS);
        for _ in 0..JOBS {
            third.succeed(&third.take(), &large("three"));
        }
        for job in &jobs {
            let output = scene.client.result(*job).output_esdl;
            assert_eq!(output, Some(large("three")));
        }
    });
    let peak = peaks.get();
    eprintln!("peak memory with large ESDLs in three steps: {peak} MiB");
    assert!(peak < 300, "{peak} MiB");
    scene.nothing_is_left();
}

#[test]
fn operators_see_where_a_job_is_and_what_its_steps_did() {
    let scene = Scene::new(&two_steps());
    let service = scene.start();
    let task = scene.first_step_runs();
    scene.first.succeed(&task, "<e id='one'/>");
    let second = scene.second_task("<e id='one'/>");
    let json = |path: &str| -> Value {
        let (_, body) = service.get(path).unwrap();
        serde_json::from_str(&body).unwrap()
    };
    // A task is published before it is committed.
    let story = eventually("the second step", || {
        let story = json(&format!("/api/jobs/{}", task.job));
        (story["step"]["number"] == 2).then_some(story)
    });
    assert_eq!(story["step"]["title"], "Simulate");
    assert_eq!(story["step"]["shares"], json!([0.75, 0.25]));
    assert_eq!(story["position"], 1);
    let attempts = &story["attempts"];
    assert_eq!(attempts[0]["outcome"], "SUCCEEDED");
    assert_eq!(attempts[0]["logs"], "the worker's logs");
    assert_eq!(attempts[1]["task"], "simulator");
    assert_eq!(attempts[1]["started_at"], Value::Null);
    let (_, page) = service.get("/").unwrap();
    assert!(page.contains("waiting, step 2 of 2, Simulate"), "{page}");
    let (_, page) = service.get(&format!("/jobs/{}", task.job)).unwrap();
    assert!(page.contains(r#"id="step-1-1""#), "{page}");
    assert!(page.contains(">the worker's logs</pre>"), "{page}");
    let command = |arguments: &[&str]| {
        let mut command = scene.deployment.command(arguments);
        let output = command.envs(scene.variables()).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let id = task.job.to_string();
    let list = command(&["jobs", "list"]);
    assert!(
        list.contains("waiting, step 2 of 2, Simulate, no. 1"),
        "{list}"
    );

    scene.second.start(&second);
    scene.second.fail(&second);
    assert_eq!(scene.client.outcome(task.job).0, ResultType::Error);
    scene.nothing_is_left();
    let shown = command(&["jobs", "show", &id]);
    let line = |step: &str| {
        shown
            .lines()
            .find(|line| line.trim_start().starts_with(step))
            .unwrap()
    };
    assert!(line("1 ").contains("succeeded"), "{shown}");
    assert!(line("2 ").contains("failed"), "{shown}");
    let (_, metrics) = service.get("/metrics").unwrap();
    for line in [
        r#"omotes_orchestrator_steps_ended_total{workflow="chain",step="1",outcome="SUCCEEDED"} 1"#,
        r#"omotes_orchestrator_steps_ended_total{workflow="chain",step="2",outcome="FAILED"} 1"#,
        r#"omotes_orchestrator_step_running_seconds_count{workflow="chain",step="1"} 1"#,
        r#"omotes_orchestrator_jobs_ended_total{workflow="chain",outcome="FAILED"} 1"#,
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    let drawn = command(&["workflows", "check", scene.file.to_str().unwrap()]);
    assert!(
        drawn.contains(
            "  1. Optimise: task optimiser, 75 % of the progress\n     ↓ its output ESDL\n  \
             2. Simulate: task simulator, 25 % of the progress, parameters cost = price\n"
        ),
        "{drawn}"
    );
}

/// A deployment whose workflow `steered` has two steps that real Celery workers do; each does what
/// the job's parameter of its own says.
fn with_celery_workers() -> (Deployment, Service) {
    let deployment = Deployment::new();
    let file = deployment.folder.join("workflows.json");
    let steered = json!([{
        "workflow_type_name": "steered", "workflow_type_description_name": "Two steps",
        "workflow_parameters": [{"parameter_type": "string", "key_name": "first"},
                                {"parameter_type": "string", "key_name": "second"}],
        "steps": [
            {"task": "optimiser", "title": "Optimise", "parameters": {"behaviour": "first"}},
            {"task": "simulator", "title": "Simulate", "parameters": {"behaviour": "second"}},
        ],
    }]);
    fs::write(&file, steered.to_string()).unwrap();
    let service = deployment.start_with(&[("WORKFLOW_CONFIG_PATH", file.to_str().unwrap())]);
    (deployment, service)
}

fn celery_worker(deployment: &Deployment, task: &str) -> CeleryWorker {
    CeleryWorker::with(deployment, "4.3", &[("WORKER_TASK", task)])
}

fn steered(first: &str, second: &str) -> Value {
    let params = json!({"first": first, "second": second});
    json!({"workflow": "steered", "params": params, "reference": "steered"})
}

#[test]
fn four_clients_and_celery_workers_of_two_types_finish_two_hundred_jobs() {
    let (deployment, _service) = with_celery_workers();
    let _workers = ["optimiser", "simulator", "optimiser", "simulator"]
        .map(|task| celery_worker(&deployment, task));
    let jobs = vec![steered("succeed", "succeed"); 50];
    let clients: Vec<_> = (0..4)
        .map(|_| SdkClient::new(&deployment, "4.3", &jobs))
        .collect();
    for story in clients.into_iter().flat_map(SdkClient::stories) {
        assert_eq!(story["result"], "SUCCEEDED", "{story}");
        assert_eq!(story["statuses"], json!(["ENQUEUED", "RUNNING"]), "{story}");
        let output = story["output_esdl"].as_str().unwrap();
        assert!(
            output.contains(r#"description="optimiser simulator""#),
            "{output}"
        );
        let said = &story["messages"];
        assert_eq!(said[0][0], "Optimise: a remark");
        assert_eq!(said[1][0], "Simulate: a remark");
        let fractions = story["progress"].as_array().unwrap();
        assert!(
            fractions.is_sorted_by_key(|one| one[0].as_f64().unwrap()),
            "{story}"
        );
    }
    deployment.no_jobs_left();
    deployment.comes_to(0, LEFT);
    let steps = "SELECT count(*) FROM job_step WHERE outcome = 'SUCCEEDED' AND starts = 1";
    assert_eq!(deployment.count(steps), 400);
}

#[test]
fn a_celery_worker_may_fail_be_cancelled_or_be_killed_in_any_step() {
    let (deployment, _service) = with_celery_workers();
    let _first = celery_worker(&deployment, "optimiser");
    let mut second = celery_worker(&deployment, "simulator");
    let mut cancelled = steered("sleep", "succeed");
    cancelled["cancel_on"] = "RUNNING".into();
    let jobs = [
        steered("fail", "succeed"),
        cancelled,
        steered("succeed", "raise"),
    ];
    let stories = SdkClient::new(&deployment, "4.3", &jobs).stories();
    let results: Vec<_> = stories.iter().map(|story| &story["result"]).collect();
    assert_eq!(results, ["ERROR", "CANCELLED", "ERROR"], "{stories:?}");
    for (story, step) in [
        (&stories[0], "step 1 of 2, Optimise"),
        (&stories[2], "step 2 of 2, Simulate"),
    ] {
        let logs = story["logs"].as_str().unwrap();
        assert!(
            logs.starts_with(&format!("The job ended in {step}.")),
            "{logs}"
        );
    }

    let file = deployment.folder.join("go on");
    let wait = format!("wait for {}", file.display());
    let client = SdkClient::new(&deployment, "4.3", &[steered("succeed", &wait)]);
    let running = "SELECT count(*) FROM job_step WHERE number = 2 AND started_at IS NOT NULL
                       AND finished_at IS NULL";
    deployment.comes_to(1, running);
    second.kill();
    let _other = celery_worker(&deployment, "simulator");
    deployment.comes_to(2, "SELECT count(*) FROM job_starts");
    fs::write(&file, "").unwrap();
    assert_eq!(client.stories()[0]["result"], "SUCCEEDED");
    deployment.no_jobs_left();
    deployment.comes_to(0, LEFT);
}
