//! How the running service says that it is, and whether one that seems to run does anything.

use std::net::SocketAddr;

use jiff::SignedDuration;

use super::cause::Kind;
use super::{Findings, Severity};
use crate::VERSION;
use crate::config::Config;
use crate::domain::overview::spoken;
use crate::healthcheck::{self, Answer, Report};
use crate::store::inspection::Inspection;

const PART: &str = "Orchestrator";

/// How many rounds of the maintenance may be missed, and how late one may be at least, before nobody is at
/// work. That of the running service may have another period than is set here.
const MISSED_ROUNDS: i32 = 5;
const LATE: SignedDuration = SignedDuration::from_mins(2);

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
                "Its process is stopped or hangs: see its state (`ps`) and its log, and restart it. Nothing is \
                 lost by that.",
            );
            findings.is(Kind::NotReady);
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
            findings.is(Kind::NotReady);
        }
        Some(trouble) => {
            let found = format!("{url}, version {version}, is not ready: {trouble}");
            findings.add(PART, Severity::Error, found, &trouble.remedy);
            findings.is(Kind::NotReady);
            for other in &trouble.others {
                let found = format!("{url} is not ready for another reason: {other}");
                findings.add(PART, Severity::Error, found, "See its log.");
                findings.is(Kind::NotReady);
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

/// Whether those that take submissions do anything: a stopped process keeps its consumer for a while, and
/// longer where RabbitMQ asks for no heartbeats.
pub(super) fn is_at_work(config: &Config, inspection: &Inspection, findings: &mut Findings) {
    let (Some(at), Some(now)) = (inspection.at_work_at, inspection.clock) else {
        return;
    };
    let silence = now.duration_since(at);
    let period = SignedDuration::try_from(config.timeout_check_period).unwrap_or_default();
    let patience = LATE.max(period * MISSED_ROUNDS);
    if silence <= patience {
        return;
    }
    findings.add(
        PART,
        Severity::Error,
        format!(
            "none is at work, though somebody takes submissions: none has looked for what is due for {}",
            spoken(silence)
        ),
        "Its process is stopped or hangs, or reaches no Postgres: see its state (`ps`) and its log, and restart \
         it. Nothing is lost by that. Of a Python service that runs instead this says nothing.",
    );
    findings.is(Kind::NotReady);
}
