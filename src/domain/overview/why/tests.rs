use std::collections::BTreeMap;

use proptest::prelude::*;
use rstest::rstest;
use uuid::Uuid;

use super::*;
use crate::domain::acts::{Done, QueueActs};
use crate::domain::job::{Origin, Progress, Via};
use crate::domain::overview::tests::waiting as at_place;
use crate::domain::overview::{Depth, End, Queue, QueueView, Queues, WorkflowRows};
use crate::domain::turns::QueueLimit;
use crate::domain::vhost::Vhost;
use crate::domain::worker::{LostTask, Workers};

/// A minute of the day at which all is told: 03:26.
const NOW: i64 = 3 * 60 + 26;

fn minute(minute: i64) -> Timestamp {
    Timestamp::from_second(20_000 * 86_400 + minute * 60).unwrap()
}

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number << 96)
}

/// One that has waited since 03:00.
fn waiting() -> JobView {
    JobView {
        id: id(7),
        reference: "a job".to_owned(),
        task_id: Some("task".to_owned()),
        registered_at: Some(minute(180)),
        submitted_at: Some(minute(180)),
        position: None,
        ..at_place(0)
    }
}

fn placed(position: i64) -> JobView {
    JobView {
        position: Some(position),
        ..waiting()
    }
}

/// One that has run since 03:12.
fn running() -> JobView {
    JobView {
        state: JobState::Live(JobStatus::Running),
        running_at: Some(minute(192)),
        starts: 1,
        ..waiting()
    }
}

fn held() -> JobView {
    JobView {
        state: JobState::Live(JobStatus::Registered),
        task_id: None,
        submitted_at: None,
        turn: Some(TurnView {
            queue: "simulator".to_owned(),
            owner: "anna".to_owned(),
            since: minute(180),
            on_hold: false,
            hold: None,
        }),
        ..waiting()
    }
}

/// One that ran from 03:12 to 03:20.
fn ended(outcome: Outcome, why: &str) -> JobView {
    JobView {
        state: JobState::Ended(outcome),
        finished_at: Some(minute(200)),
        ends: End {
            is_told: true,
            why: (!why.is_empty()).then(|| why.to_owned()),
            step: None,
            cancelled_by: None,
        },
        ..running()
    }
}

fn in_step(number: usize, job: JobView) -> JobView {
    JobView {
        step: Some(StepView {
            number,
            attempt: 1,
            title: "Simulate".to_owned(),
            task: "simulator".to_owned(),
            timeout_ms: None,
            due_at: None,
            submitted_at: job.submitted_at,
            started_at: job.running_at,
            shares: vec![0.5, 0.5],
        }),
        ..job
    }
}

/// The second attempt at its first step, which begins in as many minutes.
fn between(minutes: i64) -> JobView {
    let mut job = in_step(1, waiting());
    let step = job.step.as_mut().unwrap();
    step.attempt = 2;
    step.due_at = Some(minute(NOW + minutes));
    step.submitted_at = None;
    job.ends.step = Some(StepEnd {
        number: 1,
        title: "Simulate".to_owned(),
        outcome: Outcome::Failed,
        starts: 1,
        why: Some("no solution".to_owned()),
    });
    job
}

fn ended_in_step(number: usize, title: &str, outcome: Outcome) -> JobView {
    let mut job = ended(outcome, "no solution.");
    job.ends.step = Some(StepEnd {
        number,
        title: title.to_owned(),
        outcome,
        starts: 2,
        why: None,
    });
    job
}

fn with_workers(count: u32) -> Overview {
    Overview {
        queues: Some(Queues {
            at: minute(NOW),
            queues: vec![Queue {
                vhost: Vhost::Celery,
                name: "simulator".to_owned(),
                depth: Some(Depth {
                    messages: 1,
                    consumers: count,
                }),
            }],
            without_worker: BTreeMap::new(),
        }),
        ..Overview::default()
    }
}

