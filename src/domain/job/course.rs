//! The course of a job through the steps of its workflow: where it is, what has been, and what
//! follows.
//!
//! A job whose workflow is one plain step has none: when its task has ended, so has the job.

use std::borrow::Cow;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::{Completion, Context, Outcome, kept_why_of_logs, to_i64};
use crate::domain::workflow::{OnError, Step, Steps};
use crate::proto::EsdlMessage;

/// A job's way through its steps: its rows in `job_step` and `job_input`.
#[derive(Debug, Clone, PartialEq)]
pub struct Course {
    /// As they were at the submission, whatever the definition file says now.
    pub steps: Arc<Steps>,
    /// The job's, of which each step gets its share.
    pub parameters: Arc<Map<String, Value>>,
    /// The client's, as long as it is.
    pub reference: Option<String>,
    /// The input ESDL of the current attempt.
    pub input: Input,
    /// The attempts that have ended, oldest first.
    pub earlier: Vec<Attempt>,
    pub current: Attempt,
    /// Whose job it is, where tasks wait for their turn.
    pub owner: String,
    /// Of the current attempt, from when it has to wait for its turn until it has ended.
    pub turn: Option<Turn>,
}

/// A task's turn at a queue with limits.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// Since when the task waits, or has waited, for it.
    pub since: Timestamp,
    pub grant: Option<Grant>,
}

/// The turn that a task has been granted. From then on it counts as handed over, whether or not it
/// has reached its queue yet.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grant {
    /// When it was granted, or when somebody last took it on to hand it over.
    pub at: Timestamp,
    /// The task's id, fixed before it is published: what a crash leaves in the queue is the job's
    /// own task then, and not a second one beside it.
    pub task_id: Uuid,
}

/// An attempt's input ESDL, which is kept only as long as another one may need it.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    NotKept,
    /// In the database.
    Kept,
    /// To be written to it.
    New(Arc<str>),
}

/// One task of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Attempt {
    pub position: Position,
    /// None until its turn has come.
    pub task_id: Option<String>,
    /// When it is its turn, if it has to wait for that; of one that was held and has been handed
    /// over, since when it was held.
    pub due_at: Option<Timestamp>,
    pub submitted_at: Option<Timestamp>,
    /// When a worker first started it.
    pub started_at: Option<Timestamp>,
    /// How it ended.
    pub report: Option<Report>,
}

/// Where a job is among its steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// From 0.
    pub step: usize,
    /// 0 is the step itself, 1 its fallback, 2 the fallback of that.
    pub fallback: usize,
    /// From 1, of the step with its fallbacks.
    pub attempt: usize,
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    pub outcome: Outcome,
    pub finished_at: Timestamp,
    pub starts: i32,
    pub output_bytes: i64,
    /// Which time series its output refers to.
    pub esdl_id: Option<String>,
    /// Read from the database only for commands that may end a job.
    pub logs: String,
    /// The line of all of them that says most of why it failed.
    pub why: Option<String>,
    /// As `logs`.
    pub esdl_messages: Vec<EsdlMessage>,
}

/// What follows the end of an attempt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Next {
    /// Another attempt, with this one's output.
    OnItsOutput(Position),
    /// Another attempt after a while, with this one's input.
    OnItsInput(Position, Duration),
    Success,
    Failure,
}

/// The last bytes of an attempt's logs that are kept, and the first ones of its ESDL messages: the
/// result of a job has those of all its attempts, and must fit into a message.
const KEPT_BYTES: usize = 64 * 1024;

/// The end of an attempt's logs, without NUL, which Postgres cannot store.
pub(super) fn kept_logs(logs: &str) -> String {
    let from = logs.ceil_char_boundary(logs.len().saturating_sub(KEPT_BYTES));
    let end = logs[from..].replace('\0', "");
    match from {
        0 => end,
        left_out => format!("[{left_out} bytes are left out]\n{end}"),
    }
}

