//! A small client: submits one job and follows it to its end, as an SDK client would.
#![allow(
    clippy::print_stdout,
    reason = "what a command says goes to standard output"
)]

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, IsTerminal, Write, stdout};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use crossbeam_channel::{Receiver, Sender, never, select, unbounded};
use indicatif::{ProgressBar, ProgressStyle};
use prost::Message as _;
use serde_json::{Map, Value};
use tempfile::NamedTempFile;
use uuid::Uuid;

use crate::broker::{self, Handled, Link, Publisher};
use crate::config;
use crate::telemetry::report::{one_line, percent, readable};
use crate::threads::{Calls, Signal, within_deadline};
use crate::wire::{
    self, JobProgressUpdate, JobResult, JobStatusUpdate, JobSubmission, Outgoing,
    job_result::ResultType, job_submission::JobPriority,
};

/// How long queues without a client stay, as in the Python SDK.
const QUEUE_EXPIRY: Duration = Duration::from_secs(48 * 60 * 60);
/// How long it may take to leave nothing behind at RabbitMQ.
const CLEAN_UP_DEADLINE: Duration = Duration::from_secs(30);

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
}

impl Order {
    fn submission(&self, job_id: Uuid) -> anyhow::Result<JobSubmission> {
        Ok(JobSubmission {
            uuid: job_id.to_string(),
            timeout_ms: self
                .timeout
                .map(|timeout| u32::try_from(timeout.as_millis()))
                .transpose()
                .context("the timeout is above 49 days")?,
            workflow_type: self.workflow.clone(),
            esdl: self.esdl.clone(),
            params_dict: Some(wire::protobuf_struct(&self.params)),
            job_reference: self.reference.clone(),
            job_priority: Some(self.priority.into()),
        })
    }
}

/// Where an output ESDL goes, and can go: that is certain before there is one.
#[derive(Debug)]
pub enum Output {
    /// Standard output, after all else.
    Printed,
    /// A new file that takes the place of what is at `path` as a whole, and only once it is complete.
    File { path: PathBuf, new: NamedTempFile },
    /// What cannot be replaced: a pipe, a device, a file in a folder where no other can be made.
    Inside { path: PathBuf, file: File },
}

impl Output {
    /// # Errors
    /// There is no such folder, or nothing can be written there; the error names the path.
    pub fn to(path: &Path) -> anyhow::Result<Output> {
        Output::open(path).with_context(|| path.display().to_string())
    }

    fn open(path: &Path) -> anyhow::Result<Output> {
        // Opened once more, it would be written from its beginning where the shell has sent it to a file.
        let standard_output = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"];
        if standard_output.iter().any(|one| path == Path::new(one)) {
            return Ok(Output::Printed);
        }
        let given = path.to_owned();
        let old = fs::metadata(path).ok();
        if old.as_ref().is_some_and(fs::Metadata::is_dir) {
            bail!("it is a folder");
        }
        // /dev/fd/3 is a regular file where the shell has sent it to one.
        let is_file = old.as_ref().is_none_or(fs::Metadata::is_file) && !is_of_the_system(path);
        if !is_file {
            let file = OpenOptions::new().append(true).open(path)?;
            return Ok(Output::Inside { path: given, file });
        }
        // Whoever has put a link there wants it kept.
        let place = match &old {
            Some(_) => fs::canonicalize(path)?,
            None => given.clone(),
        };
        let folder = match place.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            Some(_) | None => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(".").suffix(".part");
        #[cfg(unix)]
        builder.permissions(permissions(old.as_ref()));
        match (builder.tempfile_in(folder), &old) {
            (Ok(new), Some(_)) => {
                // That it can be written is no matter of its folder.
                OpenOptions::new().append(true).open(&place)?;
                Ok(Output::File { path: place, new })
            }
            (Ok(new), None) => Ok(Output::File { path: place, new }),
            (Err(_), Some(_)) => Ok(Output::Inside {
                file: OpenOptions::new().write(true).open(&place)?,
                path: given,
            }),
            // The error of the file itself, which does not name another.
            (Err(_), None) => {
                let opened = OpenOptions::new().write(true).create_new(true).open(&place);
                drop(opened?);
                fs::remove_file(&place)?;
                bail!("no file can be made beside it")
            }
        }
    }

