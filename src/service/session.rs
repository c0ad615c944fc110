//! One generation of broker connections with the threads that live on them. It ends as a whole:
//! when a connection is lost, when a thread fails, or when the service stops. Nothing of it lives
//! on in memory; what was not acknowledged goes back to the queues.

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use crossbeam_channel::{
    Receiver, RecvTimeoutError, Sender, after, bounded, never, select, tick, unbounded,
};
use jiff::{SignedDuration, Timestamp};
use log::{error, info, warn};

use crate::broker::intake::Intake;
use crate::broker::{self, Claim, DEADLINE, Delivered, Link, PublishError, Publisher, Received};
use crate::busy::Busy;
use crate::config::Config;
use crate::fault_point;
use crate::service::handler::{
    self, ClosedQueues, Handler, MAX_BATCH_MESSAGES, Publishers, Setting, Watched, Work, panic_text,
};
use crate::service::inquiry::{self, Inquiry};
use crate::service::maintenance;
use crate::service::requests;
use crate::service::shared::Service;
use crate::service::stuck;
use crate::telemetry::health::Part;
use crate::wire::{self, Inbox};

/// How long the threads may take to finish what is in hand when the service stops.
const STOP_DEADLINE: Duration = Duration::from_secs(4);
/// How many bytes of messages are in hand, beyond one message, before RabbitMQ is made to wait.
const MAX_IN_HAND: usize = 32 * 1024 * 1024;
/// How often the watchdog looks.
const WATCH_PERIOD: Duration = Duration::from_secs(1);
/// How often each connection is asked for an answer.
const PULSE_PERIOD: Duration = Duration::from_secs(5);
/// A wait that is longer makes the service unready.
const PATIENCE: Duration = Duration::from_secs(15);
/// A handler that has been at one step for so long without waiting for anybody does not come back
/// in time to be of use to this session.
const LOST_IN_THOUGHT: Duration = Duration::from_secs(2 * 60);
/// How long the threads of a session that has failed may take to end. Whatever they wait for is
/// freed at once, and no step of theirs takes long.
const END_DEADLINE: Duration = Duration::from_secs(60);
/// All the statements of a batch together never last as long, where Postgres has a say in it: it
/// ends each of them after 35 seconds.
const STUCK: Duration = Duration::from_secs(6 * 60);

/// The queues of each consumer thread. What a worker says of a task comes through two, and a start or
/// the last progress is of no use after the result.
const CONSUMERS: [(&str, &[Inbox]); 5] = [
    ("submissions", &[Inbox::Submissions]),
    ("cancels", &[Inbox::Cancels]),
    ("workflow-requests", &[Inbox::WorkflowRequests]),
    ("named-requests", &[Inbox::NamedWorkflowRequests]),
    ("events", &[Inbox::Progress, Inbox::Results]),
];

/// How many messages of a queue a consumer has in hand at most. RabbitMQ keeps the rest. Those whose
/// outcomes wait are in hand meanwhile and must not hold up a backlog, so there is room for as many
/// more as can become of one in that time.
fn prefetch(inbox: Inbox, outcome_delay: Duration) -> u16 {
    const ENDED_PER_MILLISECOND: u128 = 8;
    let waiting = u16::try_from(outcome_delay.as_millis() * ENDED_PER_MILLISECOND);
    let waiting = waiting.unwrap_or(u16::MAX);
    match inbox {
        Inbox::Submissions | Inbox::Results => waiting.saturating_add(1000),
        Inbox::Cancels => waiting.saturating_add(100),
        Inbox::Progress => 2000,
        Inbox::WorkflowRequests | Inbox::NamedWorkflowRequests => 20,
    }
}

/// How many messages of each queue may wait for one that takes nothing, of all handlers together:
/// most of what RabbitMQ hands out is to be for those that get through.
fn closed_queues() -> ClosedQueues {
    let prefetch = |inbox| usize::from(prefetch(inbox, Duration::ZERO));
    let limits = Inbox::ALL.map(|inbox| (inbox, prefetch(inbox) / 4));
    ClosedQueues::new(HashMap::from(limits), MAX_IN_HAND / 2)
}