pub(super) fn kept_messages(messages: &[EsdlMessage]) -> Vec<EsdlMessage> {
    let mut bytes = 0;
    let fits = |message: &&EsdlMessage| {
        let object = message.esdl_object_id.as_ref().map_or(0, String::len);
        bytes += size_of::<EsdlMessage>() + message.technical_message.len() + object;
        bytes <= KEPT_BYTES
    };
    messages.iter().take_while(fits).cloned().collect()
}

impl Position {
    pub(super) const FIRST: Position = Position {
        step: 0,
        fallback: 0,
        attempt: 1,
    };

    fn next_step(self) -> Position {
        Position {
            step: self.step + 1,
            ..Position::FIRST
        }
    }
}

impl Report {
    pub(super) fn new(outcome: Outcome, starts: usize, now: Timestamp) -> Report {
        Report {
            outcome,
            finished_at: now,
            starts: i32::try_from(starts).unwrap_or(i32::MAX),
            output_bytes: 0,
            esdl_id: None,
            logs: String::new(),
            why: None,
            esdl_messages: Vec::new(),
        }
    }

    pub(super) fn of(
        completion: &Completion,
        outcome: Outcome,
        starts: usize,
        context: &Context<'_>,
    ) -> Report {
        let output_esdl = completion.output_esdl.as_deref().unwrap_or_default();
        Report {
            output_bytes: to_i64(output_esdl.len()),
            esdl_id: completion.esdl_id(),
            logs: kept_logs(&completion.logs),
            why: match outcome {
                Outcome::Succeeded => None,
                _ => kept_why_of_logs(&completion.logs, context),
            },
            esdl_messages: kept_messages(&completion.esdl_messages),
            ..Report::new(outcome, starts, context.now)
        }
    }
}

impl Attempt {
    /// One that is put on its queue now.
    pub(super) fn submitted(position: Position, task_id: String, now: Timestamp) -> Attempt {
        Attempt {
            task_id: Some(task_id),
            submitted_at: Some(now),
            ..Attempt::to_come(position)
        }
    }

    /// One that has no task yet.
    pub(super) fn to_come(position: Position) -> Attempt {
        Attempt {
            position,
            task_id: None,
            due_at: None,
            submitted_at: None,
            started_at: None,
            report: None,
        }
    }

    /// Whether it ended with its worker's result.
    pub(super) fn by_its_result(&self) -> bool {
        let report = self.report.as_ref();
        report.is_some_and(|report| report.outcome.by_its_task())
    }

    /// Whether it is in its queue.
    fn waits(&self) -> bool {
        self.submitted_at.is_some() && self.started_at.is_none() && self.report.is_none()
    }

    /// When it last came forward.
    pub(super) fn since(&self) -> Option<Timestamp> {
        self.started_at.or(self.submitted_at).or(self.due_at)
    }

    /// How long it has been in its queue by `now`, or has waited for its turn there.
    fn time_in_queue(&self, now: Timestamp) -> SignedDuration {
        let Some(submitted_at) = self.submitted_at else {
            return SignedDuration::ZERO;
        };
        let submitted_at = self.due_at.unwrap_or(submitted_at);
        let finished_at = self.report.as_ref().map(|report| report.finished_at);
        let end = self.started_at.or(finished_at).unwrap_or(now);
        end.duration_since(submitted_at).max(SignedDuration::ZERO)
    }
}

impl Course {
    /// The one at this position; the first step for one that the definition does not have, which no
    /// row of ours names.
    pub fn step_at(&self, position: Position) -> &Step {
        let step = self.steps.get(position.step, position.fallback);
        step.unwrap_or(&self.steps.all()[0])
    }

    pub fn step(&self) -> &Step {
        self.step_at(self.current.position)
    }

    /// All attempts, the current one last.
    pub fn attempts(&self) -> impl Iterator<Item = &Attempt> {
        self.earlier.iter().chain([&self.current])
    }