    /// Writes the output, and says where to.
    fn write(self, esdl: &str) -> anyhow::Result<Option<String>> {
        let size = esdl.len();
        let (path, written) = match self {
            Output::Printed => {
                let mut out = stdout();
                let printed = writeln!(out, "{esdl}").and_then(|()| out.flush());
                return match printed {
                    // Its reader has had enough, as `head` has.
                    Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
                    Ok(()) | Err(_) => Ok(None),
                };
            }
            Output::File { path, mut new } => {
                let written = new.write_all(esdl.as_bytes()).and_then(|()| {
                    new.as_file().sync_all()?;
                    new.persist(&path)?;
                    Ok(())
                });
                (path, written)
            }
            Output::Inside { path, mut file } => {
                let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
                let is_replaced = is_file && !is_of_the_system(&path);
                let emptied = if is_replaced { file.set_len(0) } else { Ok(()) };
                let written = emptied.and_then(|()| file.write_all(esdl.as_bytes()));
                (path, written)
            }
        };
        written.with_context(|| path.display().to_string())?;
        let said = format!("output ESDL: {} ({size} bytes)", path.display());
        Ok(Some(said))
    }
}

/// Whether what is there stands for something else, such as a file that somebody writes into already.
fn is_of_the_system(path: &Path) -> bool {
    path.starts_with("/dev") || path.starts_with("/proc")
}

/// Those of a file that takes the place of `old`: its own, or what is usual.
#[cfg(unix)]
fn permissions(old: Option<&fs::Metadata>) -> fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    old.map_or_else(
        // Of which the process's umask is taken away.
        || fs::Permissions::from_mode(0o666),
        fs::Metadata::permissions,
    )
}

enum Update {
    Status(JobStatusUpdate),
    Progress(JobProgressUpdate),
    Result(JobResult),
    /// A queue cannot be consumed any more.
    Lost(anyhow::Error),
}

/// Submits `order`, shows what becomes of it, and returns how it ended; `output` is where the output
/// ESDL goes. The first thing that comes through `interrupts` cancels the job, the next one gives up
/// waiting for it. What goes wrong once the result is there and written is only told.
///
/// # Errors
/// RabbitMQ is not there or refuses something, or the output could not be written and was printed.
pub fn submit(
    rabbitmq: &config::RabbitMq,
    order: &Order,
    output: Output,
    interrupts: &Receiver<i32>,
) -> anyhow::Result<ResultType> {
    let job_id = Uuid::new_v4();
    let submission = order.submission(job_id)?;
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

    let (stop, stopped) = Signal::pending();
    let (done, all_done) = unbounded();
    let (update, updates) = unbounded();
    let ended = thread::scope(|scope| {
        let spawned = thread::Builder::new()
            .name("consume-updates".to_owned())
            .spawn_scoped(scope, || {
                follow(&incoming, &queues, &stopped, &all_done, &update);
            });
        let result = spawned
            .context("following the job")
            .and_then(|_| converse(job_id, &submission, &outgoing, &updates, &done, interrupts));
        let ended = result.and_then(|result| {
            show_result(output, &result)?;
            Ok(result.result_type())
        });
        match &ended {
            // The consumers end in good order before their queues go.
            Ok(_) => drop((stop, done)),
            Err(_) => incoming.kill(),
        }
        ended
    })?;
    clean_up(incoming, outgoing, &queues);
    Ok(ended)
}

/// Leaves nothing behind at RabbitMQ. The job has ended, and its result is where it should be: what
/// fails here is told, and changes nothing.
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
        warn(&error.context("the job's queues could not be deleted, and go by themselves in 48 h"));
    }
    for link in [incoming, outgoing] {
        if let Err(error) = link.close_within(CLEAN_UP_DEADLINE) {
            warn(&error.context("closing the connection"));
        }
    }
}