/// A blocked publisher must not take the consumers down, hence the two directions of each vhost.
struct Links {
    sdk_in: Link,
    sdk_out: Link,
    task_in: Link,
    celery_out: Link,
    /// For dead letters of the workers' events, where their vhost is not the Celery tasks'.
    task_out: Option<Link>,
}

impl Links {
    fn open(config: &Config, intake: &Arc<Intake>) -> anyhow::Result<Links> {
        let Config {
            sdk_rabbitmq,
            task_rabbitmq,
            celery_rabbitmq,
            ..
        } = config;
        Ok(Links {
            sdk_in: Link::open_gated(sdk_rabbitmq, "SDK, consuming", intake)?,
            sdk_out: Link::open(sdk_rabbitmq, "SDK, publishing")?,
            task_in: Link::open_gated(task_rabbitmq, "TASK, consuming", intake)?,
            celery_out: Link::open(celery_rabbitmq, "CELERY, publishing")?,
            task_out: (task_rabbitmq != celery_rabbitmq)
                .then(|| Link::open(task_rabbitmq, "TASK, publishing"))
                .transpose()?,
        })
    }

    fn task_out(&self) -> &Link {
        self.task_out.as_ref().unwrap_or(&self.celery_out)
    }

    fn all(&self) -> impl Iterator<Item = &Link> {
        [&self.sdk_in, &self.sdk_out, &self.task_in, &self.celery_out]
            .into_iter()
            .chain(&self.task_out)
    }

    fn publishing(&self) -> impl Iterator<Item = &Link> {
        [&self.sdk_out, &self.celery_out]
            .into_iter()
            .chain(&self.task_out)
    }

    fn kill(&self) {
        self.all().for_each(Link::kill);
    }

    /// Closes all connections and returns what had ended those that were ended before.
    fn close(self) -> Vec<String> {
        let Links {
            sdk_in,
            sdk_out,
            task_in,
            celery_out,
            task_out,
        } = self;
        [sdk_in, task_in, sdk_out, celery_out]
            .into_iter()
            .chain(task_out)
            .filter_map(|link| link.close().err())
            .map(|error| format!("{error:#}"))
            .collect()
    }
}

/// Runs one session until `stop` is disconnected.
///
/// # Errors
/// What ended the session before.
pub fn run(service: &Service, stop: &Receiver<Infallible>) -> anyhow::Result<()> {
    let intake = Intake::new(MAX_IN_HAND);
    let links = Links::open(&service.config, &intake)?;
    let outcome = broker::within_deadline(DEADLINE, || links.kill(), || prepare(service, &links))
        .and_then(|prepared| work(service, &links, &intake, prepared, stop));
    if outcome.is_err() {
        // A connection that is lost in silence or blocked would keep its close waiting.
        links.kill();
    }
    let causes = links.close();
    outcome.map_err(|error| match causes.is_empty() {
        true => error,
        false => error.context(format!("connections: {}", causes.join("; "))),
    })
}

/// What a session begins with.
struct Prepared {
    /// The queue behind each inbox.
    queue_names: HashMap<Inbox, String>,
    /// Whether the requests that are sent to their queue are answered here.
    claim: Claim,
}

/// Declares what the orchestrator and others rely on, and tells all clients the workflows.
fn prepare(service: &Service, links: &Links) -> anyhow::Result<Prepared> {
    let config = &service.config;
    let (results, progress) = (&config.task_result_queue, &config.task_progress_queue);
    links.sdk_in.declare_for_clients()?;
    links.task_in.declare_for_workers(&[results, progress])?;
    for link in [&links.sdk_out, links.task_out()] {
        match link.declare_dead_letters() {
            // It is tried again with the first letter.
            Err(PublishError::Unavailable(why) | PublishError::Refused(why)) => {
                warn!(
                    "{}: {} cannot be declared: {why}",
                    link.name(),
                    wire::DEAD_LETTERS_QUEUE
                );
            }
            declared => declared?,
        }
    }
    links.celery_out.declare_pidbox()?;
    // Each replica has its own, for a queue of all would need one that is exclusive to none; so a
    // client may get more than one answer. It is there before the workflows are told, lest a
    // client that asks meanwhile hears nothing.
    let requests = links
        .sdk_in
        .declare_private_queue(wire::OMOTES_EXCHANGE, wire::WORKFLOW_REQUESTS_KEY)?;
    let claim = requests::claim(&links.sdk_in)?;
    let announcement = wire::available_workflows(service.catalogue.get().announcement());
    // Before anything is consumed, so that it comes between the starts from before and after.
    service.store.connection()?.session_begins()?;
    let busy = Busy::default();
    Publisher::new(&links.sdk_out, &busy)
        .publish(&[announcement])
        .context("telling clients the workflows")?;
    let queue_names = HashMap::from([
        (Inbox::Submissions, wire::SUBMISSIONS_QUEUE.to_owned()),
        (Inbox::Cancels, wire::CANCELS_QUEUE.to_owned()),
        (Inbox::WorkflowRequests, requests),
        (
            Inbox::NamedWorkflowRequests,
            wire::WORKFLOW_REQUESTS_KEY.to_owned(),
        ),
        (Inbox::Progress, progress.clone()),
        (Inbox::Results, results.clone()),
    ]);
    Ok(Prepared { queue_names, claim })
}

