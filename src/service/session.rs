//! One generation of broker connections with the threads that use them. It ends as a whole: when a
//! connection is lost, when a thread fails, or when the service stops. Nothing of it survives in
//! memory; what was not acknowledged returns to the queues.

use std::collections::HashMap;
use std::iter;
use std::panic::catch_unwind;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use crossbeam_channel::{Receiver, Sender, bounded, never, unbounded};
use jiff::Timestamp;
use log::{info, warn};

use self::crew::Recruits;
use self::links::Links;
use self::nodes::Nodes;
use self::pulse::Pulse;
use self::watchdog::Watchdog;
use crate::broker::intake::Intake;
use crate::broker::{self, Claim, DEADLINE, Handled, PublishError, Publisher, Received, Source};
use crate::service::handler::{
    self, ClosedQueues, Common, Findings, Handler, MAX_BATCH_MESSAGES, Publishers, Watched, Work,
};
use crate::service::inquiry::{self, Inquiry};
use crate::service::maintenance::{self, Backlog, Calm};
use crate::service::requests;
use crate::service::shared::Service;
use crate::service::turns::{self, Turns, Wakes};
use crate::telemetry::health::Part;
use crate::threads::{Calls, Signal, within_deadline};
use crate::wire::{self, Inbox};

mod crew;
mod links;
mod nodes;
mod pulse;
mod watchdog;

/// How many bytes of messages may be in flight, beyond one message, before RabbitMQ is made to
/// wait.
const MAX_IN_HAND: usize = 32 * 1024 * 1024;

/// The queues of each consumer thread. A worker's events for a task arrive through two, and a START
/// or the last progress is of no use after the result.
const CONSUMERS: [(&str, &[Inbox]); 5] = [
    ("submissions", &[Inbox::Submissions]),
    ("cancels", &[Inbox::Cancels]),
    ("workflow-requests", &[Inbox::WorkflowRequests]),
    ("named-requests", &[Inbox::NamedWorkflowRequests]),
    ("events", &[Inbox::Progress, Inbox::Results]),
];

/// The prefetch of a queue. Messages whose outcomes wait to be told stay in flight and must not
/// hold up a backlog, so there is room for as many more as can accumulate in that time.
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

/// The prefetch that a session begins with: what it hands back counts in quorum queues, and it knows
/// nothing of how the sessions before it have ended, in this process or in another.
fn first_prefetch(inbox: Inbox) -> u16 {
    match inbox {
        Inbox::Submissions | Inbox::Cancels | Inbox::Progress | Inbox::Results => 1,
        // Nothing is lost with them.
        inbox @ (Inbox::WorkflowRequests | Inbox::NamedWorkflowRequests) => {
            prefetch(inbox, Duration::ZERO)
        }
    }
}

/// How many messages of each queue may wait for a closed queue, over all handlers: most of what
/// RabbitMQ delivers is to be for queues that take something.
fn closed_queues() -> ClosedQueues {
    let prefetch = |inbox| usize::from(prefetch(inbox, Duration::ZERO));
    let limits = Inbox::ALL.map(|inbox| (inbox, prefetch(inbox) / 4));
    ClosedQueues::new(HashMap::from(limits), MAX_IN_HAND / 2)
}

