//! The steps of jobs: `job_step` has a row for each task that a job of several steps has had, and
//! `job_input` what such a job still needs.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use jiff::Timestamp;
use postgres::Row;
use serde_json::{Value, json};
use uuid::Uuid;

use super::rows::{NEWEST_FIRST, SUCCEEDED, named, seconds};
use super::turns::{self, TurnChanges};
use super::{Connection, StoreError, Transaction};
use crate::domain::estimate;
use crate::domain::job::{Attempt, Course, Input, Job, Outcome, Position, Report};
use crate::domain::overview::{AttemptView, StepEnd, StepView, shares};
use crate::domain::workflow::Steps;
use crate::proto::EsdlMessage;

/// What changes of jobs' courses.
#[derive(Default)]
pub(super) struct CourseChanges<'a> {
    begun: Vec<(Uuid, &'a Course)>,
    /// Inputs that are kept instead of others, or no longer.
    inputs: Vec<(Uuid, Option<&'a str>)>,
    /// New ones, and those to which something has happened.
    attempts: Vec<(Uuid, &'a Course, &'a Attempt)>,
    turns: TurnChanges<'a>,
}

impl<'a> CourseChanges<'a> {
    pub(super) fn is_empty(&self) -> bool {
        let CourseChanges {
            begun,
            inputs,
            attempts,
            turns,
        } = self;
        begun.is_empty() && inputs.is_empty() && attempts.is_empty() && turns.is_empty()
    }

    /// A job that has no row yet.
    pub(super) fn add_new(&mut self, job_id: Uuid, after: &'a Job) {
        if let Some(course) = &after.course {
            self.begun.push((job_id, course));
            self.turns.add(job_id, None, after);
            let attempts = course.attempts();
            self.attempts
                .extend(attempts.map(|attempt| (job_id, &**course, attempt)));
        }
    }

    pub(super) fn add(&mut self, job_id: Uuid, before: &'a Job, job: &'a Job) {
        let (before, course) = match (&before.course, &job.course) {
            (_, None) => return,
            (None, Some(_)) => return self.add_new(job_id, job),
            (Some(before), Some(after)) => (before, after),
        };
        match (&before.input, &course.input) {
            (_, Input::New(esdl)) => self.inputs.push((job_id, Some(esdl))),
            (Input::Kept | Input::New(_), Input::NotKept) => self.inputs.push((job_id, None)),
            (_, Input::Kept) | (Input::NotKept, Input::NotKept) => {}
        }
        self.turns.add(job_id, before.turn.as_ref(), job);
        let known = before.earlier.len();
        let changed = course.attempts().enumerate().skip(known);
        let changed = changed.filter(|(place, now)| *place > known || before.current != **now);
        self.attempts
            .extend(changed.map(|(_, attempt)| (job_id, &**course, attempt)));
    }
}

impl Transaction<'_> {
    /// The courses of these jobs: of those in `whole` with parameters, logs and messages.
    pub(super) fn load_courses(
        &mut self,
        job_ids: &[Uuid],
        whole: &[Uuid],
    ) -> Result<Vec<(Uuid, Course)>, StoreError> {
        if job_ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut attempts = self.load_attempts(job_ids, whole)?;
        let rows = self.query(
            "SELECT job_id, steps, esdl IS NOT NULL AS has_input, job_input.owner,
                    CASE WHEN job_id = ANY($2) THEN parameters END AS parameters,
                    CASE WHEN job_id = ANY($2) THEN reference END AS reference,
                    held_at, granted_at, taken_at, celery_id
             FROM job_input LEFT JOIN job_turn USING (job_id) WHERE job_id = ANY($1)",
            &[&job_ids, &whole],
        )?;
        rows.iter()
            .map(|row| {
                let job_id: Uuid = row.try_get("job_id")?;
                let attempts = attempts.remove(&job_id).unwrap_or_default();
                let course = course(row, attempts).map_err(|error| {
                    StoreError::Refused(format!("the steps of job {job_id}: {error:#}"))
                })?;
                Ok((job_id, course))
            })
            .collect()
    }

    fn load_attempts(
        &mut self,
        job_ids: &[Uuid],
        whole: &[Uuid],
    ) -> Result<HashMap<Uuid, Vec<Attempt>>, StoreError> {
        let rows = self.query(
            "SELECT job_id, number, attempt, fallback, celery_id, due_at, submitted_at, started_at,
                    finished_at, outcome, starts, output_bytes, esdl_id, why,
                    CASE WHEN job_id = ANY($2) THEN logs END AS logs,
                    CASE WHEN job_id = ANY($2) THEN esdl_messages END AS esdl_messages
             FROM job_step WHERE job_id = ANY($1) ORDER BY job_id, number, attempt",
            &[&job_ids, &whole],
        )?;
        let mut attempts: HashMap<Uuid, Vec<Attempt>> = HashMap::new();
        for row in &rows {
            let job_id: Uuid = row.try_get("job_id")?;
            let attempt = attempt(row).map_err(|error| {
                StoreError::Refused(format!("a step of job {job_id}: {error:#}"))
            })?;
            attempts.entry(job_id).or_default().push(attempt);
        }
        Ok(attempts)
    }

    /// How many bytes the kept input ESDLs of these jobs have, taken together.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn size_of_inputs(&mut self, job_ids: &[Uuid]) -> Result<usize, StoreError> {
        let rows = self.query(
            "SELECT coalesce(sum(octet_length(esdl)), 0)::bigint FROM job_input
             WHERE job_id = ANY($1)",
            &[&job_ids],
        )?;
        let size: i64 = rows.first().map_or(Ok(0), |row| row.try_get(0))?;
        Ok(usize::try_from(size).unwrap_or_default())
    }

    /// The kept input ESDLs of these jobs.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn inputs(&mut self, job_ids: &[Uuid]) -> Result<HashMap<Uuid, String>, StoreError> {
        let rows = self.query(
            "SELECT job_id, esdl FROM job_input WHERE job_id = ANY($1) AND esdl IS NOT NULL",
            &[&job_ids],
        )?;
        rows.iter()
            .map(|row| Ok((row.try_get("job_id")?, row.try_get("esdl")?)))
            .collect()
    }

    pub(super) fn write_courses(&mut self, changes: &CourseChanges<'_>) -> Result<(), StoreError> {
        self.insert_inputs(&changes.begun)?;
        self.update_inputs(&changes.inputs)?;
        self.write_attempts(&changes.attempts)?;
        self.write_turns(&changes.turns)
    }

    fn insert_inputs(&mut self, begun: &[(Uuid, &Course)]) -> Result<(), StoreError> {
        if begun.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = begun.iter().map(|(id, _)| id).collect();
        let steps: Vec<_> = begun
            .iter()
            .map(|(_, course)| course.steps.source())
            .collect();
        let parameters: Vec<_> = begun
            .iter()
            .map(|(_, course)| json!(*course.parameters).to_string())
            .collect();
        let references: Vec<_> = begun
            .iter()
            .map(|(_, course)| json!(course.reference).to_string())
            .collect();
        let inputs: Vec<_> = begun
            .iter()
            .map(|(_, course)| match &course.input {
                Input::New(esdl) => Some(&**esdl),
                Input::Kept | Input::NotKept => None,
            })
            .collect();
        let owners: Vec<_> = begun.iter().map(|(_, course)| &course.owner).collect();
        // What a job of the same id has left that another service has ended.
        self.execute(
            "INSERT INTO job_input (job_id, steps, parameters, reference, esdl, owner)
             SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[],
                                  $6::varchar[])
             ON CONFLICT (job_id) DO UPDATE
             SET steps = excluded.steps, parameters = excluded.parameters,
                 reference = excluded.reference, esdl = excluded.esdl, owner = excluded.owner",
            &[&ids, &steps, &parameters, &references, &inputs, &owners],
        )?;
        self.execute("DELETE FROM job_step WHERE job_id = ANY($1)", &[&ids])?;
        Ok(())
    }

    fn update_inputs(&mut self, inputs: &[(Uuid, Option<&str>)]) -> Result<(), StoreError> {
        if inputs.is_empty() {
            return Ok(());
        }
        let (ids, texts): (Vec<_>, Vec<_>) = inputs.iter().copied().unzip();
        self.execute(
            "UPDATE job_input SET esdl = new.esdl
             FROM unnest($1::uuid[], $2::text[]) AS new (job_id, esdl)
             WHERE job_input.job_id = new.job_id",
            &[&ids, &texts],
        )?;
        Ok(())
    }

    fn write_attempts(&mut self, attempts: &[(Uuid, &Course, &Attempt)]) -> Result<(), StoreError> {
        if attempts.is_empty() {
            return Ok(());
        }
        let columns = AttemptColumns::of(attempts);
        self.execute(
            "INSERT INTO job_step (job_id, number, attempt, fallback, title, task, timeout_ms,
                                   celery_id, due_at, submitted_at, started_at, finished_at,
                                   outcome, starts, output_bytes, esdl_id, logs, esdl_messages, why)
             SELECT * FROM unnest($1::uuid[], $2::smallint[], $3::smallint[], $4::smallint[],
                                  $5::varchar[], $6::varchar[], $7::bigint[], $8::varchar[],
                                  $9::timestamptz[], $10::timestamptz[], $11::timestamptz[],
                                  $12::timestamptz[], $13::varchar[], $14::integer[],
                                  $15::bigint[], $16::varchar[], $17::text[], $18::text[], $19::varchar[])
             ON CONFLICT (job_id, number, attempt) DO UPDATE
             SET fallback = excluded.fallback, title = excluded.title, task = excluded.task,
                 timeout_ms = excluded.timeout_ms, celery_id = excluded.celery_id,
                 due_at = excluded.due_at, submitted_at = excluded.submitted_at,
                 started_at = excluded.started_at, finished_at = excluded.finished_at,
                 outcome = excluded.outcome, starts = excluded.starts,
                 output_bytes = excluded.output_bytes, esdl_id = excluded.esdl_id,
                 logs = excluded.logs, esdl_messages = excluded.esdl_messages, why = excluded.why",
            &[
                &columns.ids,
                &columns.numbers,
                &columns.attempts,
                &columns.fallbacks,
                &columns.titles,
                &columns.tasks,
                &columns.timeouts,
                &columns.task_ids,
                &columns.due,
                &columns.submitted,
                &columns.started,
                &columns.finished,
                &columns.outcomes,
                &columns.starts,
                &columns.sizes,
                &columns.esdl_ids,
                &columns.logs,
                &columns.messages,
                &columns.whys,
            ],
        )?;
        Ok(())
    }
}