/// How a thread of the session ended.
struct Report {
    thread: String,
    outcome: anyhow::Result<()>,
}

fn work(
    service: &Service,
    links: &Links,
    intake: &Intake,
    prepared: Prepared,
    stop: &Receiver<Infallible>,
) -> anyhow::Result<()> {
    let Prepared { queue_names, claim } = &prepared;
    let config = &service.config;
    let closed = closed_queues();
    let (nudge, nudges) = bounded(1);
    let setting = Setting {
        store: &service.store,
        catalogue: &service.catalogue,
        celery_sender: &service.celery_sender,
        revoke_clock: &service.revoke_clock,
        rules: &service.rules,
        metrics: &service.metrics,
        inquiry: nudge,
        queue_names,
        closed: &closed,
    };
    let watched: Vec<Watched> = (0..config.handler_threads)
        .map(|_| Watched::default())
        .collect();
    let pulse = Pulse::default();
    let maintenance_busy = Busy::default();
    let inquiry_watched = inquiry::Watched::default();
    let (report, reports) = unbounded();
    let (session_stop, session_stopped) = bounded::<Infallible>(0);

    thread::scope(|scope| {
        let mut done_senders = HashMap::new();
        let done_receivers = CONSUMERS.map(|(_, inboxes)| {
            let (sender, receiver) = unbounded();
            done_senders.extend(inboxes.iter().map(|inbox| (*inbox, sender.clone())));
            receiver
        });
        let mut handler_inputs = Vec::new();
        // What the handlers have not taken yet, for maintenance to see whether that is a backlog.
        let mut unread = Vec::new();
        let mut finding_inputs = Vec::new();
        let mut running = BTreeSet::new();
        for (number, watched) in watched.iter().enumerate() {
            // The broker hands out no more than the prefetch before something is acknowledged. So a
            // handler that is held up does not hold up the consumers.
            let (input, messages) = unbounded::<Work>();
            handler_inputs.push(input);
            unread.push(messages.clone());
            let (input, findings) = bounded::<Work>(maintenance::MAX_FINDINGS.into());
            finding_inputs.push(input);
            let publishers = Publishers {
                sdk: Publisher::new(&links.sdk_out, &watched.sdk),
                celery: Publisher::new(&links.celery_out, &watched.celery),
                task: Publisher::new(links.task_out(), &watched.task),
            };
            let handler = Handler::new(number, &setting, watched, publishers, done_senders.clone());
            let stopped = session_stopped.clone();
            let name = format!("handler-{}", number + 1);
            running.insert(name.clone());
            spawn(scope, name, &report, move || {
                handler.run(&messages, &findings, &stopped)
            })?;
        }
        // From here on only handlers hold them: a consumer knows by their end that no more comes.
        drop(done_senders);
        let (nobody_answers, vacant) = bounded(1);
        for ((name, inboxes), done) in CONSUMERS.into_iter().zip(done_receivers) {
            let link = match inboxes[0] {
                Inbox::Submissions
                | Inbox::Cancels
                | Inbox::WorkflowRequests
                | Inbox::NamedWorkflowRequests => &links.sdk_in,
                Inbox::Progress | Inbox::Results => &links.task_in,
            };
            let queues: Vec<_> = inboxes
                .iter()
                .map(|inbox| {
                    let prefetch = prefetch(*inbox, config.outcome_delay);
                    (queue_names[inbox].as_str(), prefetch)
                })
                .collect();
            let inputs = handler_inputs.clone();
            let (stopped, vacant) = (session_stopped.clone(), vacant.clone());
            let hand_over = move |place: usize, received: Received| {
                // One job's messages all go to one handler, which keeps their order.
                let job = catch_unwind(|| wire::job_id(&received.body));
                // What makes this panic makes its handler panic too, which puts it aside.
                let handler = job
                    .ok()
                    .flatten()
                    .map_or(0, |id| handler::index(id, inputs.len()));
                let inbox = inboxes[place];
                // A handler that is gone leaves it to the next session.
                let _ = inputs[handler].send(Work::Message { inbox, received });
            };
            let announcer = handler_inputs[0].clone();
            let name = format!("consume-{name}");
            running.insert(name.clone());
            spawn(scope, name, &report, move || {
                if inboxes[0] != Inbox::NamedWorkflowRequests {
                    return broker::consume(link, &queues, &stopped, &done, hand_over);
                }
                let (claim, prefetch) = (claim.clone(), queues[0].1);
                let answering = requests::Answering {
                    link,
                    prefetch,
                    announcer,
                    vacant,
                };
                answering.run(claim, &stopped, &done, hand_over)
            })?;
        }
        drop(handler_inputs);
        let (stopped, own_pulse) = (session_stopped.clone(), &pulse);
        spawn(scope, "pulse".to_owned(), &report, move || {
            own_pulse.run(links, &nobody_answers, &stopped)
        })?;
        running.insert("pulse".to_owned());
        let announcer = finding_inputs[0].clone();
        let inquiry = Inquiry {
            service,
            link: &links.celery_out,
            handlers: finding_inputs.clone(),
            watched: &inquiry_watched,
            stop: session_stopped.clone(),
        };
        let nudges = &nudges;
        spawn(scope, "inquiry".to_owned(), &report, move || {
            inquiry.run(nudges);
            Ok(())
        })?;
        running.insert("inquiry".to_owned());
        let (stopped, own_busy) = (session_stopped.clone(), &maintenance_busy);
        let handlers = watched.as_slice();
        spawn(scope, "maintenance".to_owned(), &report, move || {
            let behind = || {
                let unread = unread.iter().any(|input| input.len() > MAX_BATCH_MESSAGES);
                unread || are_behind(handlers, links, intake, config)
            };
            maintenance::run(service, &finding_inputs, behind, own_busy, &stopped);
            Ok(())
        })?;
        running.insert("maintenance".to_owned());
        drop(report);
        service.metrics.session_begun();
        info!(
            "connected; {} workflows",
            service.catalogue.get().announcement().workflows.len()
        );
        for part in [Part::Broker, Part::Publishing, Part::Handling] {
            service.health.report(part, None, Timestamp::now());
        }
        let watch = Watch {
            service,
            links,
            watched: &watched,
            pulse: &pulse,
            maintenance: &maintenance_busy,
            closed: &closed,
            inquiry: &inquiry_watched,
            intake,
            announcer,
            blocked: HashMap::new(),
            running,
            session_stop: Some(session_stop),
            too_late: never(),
            cause: None,
        };
        watch.run(stop, &reports)
    })
}

