//! Who is next, and that nobody waits for ever and no limit is exceeded.

use proptest::prelude::*;
use rstest::rstest;

use super::*;

const AGING: Duration = Duration::from_secs(3600);

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// `owner`'s task with this number, which waits since then.
fn held(number: u128, owner: &str, priority: Priority, since: i64) -> Held {
    Held {
        job_id: Uuid::from_u128(number),
        owner: owner.to_owned(),
        priority,
        since: at(since),
        moved_at: None,
    }
}

fn handed_over(tasks: &[(&str, usize)]) -> HandedOver {
    let by_owner = tasks
        .iter()
        .map(|(owner, tasks)| ((*owner).to_owned(), *tasks));
    HandedOver {
        waiting: 0,
        by_owner: by_owner.collect(),
    }
}

/// The numbers of those that are next at second 10,000.
fn numbers(held: Vec<Held>, served: &[(&str, i64)], tasks: &[(&str, usize)]) -> Vec<u128> {
    let served = served
        .iter()
        .map(|(owner, time)| ((*owner).to_owned(), at(*time)));
    let waiting = Waiting {
        held,
        served: served.collect(),
    };
    let next = next(waiting, &handed_over(tasks), usize::MAX, AGING, at(10_000));
    next.iter().map(Uuid::as_u128).collect()
}

const LOW: Priority = Priority::Low;
const MEDIUM: Priority = Priority::Medium;
const HIGH: Priority = Priority::High;

#[rstest]
#[case::the_oldest_of_one_owner(
    vec![held(1, "a", MEDIUM, 9_002), held(2, "a", MEDIUM, 9_001)],
    &[], &[], &[2, 1]
)]
#[case::the_highest_priority(
    vec![held(1, "a", LOW, 9_001), held(2, "a", MEDIUM, 9_002), held(3, "a", HIGH, 9_003)],
    &[], &[], &[3, 2, 1]
)]
#[case::who_has_fewest(
    vec![held(1, "a", MEDIUM, 9_001), held(2, "b", MEDIUM, 9_002)],
    &[], &[("a", 2), ("b", 1)], &[2, 1]
)]
#[case::by_turns(
    vec![held(1, "a", MEDIUM, 9_001), held(2, "a", MEDIUM, 9_002), held(3, "a", MEDIUM, 9_003),
         held(4, "b", MEDIUM, 9_004), held(5, "b", MEDIUM, 9_005)],
    &[], &[], &[1, 4, 2, 5, 3]
)]
#[case::who_was_served_longest_ago(
    vec![held(1, "a", MEDIUM, 9_001), held(2, "b", MEDIUM, 9_002)],
    &[("a", 9_500), ("b", 9_400)], &[], &[2, 1]
)]
#[case::who_waits_longer_than_the_other_was_served(
    vec![held(1, "a", MEDIUM, 9_001), held(2, "new", MEDIUM, 9_450)],
    &[("a", 9_500)], &[], &[2, 1]
)]
#[case::whose_last_turn_was_before_the_other_came(
    vec![held(1, "a", MEDIUM, 9_001), held(2, "new", MEDIUM, 9_550)],
    &[("a", 9_500)], &[], &[1, 2]
)]
#[case::a_priority_goes_before_an_owner(
    vec![held(1, "a", HIGH, 9_001), held(2, "b", MEDIUM, 9_002)],
    &[("a", 9_500)], &[("a", 5)], &[1, 2]
)]
#[case::one_level_with_each_hour(
    vec![held(1, "a", HIGH, 9_001), held(2, "b", MEDIUM, 6_400), held(3, "b", MEDIUM, 6_401)],
    &[], &[], &[2, 1, 3]
)]
#[case::two_levels_after_two_hours(
    vec![held(1, "a", HIGH, 9_001), held(2, "b", LOW, 2_800), held(3, "c", LOW, 2_801)],
    &[], &[], &[2, 1, 3]
)]
#[case::no_higher_than_high(
    vec![held(1, "a", MEDIUM, 0), held(2, "b", HIGH, 9_999)],
    &[("a", 9_999)], &[("a", 1)], &[2, 1]
)]
#[case::the_last_one_put_first(
    vec![held(1, "a", HIGH, 9_001),
         Held { moved_at: Some(at(9_100)), ..held(2, "b", LOW, 9_002) },
         Held { moved_at: Some(at(9_200)), ..held(3, "b", LOW, 9_003) }],
    &[], &[("b", 9)], &[3, 2, 1]
)]
fn the_next_is(
    #[case] held: Vec<Held>,
    #[case] served: &[(&str, i64)],
    #[case] tasks: &[(&str, usize)],
    #[case] expected: &[u128],
) {
    assert_eq!(numbers(held, served, tasks), expected);
}

