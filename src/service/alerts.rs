//! Tells a webhook of troubles, where there is one. One replica tells for all what all of them see; which
//! that is stays so as long as it lives. Of its own readiness each replica can tell without a database:
//! that one at once, and the others only when it lasts, for the first may have gone with the
//! database. What is told, and when, is decided in [`crate::domain::alerts`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use log::{debug, info, warn};

use crate::config::Alerts;
use crate::domain::alerts::{Alert, Event, Key, Message, Seen, Trouble, messages};
use crate::domain::overview::{LonelyQueue, Overview, spoken};
use crate::domain::text::one_line;
use crate::domain::worker::{WorkerState, Workers};
use crate::service::shared::Service;
use crate::store::{Connection, StoreError, Upkeep};
use crate::telemetry::health::{Part, PartView};
use crate::telemetry::trouble::trouble;
use crate::threads::Signal;
use crate::webhook;
use crate::wire::DEAD_LETTERS_QUEUE;

/// Between two looks; less where troubles are to be told sooner.
const PERIOD: Duration = Duration::from_secs(10);
/// After so many periods without a word of the replica that tells, another one does.
const PERIODS_OF_SILENCE: u32 = 4;
/// How many times longer a replica that does not tell for all waits before it tells of its own readiness.
const PATIENCE: i32 = 3;
/// Between attempts to reach a receiver, doubled each time.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LAST_PAUSE: Duration = Duration::from_secs(300);
/// Attempts to tell one thing, over more than an hour.
const MOST_ATTEMPTS: u32 = 20;
/// How long after its start a replica can say that no job waits without a worker: it counts from its own
/// first look on.
const SETTLED: Duration = Duration::from_secs(45);
/// How old a look at the workers may be.
const RECENT: SignedDuration = SignedDuration::from_mins(2);

/// Looks periodically, until `stop` is given.
pub fn run(service: &Service, alerts: &Alerts, stop: &Signal) {
    let mut teller = Teller {
        service,
        alerts,
        stop,
        tells_for_all: false,
        of_itself: BTreeMap::new(),
        attempts: BTreeMap::new(),
        pause: None,
        begun: Instant::now(),
    };
    info!("troubles are told to {}", one_line(&webhook::host(alerts)));
    let period = PERIOD.min(alerts.after.max(Duration::from_secs(1)));
    while !stop.comes_within(period) {
        teller.look(period);
    }
}

struct Teller<'s> {
    service: &'s Service,
    alerts: &'s Alerts,
    stop: &'s Signal,
    /// As far as is known.
    tells_for_all: bool,
    /// What was told of this replica's own readiness.
    of_itself: BTreeMap<Key, Timestamp>,
    /// How often each message has failed to arrive.
    attempts: BTreeMap<Key, u32>,
    /// After a failure: until when nothing is sent, and how long the next pause is.
    pause: Option<(Instant, Duration)>,
    begun: Instant,
}

