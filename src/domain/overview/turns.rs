//! What operators see of turns: queues with limits, and what waits there.

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use crate::domain::acts::{Done, QueueActs};
use crate::domain::turns::QueueLimit;

/// Of how many tasks that wait for their turn the order is told.
pub const TOLD: usize = 200;

/// How many of the jobs that have the seats of a queue are named.
pub const SEATS: i32 = 3;

/// A queue with limits, or at which tasks wait for their turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct QueueView {
    pub name: String,
    #[serde(flatten)]
    pub limit: QueueLimit,
    /// Tasks that wait for their turn.
    pub held: i64,
    /// Those that operators do not let go.
    pub on_hold: i64,
    /// Tasks that are handed over and not started, as far as turns are counted here.
    pub waiting: i64,
    /// Those that have been started and have not ended.
    pub running: i64,
    /// Since when the one waits that has waited longest to be started, unless somebody does not let it go.
    pub oldest_waiting: Option<Timestamp>,
    /// The jobs that are next with their owners, in their order, at most [`TOLD`].
    #[serde(skip)]
    pub order: Vec<(Uuid, String)>,
    /// The jobs whose tasks are handed over, at most [`SEATS`].
    pub seats: Vec<Uuid>,
    /// Whether it is a command, and not the definition file, that pauses it.
    #[serde(skip)]
    pub is_paused_by_operator: bool,
    /// Who has changed that by a command, as far as is known.
    pub acts: QueueActs,
}

/// A job's turn, as long as it waits for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TurnView {
    pub queue: String,
    /// Whose it is; empty if nobody says.
    pub owner: String,
    pub since: Timestamp,
    /// Whether an operator does not let it go.
    pub on_hold: bool,
    /// Who, if that is known.
    pub hold: Option<Done>,
}

impl TurnView {
    pub fn text(&self) -> &'static str {
        match self.on_hold {
            true => "on hold",
            false => "held",
        }
    }

    /// How many of its queue go before it, with it.
    pub(super) fn place(&self, job_id: Uuid, queues: &[QueueView]) -> Option<i64> {
        let queue = queues.iter().find(|queue| queue.name == self.queue)?;
        let mut places = queue.own_places();
        places.find_map(|(id, place)| (id == job_id).then_some(place))
    }
}

impl QueueView {
    /// Who pauses it.
    pub fn paused_by(&self) -> Option<&Done> {
        let is_operators = self.limit.is_paused && self.is_paused_by_operator;
        self.acts.paused.as_ref().filter(|_| is_operators)
    }

    /// Who has changed what is allowed there, each in one line that may be shown as it is.
    pub fn changes(&self) -> Vec<String> {
        let QueueActs { paused, limited } = &self.acts;
        let paused = paused
            .as_ref()
            .map(|Done { at, by }| match self.paused_by() {
                Some(_) => format!("paused by {by}, since {at:.0}"),
                None => format!("resumed by {by}, at {at:.0}"),
            });
        let limited = limited.as_ref();
        let limited = limited.map(|Done { at, by }| format!("limited by {by}, at {at:.0}"));
        paused.into_iter().chain(limited).collect()
    }

    /// The jobs that are next at these queues, each with how many of its queue go before it, with it: the
    /// order in which lists have them.
    pub fn places(queues: &[QueueView]) -> impl Iterator<Item = (Uuid, i64)> {
        queues.iter().flat_map(QueueView::own_places)
    }

    fn own_places(&self) -> impl Iterator<Item = (Uuid, i64)> {
        let places = self.waiting.saturating_add(1)..;
        self.order.iter().map(|(id, _)| *id).zip(places)
    }

    /// How many of `workers` may work at once.
    pub(super) fn workers(&self, workers: usize) -> usize {
        match self.limit {
            QueueLimit {
                is_paused: true, ..
            } => 0,
            QueueLimit {
                max_running: Some(seats),
                ..
            } => workers.min(usize::try_from(seats).unwrap_or(usize::MAX)),
            QueueLimit {
                max_running: None, ..
            } => workers,
        }
    }
}
