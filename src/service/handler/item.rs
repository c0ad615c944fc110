//! A message in a handler: what it asks for, and what becomes of it when it is refused or has to
//! wait.

use std::collections::BTreeMap;
use std::mem;
use std::panic::catch_unwind;
use std::time::{Duration, Instant};

use log::{error, warn};
use uuid::Uuid;

use super::closed::Destination;
use super::watched::Watched;
use super::{Refuser, Work, fault_in_ourselves};
use crate::domain::job::Command;
use crate::fault_point;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::report::{self, one_line};
use crate::wire::{self, Inbox, Request, Undecodable};

/// The most memory that a command may take when its message's body is dropped, in bytes.
const SMALL: usize = 4 * 1024;

/// A message of a batch, with what it asks for.
pub(super) struct Item {
    pub(super) work: Work,
    pub(super) job: Option<(Uuid, Command)>,
    pub(super) list_workflows: bool,
    /// Why the message becomes a dead letter.
    pub(super) dead_letter: Option<String>,
    /// The closed queue that it waits for; it is not done.
    pub(super) stalled_on: Option<Destination>,
    /// How long its committed outcome must wait before the client is told.
    pub(super) wait: Option<Duration>,
    /// It has been handled once and has waited since.
    pub(super) has_waited: bool,
    /// The output ESDL of a result that RabbitMQ does not take, or Postgres.
    pub(super) untold_output: Option<String>,
    /// Its command is no longer what its body says.
    altered: bool,
    /// Its body was dropped because it is no longer needed.
    released: bool,
}

impl Item {
    /// Decodes what the message asks for. One that makes the decoder panic becomes a dead letter.
    pub(super) fn new(work: Work, watched: &Watched) -> Item {
        let mut item = Item {
            job: None,
            list_workflows: false,
            dead_letter: None,
            stalled_on: None,
            wait: None,
            has_waited: false,
            untold_output: None,
            altered: false,
            released: false,
            work,
        };
        match &item.work {
            Work::Message { .. } => item.read(watched),
            Work::Finding { job_id, command } => item.job = Some((*job_id, command.clone())),
            Work::WorkflowsChanged => item.list_workflows = true,
        }
        item
    }

    fn read(&mut self, watched: &Watched) {
        let Work::Message { inbox, received } = &self.work else {
            return;
        };
        let id = received.message_id();
        let decoded = catch_unwind(|| {
            watched.reads(&self.work);
            fault_point::reached(id.unwrap_or_default());
            wire::decode(*inbox, &received.body, id, received.redelivered)
        });
        match decoded {
            Ok(Ok(Request::Job { id, mut command })) => {
                if let Command::Submit(submission) = &mut command {
                    let header = |name: &str| received.header(name);
                    let (sender, requested) = wire::sent_for(header, received.sender());
                    submission.sender = sender;
                    submission.requested = requested.map(Box::new);
                } else if let Command::Cancel(origin) = &mut command {
                    *origin = wire::origin(|name| received.header(name), received.sender());
                }
                self.job = Some((id, command));
            }
            Ok(Ok(Request::ListWorkflows)) => self.list_workflows = true,
            Ok(Err(undecodable)) => self.cannot_be_read(undecodable),
            Err(panic) => {
                let reason = fault_in_ourselves(&*panic);
                error!("{}: {}", self.label(), one_line(&reason));
                // What panics on the whole body may do so on its beginning too.
                let unread = catch_unwind(|| wire::unread(*inbox, &received.body, reason.clone()));
                self.cannot_be_read(unread.unwrap_or(Undecodable {
                    reason,
                    instead: None,
                }));
            }
        }
    }

    fn cannot_be_read(&mut self, undecodable: Undecodable) {
        self.job = undecodable.instead.map(|instead| *instead);
        self.dead_letter = Some(undecodable.reason);
        self.altered = true;
    }

    /// Whether its message is as it was delivered, and not without its body.
    pub(super) fn is_whole(&self) -> bool {
        !self.released
    }

    /// What its message holds.
    pub(super) fn body(&self) -> Option<&[u8]> {
        match &self.work {
            Work::Message { received, .. } => Some(&received.body),
            Work::Finding { .. } | Work::WorkflowsChanged => None,
        }
    }

    /// Where its message came from; None for a finding.
    pub(super) fn inbox(&self) -> Option<Inbox> {
        match &self.work {
            Work::Message { inbox, .. } => Some(*inbox),
            Work::Finding { .. } | Work::WorkflowsChanged => None,
        }
    }

    /// Bytes that it holds, including what has been decoded: a small message may decode to much.
    pub(super) fn size(&self) -> usize {
        let command = self.job.as_ref().map(|(_, command)| command);
        let output = self.untold_output.as_ref().map_or(0, String::len);
        self.work.size() + command.map_or(0, Command::decoded_bytes) + output
    }

    /// The same, including the message's properties.
    pub(super) fn held(&self) -> usize {
        let properties = match &self.work {
            Work::Message { received, .. } => received.size().saturating_sub(received.body.len()),
            Work::Finding { .. } | Work::WorkflowsChanged => 0,
        };
        self.size() + properties
    }

    /// It is tried again, and may have been committed. What tells a START from its repetition is
    /// its message id or, without one, AMQP's redelivered flag.
    pub(super) fn repeat(&mut self) {
        match &mut self.job {
            Some((_, Command::Start { redelivered, .. })) => *redelivered = true,
            // Its task may be on its queue; it is looked for.
            Some((_, Command::TakeTurn { grant })) => *grant = None,
            Some(_) | None => {}
        }
    }

