//! A Postgres that is set otherwise than the service needs it: by its role, its database or its
//! server, or because it is a standby.

use omotes_orchestrator::wire::{job_result::ResultType, job_status_update::JobStatus};
use rstest::rstest;

use crate::harness::deployment::{Deployment, Server, eventually, server_client, setting};
use crate::harness::peers::{Client, Worker, running_job};

const OUTPUT: &str = "<e id='out-1'/>";

/// A superuser of the shared server, for one replica alone. Gone when dropped.
struct Role {
    name: String,
}

impl Role {
    fn new(deployment: &Deployment, kind: &str) -> Role {
        let name = format!("{}_{kind}", deployment.name);
        let sql = format!("CREATE ROLE {name} LOGIN SUPERUSER PASSWORD 'secret'");
        server_client("postgres").batch_execute(&sql).unwrap();
        Role { name }
    }

    fn variables(&self) -> [(&str, &str); 2] {
        [
            ("POSTGRESQL_USERNAME", self.name.as_str()),
            ("POSTGRESQL_PASSWORD", "secret"),
        ]
    }

    /// For connections from now on, of which there are none before.
    fn set(&self, setting: &str) {
        let sql = format!("ALTER ROLE {} {setting}", self.name);
        let mut server = server_client("postgres");
        server.batch_execute(&sql).unwrap();
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1";
        server.query(sql, &[&self.name]).unwrap();
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let Role { name } = self;
        let database = name.rsplit_once('_').unwrap().0;
        let owner = setting("POSTGRES_USER");
        let given_back = format!("REASSIGN OWNED BY {name} TO {owner}; DROP ROLE {name}");
        server_client(database).batch_execute(&given_back).unwrap();
    }
}

#[rstest]
#[case::role("ALTER ROLE omotes SET synchronous_commit = off")]
#[case::database("ALTER DATABASE omotes SET synchronous_commit = off")]
#[case::server("ALTER SYSTEM SET synchronous_commit = off")]
fn what_is_acknowledged_survives_a_kill_of_postgres_whatever_it_is_set_to(#[case] sql: &str) {
    const JOBS: i64 = 30;
    let deployment = Deployment::with_own(&[Server::RabbitMq, Server::Postgres], |deployment| {
        let conf = deployment.extra_folder(Server::Postgres).join("conf");
        // The longest that a commit may stay in memory if nobody asks for more.
        std::fs::write(conf, "wal_writer_delay = 10s\n").unwrap();
    });
    let mut server = deployment.sql();
    server.batch_execute(sql).unwrap();
    server.batch_execute("SELECT pg_reload_conf()").unwrap();
    let off = "SELECT count(*) FROM pg_settings
               WHERE name = 'synchronous_commit' AND reset_val = 'off'";
    deployment.comes_to(1, off);
    let service = deployment.start_single_file();
    let client = Client::new(&deployment);
    for _ in 0..JOBS {
        let (job, submission) = client.submission("workflow_1");
        client.listen(job);
        client.send(&submission);
    }
    client.submissions_handled();
    // What was handled last may not have been acknowledged, so it is not counted.
    deployment.kill_server(Server::Postgres);
    service.kill();
    deployment.start_server(Server::Postgres);
    let left = client.peer.queue_length("job_submissions");
    assert!(left <= 1, "{left} were not acknowledged");
    let jobs = "SELECT count(*) FROM job WHERE status = 'SUBMITTED'";
    assert_eq!(deployment.count(jobs), JOBS);
}

/// What an operator has chosen beyond the service's needs stays.
#[rstest]
#[case("off", "on")]
#[case("on", "on")]
#[case("local", "local")]
#[case("remote_write", "remote_write")]
#[case("remote_apply", "remote_apply")]
fn commits_wait_for_the_disk_and_for_what_else_they_are_set_to(
    #[case] set: &str,
    #[case] kept: &str,
) {
    let deployment = Deployment::new();
    let role = Role::new(&deployment, "committer");
    let service = deployment.start();
    deployment
        .sql()
        .batch_execute(
            "CREATE TABLE seen (how text);
             CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN INSERT INTO seen VALUES (current_setting('synchronous_commit')); RETURN new; END $$;
             CREATE TRIGGER see BEFORE INSERT ON job FOR EACH ROW EXECUTE FUNCTION see()",
        )
        .unwrap();
    assert!(service.stop().success());
    role.set(&format!("SET synchronous_commit = {set}"));
    let service = deployment.start_with(&role.variables());
    let client = Client::new(&deployment);
    client.submit("workflow_1");
    let sql = format!("SELECT count(*) FROM seen WHERE how = '{kept}'");
    deployment.comes_to(1, &sql);
    assert!(service.stop().success());
}

