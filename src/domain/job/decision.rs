//! What is decided about a command, and what has to be known for that.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::course::Report;
use super::told::kept_of_result;
use super::{Ended, Ending, Job, Outcome, Priority, State, Submission, Told, kept_why};
use crate::domain::workflow::Catalogue;
use crate::proto::EsdlMessage;

/// What a decision needs to know beside the job.
pub struct Context<'a> {
    pub now: Timestamp,
    /// When a replica last began a session with RabbitMQ; whatever had one before has lost it.
    pub session_begun: Option<Timestamp>,
    /// For the task, if one is published: fresh for each attempt, since the same task twice
    /// would look like a crash loop.
    pub new_task_id: Uuid,
    pub catalogue: &'a Catalogue,
    /// Whether a task queue takes nothing for now.
    pub is_closed: &'a dyn Fn(&str) -> bool,
    /// Whether the tasks of a queue have to wait for their turn.
    pub has_limits: &'a dyn Fn(&str) -> bool,
    /// What holds for every job.
    pub rules: &'a Rules,
}

/// What the configuration says of all jobs.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Starts allowed per job; the next one ends it.
    pub delivery_limit: usize,
    /// How long a job may stay in one state.
    pub retention: Duration,
    /// An ending job whose client has not been told for this long gets an error instead: the message
    /// that led to its end would have come again by now, so RabbitMQ must have lost it.
    pub outcome_lost: Duration,
    /// How long after its submission a job's client is told of its outcome at the earliest: some
    /// clients note a job only after they have submitted it, and would not know what the outcome
    /// is about.
    pub outcome_delay: Duration,
    pub timeout_result: TimeoutResult,
    /// Whether a job whose parameters do not fit its workflow's definition is refused, instead of
    /// left to its worker.
    pub reject_invalid_params: bool,
    /// Whether anything of a worker's logs may be kept when its job has ended.
    pub keep_logs: bool,
    /// Whether the parameters of jobs may be kept for their stories.
    pub keep_parameters: bool,
    /// Ends the owner at the beginning of a job's reference; empty if there is none.
    pub fair_share_separator: String,
}

/// How a timeout is reported to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeoutResult {
    /// As the Python service does, and as OMOTES's system tests have it.
    Cancelled,
    /// As the protocol has it.
    TimedOut,
}

/// What to do about a command.
#[derive(Debug, PartialEq)]
pub struct Decision<'a> {
    /// The job's new state; None leaves its rows alone.
    pub next: Option<State>,
    /// To be sent before the new state is committed, in this order: what is committed has been
    /// asked of the workers.
    pub publications: Vec<Publication<'a>>,
    /// To be sent after the commit, in this order: what clients are told is certain, and a task that
    /// is revoked is no longer its job's. If they tell the outcome, the job is no longer
    /// [`State::Ending`] then.
    pub announcements: Vec<Publication<'a>>,
    /// How long from now those of them that tell the outcome have to wait
    /// ([`Publication::tells_outcome`]), and with them the end of [`State::Ending`].
    pub wait: Duration,
    pub time_series: Vec<TimeSeries<'a>>,
    /// Whether what is kept of the job for its client is not needed any more.
    pub gives_up_kept: bool,
    pub event: Event,
}

impl Decision<'_> {
    pub(super) fn nothing(event: Event) -> Self {
        Decision {
            next: None,
            publications: Vec::new(),
            announcements: Vec::new(),
            wait: Duration::ZERO,
            time_series: Vec::new(),
            gives_up_kept: false,
            event,
        }
    }

    pub(super) fn ignored(why: &'static str) -> Self {
        Decision::nothing(Event::Ignored(why))
    }

    /// The same end, with what the history keeps of why.
    pub(super) fn because(mut self, why: Option<String>) -> Self {
        if let Some(State::Ending(Ending { ended, .. })) = &mut self.next {
            ended.why = why;
        }
        self
    }
}

/// A message to send.
#[derive(Debug, Clone, PartialEq)]
pub enum Publication<'a> {
    /// To the queue of its Celery task.
    Task {
        job_id: Uuid,
        task_id: Uuid,
        assignment: Assignment<'a>,
    },
    /// To all Celery workers: end this task.
    Revoke {
        task_id: Cow<'a, str>,
    },
    Status {
        job_id: Uuid,
        status: ClientStatus,
    },
    Progress {
        job_id: Uuid,
        fraction: f64,
        message: Cow<'a, str>,
    },
    Result {
        job_id: Uuid,
        result_type: ResultType,
        output_esdl: Option<&'a str>,
        logs: Cow<'a, str>,
        esdl_messages: Cow<'a, [EsdlMessage]>,
    },
}

