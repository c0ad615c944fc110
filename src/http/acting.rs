//! What operators do through the page: asked again where something is destroyed, done by
//! [`crate::actions`], and told in the log with who it was.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, bail};
use jiff::Timestamp;
use log::{info, warn};
use serde_json::json;
use uuid::Uuid;

use super::accounts::{Accounts, Purpose};
use super::admission::Visit;
use super::form::{Action, Form};
use super::page::Frame;
use super::page::acting::{self as pages, Acting, Letter};
use super::server::Response;
use super::{html, json_response, refusal};
use crate::actions::letters::{Letters, named};
use crate::actions::{Failure, counted, jobs, queues};
use crate::broker::dead_letters::Fate;
use crate::domain::overview::{Filter, JobState};
use crate::domain::text::excerpt;
use crate::domain::worker::Wish;
use crate::service::shared::Service;
use crate::service::workers::{find, steering};
use crate::store::{Connection, LimitChange, StoreError, TurnChange};
use crate::telemetry::health::Part;
use crate::telemetry::report::{harmless, one_line};

/// How long going through the dead letters of a vhost may take, while somebody waits for the page.
const LETTERS_PATIENCE: Duration = Duration::from_secs(10);
/// Jobs and letters that a line of the log or a page names.
const TOLD: usize = 20;

/// How long the text may be that goes along in a link.
const MAX_NOTE: usize = 2000;
const NOTHING_DONE: &str = "nothing was done";

/// What came of an action.
enum Came {
    Done(Vec<String>),
    /// There is so much more of it than the operator was shown that it is asked for again.
    More(usize),
}

/// The page that asks again.
pub(super) fn confirm(
    service: &Service,
    visit: &Visit,
    frame: &Frame<'_>,
    acting: &Acting,
    form: &Form,
) -> Response {
    let asked = match &form.action {
        Action::Cancel(ids) => confirm_cancel(service, frame, acting, ids),
        Action::CancelMatching(filter, _) => confirm_matching(service, frame, acting, filter, None),
        Action::Requeue(_) | Action::RequeueAll(_) => confirm_requeue(service, frame, acting, None),
        Action::Turns(..) | Action::Limits(..) | Action::Steer(..) => Err(Failure::Refused(
            "this is done without being asked again".to_owned(),
        )),
    };
    asked
        .map(|page| html(200, frame.nonce, page))
        .unwrap_or_else(|failure| failed(visit, &failure))
}

fn confirm_cancel(
    service: &Service,
    frame: &Frame<'_>,
    acting: &Acting,
    ids: &[Uuid],
) -> Result<String, Failure> {
    let mut connection = looking(service)?;
    let mut live = Vec::new();
    for id in ids {
        let story = connection.story(*id)?;
        live.extend(story.map(|story| story.job));
    }
    live.retain(|job| matches!(job.state, JobState::Live(_)));
    Ok(match live.is_empty() {
        true => pages::gone(ids),
        false => pages::confirm_cancel(frame, acting, &live),
    })
}

fn confirm_matching(
    service: &Service,
    frame: &Frame<'_>,
    acting: &Acting,
    filter: &Filter,
    notice: Option<&str>,
) -> Result<String, Failure> {
    let mut connection = looking(service)?;
    let found = jobs::unfinished(&mut connection, filter, |_| true)?;
    Ok(pages::confirm_matching(frame, acting, &found, notice))
}

fn confirm_requeue(
    service: &Service,
    frame: &Frame<'_>,
    acting: &Acting,
    notice: Option<&str>,
) -> Result<String, Failure> {
    let letters = Letters::open(&service.config, LETTERS_PATIENCE)?;
    let mut first = Vec::new();
    let mut count = 0;
    letters.look(|_, letter| {
        count += 1;
        if first.len() < pages::NAMED {
            first.push(Letter {
                id: letter.id.clone(),
                time: letter.time.clone(),
                queue: letter.queue.clone(),
                reason: letter.reason.clone(),
            });
        }
    })?;
    letters.close()?;
    Ok(pages::confirm_requeue(frame, acting, &first, count, notice))
}

