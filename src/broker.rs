//! RabbitMQ: the only file that names amiquip, beside what is below it.
//!
//! amiquip blocks without end when the broker stops reading (an alarm) or answering, and what
//! frees it is the socket being shut down under it. So a [`Link`] keeps a second handle of its
//! socket as a kill switch, for whoever watches over the calls.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use amiquip::{
    AmqpProperties, AmqpValue, Auth, Channel, Confirm, Connection, ConnectionBlockedNotification,
    ConnectionOptions, ConnectionTuning, ExchangeDeclareOptions, ExchangeType, FieldTable,
    IoStream, Publish, QueueDeclareOptions, Return,
};
use anyhow::{Context, anyhow};
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use serde_json::{Map, Number, Value};
use thiserror::Error;
use uuid::Uuid;

use self::guarded_stream::GuardedStream;
use self::intake::{GatedStream, Intake};
use self::tls_stream::TlsStream;
use crate::busy::Busy;
use crate::config::{self, CONNECT_TIMEOUT};
use crate::overview::Depth;
use crate::tls::Tls;
use crate::wire::{
    CANCELS_QUEUE, DEAD_LETTERS_QUEUE, OMOTES_EXCHANGE, Outgoing, PIDBOX_EXCHANGE,
    SUBMISSIONS_QUEUE, TASK_QUEUE_MAX_PRIORITY,
};

mod consuming;
pub mod dead_letters;
mod guarded_stream;
pub mod inspection;
pub mod intake;
mod questions;
mod readable;
mod tls_stream;
mod unacked;

pub use self::consuming::{Handled, Received, consume};

/// Seconds between heartbeats; a silent network is noticed after twice as long.
const HEARTBEAT_SECONDS: u16 = 10;
/// How long the broker may take over anything it is asked; a blocked one takes for ever.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// The library, as it names itself in the log.
pub const LIBRARY: &str = "amiquip";
/// AMQP's PRECONDITION_FAILED: a message above the size limit, a queue with other arguments.
const PRECONDITION_FAILED: u16 = 406;
/// AMQP's NOT_FOUND.
const NOT_FOUND: u16 = 404;
/// What it means that RabbitMQ gives a type to a queue that names none, as no OMOTES service does.
const DEFAULT_QUEUE_TYPE: &str = "the vhost's default queue type is not classic, as OMOTES needs it: \
     rabbitmqctl update_vhost_metadata VHOST --default-queue-type classic changes that, and where \
     RabbitMQ has no such command, making the vhost anew with rabbitmqctl add_vhost";
/// AMQP's RESOURCE_LOCKED: a queue is somebody's alone.
const RESOURCE_LOCKED: u16 = 405;
/// AMQP's ACCESS_REFUSED, no rights on a queue, and RESOURCE_LOCKED.
const NOT_OURS: [u16; 2] = [403, RESOURCE_LOCKED];
/// What to look at when a broker takes connections and nothing comes of them. One that has to recover
/// more queues than it may open files stays like that.
const STUCK: &str = "RabbitMQ may be recovering its queues, or be short of file descriptors: see its \
                     log, `rabbitmqctl status`, and `ulimit -n` where it runs";
/// How fast messages reach the broker at least, in bytes per second; slower counts as not at all.
const SLOWEST_PUBLISHING: u64 = 1024 * 1024;

/// One connection to a vhost.
pub struct Link {
    /// `<name> (<user>@<host>:<port>/<vhost>)`, for messages.
    name: String,
    /// Opening a channel needs the connection for itself.
    connection: Mutex<Connection>,
    kill_switch: TcpStream,
    blocked: Receiver<ConnectionBlockedNotification>,
    /// Where what is consumed here counts.
    intake: Option<Arc<Intake>>,
}

