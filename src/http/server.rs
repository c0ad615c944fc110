//! A small HTTP/1.1 server on one thread that never waits for a client, so that slow ones, many and
//! hostile ones hold up neither each other nor anything else. One request per connection.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{debug, warn};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};

use super::streams::{Hub, Seat, Stream};

/// A client that has not sent its request and read the answer by then is disconnected, unless it is
/// given more time.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);
/// The largest body that is read as quickly as everything else.
pub(super) const MAX_BODY: usize = 64 * 1024;
/// Who takes so much of a long answer has as much time again.
const RENEWS: usize = 64 * 1024;
/// Within this time a larger one has to have arrived.
const UPLOAD_TIME: Duration = Duration::from_secs(60);
/// Beyond that the oldest is disconnected.
const MAX_CONNECTIONS: usize = 512;
/// The largest request head; browsers send less than one KiB.
const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 100;
/// How much is read of what a client sends after its request, or beyond a body that is read.
const MAX_IGNORED: usize = 2 * 1024 * 1024;
const WAKER: Token = Token(0);
const LISTENER: Token = Token(1);
const FIRST_CONNECTION: usize = 2;

/// The headers that are kept of a request.
const KEPT: [&str; 12] = [
    "accept",
    "authorization",
    "content-length",
    "content-type",
    "cookie",
    "expect",
    "host",
    "origin",
    "sec-fetch-site",
    "transfer-encoding",
    "x-forwarded-for",
    "x-forwarded-host",
];

/// A request. Only that of a POST has a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) method: String,
    /// Path and query, as they were sent.
    pub(super) target: String,
    pub(super) peer: SocketAddr,
    pub(super) body: Vec<u8>,
    headers: Vec<(&'static str, String)>,
}

/// Why a body cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BodyFault {
    /// It does not say how long it is; sent in chunks, perhaps.
    NoLength,
    FaultyLength,
    /// It is longer than it may be.
    TooLong,
}

impl Request {
    /// A header by its name in lower case; all of that name, if there are several.
    pub(super) fn header(&self, name: &str) -> Option<String> {
        let named = self.headers.iter().filter(|(one, _)| *one == name);
        let values: Vec<_> = named.map(|(_, value)| value.as_str()).collect();
        (!values.is_empty()).then(|| values.join(", "))
    }

    /// The length of the body, which may be so long.
    ///
    /// # Errors
    /// It is not known, or too long.
    pub(super) fn body_length(&self, most: usize) -> Result<usize, BodyFault> {
        if self.header("transfer-encoding").is_some() {
            return Err(BodyFault::NoLength);
        }
        let length = self.header("content-length").ok_or(BodyFault::NoLength)?;
        // No sign, which `parse` would accept; and of several headers the joined text is no number.
        if length.is_empty() || !length.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(BodyFault::FaultyLength);
        }
        match length.parse() {
            Ok(length) if length <= most => Ok(length),
            Ok(_) | Err(_) => Err(BodyFault::TooLong),
        }
    }
}

/// The connection that an answer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ticket(Token);

/// What becomes of a request.
pub(super) enum Reply {
    Now(Response),
    /// [`Server::answer`] is called by another thread. Until then its client is waited for at least
    /// so long, and gets this if that was too short; else it is disconnected.
    Later(Duration, Option<Box<Response>>),
    /// What is told from now on.
    Follow(Seat),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) content_type: &'static str,
    /// Headers beyond those that every answer has.
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
    /// How long the client has to wait for it.
    pub(super) held: Duration,
}

impl Response {
    pub(super) fn new(status: u16, content_type: &'static str, body: String) -> Response {
        Response {
            status,
            content_type,
            headers: Vec::new(),
            body: body.into_bytes(),
            held: Duration::ZERO,
        }
    }

    pub(super) fn text(status: u16, text: &str) -> Response {
        Response::new(status, "text/plain; charset=utf-8", format!("{text}\n"))
    }

