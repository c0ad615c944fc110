//! What remains when the service is killed, or loses what it talks to, at a given point of its
//! pipeline: the rows of the table of failures in tests/README.md.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use omotes_orchestrator::wire::{job_result::ResultType, job_status_update::JobStatus};
use rstest::rstest;
use uuid::Uuid;

use crate::harness::deployment::{Deployment, Service, eventually, server_client, setting};
use crate::harness::peers::{Client, Task, Worker, kept_its_session, running_job};
use crate::harness::proxy::{End, Proxy, Weather};

const OUTPUT: &str = "<e id='out-1'/>";

/// A service that stops at a point of its pipeline, once, until it is told to go on.
pub struct Held {
    pub service: Service,
    file: PathBuf,
}

impl Held {
    pub fn at(point: &str, deployment: &Deployment, variables: &[(&str, &str)]) -> Held {
        let file = deployment.folder.join(format!("held-{}", Uuid::new_v4()));
        let hold = [
            ("OMOTES_FAULT_POINT", point),
            ("OMOTES_FAULT_FILE", file.to_str().unwrap()),
        ];
        Held {
            service: deployment.start_with(&[&hold, variables].concat()),
            file,
        }
    }

    pub fn reached(&self) {
        eventually("the service comes to the point", || {
            self.is_reached().then_some(())
        });
    }

    pub fn is_reached(&self) -> bool {
        self.file.exists()
    }

    pub fn kill(self) {
        self.reached();
        self.service.kill();
        fs::remove_file(self.file).unwrap();
    }

    /// It has ended by itself.
    pub fn forget(self) {
        fs::remove_file(self.file).unwrap();
    }

    pub fn go_on(self) -> Service {
        fs::remove_file(self.file).unwrap();
        self.service
    }
}

/// The task of the job's row.
fn current_task(deployment: &Deployment, job: Uuid) -> String {
    let sql = "SELECT celery_id FROM job WHERE job_id = $1 AND celery_id IS NOT NULL";
    eventually("the job's row", || {
        let row = deployment.sql().query_opt(sql, &[&job]).unwrap()?;
        Some(row.get(0))
    })
}

/// Of these tasks of one job, all but the current one are revoked at their start, and that one
/// leads to the job's only result.
fn finish(deployment: &Deployment, client: &Client, worker: &Worker, tasks: &[Task]) {
    let current = current_task(deployment, tasks[0].job);
    for task in tasks.iter().filter(|task| task.id != current) {
        worker.start(task);
        assert_eq!(worker.revoked(), task.id);
    }
    let task = tasks.iter().find(|task| task.id == current).unwrap();
    succeed(client, worker, task);
    deployment.no_jobs_left();
}

/// A task's whole way, to the only result.
fn succeed(client: &Client, worker: &Worker, task: &Task) {
    worker.start(task);
    worker.succeed(task, OUTPUT);
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
}

#[rstest]
#[case("before publish", 1)]
#[case("after publish", 2)]
#[case("after commit", 1)]
fn a_submission_survives_a_kill(#[case] point: &str, #[case] tasks: usize) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let held = Held::at(point, &deployment, &[]);
    let job = client.submit("workflow_1");
    held.kill();
    let _next = deployment.start_single_file();
    client.submissions_handled();
    let tasks: Vec<_> = (0..tasks).map(|_| worker.take()).collect();
    assert!(tasks.iter().all(|task| task.job == job));
    assert_eq!(worker.waiting(), 0);
    finish(&deployment, &client, &worker, &tasks);
}

#[rstest]
#[case("before publish")]
#[case("after publish")]
#[case("after commit")]
fn a_start_that_survives_a_kill_counts_once(#[case] point: &str) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    client.submit("workflow_1");
    let task = worker.take();
    assert_eq!(client.status(task.job), JobStatus::Enqueued);
    assert!(service.stop().success());
    let held = Held::at(point, &deployment, &[]);
    worker.start(&task);
    held.kill();
    let _next = deployment.start_single_file();
    worker.progress_handled();
    assert_eq!(client.status(task.job), JobStatus::Running);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    deployment.comes_to(1, "SELECT count(*) FROM job_history WHERE starts = 1");
}

