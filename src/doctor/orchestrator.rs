//! Whether an orchestrator runs, what waits for it, and how it is.

use super::cause::Kind;
use super::fix::Fix;
use super::rabbitmq::Seen;
use super::{Findings, Severity, service};
use crate::broker::inspection::Inspected;
use crate::config::Config;
use crate::domain::overview::Depth;
use crate::domain::text::counted;
use crate::domain::vhost::Vhost;
use crate::store::inspection::Inspection;
use crate::wire::{CANCELS_QUEUE, SUBMISSIONS_QUEUE};

const PART: &str = "Orchestrator";

pub(super) fn examine(
    config: &Config,
    seen: &Seen,
    inspection: Option<&Inspection>,
    findings: &mut Findings,
) {
    queues(seen, inspection, findings);
    let submissions = depth(seen, SUBMISSIONS_QUEUE);
    let consumers = submissions.map(|depth| depth.consumers);
    service::ask(config, consumers, findings);
    if let Some(inspection) = inspection {
        service::standstills(&inspection.replicas, consumers, findings);
    }
}

fn depth(seen: &Seen, queue: &str) -> Option<Depth> {
    match seen.get(&(Vhost::Sdk, queue.to_owned())) {
        Some(Inspected::Good(depth)) => Some(*depth),
        Some(Inspected::Absent | Inspected::Otherwise(_) | Inspected::Forbidden(_)) | None => None,
    }
}

/// Who takes submissions, and what waits for that.
fn queues(seen: &Seen, inspection: Option<&Inspection>, findings: &mut Findings) {
    let standing = |queue: &str| seen.get(&(Vhost::Sdk, queue.to_owned()));
    if let Some(Inspected::Absent) = standing(SUBMISSIONS_QUEUE) {
        findings.add(
            PART,
            Severity::Note,
            format!(
                "there is no queue {SUBMISSIONS_QUEUE}: no orchestrator has been on this vhost"
            ),
            "Start it. What clients send before that is lost, unless --fix declares the queues.",
        );
        findings.fix(Fix::Declare);
        return;
    }
    let Some(submissions) = depth(seen, SUBMISSIONS_QUEUE) else {
        return;
    };
    if submissions.consumers > 0 {
        let count = usize::try_from(submissions.consumers).unwrap_or(usize::MAX);
        let count = counted(count, "orchestrator");
        let verb = if submissions.consumers == 1 {
            "takes"
        } else {
            "take"
        };
        findings.ok(PART, format!("{count} {verb} submissions"));
        return;
    }
    let cancels = depth(seen, CANCELS_QUEUE).map_or(0, |depth| depth.messages);
    let jobs: i64 = inspection.map_or(0, |one| one.waiting.values().sum());
    let waiting = [
        (i64::from(submissions.messages), "submission"),
        (i64::from(cancels), "cancel"),
        (jobs, "job"),
    ];
    let waiting = waiting.iter().filter(|(count, _)| *count > 0);
    let waiting: Vec<_> = waiting
        .map(|(count, noun)| counted(usize::try_from(*count).unwrap_or(0), noun))
        .collect();
    let verb = match waiting.as_slice() {
        [one] if one.starts_with("1 ") => "waits",
        _ => "wait",
    };
    let (severity, more) = match waiting.is_empty() {
        true => (Severity::Warning, String::new()),
        false => (
            Severity::Error,
            format!(", and {} {verb}", waiting.join(", ")),
        ),
    };
    findings.add(
        PART,
        severity,
        format!("no orchestrator runs{more}"),
        "Start it, and see its log if it does not stay. What waits is kept meanwhile.",
    );
    findings.is(Kind::NoOrchestrator);
}
