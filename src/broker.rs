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
/// AMQP's ACCESS_REFUSED and RESOURCE_LOCKED: no rights on a queue, or somebody's alone.
const NOT_OURS: [u16; 2] = [403, 405];
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
            channel.queue_declare(queue, durable(FieldTable::new()))?;
            channel.queue_bind(queue, OMOTES_EXCHANGE, queue, FieldTable::new())?;
        }
        channel.queue_declare(DEAD_LETTERS_QUEUE, durable(FieldTable::new()))?;
        channel.close().context("declaring the queues of clients")
    }

    /// Declares what workers send their events to.
    ///
    /// # Errors
    /// As [`Link::declare_for_clients`].
    pub fn declare_for_workers(&self, queues: &[&str]) -> anyhow::Result<()> {
        let channel = self.channel()?;
        for queue in queues.iter().chain([&DEAD_LETTERS_QUEUE]) {
            channel.queue_declare(*queue, durable(FieldTable::new()))?;
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
        // On a channel of its own, since a refusal closes it.
        let declare = || {
            let channel = self.channel()?;
            let priority = AmqpValue::LongInt(TASK_QUEUE_MAX_PRIORITY);
            let arguments = FieldTable::from([("x-max-priority".to_owned(), priority)]);
            channel.queue_declare(queue, durable(arguments))?;
            channel.close()
        };
        declare().map_err(|error: amiquip::Error| match &error {
            amiquip::Error::ServerClosedChannel { code, message, .. }
                if NOT_OURS.contains(code) =>
            {
                PublishError::Refused(format!("the task queue {queue:?} is not ours: {message}"))
            }
            _ => match refusal(&error) {
                Some(message) => PublishError::Refused(format!(
                    "the task queue {queue:?} exists, but not as durable with x-max-priority = \
                     {TASK_QUEUE_MAX_PRIORITY}: {message}"
                )),
                None => self.lost(error, "declaring a task queue"),
            },
        })
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
        let options = QueueDeclareOptions {
            exclusive: true,
            ..QueueDeclareOptions::default()
        };
        let queue = channel.queue_declare("", options)?.name().to_owned();
        channel.queue_bind(queue.as_str(), exchange, key, FieldTable::new())?;
        channel.close().context("declaring a private queue")?;
        Ok(queue)
    }

    /// How full these queues are, and who takes from them; None where there is no such queue.
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
                // A refusal closes the channel.
                Err(amiquip::Error::ServerClosedChannel { code, .. }) if code == NOT_FOUND => {
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

/// What the broker said when it closed the channel because of what it was asked.
fn refusal(error: &amiquip::Error) -> Option<&str> {
    match error {
        amiquip::Error::ServerClosedChannel { code, message, .. }
            if *code == PRECONDITION_FAILED =>
        {
            Some(message)
        }
        _ => None,
    }
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
    /// [`PublishError::Refused`] when somebody declared it with other arguments.
    pub fn declare_task_queue(&self, queue: &str) -> Result<(), PublishError> {
        self.busy.touch();
        let declared = self.link.declare_task_queue(queue);
        self.busy.idle();
        declared
    }

    /// Publishes these messages and waits for the broker's confirms: what became of each.
    ///
    /// # Errors
    /// As [`PublishError`].
    pub fn publish(&mut self, messages: &[Outgoing]) -> Result<Vec<Delivered>, PublishError> {
        self.send(messages)?;
        self.confirm()
    }

    /// Sends these messages without waiting; [`Publisher::confirm`] must follow.
    ///
    /// # Errors
    /// As [`PublishError`].
    pub fn send(&mut self, messages: &[Outgoing]) -> Result<(), PublishError> {
        self.pending.clear();
        self.ids.clear();
        let bytes: usize = messages.iter().map(|message| message.body.len()).sum();
        self.allowance = Duration::from_secs(bytes as u64 / SLOWEST_PUBLISHING);
        if messages.is_empty() {
            return Ok(());
        }
        self.busy.touch_for(self.allowance);
        let sent = self.send_all(messages);
        self.busy.idle();
        sent.map_err(|error| self.fail(Some(error)))
    }

    fn send_all(&mut self, messages: &[Outgoing]) -> Result<(), amiquip::Error> {
        let open = match &mut self.open {
            Some(open) => open,
            none => none.insert(OpenChannel::new(self.link)?),
        };
        for message in messages {
            let properties = properties(message);
            self.ids.push(return_id(&properties).cloned());
            let publish = Publish {
                body: &message.body,
                routing_key: message.routing_key.clone(),
                mandatory: message.mandatory,
                immediate: false,
                properties,
            };
            open.channel.basic_publish(message.exchange, publish)?;
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
            let id = return_id(&returned.properties);
            for (outcome, own) in outcome.iter_mut().zip(&self.ids) {
                if own.is_some() && own.as_ref() == id {
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
