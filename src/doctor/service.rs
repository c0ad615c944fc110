//! How the running service says that it is, and which replicas stand still.

use std::net::SocketAddr;

use jiff::SignedDuration;

use super::cause::{Kind, Which};
use super::{Findings, Severity};
use crate::VERSION;
use crate::config::Config;
use crate::domain::overview::spoken;
use crate::healthcheck::{self, Answer, Report};
use crate::store::inspection::Replica;

const PART: &str = "Orchestrator";
const STOPPED: &str = "Its process is stopped or hangs: see its state (`ps`) and its log, and restart it. Nothing is lost \
                       by that.";

/// How long a replica may do nothing of what it does every second.
const STANDSTILL: SignedDuration = SignedDuration::from_secs(20);

/// Asks the service that listens here how it is. `consumers` take submissions, of this and of other replicas,
/// where that is known.
pub(super) fn ask(config: &Config, consumers: Option<u32>, findings: &mut Findings) {
    let Some(bind) = config.http_bind else {
        findings.add(
            PART,
            Severity::Note,
            "HTTP_BIND is empty, so that it cannot be asked how it is",
            "",
        );
        return;
    };
    judge(bind, consumers, &healthcheck::ask(bind), findings);
}

fn judge(bind: SocketAddr, consumers: Option<u32>, answer: &Answer, findings: &mut Findings) {
    let url = healthcheck::url(bind);
    match answer {
        // Without a consumer none runs, which is told elsewhere.
        Answer::Nobody if consumers == Some(0) => {}
        Answer::Nobody => findings.add(
            PART,
            Severity::Note,
            format!("none answers at {url}, so that it cannot be asked how it is"),
            "Run this where one runs, such as `docker compose exec orchestrator omotes-orchestrator doctor`, or \
             name its address in HTTP_BIND.",
        ),
        Answer::Stranger(said) => findings.add(
            PART,
            Severity::Note,
            format!("at {url} somebody else answers, so that it cannot be asked how it is: {said}"),
            "Set HTTP_BIND as the service has it.",
        ),
        Answer::Silence(why) => {
            findings.add(
                PART,
                Severity::Error,
                format!("at {url} one takes connections, and does not answer: {why}"),
                STOPPED,
            );
            findings.is(Kind::NotReady(Which::Asked));
        }
        Answer::Service(report) => judge_report(&url, report, findings),
    }
}

fn judge_report(url: &str, report: &Report, findings: &mut Findings) {
    let version = report.version.as_deref().unwrap_or("unknown");
    match &report.trouble {
        None if report.is_ready => {
            findings.ok(PART, format!("{url} is ready, version {version}"));
        }
        None => {
            let found = format!("{url} is not ready, version {version}");
            findings.add(PART, Severity::Error, found, "See its log.");
            findings.is(Kind::NotReady(Which::Asked));
        }
        Some(trouble) => {
            let found = format!("{url}, version {version}, is not ready: {trouble}");
            findings.add(PART, Severity::Error, found, &trouble.remedy);
            findings.is(Kind::NotReady(Which::Asked));
            for other in &trouble.others {
                let found = format!("{url} is not ready for another reason: {other}");
                findings.add(PART, Severity::Error, found, "See its log.");
            }
        }
    }
    if version != VERSION {
        findings.add(
            PART,
            Severity::Note,
            format!("the one at {url} is of version {version}, and this program of {VERSION}"),
            "What it knows of the tables and of the configuration may differ.",
        );
    }
}

/// Tells replicas that stand still, wherever they run. RabbitMQ takes them for living for a while, and
/// Postgres for longer. `consumers` as in [`ask`].
pub(super) fn standstills(replicas: &[Replica], consumers: Option<u32>, findings: &mut Findings) {
    // One that takes submissions may have lost Postgres, which does not know of it then.
    let is_alone = replicas.len() == 1 && consumers.is_none_or(|consumers| consumers <= 1);
    let which = match replicas.len() {
        1 => "the orchestrator".to_owned(),
        more => format!("one of {more} orchestrators"),
    };
    let still = replicas.iter().enumerate();
    for (place, replica) in still.filter(|(_, one)| one.still_for > STANDSTILL) {
        let from = replica.from.as_deref();
        let from = from.map(|from| format!(" that is connected from {from}"));
        findings.add(
            PART,
            Severity::Error,
            format!(
                "{which}{} stands still: Postgres has not heard of it for {}",
                from.unwrap_or_default(),
                spoken(replica.still_for)
            ),
            STOPPED,
        );
        findings.is(Kind::NotReady(match is_alone {
            true => Which::Asked,
            false => Which::OneOf(place),
        }));
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::the_only_one(&[60], Some(1), &[Which::Asked])]
    #[case::given_up_by_rabbitmq(&[60], Some(0), &[Which::Asked])]
    #[case::one_is_not_in_postgres(&[60], Some(2), &[Which::OneOf(0)])]
    #[case::one_of_two(&[0, 60], Some(2), &[Which::OneOf(1)])]
    #[case::both(&[60, 60], None, &[Which::OneOf(0), Which::OneOf(1)])]
    #[case::none(&[0], Some(1), &[])]
    fn a_replica_that_stands_still_is_told_from_others(
        #[case] seconds: &[i64],
        #[case] consumers: Option<u32>,
        #[case] expected: &[Which],
    ) {
        let replicas = seconds.iter().map(|seconds| Replica {
            from: None,
            still_for: SignedDuration::from_secs(*seconds),
        });
        let replicas: Vec<_> = replicas.collect();
        let mut findings = Findings::default();
        standstills(&replicas, consumers, &mut findings);
        let kinds: Vec<_> = findings.0.into_iter().map(|one| one.kind).collect();
        let expected: Vec<_> = expected.iter().copied().map(Kind::NotReady).collect();
        assert_eq!(kinds, expected);
    }
}
