//! From one step of a job to the next: what a task's end leads to.
//!
//! A hand-over is a decision like any other: the new task is published and confirmed before the new
//! state is committed. Whatever is killed in between, the message that led to it comes again, and
//! publishes a task with an id of its own; the one of the interrupted attempt is not current, and
//! is revoked at its START.

use std::borrow::Cow;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use super::course::{Attempt, Course, Input, Next, Position, Report, Turn, kept_logs};
use super::decision::{Assignment, TaskInput};
use super::told::kept_of_result;
use super::{
    Completion, Context, Decision, Event, Job, JobStatus, Outcome, Priority, Progress, Publication,
    ResultType, State, Submission, TimeSeries, kept_why, kept_why_of_logs,
};
use crate::domain::turns;
use crate::domain::workflow::{StepParameters, Steps};

/// What the client is told of a step that is put on its queue.
const WAITS: &str = "waiting for a worker";
/// The same of one that has to wait before that.
const TRIED_AGAIN: &str = "it failed, and is tried again";
/// The same of one whose queue's node is down, say.
const CLOSED: &str = "its queue takes nothing for now";
/// The same of one that waits for its turn.
const HELD: &str = "waiting for its turn";
/// Why nothing can be handed over.
const NO_COURSE: &str = "its workflow has one step";
/// Of a worker's success that is none.
const NO_OUTPUT: &str = "Its worker reported success, but sent no ESDL.";

/// What the first task of a job is given, and the course that begins with it.
pub(super) fn submit<'a>(
    submission: &'a Submission,
    steps: &Steps,
    context: &Context<'_>,
) -> (Assignment<'a>, Option<Box<Course>>) {
    let Submission { esdl, params, .. } = submission;
    let step = &steps.all()[0];
    let mut assignment = submission.assignment(&step.task);
    if step.parameters != StepParameters::All {
        assignment.parameters = Cow::Owned(step.arguments(params));
    }
    let course = steps.plain().is_none().then(|| {
        let task_id = context.new_task_id.to_string();
        let attempt = Attempt::submitted(Position::FIRST, task_id, context.now);
        let mut course = Course::beginning(submission, steps, attempt, context);
        if course.may_need_its_input_again() {
            course.input = Input::New(Arc::from(esdl.as_str()));
        }
        Box::new(course)
    });
    (assignment, course)
}

/// The course of a job whose first task waits for its turn. It has one also for a single plain
/// step: what its task is to be given has to be kept.
pub(super) fn hold(submission: &Submission, steps: &Steps, context: &Context<'_>) -> Box<Course> {
    let attempt = Attempt::to_come(Position::FIRST);
    let mut course = Course::beginning(submission, steps, attempt, context);
    course.input = Input::New(Arc::from(submission.esdl.as_str()));
    course.turn = Some(Turn::begun(context.now));
    Box::new(course)
}

/// A worker has ended the current task of `job`.
pub(super) fn complete<'a>(
    job_id: Uuid,
    job: &Job,
    completion: &'a Completion,
    context: &Context<'_>,
) -> Decision<'a> {
    let outcome = match completion.succeeded {
        true => Outcome::Succeeded,
        false => Outcome::Failed,
    };
    let output = completion.output_esdl.as_deref();
    let Some(course) = &job.course else {
        return end(job_id, job, completion, outcome, context);
    };
    let report = |outcome| Report::of(completion, outcome, job.starts.len(), context);
    let is_missing = output.is_none_or(str::is_empty) && course.has_several_steps();
    let next = match outcome {
        Outcome::Succeeded if is_missing => {
            return without_output(job_id, job, completion, context);
        }
        Outcome::Succeeded => course.after_success(),
        failed => course.after_failure(failed),
    };
    match next {
        Next::OnItsOutput(position) => {
            let input = TaskInput::Given(output.unwrap_or_default());
            go_on(job_id, job, report(outcome), position, input, context)
        }
        Next::OnItsInput(position, wait) => {
            again(job_id, job, report(outcome), (position, wait), context)
        }
        Next::Success | Next::Failure => {
            let job = job.with_report(report(outcome));
            end(job_id, &job, completion, outcome, context)
        }
    }
}

