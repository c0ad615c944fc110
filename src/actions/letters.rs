//! The dead letters of both vhosts.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use std::{fmt, iter};

use anyhow::Context as _;
use ring::digest::{Context, SHA256};

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

/// A letter's name: its id and, behind the last `#`, what tells it from others with that id. Those that have
/// one name are alike in all.
pub fn name(vhost: Vhost, letter: &DeadLetter) -> String {
    let DeadLetter {
        id,
        queue,
        reason,
        time,
        properties,
        body,
        cut,
    } = letter;
    let mut context = Context::new(&SHA256);
    let properties = properties.to_string();
    let texts = [vhost.name(), queue, reason, time, &properties, cut];
    for part in texts.map(str::as_bytes).into_iter().chain([&body[..]]) {
        context.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        context.update(part);
    }
    let digest = context.finish();
    let digest = digest.as_ref()[..8].iter();
    let digest: String = digest.map(|byte| format!("{byte:02x}")).collect();
    format!("{id}#{digest}")
}

fn id_of(name: &str) -> &str {
    name.rsplit_once('#').map_or(name, |(id, _)| id)
}

/// The names of all letters that there are.
pub struct Names {
    pub all: Vec<String>,
    /// Ids that name none alone: several that differ have them, or they look like the name of another.
    shared: BTreeSet<String>,
}

impl Names {
    pub fn new(all: Vec<String>) -> Names {
        let names: BTreeSet<&str> = all.iter().map(String::as_str).collect();
        let mut ids: BTreeMap<&str, usize> = BTreeMap::new();
        for name in &names {
            *ids.entry(id_of(name)).or_default() += 1;
        }
        let shared = ids.into_iter();
        let shared = shared.filter(|(id, count)| *count > 1 || names.contains(id));
        let shared = shared.map(|(id, _)| id.to_owned()).collect();
        Names { all, shared }
    }

    /// What is shown of a letter's name: its id, if that names it.
    pub fn shown<'n>(&self, name: &'n str) -> &'n str {
        let id = id_of(name);
        match id.is_empty() || self.shared.contains(id) {
            true => name,
            false => id,
        }
    }
}

