//! The HTTP endpoint: health, metrics, status page and API.

use std::cell::RefCell;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use anyhow::Context;
use crossbeam_channel::{Receiver, Sender, TrySendError, select};
use jiff::Timestamp;
use log::{error, info};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::VERSION;
use crate::config::Config;
use crate::domain::activity::{Activity, Sizes};
use crate::domain::overview::Filter;
use crate::domain::switch::InFlight;
use crate::service::shared::Service;
use crate::telemetry::report::one_line;
use crate::telemetry::trouble::trouble;
use crate::threads::Signal;

mod accounts;
mod acting;
mod admission;
mod editions;
mod figures;
mod form;
mod guard;
mod live;
mod page;
mod patch;
mod says;
mod server;
mod streams;
mod submission;
mod submitting;
mod upload;
mod views;

use accounts::Accounts;
use admission::{Uploads, Visit};
use figures::Figures;
use form::{Action, Form};
pub use live::follow as follow_pages;
use server::{DEADLINE, Reply, Request, Response, Server, Ticket};
use streams::Topic;

/// How many requests may wait for the database in a lane; further clients are told to come again.
pub const MAX_WAITING: usize = 64;
/// For how long the client of an action is waited for. RabbitMQ and workers may take their time, and
/// even more than that.
const ACTION_TIME: Duration = Duration::from_secs(60);
const CONFIRMED_LATE: &str = "This takes longer than anybody waits for it. Nothing was done.";
const DONE_LATE: &str = "This takes longer than anybody waits for it. Whether it is done is not known \
                         yet: the log will tell.";
const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream";
const HTML: &str = "text/html; charset=utf-8";
const PATHS: &str = "/, /jobs/<id>, /jobs/<id>/compare/<id>, /submit, /dead-letters, /api/jobs, /api/jobs/<id>, /api/jobs/<id>/result, \
                     /api/jobs/<id>/compare/<id>, /api/overview, /api/workers, /api/limits, \
                     /metrics, /health/live and /health/ready";

/// The server, and who may do what there.
pub struct Endpoint {
    server: Server,
    accounts: Accounts,
    figures: Figures<Activity>,
    sizes: Figures<Sizes>,
    in_flight: Figures<InFlight>,
    uploads: Uploads,
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
    /// A text search scans the whole history, and output ESDLs are large.
    pub searches: T,
    pub metrics: T,
    /// What operators do to jobs and queues.
    pub actions: T,
    /// What waits for workers, goes through dead letters, or is about many jobs or large ones.
    pub slow_actions: T,
}

