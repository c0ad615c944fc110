//! Which requests are answered: whose they are, and whether a form comes from where it should.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use log::warn;

use super::accounts::{self, Access, Accounts, Purpose, SealFault};
use super::form::Form;
use super::guard::{Guesses, PENALTY, Provenance};
use super::server::{BodyFault, MAX_BODY, Request, Response};
use super::{ACT, HTML, Route, SUBMIT, refusal, route};
use crate::domain::job::{Origin, Via};
use crate::telemetry::report::one_line;

/// Who asks, and how it is to be answered.
#[derive(Debug, Clone)]
pub(super) struct Visit {
    pub(super) access: Access,
    /// Whether a page is wanted, also of what goes wrong.
    pub(super) html: bool,
    pub(super) peer: SocketAddr,
    /// From where, as a proxy or anybody else says.
    pub(super) forwarded: Option<String>,
    /// What was done before.
    pub(super) note: Option<String>,
    /// Whether a pass is to be handed out, see [`Purpose::Pass`].
    pub(super) needs_pass: bool,
    /// The room that its body takes, until it is answered.
    upload: Option<Arc<()>>,
}

/// The room for large bodies: as many as there are clones of it.
#[derive(Debug, Default)]
pub(super) struct Uploads(Arc<()>);

impl Uploads {
    fn enter(&self) -> Option<Arc<()>> {
        (Arc::strong_count(&self.0) <= MAX_UPLOADS).then(|| Arc::clone(&self.0))
    }
}

/// How large an ESDL may be with what else is filled in, and how many are read at once: each is in memory
/// several times until RabbitMQ has it.
const MAX_UPLOAD: usize = 16 * 1024 * 1024;
const MAX_UPLOADS: usize = 3;

impl Visit {
    pub(super) fn account(&self) -> &str {
        match &self.access {
            Access::Act(name) | Access::Look(name) => name,
            Access::Open => "nobody",
        }
    }

    /// The same for whom it concerns later.
    pub(super) fn origin(&self) -> Origin {
        let from = match &self.forwarded {
            Some(claimed) => format!("{}, which says it is for {claimed}", self.peer.ip()),
            None => self.peer.ip().to_string(),
        };
        Origin::new(Via::Page, Some(self.account()), Some(&from))
    }

    /// The account, and where its request came from.
    pub(super) fn who(&self) -> String {
        let (name, peer) = (one_line(self.account()), self.peer);
        match &self.forwarded {
            Some(claimed) => {
                let claimed = one_line(claimed);
                format!("{name} at {peer}, which says it is for {claimed}")
            }
            None => format!("{name} at {peer}"),
        }
    }
}

/// Paths that need no account.
const HEALTH: &str = "/health/";
/// What somebody who may only look is told.
const MAY_NOT_ACT: &str = "This account may only look.";
const NOBODY_ACTS: &str = "Nobody may act here: set HTTP_BASIC_AUTH to user:password, which whoever \
                           acts has to give. The command line does the same.";

/// Browsers do not say where a request comes from unless the connection is encrypted, but they send
/// the cookie only if it comes from here.
const NO_PASS: &str = "Whether this was sent by another site is not known. Load the list of jobs, and \
                       let it set its cookie; then ask from there.";

/// Whether a request is one that is answered, as its head says.
pub(super) fn admit(
    request: &Request,
    accounts: &Accounts,
    guesses: &RefCell<Guesses>,
    uploads: &Uploads,
) -> Result<(Route, Visit), Response> {
    let (path, query) = request
        .target
        .split_once('?')
        .unwrap_or((&request.target, ""));
    let accept = request.header("accept");
    let html = accept.is_some_and(|accept| accept.contains("text/html"));
    let mut visit = Visit {
        access: Access::Open,
        html,
        peer: request.peer,
        forwarded: request.header("x-forwarded-for"),
        note: None,
        needs_pass: false,
        upload: None,
    };
    if !path.starts_with(HEALTH) {
        let has_pass = has_pass(request, accounts);
        let mut guesses = guesses.borrow_mut();
        visit.access = access(request, accounts, &mut guesses, has_pass, html)?;
        visit.needs_pass = !has_pass;
        if request.method == "POST" {
            may_act(request, &visit)?;
            admit_form(request, path, &visit)?;
            if path == SUBMIT {
                return enter(uploads, visit);
            }
            return Ok((Route::Form, visit));
        }
    }
    let refuse = |(status, why): (u16, String)| refusal(html, status, &why);
    let (query, note) = without_note(accounts, query);
    visit.note = note;
    let route = route(path, &query).map_err(refuse)?;
    if !["GET", "HEAD"].contains(&request.method.as_str()) {
        return Err(refuse((405, "only GET and HEAD".to_owned())));
    }
    if matches!(route, Route::Follow(_)) {
        // It takes one of few places.
        comes_from_here(request, &visit)?;
    }
    if matches!(route, Route::SubmitForm(_)) {
        may_act(request, &visit)?;
    }
    if matches!(route, Route::Confirm(_) | Route::Letters) {
        may_act(request, &visit)?;
        // It costs something to find out what is asked about; to a quorum queue a look at a letter is a
        // delivery, of which it may have a limit.
        comes_from_here(request, &visit)?;
        let says_where_from = ["sec-fetch-site", "origin"].map(|name| request.header(name));
        if visit.needs_pass && says_where_from.iter().all(Option::is_none) {
            return Err(refused(request, &visit, NO_PASS));
        }
    }
    Ok((route, visit))
}

