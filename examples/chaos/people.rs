//! Those who live through it: a client that submits and cancels, one that collects the results, and
//! workers. Each connects again, and says again what was not confirmed, for as long as it takes.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{Channel, Connection, QueueDeleteOptions};
use anyhow::Context;
use crossbeam_channel::{after, unbounded};
use omotes_orchestrator::broker::{self, Handled, Link, Publisher, Received};
use omotes_orchestrator::config::{Address, RabbitMq};
use omotes_orchestrator::threads::{Calls, Signal};
use omotes_orchestrator::wire::{
    self, DEAD_LETTERS_QUEUE, JobResult, JobSubmission, Outgoing, PIDBOX_EXCHANGE,
    TaskProgressUpdate, TaskResult, job_result,
    task_progress_update::{ProgressStatus, ProgressType},
    task_result,
};
use prost::Message as _;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::ledger::{Plan, Record};

pub const WORKFLOW: &str = "chaos";
/// The workflow of two steps, both of which are tasks of that one.
const STEPS: &str = "chaos_steps";
pub const RESULTS: &str = "omotes_task_result_events";
pub const PROGRESS: &str = "omotes_task_progress_events";
const ESDL: &str =
    "<?xml version='1.0'?><esdl:EnergySystem xmlns:esdl='http://www.tno.nl/esdl' id='in'/>";
const QUEUE_EXPIRY: Duration = Duration::from_secs(48 * 60 * 60);
/// How long the queue of a result is kept after the first one.
const QUEUE_KEPT: Duration = Duration::from_secs(20);
/// How long a task takes, and one that is too slow for its client.
const TASK: Duration = Duration::from_millis(150);
const SLOW_TASK: Duration = Duration::from_secs(4);
const SHORT_TIMEOUT_MS: u32 = 300;

/// Something that the client does at its time.
#[derive(Debug, Clone)]
pub enum Action {
    Submit(Uuid, Plan),
    Cancel(Uuid),
    /// A message that nobody can read, to one of the four queues.
    Bad(usize, Uuid),
}

/// What all of them share.
pub struct World {
    pub sdk: RabbitMq,
    pub celery: RabbitMq,
    pub records: Mutex<BTreeMap<Uuid, (Plan, Record)>>,
    /// Jobs that have been submitted and not heard of.
    pub waiting: Mutex<BTreeSet<Uuid>>,
    /// Jobs whose result has come, and when. Their queues stay for a while, for what else may come.
    heard: Mutex<VecDeque<(Instant, Uuid)>>,
    pub bad: Mutex<BTreeSet<Uuid>>,
    pub revoked: Mutex<HashSet<String>>,
    /// Tasks whose worker has died over them once.
    crashed: Mutex<HashSet<String>>,
    /// Tasks that are being computed.
    pub computing: AtomicUsize,
    /// Those of them that hold a seat, and the most that did at once.
    pub seats: Mutex<(BTreeSet<String>, usize)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn pause(time: Duration) {
    let _ = after(time).recv();
}

impl World {
    pub fn new(sdk: RabbitMq, celery: RabbitMq) -> World {
        World {
            sdk,
            celery,
            records: Mutex::default(),
            waiting: Mutex::default(),
            heard: Mutex::default(),
            bad: Mutex::default(),
            revoked: Mutex::default(),
            crashed: Mutex::default(),
            computing: AtomicUsize::new(0),
            seats: Mutex::default(),
        }
    }