/// Whether something that workers have said may be waiting: in RabbitMQ, or in the hands of a handler
/// that is held up.
fn are_behind(handlers: &[Watched], links: &Links, intake: &Intake, config: &Config) -> bool {
    let (results, progress) = (&config.task_result_queue, &config.task_progress_queue);
    if handlers.iter().any(Watched::is_held_up) || intake.is_full() {
        return true;
    }
    match links.task_in.depths(&[results, progress]) {
        Ok(depths) => depths.iter().flatten().any(|depth| depth.messages > 0),
        // Then the session is at its end.
        Err(_) => true,
    }
}

/// As the threads are called, in their order.
fn handler_names() -> impl Iterator<Item = String> {
    (1..).map(|number| format!("handler-{number}"))
}

/// Starts a thread whose end, also by a panic, is reported.
fn spawn<'scope, 'env>(
    scope: &'scope thread::Scope<'scope, 'env>,
    name: String,
    report: &Sender<Report>,
    body: impl FnOnce() -> anyhow::Result<()> + Send + 'scope,
) -> anyhow::Result<()> {
    let report = report.clone();
    let thread = name.clone();
    thread::Builder::new()
        .name(name)
        .spawn_scoped(scope, move || {
            // The panic hook has logged where it came from.
            let outcome = catch_unwind(AssertUnwindSafe(body))
                .unwrap_or_else(|panic| Err(anyhow!("panicked: {}", panic_text(&*panic))));
            // The watching thread is there until all threads have reported.
            let _ = report.send(Report { thread, outcome });
        })
        .context("starting a thread")?;
    Ok(())
}

