//! RabbitMQ: the only file that names amiquip, beside what is below it.
//!
//! amiquip blocks without end when the broker stops reading (an alarm) or answering, and what
//! frees it is the socket being shut down under it. So a [`Link`] keeps a second handle of its
//! socket as a kill switch, for whoever watches over the calls.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::mem;
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use amiquip::{
    AmqpProperties, AmqpValue, Auth, Channel, Confirm, Connection, ConnectionBlockedNotification,
    ConnectionOptions, ConnectionTuning, Consumer, ConsumerMessage, ConsumerOptions, Delivery,
    ExchangeDeclareOptions, ExchangeType, FieldTable, IoStream, Publish, QueueDeclareOptions,
    Return,
};
use anyhow::{Context, anyhow, bail};
use crossbeam_channel::{Receiver, RecvTimeoutError, Select, TryRecvError, bounded, select};
use serde_json::{Map, Number, Value};
use thiserror::Error;
use uuid::Uuid;

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

pub mod dead_letters;
pub mod inspection;
pub mod intake;
mod tls_stream;

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
/// When nothing has come in for so long, messages that are done with are no longer kept waiting for
/// those before them to be acknowledged with them.
const LAST_ACKNOWLEDGEMENT: Duration = Duration::from_millis(50);
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
                speak(stream, options, intake)?
            }
            Some(tls) => {
                let stream = TlsStream::open(stream, &config.host, tls, CONNECT_TIMEOUT)
                    .with_context(|| format!("TLS with {address}"))?;
                speak(stream, options, intake)?
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
) -> Result<Connection, amiquip::Error> {
    let tuning = ConnectionTuning::default();
    match intake {
        None => Connection::insecure_open_stream(stream, options, tuning),
        Some(intake) => {
            Connection::insecure_open_stream(GatedStream::new(stream, intake), options, tuning)
        }
    }
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

/// A message as it was delivered.
#[derive(Debug)]
pub struct Received {
    /// Identifies the delivery to its consumer.
    pub tag: u64,
    pub body: Vec<u8>,
    pub redelivered: bool,
    properties: AmqpProperties,
}

impl Received {
    pub fn message_id(&self) -> Option<&str> {
        self.properties.message_id().as_deref()
    }

    pub fn correlation_id(&self) -> Option<&str> {
        self.properties.correlation_id().as_deref()
    }

    /// The message's properties as JSON, those that are set.
    pub fn properties(&self) -> Map<String, Value> {
        let own = &self.properties;
        let text = |text: &Option<String>| text.clone().map(Value::String);
        [
            ("content_type", text(own.content_type())),
            ("content_encoding", text(own.content_encoding())),
            ("headers", own.headers().as_ref().map(table_to_json)),
            ("delivery_mode", own.delivery_mode().map(Value::from)),
            ("priority", own.priority().map(Value::from)),
            ("correlation_id", text(own.correlation_id())),
            ("reply_to", text(own.reply_to())),
            ("expiration", text(own.expiration())),
            ("message_id", text(own.message_id())),
            ("timestamp", own.timestamp().map(Value::from)),
            ("type", text(own.type_())),
            ("user_id", text(own.user_id())),
            ("app_id", text(own.app_id())),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)))
        .collect()
    }
}