/// Characters of an attempt's logs that operators are shown.
const SHOWN_LOGS: i32 = 20_000;

impl Connection {
    /// The tasks that a job of several steps has had, oldest first.
    ///
    /// # Errors
    /// The connection is lost, or a row is none that this program writes.
    pub(super) fn attempts(&mut self, job_id: Uuid) -> Result<Vec<AttemptView>, StoreError> {
        let rows = self.client.query(
            "SELECT number, attempt, fallback, title, task, celery_id, due_at, submitted_at,
                    started_at, finished_at, outcome, starts, output_bytes, esdl_id, why,
                    left(logs, $2) AS logs, NULL AS esdl_messages
             FROM job_step WHERE job_id = $1 ORDER BY number, attempt",
            &[&job_id, &SHOWN_LOGS],
        )?;
        let views = rows.iter().map(|row| {
            let (title, task) = (row.try_get("title")?, row.try_get("task")?);
            Ok(AttemptView::new(attempt(row)?, title, task))
        });
        let views: anyhow::Result<_> = views.collect();
        views.map_err(StoreError::Transient)
    }

    /// How long the last successful runs of these workflows' steps took, by the workflow and the
    /// step's number.
    pub(super) fn runs_of_steps(
        &mut self,
        workflows: &[String],
    ) -> Result<Vec<(String, usize, Vec<Duration>)>, StoreError> {
        let sql = format!(
            "SELECT wanted.workflow_type, number, array_agg(seconds) AS seconds
             FROM unnest($1::varchar[]) AS wanted (workflow_type)
             JOIN LATERAL (
                 SELECT job_id FROM job_history AS ended
                 -- As a rule there are none at all.
                 WHERE {SUCCEEDED} AND EXISTS (SELECT FROM job_step)
                 {NEWEST_FIRST} LIMIT $2
             ) AS ended ON true
             JOIN LATERAL (
                 SELECT number, extract(epoch FROM finished_at - started_at)::float8 AS seconds
                 FROM job_step
                 WHERE job_step.job_id = ended.job_id AND outcome = 'SUCCEEDED'
                   AND started_at IS NOT NULL
             ) AS runs ON true
             GROUP BY wanted.workflow_type, number"
        );
        let rows = self
            .client
            .query(&sql, &[&workflows, &estimate::MAX_RUNS])?;
        rows.iter()
            .map(|row| {
                let number: i16 = row.try_get("number")?;
                let runs = seconds(row.try_get("seconds")?);
                let number = usize::try_from(number).unwrap_or_default();
                Ok((row.try_get("workflow_type")?, number, runs))
            })
            .collect()
    }

