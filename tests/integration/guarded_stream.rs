//! Messages with properties that amiquip cannot read, or only at a price: they are handled like all
//! others, and so is what comes behind them.

use std::collections::HashSet;

use amiquip::{AmqpValue, ExchangeDeclareOptions, ExchangeType, FieldTable, QueueDeclareOptions};
use omotes_orchestrator::wire::{
    DEAD_LETTERS_QUEUE, job_result::ResultType, job_status_update::JobStatus, task_result,
};
use prost::Message;
use rstest::rstest;
use serde_json::json;
use uuid::Uuid;

use crate::harness::deployment::{Deployment, eventually, management};
use crate::harness::peers::{Client, Peer, Worker, kept_its_session};
use crate::harness::raw::{Properties, RawPublisher, entry, long};

const OUTPUT: &str = "<e id='out-1'/>";
const SUBMISSIONS: &str = "job_submissions";
const PROGRESS: &str = "omotes_task_progress_events";
const RESULTS: &str = "omotes_task_result_events";
/// What comes before and behind the poison in the headers.
const GOOD: &[u8] = b"a text";

/// What is wrong with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Poison {
    ContentType,
    HeaderKey,
    HeaderText,
    RoutingKey,
    Depth,
    LongArray,
    ManyHeaders,
}

impl Poison {
    pub const ALL: [Poison; 7] = [
        Poison::ContentType,
        Poison::HeaderKey,
        Poison::HeaderText,
        Poison::RoutingKey,
        Poison::Depth,
        Poison::LongArray,
        Poison::ManyHeaders,
    ];

    fn properties(self) -> Properties {
        let content_type = match self {
            Poison::ContentType => b"text/\xff\xfe".as_slice(),
            _ => b"text/plain",
        };
        let poison = match self {
            Poison::ContentType | Poison::RoutingKey => Vec::new(),
            Poison::HeaderKey => entry(b"k\xff", b'S', &long(b"x")),
            Poison::HeaderText => entry(b"bad text", b'S', &long(b"\xc3\x28 and so on")),
            // Each is an array of which the next is the only item.
            Poison::Depth => {
                let arrays = (0..26_000_u32).rev();
                let nested =
                    arrays.flat_map(|inside| [&b"A"[..], &(5 * inside).to_be_bytes()].concat());
                [&b"\x04deep"[..], &nested.collect::<Vec<_>>()].concat()
            }
            Poison::LongArray => entry(b"many", b'A', &long(&[b'V'; 100_000])),
            Poison::ManyHeaders => (0..26_000_u32)
                .flat_map(|number| {
                    let key =
                        [number, number / 30, number / 900].map(|digit| b'a' + digit as u8 % 30);
                    entry(&key, b'V', b"")
                })
                .collect(),
        };
        Properties {
            content_type: content_type.to_vec(),
            headers: [
                entry(b"before", b'S', &long(GOOD)),
                poison,
                entry(b"behind", b'S', &long(GOOD)),
            ]
            .concat(),
            message_id: Vec::new(),
        }
    }
}

/// Publishes poison to the queues of one vhost.
struct Poisoner {
    raw: RawPublisher,
    poison: Poison,
    properties: Properties,
}

impl Poisoner {
    fn new(
        deployment: &Deployment,
        vhost: &str,
        peer: &Peer,
        queues: &[&str],
        poison: Poison,
    ) -> Poisoner {
        let options = ExchangeDeclareOptions::default();
        for queue in queues {
            // Through it, a queue takes messages with any key.
            let exchange = format!("to {queue}");
            peer.channel
                .exchange_declare(ExchangeType::Fanout, exchange.as_str(), options.clone())
                .unwrap();
            peer.channel
                .queue_bind(*queue, exchange.as_str(), "", FieldTable::new())
                .unwrap();
        }
        Poisoner {
            raw: RawPublisher::new(deployment, vhost),
            poison,
            properties: poison.properties(),
        }
    }

    fn send(&mut self, queue: &str, body: &[u8]) {
        let exchange = format!("to {queue}");
        let key = match self.poison {
            Poison::RoutingKey => b"\xff\xfe".as_slice(),
            _ => queue.as_bytes(),
        };
        self.properties.message_id = Uuid::new_v4().simple().to_string().into_bytes();
        self.raw.publish(&exchange, key, &self.properties, body);
    }
}