/// Ends the job with its task's result.
fn end<'a>(
    job_id: Uuid,
    job: &Job,
    completion: &'a Completion,
    outcome: Outcome,
    context: &Context<'_>,
) -> Decision<'a> {
    let Completion {
        task_id: _,
        succeeded,
        output_esdl,
        logs,
        esdl_messages,
    } = completion;
    let output_esdl = output_esdl.as_deref();
    let why = kept_why_of_logs(logs, context);
    let (logs, esdl_messages) = match &job.course {
        None => (Cow::from(logs), Cow::from(esdl_messages)),
        Some(course) => (
            course.logs(outcome, logs),
            course.esdl_messages(esdl_messages),
        ),
    };
    let result_bytes = output_esdl.unwrap_or_default().len() + logs.len();
    let kept = kept_of_result(&logs, &esdl_messages, context);
    let told = Publication::Result {
        job_id,
        result_type: match succeeded {
            true => ResultType::Succeeded,
            false => ResultType::Error,
        },
        output_esdl,
        logs,
        esdl_messages,
    };
    let ends = job
        .ends(outcome, result_bytes, [told], context)
        .telling(kept);
    match succeeded {
        true => Decision {
            time_series: series_of_success(job, completion),
            ..ends
        },
        false => ends.because(why),
    }
}

fn series_of_success<'a>(job: &Job, completion: &Completion) -> Vec<TimeSeries<'a>> {
    let esdl_id = completion.esdl_id();
    let passing = match &job.course {
        Some(course) => course.passing_series(esdl_id.as_deref()),
        None => Vec::new(),
    };
    let passing = (!passing.is_empty()).then_some(TimeSeries::RetireThese(passing));
    let kept = esdl_id.map(|esdl_id| job.keeps(esdl_id));
    passing.into_iter().chain(kept).collect()
}

/// A step has ended without what the next one needs.
fn without_output<'a>(
    job_id: Uuid,
    job: &Job,
    completion: &'a Completion,
    context: &Context<'_>,
) -> Decision<'a> {
    let logs = match completion.logs.as_str() {
        "" => NO_OUTPUT.to_owned(),
        logs => format!("{NO_OUTPUT}\n{logs}"),
    };
    let mut report = Report::of(completion, Outcome::Failed, job.starts.len(), context);
    report.logs = kept_logs(&logs);
    report.why = Some(NO_OUTPUT.to_owned());
    let job = job.with_report(report);
    let messages = &completion.esdl_messages;
    job.fails(job_id, Outcome::Failed, &logs, messages, context)
        .because(Some(NO_OUTPUT.to_owned()))
}

/// The current task of `job` has ended without a result of its own: as a crash loop, or past its
/// step's timeout. `logs` say so.
pub(super) fn fail<'a>(
    job_id: Uuid,
    job: &Job,
    outcome: Outcome,
    logs: &str,
    context: &Context<'_>,
) -> Decision<'a> {
    let Some(course) = &job.course else {
        return job.fails(job_id, outcome, logs, &[], context);
    };
    let report = Report {
        logs: kept_logs(logs),
        why: kept_why(logs),
        ..Report::new(outcome, job.starts.len(), context.now)
    };
    match course.after_failure(outcome) {
        Next::OnItsInput(position, wait) => again(job_id, job, report, (position, wait), context),
        Next::Failure | Next::Success | Next::OnItsOutput(_) => {
            let job = job.with_report(report);
            job.fails(job_id, outcome, logs, &[], context)
        }
    }
}

