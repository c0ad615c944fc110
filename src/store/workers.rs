//! Celery's workers, and the tasks that they have or should have.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use jiff::Timestamp;
use postgres::Row;
use uuid::Uuid;

use super::rows::named;
use super::{Connection, StoreError, Transaction};
use crate::domain::job::Outcome;
use crate::domain::worker::{
    Absence, CurrentTask, Look, LostTask, RunningTask, TaskEnd, TaskView, WaitingTask, Wish,
    Worker, WorkerState, WorkerView, Workers,
};

/// What is known before a look.
#[derive(Debug, Default)]
pub struct Known {
    /// The database's time.
    pub now: Timestamp,
    pub workers: BTreeMap<String, Worker>,
    pub absences: Vec<Absence>,
}

/// Tasks of a job, each with a worker that was seen with it, that its story keeps.
const MAX_SEEN: i64 = 10;

/// The task of a running job.
#[derive(Debug)]
pub struct Running {
    pub workflow: String,
    /// Its queue, if that was kept; otherwise it is the one of the workflow.
    pub queue: Option<String>,
    pub task: RunningTask,
}

/// The task of a job that waits.
#[derive(Debug)]
pub struct Waiting {
    pub workflow: String,
    pub queue: Option<String>,
    pub task: WaitingTask,
}

/// Tasks that wait in one queue, of which it is asked at a time whether they are nowhere.
const MAX_WAITING: i64 = 1000;

impl Connection {
    /// # Errors
    /// The connection is lost.
    pub fn known_workers(&mut self) -> Result<Known, StoreError> {
        let row = self.client.query_one("SELECT clock_timestamp()", &[])?;
        let now = row.try_get(0)?;
        let mut tasks: HashMap<String, Vec<CurrentTask>> = HashMap::new();
        let rows = self.client.query(
            "SELECT host, celery_id, task, job_id, first_seen FROM worker_task WHERE is_current
             ORDER BY host, first_seen, celery_id",
            &[],
        )?;
        for row in &rows {
            let current = CurrentTask {
                id: row.try_get("celery_id")?,
                name: row.try_get("task")?,
                job_id: row.try_get("job_id")?,
                first_seen: row.try_get("first_seen")?,
            };
            tasks.entry(row.try_get("host")?).or_default().push(current);
        }
        let rows = self
            .client
            .query("SELECT * FROM worker ORDER BY host", &[])?;
        let workers: Result<BTreeMap<_, _>, postgres::Error> = rows
            .iter()
            .map(|row| {
                let host: String = row.try_get("host")?;
                let tasks = tasks.remove(&host).unwrap_or_default();
                Ok((host, worker(row, tasks)?))
            })
            .collect();
        let rows = self.client.query("SELECT * FROM absent_task", &[])?;
        let absences: Result<_, postgres::Error> = rows.iter().map(absence).collect();
        Ok(Known {
            now,
            workers: workers?,
            absences: absences?,
        })
    }

