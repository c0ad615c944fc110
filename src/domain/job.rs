//! What happens to a job: [`decide`], a pure and total function from a job's [`State`] and a
//! [`Command`] to a [`Decision`]. It knows no broker, database, clock or random source.
//!
//! ```text
//!            Submit               Start              Result              told
//!  Unknown ──────────> Submitted ────────> Running ─────────> Ending ─────────> Ended
//!   │  │                │   ▲                 │                ▲ ▲               ▲
//!   │  │                │   │ Submit          │                │ │               │
//!   │  │                │  Registered         └── Cancel, ... ─┘ │               │
//!   │  │                │  (only left by the                     │               │
//!   │  │                │   Python service)                      │               │
//!   │  │                └──────── Cancel, TimeOut, ... ──────────┤               │
//!   │  └── Refuse, unknown workflow, Submit after its Cancel ────┘               │
//!   └───────────────────────── Cancel before the submission ─────────────────────┘
//! ```
//!
//! An outcome is committed before the client is told of it, and the row in `job` goes when that has
//! been done. Whatever the service dies of in between, the command that led to the outcome comes
//! again and leads to the same one; no other can.

use std::borrow::Cow;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::domain::esdl;
use crate::domain::parameters;
use crate::domain::text::excerpt;
use crate::domain::workflow::Catalogue;
use crate::proto::EsdlMessage;

mod starts;

pub use self::starts::{MAX_EXCUSED, Start, Suspicion, Verdict};

/// Characters of a client's reference that are kept. Its task carries it whole, but a cancel, say,
/// loads what is kept of any job that it names.
pub const MAX_REFERENCE: usize = 1000;
/// The same for a workflow's name. One that is defined has no more bytes.
pub const MAX_WORKFLOW_TYPE: usize = 255;

const NO_WORKER: &str = "Waiting: no worker for this workflow is connected.";
/// Logs of the result of a job that crashed its workers; clients compare this text.
pub const CRASH_LOOP_LOGS: &str =
    "Job cannot be processed due to being retried the maximum number of times.";

/// How the logs of the result end that a client gets instead of one that RabbitMQ has lost.
pub const LOST_LOGS: &str = "was lost when RabbitMQ was interrupted. Submit it again.";

/// What the database knows of a job.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// Neither a row nor a history: never seen, or forgotten after the history's retention.
    Unknown,
    Live(Job),
    /// Its outcome is certain; whether the client has been told is not.
    Ending(Ending),
    Ended(Ended),
}

/// A job that ends: its row in `job`, left as it was, beside the one in `job_history`.
#[derive(Debug, Clone, PartialEq)]
pub struct Ending {
    pub job: Job,
    pub ended: Ended,
}

/// A job that has not ended: its row in `job` and those in `job_starts`.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub workflow_type: String,
    /// Empty when the client gave none, the first [`MAX_REFERENCE`] characters of a longer one.
    pub reference: String,
    pub status: JobStatus,
    /// The job's current Celery task; no other task's events count.
    pub task_id: Option<String>,
    pub registered_at: Timestamp,
    pub submitted_at: Option<Timestamp>,
    /// When a worker first started the job.
    pub running_at: Option<Timestamp>,
    /// How long the job may run, in milliseconds.
    pub timeout_ms: Option<i64>,
    /// None in rows of the Python service.
    pub priority: Option<Priority>,
    /// Oldest first.
    pub starts: Vec<Start>,
    /// What its task has said last, since its last start.
    pub progress: Option<Progress>,
}

/// How far a task says it is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Progress {
    /// From 0.0 to 1.0.
    pub fraction: f64,
    /// Its beginning, if it is long.
    pub message: String,
    pub at: Timestamp,
}

impl Progress {
    /// Characters that are kept of a message.
    const MAX_MESSAGE: usize = 500;

    fn new(fraction: f64, message: &str, at: Timestamp) -> Progress {
        Progress {
            fraction,
            message: kept(message, Progress::MAX_MESSAGE),
            at,
        }
    }
}

/// What is kept of a text: its first `characters`, but for NUL, which Postgres has not.
fn kept(text: &str, characters: usize) -> String {
    let storable = text.chars().filter(|character| *character != '\0');
    storable.take(characters).collect()
}

fn kept_reference(reference: Option<&str>) -> String {
    kept(reference.unwrap_or_default(), MAX_REFERENCE)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobStatus {
    /// Known but without a task. Only the Python service leaves rows like this, when it is
    /// killed between its two writes; the broker then delivers the submission again.
    Registered,
    Submitted,
    Running,
}

impl JobStatus {
    pub const ALL: &[JobStatus] = &[
        JobStatus::Registered,
        JobStatus::Submitted,
        JobStatus::Running,
    ];

    /// As the database has it.
    pub fn name(self) -> &'static str {
        match self {
            JobStatus::Registered => "REGISTERED",
            JobStatus::Submitted => "SUBMITTED",
            JobStatus::Running => "RUNNING",
        }
    }
}

