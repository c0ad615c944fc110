//! Tasks that wait for their turn, and what operators allow at task queues.

use std::time::Duration;

use jiff::Timestamp;
use postgres::Row;
use postgres::fallible_iterator::FallibleIterator;
use uuid::Uuid;

use super::rows::named;
use super::{Connection, StoreError, Transaction};
use crate::domain::job::{Grant, Job, Priority, Turn};
use crate::domain::turns::{HandedOver, Held, Limits, QueueLimit, Waiting};

pub use self::change::{LimitChange, QueueChange, TurnChange};
pub(super) use self::view::{granted_at, view};

/// Tells all replicas that something has changed that they decide turns by.
const CHANNEL: &str = "omotes_turns";

/// Owners at a queue that are looked at in one decision, beside those whose tasks have waited
/// longest.
const MAX_OWNERS: i64 = 1000;

/// Whether a worker has started the task that a row `turn` of `job_turn` is about; NULL when its job is
/// gone.
macro_rules! is_started {
    () => {
        "(
    SELECT coalesce(
        (SELECT started_at IS NOT NULL FROM job_step AS step
         WHERE step.job_id = turn.job_id AND finished_at IS NULL),
        status = 'RUNNING')
    FROM job WHERE job.job_id = turn.job_id
)"
    };
}

mod change;
mod view;

/// What changes of jobs' turns.
#[derive(Default)]
pub(super) struct TurnChanges<'a> {
    begun: Vec<(Uuid, &'a Job, &'a Turn)>,
    ended: Vec<Uuid>,
}

impl<'a> TurnChanges<'a> {
    pub(super) fn is_empty(&self) -> bool {
        self.begun.is_empty() && self.ended.is_empty()
    }

    pub(super) fn add(&mut self, job_id: Uuid, before: Option<&Turn>, after: &'a Job) {
        let turn = after
            .course
            .as_ref()
            .and_then(|course| course.turn.as_ref());
        match (before, turn) {
            (None, None) => {}
            // It is granted elsewhere.
            (Some(before), Some(after)) if before.since == after.since => {}
            (_, Some(turn)) => self.begun.push((job_id, after, turn)),
            (Some(_), None) => self.ended.push(job_id),
        }
    }
}

