//! All that can happen to a job.

use std::borrow::Cow;

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::decision::{cancellation, error_result, revoke};
use super::{
    Attempt, ClientStatus, Command, Completion, Context, Decision, Ended, Ending, Event, Job,
    JobStatus, LOST_LOGS, MAX_WORKFLOW_TYPE, Origin, Outcome, Publication, State, Submission,
    TimeSeries, Via, kept_why,
};
use super::{hand_over, starts, told};
use crate::domain::parameters;
use crate::domain::text::excerpt;
use crate::domain::workflow::Definition;

/// Why an event of a task that is no longer the job's is not heeded.
const EARLIER_STEP: &str = "it is of an attempt that has ended";
const SUBMITTED_ALREADY: &str = "the job was submitted already";
const NO_WORKER: &str = "Waiting: no worker for this workflow is connected.";

/// What to do about `command` for the job `job_id`, which is in `state`. Every pair has an answer;
/// "ignored, because" is one of them.
pub fn decide<'a>(
    job_id: Uuid,
    state: &State,
    command: &'a Command,
    context: &Context<'_>,
) -> Decision<'a> {
    let taken;
    let standing = match state {
        State::Unknown => Standing::Unknown,
        State::Live(job) => match command.task_id().and_then(|task| job.with_granted(task)) {
            Some(job) => {
                taken = job;
                Standing::Live(&taken)
            }
            None => Standing::Live(job),
        },
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
            time_series: Vec::new(),
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
            time_series: Vec::new(),
            ..again
        },
        Event::Ended(_) if ending.may_still_end_by(command) => again,
        // The workflow definitions have changed since it was refused.
        Event::Submitted { .. } | Event::Held { what: None, .. }
            if ended.outcome == Outcome::Rejected =>
        {
            let reason = "The orchestrator refused this job when it was submitted.";
            job.rejected(job_id, reason, context)
        }
        // So was its next task.
        Event::HandedOver { .. } | Event::Postponed { .. } | Event::Held { .. }
            if ended.outcome == Outcome::Rejected =>
        {
            let reason = "The orchestrator could not go on with this job.";
            Decision {
                next: None,
                time_series: Vec::new(),
                ..job.rejected(job_id, reason, context)
            }
        }
        Event::Submitted { .. }
        | Event::Held { .. }
        | Event::Started { .. }
        | Event::HandedOver { .. }
        | Event::Postponed { .. }
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
            | Command::Cancel(_)
            | Command::Start { .. }
            | Command::Progress { .. }
            | Command::TimeOut
            | Command::Expire
            | Command::NoWorker
            | Command::TaskLost { .. }
            | Command::TakeTurn { .. }
            | Command::Judge { .. } => false,
        }
    }

    /// Whether this is the submission that came after its cancel.
    fn cancelled_before(&self, command: &Command) -> bool {
        let is_submission = match command {
            Command::Submit(_) | Command::Refuse { .. } => true,
            Command::Cancel(_)
            | Command::Start { .. }
            | Command::Progress { .. }
            | Command::Result { .. }
            | Command::TimeOut
            | Command::Expire
            | Command::NoWorker
            | Command::TaskLost { .. }
            | Command::TakeTurn { .. }
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
    let (result_bytes, why) = (logs.len(), kept_why(&logs));
    let to_client = [error_result(job_id, Cow::Owned(logs))];
    job.ends(Outcome::Lost, result_bytes, to_client, context)
        .because(why)
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
        } => refuse(job_id, standing, reason, workflow_type, reference, context),
        Command::Cancel(origin) => {
            let cancel = cancel(job_id, standing, context);
            let by_client = origin.via == Via::Client;
            Decision {
                gives_up_kept: cancel.gives_up_kept && by_client,
                ..cancel
            }
            .asked_by(origin)
        }
        Command::TimeOut => time_out(job_id, standing, context),
        Command::Expire => expire(job_id, standing, context),
        Command::NoWorker => no_worker(job_id, standing, context),
        Command::TakeTurn { grant } => match standing {
            Standing::Live(job) => hand_over::take_turn(job_id, job, *grant, context),
            Standing::Unknown | Standing::Ended(_) => Decision::ignored("the job has ended"),
        },
        Command::Start {
            task_id,
            message_id,
            redelivered,
        } => match own_task(standing, task_id) {
            Own::Current(job) => starts::start(job_id, job, message_id, *redelivered, context),
            Own::Done(ended) => {
                starts::start_after_result(ended, task_id, message_id, *redelivered)
            }
            Own::Earlier(_) => revoke(task_id, EARLIER_STEP),
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
            Own::Earlier(_) => Decision::ignored(EARLIER_STEP),
            Own::Stray(why) => Decision::ignored(why),
        },
        Command::TaskLost { task_id, since } => match own_task(standing, task_id) {
            Own::Current(job) => task_lost(job_id, job, *since, context),
            Own::Done(_) => Decision::ignored("the job has ended"),
            Own::Earlier(_) => Decision::ignored(EARLIER_STEP),
            Own::Stray(why) => Decision::ignored(why),
        },
        Command::Progress {
            task_id,
            fraction,
            message,
        } => match own_task(standing, task_id) {
            Own::Current(job) => progress(job_id, job, *fraction, message, context),
            Own::Done(_) => Decision::ignored("the job has ended with this task's result"),
            // The last progress trails the result.
            Own::Earlier(attempt) if attempt.by_its_result() => Decision::ignored(EARLIER_STEP),
            Own::Earlier(_) => revoke(task_id, EARLIER_STEP),
            Own::Stray(why) => revoke(task_id, why),
        },
        Command::Result(completion) => match own_task(standing, &completion.task_id) {
            Own::Current(job) => hand_over::complete(job_id, job, completion, context),
            Own::Done(_) => Decision::ignored("the job has ended"),
            Own::Earlier(attempt) if attempt.by_its_result() => Decision::ignored(EARLIER_STEP),
            Own::Earlier(_) => Decision {
                time_series: late_series(standing, completion),
                ..Decision::ignored(EARLIER_STEP)
            },
            Own::Stray(why) => Decision {
                time_series: late_series(standing, completion),
                ..Decision::ignored(why)
            },
        },
        Command::Fail { reason, task_id } => match standing {
            Standing::Live(job) if task_id.is_none() || *task_id == job.task_id => {
                job.rejected(job_id, reason, context)
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
    let mut job = job.clone();
    let told = job.tells_progress(job_id, fraction, message, context.now);
    Decision {
        next: Some(State::Live(job)),
        publications: vec![told],
        ..Decision::nothing(Event::Progressed)
    }
}

fn submit<'a>(
    job_id: Uuid,
    standing: Standing<'_>,
    submission: &'a Submission,
    context: &Context<'_>,
) -> Decision<'a> {
    let refused = |reason: String| {
        refuse(
            job_id,
            standing,
            &reason,
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
    let misfits = parameters::misfits(&definition.parameters, &submission.params);
    let (keys, faults): (Vec<_>, Vec<_>) = misfits.into_iter().unzip();
    if context.rules.reject_invalid_params && !faults.is_empty() {
        let refused = refused(misfit(submission, &faults.join("; ")));
        return match context.rules.keep_parameters {
            true => refused,
            // Its client is told the values, and nobody else.
            false => refused.keeping_of_refusal(&misfit(submission, &keys.join(", ")), context),
        };
    }
    match submission_expected(standing) {
        Expected::Yes { registered_at } => {
            let registered_at = registered_at.unwrap_or(context.now);
            accept(
                job_id,
                submission,
                registered_at,
                definition,
                faults,
                context,
            )
        }
        Expected::Cancelled(by) => cancelled_before_submission(
            job_id,
            &submission.workflow_type,
            &submission.reference,
            by,
            context,
        ),
        Expected::Again => Decision {
            publications: vec![enqueued(job_id)],
            ..Decision::ignored(SUBMITTED_ALREADY)
        },
        Expected::No(why) => Decision::ignored(why),
    }
}

fn misfit(submission: &Submission, what: &str) -> String {
    let workflow = &submission.workflow_type;
    format!("The parameters do not fit the workflow {workflow}: {what}.")
}

fn enqueued<'a>(job_id: Uuid) -> Publication<'a> {
    Publication::Status {
        job_id,
        status: ClientStatus::Enqueued,
    }
}

/// Gives a job to the workers, or lets it wait for its turn. `faults` is in what its parameters do not fit its workflow.
fn accept<'a>(
    job_id: Uuid,
    submission: &'a Submission,
    registered_at: Timestamp,
    definition: &Definition,
    faults: Vec<String>,
    context: &Context<'_>,
) -> Decision<'a> {
    let timeout_ms = submission
        .timeout_ms
        .or(definition.limits.default_timeout_ms);
    let job = Job {
        timeout_ms: timeout_ms.map(i64::from),
        priority: Some(submission.priority),
        parameters: told::kept_parameters(&submission.params, context),
        ..Job::without_task(
            &submission.workflow_type,
            &submission.reference,
            registered_at,
        )
    };
    let enqueued = enqueued(job_id);
    let queue = &definition.steps.all()[0].task;
    if (context.has_limits)(queue) {
        let course = Some(hand_over::hold(submission, &definition.steps, context));
        return Decision {
            next: Some(State::Live(Job { course, ..job })),
            publications: vec![enqueued],
            ..Decision::nothing(Event::Held {
                what: None,
                queue: queue.clone(),
                faults,
            })
        };
    }
    let task_id = context.new_task_id;
    let (assignment, course) = hand_over::submit(submission, &definition.steps, context);
    let job = Job {
        status: JobStatus::Submitted,
        task_id: Some(task_id.to_string()),
        submitted_at: Some(context.now),
        // The definitions may say something else before a worker has begun it.
        task_queue: course.is_none().then(|| queue.clone()),
        course,
        ..job
    };
    let task = Publication::Task {
        job_id,
        task_id,
        assignment,
    };
    Decision {
        next: Some(State::Live(job)),
        publications: vec![task, enqueued],
        ..Decision::nothing(Event::Submitted {
            task_id,
            queue: queue.clone(),
            faults,
        })
    }
}

