//! What is kept of jobs for a while: output ESDLs whose clients have gone.

use std::fs;

use serde_json::json;
use uuid::Uuid;

use crate::acting::{ACCOUNTS, BEN};
use crate::harness::deployment::Service;
use crate::harness::operator::Operator;
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
    assert!(said.contains("is kept: KEEP_RESULTS_SEC is 0"), "{said}");
    drop(service);
}

#[test]
fn what_is_kept_is_forgotten_in_time_and_with_the_history() {
    let scene = Scene::new(&json!({}));
    let keeps = [("KEEP_RESULTS_SEC", "600")];
    let service = start(&scene, &keeps);
    ends_alone(&scene, "<e/>");
    let kept = "SELECT count(*) FROM job_result";
    assert_eq!(scene.deployment.count(kept), 1);
    service.stop();
    // Nothing is to be kept any more.
    let service = start(&scene, &[]);
    scene.deployment.comes_to(0, kept);
    let history = "SELECT count(*) FROM job_history";
    assert_eq!(scene.deployment.count(history), 1);
    service.stop();
    let service = start(&scene, &keeps);
    ends_alone(&scene, "<e/>");
    assert_eq!(scene.deployment.count(kept), 1);
    service.stop();
    let forgets = [&keeps[..], &[("JOB_HISTORY_RETENTION_SEC", "1")]].concat();
    let _service = start(&scene, &forgets);
    scene.deployment.comes_to(0, kept);
    scene.deployment.comes_to(0, history);
}