/// Another attempt with the current one's input, at once or after a while.
fn again<'a>(
    job_id: Uuid,
    job: &Job,
    report: Report,
    (position, wait): (Position, Duration),
    context: &Context<'_>,
) -> Decision<'a> {
    let course = job.course.as_ref();
    let input = course.map_or(TaskInput::Kept, |course| course.kept_input());
    match wait.is_zero() {
        true => go_on(job_id, job, report, position, input, context),
        false => {
            let until = context.now.checked_add(wait).unwrap_or(Timestamp::MAX);
            postpone(job_id, job, report, position, &input, (TRIED_AGAIN, until))
        }
    }
}

/// Hands the job over to the task at `position`, or later if its queue takes nothing for now: the
/// end of the task before is certain, and no timeout must overtake it.
fn go_on<'a>(
    job_id: Uuid,
    job: &Job,
    report: Report,
    position: Position,
    input: TaskInput<'a>,
    context: &Context<'_>,
) -> Decision<'a> {
    let course = job.course.as_ref();
    let task = course.map_or("", |course| &course.step_at(position).task);
    let has_limits = (context.has_limits)(task);
    if !has_limits && (context.is_closed)(task) {
        let later = (CLOSED, context.now);
        return postpone(job_id, job, report, position, &input, later);
    }
    let (announcements, time_series) = job.aftermath(&report);
    let next = job.come_to(position, None, report);
    Decision {
        announcements,
        time_series,
        ..match has_limits {
            true => wait_for_turn(job_id, next, &input, context),
            false => put_on_queue(job_id, next, context.new_task_id, input, context),
        }
    }
}

/// Lets the current attempt, which has no task yet, wait for its turn at its queue.
fn wait_for_turn<'a>(
    job_id: Uuid,
    mut job: Job,
    input: &TaskInput<'_>,
    context: &Context<'_>,
) -> Decision<'a> {
    let Some(course) = &mut job.course else {
        return Decision::ignored(NO_COURSE);
    };
    course.input = input.to_be_kept();
    course.current.due_at = None;
    course.turn = Some(Turn::begun(context.now));
    let event = Event::Held {
        what: Some(course.name(course.current.position)),
        queue: course.step().task.clone(),
        faults: Vec::new(),
    };
    let progress = job.tells_progress(job_id, 0.0, HELD, context.now);
    Decision {
        next: Some(State::Live(job)),
        publications: vec![progress],
        ..Decision::nothing(event)
    }
}

/// Lets some time pass before the attempt at `position`: until then the job has no task.
fn postpone<'a>(
    job_id: Uuid,
    job: &Job,
    report: Report,
    position: Position,
    input: &TaskInput<'_>,
    (why, until): (&'static str, Timestamp),
) -> Decision<'a> {
    let now = report.finished_at;
    let (announcements, time_series) = job.aftermath(&report);
    let mut job = job.come_to(position, Some(until), report);
    let Some(course) = &mut job.course else {
        return Decision::ignored(NO_COURSE);
    };
    course.input = input.to_be_kept();
    let what = course.name(position);
    let progress = job.tells_progress(job_id, 0.0, why, now);
    Decision {
        next: Some(State::Live(job)),
        publications: vec![progress],
        announcements,
        time_series,
        ..Decision::nothing(Event::Postponed { what, why, until })
    }
}