impl Link {
    /// Connects; `purpose` names the link in messages and in RabbitMQ's management page.
    ///
    /// # Errors
    /// The host does not resolve or answer within [`CONNECT_TIMEOUT`], or refuses the user or the
    /// vhost.
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
        let name = format!("{purpose} ({config})");
        let (connection, kill_switch, blocked) = open(config, purpose, intake)
            .with_context(|| format!("connecting to RabbitMQ for {name}"))?;
        Ok(Link {
            name,
            connection: Mutex::new(connection),
            kill_switch,
            blocked,
            intake: intake.cloned(),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Ends the connection at once and frees every call that is blocked on it.
    pub fn kill(&self) {
        // It fails when the connection is gone already, which is as good.
        let _ = self.kill_switch.shutdown(Shutdown::Both);
    }

    /// Why the broker blocks this connection, if the latest word is that it does; None when there
    /// is no news.
    pub fn blocked_news(&self) -> Option<Option<String>> {
        self.blocked.try_iter().last().map(|news| match news {
            ConnectionBlockedNotification::Blocked(reason) => Some(reason),
            ConnectionBlockedNotification::Unblocked => None,
        })
    }

    /// Closes the connection in good order.
    ///
    /// # Errors
    /// What ended the connection, if it was ended before.
    pub fn close(self) -> anyhow::Result<()> {
        let connection = self
            .connection
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        connection.close().context(self.name)
    }

    /// The same, in good order only if that takes no longer than `deadline`.
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

    /// Asks for an answer.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn check(&self) -> anyhow::Result<()> {
        let channel = self.channel().with_context(|| self.name.clone())?;
        channel.close().with_context(|| self.name.clone())
    }

    fn channel(&self) -> Result<Channel, amiquip::Error> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .open_channel(None)
    }

    /// Declares what clients rely on.
    ///
    /// # Errors
    /// Somebody declared one of them otherwise, or the connection is lost.
    pub fn declare_for_clients(&self) -> anyhow::Result<()> {
        let channel = self.channel()?;
        let options = ExchangeDeclareOptions::default();
        channel.exchange_declare(ExchangeType::Direct, OMOTES_EXCHANGE, options)?;
        for queue in [SUBMISSIONS_QUEUE, CANCELS_QUEUE] {
            let options = durable(FieldTable::new());
            channel.queue_declare(queue, options).map_err(explained)?;
            channel.queue_bind(queue, OMOTES_EXCHANGE, queue, FieldTable::new())?;
        }
        channel.close().context("declaring the queues of clients")
    }

    /// Declares what workers send their events to.
    ///
    /// # Errors
    /// As [`Link::declare_for_clients`].
    pub fn declare_for_workers(&self, queues: &[&str]) -> anyhow::Result<()> {
        let channel = self.channel()?;
        for queue in queues {
            let options = durable(FieldTable::new());
            channel.queue_declare(*queue, options).map_err(explained)?;
        }
        channel.close().context("declaring the queues of workers")
    }

    /// Declares the exchange through which workers hear revokes.
    ///
    /// # Errors
    /// As [`Link::declare_for_clients`].
    pub fn declare_pidbox(&self) -> anyhow::Result<()> {
        let channel = self.channel()?;
        let options = ExchangeDeclareOptions::default();
        channel.exchange_declare(ExchangeType::Fanout, PIDBOX_EXCHANGE, options)?;
        channel
            .close()
            .context("declaring Celery's exchange for remote control")
    }

    fn declare_task_queue(&self, queue: &str) -> Result<(), PublishError> {
        let priority = AmqpValue::LongInt(TASK_QUEUE_MAX_PRIORITY);
        let arguments = FieldTable::from([("x-max-priority".to_owned(), priority)]);
        match self.declare(queue, durable(arguments)) {
            Ok(_) => Ok(()),
            Err(error) => Err(match closed(&error) {
                Some((code, message)) => task_queue_refusal(queue, code, message),
                None => self.lost(error, "declaring a task queue"),
            }),
        }
    }

    /// Declares where the messages of this vhost go that cannot be handled. One that somebody
    /// declared otherwise is as good.
    ///
    /// # Errors
    /// [`PublishError::Unavailable`] with what the broker says where that is not possible.
    pub fn declare_dead_letters(&self) -> Result<(), PublishError> {
        match self.declare(DEAD_LETTERS_QUEUE, durable(FieldTable::new())) {
            Ok(_) => Ok(()),
            Err(error) => match closed(&error) {
                Some((PRECONDITION_FAILED, _)) => Ok(()),
                Some((_, message)) => Err(PublishError::Unavailable(message.to_owned())),
                None => Err(self.lost(error, "declaring the queue of dead letters")),
            },
        }
    }

    /// Declares a queue, on a channel of its own, since a refusal closes it. Returns its name.
    fn declare(&self, queue: &str, options: QueueDeclareOptions) -> Result<String, amiquip::Error> {
        let channel = self.channel()?;
        let name = channel.queue_declare(queue, options)?.name().to_owned();
        channel.close()?;
        Ok(name)
    }

