//! Requests for the workflows that are sent to the queue of this name, through the default
//! exchange, as the TypeScript SDK does.

use amiquip::{AmqpValue, FieldTable, QueueDeclareOptions};
use omotes_orchestrator::wire::{
    AVAILABLE_WORKFLOWS_KEY, AvailableWorkflows, OMOTES_EXCHANGE, WORKFLOW_REQUESTS_KEY,
    job_result::ResultType,
};
use prost::Message;
use serde_json::json;

use crate::crashes::Held;
use crate::harness::deployment::{Deployment, Service, management, setting};
use crate::harness::peers::{Client, Peer, Worker};

const HEARD: &str = "a client's workflows";
const TAKEN: &str = "requests that are sent to request_available_workflows are answered here";

/// A client that hears of the workflows.
fn listening(deployment: &Deployment) -> Client {
    let client = Client::new(deployment);
    client.peer.declare(HEARD);
    let key = AVAILABLE_WORKFLOWS_KEY;
    let channel = &client.peer.channel;
    channel
        .queue_bind(HEARD, OMOTES_EXCHANGE, key, FieldTable::new())
        .unwrap();
    client
}

fn hears_workflows(client: &Client) {
    let taken = client.peer.next(HEARD);
    let message = AvailableWorkflows::decode(taken.body.as_slice()).unwrap();
    assert!(!message.workflows.is_empty());
}

fn ask(client: &Client) {
    client.peer.send(WORKFLOW_REQUESTS_KEY, b"");
}

fn assert_one_session(service: &Service) {
    let log = service.log();
    assert!(!log.contains("the session with RabbitMQ has ended"));
}

/// The handler that tells them has as much to do as it has room for.
#[test]
fn new_workflows_are_told_when_the_handler_has_room_again() {
    let deployment = Deployment::new();
    assert!(deployment.start().stop().success());
    let overdue = "INSERT INTO job (job_id, celery_id, workflow_type, status, registered_at,
                                    running_at, timeout_after_ms, job_reference)
                   SELECT gen_random_uuid(), 'task', 'workflow_1', 'RUNNING', now(),
                          now() - interval '1 hour', 1000, ''
                   FROM generate_series(1, 2500)";
    deployment.sql().batch_execute(overdue).unwrap();
    let variables = [
        ("HANDLER_THREADS", "1"),
        ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
        ("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "0"),
    ];
    let held = Held::at("before publish", &deployment, &variables);
    held.reached();
    let client = listening(&deployment);
    // By then it has been given as much as it takes.
    deployment.looked_for_what_is_due();
    held.service.signal("-HUP");
    held.service.logged("told of the new workflows");
    let _service = held.go_on();
    hears_workflows(&client);
}

#[test]
fn a_request_that_is_sent_to_the_queue_is_answered() {
    let deployment = Deployment::new();
    let client = listening(&deployment);
    let service = deployment.start();
    // At the start, once.
    hears_workflows(&client);
    service.logged(TAKEN);
    assert_eq!(client.peer.queue_length(HEARD), 0);
    for _ in 0..2 {
        ask(&client);
        hears_workflows(&client);
    }
    assert_eq!(client.peer.queue_length(HEARD), 0);
    assert!(service.stop().success());
}

#[test]
fn another_replica_answers_when_the_one_that_did_is_killed() {
    let deployment = Deployment::new();
    let client = listening(&deployment);
    let first = deployment.start();
    first.logged(TAKEN);
    let second = deployment.start();
    second.logged("request_available_workflows: not ours for now");
    ask(&client);
    for _ in 0..3 {
        hears_workflows(&client);
    }
    first.kill();
    // Whoever has asked meanwhile, in vain, hears it with all others.
    hears_workflows(&client);
    second.logged(TAKEN);
    ask(&client);
    hears_workflows(&client);
    assert_one_session(&second);
    let log = second.log();
    assert_eq!(log.matches("not ours for now").count(), 1);
}

#[test]
fn the_queue_of_a_python_service_is_taken_over_when_that_goes() {
    let deployment = Deployment::new();
    let client = listening(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let python = Peer::new(&deployment, &deployment.sdk_vhost());
    let alone = QueueDeclareOptions {
        exclusive: true,
        ..QueueDeclareOptions::default()
    };
    python
        .channel
        .queue_declare(WORKFLOW_REQUESTS_KEY, alone)
        .unwrap();
    let service = deployment.start();
    hears_workflows(&client);
    service.logged("request_available_workflows: not ours for now");
    ask(&client);
    assert_eq!(python.next(WORKFLOW_REQUESTS_KEY).body, b"");
    let job = client.submit("workflow_1");
    worker.succeed(&worker.take(), "<e/>");
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);

    drop(python);
    hears_workflows(&client);
    service.logged(TAKEN);
    ask(&client);
    hears_workflows(&client);
    assert_eq!(service.log().matches("not ours for now").count(), 1);
    assert_one_session(&service);
}

#[test]
fn a_queue_that_somebody_left_is_used_as_it_is() {
    let deployment = Deployment::new();
    let client = listening(&deployment);
    let options = QueueDeclareOptions {
        durable: true,
        arguments: FieldTable::from([("x-max-length".to_owned(), AmqpValue::LongInt(1000))]),
        ..QueueDeclareOptions::default()
    };
    let channel = &client.peer.channel;
    channel
        .queue_declare(WORKFLOW_REQUESTS_KEY, options)
        .unwrap();
    ask(&client);
    let service = deployment.start();
    // At the start and as the answer.
    hears_workflows(&client);
    hears_workflows(&client);
    service.logged(TAKEN);
    assert_one_session(&service);
}

#[test]
fn without_rights_on_the_queue_the_rest_works() {
    let deployment = Deployment::new();
    let client = listening(&deployment);
    let vhost = deployment.sdk_vhost();
    let user = json!({"password": setting("RABBITMQ_PASSWORD"), "tags": ""});
    management("PUT", &format!("users/{vhost}"), Some(user));
    let rights = "^(amq\\.gen.*|omotes_.*|job_.*)$";
    let rights = json!({"configure": rights, "write": ".*", "read": ".*"});
    management("PUT", &format!("permissions/{vhost}/{vhost}"), Some(rights));
    let service = deployment.start_with(&[("SDK_RABBITMQ_USERNAME", &vhost)]);
    hears_workflows(&client);
    let line = service.logged("request_available_workflows: not ours for now");
    assert!(line.contains("ACCESS_REFUSED"), "{line}");
    // Through the exchange, as the Python SDK does.
    let publish = amiquip::Publish::new(b"", WORKFLOW_REQUESTS_KEY);
    let channel = &client.peer.channel;
    channel.basic_publish(OMOTES_EXCHANGE, publish).unwrap();
    hears_workflows(&client);
    assert_one_session(&service);
    assert!(service.stop().success());
    management("DELETE", &format!("users/{vhost}"), None);
}