#[test]
fn without_aging_a_priority_stays() {
    let waiting = Waiting {
        held: vec![held(1, "a", LOW, 0), held(2, "b", HIGH, 9_999_999)],
        served: HashMap::new(),
    };
    let next = next(
        waiting,
        &HandedOver::default(),
        1,
        Duration::ZERO,
        at(10_000_000),
    );
    assert_eq!(next, [Uuid::from_u128(2)]);
}

#[rstest]
#[case::nothing_is_unlimited(None, None, false, usize::MAX)]
#[case::window(Some(3), None, false, 1)]
#[case::max_running(None, Some(7), false, 2)]
#[case::the_smaller(Some(3), Some(7), false, 1)]
#[case::more_than_allowed(Some(1), Some(4), false, 0)]
#[case::paused(None, None, true, 0)]
fn there_is_room(
    #[case] window: Option<u32>,
    #[case] max_running: Option<u32>,
    #[case] is_paused: bool,
    #[case] room: usize,
) {
    let limit = QueueLimit {
        window,
        max_running,
        is_paused,
    };
    let handed_over = HandedOver {
        waiting: 2,
        ..handed_over(&[("a", 3), ("b", 2)])
    };
    assert_eq!(limit.room(&handed_over), room);
    assert_eq!(limit.holds(), room != usize::MAX);
}

#[rstest]
#[case::sender(Some("anna"), Some("x/1"), "anna")]
#[case::reference(None, Some("x/1/2"), "x")]
#[case::reference_without_separator(None, Some("x 1"), NO_OWNER)]
#[case::nothing(None, None, NO_OWNER)]
#[case::nothing_but_spaces(Some(" "), Some("/1"), NO_OWNER)]
#[case::nul(Some("a\0b"), None, "ab")]
fn an_owner_is(
    #[case] sender: Option<&str>,
    #[case] reference: Option<&str>,
    #[case] expected: &str,
) {
    assert_eq!(owner(sender, reference, "/"), expected);
}

#[test]
fn an_owner_has_a_bounded_name_and_may_have_none() {
    let reference = "ü".repeat(1_000_000) + "/1";
    let name = owner(None, Some(&reference), "/");
    assert_eq!(name.chars().count(), MAX_OWNER);
    assert_eq!(owner(None, Some("x/1"), ""), NO_OWNER);
    assert_eq!(owner(None, Some("x:1"), ":"), "x");
}

/// A queue with limits, its workers, and replicas that die.
#[derive(Debug, Default)]
struct Queue {
    limit: QueueLimit,
    now: i64,
    count: u128,
    /// In the database.
    held: Vec<Held>,
    served: HashMap<String, Timestamp>,
    /// Handed over: whether a worker has started it.
    tasks: BTreeMap<Uuid, (String, bool)>,
    /// In the order of their turns, with how long each has waited.
    turns: Vec<(String, i64)>,
}

impl Queue {
    fn limited(window: Option<u32>, max_running: Option<u32>) -> Queue {
        Queue {
            limit: QueueLimit {
                window,
                max_running,
                is_paused: false,
            },
            ..Queue::default()
        }
    }

    fn submit(&mut self, owner: &str, priority: Priority) {
        self.count += 1;
        self.held.push(held(self.count, owner, priority, self.now));
    }

    fn handed_over(&self) -> HandedOver {
        let mut handed_over = HandedOver::default();
        for (owner, is_started) in self.tasks.values() {
            handed_over.waiting += usize::from(!is_started);
            *handed_over.by_owner.entry(owner.clone()).or_default() += 1;
        }
        handed_over
    }

    /// One decision; `is_committed` says whether its replica lives to commit it.
    fn decide(&mut self, is_committed: bool) {
        let handed_over = self.handed_over();
        let waiting = Waiting {
            held: self.held.clone(),
            served: self.served.clone(),
        };
        let room = self.limit.room(&handed_over).min(MAX_GRANTS);
        for job_id in next(waiting, &handed_over, room, AGING, at(self.now)) {
            if !is_committed {
                continue;
            }
            let place = self.held.iter().position(|held| held.job_id == job_id);
            let held = self.held.remove(place.expect("it waits"));
            let waited = self.now - held.since.as_second();
            self.turns.push((held.owner.clone(), waited));
            self.served.insert(held.owner.clone(), at(self.now));
            self.tasks.insert(job_id, (held.owner, false));
        }
    }