fn worker(state: WorkerState) -> WorkerView {
    WorkerView {
        host: "worker-simulator@a1".to_owned(),
        state,
        since: minute(180),
        first_seen: minute(100),
        last_seen: minute(192),
        began_at: None,
        pool: None,
        pool_size: None,
        celery: None,
        queues: vec!["simulator".to_owned()],
        tasks: vec![TaskView {
            id: "task".to_owned(),
            name: "simulator".to_owned(),
            job_id: Some(id(7)),
            reference: None,
            workflow: None,
            step: None,
            since: minute(192),
            ended: None,
        }],
        tasks_per_hour: None,
        ended: 0,
        failed: 0,
    }
}

fn seen(state: WorkerState, overview: Overview) -> Overview {
    Overview {
        workers: Some(Workers {
            looked_at: Some(minute(NOW)),
            workers: vec![worker(state)],
            lost_tasks: Vec::new(),
            more_lost_tasks: 0,
        }),
        ..overview
    }
}

fn change_workers(mut overview: Overview, change: impl FnOnce(&mut Workers)) -> Overview {
    change(overview.workers.as_mut().unwrap());
    overview
}

fn without_worker(overview: Overview) -> Overview {
    let mut overview = overview;
    if let Some(queues) = &mut overview.queues {
        let since = ("simulator".to_owned(), minute(192));
        queues.without_worker = BTreeMap::from([since]);
    }
    overview
}

fn in_outage(overview: Overview) -> Overview {
    Overview {
        outage: Some(Outage {
            what: "RabbitMQ does not answer",
            since: Some(minute(200)),
        }),
        ..overview
    }
}

fn lost() -> Overview {
    let mut overview = seen(WorkerState::Idle, with_workers(1));
    if let Some(workers) = &mut overview.workers {
        workers.lost_tasks.push(LostTask {
            job_id: id(7),
            task_id: "task".to_owned(),
            since: minute(200),
            never_begun: false,
        });
    }
    overview
}

/// The last runs took from 1 to 10 times as many minutes.
fn with_runs(minutes: u64, overview: Overview) -> Overview {
    let runs = (1..=10).map(|run| Duration::from_secs(60 * run * minutes));
    let rows = WorkflowRows {
        runs: Runs::new(runs.collect()),
        ..WorkflowRows::default()
    };
    Overview {
        rows: BTreeMap::from([("simulator".to_owned(), rows)]),
        ..overview
    }
}

fn limited(limit: QueueLimit) -> QueueView {
    QueueView {
        name: "simulator".to_owned(),
        limit,
        held: 3,
        on_hold: 0,
        waiting: 0,
        running: 1,
        oldest_waiting: None,
        order: Vec::new(),
        seats: vec![id(0x1234_abcd)],
        is_paused_by_operator: true,
        acts: QueueActs::default(),
    }
}

fn done() -> Done {
    Done {
        at: minute(193),
        by: Origin::new(Via::Page, Some("anna"), Some("10.0.0.7")),
    }
}

fn seats(most: u32) -> QueueView {
    limited(QueueLimit {
        max_running: Some(most),
        ..QueueLimit::default()
    })
}

fn paused(by_operator: bool) -> QueueView {
    QueueView {
        is_paused_by_operator: by_operator,
        ..limited(QueueLimit {
            is_paused: true,
            max_running: Some(1),
            window: None,
        })
    }
}

fn window() -> QueueView {
    QueueView {
        waiting: 5,
        ..limited(QueueLimit {
            window: Some(5),
            ..QueueLimit::default()
        })
    }
}

fn after(owners: &[&str], view: QueueView) -> QueueView {
    let order = (100..).zip(owners);
    let order = order.map(|(number, owner)| (id(number), (*owner).to_owned()));
    let own = (id(7), "anna".to_owned());
    QueueView {
        order: order.chain([own]).collect(),
        ..view
    }
}

fn at_turn(view: QueueView) -> Overview {
    Overview {
        turns: vec![view],
        ..Overview::default()
    }
}

fn nothing() -> Overview {
    Overview::default()
}

fn change(mut job: JobView, change: impl FnOnce(&mut JobView)) -> JobView {
    change(&mut job);
    job
}

fn progress(at: i64) -> Option<Progress> {
    Some(Progress {
        fraction: 0.5,
        message: "half".to_owned(),
        at: minute(at),
    })
}

