//! Postgres: all SQL is here and below, and in `migrations/`.
//!
//! Each statement works on a whole batch of jobs. A handler locks the jobs of its batch, loads
//! their states, and writes back what [`crate::domain::job::decide`] made of them, all in one transaction.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::anyhow;
use jiff::Timestamp;
use postgres::error::SqlState;
use postgres::types::ToSql;
use postgres::{Client, Row, Statement};
use thiserror::Error;
use uuid::Uuid;

use self::connect::{Access, ConnectError, Connector, noted};
use crate::config;
use crate::domain::batch::{Series, SeriesChanges, Transition};
use crate::domain::job::{
    Ended, Ending, Job, JobStatus, MAX_REFERENCE, MAX_WORKFLOW_TYPE, Outcome, Priority, Progress,
    Start, State,
};
use crate::domain::time_series::Guard;
use crate::threads::Calls;

pub use self::upkeep::{Overdue, Task};

mod connect;
pub mod inspection;
pub mod migrate;
pub mod rights;
mod starts;
mod upkeep;
pub mod views;

/// What went wrong with the database, by what can be done about it.
#[derive(Debug, Error)]
pub enum StoreError {
    /// It may work the next time, on a new connection.
    #[error(transparent)]
    Transient(anyhow::Error),
    /// Somebody else holds a lock, for longer than `lock_timeout`: Postgres works, and whoever else
    /// asks has to wait as well.
    #[error(transparent)]
    Locked(anyhow::Error),
    /// Postgres has no room for so much at once, in most cases in its table of locks. Less of it may
    /// go through.
    #[error(transparent)]
    TooMuch(anyhow::Error),
    /// It took longer than the connection's `statement_timeout`, or somebody cancelled it.
    #[error(transparent)]
    TooLong(anyhow::Error),
    /// Postgres refuses the content, and will the next time: a NUL in a text, a value out of range.
    #[error("what is in Postgres, or should be, is refused: {0}")]
    Refused(String),
}

impl From<postgres::Error> for StoreError {
    fn from(error: postgres::Error) -> Self {
        if let Some(refusal) = error.as_db_error().filter(|_| is_refusal(&error)) {
            return StoreError::Refused(refusal.message().to_owned());
        }
        let code = error.code().cloned();
        // A plain error says no more than "db error"; what the server said is in its source.
        let error = anyhow!(error).context("Postgres");
        match code {
            Some(SqlState::LOCK_NOT_AVAILABLE) => StoreError::Locked(error),
            Some(SqlState::OUT_OF_MEMORY) => StoreError::TooMuch(error),
            Some(SqlState::QUERY_CANCELED) => StoreError::TooLong(error),
            Some(_) | None => StoreError::Transient(error),
        }
    }
}

/// Whether it is about the content, whoever asks and whenever: data exceptions (class 22), and limits
/// of Postgres itself (54), such as for a text that is too long to index.
fn is_refusal(error: &postgres::Error) -> bool {
    let code = error.code().map(SqlState::code);
    code.is_some_and(|code| code.starts_with("22") || code.starts_with("54"))
}

/// Connections to the database.
#[derive(Clone)]
pub struct Store {
    pool: r2d2::Pool<Connector>,
    last_failure: LastFailure,
    /// Of whoever uses its connections.
    calls: Arc<Calls>,
}

/// Why the pool could not connect the last time, with the whole cause chain: the pool's own error
/// has but the first link of it.
#[derive(Debug, Clone, Default)]
struct LastFailure(Arc<Mutex<String>>);

impl r2d2::HandleError<ConnectError> for LastFailure {
    fn handle_error(&self, error: ConnectError) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = error.to_string();
    }
}

impl Store {
    /// At most `connections` connections, none of which is opened before it is needed, to a server
    /// that takes writes.
    pub fn new(config: &config::Postgres, connections: u32) -> Store {
        let connector = Connector::new(config.clone(), "35s", Access::Write);
        Store::open(connector, connections)
    }

    /// For those who look on, be it at a standby: what takes longer than anybody waits for a page is
    /// given up.
    pub fn for_viewers(config: &config::Postgres) -> Store {
        Store::open(Connector::new(config.clone(), "5s", Access::Read), VIEWERS)
    }

