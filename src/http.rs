//! The HTTP endpoint: health, metrics, status page and API; and the client side of the health
//! check.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use crossbeam_channel::{Receiver, Sender, TrySendError, select};
use jiff::Timestamp;
use log::{error, info};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::domain::overview::{Filter, Overview};
use crate::service::shared::Service;
use crate::store::{Connection, StoreError};
use crate::telemetry::health::{Part, PartView};
use crate::telemetry::metrics;
use crate::telemetry::report::one_line;
use crate::telemetry::trouble::{Trouble, trouble};
use crate::threads::Signal;

mod page;
mod server;

use page::Frame;
pub use server::{DEADLINE, Request, Response, Server, Ticket};

/// How many requests may wait for the database in a lane; further clients are told to come again.
pub const MAX_WAITING: usize = 64;
const JSON: &str = "application/json";
const HTML: &str = "text/html; charset=utf-8";
const PATHS: &str = "/, /jobs/<id>, /api/jobs, /api/jobs/<id>, /api/overview, /api/workers, \
                     /metrics, /health/live and /health/ready";

/// A request whose answer needs the database, and when it arrived.
pub type Question = (Ticket, Route, Instant);

/// Queues of requests that need the database. Requests of one lane are answered one after the other
/// and never wait for another lane: a scrape is not delayed by searches.
#[derive(Debug)]
pub struct Lanes<T> {
    pub pages: T,
    /// A text search scans the whole history.
    pub searches: T,
    pub metrics: T,
}

impl<T> Lanes<T> {
    fn of(&self, route: &Route) -> &T {
        match route {
            Route::Metrics => &self.metrics,
            Route::Jobs(filter) | Route::Page(filter) if filter.text.is_some() => &self.searches,
            Route::Live
            | Route::Ready
            | Route::Overview
            | Route::Workers
            | Route::Jobs(_)
            | Route::Job(_)
            | Route::Page(_)
            | Route::JobPage(_) => &self.pages,
        }
    }
}

/// Listens at `address`.
///
/// # Errors
/// The address is taken or not this machine's.
pub fn listen(address: SocketAddr) -> anyhow::Result<Server> {
    let server =
        Server::listen(address).with_context(|| format!("listening at {address} (HTTP_BIND)"))?;
    info!("status page at http://{}/", server.address());
    Ok(server)
}

/// Answers requests until [`Server::stop`] is called; hands those that need the database to their
/// lane.
pub fn serve(server: &Server, service: &Service, lanes: &Lanes<Sender<Question>>) {
    let answer = |request: &Request, ticket| match route(request, service) {
        Ok(Route::Live) => Some(json_response(200, &json!({"live": true}))),
        Ok(Route::Ready) => {
            let now = Timestamp::now();
            let (ready, mut body) = service.health.ready(now);
            if let Some(trouble) = trouble(&service.health.parts(now).1) {
                body["trouble"] = trouble.json();
            }
            Some(json_response(if ready { 200 } else { 503 }, &body))
        }
        Ok(route) => {
            let lane = lanes.of(&route);
            match lane.try_send((ticket, route, Instant::now())) {
                Ok(()) => None,
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                    Some(Response::text(503, "Too many requests at once."))
                }
            }
        }
        Err(refusal) => Some(refusal),
    };
    if let Err(error) = server.serve(answer) {
        error!("the HTTP endpoint has ended: {error}");
    }
}

/// Answers what [`serve`] hands over in one lane, until `stop` is given.
pub fn answer(server: &Server, service: &Service, questions: &Receiver<Question>, stop: &Signal) {
    loop {
        select! {
            recv(questions) -> question => {
                let Ok((ticket, route, since)) = question else { return };
                // By then its client has been disconnected.
                if since.elapsed() < DEADLINE {
                    // If it panics, the client still gets an answer.
                    let response = catch_unwind(AssertUnwindSafe(|| respond(service, &route)));
                    let response = response
                        .unwrap_or_else(|_| Response::text(500, "A fault; the log has it."));
                    server.answer(ticket, response);
                }
            }
            recv(stop.receiver()) -> _ => return,
        }
    }
}

/// What a request is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    Live,
    Ready,
    Metrics,
    Overview,
    Workers,
    Jobs(Filter),
    Job(Uuid),
    Page(Filter),
    JobPage(Uuid),
}

