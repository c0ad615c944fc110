//! What jobs wait for that nobody looks after: paused queues, silent workers, tasks that nobody has; and which
//! run for too long, or without a word.

use jiff::{SignedDuration, Timestamp};

use super::cause::Kind;
use super::{Findings, Severity};
use crate::config::{Config, QUEUE_AGE};
use crate::domain::job::JobStatus;
use crate::domain::overview::{
    Ambers, Filter, JobState, JobView, MAX_LIMIT, Overview, QueueView, spoken,
};
use crate::domain::text::{counted, harmless};
use crate::domain::worker::{WorkerState, WorkerView, Workers};
use crate::domain::workflow::Catalogue;
use crate::store::inspection::{Inspection, WaitingJobs};
use crate::store::{Connection, StoreError};
use crate::telemetry::report::one_line;

const PART: &str = "Jobs";
const WORKERS: &str = "Workers";

/// How many that are alike are named.
const NAMED: usize = 10;

/// How old a look at the workers may be.
const RECENT: SignedDuration = SignedDuration::from_mins(2);

/// Checks them, in tables that may be read.
pub(super) fn examine(
    config: &Config,
    catalogue: Option<&Catalogue>,
    inspection: &Inspection,
    connection: &mut Connection,
    findings: &mut Findings,
) {
    let now = inspection.clock.unwrap_or_else(Timestamp::now);
    let why = |error| one_line(&format!("{:#}", anyhow::Error::from(error)));
    const REMEDY: &str = "See Postgres's log, and try again.";
    let known = match look(config, catalogue, now, connection, findings) {
        Ok(known) => known,
        Err(error) => {
            let found = format!("what they wait for is not known: {}", why(error));
            findings.add(PART, Severity::Error, found, REMEDY);
            return;
        }
    };
    if inspection.replicas.is_empty() {
        // Nobody hears what the workers report, and it waits.
        return;
    }
    match running(known, now, connection) {
        Ok(jobs) => {
            for kind in Ambers::among(&jobs, now) {
                judge_running(&kind, findings);
            }
        }
        Err(error) => {
            // As where somebody has locked what was not needed so far, which is told.
            let found = format!("which are overdue or silent is not known: {}", why(error));
            findings.add(PART, Severity::Note, found, REMEDY);
            findings.is(Kind::NotLookedAt);
        }
    }
}

fn look(
    config: &Config,
    catalogue: Option<&Catalogue>,
    now: Timestamp,
    connection: &mut Connection,
    findings: &mut Findings,
) -> Result<Overview, StoreError> {
    let defined = catalogue.map(Catalogue::queue_limits).unwrap_or_default();
    let limits = connection.queue_limits(defined)?;
    let turns = connection.turns(&limits, config.priority_aging)?;
    for queue in &turns {
        judge_pause(queue, findings);
    }
    let age = config
        .alerts
        .as_ref()
        .map_or(QUEUE_AGE, |alerts| alerts.queue_age);
    let age = SignedDuration::try_from(age).unwrap_or(SignedDuration::MAX);
    for (workflow, waiting) in connection.waiting_jobs()? {
        judge_age(&workflow, waiting, age, now, findings);
    }
    let workers = match config.workers_period {
        Some(_) => Some(connection.workers()?),
        None => None,
    };
    if let Some(workers) = &workers {
        judge_workers(workers, now, findings);
    }
    Ok(Overview {
        has_rows: true,
        turns,
        workers,
        ..Overview::default()
    })
}

/// Those that run, with what is to be expected of them, as lists of jobs have it.
fn running(
    mut known: Overview,
    now: Timestamp,
    connection: &mut Connection,
) -> Result<Vec<JobView>, StoreError> {
    known.rows = connection.workflows(&[])?;
    let filter = Filter {
        state: Some(JobState::Live(JobStatus::Running)),
        limit: MAX_LIMIT,
        ..Filter::default()
    };
    let mut jobs = connection.jobs(&filter, &known.turns)?.jobs;
    known.explain(&mut jobs, now);
    Ok(jobs)
}

