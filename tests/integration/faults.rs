//! What is broken, refused or gone, and what becomes of the jobs meanwhile.

use std::collections::HashSet;
use std::net::TcpListener;

use amiquip::{AmqpProperties, AmqpValue, Exchange, FieldTable, Publish, QueueDeclareOptions};
use omotes_orchestrator::wire::{
    AVAILABLE_WORKFLOWS_KEY, DEAD_LETTERS_QUEUE, JobDelete, JobSubmission, OMOTES_EXCHANGE,
    job_result::ResultType, job_status_update::JobStatus,
};
use prost::Message;
use rstest::rstest;
use serde_json::json;
use uuid::Uuid;

use crate::harness::deployment::{Deployment, close_a_connection, eventually, server_client};
use crate::harness::peers::{Client, Peer, Task, Worker, kept_its_session, running_job};

const OUTPUT: &str = "<e id='out-1'/>";

fn text(value: AmqpValue) -> String {
    match value {
        AmqpValue::LongString(text) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_cannot_be_decoded_becomes_a_dead_letter_with_its_reason() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();

    let no_id = JobDelete {
        uuid: "no id".to_owned(),
    };
    let queues = [
        (&client.peer, "job_submissions", b"\xff".to_vec()),
        (&client.peer, "job_deletions", no_id.encode_to_vec()),
        (&worker.peer, "omotes_task_progress_events", Vec::new()),
        (&worker.peer, "omotes_task_result_events", b"\x0a".to_vec()),
    ];
    for (peer, queue, body) in queues {
        peer.send_as(queue, &body, "a message id");
        let letter = peer.next(DEAD_LETTERS_QUEUE);
        assert_eq!(letter.body, body);
        assert_eq!(text(letter.header("queue")), queue);
        assert!(!text(letter.header("reason")).is_empty());
        assert!(text(letter.header("time")).ends_with('Z'));
        match letter.header("properties") {
            AmqpValue::FieldTable(properties) => {
                assert_eq!(text(properties["message_id"].clone()), "a message id");
            }
            other => panic!("{other:?}"),
        }
    }
    service.logged(
        "message a message id from cancels: put into omotes_dead_letters: \"no id\" is no job id",
    );

    let job = client.submit("workflow_1");
    let task = worker.take();
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
}

#[test]
fn a_submission_cut_short_gets_an_error_result() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let _service = deployment.start();
    let (job, submission) = client.submission("workflow_1");
    client.listen(job);
    let mut body = submission.encode_to_vec();
    body.truncate(body.len() - 3);
    client.peer.send("job_submissions", &body);
    let (result_type, logs) = client.outcome(job);
    assert_eq!(result_type, ResultType::Error);
    assert!(logs.contains("JobSubmission"), "{logs}");
    assert_eq!(client.peer.next(DEAD_LETTERS_QUEUE).body, body);
}

#[test]
fn parameters_that_json_cannot_express_get_an_error_result() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let _service = deployment.start();
    let (job, submission) = client.submission("workflow_1");
    client.listen(job);
    let nan = prost_types::Value {
        kind: Some(prost_types::value::Kind::NumberValue(f64::NAN)),
    };
    client.send(&JobSubmission {
        params_dict: Some(prost_types::Struct {
            fields: [("x".to_owned(), nan)].into(),
        }),
        ..submission
    });
    let logs = "The parameter params_dict.x is NaN, which is no finite number.";
    assert_eq!(client.outcome(job), (ResultType::Error, logs.to_owned()));
}

