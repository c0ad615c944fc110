//! One outage is one trouble: on the page, in the health, in the log, and on the command line.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::Stdio;
use std::time::Instant;

use omotes_orchestrator::config::CONNECT_TIMEOUT;
use omotes_orchestrator::wire::job_status_update::JobStatus;
use uuid::Uuid;

use crate::harness::deployment::{Deployment, Server, eventually, free_port};
use crate::harness::peers::Client;

/// Whatever else does not work because of it.
#[test]
fn a_killed_postgres_is_the_one_trouble() {
    let deployment = Deployment::with_own_servers();
    let service = deployment.start_with(&[("HANDLER_THREADS", "4"), ("LOG_LEVEL", "INFO")]);
    let client = Client::new(&deployment);
    let known = client.submit("workflow_1");
    assert_eq!(client.status(known), JobStatus::Enqueued);
    deployment.kill_server(Server::Postgres);
    // So many that each handler has some.
    for _ in 0..100 {
        let (_, submission) = client.submission("workflow_1");
        client.send(&submission);
    }
    let answer = eventually("several parts that do not work", || {
        let (_, body) = service.readiness()?;
        let parts = body["parts"].as_object()?;
        let faulty = parts.values().filter(|part| part["ok"] == false).count();
        (faulty >= 4 && body["parts"]["broker"]["ok"] == false).then_some(body)
    });
    assert_eq!(answer["trouble"]["cause"], "postgres");
    assert_eq!(answer["trouble"]["others"].as_array().unwrap().len(), 0);
    let (status, page) = service.get("/").unwrap();
    assert_eq!(status, 503);
    assert_eq!(page.matches("class=\"trouble").count(), 1, "{page}");
    assert!(
        page.contains("<div class=\"lead\"><p><b>Postgres does not answer</b> for "),
        "{page}"
    );
    assert!(page.contains("What follows from it"), "{page}");

    service.logged("the session with RabbitMQ has ended, for want of Postgres");
    let log = service.log();
    assert_eq!(log.matches("Stack backtrace").count(), 1, "{log}");

    deployment.start_server(Server::Postgres);
    service.wait_until_ready();
    assert!(!service.get("/").unwrap().1.contains("class=\"lead\""));
}

/// A pool would try for ten seconds.
#[test]
fn commands_end_soon_where_nobody_listens() {
    let deployment = Deployment::new();
    let port = free_port().to_string();
    for arguments in [
        &["jobs", "list"][..],
        &["workers"],
        &["db", "current"],
        &["queues", "--interval", "0"],
        &["doctor"],
    ] {
        let begun = Instant::now();
        let mut command = deployment.command(arguments);
        let output = command.env("POSTGRESQL_PORT", &port).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8(said).unwrap();
        assert!(begun.elapsed() < CONNECT_TIMEOUT, "{arguments:?}: {said}");
        let refused = said.contains("no connection to Postgres: ");
        let needs_none = arguments[0] == "queues";
        assert_eq!(refused, !needs_none, "{arguments:?}: {said}");
    }
}

/// Of a server that only says nothing they say soon that they go on trying.
#[test]
fn commands_say_soon_that_nobody_answers() {
    let deployment = Deployment::new();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port().to_string();
    let mut command = deployment.command(&["jobs", "list"]);
    let mut list = command
        .env("POSTGRESQL_PORT", port)
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(list.stderr.take().unwrap()).lines();
    let first = said.next().unwrap().unwrap();
    assert!(first.starts_with("Postgres at "), "{first}");
    assert!(first.ends_with(" does not answer; still trying"), "{first}");
    // It says so long before it gives up.
    assert!(list.try_wait().unwrap().is_none());
    assert!(!list.wait().unwrap().success());
}

/// They hold up all work, as a Postgres does that is gone.
#[test]
fn locked_tables_are_a_trouble_of_postgres() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job_starts IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    let trouble = eventually("the lock is told", || {
        let (_, body) = service.readiness()?;
        body.get("trouble").cloned()
    });
    assert_eq!(trouble["cause"], "postgres", "{trouble}");
    let why = trouble["why"].as_str().unwrap();
    assert!(why.contains("somebody has locked the tables"), "{why}");
    lock.rollback().unwrap();
    service.wait_until_ready();
}

#[test]
fn tables_of_another_revision_are_no_outage() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let mut sql = deployment.sql();
    sql.batch_execute("ALTER TABLE job_history RENAME COLUMN why TO other")
        .unwrap();
    for path in ["/", "/api/jobs"] {
        let (status, said) = service.get(path).unwrap();
        assert_eq!(status, 503);
        assert!(said.contains("does not exist"), "{said}");
        assert!(!said.contains("Postgres does not"), "{said}");
    }
    sql.batch_execute("ALTER TABLE job_history RENAME COLUMN other TO why")
        .unwrap();
    assert_eq!(service.get("/").unwrap().0, 200);
}

#[test]
fn a_killed_rabbitmq_is_the_one_trouble() {
    let deployment = Deployment::with_own_servers();
    let service = deployment.start();
    deployment.kill_server(Server::RabbitMq);
    let answer = eventually("no session", || {
        let (_, body) = service.readiness()?;
        (body["parts"]["broker"]["ok"] == false).then_some(body)
    });
    assert_eq!(answer["trouble"]["cause"], "broker");
    let (_, page) = service.get("/").unwrap();
    assert!(
        page.contains("<b>There is no session with RabbitMQ</b>"),
        "{page}"
    );
    assert_eq!(page.matches("class=\"trouble").count(), 1, "{page}");
    // Of a job that has ended nothing depends on it.
    let ended = Uuid::new_v4();
    let history = "INSERT INTO job_history (job_id, finished_at, starts, outcome, result_bytes)
                   VALUES ($1, now(), 0, 'FAILED', 0)";
    deployment.sql().execute(history, &[&ended]).unwrap();
    let mut show = deployment.command(&["jobs", "show", &ended.to_string()]);
    let output = show.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    // Of Postgres it may say, where much else goes on, that it does not answer yet.
    assert!(
        output.status.success() && !said.contains("RabbitMQ"),
        "{said}"
    );
    let output = deployment.command(&["jobs", "list"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("nothing is known of workers without RabbitMQ"),
        "{said}"
    );
}