/// A job that runs, and no service.
fn left_running() -> (Deployment, Client, Worker, Task) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let task = running_job(&client, &worker, None);
    assert!(service.stop().success());
    (deployment, client, worker, task)
}

/// A job that runs, and a service that is killed at this point over whatever `cause` does. The
/// queue of the cause stays as it is until the next service is there.
fn killed_over_the_end_of_a_job(
    point: &str,
    cause: impl FnOnce(&Client, &Worker, &Task),
) -> (Deployment, Client, Worker, Task) {
    let (deployment, client, worker, task) = left_running();
    let held = Held::at(point, &deployment, &[]);
    cause(&client, &worker, &task);
    held.kill();
    (deployment, client, worker, task)
}

#[rstest]
#[case("before publish", 1)]
#[case("after commit", 1)]
#[case("after telling", 2)]
#[case("after settling", 1)]
fn a_result_survives_a_kill(#[case] point: &str, #[case] results: usize) {
    let (deployment, client, worker, task) =
        killed_over_the_end_of_a_job(point, |_, worker, task| worker.succeed(task, OUTPUT));
    let _next = deployment.start_single_file();
    worker.results_handled();
    for _ in 0..results {
        assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    }
    client.heard_nothing_more(&worker, task.job);
    deployment.no_jobs_left();
    assert_eq!(deployment.count("SELECT count(*) FROM job_history"), 1);
}

