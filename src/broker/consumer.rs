//! Consumes messages from queues, and acknowledges them when they are done.

use std::convert::Infallible;
use std::mem;
use std::panic::resume_unwind;
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{Channel, Consumer, ConsumerMessage, ConsumerOptions, Delivery};
use anyhow::{Context, anyhow, bail};
use crossbeam_channel::{Receiver, Select, TryRecvError, never, select};

use super::received::Received;
use super::unacked::Unacked;
use super::window::Window;
use super::{DEADLINE, Link};
use crate::fault_point;
use crate::threads::Signal;

/// After this long without an event, finished messages are acknowledged one by one instead of
/// waiting for those before them to be acknowledged together.
const LAST_ACKNOWLEDGEMENT: Duration = Duration::from_millis(50);

/// How often it is looked whether more may be taken, when all that speaks against it is that too much is in
/// flight.
const UNTIL_IT_MAY_GROW: Duration = Duration::from_secs(1);

/// They wait no longer than this even while events keep coming: the first unfinished message before
/// them may be waiting to be told, long after theirs have been.
const LONGEST_WAIT: Duration = Duration::from_millis(200);
/// What became of a delivery, by its tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handled {
    /// It is done, and can be acknowledged.
    Done(u64),
    /// It is not done, but waits for something that others do not wait for.
    Kept(u64),
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
    mut hand_over: impl FnMut(usize, Received) + Send,
) -> anyhow::Result<()> {
    let channel = link.channel()?;
    let mut consumers = Consumers::new(link, &channel, sources);
    consumers.open_more(&mut hand_over)?;
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
            let patience = match self.would_grow() {
                true => UNTIL_IT_MAY_GROW,
                false => DEADLINE,
            };
            let patience = patience.min(self.in_hand.patience());
            let Ok(event) = events.ready_timeout(patience) else {
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
                    self.in_hand.pass_on(queue, place, message, hand_over)?;
                }
            }
        }
    }

    /// Whether a window is to grow, or the next queue might be consumed. Not while nothing is read: what is
    /// done until the answers come would be acknowledged only then.
    fn may_grow(&self) -> bool {
        let intake = self.in_hand.link.intake.as_ref();
        !intake.is_some_and(|intake| intake.is_full()) && self.would_grow()
    }

    /// The same, whether or not something is read.
    fn would_grow(&self) -> bool {
        let windows = &self.in_hand.windows[..self.open.len()];
        !self.is_ended && (windows.iter().any(Window::is_to_grow) || self.next_is_due())
    }

    /// Whether there is a queue that waits for the one before it, of which nothing is on its way through.
    fn next_is_due(&self) -> bool {
        let windows = &self.in_hand.windows;
        self.open.len() < windows.len() && !windows[self.open.len() - 1].has_some_on_their_way()
    }

    /// Lets the windows grow that are to, and consumes more queues where that keeps the order.
    fn grow(&mut self, hand_over: &mut (impl FnMut(usize, Received) + Send)) -> anyhow::Result<()> {
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
        if self.next_is_due()
            && !self.in_hand.windows[last].is_full()
            && self.is_empty(last, hand_over)?
        {
            self.reopen(last, Window::open, hand_over)?;
        }
        self.open_more(hand_over)?;
        self.in_hand.acknowledge_in_order()?;
        Ok(())
    }

    /// Starts the consumers of further queues: of one that is empty, when others follow it, with its whole
    /// prefetch, for whatever comes to it goes to the consumer before what comes to the next.
    fn open_more(
        &mut self,
        hand_over: &mut (impl FnMut(usize, Received) + Send),
    ) -> anyhow::Result<()> {
        while self.open.len() < self.sources.len() {
            let place = self.open.len();
            if place > 0 && !self.in_hand.windows[place - 1].is_full() {
                break;
            }
            let may_open = place + 1 < self.sources.len() && !self.in_hand.windows[place].is_full();
            if may_open && self.is_empty(place, hand_over)? {
                self.in_hand.windows[place].open();
            }
            let consumer = self.start(place, hand_over)?;
            self.inputs.push(consumer.receiver().clone());
            self.open.push(consumer);
        }
        Ok(())
    }

    /// Starts a queue's consumer with its present prefetch.
    fn start(
        &mut self,
        place: usize,
        hand_over: &mut (impl FnMut(usize, Received) + Send),
    ) -> anyhow::Result<Consumer<'c>> {
        let channel = self.in_hand.channel;
        let (queue, size) = (
            self.sources[place].queue,
            self.in_hand.windows[place].size(),
        );
        // It applies to each consumer that is started after it, and never to one that there is; and the
        // kind that does not is unknown to quorum queues.
        self.asks(hand_over, |_| channel.qos(0, size, false))?;
        self.asks(hand_over, |_| {
            channel.basic_consume(queue, ConsumerOptions::default())
        })
    }

    /// Replaces a queue's consumer by one with another prefetch. What is in flight stays so.
    fn reopen(
        &mut self,
        place: usize,
        widen: impl FnOnce(&mut Window),
        hand_over: &mut (impl FnMut(usize, Received) + Send),
    ) -> anyhow::Result<()> {
        self.asks(hand_over, |open| open[place].cancel())?;
        // The end of a consumer may arrive after the answer to its cancel.
        let mut is_ended = false;
        while !is_ended {
            let last = self.inputs[place].recv().ok();
            is_ended = matches!(last, None | Some(ConsumerMessage::ClientCancelled));
            let last = (!is_ended).then_some((place, last));
            for (place, message) in before(&self.inputs, place).chain(last) {
                let queue = self.sources[place].queue;
                self.in_hand.pass_on(queue, place, message, hand_over)?;
            }
        }
        self.inputs[place] = never();
        widen(&mut self.in_hand.windows[place]);
        // RabbitMQ has room for what comes next.
        self.in_hand.acknowledge_in_order()?;
        let consumer = self.start(place, hand_over)?;
        self.inputs[place] = consumer.receiver().clone();
        self.open[place] = consumer;
        Ok(())
    }

    /// Whether nothing waits in a queue.
    fn is_empty(
        &mut self,
        place: usize,
        hand_over: &mut (impl FnMut(usize, Received) + Send),
    ) -> anyhow::Result<bool> {
        let channel = self.in_hand.channel;
        let queue = self.sources[place].queue;
        let declared = self.asks(hand_over, |_| channel.queue_declare_passive(queue))?;
        Ok(declared.declared_message_count() == Some(0))
    }

    /// Asks RabbitMQ something. The answer comes behind what has been sent before, of which nothing is read
    /// while too much is in flight; so that is handed over meanwhile, and its handlers make room. A
    /// question without an answer ends the connection.
    fn asks<T>(
        &mut self,
        hand_over: &mut (impl FnMut(usize, Received) + Send),
        question: impl FnOnce(&[Consumer<'c>]) -> Result<T, amiquip::Error>,
    ) -> anyhow::Result<T> {
        if self.inputs.is_empty() {
            return Ok(question(&self.open)?);
        }
        let (asking, is_answered) = Signal::pending();
        let meanwhile = Meanwhile {
            link: self.in_hand.link,
            sources: self.sources,
            inputs: self.inputs.clone(),
            taken: Vec::new(),
        };
        let (answer, taken) = thread::scope(|scope| {
            let taking = thread::Builder::new()
                .name("meanwhile".to_owned())
                .spawn_scoped(scope, || meanwhile.take(&is_answered, hand_over))?;
            let answer = question(&self.open);
            drop(asking);
            let taken = taking.join().unwrap_or_else(|panic| resume_unwind(panic));
            anyhow::Ok((answer, taken))
        })?;
        for (place, delivery) in taken? {
            self.in_hand.take(place, delivery);
        }
        Ok(answer?)
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

/// Takes what comes while the consumers' thread waits for an answer.
struct Meanwhile<'c> {
    link: &'c Link,
    sources: &'c [Source<'c>],
    inputs: Vec<Receiver<ConsumerMessage>>,
    /// With their queues' places.
    taken: Vec<(usize, Delivery)>,
}

impl Meanwhile<'_> {
    fn take(
        mut self,
        is_answered: &Signal,
        hand_over: &mut impl FnMut(usize, Received),
    ) -> anyhow::Result<Vec<(usize, Delivery)>> {
        let mut since = Instant::now();
        loop {
            let mut events = Select::new();
            for input in &self.inputs {
                events.recv(input);
            }
            let answered = events.recv(is_answered.receiver());
            let place = match events.ready_timeout(UNTIL_IT_MAY_GROW) {
                // What was sent before the answer is there, and is handed over in its order.
                Ok(event) if event == answered => {
                    for place in 0..self.inputs.len() {
                        while self.take_arrived(place, hand_over)? {}
                    }
                    return Ok(self.taken);
                }
                Ok(place) => place,
                Err(_) => {
                    let intake = self.link.intake.as_ref();
                    if intake.is_some_and(|intake| intake.is_full()) {
                        since = Instant::now();
                    } else if since.elapsed() > DEADLINE {
                        self.link.kill();
                    }
                    continue;
                }
            };
            since = Instant::now();
            if let Err(error) = self.take_arrived(place, hand_over) {
                self.discard_until(is_answered);
                return Err(error);
            }
        }
    }

    /// Takes the next message of a queue and what came from those before it. False if there is none.
    fn take_arrived(
        &mut self,
        place: usize,
        hand_over: &mut impl FnMut(usize, Received),
    ) -> anyhow::Result<bool> {
        let messages: Vec<_> = arrived(&self.inputs, place).collect();
        let some = !messages.is_empty();
        for (place, message) in messages {
            if matches!(message, Some(ConsumerMessage::ClientCancelled)) {
                self.inputs[place] = never();
                continue;
            }
            let mut delivery = delivered(self.link, self.sources[place].queue, message)?;
            hand_over(place, received(self.link, &mut delivery));
            self.taken.push((place, delivery));
        }
        Ok(some)
    }

    /// The session is at its end; but the answer has to get through, behind what is never taken.
    fn discard_until(&self, is_answered: &Signal) {
        if let Some(intake) = &self.link.intake {
            intake.open();
        }
        while !is_answered.comes_within(LAST_ACKNOWLEDGEMENT) {
            let unread = self.inputs.iter();
            unread.for_each(|input| input.try_iter().for_each(drop));
        }
    }
}

