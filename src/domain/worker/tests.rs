use std::collections::{BTreeMap, BTreeSet};
use std::slice;

use jiff::{SignedDuration, Timestamp};
use rstest::rstest;
use uuid::Uuid;

use super::*;
use crate::domain::overview::Depth;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

fn queues(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// What a worker of queue `q` answers whose process began at 0.
fn answer(second: i64, tasks: &[&str], takes: &[&str]) -> Answer {
    Answer {
        stats: Some(Stats {
            pid: Some(1),
            uptime: Some(SignedDuration::from_secs(second)),
            pool: Some("celery.concurrency.prefork:TaskPool".to_owned()),
            pool_size: Some(1),
            prefetch: Some(1),
            count: 0,
        }),
        tasks: Some(
            tasks
                .iter()
                .map(|id| SaidTask {
                    id: (*id).to_owned(),
                    name: "q".to_owned(),
                    job_id: None,
                })
                .collect(),
        ),
        queues: Some(queues(takes)),
        celery: None,
    }
}

fn running(task_id: &str) -> RunningTask {
    RunningTask {
        job_id: Uuid::from_u128(7),
        task_id: task_id.to_owned(),
        queue: "q".to_owned(),
        priority: 1,
        submitted_at: at(0),
        started_at: at(1),
    }
}

/// One look after the other, each with all that is known from the ones before.
#[derive(Default)]
struct Looks {
    known: BTreeMap<String, Worker>,
    absences: Vec<Absence>,
    connected: BTreeSet<String>,
    running: Vec<RunningTask>,
    waiting: Vec<WaitingTask>,
    more_waiting: BTreeMap<String, i64>,
    others: BTreeMap<String, Uuid>,
    depths: Depths,
}

impl Looks {
    fn look(&mut self, second: i64, answers: &[(&str, Answer)]) -> Look {
        let seen = Seen {
            asked_at: at(second - 3),
            now: at(second),
            answers: answers
                .iter()
                .map(|(host, answer)| ((*host).to_owned(), answer.clone()))
                .collect(),
            connected: self.connected.clone(),
            running: self.running.clone(),
            waiting: self.waiting.clone(),
            more_waiting: self.more_waiting.clone(),
            others: self.others.clone(),
            depths: self.depths.clone(),
        };
        let look = look(self.known.clone(), &self.absences, &seen);
        self.known = look
            .workers
            .iter()
            .map(|worker| (worker.host.clone(), worker.clone()))
            .collect();
        self.absences.clone_from(&look.absences);
        look
    }

    fn state(&self, host: &str) -> WorkerState {
        self.known[host].state
    }

    /// A queue with so many messages and consumers.
    fn queue(&mut self, messages: u32, consumers: u32) {
        let depth = Depth {
            messages,
            consumers,
        };
        self.depths.insert("q".to_owned(), depth);
    }
}

#[rstest]
#[case::idle(&[], &["q"], WorkerState::Idle)]
#[case::busy(&["t"], &["q"], WorkerState::Busy)]
#[case::draining(&["t"], &[], WorkerState::Draining)]
#[case::drained(&[], &[], WorkerState::Drained)]
fn whoever_answers_is_in_a_state(
    #[case] tasks: &[&str],
    #[case] takes: &[&str],
    #[case] expected: WorkerState,
) {
    let mut looks = Looks::default();
    looks.look(10, &[("w", answer(10, &[], &["q"]))]);
    looks.look(25, &[("w", answer(25, tasks, takes))]);
    assert_eq!(looks.state("w"), expected);
}

#[test]
fn who_does_not_answer_is_silent_as_long_as_it_is_connected() {
    let mut looks = Looks::default();
    let new = looks.look(10, &[("w", answer(10, &["t"], &["q"]))]);
    assert_eq!(new.news, [News::Appeared("w".to_owned())]);
    looks.connected = queues(&["w"]);
    assert_eq!(looks.look(25, &[]).news, []);
    assert_eq!(looks.state("w"), WorkerState::Silent);
    assert_eq!(looks.look(40, &[]).news, [News::Silent("w".to_owned())]);
    assert_eq!(looks.known["w"].state_since, at(25));
    // What it had it may still have.
    assert_eq!(looks.known["w"].tasks.len(), 1);
    let back = looks.look(55, &[("w", answer(55, &["t"], &["q"]))]);
    assert_eq!(back.news, [News::Back("w".to_owned())]);
    assert_eq!(looks.known["w"].tasks[0].first_seen, at(10));
    looks.connected.clear();
    assert_eq!(looks.look(70, &[]).news, [News::Gone("w".to_owned())]);
    assert_eq!(looks.state("w"), WorkerState::Gone);
    assert_eq!(looks.look(85, &[]).news, []);
    assert_eq!(looks.known["w"].tasks, []);
    let day = 24 * 60 * 60;
    let over = looks.look(55 + day + 1, &[]);
    assert_eq!(over.forgotten, ["w"]);
}

#[test]
fn a_solo_worker_that_computes_does_not_answer() {
    let mut looks = Looks::default();
    let mut solo = answer(10, &[], &["q"]);
    solo.stats.as_mut().unwrap().pool = Some("celery.concurrency.solo:TaskPool".to_owned());
    looks.look(10, &[("w", solo)]);
    looks.connected = queues(&["w"]);
    looks.running = vec![running("t")];
    looks.queue(0, 1);
    let look = looks.look(25, &[]);
    assert_eq!(looks.state("w"), WorkerState::BusyAndDeaf);
    assert_eq!(look.absences, []);
    looks.running.clear();
    looks.look(40, &[]);
    assert_eq!(looks.state("w"), WorkerState::Silent);
}

/// By the number of its process, or by its age where that is the same, as in a container.
#[rstest]
#[case::another_process(2, 25, true)]
#[case::a_younger_one(1, 3, true)]
#[case::the_same(1, 25, false)]
#[case::the_same_with_a_slow_answer(1, 20, false)]
fn a_worker_that_is_started_again_is_noticed(
    #[case] pid: i64,
    #[case] uptime: i64,
    #[case] is_new: bool,
) {
    let mut looks = Looks::default();
    looks.look(60, &[("w", answer(60, &["t"], &["q", "r"]))]);
    looks.known.get_mut("w").unwrap().wish = Some(Wish::Drained);
    let mut next = answer(60 + uptime, &[], &["q"]);
    let stats = next.stats.as_mut().unwrap();
    stats.pid = Some(pid);
    if uptime == 3 {
        stats.uptime = Some(SignedDuration::from_secs(3));
    }
    let look = looks.look(85, &[("w", next)]);
    let worker = &looks.known["w"];
    assert_eq!(look.news.contains(&News::Restarted("w".to_owned())), is_new);
    assert_eq!(worker.wish.is_none(), is_new);
    assert_eq!(worker.serves.len(), if is_new { 1 } else { 2 });
    assert_eq!(worker.first_seen, at(60));
}

#[test]
fn who_was_sent_back_to_its_queues_is_sent_there_again_when_it_forgets_them() {
    let mut looks = Looks::default();
    looks.look(10, &[("w", answer(10, &[], &["q"]))]);
    let nothing = looks.look(25, &[("w", answer(25, &[], &[]))]);
    assert_eq!(nothing.restored, []);
    looks.known.get_mut("w").unwrap().wish = Some(Wish::Drained);
    assert_eq!(looks.look(40, &[("w", answer(40, &[], &[]))]).restored, []);
    looks.known.get_mut("w").unwrap().wish = Some(Wish::Resumed);
    let look = looks.look(55, &[("w", answer(55, &[], &[]))]);
    assert_eq!(look.restored, [("w".to_owned(), "q".to_owned())]);
}

#[test]
fn what_a_worker_does_in_an_hour_is_counted_over_its_processes() {
    let mut looks = Looks::default();
    let minute = 60;
    // Begun at 0 with 100 behind it; one each minute; started again in between.
    for now in 1..=90 {
        let second = now * minute;
        let mut answer = answer(second, &[], &["q"]);
        let stats = answer.stats.as_mut().unwrap();
        stats.count = 100 + now;
        if now > 40 {
            stats.pid = Some(2);
            stats.uptime = Some(SignedDuration::from_secs((now - 40) * minute));
            stats.count = now - 40;
        }
        looks.look(second, &[("w", answer)]);
    }
    let worker = looks.known["w"].clone();
    assert_eq!(worker.begun, 89);
    let view = WorkerView::new(worker, Vec::new(), (0, 0));
    assert_eq!(view.tasks_per_hour, Some(60.0));
    assert_eq!(view.pool.as_deref(), Some("prefork"));
}

#[test]
fn a_flood_of_made_up_workers_is_bounded() {
    let mut looks = Looks::default();
    for round in 0..3 {
        let hosts: Vec<_> = (0..MAX_KNOWN).map(|one| format!("{round}-{one}")).collect();
        let answers: Vec<_> = hosts
            .iter()
            .map(|host| (host.as_str(), answer(round, &[], &["q"])))
            .collect();
        let look = looks.look(round * 15, &answers);
        assert_eq!(look.workers.len(), MAX_KNOWN);
    }
}

/// Looks at a task that was with worker `w` and that nobody has any more, each 15 seconds for two
/// minutes; `change` changes what is seen. Returns the last look.
fn without_its_worker(change: impl Fn(&mut Looks, &mut Vec<(&str, Answer)>)) -> Look {
    let mut looks = Looks {
        running: vec![running("t")],
        ..Looks::default()
    };
    looks.look(
        10,
        &[
            ("w", answer(10, &["t"], &["q"])),
            ("v", answer(10, &[], &["q"])),
        ],
    );
    looks.queue(0, 1);
    two_minutes(looks, "v", change)
}

/// What is seen by the end of two minutes of a look each 15 seconds, in which this worker has nothing to do.
fn two_minutes(
    mut looks: Looks,
    worker: &str,
    change: impl Fn(&mut Looks, &mut Vec<(&str, Answer)>),
) -> Look {
    let mut told = 0;
    let mut last = Look::default();
    for second in (25..=130).step_by(15) {
        let mut answers = vec![(worker, answer(second, &[], &["q"]))];
        change(&mut looks, &mut answers);
        last = looks.look(second, &answers);
        let is_told = |news: &&News| matches!(news, News::Absent { .. });
        told += last.news.iter().filter(is_told).count();
    }
    let expected = last.absences.iter().filter(|one| one.is_told).count();
    assert_eq!(told, expected, "told once");
    last
}

#[test]
fn a_task_that_nobody_has_is_absent() {
    let look = without_its_worker(|_, _| {});
    let absence = Absence {
        job_id: Uuid::from_u128(7),
        task_id: "t".to_owned(),
        since: at(25),
        confirmed_at: at(130),
        may_wait: false,
        is_told: true,
    };
    assert_eq!(look.absences, [absence]);
}

#[rstest]
#[case::with_another_worker(|_: &mut Looks, answers: &mut Vec<(&str, Answer)>| {
    answers[0].1 = answer(10, &["t"], &["q"]);
})]
#[case::with_one_whose_job_it_is_not(|_: &mut Looks, answers: &mut Vec<(&str, Answer)>| {
    answers.push(("x", answer(10, &["t"], &["other"])));
})]
#[case::its_worker_is_silent(|looks: &mut Looks, _: &mut Vec<(&str, Answer)>| {
    looks.connected = queues(&["w"]);
})]
#[case::another_one_is_silent(|looks: &mut Looks, answers: &mut Vec<(&str, Answer)>| {
    looks.connected = queues(&["v"]);
    answers.clear();
    looks.queue(0, 0);
})]
#[case::a_consumer_has_never_answered(|looks: &mut Looks, _: &mut Vec<(&str, Answer)>| {
    looks.queue(0, 2);
})]
#[case::nothing_is_known_of_its_queue(|looks: &mut Looks, _: &mut Vec<(&str, Answer)>| {
    looks.depths.clear();
})]
#[case::a_worker_had_no_time_to_say_what_it_has(|_: &mut Looks, answers: &mut Vec<(&str, Answer)>| {
    answers[0].1.tasks = None;
})]
#[case::it_has_just_been_started(|looks: &mut Looks, answers: &mut Vec<(&str, Answer)>| {
    let uptime = answers[0].1.stats.as_ref().unwrap().uptime.unwrap();
    looks.running[0].started_at = at(uptime.as_secs() - 1);
})]
#[case::its_job_has_ended(|looks: &mut Looks, _: &mut Vec<(&str, Answer)>| looks.running.clear())]
fn a_task_that_somebody_may_have_is_not(#[case] change: fn(&mut Looks, &mut Vec<(&str, Answer)>)) {
    assert_eq!(without_its_worker(change).absences, []);
}