impl Transaction<'_> {
    pub(super) fn write_turns(&mut self, changes: &TurnChanges<'_>) -> Result<(), StoreError> {
        let TurnChanges { begun, ended } = changes;
        if !ended.is_empty() {
            self.execute("DELETE FROM job_turn WHERE job_id = ANY($1)", &[ended])?;
        }
        if begun.is_empty() {
            return Ok(());
        }
        let courses = begun.iter().filter_map(|(id, job, turn)| {
            let course = job.course.as_ref()?;
            Some((*id, *job, &**course, *turn))
        });
        let (mut ids, mut queues, mut owners) = (Vec::new(), Vec::new(), Vec::new());
        let (mut priorities, mut times) = (Vec::new(), Vec::new());
        for (id, job, course, turn) in courses {
            ids.push(id);
            queues.push(course.step().task.as_str());
            owners.push(course.owner.as_str());
            priorities.push(job.priority.unwrap_or_default().name());
            times.push(turn.since);
        }
        self.execute(
            "INSERT INTO job_turn (job_id, queue, owner, priority, held_at)
             SELECT * FROM unnest($1::uuid[], $2::varchar[], $3::varchar[], $4::varchar[],
                                  $5::timestamptz[])
             ON CONFLICT (job_id) DO UPDATE
             SET queue = excluded.queue, owner = excluded.owner, priority = excluded.priority,
                 held_at = excluded.held_at, moved_at = NULL, on_hold = false, released = false,
                 granted_at = NULL, taken_at = NULL, celery_id = NULL",
            &[&ids, &queues, &owners, &priorities, &times],
        )?;
        Ok(())
    }

    /// Excludes other decisions about who is next at this queue, of any replica, until this
    /// transaction ends. Returns the database's time.
    ///
    /// # Errors
    /// The wait took longer than the connection's `lock_timeout`, or the connection is lost.
    pub fn lock_queue(&mut self, queue: &str) -> Result<Timestamp, StoreError> {
        let rows = self.query(
            // Nobody holds it for long but who has been stopped, and other queues are not to wait.
            "SELECT set_config('lock_timeout', '1s', true),
                    -- The locks of jobs have one key, and those of replicas another first one.
                    pg_advisory_xact_lock(x'6f6d7475'::integer, hashtext($1))::text,
                    clock_timestamp() AS now",
            &[&queue],
        )?;
        Ok(rows
            .first()
            .map_or(Ok(Timestamp::UNIX_EPOCH), |row| row.try_get("now"))?)
    }

    /// The same, and what is allowed at the queue where the definition file has `defined`; without
    /// waiting: None when somebody decides right now, or when other jobs wait there than this one.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn try_lock_queue(
        &mut self,
        queue: &str,
        newcomer: Uuid,
        defined: QueueLimit,
    ) -> Result<Option<QueueLimit>, StoreError> {
        let rows = self.query(
            "SELECT max_waiting, max_running, paused, queue IS NOT NULL AS is_set
             FROM (SELECT pg_try_advisory_xact_lock(x'6f6d7475'::integer, hashtext($1)) AS mine) AS lock
             LEFT JOIN queue_limit ON queue = $1
             WHERE mine
               AND (SELECT true FROM job_turn
                    WHERE job_turn.queue = $1 AND granted_at IS NULL AND NOT on_hold
                      AND job_id <> $2 LIMIT 1) IS NULL",
            &[&queue, &newcomer],
        )?;
        match rows.first() {
            Some(row) if row.try_get("is_set")? => limit(row, defined).map(Some),
            Some(_) => Ok(Some(defined)),
            None => Ok(None),
        }
    }

    /// What is allowed at a queue where the definition file has this.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn limit(&mut self, queue: &str, defined: QueueLimit) -> Result<QueueLimit, StoreError> {
        let rows = self.query(
            "SELECT max_waiting, max_running, paused FROM queue_limit WHERE queue = $1",
            &[&queue],
        )?;
        rows.first().map_or(Ok(defined), |row| limit(row, defined))
    }

    /// Those of a queue that operators let go whatever is allowed, at most `most`.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn released(&mut self, queue: &str, most: usize) -> Result<Vec<Uuid>, StoreError> {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let rows = self.query(
            "SELECT job_id FROM job_turn
             WHERE queue = $1 AND granted_at IS NULL AND NOT on_hold AND released
               AND (SELECT true FROM job_history AS ended
                    WHERE ended.job_id = job_turn.job_id) IS NOT TRUE
             ORDER BY held_at, job_id LIMIT $2",
            &[&queue, &most],
        )?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    /// The tasks of a queue with limits that are handed over and have not ended.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn handed_over(&mut self, queue: &str) -> Result<HandedOver, StoreError> {
        // Sub-selects, so that the few rows are looked up whatever Postgres believes of the tables.
        let statement = concat!(
            "SELECT owner, count(*) AS tasks, count(*) FILTER (WHERE NOT started) AS waiting
             FROM (
                 SELECT owner, ",
            is_started!(),
            " AS started
                 FROM job_turn AS turn
                 WHERE queue = $1 AND granted_at IS NOT NULL
                   -- One that its task has not ended itself is told to end after its outcome is
                   -- committed.
                   AND (SELECT outcome IN ('SUCCEEDED', 'FAILED')
                               OR ended.finished_at < clock_timestamp() - interval '10 s'
                        FROM job_history AS ended
                        WHERE ended.job_id = turn.job_id) IS NOT TRUE
             ) AS granted
             WHERE started IS NOT NULL
             GROUP BY owner"
        );
        let rows = self.query(statement, &[&queue])?;
        let mut handed_over = HandedOver::default();
        for row in &rows {
            let (tasks, waiting): (i64, i64) = (row.try_get("tasks")?, row.try_get("waiting")?);
            handed_over.waiting += to_usize(waiting);
            handed_over
                .by_owner
                .insert(row.try_get("owner")?, to_usize(tasks));
        }
        Ok(handed_over)
    }

    /// What waits at a queue, as much as is needed to decide which `most` are next.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn waiting(&mut self, queue: &str, most: usize) -> Result<Waiting, StoreError> {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let rows = self.query(
            // Postgres takes `IS NOT TRUE` for every second row and reads on in the index's order; of
            // `IS NULL` it believes that it is rare, and sorts them all. `held_at > '-infinity'` asks
            // for the index that is made for the oldest.
            "WITH RECURSIVE owners AS (
                 (SELECT owner FROM job_turn
                  WHERE queue = $1 AND granted_at IS NULL AND NOT on_hold
                  ORDER BY owner LIMIT 1)
                 UNION ALL
                 SELECT next.owner FROM owners, LATERAL (
                     SELECT owner FROM job_turn
                     WHERE queue = $1 AND granted_at IS NULL AND NOT on_hold
                       AND owner > owners.owner
                     ORDER BY owner LIMIT 1
                 ) AS next
             ), looked_at AS (
                 SELECT owner FROM owners LIMIT $3
             ), levels (priority) AS (VALUES ('LOW'), ('MEDIUM'), ('HIGH'))
             SELECT held.job_id, held.owner, held.priority, held.held_at, held.moved_at,
                    (SELECT served_at FROM turn_owner
                     WHERE turn_owner.queue = $1 AND turn_owner.owner = held.owner) AS served_at
             FROM (
                 SELECT line.* FROM looked_at, levels, LATERAL (
                     SELECT job_id, owner, priority, held_at, moved_at FROM job_turn
                     WHERE queue = $1 AND granted_at IS NULL AND NOT on_hold
                       AND owner = looked_at.owner AND priority = levels.priority
                       AND (SELECT true FROM job_history AS ended
                            WHERE ended.job_id = job_turn.job_id) IS NOT TRUE
                     ORDER BY held_at, job_id LIMIT $2
                 ) AS line
                 UNION
                 SELECT oldest.* FROM levels, LATERAL (
                     SELECT job_id, owner, priority, held_at, moved_at FROM job_turn
                     WHERE queue = $1 AND granted_at IS NULL AND NOT on_hold
                       AND held_at > '-infinity' AND priority = levels.priority
                       AND (SELECT true FROM job_history AS ended
                            WHERE ended.job_id = job_turn.job_id) IS NOT TRUE
                     ORDER BY held_at, job_id LIMIT $2
                 ) AS oldest
                 UNION
                 SELECT * FROM (
                     SELECT job_id, owner, priority, held_at, moved_at FROM job_turn
                     WHERE queue = $1 AND granted_at IS NULL AND NOT on_hold
                       AND moved_at IS NOT NULL
                       AND (SELECT true FROM job_history AS ended
                            WHERE ended.job_id = job_turn.job_id) IS NOT TRUE
                     ORDER BY moved_at DESC LIMIT $2
                 ) AS moved
             ) AS held",
            &[&queue, &most, &MAX_OWNERS],
        )?;
        let mut waiting = Waiting::default();
        for row in &rows {
            let owner: String = row.try_get("owner")?;
            if let Some(served_at) = row.try_get("served_at")? {
                waiting.served.insert(owner.clone(), served_at);
            }
            waiting.held.push(
                held(row, owner).map_err(|error| {
                    StoreError::Refused(format!("a turn at {queue}: {error:#}"))
                })?,
            );
        }
        Ok(waiting)
    }

    /// Grants these jobs their turn, in this order, with an id for each one's task. Returns those
    /// that were still waiting, with the time of the grant.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn grant(
        &mut self,
        queue: &str,
        turns: &[(Uuid, Uuid)],
    ) -> Result<Vec<(Uuid, Timestamp)>, StoreError> {
        let (jobs, tasks): (Vec<_>, Vec<_>) = turns.iter().copied().unzip();
        let rows = self.query(
            "WITH granted AS (
                 UPDATE job_turn SET granted_at = clock_timestamp(), celery_id = new.celery_id
                 FROM unnest($2::uuid[], $3::uuid[]) WITH ORDINALITY
                      AS new (job_id, celery_id, place)
                 WHERE job_turn.job_id = new.job_id AND granted_at IS NULL AND NOT on_hold
                 RETURNING job_turn.job_id, owner, granted_at, place
             ), served AS (
                 INSERT INTO turn_owner (queue, owner, served_at)
                 SELECT $1, owner, clock_timestamp() + max(place) * interval '1 microsecond'
                 FROM granted GROUP BY owner
                 ON CONFLICT (queue, owner) DO UPDATE SET served_at = excluded.served_at
             )
             SELECT job_id, granted_at FROM granted ORDER BY place",
            &[&queue, &jobs, &tasks],
        )?;
        rows.iter()
            .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
            .collect()
    }

    /// Takes on granted tasks that nobody has put on their queue for `time`: whoever had taken them
    /// on no longer does, once this transaction, which holds the jobs' locks, is committed.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn take_on(
        &mut self,
        job_ids: &[Uuid],
        time: Duration,
    ) -> Result<Vec<(Uuid, Timestamp)>, StoreError> {
        let rows = self.query(
            "UPDATE job_turn AS turn SET taken_at = clock_timestamp()
             WHERE job_id = ANY($1)
               AND coalesce(taken_at, granted_at) <= clock_timestamp() - $2 * interval '1 second'
               AND (SELECT submitted_at IS NULL FROM job_step AS step
                    WHERE step.job_id = turn.job_id AND finished_at IS NULL)
             RETURNING job_id, taken_at",
            &[&job_ids, &time.as_secs_f64()],
        )?;
        rows.iter()
            .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
            .collect()
    }
}