fn refuse<'a>(
    job_id: Uuid,
    standing: Standing<'_>,
    reason: &str,
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
        Expected::Cancelled(by) => {
            cancelled_before_submission(job_id, workflow_type, reference, by, context)
        }
        Expected::Again => Decision::ignored(SUBMITTED_ALREADY),
        Expected::No(why) => Decision::ignored(why),
    }
}

/// Whether a submission is news for a job in this state.
enum Expected<'s> {
    Yes {
        registered_at: Option<Timestamp>,
    },
    /// The cancel of this submission came first, from whom, as far as the batch knows.
    Cancelled(Option<&'s Origin>),
    /// It is none, but that it was accepted may not have reached its client.
    Again,
    No(&'static str),
}

/// Whether its task has had to wait for its turn.
fn waits_or_waited(job: &Job) -> bool {
    let course = job.course.as_ref();
    course.is_some_and(|course| course.turn.is_some())
}

fn submission_expected(standing: Standing<'_>) -> Expected<'_> {
    match standing {
        Standing::Unknown => Expected::Yes {
            registered_at: None,
        },
        Standing::Live(job) => match job.status {
            JobStatus::Registered if job.course.is_none() => Expected::Yes {
                registered_at: Some(job.registered_at),
            },
            JobStatus::Registered | JobStatus::Submitted if waits_or_waited(job) => Expected::Again,
            JobStatus::Registered | JobStatus::Submitted | JobStatus::Running => {
                Expected::No(SUBMITTED_ALREADY)
            }
        },
        Standing::Ended(ended) if ended.registered_at.is_none() => {
            let told = ended.told.as_ref();
            Expected::Cancelled(told.and_then(|told| told.by.as_ref()))
        }
        Standing::Ended(_) => Expected::No("the job has ended already"),
    }
}

fn cancelled_before_submission<'a>(
    job_id: Uuid,
    workflow_type: &str,
    reference: &Option<String>,
    by: Option<&Origin>,
    context: &Context<'_>,
) -> Decision<'a> {
    let ends = Job::without_task(workflow_type, reference, context.now).ends(
        Outcome::Cancelled,
        0,
        cancellation(job_id),
        context,
    );
    match by {
        Some(origin) => ends.asked_by(origin),
        None => ends,
    }
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
                why: None,
                told: Some(Box::default()),
            })),
            time_series: vec![TimeSeries::Retire],
            ..Decision::nothing(Event::CancelNoted)
        },
        Standing::Live(job) => Decision {
            time_series: vec![TimeSeries::Retire],
            ..job.ends(Outcome::Cancelled, 0, cancellation(job_id), context)
        },
        // Deleting a finished job is how a client gives up what it left. A cancel that comes again, or an
        // operator's that has met the job's end, is none.
        Standing::Ended(ended) => Decision {
            time_series: vec![TimeSeries::Retire],
            gives_up_kept: ended.outcome != Outcome::Cancelled,
            ..Decision::ignored("the job has ended already")
        },
    }
}