#[rstest]
// Held.
#[case::on_hold(
    change(held(), |job| job.turn.as_mut().unwrap().on_hold = true), at_turn(seats(1)),
    "Held: an operator does not let it go.")]
#[case::on_hold_of_somebody(
    change(held(), |job| {
        let turn = job.turn.as_mut().unwrap();
        (turn.on_hold, turn.hold) = (true, Some(done()));
    }),
    at_turn(seats(1)),
    "Held: anna does not let it go since 03:13.")]
#[case::paused_by_somebody(
    held(),
    at_turn(QueueView {
        acts: QueueActs { paused: Some(done()), limited: None },
        ..paused(true)
    }),
    "Held: `simulator` is paused by anna since 03:13.")]
#[case::no_view(held(), nothing(), "Held: waits for its turn at `simulator`.")]
#[case::paused(
    held(),
    at_turn(paused(true)),
    "Held: `simulator` is paused by an operator."
)]
#[case::paused_in_file(
    held(),
    at_turn(paused(false)),
    "Held: `simulator` is paused by its definition."
)]
#[case::seat(
    held(), at_turn(after(&[], seats(1))),
    "Held: `max_running` 1 of `simulator` is used by job 1234abcd; it is the next.")]
#[case::seats(
    held(),
    at_turn(QueueView { running: 2, seats: vec![id(1), id(2)], ..seats(2) }),
    "Held: `max_running` 2 of `simulator` is used by jobs 00000001, 00000002.")]
#[case::many_seats(
    held(),
    at_turn(QueueView { running: 9, seats: vec![id(1), id(2), id(3)], ..seats(9) }),
    "Held: `max_running` 9 of `simulator` is used by jobs 00000001, 00000002, 00000003 and others.")]
#[case::window(held(), at_turn(window()), "Held: `window` 5 of `simulator` is full.")]
#[case::room(
    held(), at_turn(after(&["anna"], seats(2))),
    "Held: waits for its turn at `simulator`; 1 job goes first (00000064).")]
#[case::others_first(
    held(), at_turn(after(&["bob", "bob"], seats(1))),
    "Held: `max_running` 1 of `simulator` is used by job 1234abcd; \
     2 jobs of other owners go first (00000064, 00000065).")]
#[case::own_and_others_first(
    held(), at_turn(after(&["anna", "bob"], window())),
    "Held: `window` 5 of `simulator` is full; 2 jobs go first (00000064, 00000065), 1 of them of other owners.")]
#[case::many_first(
    held(), at_turn(after(&["anna"; 12], window())),
    "Held: `window` 5 of `simulator` is full; 12 jobs go first (00000064, 00000065, 00000066 and 9 more).")]
#[case::no_room_for_names(
    change(held(), |job| job.turn.as_mut().unwrap().queue = "q".repeat(60)),
    Overview {
        turns: vec![QueueView { name: "q".repeat(60), seats: vec![id(1), id(2)], running: 2, ..after(&["bob"; 12], seats(2)) }],
        ..in_outage(nothing())
    },
    &format!(
        "Held: `max_running` 2 of `{}` is used by jobs 00000001, 00000002; RabbitMQ does not answer (since 03:20); \
         12 jobs of other owners go first.",
        "q".repeat(60)
    ))]
#[case::beyond_what_is_told(
    held(),
    at_turn(QueueView { order: vec![(id(1), String::new()); 200], ..window() }),
    "Held: `window` 5 of `simulator` is full; more than 200 jobs go first (00000001, 00000001, 00000001 and others).")]
#[case::beyond_all_that_are_told(
    held(), at_turn(QueueView { order: vec![(id(1), String::new()); 3], ..window() }),
    "Held: `window` 5 of `simulator` is full.")]
#[case::held_without_worker(
    held(),
    Overview { turns: vec![after(&[], window())], ..without_worker(with_workers(0)) },
    "Held: `window` 5 of `simulator` is full; it is the next; no worker takes `simulator` since 03:12.")]
#[case::three_of_more_seats(
    held(),
    at_turn(QueueView { running: 9, seats: vec![id(1), id(2), id(3)], ..seats(3) }),
    "Held: `max_running` 3 of `simulator` is used by jobs 00000001, 00000002, 00000003 and others.")]
