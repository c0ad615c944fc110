//! The dead letters of both vhosts.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use anyhow::Context;

use super::{Failure, counted};

use crate::broker::dead_letters::{DeadLetter, Fate, go_through};
use crate::broker::{DEADLINE, Link};
use crate::config::Config;
use crate::domain::vhost::Vhost;
use crate::telemetry::report::one_line;
use crate::threads::within_deadline;

/// Connections to where they are.
pub struct Letters {
    links: Vec<(Vhost, Link)>,
    patience: Duration,
}

/// What became of a letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    pub id: String,
    done: &'static str,
    /// Why it stays.
    pub failure: Option<String>,
}

impl fmt::Display for Settled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Settled { id, done, failure } = self;
        match failure {
            None => write!(f, "{}: {done}", one_line(id)),
            Some(why) => write!(f, "{}: it stays, for {why}", one_line(id)),
        }
    }
}

impl Letters {
    /// Going through those of a vhost may take as long as `patience`.
    ///
    /// # Errors
    /// RabbitMQ is not there.
    pub fn open(config: &Config, patience: Duration) -> anyhow::Result<Letters> {
        let open = |rabbitmq| Link::open(rabbitmq, "dead letters");
        let mut links = vec![(Vhost::Sdk, open(&config.sdk_rabbitmq)?)];
        if config.task_rabbitmq != config.sdk_rabbitmq {
            links.push((Vhost::Task, open(&config.task_rabbitmq)?));
        }
        Ok(Letters { links, patience })
    }

    /// Shows each of them, and leaves all where they are.
    ///
    /// # Errors
    /// RabbitMQ is not there any more.
    pub fn look(&self, mut show: impl FnMut(Vhost, &DeadLetter)) -> anyhow::Result<()> {
        for (vhost, link) in &self.links {
            self.go_through(link, |letter| {
                show(*vhost, letter);
                Fate::Leave
            })?;
        }
        Ok(())
    }

    /// Requeues or drops these, and adds what became of each to `settled`.
    ///
    /// # Errors
    /// RabbitMQ is not there any more. What of a vhost was not settled by then stays.
    pub fn settle(
        &self,
        ids: &[String],
        fate: Fate,
        settled: &mut Vec<Settled>,
    ) -> anyhow::Result<()> {
        let done = match fate {
            Fate::Leave => "left",
            Fate::Requeue => "requeued",
            Fate::Drop => "dropped",
        };
        for (vhost, link) in &self.links {
            let mut meant = Vec::new();
            let fate_of = |letter: &DeadLetter| {
                if !ids.contains(&letter.id) {
                    return Fate::Leave;
                }
                meant.push(letter.id.clone());
                fate
            };
            let mut failed = self.go_through(link, fate_of).with_context(|| {
                let name = vhost.name();
                let count = counted(ids.len(), "letter");
                format!("some of {count} may be {done}; the others are still there, at {name}")
            })?;
            settled.extend(meant.into_iter().map(|id| Settled {
                failure: failed.remove(&id),
                id,
                done,
            }));
        }
        Ok(())
    }

    fn go_through(
        &self,
        link: &Link,
        fate: impl FnMut(&DeadLetter) -> Fate,
    ) -> anyhow::Result<BTreeMap<String, String>> {
        within_deadline(self.patience, || link.kill(), || go_through(link, fate))
    }

    /// # Errors
    /// RabbitMQ is not there any more.
    pub fn close(self) -> anyhow::Result<()> {
        for (_, link) in self.links {
            link.close_within(DEADLINE)?;
        }
        Ok(())
    }
}

/// The one of `known` with this beginning.
///
/// # Errors
/// There is none, or there are several.
pub fn named(beginning: &str, known: &[String]) -> Result<String, Failure> {
    let mut fitting = known.iter().filter(|id| id.starts_with(beginning));
    match (fitting.next(), fitting.next()) {
        (Some(id), None) => Ok(id.clone()),
        (Some(_), Some(_)) => Err(Failure::Refused(format!(
            "{beginning:?} is the beginning of several ids"
        ))),
        (None, _) => Err(Failure::Refused(format!(
            "there is no dead letter {beginning:?}"
        ))),
    }
}
