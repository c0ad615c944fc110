//! Questions to Celery's workers, which answer to a queue that exists for one question.

use std::time::Duration;

use amiquip::{
    AmqpValue, ConsumerMessage, ConsumerOptions, ExchangeDeclareOptions, ExchangeType, FieldTable,
};
use anyhow::{Context, bail};
use crossbeam_channel::{after, select};

use super::Link;
use super::consumer::cancel;
use super::publisher::to_publish;
use super::topology::exclusive;
use crate::threads::{Calls, Signal};
use crate::wire::{Outgoing, REPLIES_EXCHANGE};

/// Prefetch of answers, which bounds what is in memory.
const PREFETCH: u16 = 5;
/// Anything larger is not an answer of a worker.
const LARGEST_ANSWER: usize = 1024 * 1024;

/// How long the queue of answers outlives its consumer.
const EXPIRES_MS: i64 = 60_000;

/// What is asked of the workers.
#[derive(Debug, Clone, Copy)]
pub struct Question<'q> {
    pub message: &'q Outgoing,
    /// The routing key that its answers come with.
    pub key: &'q str,
    /// How long they are waited for.
    pub time: Duration,
}

impl Link {
    /// Publishes a question and hands over the answers that arrive in time. Ends early, and returns
    /// false, when `stop` is given. `calls` shows a watchdog since when one has been going on.
    ///
    /// # Errors
    /// RabbitMQ refuses the exchange, or the connection is lost.
    pub fn ask(
        &self,
        question: &Question<'_>,
        calls: &Calls,
        stop: &Signal,
        hand_over: impl FnMut(&[u8]),
    ) -> anyhow::Result<bool> {
        self.ask_workers(question, calls, stop, hand_over)
            .with_context(|| self.name.clone())
    }

    fn ask_workers(
        &self,
        &Question { message, key, time }: &Question<'_>,
        calls: &Calls,
        stop: &Signal,
        mut hand_over: impl FnMut(&[u8]),
    ) -> anyhow::Result<bool> {
        let call = calls.begin();
        let channel = self.channel()?;
        let exchange = ExchangeDeclareOptions::default();
        channel.exchange_declare(ExchangeType::Direct, REPLIES_EXCHANGE, exchange)?;
        // It expires if the channel fails, which leaves the connection and its exclusive queues.
        let expires = ("x-expires".to_owned(), AmqpValue::LongLongInt(EXPIRES_MS));
        let options = exclusive(FieldTable::from([expires]));
        let queue = channel.queue_declare("", options)?.name().to_owned();
        channel.queue_bind(queue.as_str(), REPLIES_EXCHANGE, key, FieldTable::new())?;
        channel.qos(0, PREFETCH, false)?;
        let consumer = channel.basic_consume(queue.as_str(), ConsumerOptions::default())?;
        // Outlives the consumer: a delivery for one without receiver ends the connection.
        let answers = consumer.receiver().clone();
        channel.basic_publish(message.exchange, to_publish(message))?;
        drop(call);
        let time = after(time);
        let complete = loop {
            select! {
                recv(answers) -> message => match message {
                    Ok(ConsumerMessage::Delivery(delivery)) => {
                        if delivery.body.len() <= LARGEST_ANSWER {
                            hand_over(&delivery.body);
                        }
                        let _call = calls.begin();
                        delivery.ack(&channel)?;
                    }
                    Ok(_) | Err(_) => bail!("the queue of the workers' answers is gone"),
                },
                recv(time) -> _ => break true,
                recv(stop.receiver()) -> _ => break false,
            }
        };
        let _call = calls.begin();
        let consumers = [consumer];
        cancel(&consumers)?;
        drop(consumers);
        channel.queue_delete(queue, Default::default())?;
        channel.close()?;
        Ok(complete)
    }
}
