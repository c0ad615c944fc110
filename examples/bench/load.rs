//! Backlogs for the service, and how fast it works them off.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use amiquip::{
    AmqpProperties, Auth, Channel, Connection, ConnectionOptions, ConnectionTuning,
    ConsumerOptions, FieldTable, QueueDeclareOptions, QueueDeleteOptions,
};
use anyhow::{Context, bail, ensure};
use omotes_orchestrator::broker::{Link, Publisher};
use omotes_orchestrator::config::{Address, Config, RabbitMq};
use omotes_orchestrator::threads::Calls;
use omotes_orchestrator::wire::{
    self, JobSubmission, OMOTES_EXCHANGE, Outgoing, TaskProgressUpdate, TaskResult,
    task_progress_update::{ProgressStatus, ProgressType},
};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::site::{Site, pause};

pub const WORKFLOW: &str = "bench";
/// Two steps, both of which are tasks of that one.
const STEPS: &str = "bench_steps";
/// A paused queue.
pub const HELD: &str = "bench_held";
/// One with more seats than are ever needed.
pub const SEATS: &str = "bench_seats";
/// What all clients together hear.
pub const CLIENTS: &str = "bench.clients";
/// How long a backlog may take.
const PATIENCE: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Submission,
    /// A submission that names no workflow.
    Refused,
    Start,
    Progress,
    Result,
    /// A submission of a job of two steps.
    Steps,
    /// The result of the first of them.
    HandOver,
    /// A submission whose task waits for its turn.
    Held,
    /// Its turn, when the queue is resumed.
    Turn,
}

impl Kind {
    /// What happens to a job.
    pub const ALL: [Kind; 4] = [Kind::Submission, Kind::Start, Kind::Progress, Kind::Result];
    /// What happens to a job of two steps.
    pub const OF_STEPS: [Kind; 3] = [Kind::Steps, Kind::HandOver, Kind::Result];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Submission => "submissions",
            Kind::Refused => "refused submissions",
            Kind::Start => "starts",
            Kind::Progress => "progress messages",
            Kind::Result => "results",
            Kind::Steps => "submissions of two steps",
            Kind::HandOver => "hand-overs",
            Kind::Held => "submissions that wait for their turn",
            Kind::Turn => "turns",
        }
    }

    /// Whether it causes a task.
    pub fn has_task(self) -> bool {
        match self {
            Kind::Submission | Kind::Steps | Kind::HandOver | Kind::Turn => true,
            Kind::Refused | Kind::Start | Kind::Progress | Kind::Result | Kind::Held => false,
        }
    }

    /// The queue of its task.
    fn queue(self) -> &'static str {
        match self {
            Kind::Held | Kind::Turn => HELD,
            Kind::Submission
            | Kind::Refused
            | Kind::Start
            | Kind::Progress
            | Kind::Result
            | Kind::Steps
            | Kind::HandOver => WORKFLOW,
        }
    }
}

/// How fast a backlog was worked off.
pub struct Measured {
    /// Messages per second.
    pub rate: f64,
    /// Milliseconds of processor time per message: of the service, RabbitMQ and Postgres.
    pub cpu: [f64; 3],
}

/// A message as RabbitMQ sees it.
#[derive(Debug, Clone)]
pub struct Sample {
    pub bytes: usize,
    pub properties: AmqpProperties,
}

/// What a kind of message is like, and what it causes.
#[derive(Debug)]
pub struct Samples {
    pub incoming: usize,
    /// To the workers, if there is one.
    pub task: Option<Sample>,
    pub client: Sample,
}

pub struct Load {
    sdk: RabbitMq,
    task: RabbitMq,
    celery: RabbitMq,
    results: String,
    progress: String,
    incoming: AtomicUsize,
}

impl Load {
    pub fn new(config: &Config) -> Load {
        Load {
            sdk: config.sdk_rabbitmq.clone(),
            task: config.task_rabbitmq.clone(),
            celery: config.celery_rabbitmq.clone(),
            results: config.task_result_queue.clone(),
            progress: config.task_progress_queue.clone(),
            incoming: AtomicUsize::new(0),
        }
    }

