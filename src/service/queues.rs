//! Looks at RabbitMQ's queues periodically: how many messages wait, and whether somebody consumes
//! them. It uses connections of its own, so it never disturbs the session's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use log::{debug, info, warn};

use crate::broker::{DEADLINE, Link};
use crate::config::{Config, RabbitMq};
use crate::domain::overview::{Queue, Queues};
use crate::domain::vhost::Vhost;
use crate::domain::worker;
use crate::service::shared::Service;
use crate::store::StoreError;
use crate::threads::{Signal, within_deadline};
use crate::wire;

const PERIOD: Duration = Duration::from_secs(5);
/// How long a missing task queue is not asked for again, unless a job waits for it.
const ABSENT_PERIOD: Duration = Duration::from_secs(5 * 60);
/// Workers may be reconnecting, after a restart of RabbitMQ or their own.
const PATIENCE: SignedDuration = SignedDuration::from_secs(30);

/// Looks every few seconds, until `stop` is given.
pub fn run(service: &Service, stop: &Signal) {
    let mut watch: Option<Watch> = None;
    let mut without_worker = WithoutWorker::default();
    let mut absent = Absent::default();
    loop {
        // Jobs may belong to workflows that are no longer defined.
        let of_jobs = service.views.connection();
        let of_jobs = of_jobs.and_then(|mut connection| connection.tasks_of_jobs());
        let catalogue = service.catalogue.get();
        let of_jobs = of_jobs.unwrap_or_default().into_iter();
        let of_jobs: BTreeSet<_> = of_jobs.flat_map(|name| catalogue.tasks_of(&name)).collect();
        let mut names: Vec<_> = catalogue.tasks().into_iter().map(str::to_owned).collect();
        names.extend(of_jobs.iter().cloned());
        names.sort_unstable();
        names.dedup();
        let looked = match watch.take() {
            Some(watch) => Ok(watch),
            None => Watch::open(&service.config),
        }
        .and_then(|watch| {
            let (known_absent, worth_a_look): (Vec<_>, Vec<_>) = names
                .into_iter()
                .partition(|name| !of_jobs.contains(name) && absent.is_known(name));
            let mut queues = watch.look(&service.config, &worth_a_look)?;
            absent.note(&queues);
            queues.extend(known_absent.into_iter().map(|name| Queue {
                vhost: Vhost::Celery,
                name,
                depth: None,
            }));
            Ok((watch, queues))
        });
        let queues = match looked {
            Ok((open, queues)) => {
                watch = Some(open);
                let now = Timestamp::now();
                let lonely = lonely(&queues);
                let past = match lonely.is_empty() {
                    true => Past::default(),
                    false => past(service).unwrap_or_default(),
                };
                let without_worker = without_worker.look(lonely, &past, now);
                Some(Queues {
                    at: now,
                    queues,
                    without_worker,
                })
            }
            // The session logs the same outage.
            Err(error) => {
                debug!("the queues cannot be looked at: {error:#}");
                None
            }
        };
        *service
            .queues
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = queues;
        if stop.comes_within(PERIOD) {
            return;
        }
    }
}

/// Task queues that do not exist, such as those of a workflow before its first job or worker.
/// RabbitMQ logs an error for each question about one, so they are not asked for every time.
#[derive(Default)]
struct Absent {
    since: BTreeMap<String, Instant>,
}

impl Absent {
    fn is_known(&self, name: &str) -> bool {
        let since = self.since.get(name);
        since.is_some_and(|since| since.elapsed() < ABSENT_PERIOD)
    }

    fn note(&mut self, queues: &[Queue]) {
        for queue in queues.iter().filter(|queue| queue.vhost == Vhost::Celery) {
            match queue.depth {
                Some(_) => self.since.remove(&queue.name),
                None => self.since.insert(queue.name.clone(), Instant::now()),
            };
        }
    }
}

/// The connections that are looked at: one for each vhost.
pub struct Watch {
    links: Vec<(RabbitMq, Link)>,
}

