//! The HTTP endpoint: health, metrics, status page and API; and the client side of the health
//! check.

use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use crossbeam_channel::{Receiver, Sender, TrySendError, select};
use jiff::Timestamp;
use log::{error, info};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::config::Config;
use crate::domain::overview::{Filter, Overview};
use crate::service::shared::Service;
use crate::store::{Connection, StoreError};
use crate::telemetry::health::{Part, PartView};
use crate::telemetry::metrics;
use crate::telemetry::report::one_line;
use crate::telemetry::trouble::{Trouble, trouble};
use crate::threads::Signal;

mod accounts;
mod acting;
mod admission;
mod form;
mod guard;
mod page;
mod server;

use accounts::{Access, Accounts, Purpose};
use admission::Visit;
use form::{Action, Back, Form};
use page::Frame;
use page::acting::Acting;
use server::{DEADLINE, Reply, Request, Response, Server, Ticket};

/// How many requests may wait for the database in a lane; further clients are told to come again.
pub const MAX_WAITING: usize = 64;
/// For how long the client of an action is waited for. RabbitMQ and workers may take their time, and
/// even more than that.
const ACTION_TIME: Duration = Duration::from_secs(60);
const CONFIRMED_LATE: &str = "This takes longer than anybody waits for it. Nothing was done.";
const DONE_LATE: &str = "This takes longer than anybody waits for it. Whether it is done is not known \
                         yet: the log will tell.";
const JSON: &str = "application/json";
const HTML: &str = "text/html; charset=utf-8";
const PATHS: &str = "/, /jobs/<id>, /api/jobs, /api/jobs/<id>, /api/overview, /api/workers, \
                     /metrics, /health/live and /health/ready";

/// The server, and who may do what there.
pub struct Endpoint {
    server: Server,
    accounts: Accounts,
}

/// A request whose answer needs the database or RabbitMQ, and when it arrived.
pub struct Question {
    ticket: Ticket,
    route: Route,
    visit: Visit,
    since: Instant,
}

/// Queues of requests that need the database. Requests of one lane are answered one after the other
/// and never wait for another lane: a scrape is not delayed by searches.
#[derive(Debug)]
pub struct Lanes<T> {
    pub pages: T,
    /// A text search scans the whole history.
    pub searches: T,
    pub metrics: T,
    /// What operators do to jobs and queues.
    pub actions: T,
    /// What waits for workers, or goes through dead letters.
    pub slow_actions: T,
}

impl<T> Lanes<T> {
    fn of(&self, route: &Route) -> &T {
        match route {
            Route::Metrics => &self.metrics,
            Route::Jobs(filter) | Route::Page(filter) if filter.text.is_some() => &self.searches,
            Route::Confirm(form) | Route::Act(form) => match &form.action {
                Action::Steer(..) | Action::Requeue(_) | Action::RequeueAll(_) => {
                    &self.slow_actions
                }
                Action::Cancel(_)
                | Action::CancelMatching(..)
                | Action::Turns(..)
                | Action::Limits(..) => &self.actions,
            },
            Route::Live
            | Route::Ready
            | Route::Form
            | Route::Overview
            | Route::Workers
            | Route::Jobs(_)
            | Route::Job(_)
            | Route::Page(_)
            | Route::JobPage(_) => &self.pages,
        }
    }
}

impl Endpoint {
    /// Listens where the configuration says, unless it says nowhere.
    ///
    /// # Errors
    /// The address is taken or not this machine's.
    pub fn listen(config: &Config) -> anyhow::Result<Option<Endpoint>> {
        let Some(address) = config.http_bind else {
            return Ok(None);
        };
        let server = Server::listen(address)
            .with_context(|| format!("listening at {address} (HTTP_BIND)"))?;
        info!("status page at http://{}/", server.address());
        let accounts = Accounts::new(config);
        Ok(Some(Endpoint { server, accounts }))
    }