/// Runs one session until `stop` is given.
///
/// # Errors
/// What ended the session before.
pub fn run(service: &Service, stop: &Signal) -> anyhow::Result<()> {
    let intake = Intake::new(MAX_IN_HAND);
    let links = Links::open(&service.config, &intake)?;
    let mut nodes = Nodes::of(&service.config, &links);
    let kill = || links.kill();
    let prepare = || within_deadline(DEADLINE, kill, || prepare(service, &links));
    let outcome = nodes
        .meanwhile(kill, prepare)
        .and_then(|prepared| work(service, &links, nodes, &intake, prepared, stop));
    if outcome.is_err() {
        // Closing a silently lost or blocked connection would block.
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
    /// Whether this replica holds the queue of requests.
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
            // It is declared again with the first letter.
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
    // Each replica has its own, since an exclusive queue cannot be shared; so a client may get more
    // than one answer. It exists before the workflows are announced, so that no request in between
    // is lost.
    let requests = links
        .sdk_in
        .declare_private_queue(wire::OMOTES_EXCHANGE, wire::WORKFLOW_REQUESTS_KEY)?;
    let claim = requests::claim(&links.sdk_in)?;
    let announcement = wire::available_workflows(service.catalogue.get().announcement());
    // Before anything is consumed, so that it separates the starts before from those after.
    let mut connection = service.store.connection()?;
    connection.session_begins()?;
    service.read_limits(&mut connection)?;
    drop(connection);
    Publisher::new(&links.sdk_out, &Calls::default())
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

/// What the threads of a session share.
struct Shared<'s> {
    common: Common<'s>,
    links: &'s Links,
    intake: &'s Intake,
    /// Of each handler.
    watched: Vec<Watched>,
    pulse: Pulse,
    /// Calls of the maintenance to Postgres.
    maintenance: Arc<Calls>,
    inquiry: inquiry::Watched,
    turns: turns::Watched,
    calm: Calm,
}

fn work(
    service: &Service,
    links: &Links,
    nodes: Nodes,
    intake: &Intake,
    prepared: Prepared,
    stop: &Signal,
) -> anyhow::Result<()> {
    let Prepared { queue_names, claim } = prepared;
    let (nudge, nudges) = bounded(1);
    let (wake_turns, woken) = bounded(1);
    let (findings, heard) = Findings::new(service.config.handler_threads);
    let shared = Shared {
        common: Common {
            service,
            inquiry: nudge,
            turns: wake_turns,
            findings,
            queue_names,
            closed: closed_queues(),
        },
        links,
        intake,
        watched: iter::repeat_with(Watched::default)
            .take(service.config.handler_threads)
            .collect(),
        pulse: Pulse::default(),
        maintenance: Arc::default(),
        inquiry: inquiry::Watched::default(),
        turns: turns::Watched::default(),
        calm: Calm::default(),
    };
    thread::scope(|scope| {
        let mut recruits = Recruits::new(scope);
        let (inputs, done) = start_handlers(&shared, &mut recruits, heard)?;
        let Inputs { messages, unread } = inputs;
        let findings = shared.common.findings.senders();
        let announcer = findings[0].clone();
        let (nobody_answers, vacant) = bounded(1);
        // From here on only consumers send messages to handlers, and only handlers report to
        // consumers: each side learns from the other's end that nothing more will come.
        start_consumers(&shared, &mut recruits, &messages, done, &claim, &vacant)?;
        drop(messages);
        let (pulse, stop_pulse) = (&shared.pulse, recruits.stop.clone());
        recruits.start("pulse", move || {
            pulse.run(links, &nobody_answers, &stop_pulse)
        })?;
        start_nodes(nodes, &mut recruits)?;
        start_inquiry(&shared, &mut recruits, findings.to_vec(), nudges)?;
        start_turns(&shared, &mut recruits, woken)?;
        start_maintenance(&shared, &mut recruits, findings.to_vec(), unread)?;
        service.metrics.session_begun();
        info!(
            "connected; {} workflows",
            service.catalogue.get().announcement().workflows.len()
        );
        for part in [Part::Broker, Part::Publishing, Part::Handling] {
            service.health.report(part, None, Timestamp::now());
        }
        Watchdog::new(&shared, recruits.all_started(), announcer).run(stop)
    })
}

/// How the handlers are reached, in their order.
struct Inputs {
    messages: Vec<Sender<Work>>,
    /// What the handlers have not taken yet, which shows whether there is a backlog.
    unread: Vec<Receiver<Work>>,
}

/// Starts the handlers. Also returns, for each of [`CONSUMERS`], the channel on which they report
/// what is done.
fn start_handlers<'scope>(
    shared: &'scope Shared<'_>,
    recruits: &mut Recruits<'scope, '_>,
    findings: Vec<Receiver<Work>>,
) -> anyhow::Result<(Inputs, [Receiver<Handled>; CONSUMERS.len()])> {
    let links = shared.links;
    let mut done_senders = HashMap::new();
    let done = CONSUMERS.map(|(_, inboxes)| {
        let (sender, receiver) = unbounded();
        done_senders.extend(inboxes.iter().map(|inbox| (*inbox, sender.clone())));
        receiver
    });
    let mut inputs = Inputs {
        messages: Vec::new(),
        unread: Vec::new(),
    };
    let handlers = shared.watched.iter().zip(findings).enumerate();
    for ((number, (watched, findings)), name) in handlers.zip(handler_names()) {
        // The prefetch bounds what is in this channel, so a handler that is held up does not hold
        // up the consumers.
        let (input, messages) = unbounded::<Work>();
        inputs.messages.push(input);
        inputs.unread.push(messages.clone());
        let publishers = Publishers {
            sdk: Publisher::new(&links.sdk_out, &watched.sdk),
            celery: Publisher::new(&links.celery_out, &watched.celery),
            task: Publisher::new(links.task_out(), &watched.task),
        };
        let done = done_senders.clone();
        let handler = Handler::new(number, &shared.common, watched, publishers, done);
        let stop = recruits.stop.clone();
        recruits.start(name, move || handler.run(&messages, &findings, &stop))?;
    }
    Ok((inputs, done))
}