    fn encode(mut self, head_only: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            303 => "See Other",
            400 => "Bad Request",
            401 => "Unauthorized",
            403 => "Forbidden",
            404 => "Not Found",
            405 => "Method Not Allowed",
            409 => "Conflict",
            411 => "Length Required",
            413 => "Content Too Large",
            415 => "Unsupported Media Type",
            429 => "Too Many Requests",
            431 => "Request Header Fields Too Large",
            500 => "Internal Server Error",
            503 => "Service Unavailable",
            _ => "",
        };
        let mut head = format!(
            "HTTP/1.1 {} {reason}\r\nContent-Type: {}\r\nContent-Length: {}\r\n\
             Cache-Control: no-store\r\nConnection: close\r\n",
            self.status,
            self.content_type,
            self.body.len()
        );
        for (name, value) in &self.headers {
            let _ = write!(head, "{name}: {value}\r\n");
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        if !head_only {
            bytes.append(&mut self.body);
        }
        bytes
    }
}

/// Listens, and answers while [`Server::serve`] runs.
pub(super) struct Server {
    address: SocketAddr,
    waker: Waker,
    stopped: AtomicBool,
    /// Answers from other threads.
    late: Mutex<Vec<(Ticket, Response)>>,
    hub: Arc<Hub>,
    /// Only for the thread that serves.
    sockets: Mutex<(Poll, TcpListener)>,
}

