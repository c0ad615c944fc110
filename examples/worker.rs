//! A worker that speaks the Celery worker's side of the contract, without Python: it takes tasks
//! one by one, pretends to compute for a while, reports progress and gives back the ESDL under a
//! new id. It hears revokes. Configured by the same environment variables as the orchestrator.
#![allow(
    clippy::print_stderr,
    reason = "an example's log is its standard error"
)]

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::Parser;
use crossbeam_channel::{select, unbounded};
use omotes_orchestrator::broker::{self, Handled, Link, Publisher, Received};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::esdl;
use omotes_orchestrator::threads::{Calls, Signal};
use omotes_orchestrator::wire::{
    self, PIDBOX_EXCHANGE, TaskProgressUpdate, TaskResult,
    task_progress_update::{ProgressStatus, ProgressType},
    task_result::ResultType,
};
use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use uuid::Uuid;

#[derive(Parser)]
struct Options {
    /// The workflow whose tasks to take.
    #[arg(long)]
    workflow: String,
    /// How long a task computes.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
}

const STEPS: u32 = 10;

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let config = Config::from_environment()?;
    let tasks_link = Link::open(&config.celery_rabbitmq, "worker, tasks")?;
    let events_link = Link::open(&config.task_rabbitmq, "worker, events")?;
    tasks_link.declare_pidbox()?;
    let calls = Calls::default();
    Publisher::new(&tasks_link, &calls).declare_task_queue(&options.workflow)?;
    let pidbox = tasks_link.declare_private_queue(PIDBOX_EXCHANGE, "")?;
    let mut events = Publisher::new(&events_link, &calls);

    let (stop, stopped) = Signal::pending();
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let revoked = Mutex::new(HashSet::new());
    thread::scope(|scope| {
        scope.spawn(move || {
            signals.forever().next();
            drop(stop);
        });
        scope.spawn(|| {
            let (done, all_done) = unbounded();
            let queues = [(pidbox.as_str(), 10)];
            let heard = broker::consume(&tasks_link, &queues, &stopped, &all_done, |_, message| {
                if let Some(task_id) = revoked_task(&message.body) {
                    eprintln!("task {task_id} is revoked");
                    revoked
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .insert(task_id);
                }
                let _ = done.send(Handled::Done(message.tag));
            });
            if let Err(error) = heard {
                eprintln!("revokes are no longer heard: {error:#}");
            }
        });
        let (task, tasks) = unbounded();
        let (done, all_done) = unbounded();
        let consumer_stopped = stopped.clone();
        let queue = options.workflow.as_str();
        let link = &tasks_link;
        scope.spawn(move || {
            let queues = [(queue, 1)];
            let consumed = broker::consume(link, &queues, &consumer_stopped, &all_done, |_, it| {
                let _ = task.send(it);
            });
            if let Err(error) = consumed {
                eprintln!("tasks are no longer taken: {error:#}");
            }
        });
        eprintln!("waiting for tasks of {queue}");
        let is_revoked = |task_id: &str| {
            revoked
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .contains(task_id)
        };
        let mut work = || {
            loop {
                let message = select! {
                    recv(tasks) -> message => message.context("no more tasks come")?,
                    recv(stopped.receiver()) -> _ => return Ok(()),
                };
                match run_task(
                    &options,
                    &config,
                    &message,
                    &mut events,
                    &stopped,
                    is_revoked,
                )? {
                    Ending::Done => done.send(Handled::Done(message.tag))?,
                    Ending::Stopped => return anyhow::Ok(()),
                }
            }
        };
        let outcome = work();
        // Frees the two consumers, which would wait for what they gave out.
        tasks_link.kill();
        outcome
    })
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

fn run_task(
    options: &Options,
    config: &Config,
    message: &Received,
    events: &mut Publisher<'_>,
    stopped: &Signal,
    is_revoked: impl Fn(&str) -> bool,
) -> anyhow::Result<Ending> {
    let task_id = message.correlation_id().context("a task without an id")?;
    let body: Value = serde_json::from_slice(&message.body)?;
    let [job, _, Value::String(esdl), _] = body[0].as_array().map_or(&[][..], Vec::as_slice) else {
        return Err(anyhow!(
            "task {task_id} does not have the four arguments of a job"
        ));
    };
    let job_id: Uuid = job["__value__"]["hex"]
        .as_str()
        .context("the job id")?
        .parse()?;
    if is_revoked(task_id) {
        return Ok(Ending::Done);
    }
    eprintln!("task {task_id} of job {job_id}");
    let mut progress = |progress_type, text: &str| {
        let update = TaskProgressUpdate {
            job_id: job_id.to_string(),
            celery_task_id: task_id.to_owned(),
            message: text.to_owned(),
            celery_task_type: options.workflow.clone(),
            progress_type: Some(progress_type),
        };
        publish(
            events,
            wire::worker_event(&config.task_progress_queue, &update),
        )
    };
    let start = ProgressType::Status(ProgressStatus::Start.into());
    progress(start, "Started job at worker.")?;
    for step in 1..STEPS {
        let pause = Duration::from_secs_f64(options.seconds / f64::from(STEPS));
        if stopped.comes_within(pause) {
            return Ok(Ending::Stopped);
        }
        if is_revoked(task_id) {
            return Ok(Ending::Done);
        }
        let fraction = f64::from(step) / f64::from(STEPS);
        let text = format!("Step {step} of {STEPS}.");
        progress(ProgressType::Progress(fraction), &text)?;
    }
    progress(ProgressType::Progress(1.0), "Calculation finished.")?;
    let output_esdl = match esdl::energy_system_id(esdl) {
        Some(id) => esdl.replacen(&id, &Uuid::new_v4().to_string(), 1),
        None => esdl.clone(),
    };
    let result = TaskResult {
        job_id: job_id.to_string(),
        celery_task_id: task_id.to_owned(),
        result_type: ResultType::Succeeded.into(),
        output_esdl: Some(output_esdl),
        logs: format!("Computed for {} seconds.", options.seconds),
        celery_task_type: options.workflow.clone(),
        esdl_messages: Vec::new(),
    };
    publish(
        events,
        wire::worker_event(&config.task_result_queue, &result),
    )?;
    Ok(Ending::Done)
}

fn publish(publisher: &mut Publisher<'_>, message: wire::Outgoing) -> anyhow::Result<()> {
    publisher.publish(&[message])?;
    Ok(())
}
