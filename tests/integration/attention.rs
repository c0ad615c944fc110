//! What somebody has to look at though nothing has failed: workers that go on with what has ended, or that do
//! not answer, tasks that are in no queue, and queues that nobody takes.

use std::fs::{self, File};

use omotes_orchestrator::wire::{job_result::ResultType, job_status_update::JobStatus};
use rstest::rstest;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::deployment::{Deployment, Service, eventually};
use crate::harness::peers::{Client, Worker, running_job};
use crate::python::{CeleryWorker, PYTHON};
use crate::workers::{self, Impostor, comes_to_be, command, start};

fn json(service: &Service, path: &str) -> Value {
    serde_json::from_str(&service.get(path).unwrap().1).unwrap()
}

/// Waits until the page says this.
fn page_says(service: &Service, text: &str) -> String {
    eventually(&format!("the page says {text}"), || {
        let (_, page) = service.get("/")?;
        page.contains(text).then_some(page)
    })
}

/// Waits until a job's sentence begins with this.
fn says(service: &Service, job: Uuid, sentence: &str) -> Value {
    eventually(&format!("{job}: {sentence}"), || {
        let job = json(service, &format!("/api/jobs/{job}"));
        let said = job["why"]["sentence"].as_str()?.starts_with(sentence);
        said.then_some(job)
    })
}

/// Makes it seem that all jobs that have ended did so a while ago.
fn ended_long_ago(deployment: &Deployment) {
    let sql = "UPDATE job_history SET finished_at = finished_at - interval '100 seconds'";
    deployment.sql().execute(sql, &[]).unwrap();
}

/// Answers the next look for a worker that computes two tasks: one of a job, and one of another
/// orchestrator's.
fn answers(impostor: &Impostor, task: &str, job: Uuid) {
    let question = impostor.asked("active");
    let key = question["ticket"].as_str().unwrap().to_owned();
    let computes = |id: &str, job: Uuid| {
        let arguments = format!("(UUID('{job}'), ..., <ESDL of 9 bytes>, ...)");
        json!({"id": id, "name": "workflow_1", "args": arguments})
    };
    let said = json!({"w@h": [computes(task, job), computes("foreign", Uuid::from_u128(7))]});
    impostor.answer(&question, said.to_string().as_bytes(), Some(&key));
}

/// Also one that was never seen to run, as where a worker has been given a task twice.
#[rstest]
#[case::that_ran(true)]
#[case::that_was_never_seen_to_run(false)]
fn who_goes_on_with_a_cancelled_job_is_told_and_told_to_stop(#[case] ran: bool) {
    let deployment = Deployment::new();
    let service = deployment.start_with(&[("WORKERS_PERIOD_SEC", "5")]);
    let client = Client::new(&deployment);
    let impostor = Impostor::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let task = running_job(&client, &worker, None);
    let sql = "UPDATE job SET job_reference = 'the first try'";
    deployment.sql().execute(sql, &[]).unwrap();
    if ran {
        answers(&impostor, &task.id, task.job);
        deployment.comes_to(2, "SELECT count(*) FROM worker_task WHERE is_current");
    }
    client.cancel(task.job);
    assert_eq!(client.outcome(task.job).0, ResultType::Cancelled);
    ended_long_ago(&deployment);
    let page = eventually("the page tells of it", || {
        answers(&impostor, &task.id, task.job);
        let (_, page) = service.get("/")?;
        page.contains("It has been told to stop").then_some(page)
    });
    assert!(page.contains(", which was cancelled"), "{page}");
    let revoke = impostor.asked("revoke");
    assert_eq!(revoke["arguments"]["task_id"], json!([task.id]));
    assert_eq!(revoke["arguments"]["terminate"], true);
    assert_eq!(revoke["destination"], json!(["w@h"]));
    let line = service.logged("told once more to stop task");
    assert!(line.contains("job the first try ("), "{line}");
    // It is still busy, by the last look.
    answers(&impostor, &task.id, task.job);
    let (_, said) = command(&deployment, &["workers"]);
    let told = format!(
        "job the first try ({}), which was cancelled",
        &task.job.to_string()[..8]
    );
    assert!(said.contains(&told), "{said}");
    assert!(said.contains("the first try for "), "{said}");
    let metrics = service.get("/metrics").unwrap().1;
    assert!(
        metrics.contains("omotes_orchestrator_tasks_in_vain{} 1.0"),
        "{metrics}"
    );
}