    /// Ends [`serve`].
    pub fn stop(&self) {
        self.server.stop();
    }
}

/// Answers requests until [`Endpoint::stop`] is called; hands those that need more than memory to
/// their lane.
pub fn serve(endpoint: &Endpoint, service: &Service, lanes: &Lanes<Sender<Question>>) {
    let guesses = RefCell::default();
    let admit = |request: &Request| admission::admit(request, &endpoint.accounts, &guesses);
    let answer = |(route, visit): (Route, Visit), request: &Request, ticket| {
        let route = match route {
            Route::Live => return Reply::Now(json_response(200, &json!({"live": true}))),
            Route::Ready => {
                let now = Timestamp::now();
                let (ready, mut body) = service.health.ready(now);
                if let Some(trouble) = trouble(&service.health.parts(now).1) {
                    body["trouble"] = trouble.json();
                }
                return Reply::Now(json_response(if ready { 200 } else { 503 }, &body));
            }
            Route::Form => match admission::read_form(&endpoint.accounts, &visit, &request.body) {
                Ok(form) => Route::Act(Box::new(form)),
                Err(refusal) => return Reply::Now(refusal),
            },
            route => route,
        };
        let (lane, html) = (lanes.of(&route), visit.html);
        let late = |why| Some(Box::new(refusal(html, 503, why)));
        let (time, otherwise) = match route {
            Route::Confirm(_) => (ACTION_TIME, late(CONFIRMED_LATE)),
            Route::Act(_) => (ACTION_TIME, late(DONE_LATE)),
            _ => (Duration::ZERO, None),
        };
        let question = Question {
            ticket,
            route,
            visit,
            since: Instant::now(),
        };
        match lane.try_send(question) {
            Ok(()) => Reply::Later(time, otherwise),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                Reply::Now(refusal(html, 503, "Too many requests at once."))
            }
        }
    };
    if let Err(error) = endpoint.server.serve(admit, answer) {
        error!("the HTTP endpoint has ended: {error}");
    }
}

/// Answers what [`serve`] hands over in one lane, until `stop` is given.
pub fn answer(
    endpoint: &Endpoint,
    service: &Service,
    questions: &Receiver<Question>,
    stop: &Signal,
) {
    loop {
        select! {
            recv(questions) -> question => {
                let Ok(question) = question else { return };
                let response = match (question.since.elapsed() < DEADLINE, &question.route) {
                    (true, _) => {
                        // If it panics, the client still gets an answer.
                        let respond = || respond(endpoint, service, &question, stop);
                        let response = catch_unwind(AssertUnwindSafe(respond));
                        let fault = |_| refusal(question.visit.html, 500, "A fault; the log has it.");
                        response.unwrap_or_else(fault)
                    }
                    (false, Route::Confirm(_) | Route::Act(_)) => {
                        const LATE: &str = "Others' actions take too long; nothing was done.";
                        refusal(question.visit.html, 503, LATE)
                    }
                    // By then its client has been disconnected.
                    (false, _) => continue,
                };
                endpoint.server.answer(question.ticket, response);
            }
            recv(stop.receiver()) -> _ => return,
        }
    }
}

/// What a request is for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Route {
    Live,
    Ready,
    Metrics,
    Overview,
    Workers,
    Jobs(Filter),
    Job(Uuid),
    Page(Filter),
    JobPage(Uuid),
    /// Asks again before something is destroyed.
    Confirm(Box<Form>),
    /// A form whose fields are in the body.
    Form,
    Act(Box<Form>),
}

/// Where forms are sent to.
const ACT: &str = "/act";

