//! What the service counts and times, for Prometheus. What is read from elsewhere only when somebody
//! asks is in [`crate::domain::overview`].

use std::collections::HashSet;
use std::fmt::Write;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use prometheus_client::encoding::text::encode_registry;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::domain::job::{Ended, Event};
use crate::domain::overview::Overview;
use crate::telemetry::health::Health;
use crate::wire::Inbox;
use jiff::Timestamp;

/// Media type of what [`Metrics::text`] returns.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
const PREFIX: &str = "omotes_orchestrator";
/// What stands for a workflow that the definitions do not have: names that clients make up must not
/// become time series.
const OTHER_WORKFLOW: &str = "other";

/// A step of a batch's way; see [`crate::service::handler`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Stage {
    Lock,
    Load,
    Decide,
    Write,
    Publish,
    Commit,
    Tell,
    Settle,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabels {
    stage: Stage,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MessageLabels {
    queue: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabels {
    workflow: String,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkflowLabels {
    workflow: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

/// How long the stages of a batch take.
#[derive(Debug)]
pub struct Stopwatch<'m> {
    metrics: &'m Metrics,
    since: Instant,
}

impl Stopwatch<'_> {
    /// `stage` is what came since the last lap.
    pub fn lap(&mut self, stage: Stage) {
        let now = Instant::now();
        let time = (now - self.since).as_secs_f64();
        self.since = now;
        let stages = &self.metrics.stages;
        stages.get_or_create(&StageLabels { stage }).observe(time);
    }
}

/// All counters and histograms of a process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    messages: Family<MessageLabels, Counter>,
    jobs_ended: Family<EndLabels, Counter>,
    waiting: Family<WorkflowLabels, Histogram>,
    running: Family<WorkflowLabels, Histogram>,
    batches: Histogram,
    stages: Family<StageLabels, Histogram>,
    publishes: Family<ResultLabels, Counter>,
    sessions: Counter,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let metrics = Metrics {
            registry: Registry::with_prefix(PREFIX),
            messages: Family::default(),
            jobs_ended: Family::default(),
            waiting: Family::new_with_constructor(minutes_and_hours),
            running: Family::new_with_constructor(minutes_and_hours),
            batches: Histogram::new(exponential_buckets(1.0, 2.0, 9)),
            // From a tenth of a millisecond to half a minute.
            stages: Family::new_with_constructor(|| {
                Histogram::new(exponential_buckets(0.0001, 4.0, 10))
            }),
            publishes: Family::default(),
            sessions: Counter::default(),
        };
        Metrics {
            registry: metrics.registered(),
            ..metrics
        }
    }
}

fn minutes_and_hours() -> Histogram {
    Histogram::new([
        1.0, 10.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 21600.0, 86400.0,
    ])
}

impl Metrics {
    fn registered(&self) -> Registry {
        let mut registry = Registry::with_prefix(PREFIX);
        registry.register(
            "messages",
            "Messages handled, by queue and what came of them",
            self.messages.clone(),
        );
        registry.register(
            "jobs_ended",
            "Jobs that have ended, by workflow and outcome",
            self.jobs_ended.clone(),
        );
        registry.register_with_unit(
            "job_waiting",
            "Time from a job's submission to its first start, of jobs that have ended",
            Unit::Seconds,
            self.waiting.clone(),
        );
        registry.register_with_unit(
            "job_running",
            "Time from a job's first start to its end",
            Unit::Seconds,
            self.running.clone(),
        );
        registry.register(
            "batch_messages",
            "Messages and findings handled in one transaction",
            self.batches.clone(),
        );
        registry.register_with_unit(
            "stage",
            "Time that a batch spends in each stage of its way",
            Unit::Seconds,
            self.stages.clone(),
        );
        registry.register(
            "published_messages",
            "Messages published, by what RabbitMQ confirmed",
            self.publishes.clone(),
        );
        registry.register(
            "sessions",
            "Sessions with RabbitMQ begun; each after the first is a reconnect",
            self.sessions.clone(),
        );
        registry
    }

    pub fn session_begun(&self) {
        self.sessions.inc();
    }

    /// How many sessions have begun.
    pub fn sessions(&self) -> u64 {
        self.sessions.get()
    }

    /// A batch of so many messages and findings went through.
    pub fn batch(&self, messages: usize) {
        self.batches.observe(messages as f64);
    }

