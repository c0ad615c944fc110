//! Queries for operators. Nothing here is in the path of a message.

use std::collections::BTreeMap;

use jiff::Timestamp;
use postgres::Row;
use uuid::Uuid;

use super::alerts::is_mark;
use super::rows::{NEWEST_FIRST, SUCCEEDED, named, progress, seconds};
use super::{Connection, StoreError, steps, story, turns};
use crate::domain::estimate::{self, Runs};
use crate::domain::job::{JobStatus, Outcome, Priority};
use crate::domain::overview::{
    End, Filter, JobState, JobView, MAX_COUNT, Page, QueueView, Queued, WorkflowRows,
};

/// Live jobs, and those whose clients may not have been told yet: first those that workers have
/// started, then the others in the order in which workers take them, and then those that are not
/// handed to them: in the order of their turns, as far as that is told, and those on hold last. Of these
/// there may be many, and only the page is read.
///
/// The `step` of a job is its current task, if it has a course.
const LIVE: &str = "
    WITH standing AS MATERIALIZED (
        SELECT job.job_id, registered_at, status = 'RUNNING' AS runs,
               ($1::text IS NULL OR status::text = $1)
                   AND ($2::text IS NULL OR workflow_type = $2)
                   AND ($3::text IS NULL OR job.job_id::text ILIKE $3 OR job_reference ILIKE $3
                        OR progress_message ILIKE $3)
                   AND ($6::uuid[] IS NULL OR job.job_id = ANY($6)) AS is_wanted,
               CASE WHEN queue.waits THEN
                   row_number() OVER (
                       PARTITION BY coalesce(step.task, task_queue, workflow_type), queue.waits
                       ORDER BY CASE priority WHEN 'HIGH' THEN 0 WHEN 'LOW' THEN 2 ELSE 1 END,
                                coalesce(step.submitted_at, job.submitted_at), job.job_id)
               END AS position
        FROM job LEFT JOIN LATERAL (
            SELECT task, job_step.submitted_at,
                   job_step.submitted_at IS NOT NULL AND started_at IS NULL
                       AND finished_at IS NULL AS waits
            FROM job_step
            WHERE job_step.job_id = job.job_id ORDER BY number DESC, attempt DESC LIMIT 1
        ) AS step ON true,
        -- One that has ended is still there until its client has been told, and takes nobody's place.
        LATERAL (
            SELECT coalesce(step.waits, status = 'SUBMITTED')
                   AND (SELECT true FROM job_history AS ended
                        WHERE ended.job_id = job.job_id) IS NOT TRUE AS waits
        ) AS queue
        WHERE status <> 'REGISTERED'
    ), registered AS NOT MATERIALIZED (
        SELECT job_id, registered_at FROM job
        WHERE status = 'REGISTERED'
          AND ($1::text IS NULL OR status::text = $1)
          AND ($2::text IS NULL OR workflow_type = $2)
          AND ($3::text IS NULL OR job_id::text ILIKE $3 OR job_reference ILIKE $3
               OR progress_message ILIKE $3)
          AND ($6::uuid[] IS NULL OR job_id = ANY($6))
    ), begun AS (
        SELECT job_id, registered_at, runs, position FROM standing WHERE is_wanted
        ORDER BY runs DESC, position, registered_at, job_id LIMIT $4 OFFSET $5
    ), counted AS (
        SELECT count(*) AS total FROM standing WHERE is_wanted
    ), placed AS MATERIALIZED (
        SELECT job_id, registered_at, place
        FROM unnest($7::uuid[], $8::bigint[]) AS next (job_id, place) JOIN registered USING (job_id)
    ), page AS (
        SELECT *, NULL::bigint AS place, false AS on_hold FROM begun
        UNION ALL
        (SELECT job_id, registered_at, NULL, NULL, place, false FROM placed
         ORDER BY place, registered_at, job_id
         LIMIT $4 - (SELECT count(*) FROM begun)
         OFFSET greatest($5 - (SELECT total FROM counted), 0))
        UNION ALL
        -- With no row left to be read, none is looked at.
        (SELECT job_id, registered_at, NULL, NULL, NULL,
                job_id IN (SELECT job_id FROM job_turn WHERE granted_at IS NULL AND on_hold) AS rests
         FROM registered WHERE job_id <> ALL($7::uuid[])
         ORDER BY rests, registered_at, job_id
         LIMIT greatest($4 - (SELECT count(*) FROM begun)
                        - greatest((SELECT count(*) FROM placed)
                                   - greatest($5 - (SELECT total FROM counted), 0), 0), 0)
         OFFSET greatest($5 - (SELECT total FROM counted) - (SELECT count(*) FROM placed), 0))
    )
    SELECT job.job_id, workflow_type, left(job_reference, 300) AS job_reference,
           status::text AS status, job.priority, job.celery_id, job.task_queue, job.registered_at,
           job.submitted_at,
           job.running_at, timeout_after_ms, progress, progress_message, progress_at,
           step.number AS step_number, step.attempt AS step_attempt, step.title AS step_title,
           step.task AS step_task, step.timeout_ms AS step_timeout_ms, step.due_at AS step_due_at,
           step.submitted_at AS step_submitted_at, step.started_at AS step_started_at,
           page.position,
           (SELECT total FROM counted) + (SELECT count(*) FROM registered) AS total,
           (SELECT count(*) FROM job_starts WHERE job_starts.job_id = page.job_id) AS starts,
           (SELECT steps FROM job_input WHERE job_input.job_id = page.job_id) AS steps,
           turn.queue AS turn_queue, turn.owner AS turn_owner, turn.held_at, turn.on_hold,
           turn.granted_at, hold.at AS hold_at, hold.origin AS hold_origin, ended.outcome, ended.finished_at, ended.result_bytes, ended.why,
           ended.cancelled_by,
           true AS is_live, last_end.number AS ended_number, last_end.title AS ended_title,
           last_end.outcome AS ended_outcome, last_end.why AS ended_why, last_end.starts AS ended_starts
    -- Each looked up for itself: these are few, whatever Postgres believes.
    FROM page
         JOIN LATERAL (SELECT * FROM job WHERE job.job_id = page.job_id LIMIT 1) AS job ON true
         LEFT JOIN LATERAL (
             SELECT * FROM job_step
             WHERE job_step.job_id = page.job_id ORDER BY number DESC, attempt DESC LIMIT 1
         ) AS step ON true
         LEFT JOIN LATERAL (
             SELECT number, title, outcome, why, starts FROM job_step
             WHERE job_step.job_id = page.job_id AND outcome IS NOT NULL
             ORDER BY number DESC, attempt DESC LIMIT 1
         ) AS last_end ON true
         LEFT JOIN LATERAL (
             SELECT outcome, finished_at, result_bytes, job_history.why,
                    (SELECT ended_by FROM job_story WHERE job_story.job_id = page.job_id
                     AND job_history.outcome = 'CANCELLED') AS cancelled_by
             FROM job_history
             WHERE job_history.job_id = page.job_id LIMIT 1
         ) AS ended ON true
         LEFT JOIN LATERAL (
             SELECT * FROM job_turn WHERE job_turn.job_id = page.job_id LIMIT 1
         ) AS turn ON true
         LEFT JOIN LATERAL (
             SELECT at, origin FROM job_act
             WHERE job_act.job_id = page.job_id AND turn.on_hold AND act = 'HOLD'
             ORDER BY number DESC LIMIT 1
         ) AS hold ON true
    ORDER BY page.runs DESC NULLS LAST, page.position, page.place, page.on_hold, page.registered_at,
             page.job_id";

