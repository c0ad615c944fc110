//! `jobs cancel`: jobs by their ids, or all that match.

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use jiff::{SignedDuration, Timestamp};
use omotes_orchestrator::broker::{Delivered, Link, Publisher};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::overview::{Filter, JobState, JobView, MAX_LIMIT, spoken};
use omotes_orchestrator::store::Connection;
use omotes_orchestrator::telemetry::report::one_line;
use omotes_orchestrator::threads::Calls;
use omotes_orchestrator::wire::{self, Outgoing};
use uuid::Uuid;

use super::state;
use crate::cli::{Agreed, NOTHING_DONE, connect, print, say_aside, told_of};

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
        ids => these(config, &mut connection, ids),
    }
}

fn these(config: &Config, connection: &mut Connection, ids: &[Uuid]) -> anyhow::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    let mut text = String::new();
    let mut live = Vec::new();
    for id in ids {
        let what = match connection.story(*id)?.map(|story| story.job.state) {
            Some(JobState::Live(_)) => {
                live.push(*id);
                "is asked to end"
            }
            Some(JobState::Ended(_)) => {
                code = ExitCode::FAILURE;
                "has ended already"
            }
            None => {
                code = ExitCode::FAILURE;
                "is unknown"
            }
        };
        let _ = writeln!(text, "job {id} {what}");
    }
    send(config, &live)?;
    print(&text)?;
    Ok(code)
}

fn all_that_match(
    config: &Config,
    connection: &mut Connection,
    matching: &Matching,
) -> anyhow::Result<ExitCode> {
    let jobs = found(connection, matching)?;
    let now = Timestamp::now();
    let mut text = String::new();
    for job in jobs.iter().take(LISTED) {
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
    if let Some(more) = jobs.len().checked_sub(LISTED).filter(|more| *more > 0) {
        let _ = writeln!(text, "and {more} more");
    }
    let count = match jobs.len() {
        1 => "1 job".to_owned(),
        count => format!("{count} jobs"),
    };
    if !matching.agreed.yes {
        print(&text)?;
        say_aside(format_args!("{count} would be cancelled; {NOTHING_DONE}"));
        return Ok(ExitCode::FAILURE);
    }
    let ids: Vec<_> = jobs.iter().map(|job| job.id).collect();
    send(config, &ids)?;
    print(&format!("{text}{count} asked to end\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// The jobs that match and have not ended.
fn found(connection: &mut Connection, matching: &Matching) -> anyhow::Result<Vec<JobView>> {
    if let Some(JobState::Ended(_)) = matching.state {
        bail!("jobs in this state have ended already");
    }
    let before = match matching.older_than {
        Some(age) => Timestamp::now()
            .checked_sub(age)
            .context("no job is as old as that")?,
        None => Timestamp::MAX,
    };
    let reference = matching.reference.as_deref().unwrap_or_default();
    let mut found = Vec::new();
    let mut filter = Filter {
        state: matching.state,
        workflow: matching.workflow.clone(),
        text: matching.reference.clone(),
        limit: MAX_LIMIT,
        ..Filter::default()
    };
    loop {
        let page = connection.jobs(&filter)?;
        let is_last = page.jobs.len() < usize::from(MAX_LIMIT);
        filter.offset += u32::from(MAX_LIMIT);
        let is_meant = |job: &JobView| {
            let is_live = matches!(job.state, JobState::Live(_));
            let is_old = job.registered_at.is_none_or(|at| at <= before);
            is_live && is_old && job.reference.starts_with(reference)
        };
        found.extend(page.jobs.into_iter().filter(is_meant));
        if is_last {
            return Ok(found);
        }
    }
}

/// Sends the cancels that clients would send.
fn send(config: &Config, ids: &[Uuid]) -> anyhow::Result<()> {
    if ids.is_empty() {
        return Ok(());
    }
    let messages: Vec<_> = ids
        .iter()
        .map(|id| Outgoing {
            // Without the orchestrator's queue the message would vanish.
            mandatory: true,
            ..wire::job_delete(*id)
        })
        .collect();
    let link = told_of("RabbitMQ", || {
        Link::open(&config.sdk_rabbitmq, "cancelling")
    })?;
    let calls = Calls::default();
    let delivered = Publisher::new(&link, &calls).publish(&messages)?;
    link.close()?;
    if !delivered.iter().all(|one| *one == Delivered::Yes) {
        bail!("RabbitMQ has not taken the cancels: is an orchestrator running on this vhost?");
    }
    Ok(())
}
