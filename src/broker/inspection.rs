//! Inspects what others have declared in a vhost, without changing anything that lasts.

use amiquip::{
    AmqpProperties, AmqpValue, Exchange, ExchangeDeclareOptions, ExchangeType, FieldTable, Publish,
};
use anyhow::Context;
use uuid::Uuid;

use super::Link;
use super::link::give_back;
use super::presence::depth;
pub use super::refusals::is_replicated_by;
use super::refusals::{NOT_FOUND, PRECONDITION_FAILED, closed};
use super::topology::durable;
use crate::domain::overview::Depth;
use crate::wire::TASK_QUEUE_MAX_PRIORITY;

/// The state of a queue or an exchange that this program and others rely on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inspected {
    /// It does not exist; whoever needs it declares it.
    Absent,
    /// As everybody declares it.
    Good(Depth),
    /// Declared with other arguments, or exclusive to somebody; RabbitMQ's words.
    Otherwise(String),
    /// This user may not do what the service does with it; RabbitMQ's words.
    Forbidden(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExchangeKind {
    Direct,
    Fanout,
}

/// AMQP's ACCESS_REFUSED.
const FORBIDDEN: u16 = 403;
/// AMQP's RESOURCE_LOCKED.
const LOCKED: u16 = 405;

/// What a refusal says about the thing that was asked for; an error if it is no refusal.
fn inspected(error: amiquip::Error) -> anyhow::Result<Inspected> {
    match error {
        amiquip::Error::ServerClosedChannel { code, message, .. } => match code {
            NOT_FOUND => Ok(Inspected::Absent),
            FORBIDDEN => Ok(Inspected::Forbidden(message)),
            PRECONDITION_FAILED | LOCKED => Ok(Inspected::Otherwise(message)),
            _ => Err(anyhow::anyhow!("{code} {message}")),
        },
        error => Err(error.into()),
    }
}

impl Link {
    /// The state of a queue, a task queue if `tasks`. Whether the user may read is checked only on
    /// an empty queue, since getting a message would count as a delivery.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn inspect_queue(&self, queue: &str, tasks: bool) -> anyhow::Result<Inspected> {
        // On a channel each, since a refusal closes it.
        let declared = match self.channel()?.queue_declare_passive(queue) {
            Ok(declared) => depth(&declared),
            Err(error) => return inspected(error),
        };
        let mut arguments = FieldTable::new();
        if tasks {
            let priority = AmqpValue::LongInt(TASK_QUEUE_MAX_PRIORITY);
            arguments.insert("x-max-priority".to_owned(), priority);
        }
        if let Err(error) = self.channel()?.queue_declare(queue, durable(arguments)) {
            return inspected(error);
        }
        let channel = self.channel()?;
        if !tasks && declared.messages == 0 {
            // A message that arrived meanwhile returns.
            if let Err(error) = channel.basic_get(queue, false) {
                return inspected(error);
            }
        }
        give_back(channel).context("looking at a queue")?;
        Ok(Inspected::Good(declared))
    }

    /// The state of a queue that is for one connection alone: [`Inspected::Otherwise`] while one
    /// holds it, [`Inspected::Good`] if it belongs to nobody.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn inspect_exclusive_queue(&self, queue: &str) -> anyhow::Result<Inspected> {
        let channel = self.channel()?;
        if let Err(error) = channel.queue_declare_passive(queue) {
            return inspected(error);
        }
        channel.close().context("looking at a queue")?;
        Ok(Inspected::Good(Depth::default()))
    }

    /// Whether a queue that exists is a quorum queue. RabbitMQ's log has an error for each that is not.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn is_quorum_queue(&self, queue: &str) -> anyhow::Result<bool> {
        let quorum = AmqpValue::LongString("quorum".to_owned());
        let options = durable(FieldTable::from([("x-queue-type".to_owned(), quorum)]));
        let channel = self.channel()?;
        match channel.queue_declare(queue, options) {
            Ok(_) => {}
            Err(error) => {
                return match closed(&error) {
                    Some((PRECONDITION_FAILED, message)) => Ok(is_replicated_by(message)),
                    Some(_) | None => Err(error).context("asking for the type of a queue"),
                };
            }
        }
        channel.close().context("asking for the type of a queue")?;
        Ok(true)
    }

    /// Whether a new task queue can be declared, as a new workflow's workers would. It is deleted
    /// at once.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn inspect_new_task_queue(&self) -> anyhow::Result<Inspected> {
        let name = format!("omotes_orchestrator_doctor_{}", Uuid::new_v4());
        let arguments = FieldTable::from([
            (
                "x-max-priority".to_owned(),
                AmqpValue::LongInt(TASK_QUEUE_MAX_PRIORITY),
            ),
            // In case the connection is lost before it is deleted.
            ("x-expires".to_owned(), AmqpValue::LongInt(60_000)),
        ]);
        let channel = self.channel()?;
        if let Err(error) = channel.queue_declare(name.as_str(), durable(arguments)) {
            return inspected(error);
        }
        channel.queue_delete(name, Default::default())?;
        channel.close().context("looking at a new queue")?;
        Ok(Inspected::Good(Depth::default()))
    }

    /// The state of an exchange of this kind.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn inspect_exchange(
        &self,
        exchange: &str,
        kind: ExchangeKind,
    ) -> anyhow::Result<Inspected> {
        if let Err(error) = self.channel()?.exchange_declare_passive(exchange) {
            return inspected(error);
        }
        let kind = match kind {
            ExchangeKind::Direct => ExchangeType::Direct,
            ExchangeKind::Fanout => ExchangeType::Fanout,
        };
        let options = ExchangeDeclareOptions::default();
        match self.channel()?.exchange_declare(kind, exchange, options) {
            Ok(_) => Ok(Inspected::Good(Depth::default())),
            Err(error) => inspected(error),
        }
    }

    /// Whether RabbitMQ takes a message of this many bytes, which is routed to no queue.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn inspect_publishing(&self, bytes: usize) -> anyhow::Result<Inspected> {
        let channel = self.channel()?;
        let confirms = channel.listen_for_publisher_confirms()?;
        channel.enable_publisher_confirms()?;
        let body = vec![b' '; bytes];
        let key = "omotes_orchestrator_doctor";
        let publish = Publish::with_properties(&body, key, AmqpProperties::default());
        Exchange::direct(&channel).publish(publish)?;
        if confirms.recv().is_ok() {
            channel.close().context("publishing")?;
            return Ok(Inspected::Good(Depth::default()));
        }
        // The next call on the channel returns what closed it.
        match channel.close() {
            Ok(()) => anyhow::bail!("RabbitMQ neither took nor refused a message"),
            Err(error) => inspected(error),
        }
    }
}