#[case::later_step(
    change(in_step(2, held()), |job| job.ends.step = Some(StepEnd {
        number: 1, title: "Prepare".to_owned(), outcome: Outcome::Succeeded, starts: 1, why: None })),
    at_turn(window()), "Held: `window` 5 of `simulator` is full.")]
// Registered.
#[case::granted(
    change(held(), |job| { job.turn = None; job.granted_at = Some(minute(NOW)); }), nothing(),
    "Has its turn: its task is on its way to RabbitMQ.")]
#[case::granted_long_ago(
    change(held(), |job| { job.turn = None; job.granted_at = Some(minute(205)); }), nothing(),
    "Has its turn since 03:25; its task is not in RabbitMQ yet.")]
#[case::granted_of_several_steps(
    change(in_step(1, held()), |job| { job.turn = None; job.granted_at = Some(minute(NOW)); }), nothing(),
    "Has its turn: its task is on its way to RabbitMQ.")]
#[case::half_registered(
    change(held(), |job| job.turn = None), nothing(),
    "Registered without a task: its submission is not done with yet.")]
// In its queue.
#[case::nothing_known(waiting(), nothing(), "Waits for a worker of `simulator`.")]
#[case::no_submission(
    change(waiting(), |job| job.submitted_at = None), nothing(), "Waits for a worker.")]
#[case::no_worker(placed(1), with_workers(0), "Waits: no worker takes `simulator`.")]
#[case::no_worker_since(
    placed(1),
    without_worker(seen(WorkerState::Gone, with_workers(0))),
    "Waits: no worker takes `simulator` since 03:12; last seen worker-simulator@a1, 14 min ago."
)]
#[case::drained(
    placed(1),
    seen(WorkerState::Drained, with_workers(0)),
    "Waits: no worker takes `simulator`; worker-simulator@a1 is drained."
)]
#[case::draining(
    placed(1),
    seen(WorkerState::Draining, with_workers(0)),
    "Waits: no worker takes `simulator`; worker-simulator@a1 takes no more, for an operator drains it."
)]
#[case::next(
    placed(1),
    seen(WorkerState::Busy, with_workers(1)),
    "Waits: it is the next at `simulator`; its worker is busy."
)]
#[case::one_first(placed(2), nothing(), "Waits: 1 job goes first at `simulator`.")]
#[case::with_place(
    placed(3),
    with_runs(20, with_workers(1)),
    "Waits: 2 jobs go first at `simulator`; about 3 h 20 min."
)]
#[case::behind_what_is_overdue(
    placed(1),
    with_runs(1, seen(WorkerState::Busy, with_workers(1))),
    "Waits: it is the next at `simulator`; its worker is busy; for how long nobody knows: what runs there takes \
     longer than all before it."
)]
#[case::processes(
    placed(1),
    change_workers(seen(WorkerState::Busy, with_workers(1)), |workers| {
        workers.workers[0].pool_size = Some(2);
    }),
    "Waits: it is the next at `simulator`.")]
#[case::deaf(
    placed(1),
    change_workers(seen(WorkerState::BusyAndDeaf, with_workers(1)), |workers| {
        workers.workers[0].tasks.clear();
    }),
    "Waits: it is the next at `simulator`; its worker is busy.")]
#[case::busy_long_ago(
    placed(1),
    change_workers(seen(WorkerState::Busy, with_workers(1)), |workers| {
        workers.looked_at = Some(minute(NOW - 3));
    }),
    "Waits: it is the next at `simulator`.")]
#[case::idle_worker(
    placed(1),
    seen(WorkerState::Idle, with_workers(1)),
    "Waits: it is the next at `simulator`."
)]
#[case::in_no_queue(
    placed(1),
    change_workers(lost(), |workers| workers.lost_tasks[0].never_begun = true),
    "Its task is lost: it is in no queue, and no worker says that it has it, since 03:20."
)]
#[case::waits_in_an_outage(
    placed(1),
    with_runs(2, in_outage(seen(WorkerState::Busy, with_workers(1)))),
    "Waits: RabbitMQ does not answer (since 03:20)."
)]
#[case::waits_in_an_outage_since_nobody_knows_when(
    placed(1),
    Overview {
        outage: Some(Outage { what: "RabbitMQ does not answer", since: None }),
        ..nothing()
    },
    "Waits: RabbitMQ does not answer."
)]
#[case::held_in_an_outage(
    held(),
    in_outage(at_turn(after(&[], seats(1)))),
    "Held: `max_running` 1 of `simulator` is used by job 1234abcd; RabbitMQ does not answer (since 03:20); \
     it is the next.")]