    pub(super) fn has_several_steps(&self) -> bool {
        self.steps.count() > 1
    }

    /// How many attempts at the current task there have been.
    fn tries(&self) -> usize {
        let Position { step, fallback, .. } = self.current.position;
        self.attempts()
            .filter(|one| (one.position.step, one.position.fallback) == (step, fallback))
            .count()
    }

    /// Whether the current attempt's input may be needed once more.
    pub(super) fn may_need_its_input_again(&self) -> bool {
        let step = self.step();
        self.can_be_tried_again() || step.on_error != OnError::Fail
    }

    fn can_be_tried_again(&self) -> bool {
        usize::try_from(self.step().attempts).is_ok_and(|attempts| self.tries() < attempts)
    }

    /// What follows when the current task has succeeded.
    pub(super) fn after_success(&self) -> Next {
        let next = self.current.position.next_step();
        match next.step < self.steps.count() {
            true => Next::OnItsOutput(next),
            false => Next::Success,
        }
    }

    /// What follows when the current task has failed; only its worker's error is worth another
    /// attempt.
    pub(super) fn after_failure(&self, outcome: Outcome) -> Next {
        let here = self.current.position;
        let again = Position {
            attempt: here.attempt + 1,
            ..here
        };
        if outcome == Outcome::Failed && self.can_be_tried_again() {
            return Next::OnItsInput(again, self.step().retry_wait);
        }
        match &self.step().on_error {
            OnError::Fail => Next::Failure,
            OnError::Continue => Next::OnItsInput(here.next_step(), Duration::ZERO),
            OnError::Fallback(_) => {
                let fallback = Position {
                    fallback: here.fallback + 1,
                    ..again
                };
                Next::OnItsInput(fallback, Duration::ZERO)
            }
        }
    }

    /// How long the job's tasks have waited for their turns and in their queues since its first START,
    /// which does not count against its timeout.
    pub(super) fn idle(&self, running_at: Timestamp, now: Timestamp) -> SignedDuration {
        self.attempts()
            .filter(|one| one.submitted_at.is_some_and(|at| at >= running_at))
            .map(|one| one.time_in_queue(now))
            .chain(
                self.turn_to_come()
                    .map(|turn| now.duration_since(turn.since)),
            )
            .fold(SignedDuration::ZERO, SignedDuration::saturating_add)
    }

    /// Whether the current attempt waits for a worker.
    pub(super) fn waits(&self) -> bool {
        self.current.waits()
    }

    /// The turn that the current attempt waits for, or has been granted without its task being
    /// known to be on its queue.
    pub(super) fn turn_to_come(&self) -> Option<&Turn> {
        let is_to_come = self.current.submitted_at.is_none() && self.current.report.is_none();
        self.turn.as_ref().filter(|_| is_to_come)
    }

    /// Its granted turn, if its task is not known to be on its queue.
    pub(super) fn grant_to_take(&self) -> Option<Grant> {
        self.turn_to_come()?.grant
    }

    /// The progress of the whole when the current step's is `fraction`.
    pub(super) fn progress_of(&self, fraction: f64) -> f64 {
        let number = self.current.position.step;
        let (from, to) = (
            self.steps.share_before(number),
            self.steps.share_before(number + 1),
        );
        from + (to - from) * fraction.clamp(0.0, 1.0)
    }

