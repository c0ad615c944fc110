//! Consumes messages from queues, and acknowledges them when they are done.

use std::convert::Infallible;
use std::mem;
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{
    AmqpProperties, AmqpValue, Channel, Consumer, ConsumerMessage, ConsumerOptions, Delivery,
    FieldTable,
};
use anyhow::{Context, anyhow, bail};
use crossbeam_channel::{Receiver, Select, TryRecvError, never, select};
use serde_json::{Map, Value};

use super::unacked::Unacked;
use super::values::table_to_json;
use super::window::Window;
use super::{DEADLINE, Link};
use crate::fault_point;
use crate::threads::Signal;

/// After this long without an event, finished messages are acknowledged one by one instead of
/// waiting for those before them to be acknowledged together.
const LAST_ACKNOWLEDGEMENT: Duration = Duration::from_millis(50);

/// They wait no longer than this even while events keep coming: the first unfinished message before
/// them may be waiting to be told, long after theirs have been.
const LONGEST_WAIT: Duration = Duration::from_millis(200);
/// What a message that was released, but is still unacked, counts as, in bytes.
const RELEASED: usize = 1024;

/// A message as it was delivered.
#[derive(Debug)]
pub struct Received {
    /// Identifies the delivery to its consumer.
    pub tag: u64,
    pub body: Vec<u8>,
    pub redelivered: bool,
    pub(super) properties: AmqpProperties,
}

impl Received {
    /// About how many bytes of memory it takes: its body, and its properties as amiquip holds them.
    pub fn size(&self) -> usize {
        let own = &self.properties;
        let texts = [
            own.content_type(),
            own.content_encoding(),
            own.correlation_id(),
            own.reply_to(),
            own.expiration(),
            own.message_id(),
            own.type_(),
            own.user_id(),
            own.app_id(),
            own.cluster_id(),
        ];
        let texts: usize = texts.into_iter().flatten().map(String::len).sum();
        let headers = own.headers().as_ref().map_or(0, table_size);
        self.body.len() + size_of_val(self) + texts + headers
    }

    pub fn message_id(&self) -> Option<&str> {
        self.properties.message_id().as_deref()
    }

    /// Who sent it: its `user-id`, which RabbitMQ has checked, or its `app-id`.
    pub fn sender(&self) -> Option<&str> {
        let properties = [self.properties.user_id(), self.properties.app_id()];
        let texts = properties.into_iter().flatten().map(String::as_str);
        texts.into_iter().find(|text| !text.trim().is_empty())
    }

    pub fn correlation_id(&self) -> Option<&str> {
        self.properties.correlation_id().as_deref()
    }

    /// Drops everything but its id, about `RELEASED` bytes.
    pub fn release(&mut self) {
        self.body = Vec::new();
        let id = self.properties.message_id().clone();
        self.properties = match id {
            Some(id) => AmqpProperties::default().with_message_id(id),
            None => AmqpProperties::default(),
        };
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

/// What became of a delivery, by its tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handled {
    /// It is done, and can be acknowledged.
    Done(u64),
    /// It is not done, but waits for something that others do not wait for.
    Kept(u64),
    /// The same, and it takes next to no memory any more.
    Released(u64),
}

/// A queue to consume.
#[derive(Debug, Clone, Copy)]
pub struct Source<'q> {
    pub queue: &'q str,
    pub prefetch: u16,
    /// What the prefetch is at first; it grows as messages go through.
    pub first: u16,
}

