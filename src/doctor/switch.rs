//! What is to be known before the Python service's place is taken, or given back to it.

use std::collections::BTreeSet;

use super::cause::Kind;
use super::rabbitmq::Seen;
use super::{Finding, Findings, Role, Severity};
use crate::broker::Link;
use crate::broker::inspection::Inspected;
use crate::config::Config;
use crate::domain::switch::{self, InFlight, Remark};
use crate::domain::vhost::Vhost;
use crate::domain::workflow::Catalogue;
use crate::store::inspection::Inspection;
use crate::store::migrate::{self, ALEMBIC_HEAD, REVISIONS};
use crate::store::{Store, StoreError};
use crate::telemetry::report::one_line;
use crate::threads::within_deadline;
use crate::wire::{CANCELS_QUEUE, DEAD_LETTERS_QUEUE, SUBMISSIONS_QUEUE, WORKFLOW_REQUESTS_KEY};

/// What holds in both directions.
const PART: &str = "Switch";
/// What holds on the way to the Python service alone.
const BACK: &str = "Switch back";

/// The switch that is about to be made.
#[derive(Debug)]
pub struct Switch {
    /// Whether it may be one to this service, and one to the Python service.
    pub may_be_here: bool,
    pub may_be_back: bool,
}

/// What the other checks have seen.
pub(super) struct Scene<'s> {
    pub(super) config: &'s Config,
    pub(super) catalogue: Option<&'s Catalogue>,
    pub(super) inspection: Option<&'s Inspection>,
    pub(super) seen: &'s Seen,
}

/// Says nothing of what could not be looked at: the other checks have reported that.
pub(super) fn examine(switch: &Switch, scene: &Scene<'_>, findings: &mut Findings) {
    queues(scene, findings);
    let in_flight = scene.inspection.and_then(|inspection| {
        revision(inspection, switch, findings);
        in_flight(scene.config, inspection, findings)
    });
    match &in_flight {
        Some(in_flight) => judge_jobs(in_flight, switch, findings),
        None => findings.hinders("which jobs are in flight is not known"),
    }
    if switch.may_be_back {
        examine_back(scene, in_flight.as_ref(), findings);
    }
    verdicts(switch, findings);
}

/// What matters on the way to the Python service alone.
fn examine_back(scene: &Scene<'_>, in_flight: Option<&InFlight>, findings: &mut Findings) {
    if let Some(in_flight) = in_flight {
        add(switch::of_jobs(in_flight, scene.catalogue), findings);
    }
    if let Some(catalogue) = scene.catalogue {
        add(switch::of_definitions(catalogue), findings);
    }
    dead_letters(scene.seen, findings);
    requests(scene, findings);
    add(switch::of_servers(&scene.config.servers()), findings);
    add(switch::of_variables(&scene.config.variables), findings);
}

/// Adds what matters on the way to the Python service alone.
fn add(remarks: impl IntoIterator<Item = Remark>, findings: &mut Findings) {
    for remark in remarks {
        let severity = match remark.hinders {
            Some(_) => Severity::Warning,
            None => Severity::Note,
        };
        findings.add(BACK, severity, remark.found, remark.remedy);
        if let Some(why) = remark.hinders {
            findings.hinders(why);
        }
    }
}

/// Says first whether the switch may be made, of each that is asked for.
fn verdicts(switch: &Switch, findings: &mut Findings) {
    let here = [switch.may_be_here, false];
    let back = [switch.may_be_back, true];
    for [_, is_back] in [here, back].into_iter().filter(|[is_asked, _]| *is_asked) {
        let reasons = findings.0.iter().filter(|one| concerns(one, is_back));
        let mut reasons: Vec<_> = reasons.flat_map(reasons_of).collect();
        let mut told = BTreeSet::new();
        reasons.retain(|reason| told.insert(reason.clone()));
        let severity = match reasons.is_empty() {
            true => Severity::Ok,
            false => Severity::Warning,
        };
        let found = match (reasons.as_slice(), is_back) {
            (reasons, true) => switch::verdict_back(reasons),
            ([], false) => {
                "Safe to come to this service: it goes on where the Python service has stopped."
                    .to_owned()
            }
            (reasons, false) => format!("Not yet to this service: {}.", reasons.join("; ")),
        };
        let part = if is_back { BACK } else { PART };
        findings.add(part, severity, found, "");
        if let Some(verdict) = findings.0.last_mut() {
            verdict.role = Role::Verdict;
        }
    }
}

/// Whether a finding matters in this direction.
fn concerns(finding: &Finding, is_back: bool) -> bool {
    match is_back {
        true => finding.kind != Kind::NeededHere,
        false => finding.part != BACK,
    }
}

