//! Moderate load for a long time: does anything grow?

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use amiquip::{Consumer, ConsumerMessage, Delivery, FieldTable};
use anyhow::{Context, bail, ensure};
use crossbeam_channel::RecvTimeoutError;
use omotes_orchestrator::broker::{Link, Publisher};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::threads::Calls;
use omotes_orchestrator::wire::{self, OMOTES_EXCHANGE};
use uuid::Uuid;

use crate::load::{CLIENTS, Kind, Load, WORKFLOW, open, submission, task_of, unacknowledged};
use crate::site::{Site, pause};

const JOBS_PER_SECOND: u32 = 20;
const PROGRESS_PER_JOB: usize = 10;
const SMALL: usize = 2_000;
const LARGE: usize = 1_000_000;
/// How often is looked.
const PERIOD: Duration = Duration::from_secs(60);
/// What the last jobs may take to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// How far the load is; shared by its threads.
#[derive(Default)]
struct Tally {
    stopped: AtomicBool,
    submitted: AtomicU64,
    ended: AtomicU64,
}

/// Some jobs are cancelled, and some have a large ESDL; their ids tell which.
fn is_cancelled(job: Uuid) -> bool {
    job.as_bytes()[0] < 12
}

fn esdl_of(job: Uuid) -> usize {
    if job.as_bytes()[1] < 3 { LARGE } else { SMALL }
}

/// Runs the load on a service that has been started, and prints each minute what it holds.
///
/// # Errors
/// RabbitMQ is gone, or a job is without a result.
pub fn run(
    config: &Config,
    load: &Load,
    site: &Site,
    folder: &Path,
    time: Duration,
) -> anyhow::Result<()> {
    load.listen(&[], Kind::Result)?;
    let tally = Tally::default();
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    thread::scope(|scope| {
        let client = scope.spawn(|| hear(config, &tally));
        let worker = scope.spawn(|| work(config, load, &tally));
        let submitter = scope.spawn(|| submit(config, time, &tally));
        let watched = watch(site, folder, &submitter, &tally);
        let submitted = submitter.join().expect("it does not panic");
        let deadline = Instant::now() + PATIENCE;
        while count(&tally.ended) < count(&tally.submitted) && Instant::now() < deadline {
            pause(Duration::from_millis(50));
        }
        tally.stopped.store(true, Ordering::Relaxed);
        worker.join().expect("it does not panic")?;
        client.join().expect("it does not panic")?;
        submitted?;
        let (submitted, ended) = (count(&tally.submitted), count(&tally.ended));
        ensure!(
            submitted == ended,
            "{submitted} jobs submitted, {ended} results"
        );
        println!("{submitted} jobs submitted, each with one result");
        watched
    })
}

/// Looks each minute until all jobs are submitted.
fn watch<T>(
    site: &Site,
    folder: &Path,
    submitter: &ScopedJoinHandle<'_, T>,
    tally: &Tally,
) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut next = PERIOD;
    println!("minutes  results  RSS MiB  threads  files  channels  CPU s");
    while !submitter.is_finished() {
        if began.elapsed() < next {
            pause(Duration::from_millis(100));
            continue;
        }
        next += PERIOD;
        println!(
            "{:>7.0} {:>8} {:>8.2} {:>8} {:>6} {:>9} {:>6.1}",
            began.elapsed().as_secs_f64() / 60.0,
            tally.ended.load(Ordering::Relaxed),
            site.memory(),
            site.count("task")?,
            site.count("fd")?,
            channels(folder)?,
            site.cpu()[0].as_secs_f64()
        );
    }
    Ok(())
}

/// At RabbitMQ, with those of the load, whose number stays the same.
fn channels(folder: &Path) -> anyhow::Result<usize> {
    let folder = folder.join("rabbitmq");
    let output = Command::new("./run.sh")
        .args(["private", "ctl"])
        .arg(&folder)
        .args(["--quiet", "list_channels", "--no-table-headers", "pid"])
        .output()
        .context("./run.sh")?;
    ensure!(
        output.status.success(),
        "rabbitmqctl: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.stdout.iter().filter(|byte| **byte == b'\n').count())
}

/// The clients that submit and cancel.
fn submit(config: &Config, time: Duration, tally: &Tally) -> anyhow::Result<()> {
    let mut connection = open(&config.sdk_rabbitmq)?;
    let channel = connection.open_channel(None)?;
    let link = Link::open(&config.sdk_rabbitmq, "bench")?;
    let calls = Calls::default();
    let mut publisher = Publisher::new(&link, &calls);
    let began = Instant::now();
    let mut due = Duration::ZERO;
    while due < time {
        pause(due.saturating_sub(began.elapsed()));
        due += Duration::from_secs(1) / JOBS_PER_SECOND;
        let job = Uuid::new_v4();
        let key = wire::result_queue(job);
        channel.queue_bind(CLIENTS, OMOTES_EXCHANGE, key, FieldTable::new())?;
        publisher.publish(&[submission(job, esdl_of(job))])?;
        tally.submitted.fetch_add(1, Ordering::Relaxed);
        if is_cancelled(job) {
            publisher.publish(&[wire::job_delete(job)])?;
        }
    }
    Ok(connection.close()?)
}

/// The clients that wait for results.
fn hear(config: &Config, tally: &Tally) -> anyhow::Result<()> {
    let mut connection = open(&config.sdk_rabbitmq)?;
    let channel = connection.open_channel(None)?;
    let results = channel.basic_consume(CLIENTS, unacknowledged())?;
    while let Some(result) = next(&results, tally)? {
        let key = result.routing_key;
        channel.queue_unbind(CLIENTS, OMOTES_EXCHANGE, key, FieldTable::new())?;
        tally.ended.fetch_add(1, Ordering::Relaxed);
    }
    drop(results);
    Ok(connection.close()?)
}

/// A worker: start, progress, result.
fn work(config: &Config, load: &Load, tally: &Tally) -> anyhow::Result<()> {
    let mut connection = open(&config.celery_rabbitmq)?;
    let channel = connection.open_channel(None)?;
    let tasks = channel.basic_consume(WORKFLOW, unacknowledged())?;
    let link = Link::open(&config.task_rabbitmq, "bench")?;
    let calls = Calls::default();
    let mut publisher = Publisher::new(&link, &calls);
    while let Some(task) = next(&tasks, tally)? {
        let task = task_of(&task.body, task.properties.correlation_id().as_deref())?;
        if is_cancelled(task.0) {
            continue;
        }
        let mut events = vec![load.start(&task)];
        events.extend((0..PROGRESS_PER_JOB).map(|_| load.progress(&task)));
        events.push(load.result(&task, esdl_of(task.0)));
        publisher.publish(&events)?;
    }
    drop(tasks);
    Ok(connection.close()?)
}

/// The next message, none when all is over.
fn next(consumer: &Consumer<'_>, tally: &Tally) -> anyhow::Result<Option<Delivery>> {
    loop {
        match consumer.receiver().recv_timeout(Duration::from_millis(100)) {
            Ok(ConsumerMessage::Delivery(delivery)) => return Ok(Some(delivery)),
            Ok(_) | Err(RecvTimeoutError::Disconnected) => bail!("RabbitMQ is gone"),
            Err(RecvTimeoutError::Timeout) if tally.stopped.load(Ordering::Relaxed) => {
                return Ok(None);
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}
