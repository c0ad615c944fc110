//! Events of workers, in any order and from any task.

use omotes_orchestrator::wire::{job_result::ResultType, job_status_update::JobStatus};
use uuid::Uuid;

use crate::harness::deployment::Deployment;
use crate::harness::peers::{Client, Task, Worker};

const OUTPUT: &str = "<e id='out-1'/>";

#[test]
fn a_start_delivered_twice_counts_once() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start_single_file();
    let job = client.submit("workflow_1");
    let task = worker.take();
    worker.start_as(&task, "the same message");
    worker.start_as(&task, "the same message");
    worker.progress_handled();
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    deployment.comes_to(1, "SELECT count(*) FROM job_history WHERE starts = 1");
}

#[test]
fn what_a_worker_says_before_its_result_is_heard_before_it() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let tasks: Vec<Task> = (0..50)
        .map(|_| {
            let job = client.submit("workflow_1");
            assert_eq!(client.status(job), JobStatus::Enqueued);
            worker.take()
        })
        .collect();
    // So that it finds everything at once.
    service.signal("-STOP");
    for task in &tasks {
        worker.start(task);
        worker.progress(task, 1.0);
        // RabbitMQ answers when the queue has got what was sent before.
        worker.peer.queue_length("omotes_task_progress_events");
        worker.succeed(task, OUTPUT);
    }
    service.signal("-CONT");
    for task in &tasks {
        assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
        for kind in ["progress", "status"] {
            let queue = format!("jobs.{}.{kind}", task.job);
            assert_eq!(client.peer.queue_length(&queue), 1, "{queue}");
        }
        assert_eq!(client.status(task.job), JobStatus::Running);
    }
}

#[test]
fn a_task_that_is_started_too_often_ends_its_job() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start_with(&[("DELIVERY_LIMIT_THRESHOLD_PER_JOB", "2")]);
    let job = client.submit("workflow_1");
    let task = worker.take();
    for _ in 0..3 {
        worker.start(&task);
    }
    assert_eq!(worker.revoked(), task.id);
    let logs = "Job cannot be processed due to being retried the maximum number of times.";
    assert_eq!(client.outcome(job), (ResultType::Error, logs.to_owned()));
    let statuses = [client.status(job), client.status(job), client.status(job)];
    assert_eq!(
        statuses,
        [JobStatus::Enqueued, JobStatus::Running, JobStatus::Running]
    );
    client.heard_nothing_more(&worker, job);
}

#[test]
fn progress_that_trails_its_tasks_result_is_ignored() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start_single_file();
    let job = client.submit("workflow_1");
    let task = worker.take();
    worker.start_as(&task, "the start");
    worker.succeed(&task, OUTPUT);
    client.outcome(job);
    worker.progress(&task, 1.0);
    worker.start_as(&task, "the start");
    // Says that nothing was revoked.
    worker.progress_handled();
    assert_eq!(client.peer.queue_length(&format!("jobs.{job}.progress")), 0);
}

#[test]
fn a_task_that_is_not_its_jobs_current_one_is_revoked_and_its_result_ignored() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start_single_file();
    let job = client.submit("workflow_1");
    let task = worker.take();
    let orphan = Task {
        job,
        id: Uuid::new_v4().to_string(),
    };
    worker.start(&orphan);
    assert_eq!(worker.revoked(), orphan.id);
    worker.progress(&orphan, 0.5);
    assert_eq!(worker.revoked(), orphan.id);
    worker.succeed(&orphan, "<e id='orphan'/>");
    worker.results_handled();
    worker.start(&task);
    assert_eq!(client.status(job), JobStatus::Enqueued);
    assert_eq!(client.status(job), JobStatus::Running);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.result(job).output_esdl.as_deref(), Some(OUTPUT));
    client.heard_nothing_more(&worker, job);
}

#[test]
fn events_of_an_unknown_job_are_one_line_each_and_hold_up_nothing() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let stranger = Task {
        job: Uuid::new_v4(),
        id: "a stranger's task".to_owned(),
    };
    worker.start(&stranger);
    assert_eq!(worker.revoked(), stranger.id);
    worker.succeed(&stranger, OUTPUT);
    service.logged(&format!(
        "job {}: task a stranger's task is revoked: the job is unknown",
        stranger.job
    ));
    service.logged(&format!(
        "job {}: a result is ignored: the job is unknown",
        stranger.job
    ));
    let job = client.submit("workflow_1");
    let task = worker.take();
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    deployment.no_jobs_left();
    assert_eq!(deployment.count("SELECT count(*) FROM job_history"), 1);
}

#[test]
fn a_submission_delivered_again_has_no_effect() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start_single_file();
    let (job, submission) = client.submission("workflow_1");
    client.listen(job);
    client.send(&submission);
    client.send(&submission);
    let task = worker.take();
    client.submissions_handled();
    assert_eq!(worker.waiting(), 0);
    worker.start(&task);
    assert_eq!(client.status(job), JobStatus::Enqueued);
    assert_eq!(client.status(job), JobStatus::Running);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    // Not after its end either.
    client.send(&submission);
    client.submissions_handled();
    assert_eq!(worker.waiting(), 0);
    client.heard_nothing_more(&worker, job);
}

#[test]
fn a_timeout_beyond_a_signed_integer_is_kept() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start();
    let (_, mut submission) = client.submission("workflow_1");
    submission.timeout_ms = Some(u32::MAX);
    client.send(&submission);
    let task = worker.take();
    worker.start(&task);
    let sql = "SELECT timeout_after_ms FROM job";
    crate::harness::deployment::eventually("the row", || {
        let row = deployment.sql().query_opt(sql, &[]).unwrap()?;
        (row.get::<_, i64>(0) == i64::from(u32::MAX)).then_some(())
    });
}