/// Ends a job, or its step, that runs for longer than its timeout. Whoever found it may have looked
/// before it ended or was started again, so this looks once more.
fn time_out<'a>(job_id: Uuid, standing: Standing<'_>, context: &Context<'_>) -> Decision<'a> {
    let job = match standing {
        Standing::Live(job) => job,
        Standing::Unknown | Standing::Ended(_) => return Decision::ignored("the job has ended"),
    };
    if let Some(timeout) = job.overdue(context.now) {
        let logs =
            format!("The job was ended because it ran for longer than its timeout of {timeout:#}.");
        return job.fails(job_id, Outcome::TimedOut, &logs, &[], context);
    }
    match job.step_overdue(context.now) {
        Some((step, timeout)) => {
            let logs = format!(
                "The step {step} was ended because it ran for longer than its timeout of \
                 {timeout:#}."
            );
            hand_over::fail(job_id, job, Outcome::TimedOut, &logs, context)
        }
        None => Decision::ignored("it is within its timeout"),
    }
}

impl Job {
    /// Its timeout, if it has passed. What later steps wait in their queues is not counted.
    fn overdue(&self, now: Timestamp) -> Option<SignedDuration> {
        let timeout = SignedDuration::from_millis(self.timeout_ms.filter(|timeout| *timeout > 0)?);
        let running_at = self
            .running_at
            .filter(|_| self.status == JobStatus::Running)?;
        let idle = match &self.course {
            Some(course) => course.idle(running_at, now),
            None => SignedDuration::ZERO,
        };
        let end = running_at.checked_add(timeout.saturating_add(idle)).ok()?;
        (end <= now).then_some(timeout)
    }