    /// The tasks of jobs that workers have started and that have not ended, and the database's time.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn running_tasks(&mut self) -> Result<(Timestamp, Vec<Running>), StoreError> {
        let row = self.client.query_one("SELECT clock_timestamp()", &[])?;
        let now = row.try_get(0)?;
        let rows = self.client.query(
            "SELECT job.job_id, workflow_type, job.celery_id, coalesce(step.task, task_queue) AS queue,
                    CASE priority WHEN 'HIGH' THEN 0 WHEN 'LOW' THEN 2 ELSE 1 END AS rank,
                    coalesce(step.submitted_at, job.submitted_at, registered_at) AS submitted_at,
                    coalesce((SELECT max(job_starts.started_at) FROM job_starts
                              WHERE job_starts.job_id = job.job_id),
                             step.started_at, running_at, registered_at) AS started_at
             FROM job LEFT JOIN job_step AS step
                 ON step.job_id = job.job_id AND step.celery_id = job.celery_id
             WHERE status = 'RUNNING' AND job.celery_id IS NOT NULL
               AND (step.job_id IS NULL OR step.started_at IS NOT NULL)
               -- Whoever ends as lost is found again until that is told.
               AND NOT EXISTS (SELECT FROM job_history AS ended
                               WHERE ended.job_id = job.job_id AND outcome <> 'LOST')",
            &[],
        )?;
        let running: Result<Vec<_>, postgres::Error> = rows.iter().map(running).collect();
        Ok((now, running?))
    }

    /// Tasks that wait in queues, as far as the database knows: of these queues and of workflows that have
    /// theirs there where it is not kept, and those that nobody had before; the oldest ones of each queue. Beside
    /// each how many wait in its queue by then, other than those in `begun`.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn waiting_tasks(
        &mut self,
        queues: &[&str],
        workflows: &[&str],
        absent: &[&str],
        begun: &[&str],
        until: Timestamp,
    ) -> Result<Vec<(Waiting, i64)>, StoreError> {
        let rows = self.client.query(
            "SELECT * FROM (
                 SELECT *, row_number() OVER (PARTITION BY workflow, queue
                                              ORDER BY submitted_at, job_id) AS place,
                        count(*) FILTER (WHERE submitted_at < $5 AND celery_id <> ALL($4))
                            OVER (PARTITION BY workflow, queue) AS waiting
                 FROM (
                     SELECT job.job_id, workflow_type, job.celery_id,
                            coalesce(step.task, task_queue) AS queue,
                            -- Of those whose queue is kept it does not matter.
                            CASE WHEN coalesce(step.task, task_queue) IS NULL
                                 THEN workflow_type END AS workflow,
                            coalesce(step.submitted_at, job.submitted_at, registered_at)
                                AS submitted_at
                     FROM job LEFT JOIN job_step AS step
                         ON step.job_id = job.job_id AND step.celery_id = job.celery_id
                     WHERE job.celery_id IS NOT NULL
                       AND CASE WHEN step.job_id IS NULL THEN status = 'SUBMITTED'
                                ELSE step.started_at IS NULL AND step.finished_at IS NULL END
                       AND (coalesce(step.task, task_queue) = ANY($1)
                            OR coalesce(step.task, task_queue) IS NULL
                               AND workflow_type = ANY($2)
                            OR job.celery_id = ANY($3))
                       AND NOT EXISTS (SELECT FROM job_history AS ended
                                       WHERE ended.job_id = job.job_id AND outcome <> 'LOST')
                 ) AS waiting
             ) AS placed
             WHERE place <= $6 OR celery_id = ANY($3)
             ORDER BY submitted_at, job_id",
            &[&queues, &workflows, &absent, &begun, &until, &MAX_WAITING],
        )?;
        rows.iter()
            .map(|row| {
                let waiting = Waiting {
                    workflow: row.try_get("workflow_type")?,
                    queue: row.try_get("queue")?,
                    task: WaitingTask {
                        queue_is_kept: false,
                        job_id: row.try_get("job_id")?,
                        task_id: row.try_get("celery_id")?,
                        queue: String::new(),
                        submitted_at: row.try_get("submitted_at")?,
                    },
                };
                Ok((waiting, row.try_get("waiting")?))
            })
            .collect()
    }

    /// Which of these jobs there are, or have been as far as the history goes.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn known_jobs(&mut self, ids: &[Uuid]) -> Result<BTreeSet<Uuid>, StoreError> {
        let rows = self.client.query(
            "SELECT job_id FROM job WHERE job_id = ANY($1)
             UNION SELECT job_id FROM job_history WHERE job_id = ANY($1)",
            &[&ids],
        )?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Keeps what a look has shown, as of `now`.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn keep_look(&mut self, look: &Look, now: Timestamp) -> Result<(), StoreError> {
        let mut transaction = self.transaction()?;
        // One after the other, should two replicas look at once.
        transaction.execute(
            "INSERT INTO worker_look (looked_at, more_absent) VALUES ($1, $2)
             ON CONFLICT (singleton) DO UPDATE
             SET looked_at = excluded.looked_at, more_absent = excluded.more_absent",
            &[&now, &look.more_absent],
        )?;
        transaction.keep_workers(&look.workers)?;
        transaction.keep_tasks(&look.workers, now)?;
        transaction.keep_absences(&look.absences)?;
        transaction.execute(
            "DELETE FROM worker WHERE host = ANY($1)",
            &[&look.forgotten],
        )?;
        transaction.commit()
    }

    /// Notes what an operator wants of a worker.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn wish(&mut self, host: &str, wish: Wish) -> Result<(), StoreError> {
        let sql = "UPDATE worker SET wish = $2 WHERE host = $1";
        self.client.execute(sql, &[&host, &wish.name()])?;
        Ok(())
    }

    /// The workers for operators.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn workers(&mut self) -> Result<Workers, StoreError> {
        let rows = self
            .client
            .query("SELECT looked_at, more_absent FROM worker_look", &[])?;
        let row = rows.first();
        let looked_at = row.map(|row| row.get(0));
        let more_lost_tasks = row.and_then(|row| row.get(1));
        let known = self.known_workers()?;
        let mut tasks = self.tasks_of_workers()?;
        let mut ended = self.ended_tasks()?;
        let views = known.workers.into_values().map(|worker| {
            let tasks = tasks.remove(&worker.host).unwrap_or_default();
            let ended = ended.remove(&worker.host).unwrap_or_default();
            WorkerView::new(worker, tasks, ended)
        });
        Ok(Workers {
            looked_at,
            workers: views.collect(),
            lost_tasks: self.told_losses()?,
            more_lost_tasks: more_lost_tasks.unwrap_or(0),
        })
    }

    /// Of jobs that have not ended since.
    fn told_losses(&mut self) -> Result<Vec<LostTask>, StoreError> {
        let rows = self.client.query(
            "SELECT job.job_id, job.celery_id, since,
                    CASE WHEN step.job_id IS NULL THEN running_at IS NULL
                         ELSE step.started_at IS NULL END AS never_begun
             FROM absent_task JOIN job ON job.job_id = absent_task.job_id
                                       AND job.celery_id = absent_task.celery_id
                  LEFT JOIN job_step AS step ON step.job_id = job.job_id
                                             AND step.celery_id = job.celery_id
             WHERE is_told
               AND NOT EXISTS (SELECT FROM job_history AS ended WHERE ended.job_id = job.job_id)
             ORDER BY since, job.job_id",
            &[],
        )?;
        let lost = rows.iter().map(|row| LostTask {
            job_id: row.get("job_id"),
            task_id: row.get("celery_id"),
            since: row.get("since"),
            never_begun: row.get("never_begun"),
        });
        Ok(lost.collect())
    }

    fn tasks_of_workers(&mut self) -> Result<HashMap<String, Vec<TaskView>>, StoreError> {
        let rows = self.client.query(
            "SELECT host, worker_task.celery_id, worker_task.task, worker_task.job_id,
                    left(coalesce(job.job_reference, ended.job_reference), 300) AS job_reference,
                    coalesce(job.workflow_type, ended.workflow_type) AS workflow_type, step.title,
                    coalesce(step.started_at, its.running_at,
                             CASE WHEN ended.celery_id = worker_task.celery_id
                                  THEN ended.running_at END,
                             first_seen) AS since,
                    coalesce(step.outcome, ended.outcome) AS outcome,
                    coalesce(step.finished_at, ended.finished_at) AS finished_at
             FROM worker_task
                  LEFT JOIN job ON job.job_id = worker_task.job_id
                  LEFT JOIN job AS its ON its.job_id = worker_task.job_id
                                       AND its.celery_id = worker_task.celery_id
                  LEFT JOIN job_history AS ended ON ended.job_id = worker_task.job_id
                  LEFT JOIN job_step AS step ON step.job_id = worker_task.job_id
                                             AND step.celery_id = worker_task.celery_id
             WHERE is_current ORDER BY host, since, celery_id",
            &[],
        )?;
        let mut tasks: HashMap<String, Vec<TaskView>> = HashMap::new();
        for row in &rows {
            let reference: Option<String> = row.try_get("job_reference")?;
            tasks
                .entry(row.try_get("host")?)
                .or_default()
                .push(TaskView {
                    id: row.try_get("celery_id")?,
                    name: row.try_get("task")?,
                    job_id: row.try_get("job_id")?,
                    reference: reference.filter(|reference| !reference.is_empty()),
                    workflow: row.try_get("workflow_type")?,
                    step: row.try_get("title")?,
                    since: row.try_get("since")?,
                    ended: end_of_task(row)?,
                });
        }
        Ok(tasks)
    }

    /// How many of the tasks that each worker was seen with have ended, and how many of them badly.
    fn ended_tasks(&mut self) -> Result<HashMap<String, (i64, i64)>, StoreError> {
        let rows = self.client.query(
            "SELECT host, count(outcome) AS ended,
                    count(outcome) FILTER (WHERE outcome NOT IN ('SUCCEEDED', 'CANCELLED')) AS failed
             FROM (SELECT host, coalesce(step.outcome, ended.outcome) AS outcome
                   FROM worker_task
                        LEFT JOIN job_step AS step ON step.job_id = worker_task.job_id
                                                   AND step.celery_id = worker_task.celery_id
                        LEFT JOIN job_history AS ended ON ended.job_id = worker_task.job_id
                                                       AND ended.celery_id = worker_task.celery_id
                   WHERE NOT is_current AND last_seen >= now() - interval '1 hour') AS tasks
             GROUP BY host",
            &[],
        )?;
        Ok(rows
            .iter()
            .map(|row| (row.get("host"), (row.get("ended"), row.get("failed"))))
            .collect())
    }
}

