//! Questions about one queue, with a short deadline: while its node in a cluster is down or hangs,
//! RabbitMQ may take a minute or more to answer, and nothing else should wait for that.

use std::mem;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{Channel, Queue};
use anyhow::Context;
use crossbeam_channel::{Receiver, RecvTimeoutError, after, bounded};

use super::link::Link;
use super::refusals::{
    NOT_FOUND, NOT_OURS, PublishError, RESOURCE_LOCKED, closed, is_missing, unavailable,
};
use crate::domain::overview::{ClientQueue, Depth};

/// How long an answer is waited for: less than what a stop leaves a handler.
const PATIENCE: Duration = Duration::from_secs(3);

/// What RabbitMQ says of a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    There,
    Missing,
    /// It is exclusive to somebody, or may not be looked at.
    NotOurs,
    /// For now; RabbitMQ's words.
    Unavailable(String),
    /// Nothing, for now.
    Silent,
}

impl Found {
    /// Why it may take later what it does not take now, if that is so.
    pub fn why_unavailable(&self) -> Option<String> {
        match self {
            Found::There | Found::Missing | Found::NotOurs => None,
            Found::Unavailable(message) => Some(unavailable(message)),
            Found::Silent => Some(silence()),
        }
    }
}

pub(super) fn silence() -> String {
    format!("it is not available: RabbitMQ has not answered about it for {PATIENCE:?}")
}

/// Why there is no answer to a question, or not the one that was hoped for.
pub(super) enum Unanswered {
    Silent,
    Error(amiquip::Error),
}

/// A question that has been asked.
pub(super) struct Asked<T> {
    answer: Receiver<Result<T, amiquip::Error>>,
    deadline: Instant,
}

impl<T> Asked<T> {
    pub(super) fn answer(self) -> Result<T, Unanswered> {
        match self.answer.recv_deadline(self.deadline) {
            Ok(answer) => answer.map_err(Unanswered::Error),
            Err(RecvTimeoutError::Timeout) => Err(Unanswered::Silent),
            // Its thread has panicked.
            Err(RecvTimeoutError::Disconnected) => {
                Err(Unanswered::Error(amiquip::Error::EventLoopDropped))
            }
        }
    }
}

impl Link {
    /// Asks for something on a channel of its own, which a refusal closes, and on a thread of its
    /// own: nothing but an answer or the connection's end frees a call. Several can be asked at once.
    pub(super) fn ask_apart<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Channel) -> Result<T, amiquip::Error> + Send + 'static,
    ) -> Result<Asked<T>, PublishError> {
        self.ask_within(PATIENCE, question)
    }

    /// The same, with an answer within `patience`.
    pub(super) fn ask_within<T: Send + 'static>(
        &self,
        patience: Duration,
        question: impl FnOnce(&Channel) -> Result<T, amiquip::Error> + Send + 'static,
    ) -> Result<Asked<T>, PublishError> {
        let channel = self.channel();
        let channel = channel.map_err(|error| self.lost(error, "opening a channel"))?;
        let (sender, answer) = bounded(1);
        let unanswered = Counted::new(&self.unanswered);
        let ask = move || {
            let answer = question(&channel);
            let answer = answer.and_then(|answer| channel.close().map(|()| answer));
            drop(unanswered);
            // Nobody may be waiting for it any more.
            let _ = sender.send(answer);
        };
        let deadline = Instant::now() + patience;
        let thread = thread::Builder::new().name("question".to_owned());
        let started = thread.spawn(ask).context("starting a thread");
        started.map_err(PublishError::Lost)?;
        Ok(Asked { answer, deadline })
    }

    /// What RabbitMQ says of these queues.
    ///
    /// # Errors
    /// [`PublishError::Lost`] alone.
    pub(super) fn look_for(&self, queues: &[&str]) -> Result<Vec<Found>, PublishError> {
        let ask = |queue: &&str| {
            let queue = (*queue).to_owned();
            self.ask_apart(move |channel| channel.queue_declare_passive(queue).map(drop))
        };
        let asked: Vec<_> = queues.iter().map(ask).collect::<Result<_, _>>()?;
        let answers = asked.into_iter().map(|asked| match asked.answer() {
            Ok(()) => Ok(Found::There),
            Err(Unanswered::Silent) => Ok(Found::Silent),
            Err(Unanswered::Error(error)) => match closed(&error) {
                Some((code, message)) => Ok(found(code, message)),
                None => Err(self.lost(error, "looking for a queue")),
            },
        });
        answers.collect()
    }
}