#[rstest]
#[case::others_wait_there_too(|looks: &mut Looks, _: &mut Vec<(&str, Answer)>| looks.queue(5, 1), true)]
#[case::a_busy_worker_takes_several(|_: &mut Looks, answers: &mut Vec<(&str, Answer)>| {
    answers[0].1 = answer(10, &["u"], &["q"]);
    answers[0].1.stats.as_mut().unwrap().prefetch = Some(4);
}, true)]
#[case::a_busy_worker_takes_one(|_: &mut Looks, answers: &mut Vec<(&str, Answer)>| {
    answers[0].1 = answer(10, &["u"], &["q"]);
}, false)]
#[case::one_that_came_later_was_started(|looks: &mut Looks, _: &mut Vec<(&str, Answer)>| {
    looks.queue(5, 1);
    looks.running.truncate(1);
    looks.running.push(RunningTask { submitted_at: at(30), started_at: at(31), ..running("later") });
}, false)]
#[case::one_that_came_later_and_goes_first_was_started(|looks: &mut Looks, _: &mut Vec<(&str, Answer)>| {
    looks.queue(5, 1);
    looks.running.truncate(1);
    looks.running.push(RunningTask { submitted_at: at(30), started_at: at(31), priority: 0, ..running("later") });
}, true)]
#[case::one_that_came_earlier_was_started(|looks: &mut Looks, _: &mut Vec<(&str, Answer)>| {
    looks.queue(5, 1);
    looks.running.truncate(1);
    looks.running.push(RunningTask { submitted_at: at(2), started_at: at(31), ..running("later") });
}, true)]
fn an_absent_task_may_wait_in_its_queue(
    #[case] change: fn(&mut Looks, &mut Vec<(&str, Answer)>),
    #[case] expected: bool,
) {
    let look = without_its_worker(change);
    let absence = look.absences.iter().find(|one| one.task_id == "t").unwrap();
    assert_eq!(absence.may_wait, expected);
    assert_eq!(absence.is_told, !expected);
}

