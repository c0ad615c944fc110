//! What operators change of turns, with who did it.

use jiff::Timestamp;
use postgres::Row;
use serde_json::json;
use uuid::Uuid;

use crate::domain::acts::{Deed, Done, QueueActs};
use crate::domain::job::{Origin, Priority};
use crate::store::rows::named;
use crate::store::{Connection, StoreError, Transaction};

/// What an operator changes at a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitChange {
    Window(QueueChange),
    MaxRunning(QueueChange),
    Paused(bool),
}

/// Another limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueChange {
    /// As the definition file has it.
    AsDefined,
    Unlimited,
    To(u32),
}

/// What an operator changes of a task that waits for its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TurnChange {
    Hold,
    Release,
    First,
    Priority(Priority),
}

impl QueueChange {
    /// As the database has it.
    fn column(self) -> Option<i32> {
        match self {
            QueueChange::AsDefined => None,
            QueueChange::Unlimited => Some(0),
            QueueChange::To(limit) => Some(i32::try_from(limit).unwrap_or(i32::MAX)),
        }
    }
}

impl Connection {
    /// Sets what somebody allows at a queue, and tells the replicas.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn change_limits(
        &mut self,
        queue: &str,
        changes: &[LimitChange],
        by: &Origin,
    ) -> Result<(), StoreError> {
        let mut transaction = self.transaction()?;
        let mut acts = transaction.acts_at(queue)?;
        let rows = transaction.query(
            "INSERT INTO queue_limit (queue, changed_at) VALUES ($1, clock_timestamp())
             ON CONFLICT (queue) DO UPDATE SET changed_at = excluded.changed_at
             RETURNING changed_at",
            &[&queue],
        )?;
        let at = rows.first().map(|row| row.try_get(0)).transpose()?;
        let done = at.map(|at| Done { at, by: by.clone() });
        for change in changes {
            match change {
                LimitChange::Window(_) | LimitChange::MaxRunning(_) => {
                    acts.limited.clone_from(&done)
                }
                LimitChange::Paused(_) => acts.paused.clone_from(&done),
            }
            match change {
                LimitChange::Window(limit) => transaction.execute(
                    "UPDATE queue_limit SET max_waiting = $2 WHERE queue = $1",
                    &[&queue, &limit.column()],
                )?,
                LimitChange::MaxRunning(limit) => transaction.execute(
                    "UPDATE queue_limit SET max_running = $2 WHERE queue = $1",
                    &[&queue, &limit.column()],
                )?,
                LimitChange::Paused(paused) => transaction.execute(
                    "UPDATE queue_limit SET paused = $2 WHERE queue = $1",
                    &[&queue, paused],
                )?,
            };
        }
        transaction.execute(
            "UPDATE queue_limit SET acts = $2 WHERE queue = $1",
            &[&queue, &json!(acts).to_string()],
        )?;
        transaction.notify()?;
        transaction.commit()
    }

    /// Changes what waits for its turn among these jobs, and tells the replicas. Returns those that
    /// it has changed.
    ///
    /// # Errors
    /// The connection is lost, or somebody holds a job's lock for too long.
    pub fn change_turns(
        &mut self,
        job_ids: &[Uuid],
        change: TurnChange,
        by: &Origin,
    ) -> Result<Vec<Uuid>, StoreError> {
        let mut transaction = self.transaction()?;
        // Not while a handler is at it, which writes the job's row as it has read it.
        transaction.lock(job_ids)?;
        let rows = match change {
            TurnChange::Hold | TurnChange::Release => transaction.query(
                "UPDATE job_turn AS turn SET on_hold = $2 FROM job_turn AS before
                 WHERE turn.job_id = ANY($1) AND turn.granted_at IS NULL
                   AND before.job_id = turn.job_id
                 RETURNING turn.job_id, before.on_hold <> $2 AS is_new, NULL AS was",
                &[&job_ids, &(change == TurnChange::Hold)],
            )?,
            TurnChange::First => transaction.query(
                "UPDATE job_turn SET moved_at = clock_timestamp()
                 WHERE job_id = ANY($1) AND granted_at IS NULL
                 RETURNING job_id, true AS is_new, NULL AS was",
                &[&job_ids],
            )?,
            TurnChange::Priority(priority) => transaction.query(
                "WITH changed AS (
                     UPDATE job_turn SET priority = $2
                     WHERE job_id = ANY($1) AND granted_at IS NULL RETURNING job_id
                 ), before AS MATERIALIZED (
                     SELECT job_id, priority AS was FROM job WHERE job_id = ANY($1)
                 ), jobs AS (
                     UPDATE job SET priority = $2 FROM changed WHERE job.job_id = changed.job_id
                 )
                 SELECT job_id, was IS DISTINCT FROM $2 AS is_new, was
                 FROM changed JOIN before USING (job_id)",
                &[&job_ids, &priority.name()],
            )?,
        };
        let acts = rows.iter().map(|row| act(row, change));
        let acts: anyhow::Result<Vec<_>> = acts.collect();
        let acts: Vec<_> = acts
            .map_err(StoreError::Transient)?
            .into_iter()
            .flatten()
            .collect();
        transaction.note_acts(&acts, by)?;
        transaction.notify()?;
        transaction.commit()?;
        rows.iter().map(|row| Ok(row.try_get("job_id")?)).collect()
    }

    /// Lets everything go that waits for its turn, whatever is allowed, and returns how much there
    /// was. The replicas hand it over.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn release_all(&mut self, by: &Origin) -> Result<usize, StoreError> {
        let mut transaction = self.transaction()?;
        let rows = transaction.query(
            "UPDATE job_turn SET released = true, on_hold = false WHERE granted_at IS NULL
             RETURNING job_id",
            &[],
        )?;
        let acts = rows.iter().map(|row| Ok((row.try_get(0)?, Deed::LetGo)));
        let acts = acts.collect::<Result<Vec<_>, postgres::Error>>()?;
        transaction.note_acts(&acts, by)?;
        transaction.notify()?;
        transaction.commit()?;
        Ok(rows.len())
    }
}

/// A job whose turn has changed, unless it was so before.
fn act(row: &Row, change: TurnChange) -> anyhow::Result<Option<(Uuid, Deed)>> {
    let was: Option<&str> = row.try_get("was")?;
    let was = was.map(|name| named(Priority::ALL, Priority::name, name));
    let deed = match change {
        TurnChange::Hold => Deed::Held,
        TurnChange::Release => Deed::Released,
        TurnChange::First => Deed::MovedFirst,
        TurnChange::Priority(priority) => Deed::Prioritised {
            was: was.transpose()?,
            priority,
        },
    };
    let is_new: bool = row.try_get("is_new")?;
    Ok(is_new.then_some((row.try_get("job_id")?, deed)))
}

/// What is known of who has changed a queue, in its row.
pub(super) fn acts(row: &Row) -> Result<QueueActs, StoreError> {
    let text: Option<&str> = row.try_get("acts")?;
    let acts = text.and_then(|text| serde_json::from_str::<QueueActs>(text).ok());
    let changed_at: Option<Timestamp> = row.try_get("changed_at")?;
    let known = acts.zip(changed_at);
    Ok(known.map_or_else(QueueActs::default, |(acts, at)| acts.as_of(at)))
}

impl Transaction<'_> {
    fn acts_at(&mut self, queue: &str) -> Result<QueueActs, StoreError> {
        let rows = self.query(
            "SELECT acts, changed_at FROM queue_limit WHERE queue = $1 FOR UPDATE",
            &[&queue],
        )?;
        rows.first().map_or(Ok(QueueActs::default()), acts)
    }
}