    fn open(connector: Connector, connections: u32) -> Store {
        let last_failure = LastFailure::default();
        let pool = r2d2::Pool::builder()
            .max_size(connections)
            .min_idle(Some(0))
            .connection_timeout(config::CONNECT_TIMEOUT)
            // Whoever waits for the connection reports the failure.
            .error_handler(Box::new(last_failure.clone()))
            .build_unchecked(connector);
        Store {
            pool,
            last_failure,
            calls: Arc::default(),
        }
    }

    /// The same for one thread: `calls` tells a watchdog since when one has been waiting.
    pub fn watched_by(&self, calls: &Arc<Calls>) -> Store {
        Store {
            calls: calls.clone(),
            ..self.clone()
        }
    }

    /// How many connections there are, and how many of them nobody uses.
    pub fn connections(&self) -> (u32, u32) {
        let state = self.pool.state();
        (state.connections, state.idle_connections)
    }

    /// A connection on which nothing has failed so far, to a server that takes writes unless it is
    /// for viewers.
    ///
    /// # Errors
    /// [`StoreError::Transient`], after [`config::CONNECT_TIMEOUT`] without one.
    pub fn connection(&self) -> Result<Connection, StoreError> {
        let _call = self.calls.begin();
        let mut client = self.pool.get().map_err(|_| {
            let LastFailure(last) = &self.last_failure;
            let last = last.lock().unwrap_or_else(PoisonError::into_inner);
            StoreError::Transient(anyhow!(
                "no connection to Postgres within {:?}: {last}",
                config::CONNECT_TIMEOUT
            ))
        })?;
        client.calls = self.calls.clone();
        Ok(Connection {
            client,
            statements: HashMap::new(),
        })
    }
}

/// The status page, its searches, the metrics, and the look at RabbitMQ's queues.
const VIEWERS: u32 = 4;

/// One connection with the statements prepared on it so far.
pub struct Connection {
    client: r2d2::PooledConnection<Connector>,
    statements: HashMap<&'static str, Statement>,
}

impl Connection {
    /// Does something about the revisions, see [`migrate`].
    ///
    /// # Errors
    /// Those of `work`.
    pub fn revisions<T>(
        &mut self,
        work: impl FnOnce(&mut Client) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        self.client.work(work)
    }

    /// Has Postgres commit something, which changes nothing.
    ///
    /// # Errors
    /// It does not: it is a standby, its disk is full, or the connection is lost.
    pub fn check_writing(&mut self) -> Result<(), StoreError> {
        // A transaction with a number of its own is written to the log, and waits for it.
        self.client.execute("SELECT txid_current()", &[])?;
        Ok(())
    }

