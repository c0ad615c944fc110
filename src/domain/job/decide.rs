//! All that can happen to a job.

use std::borrow::Cow;

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::decision::{cancellation, error_result, revoke};
use super::starts;
use super::{
    ClientStatus, Command, Completion, Context, Decision, Ended, Ending, Event, Job, JobStatus,
    LOST_LOGS, MAX_WORKFLOW_TYPE, Outcome, Progress, Publication, ResultType, State, Submission,
    TimeSeries, TimeoutResult,
};
use crate::domain::esdl;
use crate::domain::parameters;
use crate::domain::text::excerpt;
use crate::domain::workflow::Limits;

const NO_WORKER: &str = "Waiting: no worker for this workflow is connected.";

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
        State::Ending(ending) => return decide_again(job_id, ending, command, context),
        State::Ended(ended) => Standing::Ended(ended),
    };
    decide_for(job_id, standing, command, context)
}

/// Decides about a job that is ending. Whatever the service died of before the client was told, the
/// message that led to the outcome is redelivered: it leads to the same outcome, which is told
/// then, whatever it would lead to by now. For all other messages the job has ended.
fn decide_again<'a>(
    job_id: Uuid,
    ending: &Ending,
    command: &'a Command,
    context: &Context<'_>,
) -> Decision<'a> {
    let Ending { job, ended } = ending;
    if *command == Command::Expire && ended.outcome != Outcome::Expired {
        return lose(job_id, ending, context);
    }
    if ending.cancelled_before(command) {
        let again = cancel(job_id, Standing::Live(job), context);
        return Decision {
            // Nothing new, unless the Python service has registered it meanwhile.
            next: again.next.filter(|_| ended.registered_at.is_none()),
            time_series: None,
            ..again
        };
    }
    // What led to it might not any more: since then a session has begun, or a worker has
    // reconnected.
    if ended.outcome == Outcome::CrashLoop && starts::may_end(job, command) {
        return Decision {
            next: None,
            ..starts::crash_loop(job_id, job, context)
        };
    }
    let again = decide_for(job_id, Standing::Live(job), command, context);
    match again.event {
        Event::Ended(outcome) if outcome == ended.outcome => Decision {
            next: None,
            // Committed with the outcome; the client may have given them up since.
            time_series: None,
            ..again
        },
        Event::Ended(_) if ending.may_still_end_by(command) => again,
        // The workflow definitions have changed since it was refused.
        Event::Submitted { .. } if ended.outcome == Outcome::Rejected => {
            let reason = "The orchestrator refused this job when it was submitted.";
            job.rejected(job_id, Cow::Borrowed(reason), context)
        }
        Event::Submitted { .. }
        | Event::Started { .. }
        | Event::Excused { .. }
        | Event::Suspected { .. }
        | Event::Progressed
        | Event::Ended(_)
        | Event::CancelNoted
        | Event::Revoked(_)
        | Event::Ignored(_) => decide_for(job_id, Standing::Ended(ended), command, context),
    }
}

impl Ending {
    /// Whether this command may replace its outcome. The client may have been told already, so
    /// mostly not.
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

/// Tells what can be told of a job whose end has not been told and never will be.
fn lose<'a>(job_id: Uuid, ending: &Ending, context: &Context<'_>) -> Decision<'a> {
    let Ending { job, ended } = ending;
    // Until then it may be waiting in a handler's memory.
    let tellable_from = job.outcome_from(context).max(ended.finished_at);
    let told_by = tellable_from.checked_add(context.rules.outcome_lost);
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
    let to_client = [error_result(job_id, Cow::Owned(logs))];
    job.ends(Outcome::Lost, result_bytes, to_client, context)
}

/// The state that a decision sees: a job that is ending looks live to the message that led to its
/// end, and ended to every other.
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
        } => {
            let reason = Cow::Borrowed(reason.as_str());
            refuse(job_id, standing, reason, workflow_type, reference, context)
        }
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
            Own::Current(job) => progress(job_id, job, *fraction, message, context),
            Own::Done(_) => Decision::ignored("the job has ended with this task's result"),
            Own::Stray(why) => revoke(task_id, why),
        },
        Command::Result(completion) => match own_task(standing, &completion.task_id) {
            Own::Current(job) => end_with_result(job_id, job, completion, context),
            Own::Done(_) => Decision::ignored("the job has ended"),
            Own::Stray(why) => Decision {
                time_series: late_series(standing, completion),
                ..Decision::ignored(why)
            },
        },
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

