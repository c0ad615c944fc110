//! The whole story of a job, as it is kept with the history: what has happened to it, who has ended it,
//! what it was given and what it has left.

use amiquip::{AmqpValue, FieldTable};
use omotes_orchestrator::wire::{
    self, EsdlMessage, JobDelete, JobSubmission, TaskResult, job_result::ResultType,
    job_submission::JobPriority, task_result,
};
use prost::Message;
use rstest::rstest;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::acting::{ACCOUNTS, ANNA};
use crate::harness::deployment::{Service, eventually};
use crate::harness::operator::Operator;
use crate::harness::peers::{Task, Worker};
use crate::turns::{Scene, TASK};

const HOSTILE: &str = "<script>\"&'\u{202e}\u{1b}[31m\nof another line";

pub fn story(service: &Service, job: Uuid) -> Value {
    eventually("the story of a job", || {
        let operator = Operator::at(service, ANNA);
        let answer = operator.request(
            &format!("GET /api/jobs/{job}"),
            "Sec-Fetch-Site: same-origin\r\n",
            b"",
        );
        (answer.status == 200).then(|| serde_json::from_str(&answer.body).unwrap())
    })
}

/// What has happened to a job, once it has ended.
fn events(service: &Service, job: Uuid) -> Vec<String> {
    let story = eventually("the job's end", || {
        Some(story(service, job)).filter(|story| !story["finished_at"].is_null())
    });
    let events = story["events"].as_array().unwrap().iter();
    events
        .map(|event| event["what"].as_str().unwrap().to_owned())
        .collect()
}

/// A workflow whose parameters have titles.
fn scene() -> Scene {
    Scene::new(&json!({"workflow_parameters": [
        {"parameter_type": "float", "key_name": "price", "title": "The <price>", "default": 1.0},
        {"parameter_type": "string", "key_name": "solver", "default": "one"},
    ]}))
}

fn start(scene: &Scene, more: &[(&str, &str)]) -> Service {
    let variables = [&scene.variables()[..], &ACCOUNTS, more].concat();
    scene.deployment.start_with(&variables)
}

fn submission(scene: &Scene) -> (Uuid, JobSubmission) {
    let (job, mut submission) = scene.client.submission(TASK);
    let parameters = json!({"solver": HOSTILE, "price": 1.5});
    submission.params_dict = Some(wire::protobuf_struct(parameters.as_object().unwrap()));
    submission.set_job_priority(JobPriority::High);
    submission.timeout_ms = Some(3_600_000);
    (job, submission)
}

fn submit(scene: &Scene) -> Uuid {
    let (job, submission) = submission(scene);
    scene.client.listen(job);
    scene.client.send(&submission);
    job
}

/// Ends a task with logs and a message about an asset.
fn fail(worker: &Worker, task: &Task, logs: &str) {
    let result = TaskResult {
        job_id: task.job.to_string(),
        celery_task_id: task.id.clone(),
        result_type: task_result::ResultType::Error.into(),
        output_esdl: None,
        logs: logs.to_owned(),
        celery_task_type: TASK.to_owned(),
        esdl_messages: vec![EsdlMessage {
            technical_message: format!("too cold {HOSTILE}"),
            severity: wire::esdl_message::Severity::Error.into(),
            esdl_object_id: Some(format!("pump-7{HOSTILE}")),
        }],
    };
    worker
        .peer
        .send_safely("omotes_task_result_events", &result.encode_to_vec());
}

/// By whom a test cancels.
#[derive(Clone, Copy)]
enum By {
    Client,
    Page,
    CommandLine,
    Forger,
}

fn cancel(scene: &Scene, service: &Service, job: Uuid, by: By) {
    let id = job.to_string();
    match by {
        By::Client => scene.client.cancel(job),
        By::Page => {
            let anna = Operator::at(service, ANNA);
            let sent = anna.send(&[("do", "cancel"), ("id", &id)]);
            anna.done(&sent, "is asked to end");
        }
        By::CommandLine => {
            let mut command = scene.deployment.command(&["jobs", "cancel", &id]);
            let output = command.env("USER", "ben").env_remove("SUDO_USER").output();
            assert!(output.unwrap().status.success());
        }
        By::Forger => {
            let text = |text: &str| AmqpValue::LongString(text.to_owned());
            let headers = FieldTable::from([
                ("omotes_via".to_owned(), text("page")),
                ("omotes_who".to_owned(), text(&HOSTILE.repeat(1000))),
                ("omotes_from".to_owned(), AmqpValue::Boolean(true)),
            ]);
            let message = JobDelete { uuid: id };
            let peer = &scene.client.peer;
            peer.send_with("job_deletions", &message.encode_to_vec(), headers);
        }
    }
}