#[test]
fn no_setting_of_the_role_gets_in_the_way() {
    // A pooler's sessions with Postgres begin with them before any transaction can say otherwise.
    let deployment = Deployment::new().without_pooler();
    let role = Role::new(&deployment, "odd");
    for setting in [
        "default_transaction_isolation = 'serializable'",
        "default_transaction_deferrable = on",
        "lock_timeout = '1ms'",
        "statement_timeout = '1ms'",
        "idle_in_transaction_session_timeout = '1ms'",
        "idle_session_timeout = '20ms'",
        "row_security = off",
        "\"DateStyle\" = 'SQL, DMY'",
        "\"TimeZone\" = 'Pacific/Kiritimati'",
        "\"IntervalStyle\" = 'sql_standard'",
        "\"bytea_output\" = 'escape'",
        "extra_float_digits = -15",
        "client_encoding = 'LATIN1'",
        "array_nulls = off",
        "standard_conforming_strings = off",
        "transform_null_equals = on",
        "lc_messages = 'C'",
    ] {
        role.set(&format!("SET {setting}"));
    }
    let often = [("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1")];
    let service = deployment.start_with(&[&role.variables()[..], &often].concat());
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let task = running_job(&client, &worker, None);
    // Meanwhile the handler has nothing to do.
    let mut server = deployment.sql();
    let mut last_run = || {
        let sql = "SELECT last_run::text FROM maintenance_run WHERE task = 'history'";
        let row = server.query_opt(sql, &[]).unwrap();
        row.map(|row| row.get::<_, String>(0))
    };
    for _ in 0..2 {
        let before = last_run();
        eventually("a round of maintenance", || {
            (last_run() != before).then_some(())
        });
    }
    worker.succeed(&task, "<e id='Größe €'/>");
    let result = client.result(task.job);
    assert_eq!(result.output_esdl.as_deref(), Some("<e id='Größe €'/>"));
    deployment.no_jobs_left();
    let log = service.log();
    assert!(!log.contains("wait for Postgres"), "{log}");
    assert!(!log.contains("maintenance fails"), "{log}");
    assert!(service.stop().success());
}

#[test]
fn a_replica_whose_postgres_takes_no_writes_leaves_messages_to_others() {
    const JOBS: usize = 20;
    // PgBouncer gives a new session what its first one had, writes included.
    let deployment = Deployment::new().without_pooler();
    let role = Role::new(&deployment, "reader");
    let healthy = deployment.start();
    let reading = deployment.start_with(&role.variables());
    role.set("SET default_transaction_read_only = on");
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    for _ in 0..JOBS {
        client.submit("workflow_1");
    }
    // Those that it had been given already as well.
    let tasks: Vec<_> = (0..JOBS).map(|_| worker.take()).collect();
    let why = eventually("it is not ready", || {
        let (ready, body) = reading.readiness()?;
        let why = body["parts"]["postgres"]["why"].as_str()?.to_owned();
        (!ready).then_some(why)
    });
    assert!(why.contains("is read-only"), "{why}");
    assert!(why.contains("source: user"), "{why}");
    for task in &tasks {
        worker.start(task);
        worker.succeed(task, OUTPUT);
        assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    }
    assert!(healthy.stop().success());
    role.set("RESET default_transaction_read_only");
    reading.wait_until_ready();
    let task = running_job(&client, &worker, None);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    deployment.no_jobs_left();
    assert!(reading.stop().success());
}

/// As a managed Postgres becomes whose disk is nearly full.
#[test]
fn a_database_that_turns_read_only_is_told_and_survived() {
    // As above, by a pooler it would stay as it was.
    let deployment = Deployment::new().without_pooler();
    let service = deployment.start();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let name = deployment.database();
    let mut server = server_client("postgres");
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1";
    let database = |server: &mut postgres::Client, setting: &str| {
        let sql = format!("ALTER DATABASE {name} {setting}");
        server.batch_execute(&sql).unwrap();
    };
    database(&mut server, "SET default_transaction_read_only = on");
    server.query(end, &[&name]).unwrap();
    let job = client.submit("workflow_1");
    let why = eventually("it is not ready", || {
        let (ready, body) = service.readiness()?;
        let why = body["parts"]["postgres"]["why"].as_str()?.to_owned();
        (!ready).then_some(why)
    });
    assert!(why.contains("is read-only"), "{why}");
    // Looking on goes on.
    eventually("jobs are shown", || {
        let (status, _) = service.get("/api/jobs")?;
        (status == 200).then_some(())
    });
    assert!(!service.readiness().unwrap().0);
    database(&mut server, "RESET default_transaction_read_only");
    assert_eq!(worker.take().job, job);
    assert_eq!(client.status(job), JobStatus::Enqueued);
    service.wait_until_ready();
}

/// Every lock of another session counts, whoever's it is.
#[test]
fn batches_are_divided_where_postgres_has_room_for_few_locks() {
    const JOBS: usize = 400;
    let deployment = Deployment::with_own(&[Server::RabbitMq, Server::Postgres], |deployment| {
        let conf = deployment.extra_folder(Server::Postgres).join("conf");
        std::fs::write(conf, "max_locks_per_transaction = 10\n").unwrap();
    });
    let service = deployment.start();
    assert!(service.stop().success());
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let submissions: Vec<_> = (0..JOBS)
        .map(|_| client.submission("workflow_1").1)
        .collect();
    submissions.iter().for_each(|one| client.send(one));
    eventually("all are in the queue", || {
        let waiting = client.peer.queue_length("job_submissions");
        (usize::try_from(waiting) == Ok(JOBS)).then_some(())
    });
    let mut other = deployment.sql();
    let full = other
        .batch_execute("SELECT pg_advisory_lock(1, key) FROM generate_series(1, 1000000) AS key")
        .unwrap_err();
    assert_eq!(full.code().unwrap().code(), "53200", "{full:?}");
    other
        .batch_execute("SELECT pg_advisory_unlock(1, key) FROM generate_series(1, 100) AS key")
        .unwrap();
    let service = deployment.start_single_file();
    let taken: std::collections::HashSet<_> = (0..JOBS).map(|_| worker.take().job).collect();
    assert_eq!(taken.len(), JOBS);
    service.logged("a batch is divided");
    deployment.comes_to(400, "SELECT count(*) FROM job");
    assert!(!service.log().contains("wait for Postgres"));
    assert!(service.stop().success());
}