#[case::step_waits(
    in_step(2, placed(2)),
    nothing(),
    "Waits: 1 job goes first at `simulator`."
)]
// Between attempts.
#[case::between(
    between(5),
    nothing(),
    "Waits between attempts: attempt 2 of step 1 of 2, Simulate begins in 5 min; the one before it failed."
)]
#[case::due(
    between(0),
    nothing(),
    "Waits: it is time for attempt 2 of step 1 of 2, Simulate, which is about to begin; \
     the one before it failed."
)]
#[case::stalled(
    change(between(-16), |job| job.progress = progress(189)), nothing(),
    "Waits for attempt 2 of step 1 of 2, Simulate since 03:10; its task is not in RabbitMQ yet.")]
#[case::stalled_and_told(
    change(between(-16), |job| job.progress = progress(191)), nothing(),
    "Waits for attempt 2 of step 1 of 2, Simulate since 03:10; its task is not in RabbitMQ yet; half.")]
// Running.
#[case::runs(running(), nothing(), "Runs for 14 min.")]
#[case::no_start(change(running(), |job| job.running_at = None), nothing(), "Runs.")]
#[case::on_host(
    running(),
    seen(WorkerState::Busy, with_workers(1)),
    "Runs on worker-simulator@a1 for 14 min."
)]
#[case::other_task(
    change(running(), |job| job.task_id = Some("other".to_owned())),
    seen(WorkerState::Busy, with_workers(1)), "Runs for 14 min.")]
#[case::silent(
    running(),
    seen(WorkerState::Silent, with_workers(1)),
    "Runs on worker-simulator@a1 for 14 min; its worker has not answered since 03:12; restart it, and the task \
     goes to another, as far as its delivery limit allows."
)]
#[case::no_room_for_all(
    change(in_step(2, running()), |job| {
        (job.progress, job.starts) = (progress(193), 2);
        job.step.as_mut().unwrap().timeout_ms = Some(40 * 60_000);
    }),
    seen(WorkerState::Silent, with_workers(1)),
    "Runs step 2 of 2, Simulate on worker-simulator@a1 for 14 min; its worker has not answered since 03:12; \
     restart it, and the task goes to another, as far as its delivery limit allows; started 2 times."
)]
#[case::little_room_for_a_silent_one(
    change(in_step(2, running()), |job| {
        job.step.as_mut().unwrap().title = "Simulate the heat network of a whole district".to_owned();
    }),
    seen(WorkerState::Silent, with_workers(1)),
    "Runs step 2 of 2, Simulate the heat network of a whole district on worker-simulator@a1 for 14 min; its worker \
     has not answered since 03:12."
)]
#[case::silent_without_estimate(
    running(),
    with_runs(2, seen(WorkerState::Silent, with_workers(1))),
    "Runs on worker-simulator@a1 for 14 min; its worker has not answered since 03:12; restart it, and the task \
     goes to another, as far as its delivery limit allows."
)]
#[case::in_an_outage(
    running(),
    with_runs(2, in_outage(nothing())),
    "Runs for 14 min; whether it still does is not known: RabbitMQ does not answer (since 03:20)."
)]
#[case::in_time(
    running(),
    with_runs(2, nothing()),
    "Runs for 14 min; about 4 min left."
)]
#[case::slow(
    change(running(), |job| job.running_at = Some(minute(NOW - 19))), with_runs(2, nothing()),
    "Runs for 19 min; longer than 90 % of those before it.")]
#[case::slowest(
    running(),
    with_runs(1, nothing()),
    "Runs for 14 min; longer than all of those before it."
)]
#[case::all_at_once(
    change(running(), |job| {
        job.progress = progress(193);
        job.timeout_ms = Some(40 * 60_000);
        job.starts = 2;
    }),
    seen(WorkerState::Busy, with_runs(1, with_workers(1))),
    "Runs on worker-simulator@a1 for 14 min; longer than all of those before it; \
     last word 13 min ago; times out in 26 min; started 2 times.")]