    /// The title and the timeout of its current step, if that has passed.
    fn step_overdue(&self, now: Timestamp) -> Option<(&str, SignedDuration)> {
        let course = self.course.as_ref()?;
        let timeout = SignedDuration::from_millis(course.step().timeout_ms?.into());
        let end = course.current.started_at?.checked_add(timeout).ok()?;
        (end <= now).then_some((course.step().title.as_str(), timeout))
    }

    /// Since when nothing has happened to it, and what it has been doing.
    fn unchanged_since(&self) -> (Timestamp, &'static str) {
        let (since, what) = match self.status {
            JobStatus::Registered => (None, "registered"),
            JobStatus::Submitted => (self.submitted_at, "waiting for a worker"),
            JobStatus::Running => (self.running_at, "running"),
        };
        let (since, what) = match &self.course {
            Some(course) => match course.turn_to_come() {
                Some(turn) => (Some(turn.since), "waiting for its turn"),
                None if course.waits() => {
                    (course.current.since().or(since), "waiting for a worker")
                }
                None => (course.current.since().or(since), what),
            },
            None => (since, what),
        };
        (since.unwrap_or(self.registered_at), what)
    }
}

/// Ends a job that nothing has been heard of for so long that nobody can be waiting for it.
fn expire<'a>(job_id: Uuid, standing: Standing<'_>, context: &Context<'_>) -> Decision<'a> {
    let job = match standing {
        Standing::Live(job) => job,
        Standing::Unknown | Standing::Ended(_) => return Decision::ignored("the job has ended"),
    };
    let (since, what) = job.unchanged_since();
    let retention = context.rules.retention;
    let expired = since
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
    job.fails(job_id, Outcome::Expired, &logs, &[], context)
}

