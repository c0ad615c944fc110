//! The log's lines about jobs: one for each event that an operator cares about, always with the
//! job's id and its client's reference. Everything else about a job is logged at DEBUG.

use log::{Level, log, log_enabled};
use uuid::Uuid;

use crate::domain::batch::Report;
use crate::domain::job::{Command, Event, Outcome};
use crate::domain::text::short;
pub use crate::domain::text::{harmless, one_line, readable};

/// A job's progress for display, clamped to 0–100 %.
pub fn percent(fraction: f64) -> String {
    // NaN is not above zero either.
    let part = if fraction > 0.0 {
        fraction.min(1.0)
    } else {
        0.0
    };
    format!("{:.0} %", part * 100.0)
}

/// How a line names a job.
pub fn job(id: Uuid, reference: &str) -> String {
    match reference {
        "" => format!("job {id}"),
        reference => format!("job {id} ({})", one_line(reference)),
    }
}

/// An error with its causes, each of them once: some say that of theirs in their own words already.
pub fn with_causes(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.ends_with(&cause) {
            let colon = if text.is_empty() { "" } else { ": " };
            text = text + colon + &cause;
        }
    }
    text
}

/// Logs what became of a command.
pub fn log(report: &Report<'_>) {
    let Report {
        subject,
        event,
        command,
        ..
    } = report;
    let new_task;
    let (task, faults) = match event {
        Event::Submitted {
            task_id, faults, ..
        } => {
            new_task = task_id.to_string();
            (Some(new_task.as_str()), faults.as_slice())
        }
        Event::Held { faults, .. } => (command.task_id(), faults.as_slice()),
        Event::HandedOver { task_id, .. } => {
            new_task = task_id.to_string();
            (Some(new_task.as_str()), [].as_slice())
        }
        Event::Started { .. }
        | Event::Postponed { .. }
        | Event::Excused { .. }
        | Event::Suspected { .. }
        | Event::Progressed
        | Event::Ended(_)
        | Event::CancelNoted
        | Event::Revoked(_)
        | Event::Ignored(_) => (command.task_id(), [].as_slice()),
    };
    let say = |level, text: &str| {
        log!(
            level,
            job:% = subject.id,
            reference = short(&subject.reference),
            workflow = short(&subject.workflow),
            task = short(task.unwrap_or_default());
            "{}: {text}",
            job(subject.id, &subject.reference)
        );
    };
    let level = level(event, command);
    if log_enabled!(level) {
        say(level, &line(report));
    }
    if !faults.is_empty() {
        let workflow = one_line(&subject.workflow);
        let faults = one_line(&faults.join("; "));
        let text = format!("its parameters do not fit {workflow}: {faults}");
        say(Level::Warn, &text);
    }
}

/// What is said of an event.
fn line(report: &Report<'_>) -> String {
    let Report { event, command, .. } = report;
    match event {
        Event::Submitted { task_id, queue, .. } => {
            format!("submitted to {} as task {task_id}", one_line(queue))
        }
        Event::Held { what, queue, .. } => {
            let queue = one_line(queue);
            match what {
                None => format!("accepted, and waits for its turn at {queue}"),
                Some(what) => format!("{} waits for its turn at {queue}", one_line(what)),
            }
        }
        Event::HandedOver { task_id, to, task } => {
            let (to, task) = (one_line(to), one_line(task));
            format!("goes on with {to}: submitted to {task} as task {task_id}")
        }
        Event::Postponed { what, why, until } => {
            format!("{}, begins at {until:.0}: {why}", one_line(what))
        }
        Event::Started { starts: 1 } => "running".to_owned(),
        Event::Started { starts } => format!("running, started {starts} times"),
        Event::Excused { starts, why } => {
            format!("its task was started {starts} times, and goes on: {why}")
        }
        Event::Suspected { starts } => {
            format!("its task was started {starts} times: asking whether a worker died")
        }
        Event::Progressed => progress(command),
        Event::Ended(outcome) => {
            let why = reason(report)
                .map(|why| format!(": {why}"))
                .unwrap_or_default();
            format!("{}{why}", outcome_text(*outcome))
        }
        Event::CancelNoted => "cancelled before it was submitted, or long ago".to_owned(),
        Event::Revoked(why) => {
            let task = command.task_id().map(one_line).unwrap_or_default();
            format!("task {task} is revoked: {why}")
        }
        Event::Ignored(why) => format!("{} is ignored: {why}", command.name()),
    }
}