/// A job that has ended: its row in `job_history`.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    pub outcome: Outcome,
    pub workflow_type: Option<String>,
    pub reference: Option<String>,
    pub task_id: Option<String>,
    /// None when a cancel was all that ever came for this job.
    pub registered_at: Option<Timestamp>,
    pub submitted_at: Option<Timestamp>,
    pub running_at: Option<Timestamp>,
    pub finished_at: Timestamp,
    pub starts: i32,
    /// AMQP message ids of the last starts; none in rows of earlier versions.
    pub start_ids: Vec<String>,
    /// Size of the output ESDL and the logs together.
    pub result_bytes: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The worker delivered an output ESDL.
    Succeeded,
    /// The worker reported an error.
    Failed,
    Cancelled,
    /// Its workers died more often than the delivery limit allows.
    CrashLoop,
    /// The submission could not be run, or an event of the job could not be handled.
    Rejected,
    /// It ran for longer than its client allowed.
    TimedOut,
    /// It stayed in one state for longer than jobs are kept.
    Expired,
    /// It had ended otherwise, but what its client was to hear got lost before it was told.
    Lost,
}

impl Outcome {
    pub const ALL: &[Outcome] = &[
        Outcome::Succeeded,
        Outcome::Failed,
        Outcome::Cancelled,
        Outcome::CrashLoop,
        Outcome::Rejected,
        Outcome::TimedOut,
        Outcome::Expired,
        Outcome::Lost,
    ];

    /// As the database has it.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Succeeded => "SUCCEEDED",
            Outcome::Failed => "FAILED",
            Outcome::Cancelled => "CANCELLED",
            Outcome::CrashLoop => "CRASH_LOOP",
            Outcome::Rejected => "REJECTED",
            Outcome::TimedOut => "TIMED_OUT",
            Outcome::Expired => "EXPIRED",
            Outcome::Lost => "LOST",
        }
    }

    /// Whether the job's own task ended it, so that nothing is left to revoke.
    fn by_its_task(self) -> bool {
        match self {
            Outcome::Succeeded | Outcome::Failed => true,
            Outcome::Cancelled
            | Outcome::CrashLoop
            | Outcome::Rejected
            | Outcome::TimedOut
            | Outcome::Expired
            | Outcome::Lost => false,
        }
    }
}

/// What somebody asks or reports about one job.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    Submit(Submission),
    /// A submission that cannot be run; its client is told why.
    Refuse {
        reason: String,
        workflow_type: String,
        reference: Option<String>,
    },
    Cancel,
    /// A worker has begun a task.
    Start {
        task_id: String,
        message_id: Option<String>,
        redelivered: bool,
    },
    Progress {
        task_id: String,
        /// From 0.0 to 1.0.
        fraction: f64,
        message: String,
    },
    Result {
        task_id: String,
        succeeded: bool,
        output_esdl: Option<String>,
        logs: String,
        esdl_messages: Vec<EsdlMessage>,
    },
    /// Somebody has seen that the job runs for longer than its timeout.
    TimeOut,
    /// Somebody has seen that the job has been in one state for longer than jobs are kept, or that
    /// it has been ending for too long.
    Expire,
    /// Somebody has seen that the job waits for a worker and that there is none.
    NoWorker,
    /// The workers have been asked who runs the task, because of its start at this time: a
    /// [`Suspicion`].
    Judge {
        task_id: String,
        at: Timestamp,
        /// How many executions of it the workers told of.
        alive: usize,
        /// Whether they had the time that they may need to come back to RabbitMQ.
        last: bool,
    },
    /// An event of the job that cannot be handled, and without which it would never end.
    Fail {
        reason: String,
        /// The task it came from, where that can be read.
        task_id: Option<String>,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Submission {
    pub workflow_type: String,
    pub esdl: String,
    pub params: Map<String, Value>,
    pub reference: Option<String>,
    pub priority: Priority,
    pub timeout_ms: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Priority {
    Low,
    #[default]
    Medium,
    High,
}

impl Priority {
    pub const ALL: &[Priority] = &[Priority::Low, Priority::Medium, Priority::High];

    /// As the database has it.
    pub fn name(self) -> &'static str {
        match self {
            Priority::Low => "LOW",
            Priority::Medium => "MEDIUM",
            Priority::High => "HIGH",
        }
    }
}

/// What a decision needs to know beside the job.
pub struct Context<'a> {
    pub now: Timestamp,
    /// When a replica last began a session with RabbitMQ; whatever had one before has lost it.
    pub session_begun: Option<Timestamp>,
    /// For the task, if one is published: fresh for each attempt, since the same task twice
    /// would look like a crash loop.
    pub new_task_id: Uuid,
    pub catalogue: &'a Catalogue,
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
    /// How long after a job's end the client may be told of it at the latest, because what led to
    /// it comes again. RabbitMQ loses that when it is killed before it has written it.
    pub telling: Duration,
    /// How long after its submission a job's client is told of its outcome at the earliest: some
    /// clients note a job only after they have submitted it, and would not know what the outcome
    /// is about.
    pub outcome_delay: Duration,
    pub timeout_result: TimeoutResult,
    /// Whether a job whose parameters do not fit its workflow's definition is refused, instead of
    /// left to its worker.
    pub reject_invalid_params: bool,
}

