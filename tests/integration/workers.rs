//! What is known of Celery's workers, and the tasks that none of them has.

use std::fs::File;
use std::time::{Duration, Instant};

use amiquip::{
    AmqpProperties, AmqpValue, ExchangeDeclareOptions, ExchangeType, FieldTable, Publish,
};
use omotes_orchestrator::wire::{
    job_result::ResultType, job_status_update::JobStatus, protobuf_struct,
};
use rstest::rstest;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::deployment::{Deployment, Service, eventually};
use crate::harness::peers::{Client, Peer};
use crate::python::{CeleryWorker, PYTHON};

/// What operators are promised.
const SEEN_WITHIN: Duration = Duration::from_secs(30);

/// A service that looks at the workers each so many seconds.
pub fn start(deployment: &Deployment, period: &str, variables: &[(&str, &str)]) -> Service {
    let workflows = format!("{PYTHON}/workflows.json");
    let own = [
        ("WORKFLOW_CONFIG_PATH", workflows.as_str()),
        ("WORKERS_PERIOD_SEC", period),
    ];
    deployment.start_with(&[&own, variables].concat())
}

pub fn name(worker: &CeleryWorker) -> String {
    format!("worker-steerable@{}", worker.host)
}

/// Waits until a worker is in this state.
pub fn comes_to_be(deployment: &Deployment, worker: &CeleryWorker, state: &str) {
    let since = Instant::now();
    let mut sql = deployment.sql();
    eventually(&format!("{} is {state}", worker.host), || {
        let sql = sql.query_opt(
            "SELECT FROM worker WHERE host = $1 AND state = $2",
            &[&name(worker), &state],
        );
        sql.unwrap().map(drop)
    });
    let took = since.elapsed();
    assert!(took < SEEN_WITHIN, "{state} was seen after {took:?}");
}

/// A job that does what it is told.
pub fn job(client: &Client, behaviour: &str) -> Uuid {
    let (job, mut submission) = client.submission("steerable");
    let params = json!({"behaviour": behaviour, "number": 1.5});
    submission.params_dict = Some(protobuf_struct(params.as_object().unwrap()));
    client.listen(job);
    client.send(&submission);
    job
}

/// A job that runs until the file is there.
pub fn running_job(deployment: &Deployment, client: &Client, file: &str) -> Uuid {
    let file = deployment.folder.join(file);
    let job = job(client, &format!("wait for {}", file.display()));
    assert_eq!(client.status(job), JobStatus::Enqueued);
    assert_eq!(client.status(job), JobStatus::Running);
    job
}

