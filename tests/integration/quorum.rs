//! Core queues that are quorum queues, of which RabbitMQ drops a message that it has delivered too often.

use std::collections::HashSet;

use omotes_orchestrator::wire::DEAD_LETTERS_QUEUE;
use rstest::rstest;
use serde_json::json;
use uuid::Uuid;

use crate::harness::deployment::{Deployment, Service, eventually, management};
use crate::harness::peers::{Client, Worker};

const JOBS: usize = 30;
/// More than a message may be delivered.
const RESTARTS: usize = 25;

/// Several addresses, as a cluster has.
const CLUSTER: (&str, &str) = ("SDK_RABBITMQ_HOSTNAME", "127.0.0.1,localhost");

#[derive(Debug, Clone, Copy)]
enum End {
    Kill,
    Stop,
}

impl End {
    fn of(self, service: Service) {
        match self {
            End::Kill => service.kill(),
            End::Stop => assert!(service.stop().success()),
        }
    }
}

/// Makes all queues of the clients' vhost quorum queues, with RabbitMQ 4's limit.
fn replicate(deployment: &Deployment) {
    let vhost = deployment.sdk_vhost();
    deployment.make_vhost_anew(&vhost, &json!({"defaultqueuetype": "quorum"}));
    let policy = json!({
        "pattern": "^job_(submissions|deletions)$",
        "apply-to": "queues",
        "definition": {
            "delivery-limit": 20,
            "dead-letter-exchange": "",
            "dead-letter-routing-key": DEAD_LETTERS_QUEUE,
        },
    });
    management("PUT", &format!("policies/{vhost}/limit"), Some(policy));
}

/// A service that waits for a lock in Postgres.
fn launch_that_waits(deployment: &Deployment) -> Service {
    let mut sql = deployment.sql();
    // Those of earlier ones may not have noticed yet that they are alone.
    let now = sql.query_one("SELECT now()::text", &[]).unwrap();
    let now: String = now.get(0);
    let service = deployment.launch(&[CLUSTER]);
    let waiting = "SELECT 1 FROM pg_locks JOIN pg_stat_activity USING (pid)
                   WHERE NOT granted AND datname = current_database() AND query_start > $1::text::timestamptz";
    eventually("it waits for the lock", || {
        sql.query(waiting, &[&now]).unwrap().pop()
    });
    service
}

#[rstest]
#[case(End::Kill)]
#[case(End::Stop)]
fn restarts_while_postgres_is_locked_cost_no_delivery(#[case] end: End) {
    let deployment = Deployment::new();
    replicate(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    assert!(deployment.start_with(&[CLUSTER]).stop().success());
    let client = Client::new(&deployment);
    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    let jobs: HashSet<Uuid> = (0..JOBS).map(|_| client.submit("workflow_1")).collect();
    eventually("all are there", || {
        (client.peer.queue_length("job_submissions") as usize == JOBS).then_some(())
    });
    for _ in 0..RESTARTS {
        let service = deployment.launch(&[CLUSTER]);
        eventually(
            "it waits for the lock, without any message or with some",
            || {
                let taken = (client.peer.queue_length("job_submissions") as usize) < JOBS;
                (taken || service.log().contains("somebody has locked the tables")).then_some(())
            },
        );
        end.of(service);
    }
    lock.rollback().unwrap();
    let _service = deployment.start_with(&[CLUSTER]);
    let tasks: HashSet<Uuid> = (0..JOBS).map(|_| worker.take().job).collect();
    assert_eq!(tasks, jobs);
    assert_eq!(client.peer.queue_length(DEAD_LETTERS_QUEUE), 0);
}

/// What cannot be seen before a message is taken.
#[rstest]
#[case(End::Kill)]
#[case(End::Stop)]
fn restarts_on_one_message_use_up_no_delivery_of_the_others(#[case] end: End) {
    let deployment = Deployment::new();
    replicate(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    assert!(deployment.start_with(&[CLUSTER]).stop().success());
    let client = Client::new(&deployment);
    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    let first = client.submit("workflow_1");
    // As the service locks a job.
    let (high, low) = first.as_u64_pair();
    let key = (high ^ low).cast_signed();
    lock.execute("SELECT pg_advisory_xact_lock($1)", &[&key])
        .unwrap();
    let jobs: HashSet<Uuid> = (0..JOBS).map(|_| client.submit("workflow_1")).collect();
    eventually("all are there", || {
        (client.peer.queue_length("job_submissions") as usize > JOBS).then_some(())
    });
    for _ in 0..RESTARTS {
        // One that waits no longer than the message is there.
        if client.peer.queue_length("job_submissions") as usize == JOBS {
            break;
        }
        end.of(launch_that_waits(&deployment));
        eventually(
            "what it had in hand is back, or among the dead letters",
            || {
                let waiting = client.peer.queue_length("job_submissions");
                let letters = client.peer.queue_length(DEAD_LETTERS_QUEUE);
                (waiting + letters > JOBS as u32).then_some(())
            },
        );
    }
    assert_eq!(client.peer.queue_length("job_submissions") as usize, JOBS);
    lock.rollback().unwrap();
    let _service = deployment.start_with(&[CLUSTER]);
    let tasks: HashSet<Uuid> = (0..JOBS).map(|_| worker.take().job).collect();
    assert_eq!(tasks, jobs);
    assert_eq!(client.peer.queue_length(DEAD_LETTERS_QUEUE), 1);
    // The one that took all the deliveries is kept.
    let requeued = deployment
        .command(&["dead-letters", "requeue", "--all"])
        .output();
    let requeued = requeued.unwrap();
    let said = String::from_utf8_lossy(&requeued.stderr);
    assert!(requeued.status.success(), "{said}");
    assert_eq!(worker.take().job, first);
}

/// Looking at one is a delivery, of which RabbitMQ 4 allows 20.
#[test]
fn looking_at_dead_letters_loses_none() {
    const LETTERS: u32 = 3;
    let deployment = Deployment::new();
    replicate(&deployment);
    let policy = json!({
        "pattern": "^omotes_dead_letters$",
        "apply-to": "queues",
        "definition": {"delivery-limit": 20},
    });
    let vhost = deployment.sdk_vhost();
    management("PUT", &format!("policies/{vhost}/letters"), Some(policy));
    let _service = deployment.start();
    let client = Client::new(&deployment);
    for _ in 0..LETTERS {
        client.peer.send("job_submissions", b"\xff");
    }
    let there = || client.peer.queue_length(DEAD_LETTERS_QUEUE) == LETTERS;
    eventually("all are there", || there().then_some(()));
    let list = || {
        let output = deployment.command(&["dead-letters", "list"]).output();
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        String::from_utf8(output.stdout).unwrap()
    };
    let first = list();
    assert_eq!(first.matches("job_submissions").count(), LETTERS as usize);
    for _ in 0..25 {
        assert_eq!(list(), first);
    }
    eventually("all have returned", || there().then_some(()));
    let drop = ["dead-letters", "drop", "--all", "--yes"];
    assert!(deployment.command(&drop).status().unwrap().success());
    eventually("all are dropped", || {
        (client.peer.queue_length(DEAD_LETTERS_QUEUE) == 0).then_some(())
    });
}