#[test]
fn what_postgres_refuses_becomes_a_dead_letter_and_holds_up_nobody_else() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start_single_file();
    let jobs = [client.submit("workflow_1"), client.submit("workflow_1")];
    let tasks = [worker.take(), worker.take()];
    assert!(service.stop().success());

    // All in one batch of the next service: a start that Postgres refuses among good ones, one of
    // which has an id that it could not store.
    let mut sql = deployment.sql();
    // A division by zero, as any error in the data.
    sql.batch_execute("ALTER TABLE job_starts ADD CHECK (1 / (length(message_id) - 7) = 0)")
        .unwrap();
    worker.start(&tasks[0]);
    worker.start_as(&tasks[1], "refused");
    worker.start_as(&tasks[1], "with a \0 in it");
    worker.progress(&tasks[0], 0.5);
    // An id that is too long for the index.
    let id: String = (0..400).map(|_| Uuid::new_v4().to_string()).collect();
    let output = format!("<e id='{id}'/>");
    let _service = deployment.start_single_file();
    assert_eq!(client.status(jobs[0]), JobStatus::Enqueued);
    assert_eq!(client.status(jobs[0]), JobStatus::Running);
    assert_eq!(client.progress(jobs[0]).0, 0.5);
    assert_eq!(client.status(jobs[1]), JobStatus::Enqueued);
    assert_eq!(client.status(jobs[1]), JobStatus::Running);
    let letter = worker.peer.next(DEAD_LETTERS_QUEUE);
    assert!(
        text(letter.header("reason")).contains("division by zero"),
        "{:?}",
        letter.properties
    );

    worker.succeed(&tasks[0], &output);
    worker.succeed(&tasks[1], OUTPUT);
    let (result_type, logs) = client.outcome(jobs[0]);
    assert_eq!(result_type, ResultType::Error);
    assert!(logs.contains("index row"), "{logs}");
    assert_eq!(client.outcome(jobs[1]).0, ResultType::Succeeded);
    worker.peer.next(DEAD_LETTERS_QUEUE);
}

#[test]
fn a_task_above_the_brokers_limit_is_an_error_result_that_names_the_limit() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let (job, submission) = client.submission("workflow_1");
    client.listen(job);
    // A submission that RabbitMQ takes, whose task with its escaped quotes it does not.
    client.send(&JobSubmission {
        esdl: "\"".repeat(9 * 1024 * 1024),
        ..submission
    });
    let (result_type, logs) = client.outcome(job);
    assert_eq!(result_type, ResultType::Error);
    assert!(
        logs.contains("larger than configured max size 16777216"),
        "{logs}"
    );

    let job = client.submit("workflow_1");
    let task = worker.take();
    assert_eq!(task.job, job);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    kept_its_session(&deployment, &service);
}

#[test]
fn a_task_queue_declared_otherwise_is_an_error_result_that_says_so() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let celery = Peer::new(&deployment, &deployment.celery_vhost());
    celery.declare("workflow_1");
    let service = deployment.start();
    let job = client.submit("workflow_1");
    let (result_type, logs) = client.outcome(job);
    assert_eq!(result_type, ResultType::Error);
    assert!(
        logs.contains(
            "the task queue \"workflow_1\" exists, but not as durable with x-max-priority = 10"
        ),
        "{logs}"
    );
    service.logged("the task queue \"workflow_1\" exists");
    // Other workflows go on.
    let worker = Worker::new(&deployment, "workflow_2");
    let job = client.submit("workflow_2");
    assert_eq!(worker.take().job, job);
}

#[test]
fn a_default_queue_type_that_forbids_a_task_queue_is_named() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    deployment.make_celery_vhost_anew(&json!({"defaultqueuetype": "quorum"}));
    let service = deployment.start();
    let job = client.submit("workflow_1");
    let (result_type, logs) = client.outcome(job);
    assert_eq!(result_type, ResultType::Error);
    assert!(logs.contains("default queue type is not classic"), "{logs}");
    assert!(!logs.contains("exists"), "{logs}");
    assert!(
        !service
            .log()
            .contains("the session with RabbitMQ has ended")
    );
}

#[test]
fn a_task_queue_that_is_somebodys_alone_is_an_error_result_that_says_so() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let celery = Peer::new(&deployment, &deployment.celery_vhost());
    let alone = QueueDeclareOptions {
        exclusive: true,
        ..QueueDeclareOptions::default()
    };
    celery.channel.queue_declare("workflow_1", alone).unwrap();
    let service = deployment.start();
    let job = client.submit("workflow_1");
    let (result_type, logs) = client.outcome(job);
    assert_eq!(result_type, ResultType::Error);
    assert!(
        logs.contains("the task queue \"workflow_1\" is not ours"),
        "{logs}"
    );
    kept_its_session(&deployment, &service);
}