    /// Declares a client's own queue: durable, bound to the exchange under its own name, and gone
    /// when unused for `expires`.
    ///
    /// # Errors
    /// As [`Link::declare_for_clients`].
    pub fn declare_client_queue(&self, queue: &str, expires: Duration) -> anyhow::Result<()> {
        let channel = self.channel()?;
        let expires = i64::try_from(expires.as_millis()).unwrap_or(i64::MAX);
        let arguments =
            FieldTable::from([("x-expires".to_owned(), AmqpValue::LongLongInt(expires))]);
        channel.queue_declare(queue, durable(arguments))?;
        channel.queue_bind(queue, OMOTES_EXCHANGE, queue, FieldTable::new())?;
        channel.close().context("declaring a client's queue")
    }

    /// Declares a queue of this connection alone, bound to a key of an exchange, and returns its
    /// name.
    ///
    /// # Errors
    /// As [`Link::declare_for_clients`].
    pub fn declare_private_queue(&self, exchange: &str, key: &str) -> anyhow::Result<String> {
        let channel = self.channel()?;
        let options = exclusive(FieldTable::new());
        let queue = channel.queue_declare("", options)?.name().to_owned();
        channel.queue_bind(queue.as_str(), exchange, key, FieldTable::new())?;
        channel.close().context("declaring a private queue")?;
        Ok(queue)
    }

    /// Tries to get a queue of this name for this connection alone; where somebody has left one that
    /// is nobody's alone, that is as good. With it comes a mark that others find ([`Mark`]).
    ///
    /// # Errors
    /// The connection is lost.
    pub fn claim_queue(&self, queue: &str, mark: Mark) -> anyhow::Result<Claim> {
        let claimed = self.claim(queue, mark);
        claimed.or_else(|error| match closed(&error) {
            Some((_, message)) => Ok(Claim::Refused(message.to_owned())),
            None => Err(anyhow!(error).context(format!("{}: {queue}", self.name))),
        })
    }

    fn claim(&self, queue: &str, mark: Mark) -> Result<Claim, amiquip::Error> {
        match self.declare(queue, exclusive(FieldTable::new())) {
            Ok(_) => {}
            Err(error) => {
                let Some((RESOURCE_LOCKED | PRECONDITION_FAILED, _)) = closed(&error) else {
                    return Err(error);
                };
                let channel = self.channel()?;
                match channel.queue_declare_passive(queue) {
                    Ok(_) => channel.close()?,
                    // What was said first says more.
                    Err(again) if closed(&again).is_some() => return Err(error),
                    Err(lost) => return Err(lost),
                }
            }
        }
        // It takes messages and keeps none.
        let nothing = [("x-max-length".to_owned(), AmqpValue::LongInt(0))];
        let channel = self.channel()?;
        let options = exclusive(FieldTable::from(nothing));
        let marker = channel.queue_declare("", options)?.name().to_owned();
        channel.queue_bind(marker.as_str(), mark.exchange, mark.key, FieldTable::new())?;
        channel.close()?;
        Ok(Claim::Held { marker })
    }

    /// How full these queues are, and who takes from them; None where there is no such queue, or
    /// none that may be looked at.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn depths(&self, queues: &[&str]) -> anyhow::Result<Vec<Option<Depth>>> {
        let mut depths = Vec::with_capacity(queues.len());
        let mut channel = self.channel()?;
        for queue in queues {
            depths.push(match channel.queue_declare_passive(*queue) {
                Ok(declared) => Some(Depth {
                    messages: declared.declared_message_count().unwrap_or_default(),
                    consumers: declared.declared_consumer_count().unwrap_or_default(),
                }),
                // A refusal closes the channel. Of a queue that is somebody's alone nothing is told.
                Err(amiquip::Error::ServerClosedChannel { code, .. })
                    if code == NOT_FOUND || NOT_OURS.contains(&code) =>
                {
                    channel = self.channel()?;
                    None
                }
                Err(error) => return Err(error).context(format!("{}: {queue}", self.name)),
            });
        }
        channel.close().context("looking at queues")?;
        Ok(depths)
    }

    /// Deletes a queue that this program declared.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn delete_queue(&self, queue: &str) -> anyhow::Result<()> {
        let channel = self.channel()?;
        channel.queue_delete(queue, Default::default())?;
        channel.close().context("deleting a queue")
    }

    fn lost(&self, error: amiquip::Error, during: &str) -> PublishError {
        PublishError::Lost(anyhow!(error).context(format!("{}: {during}", self.name)))
    }
}

/// Runs `body`, and `kill` when it takes too long, which is to free every call that it waits in.
///
/// # Errors
/// Those of `body`.
pub fn within_deadline<T>(
    time: Duration,
    kill: impl FnOnce() + Send,
    body: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let (done, is_done) = bounded::<Infallible>(0);
    thread::scope(|scope| {
        thread::Builder::new()
            .name("deadline".to_owned())
            .spawn_scoped(scope, move || {
                if let Err(RecvTimeoutError::Timeout) = is_done.recv_timeout(time) {
                    kill();
                }
            })?;
        let outcome = body();
        drop(done);
        outcome
    })
}

