//! Periodic work that one replica does for all, and how replicas notice each other.

use std::time::Duration;

use jiff::Timestamp;
use log::warn;
use uuid::Uuid;

use super::{Connection, StoreError};

/// What one replica does for all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upkeep {
    /// Finding jobs that are past their timeout or their retention.
    Limits,
    /// Deleting history past its retention.
    History,
    TimeSeries,
    /// Asking the workers what they do.
    Workers,
    /// Telling a webhook of troubles.
    Alerts,
}

impl Upkeep {
    /// As the database has it.
    pub fn name(self) -> &'static str {
        match self {
            Upkeep::Limits => "limits",
            Upkeep::History => "history",
            Upkeep::TimeSeries => "time series",
            Upkeep::Workers => "workers",
            Upkeep::Alerts => "alerts",
        }
    }
}

/// What makes a job overdue.
#[derive(Debug, Clone, Copy)]
pub enum Overdue {
    /// It has been running for longer than its timeout and this time.
    Timeout { grace: Duration },
    /// Its step has been running for longer than its own timeout and this time.
    StepTimeout { grace: Duration },
    /// It ended longer than this ago and its client has not been told; except for jobs that the
    /// other reasons find again.
    OutcomeLost(Duration),
}

/// What is known of task queues beside what the database has.
#[derive(Debug, Clone, Default)]
pub struct KnownQueues {
    /// Workflows of one task of another name than theirs, and those tasks.
    pub workflows: Vec<String>,
    pub tasks: Vec<String>,
    /// Queues that are paused.
    pub paused: Vec<String>,
}

/// What a replica can see of the others.
#[derive(Debug, Clone, Copy)]
pub struct Around {
    /// The database's time.
    pub now: Timestamp,
    /// How many others show their presence.
    pub replicas: i64,
    /// How many of them seem to stand still.
    pub silent: i64,
    /// How many of them show [`Sign::HeldUp`].
    pub held_up: i64,
    /// How many of them show [`Sign::StalledOutcomes`].
    pub stalled_outcomes: i64,
}

/// What a replica shows the others of itself, until its connection is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// It exists and, by the connection's last use, does not stand still.
    Presence,
    /// It has messages that it does not get to handle.
    HeldUp,
    /// It has outcomes that wait for their clients' queues.
    StalledOutcomes,
}

impl Sign {
    /// The advisory lock that all those share who show it. The locks of jobs have another kind of
    /// key.
    pub(super) fn lock(self) -> (i32, i32) {
        let number = match self {
            Sign::Presence => 1,
            Sign::HeldUp => 2,
            Sign::StalledOutcomes => 3,
        };
        (0x6f6d_6f74, number)
    }
}

