//! What is answered with the database: pages, the API, metrics.

use std::sync::atomic::Ordering;

use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use super::accounts::{Access, Purpose};
use super::admission::{self, Visit};
use super::form::Back;
use super::page::acting::Acting;
use super::page::{self, Frame, Sheet};
use super::server::Response;
use super::streams::{Seen, Topic};
use super::{Endpoint, Question, Route, acting, html, json_response, refusal, submitting};
use crate::domain::overview::{Filter, JobName, Line, MAX_LIMIT, Overview, Story, compare};
use crate::domain::switch::{self, InFlight, Remark};
use crate::service::shared::Service;
use crate::store::{Connection, StoreError};
use crate::telemetry::health::{Part, PartView};
use crate::telemetry::metrics;
use crate::telemetry::report::one_line;
use crate::telemetry::trouble::{Trouble, trouble};
use crate::threads::Signal;

pub(super) fn respond(
    endpoint: &Endpoint,
    service: &Service,
    question: &Question,
    stop: &Signal,
) -> Response {
    let Question { route, visit, .. } = question;
    let now = Timestamp::now();
    let (_, parts) = service.health.parts(now);
    let nonce = Uuid::new_v4().simple().to_string();
    let acting = forms(endpoint, &visit.access, route, now);
    let frame = Frame {
        // What somebody is asked must not change before it is answered.
        nonce: (!matches!(route, Route::Confirm(_) | Route::Act(_))).then_some(&nonce),
        now,
        host: &service.host,
        parts: &parts,
        note: visit.note.as_deref(),
        acting: acting.as_ref(),
    };
    match (route, &acting) {
        (Route::Confirm(form), Some(acting)) => {
            return acting::confirm(service, visit, &frame, acting, form);
        }
        (Route::Act(form), Some(acting)) => {
            let accounts = &endpoint.accounts;
            let response = acting::act(service, accounts, visit, &frame, acting, form, stop);
            look_anew(endpoint, service);
            return response;
        }
        (Route::SubmitForm(workflow), Some(acting)) => {
            let accounts = &endpoint.accounts;
            return submitting::form(service, accounts, &frame, acting, workflow.as_deref());
        }
        (Route::Submission(kind, body), Some(acting)) => {
            let accounts = &endpoint.accounts;
            let sent = (kind.as_str(), body.as_slice());
            let response = submitting::submit(service, accounts, visit, &frame, acting, sent);
            look_anew(endpoint, service);
            return response;
        }
        (Route::Letters, _) => return letters(service, visit, &frame),
        _ => {}
    }
    let mut connection = match viewing(service, &parts) {
        Ok(connection) => connection,
        Err(why) => return without_database(service, route, &frame, &why),
    };
    match with_database(endpoint, service, &mut connection, route, &frame) {
        Ok(response) => admission::with_pass(response, &endpoint.accounts, visit, now),
        Err(StoreError::TooLong(_)) => in_vain(service, route, &frame, IN_VAIN),
        Err(error) => in_vain(service, route, &frame, &one_line(&text(error))),
    }
}

fn letters(service: &Service, visit: &Visit, frame: &Frame<'_>) -> Response {
    match acting::letters(service) {
        Ok((first, names)) => {
            let sheet = page::letters(frame, &first, &names);
            html(200, frame.nonce, sheet.document(frame))
        }
        Err(failure) => refusal(visit.html, 503, &one_line(&failure.to_string())),
    }
}

/// Has pages show what has been done, whatever came of it.
fn look_anew(endpoint: &Endpoint, service: &Service) {
    service.look_anew();
    endpoint.server.hub().look_anew();
}

/// What a page's forms carry, for whoever may act.
fn forms(endpoint: &Endpoint, access: &Access, route: &Route, now: Timestamp) -> Option<Acting> {
    let Access::Act(account) = access else {
        return None;
    };
    Some(Acting {
        token: endpoint.accounts.seal(Purpose::Form, account, now),
        back: match route {
            Route::Page(filter) => Back::List(filter.clone()),
            Route::JobPage(id) => Back::Job(*id),
            Route::Confirm(form) | Route::Act(form) => form.back.clone(),
            _ => Back::List(Filter::default()),
        },
    })
}

