//! What becomes of the jobs when RabbitMQ and Postgres themselves are killed, short of memory or
//! disk, or full of large messages.

use std::net::TcpListener;
use std::time::Instant;

use omotes_orchestrator::wire::{
    JobSubmission, job_result::ResultType, job_status_update::JobStatus,
};
use rstest::rstest;

use crate::harness::deployment::{Deployment, Server, Service, eventually};
use crate::harness::peers::{Client, Task, Worker, kept_its_session, running_job};
use crate::harness::standby::Standby;

const OUTPUT: &str = "<e id='out-1'/>";

/// The readiness comes to say that this part is down.
fn misses(service: &Service, part: &str) {
    eventually("it is not ready", || {
        let (ready, body) = service.readiness()?;
        (!ready && body["parts"][part]["ok"] == false).then_some(())
    });
}

#[test]
fn a_broker_that_is_killed_loses_nothing() {
    let deployment = Deployment::with_own_servers();
    let service = deployment.start();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let done = running_job(&client, &worker, None);
    let running = running_job(&client, &worker, None);
    let waiting = client.submit("workflow_1");
    assert_eq!(client.status(waiting), JobStatus::Enqueued);
    worker.succeed(&done, OUTPUT);
    deployment.kill_server(Server::RabbitMq);
    misses(&service, "broker");
    deployment.start_server(Server::RabbitMq);
    service.wait_until_ready();
    // Another connection, and the bindings of the client's queues are gone with the exchange.
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    assert_eq!(client.outcome(done.job).0, ResultType::Succeeded);
    worker.succeed(&running, OUTPUT);
    assert_eq!(client.outcome(running.job).0, ResultType::Succeeded);
    let task = worker.take();
    assert_eq!(task.job, waiting);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(waiting).0, ResultType::Succeeded);
    deployment.no_jobs_left();
}

#[test]
fn a_postgres_that_is_killed_loses_nothing() {
    let deployment = Deployment::with_own_servers();
    let service = deployment.start();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let running = running_job(&client, &worker, None);
    deployment.kill_server(Server::Postgres);
    worker.succeed(&running, OUTPUT);
    let waiting = client.submit("workflow_1");
    misses(&service, "postgres");
    deployment.start_server(Server::Postgres);
    assert_eq!(client.outcome(running.job).0, ResultType::Succeeded);
    assert_eq!(worker.take().job, waiting);
    service.wait_until_ready();
    kept_its_session(&deployment, &service);
}

#[test]
fn a_service_moves_on_to_another_rabbitmq() {
    let deployment = Deployment::with_own_servers();
    let other = Deployment::with_own(&[], |_| {});
    // Accepts connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let hosts = [
        "127.0.0.1:1".to_owned(),
        silent.local_addr().unwrap().to_string(),
        format!("localhost:{}", other.rabbitmq_port()),
        "127.0.0.1".to_owned(),
    ]
    .join(",");
    let variables =
        ["SDK", "TASK", "CELERY"].map(|vhost| (format!("{vhost}_RABBITMQ_HOSTNAME"), &*hosts));
    let variables = variables
        .each_ref()
        .map(|(name, hosts)| (name.as_str(), *hosts));
    let service = deployment.start_with(&variables);
    let runs_a_job = |deployment: &Deployment| {
        let client = Client::new(deployment);
        let worker = Worker::new(deployment, "workflow_1");
        let job = running_job(&client, &worker, None);
        worker.succeed(&job, OUTPUT);
        assert_eq!(client.outcome(job.job).0, ResultType::Succeeded);
    };
    runs_a_job(&deployment);
    deployment.kill_server(Server::RabbitMq);
    misses(&service, "broker");
    // With another node's queues and nothing in them.
    other.start_server(Server::RabbitMq);
    service.wait_until_ready();
    runs_a_job(&other);
    deployment.no_jobs_left();
}

