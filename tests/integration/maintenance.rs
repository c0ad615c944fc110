//! What ends because time has passed: timeouts, retention, history.

use std::collections::{HashMap, HashSet};

use omotes_orchestrator::wire::{JobResult, job_result::ResultType, job_status_update::JobStatus};
use prost::Message;
use rstest::rstest;
use uuid::Uuid;

use crate::crashes::Held;
use crate::harness::deployment::{Deployment, Service, eventually};
use crate::harness::peers::{Client, Worker, running_job};
use crate::harness::proxy::{End, Proxy, Weather};

/// Looks for what is due every second, from the start on.
const OFTEN: [(&str, &str); 2] = [
    ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
    ("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "0"),
];

/// A service that looks for what is due every second, from its start on.
fn start(deployment: &Deployment, variables: &[(&str, &str)]) -> Service {
    deployment.start_with(&[&OFTEN, variables].concat())
}

/// Makes a time in a job's row lie further back, by so many seconds.
fn age(deployment: &Deployment, column: &str, job: Uuid, seconds: f64) {
    let sql =
        format!("UPDATE job SET {column} = {column} - $1 * interval '1 second' WHERE job_id = $2");
    let rows = deployment.sql().execute(&sql, &[&seconds, &job]).unwrap();
    assert_eq!(rows, 1);
}

/// Waits until so many jobs have had this outcome.
fn outcomes(deployment: &Deployment, outcome: &str, expected: i64) {
    let sql = format!("SELECT count(*) FROM job_history WHERE outcome = '{outcome}'");
    deployment.comes_to(expected, &sql);
}

#[test]
fn a_job_that_runs_for_too_long_is_ended() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    // Two of them, which find the same.
    let [service, other] = [start(&deployment, &[]), start(&deployment, &[])];
    let hour = Some(60 * 60 * 1000);
    let [short, long, unlimited, zero] =
        [hour, Some(u32::MAX), None, Some(0)].map(|timeout| running_job(&client, &worker, timeout));
    for task in [&short, &long, &unlimited, &zero] {
        age(&deployment, "running_at", task.job, 60.0 * 60.0);
    }
    assert_eq!(worker.revoked(), short.id);
    assert_eq!(client.status(short.job), JobStatus::Cancelled);
    let logs = "The job was ended because it ran for longer than its timeout of 1h.";
    assert_eq!(
        client.outcome(short.job),
        (ResultType::Cancelled, logs.to_owned())
    );
    outcomes(&deployment, "TIMED_OUT", 1);
    // The worker that had not heard it is told again, and its result is of no use.
    worker.progress(&short, 0.5);
    assert_eq!(worker.revoked(), short.id);
    worker.succeed(&short, "<e/>");
    for task in [&long, &unlimited, &zero] {
        worker.succeed(task, "<e/>");
        assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    }
    // What it does not finish comes to the one that is left.
    assert!(other.stop().success());
    deployment.looked_for_what_is_due();
    client.heard_nothing_more(&worker, short.job);
    outcomes(&deployment, "SUCCEEDED", 3);
    assert!(service.stop().success());
}

#[test]
fn a_timeout_is_told_as_one_where_asked_for() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = start(&deployment, &[("TIMEOUT_RESULT_TYPE", "TIMEOUT")]);
    let task = running_job(&client, &worker, Some(1000 * 1000));
    age(&deployment, "running_at", task.job, 1000.0);
    assert_eq!(worker.revoked(), task.id);
    assert_eq!(client.outcome(task.job).0, ResultType::Timeout);
    deployment.looked_for_what_is_due();
    client.heard_nothing_more(&worker, task.job);
}

#[test]
fn no_timeout_is_enforced_right_after_the_start() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let buffer = [("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "10000")];
    let _service = start(&deployment, &buffer);
    let task = running_job(&client, &worker, Some(1000));
    age(&deployment, "running_at", task.job, 500.0);
    deployment.looked_for_what_is_due();
    worker.succeed(&task, "<e/>");
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
}

#[test]
fn jobs_that_nothing_is_heard_of_are_given_up_with_a_reason() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = start(&deployment, &[("JOB_RETENTION_SEC", "7200")]);
    let running = running_job(&client, &worker, None);
    let waiting = client.submit("workflow_1");
    assert_eq!(client.status(waiting), JobStatus::Enqueued);
    let registered = Uuid::new_v4();
    client.listen(registered);
    let sql = "INSERT INTO job (job_id, workflow_type, status, registered_at)
               VALUES ($1, 'workflow_1', 'REGISTERED', now())";
    deployment.sql().execute(sql, &[&registered]).unwrap();

    for (column, job, doing) in [
        ("running_at", running.job, "running"),
        ("submitted_at", waiting, "waiting for a worker"),
        ("registered_at", registered, "registered"),
    ] {
        age(&deployment, column, job, 7200.0);
        let (result_type, logs) = client.outcome(job);
        assert_eq!(result_type, ResultType::Error);
        assert!(
            logs.contains(&format!("it had been {doing} for longer than the 2h")),
            "{logs}"
        );
    }
    outcomes(&deployment, "EXPIRED", 3);
    deployment.no_jobs_left();
    deployment.looked_for_what_is_due();
    for job in [running.job, waiting, registered] {
        client.heard_nothing_more(&worker, job);
    }
    let revoked = [worker.revoked(), worker.revoked()];
    assert_eq!(revoked[0], running.id);
    assert_eq!(worker.take().id, revoked[1]);
}