    /// Jobs whose next attempt's time has come, with that time, in its order after `after`, at most
    /// `limit`.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn due_attempts(
        &mut self,
        after: Option<(Timestamp, Uuid)>,
        limit: i64,
    ) -> Result<Vec<(Timestamp, Uuid)>, StoreError> {
        let (time, id) = after.unzip();
        let rows = self.client.query(
            "SELECT due_at, job_id FROM job_step JOIN job USING (job_id)
             WHERE due_at <= clock_timestamp() AND job_step.submitted_at IS NULL
               AND finished_at IS NULL
               AND ($1::timestamptz IS NULL OR (due_at, job_id) > ($1, $2::uuid))
             ORDER BY due_at, job_id LIMIT $3",
            &[&time, &id, &limit],
        )?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// Deletes what is left of jobs that another service, such as the Python service, has ended, and of
    /// those whose history an earlier version has forgotten, which knew nothing of stories. What a running
    /// transaction adds is left alone. Returns how many steps there were.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn sweep_courses(&mut self) -> Result<u64, StoreError> {
        Ok(self.client.execute(
            "WITH inputs AS (
                 DELETE FROM job_input
                 WHERE NOT EXISTS (SELECT FROM job WHERE job.job_id = job_input.job_id)
             ), turns AS (
                 DELETE FROM job_turn
                 WHERE NOT EXISTS (SELECT FROM job WHERE job.job_id = job_turn.job_id)
             ), owners AS (
                 -- An owner who has had no turn for so long has no claim to be the last.
                 DELETE FROM turn_owner WHERE served_at < now() - interval '1 day'
             ), stories AS (
                 DELETE FROM job_story AS story
                 WHERE NOT EXISTS (SELECT FROM job WHERE job.job_id = story.job_id)
                   AND NOT EXISTS (SELECT FROM job_history AS ended
                                   WHERE ended.job_id = story.job_id)
             ), results AS (
                 DELETE FROM job_result AS result
                 WHERE NOT EXISTS (SELECT FROM job WHERE job.job_id = result.job_id)
                   AND NOT EXISTS (SELECT FROM job_history AS ended
                                   WHERE ended.job_id = result.job_id)
             ), submissions AS (
                 DELETE FROM job_submission AS submission
                 WHERE NOT EXISTS (SELECT FROM job WHERE job.job_id = submission.job_id)
                   AND NOT EXISTS (SELECT FROM job_history AS ended
                                   WHERE ended.job_id = submission.job_id)
             ), acts AS (
                 DELETE FROM job_act
                 WHERE NOT EXISTS (SELECT FROM job WHERE job.job_id = job_act.job_id)
                   AND NOT EXISTS (SELECT FROM job_history AS ended
                                   WHERE ended.job_id = job_act.job_id)
                 RETURNING job_id, act
             ), series AS (
                 UPDATE esdl_time_series_info SET deactivated_at = now()
                 FROM acts
                 WHERE act = 'AGAIN' AND esdl_time_series_info.job_id = acts.job_id
                   AND deactivated_at IS NULL
             )
             DELETE FROM job_step
             WHERE NOT EXISTS (SELECT FROM job WHERE job.job_id = job_step.job_id)
               AND NOT EXISTS (
                   SELECT FROM job_history WHERE job_history.job_id = job_step.job_id
               )",
            &[],
        )?)
    }
}