#[test]
fn after_an_outage_and_after_a_start_an_absence_begins_anew() {
    let mut looks = Looks {
        running: vec![running("t")],
        ..Looks::default()
    };
    looks.queue(0, 0);
    let since = |looks: &mut Looks, second| looks.look(second, &[]).absences[0].since;
    assert_eq!(since(&mut looks, 20), at(20));
    assert_eq!(since(&mut looks, 110), at(20));
    assert_eq!(since(&mut looks, 201), at(201));
    looks.running[0].started_at = at(205);
    assert_eq!(since(&mut looks, 216), at(216));
}

/// Looks at a task that is on its queue by what the database knows, each 15 seconds for two minutes. `w`
/// takes tasks from there and has nothing to do; `change` changes what is seen.
fn in_no_queue(change: impl Fn(&mut Looks, &mut Vec<(&str, Answer)>)) -> Look {
    let mut looks = Looks {
        waiting: vec![WaitingTask {
            queue_is_kept: true,
            job_id: Uuid::from_u128(8),
            task_id: "waits".to_owned(),
            queue: "q".to_owned(),
            submitted_at: at(0),
        }],
        ..Looks::default()
    };
    looks.queue(0, 1);
    two_minutes(looks, "w", change)
}

#[test]
fn a_task_that_no_worker_has_begun_and_no_queue_has_is_absent() {
    let absence = Absence {
        job_id: Uuid::from_u128(8),
        task_id: "waits".to_owned(),
        since: at(25),
        confirmed_at: at(130),
        may_wait: false,
        is_told: true,
    };
    assert_eq!(in_no_queue(|_, _| {}).absences, slice::from_ref(&absence));
    // Also if nobody takes from there, or it is gone.
    let nobody = in_no_queue(|looks, answers| {
        looks.queue(0, 0);
        answers.clear();
    });
    assert_eq!(nobody.absences, slice::from_ref(&absence));
    // A worker that cannot be asked has nothing to do, as far as is known: that is no proof.
    let stranger = in_no_queue(|looks, _| looks.queue(0, 2));
    let doubtful = Absence {
        may_wait: true,
        ..absence
    };
    assert_eq!(stranger.absences, slice::from_ref(&doubtful));
    // By the definitions it should have been there.
    let elsewhere = in_no_queue(|looks, _| looks.waiting[0].queue_is_kept = false);
    assert_eq!(elsewhere.absences, [doubtful]);
}