/// RabbitMQ may lose what it has delivered and not yet written, when it is killed.
#[test]
fn an_outcome_that_the_broker_has_forgotten_ends_with_an_error() {
    let (deployment, client, worker, task) =
        killed_over_the_end_of_a_job("after commit", |_, worker, task| {
            worker.succeed(task, OUTPUT);
        });
    let results = "omotes_task_result_events";
    eventually("the result is back in its queue", || {
        (worker.peer.queue_length(results) == 1).then_some(())
    });
    worker.peer.channel.queue_purge(results).unwrap();
    let _next = deployment.start_with(&[
        ("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "0"),
        ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
        ("OUTCOME_LOST_SEC", "1"),
    ]);
    let (result_type, logs) = client.outcome(task.job);
    assert_eq!(result_type, ResultType::Error);
    assert!(
        logs.starts_with("The job succeeded, but its result was lost"),
        "{logs}"
    );
    deployment.no_jobs_left();
    let lost = "SELECT count(*) FROM job_history WHERE outcome = 'LOST'";
    assert_eq!(deployment.count(lost), 1);
}

/// It stands still between telling the client and noting that it has.
#[rstest]
#[case::alone(1)]
#[case::beside_another_that_goes_on(2)]
fn a_result_that_was_told_is_not_lost_by_a_standstill(#[case] replicas: usize) {
    let (deployment, client, worker, task) = left_running();
    let soon = [
        ("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "0"),
        ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
        ("OUTCOME_LOST_SEC", "6"),
    ];
    let others: Vec<_> = (1..replicas)
        .map(|_| deployment.start_with(&soon))
        .collect();
    // Whichever gets the result, it is the one that stands still.
    let held = Held::at("after telling", &deployment, &soon);
    for other in &others {
        other.signal("-STOP");
    }
    worker.succeed(&task, OUTPUT);
    held.reached();
    held.service.signal("-STOP");
    for other in &others {
        other.signal("-CONT");
    }
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    let past = "SELECT count(*) FROM job_history WHERE finished_at < now() - interval '15 seconds'";
    deployment.comes_to(1, past);
    if others.is_empty() {
        held.service.signal("-CONT");
        let _service = held.go_on();
        deployment.no_jobs_left();
    } else {
        // RabbitMQ gives the result to the other one, which tells it once more.
        assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
        deployment.no_jobs_left();
        held.service.signal("-CONT");
        held.go_on().wait_until_ready();
    }
    client.hears_nothing(task.job);
    deployment.comes_to(
        1,
        "SELECT count(*) FROM job_history WHERE outcome = 'SUCCEEDED'",
    );
}

#[rstest]
#[case("before publish", 1)]
#[case("after commit", 1)]
#[case("after telling", 2)]
#[case("after settling", 1)]
fn a_cancel_survives_a_kill(#[case] point: &str, #[case] results: usize) {
    let (deployment, client, worker, task) =
        killed_over_the_end_of_a_job(point, |client, _, task| client.cancel(task.job));
    let _next = deployment.start_single_file();
    client.cancels_handled();
    for _ in 0..results {
        assert_eq!(worker.revoked(), task.id);
        assert_eq!(client.status(task.job), JobStatus::Cancelled);
        assert_eq!(client.outcome(task.job).0, ResultType::Cancelled);
    }
    client.heard_nothing_more(&worker, task.job);
    deployment.no_jobs_left();
}

#[rstest]
#[case("after commit", 1)]
#[case("after telling", 2)]
fn a_timeout_survives_a_kill(#[case] point: &str, #[case] results: usize) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let task = running_job(&client, &worker, Some(1));
    assert!(service.stop().success());
    let soon = [
        ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
        ("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "0"),
    ];
    Held::at(point, &deployment, &soon).kill();
    // It has been told, or is about to be: the result comes too late.
    worker.succeed(&task, OUTPUT);
    let _next = deployment.start_with(&soon);
    for _ in 0..results {
        assert_eq!(client.status(task.job), JobStatus::Cancelled);
        assert_eq!(client.outcome(task.job).0, ResultType::Cancelled);
    }
    deployment.looked_for_what_is_due();
    client.heard_nothing_more(&worker, task.job);
    deployment.no_jobs_left();
}

#[rstest]
#[case("before publish", 1)]
#[case("after commit", 1)]
#[case("after telling", 2)]
#[case("after settling", 1)]
fn a_refusal_survives_a_kill(#[case] point: &str, #[case] results: usize) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let held = Held::at(point, &deployment, &[]);
    let job = client.submit("no such workflow");
    held.kill();
    let _next = deployment.start_single_file();
    client.submissions_handled();
    for _ in 0..results {
        assert_eq!(client.outcome(job).0, ResultType::Error);
    }
    client.heard_nothing_more(&worker, job);
    deployment.no_jobs_left();
}

/// Whatever comes first afterwards, the client hears of one outcome only.
#[rstest]
#[case("after commit", 1)]
#[case("after telling", 2)]
fn a_cancel_cannot_overtake_a_result_that_was_killed(#[case] point: &str, #[case] results: usize) {
    let (deployment, client, worker, task) =
        killed_over_the_end_of_a_job(point, |_, worker, task| worker.succeed(task, OUTPUT));
    let result = worker.peer.next("omotes_task_result_events");
    let next = deployment.start_single_file();
    client.cancel(task.job);
    client.cancels_handled();
    next.logged("a cancel is ignored: the job has ended already");
    worker.peer.send("omotes_task_result_events", &result.body);
    for _ in 0..results {
        assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    }
    worker.results_handled();
    client.heard_nothing_more(&worker, task.job);
    deployment.no_jobs_left();
}

#[test]
fn a_result_cannot_overtake_a_cancel_that_was_killed() {
    let (deployment, client, worker, task) =
        killed_over_the_end_of_a_job("after commit", |client, _, task| client.cancel(task.job));
    let cancel = client.peer.next("job_deletions");
    let _next = deployment.start_single_file();
    worker.succeed(&task, OUTPUT);
    worker.results_handled();
    client.peer.send("job_deletions", &cancel.body);
    assert_eq!(client.status(task.job), JobStatus::Cancelled);
    assert_eq!(client.outcome(task.job).0, ResultType::Cancelled);
    client.cancels_handled();
    client.heard_nothing_more(&worker, task.job);
}

#[test]
fn a_commit_that_postgres_refuses_is_repeated() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let held = Held::at("after publish", &deployment, &[]);
    let job = client.submit("workflow_1");
    held.reached();
    let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1";
    let ended = server_client("postgres")
        .query(sql, &[&deployment.name])
        .unwrap();
    assert!(!ended.is_empty());
    let service = held.go_on();
    service.logged("messages wait for Postgres");
    let tasks = [worker.take(), worker.take()];
    assert!(tasks.iter().all(|task| task.job == job));
    finish(&deployment, &client, &worker, &tasks);
}

/// A service whose way to RabbitMQ can be cut.
pub fn behind_a_proxy(proxy: &Proxy) -> Vec<(&'static str, String)> {
    [
        "SDK_RABBITMQ_PORT",
        "TASK_RABBITMQ_PORT",
        "CELERY_RABBITMQ_PORT",
    ]
    .map(|name| (name, proxy.port().to_string()))
    .to_vec()
}

pub fn borrowed<'a>(variables: &'a [(&'static str, String)]) -> Vec<(&'a str, &'a str)> {
    variables
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect()
}

pub fn rabbitmq_proxy() -> Proxy {
    Proxy::new(setting("RABBITMQ_PORT").parse::<u16>().unwrap()).unwrap()
}

#[rstest]
#[case("before publish", End::Fin, 1)]
#[case("before publish", End::Rst, 1)]
#[case("after publish", End::Fin, 1)]
#[case("after publish", End::Rst, 1)]
#[case("after commit", End::Rst, 1)]
fn a_connection_lost_in_the_middle_of_it_loses_nothing(
    #[case] point: &str,
    #[case] end: End,
    #[case] tasks: usize,
) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let proxy = rabbitmq_proxy();
    let variables = behind_a_proxy(&proxy);
    let held = Held::at(point, &deployment, &borrowed(&variables));
    let job = client.submit("workflow_1");
    held.reached();
    proxy.cut(end);
    let service = held.go_on();
    service.logged("the session with RabbitMQ has ended, a new one follows");
    service.wait_until_ready();
    let tasks: Vec<_> = (0..tasks).map(|_| worker.take()).collect();
    assert!(tasks.iter().all(|task| task.job == job));
    finish(&deployment, &client, &worker, &tasks);
    client.all_handled(&worker, job);
    assert_eq!(worker.waiting(), 0);
}

#[test]
fn a_message_that_two_replicas_have_is_handled_once() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let proxy = rabbitmq_proxy();
    let variables = behind_a_proxy(&proxy);
    // It holds the job's lock, and loses the connection that its message came through.
    let held = Held::at("after publish", &deployment, &borrowed(&variables));
    let job = client.submit("workflow_1");
    held.reached();
    let other = deployment.start();
    proxy.cut(End::Rst);
    let waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    eventually("the other replica waits for the lock", || {
        (deployment.count(waiting) > 0).then_some(())
    });
    let _held = held.go_on();
    other.logged("a submission is ignored: the job was submitted already");
    let task = worker.take();
    assert_eq!(worker.waiting(), 0);
    finish(&deployment, &client, &worker, std::slice::from_ref(&task));
    assert_eq!(task.job, job);
}

#[test]
fn a_replica_that_hangs_holds_up_nobody_for_long() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let hanging = deployment.start();
    let task = running_job(&client, &worker, None);
    // Not in the middle of a transaction: that is the next test.
    deployment.comes_to(1, "SELECT count(*) FROM job WHERE status = 'RUNNING'");
    hanging.signal("-STOP");
    // Delivered to the one that hangs, which does not take it.
    worker.succeed(&task, OUTPUT);
    let in_hand = client.submit("workflow_1");
    let other = deployment.start();
    let job = client.submit("workflow_1");
    // RabbitMQ misses two heartbeats and gives its messages to the other one.
    let taken = HashSet::from([worker.take().job, worker.take().job]);
    assert_eq!(taken, HashSet::from([job, in_hand]));
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    hanging.signal("-CONT");
    // It still believes itself to be ready.
    hanging.logged("the session with RabbitMQ has ended");
    hanging.wait_until_ready();
    assert!(other.stop().success());
    let job = client.submit("workflow_1");
    assert_eq!(worker.take().job, job);
    client.heard_nothing_more(&worker, task.job);
}