fn progress<'a>(
    job_id: Uuid,
    job: &Job,
    fraction: f64,
    message: &'a str,
    context: &Context<'_>,
) -> Decision<'a> {
    if !fraction.is_finite() {
        return Decision::ignored("its progress is not a finite number");
    }
    Decision {
        next: Some(State::Live(Job {
            progress: Some(Progress::new(fraction, message, context.now)),
            ..job.clone()
        })),
        publications: vec![Publication::Progress {
            job_id,
            fraction,
            message,
        }],
        ..Decision::nothing(Event::Progressed)
    }
}

fn end_with_result<'a>(
    job_id: Uuid,
    job: &Job,
    completion: &'a Completion,
    context: &Context<'_>,
) -> Decision<'a> {
    let Completion {
        task_id: _,
        succeeded,
        output_esdl,
        logs,
        esdl_messages,
    } = completion;
    let (result_type, outcome) = match succeeded {
        true => (ResultType::Succeeded, Outcome::Succeeded),
        false => (ResultType::Error, Outcome::Failed),
    };
    let output_esdl = output_esdl.as_deref();
    let result_bytes = output_esdl.unwrap_or_default().len() + logs.len();
    let to_client = Publication::Result {
        job_id,
        result_type,
        output_esdl,
        logs: Cow::Borrowed(logs),
        esdl_messages,
    };
    Decision {
        time_series: esdl_id(completion).map(|esdl_id| TimeSeries::Keep {
            esdl_id,
            reference: Cow::Owned(job.reference.clone()),
        }),
        ..job.ends(outcome, result_bytes, [to_client], context)
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
        Expected::Yes { registered_at } => {
            let registered_at = registered_at.unwrap_or(context.now);
            let limits = &definition.limits;
            accept(job_id, submission, registered_at, limits, faults, context)
        }
        Expected::Cancelled => cancelled_before_submission(
            job_id,
            &submission.workflow_type,
            &submission.reference,
            context,
        ),
        Expected::No(why) => Decision::ignored(why),
    }
}

/// Gives a job to the workers. `faults` is in what its parameters do not fit its workflow.
fn accept<'a>(
    job_id: Uuid,
    submission: &'a Submission,
    registered_at: Timestamp,
    limits: &Limits,
    faults: Vec<String>,
    context: &Context<'_>,
) -> Decision<'a> {
    let task_id = context.new_task_id;
    let timeout_ms = submission.timeout_ms.or(limits.default_timeout_ms);
    let job = Job {
        status: JobStatus::Submitted,
        task_id: Some(task_id.to_string()),
        submitted_at: Some(context.now),
        timeout_ms: timeout_ms.map(i64::from),
        priority: Some(submission.priority),
        ..Job::without_task(
            &submission.workflow_type,
            &submission.reference,
            registered_at,
        )
    };
    let task = Publication::Task {
        job_id,
        task_id,
        submission,
    };
    let enqueued = Publication::Status {
        job_id,
        status: ClientStatus::Enqueued,
    };
    Decision {
        next: Some(State::Live(job)),
        publications: vec![task, enqueued],
        ..Decision::nothing(Event::Submitted { task_id, faults })
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
    let to_client = status.into_iter().chain([result]);
    job.ends(Outcome::TimedOut, result_bytes, to_client, context)
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
    let to_client = [error_result(job_id, Cow::Owned(logs))];
    job.ends(Outcome::Expired, result_bytes, to_client, context)
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

/// The series of a task that delivered although its job had been deleted.
fn late_series<'a>(standing: Standing<'_>, completion: &Completion) -> Option<TimeSeries<'a>> {
    match standing {
        Standing::Ended(ended) if ended.task_id.as_ref() == Some(&completion.task_id) => {
            esdl_id(completion).map(|esdl_id| TimeSeries::RetireLate {
                esdl_id,
                reference: Cow::Owned(ended.reference.clone().unwrap_or_default()),
            })
        }
        Standing::Unknown | Standing::Live(_) | Standing::Ended(_) => None,
    }
}

fn esdl_id(completion: &Completion) -> Option<String> {
    let output_esdl = completion.output_esdl.as_deref();
    output_esdl
        .filter(|_| completion.succeeded)
        .and_then(esdl::energy_system_id)
}
