//! What somebody has done to a job or to what is allowed at a queue, through the page or by a command.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::domain::job::{Origin, Priority, Via};
use crate::domain::text::one_line;

/// What somebody has done to a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Act {
    pub at: Timestamp,
    pub deed: Deed,
    /// None if it is not known any more.
    pub by: Option<Origin>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    Submitted,
    /// Submitted what this job was.
    RanAgain(Uuid),
    Held,
    Released,
    /// Released whatever its queue allows.
    LetGo,
    MovedFirst,
    Prioritised {
        was: Option<Priority>,
        priority: Priority,
    },
}

impl Deed {
    /// The other job, of one that was submitted once more.
    pub fn ran_again(&self) -> Option<Uuid> {
        match self {
            Deed::RanAgain(other) => Some(*other),
            Deed::Submitted
            | Deed::Held
            | Deed::Released
            | Deed::LetGo
            | Deed::MovedFirst
            | Deed::Prioritised { .. } => None,
        }
    }
}

/// By whom something was done, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    pub at: Timestamp,
    #[serde(flatten)]
    pub by: Origin,
}

/// Another run of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    pub id: Uuid,
    pub at: Timestamp,
    pub by: Option<Origin>,
}

/// Who has changed what is allowed at a queue.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueActs {
    /// The last pause, or its end.
    pub paused: Option<Done>,
    pub limited: Option<Done>,
}

impl QueueActs {
    /// Those of a row that was last changed then. An earlier version changes it without a word, and then
    /// nothing is certain.
    pub fn as_of(self, changed_at: Timestamp) -> QueueActs {
        let both = [&self.paused, &self.limited];
        let last = both.into_iter().flatten().map(|done| done.at).max();
        match last == Some(changed_at) {
            true => self,
            false => QueueActs::default(),
        }
    }
}

impl Origin {
    /// Who it is in a word or two; harmless.
    pub fn name(&self) -> String {
        match (&self.who, self.via) {
            // The name by which it is connected to RabbitMQ, and nobody's own.
            (Some(who), Via::Client) => format!("client {}", one_line(who)),
            (Some(who), Via::Page | Via::CommandLine) => one_line(who),
            (None, Via::Client) => "a client".to_owned(),
            (None, Via::Page) => "somebody at the status page".to_owned(),
            (None, Via::CommandLine) => "somebody at the command line".to_owned(),
        }
    }
}

/// `anna, by the status page, from 10.0.0.7`; harmless.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = match self.via {
            Via::Client => "a client",
            Via::Page => "the status page",
            Via::CommandLine => "the command line",
        };
        match (&self.who, self.via) {
            (Some(who), Via::Client) => write!(f, "{way}, {}", one_line(who))?,
            (Some(who), _) => write!(f, "{}, by {way}", one_line(who))?,
            (None, Via::Client) => f.write_str(way)?,
            (None, _) => write!(f, "somebody, by {way}")?,
        }
        match &self.from {
            Some(from) => write!(f, ", from {}", one_line(from)),
            None => Ok(()),
        }
    }
}

/// Whoever it was, in a sentence.
pub fn by(origin: Option<&Origin>) -> String {
    origin.map_or_else(|| "somebody".to_owned(), Origin::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn done(second: i64) -> Option<Done> {
        Some(Done {
            at: Timestamp::from_second(second).unwrap(),
            by: Origin::new(Via::Page, Some("anna"), Some("10.0.0.7")),
        })
    }

    #[rstest]
    #[case::the_pause_is_the_last(done(2), done(1), 2, true)]
    #[case::the_limit_is_the_last(done(1), done(2), 2, true)]
    #[case::an_earlier_version_has_changed_it(done(1), done(2), 3, false)]
    #[case::it_is_an_earlier_versions(None, None, 3, false)]
    fn who_changed_a_queue_is_known_if_nobody_else_has_since(
        #[case] paused: Option<Done>,
        #[case] limited: Option<Done>,
        #[case] changed_at: i64,
        #[case] is_known: bool,
    ) {
        let acts = QueueActs { paused, limited };
        let text = serde_json::to_string(&acts).unwrap();
        assert_eq!(serde_json::from_str::<QueueActs>(&text).unwrap(), acts);
        let known = acts.as_of(Timestamp::from_second(changed_at).unwrap());
        assert_eq!(known.paused.is_some() || known.limited.is_some(), is_known);
    }

    #[test]
    fn whoever_did_it_has_a_name() {
        let origin = |via, who| Origin::new(via, who, None);
        assert_eq!(origin(Via::Page, Some("an\nna")).name(), "an\\nna");
        assert_eq!(origin(Via::Client, None).name(), "a client");
        assert_eq!(origin(Via::Client, Some("omotes")).name(), "client omotes");
        let nobody = origin(Via::CommandLine, None);
        assert_eq!(nobody.name(), "somebody at the command line");
        assert_eq!(by(Some(&nobody)), "somebody, by the command line");
        assert_eq!(by(None), "somebody");
    }
}