fn route(request: &Request, service: &Service) -> Result<Route, Response> {
    let (path, query) = request
        .target
        .split_once('?')
        .unwrap_or((&request.target, ""));
    let open = path.starts_with("/health/");
    if let Some(user) = &service.config.http_basic_auth
        && !open
        && !authorized(request.authorization.as_deref(), user.reveal())
    {
        let mut refusal = Response::text(401, "A user and a password are needed.");
        let challenge = "Basic realm=\"OMOTES orchestrator\", charset=\"UTF-8\"".to_owned();
        refusal.headers.push(("WWW-Authenticate", challenge));
        return Err(refusal);
    }
    let not_found = |text: &str| Err(json_response(404, &json!({"error": text})));
    let job = |id: &str| id.parse::<Uuid>();
    let filter =
        || Filter::parse(query).map_err(|error| json_response(400, &json!({"error": error})));
    let route = match path {
        "/health/live" => Route::Live,
        "/health/ready" => Route::Ready,
        "/metrics" => Route::Metrics,
        "/api/overview" => Route::Overview,
        "/api/workers" => Route::Workers,
        "/api/jobs" => Route::Jobs(filter()?),
        "/" => Route::Page(filter()?),
        _ => match (path.strip_prefix("/api/jobs/"), path.strip_prefix("/jobs/")) {
            (Some(id), _) => match job(id) {
                Ok(id) => Route::Job(id),
                Err(_) => return not_found(&format!("{} is no job id", one_line(id))),
            },
            (None, Some(id)) => match job(id) {
                Ok(id) => Route::JobPage(id),
                Err(_) => return not_found(&format!("{} is no job id", one_line(id))),
            },
            (None, None) => return not_found(&format!("there are {PATHS}")),
        },
    };
    match request.method.as_str() {
        "GET" | "HEAD" => Ok(route),
        _ => Err(json_response(405, &json!({"error": "only GET and HEAD"}))),
    }
}

/// Whether a request carries the credentials `user:password`. Takes the same time for any wrong
/// password of the same length.
fn authorized(header: Option<&str>, user: &str) -> bool {
    let given = header
        .and_then(|header| header.strip_prefix("Basic "))
        .and_then(|encoded| BASE64_STANDARD.decode(encoded.trim()).ok())
        .unwrap_or_default();
    let pairs = given.iter().zip(user.as_bytes());
    let differences = pairs.fold(0, |differences, (a, b)| differences | (a ^ b));
    given.len() == user.len() && differences == 0
}

fn json_response(status: u16, body: &Value) -> Response {
    Response {
        status,
        content_type: JSON,
        headers: Vec::new(),
        body: format!("{body:#}\n").into_bytes(),
    }
}

fn html(status: u16, frame: &Frame<'_>, page: String) -> Response {
    Response {
        status,
        content_type: HTML,
        // The pages show what clients and workers send; should any of it ever get through as
        // markup, the browser runs only the page's own script and loads nothing.
        headers: vec![(
            "Content-Security-Policy",
            format!(
                "default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{}'; \
                 connect-src 'self'; img-src data:; form-action 'self'; frame-ancestors 'none'; \
                 base-uri 'none'",
                frame.nonce
            ),
        )],
        body: page.into_bytes(),
    }
}

fn respond(service: &Service, route: &Route) -> Response {
    let now = Timestamp::now();
    let (_, parts) = service.health.parts(now);
    let nonce = Uuid::new_v4().simple().to_string();
    let frame = Frame {
        nonce: &nonce,
        now,
        host: &service.host,
        parts: &parts,
    };
    // Nobody waits as long as connecting in vain takes.
    let mut parts = parts.iter();
    let postgres = parts.find_map(|part| part.why.as_ref().filter(|_| part.part == Part::Postgres));
    if let Some(why) = postgres.filter(|_| !service.can_look_on.load(Ordering::Relaxed)) {
        return without_database(service, route, &frame, why);
    }
    let text = |error: StoreError| format!("{:#}", anyhow::Error::from(error));
    let mut connection = match service.views.connection() {
        Ok(connection) => connection,
        Err(error) => return without_database(service, route, &frame, &text(error)),
    };
    match with_database(service, &mut connection, route, &frame) {
        Ok(response) => response,
        Err(StoreError::TooLong(_)) => in_vain(service, route, &frame, IN_VAIN),
        Err(error) => in_vain(service, route, &frame, &one_line(&text(error))),
    }
}

