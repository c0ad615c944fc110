//! Who is next: which of the tasks that wait for their turn at a queue are handed to RabbitMQ.
//!
//! A queue without limits needs none of this. At one with limits a job's task is *held* in the
//! database; when there is room, it is *granted* its turn, and from then until it has ended it
//! counts as handed over. [`next()`] decides, from what the database has; whoever asks holds the
//! queue's lock, so that there is one decision at a time among all replicas.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::job::Priority;

/// Characters of an owner that are kept and compared.
pub const MAX_OWNER: usize = 255;

/// How many are granted their turn at once; the others follow.
pub const MAX_GRANTS: usize = 200;

/// The owner of jobs whose submissions do not say whose they are.
pub const NO_OWNER: &str = "";

/// What an operator allows at a task queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct QueueLimit {
    /// How many tasks may be handed over and not started.
    pub window: Option<u32>,
    /// How many tasks may be handed over and not ended: the seats of a licence.
    pub max_running: Option<u32>,
    /// Nothing is handed over.
    #[serde(rename = "paused")]
    pub is_paused: bool,
}

impl QueueLimit {
    /// Whether tasks have to wait for their turn.
    pub fn holds(self) -> bool {
        self != QueueLimit::default()
    }

    /// How many more tasks may be handed over.
    pub fn room(self, handed_over: &HandedOver) -> usize {
        let left = |limit: Option<u32>, used: usize| match limit {
            Some(limit) => usize::try_from(limit)
                .unwrap_or(usize::MAX)
                .saturating_sub(used),
            None => usize::MAX,
        };
        match self.is_paused {
            true => 0,
            false => left(self.window, handed_over.waiting)
                .min(left(self.max_running, handed_over.all())),
        }
    }
}

/// What is allowed at each queue with limits, by its name.
pub type Limits = BTreeMap<String, QueueLimit>;

/// For the log: `simulator at most 2 running; optimizer paused`.
pub fn in_words(limits: &Limits) -> String {
    let words = limits
        .iter()
        .map(|(queue, limit)| format!("{queue} {limit}"));
    match limits.is_empty() {
        true => "none".to_owned(),
        false => words.collect::<Vec<_>>().join("; "),
    }
}

impl fmt::Display for QueueLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let QueueLimit {
            window,
            max_running,
            is_paused,
        } = self;
        let limits = [
            is_paused.then(|| "paused".to_owned()),
            window.map(|limit| format!("at most {limit} waiting in RabbitMQ")),
            max_running.map(|limit| format!("at most {limit} running")),
        ];
        let limits: Vec<_> = limits.into_iter().flatten().collect();
        match limits.is_empty() {
            true => write!(f, "unlimited"),
            false => write!(f, "{}", limits.join(", ")),
        }
    }
}

/// The limits in force, which change when operators or the definition file change them.
#[derive(Debug, Default)]
pub struct CurrentLimits(RwLock<Arc<Limits>>);

impl CurrentLimits {
    pub fn get(&self) -> Arc<Limits> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn replace(&self, limits: Limits) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(limits);
    }
}

/// The tasks of a queue that are handed over and have not ended.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HandedOver {
    /// How many of them no worker has started.
    pub waiting: usize,
    /// How many there are, by owner.
    pub by_owner: HashMap<String, usize>,
}

impl HandedOver {
    pub fn all(&self) -> usize {
        self.by_owner.values().sum()
    }
}

/// A task that waits for its turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    pub job_id: Uuid,
    pub owner: String,
    pub priority: Priority,
    pub since: Timestamp,
    /// When an operator has put it first.
    pub moved_at: Option<Timestamp>,
}

/// Of what is held at a queue, as much as [`next()`] needs: of each owner and priority those that
/// have waited longest, as many as there is room for, and those that were put first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Waiting {
    pub held: Vec<Held>,
    /// When each of their owners last had a turn at this queue.
    pub served: HashMap<String, Timestamp>,
}