/// What a path and a query ask for.
fn route(path: &str, query: &str) -> Result<Route, (u16, String)> {
    let filter = || Filter::parse(query).map_err(|error| (400, error));
    let job = |id: &str| {
        let no_id = |_| (404, format!("{} is no job id", one_line(id)));
        id.parse::<Uuid>().map_err(no_id)
    };
    Ok(match path {
        "/health/live" => Route::Live,
        "/health/ready" => Route::Ready,
        "/metrics" => Route::Metrics,
        "/api/overview" => Route::Overview,
        "/api/workers" => Route::Workers,
        "/api/jobs" => Route::Jobs(filter()?),
        "/" => Route::Page(filter()?),
        "/confirm" => {
            let form = Form::parse(query.as_bytes()).map_err(|error| (400, error))?;
            Route::Confirm(Box::new(form))
        }
        ACT => return Err((405, "only POST".to_owned())),
        _ => match (path.strip_prefix("/api/jobs/"), path.strip_prefix("/jobs/")) {
            (Some(id), _) => Route::Job(job(id)?),
            (None, Some(id)) => Route::JobPage(job(id)?),
            (None, None) => return Err((404, format!("there are {PATHS}"))),
        },
    })
}

/// Why a request gets nothing: for a browser a page, for others JSON.
fn refusal(is_page: bool, status: u16, why: &str) -> Response {
    if !is_page {
        return json_response(status, &json!({"error": why}));
    }
    let title = match status {
        400 | 411 | 413 | 415 => "This is not understood",
        401 => "Who are you?",
        403 => "This is not allowed",
        404 => "There is no such page",
        405 => "This cannot be asked for like that",
        429 => "Too many guesses",
        500 => "A fault",
        _ => "This does not work for now",
    };
    html(status, None, page::acting::refused(title, why))
}

fn json_response(status: u16, body: &Value) -> Response {
    Response::new(status, JSON, format!("{body:#}\n"))
}

/// A page, with a script if it has a nonce for it.
fn html(status: u16, nonce: Option<&str>, page: String) -> Response {
    let mut response = Response::new(status, HTML, page);
    // The pages show what clients and workers send; should any of it ever get through as markup, the
    // browser runs only the page's own script and loads nothing.
    let script = match nonce {
        Some(nonce) => format!("script-src 'nonce-{nonce}'; connect-src 'self'; "),
        None => String::new(),
    };
    let policy = format!(
        "default-src 'none'; style-src 'unsafe-inline'; {script}img-src data:; form-action 'self'; \
         frame-ancestors 'none'; base-uri 'none'"
    );
    response.headers.push(("Content-Security-Policy", policy));
    response
}

