//! Follows a job as its client.

use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow};
use crossbeam_channel::{Receiver, Sender, never, select, unbounded};
use omotes_orchestrator::broker::{self, Handled, Link, Publisher, Source};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::telemetry::report::{one_line, readable};
use omotes_orchestrator::threads::{Calls, Signal, within_deadline};
use omotes_orchestrator::wire::job_result::ResultType;
use omotes_orchestrator::wire::{
    self, JobProgressUpdate, JobResult, JobStatusUpdate, JobSubmission, Outgoing,
};
use prost::Message as _;
use uuid::Uuid;

use super::display::Display;
use super::output::Output;
use super::takers;
use crate::cli::jobs::origin::origin;
use crate::cli::{say_aside, told_of, warn};

/// How long queues without a client stay, as in the Python SDK.
const QUEUE_EXPIRY: Duration = Duration::from_secs(48 * 60 * 60);

/// How long the clean-up at RabbitMQ may take.
const CLEAN_UP_DEADLINE: Duration = Duration::from_secs(30);

enum Update {
    Status(JobStatusUpdate),
    Progress(JobProgressUpdate),
    Result(JobResult),
    /// A queue cannot be consumed any more.
    Lost(anyhow::Error),
}

/// Submits a job with its message, whose tasks go to these queues, shows its course, and returns how it ended; the output
/// ESDL goes to `output`.
/// The first signal from `interrupts` cancels the job, the next one gives up waiting for it.
/// Failures after the result has been written are only warnings.
///
/// # Errors
/// RabbitMQ is not there or refuses something, or the output could not be written and was printed.
pub(super) fn submit(
    config: &Config,
    (submission, message): (&JobSubmission, Outgoing),
    tasks: &[String],
    output: Output,
    interrupts: &Receiver<i32>,
) -> anyhow::Result<ResultType> {
    let job_id = submission.uuid.parse()?;
    let rabbitmq = &config.sdk_rabbitmq;
    let incoming = told_of("RabbitMQ", || Link::open(rabbitmq, "client, consuming"))?;
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

    if let Some(nobody) = takers::of_submissions(&incoming)? {
        warn(nobody);
    }
    let workers = takers::Workers::new(&config.celery_rabbitmq, tasks);
    let (stop, stopped) = Signal::pending();
    let (done, all_done) = unbounded();
    let (update, updates) = unbounded();
    let ended = thread::scope(|scope| {
        let spawned = thread::Builder::new()
            .name("consume-updates".to_owned())
            .spawn_scoped(scope, || {
                follow(&incoming, &queues, &stopped, &all_done, &update);
            });
        let result = spawned.context("following the job").and_then(|_| {
            let line = Line {
                updates: &updates,
                done: &done,
                interrupts,
                workers: &workers,
            };
            converse(job_id, (submission, message), &outgoing, &line)
        });
        let ended = result.and_then(|result| {
            show_result(output, &result)?;
            Ok(result.result_type())
        });
        match &ended {
            // The consumers end before their queues are deleted.
            Ok(_) => drop((stop, done)),
            Err(_) => incoming.kill(),
        }
        ended
    })?;
    clean_up(incoming, outgoing, &queues);
    Ok(ended)
}

/// Cleans up at RabbitMQ. The job has ended and its result is written, so a failure here is only a
/// warning.
fn clean_up(incoming: Link, outgoing: Link, queues: &[String]) {
    let deleted = within_deadline(
        CLEAN_UP_DEADLINE,
        || incoming.kill(),
        || {
            queues
                .iter()
                .try_for_each(|queue| incoming.delete_queue(queue))
        },
    );
    if let Err(error) = deleted {
        tell(&error.context("the job's queues could not be deleted, and go by themselves in 48 h"));
    }
    for link in [incoming, outgoing] {
        if let Err(error) = link.close_within(CLEAN_UP_DEADLINE) {
            tell(&error.context("closing the connection"));
        }
    }
}

fn tell(error: &anyhow::Error) {
    warn(&readable(&format!("{error:#}")));
}

/// What comes in while a job goes on.
struct Line<'l> {
    updates: &'l Receiver<(u64, Update)>,
    done: &'l Sender<Handled>,
    interrupts: &'l Receiver<i32>,
    workers: &'l takers::Workers,
}