/// As many as are not looked at one by one are told where one of the same queue is.
#[test]
fn what_is_as_absent_is_counted() {
    let of = |queue: &str| BTreeMap::from([(queue.to_owned(), 7)]);
    let more = |look: Look| look.more_absent;
    assert_eq!(
        more(in_no_queue(|looks, _| looks.more_waiting = of("q"))),
        7
    );
    assert_eq!(
        more(in_no_queue(|looks, _| looks.more_waiting = of("r"))),
        0
    );
    let told_later = in_no_queue(|looks, _| {
        looks.more_waiting = of("q");
        looks.absences.clear();
    });
    assert_eq!(more(told_later), 0);
    // A worker that computes one may hold all others.
    let held = in_no_queue(|looks, answers| {
        looks.more_waiting = of("q");
        if looks.absences.iter().any(|one| one.is_told) {
            answers[0].1 = answer(10, &["u"], &["q"]);
            answers[0].1.stats.as_mut().unwrap().prefetch = Some(0);
        }
    });
    assert!(held.absences[0].is_told);
    assert_eq!(held.more_absent, 0);
}

#[rstest]
#[case::something_is_in_its_queue(|looks: &mut Looks, _: &mut Vec<(&str, Answer)>| looks.queue(1, 1))]
#[case::nothing_is_known_of_its_queue(|looks: &mut Looks, _: &mut Vec<(&str, Answer)>| {
    looks.depths.clear();
})]
#[case::a_worker_has_it(|_: &mut Looks, answers: &mut Vec<(&str, Answer)>| {
    answers[0].1 = answer(10, &["waits"], &["q"]);
})]
#[case::one_whose_queue_it_is_not_has_it(|_: &mut Looks, answers: &mut Vec<(&str, Answer)>| {
    answers.push(("x", answer(10, &["waits"], &["other"])));
})]
#[case::a_busy_worker_may_have_been_given_it(|_: &mut Looks, answers: &mut Vec<(&str, Answer)>| {
    answers[0].1 = answer(10, &["u"], &["q"]);
    answers[0].1.stats.as_mut().unwrap().prefetch = Some(4);
})]
#[case::one_that_acknowledges_what_it_begins_may_too(|_: &mut Looks, answers: &mut Vec<(&str, Answer)>| {
    answers[0].1 = answer(10, &["u"], &["q"]);
    answers[0].1.stats.as_mut().unwrap().prefetch = Some(1);
})]
#[case::a_worker_is_silent(|looks: &mut Looks, answers: &mut Vec<(&str, Answer)>| {
    // It has answered in the first look.
    if !looks.known.is_empty() {
        looks.connected = queues(&["w"]);
        answers.clear();
        looks.queue(0, 0);
    }
})]
#[case::one_that_cannot_be_asked_computes_another(|looks: &mut Looks, _: &mut Vec<(&str, Answer)>| {
    looks.queue(0, 2);
    looks.running = vec![running("of a stranger")];
})]
#[case::it_has_just_been_put_there(|looks: &mut Looks, answers: &mut Vec<(&str, Answer)>| {
    let uptime = answers[0].1.stats.as_ref().unwrap().uptime.unwrap();
    looks.waiting[0].submitted_at = at(uptime.as_secs() - 1);
})]
fn a_task_that_may_be_in_its_queue_or_with_a_worker_is_not(
    #[case] change: fn(&mut Looks, &mut Vec<(&str, Answer)>),
) {
    let look = in_no_queue(change);
    let told: Vec<_> = look.absences.iter().filter(|one| one.is_told).collect();
    assert_eq!(told, Vec::<&Absence>::new());
}