#[rstest]
#[case::client(By::Client, "Cancelled by a client", json!({"via": "client", "who": null, "from": null}))]
#[case::page(
    By::Page,
    "Cancelled by anna, by the status page, from 127.0.0.1",
    json!({"via": "page", "who": "anna", "from": "127.0.0.1"})
)]
#[case::command_line(
    By::CommandLine,
    "Cancelled by ben, by the command line, from ",
    json!({"via": "command_line", "who": "ben"})
)]
#[case::forger(
    By::Forger,
    "Cancelled by <script>\"&'\\u{202e}\\u{1b}[31m\\nof another line<script>",
    json!({"via": "page", "from": null})
)]
fn it_is_known_who_cancelled_a_job(#[case] by: By, #[case] last: &str, #[case] origin: Value) {
    let scene = scene();
    let service = start(&scene, &[]);
    let job = submit(&scene);
    let task = scene.runs();
    assert_eq!(task.job, job);
    scene
        .deployment
        .comes_to(1, "SELECT count(*) FROM job WHERE status = 'RUNNING'");
    cancel(&scene, &service, job, by);
    assert_eq!(scene.client.outcome(job).0, ResultType::Cancelled);
    let events = events(&service, job);
    assert_eq!(
        events[0],
        format!("Submitted to `{TASK}`, and handed over to `{TASK}` at once")
    );
    assert_eq!(events[1], "Started");
    assert!(events[2].starts_with(last), "{events:?}");
    let by = &story(&service, job)["cancelled_by"];
    for (key, value) in origin.as_object().unwrap() {
        assert_eq!(by[key], *value, "{by}");
    }
    // As much as is kept of a name.
    assert!(
        by["who"]
            .as_str()
            .is_none_or(|who| who.chars().count() <= 120),
        "{by}"
    );
    let shown = scene.does(&["jobs", "show", &job.to_string()]);
    assert!(shown.contains(last), "{shown}");
    let page = Operator::at(&service, ANNA).get(&format!("/jobs/{job}"));
    assert!(page.body.contains("Cancelled by"), "{}", page.body);
    assert!(!page.body.contains("<script>\""), "{}", page.body);
}

#[test]
fn a_cancel_before_its_submission_is_known_as_well() {
    let scene = scene();
    let service = start(&scene, &[]);
    let (job, submission) = submission(&scene);
    scene.client.listen(job);
    let headers = |name: &str, value: &str| (name.to_owned(), AmqpValue::LongString(value.into()));
    let headers = FieldTable::from([
        headers("omotes_via", "command line"),
        headers("omotes_who", "ben"),
    ]);
    let message = JobDelete {
        uuid: job.to_string(),
    };
    let peer = &scene.client.peer;
    peer.send_with("job_deletions", &message.encode_to_vec(), headers);
    scene
        .deployment
        .comes_to(1, "SELECT count(*) FROM job_history");
    scene.client.send(&submission);
    assert_eq!(scene.client.outcome(job).0, ResultType::Cancelled);
    let events = events(&service, job);
    assert_eq!(
        events.last().unwrap(),
        "Cancelled by ben, by the command line"
    );
}