/// The level of an event's line.
fn level(event: &Event, command: &Command) -> Level {
    match event {
        Event::Submitted { .. }
        | Event::Held { .. }
        | Event::HandedOver { .. }
        | Event::Started { starts: 1 }
        | Event::CancelNoted => Level::Info,
        Event::Started { .. }
        | Event::Postponed { .. }
        | Event::Excused { .. }
        | Event::Suspected { .. }
        | Event::Revoked(_) => Level::Warn,
        Event::Progressed => Level::Debug,
        Event::Ended(Outcome::Succeeded | Outcome::Cancelled) => Level::Info,
        Event::Ended(
            Outcome::Failed
            | Outcome::CrashLoop
            | Outcome::Rejected
            | Outcome::TimedOut
            | Outcome::Expired
            | Outcome::Lost,
        ) => Level::Warn,
        Event::Ignored(_) => match command {
            // Every job's last progress trails its result.
            Command::Progress { .. }
            | Command::NoWorker
            | Command::TaskLost { .. }
            | Command::TakeTurn { .. }
            | Command::Judge { .. } => Level::Debug,
            Command::Submit(_)
            | Command::Refuse { .. }
            | Command::Cancel(_)
            | Command::Start { .. }
            | Command::Result { .. }
            | Command::TimeOut
            | Command::Expire
            | Command::Fail { .. } => Level::Info,
        },
    }
}

fn progress(command: &Command) -> String {
    match command {
        Command::Progress {
            fraction, message, ..
        } => format!("{} {}", percent(*fraction), one_line(message)),
        other => other.name().to_owned(),
    }
}

/// Why a job ended, where its outcome does not say it all.
fn reason(report: &Report<'_>) -> Option<String> {
    match report.command {
        Command::Refuse { reason, .. } | Command::Fail { reason, .. } => Some(one_line(reason)),
        Command::Submit(submission) => Some(match report.refusal.as_deref() {
            // Cancelled before it came.
            None | Some("") => format!("workflow {}", one_line(&submission.workflow_type)),
            Some(refusal) => one_line(refusal),
        }),
        Command::Cancel(_)
        | Command::Start { .. }
        | Command::Progress { .. }
        | Command::Result { .. }
        | Command::TimeOut
        | Command::Expire
        | Command::NoWorker
        | Command::TaskLost { .. }
        | Command::TakeTurn { .. }
        | Command::Judge { .. } => None,
    }
}

fn outcome_text(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Succeeded => "succeeded",
        Outcome::Failed => "failed at its worker",
        Outcome::Cancelled => "cancelled",
        Outcome::CrashLoop => "ended, for its workers died too often",
        Outcome::Rejected => "refused",
        Outcome::TimedOut => "ended, for it ran for longer than its timeout",
        Outcome::Expired => "given up, for it was unfinished for longer than jobs are kept",
        Outcome::Lost => "given up, for its task is lost, or what its client was to hear",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    use rstest::rstest;
    use thiserror::Error;

    /// As amiquip's errors are, which name their cause themselves.
    #[derive(Debug, Error)]
    #[error("I/O error while reading socket: {0}")]
    struct Outer(#[source] io::Error);

    #[test]
    fn a_cause_is_told_once() {
        let reset = || Outer(io::Error::other("reset by peer"));
        let lost = anyhow::Error::from(reset()).context("SDK, consuming");
        assert_eq!(
            with_causes(&lost),
            "SDK, consuming: I/O error while reading socket: reset by peer"
        );
        let other = anyhow::Error::from(io::Error::other("refused")).context("connecting");
        assert_eq!(with_causes(&other), "connecting: refused");
    }

    #[rstest]
    #[case(0.254, "25 %")]
    #[case(1.0, "100 %")]
    #[case(7.5, "100 %")]
    #[case(-0.2, "0 %")]
    #[case(-0.0, "0 %")]
    #[case(f64::NAN, "0 %")]
    #[case(f64::INFINITY, "100 %")]
    #[case(f64::NEG_INFINITY, "0 %")]
    fn a_progress_is_a_part_of_the_whole(#[case] fraction: f64, #[case] shown: &str) {
        assert_eq!(percent(fraction), shown);
    }
}