/// More than one round looks for.
#[test]
fn thousands_of_jobs_that_are_due_at_once_all_get_their_end() {
    const OVERDUE: usize = 2500;
    const WAITING: usize = 2000;
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    assert!(deployment.start().stop().success());
    let jobs: Vec<Uuid> = (0..OVERDUE + WAITING).map(|_| Uuid::new_v4()).collect();
    let (overdue, waiting) = jobs.split_at(OVERDUE);
    // Running for longer than their timeout and than any job may.
    let sql = "INSERT INTO job (job_id, celery_id, workflow_type, status, registered_at,
                                submitted_at, running_at, timeout_after_ms)
               SELECT id, 'a task', 'workflow_1', 'RUNNING', t, t, t, 1000
               FROM unnest($1::uuid[]) AS id, (SELECT now() - interval '3 hours' AS t) AS long_ago";
    let mut connection = deployment.sql();
    connection.execute(sql, &[&overdue]).unwrap();
    let sql =
        "INSERT INTO job (job_id, celery_id, workflow_type, status, registered_at, submitted_at)
               SELECT id, 'a task', 'workflow_1', 'SUBMITTED', t, t
               FROM unnest($1::uuid[]) AS id, (SELECT now() - interval '3 hours' AS t) AS long_ago";
    connection.execute(sql, &[&waiting]).unwrap();
    let results = client.listen_to_results(&jobs);

    let _service = start(&deployment, &[("JOB_RETENTION_SEC", "7200")]);
    deployment.comes_to(0, "SELECT count(*) FROM job");
    deployment.looked_for_what_is_due();
    let mut ends = HashMap::new();
    while let Some(taken) = client.peer.poll(&results) {
        let result = JobResult::decode(taken.body.as_slice()).unwrap();
        let end = result.result_type();
        let first = ends.insert(result.uuid.parse::<Uuid>().unwrap(), end);
        assert_eq!(first, None, "{} ends twice", result.uuid);
    }
    for (jobs, end) in [
        (overdue, ResultType::Cancelled),
        (waiting, ResultType::Error),
    ] {
        let others: HashSet<_> = jobs
            .iter()
            .filter(|job| ends.get(job) != Some(&end))
            .collect();
        assert!(others.is_empty(), "{} do not end as {end:?}", others.len());
    }
    outcomes(&deployment, "TIMED_OUT", i64::try_from(OVERDUE).unwrap());
    outcomes(&deployment, "EXPIRED", i64::try_from(WAITING).unwrap());
}

#[test]
fn replicas_take_turns_at_what_is_due() {
    let deployment = Deployment::new();
    let _services = [(); 3].map(|()| start(&deployment, &[]));
    deployment
        .sql()
        .batch_execute(
            "CREATE TABLE runs (task varchar, at timestamptz);
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN INSERT INTO runs VALUES (new.task, new.last_run); RETURN new; END $$;
             CREATE TRIGGER note AFTER UPDATE ON maintenance_run
             FOR EACH ROW EXECUTE FUNCTION note()",
        )
        .unwrap();
    eventually("some rounds", || {
        (deployment.count("SELECT count(*) FROM runs WHERE task = 'limits'") >= 5).then_some(())
    });
    // Never sooner than the period, which is a second, whoever it was.
    let too_soon = "SELECT count(*) FROM (
                        SELECT at - lag(at) OVER (PARTITION BY task ORDER BY at) AS pause FROM runs
                    ) AS pauses WHERE pause < interval '0.9 seconds'";
    assert_eq!(deployment.count(too_soon), 0);
}

/// One whose tables have these rows, and note each time that a replica begins with something.
fn with_rows(rows: &str) -> Deployment {
    let deployment = Deployment::new();
    assert!(deployment.start().stop().success());
    let mut sql = deployment.sql();
    sql.batch_execute(
        "CREATE TABLE runs (task varchar);
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN INSERT INTO runs VALUES (new.task); RETURN new; END $$;
             CREATE TRIGGER note AFTER INSERT OR UPDATE ON maintenance_run
             FOR EACH ROW EXECUTE FUNCTION note()",
    )
    .unwrap();
    sql.batch_execute(rows).unwrap();
    deployment
}

