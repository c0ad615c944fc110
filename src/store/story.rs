//! What the story of a job is told from: `job_story` has a row for each job that has ended, deleted with
//! that in `job_history`.

use jiff::Timestamp;
use postgres::Row;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use uuid::Uuid;

use super::rows::{named, progress};
use super::steps::{messages_from_text, messages_to_text};
use super::{Connection, StoreError};
use crate::domain::job::{Ended, Origin, Priority, Start, Verdict};
use crate::domain::overview::{
    AttemptView, Delivery, Filter, Kept, Rows, Seen, Story, Whereabouts,
};

/// What the story keeps of jobs that have ended by column, for `unnest`.
#[derive(Default)]
pub(super) struct ToldColumns<'a> {
    pub(super) starts: Vec<Option<String>>,
    pub(super) by: Vec<Option<String>>,
    pub(super) logs: Vec<Option<&'a str>>,
    pub(super) messages: Vec<Option<String>>,
    pub(super) keeps_progress: Vec<bool>,
}

impl<'a> ToldColumns<'a> {
    pub(super) fn of(jobs: &[(Uuid, &'a Ended)]) -> ToldColumns<'a> {
        let mut columns = ToldColumns::default();
        for (_, job) in jobs {
            let told = job.told.as_deref();
            let starts = told.map(|told| starts_to_text(&told.starts));
            columns.starts.push(starts.filter(|text| text != "[]"));
            let by = told.and_then(|told| told.by.as_ref());
            columns.by.push(by.map(|origin| json!(origin).to_string()));
            let logs = told.map(|told| told.logs.as_str());
            columns.logs.push(logs.filter(|logs| !logs.is_empty()));
            let messages = told.map(|told| messages_to_text(&told.esdl_messages));
            columns.messages.push(messages.filter(|text| text != "[]"));
            columns
                .keeps_progress
                .push(told.is_some_and(|told| told.keeps_progress));
        }
        columns
    }
}

fn starts_to_text(starts: &[Start]) -> String {
    let starts = starts.iter();
    let starts = starts.map(|start| json!({"at": start.at, "verdict": start.verdict.name()}));
    Value::Array(starts.collect()).to_string()
}

/// A start as `job_story` has it.
#[derive(Deserialize)]
struct StartRow {
    at: Timestamp,
    verdict: Option<String>,
}

/// A text as JSON; nothing of what is none.
fn from_json<T: DeserializeOwned + Default>(row: &Row, column: &str) -> anyhow::Result<T> {
    let text: Option<&str> = row.try_get(column)?;
    let value = text.and_then(|text| serde_json::from_str(text).ok());
    Ok(value.unwrap_or_default())
}

/// Who has cancelled it, in a row of a job that has ended.
pub(super) fn cancelled_by(row: &Row) -> anyhow::Result<Option<Origin>> {
    from_json(row, "cancelled_by")
}

impl Connection {
    /// One job, if it is known.
    ///
    /// # Errors
    /// As [`Connection::jobs`].
    pub fn story(&mut self, job_id: Uuid) -> Result<Option<Story>, StoreError> {
        let live = Filter {
            id: Some(job_id),
            ..Filter::default()
        };
        let finished = Filter {
            finished: true,
            ..live.clone()
        };
        let job = match self.jobs(&live, &[])?.jobs.pop() {
            Some(job) => Some(job),
            None => self.jobs(&finished, &[])?.jobs.pop(),
        };
        let Some(mut job) = job else { return Ok(None) };
        let row = self.client.query_one(STORY, &[&job_id])?;
        let (acts, acts_left_out) = self.acts(job_id)?;
        let rows = Rows {
            acts,
            acts_left_out,
            runs: self.runs(job_id)?,
            ..rows(&row, self.attempts(job_id)?).map_err(StoreError::Transient)?
        };
        let (priority, timeout, queue) = of_end(&row).map_err(StoreError::Transient)?;
        job.priority = job.priority.or(priority);
        job.timeout_ms = job.timeout_ms.or(timeout);
        job.queue = job.queue.or(queue);
        Ok(Some(Story::new(job, rows)))
    }
}

const STORY: &str = "
    SELECT told.priority, told.timeout_ms, told.task_queue, told.starts, told.hosts, told.ended_by, told.logs,
           told.esdl_messages, coalesce(told.parameters, job.parameters) AS parameters,
           coalesce(told.marks, job.marks) AS marks, told.progress, told.progress_message,
           told.progress_at,
           (SELECT bytes FROM job_result WHERE job_result.job_id = wanted.job_id) AS result_bytes,
           (SELECT kept_at FROM job_result WHERE job_result.job_id = wanted.job_id) AS result_kept_at,
           told.delivery,
           EXISTS (SELECT FROM job_submission
                   WHERE job_submission.job_id = wanted.job_id) AS can_run_again,
           (SELECT array_agg(started_at ORDER BY started_at) FROM job_starts
            WHERE job_starts.job_id = wanted.job_id) AS started_at,
           (SELECT array_agg(verdict ORDER BY started_at) FROM job_starts
            WHERE job_starts.job_id = wanted.job_id) AS verdicts,
           (SELECT json_agg(json_build_object(
                       'host', host, 'task_id', celery_id, 'first_seen', first_seen,
                       'last_seen', last_seen))::text
            FROM (SELECT * FROM worker_task WHERE worker_task.job_id = wanted.job_id
                  ORDER BY first_seen LIMIT 50) AS seen) AS seen
    FROM (SELECT $1::uuid AS job_id) AS wanted
         LEFT JOIN job USING (job_id) LEFT JOIN job_story AS told USING (job_id)";

fn rows(row: &Row, attempts: Vec<AttemptView>) -> anyhow::Result<Rows> {
    let mut seen: Vec<Seen> = from_json(row, "hosts")?;
    seen.extend(from_json::<Vec<Seen>>(row, "seen")?);
    let marks: Option<&str> = row.try_get("marks")?;
    let marks = marks.unwrap_or_default().lines();
    let messages: Option<&str> = row.try_get("esdl_messages")?;
    Ok(Rows {
        attempts,
        starts: starts(row)?,
        seen,
        marks: marks
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect(),
        last: progress(row)?,
        ended_by: from_json(row, "ended_by")?,
        parameters: from_json(row, "parameters")?,
        whereabouts: whereabouts(row)?,
        can_run_again: row.try_get("can_run_again")?,
        logs: row.try_get("logs")?,
        esdl_messages: messages.map(messages_from_text).unwrap_or_default(),
        ..Rows::default()
    })
}

fn whereabouts(row: &Row) -> anyhow::Result<Whereabouts> {
    let delivery: Option<&str> = row.try_get("delivery")?;
    let delivery = delivery.map(|name| named(Delivery::ALL, Delivery::name, name));
    let bytes: Option<i64> = row.try_get("result_bytes")?;
    let kept = bytes.zip(row.try_get("result_kept_at")?);
    Ok(Whereabouts {
        delivery: delivery.transpose()?,
        kept: kept.map(|(bytes, at)| Kept { at, bytes }),
    })
}

/// When its current task was started, or its last one.
fn starts(row: &Row) -> anyhow::Result<Vec<(Timestamp, Verdict)>> {
    let verdict = |name: Option<&str>| match name {
        None => Ok(Verdict::Counts),
        Some(name) => {
            let name_of = |verdict: Verdict| verdict.name().unwrap_or_default();
            named(Verdict::NAMED, name_of, name)
        }
    };
    let live: Option<Vec<Timestamp>> = row.try_get("started_at")?;
    if let Some(live) = live {
        let verdicts: Vec<Option<&str>> = row.try_get("verdicts")?;
        let starts = live.into_iter().zip(verdicts);
        return starts.map(|(at, name)| Ok((at, verdict(name)?))).collect();
    }
    let starts: Vec<StartRow> = from_json(row, "starts")?;
    let starts = starts.into_iter();
    starts
        .map(|start| Ok((start.at, verdict(start.verdict.as_deref())?)))
        .collect()
}

/// What the history has of a job that is no longer in its own row.
fn of_end(row: &Row) -> anyhow::Result<(Option<Priority>, Option<i64>, Option<String>)> {
    let priority: Option<&str> = row.try_get("priority")?;
    let priority = priority.map(|name| named(Priority::ALL, Priority::name, name));
    Ok((
        priority.transpose()?,
        row.try_get("timeout_ms")?,
        row.try_get("task_queue")?,
    ))
}