/// A connection for looking, or why there is none.
fn viewing(service: &Service, parts: &[PartView]) -> Result<Connection, String> {
    // Nobody waits as long as connecting in vain takes.
    let mut parts = parts.iter();
    let postgres = parts.find_map(|part| part.why.as_ref().filter(|_| part.part == Part::Postgres));
    if let Some(why) = postgres.filter(|_| !service.can_look_on.load(Ordering::Relaxed)) {
        return Err(why.clone());
    }
    service.views.connection().map_err(text)
}

fn text(error: StoreError) -> String {
    format!("{:#}", anyhow::Error::from(error))
}

/// What is said of a question that takes longer than anybody waits.
const IN_VAIN: &str = "This takes longer than Postgres is given for it. Ask for less: a single \
                       workflow, a single state, or a job by its id.";

/// The answer if Postgres is there and does not say what was asked for.
fn in_vain(service: &Service, route: &Route, frame: &Frame<'_>, why: &str) -> Response {
    instead(service, route, frame, why, || page::in_vain(frame, why))
}

/// What is said where Postgres has not: to whoever wants a page this one.
fn instead(
    service: &Service,
    route: &Route,
    frame: &Frame<'_>,
    why: &str,
    sheet: impl FnOnce() -> Sheet,
) -> Response {
    match route {
        Route::Metrics => metrics_text(service, &service.overview_without_database(), frame.now),
        Route::Page(_) | Route::JobPage(_) | Route::NamedJob(_) | Route::Compare(..) => {
            html(503, frame.nonce, sheet().document(frame))
        }
        Route::Live
        | Route::Ready
        | Route::Form
        | Route::Upload
        | Route::Submission(..)
        | Route::SubmitForm(_)
        | Route::Follow(_)
        | Route::Confirm(_)
        | Route::Act(_)
        | Route::Letters
        | Route::Limits
        | Route::Overview
        | Route::Workers
        | Route::Jobs(_)
        | Route::Result(_)
        | Route::Comparison(..)
        | Route::Job(_) => json_response(503, &json!({"error": why})),
    }
}

fn with_database(
    endpoint: &Endpoint,
    service: &Service,
    connection: &mut Connection,
    route: &Route,
    frame: &Frame<'_>,
) -> Result<Response, StoreError> {
    let now = frame.now;
    if let Route::NamedJob(name) = route {
        return named_job(connection, name, frame);
    }
    if let Route::Result(id) = route {
        return Ok(match connection.kept_result(*id)? {
            Some(esdl) => result(*id, esdl),
            None => {
                let why = format!("no output ESDL of job {id} is kept");
                json_response(404, &json!({"error": why}))
            }
        });
    }
    let overview = service.overview(connection)?;
    Ok(match route {
        Route::Live
        | Route::Ready
        | Route::Form
        | Route::Upload
        | Route::Submission(..)
        | Route::SubmitForm(_)
        | Route::Follow(_)
        | Route::Result(_)
        | Route::NamedJob(_)
        | Route::Letters
        | Route::Limits
        | Route::Confirm(_)
        | Route::Act(_) => {
            unreachable!("answered before")
        }
        Route::Metrics => metrics_text(service, &overview, now),
        Route::Overview => json_response(200, &overview_json(&overview, frame.parts)),
        Route::Workers => json_response(200, &json!(overview.workers.unwrap_or_default())),
        Route::Jobs(filter) => {
            let mut page = service.page(connection, filter)?;
            overview.explain(&mut page.jobs, now);
            json_response(200, &json!(page))
        }
        Route::Job(id) => match connection.story(*id)? {
            Some(mut story) => {
                overview.explain(std::slice::from_mut(&mut story.job), now);
                service.complete_one(&mut story, true);
                json_response(200, &json!(story))
            }
            None => unknown(*id),
        },
        Route::Comparison(one, other) => {
            match compared(service, connection, &overview, (*one, *other), now)? {
                Ok(compared) => json_response(200, &json!(compared.lines)),
                Err(id) => unknown(id),
            }
        }
        Route::Page(_) | Route::JobPage(_) | Route::Compare(..) => {
            let (status, sheet) = sheet((endpoint, service), connection, &overview, route, frame)?;
            html(status, frame.nonce, sheet.document(frame))
        }
    })
}

