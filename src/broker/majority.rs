//! Whether a node of a cluster has the majority of the nodes with it.
//!
//! RabbitMQ that has Khepri keeps the connections of a node that is cut off from the others, and what needs
//! nobody else goes on there: handshakes, channels, looks at queues, even those whose leader it was. What
//! its consumers are given comes from nowhere. So it is asked for what only a majority can say: to bind a
//! queue, even if it is bound already.
//!
//! The question has a connection of its own, since RabbitMQ ends the one on which it has given up on it, 30
//! seconds later; and no answer says something about a node only if another one has answered meanwhile. While
//! the cluster chooses a leader, or RabbitMQ that has Mnesia waits for a node that is cut off, none answers.

use std::time::Duration;

use amiquip::{Channel, ExchangeDeclareOptions, ExchangeType, FieldTable};

use super::link::{Link, Node};
use super::presence::Unanswered;
use super::refusals::closed;
use super::topology::exclusive;
use crate::config;

/// How long an answer is waited for, and each step of the connection. It takes some milliseconds.
const PATIENCE: Duration = Duration::from_secs(1);
/// Nothing is ever published with it.
const KEY: &str = "omotes_orchestrator_majority";

/// A node that has had a majority with it, on a connection on which it can be asked again.
pub struct Majority {
    link: Link,
    queue: String,
    exchange: &'static str,
}

/// What a node says when it is asked for the first time.
pub enum Heard {
    Answer(Box<Majority>),
    /// It has taken the connection, and then said nothing.
    Silence,
    /// It says that this cannot be asked.
    Refusal(String),
    /// It does not take the connection, or it has been lost.
    Nothing,
}

impl Majority {
    /// Asks a node for what needs the majority, with a queue that it binds to `exchange`, a direct one.
    pub fn ask(config: &config::RabbitMq, node: &Node, exchange: &'static str) -> Heard {
        let Ok(link) = Link::open_on(config, node, PATIENCE, "asking for a majority") else {
            return Heard::Nothing;
        };
        let asked = link.ask_within(PATIENCE, move |channel| {
            let options = ExchangeDeclareOptions::default();
            channel.exchange_declare(ExchangeType::Direct, exchange, options)?;
            let options = exclusive(FieldTable::new());
            let queue = channel.queue_declare("", options)?.name().to_owned();
            bind(channel, &queue, exchange)?;
            Ok(queue)
        });
        let Ok(asked) = asked else {
            return Heard::Nothing;
        };
        let heard = match asked.answer() {
            Ok(queue) => {
                return Heard::Answer(Box::new(Majority {
                    link,
                    queue,
                    exchange,
                }));
            }
            Err(Unanswered::Silent) => Heard::Silence,
            Err(Unanswered::Error(error)) => match closed(&error) {
                Some((_, message)) => Heard::Refusal(message.to_owned()),
                None => Heard::Nothing,
            },
        };
        // What has no answer would hold up a farewell.
        link.kill();
        heard
    }

    /// Asks again, and says whether there was an answer. Without one this is of no more use.
    pub fn is_there(&self) -> bool {
        let (queue, exchange) = (self.queue.clone(), self.exchange);
        let question = move |channel: &Channel| bind(channel, &queue, exchange);
        let asked = self.link.ask_within(PATIENCE, question);
        let is_there = asked.is_ok_and(|asked| asked.answer().is_ok());
        if !is_there {
            self.link.kill();
        }
        is_there
    }

    pub fn close(self) {
        // Nothing depends on it.
        let _ = self.link.close_within(PATIENCE);
    }
}

fn bind(channel: &Channel, queue: &str, exchange: &str) -> Result<(), amiquip::Error> {
    channel.queue_bind(queue, exchange, KEY, FieldTable::new())
}