fn open(
    config: &config::RabbitMq,
    purpose: &str,
    intake: Option<&Arc<Intake>>,
) -> anyhow::Result<(
    Connection,
    TcpStream,
    Receiver<ConnectionBlockedNotification>,
)> {
    // Before anything is asked of the network.
    let tls = config.tls.as_ref().map(Tls::client_config).transpose()?;
    let addresses = (config.host.as_str(), config.port).to_socket_addrs()?;
    let mut last_error = anyhow!("{} has no address", config.host);
    for address in addresses {
        let stream = match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(stream) => stream,
            Err(error) => {
                last_error = anyhow!(error).context(address);
                continue;
            }
        };
        // amiquip never sets it, and without it a confirm takes 44 ms.
        stream.set_nodelay(true)?;
        let kill_switch = stream.try_clone()?;
        let options = ConnectionOptions::default()
            .auth(Auth::Plain {
                username: config.username.clone(),
                password: config.password.reveal().to_owned(),
            })
            .virtual_host(config.vhost.as_str())
            .heartbeat(HEARTBEAT_SECONDS)
            .connection_timeout(Some(CONNECT_TIMEOUT))
            .information(Some(format!("omotes-orchestrator {purpose}")));
        let mut connection = match tls {
            None => {
                let stream = mio_of_amiquip::net::TcpStream::from_stream(stream)?;
                speak(stream, options, intake).with_context(|| address.to_string())?
            }
            Some(tls) => {
                let stream = TlsStream::open(stream, &config.host, tls, CONNECT_TIMEOUT)
                    .with_context(|| format!("TLS with {address}"))?;
                speak(stream, options, intake).with_context(|| address.to_string())?
            }
        };
        let blocked = connection.listen_for_connection_blocked()?;
        return Ok((connection, kill_switch, blocked));
    }
    Err(last_error)
}

fn speak<S: IoStream>(
    stream: S,
    options: ConnectionOptions<Auth>,
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
            anyhow!("no end of the AMQP handshake: nothing for {CONNECT_TIMEOUT:?}; {STUCK}")
        }
        error => error.into(),
    })
}

fn durable(arguments: FieldTable) -> QueueDeclareOptions {
    QueueDeclareOptions {
        durable: true,
        arguments,
        ..QueueDeclareOptions::default()
    }
}

fn exclusive(arguments: FieldTable) -> QueueDeclareOptions {
    QueueDeclareOptions {
        exclusive: true,
        arguments,
        ..QueueDeclareOptions::default()
    }
}

/// The code and what the broker said when it closed the channel because of what it was asked.
fn closed(error: &amiquip::Error) -> Option<(u16, &str)> {
    match error {
        amiquip::Error::ServerClosedChannel { code, message, .. } => Some((*code, message)),
        _ => None,
    }
}

/// What it said because a message or an argument is not as it should be.
fn refusal(error: &amiquip::Error) -> Option<&str> {
    closed(error)
        .filter(|(code, _)| *code == PRECONDITION_FAILED)
        .map(|(_, message)| message)
}

/// Whether that is because the vhost has a default queue type. A queue is refused then that takes
/// priorities, which a quorum queue does not, and any that exists as a classic one.
fn is_default_queue_type(message: &str) -> bool {
    let no_priorities = message.contains("invalid arg 'x-max-priority'")
        && message.contains("of queue type rabbit_");
    no_priorities || message.contains("inequivalent arg 'x-queue-type'")
}

/// The error of a declaration, with what to do about it where that is known.
fn explained(error: amiquip::Error) -> anyhow::Error {
    match closed(&error) {
        Some((PRECONDITION_FAILED, message)) if is_default_queue_type(message) => {
            anyhow!(error).context(DEFAULT_QUEUE_TYPE)
        }
        Some(_) | None => anyhow!(error),
    }
}

/// What it means that the broker refuses to declare a task queue.
fn task_queue_refusal(queue: &str, code: u16, message: &str) -> PublishError {
    match code {
        // It exists, on a node of the cluster that is not there.
        NOT_FOUND => PublishError::Unavailable(format!("it is not available: {message}")),
        PRECONDITION_FAILED if is_default_queue_type(message) => PublishError::Refused(format!(
            "the task queue {queue:?} cannot be declared with x-max-priority = \
                 {TASK_QUEUE_MAX_PRIORITY}, as its workers do: {DEFAULT_QUEUE_TYPE} ({message})"
        )),
        PRECONDITION_FAILED => PublishError::Refused(format!(
            "the task queue {queue:?} exists, but not as durable with x-max-priority = \
             {TASK_QUEUE_MAX_PRIORITY}: {message}"
        )),
        _ => PublishError::Refused(format!("the task queue {queue:?} is not ours: {message}")),
    }
}