/// Whether the task of [`without_its_worker`] is told, after it was, when a worker of its queue is silent; and
/// whether its job may be ended.
#[test]
fn what_is_told_as_lost_stays_so_while_a_worker_is_silent() {
    let mut looks = Looks {
        running: vec![running("t")],
        ..Looks::default()
    };
    looks.queue(0, 1);
    let v = |second| vec![("v", answer(second, &[], &["q"]))];
    for second in [20, 80] {
        looks.look(second, &v(second));
    }
    let is_told = |look: &Look| {
        look.absences
            .iter()
            .map(|one| (one.is_told, one.may_wait))
            .next()
    };
    let told = looks.look(95, &v(95));
    assert_eq!(is_told(&told), Some((true, false)));
    looks.connected = queues(&["v"]);
    for second in [110, 125, 220] {
        let look = looks.look(second, &[]);
        assert_eq!(is_told(&look), Some((true, true)), "at {second}");
        assert!(
            !look
                .news
                .iter()
                .any(|news| matches!(news, News::Absent { .. }))
        );
    }
    // It counts anew from here on, for after so long nobody knows what was in between.
    let back = looks.look(235, &v(235));
    assert_eq!(is_told(&back), Some((true, false)));
    assert_eq!(back.absences[0].since, at(235));
    assert_eq!(back.news, [News::Back("v".to_owned())]);
    looks.running[0].started_at = at(240);
    assert_eq!(is_told(&looks.look(250, &v(250))), Some((false, false)));
}

