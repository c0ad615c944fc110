//! Follows a job as its client.

use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow};
use crossbeam_channel::{Receiver, Sender, after, never, select, unbounded};
use omotes_orchestrator::broker::{self, Handled, Link, Publisher, Source};
use omotes_orchestrator::config::{Config, RabbitMq};
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

/// How long a lost connection is tried again: RabbitMQ may be restarted, or its machine.
const RECONNECT_PATIENCE: Duration = Duration::from_mins(15);
/// Between two attempts.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_secs(5);

enum Update {
    Status(JobStatusUpdate),
    Progress(JobProgressUpdate),
    Result(JobResult),
    /// A queue cannot be consumed for now.
    Lost(anyhow::Error),
    /// What has come cannot be read.
    Unreadable(anyhow::Error),
}

/// What has been heard last through a connection.
enum Heard {
    Result(JobResult),
    Lost(anyhow::Error),
}

/// What became of following through a connection.
enum Course {
    /// The output is written.
    Ended(ResultType),
    Lost(anyhow::Error),
}

/// The connections of a client.
struct Links {
    incoming: Link,
    outgoing: Link,
}

impl Links {
    fn open(rabbitmq: &RabbitMq) -> anyhow::Result<Links> {
        Ok(Links {
            incoming: Link::open(rabbitmq, "client, consuming")?,
            outgoing: Link::open(rabbitmq, "client, publishing")?,
        })
    }

    fn send(&self, message: Outgoing) -> anyhow::Result<()> {
        let calls = Calls::default();
        Publisher::new(&self.outgoing, &calls).publish(&[message])?;
        Ok(())
    }
}

/// Submits a job with its message, whose tasks go to these queues, shows its course, and returns how it ended; the output
/// ESDL goes to `output`. A connection that is lost is opened again.
/// The first signal from `interrupts` cancels the job, the next one gives up waiting for it.
/// Failures after the result has been written are only warnings.
///
/// # Errors
/// RabbitMQ is not there, or away for too long, or refuses something, or the output could not be written and
/// was printed.
pub(super) fn submit(
    config: &Config,
    (submission, message): (&JobSubmission, Outgoing),
    tasks: &[String],
    output: Output,
    interrupts: &Receiver<i32>,
) -> anyhow::Result<ResultType> {
    let job_id = submission.uuid.parse()?;
    let queues = [
        wire::status_queue(job_id),
        wire::progress_queue(job_id),
        wire::result_queue(job_id),
    ];
    let mut links = told_of("RabbitMQ", || Links::open(&config.sdk_rabbitmq))?;
    links.incoming.declare_for_clients()?;
    for queue in &queues {
        links.incoming.declare_client_queue(queue, QUEUE_EXPIRY)?;
    }
    if let Some(nobody) = takers::of_submissions(&links.incoming)? {
        warn(nobody);
    }
    links.send(message)?;
    let display = Display::new();
    let workflow = one_line(&submission.workflow_type);
    display.line(&format!("job {job_id} submitted to {workflow}"));
    let mut follower = Follower {
        job_id,
        queues,
        display,
        workers: takers::Workers::new(&config.celery_rabbitmq, tasks),
        interrupts: interrupts.clone(),
        is_cancelled: false,
        owes_cancel: false,
        output: Some(output),
    };
    let ended = loop {
        let course = follower.follow(&links);
        let again = match course {
            Ok(Course::Ended(result)) => break Ok(result),
            Ok(Course::Lost(error)) => follower.reconnect(config, &error),
            Err(error) => Err(error),
        };
        match again {
            Ok(opened) => links = opened,
            Err(error) => break Err(error),
        }
    };
    follower.display.end();
    let ended = ended?;
    clean_up(links, &follower.queues);
    Ok(ended)
}