#[test]
fn a_queue_that_takes_nothing_more_holds_up_nobody() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let (job, submission) = client.submission("workflow_1");
    client.listen(job);
    let full = |queue: &str, key: &str| {
        let overflow = AmqpValue::LongString("reject-publish".to_owned());
        let options = QueueDeclareOptions {
            durable: true,
            arguments: FieldTable::from([
                ("x-max-length".to_owned(), AmqpValue::LongInt(1)),
                ("x-overflow".to_owned(), overflow),
            ]),
            ..QueueDeclareOptions::default()
        };
        let channel = &client.peer.channel;
        channel.queue_declare(queue, options).unwrap();
        channel
            .queue_bind(queue, OMOTES_EXCHANGE, key, FieldTable::new())
            .unwrap();
        client.peer.send(queue, b"full");
    };
    // Of a client that has stopped reading: of everything that clients hear.
    full("workflows", AVAILABLE_WORKFLOWS_KEY);
    full("status", &format!("jobs.{job}.status"));
    full("progress", &format!("jobs.{job}.progress"));
    full("result", &format!("jobs.{job}.result"));
    let service = deployment.start();
    client.send(&submission);
    let task = worker.take();
    worker.start(&task);
    worker.progress(&task, 0.5);
    // Before the result, which comes by another queue and would make it late.
    service.logged(&format!(
        "a queue for jobs.{job}.progress takes nothing more"
    ));
    worker.succeed(&task, OUTPUT);
    // The client's own queue, by its name.
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    kept_its_session(&deployment, &service);
}

#[test]
fn a_row_that_cannot_be_read_holds_up_nobody_else() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start_single_file();
    let broken = running_job(&client, &worker, None);
    let good = running_job(&client, &worker, None);
    let sql = "UPDATE job SET registered_at = 'infinity' WHERE job_id = $1";
    deployment.sql().execute(sql, &[&broken.job]).unwrap();
    worker.succeed(&broken, OUTPUT);
    worker.succeed(&good, OUTPUT);
    assert_eq!(client.outcome(good.job).0, ResultType::Succeeded);
    let letter = worker.peer.next(DEAD_LETTERS_QUEUE);
    let reason = text(letter.header("reason"));
    assert!(
        reason.contains(&format!("the row of job {}", broken.job)),
        "{reason}"
    );
    kept_its_session(&deployment, &service);
}

#[test]
fn headers_that_would_not_fit_are_left_out_of_a_dead_letter() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let service = deployment.start();
    let long = AmqpValue::LongString("x".repeat(32_000));
    let headers = FieldTable::from([("x".to_owned(), long)]);
    let properties = AmqpProperties::default().with_headers(headers);
    let publish = Publish::with_properties(b"\xff", "job_submissions", properties);
    Exchange::direct(&client.peer.channel)
        .publish(publish)
        .unwrap();
    let letter = client.peer.next(DEAD_LETTERS_QUEUE);
    let left_out = text(letter.header("properties"));
    assert!(left_out.starts_with("left out: "), "{left_out}");
    kept_its_session(&deployment, &service);
}

#[test]
fn a_task_queue_that_was_deleted_is_declared_again() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start_single_file();
    client.submit("workflow_1");
    worker.take();
    worker.peer.delete_queue("workflow_1");
    let job = client.submit("workflow_1");
    service.logged("the task queue \"workflow_1\" was deleted");
    let worker = Worker::new(&deployment, "workflow_1");
    assert_eq!(worker.take().job, job);
}

#[test]
fn a_client_whose_queue_lost_its_binding_gets_its_result() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start();
    let job = client.submit("workflow_1");
    let task = worker.take();
    let queue = format!("jobs.{job}.result");
    client
        .peer
        .channel
        .queue_unbind(
            queue.as_str(),
            "omotes_exchange",
            queue.as_str(),
            FieldTable::new(),
        )
        .unwrap();
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
}