/// As what a client is told of a timeout.
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
    /// To be sent once it is committed, in this order: what clients are told holds. Then the job is
    /// no longer [`State::Ending`].
    pub announcements: Vec<Publication<'a>>,
    /// How long from now those of them that tell the outcome have to wait
    /// ([`Publication::tells_outcome`]), and with them the end of [`State::Ending`].
    pub wait: Duration,
    pub time_series: Option<TimeSeries<'a>>,
    pub event: Event,
}

/// A message to send.
#[derive(Debug, Clone, PartialEq)]
pub enum Publication<'a> {
    /// To the queue of the job's workflow.
    Task {
        job_id: Uuid,
        task_id: Uuid,
        submission: &'a Submission,
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
        message: &'a str,
    },
    Result {
        job_id: Uuid,
        result_type: ResultType,
        output_esdl: Option<&'a str>,
        logs: Cow<'a, str>,
        esdl_messages: &'a [EsdlMessage],
    },
}

impl Publication<'_> {
    /// Whether it is among what a client hears of its job's outcome, where it is an announcement;
    /// a revoke, which is for workers, is not.
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

/// What becomes of the database that a job's output ESDL refers to.
#[derive(Debug, Clone, PartialEq)]
pub enum TimeSeries<'a> {
    /// A job succeeded: guard its series, also when a scan had marked them meanwhile.
    Keep {
        esdl_id: String,
        reference: Cow<'a, str>,
    },
    /// The job was deleted, but its task still delivered: these series are nobody's.
    RetireLate {
        esdl_id: String,
        reference: Cow<'a, str>,
    },
    /// The job was deleted: whatever it left is to go.
    Retire,
}

/// What became of a command, for the log.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Submitted {
        task_id: Uuid,
        /// In what its parameters do not fit the workflow's definition.
        faults: Vec<String>,
    },
    Started {
        starts: usize,
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

/// What to do about `command` for the job `job_id`, which is in `state`. Every pair has an answer;
/// "ignored, because" is one of them.
pub fn decide<'a>(
    job_id: Uuid,
    state: &State,
    command: &'a Command,
    context: &Context<'_>,
) -> Decision<'a> {
    let standing = match state {
        State::Unknown => Standing::Unknown,
        State::Live(job) => Standing::Live(job),
        State::Ended(ended) => Standing::Ended(ended),
        State::Ending(ending)
            if *command == Command::Expire && ending.ended.outcome != Outcome::Expired =>
        {
            return lose(job_id, ending, context);
        }
        State::Ending(ending) if ending.cancelled_before(command) => {
            let again = cancel(job_id, Standing::Live(&ending.job), context);
            return Decision {
                // Nothing new, but where the Python service has registered it meanwhile.
                next: again.next.filter(|_| ending.ended.registered_at.is_none()),
                time_series: None,
                ..again
            };
        }
        // What led to it would not any more: since then a session has begun, or a worker is back.
        State::Ending(ending)
            if ending.ended.outcome == Outcome::CrashLoop
                && starts::may_end(&ending.job, command) =>
        {
            return Decision {
                next: None,
                ..starts::crash_loop(job_id, &ending.job, context)
            };
        }
        State::Ending(ending) => {
            let again = decide_for(job_id, Standing::Live(&ending.job), command, context);
            match again.event {
                Event::Ended(outcome) if outcome == ending.ended.outcome => {
                    return Decision {
                        next: None,
                        // Committed with the outcome; since then the client may have given them up.
                        time_series: None,
                        ..again
                    };
                }
                Event::Ended(_) if ending.may_still_end_by(command) => return again,
                // The workflow definitions have changed since it was refused.
                Event::Submitted { .. } if ending.ended.outcome == Outcome::Rejected => {
                    let reason = "The orchestrator refused this job when it was submitted.";
                    return ending.job.rejected(job_id, Cow::Borrowed(reason), context);
                }
                Event::Submitted { .. }
                | Event::Started { .. }
                | Event::Excused { .. }
                | Event::Suspected { .. }
                | Event::Progressed
                | Event::Ended(_)
                | Event::CancelNoted
                | Event::Revoked(_)
                | Event::Ignored(_) => Standing::Ended(&ending.ended),
            }
        }
    };
    decide_for(job_id, standing, command, context)
}