/// Puts the task of a postponed attempt on its queue when its time has come, or one that was held
/// when it has been granted its turn at the time `grant`.
///
/// A granted task is published once: whoever has begun that and does not know how it ended leaves it
/// to those who look for it ([`Job::with_granted`]), for there must not be two of it.
pub(super) fn take_turn<'a>(
    job_id: Uuid,
    job: &Job,
    grant: Option<Timestamp>,
    context: &Context<'_>,
) -> Decision<'a> {
    let Some(course) = &job.course else {
        return Decision::ignored(NO_COURSE);
    };
    let closed = (context.is_closed)(&course.step().task);
    match (course.turn_to_come(), course.current.due_at) {
        (Some(Turn { grant: None, .. }), _) => Decision::ignored("its turn has not come"),
        (
            Some(Turn {
                grant: Some(granted),
                ..
            }),
            _,
        ) if grant != Some(granted.at) => Decision::ignored("somebody else hands it over"),
        (Some(_), _) if closed => Decision::ignored(CLOSED),
        (
            Some(Turn {
                grant: Some(granted),
                ..
            }),
            _,
        ) => put_on_queue(
            job_id,
            job.clone(),
            granted.task_id,
            course.kept_input(),
            context,
        ),
        (None, Some(due_at)) if course.current.submitted_at.is_none() && due_at <= context.now => {
            let input = course.kept_input();
            match (context.has_limits)(&course.step().task) {
                true => wait_for_turn(job_id, job.clone(), &input, context),
                false if closed => Decision::ignored(CLOSED),
                false => {
                    let task_id = context.new_task_id;
                    put_on_queue(job_id, job.clone(), task_id, input, context)
                }
            }
        }
        (None, _) => Decision::ignored("no step's turn has come"),
    }
}

/// Puts the task of the current attempt, which has none yet, on its queue.
fn put_on_queue<'a>(
    job_id: Uuid,
    mut job: Job,
    task_id: Uuid,
    input: TaskInput<'a>,
    context: &Context<'_>,
) -> Decision<'a> {
    let priority = job.priority.unwrap_or_default();
    let is_first = job.status == JobStatus::Registered;
    let Some(course) = &job.course else {
        return Decision::ignored(NO_COURSE);
    };
    let task = Publication::Task {
        job_id,
        task_id,
        assignment: course.assignment(input.clone(), priority),
    };
    let event = Event::HandedOver {
        task_id,
        to: course.name(course.current.position),
        task: course.step().task.clone(),
    };
    job.has_task(task_id, &input, context.now);
    let mut publications = vec![task];
    if !is_first {
        publications.push(job.tells_progress(job_id, 0.0, WAITS, context.now));
    }
    Decision {
        next: Some(State::Live(job)),
        publications,
        ..Decision::nothing(event)
    }
}

impl Turn {
    fn begun(now: Timestamp) -> Turn {
        Turn {
            since: now,
            grant: None,
        }
    }
}

impl Course {
    /// That of a new job which begins with this attempt.
    fn beginning(
        submission: &Submission,
        steps: &Steps,
        current: Attempt,
        context: &Context<'_>,
    ) -> Course {
        let Submission {
            params,
            reference,
            sender,
            ..
        } = submission;
        Course {
            steps: Arc::new(steps.clone()),
            parameters: Arc::new(params.clone()),
            reference: reference.clone(),
            input: Input::NotKept,
            earlier: Vec::new(),
            current,
            owner: turns::owner(
                sender.as_deref(),
                reference.as_deref(),
                &context.rules.fair_share_separator,
            ),
            turn: None,
        }
    }
}

impl Job {
    /// The same with the task on its queue that has been granted its turn, if this is that task and
    /// it is not known to be there: what its worker says shows that it is.
    pub(super) fn with_granted(&self, task_id: &str) -> Option<Job> {
        let grant = self.course.as_ref()?.grant_to_take()?;
        if grant.task_id.to_string() != task_id {
            return None;
        }
        let mut job = self.clone();
        job.has_task(grant.task_id, &TaskInput::Kept, grant.at);
        Some(job)
    }

    /// Notes that the current attempt's task is on its queue since `at`.
    fn has_task(&mut self, task_id: Uuid, input: &TaskInput<'_>, at: Timestamp) {
        if let Some(course) = &mut self.course {
            course.current.task_id = Some(task_id.to_string());
            course.current.submitted_at = Some(at);
            if let Some(turn) = &course.turn {
                course.current.due_at = Some(turn.since);
            }
            course.input = match course.may_need_its_input_again() {
                true => input.to_be_kept(),
                false => Input::NotKept,
            };
        }
        self.task_id = Some(task_id.to_string());
        if self.status == JobStatus::Registered {
            self.status = JobStatus::Submitted;
            self.submitted_at = Some(at);
        }
    }
}

