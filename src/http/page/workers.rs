//! The workers' part of the status page.

use jiff::Timestamp;
use maud::{Markup, html};

use super::acting::Acting;
use super::words::{Matter, command, looked, name, since};
use crate::domain::overview::JobView;
use crate::domain::worker::{LostTask, TaskView, WorkerState, WorkerView, Workers};
use crate::telemetry::report::{harmless, one_line};

/// How many lost tasks are told one by one.
const NAMED: usize = 20;

/// What somebody has to look at; `jobs` are those that are known by their names.
pub(super) fn matters(workers: &Workers, jobs: &[JobView], now: Timestamp) -> Vec<Matter> {
    let silent = workers.workers.iter();
    let silent = silent.filter(|worker| worker.state == WorkerState::Silent);
    let silent = silent.map(|worker| Matter {
        short: format!("worker {} does not answer", one_line(&worker.host)),
        full: html! {
            "The worker " b { (one_line(&worker.host)) } " has not answered for " (since(worker.last_seen, now))
            ", though it is connected to RabbitMQ."
            @if !worker.tasks.is_empty() {
                " It computes " @for (place, task) in worker.tasks.iter().enumerate() {
                    @if place > 0 { ", " } (computes(task, now))
                } ". Restart it: its task goes to another, as far as its delivery limit allows."
            } @else { " Restart it." }
        },
    });
    let job = |lost: &LostTask| {
        let known = jobs.iter().find(|job| job.id == lost.job_id);
        html! { a href={ "/jobs/" (lost.job_id) } {
            @match known { Some(job) => (name(job)), None => code { (lost.job_id) } }
        } }
    };
    let lost = workers.lost_tasks.iter().take(NAMED).map(|lost| Matter {
        short: "a task is lost".to_owned(),
        full: html! {
            "No worker has had the task of job " (job(lost)) " for " (since(lost.since, now))
            @if lost.never_begun { ", and it is in no queue, though none has begun it" }
            ". Cancel the job and submit it again."
        },
    });
    let in_vain = workers.in_vain().map(|one| Matter {
        short: "a worker computes for nobody".to_owned(),
        full: html! {
            "The worker " b { (one_line(&one.worker.host)) } " computes " (computes(one.task, now))
            ". It has been told to stop; if it goes on, restart it."
        },
    });
    let more_lost = workers.more_lost(NAMED).map(|more| Matter {
        short: "more tasks are lost".to_owned(),
        full: html! { (more) ". " (command("omotes-orchestrator workers")) " names them." },
    });
    silent.chain(lost).chain(more_lost).chain(in_vain).collect()
}

pub(super) fn table(workers: &Workers, now: Timestamp, acting: Option<&Acting>) -> Markup {
    html! {
        @if let Some(looked_at) = workers.looked_at {
            section {
                h2 { "Workers " span.dim { (looked(looked_at, now)) " ago" } }
                @if workers.workers.is_empty() {
                    div.empty {
                        p { b { "No worker has answered." } " Start one; what keeps those away that run: "
                            (command("omotes-orchestrator doctor")) }
                    }
                } @else {
                    div.card tabindex="0" role="region" aria-label="Workers" { table {
                        thead { tr {
                            th scope="col" { "Worker" } th scope="col" { "State" } th scope="col" { "For" }
                            th scope="col" { "Queues" } th scope="col" { "Computes" }
                            th.number scope="col" title="Begun in the last hour." { "Tasks/h" }
                            th.number scope="col" title="Of the tasks that it was seen with, those that ended in the last hour." { "Ended" }
                            th.number scope="col" { "Failed" } @if acting.is_some() { th scope="col" { "Actions" } }
                        } }
                        tbody { @for worker in &workers.workers { (row(worker, now, acting)) } }
                    } }
                }
            }
        }
    }
}

fn row(worker: &WorkerView, now: Timestamp, acting: Option<&Acting>) -> Markup {
    let queues: Vec<_> = worker.queues.iter().map(|queue| one_line(queue)).collect();
    html! {
        tr.worker id={ "worker-" (one_line(&worker.host)) } {
            th scope="row" title=(about(worker)) { (one_line(&worker.host)) }
            td.nowrap { span class={ "state " (dot(worker.state)) } { span { (worker.state.text()) } } }
            td.nowrap { (since(worker.since, now)) }
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
        span.dim { " for " (since(task.since, now)) }
        @if let Some(end) = &task.ended { span.warn { ", which " (end.in_words()) " " (since(end.at, now)) " ago" } }
    }
}

fn dot(state: WorkerState) -> &'static str {
    match state {
        WorkerState::Idle => "waits",
        WorkerState::Busy | WorkerState::BusyAndDeaf => "runs",
        WorkerState::Draining | WorkerState::Drained => "hold",
        WorkerState::Silent => "amber",
        WorkerState::Gone => "off",
    }
}