/// Submits the job and shows its updates until its result.
fn converse(
    job_id: Uuid,
    (submission, message): (&JobSubmission, Outgoing),
    outgoing: &Link,
    line: &Line<'_>,
) -> anyhow::Result<JobResult> {
    let calls = Calls::default();
    let mut publisher = Publisher::new(outgoing, &calls);
    let mut send = |message: Outgoing| {
        publisher.publish(&[message])?;
        anyhow::Ok(())
    };
    send(message)?;
    let display = Display::new();
    let workflow = one_line(&submission.workflow_type);
    display.line(&format!("job {job_id} submitted to {workflow}"));
    let cancel = || send(wire::job_delete_for(job_id, &origin()));
    let result = wait(&display, line, cancel);
    display.end();
    result
}

/// Consumes the job's queues for its status, its progress and its result, until `stopped`. Each update
/// comes with the tag to send through `done`, if it is a message's.
fn follow(
    link: &Link,
    queues: &[String; 3],
    stopped: &Signal,
    done: &Receiver<Handled>,
    update: &Sender<(u64, Update)>,
) {
    let queues = queues.each_ref().map(|queue| Source::new(queue, 10));
    let consumed = broker::consume(link, &queues, stopped, done, |place, received| {
        let body = received.body.as_slice();
        let decoded = match place {
            0 => JobStatusUpdate::decode(body).map(Update::Status),
            1 => JobProgressUpdate::decode(body).map(Update::Progress),
            _ => JobResult::decode(body).map(Update::Result),
        };
        let message = decoded.unwrap_or_else(|error| Update::Lost(anyhow!(error)));
        // Nobody receives it only when nobody needs it any more.
        let _ = update.send((received.tag, message));
    });
    if let Err(error) = consumed {
        let _ = update.send((0, Update::Lost(error)));
    }
}

fn wait(
    display: &Display,
    line: &Line<'_>,
    mut cancel: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<JobResult> {
    let mut interrupts = line.interrupts.clone();
    let mut cancelled = false;
    loop {
        select! {
            recv(line.workers.news()) -> nobody => {
                if let Ok(nobody) = nobody {
                    display.line(&format!("warning: {nobody}"));
                }
            },
            recv(line.updates) -> update => {
                let (tag, update) = update?;
                match update {
                    Update::Status(update) => {
                        display.line(&format!("status {}", update.status().as_str_name()));
                        if update.status() == wire::job_status_update::JobStatus::Enqueued {
                            line.workers.look();
                        }
                    }
                    Update::Progress(update) => display.progress(update.progress, &update.message),
                    // It stays unacked until it is written.
                    Update::Result(result) => return Ok(result),
                    Update::Lost(error) => {
                        let what = "the job goes on, but cannot be followed any more";
                        return Err(error.context(what));
                    }
                }
                line.done.send(Handled::Done(tag))?;
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

/// Writes the output to where it is kept, then shows how the job ended.
fn show_result(output: Output, result: &JobResult) -> anyhow::Result<()> {
    let esdl = result
        .output_esdl
        .as_deref()
        .filter(|esdl| !esdl.is_empty());
    let (written, printed) = match (esdl, output) {
        (Some(esdl), Output::Printed) => (Ok(None), Some(esdl)),
        (Some(esdl), output) => {
            let written = output.write(esdl);
            // Better there than nowhere.
            let printed = written.is_err().then_some(esdl);
            (written, printed)
        }
        (None, _) => (Ok(None), None),
    };
    say_aside(format_args!(
        "result {}",
        result.result_type().as_str_name()
    ));
    for message in &result.esdl_messages {
        let object = message.esdl_object_id.as_ref();
        say_aside(format_args!(
            "{} {}{}",
            message.severity().as_str_name(),
            readable(&message.technical_message),
            object
                .map(|id| format!(" ({})", one_line(id)))
                .unwrap_or_default()
        ));
    }
    if !result.logs.is_empty() {
        say_aside(format_args!("logs:\n{}", readable(result.logs.trim_end())));
    }
    if let Some(esdl) = printed {
        Output::Printed.write(esdl).context("standard output")?;
    }
    let said = written.context("the output ESDL could not be written, and is printed instead")?;
    if let Some(said) = said {
        say_aside(format_args!("{said}"));
    }
    Ok(())
}