impl Watch {
    /// # Errors
    /// As [`Link::open`].
    pub fn open(config: &Config) -> anyhow::Result<Watch> {
        let mut links: Vec<(RabbitMq, Link)> = Vec::new();
        for one in [
            &config.sdk_rabbitmq,
            &config.task_rabbitmq,
            &config.celery_rabbitmq,
        ] {
            if !links.iter().any(|(known, _)| known == one) {
                links.push((one.clone(), Link::open(one, "looking at queues")?));
            }
        }
        Ok(Watch { links })
    }

    /// All queues that matter here: the service's own, and those of these workflows' tasks.
    ///
    /// # Errors
    /// A connection is lost, or RabbitMQ takes too long.
    pub fn look(&self, config: &Config, workflows: &[String]) -> anyhow::Result<Vec<Queue>> {
        let kill = || self.links.iter().for_each(|(_, link)| link.kill());
        within_deadline(DEADLINE, kill, || self.look_at_all(config, workflows))
    }

    fn look_at_all(&self, config: &Config, workflows: &[String]) -> anyhow::Result<Vec<Queue>> {
        let letters = wire::DEAD_LETTERS_QUEUE;
        let sdk = [wire::SUBMISSIONS_QUEUE, wire::CANCELS_QUEUE, letters];
        let task = [
            config.task_result_queue.as_str(),
            &config.task_progress_queue,
            letters,
        ];
        let task = match config.task_rabbitmq == config.sdk_rabbitmq {
            true => &task[..2],
            false => &task[..],
        };
        let celery: Vec<&str> = workflows.iter().map(String::as_str).collect();
        let mut queues = Vec::new();
        for (vhost, names) in [
            (Vhost::Sdk, &sdk[..]),
            (Vhost::Task, task),
            (Vhost::Celery, &celery),
        ] {
            let rabbitmq = config.rabbitmq(vhost);
            let mut links = self.links.iter();
            let Some((_, link)) = links.find(|(known, _)| known == rabbitmq) else {
                continue;
            };
            let depths = link.depths_in_time(names)?;
            queues.extend(names.iter().zip(depths).map(|(name, depth)| Queue {
                vhost,
                name: (*name).to_owned(),
                depth,
            }));
        }
        Ok(queues)
    }
}

/// What the database knows of task queues' past.
#[derive(Default)]
struct Past {
    /// Since when workers have said, or been seen, to take nothing from them.
    deserted: BTreeMap<String, Timestamp>,
    /// Since when the oldest job that waits there waits.
    oldest: BTreeMap<String, Timestamp>,
}

fn past(service: &Service) -> Result<Past, StoreError> {
    let mut connection = service.views.connection()?;
    let tasks = service.catalogue.get().tasks_by_workflow();
    let mut past = Past {
        deserted: worker::deserted(&connection.known_workers()?.workers),
        oldest: BTreeMap::new(),
    };
    for queued in connection.queued()? {
        let queue = match (queued.queue, tasks.get(&queued.workflow).map(Vec::as_slice)) {
            (Some(queue), _) => queue,
            (None, Some([task])) => task.clone(),
            (None, _) => queued.workflow,
        };
        let oldest = past.oldest.entry(queue).or_insert(queued.oldest);
        *oldest = queued.oldest.min(*oldest);
    }
    Ok(past)
}

/// Task queues in which something waits, and which nobody takes.
fn lonely(queues: &[Queue]) -> BTreeSet<&str> {
    let tasks = queues.iter().filter(|queue| queue.vhost == Vhost::Celery);
    tasks
        .filter(|queue| {
            let depth = queue.depth;
            depth.is_some_and(|depth| depth.consumers == 0 && depth.messages > 0)
        })
        .map(|queue| queue.name.as_str())
        .collect()
}

/// Task queues in which jobs wait although they have no worker.
#[derive(Default)]
struct WithoutWorker {
    /// When each was first seen so, and since when it is so.
    since: BTreeMap<String, (Timestamp, Timestamp)>,
    /// Those already logged.
    warned_of: BTreeSet<String>,
    /// Whether nothing was seen before.
    has_looked: bool,
}

