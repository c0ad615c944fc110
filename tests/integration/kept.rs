//! What is kept of jobs for a while: output ESDLs whose clients have gone, and what was submitted, for
//! another run.

use std::fs;

use omotes_orchestrator::wire::{self, job_result::ResultType};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::acting::{ACCOUNTS, ANNA, BEN};
use crate::crashes::Held;
use crate::harness::deployment::{Deployment, Service};
use crate::harness::operator::Operator;
use crate::harness::peers::ESDL;
use crate::python::{CeleryWorker, PYTHON, SdkClient, order};
use crate::story::story;
use crate::turns::{Scene, TASK};

const RESULTS: &str = "SELECT count(*) FROM job_result";

fn start(scene: &Scene, more: &[(&str, &str)]) -> Service {
    let variables = [&scene.variables()[..], &ACCOUNTS, more].concat();
    scene.deployment.start_with(&variables)
}

/// Runs a job for which no client waits.
fn ends_alone(scene: &Scene, output: &str) -> Uuid {
    let (job, submission) = scene.client.submission(TASK);
    scene.client.send(&submission);
    let task = scene.runs();
    assert_eq!(task.job, job);
    scene.worker.succeed(&task, output);
    let ended = format!("SELECT count(*) FROM job_history WHERE job_id = '{job}'");
    scene.deployment.comes_to(1, &ended);
    scene.deployment.no_jobs_left();
    job
}

