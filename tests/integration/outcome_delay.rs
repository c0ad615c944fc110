//! Outcomes that wait until their clients can know what they are about.

use omotes_orchestrator::wire::{
    self, TaskResult, job_result::ResultType, job_status_update::JobStatus,
};
use prost::Message;
use rstest::rstest;
use uuid::Uuid;

use crate::crashes::Held;
use crate::harness::deployment::{Deployment, Service, eventually};
use crate::harness::peers::{Client, Task, Worker, running_job};

/// Longer than any test waits for anything.
const LONG: (&str, &str) = ("OUTCOME_DELAY_MS", "600000");
const OUTPUT: &str = "<e id='out-1'/>";
const RESULTS: &str = "omotes_task_result_events";

fn start_single_file(deployment: &Deployment, delay: (&str, &str)) -> Service {
    deployment.start_with(&[("HANDLER_THREADS", "1"), delay])
}

/// Waits until these jobs' outcomes are committed, and their clients are yet to hear them.
fn are_ending(deployment: &Deployment, jobs: &[Uuid]) {
    let sql = "SELECT count(*) FROM job JOIN job_history USING (job_id) WHERE job_id = ANY($1)";
    eventually("the outcomes are committed", || {
        let row = deployment.sql().query_one(sql, &[&jobs]).unwrap();
        (row.get::<_, i64>(0) == i64::try_from(jobs.len()).unwrap()).then_some(())
    });
}

/// Makes a running job one that was submitted long ago.
fn age(deployment: &Deployment, job: Uuid) {
    let sql = "UPDATE job SET registered_at = now() - interval '1 hour'
               WHERE job_id = $1 AND status = 'RUNNING'";
    // What clients hear comes before its commit.
    eventually("the job runs", || {
        (deployment.sql().execute(sql, &[&job]).unwrap() == 1).then_some(())
    });
}

/// A job that has long been submitted has its whole way: what came before it is handled.
fn an_old_job_gets_its_result(deployment: &Deployment, client: &Client, worker: &Worker) {
    let task = running_job(client, worker, None);
    age(deployment, task.job);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
}

fn in_queue(client: &Client, worker: &Worker) -> [u32; 3] {
    [
        client.peer.queue_length("job_submissions"),
        client.peer.queue_length("job_deletions"),
        worker.peer.queue_length(RESULTS),
    ]
}

#[test]
fn an_outcome_waits_and_nothing_waits_for_it() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = start_single_file(&deployment, LONG);

    let failed = running_job(&client, &worker, None);
    worker.progress(&failed, 0.5);
    assert_eq!(client.progress(failed.job).0, 0.5);
    worker.fail(&failed);
    are_ending(&deployment, &[failed.job]);
    let cancelled = running_job(&client, &worker, None);
    client.cancel(cancelled.job);
    // Its worker hears it at once.
    assert_eq!(worker.revoked(), cancelled.id);
    let refused = client.submit("no such workflow");
    let (cancelled_first, submission) = client.submission("workflow_1");
    client.listen(cancelled_first);
    client.cancel(cancelled_first);
    let noted = "SELECT count(*) FROM job_history WHERE registered_at IS NULL";
    deployment.comes_to(1, noted);
    client.send(&submission);
    let jobs = [failed.job, cancelled.job, refused, cancelled_first];
    are_ending(&deployment, &jobs);

    // The result is certain, as ever.
    client.cancel(failed.job);
    service.logged("a cancel is ignored: the job has ended already");
    an_old_job_gets_its_result(&deployment, &client, &worker);
    for job in jobs {
        client.hears_nothing(job);
    }
    assert_eq!(worker.waiting(), 0);
    assert!(service.stop().success());
    assert_eq!(in_queue(&client, &worker), [2, 1, 1]);

    let _next = start_single_file(&deployment, ("OUTCOME_DELAY_MS", "0"));
    let (result_type, logs) = client.outcome(failed.job);
    assert_eq!(
        (result_type, logs.as_str()),
        (ResultType::Error, "the worker's logs")
    );
    for job in [cancelled.job, cancelled_first] {
        assert_eq!(client.status(job), JobStatus::Cancelled);
        assert_eq!(client.outcome(job).0, ResultType::Cancelled);
    }
    let (result_type, logs) = client.outcome(refused);
    assert_eq!(result_type, ResultType::Error);
    assert!(logs.contains("no such workflow"), "{logs}");
    deployment.no_jobs_left();
    for job in jobs {
        client.hears_nothing(job);
    }
}

