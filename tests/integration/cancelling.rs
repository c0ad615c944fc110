//! Cancels, whenever they come.

use omotes_orchestrator::wire::{job_result::ResultType, job_status_update::JobStatus};
use prost::Message;

use crate::harness::deployment::Deployment;
use crate::harness::peers::{Client, Worker};

const OUTPUT: &str = "<e id='out-1'/>";

fn cancelled() -> (ResultType, String) {
    (ResultType::Cancelled, String::new())
}

#[test]
fn a_running_job_is_cancelled() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start_single_file();
    let job = client.submit("workflow_1");
    let task = worker.take();
    worker.start(&task);
    assert_eq!(client.status(job), JobStatus::Enqueued);
    assert_eq!(client.status(job), JobStatus::Running);
    client.cancel(job);
    assert_eq!(worker.revoked(), task.id);
    assert_eq!(client.status(job), JobStatus::Cancelled);
    assert_eq!(client.outcome(job), cancelled());
    // Again, and the worker that had not heard it still delivers.
    client.cancel(job);
    client.cancels_handled();
    worker.succeed(&task, OUTPUT);
    worker.results_handled();
    client.heard_nothing_more(&worker, job);
    let sql = "SELECT count(*) FROM esdl_time_series_info WHERE deactivated_at IS NOT NULL";
    deployment.comes_to(1, sql);
    deployment.no_jobs_left();
}

#[test]
fn a_waiting_jobs_task_is_revoked_when_a_worker_takes_it_later() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let _service = deployment.start_single_file();
    let job = client.submit("workflow_1");
    assert_eq!(client.status(job), JobStatus::Enqueued);
    // No worker is up to hear the revoke.
    client.cancel(job);
    assert_eq!(client.status(job), JobStatus::Cancelled);
    assert_eq!(client.outcome(job), cancelled());
    let worker = Worker::new(&deployment, "workflow_1");
    let task = worker.take();
    worker.start(&task);
    assert_eq!(worker.revoked(), task.id);
    client.heard_nothing_more(&worker, job);
}

#[test]
fn a_cancel_before_its_submission_is_remembered() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start_single_file();
    let (job, submission) = client.submission("workflow_1");
    client.listen(job);
    client.cancel(job);
    client.cancels_handled();
    client.hears_nothing(job);
    client.send(&submission);
    assert_eq!(client.status(job), JobStatus::Cancelled);
    assert_eq!(client.outcome(job), cancelled());
    // The submission once more, as after a crash.
    client.send(&submission);
    client.submissions_handled();
    client.heard_nothing_more(&worker, job);
    assert_eq!(worker.waiting(), 0);
}

#[test]
fn submission_and_cancel_that_were_both_waiting_end_in_one_cancellation() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let jobs: Vec<_> = (0..20)
        .map(|_| {
            let (job, submission) = client.submission("workflow_1");
            client.listen(job);
            client
                .peer
                .send("job_submissions", &submission.encode_to_vec());
            client.cancel(job);
            job
        })
        .collect();
    let _service = deployment.start();
    for job in &jobs {
        assert_eq!(client.outcome(*job), cancelled());
    }
    let sql = "SELECT count(*) FROM job_history WHERE outcome = 'CANCELLED'";
    deployment.comes_to(20, sql);
    deployment.no_jobs_left();
    let worker = Worker::new(&deployment, "workflow_1");
    for job in &jobs {
        client.all_handled(&worker, *job);
        assert_eq!(client.peer.queue_length(&format!("jobs.{job}.result")), 0);
    }
}

#[test]
fn deleting_a_finished_job_retires_its_series() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start_single_file();
    let job = client.submit("workflow_1");
    let task = worker.take();
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    let kept = "SELECT count(*) FROM esdl_time_series_info WHERE deactivated_at IS NULL";
    deployment.comes_to(1, kept);
    client.cancel(job);
    deployment.comes_to(0, kept);
    client.all_handled(&worker, job);
    assert_eq!(client.peer.queue_length(&format!("jobs.{job}.result")), 0);
}
