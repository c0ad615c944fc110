//! What is kept of jobs for a while, compressed: output ESDLs that no client has taken, and what clients
//! submitted.

use std::borrow::Cow;
use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{Context, anyhow};
use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use postgres::types::ToSql;
use uuid::Uuid;

use super::{Connection, StoreError, Transaction};
use crate::domain::overview::Delivery;

/// What one row may have, compressed: Postgres takes no more than 1 GiB in a message, and a handler's
/// memory is bounded as well.
const MAX_COMPRESSED: usize = 64 * 1024 * 1024;

/// An output ESDL that its client does not take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptResult<'a> {
    pub job_id: Uuid,
    pub esdl: Cow<'a, str>,
}

/// What a job was submitted with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptSubmission {
    pub message: Vec<u8>,
    /// Whose it was, where the message has said so.
    pub sender: Option<String>,
}

/// In a handler's thread, so the fastest level: it makes a sixth of an ESDL, the best one a ninth.
fn compressed(content: &[u8]) -> Result<Vec<u8>, StoreError> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    let done = encoder.write_all(content).and_then(|()| encoder.finish());
    // Into memory nothing fails.
    done.map_err(|error| StoreError::Refused(error.to_string()))
}

/// The content of so many bytes.
fn decompressed(compressed: &[u8], bytes: i64) -> anyhow::Result<Vec<u8>> {
    let bytes = u64::try_from(bytes).context("a negative size")?;
    let mut content = Vec::new();
    // What is longer than it says is not what was written.
    ZlibDecoder::new(compressed)
        .take(bytes.saturating_add(1))
        .read_to_end(&mut content)?;
    match u64::try_from(content.len()) == Ok(bytes) {
        true => Ok(content),
        false => Err(anyhow!("it has not the {bytes} bytes that it should have")),
    }
}

impl Connection {
    /// Notes that the results of these jobs are not in their clients' queues.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn note_deliveries(&mut self, deliveries: &[(Uuid, Delivery)]) -> Result<(), StoreError> {
        let ids: Vec<_> = deliveries.iter().map(|(id, _)| *id).collect();
        let names = deliveries.iter().map(|(_, delivery)| delivery.name());
        let names: Vec<_> = names.collect();
        self.client.execute(
            "UPDATE job_story SET delivery = new.delivery
             FROM unnest($1::uuid[], $2::varchar[]) AS new (job_id, delivery)
             WHERE job_story.job_id = new.job_id",
            &[&ids, &names],
        )?;
        Ok(())
    }

    /// Keeps these, in place of what is kept of the same jobs. Returns those that are too large.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn keep_results(&mut self, results: &[KeptResult<'_>]) -> Result<Vec<Uuid>, StoreError> {
        let mut too_large = Vec::new();
        // One at a time: there are few, and each may be large.
        for result in results {
            let esdl = compressed(result.esdl.as_bytes())?;
            if esdl.len() > MAX_COMPRESSED {
                too_large.push(result.job_id);
                continue;
            }
            let bytes = i64::try_from(result.esdl.len()).unwrap_or(i64::MAX);
            let values: [&(dyn ToSql + Sync); 3] = [&result.job_id, &bytes, &esdl];
            self.client.execute(
                "INSERT INTO job_result (job_id, kept_at, bytes, esdl)
                 VALUES ($1, clock_timestamp(), $2, $3)
                 ON CONFLICT (job_id) DO UPDATE
                 SET kept_at = excluded.kept_at, bytes = excluded.bytes, esdl = excluded.esdl",
                &values,
            )?;
        }
        Ok(too_large)
    }

    /// The output ESDL of a job, if it is kept.
    ///
    /// # Errors
    /// The connection is lost, or it is not what was written.
    pub fn kept_result(&mut self, job_id: Uuid) -> Result<Option<String>, StoreError> {
        let rows = self.client.query(
            "SELECT bytes, esdl FROM job_result WHERE job_id = $1",
            &[&job_id],
        )?;
        let Some(row) = rows.first() else {
            return Ok(None);
        };
        let (bytes, esdl): (i64, &[u8]) = (row.get("bytes"), row.get("esdl"));
        let read = decompressed(esdl, bytes).and_then(|esdl| Ok(String::from_utf8(esdl)?));
        let read = read
            .map_err(|error| StoreError::Refused(format!("the result of job {job_id}: {error:#}")));
        read.map(Some)
    }

    /// Deletes what has been kept for so long, or is of a job that is not known any more; at most `limit`.
    /// Returns how many.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn forget_results(&mut self, kept: Duration, limit: i64) -> Result<u64, StoreError> {
        Ok(self.client.execute(
            "DELETE FROM job_result WHERE job_id IN (
                 SELECT job_id FROM job_result
                 WHERE kept_at <= clock_timestamp() - $1 * interval '1 second'
                 ORDER BY kept_at LIMIT $2)",
            &[&kept.as_secs_f64(), &limit],
        )?)
    }

    /// What a job was submitted with, if it is kept.
    ///
    /// # Errors
    /// The connection is lost, or it is not what was written.
    pub fn kept_submission(&mut self, job_id: Uuid) -> Result<Option<KeptSubmission>, StoreError> {
        let rows = self.client.query(
            "SELECT bytes, message, sender FROM job_submission WHERE job_id = $1",
            &[&job_id],
        )?;
        let Some(row) = rows.first() else {
            return Ok(None);
        };
        let (bytes, message): (i64, &[u8]) = (row.get("bytes"), row.get("message"));
        let read = decompressed(message, bytes).map_err(|error| {
            StoreError::Refused(format!("the submission of job {job_id}: {error:#}"))
        });
        Ok(Some(KeptSubmission {
            message: read?,
            sender: row.get("sender"),
        }))
    }

    /// The same as [`Connection::forget_results`] of submissions, but for those of jobs that have not
    /// ended.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn forget_submissions(&mut self, kept: Duration, limit: i64) -> Result<u64, StoreError> {
        Ok(self.client.execute(
            "DELETE FROM job_submission WHERE job_id IN (
                 SELECT job_id FROM job_submission AS kept
                 WHERE kept_at <= clock_timestamp() - $1 * interval '1 second'
                   AND NOT EXISTS (SELECT FROM job WHERE job.job_id = kept.job_id)
                 ORDER BY kept_at LIMIT $2)",
            &[&kept.as_secs_f64(), &limit],
        )?)
    }
}

