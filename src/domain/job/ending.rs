//! A job whose outcome is committed, while it is not known whether its client has been told.

use std::borrow::Cow;

use uuid::Uuid;

use super::decide::{Standing, cancel, decide_for, error_result};
use super::{Command, Context, Decision, Ending, Event, JobStatus, LOST_LOGS, Outcome, starts};

/// Decides about a job that is ending. Whatever the service died of before the client was told, the
/// message that led to the outcome is redelivered: it leads to the same outcome, which is told
/// then, whatever it would lead to by now. For all other messages the job has ended.
pub(super) fn decide<'a>(
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

/// Tells what can be told of a job whose end has not been told and never will be.
fn lose<'a>(job_id: Uuid, ending: &Ending, context: &Context<'_>) -> Decision<'a> {
    let Ending { job, ended } = ending;
    // Until then it may be waiting in a handler's memory.
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
