//! What operators do through the page: asked again where something is destroyed, done by
//! [`crate::actions`], and told in the log with who it was.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, bail};
use jiff::Timestamp;
use log::{info, warn};
use serde_json::{Map, json};
use uuid::Uuid;

use super::accounts::{Accounts, Purpose};
use super::admission::Visit;
use super::form::{Action, Back, Form, Shown, Whole};
use super::page::Frame;
use super::page::acting::{self as pages, Acting, Letter};
use super::server::Response;
use super::submission::{self, Filled};
use super::{html, json_response, refusal};
use crate::actions::letters::{self, Letters, Names, all_named, exactly};
use crate::actions::{Failure, TOLD, again, bounded, counted, derived_id, digest, jobs, queues};
use crate::broker::dead_letters::Fate;
use crate::domain::job::Origin;
use crate::domain::overview::{Filter, JobState};
use crate::domain::text::excerpt;
use crate::domain::worker::Wish;
use crate::service::shared::Service;
use crate::service::workers::{find, steering};
use crate::store::{Connection, LimitChange, StoreError, TurnChange};
use crate::telemetry::health::Part;
use crate::telemetry::report::{harmless, one_line};
use crate::threads::Signal;
use crate::wire::{self, JobSubmission};

/// How long going through the dead letters of a vhost may take, while somebody waits for the page.
const LETTERS_PATIENCE: Duration = Duration::from_secs(10);
/// How long the text may be that goes along in a link.
const MAX_NOTE: usize = 2000;
const NOTHING_DONE: &str = "nothing was done";

/// What came of an action.
enum Came {
    Done(Vec<String>),
    /// There are others now than the operator was shown: it is asked again.
    Others,
    /// What was filled in does not fit: nothing was done.
    Faulty(Vec<String>),
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
        Action::Matching(whole, filter, _) => {
            confirm_matching(service, frame, acting, (*whole, filter), None)
        }
        Action::Requeue(_) | Action::RequeueAll(_) => confirm_requeue(service, frame, acting, None),
        Action::Again(ids, _, params) if ids.len() == 1 => {
            confirm_again(service, frame, acting, (ids[0], params), &[])
        }
        Action::Again(..) | Action::Turns(..) | Action::Limits(..) | Action::Steer(..) => Err(
            Failure::Refused("this is done without being asked again".to_owned()),
        ),
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
    (whole, filter): (Whole, &Filter),
    notice: Option<&str>,
) -> Result<String, Failure> {
    // As Postgres keeps it.
    let at = Timestamp::from_microsecond(frame.now.as_microsecond()).unwrap_or(frame.now);
    let found = jobs::matching(
        &mut looking(service)?,
        filter,
        whole.turn(),
        at,
        pages::NAMED,
    )?;
    let digest = digest(&found.ids);
    let ids = None;
    let shown = Shown { at, digest, ids };
    Ok(pages::confirm_matching(
        frame, acting, whole, &found, &shown, notice,
    ))
}

/// The first of the dead letters, and the names of all.
///
/// # Errors
/// RabbitMQ is not there.
pub(super) fn letters(service: &Service) -> Result<(Vec<Letter>, Names), Failure> {
    let letters = Letters::open(&service.config, LETTERS_PATIENCE)?;
    let mut first = Vec::new();
    let mut names = Vec::new();
    letters.look(|vhost, letter| {
        let name = letters::name(vhost, letter);
        names.push(name.clone());
        if first.len() < pages::NAMED {
            first.push(Letter {
                name,
                time: letter.time.clone(),
                vhost,
                queue: letter.queue.clone(),
                bytes: letter.body.len(),
                reason: letter.reason.clone(),
            });
        }
    })?;
    letters.close()?;
    Ok((first, Names::new(names)))
}

fn confirm_requeue(
    service: &Service,
    frame: &Frame<'_>,
    acting: &Acting,
    notice: Option<&str>,
) -> Result<String, Failure> {
    let (first, names) = letters(service)?;
    let digest = digest(&names.all);
    Ok(pages::confirm_requeue(
        frame, acting, &first, &names, &digest, notice,
    ))
}

