//! A worker that speaks the Celery worker's side of the contract, without Python: it takes tasks
//! one by one, pretends to compute for a while, reports progress and gives back the ESDL under a
//! new id. It hears revokes, and connects again when it loses RabbitMQ. Configured by the same
//! environment variables and `.env` file as the orchestrator. A job says what is to become of its
//! task by the parameters `outcome` (`succeed`, `fail`, or `crash`: the process dies) and `seconds`.
#![allow(
    clippy::print_stderr,
    reason = "an example's log is its standard error"
)]

use std::collections::HashSet;
use std::path::Path;
use std::process;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use crossbeam_channel::{select, unbounded};
use omotes_orchestrator::broker::{self, Handled, Link, Publisher, Received, Source};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::config::environment::Environment;
use omotes_orchestrator::domain::esdl;
use omotes_orchestrator::threads::{Calls, Signal};
use omotes_orchestrator::wire::{
    self, PIDBOX_EXCHANGE, TaskProgressUpdate, TaskResult,
    task_progress_update::{ProgressStatus, ProgressType},
    task_result::ResultType,
};
use serde::Deserialize;
use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use uuid::Uuid;

#[derive(Parser)]
struct Options {
    /// The Celery task to take: a workflow, or one of its steps.
    #[arg(long)]
    workflow: String,
    /// How long a task computes whose job does not say it.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
}

const PARTS: u32 = 10;
/// Between attempts to connect.
const RETRY: Duration = Duration::from_secs(2);

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let config = Environment::with_file(Path::new(".env"))?.config()?;
    let (stop, stopped) = Signal::pending();
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    thread::spawn(move || {
        signals.forever().next();
        drop(stop);
    });
    while let Err(error) = work(&options, &config, &stopped) {
        eprintln!("{error:#}; it connects again");
        if stopped.comes_within(RETRY) {
            break;
        }
    }
    Ok(())
}

/// Takes tasks until the worker is to stop or loses RabbitMQ.
fn work(options: &Options, config: &Config, stopped: &Signal) -> anyhow::Result<()> {
    let tasks_link = Link::open(&config.celery_rabbitmq, "worker, tasks")?;
    let events_link = Link::open(&config.task_rabbitmq, "worker, events")?;
    tasks_link.declare_pidbox()?;
    let calls = Calls::default();
    Publisher::new(&tasks_link, &calls).declare_task_queue(&options.workflow)?;
    let pidbox = tasks_link.declare_private_queue(PIDBOX_EXCHANGE, "")?;
    let mut events = Publisher::new(&events_link, &calls);
    let revoked = Revoked::default();
    thread::scope(|scope| {
        scope.spawn(|| hear_revokes(&tasks_link, &pidbox, &revoked, stopped));
        let (task, tasks) = unbounded();
        let (done, all_done) = unbounded();
        let queue = options.workflow.as_str();
        let (link, consumer_stopped) = (&tasks_link, stopped.clone());
        scope.spawn(move || {
            let queues = [Source::new(queue, 1)];
            let consumed = broker::consume(link, &queues, &consumer_stopped, &all_done, |_, it| {
                let _ = task.send(it);
            });
            if let Err(error) = consumed
                && !consumer_stopped.is_given()
            {
                eprintln!("tasks are no longer taken: {error:#}");
            }
        });
        eprintln!("waiting for tasks of {queue}");
        let mut take = || {
            loop {
                let message = select! {
                    recv(tasks) -> message => message.context("no more tasks come")?,
                    recv(stopped.receiver()) -> _ => return Ok(()),
                };
                let task = Task::read(&message, options)?;
                match task.run(options, config, &mut events, stopped, &revoked)? {
                    Ending::Done => done.send(Handled::Done(message.tag))?,
                    Ending::Stopped => return anyhow::Ok(()),
                }
            }
        };
        let outcome = take();
        // Frees the two consumers, which would wait for what they gave out.
        tasks_link.kill();
        outcome
    })
}

/// The ids of the tasks that are revoked.
#[derive(Default)]
struct Revoked(Mutex<HashSet<String>>);

impl Revoked {
    fn add(&self, task_id: String) {
        self.lock().insert(task_id);
    }