impl TaskInput<'_> {
    fn to_be_kept(&self) -> Input {
        match self {
            TaskInput::Given(esdl) => Input::New(Arc::from(*esdl)),
            TaskInput::Held(esdl) => Input::New(Arc::clone(esdl)),
            TaskInput::Kept => Input::Kept,
        }
    }
}

impl Course {
    /// The input of the current attempt, for another one.
    fn kept_input<'a>(&self) -> TaskInput<'a> {
        match &self.input {
            Input::New(esdl) => TaskInput::Held(Arc::clone(esdl)),
            Input::Kept | Input::NotKept => TaskInput::Kept,
        }
    }

    /// What the current attempt's task is given.
    fn assignment<'a>(&self, input: TaskInput<'a>, priority: Priority) -> Assignment<'a> {
        let step = self.step();
        Assignment {
            task: Cow::Owned(step.task.clone()),
            reference: self.reference.clone().map(Cow::Owned),
            parameters: Cow::Owned(step.arguments(&self.parameters)),
            priority,
            input,
        }
    }
}

impl Job {
    /// The same with its current attempt ended.
    fn with_report(&self, report: Report) -> Job {
        let mut job = self.clone();
        if let Some(course) = &mut job.course {
            course.current.report = Some(report);
        }
        job
    }

    /// The same before the attempt at `position`, which has no task yet; `report` says how the
    /// current one ended.
    fn come_to(&self, position: Position, due_at: Option<Timestamp>, report: Report) -> Job {
        let mut job = self.with_report(report);
        job.task_id = None;
        job.starts.clear();
        if let Some(course) = &mut job.course {
            let next = Attempt {
                due_at,
                ..Attempt::to_come(position)
            };
            course.turn = None;
            let ended = mem::replace(&mut course.current, next);
            course.earlier.push(ended);
        }
        job
    }

    /// What follows from the end of the current attempt, whatever comes next: what is announced,
    /// and what becomes of the time series of its output. Its task is not revoked before the
    /// commit, for whoever decides again after a crash may leave it to the job.
    fn aftermath<'a>(&self, report: &Report) -> (Vec<Publication<'a>>, Vec<TimeSeries<'a>>) {
        let held = report.esdl_id.clone().map(|esdl_id| TimeSeries::Hold {
            esdl_id,
            reference: Cow::Owned(self.reference.clone()),
        });
        let revocation = self.revocation(report.outcome);
        (revocation.into_iter().collect(), held.into_iter().collect())
    }

    fn keeps<'a>(&self, esdl_id: String) -> TimeSeries<'a> {
        TimeSeries::Keep {
            esdl_id,
            reference: Cow::Owned(self.reference.clone()),
        }
    }

    /// Notes the progress of the current step and tells the client that of the whole, which never
    /// falls.
    pub(super) fn tells_progress<'a>(
        &mut self,
        job_id: Uuid,
        fraction: f64,
        message: &'a str,
        now: Timestamp,
    ) -> Publication<'a> {
        let (fraction, message) = match &self.course {
            None => (fraction, Cow::Borrowed(message)),
            Some(course) => {
                let before = self.progress.as_ref().map_or(0.0, |one| one.fraction);
                (
                    course.progress_of(fraction).max(before),
                    course.led(message),
                )
            }
        };
        self.progress = Some(Progress::new(fraction, &message, now));
        Publication::Progress {
            job_id,
            fraction,
            message,
        }
    }

    /// Whether its current task is in a queue and its client has not been told since that nobody
    /// takes it.
    pub(super) fn waits_without_notice(&self) -> bool {
        let told_at = self.progress.as_ref().map(|progress| progress.at);
        match &self.course {
            None => self.status == JobStatus::Submitted && told_at.is_none(),
            Some(course) => course.waits() && told_at <= course.current.submitted_at,
        }
    }
}

#[cfg(test)]
mod tests;