/// Whether this connection has a queue that others want too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    Held {
        /// The queue that is its mark.
        marker: String,
    },
    /// What the broker says: most often that it is somebody's alone.
    Refused(String),
}

/// Where a mandatory message is not returned while somebody holds a claim. So others need not ask
/// for the queue itself, which RabbitMQ logs as an error each time.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    pub exchange: &'static str,
    pub key: &'static str,
}

/// What became of a message that the broker confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivered {
    Yes,
    /// It was mandatory, and no queue is bound to its key.
    Unroutable,
    /// A queue does not take it, because it is full or failed.
    Rejected,
}

#[derive(Debug, Error)]
pub enum PublishError {
    /// The broker does not take one of the messages for what it is. Which of the others arrived
    /// is open. The publisher can be used again.
    #[error("{0}")]
    Refused(String),
    /// A queue is not available for now, and may be later.
    #[error("{0}")]
    Unavailable(String),
    /// The connection is of no more use.
    #[error(transparent)]
    Lost(anyhow::Error),
}

/// Publishes with confirms, on a channel of its own.
pub struct Publisher<'l> {
    link: &'l Link,
    busy: &'l Busy,
    /// None after a refusal, which closes the channel.
    open: Option<OpenChannel>,
    /// Tags, as the broker counts them, of messages that it has not confirmed yet.
    pending: BTreeSet<u64>,
    /// By what each message of the batch is recognised when it comes back.
    ids: Vec<Option<String>>,
    /// How much longer than usual the broker may take over the batch, for its size.
    allowance: Duration,
}

struct OpenChannel {
    channel: Channel,
    confirms: Receiver<Confirm>,
    returns: Receiver<Return>,
    published: u64,
}

