//! Jobs that come and go, as many at once as there are always, from submission to result: what is open
//! beside them comes and goes too, so that a service that has been running for long is held against
//! itself.

use std::time::{Duration, Instant};

use amiquip::{Consumer, ConsumerMessage};
use anyhow::bail;
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use omotes_orchestrator::broker::{Link, Publisher};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::threads::Calls;
use uuid::Uuid;

use crate::load::{CLIENTS, Kind, Load, WORKFLOW, open, submission, task_of, unacknowledged};
use crate::site::Site;
use crate::viewers::Viewers;

/// So many jobs are under way.
const AT_ONCE: usize = 500;
/// So many at the most are submitted, or ended, together.
const TOGETHER: usize = 50;
const ESDL: usize = 2_000;
/// How long nothing may happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// What some jobs took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Flow {
    pub jobs: f64,
    pub seconds: f64,
    /// Milliseconds of processor time: of the service, RabbitMQ and Postgres.
    pub cpu: [f64; 3],
    /// What each page was told.
    pub bytes: f64,
}

impl Flow {
    fn add(&mut self, other: Flow) {
        self.jobs += other.jobs;
        self.seconds += other.seconds;
        self.bytes += other.bytes;
        for (sum, cpu) in self.cpu.iter_mut().zip(other.cpu) {
            *sum += cpu;
        }
    }
}

/// Has so many jobs done with no page open, then as many beside so many pages that are opened, and so on
/// by turns.
///
/// # Errors
/// RabbitMQ or the service is gone.
pub fn beside_pages(
    config: &Config,
    load: &Load,
    site: &Site,
    (rounds, jobs): (usize, usize),
    pages: usize,
) -> anyhow::Result<[Flow; 2]> {
    let ids: Vec<Uuid> = (0..2 * rounds * jobs).map(|_| Uuid::new_v4()).collect();
    load.listen(&ids, Kind::Result)?;
    let (stop, stopped) = bounded::<()>(0);
    std::thread::scope(|scope| {
        let worker = scope.spawn(move || work(config, load, &stopped));
        let flows = by_turns(config, site, &ids, jobs, pages);
        drop(stop);
        worker.join().expect("it does not panic")?;
        flows
    })
}

fn by_turns(
    config: &Config,
    site: &Site,
    ids: &[Uuid],
    jobs: usize,
    pages: usize,
) -> anyhow::Result<[Flow; 2]> {
    let mut client = Client {
        ids: ids.iter(),
        under_way: 0,
    };
    let link = Link::open(&config.sdk_rabbitmq, "bench")?;
    let calls = Calls::default();
    let mut publisher = Publisher::new(&link, &calls);
    let mut connection = open(&config.sdk_rabbitmq)?;
    let channel = connection.open_channel(None)?;
    let results = channel.basic_consume(CLIENTS, unacknowledged())?;
    let mut flows = [Flow::default(); 2];
    // It meets prepared statements and the like for the first time.
    client.go_on(&mut publisher, &results, jobs / 10)?;
    for turn in 0..ids.len() / jobs {
        let (began, cpu) = (Instant::now(), site.cpu());
        let viewers = match turn % 2 {
            0 => None,
            _ => Some(Viewers::open(&site.page()?, pages)?),
        };
        let done = client.go_on(&mut publisher, &results, jobs)?;
        let spent = site.cpu();
        let told = viewers.as_ref().map_or(0, Viewers::bytes);
        flows[turn % 2].add(Flow {
            jobs: done as f64,
            seconds: began.elapsed().as_secs_f64(),
            cpu: [0, 1, 2].map(|which| {
                let time: Duration = spent[which] - cpu[which];
                time.as_secs_f64() * 1000.0
            }),
            bytes: told as f64 / pages as f64,
        });
    }
    client.go_on(&mut publisher, &results, usize::MAX)?;
    drop(results);
    connection.close()?;
    Ok(flows)
}

struct Client<'a> {
    ids: std::slice::Iter<'a, Uuid>,
    under_way: usize,
}

impl Client<'_> {
    /// Waits for so many results or a few more, as far as there are any, and submits a job for each of
    /// them, as far as some are left.
    fn go_on(
        &mut self,
        publisher: &mut Publisher<'_>,
        results: &Consumer<'_>,
        count: usize,
    ) -> anyhow::Result<usize> {
        let mut done = 0;
        while done < count {
            let free = (AT_ONCE - self.under_way).min(TOGETHER);
            let new: Vec<_> = self.ids.by_ref().take(free).collect();
            let submissions = new.iter().map(|id| submission(**id, ESDL));
            publisher.publish(&submissions.collect::<Vec<_>>())?;
            self.under_way += new.len();
            if self.under_way == 0 {
                break;
            }
            if self.under_way == AT_ONCE || new.is_empty() {
                let ended = some(results)?.len();
                self.under_way -= ended;
                done += ended;
            }
        }
        Ok(done)
    }
}

/// The next messages, at least one.
fn some(consumer: &Consumer<'_>) -> anyhow::Result<Vec<amiquip::Delivery>> {
    let mut messages = Vec::new();
    let first = consumer.receiver().recv_timeout(PATIENCE);
    let others = consumer.receiver().try_iter().map(Ok);
    for message in std::iter::once(first).chain(others).take(TOGETHER) {
        match message {
            Ok(ConsumerMessage::Delivery(delivery)) => messages.push(delivery),
            Ok(_) | Err(RecvTimeoutError::Disconnected) => bail!("RabbitMQ is gone"),
            Err(RecvTimeoutError::Timeout) => bail!("nothing happens any more"),
        }
    }
    Ok(messages)
}

/// A worker: start, progress, result.
fn work(config: &Config, load: &Load, stopped: &Receiver<()>) -> anyhow::Result<()> {
    let mut connection = open(&config.celery_rabbitmq)?;
    let channel = connection.open_channel(None)?;
    let tasks = channel.basic_consume(WORKFLOW, unacknowledged())?;
    let link = Link::open(&config.task_rabbitmq, "bench")?;
    let calls = Calls::default();
    let mut publisher = Publisher::new(&link, &calls);
    loop {
        let first = crossbeam_channel::select! {
            recv(tasks.receiver()) -> message => message?,
            recv(stopped) -> _ => break,
        };
        let others = tasks.receiver().try_iter();
        let mut events = Vec::new();
        for message in std::iter::once(first).chain(others).take(TOGETHER) {
            let ConsumerMessage::Delivery(task) = message else {
                bail!("the tasks' queue is gone");
            };
            let task = task_of(&task.body, task.properties.correlation_id().as_deref())?;
            events.extend([
                load.start(&task),
                load.progress(&task),
                load.result(&task, ESDL),
            ]);
        }
        publisher.publish(&events)?;
    }
    drop(tasks);
    Ok(connection.close()?)
}
