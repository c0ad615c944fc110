//! How much was done and waited lately, for the page's charts.

use jiff::Timestamp;

use super::rows::named;
use super::{Connection, StoreError};
use crate::domain::activity::{Activity, Counted, WIDTH};
use crate::domain::job::Outcome;

impl Connection {
    /// What was done and what waited in the day before `now`.
    ///
    /// # Errors
    /// The connection is lost, or this takes too long.
    pub fn activity(&mut self, now: Timestamp) -> Result<Activity, StoreError> {
        let begin = Activity::begin(now);
        // One that has ended and whose client has not been told is there twice, for a moment.
        let rows = self.client.query(
            "WITH ended AS MATERIALIZED (
                 SELECT registered_at, running_at, finished_at, outcome
                 FROM job_history WHERE finished_at >= $1
             ), waits AS (
                 SELECT registered_at AS begun, coalesce(running_at, finished_at) AS until FROM ended
                 WHERE registered_at IS NOT NULL
                 UNION ALL
                 SELECT registered_at, running_at FROM job WHERE registered_at IS NOT NULL
             ), changes AS (
                 SELECT begun AS at, 1 AS change, NULL::varchar AS outcome FROM waits
                 UNION ALL
                 SELECT until, -1, NULL FROM waits WHERE until IS NOT NULL
                 UNION ALL
                 SELECT finished_at, 1, outcome FROM ended
             )
             SELECT greatest(-1, floor(extract(epoch FROM at - $1)::float8 / $2))::int AS number,
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
}