/// The form for another run of a job, filled in with these parameters, or with its own.
fn confirm_again(
    service: &Service,
    frame: &Frame<'_>,
    acting: &Acting,
    (id, params): (Uuid, &[(String, String)]),
    faults: &[String],
) -> Result<String, Failure> {
    let mut connection = looking(service)?;
    let unchanged = |_: &JobSubmission| Ok(Map::new());
    let again = again::submission(&service.config, &mut connection, (id, id), unchanged)?;
    drop(connection);
    let submission = &again.submission;
    let catalogue = service.catalogue.get();
    let definition = catalogue.definition(&submission.workflow_type);
    let definitions = definition.map_or(&[][..], |definition| &definition.parameters);
    let params = match params {
        [] => submission::written(definitions, &wire::submitted_parameters(submission)),
        params => params.to_vec(),
    };
    let filled = Filled {
        params,
        ..Filled::default()
    };
    let rerun = pages::Rerun {
        id,
        workflow: &submission.workflow_type,
        reference: submission.job_reference.as_deref().unwrap_or_default(),
        definitions,
        filled: &filled,
        faults,
    };
    Ok(pages::confirm_again(frame, acting, &rerun))
}

/// Does what a form asks for, and sends the operator back. The log has who asks before, should the
/// service end in the middle of it, and what came of it.
pub(super) fn act(
    service: &Service,
    accounts: &Accounts,
    visit: &Visit,
    frame: &Frame<'_>,
    acting: &Acting,
    form: &Form,
    stop: &Signal,
) -> Response {
    let (who, account) = (visit.who(), visit.account());
    let what = in_words(&form.action);
    info!(account; "{who} asks: {what}");
    let performed = perform(service, form, visit, stop);
    match performed {
        Ok(Came::Done(lines)) => {
            // All of them, a readable part at a time.
            for told in lines.chunks(TOLD) {
                let told = told.join("; ");
                info!(account; "{who}: {what}: {told}");
            }
            done(accounts, visit, &form.back, &lines, frame.now)
        }
        Ok(Came::Others) => {
            info!(account; "{who}: {what}: not done, for there are others now than were shown");
            ask_again(service, visit, frame, acting, form)
        }
        Ok(Came::Faulty(faults)) => {
            let why = one_line(&faults.join("; "));
            info!(account; "{who}: {what}: not done: {why}");
            refuse_again(service, visit, frame, acting, (form, &faults))
        }
        Err(failure) => {
            warn!(account; "{who}: {what}: failed: {}", one_line(&failure.to_string()));
            failed(visit, &failure)
        }
    }
}

fn perform(service: &Service, form: &Form, visit: &Visit, stop: &Signal) -> Result<Came, Failure> {
    let config = &service.config;
    let lines = match &form.action {
        // Only looks: RabbitMQ keeps it while Postgres does not write.
        Action::Cancel(ids) => lines(&jobs::cancel(
            config,
            looking(service)?,
            ids,
            &visit.origin(),
        )?),
        Action::Matching(whole, filter, shown) => {
            return to_all(service, visit, *whole, filter, shown.as_ref());
        }
        Action::Again(ids, at, params) => {
            let origin = visit.origin();
            let content = format!("{params:?}");
            let names = [form.token.as_bytes(), at.as_bytes(), content.as_bytes()];
            let mut faults = Vec::new();
            let told = each(ids, stop, |id| {
                let new = derived_id(id, &names);
                run_again(service, (id, new), (params, &mut faults), &origin)
            });
            if !faults.is_empty() {
                return Ok(Came::Faulty(faults));
            }
            told?
        }
        Action::Turns(ids, change) => lines(&jobs::change_turns(
            &mut connection(service)?,
            ids,
            *change,
            &visit.origin(),
        )?),
        Action::Limits(queue, changes) => {
            let catalogue = service.catalogue.get();
            let mut connection = connection(service)?;
            let limit = queues::change_limits(
                &catalogue,
                &mut connection,
                queue,
                (changes, &visit.origin()),
            )?;
            vec![format!("{}: {limit}", one_line(queue))]
        }
        Action::Steer(host, wish) => vec![steer(service, host, *wish, stop)?],
        Action::Requeue(ids) => return requeue(service, Some(ids), None),
        Action::RequeueAll(shown) => return requeue(service, None, shown.as_deref()),
    };
    Ok(Came::Done(lines))
}