#[test]
fn a_replica_that_hangs_in_a_transaction_holds_up_nobody_for_long() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let hanging = Held::at("before publish", &deployment, &[]);
    let locked = client.submit("workflow_1");
    hanging.reached();
    hanging.service.signal("-STOP");
    let other = deployment.start_with(&[("HANDLER_THREADS", "1")]);
    // It has got the message, and waits for the job's lock.
    other.logged("has been waiting for Postgres");
    let behind = client.submit("workflow_1");
    let tasks = [worker.take(), worker.take()];
    // The lock may be waited for more than once, and then in any order.
    let taken = HashSet::from([tasks[0].job, tasks[1].job]);
    assert_eq!(taken, HashSet::from([locked, behind]));
    hanging.service.signal("-CONT");
    let hanging = hanging.go_on();
    // It still believes itself to be ready.
    hanging.logged("the session with RabbitMQ has ended");
    hanging.wait_until_ready();
    for task in tasks {
        succeed(&client, &worker, &task);
    }
    deployment.no_jobs_left();
}

#[rstest]
#[case::that_refuses(Weather::Refuse)]
#[case::that_resets(Weather::Reset)]
#[case::that_says_nothing(Weather::BlackHole)]
fn a_replica_without_postgres_lets_go_of_its_messages(#[case] weather: Weather) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let proxy = Proxy::new(deployment.postgres_door()).unwrap();
    let port = proxy.port().to_string();
    let cut_off = deployment.start_with(&[("POSTGRESQL_PORT", &port)]);
    proxy.set(weather);
    proxy.cut(End::Rst);
    let job = client.submit("workflow_1");
    cut_off.logged("messages wait for Postgres");
    let other = deployment.start();
    let task = worker.take();
    assert_eq!(task.job, job);
    // Nor does it take any while it cannot do anything about them.
    let jobs = [(); 3].map(|()| client.submit("workflow_1"));
    let mut tasks = vec![task];
    tasks.extend(jobs.map(|_| worker.take()));
    cut_off.logged("what is in hand is left to other replicas");
    // A task that is published and not committed would be given out again.
    deployment.comes_to(4, "SELECT count(*) FROM job");
    drop(other);
    proxy.set(Weather::Fair);
    cut_off.wait_until_ready();
    for task in tasks {
        succeed(&client, &worker, &task);
    }
    deployment.no_jobs_left();
}