#[test]
fn the_result_of_a_gone_client_can_be_had() {
    let scene = Scene::new(&json!({}));
    let service = start(&scene, &[("KEEP_RESULTS_SEC", "600")]);
    let output = format!(
        "<?xml version='1.0'?><script>1</script><e>é{}</e>",
        "x".repeat(100_000)
    );
    let job = ends_alone(&scene, &output);
    // One whose client is there has been given it.
    scene.submit(1);
    let task = scene.runs();
    scene.ends(&task);
    scene.deployment.no_jobs_left();
    assert_eq!(scene.deployment.count(RESULTS), 1);

    let told = story(&service, job);
    assert_eq!(told["kept_result"], output.len());
    let whereabouts = told["whereabouts"].to_string();
    let kept = format!("It is kept here, {} bytes, until ", output.len());
    assert!(whereabouts.contains(&kept), "{whereabouts}");
    assert!(
        whereabouts.contains("its client's queue was gone."),
        "{whereabouts}"
    );
    let path = format!("/api/jobs/{job}/result");
    let ben = Operator::at(&service, BEN);
    let page = ben.get(&format!("/jobs/{job}"));
    assert!(
        page.body.contains(&format!("href=\"{path}\"")),
        "{}",
        page.body
    );
    let answer = ben.get(&path);
    assert_eq!((answer.status, &answer.body), (200, &output));
    // Whatever is in it, no browser takes it for a page.
    for (name, value) in [
        ("Content-Type", "application/octet-stream"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Security-Policy", "default-src 'none'; sandbox"),
    ] {
        assert_eq!(answer.header(name), Some(value), "{}", answer.head);
    }
    let file = answer.header("Content-Disposition").unwrap();
    assert_eq!(file, format!("attachment; filename=\"{job}.esdl\""));
    assert_eq!(Operator::at(&service, "").get(&path).status, 401);
    let other = ben.get(&format!("/api/jobs/{}/result", task.job));
    other.is(404, "no output ESDL of job");

    let printed = scene.does(&["jobs", "result", &job.to_string()]);
    assert_eq!(printed.trim_end(), output);
    let file = scene.deployment.folder.join("again.esdl");
    let path = file.to_str().unwrap();
    scene.does(&["jobs", "result", &job.to_string(), "--output", path]);
    assert_eq!(fs::read_to_string(&file).unwrap(), output);
    drop(service);
}

#[test]
fn no_result_is_kept_where_none_is_to_be() {
    let scene = Scene::new(&json!({}));
    let service = start(&scene, &[]);
    let job = ends_alone(&scene, "<e/>");
    assert_eq!(scene.deployment.count(RESULTS), 0);
    let job = job.to_string();
    let output = scene.deployment.command(&["jobs", "result", &job]).output();
    let output = output.unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    let why = "is not here: it is not kept here, for KEEP_RESULTS_SEC is 0, and its client's queue was gone.";
    assert!(said.contains(why), "{said}");
    drop(service);
}

#[test]
fn what_is_kept_is_forgotten_in_time_and_with_the_history() {
    let scene = Scene::new(&json!({}));
    let keeps = [("KEEP_RESULTS_SEC", "600"), ("KEEP_INPUTS_SEC", "600")];
    let service = start(&scene, &keeps);
    ends_alone(&scene, "<e/>");
    let kept = "SELECT (SELECT count(*) FROM job_result) + (SELECT count(*) FROM job_submission)";
    assert_eq!(scene.deployment.count(kept), 2);
    service.stop();
    // Nothing is to be kept any more.
    let service = start(&scene, &[]);
    scene.deployment.comes_to(0, kept);
    let history = "SELECT count(*) FROM job_history";
    assert_eq!(scene.deployment.count(history), 1);
    service.stop();
    let service = start(&scene, &keeps);
    ends_alone(&scene, "<e/>");
    assert_eq!(scene.deployment.count(kept), 2);
    service.stop();
    let forgets = [&keeps[..], &[("JOB_HISTORY_RETENTION_SEC", "1")]].concat();
    let _service = start(&scene, &forgets);
    scene.deployment.comes_to(0, kept);
    scene.deployment.comes_to(0, history);
}

/// Too large for it, say.
#[test]
fn a_result_that_rabbitmq_does_not_take_is_kept() {
    let scene = Scene::on(Deployment::with_own_servers(), &json!({}));
    let keeps = [("KEEP_RESULTS_SEC", "600")];
    let service = start(&scene, &keeps);
    scene.submit(1);
    let task = scene.runs();
    scene
        .deployment
        .comes_to(1, "SELECT count(*) FROM job WHERE status = 'RUNNING'");
    service.stop();
    let output = format!("<e id='out'><!--{}--></e>", "x".repeat(1024 * 1024));
    scene.worker.succeed(&task, &output);
    scene.deployment.limit_messages(256 * 1024);
    let service = start(&scene, &keeps);
    let (result, logs) = scene.client.outcome(task.job);
    assert_eq!(result, ResultType::Error);
    assert!(logs.contains("larger than configured max size"), "{logs}");
    scene.deployment.no_jobs_left();
    let printed = scene.does(&["jobs", "result", &task.job.to_string()]);
    assert_eq!(printed.trim_end(), output);
    let whereabouts = story(&service, task.job)["whereabouts"].to_string();
    assert!(
        whereabouts.contains("RabbitMQ did not take it."),
        "{whereabouts}"
    );
}

/// The client may have been told the first time, and be gone because of that.
#[test]
fn it_is_said_that_a_client_may_have_what_is_kept() {
    let scene = Scene::new(&json!({}));
    let service = start(&scene, &[]);
    let job = scene.submit(1)[0];
    let task = scene.runs();
    let runs = "SELECT count(*) FROM job WHERE status = 'RUNNING'";
    scene.deployment.comes_to(1, runs);
    assert!(service.stop().success());
    let variables = [&scene.variables()[..], &[("KEEP_RESULTS_SEC", "600")]].concat();
    let held = Held::at("after telling", &scene.deployment, &variables);
    scene.worker.succeed(&task, "<e id='out'/>");
    assert_eq!(scene.client.outcome(job).0, ResultType::Succeeded);
    held.kill();
    scene
        .client
        .peer
        .delete_queue(&format!("jobs.{job}.result"));
    let service = start(&scene, &[("KEEP_RESULTS_SEC", "600")]);
    scene.deployment.no_jobs_left();
    let whereabouts = story(&service, job)["whereabouts"].to_string();
    assert!(
        whereabouts.contains("It is kept here, 13 bytes"),
        "{whereabouts}"
    );
    assert!(whereabouts.contains("so it may have it."), "{whereabouts}");
}

#[test]
fn what_is_kept_goes_when_its_client_deletes_the_job() {
    let scene = Scene::new(&json!({}));
    let keeps = [("KEEP_RESULTS_SEC", "600"), ("KEEP_INPUTS_SEC", "600")];
    let _service = start(&scene, &keeps);
    let job = ends_alone(&scene, "<e/>");
    let other = ends_alone(&scene, "<e/>");
    let kept = |job: Uuid| {
        format!(
            "SELECT (SELECT count(*) FROM job_result WHERE job_id = '{job}')
                  + (SELECT count(*) FROM job_submission WHERE job_id = '{job}')"
        )
    };
    assert_eq!(scene.deployment.count(&kept(job)), 2);
    scene.client.cancel(job);
    scene.deployment.comes_to(0, &kept(job));
    assert_eq!(scene.deployment.count(&kept(other)), 2);
}

/// A job that has ended, and whose input is kept.
fn to_be_run_again(scene: &Scene) -> Uuid {
    let (job, mut submission) = scene.client.submission(TASK);
    let parameters = json!({"price": 1.5, "solver": "one"});
    submission.params_dict = Some(wire::protobuf_struct(parameters.as_object().unwrap()));
    submission.timeout_ms = Some(600_000);
    scene.client.listen(job);
    scene.client.send(&submission);
    let task = scene.runs();
    scene.worker.fail(&task);
    assert_eq!(scene.client.outcome(job).0, ResultType::Error);
    scene.deployment.no_jobs_left();
    job
}

/// What the next task is given, and its job.
fn given(scene: &Scene) -> (Uuid, Value) {
    let message = scene.worker.take_message();
    let task = crate::harness::peers::Task::of(&message);
    scene.worker.start(&task);
    scene.worker.succeed(&task, "<e id='again'/>");
    (task.job, message.json())
}

#[test]
fn a_job_runs_again_by_page_and_command_line() {
    let scene = Scene::new(&json!({}));
    let keeps = [("KEEP_RESULTS_SEC", "600"), ("KEEP_INPUTS_SEC", "600")];
    let service = start(&scene, &keeps);
    let job = to_be_run_again(&scene);
    let id = job.to_string();
    let anna = Operator::at(&service, ANNA);
    let path = format!("/jobs/{id}");
    anna.get(&path).is(200, "Run again");
    let ben = Operator::at(&service, BEN).get(&path);
    assert!(!ben.body.contains("Run again"));
    let sent = anna.send(&[("do", "again"), ("id", &id), ("job", &id)]);
    anna.done(&sent, &format!("job {id} runs again as job "));
    let (by_page, task) = given(&scene);
    assert_ne!(by_page, job);
    let text = task.to_string();
    assert!(
        text.contains("\"price\":1.5") && text.contains("\"solver\":\"one\""),
        "{text}"
    );
    scene.deployment.no_jobs_left();
    let result = scene.does(&["jobs", "result", &by_page.to_string()]);
    assert_eq!(result.trim_end(), "<e id='again'/>");
    assert_eq!(story(&service, by_page)["timeout_ms"], 600_000);
    assert_eq!(story(&service, by_page)["reference"], "a reference");

    let said = scene.does(&[
        "jobs",
        "rerun",
        &id,
        "--unchecked",
        "--param",
        "price=2",
        "--param",
        "more=x",
    ]);
    assert!(
        said.contains(&format!("job {id} runs again as job ")),
        "{said}"
    );
    let (by_command, task) = given(&scene);
    assert!(said.contains(&by_command.to_string()), "{said}");
    let text = task.to_string();
    for expected in ["\"price\":2.0", "\"solver\":\"one\"", "\"more\":\"x\""] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    scene.deployment.no_jobs_left();

    let compared = scene.does(&["jobs", "compare", &id, &by_command.to_string()]);
    let line = |what: &str| {
        let mut lines = compared.lines();
        let found = lines.find(|line| line.contains(what));
        found
            .unwrap_or_else(|| panic!("{what}: {compared}"))
            .split_whitespace()
            .collect::<Vec<_>>()
    };
    assert_eq!(
        line("parameter price"),
        ["*", "parameter", "price", "1.5", "2.0"]
    );
    assert_eq!(
        line("parameter solver"),
        ["parameter", "solver", "one", "one"]
    );
    assert_eq!(line("state"), ["*", "state", "failed", "succeeded"]);
    assert_eq!(line("messages: info"), ["messages:", "info", "1", "1"]);
    let compared = scene.does(&["jobs", "compare", "--json", &id, &by_command.to_string()]);
    let compared: Value = serde_json::from_str(&compared).unwrap();
    assert!(
        compared
            .as_array()
            .unwrap()
            .iter()
            .any(|line| line["one"] == "1.5")
    );
}

#[test]
fn a_run_again_is_followed_to_its_end() {
    let scene = Scene::new(&json!({}));
    let _service = start(&scene, &[("KEEP_INPUTS_SEC", "600")]);
    let job = to_be_run_again(&scene).to_string();
    let file = scene.deployment.folder.join("again.esdl");
    let arguments = ["jobs", "rerun", &job, "--output", file.to_str().unwrap()];
    let child = scene.deployment.command(&arguments).spawn().unwrap();
    given(&scene);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "<e id='again'/>");
}