const FINISHED: &str = "
    WITH wanted AS NOT MATERIALIZED (
        SELECT * FROM job_history
        WHERE ($1::text IS NULL OR outcome = $1)
          AND ($2::text IS NULL OR workflow_type = $2)
          AND ($3::text IS NULL OR job_id::text ILIKE $3 OR job_reference ILIKE $3)
          AND ($7::uuid IS NULL OR job_id = $7)
    )
    SELECT page.job_id, left(workflow_type, 300) AS workflow_type,
           left(job_reference, 300) AS job_reference, NULL AS status, NULL AS priority,
           page.celery_id, NULL AS task_queue, registered_at, page.submitted_at, running_at,
           NULL::bigint AS timeout_after_ms, NULL::float8 AS progress, NULL AS progress_message,
           NULL::timestamptz AS progress_at, NULL AS steps, NULL AS turn_queue,
           NULL::bigint AS position,
           (SELECT count(*) FROM (SELECT FROM wanted LIMIT $6) AS counted) AS total,
           page.starts::bigint AS starts, page.outcome, page.finished_at, page.result_bytes,
           page.why,
           (SELECT ended_by FROM job_story WHERE job_story.job_id = page.job_id
            AND page.outcome = 'CANCELLED') AS cancelled_by,
           false AS is_live, last_end.number AS ended_number,
           last_end.title AS ended_title, last_end.outcome AS ended_outcome,
           last_end.why AS ended_why, last_end.starts AS ended_starts
    FROM (
        SELECT * FROM wanted ORDER BY finished_at DESC, job_id LIMIT $4 OFFSET $5
    ) AS page LEFT JOIN LATERAL (
        SELECT number, title, outcome, why, starts FROM job_step
        WHERE job_step.job_id = page.job_id AND outcome IS NOT NULL
        ORDER BY number DESC, attempt DESC LIMIT 1
    ) AS last_end ON true
    ORDER BY page.finished_at DESC, page.job_id";

