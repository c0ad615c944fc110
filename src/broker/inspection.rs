//! A look at what others have made of a vhost, which changes nothing that lasts.

use amiquip::{
    AmqpProperties, AmqpValue, Exchange, ExchangeDeclareOptions, ExchangeType, FieldTable, Publish,
};
use anyhow::Context;
use uuid::Uuid;

use super::Link;
use super::refusals::{NOT_FOUND, PRECONDITION_FAILED};
use super::topology::durable;
use crate::domain::overview::Depth;
use crate::wire::TASK_QUEUE_MAX_PRIORITY;

/// How something stands that this program and others rely on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It is not there; whoever needs it declares it.
    Absent,
    /// As everybody declares it.
    Good(Depth),
    /// Declared otherwise, or somebody's alone; RabbitMQ's words.
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

/// What a refusal says of that which was asked for; an error when it is none.
fn standing(error: amiquip::Error) -> anyhow::Result<Standing> {
    match error {
        amiquip::Error::ServerClosedChannel { code, message, .. } => match code {
            NOT_FOUND => Ok(Standing::Absent),
            FORBIDDEN => Ok(Standing::Forbidden(message)),
            PRECONDITION_FAILED | LOCKED => Ok(Standing::Otherwise(message)),
            _ => Err(anyhow::anyhow!("{code} {message}")),
        },
        error => Err(error.into()),
    }
}

impl Link {
    /// How a queue stands: `tasks` if it is one for tasks. Whether the user may read is only seen of
    /// one that is empty, for a look at a message would count as its delivery.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn inspect_queue(&self, queue: &str, tasks: bool) -> anyhow::Result<Standing> {
        // On a channel each, since a refusal closes it.
        let declared = match self.channel()?.queue_declare_passive(queue) {
            Ok(declared) => Depth {
                messages: declared.declared_message_count().unwrap_or_default(),
                consumers: declared.declared_consumer_count().unwrap_or_default(),
            },
            Err(error) => return standing(error),
        };
        let mut arguments = FieldTable::new();
        if tasks {
            let priority = AmqpValue::LongInt(TASK_QUEUE_MAX_PRIORITY);
            arguments.insert("x-max-priority".to_owned(), priority);
        }
        if let Err(error) = self.channel()?.queue_declare(queue, durable(arguments)) {
            return standing(error);
        }
        let channel = self.channel()?;
        if !tasks && declared.messages == 0 {
            // One that has come meanwhile goes back with the channel.
            if let Err(error) = channel.basic_get(queue, false) {
                return standing(error);
            }
        }
        channel.close().context("looking at a queue")?;
        Ok(Standing::Good(declared))
    }

    /// Whether a queue for tasks can be declared that is not there yet, as by a new workflow's workers. It
    /// is deleted at once.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn inspect_new_task_queue(&self) -> anyhow::Result<Standing> {
        let name = format!("omotes_orchestrator_doctor_{}", Uuid::new_v4());
        let arguments = FieldTable::from([
            (
                "x-max-priority".to_owned(),
                AmqpValue::LongInt(TASK_QUEUE_MAX_PRIORITY),
            ),
            // Where the connection is lost before it is deleted.
            ("x-expires".to_owned(), AmqpValue::LongInt(60_000)),
        ]);
        let channel = self.channel()?;
        if let Err(error) = channel.queue_declare(name.as_str(), durable(arguments)) {
            return standing(error);
        }
        channel.queue_delete(name, Default::default())?;
        channel.close().context("looking at a new queue")?;
        Ok(Standing::Good(Depth::default()))
    }

    /// How an exchange of this kind stands.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn inspect_exchange(&self, exchange: &str, kind: ExchangeKind) -> anyhow::Result<Standing> {
        if let Err(error) = self.channel()?.exchange_declare_passive(exchange) {
            return standing(error);
        }
        let kind = match kind {
            ExchangeKind::Direct => ExchangeType::Direct,
            ExchangeKind::Fanout => ExchangeType::Fanout,
        };
        let options = ExchangeDeclareOptions::default();
        match self.channel()?.exchange_declare(kind, exchange, options) {
            Ok(_) => Ok(Standing::Good(Depth::default())),
            Err(error) => standing(error),
        }
    }

    /// Whether RabbitMQ takes a message of so many bytes, which no queue gets.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn inspect_publishing(&self, bytes: usize) -> anyhow::Result<Standing> {
        let channel = self.channel()?;
        let confirms = channel.listen_for_publisher_confirms()?;
        channel.enable_publisher_confirms()?;
        let body = vec![b' '; bytes];
        let key = "omotes_orchestrator_doctor";
        let publish = Publish::with_properties(&body, key, AmqpProperties::default());
        Exchange::direct(&channel).publish(publish)?;
        if confirms.recv().is_ok() {
            channel.close().context("publishing")?;
            return Ok(Standing::Good(Depth::default()));
        }
        // What closed the channel is told to whoever uses it next.
        match channel.close() {
            Ok(()) => anyhow::bail!("RabbitMQ neither took nor refused a message"),
            Err(error) => standing(error),
        }
    }
}
