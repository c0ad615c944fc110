//! The thread that checks whether the nodes of a cluster that a session is on can serve it, and ends the
//! session where one cannot while another can. A session that has nothing to do would not notice.

use std::thread;
use std::time::Duration;

use anyhow::{anyhow, bail};
use log::{debug, warn};

use super::links::Links;
use crate::broker::{Heard, Link, Majority, Node};
use crate::config::{Config, RabbitMq};
use crate::threads::Signal;
use crate::wire::{OMOTES_EXCHANGE, REPLIES_EXCHANGE};

/// How often each is asked.
const PERIOD: Duration = Duration::from_secs(1);

/// The nodes that a session is on, if there are others.
pub(super) struct Nodes(Vec<Watched>);

/// A node that connections of the session are to.
struct Watched {
    /// Of a vhost there, and a direct exchange in it that the service uses.
    config: RabbitMq,
    exchange: &'static str,
    node: Node,
    others: Vec<Node>,
    /// None before it has been asked, and when it does not answer.
    majority: Option<Box<Majority>>,
    /// It has said that it cannot be asked.
    is_given_up: bool,
}

impl Nodes {
    pub(super) fn of(config: &Config, links: &Links) -> Nodes {
        let mut watched: Vec<Watched> = Vec::new();
        for (config, exchange) in [
            (&config.sdk_rabbitmq, OMOTES_EXCHANGE),
            (&config.celery_rabbitmq, REPLIES_EXCHANGE),
        ] {
            // Several addresses of one name are as a rule those of one node, such as localhost's.
            if config.servers.len() == 1 {
                continue;
            }
            let all = Node::all_of(config);
            for node in links.all().map(Link::node) {
                if !all.contains(node) || watched.iter().any(|one| one.node == *node) {
                    continue;
                }
                watched.push(Watched {
                    config: config.clone(),
                    exchange,
                    node: node.clone(),
                    others: all.iter().filter(|one| *one != node).cloned().collect(),
                    majority: None,
                    is_given_up: false,
                });
            }
        }
        Nodes(watched)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Asks each of them periodically until `stop` is given.
    ///
    /// # Errors
    /// One has no majority with it, and another one has.
    pub(super) fn run(&mut self, stop: &Signal) -> anyhow::Result<()> {
        while !stop.comes_within(PERIOD) {
            for watched in self.0.iter_mut().take_while(|_| !stop.is_given()) {
                watched.look(stop)?;
            }
        }
        Ok(())
    }

    /// Asks them while `body` goes on, and calls `kill` where one cannot serve, which is to end the body.
    ///
    /// # Errors
    /// As [`Nodes::run`], or the body's.
    pub(super) fn meanwhile<T>(
        &mut self,
        kill: impl FnOnce() + Send,
        body: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        if self.is_empty() {
            return body();
        }
        let (running, done) = Signal::pending();
        thread::scope(|scope| {
            let watching = thread::Builder::new()
                .name("nodes".to_owned())
                .spawn_scoped(scope, || self.run(&done).inspect_err(|_| kill()))?;
            let outcome = body();
            drop(running);
            match (watching.join(), outcome) {
                (Ok(Ok(())), outcome) => outcome,
                (Ok(Err(found)), Ok(_)) => Err(found),
                (Ok(Err(found)), Err(error)) => Err(error.context(format!("{found:#}"))),
                (Err(_), _) => Err(anyhow!("the thread that asks the nodes panicked")),
            }
        })
    }

    pub(super) fn close(self) {
        let asked = self.0.into_iter().filter_map(|watched| watched.majority);
        asked.for_each(|majority| majority.close());
    }
}

impl Watched {
    fn look(&mut self, stop: &Signal) -> anyhow::Result<()> {
        if self.is_given_up || self.answers() {
            return Ok(());
        }
        let mut others = self.others.iter();
        let Some(other) = others.find(|node| !stop.is_given() && self.serves(node)) else {
            debug!(
                "{} says nothing of what needs the majority of its cluster, and nor does another node",
                self.node
            );
            return Ok(());
        };
        if stop.is_given() {
            return Ok(());
        }
        // Once more: it may be able to answer since the other one is.
        match self.ask(&self.node) {
            Heard::Answer(majority) => self.majority = Some(majority),
            // A session that is stopping ends in good order.
            Heard::Silence if stop.is_given() => {}
            Heard::Silence => {
                self.node.suspect();
                bail!(
                    "{} has no majority of its cluster with it, as a node that is cut off from the others: it says \
                     nothing where {other} answers",
                    self.node
                );
            }
            Heard::Refusal(_) | Heard::Nothing => {}
        }
        Ok(())
    }

    /// Whether there is nothing to find out: it answers, or cannot be asked.
    fn answers(&mut self) -> bool {
        if let Some(majority) = self.majority.take() {
            let is_there = majority.is_there();
            self.majority = is_there.then_some(majority);
            return is_there;
        }
        match self.ask(&self.node) {
            Heard::Answer(majority) => self.majority = Some(majority),
            Heard::Silence => return false,
            // Its connections will end, and tell.
            Heard::Nothing => {}
            Heard::Refusal(why) => {
                warn!(
                    "{} cannot be asked whether it has a majority with it: {why}",
                    self.node
                );
                self.is_given_up = true;
            }
        }
        true
    }

    fn serves(&self, node: &Node) -> bool {
        matches!(self.ask(node), Heard::Answer(_))
    }

    fn ask(&self, node: &Node) -> Heard {
        Majority::ask(&self.config, node, self.exchange)
    }
}
