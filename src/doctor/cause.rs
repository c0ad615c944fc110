//! The one root cause of several findings. Pure.
//!
//! A server that cannot be reached is found through each connection to it, and an orchestrator that cannot
//! start without it is found not to run: that is one thing to be done.

use serde::Serialize;

use super::{Finding, Severity};

/// What a finding is, as far as others may follow from it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum Kind {
    /// No orchestrator works without this.
    Needed,
    /// A connection to RabbitMQ does not come about: to which servers, and why.
    Unreachable {
        servers: String,
        why: String,
    },
    NoOrchestrator,
    /// Jobs wait for somebody to compute them.
    NoWorker,
    /// This service alone needs it, to add to the tables.
    NeededHere,
    /// One that runs does not do what it should, or does not answer.
    NotReady(Which),
    /// It could not be looked at, as always where nobody says how: of no interest beside an error.
    NotLookedAt,
    #[default]
    Other,
}

/// Which orchestrator, as far as that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    /// The one that is asked how it is, or the only one.
    Asked,
    /// One of several that Postgres knows, by its place: perhaps the one that is asked, perhaps another.
    OneOf(usize),
}

/// A finding's place among the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// What all of them come to, for whoever asks for that.
    Verdict,
    /// Others follow from it.
    Cause,
    /// It goes when the cause goes.
    Follows,
    #[default]
    Own,
}

/// Puts the cause of several findings before all others, and what follows from it behind it.
pub(super) fn lead(findings: &mut [Finding]) {
    for place in candidates(findings) {
        let cause = findings[place].kind.clone();
        let follows = |(other, finding): (usize, &Finding)| {
            other != place && finding.severity > Severity::Note && explains(&cause, &finding.kind)
        };
        let following: Vec<_> = findings.iter().enumerate().map(follows).collect();
        if !following.contains(&true) {
            continue;
        }
        findings[place].role = Role::Cause;
        for (finding, follows) in findings.iter_mut().zip(following) {
            if follows {
                finding.role = Role::Follows;
            }
        }
        break;
    }
    // Within each, the order in which they were found.
    findings.sort_by_key(|finding| match finding.role {
        Role::Verdict => 0,
        Role::Cause => 1,
        Role::Follows => 2,
        Role::Own => 3,
    });
}

/// Leaves out what only says that something was not looked at, where something is known to be wrong.
pub(super) fn without_noise(findings: &mut Vec<Finding>) {
    let is_bad = |finding: &Finding| finding.severity == Severity::Error;
    if findings.iter().any(is_bad) {
        findings.retain(|finding| finding.kind != Kind::NotLookedAt);
    }
}

/// Where findings are that others may follow from, those first from which most would.
fn candidates(findings: &[Finding]) -> Vec<usize> {
    let faulty = |finding: &Finding| finding.severity == Severity::Error;
    let places = findings.iter().enumerate().filter(|(_, one)| faulty(one));
    let mut places: Vec<_> = places.map(|(place, _)| place).collect();
    places.sort_by_key(|place| match findings[*place].kind {
        Kind::Needed => 0,
        Kind::Unreachable { .. } => 1,
        Kind::NotReady(_) | Kind::NoOrchestrator => 2,
        Kind::NoWorker | Kind::NeededHere | Kind::NotLookedAt | Kind::Other => 3,
    });
    places
}

