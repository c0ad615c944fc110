//! What is kept of a job for its story, beside what decisions need: bounded, and nothing of what must not
//! be kept.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::course::kept_messages;
use super::{Context, Decision, Ending, Event, Outcome, Progress, Start, State, kept, kept_why};
use crate::proto::EsdlMessage;

/// Bytes of logs that are kept at their beginning and at their end.
const HEAD: usize = 16 * 1024;
const TAIL: usize = 48 * 1024;
/// Bytes of parameters, as JSON. What does not fit is left out.
const MAX_PARAMETERS: usize = 16 * 1024;
/// Starts that are kept, the last ones.
const MAX_STARTS: usize = 20;
/// Characters of a mark's message.
const MAX_MARK: usize = 120;
/// Characters of a name or an address.
const MAX_NAME: usize = 120;

/// Who asked for something, as far as that is known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    #[serde(default)]
    pub via: Via,
    pub who: Option<String>,
    /// A host or an address.
    pub from: Option<String>,
}

/// By which way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Via {
    #[default]
    Client,
    Page,
    CommandLine,
}

impl Via {
    pub const ALL: &[Via] = &[Via::Client, Via::Page, Via::CommandLine];

    /// As headers have it.
    pub fn name(self) -> &'static str {
        match self {
            Via::Client => "client",
            Via::Page => "page",
            Via::CommandLine => "command line",
        }
    }
}

impl Origin {
    /// With as much of the texts as is kept; empty ones are none.
    pub fn new(via: Via, who: Option<&str>, from: Option<&str>) -> Origin {
        let kept = |text: Option<&str>| {
            let text = kept(text?, MAX_NAME);
            let text = text.trim();
            (!text.is_empty()).then(|| text.to_owned())
        };
        Origin {
            via,
            who: kept(who),
            from: kept(from),
        }
    }
}

/// What the history keeps of a job's end for its story.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Told {
    /// Who asked it to end.
    pub by: Option<Origin>,
    /// Of its result; the middle is left out of long ones.
    pub logs: String,
    pub esdl_messages: Vec<EsdlMessage>,
    /// Its last task's last ones.
    pub starts: Vec<Start>,
    /// Whether what its task said of its progress may be kept.
    pub keeps_progress: bool,
}

impl Told {
    pub(super) fn new(starts: &[Start], context: &Context<'_>) -> Told {
        let skipped = starts.len().saturating_sub(MAX_STARTS);
        Told {
            starts: starts[skipped..].to_vec(),
            keeps_progress: context.rules.keep_logs,
            ..Told::default()
        }
    }
}

impl Decision<'_> {
    /// The same end, with what the story keeps of the result, see [`kept_of_result`].
    pub(super) fn telling(mut self, (logs, messages): (String, Vec<EsdlMessage>)) -> Self {
        if let Some(told) = self.told() {
            told.logs = logs;
            told.esdl_messages = messages;
        }
        self
    }

    /// The same end, with who asked for it.
    pub(super) fn asked_by(mut self, origin: &Origin) -> Self {
        if let Some(told) = self.told() {
            told.by = Some(origin.clone());
        }
        self
    }

    /// The same refusal, of which no more is kept than this.
    pub(super) fn keeping_of_refusal(self, text: &str, context: &Context<'_>) -> Self {
        match &self.event {
            Event::Ended(Outcome::Rejected) => {
                let kept = kept_of_result(text, &[], context);
                self.because(kept_why(text)).telling(kept)
            }
            _ => self,
        }
    }

    fn told(&mut self) -> Option<&mut Told> {
        match &mut self.next {
            Some(State::Ending(Ending { ended, .. }) | State::Ended(ended)) => {
                ended.told.as_deref_mut()
            }
            Some(State::Unknown | State::Live(_)) | None => None,
        }
    }
}

/// What may be kept of a result's logs and messages.
pub(super) fn kept_of_result(
    logs: &str,
    messages: &[EsdlMessage],
    context: &Context<'_>,
) -> (String, Vec<EsdlMessage>) {
    match context.rules.keep_logs {
        true => (head_and_tail(logs), kept_messages(messages)),
        false => Default::default(),
    }
}

/// Logs without their middle, if they are long, and without NUL, which Postgres cannot store.
fn head_and_tail(logs: &str) -> String {
    if logs.len() <= HEAD + TAIL {
        return logs.replace('\0', "");
    }
    let head = &logs[..logs.floor_char_boundary(HEAD)];
    let tail = &logs[logs.ceil_char_boundary(logs.len() - TAIL)..];
    let left_out = logs.len() - head.len() - tail.len();
    format!("{head}\n[{left_out} bytes are left out]\n{tail}").replace('\0', "")
}