#[case::word_of_the_orchestrator(
    change(running(), |job| job.progress = progress(192)), nothing(), "Runs for 14 min.")]
#[case::lost_task_of_another_attempt(
    change(running(), |job| job.task_id = Some("next".to_owned())), lost(), "Runs for 14 min.")]
#[case::lost_task_of_an_old_look(
    running(),
    change_workers(lost(), |workers| workers.looked_at = Some(minute(NOW - 3))),
    "Runs for 14 min.")]
#[case::no_look(
    running(), change_workers(lost(), |workers| workers.looked_at = None), "Runs for 14 min.")]
#[case::lost_task_without_session(
    running(), Overview { is_cut_off: true, ..lost() }, "Runs for 14 min.")]
#[case::overdue(
    change(running(), |job| job.timeout_ms = Some(60_000)), nothing(),
    "Runs for 14 min; its timeout is over.")]
#[case::no_timeout(change(running(), |job| job.timeout_ms = Some(0)), nothing(), "Runs for 14 min.")]
#[case::lost_task(
    change(running(), |job| job.progress = progress(196)), lost(),
    "Its task is lost: no worker has had it since 03:20; last word 10 min ago.")]
#[case::step(
    in_step(2, running()),
    nothing(),
    "Runs step 2 of 2, Simulate for 14 min."
)]
#[case::timeout_of_a_step(
    change(in_step(2, running()), |job| {
        job.timeout_ms = Some(1);
        job.step.as_mut().unwrap().timeout_ms = Some(15 * 60_000);
    }),
    nothing(), "Runs step 2 of 2, Simulate for 14 min; times out in 1 min.")]
// Ended.
#[case::succeeded(ended(Outcome::Succeeded, ""), nothing(), "Succeeded after 8 min.")]
#[case::failed(
    ended(Outcome::Failed, "no solution."),
    nothing(),
    "Failed: no solution."
)]
#[case::failed_and_says_so(
    ended(Outcome::Failed, "Failed after 2 seconds"),
    nothing(),
    "Failed after 2 seconds."
)]
#[case::failed_and_says_so_and_why(
    ended(Outcome::Failed, "FAILED: no heat"),
    nothing(),
    "Failed: no heat."
)]
#[case::another_word(ended(Outcome::Failed, "Failedé"), nothing(), "Failed: Failedé.")]
#[case::failed_silently(ended(Outcome::Failed, ""), nothing(), "Failed.")]
#[case::failed_in_step(
    ended_in_step(2, "Simulate", Outcome::Failed),
    nothing(),
    "Failed in step 2, Simulate: no solution."
)]
#[case::failed_in_first_step(
    ended_in_step(1, "Simulate", Outcome::Failed),
    nothing(),
    "Failed in step 1, Simulate: no solution."
)]
#[case::failed_in_its_only_step(
    ended_in_step(1, "simulator", Outcome::Failed),
    nothing(),
    "Failed: no solution."
)]
#[case::cancelled_early(
    change(ended(Outcome::Cancelled, ""), |job| { job.registered_at = None; job.running_at = None; }),
    nothing(), "Cancelled before it was submitted.")]
#[case::cancelled_at_once(
    change(ended(Outcome::Cancelled, ""), |job| {
        job.registered_at = job.finished_at;
        job.submitted_at = None;
        job.running_at = None;
    }),
    nothing(), "Cancelled before it was submitted.")]
#[case::cancelled_waiting(
    change(ended(Outcome::Cancelled, ""), |job| job.running_at = None),
    nothing(), "Cancelled while it waited.")]
#[case::cancelled(ended(Outcome::Cancelled, ""), nothing(), "Cancelled after 8 min.")]
#[case::cancelled_by_somebody(
    change(ended(Outcome::Cancelled, ""), |job| job.ends.cancelled_by = Some(done().by)),
    nothing(), "Cancelled by anna after 8 min.")]
