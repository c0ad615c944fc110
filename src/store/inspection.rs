//! Inspects a database, possibly somebody else's, without changing anything.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};

use super::connect::unwritable;
use super::migrate::{self, REVISIONS};
use super::rights::{self, Lack};
use super::{Connection, Sign, StoreError};
use crate::domain::switch::InFlight;

/// What is known of a database.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Inspection {
    /// How many revisions it has, or why that is not known.
    pub revision: Option<Result<usize, String>>,
    /// Why it takes no writes, if it takes none.
    pub unwritable: Option<String>,
    /// What this user lacks to work with the tables, and to upgrade them.
    pub lacks_to_work: Vec<Lack>,
    pub lacks_to_upgrade: Vec<Lack>,
    pub clock: Option<Timestamp>,
    /// Whether the tables are this program's, and may be read.
    pub is_usable: bool,
    /// The replicas that have a session with RabbitMQ.
    pub replicas: Vec<Replica>,
    pub settings: Settings,
    /// Jobs that wait, and others, by workflow.
    pub waiting: BTreeMap<String, i64>,
    /// Tasks that are handed over, wanted and not started: by workflow, and by the task of the job's step
    /// where it has several.
    pub handed_over: BTreeMap<(String, Option<String>), i64>,
    /// The longest timeout of a job that has not ended, in milliseconds.
    pub longest_timeout_ms: Option<i64>,
    /// The longest running time in the history, in milliseconds.
    pub longest_run_ms: Option<i64>,
    pub largest_result: Option<i64>,
}

/// A replica, by the connection on which it shows its presence, and which it uses every second.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replica {
    /// From which address, if this user may see that.
    pub from: Option<String>,
    /// For how long it has not used it.
    pub still_for: SignedDuration,
}

/// The jobs of a workflow that wait for anything but to be released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitingJobs {
    pub count: i64,
    /// Since when the oldest does.
    pub since: Timestamp,
}

/// Settings of the server, role or database that may matter.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settings {
    /// synchronous_commit, if the service did not set it.
    pub synchronous_commit: String,
    pub fsync: bool,
    pub full_page_writes: bool,
    /// The capacity of the lock table.
    pub locks: Option<i64>,
}

impl Connection {
    /// # Errors
    /// The connection is lost, or a query that everybody may do was refused.
    pub fn inspect(&mut self) -> Result<Inspection, StoreError> {
        let mut inspection = Inspection::default();
        if !self.client.is_pooled() {
            self.client.batch_execute("SET statement_timeout = '10s'")?;
        }
        let revision = self.revisions(migrate::current);
        let at_head = matches!(revision, Ok(applied) if applied == REVISIONS.len());
        inspection.revision = Some(revision.map_err(|error| format!("{error:#}")));
        let row = self
            .client
            .query_one("SELECT clock_timestamp() AS clock", &[])?;
        inspection.clock = Some(row.get("clock"));
        inspection.settings = self.settings()?;
        inspection.unwritable = self.client.query_with(unwritable)?;
        inspection.lacks_to_work = self.client.query_with(rights::to_work)?;
        inspection.lacks_to_upgrade = self.client.query_with(rights::to_upgrade)?;
        let readable = !inspection
            .lacks_to_work
            .iter()
            .any(|lack| lack.what.starts_with("SELECT"));
        inspection.is_usable = at_head && readable;
        if inspection.is_usable {
            inspection.replicas = self.replicas()?;
            let rows = self.client.query(
                "SELECT workflow_type, count(*) FILTER (WHERE status <> 'RUNNING') FROM job
                 GROUP BY workflow_type",
                &[],
            )?;
            inspection.waiting = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
            inspection.handed_over = self.handed_over()?;
            let row = self.client.query_one(
                "SELECT (SELECT max(timeout_after_ms) FROM job),
                        (SELECT max(extract(epoch FROM finished_at - running_at) * 1000)::bigint
                         FROM job_history),
                        (SELECT max(result_bytes) FROM job_history)",
                &[],
            )?;
            inspection.longest_timeout_ms = row.get(0);
            inspection.longest_run_ms = row.get(1);
            inspection.largest_result = row.get(2);
        }
        Ok(inspection)
    }

