//! What operators see of turns.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use postgres::Row;
use uuid::Uuid;

use super::change::acts;
use crate::domain::overview::{QueueView, SEATS, TOLD, TurnView};
use crate::domain::turns::{self, Limits};
use crate::store::acts::hold;
use crate::store::{Connection, StoreError};

impl Connection {
    /// The queues with limits, and those at which tasks wait for their turn.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn turns(
        &mut self,
        limits: &Limits,
        aging: Duration,
    ) -> Result<Vec<QueueView>, StoreError> {
        let statement = concat!(
            "WITH granted AS (
                 SELECT queue, job_id, held_at, granted_at, ",
            is_started!(),
            " AS started
                 FROM job_turn AS turn
                 WHERE granted_at IS NOT NULL
                   AND (SELECT true FROM job_history AS ended
                        WHERE ended.job_id = turn.job_id) IS NOT TRUE
             ), held AS (
                 SELECT queue, count(*) FILTER (WHERE NOT on_hold) AS held,
                        count(*) FILTER (WHERE on_hold) AS on_hold,
                        min(held_at) FILTER (WHERE NOT on_hold) AS oldest_held
                 FROM job_turn WHERE granted_at IS NULL GROUP BY queue
             ), handed_over AS (
                 SELECT queue, count(*) FILTER (WHERE NOT started) AS waiting,
                        count(*) FILTER (WHERE started) AS running,
                        min(held_at) FILTER (WHERE NOT started) AS oldest_handed_over,
                        (array_agg(job_id ORDER BY granted_at, job_id)
                             FILTER (WHERE started IS NOT NULL))[1:$2] AS seats
                 FROM granted GROUP BY queue
             )
             SELECT queue, coalesce(held, 0) AS held, coalesce(on_hold, 0) AS on_hold,
                    coalesce(waiting, 0) AS waiting, coalesce(running, 0) AS running,
                    coalesce(seats, '{}') AS seats,
                    least(oldest_held, oldest_handed_over) AS oldest_waiting,
                    coalesce(paused, false) AS is_operators, acts, changed_at
             FROM (unnest($1::varchar[]) AS limited (queue)
                   FULL JOIN held USING (queue) FULL JOIN handed_over USING (queue)) AS shown
                  LEFT JOIN queue_limit USING (queue)
             ORDER BY queue"
        );
        let limited: Vec<_> = limits.keys().collect();
        let rows = self.client.query(statement, &[&limited, &SEATS])?;
        let mut queues = Vec::with_capacity(rows.len());
        for row in &rows {
            let name: String = row.try_get("queue")?;
            queues.push(QueueView {
                limit: limits.get(&name).copied().unwrap_or_default(),
                held: row.try_get("held")?,
                on_hold: row.try_get("on_hold")?,
                waiting: row.try_get("waiting")?,
                running: row.try_get("running")?,
                oldest_waiting: row.try_get("oldest_waiting")?,
                seats: row.try_get("seats")?,
                is_paused_by_operator: row.try_get("is_operators")?,
                acts: acts(row)?,
                order: Vec::new(),
                name,
            });
        }
        for queue in queues.iter_mut().filter(|queue| queue.held > 0) {
            queue.order = self.order(&queue.name, aging)?;
        }
        Ok(queues)
    }

    /// The jobs that are next at a queue, if there were room for all of them.
    fn order(&mut self, queue: &str, aging: Duration) -> Result<Vec<(Uuid, String)>, StoreError> {
        let mut transaction = self.transaction()?;
        let waiting = transaction.waiting(queue, TOLD)?;
        let handed_over = transaction.handed_over(queue)?;
        let now = Timestamp::now();
        let owners = waiting.held.iter();
        let mut owners: HashMap<_, _> = owners
            .map(|held| (held.job_id, held.owner.clone()))
            .collect();
        let order = turns::next(waiting, &handed_over, TOLD, aging, now);
        let with_owner = |id| (id, owners.remove(&id).unwrap_or_default());
        Ok(order.into_iter().map(with_owner).collect())
    }
}

/// The turn that a job waits for, in a row of jobs that have not ended.
pub(in crate::store) fn view(row: &Row) -> anyhow::Result<Option<TurnView>> {
    let Some(queue) = row.try_get("turn_queue")? else {
        return Ok(None);
    };
    if granted_at(row)?.is_some() {
        return Ok(None);
    }
    Ok(Some(TurnView {
        queue,
        owner: row.try_get("turn_owner")?,
        since: row.try_get("held_at")?,
        on_hold: row.try_get("on_hold")?,
        hold: hold(row)?,
    }))
}

/// When it was granted its turn, if it is one of those that have to wait for that.
pub(in crate::store) fn granted_at(row: &Row) -> anyhow::Result<Option<Timestamp>> {
    let queue: Option<&str> = row.try_get("turn_queue")?;
    Ok(match queue {
        Some(_) => row.try_get("granted_at")?,
        None => None,
    })
}