/// Lets a large body in, while there is room for it.
fn enter(uploads: &Uploads, mut visit: Visit) -> Result<(Route, Visit), Response> {
    const BUSY: &str = "Others submit jobs just now. Nothing was submitted: try again.";
    visit.upload = uploads.enter();
    match visit.upload {
        Some(_) => Ok((Route::Upload, visit)),
        None => Err(refusal(visit.html, 503, BUSY)),
    }
}

/// The cookie with the pass.
const PASS: &str = "omotes_pass";

/// Whether a browser has been here before with the same account.
fn has_pass(request: &Request, accounts: &Accounts) -> bool {
    let (Some(cookies), Some(given)) = (request.header("cookie"), request.header("authorization"))
    else {
        return false;
    };
    let pairs = cookies.split("; ").filter_map(|pair| pair.split_once('='));
    let mut passes = pairs.filter(|(name, _)| *name == PASS);
    let now = Timestamp::now();
    passes.next().is_some_and(|(_, seal)| {
        let user = accounts::user(&given).unwrap_or_default();
        accounts.exist() && accounts.check_seal(Purpose::Pass, &user, seal, now).is_ok()
    })
}

/// What the sender of a request may do.
fn access(
    request: &Request,
    accounts: &Accounts,
    guesses: &mut Guesses,
    has_pass: bool,
    html: bool,
) -> Result<Access, Response> {
    let given = request.header("authorization");
    let (peer, now) = (request.peer.ip(), Instant::now());
    let named = given.as_deref().and_then(|given| accounts.named(given));
    let counts = given.is_some() && accounts.exist() && !has_pass;
    if counts && !guesses.may_guess(peer, named, now) {
        const WHY: &str = "Too many wrong passwords for this account from this address. Wait a few \
                           seconds.";
        let mut refusal = refusal(html, 429, WHY);
        let seconds = PENALTY.as_secs().to_string();
        refusal.headers.push(("Retry-After", seconds));
        return Err(refusal);
    }
    if let Some(access) = accounts.access(given.as_deref()) {
        return Ok(access);
    }
    let mut refusal = refusal(html, 401, "A user and a password are needed.");
    let challenge = "Basic realm=\"OMOTES orchestrator\", charset=\"UTF-8\"".to_owned();
    refusal.headers.push(("WWW-Authenticate", challenge));
    if given.is_some() {
        if guesses.wrong(peer, named, now) {
            let account = named.map_or("no account".to_owned(), one_line);
            warn!("{peer} has given several wrong passwords over HTTP, for {account}");
        }
        refusal.held = PENALTY;
    }
    Err(refusal)
}

fn may_act(request: &Request, visit: &Visit) -> Result<(), Response> {
    match &visit.access {
        Access::Act(_) => Ok(()),
        Access::Look(_) => Err(refused(request, visit, MAY_NOT_ACT)),
        Access::Open => Err(refused(request, visit, NOBODY_ACTS)),
    }
}

/// Why somebody does not get to act, told in the log too.
fn refused(request: &Request, visit: &Visit, why: &str) -> Response {
    let (who, method) = (visit.who(), one_line(&request.method));
    let target = one_line(&request.target);
    warn!("{who}: {method} {target} is refused: {why}");
    refusal(visit.html, 403, why)
}

