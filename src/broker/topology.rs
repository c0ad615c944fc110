//! Declares, inspects and deletes exchanges, queues and bindings.

use std::time::Duration;

use amiquip::{AmqpValue, ExchangeDeclareOptions, ExchangeType, FieldTable, QueueDeclareOptions};
use anyhow::{Context, anyhow};

use super::link::Link;
use super::presence::{Asked, Found, Unanswered, depth, silence};
use super::refusals::{
    NOT_FOUND, NOT_OURS, PRECONDITION_FAILED, PublishError, RESOURCE_LOCKED, closed, explained,
    is_replicated, task_queue_refusal, unavailable,
};
use crate::domain::overview::Depth;
use crate::wire::{
    CANCELS_QUEUE, DEAD_LETTERS_QUEUE, OMOTES_EXCHANGE, PIDBOX_EXCHANGE, SUBMISSIONS_QUEUE,
    TASK_QUEUE_MAX_PRIORITY,
};

impl Link {
    /// Declares what clients rely on.
    ///
    /// # Errors
    /// Somebody declared one of them otherwise, or the connection is lost.
    pub fn declare_for_clients(&self) -> anyhow::Result<()> {
        let channel = self.channel()?;
        let options = ExchangeDeclareOptions::default();
        let declared = channel.exchange_declare(ExchangeType::Direct, OMOTES_EXCHANGE, options);
        self.named(declared, "exchange", OMOTES_EXCHANGE)?;
        for queue in [SUBMISSIONS_QUEUE, CANCELS_QUEUE] {
            self.declare_ours(queue)?;
            let bound = channel.queue_bind(queue, OMOTES_EXCHANGE, queue, FieldTable::new());
            self.named(bound, "binding of the queue", queue)?;
        }
        channel.close().context("declaring the queues of clients")
    }

    /// Declares what workers send their events to.
    ///
    /// # Errors
    /// As [`Link::declare_for_clients`].
    pub fn declare_for_workers(&self, queues: &[&str]) -> anyhow::Result<()> {
        queues.iter().try_for_each(|queue| self.declare_ours(queue))
    }

    /// Declares a queue as OMOTES's programs do; one that its operator has made a quorum queue serves as
    /// well.
    fn declare_ours(&self, queue: &str) -> anyhow::Result<()> {
        match self.declare(queue, durable(FieldTable::new())) {
            Err(error) if is_replicated(&error) => Ok(()),
            declared => self.named(declared.map(drop), "queue", queue),
        }
    }

    /// Declares the exchange through which workers hear revokes.
    ///
    /// # Errors
    /// As [`Link::declare_for_clients`].
    pub fn declare_pidbox(&self) -> anyhow::Result<()> {
        let channel = self.channel()?;
        let options = ExchangeDeclareOptions::default();
        let declared = channel.exchange_declare(ExchangeType::Fanout, PIDBOX_EXCHANGE, options);
        self.named(declared, "exchange", PIDBOX_EXCHANGE)?;
        channel
            .close()
            .context("declaring Celery's exchange for remote control")
    }

    /// The outcome of a declaration, whose error names what was declared: when RabbitMQ does not
    /// answer, the error itself says nothing.
    fn named<T>(
        &self,
        declared: Result<T, amiquip::Error>,
        kind: &str,
        name: &str,
    ) -> anyhow::Result<T> {
        declared
            .map_err(explained)
            .with_context(|| format!("{}: declaring the {kind} {name:?}", self.name))
    }

    /// Declares task queues as the workers do, all at once.
    pub(super) fn declare_task_queues(
        &self,
        queues: &[&str],
    ) -> Result<Vec<Result<(), PublishError>>, PublishError> {
        let ask = |queue: &&str| {
            let queue = (*queue).to_owned();
            let priority = AmqpValue::LongInt(TASK_QUEUE_MAX_PRIORITY);
            let arguments = FieldTable::from([("x-max-priority".to_owned(), priority)]);
            let options = durable(arguments);
            self.ask_apart(move |channel| channel.queue_declare(queue, options).map(drop))
        };
        let asked: Vec<_> = queues.iter().map(ask).collect::<Result<_, _>>()?;
        let answer = |(asked, queue): (Asked<()>, &&str)| match asked.answer() {
            Ok(()) => Ok(()),
            Err(Unanswered::Silent) => Err(PublishError::Unavailable(silence())),
            Err(Unanswered::Error(error)) => Err(match closed(&error) {
                Some((code, message)) => task_queue_refusal(queue, code, message),
                None => self.lost(error, &format!("declaring the task queue {queue:?}")),
            }),
        };
        Ok(asked.into_iter().zip(queues).map(answer).collect())
    }