/// What a worker is to compute.
#[derive(Debug, Clone, PartialEq)]
pub struct Assignment<'a> {
    /// The Celery task, and its queue.
    pub task: Cow<'a, str>,
    pub reference: Option<Cow<'a, str>>,
    pub parameters: Cow<'a, Map<String, Value>>,
    pub priority: Priority,
    pub input: TaskInput<'a>,
}

impl Submission {
    /// What the worker of this task is given of it: everything.
    pub fn assignment(&self, task: &str) -> Assignment<'_> {
        let Submission {
            workflow_type: _,
            esdl,
            params,
            reference,
            priority,
            timeout_ms: _,
            sender: _,
            requested: _,
        } = self;
        Assignment {
            // As a rule it is the workflow's name, and need not be copied.
            task: match task == self.workflow_type {
                true => Cow::Borrowed(&self.workflow_type),
                false => Cow::Owned(task.to_owned()),
            },
            reference: reference.as_deref().map(Cow::Borrowed),
            parameters: Cow::Borrowed(params),
            priority: *priority,
            input: TaskInput::Given(esdl),
        }
    }
}

/// An input ESDL.
#[derive(Debug, Clone, PartialEq)]
pub enum TaskInput<'a> {
    Given(&'a str),
    /// Given earlier in the same batch.
    Held(Arc<str>),
    /// In the database, before anything of the batch is written.
    Kept,
}

impl Publication<'_> {
    /// Whether it tells the outcome, as an announcement; a revoke, which is for workers, does not.
    pub fn tells_outcome(&self) -> bool {
        match self {
            Publication::Status { .. } | Publication::Result { .. } => true,
            Publication::Task { .. }
            | Publication::Revoke { .. }
            | Publication::Progress { .. } => false,
        }
    }
}

/// The statuses that clients are sent. FINISHED is not among them: omotes-rest empties the result
/// when it comes. Neither is REGISTERED, which resets the client's row and adds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientStatus {
    Enqueued,
    Running,
    Cancelled,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResultType {
    Succeeded,
    Error,
    Cancelled,
    TimedOut,
}

/// What becomes of the time series that a job's output ESDL refers to.
#[derive(Debug, Clone, PartialEq)]
pub enum TimeSeries<'a> {
    /// A job succeeded: guard its series, also when a scan had marked them meanwhile.
    Keep {
        esdl_id: String,
        reference: Cow<'a, str>,
    },
    /// A step succeeded: guard its series while its job lives, unless they are another job's.
    Hold {
        esdl_id: String,
        reference: Cow<'a, str>,
    },
    /// The job was deleted, but its task still delivered: these series belong to nobody.
    RetireLate {
        esdl_id: String,
        reference: Cow<'a, str>,
    },
    /// The job was deleted, or failed after some of its steps: its series are retired.
    Retire,
    /// Those of its steps' outputs that nobody needs after its success.
    RetireThese(Vec<String>),
}