/// How a job stands for whoever decides about it: one that is ending is for some as it was and for
/// others at its end.
#[derive(Clone, Copy)]
enum Standing<'s> {
    Unknown,
    Live(&'s Job),
    Ended(&'s Ended),
}

fn decide_for<'a>(
    job_id: Uuid,
    standing: Standing<'_>,
    command: &'a Command,
    context: &Context<'_>,
) -> Decision<'a> {
    match command {
        Command::Submit(submission) => submit(job_id, standing, submission, context),
        Command::Refuse {
            reason,
            workflow_type,
            reference,
        } => refuse(
            job_id,
            standing,
            Cow::Borrowed(reason),
            workflow_type,
            reference,
            context,
        ),
        Command::Cancel => cancel(job_id, standing, context),
        Command::TimeOut => time_out(job_id, standing, context),
        Command::Expire => expire(job_id, standing, context),
        Command::NoWorker => no_worker(job_id, standing, context),
        Command::Start {
            task_id,
            message_id,
            redelivered,
        } => match own_task(standing, task_id) {
            Own::Current(job) => starts::start(job_id, job, message_id, *redelivered, context),
            Own::Done(ended) => {
                starts::start_after_result(ended, task_id, message_id, *redelivered)
            }
            Own::Stray(why) => revoke(task_id, why),
        },
        Command::Judge {
            task_id,
            at,
            alive,
            last,
        } => match own_task(standing, task_id) {
            Own::Current(job) => starts::judge(job_id, job, *at, *alive, *last, context),
            Own::Done(_) => Decision::ignored("the job has ended"),
            Own::Stray(why) => Decision::ignored(why),
        },
        Command::Progress {
            task_id,
            fraction,
            message,
        } => match own_task(standing, task_id) {
            Own::Current(_) if !fraction.is_finite() => {
                Decision::ignored("its progress is not a finite number")
            }
            Own::Current(job) => Decision {
                next: Some(State::Live(Job {
                    progress: Some(Progress::new(*fraction, message, context.now)),
                    ..job.clone()
                })),
                publications: vec![Publication::Progress {
                    job_id,
                    fraction: *fraction,
                    message,
                }],
                ..Decision::nothing(Event::Progressed)
            },
            Own::Done(_) => Decision::ignored("the job has ended with this task's result"),
            Own::Stray(why) => revoke(task_id, why),
        },
        Command::Result {
            task_id,
            succeeded,
            output_esdl,
            logs,
            esdl_messages,
        } => {
            let output_esdl = output_esdl.as_deref();
            match own_task(standing, task_id) {
                Own::Current(job) => {
                    let (result_type, outcome) = match succeeded {
                        true => (ResultType::Succeeded, Outcome::Succeeded),
                        false => (ResultType::Error, Outcome::Failed),
                    };
                    let result_bytes = output_esdl.unwrap_or_default().len() + logs.len();
                    let result = Publication::Result {
                        job_id,
                        result_type,
                        output_esdl,
                        logs: Cow::Borrowed(logs),
                        esdl_messages,
                    };
                    Decision {
                        time_series: esdl_id(*succeeded, output_esdl).map(|esdl_id| {
                            TimeSeries::Keep {
                                esdl_id,
                                reference: Cow::Owned(job.reference.clone()),
                            }
                        }),
                        ..job.ends(outcome, result_bytes, [result], context)
                    }
                }
                Own::Done(_) => Decision::ignored("the job has ended"),
                Own::Stray(why) => Decision {
                    time_series: late_series(standing, task_id, *succeeded, output_esdl),
                    ..Decision::ignored(why)
                },
            }
        }
        Command::Fail { reason, task_id } => match standing {
            Standing::Live(job) if task_id.is_none() || *task_id == job.task_id => {
                job.rejected(job_id, Cow::Borrowed(reason), context)
            }
            Standing::Live(_) => Decision::ignored("it is not from the job's current task"),
            Standing::Unknown => Decision::ignored("the job is unknown"),
            Standing::Ended(_) => Decision::ignored("the job has ended"),
        },
    }
}

fn submit<'a>(
    job_id: Uuid,
    standing: Standing<'_>,
    submission: &'a Submission,
    context: &Context<'_>,
) -> Decision<'a> {
    let refused = |reason| {
        refuse(
            job_id,
            standing,
            Cow::Owned(reason),
            &submission.workflow_type,
            &submission.reference,
            context,
        )
    };
    let Some(definition) = context.catalogue.definition(&submission.workflow_type) else {
        return refused(format!(
            "Workflow type {} is unknown by orchestrator at the time this submission was received.",
            excerpt(&submission.workflow_type, MAX_WORKFLOW_TYPE)
        ));
    };
    let faults = parameters::faults(&definition.parameters, &submission.params);
    if context.rules.reject_invalid_params && !faults.is_empty() {
        return refused(format!(
            "The parameters do not fit the workflow {}: {}.",
            submission.workflow_type,
            faults.join("; ")
        ));
    }
    match submission_expected(standing) {
        Expected::Yes { registered_at } => Decision {
            next: Some(State::Live(Job {
                workflow_type: submission.workflow_type.clone(),
                reference: kept_reference(submission.reference.as_deref()),
                status: JobStatus::Submitted,
                task_id: Some(context.new_task_id.to_string()),
                registered_at: registered_at.unwrap_or(context.now),
                submitted_at: Some(context.now),
                running_at: None,
                timeout_ms: submission
                    .timeout_ms
                    .or(definition.limits.default_timeout_ms)
                    .map(i64::from),
                priority: Some(submission.priority),
                starts: Vec::new(),
                progress: None,
            })),
            publications: vec![
                Publication::Task {
                    job_id,
                    task_id: context.new_task_id,
                    submission,
                },
                Publication::Status {
                    job_id,
                    status: ClientStatus::Enqueued,
                },
            ],
            ..Decision::nothing(Event::Submitted {
                task_id: context.new_task_id,
                faults,
            })
        },
        Expected::Cancelled => cancelled_before_submission(
            job_id,
            &submission.workflow_type,
            &submission.reference,
            context,
        ),
        Expected::No(why) => Decision::ignored(why),
    }
}

