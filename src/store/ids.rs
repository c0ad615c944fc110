//! Which jobs an operator may mean by the beginning of an id.

use uuid::Uuid;

use super::{Connection, StoreError};
use crate::domain::overview::JobName;

impl Connection {
    /// The ids of the jobs that begin so, whether they have ended or not, each with the job's
    /// reference; at most `limit`.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn jobs_named(
        &mut self,
        name: &JobName,
        limit: i64,
    ) -> Result<Vec<(Uuid, String)>, StoreError> {
        let (first, last) = name.range();
        // In the order of the key, so that no more is read than is asked for.
        let rows = self.client.query(
            "SELECT job_id, max(reference) FROM (
                 (SELECT job_id, left(job_reference, 300) AS reference FROM job
                  WHERE job_id BETWEEN $1 AND $2 ORDER BY job_id LIMIT $3)
                 UNION ALL
                 (SELECT job_id, left(job_reference, 300) FROM job_history
                  WHERE job_id BETWEEN $1 AND $2 ORDER BY job_id LIMIT $3)
             ) AS found GROUP BY job_id ORDER BY job_id LIMIT $3",
            &[&first, &last, &limit],
        )?;
        let reference = |row: &postgres::Row| row.get::<_, Option<String>>(1).unwrap_or_default();
        Ok(rows
            .iter()
            .map(|row| (row.get(0), reference(row)))
            .collect())
    }
}
