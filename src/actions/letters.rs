//! The dead letters of both vhosts.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use std::{fmt, iter};

use anyhow::Context;

use super::{Failure, bounded, counted};

use crate::broker::dead_letters::{DeadLetter, Fate, go_through};
use crate::broker::{DEADLINE, Link};
use crate::config::Config;
use crate::domain::vhost::Vhost;
use crate::telemetry::report::{harmless, one_line};
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
    pub failure: Option<Unsettled>,
}

/// Why nothing was done with a letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unsettled {
    Stays(String),
    NotFound,
}

impl fmt::Display for Settled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Settled { id, done, failure } = self;
        match failure {
            None => write!(f, "{}: {done}", one_line(id)),
            // Senders and other programs have written some of it.
            Some(Unsettled::Stays(why)) => {
                write!(f, "{}: it stays, for {}", one_line(id), harmless(why))
            }
            Some(Unsettled::NotFound) => write!(
                f,
                "{}: it was not found, and not {done}; somebody else may have settled it, or be \
                 looking at it",
                one_line(id)
            ),
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

    /// Requeues or drops these, each as often as it is among `ids`, and adds what became of each to
    /// `settled`.
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
        let mut left = Left::new(ids);
        for (vhost, link) in &self.links {
            let mut meant = Vec::new();
            let fate_of = |letter: &DeadLetter| {
                if !left.take(&letter.id) {
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
                failure: why(&mut failed, &id).map(Unsettled::Stays),
                id,
                done,
            }));
        }
        settled.extend(left.ids().map(|id| Settled {
            id,
            done,
            failure: Some(Unsettled::NotFound),
        }));
        Ok(())
    }

    fn go_through(
        &self,
        link: &Link,
        fate: impl FnMut(&DeadLetter) -> Fate,
    ) -> anyhow::Result<Vec<(String, String)>> {
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

/// Takes out why a letter with this id stays.
fn why(failed: &mut Vec<(String, String)>, id: &str) -> Option<String> {
    let place = failed.iter().position(|(one, _)| one == id)?;
    Some(failed.remove(place).1)
}

/// How many letters of each id have not been found yet.
struct Left<'a>(BTreeMap<&'a str, usize>);

impl<'a> Left<'a> {
    fn new(ids: &'a [String]) -> Left<'a> {
        let mut left = BTreeMap::new();
        for id in ids {
            *left.entry(id.as_str()).or_default() += 1;
        }
        Left(left)
    }

    /// Whether a letter with this id is one of them.
    fn take(&mut self, id: &str) -> bool {
        let Some(count) = self.0.get_mut(id).filter(|count| **count > 0) else {
            return false;
        };
        *count -= 1;
        true
    }

    fn ids(&self) -> impl Iterator<Item = String> {
        let each = self.0.iter();
        each.flat_map(|(id, count)| iter::repeat_n((*id).to_owned(), *count))
    }
}

/// The letters of `known` that these name, each once. There may be several with one id.
///
/// # Errors
/// One names none.
pub fn all_named(
    names: &[String],
    known: &[String],
    find: impl Fn(&str, &[String]) -> Result<String, Failure>,
) -> Result<Vec<String>, Failure> {
    let ids = names.iter().map(|name| find(name, known));
    let ids = ids.collect::<Result<BTreeSet<_>, _>>()?;
    let all = known.iter().filter(|id| ids.contains(*id));
    Ok(all.cloned().collect())
}

/// The id itself, if there is such a letter.
///
/// # Errors
/// There is none.
pub fn exactly(id: &str, known: &[String]) -> Result<String, Failure> {
    match known.iter().find(|one| *one == id && !id.is_empty()) {
        Some(id) => Ok(id.clone()),
        None => Err(Failure::Refused(format!(
            "there is no dead letter {id:?} any more, or somebody else is looking at it"
        ))),
    }
}

/// The id of `known` that is this, or else the one with this beginning.
///
/// # Errors
/// There is none, or there are several.
pub fn named(beginning: &str, known: &[String]) -> Result<String, Failure> {
    if let Ok(id) = exactly(beginning, known) {
        return Ok(id);
    }
    let fitting = known.iter().filter(|id| id.starts_with(beginning));
    let fitting: BTreeSet<_> = fitting.collect();
    let mut ids = fitting.iter();
    match (ids.next(), ids.next()) {
        (Some(id), None) => Ok((*id).clone()),
        (Some(_), Some(_)) => {
            let all: Vec<_> = fitting.iter().map(|id| one_line(id)).collect();
            Err(Failure::Refused(format!(
                "{beginning:?} is the beginning of several ids: {}",
                bounded(&all, ", ")
            )))
        }
        (None, _) => Err(Failure::Refused(format!(
            "there is no dead letter {beginning:?}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    /// Why a letter stays is partly what its sender has written.
    #[test]
    fn what_became_of_a_letter_is_one_line() {
        let settled = Settled {
            id: "1\n2026-01-01 INFO anna: 1".to_owned(),
            done: "requeued",
            failure: Some(Unsettled::Stays(
                "it is cut: x\n2026-01-01 INFO anna: y\u{202e}".to_owned(),
            )),
        };
        let text = settled.to_string();
        assert!(!text.contains(['\n', '\u{202e}']), "{text}");
    }

    fn letters(ids: &[&str]) -> Vec<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    #[rstest]
    #[case::itself_before_what_begins_so("1", Some("1"))]
    #[case::a_beginning("2", Some("23"))]
    #[case::of_several("4", None)]
    #[case::two_with_one_id("5", Some("55"))]
    #[case::nothing("9", None)]
    #[case::no_name("", None)]
    fn a_letter_is_named_by_a_beginning(#[case] name: &str, #[case] expected: Option<&str>) {
        let known = letters(&["1", "12", "23", "41", "42", "55", "55"]);
        assert_eq!(named(name, &known).ok().as_deref(), expected);
    }

    #[test]
    fn a_page_names_letters_by_their_whole_ids() {
        let known = letters(&["12", "5", "55", "55", ""]);
        for missing in ["1", "", "2"] {
            all_named(&letters(&[missing]), &known, exactly).unwrap_err();
        }
        let found = all_named(&letters(&["55", "55", "5"]), &known, exactly).unwrap();
        assert_eq!(found, letters(&["5", "55", "55"]));
    }

    #[test]
    fn what_was_not_found_is_left() {
        let ids = letters(&["1", "2", "2", "3"]);
        let mut left = Left::new(&ids);
        assert_eq!(
            ["1", "1", "2", "4"].map(|id| left.take(id)),
            [true, false, true, false]
        );
        assert_eq!(left.ids().collect::<Vec<_>>(), letters(&["2", "3"]));
    }
}