#[test]
fn a_result_that_nobody_waits_for_ends_its_job_all_the_same() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let (job, submission) = client.submission("workflow_1");
    client.send(&submission);
    worker.succeed(&worker.take(), OUTPUT);
    service.logged(&format!("nobody is waiting any more in jobs.{job}.result"));
    let sql = "SELECT count(*) FROM job_history WHERE outcome = 'SUCCEEDED'";
    deployment.comes_to(1, sql);
}

#[test]
fn a_lost_connection_is_opened_again_and_nothing_is_lost() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let job = client.submit("workflow_1");
    let task = worker.take();
    for (vhost, end) in [(deployment.sdk_vhost(), 1), (deployment.celery_vhost(), 2)] {
        close_a_connection(&vhost, "consuming");
        eventually("the session ends", || {
            let log = service.log();
            let ends = log
                .matches("the session with RabbitMQ has ended, a new one follows")
                .count();
            (ends >= end).then_some(())
        });
        service.wait_until_ready();
    }
    // Whatever arrives now is handled by the next session.
    worker.start(&task);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    let other = client.submit("workflow_1");
    assert_eq!(worker.take().job, other);
    service.wait_until_ready();
}

#[test]
fn messages_wait_while_postgres_is_gone_and_readiness_says_why() {
    // PgBouncer says it once, and then only that it cannot log in.
    let deployment = Deployment::new().without_pooler();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let running = client.submit("workflow_1");
    let task = worker.take();
    assert_eq!(client.status(running), JobStatus::Enqueued);
    deployment.comes_to(1, "SELECT count(*) FROM job");

    let name = &deployment.name;
    let mut server = server_client("postgres");
    let close = format!(
        "ALTER DATABASE {name} ALLOW_CONNECTIONS false;
         SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    );
    server.batch_execute(&close).unwrap();
    let waiting = client.submit("workflow_1");
    worker.start(&task);
    service.logged("messages wait for Postgres");
    eventually("the reason in /health/ready", || {
        let (ready, body) = service.readiness()?;
        let why = body["parts"]["postgres"]["why"].as_str()?;
        (!ready && why.contains("not currently accepting connections")).then_some(())
    });
    assert_eq!(service.get("/health/live").unwrap().0, 200);

    server
        .batch_execute(&format!("ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
        .unwrap();
    assert_eq!(client.status(running), JobStatus::Running);
    assert_eq!(worker.take().job, waiting);
    service.wait_until_ready();
}

#[test]
fn a_backlog_survives_a_kill() {
    const JOBS: usize = 1000;
    const EVENTS: usize = 3000;
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");

    // Jobs that are running, so that the events are theirs.
    let service = deployment.start();
    let running: Vec<Task> = (0..30)
        .map(|_| running_job(&client, &worker, None))
        .collect();
    assert!(service.stop().success());
    for number in 0..EVENTS {
        worker.progress(&running[number % running.len()], 0.5);
    }
    let mut submitted = HashSet::new();
    for _ in 0..JOBS {
        let (job, submission) = client.submission("workflow_1");
        client.send(&submission);
        submitted.insert(job);
    }

    // Killed in the middle of it.
    let service = deployment.start();
    let rows = "SELECT count(*) FROM job";
    eventually("some of the backlog is done", || {
        (deployment.count(rows) > 100).then_some(())
    });
    service.kill();
    let left = deployment.count(rows);
    let _service = deployment.start();
    let all = i64::try_from(JOBS + running.len()).unwrap();
    assert!(left < all, "the kill came too late to show anything");
    deployment.comes_to(all, rows);
    for task in &running {
        for _ in 0..EVENTS / running.len() {
            assert_eq!(client.progress(task.job).0, 0.5);
        }
    }
    // A task for each job, and perhaps orphans of the killed service, which are revoked when they
    // start.
    let mut sql = deployment.sql();
    let current: HashSet<String> = sql
        .query("SELECT celery_id FROM job WHERE status = 'SUBMITTED'", &[])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(current.len(), JOBS);
    let mut with_current_task = HashSet::new();
    for _ in 0..worker.waiting() {
        let task = worker.take();
        assert!(submitted.contains(&task.job));
        if current.contains(&task.id) {
            with_current_task.insert(task.job);
        } else {
            worker.start(&task);
            assert_eq!(worker.revoked(), task.id);
        }
    }
    assert_eq!(with_current_task, submitted);
}

#[test]
fn replicas_share_the_work() {
    const JOBS: usize = 200;
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    // Started at once, so that they race for the revisions too.
    let replicas = [(); 3].map(|()| deployment.launch(&[]));
    for replica in &replicas {
        replica.wait_until_ready();
    }
    let jobs: HashSet<Uuid> = (0..JOBS).map(|_| client.submit("workflow_1")).collect();
    let tasks: Vec<Task> = jobs.iter().map(|_| worker.take()).collect();
    assert_eq!(
        tasks.iter().map(|task| task.job).collect::<HashSet<_>>(),
        jobs
    );
    for task in &tasks {
        worker.start(task);
        worker.progress(task, 1.0);
    }
    for task in &tasks {
        assert_eq!(client.status(task.job), JobStatus::Enqueued);
        assert_eq!(client.status(task.job), JobStatus::Running);
        // Another replica may have it, which must not be slower than the one that gets the result.
        assert_eq!(client.progress(task.job).0, 1.0);
        worker.succeed(task, OUTPUT);
    }
    for job in &jobs {
        assert_eq!(client.outcome(*job).0, ResultType::Succeeded);
    }
    let sql = "SELECT count(*) FROM job_history WHERE outcome = 'SUCCEEDED' AND starts = 1";
    deployment.comes_to(i64::try_from(JOBS).unwrap(), sql);
    deployment.no_jobs_left();
    // They leave nothing behind that could still lead to anything, and nothing came twice.
    for replica in replicas {
        assert!(replica.stop().success());
    }
    assert_eq!(client.peer.queue_length("job_submissions"), 0);
    for queue in ["omotes_task_progress_events", "omotes_task_result_events"] {
        assert_eq!(worker.peer.queue_length(queue), 0, "{queue}");
    }
    for job in &jobs {
        client.hears_nothing(*job);
    }
    assert_eq!(worker.waiting(), 0);
}

#[test]
fn a_replica_that_is_killed_leaves_its_messages_to_the_others() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let held_up = deployment.start();
    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    let (job, submission) = client.submission("workflow_1");
    client.listen(job);
    client.send(&submission);
    eventually("the first replica has it in hand", || {
        (client.peer.queue_length("job_submissions") == 0).then_some(())
    });
    held_up.kill();
    lock.rollback().unwrap();
    let _other = deployment.start();
    assert_eq!(worker.take().job, job);
}

#[test]
fn a_postgres_that_says_nothing_is_not_waited_for() {
    let deployment = Deployment::new();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port().to_string();
    let mut command = deployment.command(&["db", "current"]);
    let output = command.env("POSTGRESQL_PORT", port).output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("takes connections, and says nothing"),
        "{said}"
    );
}

#[rstest]
#[case("false", "no end of the AMQP handshake")]
#[case("true", "TLS with")]
fn a_rabbitmq_that_says_nothing_is_told_with_what_to_look_at(
    #[case] tls: &str,
    #[case] what: &str,
) {
    let deployment = Deployment::new();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let port = silent.local_addr().unwrap().port().to_string();
    let mut service = deployment.launch(&[
        ("SDK_RABBITMQ_HOSTNAME", "127.0.0.1"),
        ("SDK_RABBITMQ_PORT", &port),
        ("SDK_RABBITMQ_TLS", tls),
    ]);
    service.logged("rabbitmqctl status");
    let log = service.log();
    for part in [what, &address, "`ulimit -n` where it runs"] {
        assert!(log.contains(part), "{part}: {log}");
    }
    service.signal("-TERM");
    assert_eq!(service.wait().code(), Some(0));
}
