//! `jobs cancel`: jobs by their ids, or all that match.

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use jiff::{SignedDuration, Timestamp};
use omotes_orchestrator::actions::{counted, jobs};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::overview::{Filter, JobState, JobView, spoken};
use omotes_orchestrator::store::Connection;
use omotes_orchestrator::telemetry::report::one_line;
use uuid::Uuid;

use super::origin::origin;
use super::state;
use crate::cli::{Agreed, NOTHING_DONE, connect, print, say_aside, told_of, turns};

/// Jobs that are listed one by one before they are cancelled.
const LISTED: usize = 20;

/// Which jobs that have not ended are cancelled.
#[derive(Args)]
pub(crate) struct Matching {
    /// Whose references begin with this.
    #[arg(long, conflicts_with = "ids")]
    reference: Option<String>,
    #[arg(long, conflicts_with = "ids")]
    workflow: Option<String>,
    /// In this state: registered, submitted or running.
    #[arg(long, value_parser = state, conflicts_with = "ids")]
    state: Option<JobState>,
    /// That were registered longer ago than this, such as 90min, 2h or 3d.
    #[arg(long, value_parser = time, conflicts_with = "ids")]
    older_than: Option<SignedDuration>,
    #[command(flatten)]
    agreed: Agreed,
}

fn time(text: &str) -> Result<SignedDuration, String> {
    let span: jiff::Span = text
        .parse()
        .map_err(|_| "expected 90min, 2h, 3d or the like")?;
    let days = jiff::SpanRelativeTo::days_are_24_hours();
    span.to_duration(days)
        .map_err(|_| "expected at most weeks and days".to_owned())
}

/// # Errors
/// Postgres or RabbitMQ is not there, or no orchestrator has been on this vhost.
pub(super) fn run(config: &Config, ids: &[Uuid], matching: &Matching) -> anyhow::Result<ExitCode> {
    let mut connection = connect(config)?;
    match ids {
        [] => all_that_match(config, &mut connection, matching),
        ids => turns::tell(&told_of("RabbitMQ", || {
            jobs::cancel(config, connection, ids, &origin())
        })?),
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
    let count = counted(found.len(), "job");
    if !matching.agreed.yes {
        print(&text)?;
        say_aside(format_args!("{count} would be cancelled; {NOTHING_DONE}"));
        return Ok(ExitCode::FAILURE);
    }
    let ids: Vec<_> = found.iter().map(|job| job.id).collect();
    jobs::ask_to_end(config, &ids, &origin())?;
    print(&format!("{text}{count} asked to end\n"))?;
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
        state: matching.state,
        workflow: matching.workflow.clone(),
        text: matching.reference.clone(),
        ..Filter::default()
    };
    Ok(jobs::unfinished(connection, &filter, |job| {
        let is_old = job.registered_at.is_none_or(|at| at <= before);
        is_old && job.reference.starts_with(reference)
    })?)
}