impl WithoutWorker {
    /// Those that have had no worker for a while. Each outage is logged once.
    fn look(
        &mut self,
        without_worker: BTreeSet<&str>,
        past: &Past,
        now: Timestamp,
    ) -> BTreeMap<String, Timestamp> {
        self.since
            .retain(|name, _| without_worker.contains(name.as_str()));
        for name in without_worker {
            let oldest = past.oldest.get(name).copied();
            let (noticed, since) = match past.deserted.get(name) {
                // Its workers were gone before: none of them is on its way back.
                Some(until) => {
                    let since = oldest.map_or(*until, |oldest| oldest.max(*until));
                    // Where workers come as jobs do, they are given their time.
                    (since, since)
                }
                // It was so before this replica was started, for as long as nobody knows.
                None if !self.has_looked => (now, oldest.unwrap_or(now)),
                None => (now, now),
            };
            let entry = (noticed.min(now), since.min(now));
            self.since.entry(name.to_owned()).or_insert(entry);
        }
        self.has_looked = true;
        let long = self
            .since
            .iter()
            .filter(|(_, (noticed, _))| now.duration_since(*noticed) >= PATIENCE);
        let long: BTreeMap<_, _> = long
            .map(|(name, (_, since))| (name.clone(), *since))
            .collect();
        for name in long.keys().filter(|name| !self.warned_of.contains(*name)) {
            warn!("task queue {name}: jobs wait, and there is no worker");
        }
        for name in self
            .warned_of
            .iter()
            .filter(|name| !long.contains_key(*name))
        {
            info!("task queue {name}: no job waits without a worker any more");
        }
        self.warned_of = long.keys().cloned().collect();
        long
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::domain::overview::Depth;

    #[test]
    fn an_outage_counts_when_it_lasts() {
        let queues = |messages, consumers| {
            [Queue {
                vhost: Vhost::Celery,
                name: "simulator".to_owned(),
                depth: Some(Depth {
                    messages,
                    consumers,
                }),
            }]
        };
        let at = |second| Timestamp::from_second(second).unwrap();
        let mut without_worker = WithoutWorker::default();
        for (second, messages, consumers, since) in [
            (0, 0, 0, None),
            (10, 1, 0, None),
            (39, 2, 0, None),
            (40, 2, 0, Some(10)),
            (50, 2, 1, None),
            (60, 2, 0, None),
            (90, 2, 0, Some(60)),
            (95, 0, 0, None),
        ] {
            let queues = queues(messages, consumers);
            let found = without_worker.look(lonely(&queues), &Past::default(), at(second));
            assert_eq!(
                found.get("simulator").copied(),
                since.map(at),
                "after {second} s"
            );
        }
    }

    /// What is told at second 100 in the first look of a replica, and half a minute later.
    #[rstest]
    #[case::nothing_is_known(None, None, None, Some(100))]
    #[case::its_workers_had_gone(Some(40), None, Some(40), Some(40))]
    #[case::its_job_came_later(Some(40), Some(60), Some(60), Some(60))]
    #[case::its_workers_have_just_gone(Some(80), Some(10), None, Some(80))]
    #[case::nobody_has_seen_its_workers(None, Some(10), None, Some(10))]
    fn a_replica_that_has_just_been_started_knows_what_was_before(
        #[case] deserted: Option<i64>,
        #[case] oldest: Option<i64>,
        #[case] at_once: Option<i64>,
        #[case] later: Option<i64>,
    ) {
        let at = |second| Timestamp::from_second(second).unwrap();
        let known = |second: Option<i64>| {
            let time = second.map(|second| ("simulator".to_owned(), at(second)));
            time.into_iter().collect()
        };
        let past = Past {
            deserted: known(deserted),
            oldest: known(oldest),
        };
        let mut without_worker = WithoutWorker::default();
        for (second, expected) in [(100, at_once), (130, later)] {
            let found = without_worker.look(BTreeSet::from(["simulator"]), &past, at(second));
            let found = found.get("simulator").copied();
            assert_eq!(found, expected.map(at), "at {second}");
        }
    }
}
