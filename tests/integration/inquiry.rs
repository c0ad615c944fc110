//! A task that is started once more although nobody died: RabbitMQ restarted, or lost a worker who
//! goes on. And what is still a crash loop.

use std::fs::File;

use omotes_orchestrator::wire::{
    job_result::ResultType, job_status_update::JobStatus, protobuf_struct,
};
use rstest::rstest;
use serde_json::json;
use uuid::Uuid;

use crate::harness::deployment::{Deployment, eventually, management};
use crate::harness::peers::{Client, Task, Worker, running_job};
use crate::python::{self, CeleryWorker};

const OUTPUT: &str = "<e id='out-1'/>";
const CRASH_LOOP: &str =
    "Job cannot be processed due to being retried the maximum number of times.";

fn ends_as_a_crash_loop(client: &Client, task: &Task) {
    let expected = (ResultType::Error, CRASH_LOOP.to_owned());
    assert_eq!(client.outcome(task.job), expected);
}

fn restart_broker(deployment: &Deployment) {
    deployment.rabbitmqctl(&["stop_app"]);
    deployment.rabbitmqctl(&["start_app"]);
}

#[rstest]
#[case::alone(false)]
#[case::with_the_service(true)]
fn a_restart_of_the_broker_is_nobodys_death(#[case] with_service: bool) {
    let deployment = Deployment::with_own_servers();
    let mut service = deployment.start();
    let task = {
        let client = Client::new(&deployment);
        let worker = Worker::new(&deployment, "workflow_1");
        running_job(&client, &worker, None)
    };
    if with_service {
        assert!(service.stop().success());
        restart_broker(&deployment);
        service = deployment.start();
    } else {
        restart_broker(&deployment);
        service.logged("the session with RabbitMQ has ended");
        service.wait_until_ready();
    }
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    worker.start(&task);
    service.logged("its task was started 2 times, and goes on");
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    assert_eq!(worker.revoked(), task.id);
    deployment.no_jobs_left();
    client.heard_nothing_more(&worker, task.job);
    let sql = "SELECT count(*) FROM job_history WHERE outcome = 'SUCCEEDED' AND starts = 2";
    assert_eq!(deployment.count(sql), 1);
}

#[test]
fn what_brings_the_broker_down_each_time_comes_to_an_end() {
    const EXCUSED: usize = 10;
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start_single_file();
    let task = running_job(&client, &worker, None);
    let mut sql = deployment.sql();
    for number in 1..=EXCUSED {
        sql.batch_execute("UPDATE broker_session SET begun_at = clock_timestamp()")
            .unwrap();
        worker.start(&task);
        worker.progress_handled();
        let excused = "SELECT count(*) FROM job_starts WHERE verdict = 'INTERRUPTED'";
        assert_eq!(deployment.count(excused), i64::try_from(number).unwrap());
    }
    sql.batch_execute("UPDATE broker_session SET begun_at = clock_timestamp()")
        .unwrap();
    worker.start(&task);
    assert_eq!(worker.revoked(), task.id);
    ends_as_a_crash_loop(&client, &task);
    client.heard_nothing_more(&worker, task.job);
}

#[test]
fn a_worker_that_only_lost_its_connection_is_not_dead() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let task = running_job(&client, &worker, None);
    worker.start(&task);
    service.logged("its task was started 2 times: asking whether a worker died");
    // The first one is not back yet.
    worker.answer(&task, 1);
    worker.answer(&task, 2);
    service.logged("its task was started 2 times, and goes on");
    // A third copy, and all three live.
    worker.start(&task);
    service.logged("its task was started 3 times: asking whether a worker died");
    worker.answer(&task, 2);
    worker.answer(&task, 3);
    service.logged("its task was started 3 times, and goes on");
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    assert_eq!(worker.revoked(), task.id);
    deployment.no_jobs_left();
    client.heard_nothing_more(&worker, task.job);
}