/// In the words of the status page.
fn judge_running(all: &Ambers<'_>, findings: &mut Findings) {
    let (first, more) = all.named();
    let name = |job: &&JobView| {
        let id = job.id.to_string();
        match job.reference.as_str() {
            "" => id,
            reference => format!("{} ({})", harmless(reference), &id[..8]),
        }
    };
    let names: Vec<_> = first.iter().map(name).collect();
    let more = match more {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    findings.add(
        PART,
        // One in a few is, where all is well.
        Severity::Note,
        format!(
            "{} {}: {}{more}",
            all.subject(),
            all.amber.word(),
            names.join(", ")
        ),
        &format!(
            "{} `jobs show ID` says what is known of it. If it is stuck, cancel it: `jobs cancel ID`.",
            all.meaning()
        ),
    );
}

fn jobs(count: i64) -> String {
    counted(usize::try_from(count).unwrap_or(0), "job")
}

fn judge_pause(queue: &QueueView, findings: &mut Findings) {
    // Those on hold wait for somebody to release them.
    let held = queue.held;
    if !queue.limit.is_paused || held == 0 {
        return;
    }
    let name = one_line(&queue.name);
    let (by, remedy) = match queue.is_paused_by_operator {
        true => (
            match queue.paused_by() {
                Some(pause) => format!(" since {:.0} by {}", pause.at, pause.by),
                None => " by an operator".to_owned(),
            },
            format!("`workflows resume {name}` lets them go."),
        ),
        false => (
            " by the definition file".to_owned(),
            format!(
                "`workflows resume {name}` lets them go, whatever the file says. Or take `paused` of it out of \
                 the file, or let single jobs go: `jobs release ID`."
            ),
        ),
    };
    let verb = if held == 1 { "waits" } else { "wait" };
    let found = format!("{name} is paused{by}, and {} {verb} for that", jobs(held));
    findings.add(PART, Severity::Warning, found, &remedy);
}

fn judge_age(
    workflow: &str,
    waiting: WaitingJobs,
    age: SignedDuration,
    now: Timestamp,
    findings: &mut Findings,
) {
    let oldest = now.duration_since(waiting.since);
    if oldest < age {
        return;
    }
    let name = one_line(workflow);
    findings.add(
        PART,
        Severity::Warning,
        match waiting.count {
            1 => format!("a job of {name} has waited for {}", spoken(oldest)),
            more => format!(
                "of the {} of {name} that wait the oldest has waited for {}",
                jobs(more),
                spoken(oldest)
            ),
        },
        &format!("`jobs list --workflow {name}` says of each why it waits."),
    );
}

fn judge_workers(workers: &Workers, now: Timestamp, findings: &mut Findings) {
    let Some(age) = workers.looked_at.map(|at| now.duration_since(at)) else {
        return;
    };
    if age > RECENT {
        // Nothing that was seen then says how they are.
        findings.add(
            WORKERS,
            Severity::Note,
            format!("nobody has looked at them for {}", spoken(age)),
            "A service does that every WORKERS_PERIOD_SEC, while it has a session with RabbitMQ.",
        );
        return;
    }
    let silent = workers.workers.iter();
    let silent = silent.filter(|worker| worker.state == WorkerState::Silent);
    for worker in silent.take(NAMED) {
        judge_silent(worker, now, findings);
    }
    for lost in workers.lost_tasks.iter().take(NAMED) {
        let since = spoken(now.duration_since(lost.since));
        findings.add(
            PART,
            Severity::Warning,
            format!("no worker has had the task of job {} for {since}", lost.job_id),
            "`jobs show` says what is known of it. What computed it has gone without a word: cancel it, and \
             submit it again.",
        );
    }
    if let Some(more) = workers.more_lost(NAMED) {
        findings.add(
            PART,
            Severity::Warning,
            more,
            "`workers` names them, of each queue the oldest ones. Something has taken them from RabbitMQ, as a purge \
             of a queue does: cancel them, and submit them again. With TASK_LOST_SEC the service ends them itself.",
        );
    }
}

fn judge_silent(worker: &WorkerView, now: Timestamp, findings: &mut Findings) {
    let tasks = worker.tasks.iter().map(|task| match task.job_id {
        Some(id) => format!("job {id}"),
        None => format!("task {}", one_line(&task.id)),
    });
    let tasks: Vec<_> = tasks.collect();
    let tasks = match tasks.is_empty() {
        true => String::new(),
        false => format!("; it has {}", tasks.join(", ")),
    };
    findings.add(
        WORKERS,
        Severity::Warning,
        format!(
            "{} has not answered for {}, though it is connected to RabbitMQ{tasks}",
            one_line(&worker.host),
            spoken(now.duration_since(worker.last_seen))
        ),
        "See whether its process is stopped or its machine hangs, and restart it if it stays so: what it has goes \
         to another worker then, as far as the delivery limit allows.",
    );
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::domain::turns::QueueLimit;

    #[rstest]
    #[case::by_command(
        true,
        true,
        3,
        "nightly is paused by an operator, and 3 jobs wait for that"
    )]
    #[case::by_file(
        true,
        false,
        1,
        "nightly is paused by the definition file, and 1 job waits for that"
    )]
    #[case::nobody_waits_but_on_hold(true, true, 0, "")]
    #[case::not_paused(false, true, 2, "")]
    fn a_pause_that_somebody_waits_for_is_told(
        #[case] is_paused: bool,
        #[case] by_operator: bool,
        #[case] held: i64,
        #[case] expected: &str,
    ) {
        let queue = QueueView {
            name: "nightly".to_owned(),
            limit: QueueLimit {
                is_paused,
                ..QueueLimit::default()
            },
            held,
            on_hold: 1,
            waiting: 0,
            running: 0,
            oldest_waiting: None,
            order: Vec::new(),
            seats: Vec::new(),
            is_paused_by_operator: by_operator,
            acts: Default::default(),
        };
        let mut findings = Findings::default();
        judge_pause(&queue, &mut findings);
        let found = findings.0.first().map_or("", |one| one.found.as_str());
        assert_eq!(found, expected);
        let resume = "`workflows resume nightly` lets them go";
        assert!(findings.0.iter().all(|one| one.remedy.starts_with(resume)));
    }
}
