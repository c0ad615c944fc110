//! Publishing with confirms.

use std::collections::BTreeSet;
use std::time::Duration;

use amiquip::{AmqpProperties, Channel, Confirm, Publish, Return};
use anyhow::anyhow;
use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::DEADLINE;
use super::link::Link;
use super::presence::Found;
use super::received::Received;
use super::refusals::{PublishError, refusal};
use super::values::{properties, republished};
use crate::threads::Calls;
use crate::wire::Outgoing;

/// The slowest acceptable rate of publishing, in bytes per second.
const SLOWEST_PUBLISHING: u64 = 1024 * 1024;

/// What became of a message, according to the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivered {
    Yes,
    /// It was mandatory, and no queue is bound to its key.
    Unroutable,
    /// A queue does not take it: it is full, its node in a cluster is down, or its process has
    /// failed. Of the last two it may turn up in the queue all the same.
    Rejected,
}

/// Publishes with confirms, on a channel of its own.
pub struct Publisher<'l> {
    link: &'l Link,
    calls: &'l Calls,
    /// None after a refusal, which closes the channel.
    open: Option<OpenChannel>,
    /// Tags, as the broker counts them, of messages that it has not confirmed yet.
    pending: BTreeSet<u64>,
    /// What identifies each message of the batch when it is returned.
    ids: Vec<Option<String>>,
    /// Extra time that the broker may take over the batch, for its size.
    allowance: Duration,
}

pub(super) struct OpenChannel {
    pub(super) channel: Channel,
    pub(super) confirms: Receiver<Confirm>,
    pub(super) returns: Receiver<Return>,
    published: u64,
}

impl<'l> Publisher<'l> {
    /// `calls` shows a watchdog since when one has been going on.
    pub fn new(link: &'l Link, calls: &'l Calls) -> Publisher<'l> {
        Publisher {
            link,
            calls,
            open: None,
            pending: BTreeSet::new(),
            ids: Vec::new(),
            allowance: Duration::ZERO,
        }
    }

    /// Declares a task queue as the workers do.
    ///
    /// # Errors
    /// As [`Publisher::declare_task_queues`].
    pub fn declare_task_queue(&self, queue: &str) -> Result<(), PublishError> {
        self.declare_task_queues(&[queue])?.into_iter().collect()
    }

    /// Declares several; returns what came of each.
    ///
    /// # Errors
    /// [`PublishError::Lost`] alone; for each queue [`PublishError::Refused`] when somebody declared
    /// it with other arguments, [`PublishError::Unavailable`] while its node in a cluster is down.
    pub fn declare_task_queues(
        &self,
        queues: &[&str],
    ) -> Result<Vec<Result<(), PublishError>>, PublishError> {
        let _call = self.calls.begin();
        self.link.declare_task_queues(queues)
    }

    /// As [`Link::declare_dead_letters`].
    ///
    /// # Errors
    /// The same.
    pub fn declare_dead_letters(&self) -> Result<(), PublishError> {
        let _call = self.calls.begin();
        self.link.declare_dead_letters()
    }

    /// What RabbitMQ says of queues that have not taken a message.
    ///
    /// # Errors
    /// [`PublishError::Lost`] alone.
    pub fn look_for(&self, queues: &[&str]) -> Result<Vec<Found>, PublishError> {
        let _call = self.calls.begin();
        self.link.look_for(queues)
    }

    /// Republishes messages at the end of the queue that they came from, unchanged; returns what
    /// became of each copy.
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

    /// Publishes these messages through the default exchange, straight to the queues named by their
    /// keys, and waits for the confirms: what became of each.
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

    /// Sends messages, each with its exchange; larger ones may take longer.
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
        let sent = self.send_all(messages);
        sent.map_err(|error| self.fail(Some(error)))
    }

    fn send_all<'m>(
        &mut self,
        messages: impl Iterator<Item = (&'m str, Publish<'m>)>,
    ) -> Result<(), amiquip::Error> {
        let call = self.calls.begin_within(self.allowance);
        let open = match &mut self.open {
            Some(open) => open,
            none => none.insert(OpenChannel::new(self.link)?),
        };
        for (exchange, publish) in messages {
            self.ids.push(return_id(&publish.properties).cloned());
            open.channel.basic_publish(exchange, publish)?;
            open.published += 1;
            self.pending.insert(open.published);
            call.goes_on(self.allowance);
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
            let call = self.calls.begin_within(self.allowance);
            let confirm = open.confirms.recv_timeout(DEADLINE + self.allowance);
            drop(call);
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
        // A returned message arrives before its confirm.
        for returned in open.returns.try_iter() {
            // If a message without an id is returned, it may be any of those. Of ours, only
            // messages without an id that are put back are mandatory.
            let id = return_id(&returned.properties);
            for (outcome, own) in outcome.iter_mut().zip(&self.ids) {
                if own.as_ref() == id {
                    *outcome = Delivered::Unroutable;
                }
            }
        }
        Ok(outcome)
    }

    /// Abandons whatever is not confirmed yet, after a refusal on another connection: its confirms
    /// must not be taken for the next batch's.
    pub fn abandon(&mut self) {
        self.pending.clear();
        if let Some(open) = self.open.take() {
            let _call = self.calls.begin_within(self.allowance);
            // A refusal of what is abandoned does not matter.
            let _ = open.channel.close();
        }
    }

    /// Finds out why the channel is gone, and drops it.
    fn fail(&mut self, error: Option<amiquip::Error>) -> PublishError {
        let closed = self.open.take().map(|open| {
            let _call = self.calls.begin();
            open.channel.close()
        });
        // The broker's reason is reported once, to whichever call comes first.
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
    pub(super) fn new(link: &Link) -> Result<OpenChannel, amiquip::Error> {
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

pub(super) fn to_publish(message: &Outgoing) -> Publish<'_> {
    Publish {
        body: &message.body,
        routing_key: message.routing_key.clone(),
        mandatory: message.mandatory,
        immediate: false,
        properties: properties(message),
    }
}