    /// What is known of time series.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn guards(&mut self) -> Result<Vec<Guard>, StoreError> {
        let rows = self.client.query(
            "SELECT esdl_id, deactivated_at, job_id FROM esdl_time_series_info
             WHERE esdl_id IS NOT NULL ORDER BY esdl_id",
            &[],
        )?;
        rows.iter()
            .map(|row| {
                Ok(Guard {
                    esdl_id: row.try_get("esdl_id")?,
                    deactivated_at: row.try_get("deactivated_at")?,
                    job_id: row.try_get("job_id")?,
                })
            })
            .collect()
    }

    /// The database's time, and since when the job runs that has been running for longest.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn oldest_running(&mut self) -> Result<(Timestamp, Option<Timestamp>), StoreError> {
        let row = self.client.query_one(
            "SELECT now() AS now, min(running_at) AS oldest FROM job WHERE status = 'RUNNING'",
            &[],
        )?;
        Ok((row.try_get("now")?, row.try_get("oldest")?))
    }

    /// Writes that nobody has claimed these series by now. Those that somebody has are left alone.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn mark_series(&mut self, esdl_ids: &[String], now: Timestamp) -> Result<(), StoreError> {
        self.client.execute(
            "INSERT INTO esdl_time_series_info (row_id, esdl_id, registered_at, deactivated_at)
             SELECT gen_random_uuid(), esdl_id, $2, $2 FROM unnest($1::varchar[]) AS new (esdl_id)
             ON CONFLICT (esdl_id) DO NOTHING",
            &[&esdl_ids, &now],
        )?;
        Ok(())
    }

    /// Deletes the row of series that nobody needs, if that is still so, after `drop` has deleted
    /// the series themselves. Nobody can claim them meanwhile. Returns whether there was such a row.
    ///
    /// # Errors
    /// The connection is lost, or `drop` has failed; the row is there then.
    pub fn delete_retired_series(
        &mut self,
        esdl_id: &str,
        drop: impl FnOnce() -> anyhow::Result<()>,
    ) -> Result<bool, StoreError> {
        let mut transaction = self.transaction()?;
        let rows = transaction.execute(
            "DELETE FROM esdl_time_series_info
             WHERE esdl_id = $1 AND deactivated_at IS NOT NULL",
            &[&esdl_id],
        )?;
        if rows > 0 {
            drop().map_err(StoreError::Transient)?;
        }
        transaction.commit()?;
        Ok(rows > 0)
    }

    /// Makes series be in use, or not from now on. Returns whether anything is known of them.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn set_series_in_use(&mut self, esdl_id: &str, in_use: bool) -> Result<bool, StoreError> {
        let rows = self.client.execute(
            "UPDATE esdl_time_series_info
             SET deactivated_at = CASE WHEN $2 THEN NULL ELSE coalesce(deactivated_at, now()) END
             WHERE esdl_id = $1",
            &[&esdl_id, &in_use],
        )?;
        Ok(rows > 0)
    }

    /// Deletes the rows of these jobs, which have ended, and whose clients have been told.
    ///
    /// # Errors
    /// The connection is lost, and then it is open whether they are deleted.
    pub fn settle(&mut self, job_ids: &[Uuid]) -> Result<(), StoreError> {
        let sql = "WITH starts AS (DELETE FROM job_starts WHERE job_id = ANY($1))
                   DELETE FROM job WHERE job_id = ANY($1)";
        let statement = match self.statements.get(sql) {
            Some(statement) => statement.clone(),
            None => self.client.prepare(sql)?,
        };
        self.client.execute(&statement, &[&job_ids])?;
        self.statements.insert(sql, statement);
        Ok(())
    }

    /// Begins a transaction, which is rolled back when dropped.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn transaction(&mut self) -> Result<Transaction<'_>, StoreError> {
        let (inner, failed, calls) = self.client.transaction()?;
        Ok(Transaction {
            inner,
            calls,
            statements: &mut self.statements,
            failed,
        })
    }
}

pub struct Transaction<'a> {
    inner: postgres::Transaction<'a>,
    calls: &'a Calls,
    statements: &'a mut HashMap<&'static str, Statement>,
    /// Of the connection.
    failed: &'a mut bool,
}

/// What a batch's decisions need to know.
#[derive(Debug)]
pub struct Loaded {
    pub states: HashMap<Uuid, State>,
    /// The database's time.
    pub now: Timestamp,
    /// When a replica last began a session with RabbitMQ, by the same clock.
    pub session_begun: Option<Timestamp>,
}