/// What became of a command, for the log.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Submitted {
        task_id: Uuid,
        /// The task's queue.
        queue: String,
        /// How its parameters do not fit the workflow's definition.
        faults: Vec<String>,
    },
    /// The job's next task waits for its turn.
    Held {
        /// Which step it is; None for a submission.
        what: Option<String>,
        queue: String,
        /// As with [`Event::Submitted`].
        faults: Vec<String>,
    },
    Started {
        starts: usize,
    },
    /// The job's next task, or the same once more, was put on its queue.
    HandedOver {
        task_id: Uuid,
        /// Which step it is.
        to: String,
        task: String,
    },
    /// The job's step is put on its queue later.
    Postponed {
        what: String,
        why: &'static str,
        until: Timestamp,
    },
    /// Started once more, which does not count.
    Excused {
        starts: usize,
        why: &'static str,
    },
    /// Started once more, which is too often unless the workers say that nobody died.
    Suspected {
        starts: usize,
    },
    Progressed,
    Ended(Outcome),
    /// A cancel before the submission it belongs to.
    CancelNoted,
    Revoked(&'static str),
    Ignored(&'static str),
}

/// Answers an event of a task that is not its job's current one.
pub(super) fn revoke<'a>(task_id: &'a str, why: &'static str) -> Decision<'a> {
    Decision {
        publications: vec![Publication::Revoke {
            task_id: Cow::Borrowed(task_id),
        }],
        ..Decision::nothing(Event::Revoked(why))
    }
}

/// An error, as its client is told of it.
pub(super) fn error_result(job_id: Uuid, logs: Cow<'_, str>) -> Publication<'_> {
    Publication::Result {
        job_id,
        result_type: ResultType::Error,
        output_esdl: None,
        logs,
        esdl_messages: Cow::Borrowed(&[]),
    }
}

/// What a client is told of a cancelled job.
pub(super) fn cancellation<'a>(job_id: Uuid) -> [Publication<'a>; 2] {
    [
        Publication::Status {
            job_id,
            status: ClientStatus::Cancelled,
        },
        Publication::Result {
            job_id,
            result_type: ResultType::Cancelled,
            output_esdl: None,
            logs: Cow::Borrowed(""),
            esdl_messages: Cow::Borrowed(&[]),
        },
    ]
}

impl Job {
    /// Ends it with this outcome: its task, unless that has done it and there is no second copy of
    /// it, and then the client is told.
    pub(super) fn ends<'a>(
        &self,
        outcome: Outcome,
        result_bytes: usize,
        to_client: impl IntoIterator<Item = Publication<'a>>,
        context: &Context<'_>,
    ) -> Decision<'a> {
        let ended = Ended {
            told: Some(Box::new(Told::new(&self.starts, context))),
            ..self.ended(outcome, result_bytes, context.now)
        };
        let mut job = self.clone();
        let mut time_series = Vec::new();
        if let Some(course) = &mut job.course {
            let report = Report::new(outcome, self.starts.len(), context.now);
            let report = course.current.report.get_or_insert(report);
            // Not of a success that RabbitMQ has lost: its client may have heard of it.
            let succeeded = report.outcome == Outcome::Succeeded;
            if !succeeded && course.has_time_series() {
                time_series.push(TimeSeries::Retire);
            }
        }
        Decision {
            next: Some(State::Ending(Ending { job, ended })),
            announcements: self
                .revocation(outcome)
                .into_iter()
                .chain(to_client)
                .collect(),
            // Negative once the time has come.
            wait: context
                .now
                .duration_until(self.outcome_from(context))
                .try_into()
                .unwrap_or_default(),
            time_series,
            ..Decision::nothing(Event::Ended(outcome))
        }
    }

    /// Revokes its task, which has come to this end, where it or a copy of it may run on.
    pub(super) fn revocation<'a>(&self, outcome: Outcome) -> Option<Publication<'a>> {
        let runs = !outcome.by_its_task() || self.starts.len() > 1;
        // It may be in its queue, or will be in a moment.
        let granted = || {
            let course = self.course.as_ref()?;
            Some(course.grant_to_take()?.task_id.to_string())
        };
        let task = self.task_id.clone().or_else(granted).filter(|_| runs);
        task.map(|task_id| Publication::Revoke {
            task_id: Cow::Owned(task_id),
        })
    }

    /// Ends it as failed in its current step, with these logs and messages of that.
    pub(super) fn fails<'a>(
        &self,
        job_id: Uuid,
        outcome: Outcome,
        logs: &str,
        esdl_messages: &'a [EsdlMessage],
        context: &Context<'_>,
    ) -> Decision<'a> {
        let why = kept_why(logs);
        let (logs, esdl_messages) = match &self.course {
            None => (Cow::Borrowed(logs), Cow::Borrowed(esdl_messages)),
            Some(course) => (
                course.logs(outcome, logs),
                course.esdl_messages(esdl_messages),
            ),
        };
        let (status, result_type) = match context.rules.timeout_result {
            _ if outcome != Outcome::TimedOut => (None, ResultType::Error),
            TimeoutResult::Cancelled => (Some(ClientStatus::Cancelled), ResultType::Cancelled),
            TimeoutResult::TimedOut => (None, ResultType::TimedOut),
        };
        let status = status.map(|status| Publication::Status { job_id, status });
        let result_bytes = logs.len();
        let kept = kept_of_result(&logs, &esdl_messages, context);
        let result = Publication::Result {
            job_id,
            result_type,
            output_esdl: None,
            logs: Cow::Owned(logs.into_owned()),
            esdl_messages,
        };
        let told = status.into_iter().chain([result]);
        self.ends(outcome, result_bytes, told, context)
            .because(why)
            .telling(kept)
    }

    pub(super) fn rejected<'a>(
        &self,
        job_id: Uuid,
        reason: &str,
        context: &Context<'_>,
    ) -> Decision<'a> {
        self.fails(job_id, Outcome::Rejected, reason, &[], context)
    }
}