#[test]
fn an_outcome_is_told_once_when_its_time_has_come() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = start_single_file(&deployment, ("OUTCOME_DELAY_MS", "2000"));
    let mut sql = deployment.sql();
    let before: jiff::Timestamp = sql.query_one("SELECT now()", &[]).unwrap().get(0);
    let too_early = |sql: &mut postgres::Client| {
        let now: jiff::Timestamp = sql.query_one("SELECT now()", &[]).unwrap().get(0);
        now.duration_since(before).as_millis() < 2000
    };
    let tasks = [(); 3].map(|()| running_job(&client, &worker, None));
    let refused = [(); 3].map(|()| client.submit("no such workflow"));
    for task in &tasks {
        worker.succeed(task, OUTPUT);
    }
    for task in &tasks {
        let result = client.result(task.job);
        assert!(!too_early(&mut sql));
        assert_eq!(result.output_esdl.as_deref(), Some(OUTPUT));
    }
    for job in refused {
        let (result_type, logs) = client.outcome(job);
        assert_eq!(result_type, ResultType::Error);
        assert!(logs.contains("no such workflow"), "{logs}");
    }
    deployment.no_jobs_left();
    client.submissions_handled();
    worker.results_handled();
    for job in tasks.map(|task| task.job).into_iter().chain(refused) {
        client.hears_nothing(job);
    }
    let ended = "SELECT count(*) FROM job_history WHERE outcome IN ('SUCCEEDED', 'REJECTED')";
    assert_eq!(deployment.count(ended), 7);
}

/// Its letter is written at once, and its client hears of it later.
#[rstest]
#[case::undecodable(|job: Uuid| (
    "job_submissions",
    [b"\x0a\x24".as_slice(), job.to_string().as_bytes(), b"\xff"].concat(),
))]
fn a_message_that_waits_has_one_dead_letter(#[case] message: fn(Uuid) -> (&'static str, Vec<u8>)) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let _service = start_single_file(&deployment, ("OUTCOME_DELAY_MS", "1000"));
    let job = Uuid::new_v4();
    client.listen(job);
    let (queue, body) = message(job);
    client.peer.send(queue, &body);
    let letter = client.peer.next(wire::DEAD_LETTERS_QUEUE);
    assert_eq!(letter.body, body);
    assert_eq!(client.outcome(job).0, ResultType::Error);
    client.submissions_handled();
    assert_eq!(client.peer.queue_length(wire::DEAD_LETTERS_QUEUE), 0);
    client.hears_nothing(job);
}

/// What Postgres does not take becomes a letter and an error, each once.
#[test]
fn a_result_that_is_refused_has_one_letter() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = start_single_file(&deployment, ("OUTCOME_DELAY_MS", "1000"));
    let task = running_job(&client, &worker, None);
    let result = TaskResult {
        job_id: task.job.to_string(),
        celery_task_id: task.id.clone(),
        // The guard row of its time series takes no NUL.
        output_esdl: Some("<e id='a&#0;b'/>\0".to_owned()),
        celery_task_type: "workflow_1".to_owned(),
        result_type: 7,
        ..TaskResult::default()
    };
    worker.peer.send(RESULTS, &result.encode_to_vec());
    let letter = worker.peer.next(wire::DEAD_LETTERS_QUEUE);
    assert_eq!(letter.body, result.encode_to_vec());
    assert_eq!(client.outcome(task.job).0, ResultType::Error);
    deployment.no_jobs_left();
    worker.results_handled();
    assert_eq!(worker.peer.queue_length(wire::DEAD_LETTERS_QUEUE), 0);
    client.hears_nothing(task.job);
}

/// A job that has failed at once, on which a service is killed.
fn killed(
    deployment: &Deployment,
    kill: impl FnOnce(&Deployment, &Client, &Worker) -> Task,
) -> (Client, Worker, Task) {
    let client = Client::new(deployment);
    let worker = Worker::new(deployment, "workflow_1");
    let task = kill(deployment, &client, &worker);
    eventually("the result is back in its queue", || {
        (worker.peer.queue_length(RESULTS) == 1).then_some(())
    });
    (client, worker, task)
}