impl<'q> Source<'q> {
    /// One with its whole prefetch from the beginning.
    pub fn new(queue: &'q str, prefetch: u16) -> Source<'q> {
        Source {
            queue,
            prefetch,
            first: prefetch,
        }
    }
}

/// Consumes queues until `stop` is given. Each message goes to `hand_over` with its queue's place in
/// `sources`, and is acknowledged when its tag arrives through `done`. After the stop nothing more is
/// handed over, and the function returns once all senders of `done` are gone; what was not acknowledged
/// returns to its queue.
///
/// The given queues keep a common order: if a sender publishes to the first, waits for the confirm
/// and then publishes to the second, the messages are handed over in that order. So they share one
/// channel, on which RabbitMQ delivers in the order in which it confirms; and a queue is consumed only
/// once those before it have been seen empty, or have their whole prefetch.
///
/// # Errors
/// A queue or the connection is gone.
pub fn consume(
    link: &Link,
    sources: &[Source<'_>],
    stop: &Signal,
    done: &Receiver<Handled>,
    mut hand_over: impl FnMut(usize, Received),
) -> anyhow::Result<()> {
    let channel = link.channel()?;
    let mut consumers = Consumers::new(link, &channel, sources);
    consumers.open_more()?;
    let mut stop = stop.receiver().clone();
    loop {
        match consumers.attend(&stop, done, &mut hand_over)? {
            Event::AllDone => break,
            Event::Stop => {
                stop = never();
                consumers.end()?;
            }
            Event::MayGrow => consumers.grow(&mut hand_over)?,
        }
    }
    consumers.in_hand.acknowledge_rest()?;
    let inputs = consumers.into_inputs();
    let closed = channel.close().with_context(|| link.name.clone());
    // Only now: the end of a consumer may arrive after the answer to its cancel.
    drop(inputs);
    closed
}

/// What ends the attention to the consumers as they are.
enum Event {
    Stop,
    /// All senders of what is done are gone.
    AllDone,
    /// A window is to grow, or the next queue may be consumed.
    MayGrow,
}

/// The consumers of the queues on one channel.
struct Consumers<'c> {
    sources: &'c [Source<'c>],
    /// Of the first queues.
    open: Vec<Consumer<'c>>,
    /// They outlive the consumers: a message for a consumer without a receiver ends the connection.
    inputs: Vec<Receiver<ConsumerMessage>>,
    in_hand: InHand<'c>,
    is_ended: bool,
}

