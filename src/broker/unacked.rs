//! The unacked deliveries of a channel, and how they may be acknowledged.

use std::collections::{BTreeMap, BTreeSet};

/// The deliveries of one channel that wait for their acknowledgement.
///
/// RabbitMQ numbers the deliveries of a channel from 1 on without gaps, across its queues. A
/// cumulative acknowledgement covers everything up to a tag, also deliveries that are still unread
/// in the receiver of another queue; those would be lost. So one is sent only up to where
/// everything has been taken and is finished, and it names a tag that is still unacked, since
/// RabbitMQ refuses any other.
#[derive(Debug)]
pub(super) struct Unacked<D> {
    /// What has been taken, by delivery tag.
    taken: BTreeMap<u64, Taken<D>>,
    /// How many of these are finished.
    finished: usize,
    /// The tag after the highest one taken.
    next: u64,
    /// Tags below it that have not been taken yet.
    untaken: BTreeSet<u64>,
}

#[derive(Debug)]
struct Taken<D> {
    delivery: D,
    is_finished: bool,
}

impl<D> Unacked<D> {
    pub(super) fn new() -> Unacked<D> {
        Unacked {
            taken: BTreeMap::new(),
            finished: 0,
            next: 1,
            untaken: BTreeSet::new(),
        }
    }

    /// It is in flight.
    pub(super) fn take(&mut self, tag: u64, delivery: D) {
        if tag >= self.next {
            self.untaken.extend(self.next..tag);
            self.next = tag + 1;
        } else {
            self.untaken.remove(&tag);
        }
        let taken = Taken {
            delivery,
            is_finished: false,
        };
        self.taken.insert(tag, taken);
    }

    /// The delivery of this tag, if it is taken and not finished.
    pub(super) fn in_hand(&mut self, tag: u64) -> Option<&mut D> {
        let taken = self.taken.get_mut(&tag)?;
        (!taken.is_finished).then_some(&mut taken.delivery)
    }

    /// Marks it as finished. Returns it the first time.
    pub(super) fn finish(&mut self, tag: u64) -> Option<&D> {
        let taken = self.taken.get_mut(&tag)?;
        if taken.is_finished {
            return None;
        }
        taken.is_finished = true;
        self.finished += 1;
        Some(&taken.delivery)
    }

    /// How many are finished and wait for their acknowledgement.
    pub(super) fn finished(&self) -> usize {
        self.finished
    }

    /// The delivery up to which everything is to be acknowledged now; marked as acknowledged.
    pub(super) fn acknowledge_in_order(&mut self) -> Option<D> {
        let first_untaken = self.untaken.first().copied().unwrap_or(self.next);
        let mut last = None;
        while let Some(first) = self.taken.first_entry()
            && first.get().is_finished
            && *first.key() < first_untaken
        {
            last = Some(first.remove().delivery);
            self.finished -= 1;
        }
        last
    }

    /// All finished deliveries, to be acknowledged one by one now; marked as acknowledged.
    pub(super) fn acknowledge_rest(&mut self) -> impl Iterator<Item = D> {
        self.finished = 0;
        self.taken
            .extract_if(.., |_, taken| taken.is_finished)
            .map(|(_, taken)| taken.delivery)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::in_order(&[1, 2, 3], &[1, 2, 3], Some(3), &[])]
    #[case::finished_in_another_order(&[1, 2, 3], &[3, 1, 2], Some(3), &[])]
    #[case::one_in_hand(&[1, 2, 3], &[1, 3], Some(1), &[3])]
    #[case::the_first_in_hand(&[1, 2, 3], &[2, 3], None, &[2, 3])]
    #[case::one_unread(&[1, 3, 4], &[1, 3, 4], Some(1), &[3, 4])]
    #[case::the_first_unread(&[2, 3], &[2, 3], None, &[2, 3])]
    #[case::the_last_unread(&[1, 2], &[1, 2], Some(2), &[])]
    #[case::read_late(&[3, 1, 2], &[3, 1, 2], Some(3), &[])]
    #[case::finished_twice(&[1, 2], &[2, 2], None, &[2])]
    #[case::never_taken(&[1], &[1, 7], Some(1), &[])]
    fn what_is_acknowledged(
        #[case] taken: &[u64],
        #[case] finished: &[u64],
        #[case] up_to: Option<u64>,
        #[case] rest: &[u64],
    ) {
        let mut unacked = Unacked::new();
        for tag in taken {
            unacked.take(*tag, *tag);
        }
        for tag in finished {
            unacked.finish(*tag);
        }
        assert_eq!(unacked.acknowledge_in_order(), up_to);
        assert_eq!(unacked.finished(), rest.len());
        assert_eq!(unacked.acknowledge_rest().collect::<Vec<_>>(), rest);
        assert_eq!(unacked.finished(), 0);
    }