impl Connection {
    /// A page of the jobs that match `filter`; of those that wait for their turn `turns` tell the order.
    ///
    /// # Errors
    /// The connection is lost, or a row is none that this program or the Python service writes.
    pub fn jobs(&mut self, filter: &Filter, turns: &[QueueView]) -> Result<Page, StoreError> {
        let state = filter.state.map(JobState::name);
        let text = filter.text.as_deref().map(like);
        let limit = i64::from(filter.limit);
        let offset = i64::from(filter.offset);
        let rows = if filter.finished {
            self.client.query(
                FINISHED,
                &[
                    &state,
                    &filter.workflow,
                    &text,
                    &limit,
                    &offset,
                    &MAX_COUNT,
                    &filter.id,
                ],
            )?
        } else {
            let (ids, places): (Vec<_>, Vec<_>) = QueueView::places(turns).unzip();
            self.client.query(
                LIVE,
                &[
                    &state,
                    &filter.workflow,
                    &text,
                    &limit,
                    &offset,
                    &filter.id.map(|id| vec![id]),
                    &ids,
                    &places,
                ],
            )?
        };
        let jobs: anyhow::Result<Vec<_>> = rows.iter().map(view).collect();
        let total = match rows.first() {
            Some(row) => row.try_get("total")?,
            // The list has become shorter than the page's offset.
            None if filter.offset > 0 => {
                let first = Filter {
                    offset: 0,
                    limit: 1,
                    ..filter.clone()
                };
                self.jobs(&first, turns)?.total
            }
            None => 0,
        };
        Ok(Page {
            jobs: jobs.map_err(StoreError::Transient)?,
            total,
        })
    }