/// Cleans up at RabbitMQ. The job has ended and its result is written, so a failure here is only a
/// warning.
fn clean_up(links: Links, queues: &[String]) {
    let Links { incoming, outgoing } = links;
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

/// What lasts from one connection to the next.
struct Follower {
    job_id: Uuid,
    queues: [String; 3],
    display: Display,
    workers: takers::Workers,
    interrupts: Receiver<i32>,
    is_cancelled: bool,
    /// RabbitMQ could not be told of the cancel yet.
    owes_cancel: bool,
    /// Taken once the result is there.
    output: Option<Output>,
}

impl Follower {
    /// Follows the job through these connections, to its end or theirs.
    fn follow(&mut self, links: &Links) -> anyhow::Result<Course> {
        let (stop, stopped) = Signal::pending();
        let (done, all_done) = unbounded();
        let (update, updates) = unbounded();
        let queues = self.queues.clone();
        thread::scope(|scope| {
            let spawned = thread::Builder::new()
                .name("consume-updates".to_owned())
                .spawn_scoped(scope, || {
                    consume(&links.incoming, &queues, &stopped, &all_done, &update);
                });
            let heard = spawned.context("following the job");
            let heard = heard.and_then(|_| self.listen(links, &updates, &done));
            let course = heard.and_then(|heard| match heard {
                Heard::Result(result) => {
                    self.display.end();
                    show_result(self.output.take().unwrap_or(Output::Printed), &result)?;
                    Ok(Course::Ended(result.result_type()))
                }
                Heard::Lost(error) => Ok(Course::Lost(error)),
            });
            match &course {
                // The consumers end before their queues are deleted.
                Ok(Course::Ended(_)) => drop((stop, done)),
                Ok(Course::Lost(_)) | Err(_) => {
                    links.incoming.kill();
                    links.outgoing.kill();
                }
            }
            course
        })
    }

    /// Shows what comes, until the result, which stays unacked until it is written.
    fn listen(
        &mut self,
        links: &Links,
        updates: &Receiver<(u64, Update)>,
        done: &Sender<Handled>,
    ) -> anyhow::Result<Heard> {
        loop {
            if self.owes_cancel {
                if let Err(error) = links.send(wire::job_delete_for(self.job_id, &origin())) {
                    return Ok(Heard::Lost(error));
                }
                self.owes_cancel = false;
            }
            let interrupts = self.interrupts.clone();
            select! {
                recv(self.workers.news()) -> nobody => {
                    if let Ok(nobody) = nobody {
                        self.display.line(&format!("warning: {nobody}"));
                    }
                },
                recv(updates) -> update => {
                    let (tag, update) = update?;
                    match update {
                        Update::Status(update) => self.show_status(&update),
                        Update::Progress(update) => {
                            self.display.progress(update.progress, &update.message);
                        }
                        Update::Result(result) => return Ok(Heard::Result(result)),
                        Update::Lost(error) => return Ok(Heard::Lost(error)),
                        Update::Unreadable(error) => return Err(self.left_alone(error)),
                    }
                    done.send(Handled::Done(tag))?;
                },
                recv(interrupts) -> signal => self.interrupted(signal.is_ok())?,
            }
        }
    }

    fn show_status(&self, update: &JobStatusUpdate) {
        let status = update.status();
        self.display
            .line(&format!("status {}", status.as_str_name()));
        if status == wire::job_status_update::JobStatus::Enqueued {
            self.workers.look();
        }
    }

    /// Somebody has pressed Ctrl-C, or nobody can any more.
    fn interrupted(&mut self, by_somebody: bool) -> anyhow::Result<()> {
        if !by_somebody {
            self.interrupts = never();
        } else if self.is_cancelled {
            return Err(self.left_alone(anyhow!("gave up waiting for the job")));
        } else {
            (self.is_cancelled, self.owes_cancel) = (true, true);
            self.display
                .line("cancelling the job; once more gives up waiting for it");
        }
        Ok(())
    }

    /// Opens the connections again, as soon as RabbitMQ lets it.
    fn reconnect(&mut self, config: &Config, lost: &anyhow::Error) -> anyhow::Result<Links> {
        let lost = one_line(&format!("{lost:#}"));
        self.display.line(&format!(
            "the job goes on, and is followed again as soon as RabbitMQ answers: {lost}"
        ));
        let patience = after(RECONNECT_PATIENCE);
        let mut pause = FIRST_PAUSE;
        loop {
            let interrupts = self.interrupts.clone();
            select! {
                recv(interrupts) -> signal => {
                    self.interrupted(signal.is_ok())?;
                    continue;
                },
                recv(patience) -> _ => {
                    return Err(self.left_alone(anyhow!("RabbitMQ does not answer: {lost}")));
                },
                recv(after(pause)) -> _ => pause = (pause * 2).min(LAST_PAUSE),
            }
            let Ok(links) = Links::open(&config.sdk_rabbitmq) else {
                continue;
            };
            let names = self.queues.each_ref().map(String::as_str);
            match links.incoming.depths_in_time(&names) {
                Ok(depths) if depths.iter().all(Option::is_some) => {
                    self.display.line("RabbitMQ answers again");
                    return Ok(links);
                }
                Ok(_) => {
                    let why = left(self.job_id, self.owes_cancel, false);
                    let gone = anyhow!("the job's queues are gone from RabbitMQ");
                    return Err(gone.context(why));
                }
                Err(_) => {}
            }
        }
    }

    /// Why the job is followed no further, while its queues are there.
    fn left_alone(&self, why: anyhow::Error) -> anyhow::Error {
        why.context(left(self.job_id, self.owes_cancel, true))
    }
}

/// That a job is followed no further, and how to learn what becomes of it; of a cancel that RabbitMQ was not
/// told of, how to do it.
fn left(job_id: Uuid, owes_cancel: bool, has_queues: bool) -> String {
    let mut text =
        format!("job {job_id} is followed no further: `jobs show {job_id}` says how it does");
    if owes_cancel {
        text += &format!(
            "; it was NOT cancelled, as RabbitMQ could not be told: `jobs cancel {job_id}` cancels it"
        );
    }
    if has_queues {
        let queue = wire::result_queue(job_id);
        text += &format!("; its result stays in the queue {queue} for 48 h");
    }
    text
}

/// Consumes the job's queues for its status, its progress and its result, until `stopped`. Each update
/// comes with the tag to send through `done`, if it is a message's.
fn consume(
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
        let message = decoded.unwrap_or_else(|error| Update::Unreadable(anyhow!(error)));
        // Nobody receives it only when nobody needs it any more.
        let _ = update.send((received.tag, message));
    });
    if let Err(error) = consumed {
        let _ = update.send((0, Update::Lost(error)));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_leaves_a_job_is_told_what_it_is_left_to() {
        let id = Uuid::nil();
        let [cancel, stays] = [
            format!("NOT cancelled, as RabbitMQ could not be told: `jobs cancel {id}`"),
            wire::result_queue(id),
        ];
        for owes_cancel in [false, true] {
            for has_queues in [false, true] {
                let text = left(id, owes_cancel, has_queues);
                assert!(text.contains(&format!("`jobs show {id}`")), "{text}");
                assert_eq!(text.contains(&cancel), owes_cancel, "{text}");
                assert_eq!(text.contains(&stays), has_queues, "{text}");
                assert_eq!(text.contains("48 h"), has_queues, "{text}");
            }
        }
    }
}