impl Teller<'_> {
    fn look(&mut self, period: Duration) {
        let now = Timestamp::now();
        let (_, parts) = self.service.health.parts(now);
        let has_postgres = parts
            .iter()
            .any(|part| part.part == Part::Postgres && part.why.is_none());
        if has_postgres && let Err(error) = self.look_for_all(&parts, period, now) {
            // The session and the probe log the same outages.
            debug!("troubles cannot be looked for: {error:#}");
        }
        self.look_at_itself(&parts, now);
    }

    /// What all replicas see, if it is for this one to tell.
    fn look_for_all(
        &mut self,
        parts: &[PartView],
        period: Duration,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let mut connection = self.service.store.connection()?;
        let silence = match self.tells_for_all {
            true => period,
            false => period * PERIODS_OF_SILENCE,
        };
        self.tells_for_all = connection.claim(Upkeep::Alerts, silence)?;
        if !self.tells_for_all {
            return Ok(());
        }
        let told = connection.told_troubles()?;
        let overview = self.service.overview(&mut connection)?;
        // Nobody else is to wait for it while a receiver takes its time.
        drop(connection);
        let mut seen = seen(&overview, parts, self.alerts, now);
        if self.begun.elapsed() < SETTLED {
            seen.known.remove(&Alert::NoWorker);
        }
        let begun = Instant::now();
        for message in self.in_order(messages(&told, &seen, self.after(1), now)) {
            // For longer than that another replica might take this one for gone, and tell the same.
            if begun.elapsed() > PERIOD || !self.tell(&message, now) {
                break;
            }
            let mut connection = self.service.store.connection()?;
            note(&mut connection, &message)?;
        }
        Ok(())
    }

    fn look_at_itself(&mut self, parts: &[PartView], now: Timestamp) {
        let seen = Seen {
            troubles: readiness(parts, &self.service.host).into_iter().collect(),
            known: BTreeSet::from([Alert::NotReady]),
        };
        let after = match self.tells_for_all {
            true => self.after(1),
            false => self.after(PATIENCE),
        };
        for message in messages(&self.of_itself, &seen, after, now) {
            if !self.tell(&message, now) {
                break;
            }
            match message.event {
                Event::Begins => drop(self.of_itself.insert(message.key, message.since)),
                Event::Ends | Event::Test => drop(self.of_itself.remove(&message.key)),
            }
        }
    }

    fn after(&self, times: i32) -> SignedDuration {
        SignedDuration::try_from(self.alerts.after).unwrap_or(SignedDuration::MAX) * times
    }

    /// Those first that have failed least, so that one that is never taken does not hold up the others.
    fn in_order(&self, mut messages: Vec<Message>) -> Vec<Message> {
        messages.sort_by_key(|message| self.attempts.get(&message.key).copied().unwrap_or(0));
        messages
    }

    /// Sends a message. Returns whether it is done with: it has arrived, or was given up.
    fn tell(&mut self, message: &Message, now: Timestamp) -> bool {
        if self.pause.is_some_and(|(until, _)| Instant::now() < until) {
            return false;
        }
        let (alert, subject) = &message.key;
        let what = match message.event {
            Event::Begins => format!("{} {}", alert.name(), one_line(subject)),
            Event::Ends | Event::Test => {
                format!("the end of {} {}", alert.name(), one_line(subject))
            }
        };
        let body = message.json(&self.service.host, now);
        match webhook::send(self.alerts, &body, self.stop) {
            Ok(Some(())) => {
                info!("told the webhook: {}", what.trim_end());
                self.pause = None;
                self.attempts.remove(&message.key);
                true
            }
            Ok(None) => false,
            Err(error) => self.failed(message, &what, &error),
        }
    }

    fn failed(&mut self, message: &Message, what: &str, error: &anyhow::Error) -> bool {
        let what = what.trim_end();
        let pause = self.pause.map_or(FIRST_PAUSE, |(_, next)| next);
        if self.pause.is_none() {
            warn!("the webhook was not told {what}, which is tried again: {error:#}");
        } else {
            debug!("the webhook still was not told {what}: {error:#}");
        }
        let next = (pause * 2).min(LAST_PAUSE);
        self.pause = Some((Instant::now() + pause, next));
        let attempts = self.attempts.entry(message.key.clone()).or_default();
        *attempts += 1;
        let is_given_up = *attempts >= MOST_ATTEMPTS;
        if is_given_up {
            self.attempts.remove(&message.key);
            warn!(
                "the webhook is not told {what}: given up after {MOST_ATTEMPTS} attempts: {error:#}"
            );
        }
        is_given_up
    }
}

fn note(connection: &mut Connection, message: &Message) -> Result<(), StoreError> {
    match message.event {
        Event::Begins => connection.note_told(&message.key, message.since),
        Event::Ends | Event::Test => connection.note_over(&message.key),
    }
}

/// Why this replica is not ready. An alarm of RabbitMQ is a trouble of its own.
fn readiness(parts: &[PartView], host: &str) -> Option<Trouble> {
    let trouble = trouble(parts).filter(|trouble| trouble.cause != Part::Publishing)?;
    Some(Trouble {
        key: (Alert::NotReady, host.to_owned()),
        since: trouble.since,
        what: format!("{}: {}", trouble.what, one_line(&trouble.why)),
        remedy: trouble.remedy.to_owned(),
    })
}

fn found(alert: Alert, subject: &str, since: Timestamp, what: String) -> Trouble {
    Trouble {
        key: (alert, subject.to_owned()),
        since,
        what,
        remedy: alert.remedy().to_owned(),
    }
}

