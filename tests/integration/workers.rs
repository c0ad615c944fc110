//! What is known of Celery's workers, and the tasks that none of them has.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use omotes_orchestrator::wire::{job_status_update::JobStatus, protobuf_struct};
use rstest::rstest;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::deployment::{Deployment, Service, eventually};
use crate::harness::peers::Client;
use crate::python::{CeleryWorker, PYTHON};

/// What operators are promised.
const SEEN_WITHIN: Duration = Duration::from_secs(30);

/// A service that looks at the workers each so many seconds.
fn start(deployment: &Deployment, period: &str, variables: &[(&str, &str)]) -> Service {
    let workflows = format!("{PYTHON}/workflows.json");
    let own = [
        ("WORKFLOW_CONFIG_PATH", workflows.as_str()),
        ("WORKERS_PERIOD_SEC", period),
    ];
    deployment.start_with(&[&own, variables].concat())
}

fn name(worker: &CeleryWorker) -> String {
    format!("worker-steerable@{}", worker.host)
}

/// Waits until a worker is in this state.
fn comes_to_be(deployment: &Deployment, worker: &CeleryWorker, state: &str) {
    let since = Instant::now();
    let mut sql = deployment.sql();
    eventually(&format!("{} is {state}", worker.host), || {
        let sql = sql.query_opt(
            "SELECT FROM worker WHERE host = $1 AND state = $2",
            &[&name(worker), &state],
        );
        sql.unwrap().map(drop)
    });
    let took = since.elapsed();
    assert!(took < SEEN_WITHIN, "{state} was seen after {took:?}");
}

/// A job that does what it is told.
fn job(client: &Client, behaviour: &str) -> Uuid {
    let (job, mut submission) = client.submission("steerable");
    let params = json!({"behaviour": behaviour, "number": 1.5});
    submission.params_dict = Some(protobuf_struct(params.as_object().unwrap()));
    client.listen(job);
    client.send(&submission);
    job
}

/// A job that runs until the file is there.
fn running_job(deployment: &Deployment, client: &Client, file: &str) -> Uuid {
    let file = deployment.folder.join(file);
    let job = job(client, &format!("wait for {}", file.display()));
    assert_eq!(client.status(job), JobStatus::Enqueued);
    assert_eq!(client.status(job), JobStatus::Running);
    job
}

fn command(deployment: &Deployment, arguments: &[&str]) -> (Option<i32>, String) {
    let output = deployment.command(arguments).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

/// What the command says of a worker.
fn view(deployment: &Deployment, worker: &CeleryWorker) -> Value {
    let output = deployment.command(&["workers", "--json"]).output().unwrap();
    let all: Value = serde_json::from_slice(&output.stdout).unwrap();
    let workers = all["workers"].as_array().unwrap();
    let own = workers.iter().find(|one| one["host"] == name(worker));
    own.unwrap().clone()
}

/// From its start to its end, each step within the time that operators are promised.
#[rstest]
#[case::celery_5_3("4.1", "5.3.6")]
#[case::celery_5_7("4.3", "5.7.0")]
fn the_life_of_a_worker_is_followed(#[case] sdk: &str, #[case] celery: &str) {
    let deployment = Deployment::new();
    let service = start(&deployment, "15", &[]);
    let client = Client::new(&deployment);
    let mut worker = CeleryWorker::new(&deployment, sdk);
    comes_to_be(&deployment, &worker, "idle");
    let idle = view(&deployment, &worker);
    assert_eq!(idle["queues"], json!(["steerable"]));
    assert_eq!(idle["celery"], celery);
    assert_eq!((&idle["pool"], &idle["pool_size"]), (&json!("prefork"), &json!(1)));

    let job = running_job(&deployment, &client, "go on");
    comes_to_be(&deployment, &worker, "busy");
    let busy = view(&deployment, &worker);
    assert_eq!(busy["tasks"][0]["job_id"], job.to_string());
    assert_eq!(busy["tasks"][0]["workflow"], "steerable");

    worker.signal("-STOP");
    comes_to_be(&deployment, &worker, "silent");
    worker.signal("-CONT");
    comes_to_be(&deployment, &worker, "busy");

    let (code, said) = command(&deployment, &["workers", "drain", &worker.host]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("takes nothing more; it finishes the task that it has"), "{said}");
    comes_to_be(&deployment, &worker, "draining");
    File::create(deployment.folder.join("go on")).unwrap();
    comes_to_be(&deployment, &worker, "drained");
    let left = self::job(&client, "succeed");
    assert_eq!(client.status(left), JobStatus::Enqueued);
    let (code, said) = command(&deployment, &["workers", "resume", &name(&worker)]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("takes tasks from steerable"), "{said}");
    comes_to_be(&deployment, &worker, "idle");
    assert_eq!(client.status(left), JobStatus::Running);

    worker.kill();
    comes_to_be(&deployment, &worker, "gone");
    service.logged(&format!("worker {}: gone", name(&worker)));
}
