//! A connection to a vhost.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use amiquip::{
    Auth, Channel, Connection, ConnectionBlockedNotification, ConnectionOptions, ConnectionTuning,
    IoStream,
};
use anyhow::{Context, anyhow};
use crossbeam_channel::Receiver;

use super::STUCK;
use super::guarded_stream::GuardedStream;
use super::intake::{GatedStream, Intake};
use super::refusals::PublishError;
use super::tls_stream::TlsStream;
use crate::config::{self, Address, CONNECT_TIMEOUT};
use crate::threads::within_deadline;
use crate::tls::{ClientConfig, Tls};

/// Seconds between heartbeats; a silent network is noticed after twice as long.
const HEARTBEAT_SECONDS: u16 = 10;
/// The same where another server can be had: one that hangs without an end is left soon.
const HEARTBEAT_SECONDS_OF_SEVERAL: u16 = 2;

/// How long one address is waited for, at each step, where there are others: not long at first, and longer
/// when none of them answers so soon.
const PATIENCE_WITH_ONE_OF_SEVERAL: [Duration; 2] =
    [Duration::from_secs(2), Duration::from_secs(5)];

/// For how long an address that did not answer is tried after all others.
const SUSPICION: Duration = Duration::from_secs(30);

/// When addresses have last failed: a session has several connections, and does not wait for the same dead
/// node with each of them.
static SUSPECTS: Mutex<BTreeMap<SocketAddr, Instant>> = Mutex::new(BTreeMap::new());

/// One of the servers' addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    server: Address,
    address: SocketAddr,
}

/// As it is configured, for messages.
impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.server.fmt(f)
    }
}

impl Node {
    /// All addresses of all servers, as far as they are known.
    pub fn all_of(config: &config::RabbitMq) -> Vec<Node> {
        resolved(config).0
    }

    /// For a while, connections are opened to all others first.
    pub fn suspect(&self) {
        note(self.address, false);
    }

    pub fn is_suspect(&self) -> bool {
        let suspects = suspects();
        let failed = suspects.get(&self.address);
        failed.is_some_and(|failed| failed.elapsed() < SUSPICION)
    }
}

/// One connection to a vhost.
pub struct Link {
    /// `<name> (<user>@<host>:<port>/<vhost>)`, with the server that it is connected to, for messages.
    pub(super) name: String,
    node: Node,
    /// Opening a channel needs exclusive access.
    connection: Mutex<Connection>,
    kill_switch: TcpStream,
    blocked: Receiver<ConnectionBlockedNotification>,
    /// Counts what is consumed here.
    pub(super) intake: Option<Arc<Intake>>,
    /// How many questions about queues have no answer yet.
    pub(super) unanswered: Arc<AtomicUsize>,
}

impl Link {
    /// Connects; `purpose` names the link in messages and in RabbitMQ's management page.
    ///
    /// # Errors
    /// No server resolves, answers within [`CONNECT_TIMEOUT`], or within five seconds where there are
    /// several, and takes the user and the vhost.
    pub fn open(config: &config::RabbitMq, purpose: &str) -> anyhow::Result<Link> {
        Link::open_with(config, purpose, None)
    }

    /// The same, for a link to consume on: it reads nothing while `intake` is full.
    ///
    /// # Errors
    /// As [`Link::open`].
    pub fn open_gated(
        config: &config::RabbitMq,
        purpose: &str,
        intake: &Arc<Intake>,
    ) -> anyhow::Result<Link> {
        Link::open_with(config, purpose, Some(intake))
    }

    fn open_with(
        config: &config::RabbitMq,
        purpose: &str,
        intake: Option<&Arc<Intake>>,
    ) -> anyhow::Result<Link> {
        let (node, opened) = open(config, purpose, intake)
            .with_context(|| format!("connecting to RabbitMQ for {purpose} ({config})"))?;
        Ok(Link::of(config, node, opened, purpose, intake))
    }

    /// Connects to one of the servers, if it is there: each step takes `patience` at the most.
    ///
    /// # Errors
    /// None resolves, or this one does not answer in time, or does not take the user and the vhost.
    pub fn open_soon(
        config: &config::RabbitMq,
        patience: Duration,
        purpose: &str,
    ) -> anyhow::Result<Link> {
        let (mut nodes, faults) = resolved(config);
        nodes.sort_by_key(Node::is_suspect);
        match (nodes.first(), faults.into_iter().next()) {
            (Some(node), _) => Link::open_on(config, node, patience, purpose),
            (None, Some(fault)) => Err(fault),
            (None, None) => Err(anyhow!("no server is configured")),
        }
    }