/// More than a page of what is overdue, and more than a handler's queue has room for: what is left
/// waits for no other round, even when it is begun so late that the next one comes meanwhile.
/// However long they all take, there is never a pause as long as that wait would be.
#[test]
fn thousands_of_overdue_jobs_wait_for_no_other_round() {
    const PERIOD: i64 = 20;
    let deployment = with_rows(
        "INSERT INTO job (job_id, celery_id, workflow_type, status, registered_at, submitted_at,
                              running_at, timeout_after_ms, job_reference)
             SELECT gen_random_uuid(), 'task', 'workflow_1', 'RUNNING', now(), now(),
                    now() - interval '1 hour', 1000, ''
             FROM generate_series(1, 3000)",
    );
    let seldom = ("TIMEOUT_JOB_HANDLER_RERUN_SEC", &*PERIOD.to_string());
    let late = ("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "30");
    let one = ("HANDLER_THREADS", "1");
    let slow = [
        ("OMOTES_FAULT_POINT", "before publish"),
        ("OMOTES_FAULT_MILLISECONDS", "700"),
    ];
    let _service = start(&deployment, &[seldom, late, one, slow[0], slow[1]]);
    outcomes(&deployment, "TIMED_OUT", 3000);
    let pause = deployment.count(
        "SELECT max(extract(epoch FROM pause))::bigint FROM (
             SELECT finished_at - lag(finished_at) OVER (ORDER BY finished_at) AS pause
             FROM job_history
         ) AS pauses",
    );
    assert!(pause < PERIOD * 3 / 4, "nothing ended for {pause} s");
}

#[test]
fn a_long_history_is_forgotten_in_few_rounds() {
    let deployment = with_rows(
        "INSERT INTO job_history (job_id, finished_at, starts, outcome, result_bytes)
             SELECT gen_random_uuid(), now() - interval '1 year', 0, 'FAILED', 0
             FROM generate_series(1, 20000)",
    );
    let seldom = ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "5");
    let service = start(&deployment, &[seldom]);
    outcomes(&deployment, "FAILED", 0);
    let rounds = deployment.count("SELECT count(*) FROM runs WHERE task = 'history'");
    assert!(rounds < 20, "{rounds} rounds");
    assert!(service.stop().success());
}

/// As after Postgres's clock has been wrong for a while.
#[test]
fn a_last_run_that_is_yet_to_come_holds_up_nothing() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = start(&deployment, &[("JOB_HISTORY_RETENTION_SEC", "1000")]);
    let task = running_job(&client, &worker, Some(1000 * 1000));
    let runs = "SELECT count(*) FROM maintenance_run WHERE task <> 'time series'";
    deployment.comes_to(2, runs);
    let mut sql = deployment.sql();
    sql.batch_execute(
        "UPDATE maintenance_run SET last_run = now() + interval '1 year';
         INSERT INTO job_history (job_id, finished_at, starts, outcome, result_bytes)
         VALUES (gen_random_uuid(), now() - interval '2000 seconds', 0, 'FAILED', 0)",
    )
    .unwrap();
    age(&deployment, "running_at", task.job, 1000.0);
    assert_eq!(client.outcome(task.job).0, ResultType::Cancelled);
    outcomes(&deployment, "FAILED", 0);
    for task in ["limits", "history"] {
        let line = format!("{task}: the last time is recorded as");
        service.logged(&line);
        assert_eq!(service.log().matches(&line).count(), 1);
    }
}

/// A paused machine, or a process that is stopped: what was confirmed in time has been waiting.
#[rstest]
#[case::alone(1)]
#[case::beside_another_that_goes_on(2)]
fn what_came_in_time_counts_although_the_service_stood_still(#[case] replicas: usize) {
    const JOBS: i64 = 20;
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let stopped = start(&deployment, &[]);
    let others: Vec<_> = (1..replicas).map(|_| start(&deployment, &[])).collect();
    let hour = Some(60 * 60 * 1000);
    let tasks: Vec<_> = (0..JOBS)
        .map(|_| running_job(&client, &worker, hour))
        .collect();
    let running = "SELECT count(*) FROM job WHERE status = 'RUNNING'";
    deployment.comes_to(JOBS, running);
    stopped.signal("-STOP");
    due_in_four_seconds(&deployment);
    // Reading them takes longer than looking for what is overdue.
    let output = format!("<e>{}</e>", "x".repeat(1024 * 1024));
    for task in &tasks {
        worker.succeed(task, &output);
    }
    if others.is_empty() {
        deployment.comes_to(JOBS, OVERDUE);
        stopped.signal("-CONT");
    }
    for task in &tasks {
        let (result_type, logs) = client.outcome(task.job);
        assert_eq!(result_type, ResultType::Succeeded, "{logs}");
    }
    stopped.signal("-CONT");
    deployment.no_jobs_left();
    outcomes(&deployment, "SUCCEEDED", JOBS);
    // It is not forgotten what timeouts are.
    stopped.wait_until_ready();
    let task = running_job(&client, &worker, hour);
    age(&deployment, "running_at", task.job, 60.0 * 60.0);
    assert_eq!(client.outcome(task.job).0, ResultType::Cancelled);
}