/// Watches over the session's threads until all have ended, and sees to it that they do: when the
/// service stops, when one of them fails, when a call to the broker takes too long.
struct Watch<'s> {
    service: &'s Service,
    links: &'s Links,
    /// Of each handler.
    watched: &'s [Watched],
    pulse: &'s Pulse,
    maintenance: &'s Busy,
    closed: &'s ClosedQueues,
    inquiry: &'s inquiry::Watched,
    intake: &'s Intake,
    /// To a handler, which can publish.
    announcer: Sender<Work>,
    /// Why RabbitMQ blocks connections, by their names.
    blocked: HashMap<String, String>,
    /// Threads that have not reported yet, by name.
    running: BTreeSet<String>,
    /// Dropped to stop the threads.
    session_stop: Option<Sender<Infallible>>,
    /// Something comes when they should have ended long ago.
    too_late: Receiver<Instant>,
    /// What ended the session.
    cause: Option<anyhow::Error>,
}

impl Watch<'_> {
    fn run(
        mut self,
        stop: &Receiver<Infallible>,
        reports: &Receiver<Report>,
    ) -> anyhow::Result<()> {
        let ticks = tick(WATCH_PERIOD);
        let mut stop = stop.clone();
        let mut deadline = never();
        while !self.running.is_empty() {
            select! {
                recv(reports) -> report => match report {
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
                    self.links.kill();
                }
                recv(self.too_late) -> _ => self.exit("the session has ended, but not all of its threads"),
                recv(self.service.catalogue_news) -> _ => {
                    // Full only while it has much else to do; the next session tells them anyway.
                    if self.announcer.try_send(Work::Announce).is_err() {
                        warn!("clients are not told of the new workflows: a handler is held up");
                    }
                }
                recv(ticks) -> _ => self.look(),
            }
        }
        self.cause.map_or(Ok(()), Err)
    }

    fn ended(&mut self, report: Report) {
        let Report { thread, outcome } = report;
        self.running.remove(&thread);
        match outcome {
            Err(error) => self.fail(error.context(format!("thread {thread}"))),
            Ok(()) if self.session_stop.is_some() => {
                self.fail(anyhow!("thread {thread} ended without being asked to"));
            }
            Ok(()) => {}
        }
    }

    /// Ends the session; the first cause is the one that counts.
    fn fail(&mut self, error: anyhow::Error) {
        self.stop_threads();
        self.links.kill();
        if self.cause.is_none() {
            // Now, not when all threads have noticed.
            self.service.no_session(&error);
            warn!("the session with RabbitMQ ends: {error:#}");
            self.cause = Some(error);
        }
    }

    fn stop_threads(&mut self) {
        if self.session_stop.take().is_some() {
            self.too_late = after(fault_point::patience(END_DEADLINE));
        }
    }

    /// Ends the process, since there is no other way to free its threads; whoever started it starts
    /// another. What they have in hand goes back to the queues.
    fn exit(&self, why: &str) -> ! {
        let names: Vec<_> = self.running.iter().map(String::as_str).collect();
        let mut text = format!("{why}: {}", names.join(", "));
        for (watched, name) in self.watched.iter().zip(handler_names()) {
            if self.running.contains(&name) {
                text += &format!("; {name} {}", watched.doing());
            }
        }
        error!("{text}");
        stuck::log_threads();
        error!("exiting, to be started again");
        process::exit(1);
    }

    /// Looks at what the threads are waiting for.
    fn look(&mut self) {
        self.intake.wake();
        if self.intake.is_full() && self.pulse.consuming.for_how_long().is_some() {
            // The answer waits behind messages that are not read yet.
            self.pulse.consuming.touch();
        }
        let to_broker = self
            .watched
            .iter()
            .flat_map(|watched| [&watched.sdk, &watched.celery, &watched.task])
            .chain([&self.pulse.publishing, &self.pulse.consuming])
            .chain([&self.inquiry.celery]);
        let longest = to_broker.filter_map(Busy::for_how_long).max();
        if let Some(wait) = longest.filter(|wait| *wait > DEADLINE) {
            self.fail(anyhow!("RabbitMQ has not answered for {wait:.0?}"));
        }
        for link in self.links.publishing() {
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
        let in_postgres = self.watched.iter().map(|watched| &watched.postgres);
        let aside = [self.maintenance, &self.inquiry.postgres];
        let stuck = in_postgres.chain(aside).any(|busy| {
            let wait = busy.for_how_long();
            wait.is_some_and(|wait| wait > STUCK)
        });
        if stuck {
            // Postgres itself ends everything earlier, so it is not Postgres that answers. A
            // thread in such a call cannot be freed; whoever started this process starts another.
            self.exit(&format!("Postgres has not answered for {STUCK:?}"));
        }
    }

    /// Whether messages get through, and whether a handler will never come back.
    fn look_at_handlers(&mut self) {
        let patience = fault_point::patience(PATIENCE);
        let limit = fault_point::patience(LOST_IN_THOUGHT);
        let mut held_up = None;
        let mut lost = None;
        for (watched, name) in self.watched.iter().zip(handler_names()) {
            let wait = watched.postgres.for_how_long();
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
        match (lost, self.closed.trouble()) {
            (Some(text), _) => self.fail(anyhow!(text)),
            // The log has it from whoever found out.
            (None, Some(trouble)) if held_up.is_none() && self.cause.is_none() => {
                let (health, now) = (&self.service.health, Timestamp::now());
                health.report(Part::Handling, Some(trouble), now);
            }
            (None, _) => self.report(Part::Handling, held_up),
        }
    }

    /// Tells the health and, when that is news, the log.
    fn report(&self, part: Part, fault: Option<String>) {
        if self.cause.is_some() {
            // Of a session that has failed nothing is known any more.
            return;
        }
        let line = match &fault {
            Some(fault) => fault.clone(),
            None => format!("{}: works again", part.name()),
        };
        let faulty = fault.is_some();
        if self.service.health.report(part, fault, Timestamp::now()) {
            if faulty {
                warn!("{line}");
            } else {
                info!("{line}");
            }
        }
    }
}

/// Since when the thread that sees whether the connections still live has been waiting for one.
#[derive(Default)]
struct Pulse {
    consuming: Busy,
    publishing: Busy,
}

impl Pulse {
    /// Asks each connection for an answer from time to time, until `stop` is disconnected, and tells
    /// when no replica answers the requests that are sent to their queue: an idle
    /// one would not notice that it is blocked, nor, where the broker has switched heartbeats off,
    /// that nobody is there any more.
    ///
    /// # Errors
    /// A connection is lost.
    fn run(
        &self,
        links: &Links,
        nobody_answers: &Sender<()>,
        stop: &Receiver<Infallible>,
    ) -> anyhow::Result<()> {
        let mut to_clients = Publisher::new(&links.sdk_out, &self.publishing);
        let mut publishers: Vec<_> = links
            .publishing()
            .skip(1)
            .map(|link| Publisher::new(link, &self.publishing))
            .collect();
        loop {
            match stop.recv_timeout(PULSE_PERIOD) {
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Ok(never) => match never {},
            }
            fault_point::reached("pulse");
            for link in [&links.sdk_in, &links.task_in] {
                self.consuming.touch();
                link.check()?;
                self.consuming.idle();
            }
            let came_back = to_clients.publish(&[wire::pulse_for_requests()])?;
            if came_back.contains(&Delivered::Unroutable) {
                // Whoever is to look is looking already, or answers.
                let _ = nobody_answers.try_send(());
            }
            for publisher in &mut publishers {
                publisher.publish(&[wire::pulse()])?;
            }
        }
    }
}