/// Why a finding is in the way of a switch.
fn reasons_of(finding: &Finding) -> Vec<String> {
    // What is found of the switch itself says it better.
    let is_told = [PART, BACK].contains(&finding.part) && !finding.hinders.is_empty();
    // Either service leaves in RabbitMQ what waits there; and between the two none runs.
    let is_waiting = matches!(finding.kind, Kind::NoWorker | Kind::NoOrchestrator);
    let is_bad = finding.severity == Severity::Error && !is_told && !is_waiting;
    let unfit = is_bad.then(|| format!("{} is not in order", finding.part));
    unfit.into_iter().chain(finding.hinders.clone()).collect()
}

/// Who consumes what an orchestrator consumes, and what waits for it.
fn queues(scene: &Scene<'_>, findings: &mut Findings) {
    let ours = [
        (Vhost::Sdk, SUBMISSIONS_QUEUE),
        (Vhost::Sdk, CANCELS_QUEUE),
        (Vhost::Task, scene.config.task_result_queue.as_str()),
        (Vhost::Task, scene.config.task_progress_queue.as_str()),
    ];
    let mut consumed = Vec::new();
    let mut waiting = Vec::new();
    for (vhost, queue) in ours {
        match scene.seen.get(&(vhost, queue.to_owned())) {
            Some(Inspected::Good(depth)) => {
                if depth.consumers > 0 {
                    consumed.push(format!("{queue} ({})", depth.consumers));
                }
                if depth.messages > 0 {
                    waiting.push(format!("{} in {queue}", depth.messages));
                }
            }
            Some(Inspected::Absent) => {}
            Some(Inspected::Otherwise(_) | Inspected::Forbidden(_)) | None => {
                findings.hinders("whether an orchestrator runs is not known");
                return;
            }
        }
    }
    if consumed.is_empty() {
        findings.ok(PART, "no orchestrator runs: nobody consumes its queues");
    } else {
        findings.add(
            PART,
            Severity::Warning,
            format!("an orchestrator runs: there are consumers of {}", consumed.join(", ")),
            "Stop it by SIGTERM, and wait for its end, before the other one starts: only then is what it \
             holds unacknowledged back in the queues, and nobody else at work on the same jobs.",
        );
        findings.hinders("an orchestrator runs");
    }
    if !waiting.is_empty() {
        findings.add(
            PART,
            Severity::Note,
            format!("messages wait: {}", waiting.join(", ")),
            "There is nothing to do: the service that starts next takes them.",
        );
    }
}

fn revision(inspection: &Inspection, switch: &Switch, findings: &mut Findings) {
    let Some(Ok(applied)) = inspection.revision else {
        return;
    };
    let last = applied.checked_sub(1).map(|last| REVISIONS[last].id);
    let found = match last {
        None => "there are no tables: either service makes its own at its first start".to_owned(),
        Some(_) if migrate::has_own(applied) => format!(
            "to the Python service the tables are at its last revision, {ALEMBIC_HEAD}: it starts with them \
             as they are"
        ),
        Some(last) if switch.may_be_here => format!(
            "the tables are as the Python service left them at {last}: this one adds to them at its first \
             start, and the Python service starts with that as well"
        ),
        Some(last) => format!(
            "the tables are as the Python service left them at {last}: it starts with them as they are"
        ),
    };
    findings.ok(PART, found);
}

fn in_flight(
    config: &Config,
    inspection: &Inspection,
    findings: &mut Findings,
) -> Option<InFlight> {
    let may_read = |what: &str| !what.starts_with("SELECT");
    if !inspection
        .lacks_to_work
        .iter()
        .all(|lack| may_read(&lack.what))
    {
        return None;
    }
    let store = Store::for_viewers(&config.postgres).hasty();
    let looked = store
        .connection()
        .and_then(|mut connection| connection.in_flight());
    looked
        .map_err(|error: StoreError| {
            findings.add(
                PART,
                Severity::Error,
                one_line(&format!("the jobs: {:#}", anyhow::Error::from(error))),
                "Which jobs are in flight is not known; try again before the switch.",
            );
        })
        .ok()
}

fn judge_jobs(in_flight: &InFlight, switch: &Switch, findings: &mut Findings) {
    if in_flight.by_state.is_empty() {
        findings.ok(PART, "no job is in flight");
        return;
    }
    let by_state = in_flight.by_state.iter();
    let by_state: Vec<_> = by_state
        .map(|(state, jobs)| format!("{jobs} {state}"))
        .collect();
    findings.add(
        PART,
        Severity::Note,
        format!("jobs are in flight: {}", by_state.join(", ")),
        match switch.may_be_back && in_flight.held > 0 {
            true => {
                "But for those that wait for their turn there is nothing to do: their tasks stay in their queues, \
                 what workers say meanwhile waits in RabbitMQ, and the service that starts next goes on with them."
            }
            false => {
                "There is nothing to do: their tasks stay in their queues, what workers say meanwhile waits in \
                 RabbitMQ, and the service that starts next goes on with them."
            }
        },
    );
    if switch.may_be_here && in_flight.without_task > 0 {
        let count = in_flight.without_task;
        findings.add(
            PART,
            Severity::Note,
            format!("{count} of them have no task: a Python service was killed over their submissions"),
            "They go on when RabbitMQ redelivers these, which it does when that service is gone; without, \
             they end after JOB_RETENTION_SEC.",
        );
    }
}