#[case::cancelled_by_somebody_while_it_waited(
    change(ended(Outcome::Cancelled, ""), |job| {
        job.running_at = None;
        job.ends.cancelled_by = Some(done().by);
    }),
    nothing(), "Cancelled by anna while it waited.")]
#[case::cancelled_by_a_client_before_it_came(
    change(ended(Outcome::Cancelled, ""), |job| {
        (job.registered_at, job.running_at) = (None, None);
        job.ends.cancelled_by = Some(Origin::new(Via::Client, None, None));
    }),
    nothing(), "Cancelled by a client before it was submitted.")]
#[case::timed_out_and_then_cancelled(
    change(ended(Outcome::TimedOut, ""), |job| job.ends.cancelled_by = Some(done().by)),
    nothing(), "Timed out after 8 min.")]
#[case::crashed(
    change(ended(Outcome::CrashLoop, "Job cannot be processed"), |job| job.starts = 3), nothing(),
    "Lost its workers: they crashed, or were stopped; its task was started 3 times.")]
#[case::crashed_in_step(
    change(ended_in_step(2, "Simulate", Outcome::CrashLoop), |job| job.starts = 3), nothing(),
    "Lost its workers in step 2, Simulate: they crashed, or were stopped; its task was started 2 times.")]
#[case::refused(
    ended(Outcome::Rejected, "there is no workflow `x`."),
    nothing(),
    "Refused: there is no workflow `x`."
)]
#[case::timed_out(
    ended(Outcome::TimedOut, "The job was ended."),
    nothing(),
    "Timed out after 8 min: The job was ended."
)]
#[case::expired(
    ended(Outcome::Expired, "it had been waiting for too long."),
    nothing(),
    "Given up: it had been waiting for too long."
)]
#[case::lost(
    ended(Outcome::Lost, "no worker has had its task."),
    nothing(),
    "Lost: no worker has had its task."
)]
#[case::not_told(
    change(ended(Outcome::Failed, "no"), |job| job.ends.is_told = false), nothing(),
    "Failed: no; its client may not have been told yet.")]
fn it_has_its_sentence(#[case] job: JobView, #[case] overview: Overview, #[case] sentence: &str) {
    let mut jobs = [job];
    overview.explain(&mut jobs, minute(NOW));
    let [job] = jobs;
    assert_eq!(job.why.unwrap().sentence, sentence);
}

/// How its row is shown: what somebody should look at, and what is expected of it.
#[rstest]
#[case::well(
    running(),
    seen(WorkerState::Busy, nothing()),
    None,
    "ends in 4 min to 6 min"
)]
#[case::its_worker_is_silent(
    running(),
    seen(WorkerState::Silent, nothing()),
    Some(Concern::WorkerSilent),
    ""
)]
#[case::it_is_lost(running(), lost(), Some(Concern::TaskLost), "")]
#[case::it_is_lost_and_waits(placed(1), lost(), Some(Concern::TaskLost), "")]
#[case::nothing_goes_on(placed(1), in_outage(nothing()), None, "")]
#[case::another_jobs_worker_is_silent(
    change(running(), |job| job.task_id = Some("other".to_owned())),
    seen(WorkerState::Silent, nothing()), None, "ends in 4 min to 6 min")]
#[case::it_has_ended(
    ended(Outcome::Cancelled, ""),
    seen(WorkerState::Silent, nothing()),
    None,
    ""
)]
fn what_is_to_be_looked_at_has_no_estimate(
    #[case] job: JobView,
    #[case] overview: Overview,
    #[case] concern: Option<Concern>,
    #[case] expected: &str,
) {
    let overview = Overview {
        rows: with_runs(2, nothing()).rows,
        ..overview
    };
    let mut jobs = [job];
    overview.explain(&mut jobs, minute(NOW));
    assert_eq!(jobs[0].concern, concern);
    assert_eq!(jobs[0].expectation().unwrap_or_default(), expected);
}