/// How many workers say that they run a task that was started twice, if they say anything.
#[rstest]
#[case::none_answers(None)]
#[case::none_runs_it(Some(0))]
#[case::one_runs_it(Some(1))]
fn a_worker_that_died_is_found_out(#[case] alive: Option<usize>) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let task = running_job(&client, &worker, None);
    worker.start(&task);
    service.logged("asking whether a worker died");
    if let Some(alive) = alive {
        worker.answer(&task, alive);
    }
    assert_eq!(worker.revoked(), task.id);
    ends_as_a_crash_loop(&client, &task);
    deployment.no_jobs_left();
    client.heard_nothing_more(&worker, task.job);
}

#[test]
fn the_first_word_about_a_suspected_job_counts() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let [done, cancelled, died] = [(); 3].map(|()| {
        let task = running_job(&client, &worker, None);
        worker.start(&task);
        service.logged(&format!(
            "job {} (a reference): its task was started",
            task.job
        ));
        task
    });
    worker.succeed(&done, OUTPUT);
    assert_eq!(client.outcome(done.job).0, ResultType::Succeeded);
    assert_eq!(worker.revoked(), done.id);
    client.cancel(cancelled.job);
    assert_eq!(client.outcome(cancelled.job).0, ResultType::Cancelled);
    assert_eq!(worker.revoked(), cancelled.id);
    // Two in so short a time are a crash loop, whatever the workers would say.
    worker.start(&died);
    ends_as_a_crash_loop(&client, &died);
    assert_eq!(worker.revoked(), died.id);
    deployment.no_jobs_left();
}

#[test]
fn what_a_replica_left_open_is_asked_by_another() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start_with(&[("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1")]);
    let task = running_job(&client, &worker, None);
    deployment.comes_to(1, "SELECT count(*) FROM job_starts");
    let left = "INSERT INTO job_starts (job_id, started_at, message_id, verdict)
                VALUES ($1, clock_timestamp(), 'from the other replica', 'SUSPECTED')";
    deployment.sql().execute(left, &[&task.job]).unwrap();
    worker.answer(&task, 2);
    service.logged("its task was started 2 times, and goes on");
    deployment.comes_to(1, "SELECT count(*) FROM job_starts WHERE verdict = 'COPY'");
    worker.start_as(&task, "from the other replica");
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    assert_eq!(worker.revoked(), task.id);
}

#[test]
fn a_task_that_runs_again_after_its_result_is_revoked() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start_single_file();
    let job = client.submit("workflow_1");
    let task = worker.take();
    worker.start_as(&task, "the start");
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    deployment.no_jobs_left();
    // What trails the result is none.
    worker.start_as(&task, "the start");
    worker.progress_handled();
    worker.start_as(&task, "another start");
    assert_eq!(worker.revoked(), task.id);
    worker.succeed(&task, OUTPUT);
    worker.results_handled();

    let overtaken = client.submit("workflow_1");
    let task = worker.take();
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(overtaken).0, ResultType::Succeeded);
    worker.start(&task);
    worker.progress_handled();
    assert_eq!(client.status(overtaken), JobStatus::Enqueued);
    client.heard_nothing_more(&worker, overtaken);
}

/// As a replica of a later version may have written it beside this one.
#[test]
fn what_a_later_version_says_of_starts_puts_no_job_out_of_reach() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start_single_file();
    let task = running_job(&client, &worker, None);
    deployment.comes_to(1, "SELECT count(*) FROM job_starts");
    let mut sql = deployment.sql();
    sql.batch_execute("UPDATE job_starts SET verdict = 'OF A LATER VERSION'")
        .unwrap();
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    deployment.no_jobs_left();
    sql.batch_execute("UPDATE job_history SET start_ids = 'of a later version'")
        .unwrap();
    worker.start(&task);
    client.heard_nothing_more(&worker, task.job);
    assert!(!service.log().contains("of a later version"));
}

/// Submits a job that runs until the file is there.
fn waiting_job(client: &Client, file: &str) -> Uuid {
    let (job, mut submission) = client.submission("steerable");
    let params = json!({"behaviour": format!("wait for {file}"), "number": 1.5});
    submission.params_dict = Some(protobuf_struct(params.as_object().unwrap()));
    client.listen(job);
    client.send(&submission);
    job
}