impl Transaction<'_> {
    /// Waits until no other transaction of any replica works on these jobs, and keeps others from
    /// it until the end of this one. Unlike a row lock it covers jobs without a row.
    ///
    /// # Errors
    /// The wait took longer than the connection's `lock_timeout`, or the connection is lost.
    pub fn lock(&mut self, job_ids: &[Uuid]) -> Result<(), StoreError> {
        let mut keys: Vec<i64> = job_ids.iter().map(lock_key).collect();
        // In one order everywhere, so that two batches never wait for each other.
        keys.sort_unstable();
        keys.dedup();
        self.execute(
            "SELECT pg_advisory_xact_lock(key) FROM unnest($1::bigint[]) AS key",
            &[&keys],
        )?;
        Ok(())
    }

    /// Lets Postgres wait for longer than usual between two statements of this transaction.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn take_time(&mut self) -> Result<(), StoreError> {
        self.execute(
            "SET LOCAL idle_in_transaction_session_timeout = '4min'",
            &[],
        )?;
        Ok(())
    }

    /// The states of these jobs, all of which are in the answer, and what else is to be known for a
    /// decision.
    ///
    /// # Errors
    /// The connection is lost. A row is not one that this program or the Python service writes:
    /// [`StoreError::Refused`].
    pub fn load(&mut self, job_ids: &[Uuid]) -> Result<Loaded, StoreError> {
        let rows = self.query(
            "SELECT clock_timestamp() AS now, wanted.job_id,
                    (SELECT begun_at FROM broker_session) AS session_begun,
                    job.status::text AS status, left(job.workflow_type, $3) AS workflow_type,
                    left(job.job_reference, $2) AS job_reference,
                    job.celery_id, job.registered_at, job.submitted_at, job.running_at,
                    job.timeout_after_ms, job.priority, job.progress, job.progress_message,
                    job.progress_at, starts.started_at, starts.message_id, starts.verdict,
                    ended.outcome, left(ended.workflow_type, $3) AS ended_workflow_type,
                    left(ended.job_reference, $2) AS ended_job_reference,
                    ended.celery_id AS ended_celery_id,
                    ended.registered_at AS ended_registered_at,
                    ended.submitted_at AS ended_submitted_at,
                    ended.running_at AS ended_running_at, ended.finished_at, ended.starts,
                    ended.start_ids, ended.result_bytes
             FROM unnest($1::uuid[]) AS wanted (job_id)
             LEFT JOIN job USING (job_id)
             LEFT JOIN LATERAL (
                 SELECT array_agg(started_at ORDER BY started_at) AS started_at,
                        array_agg(message_id ORDER BY started_at) AS message_id,
                        array_agg(verdict ORDER BY started_at) AS verdict
                 FROM job_starts WHERE job_starts.job_id = job.job_id
             ) AS starts ON true
             LEFT JOIN job_history AS ended USING (job_id)",
            // What others have written may be longer.
            &[
                &job_ids,
                &characters(MAX_REFERENCE),
                &characters(MAX_WORKFLOW_TYPE),
            ],
        )?;
        let mut loaded = Loaded {
            states: HashMap::with_capacity(rows.len()),
            now: Timestamp::UNIX_EPOCH,
            session_begun: None,
        };
        for row in &rows {
            loaded.now = row.try_get("now")?;
            loaded.session_begun = row.try_get("session_begun")?;
            let job_id: Uuid = row.try_get("job_id")?;
            let state = state(row).map_err(|error| {
                StoreError::Refused(format!("the row of job {job_id}: {error:#}"))
            })?;
            loaded.states.insert(job_id, state);
        }
        Ok(loaded)
    }

    /// Writes what has become of the jobs, and of the guard rows of their time series.
    ///
    /// # Errors
    /// A row is not as it was loaded, or the connection is lost: [`StoreError::Transient`]. A text
    /// is not one for Postgres: [`StoreError::Refused`].
    pub fn write<'a>(
        &mut self,
        transitions: &'a [Transition<'a>],
        series: &SeriesChanges,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let mut inserted = Vec::new();
        let mut updated = Vec::new();
        let mut progressed = Vec::new();
        let mut ended = Vec::new();
        let mut started: Vec<(Uuid, &Start)> = Vec::new();
        let mut judged = Vec::new();
        for Transition {
            job_id,
            before,
            after,
        } in transitions
        {
            let job_id = *job_id;
            let row = |state: &'a State| match state {
                State::Live(job) | State::Ending(Ending { job, .. }) => Some(job),
                State::Unknown | State::Ended(_) => None,
            };
            match (row(before), row(after)) {
                (Some(before), Some(after)) => {
                    if !same_row(before, after) {
                        updated.push((job_id, before, after));
                    } else if before.progress != after.progress {
                        progressed.push((job_id, after));
                    }
                    let new = after.starts.iter().skip(before.starts.len());
                    started.extend(new.map(|start| (job_id, start)));
                    let both = before.starts.iter().zip(&after.starts);
                    let changed = both.filter(|(before, after)| before.verdict != after.verdict);
                    judged.extend(changed.map(|(_, start)| (job_id, start)));
                }
                (None, Some(after)) => {
                    inserted.push((job_id, after));
                    started.extend(after.starts.iter().map(|start| (job_id, start)));
                }
                // It goes when the client has been told.
                (_, None) => {}
            }
            let outcome = |state: &'a State| match state {
                State::Ending(Ending { ended, .. }) | State::Ended(ended) => Some(ended),
                State::Unknown | State::Live(_) => None,
            };
            if let Some(after) = outcome(after)
                && outcome(before) != Some(after)
            {
                ended.push((job_id, after));
            }
        }
        let rows = [
            inserted.len(),
            updated.len(),
            started.len(),
            judged.len(),
            ended.len(),
        ];
        if !progressed.is_empty() && rows == [0; 5] && *series == SeriesChanges::default() {
            // The next progress makes good what a crash of Postgres takes away of it.
            self.execute("SET LOCAL synchronous_commit TO off", &[])?;
        }
        self.update_progress(&progressed)?;
        self.insert_jobs(&inserted)?;
        self.update_jobs(&updated)?;
        self.insert_starts(&started)?;
        self.judge_starts(&judged)?;
        self.write_history(&ended)?;
        self.write_series(series, now)
    }

    fn insert_jobs(&mut self, jobs: &[(Uuid, &Job)]) -> Result<(), StoreError> {
        if jobs.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = jobs.iter().map(|(id, _)| id).collect();
        let tasks: Vec<_> = jobs.iter().map(|(_, job)| &job.task_id).collect();
        let workflows: Vec<_> = jobs.iter().map(|(_, job)| &job.workflow_type).collect();
        let statuses: Vec<_> = jobs.iter().map(|(_, job)| job.status.name()).collect();
        let registered: Vec<_> = jobs.iter().map(|(_, job)| job.registered_at).collect();
        let submitted: Vec<_> = jobs.iter().map(|(_, job)| job.submitted_at).collect();
        let running: Vec<_> = jobs.iter().map(|(_, job)| job.running_at).collect();
        let timeouts: Vec<_> = jobs.iter().map(|(_, job)| job.timeout_ms).collect();
        let references: Vec<_> = jobs.iter().map(|(_, job)| &job.reference).collect();
        let priorities: Vec<_> = jobs
            .iter()
            .map(|(_, job)| job.priority.map(Priority::name))
            .collect();
        self.execute(
            "INSERT INTO job (job_id, celery_id, workflow_type, status, registered_at,
                              submitted_at, running_at, timeout_after_ms, job_reference, priority)
             SELECT job_id, celery_id, workflow_type, status::jobstatus, registered_at,
                    submitted_at, running_at, timeout_after_ms, job_reference, priority
             FROM unnest($1::uuid[], $2::varchar[], $3::varchar[], $4::text[], $5::timestamptz[],
                         $6::timestamptz[], $7::timestamptz[], $8::bigint[], $9::varchar[],
                         $10::varchar[])
                  AS new (job_id, celery_id, workflow_type, status, registered_at,
                          submitted_at, running_at, timeout_after_ms, job_reference, priority)",
            &[
                &ids,
                &tasks,
                &workflows,
                &statuses,
                &registered,
                &submitted,
                &running,
                &timeouts,
                &references,
                &priorities,
            ],
        )?;
        Ok(())
    }

    fn update_progress(&mut self, jobs: &[(Uuid, &Job)]) -> Result<(), StoreError> {
        if jobs.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = jobs.iter().map(|(id, _)| id).collect();
        let (fractions, messages, times) = progress_columns(jobs.iter().map(|(_, job)| *job));
        let rows = self.execute(
            "UPDATE job
             SET progress = new.progress, progress_message = new.message, progress_at = new.at
             FROM unnest($1::uuid[], $2::float8[], $3::varchar[], $4::timestamptz[])
                  AS new (job_id, progress, message, at)
             WHERE job.job_id = new.job_id",
            &[&ids, &fractions, &messages, &times],
        )?;
        expect_rows("updating progress", rows, jobs.len())
    }

    fn update_jobs(&mut self, jobs: &[(Uuid, &Job, &Job)]) -> Result<(), StoreError> {
        if jobs.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = jobs.iter().map(|(id, _, _)| id).collect();
        let old_statuses: Vec<_> = jobs.iter().map(|(_, old, _)| old.status.name()).collect();
        let statuses: Vec<_> = jobs.iter().map(|(_, _, new)| new.status.name()).collect();
        let tasks: Vec<_> = jobs.iter().map(|(_, _, new)| &new.task_id).collect();
        let submitted: Vec<_> = jobs.iter().map(|(_, _, new)| new.submitted_at).collect();
        let running: Vec<_> = jobs.iter().map(|(_, _, new)| new.running_at).collect();
        let timeouts: Vec<_> = jobs.iter().map(|(_, _, new)| new.timeout_ms).collect();
        let priorities: Vec<_> = jobs
            .iter()
            .map(|(_, _, new)| new.priority.map(Priority::name))
            .collect();
        let (fractions, messages, times) = progress_columns(jobs.iter().map(|(_, _, new)| *new));
        let rows = self.execute(
            "UPDATE job
             SET status = new.status::jobstatus, celery_id = new.celery_id,
                 submitted_at = new.submitted_at, running_at = new.running_at,
                 timeout_after_ms = new.timeout_after_ms, priority = new.priority,
                 progress = new.progress, progress_message = new.message, progress_at = new.at
             FROM unnest($1::uuid[], $2::text[], $3::text[], $4::varchar[], $5::timestamptz[],
                         $6::timestamptz[], $7::bigint[], $8::varchar[], $9::float8[],
                         $10::varchar[], $11::timestamptz[])
                  AS new (job_id, old_status, status, celery_id, submitted_at, running_at,
                          timeout_after_ms, priority, progress, message, at)
             WHERE job.job_id = new.job_id AND job.status = new.old_status::jobstatus",
            &[
                &ids,
                &old_statuses,
                &statuses,
                &tasks,
                &submitted,
                &running,
                &timeouts,
                &priorities,
                &fractions,
                &messages,
                &times,
            ],
        )?;
        expect_rows("updating jobs", rows, jobs.len())
    }

    fn write_history(&mut self, ended: &[(Uuid, &Ended)]) -> Result<(), StoreError> {
        if ended.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = ended.iter().map(|(id, _)| id).collect();
        let references: Vec<_> = ended.iter().map(|(_, job)| &job.reference).collect();
        let workflows: Vec<_> = ended.iter().map(|(_, job)| &job.workflow_type).collect();
        let tasks: Vec<_> = ended.iter().map(|(_, job)| &job.task_id).collect();
        let registered: Vec<_> = ended.iter().map(|(_, job)| job.registered_at).collect();
        let submitted: Vec<_> = ended.iter().map(|(_, job)| job.submitted_at).collect();
        let running: Vec<_> = ended.iter().map(|(_, job)| job.running_at).collect();
        let finished: Vec<_> = ended.iter().map(|(_, job)| job.finished_at).collect();
        let started: Vec<_> = ended.iter().map(|(_, job)| job.starts).collect();
        let outcomes: Vec<_> = ended.iter().map(|(_, job)| job.outcome.name()).collect();
        let sizes: Vec<_> = ended.iter().map(|(_, job)| job.result_bytes).collect();
        let start_ids = ended
            .iter()
            .map(|(_, job)| starts::ids_to_text(&job.start_ids));
        let start_ids: Vec<_> = start_ids.collect();
        self.execute(
            "INSERT INTO job_history (job_id, job_reference, workflow_type, celery_id,
                                      registered_at, submitted_at, running_at, finished_at,
                                      starts, outcome, result_bytes, start_ids)
             SELECT * FROM unnest($1::uuid[], $2::varchar[], $3::varchar[], $4::varchar[],
                                  $5::timestamptz[], $6::timestamptz[], $7::timestamptz[],
                                  $8::timestamptz[], $9::integer[], $10::varchar[], $11::bigint[],
                                  $12::varchar[])
             ON CONFLICT (job_id) DO UPDATE
             SET job_reference = excluded.job_reference, workflow_type = excluded.workflow_type,
                 celery_id = excluded.celery_id, registered_at = excluded.registered_at,
                 submitted_at = excluded.submitted_at, running_at = excluded.running_at,
                 finished_at = excluded.finished_at, starts = excluded.starts,
                 outcome = excluded.outcome, result_bytes = excluded.result_bytes,
                 start_ids = excluded.start_ids",
            &[
                &ids,
                &references,
                &workflows,
                &tasks,
                &registered,
                &submitted,
                &running,
                &finished,
                &started,
                &outcomes,
                &sizes,
                &start_ids,
            ],
        )?;
        Ok(())
    }

    /// What is kept comes first, so that a job that succeeded and was deleted within one batch ends
    /// up retired.
    fn write_series(&mut self, changes: &SeriesChanges, now: Timestamp) -> Result<(), StoreError> {
        self.upsert_series(
            &changes.keep,
            "INSERT INTO esdl_time_series_info
                 (row_id, esdl_id, job_id, job_reference, registered_at)
             SELECT gen_random_uuid(), esdl_id, job_id, job_reference, $4
             FROM unnest($1::varchar[], $2::uuid[], $3::varchar[])
                  AS new (esdl_id, job_id, job_reference)
             ON CONFLICT (esdl_id) DO UPDATE
             SET deactivated_at = NULL, job_id = excluded.job_id,
                 job_reference = excluded.job_reference",
            now,
        )?;
        // A row that exists belongs to a job that succeeded with the same id, and stays as it is.
        self.upsert_series(
            &changes.retire_late,
            "INSERT INTO esdl_time_series_info
                 (row_id, esdl_id, job_id, job_reference, registered_at, deactivated_at)
             SELECT gen_random_uuid(), esdl_id, job_id, job_reference, $4, $4
             FROM unnest($1::varchar[], $2::uuid[], $3::varchar[])
                  AS new (esdl_id, job_id, job_reference)
             ON CONFLICT (esdl_id) DO NOTHING",
            now,
        )?;
        if !changes.retire.is_empty() {
            self.execute(
                "UPDATE esdl_time_series_info SET deactivated_at = $2
                 WHERE job_id = ANY($1) AND deactivated_at IS NULL",
                &[&changes.retire, &now],
            )?;
        }
        Ok(())
    }

    fn upsert_series(
        &mut self,
        series: &[Series],
        sql: &'static str,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        // One row each, the last one's word, and in one order everywhere against deadlocks.
        let by_id: std::collections::BTreeMap<_, _> = series
            .iter()
            .map(|series| (&series.esdl_id, series))
            .collect();
        if by_id.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = by_id.values().map(|series| &series.esdl_id).collect();
        let jobs: Vec<_> = by_id.values().map(|series| series.job_id).collect();
        let references: Vec<_> = by_id.values().map(|series| &series.reference).collect();
        self.execute(sql, &[&ids, &jobs, &references, &now])?;
        Ok(())
    }

    /// Makes it all so.
    ///
    /// # Errors
    /// The connection is lost, and then it is open whether it was made so.
    pub fn commit(self) -> Result<(), StoreError> {
        let _call = self.calls.begin();
        Ok(noted(self.failed, self.inner.commit())?)
    }

    fn execute(
        &mut self,
        sql: &'static str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<u64, StoreError> {
        let statement = self.prepared(sql)?;
        let _call = self.calls.begin();
        let rows = self.inner.execute(&statement, params);
        Ok(noted(self.failed, rows)?)
    }

    fn query(
        &mut self,
        sql: &'static str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        let statement = self.prepared(sql)?;
        let _call = self.calls.begin();
        let rows = self.inner.query(&statement, params);
        Ok(noted(self.failed, rows)?)
    }

    fn prepared(&mut self, sql: &'static str) -> Result<Statement, StoreError> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        let _call = self.calls.begin();
        let statement = noted(self.failed, self.inner.prepare(sql))?;
        self.statements.insert(sql, statement.clone());
        Ok(statement)
    }
}