impl<'l> Publisher<'l> {
    /// `busy` tells a watchdog since when a call has been waiting.
    pub fn new(link: &'l Link, busy: &'l Busy) -> Publisher<'l> {
        Publisher {
            link,
            busy,
            open: None,
            pending: BTreeSet::new(),
            ids: Vec::new(),
            allowance: Duration::ZERO,
        }
    }

    /// Declares a task queue as the workers do.
    ///
    /// # Errors
    /// [`PublishError::Refused`] when somebody declared it with other arguments,
    /// [`PublishError::Unavailable`] while its node in a cluster is down.
    pub fn declare_task_queue(&self, queue: &str) -> Result<(), PublishError> {
        self.busy.touch();
        let declared = self.link.declare_task_queue(queue);
        self.busy.idle();
        declared
    }

    /// As [`Link::declare_dead_letters`].
    ///
    /// # Errors
    /// The same.
    pub fn declare_dead_letters(&self) -> Result<(), PublishError> {
        self.busy.touch();
        let declared = self.link.declare_dead_letters();
        self.busy.idle();
        declared
    }

    /// Puts messages back at the end of the queue that they came from, as they were: what became
    /// of each copy.
    ///
    /// # Errors
    /// As [`PublishError`].
    pub fn put_back(
        &mut self,
        queue: &str,
        messages: &[&Received],
    ) -> Result<Vec<Delivered>, PublishError> {
        let publishes = messages.iter().map(|message| {
            let publish = Publish {
                body: &message.body,
                routing_key: queue.to_owned(),
                mandatory: true,
                immediate: false,
                properties: republished(&message.properties),
            };
            ("", publish)
        });
        self.send_with_deadline(messages.iter().map(|message| message.body.len()), publishes)?;
        self.confirm()
    }

    /// Publishes these messages and waits for the broker's confirms: what became of each.
    ///
    /// # Errors
    /// As [`PublishError`].
    pub fn publish(&mut self, messages: &[Outgoing]) -> Result<Vec<Delivered>, PublishError> {
        self.send(messages)?;
        self.confirm()
    }

    /// Publishes these messages to the queues that are named as their keys, whatever their exchange
    /// is, and waits for the broker's confirms: what became of each.
    ///
    /// # Errors
    /// As [`PublishError`].
    pub fn publish_to_queues(
        &mut self,
        messages: &[&Outgoing],
    ) -> Result<Vec<Delivered>, PublishError> {
        let publishes = messages.iter().map(|message| ("", to_publish(message)));
        self.send_with_deadline(messages.iter().map(|message| message.body.len()), publishes)?;
        self.confirm()
    }

    /// Sends these messages without waiting; [`Publisher::confirm`] must follow.
    ///
    /// # Errors
    /// As [`PublishError`].
    pub fn send(&mut self, messages: &[Outgoing]) -> Result<(), PublishError> {
        let publishes = messages
            .iter()
            .map(|message| (message.exchange, to_publish(message)));
        self.send_with_deadline(messages.iter().map(|message| message.body.len()), publishes)
    }

    /// Sends messages, each with its exchange; they may take longer the more bytes they have.
    fn send_with_deadline<'m>(
        &mut self,
        bytes: impl Iterator<Item = usize>,
        messages: impl ExactSizeIterator<Item = (&'m str, Publish<'m>)>,
    ) -> Result<(), PublishError> {
        self.pending.clear();
        self.ids.clear();
        self.allowance = Duration::from_secs(bytes.sum::<usize>() as u64 / SLOWEST_PUBLISHING);
        if messages.len() == 0 {
            return Ok(());
        }
        self.busy.touch_for(self.allowance);
        let sent = self.send_all(messages);
        self.busy.idle();
        sent.map_err(|error| self.fail(Some(error)))
    }

    fn send_all<'m>(
        &mut self,
        messages: impl Iterator<Item = (&'m str, Publish<'m>)>,
    ) -> Result<(), amiquip::Error> {
        let open = match &mut self.open {
            Some(open) => open,
            none => none.insert(OpenChannel::new(self.link)?),
        };
        for (exchange, publish) in messages {
            self.ids.push(return_id(&publish.properties).cloned());
            open.channel.basic_publish(exchange, publish)?;
            open.published += 1;
            self.pending.insert(open.published);
            self.busy.touch_for(self.allowance);
        }
        Ok(())
    }

    /// Waits for the confirms of the messages sent: what became of each.
    ///
    /// # Errors
    /// As [`PublishError`]; also when none comes for [`DEADLINE`].
    pub fn confirm(&mut self) -> Result<Vec<Delivered>, PublishError> {
        let mut outcome = vec![Delivered::Yes; self.ids.len()];
        let Some(open) = &self.open else {
            return Ok(outcome);
        };
        let first = (open.published + 1).saturating_sub(self.ids.len() as u64);
        while !self.pending.is_empty() {
            self.busy.touch_for(self.allowance);
            let confirm = open.confirms.recv_timeout(DEADLINE + self.allowance);
            self.busy.idle();
            match confirm {
                Ok(Confirm::Ack(ack)) => {
                    if ack.multiple {
                        self.pending = self.pending.split_off(&(ack.delivery_tag + 1));
                    } else {
                        self.pending.remove(&ack.delivery_tag);
                    }
                }
                Ok(Confirm::Nack(nack)) => {
                    let rejected: Vec<_> = if nack.multiple {
                        self.pending.range(..=nack.delivery_tag).copied().collect()
                    } else {
                        vec![nack.delivery_tag]
                    };
                    for tag in rejected {
                        let index = tag.checked_sub(first).map(usize::try_from);
                        if self.pending.remove(&tag)
                            && let Some(Ok(index)) = index
                        {
                            outcome[index] = Delivered::Rejected;
                        }
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(PublishError::Lost(anyhow!(
                        "{}: no confirm within {:?}",
                        self.link.name,
                        DEADLINE + self.allowance
                    )));
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.fail(None)),
            }
        }
        // A message that comes back does so before its confirm.
        for returned in open.returns.try_iter() {
            // Of those without an id, any may have come back. Of ours, only those without one that
            // are put back are mandatory.
            let id = return_id(&returned.properties);
            for (outcome, own) in outcome.iter_mut().zip(&self.ids) {
                if own.as_ref() == id {
                    *outcome = Delivered::Unroutable;
                }
            }
        }
        Ok(outcome)
    }

    /// Gives up whatever is not confirmed yet, after a refusal on another connection: what becomes
    /// of it must not be taken for the next batch's.
    pub fn abandon(&mut self) {
        self.pending.clear();
        if let Some(open) = self.open.take() {
            self.busy.touch_for(self.allowance);
            // A refusal of what is given up is of no interest.
            let _ = open.channel.close();
            self.busy.idle();
        }
    }

    /// Finds out why the channel is gone, and gives it up.
    fn fail(&mut self, error: Option<amiquip::Error>) -> PublishError {
        let closed = self.open.take().map(|open| {
            self.busy.touch();
            let closed = open.channel.close();
            self.busy.idle();
            closed
        });
        // The broker's reason is told once, to whichever call comes first.
        let error = match (error, closed) {
            (Some(error), _) if refusal(&error).is_some() => error,
            (_, Some(Err(closed))) if refusal(&closed).is_some() => closed,
            (Some(error), _) | (None, Some(Err(error))) => error,
            (None, Some(Ok(())) | None) => amiquip::Error::ClientClosedChannel,
        };
        match refusal(&error) {
            Some(message) => PublishError::Refused(format!("the broker refuses it: {message}")),
            None => self.link.lost(error, "publishing"),
        }
    }
}

