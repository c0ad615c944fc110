//! What a sentence says of a task that waits for its turn: what keeps it, and which jobs are before it.

use jiff::Timestamp;
use uuid::Uuid;

use super::{clock, name};
use crate::domain::overview::{QueueView, TOLD};
use crate::domain::turns::QueueLimit;

/// How many of the jobs that go first are named.
const FIRSTS: usize = 3;

/// What keeps a queue from handing over more.
pub(super) fn obstacle(view: &QueueView, shown: &str, now: Timestamp) -> String {
    let QueueLimit {
        window,
        max_running,
        is_paused,
    } = view.limit;
    let is_full = |limit: Option<u32>, used: i64| limit.filter(|most| used >= i64::from(*most));
    if is_paused {
        return match (view.paused_by(), view.is_paused_by_operator) {
            (Some(pause), _) => {
                let (who, since) = (name(&pause.by.name()), clock(pause.at, now));
                format!("`{shown}` is paused by {who} since {since}")
            }
            (None, true) => format!("`{shown}` is paused by an operator"),
            (None, false) => format!("`{shown}` is paused by its definition"),
        };
    }
    if let Some(most) = is_full(max_running, view.waiting.saturating_add(view.running)) {
        return format!(
            "`max_running` {most} of `{shown}` is used{}",
            by(&view.seats, view.waiting.saturating_add(view.running))
        );
    }
    match is_full(window, view.waiting) {
        Some(most) => format!("`window` {most} of `{shown}` is full"),
        None => format!("waits for its turn at `{shown}`"),
    }
}

fn short(id: &Uuid) -> String {
    id.to_string()[..8].to_owned()
}

/// ` by job 1234abcd`, or by several of so many.
fn by(seats: &[Uuid], used: i64) -> String {
    let Some((first, further)) = seats.split_first() else {
        return String::new();
    };
    let mut ids = short(first);
    for id in further {
        ids = ids + ", " + &short(id);
    }
    match (seats.len(), usize::try_from(used).unwrap_or_default()) {
        (1, ..=1) => format!(" by job {ids}"),
        (named, used) if named >= used => format!(" by jobs {ids}"),
        _ => format!(" by jobs {ids} and others"),
    }
}

/// The jobs that are named, in full.
pub(super) fn seats(seats: &[Uuid]) -> Option<String> {
    let ids: Vec<_> = seats.iter().map(Uuid::to_string).collect();
    (!ids.is_empty()).then(|| format!("handed over: {}", ids.join(", ")))
}

/// The jobs that are handed over before it, with their owners, and whether these are all; None if that is not
/// known.
fn before(id: Uuid, view: &QueueView) -> Option<(&[(Uuid, String)], bool)> {
    match view.order.iter().position(|(other, _)| *other == id) {
        Some(place) => Some((&view.order[..place], true)),
        // One that is not told of may also have come after all that are.
        None => (view.order.len() >= TOLD).then_some((&view.order, false)),
    }
}

/// How many others are handed over before it and, with `is_named`, which come first of those.
pub(super) fn before_it(id: Uuid, owner: &str, view: &QueueView, is_named: bool) -> Option<String> {
    let (jobs, are_all) = before(id, view)?;
    let ids = match is_named && !jobs.is_empty() {
        true => format!(" ({})", listed(jobs, are_all, short)),
        false => String::new(),
    };
    if !are_all {
        return Some(format!("more than {TOLD} jobs go first{ids}"));
    }
    let others = jobs.iter().filter(|(_, other)| other != owner).count();
    Some(match (jobs.len(), others) {
        (0, _) => "it is the next".to_owned(),
        (1, 0) => format!("1 job goes first{ids}"),
        (1, _) => format!("1 job of another owner goes first{ids}"),
        (all, 0) => format!("{all} jobs go first{ids}"),
        (all, others) if all == others => format!("{all} jobs of other owners go first{ids}"),
        (all, others) => format!("{all} jobs go first{ids}, {others} of them of other owners"),
    })
}

/// Those that come first of the jobs before it, in full.
pub(super) fn firsts(id: Uuid, view: &QueueView) -> Option<String> {
    let (jobs, are_all) = before(id, view)?;
    let ids = listed(jobs, are_all, Uuid::to_string);
    (!jobs.is_empty()).then(|| format!("before it: {ids}"))
}

/// `1234abcd, 5678abcd, 9012abcd and 2 more`.
fn listed(jobs: &[(Uuid, String)], are_all: bool, text: impl Fn(&Uuid) -> String) -> String {
    let ids: Vec<_> = jobs.iter().take(FIRSTS).map(|(id, _)| text(id)).collect();
    let more = match (jobs.len() - ids.len(), are_all) {
        (_, false) => " and others".to_owned(),
        (0, true) => String::new(),
        (more, true) => format!(" and {more} more"),
    };
    ids.join(", ") + &more
}