fn unknown(id: Uuid) -> Response {
    json_response(404, &json!({"error": format!("job {id} is unknown")}))
}

/// Two jobs, and what they have of each thing.
struct Compared {
    stories: [Story; 2],
    lines: Vec<Line>,
}

/// Compares two jobs, unless one is not known: that one.
fn compared(
    service: &Service,
    connection: &mut Connection,
    overview: &Overview,
    (one, other): (Uuid, Uuid),
    now: Timestamp,
) -> Result<Result<Compared, Uuid>, StoreError> {
    let mut story = |id| -> Result<_, StoreError> {
        let Some(mut story) = connection.story(id)? else {
            return Ok(Err(id));
        };
        overview.explain(std::slice::from_mut(&mut story.job), now);
        service.complete(&mut story);
        Ok(Ok(story))
    };
    Ok(match (story(one)?, story(other)?) {
        (Ok(one), Ok(other)) => {
            let lines = compare(&one, &other, now);
            let stories = [one, other];
            Ok(Compared { stories, lines })
        }
        (Err(id), _) | (_, Err(id)) => Err(id),
    })
}

/// How many jobs are named whose ids begin alike.
const ALIKE: i64 = 20;

/// Leads to the job that is meant by the beginning of its id.
fn named_job(
    connection: &mut Connection,
    name: &str,
    frame: &Frame<'_>,
) -> Result<Response, StoreError> {
    let jobs = match name.parse::<JobName>() {
        Ok(name) => connection.jobs_named(&name, ALIKE)?,
        Err(_) => Vec::new(),
    };
    let (status, sheet) = match &jobs[..] {
        [(id, _)] => {
            let mut response = Response::text(303, "");
            response.headers.push(("Location", format!("/jobs/{id}")));
            return Ok(response);
        }
        [] => (404, page::unknown_job(frame, name, None)),
        several => (200, page::several_jobs(frame, name, several)),
    };
    Ok(html(status, frame.nonce, sheet.document(frame)))
}

/// An output ESDL, as a file. It is a worker's text, and must not be run as a page of this site.
fn result(job_id: Uuid, esdl: String) -> Response {
    let mut response = Response::new(200, "application/octet-stream", esdl);
    let disposition = format!("attachment; filename=\"{job_id}.esdl\"");
    response.headers.extend([
        ("Content-Disposition", disposition),
        ("X-Content-Type-Options", "nosniff".to_owned()),
        (
            "Content-Security-Policy",
            "default-src 'none'; sandbox".to_owned(),
        ),
    ]);
    response
}

/// What a page shows, with its status.
fn sheet(
    (endpoint, service): (&Endpoint, &Service),
    connection: &mut Connection,
    overview: &Overview,
    route: &Route,
    frame: &Frame<'_>,
) -> Result<(u16, Sheet), StoreError> {
    if let Route::JobPage(id) = route {
        return Ok(match connection.story(*id)? {
            Some(mut story) => {
                overview.explain(std::slice::from_mut(&mut story.job), frame.now);
                // Only a whole page has a script.
                service.complete_one(&mut story, frame.nonce.is_some());
                (200, page::job(frame, &story))
            }
            None => (404, page::unknown_job(frame, &id.to_string(), Some(*id))),
        });
    }
    if let Route::Compare(one, other) = route {
        let compared = compared(service, connection, overview, (*one, *other), frame.now)?;
        return Ok(match compared {
            Ok(Compared { stories, lines }) => (200, page::compare(frame, &stories, &lines)),
            Err(id) => {
                let page = page::unknown_job(frame, &id.to_string(), Some(id));
                (404, page)
            }
        });
    }
    let filter = match route {
        Route::Page(filter) => filter.clone(),
        _ => Filter::default(),
    };
    let mut page = service.page(connection, &filter)?;
    overview.explain(&mut page.jobs, frame.now);
    // How all is does not depend on what is looked at: running jobs, which come first, are those that may
    // need a look.
    let running: i64 = overview.rows.values().map(|rows| rows.running).sum();
    let mut whole = Filter::default();
    let running = u16::try_from(running).unwrap_or(MAX_LIMIT);
    whole.limit = running.clamp(whole.limit, MAX_LIMIT);
    let first = match filter == whole {
        true => page.jobs.clone(),
        false => {
            let mut first = service.page(connection, &whole)?.jobs;
            overview.explain(&mut first, frame.now);
            first
        }
    };
    let activity = endpoint.figures.get(|| connection.activity(frame.now));
    let activity = activity.as_deref();
    let sizes = endpoint.sizes.get(|| connection.sizes());
    let way_back = way_back((endpoint, service), overview, connection);
    Ok((
        200,
        page::overview(
            frame,
            overview,
            &filter,
            &page,
            &first,
            activity,
            (&service.config, sizes.as_deref(), way_back.as_deref()),
        ),
    ))
}