fn dead_letters(seen: &Seen, findings: &mut Findings) {
    let letters = seen.iter().any(|((_, queue), standing)| {
        queue == DEAD_LETTERS_QUEUE
            && matches!(standing, Inspected::Good(depth) if depth.messages > 0)
    });
    if letters {
        findings.add(
            BACK,
            Severity::Note,
            format!("the Python service never looks at what is in {DEAD_LETTERS_QUEUE}"),
            "Look through it with `dead-letters list` while this service runs: what was requeued after the \
             switch would stop the Python service's consumer if it cannot be read.",
        );
    }
}

/// The queue that the Python service declares as its own, which fails on one that lasts.
fn requests(scene: &Scene<'_>, findings: &mut Findings) {
    let was_reached = scene.seen.keys().any(|(vhost, _)| *vhost == Vhost::Sdk);
    if !was_reached {
        return;
    }
    let looked = Link::open(&scene.config.sdk_rabbitmq, "doctor").and_then(|link| {
        within_deadline(
            super::rabbitmq::DEADLINE,
            || link.kill(),
            || link.inspect_exclusive_queue(WORKFLOW_REQUESTS_KEY),
        )
    });
    let before = findings.0.len();
    match looked {
        Ok(Inspected::Good(_)) => findings.add(
            BACK,
            Severity::Error,
            format!(
                "the queue {WORKFLOW_REQUESTS_KEY} belongs to nobody: the Python service, which wants it for \
                 itself alone, does not start"
            ),
            "Delete it (`rabbitmqctl delete_queue`); either service declares it anew.",
        ),
        // Whoever holds it is known by the other queues.
        Ok(Inspected::Absent | Inspected::Otherwise(_) | Inspected::Forbidden(_)) => {}
        Err(error) => findings.add(
            BACK,
            Severity::Error,
            one_line(&format!("{WORKFLOW_REQUESTS_KEY}: {error:#}")),
            "Whether the Python service can have this queue is not known; try again before the switch.",
        ),
    }
    if findings.0.len() > before {
        findings.hinders(format!("{WORKFLOW_REQUESTS_KEY} is in the way"));
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// What the verdicts say after their first words, of each direction; empty where it is safe.
    #[rstest]
    #[case::nothing(("Postgres", Severity::Ok, Kind::Other, ""), "", "")]
    #[case::a_warning(("Postgres", Severity::Warning, Kind::Other, ""), "", "")]
    #[case::no_rights(
        ("SDK RabbitMQ", Severity::Error, Kind::Other, ""),
        "SDK RabbitMQ is not in order.",
        "SDK RabbitMQ is not in order."
    )]
    #[case::needed(
        ("Postgres", Severity::Error, Kind::Needed, "which jobs are in flight is not known"),
        "Postgres is not in order; which jobs are in flight is not known.",
        "Postgres is not in order; which jobs are in flight is not known."
    )]
    #[case::no_upgrade(
        ("Postgres", Severity::Error, Kind::NeededHere, ""), "Postgres is not in order.", ""
    )]
    #[case::of_both(
        (PART, Severity::Error, Kind::Other, "it hinders"), "it hinders.", "it hinders."
    )]
    #[case::jobs_wait_for_a_worker(("CELERY RabbitMQ", Severity::Error, Kind::NoWorker, ""), "", "")]
    #[case::jobs_wait_between_the_two(("Orchestrator", Severity::Error, Kind::NoOrchestrator, ""), "", "")]
    #[case::of_the_way_back((BACK, Severity::Error, Kind::Other, "it hinders"), "", "it hinders.")]
    fn every_error_is_in_the_way(
        #[case] (part, severity, kind, hinders): (&'static str, Severity, Kind, &str),
        #[case] here: &str,
        #[case] back: &str,
    ) {
        let mut findings = Findings::default();
        // Twice the same is one reason.
        for _ in 0..2 {
            findings.add(part, severity, "", "");
            findings.is(kind.clone());
        }
        for finding in &mut findings.0 {
            finding.hinders = Vec::from_iter((!hinders.is_empty()).then(|| hinders.to_owned()));
        }
        let switch = Switch {
            may_be_here: true,
            may_be_back: true,
        };
        verdicts(&switch, &mut findings);
        let told = findings.0.iter().filter(|one| one.role == Role::Verdict);
        let told = told.map(|one| match one.severity {
            Severity::Ok => "",
            _ => one.found.split_once(": ").unwrap().1,
        });
        assert_eq!(told.collect::<Vec<_>>(), [here, back]);
    }
}
