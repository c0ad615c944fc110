//! The workers' part of the status page.

use jiff::Timestamp;
use maud::{Markup, html};

use super::acting::Acting;
use super::ago;
use crate::domain::worker::{TaskView, WorkerState, WorkerView, Workers};
use crate::telemetry::report::{harmless, one_line};

/// What somebody has to look at.
pub(super) fn alarms(workers: &Workers, now: Timestamp) -> Markup {
    html! {
        @for worker in &workers.workers { @if worker.state == WorkerState::Silent {
            p.alarm.warn { "The worker " b { (one_line(&worker.host)) } " has not answered for " (ago(worker.last_seen, now))
                ", though it is connected to RabbitMQ." }
        } }
        @for lost in &workers.lost_tasks {
            p.alarm.warn { "No worker has had the task of job " a href={ "/jobs/" (lost.job_id) } { code { (lost.job_id) } }
                " for " (ago(lost.since, now)) "." }
        }
    }
}

pub(super) fn table(workers: &Workers, now: Timestamp, acting: Option<&Acting>) -> Markup {
    html! {
        @if let Some(looked_at) = workers.looked_at {
            h2 { "Workers " span.dim { (ago(looked_at, now)) " ago" } }
            div.card { table {
                thead { tr {
                    th { "Worker" } th { "State" } th { "For" } th { "Queues" } th { "Computes" }
                    th.number title="Begun in the last hour." { "Tasks/h" }
                    th.number title="Of the tasks that it was seen with, those that ended in the last hour." { "Ended" }
                    th.number { "Failed" } @if acting.is_some() { th { "Actions" } }
                } }
                tbody {
                    @for worker in &workers.workers { (row(worker, now, acting)) }
                    @if workers.workers.is_empty() { tr { td.dim colspan="9" { "No worker has answered." } } }
                }
            } }
        }
    }
}

fn row(worker: &WorkerView, now: Timestamp, acting: Option<&Acting>) -> Markup {
    let queues: Vec<_> = worker.queues.iter().map(|queue| one_line(queue)).collect();
    html! {
        tr.worker id={ "worker-" (one_line(&worker.host)) } {
            td { (one_line(&worker.host)) div.dim { (about(worker)) } }
            td.nowrap { span class=(class(worker.state)) { (worker.state.text()) } }
            td.nowrap { (ago(worker.since, now)) }
            td { (queues.join(", ")) }
            td { @for task in &worker.tasks { div { (computes(task, now)) } } }
            td.number { @if let Some(rate) = worker.tasks_per_hour { (format!("{rate:.1}")) } }
            td.number { (worker.ended) }
            td.number class=[(worker.failed > 0).then_some("bad")] { (worker.failed) }
            @if let Some(acting) = acting { (acting.worker(worker)) }
        }
    }
}

/// `prefork, 1 at once, Celery 5.7.0`.
fn about(worker: &WorkerView) -> String {
    let pool = worker.pool.as_deref().map(one_line);
    let size = worker.pool_size.map(|size| format!("{size} at once"));
    let celery = worker.celery.as_deref();
    let celery = celery.map(|version| format!("Celery {}", one_line(version)));
    let parts: Vec<_> = [pool, size, celery].into_iter().flatten().collect();
    parts.join(", ")
}

fn computes(task: &TaskView, now: Timestamp) -> Markup {
    html! {
        @match task.job_id {
            Some(id) => a href={ "/jobs/" (id) } {
                @match &task.reference { Some(reference) => (harmless(reference)), None => code { (id) } }
            },
            None => { (one_line(&task.name)) " " code { (one_line(&task.id)) } }
        }
        @if let Some(step) = &task.step { span.dim { ", " (one_line(step)) } }
        span.dim { " for " (ago(task.since, now)) }
    }
}

fn class(state: WorkerState) -> &'static str {
    match state {
        WorkerState::Idle => "",
        WorkerState::Busy | WorkerState::BusyAndDeaf => "good",
        WorkerState::Draining | WorkerState::Drained => "warn",
        WorkerState::Silent => "bad",
        WorkerState::Gone => "dim",
    }
}
