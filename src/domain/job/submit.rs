//! Submissions, and what comes of them.

use jiff::Timestamp;
use uuid::Uuid;

use super::decide::Standing;
use super::decision::cancellation;
use super::{
    ClientStatus, Context, Decision, Event, Job, JobStatus, MAX_WORKFLOW_TYPE, Origin, Outcome,
    Publication, State, Submission, hand_over, told,
};
use crate::domain::parameters;
use crate::domain::text::excerpt;
use crate::domain::workflow::Definition;

const SUBMITTED_ALREADY: &str = "the job was submitted already";

/// Its client submits a job.
pub(super) fn submit<'a>(
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

/// A submission is none that a job can be made of.
pub(super) fn refuse<'a>(
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
