//! The starts of a job's task: which of them count against its delivery limit, and which are a
//! second copy of a task whose worker is alive.
//!
//! A START of a task that was started before means one of two things. The previous execution has
//! died: the task kills its workers and must not be retried for ever. Or RabbitMQ has lost sight of
//! its worker, which goes on: the connection was closed, or RabbitMQ restarted, and the unacked
//! task was redelivered. The message does not tell them apart. So a START after an interruption of
//! RabbitMQ is excused, and before any other ends its job the workers are asked who is running the
//! task.

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::decision::revoke;
use super::hand_over;
use super::{
    CRASH_LOOP_LOGS, ClientStatus, Command, Context, Decision, Ended, Event, Job, JobStatus,
    Outcome, Publication, State,
};

/// How many starts of a job are excused at most, so that a task that takes RabbitMQ down each time
/// comes to an end too.
pub const MAX_EXCUSED: usize = 10;
/// How many starts' message ids the history keeps, the last ones.
const MAX_IN_HISTORY: usize = 20;

/// One time that a worker began the job's task.
#[derive(Debug, Clone, PartialEq)]
pub struct Start {
    pub at: Timestamp,
    /// AMQP message id of the worker's START, which tells a redelivery from a second start.
    /// None in rows of the Python service.
    pub message_id: Option<String>,
    pub verdict: Verdict,
}

/// How a start is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It counts against the delivery limit: the previous execution is taken for dead.
    Counts,
    /// Excused: a connection to RabbitMQ was lost since the start before it.
    Interrupted,
    /// Excused: according to the workers, the previous execution is still running.
    Copy,
    /// Open: the workers are asked.
    Suspected,
}

impl Verdict {
    /// Those that have a name.
    pub const NAMED: &[Verdict] = &[Verdict::Interrupted, Verdict::Copy, Verdict::Suspected];

    /// As in the database; none if it counts, as in rows of the Python service.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Verdict::Counts => None,
            Verdict::Interrupted => Some("INTERRUPTED"),
            Verdict::Copy => Some("COPY"),
            Verdict::Suspected => Some("SUSPECTED"),
        }
    }
}

/// A start that ends its job unless the workers say that nobody died.
#[derive(Debug, Clone, PartialEq)]
pub struct Suspicion {
    pub job_id: Uuid,
    pub task_id: String,
    /// The time of the start, which identifies it.
    pub at: Timestamp,
}

impl Job {
    fn counted(&self) -> usize {
        let verdicts = self.starts.iter().map(|start| start.verdict);
        verdicts
            .filter(|verdict| *verdict == Verdict::Counts)
            .count()
    }

    /// The messages of its starts, for the history.
    pub(super) fn start_ids(&self) -> Vec<String> {
        let skipped = self.starts.len().saturating_sub(MAX_IN_HISTORY);
        let starts = self.starts.iter().skip(skipped);
        starts
            .filter_map(|start| start.message_id.clone())
            .collect()
    }
}

/// A worker has begun the current task of `job`.
pub(super) fn start<'a>(
    job_id: Uuid,
    job: &Job,
    message_id: &Option<String>,
    redelivered: bool,
    context: &Context<'_>,
) -> Decision<'a> {
    let known = match message_id {
        Some(_) => job
            .starts
            .iter()
            .any(|start| start.message_id == *message_id),
        // Without an id the broker's flag is all there is to go by.
        None => redelivered && !job.starts.is_empty(),
    };
    if known {
        return Decision::ignored("this start was counted already");
    }
    let Some(verdict) = verdict(job, context) else {
        return crash_loop(job_id, job, context);
    };
    let mut job = job.clone();
    let was_running = job.status == JobStatus::Running;
    job.status = JobStatus::Running;
    if let Some(course) = &mut job.course {
        course.current.started_at.get_or_insert(context.now);
    }
    job.running_at = job.running_at.or(Some(context.now));
    // The rows' key is their time, and a batch has one time for all its messages.
    let at = job.starts.last().map_or(context.now, |last| {
        context.now.max(last.at + SignedDuration::from_micros(1))
    });
    job.starts.push(Start {
        at,
        message_id: message_id.clone(),
        verdict,
    });
    let starts = job.starts.len();
    let event = match verdict {
        Verdict::Counts => {
            // A job of several steps is one run to its client, whatever is started for it.
            let is_whole = job.course.is_none();
            if is_whole {
                job.progress = None;
            }
            let running = (is_whole || !was_running).then_some(Publication::Status {
                job_id,
                status: ClientStatus::Running,
            });
            return Decision {
                next: Some(State::Live(job)),
                publications: running.into_iter().collect(),
                ..Decision::nothing(Event::Started { starts })
            };
        }
        Verdict::Interrupted => Event::Excused {
            starts,
            why: "a connection to RabbitMQ was lost since the last time",
        },
        Verdict::Suspected | Verdict::Copy => Event::Suspected { starts },
    };
    // The client knows that it is running, and the previous execution may go on reporting progress.
    Decision {
        next: Some(State::Live(job)),
        ..Decision::nothing(event)
    }
}