fn expect_rows(what: &str, rows: u64, expected: usize) -> Result<(), StoreError> {
    if usize::try_from(rows) == Ok(expected) {
        Ok(())
    } else {
        Err(StoreError::Transient(anyhow!(
            "{what}: {rows} of {expected} rows were as they had been loaded; somebody else \
             changed the others"
        )))
    }
}

/// As Postgres counts them.
fn characters(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// The advisory locks of one database share one 64-bit space; half of a random UUID is as good as
/// all of it.
fn lock_key(job_id: &Uuid) -> i64 {
    let (high, low) = job_id.as_u64_pair();
    (high ^ low).cast_signed()
}

type ProgressColumns<'a> = (
    Vec<Option<f64>>,
    Vec<Option<&'a str>>,
    Vec<Option<Timestamp>>,
);

fn progress_columns<'a>(jobs: impl Iterator<Item = &'a Job>) -> ProgressColumns<'a> {
    let mut columns = ProgressColumns::default();
    for job in jobs {
        let progress = job.progress.as_ref();
        columns.0.push(progress.map(|progress| progress.fraction));
        columns.1.push(progress.map(|progress| &*progress.message));
        columns.2.push(progress.map(|progress| progress.at));
    }
    columns
}

/// Whether a job's row stays as it is, but for the progress.
fn same_row(before: &Job, after: &Job) -> bool {
    let Job {
        // Of these nothing changes in a job's life.
        workflow_type: _,
        reference: _,
        registered_at: _,
        status,
        task_id,
        submitted_at,
        running_at,
        timeout_ms,
        priority,
        // They have rows of their own.
        starts: _,
        progress: _,
    } = before;
    *status == after.status
        && *task_id == after.task_id
        && *submitted_at == after.submitted_at
        && *running_at == after.running_at
        && *timeout_ms == after.timeout_ms
        && *priority == after.priority
}