    /// One message for each job.
    pub fn prepare<'a>(
        &'a self,
        kind: Kind,
        jobs: &'a [Uuid],
        tasks: &'a [(Uuid, String)],
        esdl: usize,
    ) -> Box<dyn Iterator<Item = Outgoing> + 'a> {
        match kind {
            Kind::Submission => Box::new(jobs.iter().map(move |job| submission(*job, esdl))),
            Kind::Steps => Box::new(jobs.iter().map(move |job| submission_to(STEPS, *job, esdl))),
            Kind::Held => Box::new(jobs.iter().map(move |job| submission_to(HELD, *job, esdl))),
            Kind::Turn => Box::new(std::iter::empty()),
            Kind::Refused => Box::new(
                jobs.iter()
                    .map(move |job| submission_to("none", *job, esdl)),
            ),
            Kind::Start => Box::new(tasks.iter().map(|task| self.start(task))),
            Kind::Progress => Box::new(tasks.iter().map(|task| self.progress(task))),
            Kind::Result | Kind::HandOver => {
                Box::new(tasks.iter().map(move |task| self.result(task, esdl)))
            }
        }
    }

    pub fn start(&self, task: &(Uuid, String)) -> Outgoing {
        let start = ProgressType::Status(ProgressStatus::Start.into());
        wire::worker_event(&self.progress, &event(task, start))
    }

    pub fn progress(&self, task: &(Uuid, String)) -> Outgoing {
        wire::worker_event(&self.progress, &event(task, ProgressType::Progress(0.5)))
    }

    pub fn result(&self, (job, task): &(Uuid, String), esdl: usize) -> Outgoing {
        let result = TaskResult {
            job_id: job.to_string(),
            celery_task_id: task.clone(),
            result_type: 0,
            output_esdl: Some(esdl_of(esdl, *job)),
            logs: "a line of logs\n".repeat(10),
            celery_task_type: WORKFLOW.to_owned(),
            esdl_messages: Vec::new(),
        };
        wire::worker_event(&self.results, &result)
    }

    /// Declares the workers' queues, whose depths are looked at before there is a task.
    ///
    /// # Errors
    /// RabbitMQ is gone.
    pub fn declare(&self) -> anyhow::Result<()> {
        let link = Link::open(&self.celery, "bench")?;
        let calls = Calls::default();
        let publisher = Publisher::new(&link, &calls);
        for queue in [WORKFLOW, HELD, SEATS] {
            publisher.declare_task_queue(queue)?;
        }
        Ok(())
    }

    /// Publishes a backlog. Clients listen for what will come of it.
    pub fn publish(
        &self,
        kind: Kind,
        jobs: &[Uuid],
        messages: impl Iterator<Item = Outgoing>,
    ) -> anyhow::Result<()> {
        self.listen(jobs, kind)?;
        let config = match kind {
            Kind::Submission | Kind::Steps | Kind::Refused | Kind::Held | Kind::Turn => &self.sdk,
            Kind::Start | Kind::Progress | Kind::Result | Kind::HandOver => &self.task,
        };
        let link = Link::open(config, "bench")?;
        let calls = Calls::default();
        let mut publisher = Publisher::new(&link, &calls);
        let mut messages = messages.peekable();
        while let Some(first) = messages.peek() {
            self.incoming.store(first.body.len(), Ordering::Relaxed);
            let at_once = (4 * 1024 * 1024 / first.body.len()).clamp(1, 500);
            let batch: Vec<_> = messages.by_ref().take(at_once).collect();
            publisher.publish(&batch)?;
        }
        Ok(())
    }

    /// Binds the queue of all clients to what these jobs are told.
    ///
    /// # Errors
    /// RabbitMQ is gone.
    pub fn listen(&self, jobs: &[Uuid], kind: Kind) -> anyhow::Result<()> {
        let mut connection = open(&self.sdk)?;
        let channel = connection.open_channel(None)?;
        let options = QueueDeclareOptions {
            durable: true,
            ..QueueDeclareOptions::default()
        };
        channel.queue_declare(CLIENTS, options)?;
        let what = match kind {
            Kind::Submission | Kind::Steps | Kind::Start | Kind::Held => "status",
            Kind::Progress | Kind::HandOver => "progress",
            Kind::Refused | Kind::Result | Kind::Turn => "result",
        };
        for job in jobs {
            let key = format!("jobs.{job}.{what}");
            channel.queue_bind_nowait(CLIENTS, OMOTES_EXCHANGE, key, FieldTable::new())?;
        }
        channel.queue_declare_passive(CLIENTS)?;
        Ok(connection.close()?)
    }

    /// How fast the service, which has just begun, works off so many messages: from the tenth part
    /// on, since the first ones meet prepared statements and the like for the first time.
    pub fn measure(&self, kind: Kind, messages: usize, site: &Site) -> anyhow::Result<Measured> {
        let (config, queue) = match kind.has_task() {
            true => (&self.celery, kind.queue()),
            false => (&self.sdk, CLIENTS),
        };
        let mut connection = open(config)?;
        let channel = connection.open_channel(None)?;
        let (all, first) = (u32::try_from(messages)?, u32::try_from(messages / 10)?);
        let deadline = Instant::now() + PATIENCE;
        let mut from = None;
        loop {
            let depth = depth(&channel, queue)?;
            let now = Instant::now();
            if from.is_none() && depth >= first {
                from = Some((now, site.cpu(), depth));
            }
            if let Some((began, cpu, done)) = from
                && depth >= all
            {
                let messages = f64::from(depth - done);
                connection.close()?;
                let cpu_now = site.cpu();
                return Ok(Measured {
                    rate: messages / (now - began).as_secs_f64(),
                    cpu: [0, 1, 2].map(|which| {
                        let time: Duration = cpu_now[which] - cpu[which];
                        time.as_secs_f64() * 1000.0 / messages
                    }),
                });
            }
            ensure!(now < deadline, "{depth} of {all} {} done", kind.name());
            pause(Duration::from_millis(2));
        }
    }

    /// What one message of this kind was like, and what it caused.
    pub fn samples(&self, kind: Kind) -> anyhow::Result<Samples> {
        Ok(Samples {
            incoming: self.incoming.load(Ordering::Relaxed),
            task: match kind.has_task() {
                true => Some(first(&self.celery, kind.queue())?),
                false => None,
            },
            client: first(&self.sdk, CLIENTS)?,
        })
    }

    /// Takes all tasks: each one's job and id.
    pub fn take_tasks(&self, kind: Kind, count: usize) -> anyhow::Result<Vec<(Uuid, String)>> {
        let mut connection = open(&self.celery)?;
        let channel = connection.open_channel(None)?;
        let mut tasks = Vec::with_capacity(count);
        while let Some(got) = channel.basic_get(kind.queue(), true)? {
            tasks.push(task_of(
                &got.delivery.body,
                got.delivery.properties.correlation_id().as_deref(),
            )?);
        }
        ensure!(tasks.len() == count, "{} of {count} tasks", tasks.len());
        connection.close()?;
        Ok(tasks)
    }

    /// Empties what the clients have heard, and what the workers have not taken.
    pub fn purge(&self) -> anyhow::Result<()> {
        let mut connection = open(&self.celery)?;
        connection.open_channel(None)?.queue_purge(WORKFLOW)?;
        connection.close()?;
        let mut connection = open(&self.sdk)?;
        let channel = connection.open_channel(None)?;
        channel.queue_delete(CLIENTS, QueueDeleteOptions::default())?;
        Ok(connection.close()?)
    }
}