/// It was without a connection when it was told to stop.
#[rstest]
#[case::celery_5_3("4.1")]
#[case::celery_5_7("4.3")]
fn a_worker_that_has_missed_the_cancel_of_its_job_stops_by_the_next_look(#[case] sdk: &str) {
    let deployment = Deployment::new();
    let service = start(&deployment, "5", &[]);
    let client = Client::new(&deployment);
    let worker = CeleryWorker::new(&deployment, sdk);
    workers::running_job(&deployment, &client, "go on");
    comes_to_be(&deployment, &worker, "busy");
    // Of its cancel only the worker has not heard.
    deployment
        .sql()
        .batch_execute(
            "INSERT INTO job_history (job_id, job_reference, workflow_type, celery_id, registered_at,
                                      submitted_at, running_at, finished_at, starts, outcome,
                                      result_bytes)
                 SELECT job_id, job_reference, workflow_type, celery_id, registered_at, submitted_at,
                        running_at, now() - interval '100 seconds', 1, 'CANCELLED', 0
                 FROM job;
             DELETE FROM job_starts;
             DELETE FROM job",
        )
        .unwrap();
    service.logged("told once more to stop task");
    comes_to_be(&deployment, &worker, "idle");
}

#[test]
fn the_job_of_a_silent_worker_is_told_with_what_to_do() {
    let deployment = Deployment::new();
    let service = start(&deployment, "5", &[]);
    let client = Client::new(&deployment);
    let worker = CeleryWorker::new(&deployment, "4.3");
    let job = workers::running_job(&deployment, &client, "go on");
    comes_to_be(&deployment, &worker, "busy");
    worker.signal("-STOP");
    let on = format!("Runs on {} for ", workers::name(&worker));
    let told = eventually("its sentence", || {
        let job = says(&service, job, &on);
        let sentence = job["why"]["sentence"].as_str()?;
        let is_told = sentence.contains("; its worker has not answered since ");
        is_told.then(|| job.clone())
    });
    assert_eq!(told["concern"], "worker_silent");
    assert_eq!(told["estimate"], Value::Null);
    let page = page_says(&service, "worker silent");
    assert!(
        page.contains("Restart it: its task goes to another"),
        "{page}"
    );
    assert!(
        page.contains(&format!("It computes <a href=\"/jobs/{job}\"")),
        "{page}"
    );
    worker.signal("-CONT");
    comes_to_be(&deployment, &worker, "busy");
    File::create(deployment.folder.join("go on")).unwrap();
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
}

/// Makes it seem that a task was put on its queue, and has been absent, for longer than it has.
fn absent_for_long(deployment: &Deployment) {
    let aged = "WITH long AS (
                    UPDATE absent_task SET since = since - interval '100 seconds'
                    WHERE since > now() - interval '60 seconds' RETURNING job_id
                ), steps AS (
                    UPDATE job_step SET submitted_at = submitted_at - interval '300 seconds'
                    FROM long WHERE long.job_id = job_step.job_id
                )
                UPDATE job SET submitted_at = submitted_at - interval '300 seconds',
                               registered_at = registered_at - interval '300 seconds'
                FROM long WHERE long.job_id = job.job_id";
    let mut sql = deployment.sql();
    // A look at the same time may write what it has read before.
    eventually("a task that is nowhere", || {
        sql.execute(aged, &[]).unwrap();
        let told = "SELECT count(*) FROM absent_task WHERE is_told";
        let count = deployment.count(told) + deployment.count("SELECT count(*) FROM job_history");
        (count > 0).then_some(())
    });
}

#[derive(Clone, Copy, PartialEq)]
enum Lost {
    /// A plain job's task.
    Plain,
    /// One that was handed over by an earlier version, which has not kept on which queue.
    Earlier,
    /// One that had its turn.
    WithTurn,
}

