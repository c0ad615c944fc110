//! Two jobs beside each other: what they were given, how long they took, and what was said.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::{MessageView, Story, spoken};
use crate::domain::text::one_line;

/// Messages that only one of the two has, of which no more are named.
const MAX_MESSAGES: usize = 50;

/// The line with the sentences on how they are.
pub const WHY: &str = "why";

/// What two jobs have of one thing, each in one line that may be shown as it is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    pub what: String,
    pub one: Option<String>,
    pub other: Option<String>,
}

/// All that can be compared of two jobs, in the order in which it is shown.
pub fn compare(one: &Story, other: &Story, now: Timestamp) -> Vec<Line> {
    let both = [one, other];
    let mut lines = facts(both, now);
    lines.extend(parameters(both));
    lines.extend(steps(both, now));
    lines.extend(messages(both));
    lines
}

fn line(what: impl Into<String>, [one, other]: [Option<String>; 2]) -> Option<Line> {
    (one.is_some() || other.is_some()).then(|| Line {
        what: what.into(),
        one,
        other,
    })
}

fn facts(both: [&Story; 2], now: Timestamp) -> Vec<Line> {
    let jobs = both.map(|story| &story.job);
    let lines = [
        line(
            "reference",
            jobs.map(|job| Some(one_line(&job.reference)).filter(|text| !text.is_empty())),
        ),
        line(
            "workflow",
            jobs.map(|job| job.workflow.as_deref().map(one_line)),
        ),
        line("state", jobs.map(|job| Some(job.state.text().to_owned()))),
        line(
            WHY,
            jobs.map(|job| job.why.as_ref().map(|why| why.sentence.clone())),
        ),
        line(
            "priority",
            jobs.map(|job| job.priority.map(|one| one.name().to_lowercase())),
        ),
        line(
            "timeout",
            jobs.map(|job| {
                let limit = job.timeout_ms.filter(|timeout| *timeout > 0);
                limit.map(|timeout| spoken(SignedDuration::from_millis(timeout)))
            }),
        ),
        line("waited", jobs.map(|job| job.waited(now).map(spoken))),
        line("ran", jobs.map(|job| job.ran(now).map(spoken))),
        line("starts", jobs.map(|job| Some(job.starts.to_string()))),
        line(
            "size of the result",
            jobs.map(|job| job.result_bytes.map(|bytes| format!("{bytes} bytes"))),
        ),
    ];
    lines.into_iter().flatten().collect()
}

fn parameters(both: [&Story; 2]) -> Vec<Line> {
    let all = both.iter().flat_map(|story| &story.parameters);
    let mut keys: Vec<(&str, &str)> = Vec::new();
    for one in all {
        if !keys.iter().any(|(key, _)| *key == one.key) {
            keys.push((&one.key, one.name()));
        }
    }
    let value = |story: &Story, key: &str| {
        let mut parameters = story.parameters.iter();
        parameters.find(|one| one.key == key).map(|one| one.text())
    };
    let lines = keys.into_iter().filter_map(|(key, name)| {
        let name = format!("parameter {}", one_line(name));
        line(name, both.map(|story| value(story, key)))
    });
    lines.collect()
}

fn steps(both: [&Story; 2], now: Timestamp) -> Vec<Line> {
    let all = both.iter().flat_map(|story| &story.attempts);
    let places: BTreeSet<_> = all.map(|one| (one.step, one.attempt)).collect();
    let lines = places.into_iter().filter_map(|(step, attempt)| {
        let text = |story: &Story| {
            let mut attempts = story.attempts.iter();
            let found = attempts.find(|one| (one.step, one.attempt) == (step, attempt))?;
            let ran = found.ran(now).map(|time| format!(", ran {}", spoken(time)));
            let title = one_line(&found.title);
            Some(format!(
                "{title}: {}{}",
                found.state(),
                ran.unwrap_or_default()
            ))
        };
        let what = match attempt {
            1 => format!("step {step}"),
            again => format!("step {step}, attempt {again}"),
        };
        line(what, both.map(text))
    });
    lines.collect()
}

