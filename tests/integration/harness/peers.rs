//! The programs that the service talks to, played by the test: SDK clients and Celery workers.

use std::cell::{Cell, RefCell};

use amiquip::{
    AmqpProperties, AmqpValue, Channel, Confirm, Connection, Exchange, ExchangeDeclareOptions,
    ExchangeType, FieldTable, Get, Publish, QueueDeclareOptions, QueueDeleteOptions,
};
use omotes_orchestrator::wire::{
    self, EsdlMessage, JobDelete, JobProgressUpdate, JobResult, JobStatusUpdate, JobSubmission,
    TaskProgressUpdate, TaskResult, job_result, job_status_update::JobStatus, task_progress_update,
    task_result,
};
use prost::Message;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::deployment::{Deployment, Service, eventually, setting};

pub const ESDL: &str = "<?xml version='1.0' encoding='UTF-8'?>\n<esdl:EnergySystem \
                        xmlns:esdl=\"http://www.tno.nl/esdl\" id=\"input\" name=\"n\"/>\n";

/// A connection to one vhost with one channel.
pub struct Peer {
    // Dropped first: it is closed on its connection.
    pub channel: Channel,
    connection: RefCell<Connection>,
}

fn publish(channel: &Channel, queue: &str, body: &[u8], message_id: &str) {
    let properties = AmqpProperties::default()
        .with_delivery_mode(2)
        .with_message_id(message_id.to_owned());
    let publish = Publish::with_properties(body, queue, properties);
    Exchange::direct(channel).publish(publish).unwrap();
}

/// A message taken from a queue.
pub struct Taken {
    pub body: Vec<u8>,
    pub properties: AmqpProperties,
}