/// A task's job and its own id.
///
/// # Errors
/// It is no task of ours.
pub fn task_of(body: &[u8], id: Option<&str>) -> anyhow::Result<(Uuid, String)> {
    let body: Value = serde_json::from_slice(body)?;
    let job = body[0][0]["__value__"]["hex"].as_str();
    let job = job.context("no job id in a task")?.parse()?;
    Ok((job, id.context("no task id")?.to_owned()))
}

fn depth(channel: &Channel, queue: &str) -> anyhow::Result<u32> {
    let queue = channel.queue_declare_passive(queue)?;
    Ok(queue.declared_message_count().unwrap_or_default())
}

fn first(config: &RabbitMq, queue: &str) -> anyhow::Result<Sample> {
    let mut connection = open(config)?;
    let channel = connection.open_channel(None)?;
    let Some(got) = channel.basic_get(queue, false)? else {
        bail!("{queue} is empty");
    };
    let sample = Sample {
        bytes: got.delivery.body.len(),
        properties: got.delivery.properties.clone(),
    };
    // It goes back.
    channel.close()?;
    connection.close()?;
    Ok(sample)
}

/// For a consumer that RabbitMQ need not wait for.
pub fn unacknowledged() -> ConsumerOptions {
    ConsumerOptions {
        no_ack: true,
        ..ConsumerOptions::default()
    }
}

