//! The service's processes, and what they cost.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use crossbeam_channel::after;
use omotes_orchestrator::config;
use uuid::Uuid;

use crate::load::HELD;

/// How long a process may take to be ready, or to end.
const PATIENCE: Duration = Duration::from_secs(60);

pub fn pause(time: Duration) {
    let _ = after(time).recv();
}

pub struct Site {
    folder: PathBuf,
    program: PathBuf,
    /// Beside those of this process.
    pub variables: Vec<(&'static str, &'static str)>,
    replicas: Vec<Child>,
    /// Of all that have been stopped, in MiB.
    peak_memory: f64,
}

impl Site {
    pub fn new(folder: &Path, program: &Path) -> Site {
        Site {
            folder: folder.to_owned(),
            program: program.to_owned(),
            variables: Vec::new(),
            replicas: Vec::new(),
            peak_memory: 0.0,
        }
    }

    /// Starts replicas; the first one is connected when this returns.
    pub fn start(&mut self, replicas: usize) -> anyhow::Result<()> {
        for number in 1..=replicas {
            let log = self.folder.join(format!("replica-{number}.log"));
            let child = Command::new(&self.program)
                .arg("run")
                .envs(self.variables.iter().copied())
                .stdin(Stdio::null())
                .stderr(File::create(&log)?)
                .spawn()
                .with_context(|| self.program.display().to_string())?;
            self.replicas.push(child);
        }
        let log = self.folder.join("replica-1.log");
        let deadline = Instant::now() + PATIENCE;
        while !fs::read_to_string(&log)?.contains("connected; ") {
            ensure!(Instant::now() < deadline, "not ready: {}", log.display());
            pause(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Ends them in good order.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        self.peak_memory = self.peak_memory.max(self.status("VmHWM:"));
        for child in &mut self.replicas {
            let id = child.id().to_string();
            Command::new("kill").args(["-TERM", &id]).status()?;
        }
        for mut child in self.replicas.drain(..) {
            let deadline = Instant::now() + PATIENCE;
            loop {
                match child.try_wait()? {
                    Some(status) => {
                        ensure!(status.success(), "a replica ended with {status}");
                        break;
                    }
                    None if Instant::now() > deadline => bail!("a replica does not end"),
                    None => pause(Duration::from_millis(5)),
                }
            }
        }
        Ok(())
    }

    /// Processor time so far of all replicas, of RabbitMQ and of Postgres.
    pub fn cpu(&self) -> [Duration; 3] {
        let folder = &self.folder;
        let first_line = |path: &str| {
            let text = fs::read_to_string(folder.join(path)).unwrap_or_default();
            text.lines().next().unwrap_or_default().trim().to_owned()
        };
        let postmaster = first_line("postgres/data/postmaster.pid");
        let backends = format!("/proc/{postmaster}/task/{postmaster}/children");
        let backends = fs::read_to_string(backends).unwrap_or_default();
        [
            self.replicas
                .iter()
                .map(|child| cpu_of(&child.id().to_string()))
                .sum(),
            cpu_of(&first_line("rabbitmq/pid")),
            backends.split_whitespace().map(cpu_of).sum(),
        ]
    }

    /// Of the first replica, in MiB.
    pub fn memory(&self) -> f64 {
        self.status("VmRSS:")
    }

    /// How many entries the first replica's folder of this name in `/proc` has.
    ///
    /// # Errors
    /// It is gone.
    pub fn count(&self, name: &str) -> anyhow::Result<usize> {
        let id = self.replicas.first().context("no replica")?.id();
        Ok(fs::read_dir(format!("/proc/{id}/{name}"))?.count())
    }

    /// The most that a replica has had since this was asked, in MiB.
    pub fn peak_memory(&mut self) -> f64 {
        std::mem::take(&mut self.peak_memory)
    }

    fn status(&self, field: &str) -> f64 {
        let sizes = self.replicas.iter().filter_map(|child| {
            let status = fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
            let line = status.lines().find(|line| line.starts_with(field))?;
            line.split_whitespace().nth(1)?.parse::<f64>().ok()
        });
        sizes.fold(0.0, f64::max) / 1024.0
    }

    /// Where the first replica's status page is.
    ///
    /// # Errors
    /// It has not said so.
    pub fn page(&self) -> anyhow::Result<String> {
        let log = fs::read_to_string(self.folder.join("replica-1.log"))?;
        let line = log
            .lines()
            .find_map(|line| line.split_once("status page at "));
        let (_, url) = line.context("no status page in the log")?;
        Ok(url.trim().to_owned())
    }

    /// Runs a command of the service.
    ///
    /// # Errors
    /// It fails.
    pub fn command(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let done = Command::new(&self.program).args(arguments).status()?;
        ensure!(done.success(), "{arguments:?}: {done}");
        Ok(())
    }

    /// Makes so many jobs be there, a few of them running, and as many in the history; or none.
    pub fn fill_jobs(
        &self,
        config: &config::Postgres,
        live: i32,
        finished: i32,
    ) -> anyhow::Result<()> {
        let mut client = sql(config)?;
        client.batch_execute(
            "TRUNCATE job_history, job_starts, job_step, job_input, job_turn; DELETE FROM job",
        )?;
        client.execute(
            "INSERT INTO job (job_id, celery_id, workflow_type, status, registered_at,
                              submitted_at, running_at, timeout_after_ms, job_reference, priority,
                              progress, progress_message, progress_at)
             SELECT gen_random_uuid(), gen_random_uuid()::text, 'bench',
                    (CASE WHEN number > 100 THEN 'SUBMITTED' ELSE 'RUNNING' END)::jobstatus,
                    now(), now() - number * interval '1 second', now(), 3600000,
                    'variant ' || number, 'MEDIUM', 0.5, 'a message', now()
             FROM generate_series(1, $1) AS number",
            &[&live],
        )?;
        if finished > 0 {
            self.fill_history(config, finished)?;
        }
        client.batch_execute("VACUUM ANALYZE job")?;
        Ok(())
    }

    /// Makes jobs wait for their turn at [`HELD`]: first these, then so many others.
    pub fn fill_held(
        &self,
        config: &config::Postgres,
        first: &[Uuid],
        others: i32,
    ) -> anyhow::Result<()> {
        let mut client = sql(config)?;
        client.execute(
            "WITH held AS (
                 SELECT id, now() - interval '1 day' + place * interval '10 ms' AS at
                 FROM unnest($1::uuid[] || ARRAY(
                     SELECT gen_random_uuid() FROM generate_series(1, $2::integer)
                 )) WITH ORDINALITY AS jobs (id, place)
             ), jobs AS (
                 INSERT INTO job (job_id, workflow_type, status, registered_at, job_reference,
                                  priority)
                 SELECT id, $3::text, 'REGISTERED', at, 'a reference', 'MEDIUM' FROM held
             ), turns AS (
                 INSERT INTO job_turn (job_id, queue, owner, priority, held_at)
                 SELECT id, $3::text, 'an owner', 'MEDIUM', at FROM held
             ), inputs AS (
                 INSERT INTO job_input (job_id, steps, parameters, reference, esdl, owner)
                 SELECT id, format('[{\"task\": \"%s\"}]', $3::text), '{}', '\"a reference\"',
                        '<esdl>' || repeat('x', 2000) || '</esdl>', 'an owner'
                 FROM held
             )
             INSERT INTO job_step (job_id, number, attempt, fallback, title, task)
             SELECT id, 1, 1, 0, $3::text, $3::text FROM held",
            &[&first, &others, &HELD],
        )?;
        client.batch_execute("VACUUM ANALYZE")?;
        Ok(())
    }