    /// Connects to this node alone, each step within `patience`.
    ///
    /// # Errors
    /// It does not resolve, does not answer in time, or does not take the user and the vhost.
    pub(super) fn open_on(
        config: &config::RabbitMq,
        node: &Node,
        patience: Duration,
        purpose: &str,
    ) -> anyhow::Result<Link> {
        let tls = config.tls.as_ref().map(Tls::client_config).transpose()?;
        let tls = tls.map(|tls| (tls, node.server.host.as_str()));
        let opened = open_at(config, node.address, tls, patience, purpose, None)?;
        Ok(Link::of(config, node.clone(), opened, purpose, None))
    }

    fn of(
        config: &config::RabbitMq,
        node: Node,
        (connection, kill_switch, blocked): Opened,
        purpose: &str,
        intake: Option<&Arc<Intake>>,
    ) -> Link {
        let its_own = config::RabbitMq {
            servers: vec![node.server.clone()],
            ..config.clone()
        };
        Link {
            name: format!("{purpose} ({its_own})"),
            node,
            connection: Mutex::new(connection),
            kill_switch,
            blocked,
            intake: intake.cloned(),
            unanswered: Arc::default(),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is connected to.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Ends the connection at once and frees every call that is blocked on it.
    pub fn kill(&self) {
        // It fails if the connection is gone already, which serves as well.
        let _ = self.kill_switch.shutdown(Shutdown::Both);
    }

    /// News since the last call of whether the broker blocks this connection, and why; None if
    /// there is none.
    pub fn blocked_news(&self) -> Option<Option<String>> {
        self.blocked.try_iter().last().map(|news| match news {
            ConnectionBlockedNotification::Blocked(reason) => Some(reason),
            ConnectionBlockedNotification::Unblocked => None,
        })
    }

    /// Closes the connection, with a handshake unless RabbitMQ owes answers about queues, for which
    /// it would wait.
    ///
    /// # Errors
    /// What ended the connection, if it was ended before.
    pub fn close(self) -> anyhow::Result<()> {
        if self.unanswered.load(Ordering::Relaxed) > 0 {
            self.kill();
        }
        let connection = self
            .connection
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        connection.close().context(self.name)
    }

    /// The same, but cut off after `deadline`.
    ///
    /// # Errors
    /// As [`Link::close`], or it took longer.
    pub fn close_within(self, deadline: Duration) -> anyhow::Result<()> {
        let kill_switch = self.kill_switch.try_clone()?;
        let kill = move || {
            // As in `kill`.
            let _ = kill_switch.shutdown(Shutdown::Both);
        };
        within_deadline(deadline, kill, || self.close())
    }

    /// Asks the broker for an answer.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn check(&self) -> anyhow::Result<()> {
        let channel = self.channel().with_context(|| self.name.clone())?;
        channel.close().with_context(|| self.name.clone())
    }

    pub(super) fn channel(&self) -> Result<Channel, amiquip::Error> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .open_channel(None)
    }

    pub(super) fn lost(&self, error: amiquip::Error, during: &str) -> PublishError {
        PublishError::Lost(anyhow!(error).context(format!("{}: {during}", self.name)))
    }
}

/// A connection, its kill switch, and the news of whether it is blocked.
type Opened = (
    Connection,
    TcpStream,
    Receiver<ConnectionBlockedNotification>,
);

/// All addresses of all servers, and why some have none.
fn resolved(config: &config::RabbitMq) -> (Vec<Node>, Vec<anyhow::Error>) {
    let mut nodes = Vec::new();
    let mut faults = Vec::new();
    for server in &config.servers {
        match (server.host.as_str(), server.port).to_socket_addrs() {
            Ok(addresses) => nodes.extend(addresses.map(|address| Node {
                server: server.clone(),
                address,
            })),
            Err(error) => faults.push(anyhow!(error).context(server.to_string())),
        }
    }
    (nodes, faults)
}