    /// Counts a task that holds a seat until this is dropped. One whose job may be ended while it
    /// runs, or that RabbitMQ has given out before, is not counted: its seat may be another's.
    fn seat<'w>(&'w self, job: Uuid, task: &str) -> Option<Seat<'w>> {
        let records = lock(&self.records);
        let (plan, record) = records.get(&job)?;
        let is_alone = record.starts.get(task) == Some(&1);
        if !plan.runs_to_its_end() || !is_alone {
            return None;
        }
        let mut seats = lock(&self.seats);
        let (held, most) = &mut *seats;
        held.insert(task.to_owned());
        *most = held.len().max(*most);
        Some(Seat {
            world: self,
            task: task.to_owned(),
        })
    }

    fn note(&self, job: Uuid, change: impl FnOnce(&mut Record)) {
        if let Some((_, record)) = lock(&self.records).get_mut(&job) {
            change(record);
        }
    }

    /// Does what is on the list, each at its time, until all of it is done.
    pub fn act(&self, began: Instant, actions: &[(Duration, Action)]) {
        let mut rest = actions;
        while !rest.is_empty() {
            let result = self.act_for_a_while(began, &mut rest);
            if let Err(error) = result {
                eprintln!("client: {error:#}");
                pause(Duration::from_millis(500));
            }
        }
    }

    fn act_for_a_while(
        &self,
        began: Instant,
        rest: &mut &[(Duration, Action)],
    ) -> anyhow::Result<()> {
        let sdk = Link::open(&self.sdk, "chaos client")?;
        let celery = Link::open(&self.celery, "chaos client")?;
        sdk.declare_for_clients()?;
        celery.declare_for_workers(&[RESULTS, PROGRESS])?;
        let calls = Calls::default();
        let mut to_sdk = Publisher::new(&sdk, &calls);
        let mut to_celery = Publisher::new(&celery, &calls);
        while let Some(((time, action), later)) = rest.split_first() {
            pause(time.saturating_sub(began.elapsed()));
            match action {
                Action::Submit(job, plan) => {
                    lock(&self.records)
                        .entry(*job)
                        .or_insert_with(|| (*plan, Record::new(Instant::now())));
                    // Before the submission, as clients do, and again after a failure.
                    sdk.declare_client_queue(&wire::result_queue(*job), QUEUE_EXPIRY)?;
                    to_sdk.publish(&[wire::job_submission(&submission(*job, *plan))])?;
                    lock(&self.waiting).insert(*job);
                }
                Action::Cancel(job) => {
                    to_sdk.publish(&[wire::job_delete(*job)])?;
                }
                Action::Bad(which, mark) => {
                    let queues = [
                        wire::SUBMISSIONS_QUEUE,
                        wire::CANCELS_QUEUE,
                        RESULTS,
                        PROGRESS,
                    ];
                    let message = Outgoing {
                        exchange: "",
                        routing_key: queues[*which].to_owned(),
                        body: [b"\xff", mark.as_bytes().as_slice()].concat(),
                        ..wire::job_delete(Uuid::nil())
                    };
                    lock(&self.bad).insert(*mark);
                    match which {
                        0 | 1 => to_sdk.publish(&[message])?,
                        _ => to_celery.publish(&[message])?,
                    };
                }
            }
            *rest = later;
        }
        Ok(())
    }

    /// Collects results until the process ends.
    pub fn collect(&self) {
        loop {
            if let Err(error) = self.collect_for_a_while() {
                eprintln!("collector: {error:#}");
            }
            pause(Duration::from_millis(500));
        }
    }

    fn collect_for_a_while(&self) -> anyhow::Result<()> {
        let mut connection = open(&self.sdk)?;
        let channel = connection.open_channel(None)?;
        loop {
            let waiting: Vec<_> = lock(&self.waiting).iter().copied().collect();
            for job in waiting {
                loop {
                    let got = channel.basic_get(wire::result_queue(job), false);
                    if let Err(amiquip::Error::ServerClosedChannel { code: 404, .. }) = &got {
                        self.note(job, |record| record.lose_queue(Instant::now()));
                        lock(&self.waiting).remove(&job);
                    }
                    let Some(got) = got? else { break };
                    let result = JobResult::decode(got.delivery.body.as_slice())?;
                    let now = Instant::now();
                    self.note(job, |record| {
                        record.hear(result.result_type(), result.logs, now);
                    });
                    got.ack(&channel)?;
                    if lock(&self.waiting).remove(&job) {
                        lock(&self.heard).push_back((Instant::now(), job));
                    }
                }
            }
            // RabbitMQ takes minutes to start with thousands of queues after it was killed.
            loop {
                let old = |(at, _): &mut (Instant, Uuid)| at.elapsed() > QUEUE_KEPT;
                let Some((_, job)) = lock(&self.heard).pop_front_if(old) else {
                    break;
                };
                self.drain(&channel, job)?;
                channel.queue_delete(wire::result_queue(job), QueueDeleteOptions::default())?;
            }
            pause(Duration::from_millis(50));
        }
    }

    /// Looks once more into the queues that are left, for results that came later.
    ///
    /// # Errors
    /// The broker is gone.
    pub fn sweep(&self) -> anyhow::Result<()> {
        let mut connection = open(&self.sdk)?;
        let channel = connection.open_channel(None)?;
        let jobs: Vec<_> = lock(&self.heard).iter().map(|(_, job)| *job).collect();
        for job in jobs {
            self.drain(&channel, job)?;
        }
        Ok(())
    }

    fn drain(&self, channel: &Channel, job: Uuid) -> anyhow::Result<()> {
        while let Some(got) = channel.basic_get(wire::result_queue(job), true)? {
            let result = JobResult::decode(got.delivery.body.as_slice())?;
            let now = Instant::now();
            self.note(job, |record| {
                record.hear(result.result_type(), result.logs, now);
            });
        }
        Ok(())
    }

    /// Declares the three queues of so many jobs whose clients are idle, and keep them, as the SDK
    /// does for two days. Returns their names.
    ///
    /// # Errors
    /// The broker is gone.
    pub fn declare_idle_clients(&self, clients: usize) -> anyhow::Result<Vec<String>> {
        let sdk = Link::open(&self.sdk, "chaos idle clients")?;
        sdk.declare_for_clients()?;
        let queues: Vec<_> = (0..clients)
            .flat_map(|_| {
                let job = Uuid::new_v4();
                ["status", "progress", "result"].map(|kind| format!("jobs.{job}.{kind}"))
            })
            .collect();
        for queue in &queues {
            sdk.declare_client_queue(queue, QUEUE_EXPIRY)?;
        }
        sdk.close()?;
        Ok(queues)
    }

    /// Those of these queues of clients that are no more.
    ///
    /// # Errors
    /// The broker is gone.
    pub fn missing<'q>(&self, queues: &'q [String]) -> anyhow::Result<Vec<&'q str>> {
        let mut connection = open(&self.sdk)?;
        let mut channel = connection.open_channel(None)?;
        let mut missing = Vec::new();
        for queue in queues {
            let found = channel.queue_declare_passive(queue.as_str()).map(drop);
            match found {
                Err(amiquip::Error::ServerClosedChannel { code: 404, .. }) => {
                    missing.push(queue.as_str());
                    channel = connection.open_channel(None)?;
                }
                found => found?,
            }
        }
        Ok(missing)
    }

    /// How many messages wait in these queues of a vhost.
    ///
    /// # Errors
    /// The broker is gone, or a queue.
    pub fn depth(config: &RabbitMq, queues: &[&str]) -> anyhow::Result<u32> {
        let mut connection = open(config)?;
        let channel = connection.open_channel(None)?;
        let mut sum = 0;
        for queue in queues {
            let queue = channel.queue_declare_passive(*queue)?;
            sum += queue.declared_message_count().unwrap_or_default();
        }
        Ok(sum)
    }

    /// Takes all dead letters of a vhost: the marks in them.
    ///
    /// # Errors
    /// The broker is gone.
    pub fn dead_letters(config: &RabbitMq) -> anyhow::Result<Vec<Option<Uuid>>> {
        let mut connection = open(config)?;
        let channel = connection.open_channel(None)?;
        let mut marks = Vec::new();
        while let Some(got) = channel.basic_get(DEAD_LETTERS_QUEUE, true)? {
            let mark = got.delivery.body.get(1..);
            marks.push(mark.and_then(|mark| Uuid::from_slice(mark).ok()));
        }
        Ok(marks)
    }

    /// Hears revokes until the process ends.
    pub fn hear_revokes(&self) {
        loop {
            let heard = || {
                let link = Link::open(&self.celery, "chaos revokes")?;
                link.declare_pidbox()?;
                let queue = link.declare_private_queue(PIDBOX_EXCHANGE, "")?;
                let (_never, stopped) = Signal::pending();
                let (done, all_done) = unbounded();
                let queues = [(queue.as_str(), 100)];
                broker::consume(&link, &queues, &stopped, &all_done, |_, message| {
                    if let Ok(revoke) = serde_json::from_slice::<Value>(&message.body)
                        && let Some(task) = revoke["arguments"]["task_id"].as_str()
                    {
                        lock(&self.revoked).insert(task.to_owned());
                    }
                    let _ = done.send(Handled::Done(message.tag));
                })
            };
            if let Err(error) = heard() {
                eprintln!("revokes: {error:#}");
            }
            pause(Duration::from_millis(500));
        }
    }

    /// Works until the process ends.
    pub fn work(&self) {
        loop {
            if let Err(error) = self.work_for_a_while() {
                eprintln!(
                    "{}: {error:#}",
                    thread::current().name().unwrap_or("worker")
                );
            }
            pause(Duration::from_millis(300));
        }
    }

    fn work_for_a_while(&self) -> anyhow::Result<()> {
        let tasks = Link::open(&self.celery, "chaos tasks")?;
        let events = Link::open(&self.celery, "chaos events")?;
        events.declare_for_workers(&[RESULTS, PROGRESS])?;
        let calls = Calls::default();
        Publisher::new(&tasks, &calls).declare_task_queue(WORKFLOW)?;
        let mut publisher = Publisher::new(&events, &calls);
        let (_never, stopped) = Signal::pending();
        let (done, all_done) = unbounded();
        let queues = [(WORKFLOW, 1)];
        broker::consume(&tasks, &queues, &stopped, &all_done, |_, message| {
            self.computing.fetch_add(1, Ordering::Relaxed);
            match self.compute(&message, &mut publisher) {
                Ok(true) => {
                    let _ = done.send(Handled::Done(message.tag));
                }
                // As if the process were gone: the broker gives the task out again.
                Ok(false) => tasks.kill(),
                Err(error) => {
                    eprintln!("a worker's events: {error:#}");
                    tasks.kill();
                }
            }
            self.computing.fetch_sub(1, Ordering::Relaxed);
        })
    }

    /// Computes a task as a Celery worker would. False when the worker dies over it.
    fn compute(&self, message: &Received, publisher: &mut Publisher<'_>) -> anyhow::Result<bool> {
        let body: Value = serde_json::from_slice(&message.body)?;
        let job: Uuid = body[0][0]["__value__"]["hex"]
            .as_str()
            .context("no job id in a task")?
            .parse()?;
        let task = message.correlation_id().context("no task id")?.to_owned();
        let behaviour = body[0][3]["behaviour"].as_str().unwrap_or_default();
        let revoked = || lock(&self.revoked).contains(&task);
        if revoked() {
            return Ok(true);
        }
        let event = |progress_type| TaskProgressUpdate {
            job_id: job.to_string(),
            celery_task_id: task.clone(),
            message: "on it".to_owned(),
            celery_task_type: WORKFLOW.to_owned(),
            progress_type: Some(progress_type),
        };
        let step = body[0][3]["step"].as_u64();
        self.note(job, |record| {
            *record.starts.entry(task.clone()).or_default() += 1;
            if step == Some(2) {
                let input = body[0][2].as_str().unwrap_or_default();
                record.inputs.insert(input.to_owned());
            }
        });
        let start = event(ProgressType::Status(ProgressStatus::Start.into()));
        publisher.publish(&[wire::worker_event(PROGRESS, &start)])?;
        if behaviour == "crash" && lock(&self.crashed).insert(task.clone()) {
            return Ok(false);
        }
        let time = if behaviour == "slow" { SLOW_TASK } else { TASK };
        let _seat = self.seat(job, &task);
        let end = Instant::now() + time;
        while Instant::now() < end {
            if revoked() {
                return Ok(true);
            }
            pause(Duration::from_millis(10));
        }
        let progress = event(ProgressType::Progress(1.0));
        publisher.publish(&[wire::worker_event(PROGRESS, &progress)])?;
        let (result_type, expected) = match behaviour {
            "fail" => (
                task_result::ResultType::Error,
                job_result::ResultType::Error,
            ),
            _ => (
                task_result::ResultType::Succeeded,
                job_result::ResultType::Succeeded,
            ),
        };
        // Of steps each attempt has another one.
        let output = match step {
            None => format!("<e id='{job}'/>"),
            Some(_) => format!("<e id='{task} {}'/>", Uuid::new_v4()),
        };
        let goes_on = step == Some(1) && expected == job_result::ResultType::Succeeded;
        let result = TaskResult {
            job_id: job.to_string(),
            celery_task_id: task.clone(),
            result_type: result_type.into(),
            output_esdl: Some(output.clone()),
            logs: "done".to_owned(),
            celery_task_type: WORKFLOW.to_owned(),
            esdl_messages: Vec::new(),
        };
        // Before it is confirmed, for it may arrive without that being heard.
        self.note(job, |record| match goes_on {
            true => drop(record.outputs.insert(output)),
            false => record.delivered.push(expected),
        });
        publisher.publish(&[wire::worker_event(RESULTS, &result)])?;
        Ok(true)
    }
}