pub fn command(deployment: &Deployment, arguments: &[&str]) -> (Option<i32>, String) {
    let output = deployment.command(arguments).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

/// What the command says of a worker.
fn view(deployment: &Deployment, worker: &CeleryWorker) -> Value {
    let output = deployment.command(&["workers", "--json"]).output().unwrap();
    let all: Value = serde_json::from_slice(&output.stdout).unwrap();
    let workers = all["workers"].as_array().unwrap();
    let own = workers.iter().find(|one| one["host"] == name(worker));
    own.unwrap().clone()
}

/// From its start to its end, each step within the time that operators are promised.
#[rstest]
#[case::celery_5_3("4.1", "5.3.6")]
#[case::celery_5_7("4.3", "5.7.0")]
fn the_life_of_a_worker_is_followed(#[case] sdk: &str, #[case] celery: &str) {
    let deployment = Deployment::new();
    let service = start(&deployment, "15", &[]);
    let client = Client::new(&deployment);
    let mut worker = CeleryWorker::new(&deployment, sdk);
    comes_to_be(&deployment, &worker, "idle");
    let idle = view(&deployment, &worker);
    assert_eq!(idle["queues"], json!(["steerable"]));
    assert_eq!(idle["celery"], celery);
    assert_eq!(
        (&idle["pool"], &idle["pool_size"]),
        (&json!("prefork"), &json!(1))
    );

    let job = running_job(&deployment, &client, "go on");
    comes_to_be(&deployment, &worker, "busy");
    let busy = view(&deployment, &worker);
    assert_eq!(busy["tasks"][0]["job_id"], job.to_string());
    assert_eq!(busy["tasks"][0]["workflow"], "steerable");

    worker.signal("-STOP");
    comes_to_be(&deployment, &worker, "silent");
    worker.signal("-CONT");
    comes_to_be(&deployment, &worker, "busy");

    let (code, said) = command(&deployment, &["workers", "drain", &worker.host]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("takes nothing more; it finishes the task that it has"),
        "{said}"
    );
    comes_to_be(&deployment, &worker, "draining");
    File::create(deployment.folder.join("go on")).unwrap();
    comes_to_be(&deployment, &worker, "drained");
    let left = self::job(&client, "succeed");
    assert_eq!(client.status(left), JobStatus::Enqueued);
    let (code, said) = command(&deployment, &["workers", "resume", &name(&worker)]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("takes tasks from steerable"), "{said}");
    comes_to_be(&deployment, &worker, "idle");
    assert_eq!(client.status(left), JobStatus::Running);

    worker.kill();
    comes_to_be(&deployment, &worker, "gone");
    service.logged(&format!("worker {}: gone", name(&worker)));
}

/// Its child is replaced after each task, which is no restart of the worker; a new process of the same
/// name is.
#[test]
fn a_worker_is_the_same_with_another_child_and_not_with_another_process() {
    let deployment = Deployment::new();
    let service = start(&deployment, "5", &[]);
    let client = Client::new(&deployment);
    let variables = [
        ("MAX_TASKS_BEFORE_RESTART", "1"),
        ("WORKER_HOST", "a-container"),
    ];
    let mut worker = CeleryWorker::with(&deployment, "4.3", &variables);
    worker.host = "a-container".to_owned();
    for file in ["first", "second"] {
        let job = running_job(&deployment, &client, file);
        comes_to_be(&deployment, &worker, "busy");
        File::create(deployment.folder.join(file)).unwrap();
        assert_eq!(client.outcome(job).0, ResultType::Succeeded);
        comes_to_be(&deployment, &worker, "idle");
    }
    let before = view(&deployment, &worker);
    assert_eq!(
        (&before["ended"], &before["failed"]),
        (&json!(2), &json!(0))
    );
    assert!(
        !service.log().contains("started again"),
        "its child was replaced"
    );
    let (code, said) = command(&deployment, &["workers", "drain", "a-container"]);
    assert_eq!(code, Some(0), "{said}");
    comes_to_be(&deployment, &worker, "drained");
    worker.kill();
    let _again = CeleryWorker::with(&deployment, "4.3", &variables);
    comes_to_be(&deployment, &worker, "idle");
    service.logged("worker worker-steerable@a-container: started again");
    let after = view(&deployment, &worker);
    assert_eq!(after["first_seen"], before["first_seen"]);
    assert_ne!(after["began_at"], before["began_at"]);
}

/// Celery up to 5.3 forgets a queue that it was told to take tasks from when its connection is lost.
#[rstest]
#[case::celery_5_3("4.1")]
#[case::celery_5_7("4.3")]
fn who_was_drained_or_sent_back_stays_so_when_the_broker_restarts(#[case] sdk: &str) {
    let deployment = Deployment::with_own_servers();
    let _service = start(&deployment, "5", &[]);
    let [drained, resumed] = [(); 2].map(|()| CeleryWorker::new(&deployment, sdk));
    for worker in [&drained, &resumed] {
        comes_to_be(&deployment, worker, "idle");
        let (code, said) = command(&deployment, &["workers", "drain", &worker.host]);
        assert_eq!(code, Some(0), "{said}");
    }
    let (code, said) = command(&deployment, &["workers", "resume", &resumed.host]);
    assert_eq!(code, Some(0), "{said}");
    deployment.rabbitmqctl(&["stop_app"]);
    for worker in [&drained, &resumed] {
        // What was seen before does not count.
        let sql = "UPDATE worker SET state = 'gone' WHERE host = $1";
        deployment.sql().execute(sql, &[&name(worker)]).unwrap();
    }
    deployment.rabbitmqctl(&["start_app"]);
    comes_to_be(&deployment, &drained, "drained");
    comes_to_be(&deployment, &resumed, "idle");
    let queues = "SELECT count(*) FROM worker WHERE queues = '[\"steerable\"]'";
    assert_eq!(deployment.count(queues), 1);
}

#[test]
fn a_worker_that_is_not_known_is_told_with_those_that_are() {
    let deployment = Deployment::new();
    let _service = start(&deployment, "5", &[]);
    let (code, said) = command(&deployment, &["workers", "drain", "nobody"]);
    assert_eq!(code, Some(1));
    assert!(
        said.contains("no worker is called nobody; known are none"),
        "{said}"
    );
    let mut worker = CeleryWorker::new(&deployment, "4.3");
    comes_to_be(&deployment, &worker, "idle");
    let (code, said) = command(&deployment, &["workers", "resume", "nobody"]);
    assert_eq!(code, Some(1));
    assert!(said.contains(&name(&worker)), "{said}");
    worker.kill();
    comes_to_be(&deployment, &worker, "gone");
    let (code, said) = command(&deployment, &["workers", "drain", &worker.host]);
    assert_eq!(code, Some(1));
    assert!(said.contains("is gone"), "{said}");
}

/// A worker without a child of its own cannot answer while it computes.
#[test]
fn a_solo_worker_that_computes_is_busy_and_its_task_not_lost() {
    let deployment = Deployment::new();
    let often = [
        ("TASK_LOST_SEC", "60"),
        ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
    ];
    let service = start(&deployment, "5", &often);
    let client = Client::new(&deployment);
    let worker = CeleryWorker::with(&deployment, "4.3", &[("WORKER_POOL", "solo")]);
    comes_to_be(&deployment, &worker, "idle");
    let job = running_job(&deployment, &client, "go on");
    comes_to_be(&deployment, &worker, "busy_unanswering");
    let looks = "SELECT misses::bigint FROM worker";
    deployment.at_least(4, looks);
    assert_eq!(deployment.count("SELECT count(*) FROM absent_task"), 0);
    File::create(deployment.folder.join("go on")).unwrap();
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    comes_to_be(&deployment, &worker, "idle");
    assert!(!service.log().contains("does not answer, though"));
}

/// Makes it seem that the job's task was started, and has been absent, for longer than it has.
fn absent_for_long(deployment: &Deployment) {
    let aged = "WITH long AS (
                    UPDATE absent_task SET since = since - interval '100 seconds'
                    WHERE since > now() - interval '60 seconds' AND NOT may_wait RETURNING job_id
                ), started AS (
                    UPDATE job_starts SET started_at = started_at - interval '200 seconds'
                    FROM long WHERE long.job_id = job_starts.job_id
                )
                UPDATE job SET progress_at = progress_at - interval '200 seconds'
                FROM long WHERE long.job_id = job.job_id";
    let mut sql = deployment.sql();
    // A look at the same time may write what it has read before.
    eventually("a task that nobody has", || {
        sql.execute(aged, &[]).unwrap();
        let row = sql.query_one("SELECT count(*) FROM absent_task WHERE is_told", &[]);
        let ended = sql.query_one("SELECT count(*) FROM job_history", &[]);
        let count: i64 = row.unwrap().get::<_, i64>(0) + ended.unwrap().get::<_, i64>(0);
        (count > 0).then_some(())
    });
}