    #[test]
    fn what_was_acknowledged_by_itself_is_not_named_again() {
        let mut unacked = Unacked::new();
        for tag in 1..=3 {
            unacked.take(tag, tag);
        }
        unacked.finish(3);
        assert_eq!(unacked.acknowledge_rest().collect::<Vec<_>>(), [3]);
        unacked.finish(1);
        unacked.finish(2);
        assert_eq!(unacked.acknowledge_in_order(), Some(2));
        assert_eq!(unacked.acknowledge_in_order(), None);
        unacked.finish(3);
        assert_eq!(unacked.acknowledge_in_order(), None);
        assert_eq!(unacked.acknowledge_rest().count(), 0);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Deliver { queue: usize },
        Take { queue: usize },
        Finish(prop::sample::Index),
        InOrder,
        Rest,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..2_usize).prop_map(|queue| Step::Deliver { queue }),
            4 => (0..2_usize).prop_map(|queue| Step::Take { queue }),
            4 => any::<prop::sample::Index>().prop_map(Step::Finish),
            1 => Just(Step::InOrder),
            1 => Just(Step::Rest),
        ]
    }

    /// RabbitMQ with two queues on a channel, and the consumer of both.
    #[derive(Default)]
    struct World {
        delivered: u64,
        unread: [Vec<u64>; 2],
        in_hand: Vec<u64>,
        finished: BTreeSet<u64>,
        /// As RabbitMQ has them.
        unacknowledged: BTreeSet<u64>,
    }

    impl World {
        fn acknowledged(&mut self, tag: u64, multiple: bool) {
            assert!(self.unacknowledged.contains(&tag), "406 for {tag}");
            let tags: Vec<u64> = match multiple {
                true => self.unacknowledged.range(..=tag).copied().collect(),
                false => vec![tag],
            };
            for tag in tags {
                assert!(self.finished.contains(&tag), "{tag} is lost");
                self.unacknowledged.remove(&tag);
            }
        }

        fn run(&mut self, unacked: &mut Unacked<u64>, step: &Step) {
            match step {
                Step::Deliver { queue } => {
                    self.delivered += 1;
                    self.unread[*queue].push(self.delivered);
                    self.unacknowledged.insert(self.delivered);
                }
                Step::Take { queue } => {
                    if !self.unread[*queue].is_empty() {
                        let tag = self.unread[*queue].remove(0);
                        unacked.take(tag, tag);
                        self.in_hand.push(tag);
                    }
                }
                Step::Finish(index) => {
                    if !self.in_hand.is_empty() {
                        let tag = self.in_hand.swap_remove(index.index(self.in_hand.len()));
                        assert_eq!(unacked.finish(tag), Some(&tag));
                        self.finished.insert(tag);
                    }
                }
                Step::InOrder => {
                    if let Some(tag) = unacked.acknowledge_in_order() {
                        self.acknowledged(tag, true);
                    }
                }
                Step::Rest => {
                    for tag in unacked.acknowledge_rest() {
                        self.acknowledged(tag, false);
                    }
                }
            }
            let waiting = self.finished.intersection(&self.unacknowledged).count();
            assert_eq!(unacked.finished(), waiting);
        }
    }

    proptest! {
        #[test]
        fn what_is_finished_is_acknowledged_once_and_nothing_else(
            steps in prop::collection::vec(step(), 0..200)
        ) {
            let mut world = World::default();
            let mut unacked = Unacked::new();
            for step in &steps {
                world.run(&mut unacked, step);
            }
            // As far as it goes together, and then whatever else is finished.
            world.run(&mut unacked, &Step::InOrder);
            world.run(&mut unacked, &Step::Rest);
            prop_assert!(world.finished.is_disjoint(&world.unacknowledged));
        }
    }
}
