//! Gauges that are computed when they are scraped, so that none is left over from something that is
//! gone.

use std::sync::atomic::AtomicU64;

use jiff::Timestamp;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::VERSION;
use crate::domain::overview::{Overview, WorkflowView};
use crate::domain::worker::{WorkerState, Workers};
use crate::telemetry::health::Health;
use crate::telemetry::{OTHER_WORKFLOW, PREFIX};

type Labels = Vec<(&'static str, String)>;

struct Gauges(Registry);

/// All gauges, as of now.
pub(super) fn read(health: &Health, overview: &Overview, now: Timestamp) -> Registry {
    let mut gauges = Gauges(Registry::with_prefix(PREFIX));
    let workflows = overview.workflows();
    gauges.add_service(health, now);
    // What is not known is left out: a zero would say that all is well.
    if overview.has_rows {
        gauges.add_jobs(&workflows, overview.oldest_waiting(), now);
        gauges.add_turns(overview);
    }
    gauges.add_workers(&workflows);
    if let Some(workers) = &overview.workers {
        gauges.add_celery(workers);
    }
    gauges.add_queues(overview);
    gauges.add_database(overview);
    gauges.0
}

impl Gauges {
    fn add(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        values: impl IntoIterator<Item = (Labels, f64)>,
    ) {
        let family = Family::<Labels, Gauge<f64, AtomicU64>>::default();
        for (labels, value) in values {
            // Undefined workflows share one label.
            family.get_or_create(&labels).inc_by(value);
        }
        match unit {
            Some(unit) => self.0.register_with_unit(name, help, unit, family),
            None => self.0.register(name, help, family),
        }
    }

    fn add_service(&mut self, health: &Health, now: Timestamp) {
        let version = vec![("version", VERSION.to_owned())];
        self.add(
            "build_info",
            "Version of the program",
            None,
            [(version, 1.0)],
        );
        let (ready, parts) = health.parts(now);
        self.add(
            "ready",
            "Whether the service is ready",
            None,
            [(vec![], truth(ready))],
        );
        let parts = parts.into_iter().map(|part| {
            let labels = vec![("part", part.part.name().to_owned())];
            (labels, truth(part.why.is_none()))
        });
        self.add(
            "part_up",
            "Whether a part of the service works",
            None,
            parts,
        );
    }

    fn add_jobs(&mut self, workflows: &[WorkflowView], oldest: Option<Timestamp>, now: Timestamp) {
        let jobs = workflows.iter().flat_map(|workflow| {
            let labels = |state: &str| {
                vec![
                    ("workflow", name(workflow).to_owned()),
                    ("state", state.to_owned()),
                ]
            };
            [
                (labels("waiting"), workflow.waiting as f64),
                (labels("running"), workflow.running as f64),
            ]
        });
        self.add("jobs", "Jobs that have not ended", None, jobs);
        let age = oldest.map_or(0.0, |since| {
            now.duration_since(since).as_secs_f64().max(0.0)
        });
        self.add(
            "oldest_waiting_job",
            "How long the job has been waiting that has been waiting longest",
            Some(Unit::Seconds),
            [(vec![], age)],
        );
    }

    fn add_turns(&mut self, overview: &Overview) {
        let held = overview.turns.iter().flat_map(|queue| {
            let labels =
                |state: &str| vec![("queue", queue.name.clone()), ("state", state.to_owned())];
            [
                (labels("held"), queue.held as f64),
                (labels("on_hold"), queue.on_hold as f64),
            ]
        });
        self.add("held_jobs", "Jobs that wait for their turn", None, held);
        let paused = overview.turns.iter().map(|queue| {
            let labels = vec![("queue", queue.name.clone())];
            (labels, truth(queue.limit.is_paused))
        });
        self.add(
            "queue_paused",
            "Whether a task queue is paused",
            None,
            paused,
        );
    }

    fn add_workers(&mut self, workflows: &[WorkflowView]) {
        let missing = workflows.iter().map(|workflow| {
            let labels = vec![("workflow", name(workflow).to_owned())];
            (labels, truth(workflow.without_worker_since.is_some()))
        });
        self.add(
            "workflow_without_worker",
            "Whether jobs wait for a workflow that has no worker",
            None,
            missing,
        );
    }

    /// By no names, for they may be made up.
    fn add_celery(&mut self, workers: &Workers) {
        let states = WorkerState::ALL.iter().map(|state| {
            let labels = vec![("state", state.name().to_owned())];
            (labels, workers.count(*state) as f64)
        });
        self.add("workers", "Celery workers", None, states);
        self.add(
            "worker_tasks",
            "Tasks that Celery workers compute",
            None,
            [(vec![], workers.tasks() as f64)],
        );
        self.add(
            "lost_tasks",
            "Tasks of jobs that no worker has had for a minute, and that are in no queue",
            None,
            [(vec![], workers.count_lost() as f64)],
        );
        self.add(
            "tasks_in_vain",
            "Tasks that workers compute though their jobs have ended",
            None,
            [(vec![], workers.in_vain().count() as f64)],
        );
    }

    fn add_queues(&mut self, overview: &Overview) {
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
        self.add(
            "queue_messages",
            "Messages that wait in a queue",
            None,
            messages,
        );
        let consumers = queues
            .into_iter()
            .map(|(labels, depth)| (labels, f64::from(depth.consumers)));
        self.add("queue_consumers", "Consumers of a queue", None, consumers);
    }

    fn add_database(&mut self, overview: &Overview) {
        let idle = overview.idle_connections;
        let used = overview.connections.saturating_sub(idle);
        let connections = [("idle", idle), ("used", used)]
            .map(|(state, count)| (vec![("state", state.to_owned())], f64::from(count)));
        self.add(
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
        self.add(
            "maintenance_last_run_timestamp",
            "When what one replica does for all was last begun",
            Some(Unit::Seconds),
            runs,
        );
    }
}

fn truth(is_so: bool) -> f64 {
    f64::from(u8::from(is_so))
}

fn name(workflow: &WorkflowView) -> &str {
    match workflow.defined {
        true => &workflow.name,
        false => OTHER_WORKFLOW,
    }
}