impl Transaction<'_> {
    /// Deletes what is kept of these jobs, which their clients have given up.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn forget_kept(&mut self, job_ids: &[Uuid]) -> Result<(), StoreError> {
        self.execute(
            "WITH results AS (DELETE FROM job_result WHERE job_id = ANY($1))
             DELETE FROM job_submission WHERE job_id = ANY($1)",
            &[&job_ids],
        )?;
        Ok(())
    }

    /// Keeps the messages by which these jobs were submitted, each with its sender. Returns those that are too large.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn keep_submissions(
        &mut self,
        submissions: &[(Uuid, &[u8], Option<&str>)],
    ) -> Result<Vec<Uuid>, StoreError> {
        let (mut ids, mut sizes, mut messages) = (Vec::new(), Vec::new(), Vec::new());
        let mut senders = Vec::new();
        let mut too_large = Vec::new();
        for (job_id, message, sender) in submissions {
            let small = compressed(message)?;
            if small.len() > MAX_COMPRESSED {
                too_large.push(*job_id);
                continue;
            }
            ids.push(*job_id);
            sizes.push(i64::try_from(message.len()).unwrap_or(i64::MAX));
            messages.push(small);
            // Postgres takes no NUL.
            senders.push(sender.map(|sender| sender.replace('\0', "")));
        }
        self.execute(
            "INSERT INTO job_submission (job_id, kept_at, bytes, message, sender)
             SELECT job_id, clock_timestamp(), bytes, message, sender
             FROM unnest($1::uuid[], $2::bigint[], $3::bytea[], $4::varchar[])
                  AS new (job_id, bytes, message, sender)
             ON CONFLICT (job_id) DO UPDATE
             SET kept_at = excluded.kept_at, bytes = excluded.bytes, message = excluded.message,
                 sender = excluded.sender",
            &[&ids, &sizes, &messages, &senders],
        )?;
        Ok(too_large)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::nothing(&[])]
    #[case::something("<esdl/>".as_bytes())]
    #[case::much(&[b'x'; 1_000_000])]
    fn what_is_compressed_comes_back(#[case] content: &[u8]) {
        let small = compressed(content).unwrap();
        let bytes = i64::try_from(content.len()).unwrap();
        assert_eq!(decompressed(&small, bytes).unwrap(), content);
        // More or less than it says, or cut off.
        assert!(decompressed(&small, bytes + 1).is_err());
        assert!(decompressed(&small, bytes - 1).is_err());
        assert!(bytes == 0 || decompressed(&small[..small.len() / 2], bytes).is_err());
    }
}