fn refuse<'a>(
    job_id: Uuid,
    standing: Standing<'_>,
    reason: Cow<'a, str>,
    workflow_type: &str,
    reference: &Option<String>,
    context: &Context<'_>,
) -> Decision<'a> {
    match submission_expected(standing) {
        Expected::Yes { registered_at } => {
            let registered_at = registered_at.unwrap_or(context.now);
            Job::without_task(workflow_type, reference, registered_at)
                .rejected(job_id, reason, context)
        }
        Expected::Cancelled => {
            cancelled_before_submission(job_id, workflow_type, reference, context)
        }
        Expected::No(why) => Decision::ignored(why),
    }
}

/// Whether a submission is news for a job in this state.
enum Expected {
    Yes {
        registered_at: Option<Timestamp>,
    },
    /// The cancel of this submission came first.
    Cancelled,
    No(&'static str),
}

fn submission_expected(standing: Standing<'_>) -> Expected {
    match standing {
        Standing::Unknown => Expected::Yes {
            registered_at: None,
        },
        Standing::Live(job) => match job.status {
            JobStatus::Registered => Expected::Yes {
                registered_at: Some(job.registered_at),
            },
            JobStatus::Submitted | JobStatus::Running => {
                Expected::No("the job was submitted already")
            }
        },
        Standing::Ended(ended) if ended.registered_at.is_none() => Expected::Cancelled,
        Standing::Ended(_) => Expected::No("the job has ended already"),
    }
}

fn cancelled_before_submission<'a>(
    job_id: Uuid,
    workflow_type: &str,
    reference: &Option<String>,
    context: &Context<'_>,
) -> Decision<'a> {
    Job::without_task(workflow_type, reference, context.now).ends(
        Outcome::Cancelled,
        0,
        cancellation(job_id),
        context,
    )
}

fn cancel<'a>(job_id: Uuid, standing: Standing<'_>, context: &Context<'_>) -> Decision<'a> {
    match standing {
        Standing::Unknown => Decision {
            next: Some(State::Ended(Ended {
                outcome: Outcome::Cancelled,
                workflow_type: None,
                reference: None,
                task_id: None,
                registered_at: None,
                submitted_at: None,
                running_at: None,
                finished_at: context.now,
                starts: 0,
                start_ids: Vec::new(),
                result_bytes: 0,
            })),
            time_series: Some(TimeSeries::Retire),
            ..Decision::nothing(Event::CancelNoted)
        },
        Standing::Live(job) => Decision {
            time_series: Some(TimeSeries::Retire),
            ..job.ends(Outcome::Cancelled, 0, cancellation(job_id), context)
        },
        // Deleting a finished job is how a client gives up the series that it left.
        Standing::Ended(_) => Decision {
            time_series: Some(TimeSeries::Retire),
            ..Decision::ignored("the job has ended already")
        },
    }
}

/// Ends a job that runs for longer than its timeout. Whoever found it may have looked before it
/// ended or was started again, so this looks once more.
fn time_out<'a>(job_id: Uuid, standing: Standing<'_>, context: &Context<'_>) -> Decision<'a> {
    let due = |job: &Job| {
        let timeout = SignedDuration::from_millis(job.timeout_ms.filter(|timeout| *timeout > 0)?);
        let running_at = job
            .running_at
            .filter(|_| job.status == JobStatus::Running)?;
        (running_at.checked_add(timeout).ok()? <= context.now).then_some(timeout)
    };
    let (job, timeout) = match standing {
        Standing::Live(job) => match due(job) {
            Some(timeout) => (job, timeout),
            None => return Decision::ignored("it is within its timeout"),
        },
        Standing::Unknown | Standing::Ended(_) => return Decision::ignored("the job has ended"),
    };
    let logs =
        format!("The job was ended because it ran for longer than its timeout of {timeout:#}.");
    let result_bytes = logs.len();
    let (status, result_type) = match context.rules.timeout_result {
        TimeoutResult::Cancelled => (
            Some(Publication::Status {
                job_id,
                status: ClientStatus::Cancelled,
            }),
            ResultType::Cancelled,
        ),
        TimeoutResult::TimedOut => (None, ResultType::TimedOut),
    };
    let result = Publication::Result {
        job_id,
        result_type,
        output_esdl: None,
        logs: Cow::Owned(logs),
        esdl_messages: &[],
    };
    let told = status.into_iter().chain([result]);
    job.ends(Outcome::TimedOut, result_bytes, told, context)
}