/// Tells all workers to end the job's task, as an operator might by Celery's own means.
fn revoke(deployment: &Deployment, job: Uuid) {
    let sql = "SELECT celery_id FROM job WHERE job_id = $1";
    let task: String = deployment.sql().query_one(sql, &[&job]).unwrap().get(0);
    let body = json!({
        "method": "revoke",
        "arguments": {"task_id": task, "terminate": true, "signal": "SIGTERM"},
    });
    let properties = AmqpProperties::default()
        .with_content_type("application/json".to_owned())
        .with_content_encoding("utf-8".to_owned());
    let body = body.to_string();
    let publish = Publish::with_properties(body.as_bytes(), "", properties);
    let peer = Peer::new(deployment, &deployment.celery_vhost());
    peer.channel
        .basic_publish("celery.pidbox", publish)
        .unwrap();
}

#[rstest]
#[case::that_somebody_has_revoked(true)]
#[case::that_was_purged_after_its_workers_death(false)]
fn a_job_whose_task_is_lost_ends_with_an_error(#[case] revoked: bool) {
    let deployment = Deployment::new();
    let often = [
        ("TASK_LOST_SEC", "60"),
        ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
        ("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "0"),
    ];
    let service = start(&deployment, "5", &often);
    let client = Client::new(&deployment);
    let mut worker = CeleryWorker::new(&deployment, "4.3");
    let job = running_job(&deployment, &client, "go on");
    comes_to_be(&deployment, &worker, "busy");
    if revoked {
        revoke(&deployment, job);
        comes_to_be(&deployment, &worker, "idle");
    } else {
        worker.kill();
        comes_to_be(&deployment, &worker, "gone");
        // RabbitMQ has it in its queue: it waits, and is not lost.
        deployment.comes_to(1, "SELECT count(*) FROM absent_task WHERE may_wait");
        let peer = Peer::new(&deployment, &deployment.celery_vhost());
        peer.poll("steerable").unwrap();
    }
    deployment.comes_to(1, "SELECT count(*) FROM absent_task WHERE NOT may_wait");
    absent_for_long(&deployment);
    let (result, logs) = client.outcome(job);
    assert_eq!(result, ResultType::Error);
    assert!(logs.contains("no worker has had its task since"), "{logs}");
    deployment.no_jobs_left();
    let lost = "SELECT count(*) FROM job_history WHERE outcome = 'LOST'";
    assert_eq!(deployment.count(lost), 1);
    service.logged("given up, for its task is lost");
    deployment.comes_to(0, "SELECT count(*) FROM absent_task");
}

#[test]
fn a_lost_task_is_told_where_it_does_not_end_its_job() {
    let deployment = Deployment::new();
    let service = start(&deployment, "5", &[("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1")]);
    let client = Client::new(&deployment);
    let worker = CeleryWorker::new(&deployment, "4.3");
    let job = running_job(&deployment, &client, "go on");
    comes_to_be(&deployment, &worker, "busy");
    revoke(&deployment, job);
    absent_for_long(&deployment);
    let line = format!("job {job}: no worker has its task");
    service.logged(&line);
    let get = |path| service.get(path).unwrap().1;
    let metrics = get("/metrics");
    for sample in [
        "lost_tasks{} 1.0",
        r#"workers{state="idle"} 1.0"#,
        "worker_tasks{} 0.0",
    ] {
        let sample = format!("\nomotes_orchestrator_{sample}\n");
        assert!(metrics.contains(&sample), "{sample} in {metrics}");
    }
    assert!(get("/").contains("No worker has had the task of job"));
    let api: Value = serde_json::from_str(&get("/api/workers")).unwrap();
    assert_eq!(api["lost_tasks"][0]["job_id"], job.to_string());
    let confirmed = "SELECT extract(epoch FROM confirmed_at)::bigint FROM absent_task";
    deployment.at_least(deployment.count(confirmed) + 10, confirmed);
    assert_eq!(service.log().matches(&line).count(), 1, "told once");
    client.cancel(job);
    assert_eq!(client.outcome(job).0, ResultType::Cancelled);
}

/// Hears what all workers are asked, and answers what it likes.
pub struct Impostor {
    pub peer: Peer,
    pidbox: String,
}

impl Impostor {
    pub fn new(deployment: &Deployment) -> Impostor {
        let peer = Peer::new(deployment, &deployment.celery_vhost());
        let options = ExchangeDeclareOptions::default();
        let exchanges = [
            (ExchangeType::Fanout, "celery.pidbox"),
            (ExchangeType::Direct, "reply.celery.pidbox"),
        ];
        for (kind, name) in exchanges {
            peer.channel
                .exchange_declare(kind, name, options.clone())
                .unwrap();
        }
        let pidbox = format!("impostor-{}", Uuid::new_v4());
        peer.declare(&pidbox);
        peer.channel
            .queue_bind(pidbox.as_str(), "celery.pidbox", "", FieldTable::new())
            .unwrap();
        Impostor { peer, pidbox }
    }

    /// The next question of this kind.
    pub fn asked(&self, method: &str) -> Value {
        eventually(&format!("the question for {method}"), || {
            let question = self.peer.poll(&self.pidbox)?.json();
            (question["method"] == method).then_some(question)
        })
    }

    pub fn answer(&self, question: &Value, body: &[u8], ticket: Option<&str>) {
        let key = question["reply_to"]["routing_key"].as_str().unwrap();
        let ticket = ticket.map(|ticket| {
            let ticket = AmqpValue::LongString(ticket.to_owned());
            FieldTable::from([("ticket".to_owned(), ticket)])
        });
        let properties = AmqpProperties::default().with_headers(ticket.unwrap_or_default());
        let publish = Publish::with_properties(body, key, properties);
        let exchange = "reply.celery.pidbox";
        self.peer.channel.basic_publish(exchange, publish).unwrap();
    }
}

#[test]
fn poisoned_answers_harm_nobody() {
    let deployment = Deployment::new();
    let service = start(&deployment, "5", &[]);
    let client = Client::new(&deployment);
    let impostor = Impostor::new(&deployment);
    let worker = CeleryWorker::new(&deployment, "4.3");
    let markup = "<script>document.title = 'hacked'</script>\n@host";
    for _ in 0..2 {
        let question = impostor.asked("active");
        let key = question["ticket"].as_str().unwrap().to_owned();
        let huge = vec![b'['; 8 * 1024 * 1024];
        let long = json!({ "x".repeat(1000): [] }).to_string();
        let others = json!({"with another's ticket": []}).to_string();
        for body in [
            &b"\xff"[..],
            b"",
            b"[]",
            b"null",
            b"{\"nul \\u0000\": []}",
            b"{\"a\": [], \"b\": []}",
            b"{\"wrong type\": 5}",
            long.as_bytes(),
            &huge,
            &huge[..100_000],
        ] {
            impostor.answer(&question, body, Some(&key));
        }
        impostor.answer(&question, others.as_bytes(), Some("another"));
        let tasks = json!({markup: [{"id": "<b>", "name": "<i>"}, {"id": 5}, 7]});
        impostor.answer(&question, tasks.to_string().as_bytes(), Some(&key));
    }
    comes_to_be(&deployment, &worker, "idle");
    let names = "SELECT count(*) FROM worker WHERE host NOT LIKE 'worker-steerable%'";
    assert_eq!(deployment.count(names), 1);
    let page = service.get("/").unwrap().1;
    assert!(
        page.contains("&lt;script&gt;document.title = 'hacked'&lt;/script&gt;\\n@host"),
        "{page}"
    );
    assert!(!page.contains("<script>document"));
    let (_, said) = command(&deployment, &["workers"]);
    assert!(said.contains("hacked'</script>\\n@host"), "{said}");
    assert_eq!(
        client.outcome(job(&client, "succeed")).0,
        ResultType::Succeeded
    );
    let log = service.log();
    assert!(!log.contains("cannot be looked at"), "{log}");
    // Nobody answers for it any more, and RabbitMQ does not know it.
    let gone = "SELECT count(*) FROM worker WHERE state = 'gone'";
    deployment.comes_to(1, gone);
}

#[test]
fn of_two_replicas_one_asks_in_each_period_and_the_other_when_it_is_gone() {
    let deployment = Deployment::new();
    let impostor = Impostor::new(&deployment);
    let first = start(&deployment, "5", &[]);
    let _second = start(&deployment, "5", &[]);
    // When it was sent, by its sender's clock.
    let sent = || {
        eventually("the question for stats", || {
            let question = impostor.peer.poll(&impostor.pidbox)?;
            let is_it = question.json()["method"] == "stats";
            is_it.then(|| match question.header("expires") {
                AmqpValue::LongInt(expires) => i64::from(expires),
                AmqpValue::LongLongInt(expires) => expires,
                other => panic!("{other:?}"),
            })
        })
    };
    let begun = sent();
    let [.., ended] = [(); 4].map(|()| sent());
    // Each on its own they would take ten seconds for as many; on a busy machine each question takes its
    // time.
    assert!(ended - begun > 12, "{} s", ended - begun);
    first.kill();
    impostor.asked("stats");
    let since = Instant::now();
    impostor.asked("stats");
    assert!(since.elapsed() < SEEN_WITHIN);
}