impl Link {
    /// The depths of these queues, as far as RabbitMQ tells soon; None also for one that does not exist or
    /// may not be inspected.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn depths_in_time(&self, queues: &[&str]) -> anyhow::Result<Vec<Option<Depth>>> {
        let mut depths = Vec::with_capacity(queues.len());
        while depths.len() < queues.len() {
            // Together, up to one about which there is no good answer.
            let rest: Vec<_> = queues[depths.len()..]
                .iter()
                .map(|queue| (*queue).to_owned())
                .collect();
            let found = Arc::new(Mutex::new(Vec::new()));
            let so_far = Arc::clone(&found);
            let asked = self.ask_apart(move |channel| {
                rest.into_iter().try_for_each(|queue| {
                    let depth = depth(&channel.queue_declare_passive(queue)?);
                    so_far
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(depth);
                    Ok(())
                })
            })?;
            let answer = asked.answer();
            let found = mem::take(&mut *found.lock().unwrap_or_else(PoisonError::into_inner));
            depths.extend(found.into_iter().map(Some));
            match answer {
                Ok(()) => break,
                Err(Unanswered::Silent) if depths.len() == queues.len() => break,
                Err(Unanswered::Error(error)) if closed(&error).is_none() => {
                    return Err(self.lost(error, "looking at queues").into());
                }
                Err(Unanswered::Silent | Unanswered::Error(_)) => depths.push(None),
            }
        }
        Ok(depths)
    }
}

/// The pauses before each look at whether somebody consumes a queue.
const LOOKS: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_millis(1000),
];

impl Link {
    /// What is in the queue of a client's, as far as RabbitMQ tells soon. It creates none and takes nothing out
    /// of it; but a queue that goes when nobody uses it for a time stays for that time from now on.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn client_queue(&self, queue: &str) -> anyhow::Result<Option<ClientQueue>> {
        let queue = queue.to_owned();
        let asked = self.ask_apart(move |channel| {
            let declared = channel.queue_declare_passive(queue)?;
            Ok(depth(&declared))
        })?;
        Ok(match asked.answer() {
            Ok(Depth { messages: 1.., .. }) => Some(ClientQueue::Full),
            Ok(Depth { consumers: 1.., .. }) => Some(ClientQueue::Heard),
            Ok(_) => Some(ClientQueue::Empty),
            Err(Unanswered::Silent) => None,
            Err(Unanswered::Error(error)) => match closed(&error) {
                Some((RESOURCE_LOCKED, _)) => Some(ClientQueue::Locked),
                Some((code, message)) => {
                    let is_gone = found(code, message) == Found::Missing;
                    is_gone.then_some(ClientQueue::Gone)
                }
                None => return Err(self.lost(error, "looking at a queue").into()),
            },
        })
    }

    /// Whether a queue is there and nobody consumes it. A service that has begun a session gets another
    /// consumer each time that it takes more at once, and has none in between: so it is looked again.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn is_deserted(&self, queue: &str) -> anyhow::Result<bool> {
        for pause in LOOKS {
            let _ = after(pause).recv();
            let depth = self.depths_in_time(&[queue])?.into_iter().flatten().next();
            if depth.is_none_or(|depth| depth.consumers > 0) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// What the answer to a passive declaration says.
pub(super) fn depth(declared: &Queue<'_>) -> Depth {
    Depth {
        messages: declared.declared_message_count().unwrap_or_default(),
        consumers: declared.declared_consumer_count().unwrap_or_default(),
    }
}

/// What the broker means by closing the channel on which it was asked about a queue.
fn found(code: u16, message: &str) -> Found {
    match code {
        NOT_FOUND if is_missing(code, message) => Found::Missing,
        code if NOT_OURS.contains(&code) => Found::NotOurs,
        _ => Found::Unavailable(message.to_owned()),
    }
}

/// Counts a question until it is dropped.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(count: &Arc<AtomicUsize>) -> Counted {
        count.fetch_add(1, Ordering::Relaxed);
        Counted(Arc::clone(count))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(404, "NOT_FOUND - no queue 'w' in vhost 'v'", Found::Missing)]
    #[case(
        405,
        "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'w' in vhost 'v'",
        Found::NotOurs
    )]
    #[case(403, "ACCESS_REFUSED - access to queue 'w' refused", Found::NotOurs)]
    fn a_queue_that_will_not_come_back_is_not_waited_for(
        #[case] code: u16,
        #[case] message: &str,
        #[case] expected: Found,
    ) {
        let found = found(code, message);
        assert_eq!(found.why_unavailable(), None);
        assert_eq!(found, expected);
    }

    #[rstest]
    #[case("home node 'rabbit@b' of durable queue 'w' in vhost 'v' is down or inaccessible")]
    #[case("failed to perform operation on queue 'w' in vhost 'v' due to timeout")]
    fn a_queue_whose_node_is_down_is_waited_for(#[case] message: &str) {
        let why = found(404, &format!("NOT_FOUND - {message}")).why_unavailable();
        let why = why.unwrap();
        assert!(why.contains(message), "{why}");
    }
}
