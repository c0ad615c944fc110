//! The queues of clients whose jobs somebody looks at: whether a client listens, or has taken its result.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::debug;
use uuid::Uuid;

use crate::broker::Link;
use crate::config::RabbitMq;
use crate::domain::overview::ClientQueue;
use crate::threads::within_deadline;
use crate::wire;

/// How long a page waits for RabbitMQ's answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long an answer is good for whoever opens another page of the job; and, where there was none, for how long
/// nobody asks again.
const FRESH: Duration = Duration::from_secs(2);
const UNANSWERED: Duration = Duration::from_secs(30);
/// How long each step of the connection may take: other pages wait meanwhile.
const STEP: Duration = Duration::from_millis(700);
/// For how long whoever follows a page is told what was known when it was opened, and of how many jobs.
const KEPT: Duration = Duration::from_mins(2);
const MOST: usize = 1000;

/// A job, and whether its client had been told its end by then: an empty queue means something else before.
pub type Which = (Uuid, bool);

/// What was last known of each.
#[derive(Debug, Default)]
pub struct ClientLooks(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    queues: HashMap<Which, (Instant, ClientQueue)>,
    unanswered: Option<Instant>,
}

impl ClientLooks {
    /// What RabbitMQ says of the queue of this job's client.
    pub fn ask(&self, rabbitmq: &RabbitMq, which: Which) -> Option<ClientQueue> {
        let known = self.lock();
        if let Some((at, queue)) = known.queues.get(&which)
            && at.elapsed() < FRESH
        {
            return Some(*queue);
        }
        if known.unanswered.is_some_and(|at| at.elapsed() < UNANSWERED) {
            return None;
        }
        drop(known);
        let (id, _) = which;
        let looked = look(rabbitmq, id);
        let mut known = self.lock();
        known.unanswered = looked.is_err().then(Instant::now);
        let answer = looked.unwrap_or_else(|error| {
            debug!("the queue of the client of job {id} cannot be looked at: {error:#}");
            None
        });
        known.note(which, answer);
        answer
    }

    /// What was known when somebody last asked.
    pub fn last(&self, which: Which) -> Option<ClientQueue> {
        let known = self.lock();
        let (at, queue) = known.queues.get(&which)?;
        (at.elapsed() < KEPT).then_some(*queue)
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn note(&mut self, which: Which, answer: Option<ClientQueue>) {
        let now = Instant::now();
        self.queues.retain(|_, (at, _)| at.elapsed() < KEPT);
        match answer {
            Some(queue) if self.queues.len() < MOST => {
                self.queues.insert(which, (now, queue));
            }
            Some(_) | None => {
                self.queues.remove(&which);
            }
        }
    }
}

fn look(rabbitmq: &RabbitMq, id: Uuid) -> anyhow::Result<Option<ClientQueue>> {
    let link = Link::open_soon(rabbitmq, STEP, "looking at clients' queues")?;
    let queue = wire::result_queue(id);
    let answer = within_deadline(PATIENCE, || link.kill(), || link.client_queue(&queue));
    // What is known stays so.
    let _ = link.close_within(PATIENCE);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_known_before_the_end_says_nothing_after_it() {
        let looks = ClientLooks::default();
        let id = Uuid::from_u128(1);
        looks.lock().note((id, false), Some(ClientQueue::Heard));
        assert_eq!(looks.last((id, false)), Some(ClientQueue::Heard));
        assert_eq!(looks.last((id, true)), None);
        // Whoever asks is not told what there is no answer for.
        looks.lock().note((id, false), None);
        assert_eq!(looks.last((id, false)), None);
        for number in 0..=MOST {
            let which = (Uuid::from_u128(u128::try_from(number).unwrap()), true);
            looks.lock().note(which, Some(ClientQueue::Empty));
        }
        assert_eq!(looks.lock().queues.len(), MOST);
    }
}
