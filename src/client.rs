//! A small client: submits one job and follows it to its end, as an SDK client would.
#![allow(
    clippy::print_stdout,
    reason = "what a command says goes to standard output"
)]

use std::convert::Infallible;
use std::fs;
use std::io::{IsTerminal, stdout};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow};
use crossbeam_channel::{Receiver, Sender, bounded, never, select, unbounded};
use indicatif::{ProgressBar, ProgressStyle};
use prost::Message as _;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::broker::{self, Handled, Link, Publisher};
use crate::busy::Busy;
use crate::config;
use crate::wire::{
    self, JobProgressUpdate, JobResult, JobStatusUpdate, JobSubmission, Outgoing,
    job_result::ResultType, job_submission::JobPriority,
};

/// How long queues without a client stay, as in the Python SDK.
const QUEUE_EXPIRY: Duration = Duration::from_secs(48 * 60 * 60);

/// A job to submit.
#[derive(Debug)]
pub struct Order {
    pub esdl: String,
    pub workflow: String,
    pub params: Map<String, Value>,
    pub reference: Option<String>,
    pub priority: JobPriority,
    /// How long the job may run.
    pub timeout: Option<Duration>,
    /// Where the output ESDL goes; standard output otherwise.
    pub output: Option<PathBuf>,
}

enum Update {
    Status(JobStatusUpdate),
    Progress(JobProgressUpdate),
    Result(JobResult),
    /// A queue cannot be consumed any more.
    Lost(anyhow::Error),
}

/// Submits `order`, shows what becomes of it, and returns how it ended. The first thing that comes
/// through `interrupts` cancels the job, the next one gives up waiting for it.
///
/// # Errors
/// RabbitMQ is not there or refuses something, or the output cannot be written.
pub fn submit(
    rabbitmq: &config::RabbitMq,
    order: &Order,
    interrupts: &Receiver<i32>,
) -> anyhow::Result<ResultType> {
    let job_id = Uuid::new_v4();
    let submission = JobSubmission {
        uuid: job_id.to_string(),
        timeout_ms: order
            .timeout
            .map(|timeout| u32::try_from(timeout.as_millis()))
            .transpose()
            .context("the timeout is above 49 days")?,
        workflow_type: order.workflow.clone(),
        esdl: order.esdl.clone(),
        params_dict: Some(wire::protobuf_struct(&order.params)),
        job_reference: order.reference.clone(),
        job_priority: Some(order.priority.into()),
    };
    let incoming = Link::open(rabbitmq, "client, consuming")?;
    let outgoing = Link::open(rabbitmq, "client, publishing")?;
    incoming.declare_for_clients()?;
    let queues = [
        wire::status_queue(job_id),
        wire::progress_queue(job_id),
        wire::result_queue(job_id),
    ];
    for queue in &queues {
        incoming.declare_client_queue(queue, QUEUE_EXPIRY)?;
    }

    // Nobody stops the consumers: they end with their queues, or with the connection.
    let (_never, stopped) = bounded::<Infallible>(0);
    let (update, updates) = unbounded();
    let result = thread::scope(|scope| {
        let follow_all = || {
            thread::Builder::new()
                .name("consume-updates".to_owned())
                .spawn_scoped(scope, || follow(&incoming, &queues, &stopped, &update))?;
            let result = converse(job_id, &submission, &outgoing, &updates, interrupts)?;
            queues
                .iter()
                .try_for_each(|queue| incoming.delete_queue(queue))?;
            Ok(result)
        };
        let result: anyhow::Result<JobResult> = follow_all();
        if result.is_err() {
            incoming.kill();
        }
        result
    })?;
    incoming.close()?;
    outgoing.close()?;
    show_result(order, &result)?;
    Ok(result.result_type())
}

/// Submits the job and shows what is heard of it until its result.
fn converse(
    job_id: Uuid,
    submission: &JobSubmission,
    outgoing: &Link,
    updates: &Receiver<Update>,
    interrupts: &Receiver<i32>,
) -> anyhow::Result<JobResult> {
    let busy = Busy::default();
    let mut publisher = Publisher::new(outgoing, &busy);
    let mut send = |message: Outgoing| {
        publisher.publish(&[message])?;
        anyhow::Ok(())
    };
    send(wire::job_submission(submission))?;
    let display = Display::new();
    display.line(&format!(
        "job {job_id} submitted to {}",
        submission.workflow_type
    ));
    let cancel = || send(wire::job_delete(job_id));
    let result = wait(&display, updates, interrupts, cancel);
    display.bar.finish_and_clear();
    result
}