#[test]
fn the_orchestrator_says_that_it_has_ended_a_job() {
    let scene = scene();
    let service = start(&scene, &[("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "0")]);
    let (job, mut submission) = submission(&scene);
    submission.timeout_ms = Some(1);
    scene.client.listen(job);
    scene.client.send(&submission);
    scene.runs();
    assert_eq!(scene.client.outcome(job).0, ResultType::Cancelled);
    let events = events(&service, job);
    assert_eq!(
        events.last().unwrap(),
        "Ended by the orchestrator: it timed out"
    );
    assert_eq!(story(&service, job)["cancelled_by"], Value::Null);
}

/// However often a task begins anew.
#[test]
fn marks_of_progress_are_capped() {
    let scene = scene();
    let service = start(&scene, &[]);
    let job = submit(&scene);
    let task = scene.runs();
    let message = "\u{1}\u{e9}".repeat(300);
    for number in 0..60 {
        let fraction = match number % 2 {
            0 => 0.1,
            _ => 0.9,
        };
        scene.worker.progress_saying(&task, fraction, &message);
        let is_there = format!("SELECT count(*) FROM job WHERE progress = {fraction}");
        scene.deployment.comes_to(1, &is_there);
    }
    let bytes = "SELECT octet_length(marks)::bigint FROM job";
    let bytes = scene.deployment.count(bytes);
    assert!((1200..2500).contains(&bytes), "{bytes}");
    // The last one is told all the same, and the first.
    let events = story(&service, job)["events"].clone();
    let events = events.as_array().unwrap();
    assert!(
        events.last().unwrap()["what"]
            .as_str()
            .unwrap()
            .starts_with("90 %")
    );
    assert!(events[2]["what"].as_str().unwrap().starts_with("10 %"));
    fail(&scene.worker, &task, "");
    scene.deployment.no_jobs_left();
    let kept = "SELECT octet_length(marks)::bigint FROM job_story";
    assert_eq!(scene.deployment.count(kept), bytes);
}

#[test]
fn a_story_has_progress_parameters_messages_and_logs() {
    let scene = scene();
    let service = start(&scene, &[]);
    let job = submit(&scene);
    let task = scene.runs();
    for (fraction, message) in [
        (0.1, "begins"),
        (0.2, "still"),
        (0.6, HOSTILE),
        (0.7, "last"),
    ] {
        scene.worker.progress_saying(&task, fraction, message);
        // Each in a batch of its own.
        let is_there = format!("SELECT count(*) FROM job WHERE progress = {fraction}");
        scene.deployment.comes_to(1, &is_there);
    }
    let live = story(&service, job);
    assert_eq!(live["parameters"][0]["title"], "The <price>");
    assert_eq!(live["events"].as_array().unwrap().len(), 5, "{live}");
    let logs = format!("begin\n{}\n{HOSTILE} end", "x".repeat(200_000));
    fail(&scene.worker, &task, &logs);
    assert_eq!(scene.client.outcome(job).0, ResultType::Error);
    scene.deployment.no_jobs_left();
    let expected = [
        "Submitted to `workflow_1`, and handed over to `workflow_1` at once",
        "Started",
        "10 %: begins",
        "60 %: <script>\"&'\\u{202e}\\u{1b}[31m\\nof another line",
        "70 %: last",
        "Failed",
    ];
    assert_eq!(events(&service, job), expected);
    let told = story(&service, job);
    assert_eq!(
        told["events"][0]["evidence"],
        json!(["its priority is high", "it may run for 1 h"])
    );
    assert_eq!(
        (&told["priority"], &told["timeout_ms"]),
        (&json!("HIGH"), &json!(3_600_000))
    );
    assert_eq!(told["started_at"].as_array().unwrap().len(), 1);
    let parameters = json!([
        {"key": "price", "title": "The <price>", "value": 1.5},
        {"key": "solver", "title": null, "value": HOSTILE},
    ]);
    assert_eq!(told["parameters"], parameters);
    let messages = json!([{
        "severity": "error", "text": format!("too cold {HOSTILE}"),
        "asset": format!("pump-7{HOSTILE}"),
    }]);
    assert_eq!(told["esdl_messages"], messages);
    let kept = told["logs"].as_str().unwrap();
    assert!(
        kept.len() < 70_000 && kept.starts_with("begin\n"),
        "{}",
        kept.len()
    );
    assert!(kept.ends_with("of another line end") && kept.contains(" bytes are left out]"));

    let page = Operator::at(&service, ANNA).get(&format!("/jobs/{job}"));
    for shown in [
        "The &lt;price&gt;",
        "pump-7&lt;script&gt;",
        "too cold &lt;script&gt;",
    ] {
        assert!(page.body.contains(shown), "{shown}: {}", page.body);
    }
    let shown = scene.does(&["jobs", "show", &job.to_string()]);
    for text in [
        // With the key that `rerun --param` takes.
        "The <price> (price): 1.5",
        "\n  solver: ",
        "error (pump-7<script>\"&'\\u{202e}\\u{1b}[31m\\nof another line): too cold <script>",
    ] {
        assert!(shown.contains(text), "{shown}");
    }
    for hostile in ["\u{202e}", "\u{1b}", "<script>\""] {
        assert!(!page.body.contains(hostile), "{}", page.body);
        assert!(
            hostile == "<script>\"" || !shown.contains(hostile),
            "{shown}"
        );
    }
}

#[rstest]
#[case::both(&[], [1, 1])]
#[case::no_parameters(&[("KEEP_PARAMETERS", "false")], [0, 1])]
#[case::no_logs(&[("KEEP_LOGS", "false")], [1, 0])]
fn nothing_is_kept_that_may_not_be(#[case] variables: &[(&str, &str)], #[case] kept: [i64; 2]) {
    let scene = scene();
    let service = start(&scene, variables);
    let job = submit(&scene);
    let task = scene.runs();
    scene.worker.progress_saying(&task, 0.5, "a secret");
    let is_there = "SELECT count(*) FROM job WHERE progress = 0.5";
    scene.deployment.comes_to(1, is_there);
    fail(&scene.worker, &task, "a secret\n");
    let result = scene.client.result(job);
    assert_eq!(result.logs, "a secret\n");
    scene.deployment.no_jobs_left();
    let [parameters, logs] = kept;
    let rows = "SELECT count(*) FROM job_story WHERE parameters IS NOT NULL";
    assert_eq!(scene.deployment.count(rows), parameters);
    let rows = "SELECT count(*) FROM job_story
                WHERE logs IS NOT NULL OR esdl_messages IS NOT NULL OR marks IS NOT NULL
                   OR progress_message IS NOT NULL";
    assert_eq!(scene.deployment.count(rows), logs);
    let told = story(&service, job).to_string();
    assert_eq!(told.contains("a secret"), logs == 1, "{told}");
    assert_eq!(told.contains("solver"), parameters == 1, "{told}");
}

#[test]
fn a_job_of_two_steps_tells_of_its_retry() {
    let scene = Scene::new(&json!({
        "steps": [{"task": "first", "title": "Before"},
                  {"task": TASK, "title": "After", "retry": {"attempts": 2}}],
    }));
    let service = start(&scene, &[]);
    let first = Worker::new(&scene.deployment, "first");
    let job = submit(&scene);
    let task = first.take();
    first.start(&task);
    first.succeed(&task, "<e id='out'/>");
    let task = scene.runs();
    fail(&scene.worker, &task, "no heat");
    let task = scene.runs();
    scene.ends(&task);
    let expected = [
        "Submitted to `workflow_1`",
        "Step 1, Before: handed over to `first`",
        "Step 1, Before: started",
        "Step 1, Before: succeeded",
        "Step 2, After: handed over to `workflow_1`",
        "Step 2, After: started",
        "Step 2, After: failed",
        "Step 2, After, attempt 2: handed over to `workflow_1`",
        "Step 2, After, attempt 2: started",
        "Succeeded",
    ];
    let events: Vec<_> = events(&service, job)
        .into_iter()
        .filter(|event| !event.contains(" %: "))
        .collect();
    assert_eq!(events, expected);
    let story = story(&service, job);
    let messages = story["esdl_messages"].as_array().unwrap();
    let about = |one: &&Value| one["asset"].is_string();
    assert_eq!(messages.iter().filter(about).count(), 1, "{story}");
}

#[test]
fn a_story_is_forgotten_with_its_history() {
    let scene = scene();
    let service = start(&scene, &[]);
    let job = submit(&scene);
    let task = scene.runs();
    scene.ends(&task);
    scene.deployment.no_jobs_left();
    let rows = "SELECT (SELECT count(*) FROM job_story) + (SELECT count(*) FROM job_history)";
    assert_eq!(scene.deployment.count(rows), 2);
    assert!(
        !story(&service, job)["events"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    service.stop();
    let _service = start(&scene, &[("JOB_HISTORY_RETENTION_SEC", "1")]);
    scene.deployment.comes_to(0, rows);
}

/// Its workers' hosts are what the last hour's looks have seen, and stay with it after that.
#[test]
fn it_is_kept_where_a_job_ran() {
    let scene = scene();
    let service = start(&scene, &[("WORKERS_PERIOD_SEC", "5")]);
    let job = submit(&scene);
    let task = scene.runs();
    let seen = "INSERT INTO worker_task (host, celery_id, task, job_id, first_seen, last_seen,
                                         is_current)
                VALUES ('worker-workflow_1@one', $1, 'workflow_1', $2, now(), now() + $3, false)";
    let mut sql = scene.deployment.sql();
    sql.execute(
        &seen.replace("$3", "interval '1 minute'"),
        &[&task.id, &job],
    )
    .unwrap();
    let is_told = || {
        let events = story(&service, job)["events"].clone();
        events[1]["what"] == "Started on worker-workflow_1@one"
    };
    eventually("where it runs", || is_told().then_some(()));
    scene.ends(&task);
    scene.deployment.no_jobs_left();
    assert!(is_told());
    sql.execute(
        "UPDATE worker_task SET first_seen = first_seen - interval '2 hours',
                                last_seen = last_seen - interval '2 hours'",
        &[],
    )
    .unwrap();
    let kept = "SELECT count(*) FROM job_story WHERE hosts LIKE '%worker-workflow_1@one%'";
    scene.deployment.comes_to(1, kept);
    scene
        .deployment
        .comes_to(0, "SELECT count(*) FROM worker_task");
}
