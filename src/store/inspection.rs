//! Inspects a database, possibly somebody else's, without changing anything.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::connect::unwritable;
use super::migrate::{self, REVISIONS};
use super::rights::{self, Lack};
use super::{Connection, StoreError};

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
    pub settings: Settings,
    /// Jobs that wait, and others, by workflow.
    pub waiting: BTreeMap<String, i64>,
    /// The longest timeout of a job that has not ended, in milliseconds.
    pub longest_timeout_ms: Option<i64>,
    /// The longest running time in the history, in milliseconds.
    pub longest_run_ms: Option<i64>,
    pub largest_result: Option<i64>,
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
        if at_head && readable {
            let rows = self.client.query(
                "SELECT workflow_type, count(*) FILTER (WHERE status <> 'RUNNING') FROM job
                 GROUP BY workflow_type",
                &[],
            )?;
            inspection.waiting = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
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
