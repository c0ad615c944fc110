//! How soon Celery's workers answer where there are many, and all of them compute.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use jiff::Timestamp;
use omotes_orchestrator::broker::{Link, Publisher, Question};
use omotes_orchestrator::config::{Config, RabbitMq};
use omotes_orchestrator::domain::worker::Answer;
use omotes_orchestrator::threads::{Calls, Signal};
use omotes_orchestrator::wire::workers::Control;
use serde_json::Value;
use uuid::Uuid;

use crate::load::submission_to;
use crate::site::{Site, pause};

/// How many workers there are of each SDK.
pub const OF_EACH: usize = 25;
/// The environments of `run.sh` with the oldest and the newest Celery.
pub const SDKS: [&str; 2] = ["sdk-4.1", "sdk-4.3"];
pub const WORKERS: usize = OF_EACH * SDKS.len();
/// The workflow whose tasks compute until they are killed, and their queue.
const WORKFLOW: &str = "bench_crew";
/// How often they are asked.
const LOOKS: usize = 10;
/// As long as the service waits.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// How long so many processes may take to begin on a small machine, and a change to be seen.
const PATIENCE: Duration = Duration::from_secs(300);

/// Workers made with the SDK; dropped, they are killed with all their children.
pub struct Crew {
    workers: Vec<(String, Child)>,
}

pub struct Answers {
    /// From the questions until a worker has answered all of them.
    pub times: Vec<Duration>,
    /// How many of the workers had answered in time, of the worst look.
    pub fewest: usize,
}

impl Crew {
    /// Starts the workers, whose environments are below `venvs`, and waits until they take tasks.
    ///
    /// # Errors
    /// They do not begin.
    pub fn start(config: &RabbitMq, venvs: &Path, folder: &Path) -> anyhow::Result<Crew> {
        let folder = folder.join("crew");
        fs::create_dir_all(&folder)?;
        let mut crew = Crew {
            workers: Vec::with_capacity(WORKERS),
        };
        let mut logs = Vec::with_capacity(WORKERS);
        for sdk in SDKS {
            for number in 1..=OF_EACH {
                let host = format!("{sdk}-{number}");
                let log = folder.join(format!("{host}.log"));
                let child = command(config, &venvs.join(sdk).join("bin/python"), &host)
                    .stdout(File::create(&log)?)
                    .stderr(File::create(log.with_extension("err"))?)
                    .spawn()
                    .with_context(|| format!("the environment {sdk}"))?;
                crew.workers
                    .push((format!("worker-{WORKFLOW}@{host}"), child));
                logs.push(log);
            }
        }
        until("workers that are ready", || {
            Ok(logs.iter().all(|log| is_ready(log)))
        })?;
        Ok(crew)
    }

    /// The first worker of an SDK.
    fn first(&mut self, sdk: &str) -> anyhow::Result<&mut (String, Child)> {
        let place = SDKS.iter().position(|one| *one == sdk);
        let place = place.context("no such SDK")? * OF_EACH;
        Ok(&mut self.workers[place])
    }

    /// How long it is until the service says that a worker, stopped or killed, is in that state.
    ///
    /// # Errors
    /// It never does.
    pub fn seen_after(
        &mut self,
        sdk: &str,
        signal: &str,
        state: &str,
        site: &Site,
    ) -> anyhow::Result<Duration> {
        let (host, child) = self.first(sdk)?;
        // A stopped container stops as a whole, and so does a killed one.
        send(child, signal)?;
        let began = Instant::now();
        let host = host.clone();
        until(state, || {
            let seen = states(site)?;
            Ok(seen.get(&host).is_some_and(|now| now == state))
        })?;
        Ok(began.elapsed())
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for (_, child) in &mut self.workers {
            // It may have been killed before.
            let _ = send(child, "-KILL");
            let _ = child.wait();
        }
    }
}

fn command(config: &RabbitMq, python: &Path, host: &str) -> Command {
    let server = &config.servers[0];
    let mut command = Command::new(python);
    command
        .arg("tests/python/worker.py")
        .env("RABBITMQ_HOSTNAME", &server.host)
        .env("RABBITMQ_PORT", server.port.to_string())
        .env("RABBITMQ_USERNAME", &config.username)
        .env("RABBITMQ_PASSWORD", config.password.reveal())
        .env("RABBITMQ_VIRTUALHOST", &config.vhost)
        .env("WORKER_HOST", host)
        .env("WORKER_TASK", WORKFLOW)
        .env("LOG_LEVEL", "INFO")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null())
        // A group of its own: its children end with it.
        .process_group(0);
    command
}