/// Consumes queues, each with so many of its messages in hand at most, until `stop` is
/// disconnected: each message goes to `hand_over` with its queue's place in `queues`, and is
/// acknowledged when its tag comes in through `done`. Afterwards nothing more is handed over, and
/// the function returns once all senders of `done` are gone; what was not acknowledged goes back
/// to its queue.
///
/// Queues that belong together keep their order: who sends to the first, has that confirmed, and
/// then sends to the second, is heard in this order. So they share one channel, on which RabbitMQ
/// delivers in the order in which it confirms.
///
/// # Errors
/// A queue or the connection is gone.
pub fn consume(
    link: &Link,
    queues: &[(&str, u16)],
    stop: &Receiver<Infallible>,
    done: &Receiver<u64>,
    mut hand_over: impl FnMut(usize, Received),
) -> anyhow::Result<()> {
    let channel = link.channel()?;
    // Outlive the consumers: a delivery for a consumer without receiver ends the connection.
    let mut inputs = Vec::new();
    let mut consumers = Vec::new();
    let mut all_in_hand = 0;
    for (queue, prefetch) in queues {
        // It counts for the consumers after it, and for each by itself.
        channel.qos(0, *prefetch, false)?;
        let consumer = channel.basic_consume(*queue, ConsumerOptions::default())?;
        inputs.push(consumer.receiver().clone());
        consumers.push(consumer);
        all_in_hand += usize::from(*prefetch);
    }
    let mut in_hand = InHand::new(link, &channel, all_in_hand / 4);
    let mut events = Select::new();
    for input in &inputs {
        events.recv(input);
    }
    let done_event = events.recv(done);
    let stop_event = events.recv(stop);
    loop {
        let Ok(event) = events.ready_timeout(in_hand.patience()) else {
            in_hand.acknowledge_rest()?;
            continue;
        };
        if event == done_event {
            match done.try_recv() {
                Ok(tag) => {
                    for tag in [tag].into_iter().chain(done.try_iter()) {
                        in_hand.finish(tag);
                    }
                    in_hand.acknowledge_in_order()?;
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => break,
            }
        } else if event == stop_event {
            (0..inputs.len()).for_each(|input| events.remove(input));
            events.remove(stop_event);
            if let Some(intake) = &link.intake {
                // The answer to the cancel must get through, behind all that RabbitMQ has
                // sent already.
                intake.open();
            }
            cancel(&consumers)?;
        } else {
            let last = match inputs[event].try_recv() {
                Err(TryRecvError::Empty) => continue,
                last => last,
            };
            // What came before it, of a queue before its own, is there by now.
            let earlier = inputs[..event].iter().enumerate();
            let earlier = earlier.flat_map(|(place, input)| {
                let messages = input.try_iter();
                messages.map(move |message| (place, Some(message)))
            });
            for (place, message) in earlier.chain([(event, last.ok())]) {
                let mut delivery = delivered(link, queues[place].0, message)?;
                let received = Received {
                    tag: delivery.delivery_tag(),
                    body: mem::take(&mut delivery.body),
                    redelivered: delivery.redelivered,
                    properties: mem::take(&mut delivery.properties),
                };
                in_hand.take(delivery, received.body.len());
                hand_over(place, received);
            }
        }
    }
    in_hand.acknowledge_rest()?;
    drop(consumers);
    channel.close().with_context(|| link.name.clone())
}

/// The delivery that has come for a consumer; None and the rest are the end of it.
fn delivered(
    link: &Link,
    queue: &str,
    message: Option<ConsumerMessage>,
) -> anyhow::Result<Delivery> {
    match message {
        Some(ConsumerMessage::Delivery(delivery)) => Ok(delivery),
        Some(ConsumerMessage::ServerCancelled) => {
            bail!("{}: the queue {queue} was deleted", link.name)
        }
        Some(
            ConsumerMessage::ServerClosedChannel(error)
            | ConsumerMessage::ServerClosedConnection(error),
        ) => Err(anyhow!(error).context(format!("{}: queue {queue}", link.name))),
        Some(
            ConsumerMessage::ClientCancelled
            | ConsumerMessage::ClientClosedChannel
            | ConsumerMessage::ClientClosedConnection,
        )
        | None => bail!("{}: the connection is lost", link.name),
    }
}

/// Ends the deliveries. Those that are on their way go back to the queue when the channel closes;
/// meanwhile nobody keeps them, for they may be many and large.
fn cancel(consumers: &[Consumer<'_>]) -> anyhow::Result<()> {
    let (cancelled, is_cancelled) = bounded::<Infallible>(0);
    thread::scope(|scope| {
        for consumer in consumers {
            let (late, is_cancelled) = (consumer.receiver().clone(), is_cancelled.clone());
            thread::Builder::new()
                .name("too-late".to_owned())
                .spawn_scoped(scope, move || {
                    loop {
                        select! {
                            recv(late) -> message => if message.is_err() { return },
                            recv(is_cancelled) -> _ => return,
                        }
                    }
                })?;
        }
        let outcome = consumers.iter().try_for_each(Consumer::cancel);
        drop(cancelled);
        Ok(outcome?)
    })
}

/// The deliveries that a consumer has not acknowledged. One acknowledgement for all up to a tag
/// costs RabbitMQ a fraction of one for each, so what is done with waits a moment for what came
/// before it.
struct InHand<'c> {
    link: &'c Link,
    channel: &'c Channel,
    /// A delivery is the only means to acknowledge; it waits here without its body, but with its
    /// size.
    deliveries: BTreeMap<u64, (Delivery, usize)>,
    /// Those that are done with.
    finished: BTreeSet<u64>,
    /// How many of them may wait at most.
    limit: usize,
}

impl<'c> InHand<'c> {
    fn new(link: &'c Link, channel: &'c Channel, limit: usize) -> InHand<'c> {
        InHand {
            link,
            channel,
            deliveries: BTreeMap::new(),
            finished: BTreeSet::new(),
            limit,
        }
    }

    fn take(&mut self, delivery: Delivery, size: usize) {
        if let Some(intake) = &self.link.intake {
            intake.take(size);
        }
        self.deliveries
            .insert(delivery.delivery_tag(), (delivery, size));
    }

    fn finish(&mut self, tag: u64) {
        let Some((_, size)) = self.deliveries.get(&tag) else {
            return;
        };
        if self.finished.insert(tag)
            && let Some(intake) = &self.link.intake
        {
            intake.give_back(*size);
        }
    }

    /// Acknowledges all before the first that is not done with; the others too if they are many.
    fn acknowledge_in_order(&mut self) -> Result<(), amiquip::Error> {
        let mut last = None;
        while let Some(first) = self.deliveries.first_entry()
            && self.finished.remove(first.key())
        {
            last = Some(first.remove());
        }
        if let Some((delivery, _)) = last {
            delivery.ack_multiple(self.channel)?;
        }
        if self.finished.len() > self.limit {
            self.acknowledge_rest()?;
        }
        Ok(())
    }

    /// Acknowledges, one by one, what is done with although something before it is not.
    fn acknowledge_rest(&mut self) -> Result<(), amiquip::Error> {
        for tag in mem::take(&mut self.finished) {
            if let Some((delivery, _)) = self.deliveries.remove(&tag) {
                delivery.ack(self.channel)?;
            }
        }
        Ok(())
    }

    /// How long what is done with may wait when nothing else happens.
    fn patience(&self) -> Duration {
        match self.finished.is_empty() {
            true => DEADLINE,
            false => LAST_ACKNOWLEDGEMENT,
        }
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