fn respond(endpoint: &Endpoint, service: &Service, question: &Question, stop: &Signal) -> Response {
    let Question { route, visit, .. } = question;
    let now = Timestamp::now();
    let (_, parts) = service.health.parts(now);
    let nonce = Uuid::new_v4().simple().to_string();
    let acting = match &visit.access {
        Access::Act(account) => Some(Acting {
            token: endpoint.accounts.seal(Purpose::Form, account, now),
            back: match route {
                Route::Page(filter) => Back::List(filter.clone()),
                Route::JobPage(id) => Back::Job(*id),
                Route::Confirm(form) | Route::Act(form) => form.back.clone(),
                _ => Back::List(Filter::default()),
            },
        }),
        Access::Look(_) | Access::Open => None,
    };
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
            return acting::act(service, accounts, visit, &frame, acting, form, stop);
        }
        _ => {}
    }
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
        Ok(response) => admission::with_pass(response, &endpoint.accounts, visit, now),
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
        Route::Page(_) | Route::JobPage(_) => html(503, frame.nonce, page::in_vain(frame, why)),
        Route::Live
        | Route::Ready
        | Route::Form
        | Route::Confirm(_)
        | Route::Act(_)
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
        Route::Live | Route::Ready | Route::Form | Route::Confirm(_) | Route::Act(_) => {
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
        Route::Page(filter) => {
            let mut page = service.page(connection, filter)?;
            overview.explain(&mut page.jobs, now);
            html(
                200,
                frame.nonce,
                page::overview(frame, &overview, filter, &page),
            )
        }
        Route::Job(id) | Route::JobPage(id) => match connection.story(*id)? {
            Some(mut story) => {
                overview.explain(std::slice::from_mut(&mut story.job), now);
                match route {
                    Route::JobPage(_) => html(200, frame.nonce, page::job(frame, &story)),
                    _ => json_response(200, &json!(story)),
                }
            }
            None => match route {
                Route::JobPage(_) => html(404, frame.nonce, page::unknown_job(frame, *id)),
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
        Route::Page(_) | Route::JobPage(_) => html(503, frame.nonce, page::without_database(frame)),
        Route::Live
        | Route::Ready
        | Route::Form
        | Route::Confirm(_)
        | Route::Act(_)
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::thread;

    use base64::Engine;
    use base64::prelude::BASE64_STANDARD;
    use crossbeam_channel::bounded;

    use super::*;

    /// An endpoint with an operator, and a service that is connected to nothing.
    fn parts() -> (Endpoint, Service) {
        let path = format!("{}/config/workflow_config.json", env!("CARGO_MANIFEST_DIR"));
        let catalogue = crate::config::read_catalogue(path.as_ref()).unwrap();
        let lookup = |name: &str| {
            let value = match name {
                "HTTP_BIND" => "127.0.0.1:0",
                "HTTP_BASIC_AUTH" => "anna:s3cret",
                _ => return None,
            };
            Some(value.to_owned())
        };
        let config = Config::read(&lookup).unwrap();
        let endpoint = Endpoint::listen(&config).unwrap().unwrap();
        let (service, _) = Service::new(config, catalogue).unwrap();
        (endpoint, service)
    }

    /// Sends a cancel, as a form does.
    fn send(endpoint: &Endpoint) -> TcpStream {
        let token = endpoint
            .accounts
            .seal(Purpose::Form, "anna", Timestamp::now());
        let body = format!("do=cancel&id={}&token={token}", Uuid::nil());
        let request = format!(
            "POST /act HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic {}\r\n\
             Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\r\n{body}",
            BASE64_STANDARD.encode("anna:s3cret"),
            body.len(),
        );
        let mut stream = TcpStream::connect(endpoint.server.address()).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    fn answer_on(mut stream: TcpStream) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    fn lanes(actions: Sender<Question>) -> Lanes<Sender<Question>> {
        let other = || bounded(0).0;
        Lanes {
            pages: other(),
            searches: other(),
            metrics: other(),
            actions,
            slow_actions: other(),
        }
    }

    /// Neither when too many wait already nor when it has waited for too long.
    #[test]
    fn an_action_that_does_not_come_to_be_done_is_said_not_to_be() {
        let (endpoint, service) = parts();
        let (endpoint, service) = (&endpoint, &service);
        let (questions, asked) = bounded(1);
        let lanes = lanes(questions);
        thread::scope(|scope| {
            scope.spawn(|| serve(endpoint, service, &lanes));
            let first = send(endpoint);
            let mut question = asked.recv_timeout(DEADLINE).unwrap();
            let second = send(endpoint);
            // One waits, and there is no room for another.
            let second = (second, asked.recv_timeout(DEADLINE).unwrap());
            lanes.actions.try_send(second.1).unwrap();
            let refused = answer_on(send(endpoint));
            assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
            assert!(refused.contains("Too many requests at once."), "{refused}");
            let (late, asked_late) = bounded(1);
            question.since = question.since.checked_sub(DEADLINE).unwrap();
            late.send(question).unwrap();
            drop(late);
            let (_running, stop) = Signal::pending();
            answer(endpoint, service, &asked_late, &stop);
            let told = answer_on(first);
            assert!(told.starts_with("HTTP/1.1 503 "), "{told}");
            assert!(told.contains("nothing was done"), "{told}");
            drop(second.0);
            endpoint.stop();
        });
    }
}
