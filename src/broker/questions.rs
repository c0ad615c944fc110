//! Questions to Celery's workers, who answer into a queue that is there for one question.

use std::convert::Infallible;
use std::time::Duration;

use amiquip::{
    ConsumerMessage, ConsumerOptions, ExchangeDeclareOptions, ExchangeType, FieldTable, Publish,
    QueueDeclareOptions,
};
use anyhow::{Context, bail};
use crossbeam_channel::{Receiver, after, select};

use super::Link;
use super::consumer::cancel;
use super::values::properties;
use crate::busy::Busy;
use crate::wire::{Outgoing, REPLIES_EXCHANGE};

/// How many answers may be on their way, and so in memory.
const PREFETCH: u16 = 50;
/// More than that is no answer of a worker.
const LARGEST_ANSWER: usize = 1024 * 1024;

impl Link {
    /// Publishes a question and hands over the answers that come with `key` within `time`. Ends early,
    /// and returns false, when `stop` is disconnected. `busy` tells a watchdog since when a call has
    /// been waiting.
    ///
    /// # Errors
    /// RabbitMQ refuses the exchange, or the connection is lost.
    pub fn ask(
        &self,
        question: &Outgoing,
        key: &str,
        time: Duration,
        busy: &Busy,
        stop: &Receiver<Infallible>,
        hand_over: impl FnMut(&[u8]),
    ) -> anyhow::Result<bool> {
        busy.touch();
        let asked = self.ask_workers(question, key, time, busy, stop, hand_over);
        busy.idle();
        asked.with_context(|| self.name.clone())
    }

    fn ask_workers(
        &self,
        question: &Outgoing,
        key: &str,
        time: Duration,
        busy: &Busy,
        stop: &Receiver<Infallible>,
        mut hand_over: impl FnMut(&[u8]),
    ) -> anyhow::Result<bool> {
        let channel = self.channel()?;
        let exchange = ExchangeDeclareOptions::default();
        channel.exchange_declare(ExchangeType::Direct, REPLIES_EXCHANGE, exchange)?;
        let exclusive = QueueDeclareOptions {
            exclusive: true,
            ..QueueDeclareOptions::default()
        };
        let queue = channel.queue_declare("", exclusive)?.name().to_owned();
        channel.queue_bind(queue.as_str(), REPLIES_EXCHANGE, key, FieldTable::new())?;
        channel.qos(0, PREFETCH, false)?;
        let consumer = channel.basic_consume(queue.as_str(), ConsumerOptions::default())?;
        // Outlives the consumer: a delivery for one without receiver ends the connection.
        let answers = consumer.receiver().clone();
        let publish = Publish::with_properties(
            &question.body,
            question.routing_key.clone(),
            properties(question),
        );
        channel.basic_publish(question.exchange, publish)?;
        busy.idle();
        let time = after(time);
        let complete = loop {
            select! {
                recv(answers) -> message => match message {
                    Ok(ConsumerMessage::Delivery(delivery)) => {
                        if delivery.body.len() <= LARGEST_ANSWER {
                            hand_over(&delivery.body);
                        }
                        delivery.ack(&channel)?;
                    }
                    Ok(_) | Err(_) => bail!("the queue of the workers' answers is gone"),
                },
                recv(time) -> _ => break true,
                recv(stop) -> _ => break false,
            }
        };
        busy.touch();
        let consumers = [consumer];
        cancel(&consumers)?;
        drop(consumers);
        channel.queue_delete(queue, Default::default())?;
        channel.close()?;
        Ok(complete)
    }
}
