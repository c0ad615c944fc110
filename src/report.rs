//! What the log says of a job: one line for each event that an operator cares about, always with
//! the job's id and its client's reference. What a job does besides is for DEBUG.

use log::{Level, log, log_enabled};
use uuid::Uuid;

use crate::job::{Command, Event, Outcome};
use crate::text::beginning;

/// The longest text of somebody else's that a line repeats, in characters.
const MAX_TEXT: usize = 300;

/// Somebody else's text for a log line: short, and without what could pass for another line.
pub fn one_line(text: &str) -> String {
    text.chars()
        .take(MAX_TEXT)
        .flat_map(|character| {
            let harmless = !character.is_control() && !matches!(character, '\u{2028}' | '\u{2029}');
            let escaped = (!harmless).then(|| character.escape_default());
            escaped
                .into_iter()
                .flatten()
                .chain(harmless.then_some(character))
        })
        .collect()
}

fn short(text: &str) -> &str {
    beginning(text, MAX_TEXT)
}

/// How a line names a job.
pub fn job(id: Uuid, reference: &str) -> String {
    match reference {
        "" => format!("job {id}"),
        reference => format!("job {id} ({})", one_line(reference)),
    }
}

/// The job that a line is about.
#[derive(Debug, Clone, PartialEq)]
pub struct Subject {
    pub id: Uuid,
    /// The client's own name for it, empty when there is none.
    pub reference: String,
    /// Empty when it is not known.
    pub workflow: String,
}

/// Logs what became of a command.
pub fn log(subject: &Subject, event: &Event, command: &Command) {
    let say = |level, task: Option<&str>, text: &str| {
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
    match event {
        Event::Submitted { task_id, faults } => {
            let workflow = command.workflow_type().map(one_line).unwrap_or_default();
            let task = task_id.to_string();
            let text = format!("submitted to {workflow} as task {task_id}");
            say(Level::Info, Some(&task), &text);
            if !faults.is_empty() {
                let faults = one_line(&faults.join("; "));
                let text = format!("its parameters do not fit {workflow}: {faults}");
                say(Level::Warn, Some(&task), &text);
            }
        }
        Event::Started { starts: 1 } => say(Level::Info, command.task_id(), "running"),
        Event::Started { starts } => {
            let text = format!("running, started {starts} times");
            say(Level::Warn, command.task_id(), &text);
        }
        Event::Excused { starts, why } => {
            let text = format!("its task was started {starts} times, and goes on: {why}");
            say(Level::Warn, command.task_id(), &text);
        }
        Event::Suspected { starts } => {
            let text = format!("its task was started {starts} times: asking whether a worker died");
            say(Level::Warn, command.task_id(), &text);
        }
        Event::Progressed if log_enabled!(Level::Debug) => {
            say(Level::Debug, command.task_id(), &progress(command));
        }
        Event::Progressed => {}
        Event::Ended(outcome) => {
            let why = reason(command)
                .map(|why| format!(": {why}"))
                .unwrap_or_default();
            let text = format!("{}{why}", outcome_text(*outcome));
            say(level(*outcome), command.task_id(), &text);
        }
        Event::CancelNoted => {
            let text = "cancelled before it was submitted, or long ago";
            say(Level::Info, None, text);
        }
        Event::Revoked(why) => {
            let task = command.task_id().map(one_line).unwrap_or_default();
            let text = format!("task {task} is revoked: {why}");
            say(Level::Warn, command.task_id(), &text);
        }
        Event::Ignored(why) => {
            let level = match command {
                // Every job's last progress trails its result.
                Command::Progress { .. } | Command::NoWorker | Command::Judge { .. } => {
                    Level::Debug
                }
                Command::Submit(_)
                | Command::Refuse { .. }
                | Command::Cancel
                | Command::Start { .. }
                | Command::Result { .. }
                | Command::TimeOut
                | Command::Expire
                | Command::Fail { .. } => Level::Info,
            };
            let text = format!("{} is ignored: {why}", command.name());
            say(level, command.task_id(), &text);
        }
    }
}

fn progress(command: &Command) -> String {
    match command {
        Command::Progress {
            fraction, message, ..
        } => format!("{:.0} % {}", fraction * 100.0, one_line(message)),
        other => other.name().to_owned(),
    }
}

/// Why a job ended, where its outcome does not say it all.
fn reason(command: &Command) -> Option<String> {
    match command {
        Command::Refuse { reason, .. } | Command::Fail { reason, .. } => Some(one_line(reason)),
        Command::Submit(submission) => {
            Some(format!("workflow {}", one_line(&submission.workflow_type)))
        }
        Command::Cancel
        | Command::Start { .. }
        | Command::Progress { .. }
        | Command::Result { .. }
        | Command::TimeOut
        | Command::Expire
        | Command::NoWorker
        | Command::Judge { .. } => None,
    }
}

fn level(outcome: Outcome) -> Level {
    match outcome {
        Outcome::Succeeded | Outcome::Cancelled => Level::Info,
        Outcome::Failed
        | Outcome::CrashLoop
        | Outcome::Rejected
        | Outcome::TimedOut
        | Outcome::Expired
        | Outcome::Lost => Level::Warn,
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
        Outcome::Lost => "given up, for RabbitMQ has lost what its client was to hear",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_cannot_pass_for_another_line() {
        assert_eq!(one_line("it's \"fine\" é"), "it's \"fine\" é");
        assert_eq!(
            one_line("a\nb\u{1b}[0m\u{2028}"),
            "a\\nb\\u{1b}[0m\\u{2028}"
        );
        assert_eq!(one_line(&"x".repeat(1000)).len(), MAX_TEXT);
    }
}