fn messages(both: [&Story; 2]) -> Vec<Line> {
    let text = |one: &MessageView| match &one.asset {
        Some(asset) => format!("{} ({})", one_line(&one.text), one_line(asset)),
        None => one_line(&one.text),
    };
    let mut lines: Vec<_> = ["error", "warning", "info", "debug"]
        .into_iter()
        .filter_map(|severity| {
            let count = |story: &Story| {
                let messages = story.esdl_messages.iter();
                let count = messages.filter(|one| one.severity == severity).count();
                (count > 0).then(|| count.to_string())
            };
            line(format!("messages: {severity}"), both.map(count))
        })
        .collect();
    let texts = both.map(|story| {
        let messages = story.esdl_messages.iter();
        messages
            .map(|one| (one.severity, text(one)))
            .collect::<BTreeSet<_>>()
    });
    let differing = texts[0].symmetric_difference(&texts[1]).take(MAX_MESSAGES);
    lines.extend(differing.filter_map(|message| {
        let has = |texts: &BTreeSet<_>| texts.contains(message).then(|| "yes".to_owned());
        let (severity, text) = message;
        line(
            format!("{severity}: {text}"),
            [has(&texts[0]), has(&texts[1])],
        )
    }));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::job::{Outcome, Priority};
    use crate::domain::overview::{End, JobState, JobView, Rows};
    use crate::proto::EsdlMessage;
    use serde_json::json;
    use uuid::Uuid;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn story(ran: i64, parameters: serde_json::Value, messages: &[&str]) -> Story {
        let job = JobView {
            id: Uuid::nil(),
            reference: "ref".to_owned(),
            workflow: Some("simulator".to_owned()),
            state: JobState::Ended(Outcome::Failed),
            priority: Some(Priority::High),
            task_id: None,
            queue: None,
            registered_at: Some(at(0)),
            submitted_at: Some(at(0)),
            running_at: Some(at(10)),
            finished_at: Some(at(10 + ran)),
            timeout_ms: None,
            starts: 1,
            progress: None,
            result_bytes: None,
            position: None,
            estimate: None,
            too_few_runs: None,
            concern: None,
            step: None,
            turn: None,
            granted_at: None,
            ends: End::default(),
            why: None,
        };
        let messages = messages.iter().map(|text| EsdlMessage {
            technical_message: (*text).to_owned(),
            severity: 3,
            esdl_object_id: Some("pump\u{202e}".to_owned()),
        });
        Story::new(
            job,
            Rows {
                parameters: parameters.as_object().cloned(),
                esdl_messages: messages.collect(),
                ..Rows::default()
            },
        )
    }

    #[test]
    fn what_differs_is_beside_what_does_not() {
        let one = story(5, json!({"a": 1, "b": "x\n"}), &["cold", "dark"]);
        let other = story(65, json!({"b": "y", "c": true}), &["dark"]);
        let lines = compare(&one, &other, at(1000));
        let text = |text: &Option<String>| text.clone().unwrap_or("-".to_owned());
        let lines: Vec<_> = lines
            .iter()
            .map(|line| format!("{}: {} | {}", line.what, text(&line.one), text(&line.other)))
            .collect();
        let expected = [
            "reference: ref | ref",
            "workflow: simulator | simulator",
            "state: failed | failed",
            "priority: high | high",
            "waited: 10 s | 10 s",
            "ran: 5 s | 1 min 5 s",
            "starts: 1 | 1",
            "parameter a: 1 | -",
            "parameter b: x\\n | y",
            "parameter c: - | true",
            "messages: error: 2 | 1",
            "error: cold (pump\\u{202e}): yes | -",
        ];
        assert_eq!(lines, expected);
    }
}