#[rstest]
#[case::and_told(Lost::Plain, false)]
#[case::and_ends_its_job(Lost::Plain, true)]
#[case::and_told_of_an_earlier_version(Lost::Earlier, true)]
#[case::and_ends_its_job_after_its_turn(Lost::WithTurn, true)]
fn a_task_that_is_in_no_queue_before_a_worker_has_begun_it_is_noticed(
    #[case] kind: Lost,
    #[case] may_end: bool,
) {
    let deployment = Deployment::new();
    let often = [
        ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
        ("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "0"),
    ];
    let lost = [("TASK_LOST_SEC", "60")];
    let variables = [&often[..], if may_end { &lost } else { &[] }].concat();
    let service = start(&deployment, "5", &variables);
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "steerable");
    if kind == Lost::WithTurn {
        let limit = ["workflows", "limit", "steerable", "--max-running", "5"];
        let file = format!("{PYTHON}/workflows.json");
        let mut limit = deployment.command(&limit);
        let done = limit.env("WORKFLOW_CONFIG_PATH", file).output().unwrap();
        assert!(done.status.success(), "{done:?}");
    }
    let job = client.submit("steerable");
    assert_eq!(client.status(job), JobStatus::Enqueued);
    if kind == Lost::Earlier {
        let forget = "UPDATE job SET task_queue = NULL";
        deployment.sql().execute(forget, &[]).unwrap();
    }
    // As an operator's purge does.
    worker.take_message();
    let is_doubtful = kind == Lost::Earlier;
    let found = format!("SELECT count(*) FROM absent_task WHERE may_wait = {is_doubtful}");
    deployment.comes_to(1, &found);
    absent_for_long(&deployment);
    if may_end && !is_doubtful {
        let (result, logs) = client.outcome(job);
        assert_eq!(result, ResultType::Error);
        assert!(logs.contains("lost before a worker began it"), "{logs}");
        deployment.no_jobs_left();
        service.logged("given up, for its task is lost");
        return;
    }
    let told = says(
        &service,
        job,
        "Its task is lost: it is in no queue, and no worker says",
    );
    assert_eq!(told["concern"], "task_lost");
    page_says(
        &service,
        ", and it is in no queue, though none has begun it",
    );
    service.logged(&format!("job {job}: no worker has its task"));
    let (_, said) = command(&deployment, &["workers"]);
    assert!(
        said.contains("which none has ever begun, and it is in no queue"),
        "{said}"
    );
    let metrics = service.get("/metrics").unwrap().1;
    assert!(
        metrics.contains("omotes_orchestrator_lost_tasks{} 1.0"),
        "{metrics}"
    );
}

/// The definitions may say something else by the time that somebody looks for a task.
#[test]
fn a_task_is_where_it_was_put_whatever_the_definitions_say_by_now() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let [before, _after] = ["steerable", "other"].map(|task| Worker::new(&deployment, task));
    let file = deployment.folder.join("definitions.json");
    let variables = [
        ("WORKFLOW_CONFIG_PATH", file.to_str().unwrap()),
        ("WORKERS_PERIOD_SEC", "5"),
    ];
    let defined = |task: &str| {
        let workflow = json!([{
            "workflow_type_name": "design", "workflow_type_description_name": "",
            "steps": [{"task": task}],
        }]);
        fs::write(&file, workflow.to_string()).unwrap();
        deployment.start_with(&variables)
    };
    let service = defined("steerable");
    let job = client.submit("design");
    assert_eq!(client.status(job), JobStatus::Enqueued);
    service.stop();
    let service = defined("other");
    // The queue of which the definitions say that it is there is empty.
    let looks = "SELECT coalesce(max(extract(epoch FROM looked_at)), 0)::bigint FROM worker_look";
    let first = eventually("a look", || {
        Some(deployment.count(looks)).filter(|at| *at > 0)
    });
    eventually("three looks", || {
        (deployment.count(looks) > first + 10).then_some(())
    });
    assert_eq!(deployment.count("SELECT count(*) FROM absent_task"), 0);
    let told = says(&service, job, "Waits: ");
    let evidence = told["why"]["evidence"].to_string();
    assert!(evidence.contains("in the queue steerable since "), "{told}");
    let begin = "Submitted to `design`, and handed over to `steerable` at once";
    assert_eq!(told["events"][0]["what"], begin);
    assert_eq!(told["queue"], "steerable");
    // Nor is anything else made of it when it has ended.
    before.succeed(&before.take(), "<output>");
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    deployment.no_jobs_left();
    let told = json(&service, &format!("/api/jobs/{job}"));
    assert_eq!(told["events"][0]["what"], begin);
    let (_, shown) = command(&deployment, &["jobs", "show", &job.to_string()]);
    assert!(shown.contains(begin), "{shown}");
}

