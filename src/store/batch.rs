//! The transaction of a batch: locks its jobs, loads their states and writes what has become of them,
//! each with one statement for all jobs.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use jiff::Timestamp;
use serde_json::json;
use uuid::Uuid;

use super::rows::{same_row, state};
use super::steps::CourseChanges;
use super::story::ToldColumns;
use super::{StoreError, Transaction, expect_rows, starts};
use crate::domain::batch::{Series, SeriesChanges, Transition};
use crate::domain::job::{
    Ended, Ending, Job, MAX_REFERENCE, MAX_WORKFLOW_TYPE, Priority, Start, State,
};

/// What a batch's decisions need to know.
#[derive(Debug)]
pub struct Loaded {
    pub states: HashMap<Uuid, State>,
    /// The database's time.
    pub now: Timestamp,
    /// When a replica last began a session with RabbitMQ, by the same clock.
    pub session_begun: Option<Timestamp>,
}

/// What changes, by the statement that writes it.
#[derive(Default)]
struct Changes<'a> {
    inserted: Vec<(Uuid, &'a Job)>,
    /// Each with its previous row.
    updated: Vec<(Uuid, &'a Job, &'a Job)>,
    /// The same of those of which only the progress changes.
    progressed: Vec<(Uuid, &'a Job, &'a Job)>,
    /// Those whose task is no longer the one that was started.
    restarted: Vec<Uuid>,
    started: Vec<(Uuid, &'a Start)>,
    judged: Vec<(Uuid, &'a Start)>,
    ended: Vec<(Uuid, &'a Ended)>,
    courses: CourseChanges<'a>,
}

impl<'a> Changes<'a> {
    fn of(transitions: &'a [Transition<'a>]) -> Changes<'a> {
        let mut changes = Changes::default();
        for transition in transitions {
            changes.add_rows(transition);
            let (before, after) = (&transition.before, &transition.after);
            if let Some(ended) = outcome(after)
                && outcome(before) != Some(ended)
            {
                changes.ended.push((transition.job_id, ended));
            }
        }
        changes
    }

    fn add_rows(&mut self, transition: &'a Transition<'a>) {
        let job_id = transition.job_id;
        match (transition.before.job(), transition.after.job()) {
            (Some(before), Some(after)) => {
                if !same_row(before, after) {
                    self.updated.push((job_id, before, after));
                } else if before.progress != after.progress {
                    self.progressed.push((job_id, before, after));
                }
                self.courses.add(job_id, before, after);
                let known = match is_same_run(before, after) {
                    true => before.starts.len(),
                    false => {
                        self.restarted.push(job_id);
                        0
                    }
                };
                let new = after.starts.iter().skip(known);
                self.started.extend(new.map(|start| (job_id, start)));
                let both = before.starts[..known].iter().zip(&after.starts);
                let changed = both.filter(|(before, after)| before.verdict != after.verdict);
                self.judged
                    .extend(changed.map(|(_, start)| (job_id, start)));
            }
            (None, Some(after)) => {
                self.inserted.push((job_id, after));
                self.courses.add_new(job_id, after);
                let starts = after.starts.iter();
                self.started.extend(starts.map(|start| (job_id, start)));
            }
            // The row is deleted when the client has been told.
            (_, None) => {}
        }
    }

    fn is_nothing_but_progress(&self) -> bool {
        let Changes {
            inserted,
            updated,
            progressed,
            restarted,
            started,
            judged,
            ended,
            courses,
        } = self;
        let others = [
            inserted.len(),
            updated.len(),
            restarted.len(),
            started.len(),
            judged.len(),
            ended.len(),
        ];
        !progressed.is_empty() && others.iter().all(|rows| *rows == 0) && courses.is_empty()
    }
}

/// Whether the starts before are among those after: the task is the same.
fn is_same_run(before: &Job, after: &Job) -> bool {
    let first = |job: &Job| job.starts.first().map(|start| start.at);
    before.starts.is_empty() || first(before) == first(after)
}

/// The row in `job_history` that a state has.
fn outcome(state: &State) -> Option<&Ended> {
    match state {
        State::Ending(Ending { ended, .. }) | State::Ended(ended) => Some(ended),
        State::Unknown | State::Live(_) => None,
    }
}

impl Transaction<'_> {
    /// Waits until no other transaction of any replica works on these jobs, and excludes others
    /// until this one ends. Unlike a row lock it covers jobs without a row.
    ///
    /// # Errors
    /// The wait took longer than the connection's `lock_timeout`, or the connection is lost.
    pub fn lock(&mut self, job_ids: &[Uuid]) -> Result<(), StoreError> {
        let mut keys: Vec<i64> = job_ids.iter().map(lock_key).collect();
        // In the same order everywhere, so that two batches never deadlock.
        keys.sort_unstable();
        keys.dedup();
        self.execute(
            "SELECT pg_advisory_xact_lock(key) FROM unnest($1::bigint[]) AS key",
            &[&keys],
        )?;
        Ok(())
    }

    /// The same for those on which nobody works just now, without waiting for the others. Returns them.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn try_lock(&mut self, job_ids: &[Uuid]) -> Result<Vec<Uuid>, StoreError> {
        let mut keys: Vec<i64> = job_ids.iter().map(lock_key).collect();
        keys.sort_unstable();
        keys.dedup();
        let rows = self.query(
            "SELECT key FROM (
                 SELECT key, pg_try_advisory_xact_lock(key) AS is_locked
                 FROM unnest($1::bigint[]) AS key OFFSET 0
             ) AS tried WHERE is_locked",
            &[&keys],
        )?;
        let locked = rows.iter().map(|row| row.try_get(0));
        let locked = locked.collect::<Result<BTreeSet<i64>, _>>()?;
        let is_locked = |id: &&Uuid| locked.contains(&lock_key(id));
        Ok(job_ids.iter().filter(is_locked).copied().collect())
    }

    /// Allows a longer pause between two statements of this transaction.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn take_time(&mut self) -> Result<(), StoreError> {
        self.execute(
            "SET LOCAL idle_in_transaction_session_timeout = '4min'",
            &[],
        )?;
        Ok(())
    }

    /// The states of these jobs, all of which are in the answer, and what else is to be known for a
    /// decision. Of the courses of those in `whole` everything is read, of others only what every
    /// decision needs.
    ///
    /// # Errors
    /// The connection is lost. A row is not one that this program or the Python service writes:
    /// [`StoreError::Refused`].
    pub fn load(&mut self, job_ids: &[Uuid], whole: &[Uuid]) -> Result<Loaded, StoreError> {
        let rows = self.query(
            "SELECT clock_timestamp() AS now, wanted.job_id,
                    (SELECT begun_at FROM broker_session) AS session_begun,
                    job.status::text AS status, left(job.workflow_type, $3) AS workflow_type,
                    left(job.job_reference, $2) AS job_reference,
                    job.celery_id, job.registered_at, job.submitted_at, job.running_at,
                    job.timeout_after_ms, job.priority, job.progress, job.progress_message,
                    job.progress_at, starts.started_at, starts.message_id, starts.verdict,
                    ended.outcome, left(ended.workflow_type, $3) AS ended_workflow_type,
                    left(ended.job_reference, $2) AS ended_job_reference,
                    ended.celery_id AS ended_celery_id,
                    ended.registered_at AS ended_registered_at,
                    ended.submitted_at AS ended_submitted_at,
                    ended.running_at AS ended_running_at, ended.finished_at, ended.starts,
                    ended.start_ids, ended.result_bytes, ended.why,
                    job_input.job_id IS NOT NULL AS has_course
             FROM unnest($1::uuid[]) AS wanted (job_id)
             LEFT JOIN job USING (job_id)
             LEFT JOIN LATERAL (
                 SELECT array_agg(started_at ORDER BY started_at) AS started_at,
                        array_agg(message_id ORDER BY started_at) AS message_id,
                        array_agg(verdict ORDER BY started_at) AS verdict
                 FROM job_starts WHERE job_starts.job_id = job.job_id
             ) AS starts ON true
             LEFT JOIN job_history AS ended USING (job_id)
             LEFT JOIN job_input ON job_input.job_id = job.job_id",
            // What others have written may be longer.
            &[
                &job_ids,
                &characters(MAX_REFERENCE),
                &characters(MAX_WORKFLOW_TYPE),
            ],
        )?;
        let mut loaded = Loaded {
            states: HashMap::with_capacity(rows.len()),
            now: Timestamp::UNIX_EPOCH,
            session_begun: None,
        };
        let mut on_course = Vec::new();
        for row in &rows {
            loaded.now = row.try_get("now")?;
            loaded.session_begun = row.try_get("session_begun")?;
            let job_id: Uuid = row.try_get("job_id")?;
            let state = state(row).map_err(|error| {
                StoreError::Refused(format!("the row of job {job_id}: {error:#}"))
            })?;
            loaded.states.insert(job_id, state);
            if row.try_get("has_course")? {
                on_course.push(job_id);
            }
        }
        for (job_id, course) in self.load_courses(&on_course, whole)? {
            let state = loaded.states.get_mut(&job_id);
            if let Some(job) = state.and_then(State::job_mut) {
                job.course = Some(Box::new(course));
            }
        }
        Ok(loaded)
    }

    /// Writes what has become of the jobs, and of the guard rows of their time series.
    ///
    /// # Errors
    /// A row is not as it was loaded, or the connection is lost: [`StoreError::Transient`]. A text
    /// is not one for Postgres: [`StoreError::Refused`].
    pub fn write(
        &mut self,
        transitions: &[Transition<'_>],
        series: &SeriesChanges,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let changes = Changes::of(transitions);
        if changes.is_nothing_but_progress() && *series == SeriesChanges::default() {
            // The next progress makes good what a crash of Postgres takes away of it.
            self.execute("SET LOCAL synchronous_commit TO off", &[])?;
        }
        self.update_progress(&changes.progressed)?;
        self.insert_jobs(&changes.inserted)?;
        self.update_jobs(&changes.updated)?;
        self.write_courses(&changes.courses)?;
        self.forget_starts(&changes.restarted)?;
        self.insert_starts(&changes.started)?;
        self.judge_starts(&changes.judged)?;
        self.write_history(&changes.ended)?;
        self.write_series(series, now)
    }

    fn insert_jobs(&mut self, jobs: &[(Uuid, &Job)]) -> Result<(), StoreError> {
        if jobs.is_empty() {
            return Ok(());
        }
        let columns = JobColumns::of(jobs.iter().copied());
        self.execute(
            "INSERT INTO job (job_id, celery_id, workflow_type, status, registered_at,
                              submitted_at, running_at, timeout_after_ms, job_reference, priority,
                              parameters, task_queue)
             SELECT job_id, celery_id, workflow_type, status::jobstatus, registered_at,
                    submitted_at, running_at, timeout_after_ms, job_reference, priority, parameters,
                    task_queue
             FROM unnest($1::uuid[], $2::varchar[], $3::varchar[], $4::text[], $5::timestamptz[],
                         $6::timestamptz[], $7::timestamptz[], $8::bigint[], $9::varchar[],
                         $10::varchar[], $11::text[], $12::varchar[])
                  AS new (job_id, celery_id, workflow_type, status, registered_at,
                          submitted_at, running_at, timeout_after_ms, job_reference, priority,
                          parameters, task_queue)",
            &[
                &columns.ids,
                &columns.tasks,
                &columns.workflows,
                &columns.statuses,
                &columns.registered,
                &columns.submitted,
                &columns.running,
                &columns.timeouts,
                &columns.references,
                &columns.priorities,
                &columns.parameters,
                &columns.queues,
            ],
        )?;
        Ok(())
    }

    fn update_progress(&mut self, jobs: &[(Uuid, &Job, &Job)]) -> Result<(), StoreError> {
        if jobs.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = jobs.iter().map(|(id, ..)| id).collect();
        let progress = ProgressColumns::of(jobs);
        let rows = self.execute(
            "UPDATE job
             SET progress = new.progress, progress_message = new.message, progress_at = new.at,
                 marks = CASE WHEN new.mark IS NULL OR octet_length(job.marks) > $6 THEN job.marks
                              ELSE concat(job.marks, new.mark, chr(10)) END
             FROM unnest($1::uuid[], $2::float8[], $3::varchar[], $4::timestamptz[], $5::text[])
                  AS new (job_id, progress, message, at, mark)
             WHERE job.job_id = new.job_id",
            &[
                &ids,
                &progress.fractions,
                &progress.messages,
                &progress.times,
                &progress.marks,
                &MAX_MARKS,
            ],
        )?;
        expect_rows("updating progress", rows, jobs.len())
    }

    fn update_jobs(&mut self, jobs: &[(Uuid, &Job, &Job)]) -> Result<(), StoreError> {
        if jobs.is_empty() {
            return Ok(());
        }
        let columns = JobColumns::of(jobs.iter().map(|(id, _, new)| (*id, *new)));
        let progress = ProgressColumns::of(jobs);
        let old_statuses: Vec<_> = jobs.iter().map(|(_, old, _)| old.status.name()).collect();
        let rows = self.execute(
            "UPDATE job
             SET status = new.status::jobstatus, celery_id = new.celery_id,
                 submitted_at = new.submitted_at, running_at = new.running_at,
                 timeout_after_ms = new.timeout_after_ms, priority = new.priority,
                 progress = new.progress, progress_message = new.message, progress_at = new.at,
                 marks = CASE WHEN new.mark IS NULL OR octet_length(job.marks) > $13 THEN job.marks
                              ELSE concat(job.marks, new.mark, chr(10)) END,
                 parameters = coalesce(new.parameters, job.parameters),
                 task_queue = coalesce(new.task_queue, job.task_queue)
             FROM unnest($1::uuid[], $2::text[], $3::text[], $4::varchar[], $5::timestamptz[],
                         $6::timestamptz[], $7::bigint[], $8::varchar[], $9::float8[],
                         $10::varchar[], $11::timestamptz[], $12::text[], $14::text[],
                         $15::varchar[])
                  AS new (job_id, old_status, status, celery_id, submitted_at, running_at,
                          timeout_after_ms, priority, progress, message, at, mark, parameters,
                          task_queue)
             WHERE job.job_id = new.job_id AND job.status = new.old_status::jobstatus",
            &[
                &columns.ids,
                &old_statuses,
                &columns.statuses,
                &columns.tasks,
                &columns.submitted,
                &columns.running,
                &columns.timeouts,
                &columns.priorities,
                &progress.fractions,
                &progress.messages,
                &progress.times,
                &progress.marks,
                &MAX_MARKS,
                &columns.parameters,
                &columns.queues,
            ],
        )?;
        expect_rows("updating jobs", rows, jobs.len())
    }

    fn write_history(&mut self, ended: &[(Uuid, &Ended)]) -> Result<(), StoreError> {
        if ended.is_empty() {
            return Ok(());
        }
        let columns = HistoryColumns::of(ended);
        let told = ToldColumns::of(ended);
        // Both rows in one statement. What is told twice is told by whoever knows more.
        self.execute(
            "WITH new AS (
                 SELECT * FROM unnest($1::uuid[], $2::varchar[], $3::varchar[], $4::varchar[],
                                      $5::timestamptz[], $6::timestamptz[], $7::timestamptz[],
                                      $8::timestamptz[], $9::integer[], $10::varchar[],
                                      $11::bigint[], $12::varchar[], $13::varchar[], $14::text[],
                                      $15::text[], $16::text[], $17::text[], $18::bool[])
                      AS new (job_id, job_reference, workflow_type, celery_id, registered_at,
                              submitted_at, running_at, finished_at, starts, outcome, result_bytes,
                              start_ids, why, told_starts, ended_by, logs, esdl_messages,
                              keeps_progress)
             ), story AS (
                 INSERT INTO job_story AS before (
                     job_id, priority, timeout_ms, parameters, progress, progress_message,
                     progress_at, marks, starts, ended_by, logs, esdl_messages, task_queue, delivery)
                 SELECT new.job_id, job.priority, job.timeout_after_ms, job.parameters,
                        job.progress, CASE WHEN keeps_progress THEN job.progress_message END,
                        job.progress_at, CASE WHEN keeps_progress THEN job.marks END,
                        new.told_starts, new.ended_by, new.logs, new.esdl_messages, job.task_queue,
                        -- Unless it is found to be otherwise before the job is settled.
                        'QUEUED'
                 FROM new LEFT JOIN LATERAL (
                     SELECT * FROM job WHERE job.job_id = new.job_id LIMIT 1
                 ) AS job ON true
                 ON CONFLICT (job_id) DO UPDATE
                 SET priority = excluded.priority, timeout_ms = excluded.timeout_ms,
                     parameters = excluded.parameters, progress = excluded.progress,
                     progress_message = excluded.progress_message,
                     progress_at = excluded.progress_at, marks = excluded.marks,
                     starts = excluded.starts, task_queue = excluded.task_queue,
                     delivery = excluded.delivery,
                     ended_by = coalesce(excluded.ended_by, before.ended_by),
                     -- Of an end that could not be told the worker's logs are nowhere else.
                     logs = coalesce(excluded.logs, before.logs),
                     esdl_messages = coalesce(excluded.esdl_messages, before.esdl_messages)
             )
             INSERT INTO job_history (job_id, job_reference, workflow_type, celery_id,
                                      registered_at, submitted_at, running_at, finished_at,
                                      starts, outcome, result_bytes, start_ids, why)
             SELECT job_id, job_reference, workflow_type, celery_id, registered_at, submitted_at,
                    running_at, finished_at, starts, outcome, result_bytes, start_ids, why
             FROM new
             ON CONFLICT (job_id) DO UPDATE
             SET job_reference = excluded.job_reference, workflow_type = excluded.workflow_type,
                 celery_id = excluded.celery_id, registered_at = excluded.registered_at,
                 submitted_at = excluded.submitted_at, running_at = excluded.running_at,
                 finished_at = excluded.finished_at, starts = excluded.starts,
                 outcome = excluded.outcome, result_bytes = excluded.result_bytes,
                 start_ids = excluded.start_ids, why = excluded.why",
            &[
                &columns.ids,
                &columns.references,
                &columns.workflows,
                &columns.tasks,
                &columns.registered,
                &columns.submitted,
                &columns.running,
                &columns.finished,
                &columns.starts,
                &columns.outcomes,
                &columns.sizes,
                &columns.start_ids,
                &columns.whys,
                &told.starts,
                &told.by,
                &told.logs,
                &told.messages,
                &told.keeps_progress,
            ],
        )?;
        Ok(())
    }

    /// What is kept comes first, so that a job that succeeded and was deleted within one batch ends
    /// up retired.
    fn write_series(&mut self, changes: &SeriesChanges, now: Timestamp) -> Result<(), StoreError> {
        self.upsert_series(
            &changes.keep,
            "INSERT INTO esdl_time_series_info AS guard
                 (row_id, esdl_id, job_id, job_reference, registered_at)
             SELECT gen_random_uuid(), esdl_id, job_id, job_reference, $4
             FROM unnest($1::varchar[], $2::uuid[], $3::varchar[])
                  AS new (esdl_id, job_id, job_reference)
             ON CONFLICT (esdl_id) DO UPDATE
             SET deactivated_at = NULL, job_id = excluded.job_id,
                 job_reference = excluded.job_reference
             -- Another run, whose series are given up with its history, takes nothing from a client.
             WHERE guard.job_id IS NULL OR guard.deactivated_at IS NOT NULL
                OR NOT EXISTS (SELECT FROM job_act AS act
                               WHERE act.job_id = excluded.job_id AND act.act = 'AGAIN')",
            now,
        )?;
        // Not another job's: of the two only one may give them up.
        self.upsert_series(
            &changes.hold,
            "INSERT INTO esdl_time_series_info AS guard
                 (row_id, esdl_id, job_id, job_reference, registered_at)
             SELECT gen_random_uuid(), esdl_id, job_id, job_reference, $4
             FROM unnest($1::varchar[], $2::uuid[], $3::varchar[])
                  AS new (esdl_id, job_id, job_reference)
             ON CONFLICT (esdl_id) DO UPDATE
             SET deactivated_at = NULL, job_id = excluded.job_id,
                 job_reference = excluded.job_reference
             WHERE guard.job_id IS NULL OR guard.job_id = excluded.job_id",
            now,
        )?;
        // A row that exists belongs to a job that succeeded with the same id, and stays as it is.
        self.upsert_series(
            &changes.retire_late,
            "INSERT INTO esdl_time_series_info
                 (row_id, esdl_id, job_id, job_reference, registered_at, deactivated_at)
             SELECT gen_random_uuid(), esdl_id, job_id, job_reference, $4, $4
             FROM unnest($1::varchar[], $2::uuid[], $3::varchar[])
                  AS new (esdl_id, job_id, job_reference)
             ON CONFLICT (esdl_id) DO NOTHING",
            now,
        )?;
        if !changes.retire.is_empty() {
            self.execute(
                "UPDATE esdl_time_series_info SET deactivated_at = $2
                 WHERE job_id = ANY($1) AND deactivated_at IS NULL",
                &[&changes.retire, &now],
            )?;
        }
        if !changes.retire_these.is_empty() {
            let these = changes.retire_these.iter();
            let (jobs, ids): (Vec<Uuid>, Vec<&str>) = these
                .map(|(job_id, esdl_id)| (*job_id, esdl_id.as_str()))
                .unzip();
            self.execute(
                "UPDATE esdl_time_series_info AS guard SET deactivated_at = $3
                 FROM unnest($1::uuid[], $2::varchar[]) AS passing (job_id, esdl_id)
                 WHERE guard.job_id = passing.job_id AND guard.esdl_id = passing.esdl_id
                   AND deactivated_at IS NULL",
                &[&jobs, &ids, &now],
            )?;
        }
        Ok(())
    }

    fn upsert_series(
        &mut self,
        series: &[Series],
        sql: &'static str,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        // One row each, the last one's word, and in one order everywhere against deadlocks.
        let by_id: BTreeMap<_, _> = series
            .iter()
            .map(|series| (&series.esdl_id, series))
            .collect();
        if by_id.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = by_id.values().map(|series| &series.esdl_id).collect();
        let jobs: Vec<_> = by_id.values().map(|series| series.job_id).collect();
        let references: Vec<_> = by_id.values().map(|series| &series.reference).collect();
        self.execute(sql, &[&ids, &jobs, &references, &now])?;
        Ok(())
    }
}

