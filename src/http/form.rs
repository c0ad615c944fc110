//! What forms ask for: fields to actions. Pure.

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jiff::Timestamp;
use uuid::Uuid;

use super::submission::PARAMETER;
use crate::actions::queues::parse_change;
use crate::domain::job::Priority;
use crate::domain::overview::Filter;
use crate::domain::worker::Wish;
use crate::store::{LimitChange, TurnChange};
use crate::telemetry::report::one_line;

/// Jobs or letters that one form names.
const MAX_NAMED: usize = 100;
/// Jobs that one form submits again: their ESDLs are large.
const MAX_AGAIN: usize = 20;

/// What an operator asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    Cancel(Vec<Uuid>),
    /// This to all that match, if they are those that the operator was shown; None before that.
    Matching(Whole, Filter, Option<Shown>),
    /// Another run of each, for the form that was shown then, with these parameters in place of its own.
    Again(Vec<Uuid>, String, Vec<(String, String)>),
    Turns(Vec<Uuid>, TurnChange),
    Limits(String, Vec<LimitChange>),
    Steer(String, Wish),
    Requeue(Vec<String>),
    /// All dead letters, if they are those of this digest, which the operator was shown; None before
    /// that.
    RequeueAll(Option<String>),
}

/// What is done to all jobs that match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whole {
    Cancel,
    /// Those that wait for their turn, and may have it.
    Hold,
    /// Those that are on hold.
    Release,
}

impl Whole {
    /// As forms name it.
    pub(super) fn verb(self) -> &'static str {
        match self {
            Whole::Cancel => "cancel-all",
            Whole::Hold => "hold-all",
            Whole::Release => "release-all",
        }
    }

    /// What it is to those that wait for their turn, if it is only about these.
    pub(super) fn turn(self) -> Option<TurnChange> {
        match self {
            Whole::Cancel => None,
            Whole::Hold => Some(TurnChange::Hold),
            Whole::Release => Some(TurnChange::Release),
        }
    }
}

/// The jobs that an operator was shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shown {
    /// When. Those that have come since are not meant.
    pub(super) at: Timestamp,
    /// Of their ids, see [`crate::actions::digest`].
    pub(super) digest: String,
    /// The ids themselves, if the form had room for them.
    pub(super) ids: Option<Vec<Uuid>>,
}

/// Jobs that match, whose ids a form carries along: about as many as a form may be long for.
const MAX_CARRIED: usize = 2500;
/// Bytes of an id.
const ID: usize = 16;

/// Ids as a form carries them, unless there are too many.
pub(super) fn carried(ids: &[Uuid]) -> Option<String> {
    let bytes = || ids.iter().flat_map(|id| *id.as_bytes());
    let fits = (1..=MAX_CARRIED).contains(&ids.len());
    fits.then(|| BASE64_URL_SAFE_NO_PAD.encode(bytes().collect::<Vec<u8>>()))
}

/// What a form carries along.
fn ids_of(carried: &str) -> Option<Vec<Uuid>> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(carried).ok()?;
    let ids = bytes.chunks_exact(ID);
    if !ids.remainder().is_empty() {
        return None;
    }
    ids.map(|id| Uuid::from_slice(id).ok()).collect()
}

/// Which page the operator comes from, and goes back to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Back {
    List(Filter),
    Job(Uuid),
}

impl Back {
    pub(super) fn path(&self) -> String {
        match self {
            Back::List(filter) => match filter.query(filter.offset) {
                query if query.is_empty() => "/".to_owned(),
                query => format!("/?{query}"),
            },
            Back::Job(id) => format!("/jobs/{id}"),
        }
    }
}

/// A form as it was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Form {
    pub(super) action: Action,
    pub(super) back: Back,
    pub(super) token: String,
}

/// The fields that a form may have.
#[derive(Default)]
struct Fields {
    verb: Option<String>,
    token: Option<String>,
    list: Option<String>,
    job: Option<String>,
    level: Option<String>,
    queue: Option<String>,
    window: Option<String>,
    max_running: Option<String>,
    worker: Option<String>,
    shown: Option<String>,
    set: Option<String>,
    at: Option<String>,
    ids: Vec<String>,
    letters: Vec<String>,
    params: Vec<(String, String)>,
}