/// Whether a form is one that is read, as its head says.
fn admit_form(request: &Request, path: &str, visit: &Visit) -> Result<(), Response> {
    let refuse = |status, why: &str| Err(refusal(visit.html, status, why));
    let (form, most) = match path {
        ACT => ("application/x-www-form-urlencoded", MAX_BODY),
        SUBMIT => ("multipart/form-data", MAX_UPLOAD),
        _ => return refuse(405, "only GET and HEAD; forms are sent to /act and /submit"),
    };
    comes_from_here(request, visit)?;
    let content_type = request.header("content-type").unwrap_or_default();
    let kind = content_type.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case(form) {
        let why = format!("Content-Type: {}: expected {form}", one_line(&content_type));
        return refuse(415, &why);
    }
    match request.body_length(most) {
        Ok(_) => Ok(()),
        Err(BodyFault::NoLength) => refuse(411, "The request has no Content-Length."),
        Err(BodyFault::FaultyLength) => refuse(400, "Content-Length is no number."),
        Err(BodyFault::TooLong) => {
            let why = format!("The form is too long: at most {most} bytes are read.");
            refuse(413, &why)
        }
    }
}

/// Whether a browser says that it was sent here by a page of this service.
fn comes_from_here(request: &Request, visit: &Visit) -> Result<(), Response> {
    let header = |name| request.header(name);
    let (site, origin) = (header("sec-fetch-site"), header("origin"));
    let (host, forwarded_host) = (header("host"), header("x-forwarded-host"));
    let provenance = Provenance {
        site: site.as_deref(),
        origin: origin.as_deref(),
        host: host.as_deref(),
        forwarded_host: forwarded_host.as_deref(),
    };
    provenance.check().map_err(|why| {
        let why = format!("This was sent by another site: {}.", one_line(&why));
        refused(request, visit, &why)
    })
}

/// The form in a body, if this service has shown it to the same account.
pub(super) fn read_form(accounts: &Accounts, visit: &Visit, body: &[u8]) -> Result<Form, Response> {
    let refuse = |status, why: &str| refusal(visit.html, status, why);
    let form = Form::parse(body).map_err(|error| refuse(400, &error))?;
    check_token(accounts, visit, &form.token)?;
    Ok(form)
}

/// Whether a form is one that this service has shown to the same account.
pub(super) fn check_token(accounts: &Accounts, visit: &Visit, token: &str) -> Result<(), Response> {
    let refuse = |status, why: &str| refusal(visit.html, status, why);
    let Access::Act(account) = &visit.access else {
        return Err(refuse(403, MAY_NOT_ACT));
    };
    let now = Timestamp::now();
    let why = match accounts.check_seal(Purpose::Form, account, token, now) {
        Ok(()) => return Ok(()),
        Err(SealFault::Old) => "This form is too old. Nothing was done: load its page again.",
        Err(SealFault::Forged) if token.is_empty() => {
            "The form has no token. Nothing was done: only this page's own forms count; scripts use \
             the command line."
        }
        Err(SealFault::Forged) => {
            "The form's token is not of this account and password. Nothing was done: load its page \
             again."
        }
    };
    warn!("{}: a form is refused: {why}", visit.who());
    Err(refuse(403, why))
}

/// A query without what was done before, and that, if this service has said it.
fn without_note(accounts: &Accounts, query: &str) -> (String, Option<String>) {
    if !query.contains("seal=") {
        return (query.to_owned(), None);
    }
    let mut rest = form_urlencoded::Serializer::new(String::new());
    let (mut note, mut seal) = (String::new(), String::new());
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        match &*name {
            "note" => note = value.into_owned(),
            "seal" => seal = value.into_owned(),
            _ => {
                rest.append_pair(&name, &value);
            }
        }
    }
    let sealed = accounts.check_seal(Purpose::Note, &note, &seal, Timestamp::now());
    (rest.finish(), sealed.ok().map(|()| note))
}

/// A page, with a pass for a browser that has none.
pub(super) fn with_pass(
    mut response: Response,
    accounts: &Accounts,
    visit: &Visit,
    now: Timestamp,
) -> Response {
    if let Access::Act(account) | Access::Look(account) = &visit.access
        && response.content_type == HTML
        && visit.needs_pass
    {
        let seal = accounts.seal(Purpose::Pass, account, now);
        let seconds = accounts::PASS_LIFETIME.as_secs();
        let cookie = format!("{PASS}={seal}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict");
        response.headers.push(("Set-Cookie", cookie));
    }
    response
}