    /// Declares the dead-letter queue of this vhost. One that somebody declared with other
    /// arguments serves as well.
    ///
    /// # Errors
    /// [`PublishError::Unavailable`] with what the broker says where that is not possible.
    pub fn declare_dead_letters(&self) -> Result<(), PublishError> {
        let asked = self.ask_apart(|channel| {
            let options = durable(FieldTable::new());
            channel.queue_declare(DEAD_LETTERS_QUEUE, options).map(drop)
        })?;
        match asked.answer() {
            Ok(()) => Ok(()),
            Err(Unanswered::Silent) => Err(PublishError::Unavailable(silence())),
            Err(Unanswered::Error(error)) => match closed(&error) {
                Some((PRECONDITION_FAILED, _)) => Ok(()),
                Some((NOT_FOUND, message)) => Err(PublishError::Unavailable(unavailable(message))),
                Some((_, message)) => Err(PublishError::Unavailable(message.to_owned())),
                None => Err(self.lost(error, "declaring the queue of dead letters")),
            },
        }
    }

    /// Declares a queue on a channel of its own, since a refusal closes the channel. Returns its
    /// name.
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

    /// Declares an exclusive queue, bound to a key of an exchange, and returns its name.
    ///
    /// # Errors
    /// As [`Link::declare_for_clients`].
    pub fn declare_private_queue(&self, exchange: &str, key: &str) -> anyhow::Result<String> {
        let channel = self.channel()?;
        let options = exclusive(FieldTable::new());
        let declared = channel.queue_declare("", options);
        let declared = self.named(declared, "private queue for", key)?;
        let queue = declared.name().to_owned();
        let bound = channel.queue_bind(queue.as_str(), exchange, key, FieldTable::new());
        self.named(bound, "binding of the private queue for", key)?;
        channel.close().context("declaring a private queue")?;
        Ok(queue)
    }

    /// Tries to declare a queue of this name as exclusive; an existing one that is exclusive to
    /// nobody serves as well. It comes with a mark that shows others that the queue is held
    /// ([`Mark`]).
    ///
    /// # Errors
    /// The connection is lost.
    pub fn claim_queue(&self, queue: &str, mark: Mark) -> anyhow::Result<Claim> {
        if let Some(why) = self.why_not_claimed(queue)? {
            return Ok(Claim::Refused(why));
        }
        self.declare_mark(mark)
            .or_else(|error| match closed(&error) {
                Some((_, message)) => Ok(Claim::Refused(message.to_owned())),
                None => Err(anyhow!(error).context(format!("{}: the mark of {queue}", self.name))),
            })
    }

    /// Declares the queue. Its node may be down, and nothing else is to wait for that.
    fn why_not_claimed(&self, queue: &str) -> anyhow::Result<Option<String>> {
        let name = queue.to_owned();
        let asked = self.ask_apart(move |channel| {
            let options = exclusive(FieldTable::new());
            channel.queue_declare(name, options).map(drop)
        })?;
        let error = match asked.answer() {
            Ok(()) => return Ok(None),
            Err(Unanswered::Silent) => return Ok(Some(silence())),
            Err(Unanswered::Error(error)) => error,
        };
        let Some((code, message)) = closed(&error) else {
            return Err(anyhow!(error).context(format!("{}: {queue}", self.name)));
        };
        if !matches!(code, RESOURCE_LOCKED | PRECONDITION_FAILED) {
            return Ok(Some(message.to_owned()));
        }
        Ok(match self.look_for(&[queue])?.remove(0) {
            Found::There => None,
            Found::Silent => Some(silence()),
            // The first refusal says more.
            Found::Missing | Found::NotOurs | Found::Unavailable(_) => Some(message.to_owned()),
        })
    }

    fn declare_mark(&self, mark: Mark) -> Result<Claim, amiquip::Error> {
        // It takes messages and drops them.
        let nothing = [("x-max-length".to_owned(), AmqpValue::LongInt(0))];
        let channel = self.channel()?;
        let options = exclusive(FieldTable::from(nothing));
        let marker = channel.queue_declare("", options)?.name().to_owned();
        channel.queue_bind(marker.as_str(), mark.exchange, mark.key, FieldTable::new())?;
        channel.close()?;
        Ok(Claim::Held { marker })
    }

    /// The depths of these queues; None for one that does not exist or may not be inspected.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn depths(&self, queues: &[&str]) -> anyhow::Result<Vec<Option<Depth>>> {
        let mut depths = Vec::with_capacity(queues.len());
        let mut channel = self.channel()?;
        for queue in queues {
            depths.push(match channel.queue_declare_passive(*queue) {
                Ok(declared) => Some(depth(&declared)),
                // A refusal closes the channel. Nothing is known of a queue that is exclusive to
                // somebody.
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
}

pub(super) fn durable(arguments: FieldTable) -> QueueDeclareOptions {
    QueueDeclareOptions {
        durable: true,
        arguments,
        ..QueueDeclareOptions::default()
    }
}

pub(super) fn exclusive(arguments: FieldTable) -> QueueDeclareOptions {
    QueueDeclareOptions {
        exclusive: true,
        arguments,
        ..QueueDeclareOptions::default()
    }
}

/// Whether this connection holds a queue that others want too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    Held {
        /// The queue that is its mark.
        marker: String,
    },
    /// What the broker says: usually that somebody else holds it exclusively.
    Refused(String),
}

/// A routing key that is bound while somebody holds the claim: a mandatory message to it is
/// returned otherwise. So others need not ask for the queue itself, which RabbitMQ would log as an
/// error each time.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    pub exchange: &'static str,
    pub key: &'static str,
}