impl OpenChannel {
    fn new(link: &Link) -> Result<OpenChannel, amiquip::Error> {
        let channel = link.channel()?;
        let confirms = channel.listen_for_publisher_confirms()?;
        let returns = channel.listen_for_returns()?;
        channel.enable_publisher_confirms()?;
        Ok(OpenChannel {
            channel,
            confirms,
            returns,
            published: 0,
        })
    }
}

/// By what a message is recognised when it comes back.
fn return_id(properties: &AmqpProperties) -> Option<&String> {
    let correlation_id = properties.correlation_id().as_ref();
    properties.message_id().as_ref().or(correlation_id)
}

/// The properties of a received message as they are published once more: without its user id, which
/// the broker takes from that user alone, and without the copies that its sender has asked for.
fn republished(original: &AmqpProperties) -> AmqpProperties {
    type Copy = fn(&AmqpProperties, AmqpProperties) -> Option<AmqpProperties>;
    let copies: [Copy; 11] = [
        |from, to| Some(to.with_content_type(from.content_type().clone()?)),
        |from, to| Some(to.with_content_encoding(from.content_encoding().clone()?)),
        |from, to| Some(to.with_delivery_mode((*from.delivery_mode())?)),
        |from, to| Some(to.with_priority((*from.priority())?)),
        |from, to| Some(to.with_correlation_id(from.correlation_id().clone()?)),
        |from, to| Some(to.with_reply_to(from.reply_to().clone()?)),
        |from, to| Some(to.with_expiration(from.expiration().clone()?)),
        |from, to| Some(to.with_message_id(from.message_id().clone()?)),
        |from, to| Some(to.with_timestamp((*from.timestamp())?)),
        |from, to| Some(to.with_type_(from.type_().clone()?)),
        |from, to| Some(to.with_app_id(from.app_id().clone()?)),
    ];
    let properties = AmqpProperties::default();
    let properties = copies.iter().fold(properties, |properties, copy| {
        copy(original, properties.clone()).unwrap_or(properties)
    });
    match original.headers() {
        None => properties,
        Some(headers) => properties.with_headers(without_copies(headers.clone())),
    }
}

/// Headers without those that make RabbitMQ deliver a message to other queues too.
fn without_copies(mut headers: FieldTable) -> FieldTable {
    for name in ["CC", "BCC"] {
        headers.remove(name);
    }
    headers
}

fn to_publish(message: &Outgoing) -> Publish<'_> {
    Publish {
        body: &message.body,
        routing_key: message.routing_key.clone(),
        mandatory: message.mandatory,
        immediate: false,
        properties: properties(message),
    }
}

fn properties(message: &Outgoing) -> AmqpProperties {
    let mut properties = AmqpProperties::default()
        .with_delivery_mode(2)
        .with_priority(message.priority)
        .with_headers(json_to_table(&message.headers));
    if message.with_message_id {
        properties = properties.with_message_id(Uuid::new_v4().simple().to_string());
    }
    if let Some(content_type) = message.content_type {
        properties = properties.with_content_type(content_type.to_owned());
    }
    if let Some(encoding) = message.content_encoding {
        properties = properties.with_content_encoding(encoding.to_owned());
    }
    if let Some(id) = &message.correlation_id {
        properties = properties.with_correlation_id(id.clone());
    }
    if let Some(queue) = &message.reply_to {
        properties = properties.with_reply_to(queue.clone());
    }
    properties
}

fn json_to_table(object: &Map<String, Value>) -> FieldTable {
    object
        .iter()
        .map(|(key, value)| (key.clone(), json_to_amqp(value)))
        .collect()
}

fn json_to_amqp(value: &Value) -> AmqpValue {
    match value {
        Value::Null => AmqpValue::Void,
        Value::Bool(value) => AmqpValue::Boolean(*value),
        // As Celery's library does: the smaller integer where it fits.
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(number), _) => {
                i32::try_from(number).map_or(AmqpValue::LongLongInt(number), AmqpValue::LongInt)
            }
            (None, Some(number)) => AmqpValue::Double(number),
            (None, None) => AmqpValue::Void,
        },
        Value::String(text) => AmqpValue::LongString(text.clone()),
        Value::Array(items) => AmqpValue::FieldArray(items.iter().map(json_to_amqp).collect()),
        Value::Object(object) => AmqpValue::FieldTable(json_to_table(object)),
    }
}