#[test]
fn a_network_that_goes_silent_is_noticed_and_survived() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let proxy = rabbitmq_proxy();
    let variables = behind_a_proxy(&proxy);
    let service = deployment.start_with(&borrowed(&variables));
    proxy.set(Weather::BlackHole);
    let job = client.submit("workflow_1");
    eventually("it is not ready", || {
        let (ready, body) = service.readiness()?;
        let broker = &body["parts"]["broker"]["ok"];
        let publishing = &body["parts"]["publishing"]["ok"];
        (!ready && (broker == false || publishing == false)).then_some(())
    });
    proxy.set(Weather::Fair);
    proxy.cut(End::Rst);
    assert_eq!(worker.take().job, job);
    service.wait_until_ready();
}

#[rstest]
#[case(Weather::Delay(Duration::from_millis(200)))]
#[case(Weather::Throttle(50_000))]
fn a_slow_network_is_only_slow(#[case] weather: Weather) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let proxy = rabbitmq_proxy();
    proxy.set(weather);
    let variables = behind_a_proxy(&proxy);
    let service = deployment.start_with(&borrowed(&variables));
    let task = running_job(&client, &worker, None);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    kept_its_session(&deployment, &service);
}

#[test]
fn a_lock_that_somebody_else_holds_is_told_and_survived() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    let job = client.submit("workflow_1");
    let why = eventually("it is not ready", || {
        let (ready, body) = service.readiness()?;
        (!ready).then_some(body["parts"]["handling"]["why"].as_str()?.to_owned())
    });
    assert!(why.contains("has been waiting for Postgres for 1"), "{why}");
    service.logged("has been waiting for Postgres for 1");
    lock.rollback().unwrap();
    assert_eq!(worker.take().job, job);
    service.wait_until_ready();
}

#[test]
fn a_message_that_brings_a_fault_to_light_becomes_a_dead_letter() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service =
        deployment.start_with(&[("OMOTES_FAULT_POINT", "poison"), ("HANDLER_THREADS", "1")]);
    let (job, mut submission) = client.submission("workflow_1");
    client.listen(job);
    submission.job_reference = Some("poison".to_owned());
    client.send(&submission);
    let good = client.submit("workflow_1");
    assert_eq!(worker.take().job, good);
    service.logged("the fault point \"poison\" was reached");
    // What is done about the job brings it to light as well, so the letter is all that remains.
    let letter = client
        .peer
        .next(omotes_orchestrator::wire::DEAD_LETTERS_QUEUE);
    assert!(format!("{:?}", letter.properties).contains("a fault in the orchestrator"));
    kept_its_session(&deployment, &service);
}