/// Consumes the job's queues for its status, its progress and its result.
fn follow(
    link: &Link,
    queues: &[String; 3],
    stopped: &Receiver<Infallible>,
    update: &Sender<Update>,
) {
    let (done, all_done) = unbounded();
    let queues = queues.each_ref().map(|queue| (queue.as_str(), 10));
    let consumed = broker::consume(link, &queues, stopped, &all_done, |place, received| {
        let body = received.body.as_slice();
        let decoded = match place {
            0 => JobStatusUpdate::decode(body).map(Update::Status),
            1 => JobProgressUpdate::decode(body).map(Update::Progress),
            _ => JobResult::decode(body).map(Update::Result),
        };
        let message = decoded.unwrap_or_else(|error| Update::Lost(anyhow!(error)));
        // Nobody listens any more only when nobody wants to know any more.
        let _ = done.send(Handled::Done(received.tag));
        let _ = update.send(message);
    });
    if let Err(error) = consumed {
        let _ = update.send(Update::Lost(error));
    }
}

fn wait(
    display: &Display,
    updates: &Receiver<Update>,
    interrupts: &Receiver<i32>,
    mut cancel: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<JobResult> {
    let mut interrupts = interrupts.clone();
    let mut cancelled = false;
    loop {
        select! {
            recv(updates) -> update => match update? {
                Update::Status(update) => {
                    display.line(&format!("status {}", update.status().as_str_name()));
                }
                Update::Progress(update) => display.progress(update.progress, &update.message),
                Update::Result(result) => return Ok(result),
                Update::Lost(error) => {
                    return Err(error.context("the job goes on, but cannot be followed any more"));
                }
            },
            recv(interrupts) -> signal => {
                if signal.is_err() {
                    interrupts = never();
                } else if cancelled {
                    return Err(anyhow!("gave up waiting for the cancelled job"));
                } else {
                    cancelled = true;
                    display.line("cancelling the job; once more gives up waiting for it");
                    cancel()?;
                }
            },
        }
    }
}

/// A progress bar on a terminal, plain lines elsewhere.
struct Display {
    bar: ProgressBar,
}

impl Display {
    fn new() -> Display {
        if !stdout().is_terminal() {
            return Display {
                bar: ProgressBar::hidden(),
            };
        }
        let bar = ProgressBar::new(1000);
        let style = ProgressStyle::with_template("{bar:40} {percent:>3} % {elapsed} {msg}")
            .expect("a template without faults");
        bar.set_style(style);
        bar.enable_steady_tick(Duration::from_millis(200));
        Display { bar }
    }

    fn line(&self, text: &str) {
        if self.bar.is_hidden() {
            println!("{text}");
        } else {
            self.bar.println(text);
        }
    }

    fn progress(&self, fraction: f64, message: &str) {
        if self.bar.is_hidden() {
            println!("progress {:.0} % {message}", fraction * 100.0);
        } else {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "clamped to what the bar has"
            )]
            self.bar
                .set_position((fraction.clamp(0.0, 1.0) * 1000.0) as u64);
            self.bar.set_message(message.to_owned());
        }
    }
}

fn show_result(order: &Order, result: &JobResult) -> anyhow::Result<()> {
    println!("result {}", result.result_type().as_str_name());
    for message in &result.esdl_messages {
        println!(
            "{} {}{}",
            message.severity().as_str_name(),
            message.technical_message,
            message
                .esdl_object_id
                .as_ref()
                .map(|id| format!(" ({id})"))
                .unwrap_or_default()
        );
    }
    if !result.logs.is_empty() {
        println!("logs:\n{}", result.logs.trim_end());
    }
    match (result.output_esdl.as_deref(), &order.output) {
        (None | Some(""), _) => {}
        (Some(esdl), Some(path)) => {
            fs::write(path, esdl).with_context(|| path.display().to_string())?;
            println!("output ESDL: {} ({} bytes)", path.display(), esdl.len());
        }
        (Some(esdl), None) => println!("{esdl}"),
    }
    Ok(())
}