    /// Those of these jobs that are there, in the order of the list but for turns.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn live_jobs(&mut self, ids: &[Uuid]) -> Result<Vec<JobView>, StoreError> {
        const ANY: Option<&str> = None;
        let limit = i64::try_from(ids.len()).unwrap_or(i64::MAX);
        let (next, places): (Vec<Uuid>, Vec<i64>) = Default::default();
        let rows = self.client.query(
            LIVE,
            &[&ANY, &ANY, &ANY, &limit, &0_i64, &ids, &next, &places],
        )?;
        let jobs: anyhow::Result<Vec<_>> = rows.iter().map(view).collect();
        jobs.map_err(StoreError::Transient)
    }

    /// How many of these jobs have not ended.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn count_live(&mut self, ids: &[Uuid]) -> Result<usize, StoreError> {
        let row = self.client.query_one(
            "SELECT count(*) FROM job
             WHERE job_id = ANY($1)
               AND NOT EXISTS (SELECT FROM job_history AS ended WHERE ended.job_id = job.job_id)",
            &[&ids],
        )?;
        let count: i64 = row.get(0);
        Ok(usize::try_from(count).unwrap_or_default())
    }

    /// The ids of the jobs that match `filter`, have not ended, and were registered by then; whichever
    /// part of the list the filter is at. With `on_hold` only of those that wait for their turn, and
    /// are on hold or not.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn live_ids(
        &mut self,
        filter: &Filter,
        on_hold: Option<bool>,
        until: Timestamp,
    ) -> Result<Vec<Uuid>, StoreError> {
        let state = filter.state.map(JobState::name);
        let text = filter.text.as_deref().map(like);
        // Matches as the list does.
        let rows = self.client.query(
            "SELECT job_id FROM job
             WHERE ($1::text IS NULL OR status::text = $1)
               AND ($2::text IS NULL OR workflow_type = $2)
               AND ($3::text IS NULL OR job_id::text ILIKE $3
                    OR left(job_reference, 300) ILIKE $3 OR progress_message ILIKE $3)
               AND registered_at <= $4
               AND ($5::bool IS NULL OR job_id IN (
                       SELECT job_id FROM job_turn WHERE granted_at IS NULL AND on_hold = $5))
               AND NOT EXISTS (SELECT FROM job_history AS ended WHERE ended.job_id = job.job_id)
             ORDER BY job_id",
            &[&state, &filter.workflow, &text, &until, &on_hold],
        )?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// The figures of each workflow: of those in `defined`, and of others that jobs have.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn workflows(
        &mut self,
        defined: &[String],
    ) -> Result<BTreeMap<String, WorkflowRows>, StoreError> {
        let rows = self.client.query(
            "SELECT workflow_type,
                    count(*) FILTER (WHERE status = 'REGISTERED') AS registered,
                    count(*) FILTER (WHERE status = 'SUBMITTED') AS submitted,
                    count(*) FILTER (WHERE status = 'RUNNING') AS running,
                    min(coalesce(submitted_at, registered_at)) FILTER (WHERE status <> 'RUNNING')
                        AS oldest_waiting,
                    coalesce(array_agg(extract(epoch FROM now() - running_at)::float8)
                             FILTER (WHERE status = 'RUNNING' AND running_at IS NOT NULL),
                             '{}') AS elapsed
             FROM job GROUP BY workflow_type",
            &[],
        )?;
        let mut workflows = BTreeMap::new();
        for row in &rows {
            let counts = WorkflowRows {
                registered: row.try_get("registered")?,
                submitted: row.try_get("submitted")?,
                running: row.try_get("running")?,
                oldest_waiting: row.try_get("oldest_waiting")?,
                elapsed: seconds(row.try_get("elapsed")?),
                runs: None,
                step_runs: BTreeMap::new(),
                count: 0,
                step_counts: BTreeMap::new(),
            };
            workflows.insert(row.try_get::<_, String>("workflow_type")?, counts);
        }
        for name in defined {
            workflows.entry(name.clone()).or_default();
        }
        let names: Vec<_> = workflows.keys().cloned().collect();
        let sql = format!(
            "SELECT wanted.workflow_type, array_agg(runs.seconds) AS seconds
             FROM unnest($1::varchar[]) AS wanted (workflow_type)
             JOIN LATERAL (
                 SELECT extract(epoch FROM finished_at - running_at)::float8 AS seconds
                 FROM job_history AS ended
                 WHERE {SUCCEEDED} AND running_at IS NOT NULL
                 {NEWEST_FIRST} LIMIT $2
             ) AS runs ON true
             GROUP BY wanted.workflow_type"
        );
        let rows = self.client.query(&sql, &[&names, &estimate::MAX_RUNS])?;
        for row in &rows {
            let name: String = row.try_get("workflow_type")?;
            let seconds = seconds(row.try_get("seconds")?);
            let rows = workflows.entry(name).or_default();
            rows.count = seconds.len();
            rows.runs = Runs::new(seconds);
        }
        for (name, number, seconds) in self.runs_of_steps(&names)? {
            let rows = workflows.entry(name).or_default();
            rows.step_counts.insert(number, seconds.len());
            rows.step_runs
                .extend(Runs::new(seconds).map(|runs| (number, runs)));
        }
        Ok(workflows)
    }

    /// The workflows of the jobs that have not ended, and the tasks of those with steps.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn tasks_of_jobs(&mut self) -> Result<Vec<String>, StoreError> {
        let rows = self.client.query(
            "SELECT workflow_type FROM job
                 WHERE NOT EXISTS (SELECT FROM job_input WHERE job_input.job_id = job.job_id)
                 UNION
                 SELECT task FROM job_step JOIN job USING (job_id)
                 WHERE job_step.celery_id = job.celery_id",
            &[],
        )?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// How many tasks wait in RabbitMQ, as far as the database knows, by their kinds.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn queued(&mut self) -> Result<Vec<Queued>, StoreError> {
        let rows = self.client.query(
            "SELECT workflow_type, step.number, coalesce(step.task, task_queue) AS queue,
                    count(*) AS waiting,
                    min(coalesce(step.submitted_at, job.submitted_at, registered_at)) AS oldest
             FROM job LEFT JOIN job_step AS step
                 ON step.job_id = job.job_id AND step.celery_id = job.celery_id
             WHERE job.celery_id IS NOT NULL
               AND CASE WHEN step.job_id IS NULL THEN status = 'SUBMITTED'
                        ELSE step.started_at IS NULL AND step.finished_at IS NULL END
               AND NOT EXISTS (SELECT FROM job_history AS ended WHERE ended.job_id = job.job_id)
             GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
            &[],
        )?;
        let queued = rows.iter().map(|row| {
            let number: Option<i16> = row.try_get("number")?;
            Ok(Queued {
                workflow: row.try_get("workflow_type")?,
                step: number.and_then(|number| usize::try_from(number).ok()),
                queue: row.try_get("queue")?,
                waiting: row.try_get("waiting")?,
                oldest: row.try_get("oldest")?,
            })
        });
        queued.collect()
    }

    /// When each maintenance task was last begun, by its name.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn maintenance_runs(&mut self) -> Result<Vec<(String, Timestamp)>, StoreError> {
        let rows = self.client.query(
            "SELECT task, last_run FROM maintenance_run ORDER BY task",
            &[],
        )?;
        let runs = rows.iter().map(|row| (row.get(0), row.get(1)));
        Ok(runs
            .filter(|(task, _): &(String, _)| !is_mark(task))
            .collect())
    }

    /// Jobs that wait for a worker of this task and whose clients have not been told so, at most
    /// `limit`. `plain` are the workflows whose only step it is, for jobs whose queue is not kept.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn waiting_without_notice(
        &mut self,
        task: &str,
        plain: &[&str],
        limit: i64,
    ) -> Result<Vec<Uuid>, StoreError> {
        let rows = self.client.query(
            "SELECT job_id FROM job
             WHERE coalesce(task_queue = $1, workflow_type = ANY($2))
               AND status = 'SUBMITTED' AND progress IS NULL
               AND NOT EXISTS (SELECT FROM job_input WHERE job_input.job_id = job.job_id)
             UNION ALL
             SELECT job_id FROM job_step JOIN job USING (job_id)
             WHERE task = $1 AND job_step.celery_id = job.celery_id AND started_at IS NULL
               AND finished_at IS NULL
               AND (progress_at IS NULL OR progress_at <= job_step.submitted_at)
             LIMIT $3",
            &[&task, &plain, &limit],
        )?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}