/// A granted task that nobody has put on its queue, as far as is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostGrant {
    pub job_id: Uuid,
    pub queue: String,
    /// Whether somebody has taken it on, so that whoever had it first no longer hands it over.
    pub is_taken: bool,
    /// Whether a task of the same queue and priority that was put on it after that has been started:
    /// then this one is not on it.
    pub is_overtaken: bool,
}

impl Connection {
    /// The limits in force: those of the definition file, `defined`, but for what operators have
    /// set.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn queue_limits(&mut self, mut defined: Limits) -> Result<Limits, StoreError> {
        let rows = self.client.query(
            "SELECT queue, max_waiting, max_running, paused FROM queue_limit",
            &[],
        )?;
        for row in &rows {
            let its = defined.entry(row.try_get("queue")?).or_default();
            *its = limit(row, *its)?;
        }
        defined.retain(|_, limit| limit.holds());
        Ok(defined)
    }

    /// The queues at which something waits that may be granted its turn.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn queues_with_held(&mut self) -> Result<Vec<String>, StoreError> {
        let rows = self.client.query(
            "WITH RECURSIVE queues AS (
                 (SELECT queue FROM job_turn WHERE granted_at IS NULL AND NOT on_hold
                  ORDER BY queue LIMIT 1)
                 UNION ALL
                 SELECT next.queue FROM queues, LATERAL (
                     SELECT queue FROM job_turn
                     WHERE granted_at IS NULL AND NOT on_hold AND queue > queues.queue
                     ORDER BY queue LIMIT 1
                 ) AS next
             )
             SELECT queue FROM queues",
            &[],
        )?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    /// Granted tasks that nobody has put on their queue for `time`, as far as is known, at most
    /// `limit`.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn lost_grants(
        &mut self,
        time: Duration,
        limit: i64,
    ) -> Result<Vec<LostGrant>, StoreError> {
        let rows = self.client.query(
            "SELECT job_id, queue, taken_at IS NOT NULL AS is_taken, EXISTS (
                 SELECT FROM job_turn AS later JOIN job_step AS step USING (job_id)
                 WHERE later.queue = turn.queue AND later.granted_at IS NOT NULL
                   AND later.priority = turn.priority
                   AND step.finished_at IS NULL AND step.started_at IS NOT NULL
                   AND step.submitted_at > turn.taken_at
             ) AS is_overtaken
             FROM job_turn AS turn
             WHERE granted_at IS NOT NULL
               AND coalesce(taken_at, granted_at) <= clock_timestamp() - $1 * interval '1 second'
               AND (SELECT submitted_at IS NULL FROM job_step AS step
                    WHERE step.job_id = turn.job_id AND finished_at IS NULL)
               AND (SELECT true FROM job WHERE job.job_id = turn.job_id)
               AND (SELECT true FROM job_history AS ended
                    WHERE ended.job_id = turn.job_id) IS NOT TRUE
             ORDER BY granted_at LIMIT $2",
            &[&time.as_secs_f64(), &limit],
        )?;
        rows.iter()
            .map(|row| {
                Ok(LostGrant {
                    job_id: row.try_get("job_id")?,
                    queue: row.try_get("queue")?,
                    is_taken: row.try_get("is_taken")?,
                    is_overtaken: row.try_get("is_overtaken")?,
                })
            })
            .collect()
    }

    /// Counts what has reached a queue with limits without waiting for its turn: before it had
    /// limits, or from another service. What somebody is working on is left for the next time.
    /// `plain` are the workflows whose one plain task it is, for jobs whose queue is not kept.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn count_in(&mut self, queue: &str, plain: &[&str]) -> Result<u64, StoreError> {
        let mut transaction = self.transaction()?;
        let rows = transaction.query(
            "SELECT job_id FROM (
                 SELECT job_id FROM job
                 WHERE coalesce(task_queue = $1, workflow_type = ANY($2))
                   AND status IN ('SUBMITTED', 'RUNNING')
                   AND NOT EXISTS (SELECT FROM job_input AS input
                                   WHERE input.job_id = job.job_id)
                 UNION ALL
                 SELECT job_id FROM job_step JOIN job USING (job_id)
                 WHERE task = $1 AND job_step.submitted_at IS NOT NULL AND finished_at IS NULL
             ) AS direct
             -- Looked up one by one, for there are few of these and may be many of those.
             WHERE (SELECT true FROM job_turn WHERE job_turn.job_id = direct.job_id) IS NULL
             LIMIT 1000",
            &[&queue, &plain],
        )?;
        let found = rows.iter().map(|row| row.try_get(0));
        let found = found.collect::<Result<Vec<Uuid>, _>>()?;
        if found.is_empty() {
            return Ok(0);
        }
        let found = transaction.try_lock(&found)?;
        // Once more, for it may have gone on before it was locked.
        let counted = transaction.execute(
            "INSERT INTO job_turn (job_id, queue, owner, priority, held_at, granted_at, celery_id)
             SELECT job_id, $1, '', coalesce(priority, 'MEDIUM'), at, at, celery_id::uuid
             FROM (
                 SELECT job_id, priority, submitted_at AS at, celery_id FROM job
                 WHERE job_id = ANY($3) AND coalesce(task_queue = $1, workflow_type = ANY($2))
                   AND status IN ('SUBMITTED', 'RUNNING')
                   AND NOT EXISTS (SELECT FROM job_input AS input
                                   WHERE input.job_id = job.job_id)
                 UNION ALL
                 SELECT job_id, priority, step.submitted_at, step.celery_id
                 FROM job_step AS step JOIN job USING (job_id)
                 WHERE job_id = ANY($3) AND task = $1 AND step.submitted_at IS NOT NULL
                   AND finished_at IS NULL
             ) AS direct
             WHERE at IS NOT NULL AND celery_id ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
               AND NOT EXISTS (SELECT FROM job_history AS ended
                               WHERE ended.job_id = direct.job_id)
             ORDER BY job_id
             ON CONFLICT (job_id) DO NOTHING",
            &[&queue, &plain, &found],
        )?;
        transaction.commit()?;
        Ok(counted)
    }

    /// Receives what [`Connection::heard`] returns; not through a pooler that gives each
    /// transaction another session.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn listen(&mut self) -> Result<(), StoreError> {
        // It must not return to the pool, where nobody would take what it receives.
        self.client.give_up();
        self.client.batch_execute(&format!("LISTEN {CHANNEL}"))?;
        Ok(())
    }

    /// Waits until somebody tells the replicas something, at most `time`, and returns whether
    /// anybody has.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn heard(&mut self, time: Duration) -> Result<bool, StoreError> {
        Ok(self.client.query_with(|client| {
            let mut notices = client.notifications();
            let first = notices.timeout_iter(time).next()?;
            // One round will do for all of them.
            while notices.iter().next()?.is_some() {}
            Ok(first.is_some())
        })?)
    }
}