#[rstest]
#[case(Poison::ContentType)]
#[case(Poison::HeaderKey)]
#[case(Poison::HeaderText)]
#[case(Poison::RoutingKey)]
#[case(Poison::Depth)]
#[case(Poison::LongArray)]
#[case(Poison::ManyHeaders)]
fn poisoned_properties_harm_nobody(#[case] poison: Poison) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    client.peer.declare(DEAD_LETTERS_QUEUE);
    let mut to_sdk = Poisoner::new(
        &deployment,
        &deployment.sdk_vhost(),
        &client.peer,
        &[SUBMISSIONS, DEAD_LETTERS_QUEUE],
        poison,
    );
    let mut to_celery = Poisoner::new(
        &deployment,
        &deployment.celery_vhost(),
        &worker.peer,
        &[PROGRESS, RESULTS],
        poison,
    );
    let service = deployment.start();

    // A job whose every message is poisoned, and one behind each of them.
    let (job, submission) = client.submission("workflow_1");
    client.listen(job);
    to_sdk.send(SUBMISSIONS, &submission.encode_to_vec());
    let behind = client.submit("workflow_1");
    let mut tasks = [worker.take(), worker.take()];
    tasks.sort_by_key(|task| task.job != job);
    assert_eq!(tasks.each_ref().map(|task| task.job), [job, behind]);
    to_celery.send(PROGRESS, &worker.start_message(&tasks[0]));
    worker.start(&tasks[1]);
    for job in [job, behind] {
        assert_eq!(client.status(job), JobStatus::Enqueued);
        assert_eq!(client.status(job), JobStatus::Running);
    }
    let succeeded = task_result::ResultType::Succeeded;
    to_celery.send(RESULTS, &worker.result(&tasks[0], succeeded, OUTPUT));
    worker.succeed(&tasks[1], OUTPUT);
    for job in [job, behind] {
        assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    }

    // What cannot be decoded becomes a dead letter with its properties, as far as they can be told.
    to_sdk.send(SUBMISSIONS, b"\xff");
    let letter = client.peer.next(DEAD_LETTERS_QUEUE);
    assert_eq!(letter.body, b"\xff");
    match (letter.header("properties"), poison) {
        (AmqpValue::FieldTable(properties), _) => match &properties["headers"] {
            AmqpValue::FieldTable(headers) => {
                for name in ["before", "behind"] {
                    assert_eq!(headers[name], AmqpValue::LongString("a text".to_owned()));
                }
            }
            other => panic!("{other:?}"),
        },
        (AmqpValue::LongString(text), Poison::Depth | Poison::LongArray | Poison::ManyHeaders) => {
            assert!(text.starts_with("left out: "), "{text}");
        }
        (other, _) => panic!("{other:?}"),
    }

    // The same among the dead letters, where somebody else has put it.
    to_sdk.send(DEAD_LETTERS_QUEUE, b"x");
    client.peer.send(SUBMISSIONS, b"\xff");
    let list = || {
        deployment
            .command(&["dead-letters", "list"])
            .output()
            .unwrap()
    };
    eventually("both letters are listed", || {
        let list = list();
        let text = String::from_utf8(list.stdout).unwrap();
        assert!(list.status.success(), "{text}");
        // With their header.
        (text.lines().count() == 3).then_some(())
    });
    kept_its_session(&deployment, &service);
}

/// Sends so many small submissions with poison of 128 KiB, and returns their jobs.
pub fn send_submissions(
    deployment: &Deployment,
    client: &Client,
    queue: &str,
    poison: Poison,
    count: usize,
) -> HashSet<Uuid> {
    let mut poisoner = Poisoner::new(
        deployment,
        &deployment.sdk_vhost(),
        &client.peer,
        &[queue],
        poison,
    );
    (0..count)
        .map(|_| {
            let (job, submission) = client.submission("workflow_1");
            poisoner.send(queue, &submission.encode_to_vec());
            job
        })
        .collect()
}

#[rstest]
#[case(Poison::LongArray)]
#[case(Poison::ManyHeaders)]
fn large_headers_pass_in_bounded_memory(#[case] poison: Poison) {
    const JOBS: usize = 400;
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    client.peer.widen(SUBMISSIONS, JOBS);
    // Writing them takes minutes; from there RabbitMQ itself hands them on.
    let long_text = |text: &str| AmqpValue::LongString(text.to_owned());
    let options = QueueDeclareOptions {
        durable: true,
        arguments: FieldTable::from([
            ("x-dead-letter-exchange".to_owned(), long_text("")),
            (
                "x-dead-letter-routing-key".to_owned(),
                long_text(SUBMISSIONS),
            ),
        ]),
        ..QueueDeclareOptions::default()
    };
    client.peer.channel.queue_declare("ready", options).unwrap();
    let jobs = send_submissions(&deployment, &client, "ready", poison, JOBS);
    eventually("all are there", || {
        (client.peer.queue_length("ready") as usize == JOBS).then_some(())
    });
    // Nothing gets through for a while, and all of it would like to come in.
    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    let policy = json!({
        "pattern": "^ready$", "definition": {"max-length": 0}, "apply-to": "queues",
    });
    let path = format!("policies/{}/none", deployment.sdk_vhost());
    management("PUT", &path, Some(policy));
    service.logged("has been waiting for Postgres");
    lock.rollback().unwrap();
    let tasks: HashSet<Uuid> = (0..JOBS).map(|_| worker.take().job).collect();
    assert_eq!(tasks, jobs);
    let peak = service.peak_memory();
    eprintln!("peak memory with large headers: {peak} MiB");
    assert!(peak < 256, "{peak} MiB");
    kept_its_session(&deployment, &service);
}
