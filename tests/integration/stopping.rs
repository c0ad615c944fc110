//! How the service stops.

use std::collections::{BTreeSet, HashMap};

use omotes_orchestrator::wire::{JobProgressUpdate, JobResult, job_result::ResultType};
use prost::Message;
use rstest::rstest;
use uuid::Uuid;

use crate::harness::deployment::{Deployment, eventually};
use crate::harness::peers::{Client, Task, Worker, running_job};

#[rstest]
#[case("-TERM")]
#[case("-INT")]
#[case("-QUIT")]
fn a_signal_stops_it_in_good_order(#[case] signal: &str) {
    let deployment = Deployment::new();
    let mut service = deployment.start();
    service.signal(signal);
    assert_eq!(service.wait().code(), Some(0));
    service.logged("main stopped");
}

#[test]
fn it_stops_while_it_waits_for_the_services_it_needs() {
    let deployment = Deployment::new();
    for variable in [("POSTGRESQL_PORT", "1"), ("SDK_RABBITMQ_PORT", "1")] {
        let mut service = deployment.launch(&[variable]);
        match variable.0 {
            "POSTGRESQL_PORT" => service.logged("waiting for Postgres"),
            _ => service.logged("still no session with RabbitMQ"),
        };
        service.signal("-TERM");
        assert_eq!(service.wait().code(), Some(0));
    }
}

#[test]
fn it_stops_while_postgres_is_held_up() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let mut service = deployment.start();
    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    let job = client.submit("workflow_1");
    eventually("somebody waits for the lock", || {
        let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted
                       AND relation = 'job'::regclass";
        (lock.query_one(waiting, &[]).unwrap().get::<_, i64>(0) > 0).then_some(())
    });
    service.signal("-TERM");
    assert_eq!(service.wait().code(), Some(0));
    lock.rollback().unwrap();
    // Nothing is lost by it.
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start();
    assert_eq!(worker.take().job, job);
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let mut service = deployment.start();
    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    client.submit("workflow_1");
    eventually("somebody waits for the lock", || {
        let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted
                       AND relation = 'job'::regclass";
        (lock.query_one(waiting, &[]).unwrap().get::<_, i64>(0) > 0).then_some(())
    });
    service.signal("-TERM");
    service.logged("stopping on signal");
    service.signal("-INT");
    assert_eq!(service.wait().code(), Some(130));
}

/// Both come through one channel, and a stop finds some of either at each place on their way.
#[test]
fn progress_and_results_in_flight_survive_stops() {
    const RUNNING: usize = 20;
    const PROGRESS_EACH: u32 = 400;
    const ENDING: usize = 4000;
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let running: Vec<Task> = (0..RUNNING)
        .map(|_| running_job(&client, &worker, None))
        .collect();
    let mut ending = Vec::new();
    for _ in 0..ENDING {
        let (job, submission) = client.submission("workflow_1");
        client.send(&submission);
        ending.push(job);
    }
    let results = client.listen_to_results(&ending);
    let tasks: Vec<Task> = ending.iter().map(|_| worker.take()).collect();
    let rows = i64::try_from(RUNNING + ENDING).unwrap();
    deployment.comes_to(rows, "SELECT count(*) FROM job");
    assert!(service.stop().success());

    let mut tasks = tasks.iter();
    for number in 1..=PROGRESS_EACH {
        for task in &running {
            worker.progress(task, f64::from(number));
            if number % 2 == 0
                && let Some(task) = tasks.next()
            {
                worker.succeed_in_passing(task, "<e/>");
            }
        }
    }
    let left = |queue: &str| worker.peer.queue_length(queue);
    let queues = ["omotes_task_progress_events", "omotes_task_result_events"];
    let ended = "SELECT count(*) FROM job_history";
    let mut in_the_middle = 0;
    while queues.iter().all(|queue| left(queue) > 0) {
        let before = deployment.count(ended);
        let service = deployment.start();
        eventually("some results are handled", || {
            (deployment.count(ended) > before).then_some(())
        });
        assert!(service.stop().success());
        in_the_middle += u32::from(queues.iter().all(|queue| left(queue) > 0));
    }
    assert!(
        in_the_middle >= 1,
        "the stops came too late to show anything"
    );
    eprintln!("stops with both in flight: {in_the_middle}");

    let _service = deployment.start();
    deployment.comes_to(i64::try_from(ENDING).unwrap(), ended);
    let mut sql = deployment.sql();
    eventually("only what runs is left", || {
        let rows: i64 = sql
            .query_one("SELECT count(*) FROM job", &[])
            .unwrap()
            .get(0);
        (rows == i64::try_from(RUNNING).unwrap()).then_some(())
    });
    let mut heard: HashMap<Uuid, u32> = HashMap::new();
    while let Some(taken) = client.peer.poll(&results) {
        let result = JobResult::decode(taken.body.as_slice()).unwrap();
        assert_eq!(result.result_type(), ResultType::Succeeded);
        *heard.entry(result.uuid.parse().unwrap()).or_default() += 1;
    }
    assert_eq!(heard.len(), ENDING);
    let again = heard.values().filter(|times| **times > 1).count();
    eprintln!("told more than once: {again}");
    for task in &running {
        let queue = format!("jobs.{}.progress", task.job);
        let mut missing: BTreeSet<_> = (1..=PROGRESS_EACH).map(|one| one.to_string()).collect();
        eventually(&format!("all progress in {queue}"), || {
            while let Some(taken) = client.peer.poll(&queue) {
                let update = JobProgressUpdate::decode(taken.body.as_slice()).unwrap();
                missing.remove(&update.progress.to_string());
            }
            missing.is_empty().then_some(())
        });
        worker.succeed(task, "<e/>");
        assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    }
    deployment.no_jobs_left();
}