/// What became of a letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    /// What is shown of its name.
    pub name: String,
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
        let Settled {
            name,
            done,
            failure,
        } = self;
        match failure {
            None => write!(f, "{}: {done}", one_line(name)),
            // Senders and other programs have written some of it.
            Some(Unsettled::Stays(why)) => {
                write!(f, "{}: it stays, for {}", one_line(name), harmless(why))
            }
            Some(Unsettled::NotFound) => write!(
                f,
                "{}: it was not found, and not {done}; somebody else may have settled it, or be \
                 looking at it",
                one_line(name)
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

    /// Requeues or drops those with these of the known names, each as often as it is among `names`, and adds what
    /// became of each to `settled`.
    ///
    /// # Errors
    /// RabbitMQ is not there any more. What of a vhost was not settled by then stays.
    pub fn settle(
        &self,
        names: &[String],
        known: &Names,
        fate: Fate,
        settled: &mut Vec<Settled>,
    ) -> anyhow::Result<()> {
        let done = match fate {
            Fate::Leave => "left",
            Fate::Requeue => "requeued",
            Fate::Drop => "dropped",
        };
        let mut left = Left::new(names);
        for (vhost, link) in &self.links {
            let mut meant = Vec::new();
            let mut places = 0..;
            let fate_of = |letter: &DeadLetter| {
                let place = places.next();
                let name = name(*vhost, letter);
                if !left.take(&name) {
                    return Fate::Leave;
                }
                meant.push((place, name));
                fate
            };
            let failed = self.go_through(link, fate_of).with_context(|| {
                let name = vhost.name();
                let count = counted(names.len(), "letter");
                format!("some of {count} may be {done}; the others are still there, at {name}")
            })?;
            let mut failed: BTreeMap<usize, String> = failed.into_iter().collect();
            settled.extend(meant.into_iter().map(|(place, name)| {
                Settled {
                    failure: place
                        .and_then(|place| failed.remove(&place))
                        .map(Unsettled::Stays),
                    name: known.shown(&name).to_owned(),
                    done,
                }
            }));
        }
        settled.extend(left.names().map(|name| Settled {
            name: known.shown(&name).to_owned(),
            done,
            failure: Some(Unsettled::NotFound),
        }));
        Ok(())
    }

    fn go_through(
        &self,
        link: &Link,
        fate: impl FnMut(&DeadLetter) -> Fate,
    ) -> anyhow::Result<Vec<(usize, String)>> {
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

/// How many letters of each name have not been found yet.
struct Left<'a>(BTreeMap<&'a str, usize>);

impl<'a> Left<'a> {
    fn new(names: &'a [String]) -> Left<'a> {
        let mut left = BTreeMap::new();
        for name in names {
            *left.entry(name.as_str()).or_default() += 1;
        }
        Left(left)
    }

    /// Whether a letter of this name is one of them.
    fn take(&mut self, name: &str) -> bool {
        let Some(count) = self.0.get_mut(name).filter(|count| **count > 0) else {
            return false;
        };
        *count -= 1;
        true
    }

    fn names(&self) -> impl Iterator<Item = String> {
        let each = self.0.iter();
        each.flat_map(|(name, count)| iter::repeat_n((*name).to_owned(), *count))
    }
}

/// The letters of `known` that these mean, each once. There may be several of one name, which are alike.
///
/// # Errors
/// One means none, or may mean several.
pub fn all_named(
    texts: &[String],
    known: &[String],
    find: impl Fn(&str, &[String]) -> Result<String, Failure>,
) -> Result<Vec<String>, Failure> {
    let names = texts.iter().map(|text| find(text, known));
    let names = names.collect::<Result<BTreeSet<_>, _>>()?;
    let all = known.iter().filter(|name| names.contains(*name));
    Ok(all.cloned().collect())
}

/// The name itself, or that of the only letter with this id.
///
/// # Errors
/// There is none, or letters that differ have this id.
pub fn exactly(text: &str, known: &[String]) -> Result<String, Failure> {
    of_id(text, known)?.ok_or_else(|| {
        Failure::Refused(format!(
            "there is no dead letter {text:?} any more, or somebody else is looking at it"
        ))
    })
}

fn of_id(text: &str, known: &[String]) -> Result<Option<String>, Failure> {
    if text.is_empty() {
        return Ok(None);
    }
    if known.iter().any(|name| name == text) {
        return Ok(Some(text.to_owned()));
    }
    let names = known.iter().filter(|name| id_of(name) == text);
    let names: BTreeSet<_> = names.collect();
    match names.len() {
        0 | 1 => Ok(names.first().map(|name| (*name).clone())),
        count => Err(Failure::Refused(format!(
            "{count} dead letters that differ have the id {text:?}: name one as {}",
            listed(&names, known)
        ))),
    }
}

/// The name of `known` that this is or whose id it is, or else the one with this beginning.
///
/// # Errors
/// There is none, or there are several.
pub fn named(beginning: &str, known: &[String]) -> Result<String, Failure> {
    if let Some(name) = of_id(beginning, known)? {
        return Ok(name);
    }
    let fitting = known.iter().filter(|name| name.starts_with(beginning));
    let fitting: BTreeSet<_> = fitting.collect();
    match fitting.len() {
        0 => Err(Failure::Refused(format!(
            "there is no dead letter {beginning:?}"
        ))),
        1 => Ok(fitting.into_iter().cloned().collect()),
        _ => Err(Failure::Refused(format!(
            "{beginning:?} is the beginning of several ids: {}",
            listed(&fitting, known)
        ))),
    }
}

fn listed(names: &BTreeSet<&String>, known: &[String]) -> String {
    let known = Names::new(known.to_vec());
    let names = names.iter().map(|name| one_line(known.shown(name)));
    bounded(&names.collect::<Vec<_>>(), ", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use serde_json::json;

    /// Why a letter stays is partly what its sender has written.
    #[test]
    fn what_became_of_a_letter_is_one_line() {
        let settled = Settled {
            name: "1\n2026-01-01 INFO anna: 1".to_owned(),
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
    #[case::itself_before_what_begins_so("1", Some("1#a"))]
    #[case::a_beginning("2", Some("23#a"))]
    #[case::of_several("4", None)]
    #[case::two_that_are_alike("5", Some("55#a"))]
    #[case::two_that_differ("66", None)]
    #[case::one_of_them("66#b", Some("66#b"))]
    #[case::as_much_of_it_as_is_needed("66#a", Some("66#a1"))]
    #[case::with_such_a_sign_of_its_own("7#7", Some("7#7#a"))]
    #[case::without_an_id("#a", Some("#a"))]
    #[case::nothing("9", None)]
    #[case::no_name("", None)]
    fn a_letter_is_named_by_a_beginning(#[case] text: &str, #[case] expected: Option<&str>) {
        let known = letters(&[
            "1#a", "12#a", "23#a", "41#a", "42#a", "55#a", "55#a", "66#a1", "66#b", "7#7#a", "#a",
        ]);
        assert_eq!(named(text, &known).ok().as_deref(), expected);
    }

    #[test]
    fn a_page_names_letters_by_their_whole_ids() {
        let known = letters(&["12#a", "5#a", "55#a", "55#a", "6#a", "6#b", "#a"]);
        for missing in ["1", "", "2", "6#c"] {
            all_named(&letters(&[missing]), &known, exactly).unwrap_err();
        }
        let found = all_named(&letters(&["55", "55", "5", "6#b"]), &known, exactly).unwrap();
        assert_eq!(found, letters(&["5#a", "55#a", "55#a", "6#b"]));
        let several = exactly("6", &known).unwrap_err().to_string();
        assert!(several.ends_with("name one as 6#a, 6#b"), "{several}");
        // The last one's id looks like another's name.
        let names = Names::new([&known[..], &letters(&["5#a#c"])].concat());
        let shown: Vec<_> = names.all.iter().map(|name| names.shown(name)).collect();
        let expected = ["12", "5", "55", "55", "6#a", "6#b", "#a", "5#a#c"];
        assert_eq!(shown, expected);
    }

    #[test]
    fn letters_of_one_name_are_alike_in_all() {
        let letter = |body: &[u8], reason: &str, properties| DeadLetter {
            id: "1".to_owned(),
            queue: "job_deletions".to_owned(),
            reason: reason.to_owned(),
            time: String::new(),
            properties,
            body: body.to_vec(),
            cut: String::new(),
        };
        let one = letter(b"x", "why", json!({"priority": 1}));
        let names = [
            name(Vhost::Sdk, &one),
            name(Vhost::Task, &one),
            name(Vhost::Sdk, &letter(b"y", "why", json!({"priority": 1}))),
            name(Vhost::Sdk, &letter(b"", "whyx", json!({"priority": 1}))),
            name(Vhost::Sdk, &letter(b"x", "why", json!({"priority": 2}))),
        ];
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
        assert_eq!(name(Vhost::Sdk, &one), names[0]);
        assert!(names.iter().all(|name| id_of(name) == "1"), "{names:?}");
    }

    #[test]
    fn what_was_not_found_is_left() {
        let ids = letters(&["1", "2", "2", "3"]);
        let mut left = Left::new(&ids);
        assert_eq!(
            ["1", "1", "2", "4"].map(|id| left.take(id)),
            [true, false, true, false]
        );
        assert_eq!(left.names().collect::<Vec<_>>(), letters(&["2", "3"]));
    }
}
