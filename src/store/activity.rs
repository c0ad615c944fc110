//! How much was done and waited lately, for the page's charts.

use jiff::Timestamp;

use super::rows::named;
use super::{Connection, StoreError};
use crate::domain::activity::{Activity, Counted, Sizes, WIDTH};
use crate::domain::job::Outcome;

impl Connection {
    /// What was done and what waited in the day before `now`.
    ///
    /// # Errors
    /// The connection is lost, or this takes too long.
    pub fn activity(&mut self, now: Timestamp) -> Result<Activity, StoreError> {
        let begin = Activity::begin(now);
        // One that has ended and whose client has not been told is there twice, for a moment. Rows are
        // read once, and counted before anything else is done with them: there may be very many.
        let rows = self.client.query(
            "WITH ended AS MATERIALIZED (
                 SELECT date_bin(width, registered_at, $1) AS begun,
                        date_bin(width, coalesce(running_at, finished_at), $1) AS until,
                        date_bin(width, finished_at, $1) AS finished, outcome, count(*) AS count
                 FROM job_history, (SELECT $2::float8 * interval '1 second') AS bin (width)
                 WHERE finished_at >= $1 GROUP BY 1, 2, 3, 4
             ), waits AS (
                 SELECT begun, until, count FROM ended WHERE begun IS NOT NULL
                 UNION ALL
                 SELECT date_bin(width, registered_at, $1), date_bin(width, running_at, $1), count(*)
                 FROM job, (SELECT $2::float8 * interval '1 second') AS bin (width)
                 WHERE registered_at IS NOT NULL GROUP BY 1, 2
             ), changes AS (
                 SELECT begun AS at, count AS change, NULL::varchar AS outcome FROM waits
                 UNION ALL
                 SELECT until, -count, NULL FROM waits WHERE until IS NOT NULL
                 UNION ALL
                 SELECT finished, count, outcome FROM ended
             )
             SELECT greatest(-1, round(date_part('epoch', at - $1) / $2))::int AS number,
                    outcome, sum(change)::bigint AS change
             FROM changes GROUP BY 1, 2",
            &[&begin, &WIDTH.as_secs_f64()],
        )?;
        let counted = |row: &postgres::Row| {
            let outcome: Option<&str> = row.try_get("outcome")?;
            let change = row.try_get("change")?;
            let counted = match outcome {
                Some(outcome) => {
                    Counted::Ended(named(Outcome::ALL, Outcome::name, outcome)?, change)
                }
                None => Counted::Waiting(change),
            };
            Ok((row.try_get("number")?, counted))
        };
        let rows: anyhow::Result<Vec<_>> = rows.iter().map(counted).collect();
        Ok(Activity::new(begin, &rows.map_err(StoreError::Transient)?))
    }

    /// How much room it all takes.
    ///
    /// # Errors
    /// The connection is lost, or this takes too long.
    pub fn sizes(&mut self) -> Result<Sizes, StoreError> {
        const TOLD: i64 = 3;
        let rows = self.client.query(
            "SELECT relname::text, pg_total_relation_size(oid),
                    pg_database_size(current_database())
             FROM pg_class
             WHERE relkind = 'r'
               AND relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'job'::regclass)
             ORDER BY 2 DESC, 1 LIMIT $1",
            &[&TOLD],
        )?;
        Ok(Sizes {
            database: rows.first().map_or(0, |row| row.get(2)),
            tables: rows.iter().map(|row| (row.get(0), row.get(1))).collect(),
        })
    }
}