    /// As [`Connection::look_around`] sees them. One that waits for an answer does not stand still.
    fn replicas(&mut self) -> Result<Vec<Replica>, StoreError> {
        let (class, presence) = Sign::Presence.lock();
        let rows = self.client.query(
            "SELECT host(client_addr),
                    CASE WHEN state = 'active' THEN 0
                         ELSE coalesce(extract(epoch FROM clock_timestamp() - state_change), 0)
                    END::float8
             FROM pg_locks JOIN pg_stat_activity AS session USING (pid)
             WHERE locktype = 'advisory' AND objsubid = 2 AND classid::bigint = $1::integer
               AND objid::bigint = $2::integer AND datname = current_database() AND database = datid
             ORDER BY 1, 2",
            &[&class, &presence],
        )?;
        let replica = |row: &postgres::Row| Replica {
            from: row.get(0),
            still_for: SignedDuration::try_from_secs_f64(row.get(1)).unwrap_or_default(),
        };
        Ok(rows.iter().map(replica).collect())
    }

    /// Writes as the service does, and takes it back.
    ///
    /// # Errors
    /// It would not be taken: the disk is full, the tables are locked, or the connection is lost.
    pub fn try_writing(&mut self) -> Result<(), StoreError> {
        let mut transaction = self.transaction()?;
        transaction.check_tables()?;
        transaction.execute(
            "WITH written AS (
                 INSERT INTO job (job_id, workflow_type, status, registered_at)
                 VALUES (gen_random_uuid(), '', 'REGISTERED', now()) RETURNING job_id
             )
             INSERT INTO job_history (job_id, finished_at, starts, outcome, result_bytes)
             SELECT job_id, now(), 0, 'CANCELLED', 0 FROM written",
            &[],
        )?;
        // Where there is room for a row there may be none for a result. A table of its own finds none that
        // another has left behind.
        let may = "SELECT has_database_privilege(current_database(), 'TEMPORARY')";
        if transaction
            .query(may, &[])?
            .first()
            .is_some_and(|row| row.get(0))
        {
            transaction.execute("SET LOCAL temp_tablespaces = ''", &[])?;
            transaction.execute(
                "CREATE TEMPORARY TABLE omotes_doctor ON COMMIT DROP AS
                 SELECT repeat('x', 1000) AS filling FROM generate_series(1, 1000)",
                &[],
            )?;
        }
        Ok(())
    }

    fn handed_over(&mut self) -> Result<BTreeMap<(String, Option<String>), i64>, StoreError> {
        let rows = self.client.query(
            "SELECT workflow_type, step.task, count(*)
             FROM job LEFT JOIN LATERAL (
                 SELECT task, job_step.submitted_at IS NOT NULL AND started_at IS NULL
                              AND finished_at IS NULL AS waits
                 FROM job_step
                 WHERE job_step.job_id = job.job_id ORDER BY number DESC, attempt DESC LIMIT 1
             ) AS step ON true
             WHERE status <> 'REGISTERED' AND coalesce(step.waits, status = 'SUBMITTED')
               AND NOT EXISTS (SELECT FROM job_history WHERE job_history.job_id = job.job_id)
             GROUP BY 1, 2",
            &[],
        )?;
        let key = |row: &postgres::Row| ((row.get(0), row.get(1)), row.get(2));
        Ok(rows.iter().map(key).collect())
    }

    /// By workflow, without those on hold: they wait for as long as somebody wants.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn waiting_jobs(&mut self) -> Result<BTreeMap<String, WaitingJobs>, StoreError> {
        let rows = self.client.query(
            "SELECT workflow_type, count(*), min(coalesce(submitted_at, registered_at)) FROM job
             WHERE status <> 'RUNNING'
               AND NOT EXISTS (SELECT FROM job_turn AS turn
                               WHERE turn.job_id = job.job_id AND granted_at IS NULL AND on_hold)
             GROUP BY workflow_type",
            &[],
        )?;
        let waiting = rows.iter().map(|row| {
            let (count, since) = (row.get(1), row.get(2));
            (row.get(0), WaitingJobs { count, since })
        });
        Ok(waiting.collect())
    }

    /// Whether a job has ended for good: its client knows, and whatever comes of it is ignored.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn has_ended(&mut self, job_id: uuid::Uuid) -> Result<bool, StoreError> {
        let row = self.client.query_one(
            "SELECT EXISTS (SELECT FROM job_history WHERE job_id = $1)
                    AND NOT EXISTS (SELECT FROM job WHERE job_id = $1)",
            &[&job_id],
        )?;
        Ok(row.get(0))
    }

    /// Also of tables that this program has not upgraded.
    ///
    /// # Errors
    /// The connection is lost, or this user may not read the tables.
    pub fn in_flight(&mut self) -> Result<InFlight, StoreError> {
        let row = self.client.query_one(
            "SELECT to_regclass('job') IS NOT NULL, to_regclass('job_history') IS NOT NULL,
                    to_regclass('job_input') IS NOT NULL, to_regclass('job_turn') IS NOT NULL",
            &[],
        )?;
        let (jobs, history, steps): (bool, bool, bool) = (row.get(0), row.get(1), row.get(2));
        let turns: bool = row.get(3);
        let mut found = InFlight::default();
        if jobs {
            found.by_state = match turns {
                true => self.counts(
                    "SELECT CASE WHEN on_hold THEN 'on hold' WHEN on_hold IS NOT NULL THEN 'held'
                                 WHEN status = 'REGISTERED' THEN 'registered'
                                 WHEN status = 'SUBMITTED' THEN 'waiting'
                                 ELSE lower(status::text) END,
                            count(*)
                     FROM job LEFT JOIN job_turn AS turn
                         ON turn.job_id = job.job_id AND granted_at IS NULL
                     GROUP BY 1",
                )?,
                false => self.counts(
                    "SELECT CASE status WHEN 'SUBMITTED' THEN 'waiting' ELSE lower(status::text) END,
                            count(*)
                     FROM job GROUP BY 1",
                )?,
            };
            found.without_task = found.by_state.get("registered").copied().unwrap_or(0);
            found.by_workflow =
                self.counts("SELECT workflow_type, count(*) FROM job GROUP BY 1")?;
        }
        if jobs && steps {
            // One of a plain task has a row if it had to wait for its turn.
            found.with_steps = self.counts(
                "SELECT workflow_type, count(*) FROM job JOIN job_input USING (job_id)
                 WHERE steps::jsonb
                       <> jsonb_build_array(jsonb_build_object('task', workflow_type))
                 GROUP BY 1",
            )?;
        }
        if jobs && turns {
            let row = self.client.query_one(
                "SELECT count(*) FILTER (WHERE granted_at IS NULL),
                        count(*) FILTER (WHERE granted_at IS NOT NULL AND status = 'REGISTERED')
                 FROM job JOIN job_turn USING (job_id)",
                &[],
            )?;
            found.held = row.get(0);
            found.without_task -= row.get::<_, i64>(1);
        }
        if jobs && history {
            let row = self.client.query_one(
                "SELECT count(*) FROM job JOIN job_history USING (job_id)",
                &[],
            )?;
            found.untold = row.get(0);
        }
        Ok(found)
    }

    fn counts(&mut self, sql: &str) -> Result<BTreeMap<String, i64>, StoreError> {
        let rows = self.client.query(sql, &[])?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    fn settings(&mut self) -> Result<Settings, StoreError> {
        let row = self.client.query_one(
            "SELECT (SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit'),
                    current_setting('fsync')::boolean,
                    current_setting('full_page_writes')::boolean,
                    current_setting('max_locks_per_transaction')::bigint
                    * (current_setting('max_connections')::bigint
                       + current_setting('max_prepared_transactions')::bigint)",
            &[],
        )?;
        Ok(Settings {
            synchronous_commit: row.get(0),
            fsync: row.get(1),
            full_page_writes: row.get(2),
            locks: row.get(3),
        })
    }
}