/// Parameters as JSON, if they may be kept.
pub(super) fn kept_parameters(
    parameters: &Map<String, Value>,
    context: &Context<'_>,
) -> Option<String> {
    let may_be_kept = context.rules.keep_parameters;
    may_be_kept.then(|| those_that_fit(parameters))
}

fn those_that_fit(parameters: &Map<String, Value>) -> String {
    let mut text = String::from("{");
    for (key, value) in parameters {
        let value = match value {
            Value::Null | Value::Bool(_) | Value::Number(_) => value.to_string(),
            Value::String(one) if one.len() > MAX_PARAMETERS => continue,
            Value::String(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
        };
        let member = format!("{}:{value}", Value::from(key.as_str()));
        if text.len() + member.len() + 2 <= MAX_PARAMETERS {
            if text.len() > 1 {
                text.push(',');
            }
            text.push_str(&member);
        }
    }
    text.push('}');
    text
}

/// A point on the way of a job's progress.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mark {
    pub at: Timestamp,
    pub fraction: f64,
    pub message: String,
}

impl Progress {
    /// This progress, if it is worth a mark after the one before: the first, and each that comes to
    /// another quarter.
    pub fn mark(&self, before: Option<&Progress>) -> Option<Mark> {
        let quarter = |fraction: f64| (fraction.clamp(0.0, 1.0) * 4.0).floor();
        let is_new = before.is_none_or(|one| quarter(one.fraction) < quarter(self.fraction));
        is_new.then(|| Mark {
            at: self.at,
            fraction: self.fraction,
            message: kept(&self.message, MAX_MARK),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;
    use serde_json::json;

    fn progress(fraction: f64) -> Progress {
        Progress {
            fraction,
            message: "m".repeat(500),
            at: Timestamp::UNIX_EPOCH,
        }
    }

    #[rstest]
    #[case::the_first(None, 0.1, true)]
    #[case::the_same_quarter(Some(0.1), 0.2, false)]
    #[case::another_quarter(Some(0.2), 0.25, true)]
    #[case::several_at_once(Some(0.2), 0.8, true)]
    #[case::back(Some(0.8), 0.2, false)]
    #[case::the_end(Some(0.9), 1.0, true)]
    #[case::beyond_it(Some(1.0), 7.0, false)]
    fn progress_is_marked_at_each_quarter(
        #[case] before: Option<f64>,
        #[case] after: f64,
        #[case] is_marked: bool,
    ) {
        let mark = progress(after).mark(before.map(progress).as_ref());
        assert_eq!(mark.is_some(), is_marked);
        assert!(mark.is_none_or(|mark| mark.message.len() == MAX_MARK));
    }

    #[test]
    fn long_logs_lose_their_middle() {
        let logs = format!("head\0{}tail\0", "é".repeat(HEAD + TAIL));
        let kept = head_and_tail(&logs);
        assert!(kept.starts_with("headé") && kept.ends_with("étail"));
        assert!(kept.contains(" bytes are left out]"), "{}", kept.len());
        assert!(kept.len() < HEAD + TAIL + 60, "{}", kept.len());
        assert_eq!(head_and_tail("all\0 of it"), "all of it");
    }

    #[test]
    fn parameters_that_are_too_long_are_left_out() {
        let long = "x".repeat(MAX_PARAMETERS);
        let parameters = json!({"a": 1.5, "b": long, "c": [long], "d\"": "é\n"});
        let kept = those_that_fit(parameters.as_object().unwrap());
        let kept: Value = serde_json::from_str(&kept).unwrap();
        assert_eq!(kept, json!({"a": 1.5, "d\"": "é\n"}));
        assert_eq!(those_that_fit(&Map::new()), "{}");
    }

    proptest! {
        #[test]
        fn whoever_asks_is_kept_in_part(who in proptest::option::of("(?s)[\0é.]{0,300}"), from in "(?s).{0,300}") {
            let origin = Origin::new(Via::Page, who.as_deref(), Some(&from));
            let texts = [&origin.who, &origin.from];
            for text in texts.into_iter().flatten() {
                prop_assert!(!text.is_empty() && !text.contains('\0'));
                prop_assert!(text.chars().count() <= MAX_NAME);
            }
            let json = serde_json::to_string(&origin).unwrap();
            prop_assert_eq!(serde_json::from_str::<Origin>(&json).unwrap(), origin);
        }
    }
}
