//! A small HTTP/1.1 server on one thread that never waits for a client, so that slow ones, many and
//! hostile ones hold up neither each other nor anything else. One request per connection.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{debug, warn};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};

/// A client that has not sent its request and read the answer by then is disconnected.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// Beyond that the oldest is disconnected.
const MAX_CONNECTIONS: usize = 512;
/// The largest request head; browsers send less than one KiB.
const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 100;
/// How much is read of what a client sends after its request.
const MAX_IGNORED: usize = 256 * 1024;
const WAKER: Token = Token(0);
const LISTENER: Token = Token(1);
const FIRST_CONNECTION: usize = 2;

/// The head of a request; a body is not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    /// Path and query, as they were sent.
    pub target: String,
    pub authorization: Option<String>,
}

/// The connection that an answer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(Token);

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    pub content_type: &'static str,
    /// Headers beyond those that every answer has.
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn text(status: u16, text: &str) -> Response {
        Response {
            status,
            content_type: "text/plain; charset=utf-8",
            headers: Vec::new(),
            body: format!("{text}\n").into_bytes(),
        }
    }

    fn encode(mut self, head_only: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            401 => "Unauthorized",
            404 => "Not Found",
            405 => "Method Not Allowed",
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
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    waker: Waker,
    stopped: AtomicBool,
    /// Answers from other threads.
    late: Mutex<Vec<(Ticket, Response)>>,
    /// Only for the thread that serves.
    sockets: Mutex<(Poll, TcpListener)>,
}

impl Server {
    /// # Errors
    /// The address is taken or not this machine's.
    pub fn listen(address: SocketAddr) -> io::Result<Server> {
        let mut listener = TcpListener::bind(address)?;
        let poll = Poll::new()?;
        let registry = poll.registry();
        registry.register(&mut listener, LISTENER, Interest::READABLE)?;
        Ok(Server {
            address: listener.local_addr()?,
            waker: Waker::new(registry, WAKER)?,
            stopped: AtomicBool::new(false),
            late: Mutex::new(Vec::new()),
            sockets: Mutex::new((poll, listener)),
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends [`Server::serve`].
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// Gives the answer to a request that [`Server::serve`] got none for. By then the client may
    /// have hung up.
    pub fn answer(&self, ticket: Ticket, response: Response) {
        let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        late.push((ticket, response));
        drop(late);
        self.wake();
    }

    fn wake(&self) {
        if let Err(error) = self.waker.wake() {
            warn!("waking the HTTP endpoint: {error}");
        }
    }

    /// Answers requests until [`Server::stop`]. A handler that returns None answers later through
    /// [`Server::answer`], from another thread: this one must not wait.
    ///
    /// # Errors
    /// The operating system no longer reports events on the sockets.
    pub fn serve(&self, answer: impl Fn(&Request, Ticket) -> Option<Response>) -> io::Result<()> {
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        let (poll, listener) = &mut *sockets;
        let mut connections = Connections::default();
        let mut events = Events::with_capacity(64);
        while !self.stopped.load(Ordering::Relaxed) {
            match poll.poll(&mut events, connections.deadline()) {
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
                    }
                    LISTENER => connections.accept(listener, poll)?,
                    token => connections.go_on(token, &answer),
                }
            }
            connections.hang_up_on_late_ones();
        }
        Ok(())
    }
}

/// The connections in the order of their arrival, which is that of their deadlines.
#[derive(Default)]
struct Connections {
    by_token: BTreeMap<Token, Connection>,
    last: usize,
}

impl Connections {
    fn deadline(&self) -> Option<Duration> {
        let (_, oldest) = self.by_token.first_key_value()?;
        Some(DEADLINE.saturating_sub(oldest.since.elapsed()))
    }

    fn hang_up_on_late_ones(&mut self) {
        while self.deadline() == Some(Duration::ZERO) {
            self.by_token.pop_first();
        }
    }

    /// Accepts all waiting connections.
    fn accept(&mut self, listener: &TcpListener, poll: &Poll) -> io::Result<()> {
        loop {
            let mut stream = match listener.accept() {
                Ok((stream, _)) => stream,
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
            let connection = Connection {
                stream,
                since: Instant::now(),
                state: Progress::Asking(Vec::new()),
            };
            self.by_token.insert(token, connection);
            if self.by_token.len() > MAX_CONNECTIONS {
                self.by_token.pop_first();
            }
        }
    }

    /// Starts writing an answer that was waited for.
    fn answer(&mut self, token: Token, response: Response) {
        if let Some(connection) = self.by_token.get_mut(&token)
            && let Progress::Waiting { head_only } = connection.state
        {
            connection.state = Progress::Answering(response.encode(head_only), 0);
            self.go_on(token, &|_, _| None);
        }
    }

    /// Reads and writes what can be without waiting.
    fn go_on(&mut self, token: Token, answer: &impl Fn(&Request, Ticket) -> Option<Response>) {
        let Some(connection) = self.by_token.get_mut(&token) else {
            return;
        };
        match connection.go_on(&|request| answer(request, Ticket(token))) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Ok(()) => {}
            // A client that hangs up before its answer is no news.
            Err(error) => debug!("answering over HTTP: {error}"),
        }
        self.by_token.remove(&token);
    }
}

struct Connection {
    stream: TcpStream,
    since: Instant,
    state: Progress,
}

enum Progress {
    /// The part of the request that has arrived.
    Asking(Vec<u8>),
    /// The answer takes its time.
    Waiting { head_only: bool },
    /// What remains to be written of the answer, and from where.
    Answering(Vec<u8>, usize),
    /// The client closes first. If we did, data that it still sends would make the kernel discard
    /// the answer. So many more bytes are read.
    Answered(usize),
}

impl Connection {
    /// As far as it goes: to the end, or until something fails, be it that it would block.
    fn go_on(&mut self, answer: &impl Fn(&Request) -> Option<Response>) -> io::Result<()> {
        if let Progress::Asking(head) = &mut self.state {
            let (response, head_only) = loop {
                let mut chunk = [0; 4096];
                match self.stream.read(&mut chunk) {
                    Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                    Ok(length) => head.extend_from_slice(&chunk[..length]),
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(error) => return Err(error),
                }
                match parse(head) {
                    Parsed::Partial => {}
                    Parsed::Faulty(response) => break (Some(response), false),
                    Parsed::Request(request) => {
                        break (answer(&request), request.method == "HEAD");
                    }
                }
            };
            self.state = match response {
                Some(response) => Progress::Answering(response.encode(head_only), 0),
                None => Progress::Waiting { head_only },
            };
        }
        if let Progress::Answering(bytes, sent) = &mut self.state {
            while *sent < bytes.len() {
                match self.stream.write(&bytes[*sent..]) {
                    Ok(length) => *sent += length,
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

#[derive(Debug, PartialEq, Eq)]
enum Parsed {
    /// There is more to come.
    Partial,
    Request(Request),
    Faulty(Response),
}

fn parse(head: &[u8]) -> Parsed {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Complete(_)) => Parsed::Request(Request {
            method: request.method.unwrap_or_default().to_owned(),
            target: request.path.unwrap_or_default().to_owned(),
            authorization: request
                .headers
                .iter()
                .find(|header| header.name.eq_ignore_ascii_case("authorization"))
                .map(|header| String::from_utf8_lossy(header.value).into_owned()),
        }),
        Ok(httparse::Status::Partial) if head.len() < MAX_HEAD => Parsed::Partial,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            Parsed::Faulty(Response::text(431, "The request's head is too long."))
        }
        Err(error) => Parsed::Faulty(Response::text(400, &format!("No HTTP request: {error}."))),
    }
}