/// Where a job is, in a row of jobs that have not ended.
pub(super) fn view(row: &Row) -> anyhow::Result<Option<StepView>> {
    let Some(source) = row.try_get::<_, Option<&str>>("steps")? else {
        return Ok(None);
    };
    let Some(number) = row.try_get::<_, Option<i16>>("step_number")? else {
        return Ok(None);
    };
    let steps = Steps::from_source(source)?;
    if steps.plain().is_some() {
        // It has one only because its task had to wait for its turn.
        return Ok(None);
    }
    let attempt: i16 = row.try_get("step_attempt")?;
    Ok(Some(StepView {
        number: usize::try_from(number)?,
        attempt: usize::try_from(attempt)?,
        due_at: row.try_get("step_due_at")?,
        timeout_ms: row.try_get("step_timeout_ms")?,
        title: row.try_get("step_title")?,
        task: row.try_get("step_task")?,
        submitted_at: row.try_get("step_submitted_at")?,
        started_at: row.try_get("step_started_at")?,
        shares: shares(&steps),
    }))
}

/// The attempt of a job that ended last, in a row of jobs.
pub(super) fn last_end(row: &Row) -> anyhow::Result<Option<StepEnd>> {
    let Some(number) = row.try_get::<_, Option<i16>>("ended_number")? else {
        return Ok(None);
    };
    let starts: Option<i32> = row.try_get("ended_starts")?;
    let outcome = row.try_get("ended_outcome")?;
    Ok(Some(StepEnd {
        number: usize::try_from(number)?,
        title: row.try_get("ended_title")?,
        outcome: named(Outcome::ALL, Outcome::name, outcome)?,
        starts: i64::from(starts.unwrap_or_default()),
        why: row.try_get("ended_why")?,
    }))
}