/// What all replicas see. What cannot be looked at is not known.
fn seen(overview: &Overview, parts: &[PartView], alerts: &Alerts, now: Timestamp) -> Seen {
    let mut seen = Seen::default();
    look_at_rabbitmq(overview, parts, now, &mut seen);
    let workers = overview.workers.as_ref();
    let is_recent = |workers: &&Workers| {
        let at = workers.looked_at;
        at.is_some_and(|at| now.duration_since(at) <= RECENT)
    };
    if let Some(workers) = workers.filter(is_recent) {
        look_at_workers(workers, now, &mut seen);
    }
    if overview.has_rows {
        seen.known.insert(Alert::JobsWaitLong);
        let age = SignedDuration::try_from(alerts.queue_age).unwrap_or(SignedDuration::MAX);
        let oldest = overview.oldest_waiting();
        let late = oldest.and_then(|since| since.checked_add(age).ok());
        if let Some(since) = late.filter(|since| *since <= now) {
            let what = format!("A job has been waiting for more than {}.", spoken(age));
            seen.troubles
                .push(found(Alert::JobsWaitLong, "", since, what));
        }
    }
    seen
}

fn look_at_rabbitmq(overview: &Overview, parts: &[PartView], now: Timestamp, seen: &mut Seen) {
    let works = |wanted: Part| {
        parts
            .iter()
            .any(|one| one.part == wanted && one.why.is_none())
    };
    if works(Part::Broker) {
        seen.known.insert(Alert::RabbitMqAlarm);
        let publishing = parts.iter().find(|one| one.part == Part::Publishing);
        if let Some(why) = publishing.and_then(|one| one.why.as_ref())
            && let Some(since) = publishing.map(|one| one.since)
        {
            let what = format!("RabbitMQ takes no messages: {}", one_line(why));
            seen.troubles
                .push(found(Alert::RabbitMqAlarm, "", since, what));
        }
    }
    let Some(queues) = &overview.queues else {
        return;
    };
    seen.known.extend([Alert::NoWorker, Alert::DeadLetters]);
    let lonely = overview.lonely();
    for workflow in overview.workflows() {
        if let Some(since) = workflow.without_worker_since {
            let name = one_line(&workflow.name);
            let own = overview.tasks.get(&workflow.name);
            let queue = lonely.iter().find(|lonely| match own {
                Some(tasks) => tasks.contains(&lonely.queue),
                None => lonely.queue == workflow.name,
            });
            let what = match queue.filter(|lonely| lonely.queue != workflow.name) {
                Some(LonelyQueue { queue, .. }) => format!(
                    "Jobs of {name} wait in the queue {}, which has no worker.",
                    one_line(queue)
                ),
                None => format!("Jobs wait for {name}, which has no worker."),
            };
            seen.troubles
                .push(found(Alert::NoWorker, &workflow.name, since, what));
        }
    }
    let letters = queues
        .queues
        .iter()
        .filter(|queue| queue.name == DEAD_LETTERS_QUEUE);
    for queue in letters {
        if let Some(depth) = queue.depth.filter(|depth| depth.messages > 0) {
            let what = match depth.messages {
                1 => "1 message could not be handled.".to_owned(),
                more => format!("{more} messages could not be handled."),
            };
            seen.troubles
                .push(found(Alert::DeadLetters, queue.vhost.name(), now, what));
        }
    }
}

fn look_at_workers(workers: &Workers, now: Timestamp, seen: &mut Seen) {
    seen.known
        .extend([Alert::WorkerSilent, Alert::TasksLost, Alert::TasksInVain]);
    let silent = workers.workers.iter();
    for worker in silent.filter(|worker| worker.state == WorkerState::Silent) {
        let what = format!(
            "The worker does not answer, though it is connected to RabbitMQ; last seen {} ago{}.",
            spoken(now.duration_since(worker.last_seen)),
            worker.jobs_in_words()
        );
        let trouble = found(Alert::WorkerSilent, &worker.host, worker.since, what);
        seen.troubles.push(trouble);
    }
    for lost in &workers.lost_tasks {
        let what = format!(
            "The job is stuck: no worker has its task {}{}.",
            one_line(&lost.task_id),
            match lost.never_begun {
                true => ", which none has begun, and it is in no queue",
                false => "",
            }
        );
        let trouble = found(Alert::TasksLost, &lost.job_id.to_string(), lost.since, what);
        seen.troubles.push(trouble);
    }
    if let (Some(more), Some(first)) = (workers.more_lost(usize::MAX), workers.lost_tasks.first()) {
        let trouble = found(
            Alert::TasksLost,
            "more jobs",
            first.since,
            format!("{more}."),
        );
        seen.troubles.push(trouble);
    }
    for one in workers.in_vain() {
        let what = format!("The {}.", one.in_words(now));
        let subject = format!("{} {}", one.worker.host, one.job_id);
        seen.troubles
            .push(found(Alert::TasksInVain, &subject, one.end.at, what));
    }
}