fn is_ready(log: &Path) -> bool {
    let files: [PathBuf; 2] = [log.to_owned(), log.with_extension("err")];
    let mut said = files.iter().filter_map(|file| fs::read(file).ok());
    said.any(|said| String::from_utf8_lossy(&said).contains(" ready."))
}

fn send(child: &Child, signal: &str) -> anyhow::Result<()> {
    let group = format!("-{}", child.id());
    let sent = Command::new("kill")
        .args([signal, "--", &group])
        .stderr(Stdio::null())
        .status()?;
    ensure!(sent.success(), "kill {signal}: {sent}");
    Ok(())
}

/// Gives each worker a task that computes as long as it lives.
///
/// # Errors
/// RabbitMQ is gone, or the service does not come to see all of them busy.
pub fn give_work(config: &Config, site: &Site) -> anyhow::Result<()> {
    let sdk = Link::open(&config.sdk_rabbitmq, "bench")?;
    let calls = Calls::default();
    let mut publisher = Publisher::new(&sdk, &calls);
    let jobs: Vec<_> = (0..WORKERS)
        .map(|_| submission_to(WORKFLOW, Uuid::new_v4(), 2_000))
        .collect();
    publisher.publish(&jobs)?;
    sees(site, "busy")
}

/// Waits until the service has all workers in this state.
///
/// # Errors
/// It never does.
pub fn sees(site: &Site, state: &str) -> anyhow::Result<()> {
    until(&format!("all workers {state}"), || {
        let seen = states(site)?;
        Ok(seen.values().filter(|now| *now == state).count() == WORKERS)
    })
}

/// What the service says that each worker is.
fn states(site: &Site) -> anyhow::Result<BTreeMap<String, String>> {
    let mut answer = ureq::get(format!("{}api/workers", site.page()?)).call()?;
    let seen: Value = answer.body_mut().read_json()?;
    let workers = seen["workers"].as_array().context("no workers")?;
    let text = |worker: &Value, key: &str| worker[key].as_str().unwrap_or_default().to_owned();
    Ok(workers
        .iter()
        .map(|worker| (text(worker, "host"), text(worker, "state")))
        .collect())
}

/// Asks the workers what the service asks them, some times.
///
/// # Errors
/// RabbitMQ is gone.
pub fn ask(config: &RabbitMq) -> anyhow::Result<Answers> {
    let link = Link::open(config, "bench")?;
    let mut answers = Answers {
        times: Vec::new(),
        fewest: WORKERS,
    };
    for clock in 0..LOOKS {
        let times = look(&link, i64::try_from(clock)?)?;
        answers.fewest = answers.fewest.min(times.len());
        answers.times.extend(times);
    }
    ensure!(!answers.times.is_empty(), "nobody has answered");
    Ok(answers)
}

fn look(link: &Link, clock: i64) -> anyhow::Result<Vec<Duration>> {
    let now = Timestamp::now();
    let questions = Control::LOOK.map(|control| {
        let key = Uuid::new_v4().to_string();
        Question {
            message: control.message(None, &key, clock, now),
            key,
        }
    });
    let began = Instant::now();
    let mut complete = Vec::new();
    let mut answers: BTreeMap<String, Answer> = BTreeMap::new();
    let note = |place: usize, answer: &[u8]| {
        Control::LOOK[place].note(answer, &mut answers);
        let all = |answer: &&Answer| {
            answer.stats.is_some() && answer.tasks.is_some() && answer.queues.is_some()
        };
        let now_complete = answers.values().filter(all).count();
        complete.resize(now_complete, began.elapsed());
        match now_complete {
            WORKERS => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    };
    let (_never, stop) = Signal::pending();
    link.ask(&questions, ANSWER_TIME, &Calls::default(), &stop, note)?;
    Ok(complete)
}

fn until(what: &str, is_so: impl Fn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is_so()? {
        if Instant::now() > deadline {
            bail!("in vain waited for: {what}");
        }
        pause(Duration::from_millis(100));
    }
    Ok(())
}