/// The input is the client's, byte for byte.
#[test]
fn what_is_run_again_is_what_was_submitted() {
    let scene = Scene::new(&json!({"paused": true}));
    let service = start(&scene, &[("KEEP_INPUTS_SEC", "600")]);
    // Kept also of a job that waits for its turn, and compressed.
    let job = scene.submit(1)[0];
    scene.held(1);
    let kept = "SELECT count(*) FROM job_submission WHERE bytes > octet_length(message)";
    scene.deployment.comes_to(1, kept);
    let story = story(&service, job);
    assert_eq!(story["can_run_again"], true);
    assert!(!story.to_string().contains(ESDL));
}

/// As those of a submission are.
#[test]
fn changed_parameters_are_held_against_their_workflow() {
    let scene = Scene::new(&json!({"workflow_parameters": [
        {"parameter_type": "float", "key_name": "price", "maximum": 100.0},
    ]}));
    let _service = start(&scene, &[("KEEP_INPUTS_SEC", "600")]);
    let job = to_be_run_again(&scene).to_string();
    for (changed, said) in [
        ("prise=5", "did you mean price?"),
        ("price=500", "price"),
        ("price=abc", "price"),
    ] {
        let arguments = ["jobs", "rerun", &job, "--param", changed];
        let mut command = scene.deployment.command(&arguments);
        let output = command.envs(scene.variables()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            text.contains(said) && text.contains("nothing was submitted"),
            "{text}"
        );
    }
}