impl Transaction<'_> {
    fn notify(&mut self) -> Result<(), StoreError> {
        self.execute("SELECT pg_notify($1, '')", &[&CHANNEL])?;
        Ok(())
    }
}

/// What an operator has set in this row, and what is `defined` where that is nothing.
fn limit(row: &Row, defined: QueueLimit) -> Result<QueueLimit, StoreError> {
    let tasks = |column, defined| -> Result<Option<u32>, StoreError> {
        let set: Option<i32> = row.try_get(column)?;
        Ok(match set {
            Some(tasks) => u32::try_from(tasks).ok().filter(|tasks| *tasks > 0),
            None => defined,
        })
    };
    let paused: Option<bool> = row.try_get("paused")?;
    Ok(QueueLimit {
        window: tasks("max_waiting", defined.window)?,
        max_running: tasks("max_running", defined.max_running)?,
        is_paused: paused.unwrap_or(defined.is_paused),
    })
}

fn held(row: &Row, owner: String) -> anyhow::Result<Held> {
    Ok(Held {
        job_id: row.try_get("job_id")?,
        owner,
        priority: named(Priority::ALL, Priority::name, row.try_get("priority")?)?,
        since: row.try_get("held_at")?,
        moved_at: row.try_get("moved_at")?,
    })
}

/// Its turn, in a row of a job's course.
pub(super) fn turn(row: &Row) -> anyhow::Result<Option<Turn>> {
    let Some(since) = row.try_get("held_at")? else {
        return Ok(None);
    };
    let granted: Option<Timestamp> = row.try_get("granted_at")?;
    let taken: Option<Timestamp> = row.try_get("taken_at")?;
    let grant = taken.or(granted).zip(row.try_get("celery_id")?);
    Ok(Some(Turn {
        since,
        grant: grant.map(|(at, task_id)| Grant { at, task_id }),
    }))
}

fn to_usize(count: i64) -> usize {
    usize::try_from(count).unwrap_or_default()
}