#[test]
fn a_task_is_known_by_what_its_worker_tells_of_it_if_the_job_is_ours() {
    let mut looks = Looks::default();
    let mut told = answer(10, &["ours", "theirs"], &["q"]);
    let job = Uuid::from_u128(9);
    for task in told.tasks.iter_mut().flatten() {
        task.job_id = Some(job);
    }
    let answers = BTreeMap::from([("w".to_owned(), told.clone())]);
    let runs = [running("theirs")];
    let unknown: Vec<_> = unknown_jobs(&answers, &runs).collect();
    assert_eq!(unknown, [("ours", job)]);
    looks.others = BTreeMap::from([("ours".to_owned(), job)]);
    looks.look(10, &[("w", told)]);
    let tasks = looks.known["w"].tasks.iter();
    let jobs: Vec<_> = tasks.map(|task| (task.id.as_str(), task.job_id)).collect();
    assert_eq!(jobs, [("ours", Some(job)), ("theirs", None)]);
}

#[test]
fn a_queue_is_deserted_since_the_last_of_its_workers_has_gone() {
    let worker = |state: WorkerState, since: i64, seen: i64, serves: &[&str]| {
        let mut worker = Worker::new(&format!("{state:?} {since}"), at(0));
        worker.state = state;
        (worker.state_since, worker.last_seen) = (at(since), at(seen));
        worker.serves = queues(serves);
        (worker.host.clone(), worker)
    };
    let all = [
        worker(WorkerState::Gone, 20, 10, &["left", "drained"]),
        worker(WorkerState::Gone, 40, 30, &["left", "taken"]),
        worker(WorkerState::Drained, 50, 100, &["drained"]),
        worker(WorkerState::Silent, 60, 15, &["taken"]),
        worker(WorkerState::Gone, 90, 80, &["taken"]),
    ];
    let expected = BTreeMap::from([("drained".to_owned(), at(50)), ("left".to_owned(), at(30))]);
    assert_eq!(deserted(&all.into_iter().collect()), expected);
}