/// As Postgres counts them.
fn characters(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// The advisory locks of one database share one 64-bit space; half of a random UUID is as good as
/// all of it.
fn lock_key(job_id: &Uuid) -> i64 {
    let (high, low) = job_id.as_u64_pair();
    (high ^ low).cast_signed()
}

/// Jobs by column, for `unnest`.
#[derive(Default)]
struct JobColumns<'a> {
    ids: Vec<Uuid>,
    workflows: Vec<&'a str>,
    references: Vec<&'a str>,
    statuses: Vec<&'static str>,
    tasks: Vec<Option<&'a str>>,
    registered: Vec<Timestamp>,
    submitted: Vec<Option<Timestamp>>,
    running: Vec<Option<Timestamp>>,
    timeouts: Vec<Option<i64>>,
    priorities: Vec<Option<&'static str>>,
    parameters: Vec<Option<&'a str>>,
    queues: Vec<Option<&'a str>>,
}

impl<'a> JobColumns<'a> {
    fn of(jobs: impl Iterator<Item = (Uuid, &'a Job)>) -> JobColumns<'a> {
        let mut columns = JobColumns::default();
        for (id, job) in jobs {
            let Job {
                workflow_type,
                reference,
                status,
                task_id,
                registered_at,
                submitted_at,
                running_at,
                timeout_ms,
                priority,
                parameters,
                task_queue,
                // They have rows of their own.
                starts: _,
                course: _,
                // It has columns of its own.
                progress: _,
            } = job;
            columns.ids.push(id);
            columns.workflows.push(workflow_type);
            columns.references.push(reference);
            columns.statuses.push(status.name());
            columns.tasks.push(task_id.as_deref());
            columns.registered.push(*registered_at);
            columns.submitted.push(*submitted_at);
            columns.running.push(*running_at);
            columns.timeouts.push(*timeout_ms);
            columns.priorities.push(priority.map(Priority::name));
            columns.parameters.push(parameters.as_deref());
            columns.queues.push(task_queue.as_deref());
        }
        columns
    }
}

/// The progress of jobs by column, for `unnest`.
#[derive(Default)]
struct ProgressColumns<'a> {
    fractions: Vec<Option<f64>>,
    messages: Vec<Option<&'a str>>,
    times: Vec<Option<Timestamp>>,
    marks: Vec<Option<String>>,
}

/// Bytes of a job's marks up to which another one is added.
const MAX_MARKS: i32 = 1200;

impl<'a> ProgressColumns<'a> {
    /// Each job with its previous row.
    fn of(jobs: &[(Uuid, &'a Job, &'a Job)]) -> ProgressColumns<'a> {
        let mut columns = ProgressColumns::default();
        for (_, before, job) in jobs {
            let progress = job.progress.as_ref();
            let mark = progress.and_then(|one| one.mark(before.progress.as_ref()));
            columns.marks.push(mark.map(|mark| json!(mark).to_string()));
            let fraction = progress.map(|progress| progress.fraction);
            let message = progress.map(|progress| progress.message.as_str());
            columns.fractions.push(fraction);
            columns.messages.push(message);
            columns.times.push(progress.map(|progress| progress.at));
        }
        columns
    }
}