    /// Measures one stage after the other, from now on.
    pub fn stopwatch(&self) -> Stopwatch<'_> {
        Stopwatch {
            metrics: self,
            since: Instant::now(),
        }
    }

    /// What came of a message. None came from no queue.
    pub fn message(&self, inbox: Option<Inbox>, event: &Event) {
        let outcome = match event {
            Event::Submitted { .. } => "submitted",
            Event::Started { .. } => "started",
            Event::Excused { .. } => "excused",
            Event::Suspected { .. } => "suspected",
            Event::Progressed => "progressed",
            Event::Ended(_) => "ended",
            Event::CancelNoted => "cancel_noted",
            Event::Revoked(_) => "revoked",
            Event::Ignored(_) => "ignored",
        };
        self.count(inbox.map_or("none", Inbox::name), outcome);
    }

    pub fn dead_letter(&self, inbox: Inbox) {
        self.count(inbox.name(), "dead_letter");
    }

    pub fn workflows_told(&self) {
        self.count(Inbox::WorkflowRequests.name(), "answered");
    }

    fn count(&self, queue: &'static str, outcome: &'static str) {
        let labels = MessageLabels { queue, outcome };
        self.messages.get_or_create(&labels).inc();
    }

    /// A job has ended; `known` is whether the definitions have its workflow.
    pub fn job_ended(&self, ended: &Ended, known: impl Fn(&str) -> bool) {
        let workflow = ended.workflow_type.as_deref();
        let workflow = workflow.filter(|workflow| known(workflow));
        let workflow = workflow.unwrap_or(OTHER_WORKFLOW).to_owned();
        let seconds = |from: Option<Timestamp>, to: Timestamp| {
            from.map(|from| to.duration_since(from).as_secs_f64().max(0.0))
        };
        let labels = WorkflowLabels {
            workflow: workflow.clone(),
        };
        if let Some(running_at) = ended.running_at {
            if let Some(waiting) = seconds(ended.submitted_at, running_at) {
                self.waiting.get_or_create(&labels).observe(waiting);
            }
            if let Some(running) = seconds(Some(running_at), ended.finished_at) {
                self.running.get_or_create(&labels).observe(running);
            }
        }
        let labels = EndLabels {
            workflow,
            outcome: ended.outcome.name(),
        };
        self.jobs_ended.get_or_create(&labels).inc();
    }

    pub fn published(&self, result: &'static str, messages: usize) {
        if messages > 0 {
            let labels = ResultLabels { result };
            let counter = self.publishes.get_or_create(&labels);
            counter.inc_by(messages as u64);
        }
    }

    /// All of it in Prometheus's text format, with what is known of the rest of the deployment.
    pub fn text(&self, health: &Health, overview: &Overview, now: Timestamp) -> String {
        let gauges = gauges(health, overview, now);
        let mut text = String::new();
        // Writing into a text does not fail.
        let _ = encode_registry(&mut text, &self.registry);
        let _ = encode_registry(&mut text, &gauges);
        prometheus_text(&text)
    }
}