/// Ends a job, or its step, whose task no worker has, and which is in no queue. It is not started again: of a
/// job of one step nobody has kept the input, and what takes a task from RabbitMQ without a word, as an
/// operator's revoke does, may well have meant it. Whatever its worker has said since shows that it has it.
fn task_lost<'a>(job_id: Uuid, job: &Job, since: Timestamp, context: &Context<'_>) -> Decision<'a> {
    let heard_since = |at: Timestamp| at >= since;
    let is_waiting = match &job.course {
        Some(course) => course.waits(),
        None => job.status == JobStatus::Submitted,
    };
    if is_waiting {
        let submitted_at = match &job.course {
            Some(course) => course.current.submitted_at,
            None => job.submitted_at,
        };
        if submitted_at.is_none_or(heard_since) {
            return Decision::ignored("its task was put on its queue since");
        }
        let logs = format!(
            "The job was ended because its task was lost before a worker began it: since {since:.0} it has \
             been in no queue, and no worker has had it."
        );
        return hand_over::fail(job_id, job, Outcome::Lost, &logs, context);
    }
    if job.status != JobStatus::Running {
        return Decision::ignored("it has no task yet");
    }
    let last_start = job.starts.last().map(|start| start.at);
    if last_start.is_some_and(heard_since) {
        return Decision::ignored("its task was started since");
    }
    if job
        .progress
        .as_ref()
        .map(|progress| progress.at)
        .is_some_and(heard_since)
    {
        return Decision::ignored("its worker has reported progress since");
    }
    let logs = format!(
        "The job was ended because no worker has had its task since {since:.0}, and it does not wait for \
         one: it was lost."
    );
    hand_over::fail(job_id, job, Outcome::Lost, &logs, context)
}

/// Tells the client why nothing happens, once while the job waits.
fn no_worker<'a>(job_id: Uuid, standing: Standing<'_>, context: &Context<'_>) -> Decision<'a> {
    match standing {
        Standing::Live(job) if job.waits_without_notice() => {
            let mut job = job.clone();
            let told = job.tells_progress(job_id, 0.0, NO_WORKER, context.now);
            Decision {
                next: Some(State::Live(job)),
                publications: vec![told],
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
    /// It was the task of an attempt that has ended.
    Earlier(&'s Attempt),
    /// Nobody waits for it.
    Stray(&'static str),
}

fn own_task<'s>(standing: Standing<'s>, task_id: &str) -> Own<'s> {
    match standing {
        Standing::Unknown => Own::Stray("the job is unknown"),
        Standing::Live(job) if job.task_id.as_deref() == Some(task_id) => Own::Current(job),
        Standing::Live(job) => {
            let course = job.course.as_ref();
            match course.and_then(|course| course.earlier_task(task_id)) {
                Some(attempt) => Own::Earlier(attempt),
                None => Own::Stray("it is not the job's current task"),
            }
        }
        Standing::Ended(ended)
            if ended.outcome.by_its_task() && ended.task_id.as_deref() == Some(task_id) =>
        {
            Own::Done(ended)
        }
        Standing::Ended(_) => Own::Stray("the job has ended"),
    }
}

/// The series of a task that delivered although its job had been deleted, or gone on without it.
fn late_series<'a>(standing: Standing<'_>, completion: &Completion) -> Vec<TimeSeries<'a>> {
    let reference = match standing {
        Standing::Ended(ended) if ended.task_id.as_ref() == Some(&completion.task_id) => {
            ended.reference.clone().unwrap_or_default()
        }
        Standing::Live(Job {
            reference,
            course: Some(course),
            ..
        }) if course.earlier_task(&completion.task_id).is_some() => reference.clone(),
        Standing::Unknown | Standing::Live(_) | Standing::Ended(_) => return Vec::new(),
    };
    let late = completion.esdl_id().map(|esdl_id| TimeSeries::RetireLate {
        esdl_id,
        reference: Cow::Owned(reference),
    });
    late.into_iter().collect()
}