impl Transaction<'_> {
    /// The wish is an operator's, and goes with the process that it is about.
    fn keep_workers(&mut self, workers: &[Worker]) -> Result<(), StoreError> {
        fn column<'w, T: 'w>(workers: &'w [Worker], of: impl Fn(&'w Worker) -> T) -> Vec<T> {
            workers.iter().map(of).collect()
        }
        self.execute(
            "INSERT INTO worker (host, state, state_since, first_seen, last_seen, misses, pid, began_at,
                                 pool, pool_size, prefetch, celery, queues, serves, process_count,
                                 begun, samples)
             SELECT * FROM unnest($1::varchar[], $2::varchar[], $3::timestamptz[], $4::timestamptz[],
                 $5::timestamptz[], $6::integer[], $7::bigint[], $8::timestamptz[], $9::varchar[],
                 $10::bigint[], $11::bigint[], $12::varchar[], $13::text[], $14::text[],
                 $15::bigint[], $16::bigint[], $17::text[])
             ON CONFLICT (host) DO UPDATE SET
                 state = excluded.state, state_since = excluded.state_since,
                 last_seen = excluded.last_seen, misses = excluded.misses, pid = excluded.pid,
                 began_at = excluded.began_at, pool = excluded.pool, pool_size = excluded.pool_size,
                 prefetch = excluded.prefetch, celery = excluded.celery, queues = excluded.queues,
                 serves = excluded.serves, process_count = excluded.process_count,
                 begun = excluded.begun, samples = excluded.samples,
                 wish = CASE WHEN worker.pid IS NOT DISTINCT FROM excluded.pid
                              AND worker.began_at IS NOT DISTINCT FROM excluded.began_at
                             THEN worker.wish END",
            &[
                &column(workers, |worker| worker.host.as_str()),
                &column(workers, |worker| worker.state.name()),
                &column(workers, |worker| worker.state_since),
                &column(workers, |worker| worker.first_seen),
                &column(workers, |worker| worker.last_seen),
                &column(workers, |worker| worker.misses),
                &column(workers, |worker| worker.pid),
                &column(workers, |worker| worker.began_at),
                &column(workers, |worker| worker.pool.as_deref()),
                &column(workers, |worker| worker.pool_size),
                &column(workers, |worker| worker.prefetch),
                &column(workers, |worker| worker.celery.as_deref()),
                &column(workers, |worker| json(&worker.queues)),
                &column(workers, |worker| json(&worker.serves)),
                &column(workers, |worker| worker.process_count),
                &column(workers, |worker| worker.begun),
                &column(workers, |worker| json(&worker.samples)),
            ],
        )?;
        Ok(())
    }

    fn keep_tasks(&mut self, workers: &[Worker], now: Timestamp) -> Result<(), StoreError> {
        let tasks: Vec<_> = workers
            .iter()
            .flat_map(|worker| worker.tasks.iter().map(|task| (worker.host.as_str(), task)))
            .collect();
        let hosts: Vec<_> = tasks.iter().map(|(host, _)| *host).collect();
        let ids: Vec<_> = tasks.iter().map(|(_, task)| task.id.as_str()).collect();
        self.execute(
            "UPDATE worker_task SET is_current = false
             WHERE is_current AND NOT EXISTS (
                 SELECT FROM unnest($1::varchar[], $2::varchar[]) AS now (host, celery_id)
                 WHERE now.host = worker_task.host AND now.celery_id = worker_task.celery_id)",
            &[&hosts, &ids],
        )?;
        self.execute(
            "INSERT INTO worker_task (host, celery_id, task, job_id, first_seen, last_seen, is_current)
             SELECT host, celery_id, task, job_id, first_seen, $6, true
             FROM unnest($1::varchar[], $2::varchar[], $3::varchar[], $4::uuid[], $5::timestamptz[])
                  AS now (host, celery_id, task, job_id, first_seen)
             ON CONFLICT (host, celery_id) DO UPDATE SET
                 last_seen = excluded.last_seen, is_current = true,
                 job_id = coalesce(excluded.job_id, worker_task.job_id)",
            &[
                &hosts,
                &ids,
                &tasks
                    .iter()
                    .map(|(_, task)| task.name.as_str())
                    .collect::<Vec<_>>(),
                &tasks.iter().map(|(_, task)| task.job_id).collect::<Vec<_>>(),
                &tasks
                    .iter()
                    .map(|(_, task)| task.first_seen)
                    .collect::<Vec<_>>(),
                &now,
            ],
        )?;
        self.execute(
            "WITH gone AS (
                 -- Of a job that has not ended the story is still to be told.
                 DELETE FROM worker_task
                 WHERE NOT is_current AND last_seen < $1::timestamptz - interval '1 hour'
                   AND NOT EXISTS (SELECT FROM job WHERE job.job_id = worker_task.job_id)
                 RETURNING host, celery_id, job_id, first_seen, last_seen
             ), by_job AS (
                 SELECT job_id, json_agg(json_build_object(
                            'host', host, 'task_id', celery_id, 'first_seen', first_seen,
                            'last_seen', last_seen) ORDER BY first_seen)::text AS hosts
                 FROM (
                     SELECT *, row_number() OVER (PARTITION BY job_id ORDER BY first_seen) AS place
                     FROM gone WHERE job_id IS NOT NULL
                 ) AS placed WHERE place <= $2 GROUP BY job_id
             )
             UPDATE job_story
             SET hosts = (coalesce(job_story.hosts, '[]')::jsonb || by_job.hosts::jsonb)::text
             FROM by_job WHERE job_story.job_id = by_job.job_id
               AND coalesce(octet_length(job_story.hosts), 0) < 10000",
            &[&now, &MAX_SEEN],
        )?;
        Ok(())
    }

    fn keep_absences(&mut self, absences: &[Absence]) -> Result<(), StoreError> {
        fn column<'a, T: 'a>(absences: &'a [Absence], of: impl Fn(&'a Absence) -> T) -> Vec<T> {
            absences.iter().map(of).collect()
        }
        self.execute("DELETE FROM absent_task", &[])?;
        self.execute(
            "INSERT INTO absent_task (celery_id, job_id, since, confirmed_at, may_wait, is_told)
             SELECT * FROM unnest($1::varchar[], $2::uuid[], $3::timestamptz[], $4::timestamptz[],
                                  $5::boolean[], $6::boolean[])
             ON CONFLICT DO NOTHING",
            &[
                &column(absences, |one| one.task_id.as_str()),
                &column(absences, |one| one.job_id),
                &column(absences, |one| one.since),
                &column(absences, |one| one.confirmed_at),
                &column(absences, |one| one.may_wait),
                &column(absences, |one| one.is_told),
            ],
        )?;
        Ok(())
    }
}