/// What the next service would find; None as long as that is not counted.
fn way_back(
    (endpoint, service): (&Endpoint, &Service),
    overview: &Overview,
    connection: &mut Connection,
) -> Option<Vec<Remark>> {
    let counted = endpoint.in_flight.get(|| connection.in_flight())?;
    // What is let go now is on this page at once.
    let held = overview
        .turns
        .iter()
        .map(|turns| turns.held + turns.on_hold);
    let in_flight = InFlight {
        held: held.sum(),
        ..(*counted).clone()
    };
    let (config, catalogue) = (&service.config, service.catalogue.get());
    let (servers, variables) = (config.servers(), &config.variables);
    Some(switch::back(&in_flight, &catalogue, &servers, variables))
}

/// What whoever follows a page is shown now.
///
/// # Errors
/// It cannot be seen for now; the text says why.
pub(super) fn fragment(
    endpoint: &Endpoint,
    service: &Service,
    Topic { access, route }: &Topic,
) -> Result<Seen, String> {
    let now = Timestamp::now();
    let (_, parts) = service.health.parts(now);
    let known = viewing(service, &parts);
    let parts = match &known {
        Ok(_) => parts,
        Err(why) => noting(&parts, why, now),
    };
    let acting = forms(endpoint, access, route, now);
    let frame = Frame {
        nonce: None,
        now,
        host: &service.host,
        parts: &parts,
        note: None,
        acting: acting.as_ref(),
    };
    let sheet = match known {
        // If there is no Postgres any more, the next connection tells.
        Ok(mut connection) => {
            service
                .overview(&mut connection)
                .and_then(|overview| {
                    sheet(
                        (endpoint, service),
                        &mut connection,
                        &overview,
                        route,
                        &frame,
                    )
                })
                .map_err(text)?
                .1
        }
        Err(_) => page::without_database(&frame, events(route)),
    };
    Ok(Seen {
        is_last: !sheet.is_live(),
        content: sheet.content(),
    })
}

/// Where the changes of a page are told.
fn events(route: &Route) -> String {
    match route {
        Route::Page(filter) => page::events(filter),
        Route::JobPage(id) => page::events_of(*id),
        _ => String::new(),
    }
}

/// Parts, of which whoever asks may be the first to notice that Postgres does not work.
fn noting(parts: &[PartView], why: &str, now: Timestamp) -> Vec<PartView> {
    let mut parts = parts.to_vec();
    for part in &mut parts {
        if part.part == Part::Postgres && part.why.is_none() {
            part.why = Some(why.to_owned());
            part.since = now;
        }
    }
    parts
}

fn without_database(service: &Service, route: &Route, frame: &Frame<'_>, why: &str) -> Response {
    let parts = noting(frame.parts, why, frame.now);
    let frame = &Frame {
        parts: &parts,
        ..*frame
    };
    let error = format!("Postgres does not answer: {}", one_line(why));
    instead(service, route, frame, &error, || {
        page::without_database(frame, events(route))
    })
}

fn metrics_text(service: &Service, overview: &Overview, now: Timestamp) -> Response {
    let text = service.metrics.text(&service.health, overview, now);
    Response::new(200, metrics::CONTENT_TYPE, text)
}

fn overview_json(overview: &Overview, parts: &[PartView]) -> Value {
    let trouble = trouble(parts);
    let parts = parts
        .iter()
        .map(|part| json!({"name": part.part.name(), "since": part.since, "why": part.why}));
    json!({
        "trouble": trouble.as_ref().map(Trouble::json),
        "parts": parts.collect::<Vec<_>>(),
        "workflows": overview.workflows(),
        "queues": overview.queues,
        "turns": overview.turns,
    })
}
