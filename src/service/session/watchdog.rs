//! Watches over the session's threads and ends them: when the service stops, when one of them
//! fails, when a broker call takes too long.

use std::collections::HashMap;
use std::process;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use crossbeam_channel::{Receiver, Sender, after, never, select, tick};
use jiff::{SignedDuration, Timestamp};
use log::{error, info, warn};

use super::crew::{Crew, Ended};
use super::{Shared, handler_names};
use crate::broker::DEADLINE;
use crate::fault_point;
use crate::service::handler::Work;
use crate::service::stuck;
use crate::telemetry::health::Part;
use crate::threads::{Calls, Signal};

/// How long the threads may take to finish what is in flight when the service stops.
const STOP_DEADLINE: Duration = Duration::from_secs(4);
/// How often it looks.
const PERIOD: Duration = Duration::from_secs(1);
/// A longer wait makes the service not ready.
const PATIENCE: Duration = Duration::from_secs(15);
/// A handler that has been busy with one step for this long, without waiting for anybody, will not
/// come back in time to be of use to this session.
const LOST_IN_THOUGHT: Duration = Duration::from_secs(2 * 60);
/// How long the threads of a failed session may take to end. Whatever they wait for is freed at
/// once, and no step of theirs takes long.
const END_DEADLINE: Duration = Duration::from_secs(60);
/// The same behind a pooler: without a Postgres, PgBouncer keeps what it is asked for 120 seconds
/// (`query_wait_timeout`) before it ends the connection.
const END_DEADLINE_POOLED: Duration = Duration::from_secs(240);
/// No statement takes this long while Postgres works: it ends each of them after 35 seconds.
const STUCK: Duration = Duration::from_secs(6 * 60);

pub(super) struct Watchdog<'s> {
    shared: &'s Shared<'s>,
    crew: Crew,
    /// To a handler, which tells clients the workflows.
    announcer: Sender<Work>,
    /// It had no room for that.
    announcement_is_due: bool,
    /// Why RabbitMQ blocks connections, by their names.
    blocked: HashMap<String, String>,
    /// Receives something when the threads should have ended long ago.
    too_late: Receiver<Instant>,
    /// What ended the session.
    cause: Option<anyhow::Error>,
}

impl<'s> Watchdog<'s> {
    pub(super) fn new(shared: &'s Shared<'s>, crew: Crew, announcer: Sender<Work>) -> Watchdog<'s> {
        Watchdog {
            shared,
            crew,
            announcer,
            announcement_is_due: false,
            blocked: HashMap::new(),
            too_late: never(),
            cause: None,
        }
    }
}

