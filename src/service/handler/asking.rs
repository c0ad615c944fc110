//! About which queues of clients RabbitMQ is asked. It may say nothing about one whose node is down, and
//! whoever asks waits for that in vain: so it is asked seldom, and in turn about those that may be gone.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// For how long it is asked about none after it has not answered about one.
const PAUSE: Duration = Duration::from_secs(10);
/// And about that one: others, which nobody may be waiting in any more, have their turn.
const SILENCE: Duration = Duration::from_secs(60);

/// What one handler remembers of it.
#[derive(Debug, Default)]
pub(super) struct Asking {
    again_at: Option<Instant>,
    silent: HashMap<String, Instant>,
}

impl Asking {
    /// Whether it has not answered about this queue a moment ago.
    pub(super) fn is_silent(&mut self, queue: &str, now: Instant) -> bool {
        self.silent.retain(|_, until| now < *until);
        self.silent.contains_key(queue)
    }

    /// Whether it may be asked about one of the others.
    pub(super) fn may_ask(&self, now: Instant) -> bool {
        self.again_at.is_none_or(|at| at <= now)
    }

    /// It has not answered about this one.
    pub(super) fn is_not_answered(&mut self, queue: &str, now: Instant) {
        self.again_at = Some(now + PAUSE);
        self.silent.insert(queue.to_owned(), now + SILENCE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_are_silent_leave_the_next_turn_to_others() {
        let mut asking = Asking::default();
        let begun = Instant::now();
        let after = |seconds| begun + Duration::from_secs(seconds);
        assert!(asking.may_ask(begun));
        asking.is_not_answered("down", begun);
        assert!(!asking.may_ask(after(9)) && asking.may_ask(after(10)));
        // Whichever comes by first.
        for (second, down, gone) in [(10, true, false), (59, true, false), (60, false, false)] {
            assert_eq!(asking.is_silent("down", after(second)), down, "{second}");
            assert_eq!(asking.is_silent("gone", after(second)), gone, "{second}");
        }
    }
}