/// Whether a connection to RabbitMQ may have been lost since then. A session in the future, since
/// the database's clock was set back, must not excuse every start until it is reached.
fn interrupted_since(at: Timestamp, context: &Context<'_>) -> bool {
    context
        .session_begun
        .is_some_and(|begun| at < begun && begun <= context.now)
}

/// The verdict on the next start of `job`; None if it is one too many.
fn verdict(job: &Job, context: &Context<'_>) -> Option<Verdict> {
    let excusable = job.starts.len() - job.counted() < MAX_EXCUSED;
    let interrupted = |last: &Start| interrupted_since(last.at, context);
    if excusable && job.starts.last().is_some_and(interrupted) {
        return Some(Verdict::Interrupted);
    }
    let definition = context.catalogue.definition(&job.workflow_type);
    let step = match &job.course {
        Some(course) => Some(course.step()),
        None => definition.and_then(|definition| definition.steps.plain()),
    };
    let limit = step
        .and_then(|step| step.delivery_limit)
        .or(definition.and_then(|definition| definition.limits.delivery_limit))
        .unwrap_or(context.rules.delivery_limit);
    if job.counted() < limit {
        return Some(Verdict::Counts);
    }
    // Two within the few seconds of an inquiry are no accident of a connection: a task that is
    // quick to kill its workers gets only one more try.
    let doubted = |start: &Start| start.verdict == Verdict::Suspected;
    let worth_asking = excusable && !job.starts.is_empty() && !job.starts.iter().any(doubted);
    worth_asking.then_some(Verdict::Suspected)
}

/// The workers have been asked about the start of `job` at `at`: `alive` of them are running its
/// task. With `last` nothing more is to be expected of them.
pub(super) fn judge<'a>(
    job_id: Uuid,
    job: &Job,
    at: Timestamp,
    alive: usize,
    last: bool,
    context: &Context<'_>,
) -> Decision<'a> {
    let suspected = |start: &Start| start.at == at && start.verdict == Verdict::Suspected;
    let Some(place) = job.starts.iter().position(suspected) else {
        return Decision::ignored("nothing is held against this start any more");
    };
    // Nothing is known of the executions before a start that counts or follows an interruption.
    let copies = job.starts[..place].iter().rev();
    let copies = copies.take_while(|start| start.verdict == Verdict::Copy);
    let executions = copies.count() + 2;
    let (verdict, why) = if alive >= executions {
        let why = "the workers say that all before it still run";
        (Verdict::Copy, why)
    } else if interrupted_since(at, context) {
        let why = "a connection to RabbitMQ was lost before the workers could tell";
        (Verdict::Interrupted, why)
    } else if last {
        return crash_loop(job_id, job, context);
    } else {
        return Decision::ignored("a worker may still be on its way back");
    };
    let mut job = job.clone();
    job.starts[place].verdict = verdict;
    let starts = job.starts.len();
    Decision {
        next: Some(State::Live(job)),
        ..Decision::nothing(Event::Excused { starts, why })
    }
}

/// Whether it may have been this command that ended `job` as a crash loop.
pub(super) fn may_end(job: &Job, command: &Command) -> bool {
    match command {
        Command::Start { task_id, .. } | Command::Judge { task_id, .. } => {
            job.task_id.as_ref() == Some(task_id)
        }
        Command::Submit(_)
        | Command::Refuse { .. }
        | Command::Cancel(_)
        | Command::Progress { .. }
        | Command::Result { .. }
        | Command::TimeOut
        | Command::Expire
        | Command::NoWorker
        | Command::TaskLost { .. }
        | Command::TakeTurn { .. }
        | Command::Fail { .. } => false,
    }
}

pub(super) fn crash_loop<'a>(job_id: Uuid, job: &Job, context: &Context<'_>) -> Decision<'a> {
    hand_over::fail(job_id, job, Outcome::CrashLoop, CRASH_LOOP_LOGS, context)
}

/// A START of the task whose result ended the job: one that was counted and comes again, or trails
/// its own result, or the task runs once more, for nobody.
pub(super) fn start_after_result<'a>(
    ended: &Ended,
    task_id: &'a str,
    message_id: &Option<String>,
    redelivered: bool,
) -> Decision<'a> {
    let known = ended.starts == 0
        || match message_id {
            // The history of an earlier version, or of the Python service's starts, knows none.
            Some(id) => ended.start_ids.is_empty() || ended.start_ids.contains(id),
            None => redelivered,
        };
    if known {
        return Decision::ignored("the job has ended with this task's result");
    }
    revoke(task_id, "it runs again after its result")
}