/// Which tasks are next, in this order, at most `room`.
///
/// First what an operator has put first, the last such move before the others. Then the highest
/// priority, which rises by one level with each `aging` that a task has waited, up to the highest;
/// never if that is zero. Within a priority the owner with the fewest tasks handed over, then the one who was served
/// longest ago (or, never served, waits since longest ago), then the task that has waited longest.
pub fn next(
    waiting: Waiting,
    handed_over: &HandedOver,
    room: usize,
    aging: Duration,
    now: Timestamp,
) -> Vec<Uuid> {
    let Waiting { held, served } = waiting;
    let (mut first, others): (Vec<_>, Vec<_>) =
        held.into_iter().partition(|held| held.moved_at.is_some());
    first.sort_by_key(|held| (Reverse(held.moved_at), held.job_id));
    let mut owners = Owners::new(&others, &served, handed_over);
    let mut granted = Vec::new();
    for held in first.into_iter().take(room) {
        owners.serve(&held.owner, now);
        granted.push(held.job_id);
    }
    let mut lines = lines(others);
    while granted.len() < room {
        let heads = lines
            .iter()
            .filter_map(|(place, line)| Some((place, line.front()?)));
        let best = heads.min_by_key(|(_, head)| {
            let owner = owners.get(&head.owner);
            let level = level(head, aging, now);
            (
                Reverse(level),
                owner.tasks,
                owner.stamp,
                head.since,
                head.job_id,
            )
        });
        let Some(place) = best.map(|(place, _)| place.clone()) else {
            break;
        };
        let Some(held) = lines.get_mut(&place).and_then(VecDeque::pop_front) else {
            break;
        };
        owners.serve(&held.owner, now);
        granted.push(held.job_id);
    }
    granted
}

/// The tasks of each owner and priority, those that have waited longest first: of these only the
/// first can be next.
fn lines(held: Vec<Held>) -> BTreeMap<(String, u8), VecDeque<Held>> {
    let mut lines: BTreeMap<_, Vec<Held>> = BTreeMap::new();
    for held in held {
        let place = (held.owner.clone(), held.priority.level());
        lines.entry(place).or_default().push(held);
    }
    lines
        .into_iter()
        .map(|(place, mut line)| {
            line.sort_by_key(|held| (held.since, held.job_id));
            (place, VecDeque::from(line))
        })
        .collect()
}

/// A task's priority by now.
fn level(held: &Held, aging: Duration, now: Timestamp) -> u8 {
    let waited = now.duration_since(held.since).as_millis();
    let aging = i128::try_from(aging.as_millis()).unwrap_or(i128::MAX);
    let risen = if aging == 0 {
        0
    } else {
        (waited / aging).max(0)
    };
    let risen = u8::try_from(risen).unwrap_or(u8::MAX);
    let highest = Priority::High.level();
    held.priority.level().saturating_add(risen).min(highest)
}

/// What has been done for an owner.
#[derive(Debug, Clone, Copy)]
struct Service {
    /// How many tasks are handed over.
    tasks: usize,
    /// When the last one was, and the how-manieth of this decision; else since when the owner
    /// waits.
    stamp: (Timestamp, usize),
}

struct Owners {
    owners: HashMap<String, Service>,
    turns: usize,
}

impl Owners {
    fn new(held: &[Held], served: &HashMap<String, Timestamp>, handed_over: &HandedOver) -> Owners {
        let mut owners: HashMap<String, Service> = HashMap::new();
        for held in held {
            let owner = owners.entry(held.owner.clone()).or_insert_with(|| Service {
                tasks: handed_over.by_owner.get(&held.owner).copied().unwrap_or(0),
                stamp: (
                    served.get(&held.owner).copied().unwrap_or(Timestamp::MAX),
                    0,
                ),
            });
            if !served.contains_key(&held.owner) {
                owner.stamp = owner.stamp.min((held.since, 0));
            }
        }
        Owners { owners, turns: 0 }
    }

    fn get(&self, owner: &str) -> Service {
        self.owners.get(owner).copied().unwrap_or(Service {
            tasks: 0,
            stamp: (Timestamp::MIN, 0),
        })
    }

    fn serve(&mut self, owner: &str, now: Timestamp) {
        self.turns += 1;
        let turns = self.turns;
        if let Some(owner) = self.owners.get_mut(owner) {
            owner.tasks += 1;
            owner.stamp = (now, turns);
        }
    }
}

/// Whose job it is: its sender's, where its message says who that is; else its reference says it,
/// up to the first `separator`. Jobs that say nothing of it have one owner in common.
pub fn owner(sender: Option<&str>, reference: Option<&str>, separator: &str) -> String {
    let named = |text: Option<&str>| {
        text.filter(|text| !text.trim().is_empty())
            .map(str::to_owned)
    };
    let of_reference = || {
        let reference = reference.filter(|_| !separator.is_empty())?;
        named(Some(reference.split_once(separator)?.0))
    };
    let owner = named(sender).or_else(of_reference);
    let owner = owner.unwrap_or_else(|| NO_OWNER.to_owned());
    // Postgres takes no NUL.
    let storable = owner.chars().filter(|character| *character != '\0');
    storable.take(MAX_OWNER).collect()
}

#[cfg(test)]
mod tests;