/// The variables of a deployment whose Postgres is either of these.
fn postgres_at(ports: [u16; 2]) -> [(&'static str, String); 2] {
    [
        ("POSTGRESQL_HOST", "127.0.0.1,127.0.0.1".to_owned()),
        (
            "POSTGRESQL_PORT",
            ports.map(|port| port.to_string()).join(","),
        ),
    ]
}

#[test]
fn a_promoted_standby_takes_over_and_nothing_is_lost() {
    const JOBS: usize = 120;
    let deployment = Deployment::with_own_servers();
    let standby = Standby::of(&deployment);
    let mut command = deployment.command(&["run"]);
    command.envs(postgres_at([deployment.postgres_port(), standby.port]));
    let service = deployment.launch_command(command);
    service.wait_until_ready();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let submit = |_| {
        let (job, submission) = client.submission("workflow_1");
        client.listen(job);
        client.send(&submission);
        job
    };
    let complete = |task: &Task| {
        worker.start(task);
        worker.succeed(task, OUTPUT);
    };
    let mut jobs: Vec<_> = (0..JOBS / 2).map(submit).collect();
    for _ in 0..JOBS / 4 {
        complete(&worker.take());
    }
    // Submissions, starts and results are on their way.
    jobs.extend((0..JOBS / 2).map(submit));
    deployment.kill_server(Server::Postgres);
    let poll = || Some(Task::of(&worker.peer.poll("workflow_1")?));
    for task in std::iter::from_fn(poll).take(JOBS / 8) {
        complete(&task);
    }
    misses(&service, "postgres");
    standby.promote();
    let promoted = Instant::now();
    service.wait_until_ready();
    eprintln!("ready {:?} after the promotion", promoted.elapsed());
    let mut ended = 0;
    eventually("all outcomes", || {
        // Of a job whose submission was not committed, there may be a second task.
        std::iter::from_fn(poll).for_each(|task| complete(&task));
        let result = |job| client.peer.queue_length(&format!("jobs.{job}.result"));
        while ended < JOBS && result(jobs[ended]) > 0 {
            ended += 1;
        }
        (ended == JOBS).then_some(())
    });
    for job in jobs {
        assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    }
    standby.comes_to(0, "SELECT count(*) FROM job");
    standby.comes_to(
        i64::try_from(JOBS).unwrap(),
        "SELECT count(*) FROM job_history WHERE outcome = 'SUCCEEDED'",
    );
}

#[test]
fn of_several_postgres_servers_the_one_that_takes_writes_is_used() {
    let deployment = Deployment::with_own(&[Server::RabbitMq, Server::Postgres], |_| {});
    let standby = Standby::of(&deployment);
    // Both a standby and a server that accepts connections and says nothing come before it.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().map(|at| (at.port(), silent)).unwrap();
    for port in [standby.port, silent.0] {
        let variables = postgres_at([port, deployment.postgres_port()]);
        deployment.commands_find_postgres(&variables);
    }
    // Without a primary each server's reason is told.
    let output = deployment
        .command(&["db", "current"])
        .envs(postgres_at([standby.port, 1]))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("is a standby and takes no writes"), "{said}");
    assert!(said.contains("127.0.0.1:1: "), "{said}");
}

#[rstest]
#[case::memory(["set_vm_memory_high_watermark", "0.000001"], ["set_vm_memory_high_watermark", "0.4"])]
#[case::disk(["set_disk_free_limit", "100000GB"], ["set_disk_free_limit", "50MB"])]
fn an_alarm_of_the_broker_is_told_and_survived(#[case] on: [&str; 2], #[case] off: [&str; 2]) {
    let deployment = Deployment::with_own_servers();
    let service = deployment.start();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let job = client.submit("workflow_1");
    assert_eq!(client.status(job), JobStatus::Enqueued);
    deployment.rabbitmqctl(&on);
    // Although nothing is going on.
    let why = eventually("it is not ready", || {
        let (ready, body) = service.readiness()?;
        (!ready).then_some(body["parts"]["publishing"]["why"].as_str()?.to_owned())
    });
    assert!(why.contains("blocked by RabbitMQ: low on"), "{why}");
    service.logged("blocked by RabbitMQ: low on");
    deployment.rabbitmqctl(&off);
    service.wait_until_ready();
    let task = worker.take();
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
}

