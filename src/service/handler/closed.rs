//! Closed queues: those that take nothing for now, because a policy limits them or their node is
//! down. Messages for them wait unacked. The handlers share what they know of these queues, so that
//! one of them at a time retries and the log has one line.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::{info, warn};

use crate::domain::vhost::Vhost;
use crate::wire::{DEAD_LETTERS_QUEUE, Inbox};

/// Pauses between attempts.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(60);

/// A queue that messages are published to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Destination {
    TaskQueue(String),
    DeadLetters(Vhost),
    /// The unavailable queues in which clients wait for results, all together.
    ClientQueues,
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Destination::TaskQueue(name) => write!(f, "the task queue {name:?}"),
            Destination::DeadLetters(vhost) => {
                write!(f, "{DEAD_LETTERS_QUEUE} of the {} vhost", vhost.name())
            }
            Destination::ClientQueues => write!(f, "queues of clients"),
        }
    }
}

/// What one handler has waiting.
#[derive(Debug, Default)]
pub(super) struct Load {
    pub(super) messages: BTreeMap<Destination, usize>,
    pub(super) by_inbox: HashMap<Inbox, usize>,
    pub(super) bytes: usize,
}

#[derive(Debug)]
struct Closed {
    why: String,
    /// Not retried before this time.
    until: Instant,
    pause: Duration,
    /// How many messages of each handler wait for it.
    messages: HashMap<usize, usize>,
}

/// The closed queues that the handlers of a session know of.
#[derive(Debug)]
pub struct ClosedQueues {
    /// How many messages of an inbox may wait. More would leave no room for others in the prefetch.
    limits: HashMap<Inbox, usize>,
    max_bytes: usize,
    /// Whether `state` is empty, as it mostly is, without taking the lock.
    any: AtomicBool,
    /// How many handlers are finding out whether outcomes have to wait.
    doubts: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    closed: BTreeMap<Destination, Closed>,
    loads: HashMap<usize, Load>,
}

impl ClosedQueues {
    pub fn new(limits: HashMap<Inbox, usize>, max_bytes: usize) -> ClosedQueues {
        ClosedQueues {
            limits,
            max_bytes,
            any: AtomicBool::new(false),
            doubts: AtomicUsize::new(0),
            state: Mutex::default(),
        }
    }

    /// Whether no queue is closed.
    pub(super) fn is_empty(&self) -> bool {
        !self.any.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a queue is closed and not yet due for a retry.
    pub(super) fn is_closed(&self, queue: &Destination, now: Instant) -> bool {
        let state = (!self.is_empty()).then(|| self.lock());
        state.is_some_and(|state| {
            let closed = state.closed.get(queue);
            closed.is_some_and(|closed| now < closed.until)
        })
    }

    /// When a closed queue is due for a retry.
    pub(super) fn due(&self, queue: &Destination) -> Option<Instant> {
        self.lock().closed.get(queue).map(|closed| closed.until)
    }

    /// Closes a queue that took nothing from `handler`, which must then [`ClosedQueues::count`]
    /// what waits for it.
    pub(super) fn close(&self, handler: usize, queue: &Destination, why: &str, now: Instant) {
        let mut state = self.lock();
        self.any.store(true, Ordering::Relaxed);
        match state.closed.get_mut(queue) {
            None => {
                warn!("{queue}: {why}; what is for it waits unacknowledged, and is tried again");
                let closed = Closed {
                    why: why.to_owned(),
                    until: now + FIRST_PAUSE,
                    pause: FIRST_PAUSE,
                    messages: HashMap::from([(handler, 0)]),
                };
                state.closed.insert(queue.clone(), closed);
            }
            Some(closed) => {
                closed.messages.entry(handler).or_default();
                why.clone_into(&mut closed.why);
                // Another handler may just have retried.
                if now >= closed.until {
                    closed.pause = (closed.pause * 2).min(LAST_PAUSE);
                    closed.until = now + closed.pause;
                }
            }
        }
    }

    /// Opens a queue that has taken something.
    pub(super) fn took(&self, queue: &Destination, now: Instant) {
        if !self.is_empty()
            && let Some(closed) = self.lock().closed.get_mut(queue)
        {
            closed.pause = FIRST_PAUSE;
            closed.until = now;
        }
    }

    /// Records everything that waits in `handler`. A queue that nothing waits for is forgotten.
    pub(super) fn count(&self, handler: usize, load: Load) {
        let mut state = self.lock();
        state.closed.retain(|queue, closed| {
            match load.messages.get(queue) {
                Some(messages) => drop(closed.messages.insert(handler, *messages)),
                None if closed.messages.remove(&handler).is_none() => return true,
                None => {}
            }
            if closed.messages.is_empty() {
                info!("{queue}: nothing waits for it any more");
            }
            !closed.messages.is_empty()
        });
        state.loads.insert(handler, load);
        self.any.store(!state.closed.is_empty(), Ordering::Relaxed);
    }

    /// The inboxes of which more messages wait than may; all of them if there are too many bytes.
    pub(super) fn excess(&self) -> Vec<Inbox> {
        if self.is_empty() {
            return Vec::new();
        }
        let state = self.lock();
        let bytes: usize = state.loads.values().map(|load| load.bytes).sum();
        let of = |inbox| {
            let loads = state.loads.values();
            let counts = loads.filter_map(|load| load.by_inbox.get(&inbox));
            counts.sum::<usize>()
        };
        let limit = |inbox| self.limits.get(&inbox).copied().unwrap_or_default();
        Inbox::ALL
            .into_iter()
            .filter(|inbox| of(*inbox) > 0)
            .filter(|inbox| bytes > self.max_bytes || of(*inbox) > limit(*inbox))
            .collect()
    }

    /// Until this is dropped, outcomes may have to wait for their clients' queues.
    pub(super) fn doubt(&self) -> Doubt<'_> {
        self.doubts.fetch_add(1, Ordering::Relaxed);
        Doubt(&self.doubts)
    }