/// Does so to all that match, of those that were shown.
fn to_all(
    service: &Service,
    visit: &Visit,
    whole: Whole,
    filter: &Filter,
    shown: Option<&Shown>,
) -> Result<Came, Failure> {
    let Some(shown) = shown else {
        return Ok(Came::Others);
    };
    let Some(jobs::Meant { ids, others }) = still_meant(service, whole, filter, shown)? else {
        return Ok(Came::Others);
    };
    if ids.is_empty() {
        let nothing = std::iter::once(NOTHING_DONE.to_owned());
        return Ok(Came::Done(nothing.chain(others).collect()));
    }
    let count = counted(ids.len(), "job");
    let Some(change) = whole.turn() else {
        jobs::ask_to_end(&service.config, &ids, &visit.origin())?;
        let each = ids.iter().map(|id| format!("job {id}"));
        let head = std::iter::once(format!("{count} asked to end"));
        return Ok(Came::Done(head.chain(others).chain(each).collect()));
    };
    let became = jobs::change_all_turns(&mut connection(service)?, &ids, change, &visit.origin())?;
    let done = became.iter().filter(|one| one.is_done).count();
    let done = match done == ids.len() {
        true => count,
        false => format!("{done} of {count}"),
    };
    let what = match whole {
        Whole::Release => "released",
        Whole::Hold | Whole::Cancel => "held until they are released",
    };
    let head = std::iter::once(format!("{done} {what}"));
    let told = head.chain(others).chain(lines(&became));
    Ok(Came::Done(told.collect()))
}

/// Those of the jobs that were shown to which it is still to be done; None if it is not known which were shown
/// and there are others now.
fn still_meant(
    service: &Service,
    whole: Whole,
    filter: &Filter,
    shown: &Shown,
) -> Result<Option<jobs::Meant>, Failure> {
    let mut connection = looking(service)?;
    let matching = jobs::matching(&mut connection, filter, whole.turn(), shown.at, 0)?.ids;
    if digest(&matching) == shown.digest {
        let (ids, others) = (matching, Vec::new());
        return Ok(Some(jobs::Meant { ids, others }));
    }
    // What a form says of them counts only if it is what they were.
    let confirmed = shown
        .ids
        .as_ref()
        .filter(|ids| digest(*ids) == shown.digest);
    confirmed
        .map(|confirmed| jobs::meant(&mut connection, confirmed, &matching))
        .transpose()
}

fn lines(all: &[impl ToString]) -> Vec<String> {
    all.iter().map(|one| harmless(&one.to_string())).collect()
}

/// Submits a job once more, under this id, with these parameters in place of its own; `faults` is what does
/// not fit. The same form sent again asks for the same id, which is then
/// known already.
fn run_again(
    service: &Service,
    (id, new): (Uuid, Uuid),
    (params, faults): (&[(String, String)], &mut Vec<String>),
    origin: &Origin,
) -> Result<String, Failure> {
    let config = &service.config;
    let changes = |job: &JobSubmission| {
        let catalogue = service.catalogue.get();
        let definition = catalogue.definition(&job.workflow_type);
        let definitions = definition.map_or(&[][..], |definition| &definition.parameters);
        let own = wire::submitted_parameters(job);
        submission::changes(params, definitions, &own).map_err(|wrong| {
            *faults = wrong;
            Failure::Refused(faults.join("; "))
        })
    };
    let again = again::submission(config, &mut looking(service)?, (id, new), changes)?;
    again::submit(config, new, &again, origin)?;
    Ok(format!("job {id} runs again as job {new}"))
}