fn state(row: &Row) -> anyhow::Result<State> {
    Ok(match (job(row)?, ended(row)?) {
        (None, None) => State::Unknown,
        (Some(job), None) => State::Live(job),
        (Some(job), Some(ended)) => State::Ending(Ending { job, ended }),
        (None, Some(ended)) => State::Ended(ended),
    })
}

fn job(row: &Row) -> anyhow::Result<Option<Job>> {
    let Some(status) = row.try_get::<_, Option<&str>>("status")? else {
        return Ok(None);
    };
    Ok(Some(Job {
        workflow_type: row.try_get("workflow_type")?,
        reference: row
            .try_get::<_, Option<_>>("job_reference")?
            .unwrap_or_default(),
        status: named(JobStatus::ALL, JobStatus::name, status)?,
        task_id: row.try_get("celery_id")?,
        registered_at: row.try_get("registered_at")?,
        submitted_at: row.try_get("submitted_at")?,
        running_at: row.try_get("running_at")?,
        timeout_ms: row.try_get("timeout_after_ms")?,
        priority: row
            .try_get::<_, Option<&str>>("priority")?
            .map(|name| named(Priority::ALL, Priority::name, name))
            .transpose()?,
        progress: progress(row)?,
        starts: starts::starts(row)?,
    }))
}