    fn has(&self, task_id: &str) -> bool {
        self.lock().contains(task_id)
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hears revokes until the connection is killed: `consume` would wait for its own `done` after a stop.
fn hear_revokes(link: &Link, queue: &str, revoked: &Revoked, stopped: &Signal) {
    let (_never, not_stopped) = Signal::pending();
    let (done, all_done) = unbounded();
    let heard = broker::consume(
        link,
        &[Source::new(queue, 10)],
        &not_stopped,
        &all_done,
        |_, message| {
            if let Some(task_id) = revoked_task(&message.body) {
                eprintln!("task {task_id} is revoked");
                revoked.add(task_id);
            }
            let _ = done.send(Handled::Done(message.tag));
        },
    );
    if let Err(error) = heard
        && !stopped.is_given()
    {
        eprintln!("revokes are no longer heard: {error:#}");
    }
}

enum Ending {
    Done,
    /// The worker is to stop; the task goes back to its queue.
    Stopped,
}

fn revoked_task(body: &[u8]) -> Option<String> {
    let message: Value = serde_json::from_slice(body).ok()?;
    (message["method"] == "revoke")
        .then(|| message["arguments"]["task_id"].as_str().map(str::to_owned))?
}

/// A task of a job.
struct Task {
    id: String,
    job: Uuid,
    esdl: String,
    seconds: f64,
    wish: Wish,
}

/// What is to become of a task.
#[derive(Deserialize, Default, Clone, Copy, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Wish {
    #[default]
    Succeed,
    Fail,
    Crash,
}

impl Task {
    fn read(message: &Received, options: &Options) -> anyhow::Result<Task> {
        let id = message.correlation_id().context("a task without an id")?;
        let body: Value = serde_json::from_slice(&message.body)?;
        let arguments = body[0].as_array().map_or(&[][..], Vec::as_slice);
        let [job, _, Value::String(esdl), parameters] = arguments else {
            bail!("task {id} does not have the four arguments of a job");
        };
        let job = job["__value__"]["hex"].as_str().context("the job id")?;
        Ok(Task {
            id: id.to_owned(),
            job: job.parse()?,
            esdl: esdl.clone(),
            seconds: parameters["seconds"].as_f64().unwrap_or(options.seconds),
            wish: Wish::deserialize(&parameters["outcome"]).unwrap_or_default(),
        })
    }

    fn run(
        &self,
        options: &Options,
        config: &Config,
        events: &mut Publisher<'_>,
        stopped: &Signal,
        revoked: &Revoked,
    ) -> anyhow::Result<Ending> {
        if revoked.has(&self.id) {
            return Ok(Ending::Done);
        }
        eprintln!("task {} of job {}", self.id, self.job);
        let mut progress = |progress_type, text: &str| {
            let update = TaskProgressUpdate {
                job_id: self.job.to_string(),
                celery_task_id: self.id.clone(),
                message: text.to_owned(),
                celery_task_type: options.workflow.clone(),
                progress_type: Some(progress_type),
            };
            let event = wire::worker_event(&config.task_progress_queue, &update);
            publish(events, event)
        };
        let start = ProgressType::Status(ProgressStatus::Start.into());
        progress(start, "Started job at worker.")?;
        for part in 1..PARTS {
            let pause = Duration::from_secs_f64(self.seconds.clamp(0.0, 1e6) / f64::from(PARTS));
            if stopped.comes_within(pause) {
                return Ok(Ending::Stopped);
            }
            if revoked.has(&self.id) {
                return Ok(Ending::Done);
            }
            let fraction = f64::from(part) / f64::from(PARTS);
            let text = format!("Part {part} of {PARTS}.");
            progress(ProgressType::Progress(fraction), &text)?;
            if self.wish == Wish::Crash && part == PARTS / 2 {
                eprintln!("crashing, as the job asks for");
                process::abort();
            }
        }
        progress(ProgressType::Progress(1.0), "Calculation finished.")?;
        let result = self.result(options);
        let event = wire::worker_event(&config.task_result_queue, &result);
        publish(events, event)?;
        Ok(Ending::Done)
    }

    /// The same ESDL, under a new id; or none.
    fn result(&self, options: &Options) -> TaskResult {
        let output_esdl = match esdl::energy_system_id(&self.esdl) {
            Some(id) => self.esdl.replacen(&id, &Uuid::new_v4().to_string(), 1),
            None => self.esdl.clone(),
        };
        let fails = self.wish == Wish::Fail;
        TaskResult {
            job_id: self.job.to_string(),
            celery_task_id: self.id.clone(),
            result_type: if fails {
                ResultType::Error
            } else {
                ResultType::Succeeded
            }
            .into(),
            output_esdl: (!fails).then_some(output_esdl),
            logs: match fails {
                true => format!(
                    "Failed after {} seconds, as the job asks for.",
                    self.seconds
                ),
                false => format!("Computed for {} seconds.", self.seconds),
            },
            celery_task_type: options.workflow.clone(),
            esdl_messages: Vec::new(),
        }
    }
}

fn publish(publisher: &mut Publisher<'_>, message: wire::Outgoing) -> anyhow::Result<()> {
    publisher.publish(&[message])?;
    Ok(())
}
