//! The main way: submitted, run, delivered.

use omotes_orchestrator::wire::{
    AvailableWorkflows, JobSubmission, RequestAvailableWorkflows, job_result::ResultType,
    job_status_update::JobStatus, job_submission::JobPriority,
};
use prost::Message;
use serde_json::{Value, json};

use crate::harness::deployment::{Deployment, eventually};
use crate::harness::peers::{Client, ESDL, Peer, Worker};
use amiquip::{AmqpValue, FieldTable, QueueDeclareOptions};

const OUTPUT: &str =
    "<esdl:EnergySystem xmlns:esdl='x' id='out-1'><a id='other'/></esdl:EnergySystem>";

#[test]
fn a_job_succeeds() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start();

    let job = client.submit("workflow_1");
    let task = worker.take();
    assert_eq!(task.job, job);
    assert_eq!(client.status(job), JobStatus::Enqueued);
    let sql = "SELECT count(*) FROM job WHERE status = 'SUBMITTED' AND celery_id IS NOT NULL
               AND job_reference = 'a reference'";
    deployment.comes_to(1, sql);

    worker.start(&task);
    assert_eq!(client.status(job), JobStatus::Running);
    let sql = "SELECT count(*) FROM job JOIN job_starts USING (job_id)
               WHERE status = 'RUNNING' AND running_at = started_at";
    deployment.comes_to(1, sql);

    worker.progress(&task, 0.25);
    worker.progress(&task, 1.0);
    assert_eq!(client.progress(job), (0.25, "a message".to_owned()));
    assert_eq!(client.progress(job), (1.0, "a message".to_owned()));

    worker.succeed(&task, OUTPUT);
    let result = client.result(job);
    assert_eq!(result.result_type(), ResultType::Succeeded);
    assert_eq!(result.output_esdl.as_deref(), Some(OUTPUT));
    assert_eq!(result.logs, "the worker's logs");
    assert_eq!(result.esdl_messages[0].technical_message, "a remark");
    deployment.no_jobs_left();
    client.heard_nothing_more(&worker, job);

    let sql = "SELECT count(*) FROM job_history
               WHERE outcome = 'SUCCEEDED' AND starts = 1 AND registered_at <= submitted_at
               AND submitted_at <= running_at AND running_at <= finished_at
               AND workflow_type = 'workflow_1' AND celery_id IS NOT NULL AND result_bytes > 50";
    assert_eq!(deployment.count(sql), 1);
    let sql = "SELECT count(*) FROM esdl_time_series_info
               WHERE esdl_id = 'out-1' AND deactivated_at IS NULL AND job_reference = 'a reference'";
    assert_eq!(deployment.count(sql), 1);
}

#[test]
fn a_jobs_own_failure_reaches_its_client() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start();

    let job = client.submit("workflow_1");
    let task = worker.take();
    worker.start(&task);
    worker.fail(&task);
    let result = client.result(job);
    assert_eq!(result.result_type(), ResultType::Error);
    assert_eq!(result.output_esdl.as_deref(), Some(""));
    assert_eq!(result.logs, "the worker's logs");
    let sql = "SELECT count(*) FROM job_history WHERE outcome = 'FAILED'";
    deployment.comes_to(1, sql);
    assert_eq!(
        deployment.count("SELECT count(*) FROM esdl_time_series_info"),
        0
    );
}

#[test]
fn an_unknown_workflow_is_an_error_result() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let _service = deployment.start();

    let job = client.submit("no_such_workflow");
    let logs = "Workflow type no_such_workflow is unknown by orchestrator at the time this \
                submission was received.";
    assert_eq!(client.outcome(job), (ResultType::Error, logs.to_owned()));
    let worker = Worker::new(&deployment, "workflow_1");
    client.heard_nothing_more(&worker, job);
}

#[test]
fn a_task_is_what_celery_would_have_sent() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start();
    let captures: Value = serde_json::from_str(include_str!("../wire/captures.json")).unwrap();
    let recorded = &captures["minimal"]["task"][0];

    let (job, submission) = client.submission("workflow_1");
    let submission = JobSubmission {
        job_reference: None,
        ..submission
    };
    client.listen(job);
    client.send(&submission);
    let task = worker.take_message();

    let id = task.properties.correlation_id().clone().unwrap();
    let text = |value: &str| Some(value.to_owned());
    assert_eq!(task.properties.content_type(), &text("application/json"));
    assert_eq!(task.properties.content_encoding(), &text("utf-8"));
    assert_eq!(task.properties.delivery_mode(), &Some(2));
    assert_eq!(task.properties.priority(), &Some(4));
    assert_eq!(task.properties.message_id(), &None);
    assert!(task.properties.reply_to().is_some());

    let headers = recorded["headers"].as_object().unwrap();
    assert_eq!(
        task.properties
            .headers()
            .as_ref()
            .unwrap()
            .keys()
            .collect::<Vec<_>>(),
        headers.keys().collect::<Vec<_>>()
    );
    for (name, value) in headers {
        let expected = match (name.as_str(), value) {
            ("id" | "root_id", _) => AmqpValue::LongString(id.clone()),
            ("argsrepr" | "origin", _) => continue,
            (_, Value::Null) => AmqpValue::Void,
            (_, Value::Bool(value)) => AmqpValue::Boolean(*value),
            (_, Value::Number(number)) => {
                AmqpValue::LongInt(number.as_i64().unwrap().try_into().unwrap())
            }
            (_, Value::String(text)) => AmqpValue::LongString(text.clone()),
            (_, Value::Array(items)) => {
                AmqpValue::FieldArray(items.iter().map(|_| AmqpValue::Void).collect())
            }
            (_, Value::Object(_)) => AmqpValue::FieldTable(FieldTable::new()),
        };
        assert_eq!(task.header(name), expected, "{name}");
    }
    let embed = json!({"callbacks": null, "errbacks": null, "chain": null, "chord": null});
    let own_id = json!({"__type__": "uuid", "__value__": {"hex": job.simple().to_string()}});
    assert_eq!(task.json(), json!([[own_id, null, ESDL, {}], {}, embed]));
}