/// Does so to each of these jobs, as long as Postgres and RabbitMQ are there and nobody stops this service.
fn each(
    ids: &[Uuid],
    stop: &Signal,
    mut run: impl FnMut(Uuid) -> Result<String, Failure>,
) -> Result<Vec<String>, Failure> {
    let mut told = Vec::new();
    for (place, id) in ids.iter().enumerate() {
        let left = ids.len() - place;
        if stop.is_given() {
            told.push(format!(
                "this service ends: {} not submitted",
                counted(left, "job")
            ));
            break;
        }
        match run(*id) {
            Ok(line) => told.push(line),
            Err(failure) if ids.len() == 1 => return Err(failure),
            Err(failure @ Failure::Refused(_)) => told.push(harmless(&failure.to_string())),
            Err(Failure::Failed(error)) if told.is_empty() => return Err(Failure::Failed(error)),
            // The others would fail as well, each after as long.
            Err(Failure::Failed(error)) => {
                let others = counted(left - 1, "other job");
                let why = format!("job {id}: {error:#}; {others} not submitted");
                told.push(harmless(&why));
                break;
            }
        }
    }
    Ok(told)
}

/// A connection that writes.
fn connection(service: &Service) -> Result<Connection, Failure> {
    let connection = postgres_is_there(service).and_then(|()| Ok(service.store.connection()?));
    Ok(connection.context(NOTHING_DONE)?)
}