#[rstest]
#[case::before_it_waits(|deployment: &Deployment, client: &Client, worker: &Worker| {
    let service = start_single_file(deployment, LONG);
    let task = running_job(client, worker, None);
    assert!(service.stop().success());
    let held = Held::at("after commit", deployment, &[LONG]);
    worker.fail(&task);
    held.kill();
    task
})]
#[case::while_it_waits(|deployment: &Deployment, client: &Client, worker: &Worker| {
    let service = start_single_file(deployment, LONG);
    let task = running_job(client, worker, None);
    worker.fail(&task);
    are_ending(deployment, &[task.job]);
    service.kill();
    task
})]
fn an_outcome_that_waits_survives_a_kill(#[case] kill: fn(&Deployment, &Client, &Worker) -> Task) {
    let deployment = Deployment::new();
    let (client, worker, task) = killed(&deployment, kill);
    // It waits again, and dies again.
    let service = start_single_file(&deployment, LONG);
    service.logged("waits for its client");
    client.hears_nothing(task.job);
    service.kill();
    let _next = start_single_file(&deployment, ("OUTCOME_DELAY_MS", "0"));
    assert_eq!(client.outcome(task.job).0, ResultType::Error);
    worker.results_handled();
    client.hears_nothing(task.job);
    deployment.no_jobs_left();
}

#[rstest]
#[case("after telling", 2)]
#[case("after settling", 1)]
fn an_outcome_that_has_waited_survives_a_kill(#[case] point: &str, #[case] results: usize) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = start_single_file(&deployment, LONG);
    let task = running_job(&client, &worker, None);
    worker.fail(&task);
    are_ending(&deployment, &[task.job]);
    assert!(service.stop().success());
    age(&deployment, task.job);
    Held::at(point, &deployment, &[LONG]).kill();
    let _next = start_single_file(&deployment, LONG);
    for _ in 0..results {
        assert_eq!(client.outcome(task.job).0, ResultType::Error);
    }
    worker.results_handled();
    client.hears_nothing(task.job);
    deployment.no_jobs_left();
}

#[test]
fn a_replica_takes_over_what_waited_in_another() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let first = start_single_file(&deployment, LONG);
    let task = running_job(&client, &worker, None);
    worker.fail(&task);
    are_ending(&deployment, &[task.job]);
    let second = start_single_file(&deployment, LONG);
    // RabbitMQ chooses who gets which.
    eventually("each of them has had a cancel", || {
        client.cancel(task.job);
        let ignored = "a cancel is ignored: the job has ended already";
        let logs = [first.log(), second.log()];
        logs.iter().all(|log| log.contains(ignored)).then_some(())
    });
    age(&deployment, task.job);
    first.kill();
    assert_eq!(client.outcome(task.job).0, ResultType::Error);
    deployment.no_jobs_left();
    worker.results_handled();
    client.hears_nothing(task.job);
}

/// Nobody delivers it again: it is found again.
#[test]
fn a_timeout_waits_too() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let soon = [
        ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
        ("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "0"),
        // Counts from when it may be told.
        ("OUTCOME_LOST_SEC", "0"),
    ];
    let service = deployment.start_with(&[&soon[..], &[LONG]].concat());
    let task = running_job(&client, &worker, Some(1));
    are_ending(&deployment, &[task.job]);
    assert_eq!(worker.revoked(), task.id);
    // Found twice more.
    eventually("it is found again", || {
        (service.log().matches("waits for its client").count() > 2).then_some(())
    });
    client.hears_nothing(task.job);
    assert!(service.stop().success());
    let _next = deployment.start_with(&soon);
    assert_eq!(client.status(task.job), JobStatus::Cancelled);
    assert_eq!(client.outcome(task.job).0, ResultType::Cancelled);
    deployment.no_jobs_left();
    client.hears_nothing(task.job);
    let timed_out = "SELECT count(*) FROM job_history WHERE outcome = 'TIMED_OUT'";
    assert_eq!(deployment.count(timed_out), 1);
}