/// Connects to the first that takes the connection, of all addresses of all servers, in random
/// order: replicas spread over a cluster, and none returns to the same dead node each time.
fn open(
    config: &config::RabbitMq,
    purpose: &str,
    intake: Option<&Arc<Intake>>,
) -> anyhow::Result<(Node, Opened)> {
    // Before anything is asked of the network.
    let tls = config.tls.as_ref().map(Tls::client_config).transpose()?;
    let (mut targets, mut faults) = resolved(config);
    fastrand::shuffle(&mut targets);
    // The order among those of a kind stays.
    targets.sort_by_key(Node::is_suspect);
    let rounds = match targets.len() {
        0 | 1 => &[CONNECT_TIMEOUT][..],
        _ => &PATIENCE_WITH_ONE_OF_SEVERAL,
    };
    let unresolved = faults.len();
    for patience in rounds {
        faults.truncate(unresolved);
        for node in &targets {
            let host = tls.clone().map(|tls| (tls, node.server.host.as_str()));
            let opened = open_at(config, node.address, host, *patience, purpose, intake);
            note(node.address, opened.is_ok());
            match opened {
                Ok(opened) => return Ok((node.clone(), opened)),
                Err(fault) => faults.push(fault),
            }
        }
    }
    Err(match faults.len() {
        0 => anyhow!("{config} has no address"),
        1 => faults.remove(0),
        _ => {
            let faults: Vec<_> = faults.iter().map(|fault| format!("{fault:#}")).collect();
            anyhow!(faults.join("; "))
        }
    })
}

/// Closes a channel, and has what was taken on it and not acknowledged return to its place: said so, that is
/// no delivery for a quorum queue of RabbitMQ 4.3; otherwise it is one of the few that it allows.
pub(super) fn give_back(channel: Channel) -> amiquip::Result<()> {
    channel.nack_all(true)?;
    channel.close()
}

fn suspects() -> MutexGuard<'static, BTreeMap<SocketAddr, Instant>> {
    SUSPECTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes whether an address has answered.
fn note(address: SocketAddr, answers: bool) {
    if answers {
        suspects().remove(&address);
    } else {
        suspects().insert(address, Instant::now());
    }
}

/// Connects to one address, in TLS with the host of that name if `tls` is given; no step takes
/// longer than `patience`.
fn open_at(
    config: &config::RabbitMq,
    address: SocketAddr,
    tls: Option<(ClientConfig, &str)>,
    patience: Duration,
    purpose: &str,
    intake: Option<&Arc<Intake>>,
) -> anyhow::Result<Opened> {
    let stream = TcpStream::connect_timeout(&address, patience).context(address)?;
    // amiquip never sets it, and without it a confirm takes 44 ms.
    stream.set_nodelay(true)?;
    let kill_switch = stream.try_clone()?;
    let options = ConnectionOptions::default()
        .auth(Auth::Plain {
            username: config.username.clone(),
            password: config.password.reveal().to_owned(),
        })
        .virtual_host(config.vhost.as_str())
        .heartbeat(match config.servers.len() {
            1 => HEARTBEAT_SECONDS,
            _ => HEARTBEAT_SECONDS_OF_SEVERAL,
        })
        .connection_timeout(Some(patience))
        .information(Some(format!("omotes-orchestrator {purpose}")));
    let opened = match tls {
        None => {
            let stream = mio_of_amiquip::net::TcpStream::from_stream(stream)?;
            speak(stream, options, patience, intake)
        }
        Some((tls, host)) => {
            let stream = TlsStream::open(stream, host, tls, patience)
                .with_context(|| format!("TLS with {address}"))?;
            speak(stream, options, patience, intake)
        }
    };
    let mut connection = opened.with_context(|| address.to_string())?;
    let blocked = connection.listen_for_connection_blocked()?;
    Ok((connection, kill_switch, blocked))
}

fn speak<S: IoStream>(
    stream: S,
    options: ConnectionOptions<Auth>,
    patience: Duration,
    intake: Option<&Arc<Intake>>,
) -> anyhow::Result<Connection> {
    let tuning = ConnectionTuning::default();
    let stream = GuardedStream::new(stream);
    let opened = match intake {
        None => Connection::insecure_open_stream(stream, options, tuning),
        Some(intake) => {
            Connection::insecure_open_stream(GatedStream::new(stream, intake), options, tuning)
        }
    };
    opened.map_err(|error| match error {
        amiquip::Error::ConnectionTimeout => {
            anyhow!("no end of the AMQP handshake: nothing for {patience:?}; {STUCK}")
        }
        error => error.into(),
    })
}
