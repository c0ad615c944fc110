//! `jobs cancel`: jobs by their ids, or all that match.

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use clap_complete::ArgValueCandidates;
use jiff::{SignedDuration, Timestamp};
use omotes_orchestrator::actions::counted;
use omotes_orchestrator::actions::jobs::{self, Asked};
use omotes_orchestrator::actions::names::resolve;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::overview::{Filter, JobName, JobView, spoken};
use omotes_orchestrator::domain::parameters::typed::length;
use omotes_orchestrator::store::Connection;
use omotes_orchestrator::telemetry::report::one_line;

use super::list::{State, state};
use super::origin::origin;
use crate::cli::{Agreed, NOTHING_DONE, complete, connect, print, say_aside, told_of, turns, warn};

/// Jobs that are listed one by one before they are cancelled.
const LISTED: usize = 20;

/// Which jobs that have not ended are cancelled.
#[derive(Args)]
pub(crate) struct Matching {
    /// Whose references begin with this.
    #[arg(long, conflicts_with = "ids")]
    reference: Option<String>,
    /// Of this workflow.
    #[arg(long, value_name = "NAME", conflicts_with = "ids", add = ArgValueCandidates::new(complete::workflows))]
    workflow: Option<String>,
    /// In this state, as the list says it: registered, waiting, running, held or on-hold.
    #[arg(long, value_parser = state, conflicts_with = "ids", add = ArgValueCandidates::new(complete::states))]
    state: Option<State>,
    /// That were registered longer ago than this, such as 90min, 2h or 3d.
    #[arg(long, value_parser = time, conflicts_with = "ids")]
    older_than: Option<SignedDuration>,
    #[command(flatten)]
    agreed: Agreed,
}

fn time(text: &str) -> Result<SignedDuration, String> {
    length(text).ok_or_else(|| "expected 90min, 2h, 3d or the like".to_owned())
}

/// # Errors
/// Postgres or RabbitMQ is not there, or no orchestrator has been on this vhost.
pub(super) fn run(
    config: &Config,
    ids: &[JobName],
    matching: &Matching,
) -> anyhow::Result<ExitCode> {
    let mut connection = connect(config)?;
    match ids {
        [] => all_that_match(config, &mut connection, matching),
        names => {
            let ids = resolve(&mut connection, names)?;
            let became = told_of("RabbitMQ", || {
                jobs::cancel(config, connection, &ids, &origin())
            })?;
            turns::tell(&became)
        }
    }
}

fn all_that_match(
    config: &Config,
    connection: &mut Connection,
    matching: &Matching,
) -> anyhow::Result<ExitCode> {
    let found = found(connection, matching)?;
    let now = Timestamp::now();
    let mut text = String::new();
    for job in found.iter().take(LISTED) {
        let age = job.registered_at.map(|at| spoken(now.duration_since(at)));
        let _ = writeln!(
            text,
            "job {} {} {}, {}, registered {} ago",
            job.id,
            one_line(&job.reference),
            one_line(job.workflow.as_deref().unwrap_or("-")),
            one_line(&job.state_text()),
            age.unwrap_or_default()
        );
    }
    if let Some(more) = found.len().checked_sub(LISTED).filter(|more| *more > 0) {
        let _ = writeln!(text, "and {more} more");
    }
    if found.is_empty() {
        say_aside(format_args!("no job matches that has not ended"));
        return Ok(ExitCode::SUCCESS);
    }
    let count = counted(found.len(), "job");
    if !matching.agreed.yes {
        print(&text)?;
        say_aside(format_args!("{count} would be cancelled; {NOTHING_DONE}"));
        return Ok(ExitCode::FAILURE);
    }
    let ids: Vec<_> = found.iter().map(|job| job.id).collect();
    let asked = jobs::ask_to_end(config, &ids, &origin())?;
    print(&format!("{text}{count} asked to end\n"))?;
    if let Asked::Nobody = asked {
        warn("no orchestrator runs on this vhost: they go on until one does");
    }
    Ok(ExitCode::SUCCESS)
}

/// The jobs that match and have not ended.
fn found(connection: &mut Connection, matching: &Matching) -> anyhow::Result<Vec<JobView>> {
    let before = match matching.older_than {
        Some(age) => Timestamp::now()
            .checked_sub(age)
            .context("no job is as old as that")?,
        None => Timestamp::MAX,
    };
    let reference = matching.reference.as_deref().unwrap_or_default();
    let filter = Filter {
        state: matching.state.and_then(State::stored),
        workflow: matching.workflow.clone(),
        text: matching.reference.clone(),
        ..Filter::default()
    };
    Ok(jobs::unfinished(connection, &filter, |job| {
        let is_old = job.registered_at.is_none_or(|at| at <= before);
        let is_so = matching.state.is_none_or(|state| state.is_of(job));
        is_old && is_so && job.reference.starts_with(reference)
    })?)
}