/// Each look goes through the oldest thousand of a queue: of the others it is told how many they are.
#[test]
fn more_lost_tasks_than_are_looked_at_are_counted() {
    let deployment = Deployment::new();
    let service = start(&deployment, "5", &[]);
    let _client = Client::new(&deployment);
    let _worker = Worker::new(&deployment, "steerable");
    let planted = "INSERT INTO job (job_id, celery_id, workflow_type, status, registered_at, submitted_at,
                                    job_reference)
                   SELECT gen_random_uuid(), gen_random_uuid()::text, 'steerable', 'SUBMITTED', at, at, ''
                   FROM (SELECT now() - interval '5 min' AS at FROM generate_series(1, 1003)) AS since";
    deployment.sql().execute(planted, &[]).unwrap();
    deployment.comes_to(1000, "SELECT count(*) FROM absent_task");
    absent_for_long(&deployment);
    let metrics = eventually("all are counted", || {
        let metrics = service.get("/metrics")?.1;
        let all = metrics.contains("omotes_orchestrator_lost_tasks{} 1003.0");
        all.then_some(metrics)
    });
    assert!(metrics.contains("omotes_orchestrator_lost_tasks"));
    page_says(&service, "983 more tasks are lost: no worker has them");
    let (_, said) = command(&deployment, &["workers"]);
    let more = "3 more tasks are lost: no worker has them, and they are in no queue";
    assert!(said.contains(more), "{said}");
    let workers = json(&service, "/api/workers");
    assert_eq!(workers["lost_tasks"].as_array().unwrap().len(), 1000);
    assert_eq!(workers["more_lost_tasks"], 3);
    service.logged("3 more jobs have tasks that no worker has");
}

#[test]
fn a_queue_that_nobody_takes_is_told_since_its_last_worker_has_gone() {
    let deployment = Deployment::new();
    let service = start(&deployment, "5", &[]);
    let client = Client::new(&deployment);
    let mut worker = CeleryWorker::new(&deployment, "4.3");
    comes_to_be(&deployment, &worker, "idle");
    worker.kill();
    comes_to_be(&deployment, &worker, "gone");
    let job = client.submit("steerable");
    assert_eq!(client.status(job), JobStatus::Enqueued);
    service.stop();
    let mut sql = deployment.sql();
    let ago = "interval '3 hours 10 minutes'";
    sql.batch_execute(&format!(
        "UPDATE worker SET last_seen = last_seen - {ago}, state_since = state_since - {ago},
                           first_seen = first_seen - {ago} - {ago};
         UPDATE job SET submitted_at = submitted_at - {ago}, registered_at = registered_at - {ago}"
    ))
    .unwrap();
    let service = start(&deployment, "5", &[]);
    let page = page_says(&service, "has no worker, and 1 job waits");
    assert!(page.contains(">3 h 10 min</time>"), "{page}");
    let since = &json(&service, "/api/overview")["queues"]["without_worker"]["steerable"];
    let since: jiff::Timestamp = since.as_str().unwrap().parse().unwrap();
    let waits_since = "SELECT submitted_at FROM job";
    let waits_since: jiff::Timestamp = sql.query_one(waits_since, &[]).unwrap().get(0);
    assert_eq!(since, waits_since);
}

#[test]
fn a_waiting_job_tells_that_rabbitmq_does_not_answer() {
    let deployment = Deployment::with_own_servers();
    let service = deployment.start();
    let client = Client::new(&deployment);
    let _worker = Worker::new(&deployment, "workflow_1");
    let job = client.submit("workflow_1");
    assert_eq!(client.status(job), JobStatus::Enqueued);
    deployment.rabbitmqctl(&["stop_app"]);
    says(&service, job, "Waits: RabbitMQ does not answer (since ");
    let (_, said) = command(&deployment, &["jobs", "list"]);
    assert!(said.contains("Waits: RabbitMQ does not answer."), "{said}");
    deployment.rabbitmqctl(&["start_app"]);
    says(&service, job, "Waits: no worker takes `workflow_1`");
}

#[test]
fn whoever_holds_a_lock_that_messages_wait_for_is_named() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let task = running_job(&client, &worker, None);
    let mut sql = deployment.sql();
    let pid: i32 = sql
        .query_one("SELECT pg_backend_pid()", &[])
        .unwrap()
        .get(0);
    let mut transaction = sql.transaction().unwrap();
    transaction
        .execute("SELECT FROM job FOR UPDATE", &[])
        .unwrap();
    worker.progress(&task, 0.5);
    let ready = eventually("it is named", || {
        let (_, ready) = service.readiness()?;
        let why = ready["parts"]["handling"]["why"].as_str()?;
        let is_named =
            why.contains("a lock is held by ") && why.contains(&format!("(process {pid}"));
        is_named.then_some(ready)
    });
    let trouble = &ready["trouble"];
    assert_eq!(trouble["cause"], "handling", "{trouble}");
    assert_eq!(
        trouble["what"],
        "Messages wait for a lock that somebody holds in Postgres"
    );
    transaction.rollback().unwrap();
    service.wait_until_ready();
    assert_eq!(client.progress(task.job).0, 0.5);
}