fn progress(row: &Row) -> anyhow::Result<Option<Progress>> {
    let Some(fraction) = row.try_get("progress")? else {
        return Ok(None);
    };
    let message: Option<String> = row.try_get("progress_message")?;
    Ok(Some(Progress {
        fraction,
        message: message.unwrap_or_default(),
        at: row.try_get("progress_at")?,
    }))
}

fn ended(row: &Row) -> anyhow::Result<Option<Ended>> {
    let Some(outcome) = row.try_get::<_, Option<&str>>("outcome")? else {
        return Ok(None);
    };
    Ok(Some(Ended {
        outcome: named(Outcome::ALL, Outcome::name, outcome)?,
        workflow_type: row.try_get("ended_workflow_type")?,
        reference: row.try_get("ended_job_reference")?,
        task_id: row.try_get("ended_celery_id")?,
        registered_at: row.try_get("ended_registered_at")?,
        submitted_at: row.try_get("ended_submitted_at")?,
        running_at: row.try_get("ended_running_at")?,
        finished_at: row.try_get("finished_at")?,
        starts: row.try_get("starts")?,
        start_ids: starts::ids_from_text(row.try_get("start_ids")?),
        result_bytes: row.try_get("result_bytes")?,
    }))
}

/// Which of `all` a text of the database names.
fn named<T: Copy>(all: &[T], name_of: fn(T) -> &'static str, name: &str) -> anyhow::Result<T> {
    let mut all = all.iter().copied();
    all.find(|one| name_of(*one) == name)
        .ok_or_else(|| anyhow!("{name:?} is none of what may be here"))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::domain::job;

    #[rstest]
    #[case::status(|job: &mut Job| job.status = JobStatus::Running, false)]
    #[case::task(|job: &mut Job| job.task_id = Some("task".to_owned()), false)]
    #[case::submission(|job: &mut Job| job.submitted_at = Some(job.registered_at), false)]
    #[case::running(|job: &mut Job| job.running_at = Some(job.registered_at), false)]
    #[case::timeout(|job: &mut Job| job.timeout_ms = Some(1), false)]
    #[case::priority(|job: &mut Job| job.priority = Some(Priority::High), false)]
    #[case::starts(|job: &mut Job| job.starts.push(Start {
        at: job.registered_at,
        message_id: None,
        verdict: job::Verdict::Counts,
    }), true)]
    #[case::progress(|job: &mut Job| job.progress = Some(Progress {
        fraction: 0.5,
        message: String::new(),
        at: job.registered_at,
    }), true)]
    fn a_row_is_written_when_a_field_of_it_changes(
        #[case] change: fn(&mut Job),
        #[case] stays: bool,
    ) {
        let before = Job {
            workflow_type: "a workflow".to_owned(),
            reference: String::new(),
            status: JobStatus::Registered,
            task_id: None,
            registered_at: Timestamp::UNIX_EPOCH,
            submitted_at: None,
            running_at: None,
            timeout_ms: None,
            priority: None,
            starts: Vec::new(),
            progress: None,
        };
        let mut after = before.clone();
        change(&mut after);
        assert_eq!(same_row(&before, &after), stays);
    }
}