/// Ends a job that nothing has been heard of for so long that nobody can be waiting for it.
fn expire<'a>(job_id: Uuid, standing: Standing<'_>, context: &Context<'_>) -> Decision<'a> {
    let job = match standing {
        Standing::Live(job) => job,
        Standing::Unknown | Standing::Ended(_) => return Decision::ignored("the job has ended"),
    };
    let (since, what) = match job.status {
        JobStatus::Registered => (None, "registered"),
        JobStatus::Submitted => (job.submitted_at, "waiting for a worker"),
        JobStatus::Running => (job.running_at, "running"),
    };
    let retention = context.rules.retention;
    let expired = since
        .unwrap_or(job.registered_at)
        .checked_add(retention)
        .is_ok_and(|end| end <= context.now);
    if !expired {
        return Decision::ignored("it is within its retention");
    }
    let retention = SignedDuration::try_from(retention).unwrap_or(SignedDuration::MAX);
    let logs = format!(
        "The job was given up because it had been {what} for longer than the {retention:#} that \
         unfinished jobs are kept."
    );
    let result_bytes = logs.len();
    let told = [error_result(job_id, Cow::Owned(logs))];
    job.ends(Outcome::Expired, result_bytes, told, context)
}

/// Tells the client why nothing happens, once while the job waits.
fn no_worker<'a>(job_id: Uuid, standing: Standing<'_>, context: &Context<'_>) -> Decision<'a> {
    match standing {
        Standing::Live(job) if job.status == JobStatus::Submitted && job.progress.is_none() => {
            Decision {
                next: Some(State::Live(Job {
                    progress: Some(Progress::new(0.0, NO_WORKER, context.now)),
                    ..job.clone()
                })),
                publications: vec![Publication::Progress {
                    job_id,
                    fraction: 0.0,
                    message: NO_WORKER,
                }],
                ..Decision::nothing(Event::Progressed)
            }
        }
        Standing::Unknown | Standing::Live(_) | Standing::Ended(_) => {
            Decision::ignored("the job does not wait, or its client knows")
        }
    }
}

/// Tells what can be told of a job whose end nobody has told, and never will.
fn lose<'a>(job_id: Uuid, ending: &Ending, context: &Context<'_>) -> Decision<'a> {
    let Ending { job, ended } = ending;
    // Until then it may wait in somebody's memory.
    let tellable_from = job.outcome_from(context).max(ended.finished_at);
    let told_by = tellable_from.checked_add(context.rules.telling);
    if !told_by.is_ok_and(|end| end <= context.now) {
        return Decision::ignored("what led to its end may come again");
    }
    let what = match ended.outcome {
        Outcome::Cancelled => {
            return Decision {
                next: None,
                ..cancel(job_id, Standing::Live(job), context)
            };
        }
        Outcome::Succeeded => "succeeded, but its result",
        Outcome::Failed => "failed, but its worker's message",
        Outcome::CrashLoop
        | Outcome::Rejected
        | Outcome::TimedOut
        | Outcome::Expired
        | Outcome::Lost => "was ended by the orchestrator, but why",
    };
    let logs = format!("The job {what} {LOST_LOGS}");
    let result_bytes = logs.len();
    let told = [error_result(job_id, Cow::Owned(logs))];
    job.ends(Outcome::Lost, result_bytes, told, context)
}

/// How a task relates to the job that its event names.
enum Own<'s> {
    Current(&'s Job),
    /// It is the task whose result ended the job.
    Done(&'s Ended),
    /// Nobody waits for it.
    Stray(&'static str),
}

fn own_task<'s>(standing: Standing<'s>, task_id: &str) -> Own<'s> {
    match standing {
        Standing::Unknown => Own::Stray("the job is unknown"),
        Standing::Live(job) if job.task_id.as_deref() == Some(task_id) => Own::Current(job),
        Standing::Live(_) => Own::Stray("it is not the job's current task"),
        Standing::Ended(ended)
            if ended.outcome.by_its_task() && ended.task_id.as_deref() == Some(task_id) =>
        {
            Own::Done(ended)
        }
        Standing::Ended(_) => Own::Stray("the job has ended"),
    }
}

fn revoke<'a>(task_id: &'a str, why: &'static str) -> Decision<'a> {
    Decision {
        publications: vec![Publication::Revoke {
            task_id: Cow::Borrowed(task_id),
        }],
        ..Decision::nothing(Event::Revoked(why))
    }
}