fn json(list: &impl serde::Serialize) -> String {
    serde_json::to_string(list).expect("texts, times and numbers always serialize")
}

/// What a later version has written and this one does not understand is seen anew at the next look.
fn worker(row: &Row, tasks: Vec<CurrentTask>) -> Result<Worker, postgres::Error> {
    let state = named(WorkerState::ALL, WorkerState::name, row.try_get("state")?);
    let wish: Option<&str> = row.try_get("wish")?;
    let wish = wish.and_then(|wish| named(Wish::ALL, |one| one.name(), wish).ok());
    let list = |name: &str| -> Result<BTreeSet<String>, postgres::Error> {
        Ok(serde_json::from_str(row.try_get(name)?).unwrap_or_default())
    };
    Ok(Worker {
        host: row.try_get("host")?,
        state: state.unwrap_or(WorkerState::Silent),
        state_since: row.try_get("state_since")?,
        first_seen: row.try_get("first_seen")?,
        last_seen: row.try_get("last_seen")?,
        misses: row.try_get("misses")?,
        pid: row.try_get("pid")?,
        began_at: row.try_get("began_at")?,
        pool: row.try_get("pool")?,
        pool_size: row.try_get("pool_size")?,
        prefetch: row.try_get("prefetch")?,
        celery: row.try_get("celery")?,
        queues: list("queues")?,
        serves: list("serves")?,
        wish,
        process_count: row.try_get("process_count")?,
        begun: row.try_get("begun")?,
        samples: serde_json::from_str(row.try_get("samples")?).unwrap_or_default(),
        tasks,
    })
}