/// OpenMetrics names a counter without the `_total` of its samples, and has a line for its unit;
/// Prometheus's own format, which older scrapers and `promtool check metrics` read, has neither.
fn prometheus_text(open_metrics: &str) -> String {
    let about = |line: &'_ str| -> Option<(String, String, String)> {
        let mut words = line.strip_prefix("# ")?.splitn(3, ' ').map(str::to_owned);
        Some((words.next()?, words.next()?, words.next()?))
    };
    let counters: HashSet<String> = open_metrics
        .lines()
        .filter_map(about)
        .filter(|(keyword, _, kind)| keyword == "TYPE" && kind == "counter")
        .map(|(_, name, _)| name)
        .collect();
    let mut text = String::with_capacity(open_metrics.len());
    for line in open_metrics.lines() {
        match about(line) {
            Some((keyword, ..)) if keyword == "UNIT" => continue,
            Some((keyword, name, rest)) if counters.contains(&name) => {
                let _ = write!(text, "# {keyword} {name}_total {rest}");
            }
            Some(_) | None => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

type Labels = Vec<(&'static str, String)>;

/// The gauges of one answer; so none is left of what is no more.
struct Gauges<'r>(&'r mut Registry);

impl Gauges<'_> {
    fn add(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        values: impl IntoIterator<Item = (Labels, f64)>,
    ) {
        let family = Family::<Labels, Gauge<f64, AtomicU64>>::default();
        for (labels, value) in values {
            // Workflows that the definitions do not have are one.
            family.get_or_create(&labels).inc_by(value);
        }
        match unit {
            Some(unit) => self.0.register_with_unit(name, help, unit, family),
            None => self.0.register(name, help, family),
        }
    }
}

fn gauges(health: &Health, overview: &Overview, now: Timestamp) -> Registry {
    let mut registry = Registry::with_prefix(PREFIX);
    let mut gauges = Gauges(&mut registry);
    let truth = |is_so: bool| f64::from(u8::from(is_so));
    let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
    gauges.add(
        "build_info",
        "Version of the program",
        None,
        [(version, 1.0)],
    );

    let (ready, parts) = health.parts(now);
    gauges.add(
        "ready",
        "Whether the service is ready",
        None,
        [(vec![], truth(ready))],
    );
    let parts = parts.into_iter().map(|part| {
        let labels = vec![("part", part.name.to_owned())];
        (labels, truth(part.why.is_none()))
    });
    gauges.add(
        "part_up",
        "Whether a part of the service works",
        None,
        parts,
    );

    let workflows = overview.workflows();
    let name = |name: &str, defined: bool| match defined {
        true => name.to_owned(),
        false => OTHER_WORKFLOW.to_owned(),
    };
    let jobs = workflows.iter().flat_map(|workflow| {
        let labels = |state: &str| {
            vec![
                ("workflow", name(&workflow.name, workflow.defined)),
                ("state", state.to_owned()),
            ]
        };
        [
            (labels("waiting"), workflow.waiting as f64),
            (labels("running"), workflow.running as f64),
        ]
    });
    // What is not known is left out: a zero would say that all is well.
    if overview.has_rows {
        gauges.add("jobs", "Jobs that have not ended", None, jobs);
        let oldest = overview.oldest_waiting();
        let age = oldest.map_or(0.0, |since| {
            now.duration_since(since).as_secs_f64().max(0.0)
        });
        let help = "How long the job has been waiting that has been waiting longest";
        gauges.add(
            "oldest_waiting_job",
            help,
            Some(Unit::Seconds),
            [(vec![], age)],
        );
    }
    let lonely = workflows.iter().map(|workflow| {
        let labels = vec![("workflow", name(&workflow.name, workflow.defined))];
        (labels, truth(workflow.without_worker_since.is_some()))
    });
    let help = "Whether jobs wait for a workflow that has no worker";
    gauges.add("workflow_without_worker", help, None, lonely);

    let queues = overview.queues.iter().flat_map(|queues| &queues.queues);
    let queues = queues.filter_map(|queue| Some((queue, queue.depth?)));
    let queues: Vec<_> = queues
        .map(|(queue, depth)| {
            let labels = vec![
                ("connection", queue.vhost.name().to_owned()),
                ("queue", queue.name.clone()),
            ];
            (labels, depth)
        })
        .collect();
    let messages = queues
        .iter()
        .map(|(labels, depth)| (labels.clone(), f64::from(depth.messages)));
    gauges.add(
        "queue_messages",
        "Messages that wait in a queue",
        None,
        messages,
    );
    let consumers = queues
        .into_iter()
        .map(|(labels, depth)| (labels, f64::from(depth.consumers)));
    gauges.add("queue_consumers", "Consumers of a queue", None, consumers);

    let idle = overview.idle_connections;
    let connections = [
        ("idle", idle),
        ("used", overview.connections.saturating_sub(idle)),
    ];
    let connections =
        connections.map(|(state, count)| (vec![("state", state.to_owned())], f64::from(count)));
    gauges.add(
        "postgres_connections",
        "Connections to Postgres",
        None,
        connections,
    );
    let runs = overview.maintenance.iter().map(|(task, last_run)| {
        (
            vec![("task", task.clone())],
            last_run.as_millisecond() as f64 / 1000.0,
        )
    });
    let help = "When what one replica does for all was last begun";
    gauges.add(
        "maintenance_last_run_timestamp",
        help,
        Some(Unit::Seconds),
        runs,
    );
    registry
}