/// The series of a task that delivered although its job had been deleted.
fn late_series<'a>(
    standing: Standing<'_>,
    task_id: &str,
    succeeded: bool,
    output_esdl: Option<&str>,
) -> Option<TimeSeries<'a>> {
    match standing {
        Standing::Ended(ended) if ended.task_id.as_deref() == Some(task_id) => {
            esdl_id(succeeded, output_esdl).map(|esdl_id| TimeSeries::RetireLate {
                esdl_id,
                reference: Cow::Owned(ended.reference.clone().unwrap_or_default()),
            })
        }
        Standing::Unknown | Standing::Live(_) | Standing::Ended(_) => None,
    }
}

fn esdl_id(succeeded: bool, output_esdl: Option<&str>) -> Option<String> {
    output_esdl
        .filter(|_| succeeded)
        .and_then(esdl::energy_system_id)
}

fn error_result(job_id: Uuid, logs: Cow<'_, str>) -> Publication<'_> {
    Publication::Result {
        job_id,
        result_type: ResultType::Error,
        output_esdl: None,
        logs,
        esdl_messages: &[],
    }
}

fn cancellation<'a>(job_id: Uuid) -> [Publication<'a>; 2] {
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
            esdl_messages: &[],
        },
    ]
}

fn to_i64(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

impl Decision<'_> {
    fn nothing(event: Event) -> Self {
        Decision {
            next: None,
            publications: Vec::new(),
            announcements: Vec::new(),
            wait: Duration::ZERO,
            time_series: None,
            event,
        }
    }

    fn ignored(why: &'static str) -> Self {
        Decision::nothing(Event::Ignored(why))
    }
}

impl Job {
    /// One that is known and not given to the workers.
    fn without_task(
        workflow_type: &str,
        reference: &Option<String>,
        registered_at: Timestamp,
    ) -> Job {
        Job {
            workflow_type: kept(workflow_type, MAX_WORKFLOW_TYPE),
            reference: kept_reference(reference.as_deref()),
            status: JobStatus::Registered,
            task_id: None,
            registered_at,
            submitted_at: None,
            running_at: None,
            timeout_ms: None,
            priority: None,
            starts: Vec::new(),
            progress: None,
        }
    }

    /// From when its client may be told how it has ended.
    fn outcome_from(&self, context: &Context<'_>) -> Timestamp {
        // A clock that was put back delays nobody for longer.
        let submitted = self.registered_at.min(context.now);
        submitted
            .checked_add(context.rules.outcome_delay)
            .unwrap_or(Timestamp::MAX)
    }

    fn ended(&self, outcome: Outcome, result_bytes: usize, now: Timestamp) -> Ended {
        Ended {
            outcome,
            workflow_type: Some(self.workflow_type.clone()),
            reference: Some(self.reference.clone()),
            task_id: self.task_id.clone(),
            registered_at: Some(self.registered_at),
            submitted_at: self.submitted_at,
            running_at: self.running_at,
            finished_at: now,
            starts: i32::try_from(self.starts.len()).unwrap_or(i32::MAX),
            start_ids: self.start_ids(),
            result_bytes: to_i64(result_bytes),
        }
    }

    /// Ends it with this outcome: its task, unless that has done it and there is no second copy of
    /// it, and then the client is told.
    fn ends<'a>(
        &self,
        outcome: Outcome,
        result_bytes: usize,
        told: impl IntoIterator<Item = Publication<'a>>,
        context: &Context<'_>,
    ) -> Decision<'a> {
        let runs = !outcome.by_its_task() || self.starts.len() > 1;
        let task = self.task_id.clone().filter(|_| runs);
        let revocation = task.map(|task_id| Publication::Revoke {
            task_id: Cow::Owned(task_id),
        });
        Decision {
            next: Some(State::Ending(Ending {
                job: self.clone(),
                ended: self.ended(outcome, result_bytes, context.now),
            })),
            announcements: revocation.into_iter().chain(told).collect(),
            // Negative once the time has come.
            wait: context
                .now
                .duration_until(self.outcome_from(context))
                .try_into()
                .unwrap_or_default(),
            ..Decision::nothing(Event::Ended(outcome))
        }
    }

    fn rejected<'a>(
        &self,
        job_id: Uuid,
        reason: Cow<'a, str>,
        context: &Context<'_>,
    ) -> Decision<'a> {
        let told = [error_result(job_id, reason.clone())];
        self.ends(Outcome::Rejected, reason.len(), told, context)
    }
}

impl Ending {
    /// Whether its outcome may become the one that this command leads to. The client has perhaps
    /// been told what is certain, so mostly not.
    fn may_still_end_by(&self, command: &Command) -> bool {
        match command {
            // Its task's result could not be told: an error is told instead ...
            Command::Fail { .. } => self.ended.outcome.by_its_task(),
            // ... and may not have been.
            Command::Result { .. } => self.ended.outcome == Outcome::Rejected,
            Command::Submit(_)
            | Command::Refuse { .. }
            | Command::Cancel
            | Command::Start { .. }
            | Command::Progress { .. }
            | Command::TimeOut
            | Command::Expire
            | Command::NoWorker
            | Command::Judge { .. } => false,
        }
    }