/// RabbitMQ closes the connection on which a worker takes its tasks, and no other.
fn close_connection(deployment: &Deployment, worker: &CeleryWorker) {
    let queue = format!("worker-steerable@{}.celery.pidbox", worker.host);
    let name = eventually("the worker's connection", || {
        let path = format!("consumers/{}", deployment.celery_vhost());
        let consumers = management("GET", &path, None);
        let mut consumers = consumers.as_array()?.iter();
        let consumer = consumers.find(|consumer| consumer["queue"]["name"] == queue)?;
        let name = consumer["channel_details"]["connection_name"].as_str()?;
        Some(name.replace(' ', "%20").replace('>', "%3E"))
    });
    management("DELETE", &format!("connections/{name}"), None);
}

#[rstest]
#[case::celery_5_3("4.1")]
#[case::celery_5_4("4.2")]
#[case::celery_5_7("4.3")]
fn a_celery_worker_that_lost_its_connection_is_not_dead(#[case] sdk: &str) {
    let deployment = Deployment::new();
    let service = python::start(&deployment);
    let client = Client::new(&deployment);
    let first = CeleryWorker::new(&deployment, sdk);
    let file = deployment.folder.join("go on");
    let job = waiting_job(&client, file.to_str().unwrap());
    assert_eq!(client.status(job), JobStatus::Enqueued);
    assert_eq!(client.status(job), JobStatus::Running);
    let _second = CeleryWorker::new(&deployment, sdk);
    close_connection(&deployment, &first);
    service.logged("its task was started 2 times: asking whether a worker died");
    service.logged("its task was started 2 times, and goes on");
    File::create(file).unwrap();
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    deployment.no_jobs_left();
    assert_eq!(client.peer.queue_length(&format!("jobs.{job}.status")), 0);
    assert_eq!(client.peer.queue_length(&format!("jobs.{job}.result")), 0);
}

#[rstest]
#[case::and_another_one_gets_the_task(true)]
#[case::and_the_same_one_gets_it_again(false)]
fn a_celery_worker_survives_a_restart_of_the_broker(#[case] another: bool) {
    let deployment = Deployment::with_own_servers();
    let service = python::start(&deployment);
    let client = Client::new(&deployment);
    let first = CeleryWorker::new(&deployment, "4.3");
    let file = deployment.folder.join("go on");
    let job = waiting_job(&client, file.to_str().unwrap());
    assert_eq!(client.status(job), JobStatus::Enqueued);
    assert_eq!(client.status(job), JobStatus::Running);
    let second = another.then(|| CeleryWorker::new(&deployment, "4.3"));
    if second.is_some() {
        // Its child goes on, but it is not the one to get its task once more.
        first.signal("-STOP");
    }
    restart_broker(&deployment);
    if second.is_some() {
        service.logged("its task was started 2 times, and goes on");
        first.signal("-CONT");
    }
    File::create(file).unwrap();
    let client = Client::new(&deployment);
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    deployment.no_jobs_left();
    assert_eq!(client.peer.queue_length(&format!("jobs.{job}.status")), 0);
    assert_eq!(client.peer.queue_length(&format!("jobs.{job}.result")), 0);
}

/// One at a time is alive of what kills its worker, however many workers there are.
#[test]
fn a_task_that_kills_one_celery_worker_after_the_other_is_a_crash_loop() {
    let deployment = Deployment::new();
    let service = python::start(&deployment);
    let client = Client::new(&deployment);
    let _workers = [(); 2].map(|()| CeleryWorker::new(&deployment, "4.3"));
    let (job, mut submission) = client.submission("steerable");
    let params = json!({"behaviour": "die", "number": 1.5});
    submission.params_dict = Some(protobuf_struct(params.as_object().unwrap()));
    client.listen(job);
    client.send(&submission);
    assert_eq!(
        client.outcome(job),
        (ResultType::Error, CRASH_LOOP.to_owned())
    );
    assert!(!service.log().contains("and goes on"));
    deployment.no_jobs_left();
}