fn course(row: &Row, mut attempts: Vec<Attempt>) -> anyhow::Result<Course> {
    let parameters: Option<&str> = row.try_get("parameters")?;
    let parameters = parameters.map(serde_json::from_str).transpose();
    let reference: Option<&str> = row.try_get("reference")?;
    let reference = reference.map(serde_json::from_str::<Option<String>>);
    let current = attempts.pop().context("none is left in job_step")?;
    Ok(Course {
        steps: Arc::new(Steps::from_source(row.try_get("steps")?)?),
        parameters: Arc::new(parameters.context("parameters")?.unwrap_or_default()),
        reference: reference.transpose().context("reference")?.flatten(),
        input: match row.try_get("has_input")? {
            true => Input::Kept,
            false => Input::NotKept,
        },
        earlier: attempts,
        current,
        owner: row.try_get::<_, Option<_>>("owner")?.unwrap_or_default(),
        turn: turns::turn(row)?,
    })
}

fn attempt(row: &Row) -> anyhow::Result<Attempt> {
    let number = |column| {
        let number: i16 = row.try_get(column)?;
        usize::try_from(number).map_err(|_| anyhow!("{column} is {number}"))
    };
    Ok(Attempt {
        position: Position {
            step: number("number")?.checked_sub(1).context("number is 0")?,
            fallback: number("fallback")?,
            attempt: number("attempt")?,
        },
        task_id: row.try_get("celery_id")?,
        due_at: row.try_get("due_at")?,
        submitted_at: row.try_get("submitted_at")?,
        started_at: row.try_get("started_at")?,
        report: report(row)?,
    })
}

fn report(row: &Row) -> anyhow::Result<Option<Report>> {
    let Some(outcome) = row.try_get::<_, Option<&str>>("outcome")? else {
        return Ok(None);
    };
    let messages: Option<&str> = row.try_get("esdl_messages")?;
    Ok(Some(Report {
        outcome: named(Outcome::ALL, Outcome::name, outcome)?,
        finished_at: row.try_get("finished_at")?,
        starts: row.try_get("starts")?,
        output_bytes: row.try_get("output_bytes")?,
        esdl_id: row.try_get("esdl_id")?,
        logs: row.try_get::<_, Option<_>>("logs")?.unwrap_or_default(),
        why: row.try_get("why")?,
        esdl_messages: messages.map(messages_from_text).unwrap_or_default(),
    }))
}