    /// Workers take what is there, as many as are free.
    fn work(&mut self, workers: usize) {
        let busy = self.tasks.values().filter(|(_, started)| *started).count();
        let waiting = self.tasks.values_mut().filter(|(_, started)| !*started);
        for task in waiting.take(workers.saturating_sub(busy)) {
            task.1 = true;
        }
    }

    /// One of those that run ends.
    fn end(&mut self, place: usize) {
        let running: Vec<_> = self
            .tasks
            .iter()
            .filter(|(_, (_, started))| *started)
            .map(|(id, _)| *id)
            .collect();
        if let Some(id) = running.get(place.checked_rem(running.len()).unwrap_or(0)) {
            self.tasks.remove(id);
        }
    }
}

#[test]
fn a_single_job_of_a_new_owner_goes_within_three_starts() {
    let mut queue = Queue::limited(Some(2), None);
    for _ in 0..500 {
        queue.submit("flood", MEDIUM);
    }
    for _ in 0..100 {
        queue.now += 1;
        queue.decide(true);
        queue.work(2);
        queue.end(0);
    }
    queue.submit("new", MEDIUM);
    let before = queue.turns.len();
    while !queue.held.is_empty() {
        queue.now += 1;
        queue.decide(true);
        queue.work(2);
        queue.end(0);
    }
    let place = queue.turns[before..]
        .iter()
        .position(|(owner, _)| owner == "new");
    assert!(place.is_some_and(|place| place < 3), "{place:?}");
    assert_eq!(queue.turns.len(), 501);
}

#[derive(Debug, Clone)]
enum Happening {
    Submission(u8, Priority),
    Decision(bool),
    Taken,
    Done(usize),
    Seconds(i64),
}

fn happening() -> impl Strategy<Value = Happening> {
    let priority = prop::sample::select(Priority::ALL.to_vec());
    prop_oneof![
        5 => (0..4_u8, priority).prop_map(|(owner, level)| Happening::Submission(owner, level)),
        4 => prop::bool::weighted(0.8).prop_map(Happening::Decision),
        3 => Just(Happening::Taken),
        3 => any::<usize>().prop_map(Happening::Done),
        1 => (1..4000_i64).prop_map(Happening::Seconds),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Whoever decides, and dies over it.
    #[test]
    fn no_limit_is_ever_exceeded(
        window in prop::option::of(1..4_u32),
        max_running in prop::option::of(1..4_u32),
        story in prop::collection::vec(happening(), 0..200),
    ) {
        let mut queue = Queue::limited(window, max_running);
        for one in story {
            match one {
                Happening::Submission(owner, priority) => {
                    queue.submit(&owner.to_string(), priority);
                }
                Happening::Decision(is_committed) => queue.decide(is_committed),
                Happening::Taken => queue.work(3),
                Happening::Done(place) => queue.end(place),
                Happening::Seconds(seconds) => queue.now += seconds,
            }
            let handed_over = queue.handed_over();
            let within = |limit: Option<u32>, used: usize| limit.is_none_or(|limit| {
                used <= usize::try_from(limit).unwrap()
            });
            prop_assert!(within(window, handed_over.waiting));
            prop_assert!(within(max_running, handed_over.all()));
        }
    }

    /// However many others come, whatever their priority and whoever's they are: an owner's job has
    /// its turn once its priority has risen and each of the others has had a turn.
    #[test]
    fn nobody_waits_for_ever(
        others in 1..20_u8,
        priority in prop::sample::select(Priority::ALL.to_vec()),
        at_once in 1..5_usize,
    ) {
        let mut queue = Queue::limited(None, Some(u32::try_from(at_once).unwrap()));
        for _ in 0..50 {
            queue.submit("flood", HIGH);
        }
        queue.submit("mine", priority);
        let mut number = 0_u64;
        let step = 60;
        while queue.held.iter().any(|held| held.owner == "mine") {
            queue.now += step;
            // More than the workers can do.
            for _ in 0..=at_once {
                number += 1;
                queue.submit(&format!("other {}", number % u64::from(others)), HIGH);
            }
            // And somebody who has never been here.
            queue.submit(&format!("once {number}"), HIGH);
            queue.decide(true);
            queue.work(at_once);
            for place in 0..at_once {
                queue.end(place);
            }
            let risen = 2 * i64::try_from(AGING.as_secs()).unwrap();
            let round = step * (i64::from(others) + 4) * 3;
            prop_assert!(queue.now <= risen + round, "still waiting after {} s", queue.now);
        }
    }
}