    /// Makes the history have so many jobs.
    pub fn fill_history(&self, config: &config::Postgres, jobs: i32) -> anyhow::Result<()> {
        let mut client = sql(config)?;
        client.execute(
            "INSERT INTO job_history (job_id, job_reference, workflow_type, celery_id, registered_at,
                                      submitted_at, running_at, finished_at, starts, outcome,
                                      result_bytes)
             SELECT gen_random_uuid(), 'a reference', 'bench', gen_random_uuid()::text, ended, ended,
                    ended, ended, 1, 'SUCCEEDED', 2000
             FROM (SELECT now() - number * interval '1 second' AS ended
                   FROM generate_series(1, $1) AS number) AS times",
            &[&jobs],
        )?;
        // Not in one batch, which would be a transaction.
        client.batch_execute("VACUUM ANALYZE job_history")?;
        client.batch_execute("CHECKPOINT")?;
        Ok(())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for child in &mut self.replicas {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// User and system time of a process, zero when it is gone.
fn cpu_of(process: &str) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // What follows the name, which is in parentheses. In hundredths of a second.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let times = fields.split_whitespace().skip(11).take(2);
    let ticks: u64 = times.filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * 10)
}

fn sql(config: &config::Postgres) -> anyhow::Result<postgres::Client> {
    let mut client = postgres::Config::new();
    client.dbname(&config.database);
    for server in &config.servers {
        client.host(&server.host).port(server.port);
    }
    if let Some(username) = &config.username {
        client.user(username);
    }
    if let Some(password) = &config.password {
        client.password(password.reveal());
    }
    client
        .connect(postgres::NoTls)
        .context("connecting to Postgres")
}