/// What is said of a question that takes longer than anybody waits.
const IN_VAIN: &str = "This takes longer than Postgres is given for it. Ask for less: a single \
                       workflow, a single state, or a job by its id.";

/// The answer if Postgres is there and does not say what was asked for.
fn in_vain(service: &Service, route: &Route, frame: &Frame<'_>, why: &str) -> Response {
    match route {
        Route::Metrics => metrics_text(service, &service.overview_without_database(), frame.now),
        Route::Page(_) | Route::JobPage(_) => html(503, frame, page::in_vain(frame, why)),
        Route::Live
        | Route::Ready
        | Route::Overview
        | Route::Workers
        | Route::Jobs(_)
        | Route::Job(_) => json_response(503, &json!({"error": why})),
    }
}

fn with_database(
    service: &Service,
    connection: &mut Connection,
    route: &Route,
    frame: &Frame<'_>,
) -> Result<Response, StoreError> {
    let now = frame.now;
    let overview = service.overview(connection)?;
    Ok(match route {
        Route::Live | Route::Ready => unreachable!("answered at once"),
        Route::Metrics => metrics_text(service, &overview, now),
        Route::Overview => json_response(200, &overview_json(&overview, frame.parts)),
        Route::Workers => json_response(200, &json!(overview.workers.unwrap_or_default())),
        Route::Jobs(filter) => {
            let mut page = connection.jobs(filter)?;
            overview.explain(&mut page.jobs, now);
            json_response(200, &json!(page))
        }
        Route::Page(filter) => {
            let mut page = connection.jobs(filter)?;
            overview.explain(&mut page.jobs, now);
            html(200, frame, page::overview(frame, &overview, filter, &page))
        }
        Route::Job(id) | Route::JobPage(id) => match connection.story(*id)? {
            Some(mut story) => {
                overview.explain(std::slice::from_mut(&mut story.job), now);
                match route {
                    Route::JobPage(_) => html(200, frame, page::job(frame, &story)),
                    _ => json_response(200, &json!(story)),
                }
            }
            None => match route {
                Route::JobPage(_) => html(404, frame, page::unknown_job(frame, *id)),
                _ => json_response(404, &json!({"error": format!("job {id} is unknown")})),
            },
        },
    })
}

fn without_database(service: &Service, route: &Route, frame: &Frame<'_>, why: &str) -> Response {
    // Whoever asks may be the first to notice.
    let mut parts = frame.parts.to_vec();
    for part in &mut parts {
        if part.part == Part::Postgres && part.why.is_none() {
            part.why = Some(why.to_owned());
            part.since = frame.now;
        }
    }
    let frame = &Frame {
        parts: &parts,
        ..*frame
    };
    match route {
        Route::Metrics => metrics_text(service, &service.overview_without_database(), frame.now),
        Route::Page(_) | Route::JobPage(_) => html(503, frame, page::without_database(frame)),
        Route::Live
        | Route::Ready
        | Route::Overview
        | Route::Workers
        | Route::Jobs(_)
        | Route::Job(_) => {
            let error = format!("Postgres does not answer: {}", one_line(why));
            json_response(503, &json!({"error": error}))
        }
    }
}

fn metrics_text(service: &Service, overview: &Overview, now: Timestamp) -> Response {
    Response {
        status: 200,
        content_type: metrics::CONTENT_TYPE,
        headers: Vec::new(),
        body: service
            .metrics
            .text(&service.health, overview, now)
            .into_bytes(),
    }
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

/// Asks the service that listens at `bind` whether it is ready.
///
/// # Errors
/// It is not, or does not answer; the text says why.
pub fn check(bind: SocketAddr) -> anyhow::Result<()> {
    let mut address = bind;
    match bind.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        IpAddr::V4(_) | IpAddr::V6(_) => {}
    }
    let url = format!("http://{address}/health/ready");
    let mut response = ureq::get(&url)
        .config()
        .timeout_global(Some(Duration::from_secs(5)))
        .http_status_as_error(false)
        .build()
        .call()
        .with_context(|| url.clone())?;
    if response.status() != 200 {
        bail!("{url}: {}", response.body_mut().read_to_string()?.trim());
    }
    Ok(())
}
