//! How long a message takes through the service, one at a time, idle or beside other work.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{Channel, ConsumerMessage};
use anyhow::{Context, bail};
use omotes_orchestrator::broker::{Link, Publisher};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::threads::Calls;
use uuid::Uuid;

use crate::load::{CLIENTS, Kind, Load, open, submission, submission_to, task_of, unacknowledged};
use crate::site::pause;

const SAMPLES: usize = 500;
const ESDL: usize = 2_000;

pub struct Latencies {
    pub submissions: Vec<Duration>,
    pub results: Vec<Duration>,
}

/// Measures jobs of this workflow, beside `background` other submissions per second.
///
/// # Errors
/// RabbitMQ is gone.
pub fn measure(
    config: &Config,
    load: &Load,
    workflow: &str,
    background: f64,
) -> anyhow::Result<Latencies> {
    let jobs: Vec<Uuid> = (0..SAMPLES).map(|_| Uuid::new_v4()).collect();
    load.listen(&jobs, Kind::Result)?;
    let stopped = AtomicBool::new(false);
    thread::scope(|scope| {
        let others = scope.spawn(|| bother(config, background, &stopped));
        let latencies = sample(config, load, workflow, &jobs);
        stopped.store(true, Ordering::Relaxed);
        others.join().expect("it does not panic")?;
        latencies
    })
}

fn sample(
    config: &Config,
    load: &Load,
    workflow: &str,
    jobs: &[Uuid],
) -> anyhow::Result<Latencies> {
    let sdk = Link::open(&config.sdk_rabbitmq, "bench")?;
    let task = Link::open(&config.task_rabbitmq, "bench")?;
    let calls = Calls::default();
    let mut to_sdk = Publisher::new(&sdk, &calls);
    let mut to_task = Publisher::new(&task, &calls);
    let mut celery = open(&config.celery_rabbitmq)?;
    let celery_channel = celery.open_channel(None)?;
    let tasks = celery_channel.basic_consume(workflow, unacknowledged())?;
    let mut clients = open(&config.sdk_rabbitmq)?;
    let clients_channel: Channel = clients.open_channel(None)?;
    let heard = clients_channel.basic_consume(CLIENTS, unacknowledged())?;
    let mut latencies = Latencies {
        submissions: Vec::new(),
        results: Vec::new(),
    };
    for job in jobs {
        let began = Instant::now();
        to_sdk.send(&[submission_to(workflow, *job, ESDL)])?;
        let task = loop {
            let ConsumerMessage::Delivery(delivery) = tasks.receiver().recv()? else {
                bail!("the tasks' queue is gone");
            };
            let time = began.elapsed();
            let task = task_of(
                &delivery.body,
                delivery.properties.correlation_id().as_deref(),
            )?;
            if task.0 == *job {
                latencies.submissions.push(time);
                break task;
            }
        };
        to_sdk.confirm()?;
        let began = Instant::now();
        to_task.send(&[load.result(&task, ESDL)])?;
        let heard = heard.receiver().recv().context("no result")?;
        latencies.results.push(began.elapsed());
        let ConsumerMessage::Delivery(_) = heard else {
            bail!("the clients' queue is gone");
        };
        to_task.confirm()?;
    }
    Ok(latencies)
}

/// Submits so many jobs per second, evenly.
fn bother(config: &Config, per_second: f64, stopped: &AtomicBool) -> anyhow::Result<()> {
    if per_second <= 0.0 {
        return Ok(());
    }
    let sdk = Link::open(&config.sdk_rabbitmq, "bench")?;
    let calls = Calls::default();
    let mut publisher = Publisher::new(&sdk, &calls);
    let began = Instant::now();
    let mut sent: u32 = 0;
    while !stopped.load(Ordering::Relaxed) {
        let due = Duration::from_secs_f64(f64::from(sent) / per_second);
        pause(due.saturating_sub(began.elapsed()));
        publisher.publish(&[submission(Uuid::new_v4(), ESDL)])?;
        sent += 1;
    }
    Ok(())
}