#[test]
fn nothing_runs_again_where_no_input_is_kept() {
    let scene = Scene::new(&json!({}));
    let service = start(&scene, &[]);
    let job = to_be_run_again(&scene);
    let kept = "SELECT count(*) FROM job_submission";
    assert_eq!(scene.deployment.count(kept), 0);
    let id = job.to_string();
    let anna = Operator::at(&service, ANNA);
    let page = anna.get(&format!("/jobs/{id}"));
    assert!(!page.body.contains("Run again"));
    let refused = anna.send(&[("do", "again"), ("id", &id)]);
    refused.is(400, "is not kept: KEEP_INPUTS_SEC is 0");
    let output = scene.deployment.command(&["jobs", "rerun", &id]).output();
    let output = output.unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("is not kept: KEEP_INPUTS_SEC is 0"), "{said}");
}

/// Submitted with the SDK, and computed by Celery's worker.
#[test]
fn a_real_worker_runs_a_job_again() {
    let deployment = Deployment::new();
    let definitions = format!("{PYTHON}/workflows.json");
    let variables = [
        ("WORKFLOW_CONFIG_PATH", definitions.as_str()),
        ("KEEP_INPUTS_SEC", "600"),
    ];
    let service = deployment.start_with(&variables);
    let _worker = CeleryWorker::new(&deployment, "4.3");
    let stories = SdkClient::new(&deployment, "4.3", &[order("raise")]).stories();
    assert_eq!(stories[0]["result"], "ERROR");
    deployment.no_jobs_left();
    let failed: Uuid = {
        let mut sql = deployment.sql();
        let row = sql.query_one("SELECT job_id FROM job_history", &[]);
        row.unwrap().get(0)
    };
    let file = deployment.folder.join("again.esdl");
    let (id, path) = (failed.to_string(), file.to_str().unwrap());
    let changed = "behaviour=succeed";
    let arguments = [
        "jobs",
        "rerun",
        &id,
        "--unchecked",
        "--param",
        changed,
        "--output",
        path,
    ];
    let output = deployment.command(&arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let esdl = fs::read_to_string(&file).unwrap();
    assert!(esdl.contains("id=\"output-"), "{esdl}");
    let told = story(&service, failed);
    assert_eq!(told["esdl_messages"], json!([]));
    let succeeded = "SELECT count(*) FROM job_story JOIN job_history USING (job_id)
                     WHERE outcome = 'SUCCEEDED' AND esdl_messages LIKE '%an-asset%'
                       AND parameters LIKE '%\"succeed\"%'";
    deployment.comes_to(1, succeeded);
}