/// The content of a delivery, which counts as in flight from now on.
fn received(link: &Link, delivery: &mut Delivery) -> Received {
    Received::of(delivery, link.intake.as_ref())
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
    before(inputs, event).chain(last)
}

/// What has come from the queues before this one. A message that has been received from this one comes
/// after these.
fn before(
    inputs: &[Receiver<ConsumerMessage>],
    place: usize,
) -> impl Iterator<Item = (usize, Option<ConsumerMessage>)> {
    let earlier = inputs[..place].iter().enumerate();
    earlier.flat_map(|(place, input)| {
        let messages = input.try_iter();
        messages.map(move |message| (place, Some(message)))
    })
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

    /// Hands a delivery over, and takes it.
    fn pass_on(
        &mut self,
        queue: &str,
        place: usize,
        message: Option<ConsumerMessage>,
        hand_over: &mut impl FnMut(usize, Received),
    ) -> anyhow::Result<()> {
        let mut delivery = delivered(self.link, queue, message)?;
        hand_over(place, received(self.link, &mut delivery));
        self.take(place, delivery);
        Ok(())
    }

    /// Takes a delivery, whose content has been handed over.
    fn take(&mut self, place: usize, delivery: Delivery) {
        self.windows[place].takes();
        let held = Held {
            delivery,
            place,
            is_through: false,
        };
        self.unacked.take(held.delivery.delivery_tag(), held);
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
                    self.unacked.finish(tag);
                }
                Handled::Kept(tag) => self.passes(tag),
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