pub(super) fn messages_to_text(messages: &[EsdlMessage]) -> String {
    let messages = messages.iter().map(|message| {
        let EsdlMessage {
            technical_message,
            severity,
            esdl_object_id,
        } = message;
        json!({
            "technical_message": technical_message,
            "severity": severity,
            "esdl_object_id": esdl_object_id,
        })
    });
    Value::Array(messages.collect()).to_string()
}

/// What is none is left out.
pub(super) fn messages_from_text(text: &str) -> Vec<EsdlMessage> {
    let list: Vec<Value> = serde_json::from_str(text).unwrap_or_default();
    let text = |value: &Value, key| value.get(key).and_then(Value::as_str).map(str::to_owned);
    list.iter()
        .filter_map(|message| {
            let severity = message.get("severity").and_then(Value::as_i64);
            Some(EsdlMessage {
                technical_message: text(message, "technical_message")?,
                severity: i32::try_from(severity?).ok()?,
                esdl_object_id: text(message, "esdl_object_id"),
            })
        })
        .collect()
}

/// Attempts by column, for `unnest`.
#[derive(Default)]
struct AttemptColumns<'a> {
    ids: Vec<Uuid>,
    numbers: Vec<i16>,
    attempts: Vec<i16>,
    fallbacks: Vec<i16>,
    titles: Vec<&'a str>,
    tasks: Vec<&'a str>,
    timeouts: Vec<Option<i64>>,
    task_ids: Vec<Option<&'a str>>,
    due: Vec<Option<Timestamp>>,
    submitted: Vec<Option<Timestamp>>,
    started: Vec<Option<Timestamp>>,
    finished: Vec<Option<Timestamp>>,
    outcomes: Vec<Option<&'static str>>,
    starts: Vec<Option<i32>>,
    sizes: Vec<Option<i64>>,
    esdl_ids: Vec<Option<&'a str>>,
    logs: Vec<Option<&'a str>>,
    messages: Vec<Option<String>>,
    whys: Vec<Option<&'a str>>,
}

impl<'a> AttemptColumns<'a> {
    fn of(attempts: &[(Uuid, &'a Course, &'a Attempt)]) -> AttemptColumns<'a> {
        let number = |number: usize| i16::try_from(number).unwrap_or(i16::MAX);
        let mut columns = AttemptColumns::default();
        for (job_id, course, attempt) in attempts {
            let Attempt {
                position,
                task_id,
                due_at,
                submitted_at,
                started_at,
                report,
            } = attempt;
            let step = course.step_at(*position);
            columns.ids.push(*job_id);
            columns.numbers.push(number(position.step + 1));
            columns.attempts.push(number(position.attempt));
            columns.fallbacks.push(number(position.fallback));
            columns.titles.push(&step.title);
            columns.tasks.push(&step.task);
            columns.timeouts.push(step.timeout_ms.map(i64::from));
            columns.task_ids.push(task_id.as_deref());
            columns.due.push(*due_at);
            columns.submitted.push(*submitted_at);
            columns.started.push(*started_at);
            columns.add_report(report.as_ref());
        }
        columns
    }

    fn add_report(&mut self, report: Option<&'a Report>) {
        self.finished.push(report.map(|one| one.finished_at));
        self.outcomes.push(report.map(|one| one.outcome.name()));
        self.starts.push(report.map(|one| one.starts));
        self.sizes.push(report.map(|one| one.output_bytes));
        self.esdl_ids
            .push(report.and_then(|one| one.esdl_id.as_deref()));
        self.logs.push(report.map(|one| one.logs.as_str()));
        self.whys.push(report.and_then(|one| one.why.as_deref()));
        self.messages
            .push(report.map(|one| messages_to_text(&one.esdl_messages)));
    }
}
