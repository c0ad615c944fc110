//! Rows, and the states of jobs that they stand for.

use std::time::Duration;

use anyhow::anyhow;
use postgres::Row;

use super::starts;
use crate::domain::job::{Ended, Ending, Job, JobStatus, Outcome, Priority, Progress, State};

/// Those of `job_history AS ended` that are successes of a workflow that is `wanted`, and in which order the
/// newest come first. Nothing but the index of these can tell it so, whatever Postgres believes of how many
/// a workflow has had: for one without any it went through all that ever ended.
pub(super) const SUCCEEDED: &str = "
    (ended.workflow_type, ended.finished_at) >= (wanted.workflow_type, '-infinity')
    AND (ended.workflow_type, ended.finished_at) <= (wanted.workflow_type, 'infinity')
    AND outcome = 'SUCCEEDED'";
pub(super) const NEWEST_FIRST: &str = "ORDER BY ended.workflow_type DESC, ended.finished_at DESC";

/// Whether a job's row is unchanged, apart from the progress.
pub(super) fn same_row(before: &Job, after: &Job) -> bool {
    let Job {
        // These never change.
        workflow_type: _,
        reference: _,
        registered_at: _,
        status,
        task_id,
        submitted_at,
        running_at,
        timeout_ms,
        priority,
        // They change with the status alone.
        parameters: _,
        task_queue: _,
        // They have rows of their own.
        starts: _,
        course: _,
        progress: _,
    } = before;
    *status == after.status
        && *task_id == after.task_id
        && *submitted_at == after.submitted_at
        && *running_at == after.running_at
        && *timeout_ms == after.timeout_ms
        && *priority == after.priority
}

pub(super) fn state(row: &Row) -> anyhow::Result<State> {
    Ok(match (job(row)?, ended(row)?) {
        (None, None) => State::Unknown,
        (Some(job), None) => State::Live(job),
        (Some(job), Some(ended)) => State::Ending(Ending { job, ended }),
        (None, Some(ended)) => State::Ended(ended),
    })
}

fn job(row: &Row) -> anyhow::Result<Option<Job>> {
    let Some(status) = row.try_get::<_, Option<&str>>("status")? else {
        return Ok(None);
    };
    Ok(Some(Job {
        workflow_type: row.try_get("workflow_type")?,
        reference: row
            .try_get::<_, Option<_>>("job_reference")?
            .unwrap_or_default(),
        status: named(JobStatus::ALL, JobStatus::name, status)?,
        task_id: row.try_get("celery_id")?,
        registered_at: row.try_get("registered_at")?,
        submitted_at: row.try_get("submitted_at")?,
        running_at: row.try_get("running_at")?,
        timeout_ms: row.try_get("timeout_after_ms")?,
        priority: row
            .try_get::<_, Option<&str>>("priority")?
            .map(|name| named(Priority::ALL, Priority::name, name))
            .transpose()?,
        progress: progress(row)?,
        starts: starts::starts(row)?,
        // It is read with a statement of its own.
        course: None,
        parameters: None,
        task_queue: None,
    }))
}

pub(super) fn progress(row: &Row) -> anyhow::Result<Option<Progress>> {
    let Some(fraction) = row.try_get("progress")? else {
        return Ok(None);
    };
    let message: Option<String> = row.try_get("progress_message")?;
    Ok(Some(Progress {
        fraction,
        message: message.unwrap_or_default(),
        at: row.try_get("progress_at")?,
    }))
}

fn ended(row: &Row) -> anyhow::Result<Option<Ended>> {
    let Some(outcome) = row.try_get::<_, Option<&str>>("outcome")? else {
        return Ok(None);
    };
    Ok(Some(Ended {
        outcome: named(Outcome::ALL, Outcome::name, outcome)?,
        workflow_type: row.try_get("ended_workflow_type")?,
        reference: row.try_get("ended_job_reference")?,
        task_id: row.try_get("ended_celery_id")?,
        registered_at: row.try_get("ended_registered_at")?,
        submitted_at: row.try_get("ended_submitted_at")?,
        running_at: row.try_get("ended_running_at")?,
        finished_at: row.try_get("finished_at")?,
        starts: row.try_get("starts")?,
        start_ids: starts::ids_from_text(row.try_get("start_ids")?),
        result_bytes: row.try_get("result_bytes")?,
        why: row.try_get("why")?,
        told: None,
    }))
}

/// The one of `all` that a text in the database names.
pub(super) fn named<T: Copy>(
    all: &[T],
    name_of: fn(T) -> &'static str,
    name: &str,
) -> anyhow::Result<T> {
    let mut all = all.iter().copied();
    all.find(|one| name_of(*one) == name)
        .ok_or_else(|| anyhow!("{name:?} is none of what may be here"))
}

pub(super) fn seconds(times: Vec<f64>) -> Vec<Duration> {
    let time = |seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default();
    times.into_iter().map(time).collect()
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use rstest::rstest;

    use super::*;
    use crate::domain::job::{Start, Verdict};

    #[rstest]
    #[case::status(|job: &mut Job| job.status = JobStatus::Running, false)]
    #[case::task(|job: &mut Job| job.task_id = Some("task".to_owned()), false)]
    #[case::submission(|job: &mut Job| job.submitted_at = Some(job.registered_at), false)]
    #[case::running(|job: &mut Job| job.running_at = Some(job.registered_at), false)]
    #[case::timeout(|job: &mut Job| job.timeout_ms = Some(1), false)]
    #[case::priority(|job: &mut Job| job.priority = Some(Priority::High), false)]
    #[case::starts(|job: &mut Job| job.starts.push(Start {
        at: job.registered_at,
        message_id: None,
        verdict: Verdict::Counts,
    }), true)]
    #[case::progress(|job: &mut Job| job.progress = Some(Progress {
        fraction: 0.5,
        message: String::new(),
        at: job.registered_at,
    }), true)]
    fn a_row_is_written_when_a_field_of_it_changes(
        #[case] change: fn(&mut Job),
        #[case] stays: bool,
    ) {
        let before = Job {
            workflow_type: "a workflow".to_owned(),
            reference: String::new(),
            status: JobStatus::Registered,
            task_id: None,
            registered_at: Timestamp::UNIX_EPOCH,
            submitted_at: None,
            running_at: None,
            timeout_ms: None,
            priority: None,
            starts: Vec::new(),
            progress: None,
            course: None,
            parameters: None,
            task_queue: None,
        };
        let mut after = before.clone();
        change(&mut after);
        assert_eq!(same_row(&before, &after), stays);
    }
}