/// # Errors
/// RabbitMQ is gone.
pub fn open(config: &RabbitMq) -> anyhow::Result<Connection> {
    let RabbitMq {
        servers,
        username,
        password,
        vhost,
        // `run.sh` starts the server.
        tls: _,
    } = config;
    // `run.sh` starts one.
    let Address { host, port } = &servers[0];
    let stream = std::net::TcpStream::connect((host.as_str(), *port))?;
    stream.set_nodelay(true)?;
    let options = ConnectionOptions::default()
        .auth(Auth::Plain {
            username: username.clone(),
            password: password.reveal().to_owned(),
        })
        .virtual_host(vhost.as_str());
    let stream = mio_of_amiquip::net::TcpStream::from_stream(stream)?;
    Connection::insecure_open_stream(stream, options, ConnectionTuning::default())
        .context("connecting to RabbitMQ")
}

fn event((job, task): &(Uuid, String), progress_type: ProgressType) -> TaskProgressUpdate {
    TaskProgressUpdate {
        job_id: job.to_string(),
        celery_task_id: task.clone(),
        message: "a message".to_owned(),
        celery_task_type: WORKFLOW.to_owned(),
        progress_type: Some(progress_type),
    }
}

/// An ESDL of so many bytes, nearly all of them elements as real ones have.
fn esdl_of(bytes: usize, job: Uuid) -> String {
    let mut esdl = format!(
        "<?xml version='1.0' encoding='UTF-8'?>\n<esdl:EnergySystem \
         xmlns:esdl=\"http://www.tno.nl/esdl\" id=\"{job}\" name=\"a network\">\n"
    );
    let end = "</esdl:EnergySystem>\n";
    let asset = "    <asset xsi:type=\"esdl:Pipe\" id=\"3f0f9a52-5a2e-4c6b-9d3c-2b6f6f0f2b11\" name=\"Pipe_1\" \
         length=\"120.5\" innerDiameter=\"0.1603\" outerDiameter=\"0.25\" diameter=\"DN150\"/>\n";
    while esdl.len() + asset.len() + end.len() <= bytes {
        esdl.push_str(asset);
    }
    esdl.push_str(end);
    esdl
}

pub fn submission(job: Uuid, esdl: usize) -> Outgoing {
    submission_to(WORKFLOW, job, esdl)
}

pub fn submission_to(workflow: &str, job: Uuid, esdl: usize) -> Outgoing {
    let params = json!({"a number": 1.5, "a text": "value", "a list": [1, 2, 3]});
    let params = params.as_object().map(wire::protobuf_struct);
    wire::job_submission(&JobSubmission {
        uuid: job.to_string(),
        timeout_ms: None,
        workflow_type: workflow.to_owned(),
        esdl: esdl_of(esdl, job),
        params_dict: params,
        job_reference: Some("a reference".to_owned()),
        job_priority: None,
    })
}