#[test]
fn a_full_disk_of_postgres_is_told_and_survived() {
    let deployment = Deployment::with_own_servers();
    let service = deployment.start();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let running = running_job(&client, &worker, None);
    // As large as a file of the write-ahead log.
    deployment.limit_files("16777216");
    let full = deployment.sql().batch_execute(
        "INSERT INTO job_history (job_id, finished_at, starts, outcome, result_bytes, workflow_type)
         SELECT gen_random_uuid(), now(), 0, 'FAILED', 0, repeat('x', 1000)
         FROM generate_series(1, 30000)",
    );
    let full = format!("{:?}", full.unwrap_err());
    assert!(full.contains("could not extend file"), "{full}");
    let fill = "INSERT INTO job_history (job_id, finished_at, starts, outcome, result_bytes)
                SELECT gen_random_uuid(), now(), 0, 'FAILED', 0 FROM generate_series(1, 1000)";
    while deployment.sql().batch_execute(fill).is_ok() {}
    let fill = fill.replace("1000", "1");
    while deployment.sql().batch_execute(&fill).is_ok() {}
    worker.succeed(&running, OUTPUT);
    let why = eventually("it is not ready", || {
        let (ready, body) = service.readiness()?;
        (!ready).then_some(body["parts"]["handling"]["why"].as_str()?.to_owned())
    });
    assert!(why.contains("could not extend file"), "{why}");
    // And when the session has ended over it.
    for part in ["postgres", "broker"] {
        eventually(&format!("{part} is faulty, for want of room"), || {
            let (_, body) = service.readiness()?;
            (body["parts"][part]["ok"] == false).then(|| {
                let trouble = &body["trouble"];
                assert_eq!(trouble["cause"], "postgres", "{body}");
                assert!(
                    trouble["remedy"].as_str().unwrap().contains("room"),
                    "{body}"
                );
            })
        });
    }
    service.logged("could not extend file");
    // Without the service too.
    let output = deployment.command(&["doctor"]).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let second = said.lines().nth(1).unwrap();
    assert!(
        second.starts_with("error   Postgres        it does not take what is written: ")
            && second.contains("could not extend file"),
        "{said}"
    );
    assert!(said.contains("Give it room on its disk."), "{said}");
    deployment.limit_files("unlimited");
    assert_eq!(client.outcome(running.job).0, ResultType::Succeeded);
    service.wait_until_ready();
}

#[test]
fn large_messages_pass_in_bounded_memory() {
    const RESULTS: usize = 20;
    const MIB: usize = 1024 * 1024;
    let deployment = Deployment::with_own_servers();
    deployment.limit_messages(128 * MIB);
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let tasks: Vec<_> = (0..RESULTS)
        .map(|_| running_job(&client, &worker, None))
        .collect();
    let output = format!("<e id='out-1'>{}</e>", "x".repeat(64 * MIB));
    worker.peer.widen("omotes_task_result_events", RESULTS);
    // Nothing gets through for a while, and all of it would like to come in.
    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    for task in &tasks {
        worker.succeed(task, &output);
    }
    service.logged("has been waiting for Postgres");
    // A stop hears all that RabbitMQ has sent already, and keeps none of it.
    let (status, peak) = service.stop_watched();
    eprintln!("peak memory at a stop: {peak} MiB");
    assert!(status.success());
    assert!(peak < 512, "{peak} MiB");
    let service = deployment.launch(&[]);
    service.logged("somebody has locked the tables");
    lock.rollback().unwrap();
    for task in &tasks {
        let result = client.result(task.job);
        assert_eq!(result.output_esdl.as_deref(), Some(output.as_str()));
    }
    for _ in 0..3 {
        let (job, submission) = client.submission("workflow_1");
        client.send(&JobSubmission {
            esdl: "x".repeat(100 * MIB),
            ..submission
        });
        assert_eq!(worker.take().job, job);
    }
    let peak = service.peak_memory();
    eprintln!("peak memory with large messages: {peak} MiB");
    // An ESDL is there three times at once: in its message, decoded, and in its task. The rest is
    // what the allocator has not given back yet.
    assert!(peak < 640, "{peak} MiB");
}
