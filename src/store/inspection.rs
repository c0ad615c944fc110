//! A look at a database that may be anybody's, which changes nothing.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::migrate::{self, REVISIONS};
use super::{Connection, StoreError};

/// What is known of a database.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Inspection {
    /// How many revisions it has, or why that is not known.
    pub revision: Option<Result<usize, String>>,
    /// Rights that this user lacks, each with what for.
    pub missing_rights: Vec<String>,
    pub clock: Option<Timestamp>,
    /// Jobs that wait, and others, by workflow.
    pub waiting: BTreeMap<String, i64>,
    /// The longest timeout of a job that has not ended, in milliseconds.
    pub longest_timeout_ms: Option<i64>,
    /// How long jobs have run at most, in milliseconds, in the history.
    pub longest_run_ms: Option<i64>,
    pub largest_result: Option<i64>,
}

/// Tables and what is done to them.
const TABLES: [&str; 5] = [
    "job",
    "job_starts",
    "job_history",
    "esdl_time_series_info",
    "maintenance_run",
];

impl Connection {
    /// # Errors
    /// The connection is lost, or a look was refused that everybody may have.
    pub fn inspect(&mut self) -> Result<Inspection, StoreError> {
        let mut inspection = Inspection::default();
        self.client.batch_execute("SET statement_timeout = '10s'")?;
        let revision = self.revisions(migrate::current);
        let at_head = matches!(revision, Ok(applied) if applied == REVISIONS.len());
        inspection.revision = Some(revision.map_err(|error| format!("{error:#}")));
        let row = self.client.query_one(
            "SELECT clock_timestamp() AS clock,
                    coalesce(has_schema_privilege(current_schema(), 'CREATE'), false) AS create",
            &[],
        )?;
        inspection.clock = Some(row.get("clock"));
        if !row.get::<_, bool>("create") {
            let missing = "CREATE on the schema, for revisions of the tables";
            inspection.missing_rights.push(missing.to_owned());
        }
        let rows = self.client.query(
            "SELECT name, privilege
             FROM unnest($1::text[]) AS name,
                  unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) AS privilege
             WHERE to_regclass(name) IS NOT NULL AND NOT has_table_privilege(name, privilege)",
            &[&TABLES.as_slice()],
        )?;
        for row in rows {
            let (table, privilege): (&str, &str) = (row.get(0), row.get(1));
            inspection
                .missing_rights
                .push(format!("{privilege} on {table}"));
        }
        let readable = !inspection
            .missing_rights
            .iter()
            .any(|right| right.starts_with("SELECT"));
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
}