/// What a later version has written and this one does not understand is no end.
fn end_of_task(row: &Row) -> Result<Option<TaskEnd>, postgres::Error> {
    let outcome: Option<&str> = row.try_get("outcome")?;
    let outcome = outcome.and_then(|name| named(Outcome::ALL, Outcome::name, name).ok());
    let at: Option<Timestamp> = row.try_get("finished_at")?;
    let end = outcome.zip(at);
    Ok(end.map(|(outcome, at)| TaskEnd { outcome, at }))
}

fn absence(row: &Row) -> Result<Absence, postgres::Error> {
    Ok(Absence {
        job_id: row.try_get("job_id")?,
        task_id: row.try_get("celery_id")?,
        since: row.try_get("since")?,
        confirmed_at: row.try_get("confirmed_at")?,
        may_wait: row.try_get("may_wait")?,
        is_told: row.try_get("is_told")?,
    })
}

fn running(row: &Row) -> Result<Running, postgres::Error> {
    Ok(Running {
        workflow: row.try_get("workflow_type")?,
        queue: row.try_get("queue")?,
        task: RunningTask {
            job_id: row.try_get("job_id")?,
            task_id: row.try_get("celery_id")?,
            queue: String::new(),
            priority: row.try_get("rank")?,
            submitted_at: row.try_get("submitted_at")?,
            started_at: row.try_get("started_at")?,
        },
    })
}