impl Fields {
    fn parse(text: &[u8]) -> Result<Fields, String> {
        let mut fields = Fields::default();
        for (name, value) in form_urlencoded::parse(text) {
            if value.contains('\0') {
                return Err(format!("{}: no text has a NUL", one_line(&name)));
            }
            if let Some(key) = name.strip_prefix(PARAMETER) {
                fields.params.push((key.to_owned(), value.into_owned()));
                continue;
            }
            let once = match &*name {
                "id" => {
                    fields.ids.push(value.into_owned());
                    continue;
                }
                "letter" => {
                    fields.letters.push(value.into_owned());
                    continue;
                }
                "do" => &mut fields.verb,
                "token" => &mut fields.token,
                "list" => &mut fields.list,
                "job" => &mut fields.job,
                "level" => &mut fields.level,
                "queue" => &mut fields.queue,
                "window" => &mut fields.window,
                "max_running" => &mut fields.max_running,
                "worker" => &mut fields.worker,
                "shown" => &mut fields.shown,
                "set" => &mut fields.set,
                "at" => &mut fields.at,
                _ => return Err(format!("{} is not known here", one_line(&name))),
            };
            if once.is_some() {
                return Err(format!("{name} is given twice"));
            }
            *once = Some(value.into_owned());
        }
        let named = [("id", fields.ids.len()), ("letter", fields.letters.len())];
        match named.iter().find(|(_, count)| *count > MAX_NAMED) {
            Some((name, count)) => Err(format!("{name}: {count}, and at most {MAX_NAMED} at once")),
            None => Ok(fields),
        }
    }

    fn ids(&self) -> Result<Vec<Uuid>, String> {
        if self.ids.is_empty() {
            return Err("id is missing".to_owned());
        }
        self.ids.iter().map(|id| job_id("id", id)).collect()
    }

    fn list(&self) -> Result<Filter, String> {
        Filter::parse(self.list.as_deref().unwrap_or_default())
            .map_err(|error| format!("list: {}", one_line(&error)))
    }

    fn shown(&self) -> Result<Option<Shown>, String> {
        let Some(digest) = self.shown.clone() else {
            return Ok(None);
        };
        let at = required("at", &self.at)?;
        let parsed = at.parse().ok();
        let parsed = parsed.and_then(|at| Timestamp::from_microsecond(at).ok());
        let ids = self.set.as_deref().map(|set| {
            let faulty = || "set: expected ids as this service writes them".to_owned();
            ids_of(set).ok_or_else(faulty)
        });
        let ids = ids.transpose()?;
        match parsed {
            Some(at) => Ok(Some(Shown { at, digest, ids })),
            None => Err(format!("at={}: expected microseconds", one_line(&at))),
        }
    }

    fn limits(&self) -> Result<Vec<LimitChange>, String> {
        let mut changes = Vec::new();
        for (name, value, change) in [
            ("window", &self.window, LimitChange::Window as fn(_) -> _),
            ("max_running", &self.max_running, LimitChange::MaxRunning),
        ] {
            // An empty field leaves it as it is.
            if let Some(text) = value
                .as_deref()
                .map(str::trim)
                .filter(|text| !text.is_empty())
            {
                let faulty = |error| format!("{name}={}: {error}", one_line(text));
                changes.push(change(parse_change(text).map_err(faulty)?));
            }
        }
        match changes.is_empty() {
            true => Err("window and max_running are both empty".to_owned()),
            false => Ok(changes),
        }
    }

    fn action(&self) -> Result<Action, String> {
        if let Some((key, _)) = self
            .params
            .first()
            .filter(|_| self.verb.as_deref() != Some("again"))
        {
            return Err(format!("{PARAMETER}{} is not known here", one_line(key)));
        }
        let queue = || required("queue", &self.queue);
        let worker = || required("worker", &self.worker);
        Ok(match required("do", &self.verb)?.as_str() {
            "cancel" => Action::Cancel(self.ids()?),
            "cancel-all" => Action::Matching(Whole::Cancel, self.list()?, self.shown()?),
            "hold-all" => Action::Matching(Whole::Hold, self.list()?, self.shown()?),
            "release-all" => Action::Matching(Whole::Release, self.list()?, self.shown()?),
            "again" => {
                let ids = self.ids()?;
                if ids.len() > MAX_AGAIN {
                    return Err(format!(
                        "id: {}, and at most {MAX_AGAIN} run again at once",
                        ids.len()
                    ));
                }
                if ids.len() > 1 && !self.params.is_empty() {
                    return Err("parameters are changed of one job at a time".to_owned());
                }
                Action::Again(
                    ids,
                    self.at.clone().unwrap_or_default(),
                    self.params.clone(),
                )
            }
            "priority" => Action::Turns(self.ids()?, TurnChange::Priority(self.priority()?)),
            "first" => Action::Turns(self.ids()?, TurnChange::First),
            "hold" => Action::Turns(self.ids()?, TurnChange::Hold),
            "release" => Action::Turns(self.ids()?, TurnChange::Release),
            "pause" => Action::Limits(queue()?, vec![LimitChange::Paused(true)]),
            "resume" => Action::Limits(queue()?, vec![LimitChange::Paused(false)]),
            "limit" => Action::Limits(queue()?, self.limits()?),
            "drain" => Action::Steer(worker()?, Wish::Drained),
            "send-back" => Action::Steer(worker()?, Wish::Resumed),
            "requeue" if self.letters.is_empty() => Action::RequeueAll(self.shown.clone()),
            "requeue" => Action::Requeue(self.letters.clone()),
            other => return Err(format!("do={}: there is no such action", one_line(other))),
        })
    }