#[rstest]
#[case::runs(running(), "no estimate: after 5 successful runs; so far 1")]
#[case::waits(placed(1), "no estimate: after 5 successful runs; so far 1")]
#[case::has_steps(
    in_step(1, running()),
    "no estimate: after 5 successful runs; so far 2"
)]
#[case::has_one_left(
    in_step(2, running()),
    "no estimate: after 5 successful runs; so far 3"
)]
#[case::has_ended(ended(Outcome::Succeeded, ""), "")]
#[case::nobody_knows(change(running(), |job| job.workflow = Some("x".to_owned())), "")]
fn without_an_estimate_it_is_told_why(#[case] job: JobView, #[case] expected: &str) {
    let rows = WorkflowRows {
        count: 1,
        step_counts: BTreeMap::from([(1, 2), (2, 3)]),
        ..WorkflowRows::default()
    };
    let overview = Overview {
        rows: BTreeMap::from([("simulator".to_owned(), rows)]),
        ..nothing()
    };
    let mut jobs = [job];
    overview.explain(&mut jobs, minute(NOW));
    assert_eq!(jobs[0].expectation().unwrap_or_default(), expected);
}

#[test]
fn it_says_what_it_is_drawn_from() {
    let overview = at_turn(after(&["bob"], seats(1)));
    assert_eq!(
        why(&held(), &overview, minute(NOW)).evidence,
        [
            "held at simulator since 03:00",
            "its owner is anna",
            "simulator: 3 held, 0 waiting in RabbitMQ, 1 running",
            "handed over: 1234abcd-0000-0000-0000-000000000000",
            "before it: 00000064-0000-0000-0000-000000000000"
        ]
    );
    let overview = at_turn(after(&["bob"; 5], seats(1)));
    let told = why(&held(), &overview, minute(NOW));
    assert_eq!(
        told.evidence.last().unwrap(),
        "before it: 00000064-0000-0000-0000-000000000000, 00000065-0000-0000-0000-000000000000, \
         00000066-0000-0000-0000-000000000000 and 2 more"
    );
    assert_eq!(
        why(&between(5), &nothing(), minute(NOW)).evidence,
        ["step 1, Simulate, failed: no solution"]
    );
    let failed = ended(Outcome::Failed, "no solution.");
    assert_eq!(
        why(&failed, &nothing(), minute(NOW)).evidence,
        [
            "ended at 2024-10-04T03:20:00Z",
            "ran for 8 min",
            "no solution"
        ]
    );
}

/// A page shows them in the reader's own time.
#[test]
fn its_times_are_known_where_they_stand() {
    let overview = in_outage(with_workers(1));
    let why = why(&placed(1), &overview, minute(NOW));
    assert_eq!(
        why.sentence,
        "Waits: RabbitMQ does not answer (since 03:20)."
    );
    let told = |text: &str, moments: &[Moment]| {
        let told = moments.iter();
        let told = told.map(|one| (text[one.place.clone()].to_owned(), one.at));
        told.collect::<Vec<_>>()
    };
    assert_eq!(
        told(&why.sentence, why.moments()),
        [("03:20".to_owned(), minute(200))]
    );
    let facts: Vec<_> = why.facts().map(|(fact, at)| told(fact, at)).collect();
    assert_eq!(why.evidence[0], "in the queue simulator since 03:00");
    assert_eq!(facts, [vec![("03:00".to_owned(), minute(180))], Vec::new()]);
}

#[test]
fn a_foreign_text_cannot_pass_for_another() {
    let job = ended(Outcome::Failed, "a\u{202e}b\u{1b}[0m\nc");
    let why = why(&job, &nothing(), minute(NOW));
    assert_eq!(why.sentence, "Failed: a\\u{202e}b\\u{1b}[0m\\nc.");
}

proptest! {
    #[test]
    fn a_sentence_is_short_and_harmless(text in "\\PC{0,400}|.{0,400}", kind in 0..4) {
        let job = match kind {
            0 => ended(Outcome::Failed, &text),
            1 => ended_in_step(2, &text, Outcome::Failed),
            2 => change(held(), |job| job.turn.as_mut().unwrap().queue = text.clone()),
            _ => change(waiting(), |job| job.workflow = Some(text.clone())),
        };
        let why = why(&job, &nothing(), minute(NOW));
        for said in why.evidence.iter().chain([&why.sentence]) {
            prop_assert!(said.chars().count() <= 201);
            prop_assert_eq!(&harmless(said), said);
        }
    }
}