impl Server {
    /// # Errors
    /// The address is taken or not this machine's.
    pub(super) fn listen(address: SocketAddr) -> io::Result<Server> {
        let mut listener = TcpListener::bind(address)?;
        let poll = Poll::new()?;
        let registry = poll.registry();
        registry.register(&mut listener, LISTENER, Interest::READABLE)?;
        Ok(Server {
            address: listener.local_addr()?,
            waker: Waker::new(registry, WAKER)?,
            stopped: AtomicBool::new(false),
            late: Mutex::new(Vec::new()),
            hub: Arc::default(),
            sockets: Mutex::new((poll, listener)),
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends [`Server::serve`].
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// Gives the answer to a request that [`Server::serve`] got none for. By then the client may
    /// have hung up.
    pub(super) fn answer(&self, ticket: Ticket, response: Response) {
        let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        late.push((ticket, response));
        drop(late);
        self.wake();
    }

    /// Who follows what.
    pub(super) fn hub(&self) -> &Arc<Hub> {
        &self.hub
    }

    /// Says that [`Server::hub`] has been told something.
    pub(super) fn tell(&self) {
        self.wake();
    }

    fn wake(&self) {
        if let Err(error) = self.waker.wake() {
            warn!("waking the HTTP endpoint: {error}");
        }
    }

    /// Answers requests until [`Server::stop`]. `admit` sees a request before its body is read, and
    /// `answer` gets what it has returned. Neither may wait for anything.
    ///
    /// # Errors
    /// The operating system no longer reports events on the sockets.
    pub(super) fn serve<R>(
        &self,
        admit: impl Fn(&Request) -> Result<R, Response>,
        answer: impl Fn(R, &mut Request, Ticket) -> Reply,
    ) -> io::Result<()> {
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        let (poll, listener) = &mut *sockets;
        let mut connections = Connections {
            by_token: BTreeMap::new(),
            last: 0,
        };
        let mut events = Events::with_capacity(64);
        while !self.stopped.load(Ordering::Relaxed) {
            match poll.poll(&mut events, connections.patience()) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                polled => polled?,
            }
            for event in &events {
                match event.token() {
                    WAKER => {
                        let late = &mut *self.late.lock().unwrap_or_else(PoisonError::into_inner);
                        for (Ticket(token), response) in late.drain(..) {
                            connections.answer(token, response);
                        }
                        self.hub.telling(|| connections.tell());
                    }
                    LISTENER => connections.accept(listener, poll)?,
                    token => connections.go_on(token, |connection| {
                        connection.receive(&admit, &|admitted, request| {
                            answer(admitted, request, Ticket(token))
                        })?;
                        connection.send()
                    }),
                }
            }
            connections.end_waits();
        }
        Ok(())
    }
}

/// The connections in the order of their arrival.
struct Connections<R> {
    by_token: BTreeMap<Token, Connection<R>>,
    last: usize,
}

impl<R> Connections<R> {
    /// How long until something is to be done without an event.
    fn patience(&self) -> Option<Duration> {
        let next = self.by_token.values().map(Connection::due).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// Hangs up on those that are late, and gives the answers that had to wait.
    fn end_waits(&mut self) {
        let now = Instant::now();
        let due = self.by_token.iter().filter(|(_, one)| one.due() <= now);
        let due: Vec<_> = due.map(|(token, _)| *token).collect();
        for token in due {
            self.go_on(token, |connection| {
                let follows = matches!(connection.state, Progress::Following(_));
                if connection.deadline <= now && !follows && !connection.give_up_waiting(now) {
                    return Ok(());
                }
                if let Progress::Held(bytes, _) = &mut connection.state {
                    connection.state = Progress::Answering(mem::take(bytes), 0);
                }
                connection.send()
            });
        }
    }

    /// Accepts all waiting connections.
    fn accept(&mut self, listener: &TcpListener, poll: &Poll) -> io::Result<()> {
        loop {
            let (mut stream, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // It has hung up already.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                // Too many open files, perhaps: the next event tells.
                Err(error) => {
                    debug!("accepting an HTTP connection: {error}");
                    return Ok(());
                }
            };
            let token = Token(FIRST_CONNECTION + self.last);
            self.last += 1;
            let interest = Interest::READABLE | Interest::WRITABLE;
            poll.registry().register(&mut stream, token, interest)?;
            let connection = Connection::new(stream, peer, Progress::Asking(Vec::new()));
            self.by_token.insert(token, connection);
            if self.by_token.len() > MAX_CONNECTIONS {
                let all = self.by_token.iter();
                let all = all.map(|(token, one)| (*token, one.is_spared()));
                let victim = victim(all);
                victim.and_then(|token| self.by_token.remove(&token));
            }
        }
    }

    /// Goes on with those who follow something.
    fn tell(&mut self) {
        let all = self.by_token.iter();
        let following = all.filter(|(_, one)| matches!(one.state, Progress::Following(_)));
        let following: Vec<_> = following.map(|(token, _)| *token).collect();
        for token in following {
            self.go_on(token, Connection::send);
        }
    }

    /// Starts writing an answer that was waited for.
    fn answer(&mut self, token: Token, response: Response) {
        self.go_on(token, |connection| {
            if let Progress::Waiting { head_only, .. } = connection.state {
                connection.state = answering(response, head_only);
            }
            connection.send()
        });
    }

    /// Takes a step with a connection, and forgets it when that was its last.
    fn go_on(&mut self, token: Token, step: impl FnOnce(&mut Connection<R>) -> io::Result<()>) {
        let Some(connection) = self.by_token.get_mut(&token) else {
            return;
        };
        match step(connection) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Ok(()) => {}
            // A client that hangs up before its answer is no news.
            Err(error) => debug!("answering over HTTP: {error}"),
        }
        self.by_token.remove(&token);
    }
}

/// Who is disconnected when there are too many: the oldest, but rather one whose answer is not being
/// worked on, for what is worked on may be an action whose outcome somebody waits for; nor one who
/// follows something, of whom there are few enough.
fn victim(connections: impl Iterator<Item = (Token, bool)>) -> Option<Token> {
    let chosen = connections.min_by_key(|(token, is_spared)| (*is_spared, *token));
    chosen.map(|(token, _)| token)
}

struct Connection<R> {
    stream: TcpStream,
    peer: SocketAddr,
    deadline: Instant,
    state: Progress<R>,
}

enum Progress<R> {
    /// The part of the request that has arrived.
    Asking(Vec<u8>),
    /// An admitted request whose body is so long, and has not arrived as a whole.
    Sending(Request, R, usize),
    /// The answer takes its time.
    Waiting {
        head_only: bool,
        /// What is said if it takes too much.
        otherwise: Option<Box<Response>>,
    },
    /// The answer is not given before then.
    Held(Vec<u8>, Instant),
    /// What remains to be written of the answer, and from where.
    Answering(Vec<u8>, usize),
    /// The client closes first. If we did, data that it still sends would make the kernel discard
    /// the answer. So many more bytes are read.
    Answered(usize),
    Following(Box<Stream>),
}

fn answering<R>(response: Response, head_only: bool) -> Progress<R> {
    let held = response.held;
    let bytes = response.encode(head_only);
    match held {
        Duration::ZERO => Progress::Answering(bytes, 0),
        held => Progress::Held(bytes, Instant::now() + held),
    }
}

impl<R> Connection<R> {
    fn new(stream: TcpStream, peer: SocketAddr, state: Progress<R>) -> Connection<R> {
        Connection {
            stream,
            peer,
            deadline: Instant::now() + DEADLINE,
            state,
        }
    }

    fn is_spared(&self) -> bool {
        matches!(
            self.state,
            Progress::Waiting { .. } | Progress::Following(_)
        )
    }

    fn due(&self) -> Instant {
        match &self.state {
            Progress::Held(_, until) => (*until).min(self.deadline),
            Progress::Following(stream) => stream.due(),
            Progress::Asking(_)
            | Progress::Sending(..)
            | Progress::Waiting { .. }
            | Progress::Answering(..)
            | Progress::Answered(_) => self.deadline,
        }
    }

    /// Begins to say that the answer takes too long, if there is anything to be said.
    fn give_up_waiting(&mut self, now: Instant) -> bool {
        let Progress::Waiting {
            head_only,
            otherwise,
        } = &mut self.state
        else {
            return false;
        };
        let Some(response) = otherwise.take() else {
            return false;
        };
        self.state = answering(*response, *head_only);
        self.deadline = now + DEADLINE;
        true
    }

    /// Reads the request, as far as it has arrived, and has it answered when it is complete.
    fn receive(
        &mut self,
        admit: &impl Fn(&Request) -> Result<R, Response>,
        answer: &impl Fn(R, &mut Request) -> Reply,
    ) -> io::Result<()> {
        while let Progress::Asking(head) = &mut self.state {
            read_more(&mut self.stream, head)?;
            self.state = match parse(head, self.peer) {
                Parsed::Partial => continue,
                Parsed::Faulty(response) => answering(response, false),
                Parsed::Request(mut request, head_length) => match admit(&request) {
                    Err(response) => answering(response, request.method == "HEAD"),
                    Ok(admitted) => {
                        let mut length = 0;
                        if request.method == "POST" {
                            // Whoever admits it has looked at the length.
                            length = request.body_length(usize::MAX).unwrap_or_default();
                            if length > MAX_BODY {
                                self.deadline = Instant::now() + UPLOAD_TIME;
                            }
                            request.body = head.split_off(head_length);
                            if request.body.len() < length {
                                ask_for_body(&mut self.stream, &request)?;
                            }
                        }
                        Progress::Sending(request, admitted, length)
                    }
                },
            };
        }
        while let Progress::Sending(request, _, length) = &mut self.state {
            if request.body.len() < *length {
                read_more(&mut self.stream, &mut request.body)?;
                continue;
            }
            request.body.truncate(*length);
            self.complete(answer);
        }
        Ok(())
    }

    /// Has a complete request answered.
    fn complete(&mut self, answer: &impl Fn(R, &mut Request) -> Reply) {
        let state = mem::replace(&mut self.state, Progress::Answered(0));
        if let Progress::Sending(mut request, admitted, _) = state {
            let head_only = request.method == "HEAD";
            self.state = match answer(admitted, &mut request) {
                Reply::Now(response) => answering(response, head_only),
                Reply::Follow(seat) => Progress::Following(Box::new(Stream::new(seat))),
                Reply::Later(time, otherwise) => {
                    self.deadline = self.deadline.max(Instant::now() + time);
                    Progress::Waiting {
                        head_only,
                        otherwise,
                    }
                }
            };
        }
    }

    /// Writes the answer, if there is one, and waits for the client to close.
    fn send(&mut self) -> io::Result<()> {
        if let Progress::Following(stream) = &mut self.state {
            return stream.go_on(&mut self.stream);
        }
        if let Progress::Answering(bytes, sent) = &mut self.state {
            while *sent < bytes.len() {
                match self.stream.write(&bytes[*sent..]) {
                    Ok(length) => {
                        *sent += length;
                        if *sent % RENEWS < length {
                            self.deadline = self.deadline.max(Instant::now() + DEADLINE);
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            self.stream.shutdown(Shutdown::Write)?;
            self.state = Progress::Answered(MAX_IGNORED);
        }
        let Progress::Answered(left) = &mut self.state else {
            return Err(ErrorKind::WouldBlock.into());
        };
        let mut chunk = [0; 4096];
        while *left > 0 {
            match self.stream.read(&mut chunk) {
                Ok(0) => break,
                Ok(length) => *left = left.saturating_sub(length),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Reads what there is, or some of it; at least a byte.
fn read_more(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> io::Result<()> {
    let mut chunk = [0; 4096];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(length) => {
                bytes.extend_from_slice(&chunk[..length]);
                return Ok(());
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Tells a client to send its body, if it waits for that.
fn ask_for_body(stream: &mut TcpStream, request: &Request) -> io::Result<()> {
    let expects = request.header("expect");
    if expects.is_some_and(|value| value.eq_ignore_ascii_case("100-continue")) {
        // Nothing has been written to this socket yet, so there is room.
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
enum Parsed {
    /// There is more to come.
    Partial,
    /// With the length of its head.
    Request(Request, usize),
    Faulty(Response),
}

fn parse(head: &[u8], peer: SocketAddr) -> Parsed {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Complete(length)) => {
            let kept = request.headers.iter().filter_map(|header| {
                let mut names = KEPT.iter();
                let name = names.find(|name| header.name.eq_ignore_ascii_case(name))?;
                Some((*name, String::from_utf8_lossy(header.value).into_owned()))
            });
            let request = Request {
                headers: kept.collect(),
                method: request.method.unwrap_or_default().to_owned(),
                target: request.path.unwrap_or_default().to_owned(),
                peer,
                body: Vec::new(),
            };
            Parsed::Request(request, length)
        }
        Ok(httparse::Status::Partial) if head.len() < MAX_HEAD => Parsed::Partial,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            Parsed::Faulty(Response::text(431, "The request's head is too long."))
        }
        Err(error) => Parsed::Faulty(Response::text(400, &format!("No HTTP request: {error}."))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::the_oldest(&[(2, false), (3, false)], Some(2))]
    #[case::not_one_that_is_worked_on(&[(2, true), (3, false), (4, false)], Some(3))]
    #[case::of_those_the_oldest(&[(2, true), (3, true)], Some(2))]
    #[case::none(&[], None)]
    fn of_too_many_one_is_disconnected(
        #[case] connections: &[(usize, bool)],
        #[case] expected: Option<usize>,
    ) {
        let all = connections.iter();
        let all = all.map(|(token, is_waiting)| (Token(*token), *is_waiting));
        assert_eq!(victim(all), expected.map(Token));
    }

    /// A connection whose time is over, and its client.
    fn late(state: Progress<()>) -> (std::net::TcpStream, Connection<()>) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, peer) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut connection = Connection::new(TcpStream::from_std(stream), peer, state);
        connection.deadline = Instant::now();
        (client, connection)
    }

    #[rstest]
    #[case::an_action(Some("not known"), "HTTP/1.1 503 ")]
    #[case::a_page(None, "")]
    fn whoever_waits_too_long_is_told(#[case] otherwise: Option<&str>, #[case] answer: &str) {
        let otherwise = otherwise.map(|text| Box::new(Response::text(503, text)));
        let (mut client, connection) = late(Progress::Waiting {
            head_only: false,
            otherwise,
        });
        let mut connections = Connections {
            by_token: BTreeMap::from([(Token(FIRST_CONNECTION), connection)]),
            last: 1,
        };
        connections.end_waits();
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert!(text.starts_with(answer), "{text}");
        assert_eq!(text.is_empty(), answer.is_empty(), "{text}");
        assert_eq!(connections.by_token.is_empty(), answer.is_empty());
    }

    #[rstest]
    #[case::a_long_answer(100 * RENEWS, true)]
    #[case::a_short_one(RENEWS - 1, false)]
    fn whoever_takes_a_long_answer_has_time_for_it(#[case] length: usize, #[case] renews: bool) {
        let (_client, mut connection) = late(Progress::Answering(vec![b'x'; length], 0));
        assert!(connection.send().is_err());
        assert_eq!(connection.deadline > Instant::now(), renews);
    }
}