/// Starts the threads that take messages and hand them over to the handlers.
fn start_consumers<'scope>(
    shared: &'scope Shared<'_>,
    recruits: &mut Recruits<'scope, '_>,
    handlers: &[Sender<Work>],
    done: [Receiver<Handled>; CONSUMERS.len()],
    claim: &Claim,
    vacant: &Receiver<()>,
) -> anyhow::Result<()> {
    let (links, common) = (shared.links, &shared.common);
    let outcome_delay = common.service.config.outcome_delay;
    for ((name, inboxes), done) in CONSUMERS.into_iter().zip(done) {
        let sources = inboxes.iter().map(|inbox| Source {
            queue: &common.queue_names[inbox],
            prefetch: prefetch(*inbox, outcome_delay),
            first: first_prefetch(*inbox),
        });
        let sources: Vec<_> = sources.collect();
        let link = links.consuming(inboxes[0]);
        let handlers = handlers.to_vec();
        let announcer = handlers[0].clone();
        let hand_over =
            move |place: usize, received| hand_over(&handlers, inboxes[place], received);
        let (stop, claim) = (recruits.stop.clone(), claim.clone());
        let answering = requests::Answering {
            link,
            source: sources[0],
            announcer,
            vacant: vacant.clone(),
        };
        recruits.start(format!("consume-{name}"), move || match inboxes[0] {
            Inbox::NamedWorkflowRequests => answering.run(claim, &stop, &done, hand_over),
            Inbox::Submissions
            | Inbox::Cancels
            | Inbox::WorkflowRequests
            | Inbox::Progress
            | Inbox::Results => broker::consume(link, &sources, &stop, &done, hand_over),
        })?;
    }
    Ok(())
}

/// Gives a message to its handler: one job's messages all go to one, which keeps their order.
fn hand_over(handlers: &[Sender<Work>], inbox: Inbox, received: Received) {
    let job = catch_unwind(|| wire::job_id(&received.body));
    // Whatever panics here panics in the handler too, which makes a dead letter of it.
    let handler = job
        .ok()
        .flatten()
        .map_or(0, |id| handler::index(id, handlers.len()));
    // If the handler is gone, the session is ending and the message is redelivered.
    let received = Box::new(received);
    let _ = handlers[handler].send(Work::Message { inbox, received });
}

fn start_nodes<'scope>(
    mut nodes: Nodes,
    recruits: &mut Recruits<'scope, '_>,
) -> anyhow::Result<()> {
    if nodes.is_empty() {
        return Ok(());
    }
    let stop = recruits.stop.clone();
    recruits.start("nodes", move || {
        let outcome = nodes.run(&stop);
        nodes.close();
        outcome
    })
}