impl<'c> Consumers<'c> {
    fn new(link: &'c Link, channel: &'c Channel, sources: &'c [Source<'c>]) -> Consumers<'c> {
        Consumers {
            sources,
            open: Vec::new(),
            inputs: Vec::new(),
            in_hand: InHand::new(link, channel, sources),
            is_ended: false,
        }
    }

    /// Hands messages over and acknowledges what is done, until something else is to be done.
    fn attend(
        &mut self,
        stop: &Receiver<Infallible>,
        done: &Receiver<Handled>,
        hand_over: &mut impl FnMut(usize, Received),
    ) -> anyhow::Result<Event> {
        let inputs = match self.is_ended {
            true => &[],
            false => self.inputs.as_slice(),
        };
        let mut events = Select::new();
        for input in inputs {
            events.recv(input);
        }
        let done_event = events.recv(done);
        let stop_event = events.recv(stop);
        loop {
            let Ok(event) = events.ready_timeout(self.in_hand.patience()) else {
                self.in_hand.acknowledge_rest()?;
                if self.may_grow() {
                    return Ok(Event::MayGrow);
                }
                continue;
            };
            fault_point::reached("consumer");
            if event == done_event {
                if !self.in_hand.finish_all(done) {
                    return Ok(Event::AllDone);
                }
                if self.may_grow() {
                    return Ok(Event::MayGrow);
                }
                self.in_hand.acknowledge_in_order()?;
            } else if event == stop_event {
                return Ok(Event::Stop);
            } else {
                for (place, message) in arrived(inputs, event) {
                    let queue = self.sources[place].queue;
                    let delivery = delivered(self.in_hand.link, queue, message)?;
                    hand_over(place, self.in_hand.take(place, delivery));
                }
            }
        }
    }

    /// Whether a window is to grow, or the next queue might be consumed. Not while nothing is read: the answers
    /// to that would not come before something is done, which nobody would hear of meanwhile.
    fn may_grow(&self) -> bool {
        let intake = self.in_hand.link.intake.as_ref();
        if self.is_ended || intake.is_some_and(|intake| intake.is_full()) {
            return false;
        }
        let windows = &self.in_hand.windows[..self.open.len()];
        windows.iter().any(Window::is_to_grow) || self.next_is_due()
    }

    /// Whether there is a queue that waits for the one before it, of which nothing is on its way through.
    fn next_is_due(&self) -> bool {
        let windows = &self.in_hand.windows;
        self.open.len() < windows.len() && !windows[self.open.len() - 1].has_some_on_their_way()
    }

    /// Lets the windows grow that are to, and consumes more queues where that keeps the order.
    fn grow(&mut self, hand_over: &mut impl FnMut(usize, Received)) -> anyhow::Result<()> {
        let last = self.open.len() - 1;
        for place in 0..self.open.len() {
            let others_wait = place == last && self.open.len() < self.sources.len();
            let window = &self.in_hand.windows[place];
            if others_wait && window.is_stuck() {
                self.reopen(place, Window::open, hand_over)?;
            } else if window.is_to_grow() {
                self.reopen(place, Window::grow, hand_over)?;
            }
        }
        if self.next_is_due() && !self.in_hand.windows[last].is_full() && self.is_empty(last)? {
            self.reopen(last, Window::open, hand_over)?;
        }
        self.open_more()?;
        self.in_hand.acknowledge_in_order()?;
        Ok(())
    }

    /// Starts the consumers of further queues: of one that is empty, when others follow it, with its whole
    /// prefetch, for whatever comes to it goes to the consumer before what comes to the next.
    fn open_more(&mut self) -> anyhow::Result<()> {
        while self.open.len() < self.sources.len() {
            let place = self.open.len();
            if place > 0 && !self.in_hand.windows[place - 1].is_full() {
                break;
            }
            let window = &self.in_hand.windows[place];
            if place + 1 < self.sources.len() && !window.is_full() && self.is_empty(place)? {
                self.in_hand.windows[place].open();
            }
            let consumer = self.start(place)?;
            self.inputs.push(consumer.receiver().clone());
            self.open.push(consumer);
        }
        Ok(())
    }

    /// Starts a queue's consumer with its present prefetch.
    fn start(&self, place: usize) -> Result<Consumer<'c>, amiquip::Error> {
        let channel = self.in_hand.channel;
        // It applies to each consumer that is started after it, and never to one that there is; and the
        // kind that does not is unknown to quorum queues.
        channel.qos(0, self.in_hand.windows[place].size(), false)?;
        channel.basic_consume(self.sources[place].queue, ConsumerOptions::default())
    }

    /// Replaces a queue's consumer by one with another prefetch. What is in flight stays so.
    fn reopen(
        &mut self,
        place: usize,
        widen: impl FnOnce(&mut Window),
        hand_over: &mut impl FnMut(usize, Received),
    ) -> anyhow::Result<()> {
        self.open[place].cancel()?;
        // Whatever has come before the consumer's end, which may arrive after the answer to the cancel.
        loop {
            let message = self.inputs[place].recv().ok();
            if matches!(message, Some(ConsumerMessage::ClientCancelled)) {
                break;
            }
            let queue = self.sources[place].queue;
            let delivery = delivered(self.in_hand.link, queue, message)?;
            hand_over(place, self.in_hand.take(place, delivery));
        }
        widen(&mut self.in_hand.windows[place]);
        // RabbitMQ has room for what comes next.
        self.in_hand.acknowledge_in_order()?;
        let consumer = self.start(place)?;
        self.inputs[place] = consumer.receiver().clone();
        self.open[place] = consumer;
        Ok(())
    }

    /// Whether nothing waits in a queue.
    fn is_empty(&self, place: usize) -> Result<bool, amiquip::Error> {
        let queue = self.sources[place].queue;
        let declared = self.in_hand.channel.queue_declare_passive(queue)?;
        Ok(declared.declared_message_count() == Some(0))
    }

    fn into_inputs(self) -> Vec<Receiver<ConsumerMessage>> {
        self.inputs
    }

    /// Takes nothing more.
    fn end(&mut self) -> anyhow::Result<()> {
        self.is_ended = true;
        if let Some(intake) = &self.in_hand.link.intake {
            // The answer to the cancel must get through, behind all that RabbitMQ has sent already.
            intake.open();
        }
        cancel(&self.open)
    }
}

/// The next message of the queue at `event`, if there is one, after everything that was delivered from
/// earlier queues before it; each with its queue's place. None as a message is the consumer's end.
fn arrived(
    inputs: &[Receiver<ConsumerMessage>],
    event: usize,
) -> impl Iterator<Item = (usize, Option<ConsumerMessage>)> {
    let last = match inputs[event].try_recv() {
        Ok(message) => Some((event, Some(message))),
        Err(TryRecvError::Disconnected) => Some((event, None)),
        Err(TryRecvError::Empty) => None,
    };
    // Anything from an earlier queue that was delivered before it has arrived by now.
    let earlier = inputs[..event].iter().enumerate();
    let earlier = earlier.flat_map(|(place, input)| {
        let messages = input.try_iter();
        messages.map(move |message| (place, Some(message)))
    });
    earlier.chain(last)
}

