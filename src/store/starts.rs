//! The starts of jobs, and the sessions with RabbitMQ that some of them are excused by.

use jiff::Timestamp;
use postgres::Row;
use uuid::Uuid;

use super::{Connection, StoreError, Transaction, expect_rows};
use crate::domain::job::{Start, Suspicion, Verdict};

impl Connection {
    /// Records that a session with RabbitMQ begins now: any earlier connection may have been lost.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn session_begins(&mut self) -> Result<(), StoreError> {
        self.client.execute(
            "INSERT INTO broker_session (begun_at) VALUES (clock_timestamp())
             ON CONFLICT (singleton) DO UPDATE SET begun_at = excluded.begun_at",
            &[],
        )?;
        Ok(())
    }

    /// Starts about which the workers are to be asked, at most `limit`.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn suspicions(&mut self, limit: i64) -> Result<Vec<Suspicion>, StoreError> {
        let rows = self.client.query(
            "SELECT job_id, celery_id, started_at FROM job_starts JOIN job USING (job_id)
             WHERE verdict = 'SUSPECTED' AND celery_id IS NOT NULL
             ORDER BY started_at
             LIMIT $1",
            &[&limit],
        )?;
        rows.iter()
            .map(|row| {
                Ok(Suspicion {
                    job_id: row.try_get("job_id")?,
                    task_id: row.try_get("celery_id")?,
                    at: row.try_get("started_at")?,
                })
            })
            .collect()
    }
}

impl Transaction<'_> {
    /// Deletes the starts of these jobs' earlier tasks.
    pub(super) fn forget_starts(&mut self, job_ids: &[Uuid]) -> Result<(), StoreError> {
        if !job_ids.is_empty() {
            let sql = "DELETE FROM job_starts WHERE job_id = ANY($1)";
            self.execute(sql, &[&job_ids])?;
        }
        Ok(())
    }

    pub(super) fn insert_starts(&mut self, starts: &[(Uuid, &Start)]) -> Result<(), StoreError> {
        if starts.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = starts.iter().map(|(id, _)| id).collect();
        let times: Vec<_> = starts.iter().map(|(_, start)| start.at).collect();
        let messages: Vec<_> = starts.iter().map(|(_, start)| &start.message_id).collect();
        let verdicts = starts.iter().map(|(_, start)| start.verdict.name());
        let verdicts: Vec<_> = verdicts.collect();
        self.execute(
            "INSERT INTO job_starts (job_id, started_at, message_id, verdict)
             SELECT * FROM unnest($1::uuid[], $2::timestamptz[], $3::varchar[], $4::varchar[])",
            &[&ids, &times, &messages, &verdicts],
        )?;
        Ok(())
    }

    /// Writes the verdicts on starts that were suspected.
    pub(super) fn judge_starts(&mut self, starts: &[(Uuid, &Start)]) -> Result<(), StoreError> {
        if starts.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = starts.iter().map(|(id, _)| id).collect();
        let times: Vec<_> = starts.iter().map(|(_, start)| start.at).collect();
        let verdicts = starts.iter().map(|(_, start)| start.verdict.name());
        let verdicts: Vec<_> = verdicts.collect();
        let rows = self.execute(
            "UPDATE job_starts SET verdict = new.verdict
             FROM unnest($1::uuid[], $2::timestamptz[], $3::varchar[])
                  AS new (job_id, started_at, verdict)
             WHERE job_starts.job_id = new.job_id AND job_starts.started_at = new.started_at
               AND job_starts.verdict = 'SUSPECTED'",
            &[&ids, &times, &verdicts],
        )?;
        expect_rows("judging starts", rows, starts.len())
    }
}

/// A job's starts, which the query returns as one array for each column.
pub(super) fn starts(row: &Row) -> anyhow::Result<Vec<Start>> {
    let times: Option<Vec<Timestamp>> = row.try_get("started_at")?;
    let messages: Option<Vec<Option<String>>> = row.try_get("message_id")?;
    let verdicts: Option<Vec<Option<&str>>> = row.try_get("verdict")?;
    let messages = messages.unwrap_or_default();
    let verdicts = verdicts.unwrap_or_default();
    let starts = times.unwrap_or_default().into_iter();
    Ok(starts
        .zip(messages)
        .zip(verdicts)
        .map(|((at, message_id), verdict)| {
            // A verdict of a later version counts as no excuse; the job must remain readable.
            let excused = Verdict::NAMED.iter().find(|one| one.name() == verdict);
            Start {
                at,
                message_id,
                verdict: excused.copied().unwrap_or(Verdict::Counts),
            }
        })
        .collect())
}

/// As the history has them.
pub(super) fn ids_to_text(ids: &[String]) -> Option<String> {
    serde_json::to_string(ids).ok()
}

/// None if it is no such list, as in rows of earlier versions.
pub(super) fn ids_from_text(text: Option<&str>) -> Vec<String> {
    text.and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default()
}
