//! Questions to Celery's workers, which answer to a queue that exists for one question.

use std::ops::ControlFlow;
use std::time::Duration;

use amiquip::{
    AmqpValue, Channel, ConsumerMessage, ConsumerOptions, Delivery, ExchangeDeclareOptions,
    ExchangeType, FieldTable,
};
use anyhow::{Context, bail};
use crossbeam_channel::{after, select};

use super::Link;
use super::consumer::cancel;
use super::presence::Found;
use super::publisher::to_publish;
use super::topology::exclusive;
use crate::threads::{Calls, Signal};
use crate::wire::{Outgoing, REPLIES_EXCHANGE};

/// Prefetch of answers: on a busy machine each round trip takes its time. What is too large is dropped
/// faster than the next one can be read.
const PREFETCH: u16 = 50;
/// Anything larger is not an answer of a worker.
const LARGEST_ANSWER: usize = 1024 * 1024;
/// What the queue of answers keeps of those that are not taken at once; it drops the oldest.
const KEPT_BYTES: i64 = 16 * 1024 * 1024;

/// About how many queues RabbitMQ is asked at once.
const ASKED_AT_ONCE: usize = 20;
/// How long the queue of answers outlives its consumer.
const EXPIRES_MS: i64 = 60_000;

/// What is asked of the workers.
#[derive(Debug, Clone)]
pub struct Question {
    pub message: Outgoing,
    /// The routing key that its answers come with.
    pub key: String,
}

impl Link {
    /// Publishes questions and hands over the answers that arrive within `time`, each with the place of
    /// its question. Ends early when that breaks off, and also, and returns false, when `stop` is given.
    /// `calls` shows a watchdog since when one has been going on.
    ///
    /// # Errors
    /// RabbitMQ refuses the exchange, or the connection is lost.
    pub fn ask(
        &self,
        questions: &[Question],
        time: Duration,
        calls: &Calls,
        stop: &Signal,
        hand_over: impl FnMut(usize, &[u8]) -> ControlFlow<()>,
    ) -> anyhow::Result<bool> {
        self.ask_workers(questions, time, calls, stop, hand_over)
            .with_context(|| self.name.clone())
    }

    /// Whether RabbitMQ has these queues, or may have: one whose node is down counts as there.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn may_have(&self, queues: &[&str]) -> anyhow::Result<Vec<bool>> {
        let mut found = Vec::with_capacity(queues.len());
        for some in queues.chunks(ASKED_AT_ONCE) {
            let some = self.look_for(some)?;
            found.extend(some.iter().map(|one| *one != Found::Missing));
        }
        Ok(found)
    }

    fn ask_workers(
        &self,
        questions: &[Question],
        time: Duration,
        calls: &Calls,
        stop: &Signal,
        mut hand_over: impl FnMut(usize, &[u8]) -> ControlFlow<()>,
    ) -> anyhow::Result<bool> {
        let call = calls.begin();
        let channel = self.channel()?;
        let queue = queue_of_answers(&channel, questions)?;
        channel.qos(0, PREFETCH, false)?;
        let consumer = channel.basic_consume(queue.as_str(), ConsumerOptions::default())?;
        // Outlives the consumer: a delivery for one without receiver ends the connection.
        let answers = consumer.receiver().clone();
        for Question { message, .. } in questions {
            channel.basic_publish(message.exchange, to_publish(message))?;
        }
        drop(call);
        let time = after(time);
        let complete = loop {
            select! {
                recv(answers) -> message => match message {
                    Ok(ConsumerMessage::Delivery(answer)) => {
                        let goes_on = match asked(questions, &answer) {
                            Some(place) => hand_over(place, &answer.body),
                            None => ControlFlow::Continue(()),
                        };
                        let _call = calls.begin();
                        answer.ack(&channel)?;
                        if goes_on.is_break() {
                            break true;
                        }
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

/// A queue for the answers to these questions alone.
fn queue_of_answers(channel: &Channel, questions: &[Question]) -> Result<String, amiquip::Error> {
    let exchange = ExchangeDeclareOptions::default();
    channel.exchange_declare(ExchangeType::Direct, REPLIES_EXCHANGE, exchange)?;
    // It expires if the channel fails, which leaves the connection and its exclusive queues.
    let arguments = [
        ("x-expires", EXPIRES_MS),
        ("x-max-length-bytes", KEPT_BYTES),
    ];
    let arguments = arguments.map(|(name, value)| (name.to_owned(), AmqpValue::LongLongInt(value)));
    let options = exclusive(FieldTable::from(arguments));
    let queue = channel.queue_declare("", options)?.name().to_owned();
    for Question { key, .. } in questions {
        let key = key.as_str();
        channel.queue_bind(queue.as_str(), REPLIES_EXCHANGE, key, FieldTable::new())?;
    }
    Ok(queue)
}

/// The place of the question that this is an answer to. One with the ticket of another, or with none of
/// their keys, is none.
fn asked(questions: &[Question], answer: &Delivery) -> Option<usize> {
    if answer.body.len() > LARGEST_ANSWER {
        return None;
    }
    let key = answer.routing_key.as_str();
    let ticket = answer.properties.headers().as_ref();
    let ticket = ticket.and_then(|headers| headers.get("ticket"));
    if let Some(AmqpValue::LongString(ticket)) = ticket
        && ticket != key
    {
        return None;
    }
    questions.iter().position(|question| question.key == key)
}
