//! Taking messages from queues, and acknowledging them when they are done with.

use std::mem;
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{
    AmqpProperties, AmqpValue, Channel, Consumer, ConsumerMessage, ConsumerOptions, Delivery,
    FieldTable,
};
use anyhow::{Context, anyhow, bail};
use crossbeam_channel::{Receiver, Select, TryRecvError, select};
use serde_json::{Map, Value};

use super::unacked::Unacked;
use super::values::table_to_json;
use super::{DEADLINE, Link};
use crate::fault_point;
use crate::threads::Signal;

/// When nothing has come in for so long, messages that are done with are no longer kept waiting for
/// those before them to be acknowledged with them.
const LAST_ACKNOWLEDGEMENT: Duration = Duration::from_millis(50);

/// Nor for longer than this although something does: the outcome of the first of those before them
/// may wait to be told, and theirs may have been told long ago.
const LONGEST_WAIT: Duration = Duration::from_millis(200);
/// What a message counts as that is kept, but released, in bytes.
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
    /// How many bytes of memory it takes, about: its body, and its properties as they are held.
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

/// What has become of a delivery, by its tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handled {
    /// It is done with, and to be acknowledged.
    Done(u64),
    /// It is not done with, but takes next to no memory any more.
    Released(u64),
}

/// Consumes queues, each with so many of its messages in hand at most, until `stop` is
/// given: each message goes to `hand_over` with its queue's place in `queues`, and is
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
    stop: &Signal,
    done: &Receiver<Handled>,
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
    let stop_event = events.recv(stop.receiver());
    loop {
        let Ok(event) = events.ready_timeout(in_hand.patience()) else {
            in_hand.acknowledge_rest()?;
            continue;
        };
        fault_point::reached("consumer");
        if event == done_event {
            match done.try_recv() {
                Ok(handled) => {
                    for handled in [handled].into_iter().chain(done.try_iter()) {
                        match handled {
                            Handled::Done(tag) => in_hand.finish(tag),
                            Handled::Released(tag) => in_hand.release(tag),
                        }
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
                in_hand.take(delivery, received.size());
                hand_over(place, received);
            }
        }
    }
    in_hand.acknowledge_rest()?;
    drop(consumers);
    channel.close().with_context(|| link.name.clone())
}

/// What a table takes beside itself. It is nested no deeper than `readable.rs` lets it.
fn table_size(table: &FieldTable) -> usize {
    /// A node of a B-tree has room for eleven entries, and is at least half full when it is not
    /// the only one.
    const NODE: usize = 11 * size_of::<(String, AmqpValue)>();
    let entries = table
        .iter()
        .map(|(key, value)| key.len() + value_size(value));
    table.len().div_ceil(6) * NODE + entries.sum::<usize>()
}

/// What a value takes beside itself.
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

/// The deliveries that a consumer has not acknowledged. One acknowledgement for all up to a tag
/// costs RabbitMQ a fraction of one for each, so what is done with waits a moment for what came
/// before it.
struct InHand<'c> {
    link: &'c Link,
    channel: &'c Channel,
    /// A delivery is the only means to acknowledge; it waits here without its body, but with its
    /// size.
    unacked: Unacked<(Delivery, usize)>,
    /// How many of those that are done with may wait at most.
    limit: usize,
    /// Since when there are some, and none is acknowledged.
    waiting_since: Option<Instant>,
}

impl<'c> InHand<'c> {
    fn new(link: &'c Link, channel: &'c Channel, limit: usize) -> InHand<'c> {
        InHand {
            link,
            channel,
            unacked: Unacked::new(),
            limit,
            waiting_since: None,
        }
    }

    fn take(&mut self, delivery: Delivery, size: usize) {
        if let Some(intake) = &self.link.intake {
            intake.take(size);
        }
        self.unacked.take(delivery.delivery_tag(), (delivery, size));
    }

    fn finish(&mut self, tag: u64) {
        if let Some((_, size)) = self.unacked.finish(tag)
            && let Some(intake) = &self.link.intake
        {
            intake.give_back(*size);
        }
    }

    /// What it took of the intake is free again, though it is not done with.
    fn release(&mut self, tag: u64) {
        if let Some((_, size)) = self.unacked.in_hand(tag)
            && let Some(intake) = &self.link.intake
        {
            intake.give_back(size.saturating_sub(RELEASED));
            *size = RELEASED.min(*size);
        }
    }

    /// Acknowledges all before the first that is not done with; the others too if they are many,
    /// or have waited for long.
    fn acknowledge_in_order(&mut self) -> Result<(), amiquip::Error> {
        if let Some((delivery, _)) = self.unacked.acknowledge_in_order() {
            delivery.ack_multiple(self.channel)?;
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

    /// Acknowledges, one by one, what is done with although something before it is not.
    fn acknowledge_rest(&mut self) -> Result<(), amiquip::Error> {
        self.waiting_since = None;
        self.unacked
            .acknowledge_rest()
            .try_for_each(|(delivery, _)| delivery.ack(self.channel))
    }

    /// How long what is done with may wait when nothing else happens.
    fn patience(&self) -> Duration {
        match self.unacked.finished() {
            0 => DEADLINE,
            _ => LAST_ACKNOWLEDGEMENT,
        }
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