/// Does what a form asks for, tells of it in the log, and sends the operator back.
pub(super) fn act(
    service: &Service,
    accounts: &Accounts,
    visit: &Visit,
    frame: &Frame<'_>,
    acting: &Acting,
    form: &Form,
) -> Response {
    let (who, account) = (visit.who(), visit.account());
    let what = in_words(&form.action);
    match perform(service, &form.action) {
        Ok(Came::Done(lines)) => {
            let told = bounded(&lines, "; ");
            info!(account; "{who}: {what}: {told}");
            done(accounts, visit, form, &lines, frame.now)
        }
        Ok(Came::More(count)) => {
            info!(account; "{who}: {what}: not done, for there are {count} now");
            more(service, visit, frame, acting, form, count)
        }
        Err(failure) => {
            warn!(account; "{who}: {what}: failed: {}", one_line(&failure.to_string()));
            failed(visit, &failure)
        }
    }
}

fn perform(service: &Service, action: &Action) -> Result<Came, Failure> {
    let config = &service.config;
    let lines = match action {
        // Only looks: RabbitMQ keeps it while Postgres does not write.
        Action::Cancel(ids) => lines(&jobs::cancel(config, &mut looking(service)?, ids)?),
        Action::CancelMatching(filter, shown) => {
            let found = jobs::unfinished(&mut looking(service)?, filter, |_| true)?;
            if found.len() > shown.unwrap_or_default() {
                return Ok(Came::More(found.len()));
            }
            let ids: Vec<_> = found.iter().map(|job| job.id).collect();
            jobs::ask_to_end(config, &ids)?;
            let count = counted(ids.len(), "job");
            let each = ids.iter().map(|id| format!("job {id}"));
            std::iter::once(format!("{count} asked to end"))
                .chain(each)
                .collect()
        }
        Action::Turns(ids, change) => lines(&jobs::change_turns(
            &mut connection(service)?,
            ids,
            *change,
        )?),
        Action::Limits(queue, changes) => {
            let catalogue = service.catalogue.get();
            let mut connection = connection(service)?;
            let limit = queues::change_limits(&catalogue, &mut connection, queue, changes)?;
            vec![format!("{}: {limit}", one_line(queue))]
        }
        Action::Steer(host, wish) => vec![steer(service, host, *wish)?],
        Action::Requeue(ids) => return requeue(service, Some(ids), 0),
        Action::RequeueAll(shown) => return requeue(service, None, shown.unwrap_or_default()),
    };
    Ok(Came::Done(lines))
}

fn lines(all: &[impl ToString]) -> Vec<String> {
    all.iter().map(|one| harmless(&one.to_string())).collect()
}

/// A connection that writes.
fn connection(service: &Service) -> Result<Connection, Failure> {
    let connection = postgres_is_there(service).and_then(|()| Ok(service.store.connection()?));
    Ok(connection.context(NOTHING_DONE)?)
}

/// One that only looks, as the list does.
fn looking(service: &Service) -> Result<Connection, Failure> {
    if !service.can_look_on.load(Ordering::Relaxed) {
        postgres_is_there(service).context(NOTHING_DONE)?;
    }
    Ok(service.views.connection().context(NOTHING_DONE)?)
}

/// Nobody waits as long as connecting in vain takes, while that is known to be in vain.
fn postgres_is_there(service: &Service) -> anyhow::Result<()> {
    let (_, parts) = service.health.parts(Timestamp::now());
    let mut parts = parts.iter().filter(|part| part.part == Part::Postgres);
    match parts.find_map(|part| part.why.as_ref()) {
        Some(why) => bail!("Postgres: {why}"),
        None => Ok(()),
    }
}

fn steer(service: &Service, host: &str, wish: Wish) -> Result<String, Failure> {
    let mut connection = connection(service)?;
    let worker =
        find(&mut connection, host).map_err(|error| match error.downcast_ref::<StoreError>() {
            Some(_) => Failure::Failed(error.context(NOTHING_DONE)),
            None => Failure::Refused(format!("{error:#}")),
        })?;
    let steered = steering::steer(&service.config, &mut connection, &worker, wish);
    let steered = steered.map_err(|error| {
        error.context("whether the worker does so is not known; asking again does no harm")
    })?;
    Ok(steered.in_words(wish))
}

/// Requeues these, or all if they are no more than so many.
fn requeue(service: &Service, which: Option<&[String]>, shown: usize) -> Result<Came, Failure> {
    let letters = Letters::open(&service.config, LETTERS_PATIENCE)
        .map_err(|error| error.context("nothing was requeued"))?;
    let mut known = Vec::new();
    letters.look(|_, letter| known.push(letter.id.clone()))?;
    let ids = match which {
        Some(ids) => {
            let named = ids.iter().map(|id| named(id, &known));
            named.collect::<Result<Vec<_>, _>>()?
        }
        None if known.len() > shown => return Ok(Came::More(known.len())),
        None => known,
    };
    let mut settled = Vec::new();
    let outcome = letters.settle(&ids, Fate::Requeue, &mut settled);
    let told = lines(&settled);
    if let Err(error) = outcome {
        let so_far = match told.is_empty() {
            true => error,
            false => error.context(format!("so far: {}", bounded(&told, "; "))),
        };
        return Err(so_far.into());
    }
    // What is confirmed stays so.
    let _ = letters.close();
    let requeued = settled.iter().filter(|one| one.failure.is_none()).count();
    let head = format!("{} requeued", counted(requeued, "dead letter"));
    Ok(Came::Done(std::iter::once(head).chain(told).collect()))
}