fn start_inquiry<'scope>(
    shared: &'scope Shared<'_>,
    recruits: &mut Recruits<'scope, '_>,
    handlers: Vec<Sender<Work>>,
    nudges: Receiver<()>,
) -> anyhow::Result<()> {
    let service = shared.common.service;
    let inquiry = Inquiry {
        service,
        store: service.store.watched_by(&shared.inquiry.postgres),
        link: &shared.links.celery_out,
        handlers,
        watched: &shared.inquiry,
        stop: recruits.stop.clone(),
    };
    recruits.start("inquiry", move || {
        inquiry.run(&nudges);
        Ok(())
    })
}

fn start_turns<'scope>(
    shared: &'scope Shared<'_>,
    recruits: &mut Recruits<'scope, '_>,
    woken: Receiver<()>,
) -> anyhow::Result<()> {
    let service = shared.common.service;
    let store = service.store.watched_by(&shared.turns.postgres);
    let stop = recruits.stop.clone();
    let is_pooled = service.config.postgres.is_pooled;
    let (news, heard) = bounded(1);
    // Through a pooler nothing can be heard, and the thread looks by itself. A channel that nobody has the
    // other end of would wake it all the time.
    let operators = match is_pooled {
        true => never(),
        false => heard,
    };
    recruits.start("turns", move || {
        let turns = Turns {
            service,
            store,
            findings: &shared.common.findings,
            calm: &shared.calm,
            is_empty: &|queue| shared.is_empty(queue),
            stop,
        };
        turns.run(&Wakes {
            handlers: woken,
            operators,
        });
        Ok(())
    })?;
    if is_pooled {
        return Ok(());
    }
    let (store, stop) = (service.store.clone(), recruits.stop.clone());
    recruits.start("turns-news", move || {
        turns::listen(&store, &news, &stop);
        Ok(())
    })
}

fn start_maintenance<'scope>(
    shared: &'scope Shared<'_>,
    recruits: &mut Recruits<'scope, '_>,
    handlers: Vec<Sender<Work>>,
    unread: Vec<Receiver<Work>>,
) -> anyhow::Result<()> {
    let service = shared.common.service;
    let store = service.store.watched_by(&shared.maintenance);
    let stop = recruits.stop.clone();
    recruits.start("maintenance", move || {
        let backlog = Backlog {
            held_up: &|| {
                let unread = unread.iter().any(|input| input.len() > MAX_BATCH_MESSAGES);
                unread || shared.is_held_up()
            },
            stalled_outcomes: &|| shared.common.closed.has_stalled_outcomes(),
            in_queues: &|| shared.has_events_to_come(),
            calm: &shared.calm,
        };
        maintenance::run(service, &store, &handlers, &backlog, &stop);
        Ok(())
    })
}

impl Shared<'_> {
    /// Whether a handler waits for somebody or for itself, or there is more in flight than it takes
    /// at once.
    fn is_held_up(&self) -> bool {
        self.watched.iter().any(Watched::is_held_up) || self.intake.is_full()
    }

    /// Whether nothing is ready in a task queue, or there is no such queue.
    fn is_empty(&self, queue: &str) -> bool {
        let _call = self.turns.celery.begin();
        match self.links.celery_out.depths(&[queue]) {
            Ok(depths) => depths.iter().flatten().all(|depth| depth.messages == 0),
            Err(_) => false,
        }
    }

    /// Whether RabbitMQ may have worker events that nobody has been given. A quorum queue without a leader is
    /// told to be empty and without consumers, of which this session is one.
    fn has_events_to_come(&self) -> bool {
        let config = &self.common.service.config;
        let (results, progress) = (&config.task_result_queue, &config.task_progress_queue);
        match self.links.task_in.depths(&[results, progress]) {
            Ok(depths) => depths.iter().any(|depth| {
                let known = depth.as_ref();
                known.is_none_or(|depth| depth.messages > 0 || depth.consumers == 0)
            }),
            // Then the session is ending.
            Err(_) => true,
        }
    }
}

/// The names of the handler threads, in order.
fn handler_names() -> impl Iterator<Item = String> {
    (1..).map(|number| format!("handler-{number}"))
}