#[test]
fn the_queue_is_ordered_by_priority() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start();

    let mut jobs = Vec::new();
    for priority in [
        Some(JobPriority::Low),
        None,
        Some(JobPriority::High),
        Some(JobPriority::Medium),
    ] {
        let (job, submission) = client.submission("workflow_1");
        client.send(&JobSubmission {
            job_priority: priority.map(i32::from),
            ..submission
        });
        jobs.push(job);
        let count = u32::try_from(jobs.len()).unwrap();
        eventually("the task", || (worker.waiting() == count).then_some(()));
    }
    let order: Vec<_> = (0..4).map(|_| worker.take().job).collect();
    assert_eq!(order, [jobs[2], jobs[1], jobs[3], jobs[0]]);
}

#[test]
fn clients_are_told_the_workflows_at_the_start_and_on_request() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let channel = &client.peer.channel;
    client.peer.declare("available_workflows.test");
    channel
        .queue_bind(
            "available_workflows.test",
            "omotes_exchange",
            "available_workflows",
            FieldTable::new(),
        )
        .unwrap();
    let announced = || {
        let body = client.peer.next("available_workflows.test").body;
        AvailableWorkflows::decode(body.as_slice())
            .unwrap()
            .workflows
            .len()
    };
    let _service = deployment.start();
    assert_eq!(announced(), 15);
    // A second replica tells them at its start, and from then on either may answer.
    let _replica = deployment.start();
    assert_eq!(announced(), 15);

    let request = RequestAvailableWorkflows {}.encode_to_vec();
    let exchange = channel
        .exchange_declare(
            amiquip::ExchangeType::Direct,
            "omotes_exchange",
            amiquip::ExchangeDeclareOptions::default(),
        )
        .unwrap();
    exchange
        .publish(amiquip::Publish::new(
            &request,
            "request_available_workflows",
        ))
        .unwrap();
    // Both have a private queue, so both answer.
    assert_eq!((announced(), announced()), (15, 15));
}

#[test]
fn a_result_goes_by_the_jobs_row_not_by_the_definitions() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let job = client.submit("workflow_1");
    let task = worker.take();
    assert_eq!(client.status(job), JobStatus::Enqueued);
    assert!(service.stop().success());

    let file = deployment.folder.join("workflows.json");
    std::fs::write(&file, "[]").unwrap();
    let _service = deployment.start_with(&[("WORKFLOW_CONFIG_PATH", file.to_str().unwrap())]);
    worker.start(&task);
    assert_eq!(client.status(job), JobStatus::Running);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
}

#[test]
fn what_is_published_is_persistent_and_known_by_an_id() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let _service = deployment.start();
    let job = client.submit("no_such_workflow");
    let result = client.peer.next(&format!("jobs.{job}.result"));
    assert_eq!(result.properties.delivery_mode(), &Some(2));
    assert_eq!(result.properties.priority(), &Some(0));
    assert_eq!(result.properties.content_type(), &None);
    assert_eq!(result.properties.headers(), &Some(FieldTable::new()));
    assert_eq!(result.properties.message_id().as_ref().unwrap().len(), 32);
}

#[test]
fn what_clients_declare_is_left_to_them() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let client = Client::new(&deployment);
    // The service must not have made a queue for this job: it would have other arguments.
    let (job, submission) = client.submission("workflow_1");
    client.send(&submission);
    let worker = Worker::new(&deployment, "workflow_1");
    let task = worker.take();
    worker.succeed(&task, OUTPUT);
    let sql = "SELECT count(*) FROM job_history";
    deployment.comes_to(1, sql);
    // Its client has been told by then, if there is one.
    deployment.no_jobs_left();
    let expiring = QueueDeclareOptions {
        durable: true,
        arguments: FieldTable::from([("x-expires".to_owned(), AmqpValue::LongInt(60_000))]),
        ..QueueDeclareOptions::default()
    };
    for kind in ["status", "progress", "result"] {
        let queue = format!("jobs.{job}.{kind}");
        let sdk = Peer::new(&deployment, &deployment.sdk_vhost());
        sdk.channel.queue_declare(queue, expiring.clone()).unwrap();
    }
}