fn warn(error: &anyhow::Error) {
    // Standard error may be gone as well.
    let _ = writeln!(
        std::io::stderr(),
        "warning: {}",
        readable(&format!("{error:#}"))
    );
}

/// Submits the job and shows what is heard of it until its result.
fn converse(
    job_id: Uuid,
    submission: &JobSubmission,
    outgoing: &Link,
    updates: &Receiver<(u64, Update)>,
    done: &Sender<Handled>,
    interrupts: &Receiver<i32>,
) -> anyhow::Result<JobResult> {
    let calls = Calls::default();
    let mut publisher = Publisher::new(outgoing, &calls);
    let mut send = |message: Outgoing| {
        publisher.publish(&[message])?;
        anyhow::Ok(())
    };
    send(wire::job_submission(submission))?;
    let display = Display::new();
    let workflow = one_line(&submission.workflow_type);
    display.line(&format!("job {job_id} submitted to {workflow}"));
    let cancel = || send(wire::job_delete(job_id));
    let result = wait(&display, updates, done, interrupts, cancel);
    display.bar.finish_and_clear();
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
    let queues = queues.each_ref().map(|queue| (queue.as_str(), 10));
    let consumed = broker::consume(link, &queues, stopped, done, |place, received| {
        let body = received.body.as_slice();
        let decoded = match place {
            0 => JobStatusUpdate::decode(body).map(Update::Status),
            1 => JobProgressUpdate::decode(body).map(Update::Progress),
            _ => JobResult::decode(body).map(Update::Result),
        };
        let message = decoded.unwrap_or_else(|error| Update::Lost(anyhow!(error)));
        // Nobody listens any more only when nobody wants to know any more.
        let _ = update.send((received.tag, message));
    });
    if let Err(error) = consumed {
        let _ = update.send((0, Update::Lost(error)));
    }
}

fn wait(
    display: &Display,
    updates: &Receiver<(u64, Update)>,
    done: &Sender<Handled>,
    interrupts: &Receiver<i32>,
    mut cancel: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<JobResult> {
    let mut interrupts = interrupts.clone();
    let mut cancelled = false;
    loop {
        select! {
            recv(updates) -> update => {
                let (tag, update) = update?;
                match update {
                    Update::Status(update) => {
                        display.line(&format!("status {}", update.status().as_str_name()));
                    }
                    Update::Progress(update) => display.progress(update.progress, &update.message),
                    // RabbitMQ keeps it until it is where it should be.
                    Update::Result(result) => return Ok(result),
                    Update::Lost(error) => {
                        let what = "the job goes on, but cannot be followed any more";
                        return Err(error.context(what));
                    }
                }
                done.send(Handled::Done(tag))?;
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
            print_line(text);
        } else {
            self.bar.println(text);
        }
    }

    fn progress(&self, fraction: f64, message: &str) {
        let message = one_line(message);
        if self.bar.is_hidden() {
            print_line(&format!("progress {} {message}", percent(fraction)));
        } else {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "clamped to what the bar has"
            )]
            self.bar
                .set_position((fraction.clamp(0.0, 1.0) * 1000.0) as u64);
            self.bar.set_message(message);
        }
    }
}

/// To standard output. Somebody who does not read it does not stop the job.
fn print_line(text: &str) {
    let _ = writeln!(stdout(), "{text}");
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
    print_line(&format!("result {}", result.result_type().as_str_name()));
    for message in &result.esdl_messages {
        let object = message.esdl_object_id.as_ref();
        print_line(&format!(
            "{} {}{}",
            message.severity().as_str_name(),
            readable(&message.technical_message),
            object
                .map(|id| format!(" ({})", one_line(id)))
                .unwrap_or_default()
        ));
    }
    if !result.logs.is_empty() {
        print_line(&format!("logs:\n{}", readable(result.logs.trim_end())));
    }
    if let Some(esdl) = printed {
        Output::Printed.write(esdl).context("standard output")?;
    }
    let said = written.context("the output ESDL could not be written, and is printed instead")?;
    if let Some(said) = said {
        print_line(&said);
    }
    Ok(())
}