    /// Whether this is the submission that came after its cancel.
    fn cancelled_before(&self, command: &Command) -> bool {
        let is_submission = match command {
            Command::Submit(_) | Command::Refuse { .. } => true,
            Command::Cancel
            | Command::Start { .. }
            | Command::Progress { .. }
            | Command::Result { .. }
            | Command::TimeOut
            | Command::Expire
            | Command::NoWorker
            | Command::Judge { .. }
            | Command::Fail { .. } => false,
        };
        is_submission
            && self.ended.outcome == Outcome::Cancelled
            && self.job.status == JobStatus::Registered
    }
}

impl State {
    /// The client's own name for the job, empty when it gave none.
    pub fn reference(&self) -> &str {
        match self {
            State::Unknown => "",
            State::Live(job) | State::Ending(Ending { job, .. }) => &job.reference,
            State::Ended(ended) => ended.reference.as_deref().unwrap_or_default(),
        }
    }

    pub fn workflow_type(&self) -> Option<&str> {
        match self {
            State::Unknown => None,
            State::Live(job) | State::Ending(Ending { job, .. }) => Some(&job.workflow_type),
            State::Ended(ended) => ended.workflow_type.as_deref(),
        }
    }
}

impl Command {
    /// What it is, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Command::Submit(_) | Command::Refuse { .. } => "a submission",
            Command::Cancel => "a cancel",
            Command::Start { .. } => "a start",
            Command::Progress { .. } => "progress",
            Command::Result { .. } | Command::Fail { .. } => "a result",
            Command::TimeOut => "a timeout",
            Command::Expire => "the end of its retention",
            Command::NoWorker => "the lack of a worker",
            Command::Judge { .. } => "what the workers say of a start",
        }
    }

    /// The client's own name for the job, where the command carries one.
    pub fn reference(&self) -> &str {
        match self {
            Command::Submit(submission) => submission.reference.as_deref().unwrap_or_default(),
            Command::Refuse { reference, .. } => reference.as_deref().unwrap_or_default(),
            Command::Cancel
            | Command::Start { .. }
            | Command::Progress { .. }
            | Command::Result { .. }
            | Command::TimeOut
            | Command::Expire
            | Command::NoWorker
            | Command::Judge { .. }
            | Command::Fail { .. } => "",
        }
    }

    /// The workflow it names.
    pub fn workflow_type(&self) -> Option<&str> {
        match self {
            Command::Submit(submission) => Some(&submission.workflow_type),
            Command::Refuse { workflow_type, .. } => Some(workflow_type),
            Command::Cancel
            | Command::Start { .. }
            | Command::Progress { .. }
            | Command::Result { .. }
            | Command::TimeOut
            | Command::Expire
            | Command::NoWorker
            | Command::Judge { .. }
            | Command::Fail { .. } => None,
        }
    }

    /// The Celery task it comes from.
    pub fn task_id(&self) -> Option<&str> {
        match self {
            Command::Start { task_id, .. }
            | Command::Progress { task_id, .. }
            | Command::Result { task_id, .. }
            | Command::Judge { task_id, .. } => Some(task_id),
            Command::Fail { task_id, .. } => task_id.as_deref(),
            Command::Submit(_)
            | Command::Refuse { .. }
            | Command::Cancel
            | Command::TimeOut
            | Command::Expire
            | Command::NoWorker => None,
        }
    }

    /// About how many bytes the values decoded from its message take beside those of its texts.
    pub fn decoded_bytes(&self) -> usize {
        match self {
            Command::Submit(submission) => parameters::bytes(&submission.params),
            Command::Result { esdl_messages, .. } => size_of_val(esdl_messages.as_slice()),
            Command::Refuse { .. }
            | Command::Cancel
            | Command::Start { .. }
            | Command::Progress { .. }
            | Command::TimeOut
            | Command::Expire
            | Command::NoWorker
            | Command::Judge { .. }
            | Command::Fail { .. } => 0,
        }
    }

    /// What to do instead when the broker or the database refuses what this command causes.
    /// None where the job can go on without it.
    pub fn instead(&self, reason: String) -> Option<Command> {
        match self {
            Command::Submit(submission) => Some(Command::Refuse {
                reason,
                workflow_type: kept(&submission.workflow_type, MAX_WORKFLOW_TYPE),
                reference: submission
                    .reference
                    .as_ref()
                    .map(|reference| kept(reference, MAX_REFERENCE)),
            }),
            Command::Result { task_id, .. } => Some(Command::Fail {
                reason,
                task_id: Some(task_id.clone()),
            }),
            Command::Refuse { .. }
            | Command::Cancel
            | Command::Start { .. }
            | Command::Progress { .. }
            | Command::TimeOut
            | Command::Expire
            | Command::NoWorker
            | Command::Judge { .. }
            | Command::Fail { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests;
