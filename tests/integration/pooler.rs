//! Postgres behind a PgBouncer that pools transactions: each of them is in another session.

use std::collections::HashSet;

use omotes_orchestrator::wire::job_result::ResultType;

use crate::harness::deployment::{self, Deployment, Server, Service};
use crate::harness::peers::{Client, Worker, kept_its_session, running_job};
use crate::harness::pooler::Pooler;

const OUTPUT: &str = "<e id='out-1'/>";

fn start(deployment: &Deployment, pooler: &Pooler, more: &[(&str, &str)]) -> Service {
    let variables = pooler.variables();
    let variables = variables
        .iter()
        .map(|(name, value)| (*name, value.as_str()));
    let variables: Vec<_> = variables.chain(more.iter().copied()).collect();
    deployment.start_with(&variables)
}

/// How many replicas show that they exist.
const PRESENT: &str = "SELECT count(*) FROM pg_locks
    JOIN pg_database ON database = pg_database.oid
    WHERE locktype = 'advisory' AND objsubid = 2 AND objid = 1 AND datname = current_database()";

#[test]
fn jobs_go_through_a_pooler_by_several_replicas() {
    let deployment = Deployment::new();
    let pooler = Pooler::before(&deployment, 6);
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    // The first one upgrades the tables.
    let often = [
        ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
        ("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "0"),
    ];
    let replicas = [(); 2].map(|()| start(&deployment, &pooler, &often));
    deployment.comes_to(2, PRESENT);
    for _ in 0..20 {
        let task = running_job(&client, &worker, None);
        worker.progress(&task, 0.5);
        worker.succeed(&task, OUTPUT);
        assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    }
    let cancelled = running_job(&client, &worker, None);
    client.cancel(cancelled.job);
    assert_eq!(client.outcome(cancelled.job).0, ResultType::Cancelled);
    let late = running_job(&client, &worker, Some(1));
    assert_eq!(client.outcome(late.job).0, ResultType::Cancelled);
    deployment.no_jobs_left();
    for path in ["/", "/api/jobs", "/metrics"] {
        let (status, body) = replicas[0].get(path).unwrap();
        assert_eq!(status, 200, "{path}: {body}");
    }
    deployment.commands_find_postgres(&pooler.variables());
    kept_its_session(&deployment, &replicas[0]);
    for replica in &replicas {
        let log = replica.log();
        assert!(!log.contains("messages wait for Postgres"), "{log}");
        assert!(!log.contains("maintenance fails"), "{log}");
        assert!(!log.contains("other replicas stand still"), "{log}");
    }
    let [one, other] = replicas;
    // PgBouncer notices.
    one.kill();
    deployment.comes_to(1, PRESENT);
    assert!(other.stop().success());
    deployment.comes_to(0, PRESENT);
}

/// Whatever the database is set to, and the session was set to by others.
#[test]
fn settings_hold_for_each_transaction_through_a_pooler() {
    let deployment = Deployment::new();
    for setting in [
        "statement_timeout = '2s'",
        "default_transaction_isolation = 'serializable'",
        "synchronous_commit = 'off'",
    ] {
        let sql = format!("ALTER DATABASE {} SET {setting}", deployment.database());
        deployment.sql().batch_execute(&sql).unwrap();
    }
    let pooler = Pooler::before(&deployment, 10);
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = start(&deployment, &pooler, &[("HANDLER_THREADS", "1")]);
    let task = running_job(&client, &worker, None);
    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    worker.succeed(&task, OUTPUT);
    // After 30 seconds, for which nothing else has ended the statement.
    let line = service.logged("messages wait for Postgres");
    assert!(!line.contains("statement timeout"), "{line}");
    service.logged("canceling statement due to lock timeout");
    lock.rollback().unwrap();
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    deployment.no_jobs_left();
    // Nothing of the service's is left behind for others.
    let left = deployment::client(pooler.port, deployment.database())
        .simple_query("SHOW lock_timeout")
        .unwrap();
    let left = left.iter().find_map(|message| match message {
        postgres::SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    assert_eq!(left, Some("0"));
}

/// PgBouncer lets whoever asks wait meanwhile, longer than a session's threads have without one.
#[test]
fn a_killed_postgres_behind_a_pooler_ends_no_process() {
    let deployment = Deployment::with_own_servers();
    let pooler = Pooler::that_waits(&deployment, 20, 8);
    let haste = ("OMOTES_FAULT_HASTE", "1");
    let service = start(&deployment, &pooler, &[haste, ("HANDLER_THREADS", "4")]);
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    deployment.kill_server(Server::Postgres);
    let jobs: HashSet<_> = (0..20).map(|_| client.submit("workflow_1")).collect();
    service.logged("the session with RabbitMQ has ended, for want of Postgres");
    deployment.start_server(Server::Postgres);
    let tasks: HashSet<_> = jobs.iter().map(|_| worker.take().job).collect();
    assert_eq!(tasks, jobs);
    service.wait_until_ready();
    assert!(service.stop().success());
}