/// Memory that a table takes beyond its own struct. `readable.rs` bounds its depth.
fn table_size(table: &FieldTable) -> usize {
    /// A node of a B-tree has room for eleven entries, and is at least half full when it is not
    /// the only one.
    const NODE: usize = 11 * size_of::<(String, AmqpValue)>();
    let entries = table
        .iter()
        .map(|(key, value)| key.len() + value_size(value));
    table.len().div_ceil(6) * NODE + entries.sum::<usize>()
}

/// Memory that a value takes beyond its own struct.
fn value_size(value: &AmqpValue) -> usize {
    match value {
        AmqpValue::LongString(text) => text.len(),
        AmqpValue::ByteArray(bytes) => bytes.len(),
        AmqpValue::FieldTable(table) => table_size(table),
        AmqpValue::FieldArray(items) => {
            size_of_val(items.as_slice()) + items.iter().map(value_size).sum::<usize>()
        }
        AmqpValue::Boolean(_)
        | AmqpValue::ShortShortInt(_)
        | AmqpValue::ShortShortUInt(_)
        | AmqpValue::ShortInt(_)
        | AmqpValue::ShortUInt(_)
        | AmqpValue::LongInt(_)
        | AmqpValue::LongUInt(_)
        | AmqpValue::LongLongInt(_)
        | AmqpValue::Float(_)
        | AmqpValue::Double(_)
        | AmqpValue::DecimalValue(_)
        | AmqpValue::Timestamp(_)
        | AmqpValue::Void => 0,
    }
}