/// An action as the log tells it.
fn in_words(action: &Action) -> String {
    match action {
        Action::Cancel(ids) => format!("cancel {}", bounded(&lines(ids), ", ")),
        Action::CancelMatching(filter, count) => {
            let which = match filter.query(0) {
                query if query.is_empty() => "all jobs".to_owned(),
                query => format!("all jobs with {}", one_line(&query)),
            };
            format!("cancel {which}, {} as shown", count.unwrap_or_default())
        }
        Action::Turns(ids, change) => {
            let verb = match change {
                TurnChange::Hold => "hold".to_owned(),
                TurnChange::Release => "release".to_owned(),
                TurnChange::First => "move first".to_owned(),
                TurnChange::Priority(priority) => format!("priority {}", priority.name()),
            };
            format!("{verb} {}", bounded(&lines(ids), ", "))
        }
        Action::Limits(queue, changes) => {
            let verbs: Vec<_> = changes
                .iter()
                .map(|change| match change {
                    LimitChange::Paused(true) => "pause",
                    LimitChange::Paused(false) => "resume",
                    LimitChange::Window(_) => "window",
                    LimitChange::MaxRunning(_) => "max_running",
                })
                .collect();
            format!("{} of queue {}", verbs.join(" and "), one_line(queue))
        }
        Action::Steer(host, Wish::Drained) => format!("drain worker {}", one_line(host)),
        Action::Steer(host, Wish::Resumed) => format!("resume worker {}", one_line(host)),
        Action::Requeue(ids) => format!("requeue {}", one_line(&bounded(ids, ", "))),
        Action::RequeueAll(count) => {
            let count = count.unwrap_or_default();
            format!("requeue all dead letters, {count} as shown")
        }
    }
}

/// The first of them.
fn bounded(texts: &[String], between: &str) -> String {
    let mut text = texts[..texts.len().min(TOLD)].join(between);
    if let Some(more) = texts.len().checked_sub(TOLD).filter(|more| *more > 0) {
        text += &format!("{between}and {more} more");
    }
    text
}

/// Sends a browser back to where it came from, with what was done.
fn done(
    accounts: &Accounts,
    visit: &Visit,
    form: &Form,
    lines: &[String],
    now: Timestamp,
) -> Response {
    if !visit.html {
        return json_response(200, &json!({"done": lines}));
    }
    let note = bounded(lines, "\n");
    let note = excerpt(&note, MAX_NOTE);
    let path = form.back.path();
    let between = if path.contains('?') { '&' } else { '?' };
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("note", &note);
    query.append_pair("seal", &accounts.seal(Purpose::Note, &note, now));
    let mut response = Response::text(303, &note);
    let location = format!("{path}{between}{}", query.finish());
    response.headers.push(("Location", location));
    response
}

/// Asks again, for what there is now.
fn more(
    service: &Service,
    visit: &Visit,
    frame: &Frame<'_>,
    acting: &Acting,
    form: &Form,
    count: usize,
) -> Response {
    let notice = format!("There are {count} now, more than this form was for. Nothing was done.");
    if !visit.html {
        return json_response(409, &json!({"error": notice, "count": count}));
    }
    let asked = match &form.action {
        Action::CancelMatching(filter, _) => {
            confirm_matching(service, frame, acting, filter, Some(&notice))
        }
        Action::Cancel(_)
        | Action::Requeue(_)
        | Action::RequeueAll(_)
        | Action::Turns(..)
        | Action::Limits(..)
        | Action::Steer(..) => confirm_requeue(service, frame, acting, Some(&notice)),
    };
    asked
        .map(|page| html(409, frame.nonce, page))
        .unwrap_or_else(|failure| failed(visit, &failure))
}

fn failed(visit: &Visit, failure: &Failure) -> Response {
    let status = match failure {
        Failure::Refused(_) => 400,
        Failure::Failed(_) => 503,
    };
    refusal(visit.html, status, &failure.to_string())
}