impl Watchdog<'_> {
    /// Watches until all threads have ended, and passes `stop` on to them.
    ///
    /// # Errors
    /// What ended the session before that.
    pub(super) fn run(mut self, stop: &Signal) -> anyhow::Result<()> {
        let ticks = tick(PERIOD);
        let mut stop = stop.receiver().clone();
        let mut deadline = never();
        while !self.crew.running.is_empty() {
            select! {
                recv(self.crew.reports) -> report => match report {
                    Ok(report) => self.ended(report),
                    Err(_) => break,
                },
                recv(stop) -> _ => {
                    stop = never();
                    deadline = after(STOP_DEADLINE);
                    self.stop_threads();
                }
                recv(deadline) -> _ => {
                    warn!("not all threads are done after {STOP_DEADLINE:?}; what they have in hand goes back to the queues");
                    self.shared.links.kill();
                }
                recv(self.too_late) -> _ => self.exit("the session has ended, but not all of its threads"),
                recv(self.shared.common.service.catalogue_news) -> _ => self.announce(),
                recv(ticks) -> _ => self.look(),
            }
        }
        self.cause.map_or(Ok(()), Err)
    }

    /// Has clients told of the new workflows, as soon as the handler has room for that. If the session
    /// ends before, the next one begins with it.
    fn announce(&mut self) {
        let taken = self.announcer.try_send(Work::WorkflowsChanged).is_ok();
        if !taken && !self.announcement_is_due {
            warn!("clients are told of the new workflows later: a handler has too much to do");
        }
        self.announcement_is_due = !taken;
    }

    fn is_stopping(&self) -> bool {
        self.crew.stop.is_none()
    }

    fn ended(&mut self, report: Ended) {
        let Ended { thread, outcome } = report;
        self.crew.running.remove(&thread);
        match outcome {
            Err(error) => self.fail(error.context(format!("thread {thread}"))),
            Ok(()) if !self.is_stopping() => {
                self.fail(anyhow!("thread {thread} ended without being asked to"));
            }
            Ok(()) => {}
        }
    }

    /// Ends the session; the first cause is the one that is reported.
    fn fail(&mut self, error: anyhow::Error) {
        self.stop_threads();
        self.shared.links.kill();
        if self.cause.is_none() {
            // At once, not when all threads have ended.
            self.shared.common.service.no_session(&error);
            warn!("the session with RabbitMQ ends: {error:#}");
            self.cause = Some(error);
        }
    }

    fn stop_threads(&mut self) {
        if self.crew.stop.take().is_some() {
            let deadline = match self.shared.common.service.config.postgres.is_pooled {
                true => END_DEADLINE_POOLED,
                false => END_DEADLINE,
            };
            self.too_late = after(fault_point::patience(deadline));
        }
    }

    /// Ends the process, since there is no other way to free its threads; its supervisor restarts
    /// it. What is in flight returns to the queues.
    fn exit(&self, why: &str) -> ! {
        let names: Vec<_> = self.crew.running.iter().map(String::as_str).collect();
        let mut text = format!("{why}: {}", names.join(", "));
        for (watched, name) in self.shared.watched.iter().zip(handler_names()) {
            if self.crew.running.contains(&name) {
                text += &format!("; {name} {}", watched.doing());
            }
        }
        error!("{text}");
        stuck::log_threads();
        error!("exiting, to be started again");
        process::exit(1);
    }

    /// Checks what the threads are waiting for.
    fn look(&mut self) {
        if self.announcement_is_due {
            self.announce();
        }
        self.shared.intake.wake();
        if self.shared.intake.is_full() {
            // The answer is queued behind messages that are not read yet.
            self.shared.pulse.consuming.restart();
        }
        let to_broker = self
            .shared
            .watched
            .iter()
            .flat_map(|watched| [&watched.sdk, &watched.celery, &watched.task])
            .chain([&self.shared.pulse.publishing, &self.shared.pulse.consuming])
            .chain([&self.shared.inquiry.celery, &self.shared.turns.celery]);
        let longest = to_broker.filter_map(Calls::current).max();
        if let Some(wait) = longest.filter(|wait| *wait > DEADLINE) {
            self.fail(anyhow!("RabbitMQ has not answered for {wait:.0?}"));
        }
        for link in self.shared.links.publishing() {
            match link.blocked_news() {
                None => {}
                Some(None) => drop(self.blocked.remove(link.name())),
                Some(Some(reason)) => drop(self.blocked.insert(link.name().to_owned(), reason)),
            }
        }
        let blocked = self.blocked.iter().next();
        let fault = blocked
            .map(|(name, reason)| format!("{name}: blocked by RabbitMQ: {reason}"))
            .or_else(|| {
                let wait = longest.filter(|wait| *wait > PATIENCE)?;
                Some(format!("RabbitMQ has not answered for {wait:.0?}"))
            });
        self.report(Part::Publishing, fault);
        self.look_at_handlers();
        let in_postgres = self.shared.watched.iter().map(|watched| &watched.postgres);
        let aside = [
            &self.shared.maintenance,
            &self.shared.inquiry.postgres,
            &self.shared.turns.postgres,
        ];
        let stuck = in_postgres.chain(aside).any(|calls| {
            let wait = calls.current();
            wait.is_some_and(|wait| wait > STUCK)
        });
        if stuck {
            // Postgres itself ends every statement earlier, so it is not Postgres that answers. A
            // thread in such a call cannot be freed; a supervisor restarts the process.
            self.exit(&format!("Postgres has not answered for {STUCK:?}"));
        }
    }

    /// Checks whether messages get through, and whether a handler is lost for good.
    fn look_at_handlers(&mut self) {
        let patience = fault_point::patience(PATIENCE);
        let limit = fault_point::patience(LOST_IN_THOUGHT);
        let mut held_up = None;
        let mut lost = None;
        for (watched, name) in self.shared.watched.iter().zip(handler_names()) {
            let wait = watched.postgres.current();
            let own = watched.busy_itself().map(|(time, what)| {
                let since = SignedDuration::try_from(time).unwrap_or_default();
                let since = Timestamp::now() - since;
                let text = format!("{name} has been {what} for {time:.0?}, since {since:.0}");
                (time, text)
            });
            if let Some((time, text)) = &own
                && *time > limit
            {
                lost = Some(text.clone());
            }
            let for_postgres = || {
                let wait = wait.filter(|wait| *wait > PATIENCE)?;
                Some(format!(
                    "{name} has been waiting for Postgres for {wait:.0?}"
                ))
            };
            let by_itself = || {
                own.filter(|(time, _)| *time > patience)
                    .map(|(_, text)| text)
            };
            held_up = held_up
                .or_else(|| watched.trouble())
                .or_else(for_postgres)
                .or_else(by_itself);
        }
        match (lost, self.shared.common.closed.trouble()) {
            (Some(text), _) => self.fail(anyhow!(text)),
            // Already logged by the handler that found out.
            (None, Some(trouble)) if held_up.is_none() && self.cause.is_none() => {
                let (health, now) = (&self.shared.common.service.health, Timestamp::now());
                health.report(Part::Handling, Some(trouble), now);
            }
            (None, _) => self.report(Part::Handling, held_up),
        }
    }

    /// Updates the health and, if that is news, logs it.
    fn report(&self, part: Part, fault: Option<String>) {
        if self.cause.is_some() {
            // Nothing is known any more about a failed session.
            return;
        }
        let line = match &fault {
            Some(fault) => fault.clone(),
            None => format!("{}: works again", part.name()),
        };
        let faulty = fault.is_some();
        if self
            .shared
            .common
            .service
            .health
            .report(part, fault, Timestamp::now())
        {
            if faulty {
                warn!("{line}");
            } else {
                info!("{line}");
            }
        }
    }
}
