//! The guard rows: which time series are in use.

use jiff::Timestamp;

use super::{Connection, StoreError};
use crate::domain::time_series::Guard;

impl Connection {
    /// All guard rows.
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

    /// The database's time, and since when the longest-running job has been running.
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

    /// Records that nobody has claimed these series so far. Rows that exist are left alone.
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

    /// Deletes the row of retired series, if they still are, after `drop` has deleted the series
    /// themselves. Nobody can claim them meanwhile. Returns whether there was such a row.
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

    /// Marks series as in use, or as retired from now on. Returns whether there is a row for them.
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
}
