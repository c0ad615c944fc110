//! Whether a submission, a start and the page take longer where very many tasks wait for their turn.

use std::time::{Duration, Instant};

use amiquip::{Consumer, ConsumerMessage, Delivery};
use anyhow::bail;
use omotes_orchestrator::broker::{Link, Publisher};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::threads::Calls;
use uuid::Uuid;

use crate::load::{CLIENTS, HELD, Kind, Load, open, submission_to, task_of, unacknowledged};
use crate::site::Site;

pub const SAMPLES: usize = 300;
const ESDL: usize = 2_000;

pub struct Times {
    /// From a submission until its client hears that it is enqueued.
    pub submissions: Vec<Duration>,
    /// From a result until the next task is with its worker.
    pub starts: Vec<Duration>,
    pub pages: Vec<Duration>,
    pub lists: Vec<Duration>,
}

/// Measures beside what waits at [`HELD`], where the first tasks to go are those of `first`.
///
/// # Errors
/// RabbitMQ or the service is gone.
pub fn measure(config: &Config, load: &Load, site: &Site, first: &[Uuid]) -> anyhow::Result<Times> {
    let new: Vec<Uuid> = (0..SAMPLES).map(|_| Uuid::new_v4()).collect();
    load.listen(&new, Kind::Held)?;
    load.listen(first, Kind::Result)?;
    let submissions = submissions(config, &new)?;
    site.command(&["workflows", "limit", HELD, "--max-running", "1"])?;
    site.command(&["workflows", "resume", HELD])?;
    let starts = starts(config, load)?;
    site.command(&["workflows", "pause", HELD])?;
    let address = site.page()?;
    Ok(Times {
        submissions,
        starts,
        pages: requests(&address)?,
        lists: requests(&format!("{address}api/jobs"))?,
    })
}

fn submissions(config: &Config, jobs: &[Uuid]) -> anyhow::Result<Vec<Duration>> {
    let sdk = Link::open(&config.sdk_rabbitmq, "bench")?;
    let calls = Calls::default();
    let mut publisher = Publisher::new(&sdk, &calls);
    let mut clients = open(&config.sdk_rabbitmq)?;
    let channel = clients.open_channel(None)?;
    let heard = channel.basic_consume(CLIENTS, unacknowledged())?;
    let mut times = Vec::with_capacity(jobs.len());
    for job in jobs {
        let began = Instant::now();
        publisher.send(&[submission_to(HELD, *job, ESDL)])?;
        next(&heard)?;
        times.push(began.elapsed());
        publisher.confirm()?;
    }
    Ok(times)
}

fn starts(config: &Config, load: &Load) -> anyhow::Result<Vec<Duration>> {
    let task = Link::open(&config.task_rabbitmq, "bench")?;
    let calls = Calls::default();
    let mut publisher = Publisher::new(&task, &calls);
    let mut celery = open(&config.celery_rabbitmq)?;
    let channel = celery.open_channel(None)?;
    let tasks = channel.basic_consume(HELD, unacknowledged())?;
    let mut times = Vec::with_capacity(SAMPLES);
    let mut current = next(&tasks)?;
    for _ in 0..SAMPLES {
        let id = current.properties.correlation_id().as_deref();
        let task = task_of(&current.body, id)?;
        let began = Instant::now();
        publisher.send(&[load.result(&task, ESDL)])?;
        current = next(&tasks)?;
        times.push(began.elapsed());
        publisher.confirm()?;
    }
    Ok(times)
}

/// How long the service takes to answer this.
///
/// # Errors
/// It does not.
pub fn requests(address: &str) -> anyhow::Result<Vec<Duration>> {
    let mut times = Vec::with_capacity(SAMPLES);
    for _ in 0..SAMPLES {
        let began = Instant::now();
        let mut answer = ureq::get(address).call()?;
        answer.body_mut().read_to_string()?;
        times.push(began.elapsed());
    }
    Ok(times)
}

fn next(consumer: &Consumer<'_>) -> anyhow::Result<Delivery> {
    match consumer.receiver().recv()? {
        ConsumerMessage::Delivery(delivery) => Ok(delivery),
        _ => bail!("the queue is gone"),
    }
}