    /// Turns its submission, which was refused with these logs, into a refusal.
    pub(super) fn turn_into_refusal(&mut self, logs: String) {
        if let Some((_, command)) = &mut self.job
            && let Command::Submit(submission) = command
        {
            *command = Command::Refuse {
                reason: logs,
                workflow_type: mem::take(&mut submission.workflow_type),
                reference: submission.reference.take(),
            };
            self.altered = true;
        }
    }

    /// Replaces a refused message's command by what can still be done about it.
    pub(super) fn give_up(&mut self, reason: String, by: Refuser) {
        error!("{}: {}", self.label(), one_line(&reason));
        let instead = self.job.take().and_then(|(id, command)| {
            let reason = format!("The orchestrator could not handle this job: {reason}.");
            let instead = command.instead(reason, by == Refuser::Broker);
            if let Command::Result(completion) = command {
                let output = completion.output_esdl.filter(|esdl| !esdl.is_empty());
                self.untold_output = output.filter(|_| completion.succeeded);
            }
            Some((id, instead?))
        });
        self.list_workflows = false;
        // What the broker refuses is usually too big for any of its queues.
        if by != Refuser::Broker || instead.is_none() {
            self.dead_letter = Some(reason);
        }
        self.job = instead;
        self.altered = true;
    }

    /// Leaves the job alone; the message becomes a dead letter.
    pub(super) fn give_up_job(&mut self, reason: String, _: Refuser) {
        error!("{}: {}", self.label(), one_line(&reason));
        self.job = None;
        self.dead_letter = Some(reason);
    }

    /// Prepares it for its wait, during which it takes no more memory than its message does: next to
    /// nothing when the body is no longer needed.
    fn rest(&mut self) {
        self.has_waited = true;
        self.wait = None;
        let is_small = match &self.job {
            // It still has to become a dead letter, or is all that there is of an output.
            _ if self.dead_letter.is_some() || self.untold_output.is_some() => false,
            Some((_, command)) => size(command) <= SMALL,
            None => false,
        };
        match &mut self.work {
            Work::Message { received, .. } if is_small => {
                received.release();
                self.released = true;
            }
            Work::Message { .. } if !self.altered => self.job = None,
            Work::Message { .. } | Work::Finding { .. } | Work::WorkflowsChanged => {}
        }
    }

    /// Restores it after its wait.
    fn wake(mut self, watched: &Watched) -> Item {
        if self.job.is_none() {
            self.read(watched);
        }
        self
    }

    /// The message whose dead letter is to be written, and its reason.
    pub(super) fn letter(&self) -> Option<(Inbox, &crate::broker::Received, &str)> {
        let reason = self.dead_letter.as_deref()?;
        match &self.work {
            Work::Message { .. } if self.released => {
                // Its job's outcome is committed, and in the end the client is told that this one
                // is lost.
                error!("{}: its body is gone: {}", self.label(), one_line(reason));
                None
            }
            Work::Message { inbox, received } => Some((*inbox, received, reason)),
            Work::Finding { .. } | Work::WorkflowsChanged => None,
        }
    }

    /// Its dead letter is written.
    pub(super) fn note_dead_letter(&mut self, metrics: &Metrics) {
        if let (Some(inbox), Some(reason)) = (self.inbox(), self.dead_letter.take()) {
            metrics.dead_letter(inbox);
            let (label, letters) = (self.label(), wire::DEAD_LETTERS_QUEUE);
            warn!("{label}: put into {letters}: {}", one_line(&reason));
        }
    }

    pub(super) fn label(&self) -> String {
        let message = match &self.work {
            Work::Message { inbox, received } => {
                let id = one_line(received.message_id().unwrap_or("without id"));
                format!("message {id} from {}", inbox.name())
            }
            Work::Finding { command, .. } => command.name().to_owned(),
            Work::WorkflowsChanged => "the workflows".to_owned(),
        };
        match &self.job {
            Some((id, command)) => format!("{}, {message}", report::job(*id, command.reference())),
            None => message,
        }
    }
}

/// About how many bytes a command takes; a huge number for one that holds what its message does.
fn size(command: &Command) -> usize {
    match command {
        Command::Submit(_) | Command::Result { .. } => usize::MAX,
        Command::Refuse {
            reason,
            workflow_type,
            reference,
        } => reason.len() + workflow_type.len() + reference.as_ref().map_or(0, String::len),
        Command::Start {
            task_id,
            message_id,
            ..
        } => task_id.len() + message_id.as_ref().map_or(0, String::len),
        Command::Progress {
            task_id, message, ..
        } => task_id.len() + message.len(),
        Command::Judge { task_id, .. } | Command::TaskLost { task_id, .. } => task_id.len(),
        Command::Fail { reason, task_id } => reason.len() + task_id.as_ref().map_or(0, String::len),
        Command::Cancel(_)
        | Command::TimeOut
        | Command::Expire
        | Command::NoWorker
        | Command::TakeTurn { .. } => 0,
    }
}

/// Items whose outcome is committed but may not be told yet, by when it may be, then in the order
/// of their arrival.
#[derive(Default)]
pub(super) struct Waiting {
    items: BTreeMap<(Instant, u64), Item>,
    count: u64,
}

impl Waiting {
    pub(super) fn add(&mut self, mut item: Item, wait: Duration) {
        item.rest();
        self.count += 1;
        self.items.insert((Instant::now() + wait, self.count), item);
    }

    /// When the first of them is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.items.first_key_value().map(|((due, _), _)| *due)
    }

    /// The first of them, if it is due.
    pub(super) fn take_due(&mut self, watched: &Watched) -> Option<Item> {
        let first = self.items.first_entry()?;
        (first.key().0 <= Instant::now()).then(|| first.remove().wake(watched))
    }
}