/// One that only looks: while the server that takes writes is there, at that, which knows of the
/// newest jobs.
fn looking(service: &Service) -> Result<Connection, Failure> {
    let is_there = postgres_is_there(service);
    let connection = match (is_there, service.can_look_on.load(Ordering::Relaxed)) {
        (Ok(()), _) => service.store.connection(),
        (Err(_), true) => service.views.connection(),
        (Err(why), false) => return Err(why.context(NOTHING_DONE).into()),
    };
    Ok(connection.context(NOTHING_DONE)?)
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

fn steer(service: &Service, host: &str, wish: Wish, stop: &Signal) -> Result<String, Failure> {
    let mut connection = connection(service)?;
    let worker =
        find(&mut connection, host).map_err(|error| match error.downcast_ref::<StoreError>() {
            Some(_) => Failure::Failed(error.context(NOTHING_DONE)),
            None => Failure::Refused(format!("{error:#}")),
        })?;
    steering::check(&worker).map_err(Failure::Refused)?;
    let steered = steering::steer(&service.config, connection, &worker, wish, stop);
    let steered =
        steered.context("whether the worker does so is not known; asking again does no harm")?;
    Ok(steered.in_words(wish))
}

/// Requeues these, or all if they are those of this digest.
fn requeue(
    service: &Service,
    which: Option<&[String]>,
    shown: Option<&str>,
) -> Result<Came, Failure> {
    let letters = Letters::open(&service.config, LETTERS_PATIENCE)
        .map_err(|error| error.context("nothing was requeued"))?;
    let mut known = Vec::new();
    letters.look(|vhost, letter| known.push(letters::name(vhost, letter)))?;
    let known = Names::new(known);
    let names = match which {
        Some(which) => all_named(which, &known.all, exactly)?,
        None if shown.is_none_or(|shown| shown != digest(&known.all)) => {
            return Ok(Came::Others);
        }
        None => known.all.clone(),
    };
    let mut settled = Vec::new();
    let outcome = letters.settle(&names, &known, Fate::Requeue, &mut settled);
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
    let all = counted(names.len(), "dead letter");
    let head = match requeued == names.len() {
        true => format!("{all} requeued"),
        false => format!("{requeued} of {all} requeued"),
    };
    Ok(Came::Done(std::iter::once(head).chain(told).collect()))
}

/// An action as the log tells it.
fn in_words(action: &Action) -> String {
    match action {
        Action::Cancel(ids) => format!("cancel {}", bounded(&lines(ids), ", ")),
        Action::Matching(whole, filter, shown) => {
            let which = match filter.query(0) {
                query if query.is_empty() => "all jobs".to_owned(),
                query => format!("all jobs with {}", one_line(&query)),
            };
            let at = shown
                .as_ref()
                .map(|shown| format!(", as shown at {}", shown.at));
            let verb = match whole {
                Whole::Cancel => "cancel",
                Whole::Hold => "hold",
                Whole::Release => "release",
            };
            format!("{verb} {which}{}", at.unwrap_or_default())
        }
        Action::Again(ids, ..) => format!("run again {}", bounded(&lines(ids), ", ")),
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
        Action::RequeueAll(_) => "requeue all dead letters that were shown".to_owned(),
    }
}

/// Sends a browser back to where it came from, with what was done.
pub(super) fn done(
    accounts: &Accounts,
    visit: &Visit,
    back: &Back,
    lines: &[String],
    now: Timestamp,
) -> Response {
    if !visit.html {
        return json_response(200, &json!({"done": lines}));
    }
    let note = bounded(lines, "\n");
    let note = excerpt(&note, MAX_NOTE);
    let path = back.path();
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
fn ask_again(
    service: &Service,
    visit: &Visit,
    frame: &Frame<'_>,
    acting: &Acting,
    form: &Form,
) -> Response {
    const NOTICE: &str = "There are others now than this form was for. Nothing was done.";
    if !visit.html {
        return json_response(409, &json!({"error": NOTICE}));
    }
    let asked = match &form.action {
        Action::Matching(whole, filter, _) => {
            confirm_matching(service, frame, acting, (*whole, filter), Some(NOTICE))
        }
        Action::Cancel(_)
        | Action::Again(..)
        | Action::Requeue(_)
        | Action::RequeueAll(_)
        | Action::Turns(..)
        | Action::Limits(..)
        | Action::Steer(..) => confirm_requeue(service, frame, acting, Some(NOTICE)),
    };
    asked
        .map(|page| html(409, frame.nonce, page))
        .unwrap_or_else(|failure| failed(visit, &failure))
}

/// Shows what does not fit, in the form that it was filled in.
fn refuse_again(
    service: &Service,
    visit: &Visit,
    frame: &Frame<'_>,
    acting: &Acting,
    (form, faults): (&Form, &[String]),
) -> Response {
    match &form.action {
        Action::Again(ids, _, params) if visit.html && ids.len() == 1 => {
            confirm_again(service, frame, acting, (ids[0], params), faults)
                .map(|page| html(400, frame.nonce, page))
                .unwrap_or_else(|failure| failed(visit, &failure))
        }
        _ => refusal(visit.html, 400, &faults.join("; ")),
    }
}

pub(super) fn failed(visit: &Visit, failure: &Failure) -> Response {
    let status = match failure {
        Failure::Refused(_) => 400,
        Failure::Failed(_) => 503,
    };
    refusal(visit.html, status, &failure.to_string())
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn what_is_submitted_again_ends_when_nothing_more_can_be() {
        let ids: Vec<_> = (0..4).map(Uuid::from_u128).collect();
        let (_running, stop) = Signal::pending();
        let mut tried = 0;
        let told = each(&ids, &stop, |id| {
            tried += 1;
            match tried {
                1 => Ok(format!("job {id} runs again")),
                2 => Err(Failure::Refused("it is not kept".to_owned())),
                _ => Err(Failure::Failed(anyhow!("RabbitMQ is away"))),
            }
        });
        let told = told.unwrap().join("\n");
        assert_eq!(tried, 3);
        for text in [
            "runs again",
            "not kept",
            "RabbitMQ is away; 1 other job not submitted",
        ] {
            assert!(told.contains(text), "{text}: {told}");
        }
        let (running, stop) = Signal::pending();
        drop(running);
        let told = each(&ids, &stop, |_| panic!("the service ends")).unwrap();
        assert_eq!(told, ["this service ends: 4 jobs not submitted"]);
    }
}
