//! The service's counters and histograms, for Prometheus. What is computed on request is in
//! [`crate::telemetry`]'s gauges.

use std::collections::HashSet;
use std::fmt::Write;
use std::time::Instant;

use jiff::Timestamp;
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::domain::job::{Attempt, Ended, Event};
use crate::domain::overview::Overview;
use crate::telemetry::health::Health;
use crate::telemetry::{OTHER_WORKFLOW, PREFIX, gauges};
use crate::wire::Inbox;

/// Media type of what [`Metrics::text`] returns.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A stage of the pipeline; see [`crate::service::handler`].
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

/// A step by its number: titles may change.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StepLabels {
    workflow: String,
    step: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StepEndLabels {
    workflow: String,
    step: u64,
    outcome: &'static str,
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
    /// Records the time since the last lap as that of `stage`.
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
    steps_ended: Family<StepEndLabels, Counter>,
    steps_running: Family<StepLabels, Histogram>,
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
            steps_ended: Family::default(),
            steps_running: Family::new_with_constructor(minutes_and_hours),
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
            "steps_ended",
            "Attempts at a step of jobs with several that have ended, by the step's number",
            self.steps_ended.clone(),
        );
        registry.register_with_unit(
            "step_running",
            "Time from the first start of an attempt at a step to its end",
            Unit::Seconds,
            self.steps_running.clone(),
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

    /// Counts a batch of so many messages and findings.
    pub fn batch(&self, messages: usize) {
        self.batches.observe(messages as f64);
    }

    /// A stopwatch for one stage after the other, starting now.
    pub fn stopwatch(&self) -> Stopwatch<'_> {
        Stopwatch {
            metrics: self,
            since: Instant::now(),
        }
    }

    /// Counts the outcome of a message. A finding comes from no queue.
    pub fn message(&self, inbox: Option<Inbox>, event: &Event) {
        let outcome = match event {
            Event::Submitted { .. } => "submitted",
            Event::Held { .. } => "held",
            Event::Started { .. } => "started",
            Event::HandedOver { .. } => "handed_over",
            Event::Postponed { .. } => "postponed",
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

    pub fn workflows_announced(&self) {
        self.count(Inbox::WorkflowRequests.name(), "answered");
    }

    fn count(&self, queue: &'static str, outcome: &'static str) {
        let labels = MessageLabels { queue, outcome };
        self.messages.get_or_create(&labels).inc();
    }

    /// Counts a job that has ended; `known` tells whether its workflow is defined.
    pub fn job_ended(&self, ended: &Ended, known: impl Fn(&str) -> bool) {
        let workflow = ended.workflow_type.as_deref();
        let workflow = workflow.filter(|workflow| known(workflow));
        let workflow = workflow.unwrap_or(OTHER_WORKFLOW).to_owned();
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

    /// Counts an attempt at a step of this workflow that has ended; `known` as above.
    pub fn step_ended(&self, workflow: &str, attempt: &Attempt, known: impl Fn(&str) -> bool) {
        let Some(report) = &attempt.report else {
            return;
        };
        let workflow = match known(workflow) {
            true => workflow.to_owned(),
            false => OTHER_WORKFLOW.to_owned(),
        };
        let step = attempt.position.step as u64 + 1;
        if let Some(running) = seconds(attempt.started_at, report.finished_at) {
            let labels = StepLabels {
                workflow: workflow.clone(),
                step,
            };
            self.steps_running.get_or_create(&labels).observe(running);
        }
        let labels = StepEndLabels {
            workflow,
            step,
            outcome: report.outcome.name(),
        };
        self.steps_ended.get_or_create(&labels).inc();
    }

    pub fn published(&self, result: &'static str, messages: usize) {
        if messages > 0 {
            let labels = ResultLabels { result };
            let counter = self.publishes.get_or_create(&labels);
            counter.inc_by(messages as u64);
        }
    }

    /// Everything in Prometheus's text format, with the gauges of the deployment.
    pub fn text(&self, health: &Health, overview: &Overview, now: Timestamp) -> String {
        let gauges = gauges::read(health, overview, now);
        let mut text = String::new();
        // Writing into a text does not fail.
        let _ = encode_registry(&mut text, &self.registry);
        let _ = encode_registry(&mut text, &gauges);
        prometheus_text(&text)
    }
}

fn seconds(from: Option<Timestamp>, to: Timestamp) -> Option<f64> {
    from.map(|from| to.duration_since(from).as_secs_f64().max(0.0))
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