impl Taken {
    pub fn header(&self, name: &str) -> AmqpValue {
        self.properties.headers().as_ref().unwrap()[name].clone()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

impl Peer {
    pub fn new(deployment: &Deployment, vhost: &str) -> Peer {
        let url = format!(
            "amqp://{}:{}@127.0.0.1:{}/{vhost}",
            setting("RABBITMQ_USER"),
            setting("RABBITMQ_PASSWORD"),
            deployment.rabbitmq_port(),
        );
        let mut connection = Connection::insecure_open(&url).unwrap();
        let channel = connection.open_channel(None).unwrap();
        Peer {
            channel,
            connection: RefCell::new(connection),
        }
    }

    /// To a queue through the default exchange, with a random message id as aio-pika has it.
    pub fn send(&self, queue: &str, body: &[u8]) {
        self.send_as(queue, body, &Uuid::new_v4().simple().to_string());
    }

    pub fn send_as(&self, queue: &str, body: &[u8], message_id: &str) {
        publish(&self.channel, queue, body, message_id);
    }

    pub fn send_with(&self, queue: &str, body: &[u8], headers: FieldTable) {
        let properties = AmqpProperties::default()
            .with_delivery_mode(2)
            .with_headers(headers);
        let publish = Publish::with_properties(body, queue, properties);
        Exchange::direct(&self.channel).publish(publish).unwrap();
    }

    /// When this returns, RabbitMQ has written it to its disk, or it has been acknowledged.
    pub fn send_safely(&self, queue: &str, body: &[u8]) {
        let channel = self.connection.borrow_mut().open_channel(None).unwrap();
        let confirms = channel.listen_for_publisher_confirms().unwrap();
        channel.enable_publisher_confirms().unwrap();
        publish(&channel, queue, body, &Uuid::new_v4().simple().to_string());
        assert!(matches!(confirms.recv().unwrap(), Confirm::Ack(_)));
        channel.close().unwrap();
    }

    /// Deletes a queue with all that is in it.
    pub fn delete_queue(&self, queue: &str) {
        let whatever_is_in_it = QueueDeleteOptions::default();
        self.channel.queue_delete(queue, whatever_is_in_it).unwrap();
    }

    /// The next message of a queue, if there is one now.
    pub fn poll(&self, queue: &str) -> Option<Taken> {
        let get = self.channel.basic_get(queue, true).unwrap()?;
        Some(Taken {
            body: get.delivery.body,
            properties: get.delivery.properties,
        })
    }

    pub fn next(&self, queue: &str) -> Taken {
        eventually(&format!("a message in {queue}"), || self.poll(queue))
    }

    /// Sends a message that cannot be handled, and waits until it is among the dead letters: then the
    /// handler that it went to has done with what it got from this queue before, all of its effects
    /// included.
    fn handled_before(&self, queue: &str, body: &[u8]) {
        // Twice, for the letter may be there before all that its own batch causes, but not before
        // what the batches before it have caused.
        for _ in 0..2 {
            let mark = Uuid::new_v4().to_string();
            self.send_as(queue, body, &mark);
            eventually("a mark among the dead letters", || {
                let letter = self.poll(wire::DEAD_LETTERS_QUEUE)?;
                format!("{:?}", letter.properties)
                    .contains(&mark)
                    .then_some(())
            });
        }
    }

    /// Lets enough through that the service takes so many messages of this queue at once.
    pub fn widen(&self, queue: &str, messages: usize) {
        for _ in 0..2 * messages {
            self.send(queue, b"\xff");
        }
        for _ in 0..2 * messages {
            self.next(wire::DEAD_LETTERS_QUEUE);
        }
    }

    pub fn queue_length(&self, queue: &str) -> u32 {
        let queue = self.channel.queue_declare_passive(queue).unwrap();
        queue.declared_message_count().unwrap()
    }

    /// Takes a message as one who looks at it.
    pub fn hold(&self, queue: &str) -> Get {
        self.channel.basic_get(queue, false).unwrap().unwrap()
    }

    pub fn give_back(&self, held: Get) {
        held.nack(&self.channel, true).unwrap();
    }

    pub fn declare(&self, queue: &str) {
        let options = QueueDeclareOptions {
            durable: true,
            ..QueueDeclareOptions::default()
        };
        self.channel.queue_declare(queue, options).unwrap();
    }
}

/// A client, without the SDK.
pub struct Client {
    pub peer: Peer,
}

impl Client {
    /// One that finds the core queues, and declares none of them.
    pub fn of_existing(deployment: &Deployment) -> Client {
        let peer = Peer::new(deployment, &deployment.sdk_vhost());
        let exchange = ExchangeDeclareOptions::default();
        peer.channel
            .exchange_declare(ExchangeType::Direct, "omotes_exchange", exchange)
            .unwrap();
        Client { peer }
    }

    pub fn new(deployment: &Deployment) -> Client {
        let Client { peer } = Client::of_existing(deployment);
        for queue in ["job_submissions", "job_deletions"] {
            peer.declare(queue);
            peer.channel
                .queue_bind(queue, "omotes_exchange", queue, FieldTable::new())
                .unwrap();
        }
        Client { peer }
    }

    /// Declares the queues of a job as the TypeScript SDK does.
    pub fn listen(&self, job: Uuid) {
        for kind in ["status", "progress", "result"] {
            let queue = format!("jobs.{job}.{kind}");
            self.peer.declare(&queue);
            let channel = &self.peer.channel;
            channel
                .queue_bind(
                    queue.as_str(),
                    "omotes_exchange",
                    queue.as_str(),
                    FieldTable::new(),
                )
                .unwrap();
        }
    }

    pub fn submission(&self, workflow: &str) -> (Uuid, JobSubmission) {
        let job = Uuid::new_v4();
        let submission = JobSubmission {
            uuid: job.to_string(),
            workflow_type: workflow.to_owned(),
            esdl: ESDL.to_owned(),
            job_reference: Some("a reference".to_owned()),
            ..JobSubmission::default()
        };
        (job, submission)
    }

    pub fn submit(&self, workflow: &str) -> Uuid {
        let (job, submission) = self.submission(workflow);
        self.listen(job);
        self.send(&submission);
        job
    }

    pub fn send(&self, submission: &JobSubmission) {
        self.peer
            .send("job_submissions", &submission.encode_to_vec());
    }

    pub fn cancel(&self, job: Uuid) {
        let message = JobDelete {
            uuid: job.to_string(),
        };
        self.peer.send("job_deletions", &message.encode_to_vec());
    }

    pub fn status(&self, job: Uuid) -> JobStatus {
        let taken = self.peer.next(&format!("jobs.{job}.status"));
        let update = JobStatusUpdate::decode(taken.body.as_slice()).unwrap();
        assert_eq!(update.uuid, job.to_string());
        update.status()
    }

    pub fn progress(&self, job: Uuid) -> (f64, String) {
        let taken = self.peer.next(&format!("jobs.{job}.progress"));
        let update = JobProgressUpdate::decode(taken.body.as_slice()).unwrap();
        assert_eq!(update.uuid, job.to_string());
        (update.progress, update.message)
    }

    pub fn result(&self, job: Uuid) -> JobResult {
        let taken = self.peer.next(&format!("jobs.{job}.result"));
        let result = JobResult::decode(taken.body.as_slice()).unwrap();
        assert_eq!(result.uuid, job.to_string());
        result
    }

    /// The type and the logs of the next result.
    pub fn outcome(&self, job: Uuid) -> (job_result::ResultType, String) {
        let result = self.result(job);
        (result.result_type(), result.logs)
    }

    /// That nothing waits for the client of a job. Says something about the service only when that is
    /// known to have handled what could have led to a message.
    pub fn hears_nothing(&self, job: Uuid) {
        for kind in ["status", "progress", "result"] {
            let queue = format!("jobs.{job}.{kind}");
            assert_eq!(self.peer.queue_length(&queue), 0, "{queue}");
        }
    }

    /// That nothing more comes for a job that has ended, of all that has been sent about it so far.
    /// Only one replica may run, or others are not waited for.
    pub fn heard_nothing_more(&self, worker: &Worker, job: Uuid) {
        self.all_handled(worker, job);
        self.hears_nothing(job);
    }

    /// Waits until all that was sent about a job has been handled. The job has ended, or ends by it.
    pub fn all_handled(&self, worker: &Worker, job: Uuid) {
        // Nobody can read them but for the job's id, so they go to the handler that has the job.
        let body = [b"\x0a\x24", job.to_string().as_bytes(), b"\xff"].concat();
        for (peer, queue) in [
            (&self.peer, "job_submissions"),
            (&self.peer, "job_deletions"),
            (&worker.peer, "omotes_task_progress_events"),
            (&worker.peer, "omotes_task_result_events"),
        ] {
            peer.handled_before(queue, &body);
        }
    }

    /// One queue that gets the results of all these jobs.
    pub fn listen_to_results(&self, jobs: &[Uuid]) -> String {
        let options = QueueDeclareOptions {
            exclusive: true,
            ..QueueDeclareOptions::default()
        };
        let channel = &self.peer.channel;
        let queue = channel.queue_declare("", options).unwrap();
        for job in jobs {
            let key = format!("jobs.{job}.result");
            let arguments = FieldTable::new();
            channel
                .queue_bind(queue.name(), "omotes_exchange", key, arguments)
                .unwrap();
        }
        queue.name().to_owned()
    }

    /// Waits until a single-file service has handled the submissions so far.
    pub fn submissions_handled(&self) {
        let job = self.submit("no_such_workflow");
        self.outcome(job);
    }

    /// Waits until a single-file service has handled the cancels so far.
    pub fn cancels_handled(&self) {
        self.peer.handled_before("job_deletions", b"\xff");
    }
}

/// A Celery worker for one workflow, without Celery.
pub struct Worker {
    pub peer: Peer,
    workflow: String,
    pidbox: String,
    marks: Cell<u32>,
}

/// A task that a worker has taken.
#[derive(Debug, Clone)]
pub struct Task {
    pub job: Uuid,
    pub id: String,
}

impl Task {
    pub fn of(message: &Taken) -> Task {
        let hex = message.json()[0][0]["__value__"]["hex"]
            .as_str()
            .unwrap()
            .to_owned();
        Task {
            job: hex.parse().unwrap(),
            id: message.properties.correlation_id().clone().unwrap(),
        }
    }
}

impl Worker {
    pub fn new(deployment: &Deployment, workflow: &str) -> Worker {
        let worker = Worker::of_existing(deployment, workflow);
        for queue in ["omotes_task_result_events", "omotes_task_progress_events"] {
            worker.peer.declare(queue);
        }
        worker
    }

    /// One that finds the queues of its events, and declares only that of its tasks.
    pub fn of_existing(deployment: &Deployment, workflow: &str) -> Worker {
        let peer = Peer::new(deployment, &deployment.celery_vhost());
        let options = QueueDeclareOptions {
            durable: true,
            arguments: FieldTable::from([("x-max-priority".to_owned(), AmqpValue::LongInt(10))]),
            ..QueueDeclareOptions::default()
        };
        peer.channel.queue_declare(workflow, options).unwrap();
        let exchange = ExchangeDeclareOptions::default();
        peer.channel
            .exchange_declare(ExchangeType::Fanout, "celery.pidbox", exchange)
            .unwrap();
        let exclusive = QueueDeclareOptions {
            exclusive: true,
            ..QueueDeclareOptions::default()
        };
        let pidbox = peer
            .channel
            .queue_declare("", exclusive)
            .unwrap()
            .name()
            .to_owned();
        peer.channel
            .queue_bind(pidbox.as_str(), "celery.pidbox", "", FieldTable::new())
            .unwrap();
        Worker {
            peer,
            workflow: workflow.to_owned(),
            pidbox,
            marks: Cell::new(0),
        }
    }

    /// Takes the next task as it is.
    pub fn take_message(&self) -> Taken {
        self.peer.next(&self.workflow)
    }

    pub fn take(&self) -> Task {
        Task::of(&self.take_message())
    }

    /// How many tasks wait.
    pub fn waiting(&self) -> u32 {
        self.peer.queue_length(&self.workflow)
    }

    fn update(&self, task: &Task, progress_type: task_progress_update::ProgressType) -> Vec<u8> {
        self.update_saying(task, progress_type, "a message")
    }

    fn update_saying(
        &self,
        task: &Task,
        progress_type: task_progress_update::ProgressType,
        message: &str,
    ) -> Vec<u8> {
        TaskProgressUpdate {
            job_id: task.job.to_string(),
            celery_task_id: task.id.clone(),
            message: message.to_owned(),
            celery_task_type: self.workflow.clone(),
            progress_type: Some(progress_type),
        }
        .encode_to_vec()
    }

    pub fn start(&self, task: &Task) {
        self.start_as(task, &Uuid::new_v4().simple().to_string());
    }

    /// Starts with a given message id, so that the message can be sent twice.
    pub fn start_as(&self, task: &Task, message_id: &str) {
        let body = self.start_message(task);
        self.peer
            .send_as("omotes_task_progress_events", &body, message_id);
    }

    pub fn start_message(&self, task: &Task) -> Vec<u8> {
        self.update(task, task_progress_update::ProgressType::Status(0))
    }

    pub fn progress(&self, task: &Task, fraction: f64) {
        let body = self.update(task, task_progress_update::ProgressType::Progress(fraction));
        self.peer.send("omotes_task_progress_events", &body);
    }

    pub fn progress_saying(&self, task: &Task, fraction: f64, message: &str) {
        let kind = task_progress_update::ProgressType::Progress(fraction);
        let body = self.update_saying(task, kind, message);
        self.peer.send("omotes_task_progress_events", &body);
    }

    /// The message with a task's result.
    pub fn result(
        &self,
        task: &Task,
        result_type: task_result::ResultType,
        output_esdl: &str,
    ) -> Vec<u8> {
        TaskResult {
            job_id: task.job.to_string(),
            celery_task_id: task.id.clone(),
            result_type: result_type.into(),
            output_esdl: Some(output_esdl.to_owned()),
            logs: "the worker's logs".to_owned(),
            celery_task_type: self.workflow.clone(),
            esdl_messages: vec![EsdlMessage {
                technical_message: "a remark".to_owned(),
                severity: wire::esdl_message::Severity::Info.into(),
                esdl_object_id: None,
            }],
        }
        .encode_to_vec()
    }

    pub fn succeed(&self, task: &Task, output_esdl: &str) {
        let body = self.result(task, task_result::ResultType::Succeeded, output_esdl);
        self.peer.send_safely("omotes_task_result_events", &body);
    }

    /// The same without a word from RabbitMQ that it has the result.
    pub fn succeed_in_passing(&self, task: &Task, output_esdl: &str) {
        let body = self.result(task, task_result::ResultType::Succeeded, output_esdl);
        self.peer.send("omotes_task_result_events", &body);
    }

    pub fn fail(&self, task: &Task) {
        let body = self.result(task, task_result::ResultType::Error, "");
        self.peer.send_safely("omotes_task_result_events", &body);
    }

    /// The task that the next revoke is about. What workers are asked meanwhile stays unanswered.
    pub fn revoked(&self) -> String {
        loop {
            let message = self.peer.next(&self.pidbox).json();
            if message["method"] == "revoke" {
                return message["arguments"]["task_id"].as_str().unwrap().to_owned();
            }
            assert_eq!(message["method"], "active");
        }
    }

    /// Answers the next question for what is being run, as so many workers that run this task.
    pub fn answer(&self, task: &Task, workers: usize) {
        let question = self.peer.next(&self.pidbox).json();
        assert_eq!(question["method"], "active");
        assert_eq!(question["arguments"], json!({"safe": true}));
        let text = |key: &str| question["reply_to"][key].as_str().unwrap().to_owned();
        let other = json!({"id": "another task", "worker_pid": 8});
        for number in 0..workers {
            let own = json!({"id": task.id, "worker_pid": 7, "acknowledged": false});
            let answer = json!({format!("worker-x@host-{number}"): [other, own]});
            let answer = answer.to_string();
            let publish = Publish::new(answer.as_bytes(), text("routing_key"));
            let channel = &self.peer.channel;
            channel.basic_publish(text("exchange"), publish).unwrap();
        }
    }

    /// Waits until a single-file service has handled the progress events so far, and says that
    /// it had revoked nothing.
    pub fn progress_handled(&self) {
        // Twice, for the revoke may be there before all that its own batch causes.
        for _ in 0..2 {
            self.marks.set(self.marks.get() + 1);
            let mark = Task {
                job: Uuid::new_v4(),
                id: format!("mark {}", self.marks.get()),
            };
            self.progress(&mark, 0.0);
            assert_eq!(self.revoked(), mark.id);
        }
    }

    /// Waits until a single-file service has handled the results so far.
    pub fn results_handled(&self) {
        self.peer
            .handled_before("omotes_task_result_events", b"\xff");
    }
}

/// A running job with this timeout, of which client and worker have heard.
pub fn running_job(client: &Client, worker: &Worker, timeout_ms: Option<u32>) -> Task {
    let (job, mut submission) = client.submission("workflow_1");
    submission.timeout_ms = timeout_ms;
    client.listen(job);
    client.send(&submission);
    let task = worker.take();
    worker.start(&task);
    assert_eq!(client.status(job), JobStatus::Enqueued);
    assert_eq!(client.status(job), JobStatus::Running);
    task
}

/// That the service's first session with RabbitMQ is the current one, also after each of its
/// connections has been asked for an answer: what is wrong with an idle one shows only then.
pub fn kept_its_session(deployment: &Deployment, service: &Service) {
    // The vhost that is asked last, where nobody else takes what is sent for an answer.
    let peer = Peer::new(deployment, &deployment.celery_vhost());
    let exclusive = QueueDeclareOptions {
        exclusive: true,
        ..QueueDeclareOptions::default()
    };
    let pulse = "omotes_orchestrator_pulse";
    peer.channel.queue_declare(pulse, exclusive).unwrap();
    // The round of the first one may have begun before this. A new session has them too.
    for _ in 0..2 {
        peer.next(pulse);
    }
    let (_, metrics) = service.get("/metrics").unwrap();
    let sessions = metrics
        .lines()
        .find(|line| line.starts_with("omotes_orchestrator_sessions_total "));
    assert_eq!(sessions, Some("omotes_orchestrator_sessions_total 1"));
    let log = service.log();
    assert!(!log.contains("the session with RabbitMQ has ended"));
}