    fn priority(&self) -> Result<Priority, String> {
        let level = required("level", &self.level)?;
        let mut all = Priority::ALL.iter();
        let known = all.find(|one| one.name().eq_ignore_ascii_case(&level));
        known
            .copied()
            .ok_or_else(|| format!("level={}: expected low, medium or high", one_line(&level)))
    }
}

fn required(name: &str, value: &Option<String>) -> Result<String, String> {
    let value = value.clone().filter(|value| !value.is_empty());
    value.ok_or_else(|| format!("{name} is missing"))
}

fn job_id(name: &str, text: &str) -> Result<Uuid, String> {
    text.parse()
        .map_err(|_| format!("{name}={}: expected a job's id", one_line(text)))
}

impl Form {
    /// What a form's fields, as they are sent, ask for.
    ///
    /// # Errors
    /// Which field is not understood.
    pub(super) fn parse(text: &[u8]) -> Result<Form, String> {
        let fields = Fields::parse(text)?;
        let back = match &fields.job {
            Some(job) => Back::Job(job_id("job", job)?),
            None => Back::List(fields.list()?),
        };
        Ok(Form {
            action: fields.action()?,
            back,
            token: fields.token.unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::server::MAX_BODY;
    use crate::store::QueueChange;
    use proptest::prelude::*;
    use rstest::rstest;

    const ID: &str = "00000000-0000-0000-0000-000000000001";

    fn id() -> Uuid {
        ID.parse().unwrap()
    }

    #[rstest]
    #[case("do=cancel&id=ID&id=ID", Action::Cancel(vec![id(), id()]))]
    #[case(
        "do=cancel-all&list=workflow%3Da%2526b&shown=x&at=7",
        Action::Matching(
            Whole::Cancel,
            Filter { workflow: Some("a&b".to_owned()), ..Filter::default() },
            Some(Shown {
                at: Timestamp::from_microsecond(7).unwrap(), digest: "x".to_owned(), ids: None,
            }),
        )
    )]
    #[case(
        "do=hold-all&shown=x&at=7&set=AAAAAAAAAAAAAAAAAAAAAQAAAAAAAAAAAAAAAAAAAAE",
        Action::Matching(
            Whole::Hold,
            Filter::default(),
            Some(Shown {
                at: Timestamp::from_microsecond(7).unwrap(), digest: "x".to_owned(),
                ids: Some(vec![id(), id()]),
            }),
        )
    )]
    #[case("do=again&id=ID&at=7", Action::Again(vec![id()], "7".to_owned(), Vec::new()))]
    #[case(
        "do=again&id=ID&param.price=5",
        Action::Again(vec![id()], String::new(), vec![("price".to_owned(), "5".to_owned())])
    )]
    #[case(
        "do=cancel-all",
        Action::Matching(Whole::Cancel, Filter::default(), None)
    )]
    #[case("do=hold-all", Action::Matching(Whole::Hold, Filter::default(), None))]
    #[case(
        "do=release-all",
        Action::Matching(Whole::Release, Filter::default(), None)
    )]
    #[case(
        "do=priority&id=ID&level=high",
        Action::Turns(vec![id()], TurnChange::Priority(Priority::High))
    )]
    #[case("do=first&id=ID", Action::Turns(vec![id()], TurnChange::First))]
    #[case("do=hold&id=ID", Action::Turns(vec![id()], TurnChange::Hold))]
    #[case("do=release&id=ID", Action::Turns(vec![id()], TurnChange::Release))]
    #[case("do=pause&queue=a", Action::Limits("a".to_owned(), vec![LimitChange::Paused(true)]))]
    #[case("do=resume&queue=a", Action::Limits("a".to_owned(), vec![LimitChange::Paused(false)]))]
    #[case(
        "do=limit&queue=a&window=3&max_running=",
        Action::Limits("a".to_owned(), vec![LimitChange::Window(QueueChange::To(3))])
    )]
    #[case(
        "do=limit&queue=a&window=+default+&max_running=unlimited",
        Action::Limits(
            "a".to_owned(),
            vec![
                LimitChange::Window(QueueChange::AsDefined),
                LimitChange::MaxRunning(QueueChange::Unlimited),
            ],
        )
    )]
    #[case("do=drain&worker=w%40h", Action::Steer("w@h".to_owned(), Wish::Drained))]
    #[case("do=send-back&worker=w%40h", Action::Steer("w@h".to_owned(), Wish::Resumed))]
    #[case("do=requeue&letter=1&letter=2", Action::Requeue(vec!["1".to_owned(), "2".to_owned()]))]
    #[case("do=requeue&shown=x", Action::RequeueAll(Some("x".to_owned())))]
    fn a_form_asks_for_an_action(#[case] text: &str, #[case] action: Action) {
        let form = Form::parse(text.replace("ID", ID).as_bytes()).unwrap();
        assert_eq!(form.action, action);
    }

    #[rstest]
    #[case("", "do is missing")]
    #[case("do=", "do is missing")]
    #[case("do=delete", "do=delete: there is no such action")]
    #[case("do=cancel", "id is missing")]
    #[case("do=cancel&id=1", "id=1: expected a job's id")]
    #[case("do=cancel&id=ID&id=%3Cb%3E%0A", "id=<b>\\n: expected a job's id")]
    #[case("do=cancel&id=ID&do=hold", "do is given twice")]
    #[case("do=cancel&id=ID&colour=red", "colour is not known here")]
    #[case("do=cancel&id=ID&%E2%80%AE=x", "\\u{202e} is not known here")]
    #[case(
        "do=cancel&id=ID&list=state%3Ddone",
        "list: state=done: expected one of"
    )]
    #[case(
        "do=cancel&id=ID&job=https://evil",
        "job=https://evil: expected a job's id"
    )]
    #[case("do=cancel-all&shown=x", "at is missing")]
    #[case("do=cancel-all&shown=x&at=7&set=AAAA", "set: expected ids")]
    #[case("do=cancel-all&shown=x&at=7&set=%20", "set: expected ids")]
    #[case("do=cancel-all&shown=x&at=soon", "at=soon: expected microseconds")]
    #[case(
        "do=cancel-all&shown=x&at=9223372036854775807",
        "at=9223372036854775807: expected microseconds"
    )]
    #[case("do=priority&id=ID", "level is missing")]
    #[case(
        "do=priority&id=ID&level=top",
        "level=top: expected low, medium or high"
    )]
    #[case("do=pause", "queue is missing")]
    #[case("do=pause&queue=a%00b", "queue: no text has a NUL")]
    #[case("do=limit&queue=a", "window and max_running are both empty")]
    #[case("do=limit&queue=a&window=0", "window=0: expected a number of tasks")]
    #[case(
        "do=limit&queue=a&max_running=-1",
        "max_running=-1: expected a number of tasks"
    )]
    #[case(
        "do=again&id=ID&id=ID&param.a=1",
        "parameters are changed of one job at a time"
    )]
    #[case("do=hold&id=ID&param.a=1", "param.a is not known here")]
    #[case("do=drain", "worker is missing")]
    fn a_faulty_form_names_the_culprit(#[case] text: &str, #[case] expected: &str) {
        let fault = Form::parse(text.replace("ID", ID).as_bytes()).unwrap_err();
        assert!(fault.starts_with(expected), "{fault}");
    }

    proptest! {
        #[test]
        fn whatever_is_sent_is_understood_or_refused(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            verb in "(cancel|cancel-all|hold-all|priority|hold|limit|drain|requeue)",
        ) {
            let _ = Form::parse(&bytes);
            let mut text = format!("do={verb}&").into_bytes();
            text.extend(&bytes);
            if let Ok(form) = Form::parse(&text) {
                // It goes into a header.
                prop_assert!(form.back.path().bytes().all(|byte| byte.is_ascii_graphic()));
            }
        }
    }

    #[test]
    fn a_form_carries_as_many_ids_as_it_may_be_long_for() {
        let ids: Vec<_> = (1..=2500).map(Uuid::from_u128).collect();
        let text = carried(&ids).unwrap();
        assert!(text.len() < MAX_BODY - 8192, "{}", text.len());
        assert_eq!(ids_of(&text), Some(ids.clone()));
        assert_eq!(carried(&[&ids[..], &ids[..1]].concat()), None);
        assert_eq!(carried(&[]), None);
    }

    #[test]
    fn a_form_names_a_hundred_jobs_at_most() {
        let text = format!("do=hold{}", format!("&id={ID}").repeat(101));
        let fault = Form::parse(text.as_bytes()).unwrap_err();
        assert_eq!(fault, "id: 101, and at most 100 at once");
    }

    #[rstest]
    #[case("", "/")]
    #[case("&list=", "/")]
    #[case("&list=text%3Da%2520b%26offset%3D50", "/?text=a+b&offset=50")]
    #[case("&list=workflow%3D%250d%250aX%3A%2520y", "/?workflow=%0D%0AX%3A+y")]
    #[case("&job=ID", "/jobs/ID")]
    fn it_goes_back_to_where_it_came_from(#[case] fields: &str, #[case] path: &str) {
        let text = format!("do=hold&id=ID{fields}").replace("ID", ID);
        let form = Form::parse(text.as_bytes()).unwrap();
        assert_eq!(form.back.path(), path.replace("ID", ID));
    }
}