    /// A message to the client, led by the step's title where there are several.
    pub(super) fn led<'m>(&self, message: &'m str) -> Cow<'m, str> {
        match self.has_several_steps() {
            true => Cow::Owned(format!("{}: {message}", self.step().title)),
            false => Cow::Borrowed(message),
        }
    }

    /// How an attempt is called: `step 2 of 3, Simulate, attempt 2`.
    pub fn name(&self, position: Position) -> String {
        let title = &self.step_at(position).title;
        let (number, count) = (position.step + 1, self.steps.count());
        let mut name = format!("step {number} of {count}, {title}");
        if position.attempt > 1 {
            let _ = write!(name, ", attempt {}", position.attempt);
        }
        name
    }

    /// The logs of the whole job, which ends with `logs` of its current attempt: under a heading
    /// each, where there is more than one. A failed job's begin with the step that it failed in.
    pub(super) fn logs<'l>(&self, outcome: Outcome, logs: &'l str) -> Cow<'l, str> {
        if !self.has_several_steps() && self.earlier.is_empty() {
            return Cow::Borrowed(logs);
        }
        let mut whole = String::new();
        if outcome != Outcome::Succeeded {
            let name = self.name(self.current.position);
            let _ = writeln!(whole, "The job ended in {name}.");
        }
        // What was refused may have been refused for its size.
        let worth_telling = |_: &&Attempt| outcome != Outcome::Rejected;
        let earlier = self.earlier.iter().filter(worth_telling);
        let earlier = earlier.filter_map(|attempt| {
            let report = attempt.report.as_ref()?;
            Some((attempt.position, report.outcome, report.logs.as_str()))
        });
        let current = (self.current.position, outcome, logs);
        for (position, outcome, logs) in earlier.chain([current]) {
            let name = self.name(position);
            let _ = writeln!(whole, "=== {name}: {} ===", outcome.in_words());
            whole.push_str(logs);
            if !logs.is_empty() && !logs.ends_with('\n') {
                whole.push('\n');
            }
        }
        Cow::Owned(whole)
    }

    /// The ESDL messages of the whole job, which ends with these of its current attempt.
    pub(super) fn esdl_messages<'m>(&self, last: &'m [EsdlMessage]) -> Cow<'m, [EsdlMessage]> {
        if !self.has_several_steps() && self.earlier.is_empty() {
            return Cow::Borrowed(last);
        }
        let earlier = self.earlier.iter().filter_map(|attempt| {
            let report = attempt.report.as_ref()?;
            Some((attempt.position, report.esdl_messages.as_slice()))
        });
        let mut whole = Vec::new();
        for (position, messages) in earlier.chain([(self.current.position, last)]) {
            let title = &self.step_at(position).title;
            whole.extend(messages.iter().map(|message| EsdlMessage {
                technical_message: format!("{title}: {}", message.technical_message),
                ..message.clone()
            }));
        }
        Cow::Owned(whole)
    }

    /// The earlier attempt with this task.
    pub(super) fn earlier_task(&self, task_id: &str) -> Option<&Attempt> {
        let is_its = |attempt: &&Attempt| attempt.task_id.as_deref() == Some(task_id);
        self.earlier.iter().find(is_its)
    }

    /// Whether outputs of earlier steps may have time series.
    pub(super) fn has_time_series(&self) -> bool {
        self.earlier_series(|_| true).next().is_some()
    }

    /// The time series that the job's success leaves to nobody, if its last output has those of
    /// `kept`.
    pub(super) fn passing_series(&self, kept: Option<&str>) -> Vec<String> {
        let also_kept: Vec<_> = self.earlier_series(|step| step.keep_time_series).collect();
        self.earlier_series(|step| !step.keep_time_series)
            .filter(|id| Some(*id) != kept && !also_kept.contains(id))
            .map(str::to_owned)
            .collect()
    }

    fn earlier_series(&self, of: impl Fn(&Step) -> bool) -> impl Iterator<Item = &str> {
        self.earlier
            .iter()
            .filter(move |attempt| of(self.step_at(attempt.position)))
            .filter_map(|attempt| attempt.report.as_ref()?.esdl_id.as_deref())
    }

    /// How many starts its earlier tasks had.
    pub(super) fn earlier_starts(&self) -> i32 {
        let reports = self.earlier.iter().filter_map(|one| one.report.as_ref());
        reports.fold(0, |sum, report| sum.saturating_add(report.starts))
    }
}