/// The replica that has results cannot handle them, but it does not stand still, and another one has
/// nothing to do but to look for what is overdue.
#[rstest]
#[case::by_a_batch_that_waits(true)]
#[case::by_its_postgres_that_is_gone(false)]
fn what_came_in_time_counts_although_a_replica_is_held_up(#[case] waits: bool) {
    const JOBS: i64 = 20;
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let other = start(&deployment, &[]);
    let hour = Some(60 * 60 * 1000);
    let tasks: Vec<_> = (0..JOBS)
        .map(|_| running_job(&client, &worker, hour))
        .collect();
    let running = "SELECT count(*) FROM job WHERE status = 'RUNNING'";
    deployment.comes_to(JOBS, running);
    let proxy = Proxy::new(deployment.postgres_door()).unwrap();
    let port = proxy.port().to_string();
    let variables = [("HANDLER_THREADS", "1"), ("POSTGRESQL_PORT", &port)];
    let held = match waits {
        true => {
            let held = Held::at("before publish", &deployment, &variables);
            eventually("one of them comes to it", || {
                client.cancel(Uuid::new_v4());
                held.is_reached().then_some(())
            });
            held
        }
        false => {
            let held = Held::at("nowhere", &deployment, &variables);
            let present = "SELECT count(*) FROM pg_locks
                           JOIN pg_database ON database = pg_database.oid
                           WHERE locktype = 'advisory' AND objsubid = 2
                             AND datname = current_database()";
            deployment.comes_to(2, present);
            // The other one has seen it.
            deployment.looked_for_what_is_due();
            proxy.set(Weather::Refuse);
            proxy.cut(End::Fin);
            held
        }
    };
    due_in_four_seconds(&deployment);
    for task in &tasks {
        worker.succeed(task, "<e/>");
    }
    eventually("what it has is long overdue", || {
        let timed_out = "SELECT count(*) FROM job_history WHERE outcome = 'TIMED_OUT'";
        assert_eq!(deployment.count(timed_out), 0);
        (deployment.count(OVERDUE) > 0).then_some(())
    });
    proxy.set(Weather::Fair);
    let service = match waits {
        true => held.go_on(),
        false => held.service,
    };
    for task in &tasks {
        let (result_type, logs) = client.outcome(task.job);
        assert_eq!(result_type, ResultType::Succeeded, "{logs}");
    }
    outcomes(&deployment, "SUCCEEDED", JOBS);
    // It is not forgotten what timeouts are.
    service.wait_until_ready();
    let task = running_job(&client, &worker, hour);
    age(&deployment, "running_at", task.job, 60.0 * 60.0);
    assert_eq!(client.outcome(task.job).0, ResultType::Cancelled);
    assert!(other.stop().success());
}

/// Running jobs that are overdue for long enough to have been found.
const OVERDUE: &str = "SELECT count(*) FROM job
     WHERE running_at <= now() - interval '1 hour' - interval '10 seconds'";

/// Their timeouts of an hour will be over.
fn due_in_four_seconds(deployment: &Deployment) {
    let sql = "UPDATE job SET running_at = now() - interval '1 hour' + interval '4 seconds'
               WHERE status = 'RUNNING'";
    deployment.sql().batch_execute(sql).unwrap();
}

#[test]
fn a_workflow_has_its_own_limits() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let file = deployment.folder.join("workflows.json");
    std::fs::write(
        &file,
        r#"[{"workflow_type_name": "workflow_1", "workflow_type_description_name": "one",
             "delivery_limit": 2, "default_timeout_sec": 3600}]"#,
    )
    .unwrap();
    let _service = start(
        &deployment,
        &[("WORKFLOW_CONFIG_PATH", file.to_str().unwrap())],
    );
    let task = running_job(&client, &worker, None);
    worker.start(&task);
    assert_eq!(client.status(task.job), JobStatus::Running);
    age(&deployment, "running_at", task.job, 3600.0);
    assert_eq!(worker.revoked(), task.id);
    assert_eq!(client.outcome(task.job).0, ResultType::Cancelled);
}