/// A task that is being computed.
struct Seat<'w> {
    world: &'w World,
    task: String,
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        lock(&self.world.seats).0.remove(&self.task);
    }
}

fn open(config: &RabbitMq) -> anyhow::Result<Connection> {
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
    let password = password.reveal();
    let url = format!("amqp://{username}:{password}@{host}:{port}/{vhost}");
    Connection::insecure_open(&url).context("connecting to RabbitMQ")
}

fn submission(job: Uuid, plan: Plan) -> JobSubmission {
    let behaviour = match plan {
        Plan::Fails => "fail",
        Plan::TooSlow => "slow",
        Plan::Crashes => "crash",
        Plan::Plain
        | Plan::Cancelled
        | Plan::UnknownWorkflow
        | Plan::Steps
        | Plan::StepsCancelled
        | Plan::FirstStepFails
        | Plan::SecondStepFails => "succeed",
    };
    let workflow = match plan {
        Plan::UnknownWorkflow => "no such workflow",
        _ if plan.has_steps() => STEPS,
        _ => WORKFLOW,
    };
    let of_step = |fails| if plan == fails { "fail" } else { "succeed" };
    let params = Map::from_iter(match plan.has_steps() {
        false => vec![("behaviour".to_owned(), behaviour.into())],
        true => vec![
            ("first".to_owned(), of_step(Plan::FirstStepFails).into()),
            ("second".to_owned(), of_step(Plan::SecondStepFails).into()),
        ],
    });
    JobSubmission {
        uuid: job.to_string(),
        timeout_ms: (plan == Plan::TooSlow).then_some(SHORT_TIMEOUT_MS),
        workflow_type: workflow.to_owned(),
        esdl: ESDL.to_owned(),
        params_dict: Some(wire::protobuf_struct(&params)),
        job_reference: Some(format!("{plan:?}")),
        job_priority: None,
    }
}