    /// Whether outcomes wait for their clients' queues.
    pub fn has_stalled_outcomes(&self) -> bool {
        if self.doubts.load(Ordering::Relaxed) > 0 {
            return true;
        }
        let state = (!self.is_empty()).then(|| self.lock());
        state.is_some_and(|state| state.closed.contains_key(&Destination::ClientQueues))
    }

    /// What messages are waiting for, for the readiness.
    pub fn trouble(&self) -> Option<String> {
        if self.is_empty() {
            return None;
        }
        let state = self.lock();
        let all: Vec<_> = state
            .closed
            .iter()
            .map(|(queue, closed)| {
                let messages: usize = closed.messages.values().sum();
                let why = &closed.why;
                format!("{queue}: {why}; {messages} messages wait for it unacknowledged")
            })
            .collect();
        (!all.is_empty()).then(|| all.join("; "))
    }
}

/// A handler's doubt whether outcomes have to wait.
#[must_use]
#[derive(Debug)]
pub(super) struct Doubt<'q>(&'q AtomicUsize);

impl Drop for Doubt<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(queue: &Destination, inbox: Inbox, messages: usize, bytes: usize) -> Load {
        Load {
            messages: BTreeMap::from([(queue.clone(), messages)]),
            by_inbox: HashMap::from([(inbox, messages)]),
            bytes,
        }
    }

    #[test]
    fn a_queue_is_asked_again_later_and_later_by_one_handler() {
        let queues = ClosedQueues::new(HashMap::new(), 0);
        let queue = Destination::TaskQueue("workflow".to_owned());
        let mut now = Instant::now();
        assert!(!queues.is_closed(&queue, now));
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            for handler in [1, 2] {
                queues.close(handler, &queue, "down", now);
                queues.count(handler, load(&queue, Inbox::Submissions, 1, 1));
            }
            let due = now + Duration::from_secs(seconds);
            assert_eq!(queues.due(&queue), Some(due));
            assert!(queues.is_closed(&queue, due - Duration::from_millis(1)));
            assert!(!queues.is_closed(&queue, due));
            now = due;
        }
        let trouble = "the task queue \"workflow\": down; 2 messages wait for it unacknowledged";
        assert_eq!(queues.trouble().as_deref(), Some(trouble));

        queues.took(&queue, now);
        queues.close(1, &queue, "down", now);
        let soon = now + Duration::from_secs(2);
        assert_eq!(queues.due(&queue), Some(soon));
        queues.count(1, Load::default());
        assert!(queues.trouble().is_some());
        queues.count(2, Load::default());
        assert_eq!(queues.trouble(), None);
        assert!(!queues.is_closed(&queue, now));
    }

    #[test]
    fn a_queue_for_which_nothing_came_to_wait_is_forgotten() {
        let queues = ClosedQueues::new(HashMap::new(), 0);
        let queue = Destination::DeadLetters(Vhost::Task);
        queues.close(1, &queue, "full", Instant::now());
        queues.count(2, Load::default());
        assert!(queues.trouble().is_some());
        queues.count(1, Load::default());
        assert_eq!(queues.trouble(), None);
    }

    #[test]
    fn what_is_too_much_is_known_of_all_handlers_together() {
        let limits = HashMap::from([(Inbox::Submissions, 10), (Inbox::Cancels, 2)]);
        let queue = Destination::DeadLetters(Vhost::Sdk);
        for (loads, expected) in [
            (
                [(Inbox::Submissions, 5, 1), (Inbox::Submissions, 5, 1)],
                vec![],
            ),
            (
                [(Inbox::Submissions, 5, 1), (Inbox::Submissions, 6, 1)],
                vec![Inbox::Submissions],
            ),
            (
                [(Inbox::Submissions, 1, 1), (Inbox::Cancels, 3, 1)],
                vec![Inbox::Cancels],
            ),
            (
                [(Inbox::Submissions, 1, 60), (Inbox::Cancels, 1, 60)],
                vec![Inbox::Submissions, Inbox::Cancels],
            ),
        ] {
            let queues = ClosedQueues::new(limits.clone(), 100);
            for (handler, (inbox, messages, bytes)) in loads.into_iter().enumerate() {
                queues.close(handler, &queue, "full", Instant::now());
                queues.count(handler, load(&queue, inbox, messages, bytes));
            }
            assert_eq!(queues.excess(), expected, "{loads:?}");
        }
    }
}