/// The delivery for a consumer; None and everything else mean its end.
fn delivered(
    link: &Link,
    queue: &str,
    message: Option<ConsumerMessage>,
) -> anyhow::Result<Delivery> {
    match message {
        Some(ConsumerMessage::Delivery(delivery)) => Ok(delivery),
        Some(ConsumerMessage::ServerCancelled) => {
            bail!(
                "{}: RabbitMQ has cancelled the consumer of {queue}: the queue was deleted, its node is \
                 down, or, from RabbitMQ 4.3 on, it is a quorum queue and a message in hand was not \
                 acknowledged within its consumer_timeout",
                link.name
            )
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

/// Cancels the consumers. Deliveries on their way return to the queue when the channel closes;
/// until then they are discarded, since they may be many and large.
pub(super) fn cancel(consumers: &[Consumer<'_>]) -> anyhow::Result<()> {
    let (cancelled, is_cancelled) = Signal::pending();
    thread::scope(|scope| {
        for consumer in consumers {
            let (late, is_cancelled) = (consumer.receiver().clone(), is_cancelled.clone());
            thread::Builder::new()
                .name("too-late".to_owned())
                .spawn_scoped(scope, move || {
                    loop {
                        select! {
                            recv(late) -> message => if message.is_err() { return },
                            recv(is_cancelled.receiver()) -> _ => return,
                        }
                    }
                })?;
        }
        let outcome = consumers.iter().try_for_each(Consumer::cancel);
        drop(cancelled);
        Ok(outcome?)
    })
}

/// The unacked deliveries of a channel. One cumulative acknowledgement costs RabbitMQ a fraction
/// of single ones, so finished deliveries wait briefly for those before them.
struct InHand<'c> {
    link: &'c Link,
    channel: &'c Channel,
    unacked: Unacked<Held>,
    /// Of each queue, in their order.
    windows: Vec<Window>,
    /// How many finished ones may wait at most.
    limit: usize,
    /// Since when some have been waiting without an acknowledgement.
    waiting_since: Option<Instant>,
}

/// A delivery that is not acknowledged yet.
#[derive(Debug)]
struct Held {
    /// Only amiquip's delivery can acknowledge; it is kept here without its body.
    delivery: Delivery,
    size: usize,
    /// Of its queue.
    place: usize,
    is_through: bool,
}

impl<'c> InHand<'c> {
    fn new(link: &'c Link, channel: &'c Channel, sources: &[Source<'_>]) -> InHand<'c> {
        let prefetch = sources.iter().map(|source| usize::from(source.prefetch));
        let windows = sources
            .iter()
            .map(|source| Window::new(source.first, source.prefetch));
        InHand {
            link,
            channel,
            unacked: Unacked::new(),
            windows: windows.collect(),
            limit: prefetch.sum::<usize>() / 4,
            waiting_since: None,
        }
    }

    /// Takes a delivery, whose content it returns.
    fn take(&mut self, place: usize, mut delivery: Delivery) -> Received {
        let received = Received {
            tag: delivery.delivery_tag(),
            body: mem::take(&mut delivery.body),
            redelivered: delivery.redelivered,
            properties: mem::take(&mut delivery.properties),
        };
        let size = received.size();
        if let Some(intake) = &self.link.intake {
            intake.take(size);
        }
        self.windows[place].takes();
        let held = Held {
            delivery,
            size,
            place,
            is_through: false,
        };
        self.unacked.take(received.tag, held);
        received
    }

    /// Notes what has come through `done`. False once all of its senders are gone.
    fn finish_all(&mut self, done: &Receiver<Handled>) -> bool {
        let first = match done.try_recv() {
            Ok(handled) => handled,
            Err(TryRecvError::Empty) => return true,
            Err(TryRecvError::Disconnected) => return false,
        };
        for handled in [first].into_iter().chain(done.try_iter()) {
            match handled {
                Handled::Done(tag) => {
                    self.passes(tag);
                    self.finish(tag);
                }
                Handled::Kept(tag) => self.passes(tag),
                Handled::Released(tag) => {
                    self.passes(tag);
                    self.release(tag);
                }
            }
        }
        true
    }

    /// It holds up nothing behind it any more.
    fn passes(&mut self, tag: u64) {
        if let Some(held) = self.unacked.in_hand(tag)
            && !mem::replace(&mut held.is_through, true)
        {
            self.windows[held.place].passes();
        }
    }

    fn finish(&mut self, tag: u64) {
        if let Some(held) = self.unacked.finish(tag)
            && let Some(intake) = &self.link.intake
        {
            intake.give_back(held.size);
        }
    }

    /// Its bytes no longer count, although it is not done.
    fn release(&mut self, tag: u64) {
        if let Some(held) = self.unacked.in_hand(tag)
            && let Some(intake) = &self.link.intake
        {
            intake.give_back(held.size.saturating_sub(RELEASED));
            held.size = RELEASED.min(held.size);
        }
    }

    /// Acknowledges everything before the first unfinished delivery; the others too if they are
    /// many or have waited for long.
    fn acknowledge_in_order(&mut self) -> Result<(), amiquip::Error> {
        if let Some(held) = self.unacked.acknowledge_in_order() {
            held.delivery.ack_multiple(self.channel)?;
            self.waiting_since = None;
        }
        if self.unacked.finished() == 0 {
            self.waiting_since = None;
            return Ok(());
        }
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        if self.unacked.finished() > self.limit || since.elapsed() > LONGEST_WAIT {
            self.acknowledge_rest()?;
        }
        Ok(())
    }

    /// Acknowledges, one by one, what is finished behind an unfinished delivery.
    fn acknowledge_rest(&mut self) -> Result<(), amiquip::Error> {
        self.waiting_since = None;
        self.unacked
            .acknowledge_rest()
            .try_for_each(|held| held.delivery.ack(self.channel))
    }

    /// How long finished deliveries may wait when nothing else happens, and a window for something to go
    /// through.
    fn patience(&self) -> Duration {
        let patience = match self.unacked.finished() {
            0 => DEADLINE,
            _ => LAST_ACKNOWLEDGEMENT,
        };
        let windows = self.windows.iter().filter_map(Window::patience);
        // One that is stuck may have to wait until it can grow.
        let least = windows.min().map(|least| least.max(LAST_ACKNOWLEDGEMENT));
        least.map_or(patience, |least| least.min(patience))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_headers(headers: FieldTable) -> Received {
        Received {
            tag: 1,
            body: vec![0; 1000],
            redelivered: false,
            properties: AmqpProperties::default().with_headers(headers),
        }
    }

    #[test]
    fn headers_count_as_they_are_held() {
        let plain = with_headers(FieldTable::new()).size();
        assert!((1000..2000).contains(&plain), "{plain}");
        let bytes = AmqpValue::ByteArray(vec![0; 100_000]);
        let large = with_headers(FieldTable::from([("a".to_owned(), bytes)])).size() - plain;
        assert!((100_000..102_000).contains(&large), "{large}");
        // A table with one header in each, which on the wire takes eight bytes.
        let nested = (0..20).fold(AmqpValue::Void, |inner, _| {
            AmqpValue::FieldTable(FieldTable::from([(String::new(), inner)]))
        });
        let nested = with_headers(FieldTable::from([("a".to_owned(), nested)])).size() - plain;
        assert!((10_000..20_000).contains(&nested), "{nested}");
    }
}