impl<T> Lanes<T> {
    fn of(&self, route: &Route) -> &T {
        match route {
            Route::Metrics => &self.metrics,
            Route::Jobs(filter) | Route::Page(filter) if filter.text.is_some() => &self.searches,
            Route::Result(_) => &self.searches,
            Route::Confirm(form) | Route::Act(form) => match &form.action {
                Action::Steer(..)
                | Action::Matching(..)
                | Action::Again(..)
                | Action::Requeue(_)
                | Action::RequeueAll(_) => &self.slow_actions,
                Action::Cancel(_) | Action::Turns(..) | Action::Limits(..) => &self.actions,
            },
            Route::Submission(..) | Route::Letters => &self.slow_actions,
            Route::Live
            | Route::Ready
            | Route::Form
            | Route::Upload
            | Route::Follow(_)
            | Route::Limits
            | Route::Overview
            | Route::Workers
            | Route::Jobs(_)
            | Route::Job(_)
            | Route::Page(_)
            | Route::SubmitForm(_)
            | Route::Compare(..)
            | Route::Comparison(..)
            | Route::NamedJob(_)
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
        Ok(Some(Endpoint {
            server,
            accounts,
            figures: Figures::default(),
            sizes: Figures::default(),
            in_flight: Figures::default(),
            uploads: Uploads::default(),
        }))
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
    let admit = |request: &Request| {
        let Endpoint {
            accounts, uploads, ..
        } = endpoint;
        admission::admit(request, accounts, &guesses, uploads)
    };
    let answer = |(route, visit): (Route, Visit), request: &mut Request, ticket| {
        let route = match route {
            Route::Live => return Reply::Now(json_response(200, &json!({"live": true}))),
            Route::Ready => {
                let now = Timestamp::now();
                let (ready, mut body) = service.health.ready(now);
                body["version"] = VERSION.into();
                if let Some(trouble) = trouble(&service.health.parts(now).1) {
                    body["trouble"] = trouble.json();
                }
                return Reply::Now(json_response(if ready { 200 } else { 503 }, &body));
            }
            Route::Limits => return Reply::Now(json_response(200, &in_force(service))),
            Route::Form => match admission::read_form(&endpoint.accounts, &visit, &request.body) {
                Ok(form) => Route::Act(Box::new(form)),
                Err(refusal) => return Reply::Now(refusal),
            },
            Route::Upload => {
                let kind = request.header("content-type").unwrap_or_default();
                Route::Submission(kind, mem::take(&mut request.body))
            }
            Route::Follow(route) => return follow(endpoint, *route, &visit, request),
            route => route,
        };
        let (lane, html) = (lanes.of(&route), visit.html);
        let late = |why| Some(Box::new(refusal(html, 503, why)));
        let (time, otherwise) = match route {
            Route::Confirm(_) | Route::Letters => (ACTION_TIME, late(CONFIRMED_LATE)),
            Route::Act(_) | Route::Submission(..) => (ACTION_TIME, late(DONE_LATE)),
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

/// The limits of this replica's environment, and those of task queues.
fn in_force(service: &Service) -> Value {
    json!({
        "version": VERSION,
        "host": service.host,
        "limits": service.config.limits(),
        "queues": *service.limits.get(),
    })
}

/// Tells a page's reader of its changes from now on.
fn follow(endpoint: &Endpoint, route: Route, visit: &Visit, request: &Request) -> Reply {
    const FULL: &str = "Too many pages are followed already. This one can be asked for instead.";
    if request.method == "HEAD" {
        return Reply::Now(Response::new(200, EVENTS, String::new()));
    }
    let access = visit.access.clone();
    match endpoint.server.hub().join(Topic { access, route }) {
        Some(seat) => Reply::Follow(seat),
        None => Reply::Now(refusal(visit.html, 503, FULL)),
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
                        let respond = || views::respond(endpoint, service, &question, stop);
                        let response = catch_unwind(AssertUnwindSafe(respond));
                        let fault = |_| refusal(question.visit.html, 500, "A fault; the log has it.");
                        response.unwrap_or_else(fault)
                    }
                    (false, Route::Confirm(_) | Route::Act(_) | Route::Submission(..)) => {
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
    /// What is in force, as JSON.
    Limits,
    Overview,
    Workers,
    Jobs(Filter),
    Job(Uuid),
    /// Its output ESDL.
    Result(Uuid),
    Page(Filter),
    JobPage(Uuid),
    /// Two jobs beside each other.
    Compare(Uuid, Uuid),
    /// The same as JSON.
    Comparison(Uuid, Uuid),
    /// Of a job that is named by something else than its id, such as the beginning of that.
    NamedJob(String),
    /// What could not be handled.
    Letters,
    /// What changes on a page.
    Follow(Box<Route>),
    /// Asks again before something is destroyed.
    Confirm(Box<Form>),
    /// The form to submit a job, for a workflow.
    SubmitForm(Option<String>),
    /// A form whose fields are in the body.
    Form,
    /// A form to submit a job, whose fields are in the body with its ESDL.
    Upload,
    /// The same with its type and its body.
    Submission(String, Vec<u8>),
    Act(Box<Form>),
}

/// Where forms are sent to.
const ACT: &str = "/act";
const SUBMIT: &str = "/submit";

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
        "/api/limits" => Route::Limits,
        "/api/overview" => Route::Overview,
        "/api/workers" => Route::Workers,
        "/api/jobs" => Route::Jobs(filter()?),
        "/" => Route::Page(filter()?),
        "/events" => Route::Follow(Box::new(Route::Page(followed(filter()?)?))),
        "/confirm" => {
            let form = Form::parse(query.as_bytes()).map_err(|error| (400, error))?;
            Route::Confirm(Box::new(form))
        }
        page::LETTERS => Route::Letters,
        SUBMIT => Route::SubmitForm(workflow(query)?),
        ACT => return Err((405, "only POST".to_owned())),
        _ => {
            let below = |folder| path.strip_prefix(folder);
            match (below("/api/jobs/"), below("/jobs/"), below("/events/jobs/")) {
                (Some(rest), ..) => {
                    match (rest.strip_suffix("/result"), rest.split_once("/compare/")) {
                        (Some(id), _) => Route::Result(job(id)?),
                        (None, Some((one, other))) => Route::Comparison(job(one)?, job(other)?),
                        (None, None) => Route::Job(job(rest)?),
                    }
                }
                (_, Some(name), _) => match (name.parse(), name.split_once("/compare/")) {
                    (Ok(id), _) => Route::JobPage(id),
                    (Err(_), Some((one, other))) => Route::Compare(job(one)?, job(other)?),
                    (Err(_), None) => Route::NamedJob(name.to_owned()),
                },
                (.., Some(id)) => Route::Follow(Box::new(Route::JobPage(job(id)?))),
                (None, None, None) => return Err((404, format!("there are {PATHS}"))),
            }
        }
    })
}

/// The workflow that a job is to be submitted for.
fn workflow(query: &str) -> Result<Option<String>, (u16, String)> {
    let mut name = None;
    for (field, value) in form_urlencoded::parse(query.as_bytes()) {
        match &*field {
            "workflow" => name = Some(value.into_owned()).filter(|name| !name.is_empty()),
            _ => return Err((400, format!("{} is not known here", one_line(&field)))),
        }
    }
    Ok(name)
}

/// A filter whose list may be followed.
fn followed(filter: Filter) -> Result<Filter, (u16, String)> {
    const WHY: &str = "a search, and a list of more than 200 jobs, is not followed";
    match page::is_followed(&filter) {
        true => Ok(filter),
        false => Err((400, WHY.to_owned())),
    }
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
    html(status, None, page::refused(title, why))
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::thread;

    use base64::Engine;
    use base64::prelude::BASE64_STANDARD;
    use crossbeam_channel::bounded;

    use super::accounts::Purpose;
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

    /// Nothing that is quick waits for what takes its time.
    #[test]
    fn what_is_slow_has_lanes_of_its_own() {
        let lanes = Lanes {
            pages: "pages",
            searches: "searches",
            metrics: "metrics",
            actions: "actions",
            slow_actions: "slow actions",
        };
        let id = Uuid::nil();
        let act = |fields: &str| Route::Act(Box::new(Form::parse(fields.as_bytes()).unwrap()));
        for (route, lane) in [
            (Route::SubmitForm(None), "pages"),
            (Route::Result(id), "searches"),
            (Route::Submission(String::new(), Vec::new()), "slow actions"),
            (act("do=cancel-all"), "slow actions"),
            (act(&format!("do=again&id={id}")), "slow actions"),
            (act(&format!("do=cancel&id={id}")), "actions"),
            (act(&format!("do=hold&id={id}")), "actions"),
            (act("do=pause&queue=a"), "actions"),
        ] {
            assert_eq!(*lanes.of(&route), lane, "{route:?}");
        }
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