fn explains(cause: &Kind, other: &Kind) -> bool {
    match (cause, other) {
        (Kind::Unreachable { .. }, Kind::Unreachable { .. })
        | (Kind::NotReady(_), Kind::NotReady(_)) => cause == other,
        (Kind::Needed | Kind::Unreachable { .. }, Kind::NoOrchestrator | Kind::NotReady(_))
        | (Kind::NotReady(_), Kind::NoOrchestrator) => true,
        (
            Kind::Needed,
            Kind::Needed
            | Kind::Unreachable { .. }
            | Kind::NoWorker
            | Kind::NeededHere
            | Kind::NotLookedAt
            | Kind::Other,
        )
        | (
            Kind::Unreachable { .. },
            Kind::Needed | Kind::NoWorker | Kind::NeededHere | Kind::NotLookedAt | Kind::Other,
        )
        | (Kind::NotReady(_), Kind::Needed | Kind::Unreachable { .. })
        | (
            Kind::NotReady(_),
            Kind::NoWorker | Kind::NeededHere | Kind::NotLookedAt | Kind::Other,
        )
        | (
            Kind::NoWorker
            | Kind::NeededHere
            | Kind::NoOrchestrator
            | Kind::NotLookedAt
            | Kind::Other,
            _,
        ) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn finding(name: &'static str) -> Finding {
        let unreachable = |servers: &str, why: &str| Kind::Unreachable {
            servers: servers.to_owned(),
            why: why.to_owned(),
        };
        let (severity, kind) = match name {
            "postgres" | "definitions" => (Severity::Error, Kind::Needed),
            "sdk" | "task" | "celery" => (Severity::Error, unreachable("mq:5672", "refused")),
            "other server" => (Severity::Error, unreachable("elsewhere:5672", "refused")),
            "other reason" => (
                Severity::Error,
                unreachable("mq:5672", "invalid credentials"),
            ),
            "not ready" => (Severity::Error, Kind::NotReady(Which::Asked)),
            "first still" => (Severity::Error, Kind::NotReady(Which::OneOf(0))),
            "second still" => (Severity::Error, Kind::NotReady(Which::OneOf(1))),
            "timeout" => (Severity::Note, Kind::NotLookedAt),
            "stopped" => (Severity::Warning, Kind::NoOrchestrator),
            "stopped, jobs wait" => (Severity::Error, Kind::NoOrchestrator),
            "letters" => (Severity::Warning, Kind::Other),
            _ => (Severity::Ok, Kind::Other),
        };
        Finding {
            part: name,
            severity,
            found: String::new(),
            remedy: String::new(),
            role: Role::Own,
            kind,
            hinders: Vec::new(),
            fix: None,
        }
    }

    /// The parts in their new order; the cause with a `>` and what follows with a `+` before it.
    #[rstest]
    #[case::one_server_of_three(&["ok", "sdk", "task", "celery"], "> sdk, + task, + celery, ok")]
    #[case::two_servers(&["sdk", "other server"], "sdk, other server")]
    #[case::two_reasons(&["sdk", "other reason", "celery"], "> sdk, + celery, other reason")]
    #[case::postgres(&["letters", "postgres", "stopped"], "> postgres, + stopped, letters")]
    #[case::postgres_alone(&["letters", "postgres"], "letters, postgres")]
    #[case::definitions(&["definitions", "stopped, jobs wait"], "> definitions, + stopped, jobs wait")]
    #[case::stopped_alone(&["stopped", "letters"], "stopped, letters")]
    #[case::postgres_and_rabbitmq(
        &["sdk", "task", "postgres"], "> sdk, + task, postgres")]
    #[case::and_the_service(&["not ready", "postgres"], "> postgres, + not ready")]
    #[case::stopped_process(&["ok", "not ready", "not ready"], "> not ready, + not ready, ok")]
    #[case::another_process(&["not ready", "second still"], "not ready, second still")]
    #[case::two_stopped_processes(
        &["stopped", "first still", "second still"], "> first still, + stopped, second still")]
    #[case::given_up(&["stopped", "not ready"], "> not ready, + stopped")]
    #[case::service_alone(&["ok", "not ready"], "ok, not ready")]
    #[case::noise(&["timeout", "postgres"], "postgres")]
    #[case::no_noise(&["timeout", "letters"], "timeout, letters")]
    #[case::nothing_is_wrong(&["ok"], "ok")]
    fn one_cause_leads(#[case] parts: &[&'static str], #[case] expected: &str) {
        let mut findings: Vec<_> = parts.iter().map(|part| finding(part)).collect();
        without_noise(&mut findings);
        lead(&mut findings);
        let told = findings.iter().map(|one| match one.role {
            Role::Cause => format!("> {}", one.part),
            Role::Follows => format!("+ {}", one.part),
            Role::Own | Role::Verdict => one.part.to_owned(),
        });
        assert_eq!(told.collect::<Vec<_>>().join(", "), expected);
    }
}
