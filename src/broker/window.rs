//! How many messages of a queue may be in flight. RabbitMQ drops a message from a quorum queue when it has
//! been delivered too often, and whatever ends a session hands back all that is in flight. So a consumer
//! begins with little, and takes twice as much each time that as much has gone through: what a session
//! hands back is at most about twice what it has done. When one message ends session after session, each
//! gets about half as far from it as the one before, until it is alone.
//! A message that goes through no sooner than others holds them up for ten seconds at most: then the
//! consumer takes more although nothing has gone through.

use std::time::{Duration, Instant};

/// How long a consumer that has all it may have waits for something of it to go through.
const PATIENCE: Duration = Duration::from_secs(10);

/// The prefetch of a queue's consumer.
#[derive(Debug)]
pub(super) struct Window {
    size: u16,
    full: u16,
    /// Messages that have gone through since it has this size.
    through: u32,
    /// Messages that have been taken and are not through.
    on_their_way: usize,
    /// When it got this size, or a message last went through.
    moved: Instant,
}

impl Window {
    pub(super) fn new(size: u16, full: u16) -> Window {
        Window {
            size: size.min(full),
            full,
            through: 0,
            on_their_way: 0,
            moved: Instant::now(),
        }
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    pub(super) fn is_full(&self) -> bool {
        self.size == self.full
    }

    pub(super) fn takes(&mut self) {
        if self.on_their_way == 0 {
            self.moved = Instant::now();
        }
        self.on_their_way += 1;
    }

    /// A message that was taken has gone through: it is done, or waits for something that the others do not
    /// wait for.
    pub(super) fn passes(&mut self) {
        self.through = self.through.saturating_add(1);
        self.on_their_way -= 1;
        self.moved = Instant::now();
    }

    pub(super) fn has_some_on_their_way(&self) -> bool {
        self.on_their_way > 0
    }

    /// Whether as many have gone through as it is wide, or it is stuck.
    pub(super) fn is_to_grow(&self) -> bool {
        !self.is_full() && (self.through >= self.size.into() || self.is_stuck())
    }

    /// Whether nothing has gone through for long, and nothing else can be taken.
    pub(super) fn is_stuck(&self) -> bool {
        self.patience() == Some(Duration::ZERO)
    }

    /// How long until it is stuck, if nothing goes through.
    pub(super) fn patience(&self) -> Option<Duration> {
        let may_get_stuck = !self.is_full() && self.on_their_way >= self.size.into();
        may_get_stuck.then(|| PATIENCE.saturating_sub(self.moved.elapsed()))
    }

    pub(super) fn grow(&mut self) {
        self.become_as_wide_as(self.size.saturating_mul(2).min(self.full));
    }

    /// Grows as far as it may.
    pub(super) fn open(&mut self) {
        self.become_as_wide_as(self.full);
    }

    fn become_as_wide_as(&mut self, size: u16) {
        self.size = size;
        self.through = 0;
        self.moved = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// How many of the messages of a queue go through in a session that the one at `fatal` ends, one after
    /// the other, and how many are in flight then.
    fn session(fatal: usize) -> (usize, usize) {
        let mut window = Window::new(1, 1000);
        let mut through = 0;
        loop {
            if through == fatal {
                return (through, window.size().into());
            }
            through += 1;
            window.takes();
            window.passes();
            if window.is_to_grow() {
                window.grow();
            }
        }
    }

    #[test]
    fn a_session_hands_back_little_more_than_it_has_done() {
        for fatal in 0..5000 {
            let (through, in_flight) = session(fatal);
            assert!(in_flight <= through + 1, "{in_flight} after {through}");
        }
        assert_eq!(session(0), (0, 1));
        assert_eq!(session(5000), (5000, 1000));
    }

    /// Whatever is in flight together is lost together: nothing of a window goes through that has the
    /// fatal message in it.
    #[test]
    fn a_fatal_message_is_soon_alone() {
        for mut fatal in 1..5000 {
            let mut sessions = 0;
            while fatal > 0 {
                let mut window = Window::new(1, 1000);
                let mut through = 0;
                while through + usize::from(window.size()) <= fatal {
                    through += usize::from(window.size());
                    (0..window.size()).for_each(|_| window.takes());
                    (0..window.size()).for_each(|_| window.passes());
                    if window.is_to_grow() {
                        window.grow();
                    }
                }
                fatal -= through;
                sessions += 1;
            }
            assert!(sessions <= 12, "{sessions} sessions");
        }
    }

    #[rstest]
    #[case(5, 3, 3)]
    #[case(3, 3, 3)]
    #[case(2, 3, 3)]
    #[case(1, 3, 2)]
    #[case(40_000, u16::MAX, u16::MAX)]
    fn it_is_never_wider_than_it_may_be(
        #[case] size: u16,
        #[case] full: u16,
        #[case] expected: u16,
    ) {
        let mut window = Window::new(size, full);
        window.grow();
        assert_eq!(window.size(), expected);
        window.open();
        assert!(window.is_full() && !window.is_to_grow());
    }

    #[test]
    fn what_does_not_go_through_holds_up_others_for_a_while_only() {
        let long_ago = Instant::now().checked_sub(PATIENCE).unwrap();
        let mut window = Window::new(2, 1000);
        window.moved = long_ago;
        window.takes();
        assert_eq!(window.patience(), None, "there is room for others");
        window.takes();
        assert!(!window.is_to_grow(), "the first one has only just come");
        window.moved = long_ago;
        assert!(window.is_stuck() && window.is_to_grow());
        window.grow();
        assert!(!window.is_to_grow());
    }
}
