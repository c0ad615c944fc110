//! What RabbitMQ 4 does otherwise, or can be set to do. On an older one these have nothing to test.

use std::fs;
use std::process::Stdio;

use amiquip::{AmqpValue, FieldTable, QueueDeclareOptions};
use omotes_orchestrator::wire::job_result::ResultType;
use serde_json::json;

use crate::harness::deployment::{Deployment, Server, eventually, management, rabbitmq_version};
use crate::harness::peers::{Client, Peer, Worker, running_job};
use crate::python::{CeleryWorker, SdkClient, order, start};

const OUTPUT: &str = "<e id='out-1'/>";

/// A deployment whose RabbitMQ denies all deprecated features but these.
fn that_permits(permitted: &[&str]) -> Deployment {
    let features = management("GET", "deprecated-features", None);
    let names: Vec<_> = features
        .as_array()
        .unwrap()
        .iter()
        .filter(|feature| feature["deprecation_phase"] != "removed")
        .map(|feature| feature["name"].as_str().unwrap())
        .collect();
    for needed in ["global_qos", "transient_nonexcl_queues"] {
        assert!(names.contains(&needed), "{names:?}");
    }
    Deployment::with_own(&Server::ALL, |deployment| {
        let permit = |name: &&str| {
            let permit = permitted.contains(name);
            format!("deprecated_features.permit.{name} = {permit}\n")
        };
        let lines: String = names.iter().map(permit).collect();
        let folder = deployment.extra_folder(Server::RabbitMq);
        fs::write(folder.join("conf"), lines).unwrap();
    })
}

#[test]
fn the_service_needs_no_deprecated_feature() {
    if rabbitmq_version() < [4, 0] {
        return;
    }
    let deployment = that_permits(&[]);
    let service = deployment.start();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let task = running_job(&client, &worker, None);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    client.peer.send("job_submissions", b"\xff");
    client
        .peer
        .next(omotes_orchestrator::wire::DEAD_LETTERS_QUEUE);
    let file = deployment.folder.join("input.esdl");
    fs::write(&file, "<EnergySystem/>").unwrap();
    let mut submit = deployment
        .command(&["submit", file.to_str().unwrap(), "--workflow", "workflow_1"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let task = worker.take();
    worker.start(&task);
    worker.succeed(&task, OUTPUT);
    assert!(submit.wait().unwrap().success());
    let doctor = deployment.command(&["doctor"]).output().unwrap();
    let said = String::from_utf8_lossy(&doctor.stdout);
    assert!(!said.contains("error "), "{said}");
    assert!(!service.log().contains("has ended"), "{}", service.log());
    assert!(service.stop().success());
}

/// Celery 5.7 and all clients do without them; the remote control of an older Celery has queues that
/// are neither durable nor exclusive, and without them its workers do not start.
#[test]
fn only_workers_of_an_older_celery_need_a_deprecated_feature() {
    if rabbitmq_version() < [4, 0] {
        return;
    }
    for (permitted, workers) in [
        (&[][..], &["4.3"][..]),
        (&["transient_nonexcl_queues"], &["4.1", "4.2"]),
    ] {
        let deployment = that_permits(permitted);
        let service = start(&deployment);
        for worker in workers {
            let _worker = CeleryWorker::new(&deployment, worker);
            for client in ["4.1", "4.2", "4.3"] {
                let mut cancelled = order("sleep");
                cancelled["cancel_on"] = "RUNNING".into();
                let jobs = [order("succeed"), cancelled];
                let stories = SdkClient::new(&deployment, client, &jobs).stories();
                assert_eq!(stories[0]["result"], json!("SUCCEEDED"), "{stories:?}");
                assert_eq!(stories[1]["result"], json!("CANCELLED"), "{stories:?}");
            }
        }
        assert!(service.stop().success());
    }
}

/// A quorum queue of RabbitMQ 4.3 takes a message back from a consumer that has it for too long, whom
/// it cancels, as it does when it is deleted.
#[test]
fn a_consumer_that_was_cancelled_by_its_timeout_is_told_and_started_again() {
    if rabbitmq_version() < [4, 3] {
        return;
    }
    let deployment = Deployment::with_own(&Server::ALL, |deployment| {
        let conf = "consumer_timeout = 1000\n\
                    quorum_queue.property_equivalence.relaxed_checks_on_redeclaration = true\n";
        let folder = deployment.extra_folder(Server::RabbitMq);
        fs::write(folder.join("conf"), conf).unwrap();
    });
    let quorum = AmqpValue::LongString("quorum".to_owned());
    let options = QueueDeclareOptions {
        durable: true,
        arguments: FieldTable::from([("x-queue-type".to_owned(), quorum)]),
        ..Default::default()
    };
    let peer = Peer::new(&deployment, &deployment.sdk_vhost());
    peer.channel
        .queue_declare("job_submissions", options)
        .unwrap();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    let job = client.submit("workflow_1");
    let line = service.logged("RabbitMQ has cancelled the consumer of job_submissions");
    assert!(line.contains("consumer_timeout"), "{line}");
    lock.rollback().unwrap();
    assert_eq!(worker.take().job, job);
    eventually("it is acknowledged", || {
        (client.peer.queue_length("job_submissions") == 0).then_some(())
    });
    service.wait_until_ready();
}