fn table_to_json(table: &FieldTable) -> Value {
    table
        .iter()
        .map(|(key, value)| (key.clone(), amqp_to_json(value)))
        .collect::<Map<_, _>>()
        .into()
}

fn amqp_to_json(value: &AmqpValue) -> Value {
    match value {
        AmqpValue::Boolean(value) => (*value).into(),
        AmqpValue::ShortShortInt(number) => (*number).into(),
        AmqpValue::ShortShortUInt(number) => (*number).into(),
        AmqpValue::ShortInt(number) => (*number).into(),
        AmqpValue::ShortUInt(number) => (*number).into(),
        AmqpValue::LongInt(number) => (*number).into(),
        AmqpValue::LongUInt(number) => (*number).into(),
        AmqpValue::LongLongInt(number) => (*number).into(),
        AmqpValue::Float(number) => double(f64::from(*number)),
        AmqpValue::Double(number) => double(*number),
        AmqpValue::DecimalValue(decimal) => format!("{decimal:?}").into(),
        AmqpValue::LongString(text) => text.as_str().into(),
        AmqpValue::FieldArray(items) => items.iter().map(amqp_to_json).collect::<Vec<_>>().into(),
        AmqpValue::Timestamp(seconds) => (*seconds).into(),
        AmqpValue::FieldTable(table) => table_to_json(table),
        AmqpValue::ByteArray(bytes) => String::from_utf8_lossy(bytes).into(),
        AmqpValue::Void => Value::Null,
    }
}

/// JSON has no NaN and no infinity; their names have to do.
fn double(number: f64) -> Value {
    Number::from_f64(number).map_or_else(|| number.to_string().into(), Value::Number)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// What RabbitMQ says; the first four are of RabbitMQ 3.10.
    #[rstest]
    #[case::no_priorities(
        406,
        "PRECONDITION_FAILED - invalid arg 'x-max-priority' for queue 'w' in vhost 'v' of queue type \
         rabbit_quorum_queue",
        "default queue type"
    )]
    #[case::exists_as_classic(
        406,
        "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'w' in vhost 'v': received \
         'quorum' but current is 'classic'",
        "default queue type"
    )]
    #[case::other_arguments(
        406,
        "PRECONDITION_FAILED - inequivalent arg 'x-max-priority' for queue 'w' in vhost 'v': received \
         the value '10' of type 'signedint' but current is none",
        "exists, but not as durable"
    )]
    #[case::somebodys_alone(
        405,
        "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'w' in vhost 'v'",
        "is not ours"
    )]
    #[case::no_rights(403, "ACCESS_REFUSED - access to queue 'w' refused", "is not ours")]
    fn a_task_queue_that_is_refused_is_explained(
        #[case] code: u16,
        #[case] message: &str,
        #[case] expected: &str,
    ) {
        match task_queue_refusal("w", code, message) {
            PublishError::Refused(why) => {
                assert!(why.contains(expected), "{why}");
                assert!(why.contains("the task queue \"w\""), "{why}");
                assert!(why.contains(message), "{why}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[rstest]
    #[case(
        "NOT_FOUND - home node 'rabbit@b' of durable queue 'w' in vhost 'v' is down or inaccessible"
    )]
    #[case("NOT_FOUND - queue 'w' in vhost 'v' process is stopped by supervisor")]
    fn a_task_queue_that_is_not_there_may_come_back(#[case] message: &str) {
        let refusal = task_queue_refusal("w", 404, message);
        assert!(
            matches!(refusal, PublishError::Unavailable(_)),
            "{refusal:?}"
        );
    }

    #[test]
    fn what_goes_back_goes_nowhere_else() {
        let headers = ["CC", "BCC", "kept"].map(|name| (name.to_owned(), AmqpValue::Void));
        let original = AmqpProperties::default()
            .with_user_id("somebody".to_owned())
            .with_message_id("id".to_owned())
            .with_priority(3)
            .with_headers(FieldTable::from(headers));
        let kept = FieldTable::from([("kept".to_owned(), AmqpValue::Void)]);
        let expected = AmqpProperties::default()
            .with_message_id("id".to_owned())
            .with_priority(3)
            .with_headers(kept);
        assert_eq!(republished(&original), expected);
    }
}