impl Connection {
    /// Whether this replica is to do what one of them does every `period`: true for the first one
    /// to ask, then for none until the period is over, give or take a tenth. A last time in the
    /// future, from when Postgres's clock was wrong, is ignored.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn claim(&mut self, task: Upkeep, period: Duration) -> Result<bool, StoreError> {
        // The time is taken after the row lock, not before it.
        let rows = self.client.query(
            "WITH before AS (SELECT last_run FROM maintenance_run WHERE task = $1)
             INSERT INTO maintenance_run AS run (task, last_run) VALUES ($1, clock_timestamp())
             ON CONFLICT (task) DO UPDATE SET last_run = clock_timestamp()
             WHERE run.last_run <= clock_timestamp() - $2::float8 * 0.9 * interval '1 second'
                OR run.last_run > clock_timestamp() + $2::float8 * interval '1 second'
             RETURNING (SELECT before.last_run FROM before
                        WHERE before.last_run > clock_timestamp() + $2::float8 * interval '1 second')",
            &[&task.name(), &period.as_secs_f64()],
        )?;
        if let Some(future) = rows
            .first()
            .and_then(|row| row.get::<_, Option<Timestamp>>(0))
        {
            warn!(
                "{}: the last time is recorded as {future:.0}, which is yet to come; it is done now \
                 all the same",
                task.name()
            );
        }
        Ok(!rows.is_empty())
    }

    /// Shows other replicas, until this connection is dropped, that this one exists and, by its
    /// last use, that it does not stand still.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn show_presence(&mut self) -> Result<(), StoreError> {
        // It must not return to the pool, where it would be used rarely.
        self.client.give_up();
        self.client.pin()?;
        self.show(Sign::Presence, true)
    }

    /// Whether a connection that shows a presence does nothing else: what it writes would not be
    /// committed, and its time stands still.
    pub fn shows_nothing_but_presence(&self) -> bool {
        self.client.is_pooled()
    }

    /// Begins or ends to show something. Only for a change.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn show(&mut self, sign: Sign, begins: bool) -> Result<(), StoreError> {
        let sql = match begins {
            true => "SELECT pg_advisory_lock_shared($1, $2)",
            false => "SELECT pg_advisory_unlock_shared($1, $2)",
        };
        let (class, number) = sign.lock();
        self.client.execute(sql, &[&class, &number])?;
        Ok(())
    }

    /// Looks for other replicas that show their presence. One stands still that has been inactive
    /// for between `silent` and `gone`, and what one that is gone once said of itself no longer
    /// counts. Without the rights to see them, those of another user are taken for active and show
    /// nothing else.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn look_around(&mut self, silent: Duration, gone: Duration) -> Result<Around, StoreError> {
        if self.client.is_pooled() {
            // What a transaction sees of other sessions is what it has seen first.
            self.client
                .batch_execute("SELECT pg_stat_clear_snapshot()")?;
        }
        let (class, presence) = Sign::Presence.lock();
        let row = self.client.query_one(
            "SELECT clock_timestamp(),
                    count(*) FILTER (WHERE objid::bigint = $2::integer),
                    count(*) FILTER (WHERE objid::bigint = $2::integer AND NOT is_gone
                        AND state_change <= clock_timestamp() - $4 * interval '1 second'),
                    count(*) FILTER (WHERE objid::bigint = $3::integer AND NOT is_gone),
                    count(*) FILTER (WHERE objid::bigint = $6::integer AND NOT is_gone)
             FROM pg_locks JOIN pg_stat_activity AS session USING (pid),
                  LATERAL (SELECT state_change <= clock_timestamp() - $5 * interval '1 second'
                                  AS is_gone) AS signs
             WHERE locktype = 'advisory' AND objsubid = 2 AND classid::bigint = $1::integer
               AND datname = current_database() AND pid <> pg_backend_pid()
               AND database = datid",
            &[
                &class,
                &presence,
                &Sign::HeldUp.lock().1,
                &silent.as_secs_f64(),
                &gone.as_secs_f64(),
                &Sign::StalledOutcomes.lock().1,
            ],
        )?;
        Ok(Around {
            now: row.try_get(0)?,
            replicas: row.try_get(1)?,
            silent: row.try_get(2)?,
            held_up: row.try_get(3)?,
            stalled_outcomes: row.try_get(4)?,
        })
    }

    /// Overdue jobs in the order of their ids, after `after`, at most `limit`.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn overdue(
        &mut self,
        overdue: Overdue,
        after: Option<Uuid>,
        limit: i64,
    ) -> Result<Vec<Uuid>, StoreError> {
        let (sql, time) = match overdue {
            Overdue::Timeout { grace } => (
                "SELECT job_id FROM job
                 WHERE status = 'RUNNING' AND timeout_after_ms > 0
                   AND running_at <= now() - timeout_after_ms * interval '1 millisecond'
                                           - $1 * interval '1 second'
                   AND ($2::uuid IS NULL OR job_id > $2)
                   -- What its later steps have waited for their turn and in their queues does not
                   -- count.
                   AND running_at <= now() - timeout_after_ms * interval '1 millisecond'
                                           - $1 * interval '1 second' - coalesce((
                       SELECT sum(coalesce(started_at, finished_at, now()) - coalesce(
                           due_at, job_step.submitted_at, turn.held_at))
                       FROM job_step LEFT JOIN job_turn AS turn
                           ON turn.job_id = job_step.job_id AND finished_at IS NULL
                       WHERE job_step.job_id = job.job_id
                         AND coalesce(job_step.submitted_at, turn.held_at) >= running_at
                   ), interval '0')
                 ORDER BY job_id LIMIT $3",
                grace,
            ),
            Overdue::StepTimeout { grace } => (
                "SELECT job_id FROM (
                     SELECT job_id, celery_id, started_at, timeout_ms FROM job_step
                     WHERE timeout_ms IS NOT NULL AND finished_at IS NULL
                     UNION ALL
                     -- Its end has not been told.
                     SELECT job_id, job_step.celery_id, started_at, timeout_ms
                     FROM job JOIN job_history AS ended USING (job_id)
                              JOIN job_step USING (job_id)
                     WHERE ended.outcome = 'TIMED_OUT' AND timeout_ms IS NOT NULL
                       AND job_step.finished_at IS NOT NULL
                 ) AS step JOIN job USING (job_id, celery_id)
                 WHERE started_at <= now() - timeout_ms * interval '1 millisecond'
                                           - $1 * interval '1 second'
                   AND ($2::uuid IS NULL OR job_id > $2)
                 ORDER BY job_id LIMIT $3",
                grace,
            ),
            Overdue::OutcomeLost(telling) => (
                "SELECT job_id FROM job JOIN job_history USING (job_id)
                 WHERE finished_at <= now() - $1 * interval '1 second'
                   AND outcome NOT IN ('TIMED_OUT', 'EXPIRED')
                   AND ($2::uuid IS NULL OR job_id > $2)
                 ORDER BY job_id LIMIT $3",
                telling,
            ),
        };
        let rows = self
            .client
            .query(sql, &[&time.as_secs_f64(), &after, &limit])?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Jobs that have been in one state for longer than `retention`, in the order of their ids, after
    /// `after`, at most `limit`. One that waits is not among them while its queue moves: if something
    /// there was started, or operators changed what is allowed there, within that time, or do not
    /// let it go.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn expired(
        &mut self,
        retention: Duration,
        queues: &KnownQueues,
        after: Option<Uuid>,
        limit: i64,
    ) -> Result<Vec<Uuid>, StoreError> {
        let KnownQueues {
            workflows,
            tasks,
            paused,
        } = queues;
        let rows = self.client.query(
            "WITH plain (workflow, task) AS (SELECT * FROM unnest($4::varchar[], $5::varchar[])),
                  since (at) AS (SELECT now() - $1 * interval '1 second')
             SELECT job_id FROM job, since
             WHERE CASE status WHEN 'REGISTERED' THEN registered_at
                               WHEN 'SUBMITTED' THEN coalesce(submitted_at, registered_at)
                               WHEN 'RUNNING' THEN coalesce(running_at, registered_at)
                   END <= since.at
               AND ($2::uuid IS NULL OR job_id > $2)
               AND NOT EXISTS (
                   SELECT FROM job_step
                   WHERE job_step.job_id = job.job_id AND finished_at IS NULL
                     AND coalesce(started_at, job_step.submitted_at, due_at) > since.at
               )
               -- Of one that has ended the client is to be told, whatever its queue does.
               AND (EXISTS (SELECT FROM job_history AS ended WHERE ended.job_id = job.job_id)
                    OR NOT EXISTS (
                        SELECT FROM job_turn WHERE job_turn.job_id = job.job_id AND on_hold
                    )
               -- Rarely looked at, since little is as old.
               AND NOT EXISTS (
                   SELECT FROM (SELECT coalesce(
                       (SELECT queue FROM job_turn WHERE job_turn.job_id = job.job_id),
                       (SELECT task FROM job_step
                        WHERE job_step.job_id = job.job_id AND finished_at IS NULL),
                       job.task_queue,
                       (SELECT task FROM plain WHERE workflow = job.workflow_type),
                       job.workflow_type
                   ) AS queue) AS its
                   WHERE (status <> 'RUNNING' OR EXISTS (
                       SELECT FROM job_step
                       WHERE job_step.job_id = job.job_id AND finished_at IS NULL
                         AND started_at IS NULL
                   ))
                   -- What the Python service has half registered is not in a queue.
                   AND (status <> 'REGISTERED' OR EXISTS (
                       SELECT FROM job_input WHERE job_input.job_id = job.job_id
                   ))
                   -- Its task is lost if one that was put on the queue after it was taken from it.
                   AND NOT EXISTS (
                       SELECT FROM job AS later
                       WHERE later.workflow_type = job.workflow_type AND job.status = 'SUBMITTED'
                         -- Another service may not have written it.
                         AND coalesce(later.task_queue = job.task_queue, true)
                         AND later.priority IS NOT DISTINCT FROM job.priority
                         AND later.submitted_at > job.submitted_at + interval '1 min'
                         AND later.running_at IS NOT NULL
                   ) AND (
                      queue = ANY($6)
                      OR EXISTS (SELECT FROM queue_limit
                                 WHERE queue_limit.queue = its.queue AND changed_at > since.at)
                      OR EXISTS (SELECT FROM job_step
                                 WHERE task = its.queue AND job_step.started_at > since.at)
                      OR EXISTS (SELECT FROM job AS other
                                     LEFT JOIN plain ON workflow = other.workflow_type
                                 WHERE coalesce(other.task_queue, task, other.workflow_type) = its.queue
                                   AND other.running_at > since.at)
                      OR EXISTS (SELECT FROM job_history AS ended
                                     LEFT JOIN plain ON workflow = ended.workflow_type
                                 WHERE coalesce((SELECT task_queue FROM job_story AS told
                                                 WHERE told.job_id = ended.job_id),
                                                task, ended.workflow_type) = its.queue
                                   AND ended.finished_at > since.at
                                   AND ended.running_at > since.at)
                   )
               ))
             ORDER BY job_id LIMIT $3",
            &[
                &retention.as_secs_f64(),
                &after,
                &limit,
                workflows,
                tasks,
                paused,
            ],
        )?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Jobs whose tasks no worker has had for this time, as of a recent look, with the tasks and
    /// since when; in the order of their ids, after `after`, at most `limit`.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn lost_tasks(
        &mut self,
        time: Duration,
        after: Option<Uuid>,
        limit: i64,
    ) -> Result<Vec<(Uuid, String, Timestamp)>, StoreError> {
        let rows = self.client.query(
            "SELECT job.job_id, job.celery_id, since
             FROM absent_task JOIN job ON job.job_id = absent_task.job_id
                                       AND job.celery_id = absent_task.celery_id
             WHERE NOT may_wait AND status IN ('RUNNING', 'SUBMITTED')
               AND confirmed_at - since >= $1 * interval '1 second'
               AND confirmed_at > now() - interval '90 seconds'
               AND ($2::uuid IS NULL OR job.job_id > $2)
             ORDER BY job.job_id LIMIT $3",
            &[&time.as_secs_f64(), &after, &limit],
        )?;
        let lost = rows.iter().map(|row| (row.get(0), row.get(1), row.get(2)));
        Ok(lost.collect())
    }

    /// Deletes the history of jobs that ended longer than `retention` ago, at most `limit`, and
    /// returns how many.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn forget(&mut self, retention: Duration, limit: i64) -> Result<u64, StoreError> {
        let row = self.client.query_one(
            "WITH gone AS (
                 DELETE FROM job_history
                 WHERE job_id IN (
                     SELECT job_id FROM job_history
                     WHERE finished_at <= now() - $1 * interval '1 second'
                       AND NOT EXISTS (SELECT FROM job WHERE job.job_id = job_history.job_id)
                     ORDER BY finished_at LIMIT $2
                 )
                 RETURNING job_id
             ), steps AS (
                 DELETE FROM job_step USING gone WHERE job_step.job_id = gone.job_id
             ), stories AS (
                 DELETE FROM job_story USING gone WHERE job_story.job_id = gone.job_id
             ), results AS (
                 DELETE FROM job_result USING gone WHERE job_result.job_id = gone.job_id
             ), submissions AS (
                 DELETE FROM job_submission USING gone
                 WHERE job_submission.job_id = gone.job_id
             ), acts AS (
                 DELETE FROM job_act USING gone WHERE job_act.job_id = gone.job_id
                 RETURNING job_act.job_id, act
             ), series AS (
                 -- No client has those of another run, and would delete them.
                 UPDATE esdl_time_series_info SET deactivated_at = now()
                 FROM acts
                 WHERE act = 'AGAIN' AND esdl_time_series_info.job_id = acts.job_id
                   AND deactivated_at IS NULL
             )
             SELECT count(*) FROM gone",
            &[&retention.as_secs_f64(), &limit],
        )?;
        let forgotten: i64 = row.try_get(0)?;
        Ok(forgotten.unsigned_abs())
    }
}