/// A LIKE pattern that matches texts containing this one.
fn like(text: &str) -> String {
    let escaped = text
        .replace('\\', "\\\\")
        .replace('%', "\\%")
        .replace('_', "\\_");
    // Postgres takes no NUL, and no text has one.
    format!("%{}%", escaped.replace('\0', ""))
}

fn view(row: &Row) -> anyhow::Result<JobView> {
    let outcome: Option<&str> = row.try_get("outcome")?;
    let state = match outcome {
        Some(outcome) => JobState::Ended(named(Outcome::ALL, Outcome::name, outcome)?),
        None => {
            let status: &str = row.try_get("status")?;
            JobState::Live(named(JobStatus::ALL, JobStatus::name, status)?)
        }
    };
    let priority: Option<&str> = row.try_get("priority")?;
    let reference: Option<String> = row.try_get("job_reference")?;
    Ok(JobView {
        id: row.try_get("job_id")?,
        reference: reference.unwrap_or_default(),
        workflow: row.try_get("workflow_type")?,
        state,
        priority: priority
            .map(|name| named(Priority::ALL, Priority::name, name))
            .transpose()?,
        task_id: row.try_get("celery_id")?,
        queue: row.try_get("task_queue")?,
        registered_at: row.try_get("registered_at")?,
        submitted_at: row.try_get("submitted_at")?,
        running_at: row.try_get("running_at")?,
        finished_at: row.try_get("finished_at")?,
        timeout_ms: row.try_get("timeout_after_ms")?,
        starts: row.try_get("starts")?,
        progress: progress(row)?,
        result_bytes: row.try_get("result_bytes")?,
        position: row.try_get("position")?,
        estimate: None,
        too_few_runs: None,
        concern: None,
        step: steps::view(row)?,
        turn: turns::view(row)?,
        ends: End {
            is_told: !row.try_get::<_, bool>("is_live")?,
            why: row.try_get("why")?,
            step: steps::last_end(row)?,
            cancelled_by: story::cancelled_by(row)?,
        },
        granted_at: turns::granted_at(row)?,
        why: None,
    })
}