/// Jobs that have ended by column, for `unnest`.
#[derive(Default)]
struct HistoryColumns<'a> {
    ids: Vec<Uuid>,
    outcomes: Vec<&'static str>,
    workflows: Vec<Option<&'a str>>,
    references: Vec<Option<&'a str>>,
    tasks: Vec<Option<&'a str>>,
    registered: Vec<Option<Timestamp>>,
    submitted: Vec<Option<Timestamp>>,
    running: Vec<Option<Timestamp>>,
    finished: Vec<Timestamp>,
    starts: Vec<i32>,
    start_ids: Vec<Option<String>>,
    sizes: Vec<i64>,
    whys: Vec<Option<&'a str>>,
}

impl<'a> HistoryColumns<'a> {
    fn of(jobs: &[(Uuid, &'a Ended)]) -> HistoryColumns<'a> {
        let mut columns = HistoryColumns::default();
        for (id, job) in jobs {
            let Ended {
                outcome,
                workflow_type,
                reference,
                task_id,
                registered_at,
                submitted_at,
                running_at,
                finished_at,
                starts: counted,
                start_ids,
                result_bytes,
                why,
                // It has a row of its own.
                told: _,
            } = job;
            columns.ids.push(*id);
            columns.whys.push(why.as_deref());
            columns.outcomes.push(outcome.name());
            columns.workflows.push(workflow_type.as_deref());
            columns.references.push(reference.as_deref());
            columns.tasks.push(task_id.as_deref());
            columns.registered.push(*registered_at);
            columns.submitted.push(*submitted_at);
            columns.running.push(*running_at);
            columns.finished.push(*finished_at);
            columns.starts.push(*counted);
            columns.start_ids.push(starts::ids_to_text(start_ids));
            columns.sizes.push(*result_bytes);
        }
        columns
    }
}
