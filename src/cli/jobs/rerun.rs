//! `jobs rerun`: another run of a job, as its client submitted it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use clap_complete::ArgValueCandidates;
use omotes_orchestrator::actions::again;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::overview::JobName;
use omotes_orchestrator::domain::parameters::typed;
use uuid::Uuid;

use super::origin::origin;
use super::the_one;
use crate::cli::submit::{self, output::Output, parse_param};
use crate::cli::{complete, connect, say, told_of};

#[derive(Args)]
pub(crate) struct Rerun {
    /// The job's id, or its beginning.
    #[arg(add = ArgValueCandidates::new(complete::jobs))]
    id: JobName,
    /// A parameter in place of the job's own: JSON where it parses as such, a text otherwise.
    #[arg(long = "param", value_name = "KEY=VALUE", value_parser = parse_param)]
    params: Vec<(String, String)>,
    /// Do not hold these parameters against the definitions that are here, which may be others than the
    /// service has.
    #[arg(long)]
    unchecked: bool,
    /// Follow it to its end, as `submit` does, and write its output ESDL to this file.
    #[arg(long)]
    output: Option<PathBuf>,
}

/// # Errors
/// Postgres or RabbitMQ is not there, or its input is not kept.
pub(super) fn run(config: &Config, rerun: Rerun) -> anyhow::Result<ExitCode> {
    let mut connection = connect(config)?;
    let id = the_one(&mut connection, &rerun.id)?;
    let new = Uuid::new_v4();
    let again = again::submission(config, &mut connection, (id, new), |submission| {
        Ok(match rerun.unchecked {
            true => typed::plain(&rerun.params),
            false => submit::changes(config, &submission.workflow_type, &rerun.params)?,
        })
    })?;
    drop(connection);
    if let Some(path) = &rerun.output {
        let tasks = submit::tasks(config, &again.submission.workflow_type);
        let (submission, message) = (&again.submission, again.message(&origin()));
        return submit::follow_to_its_end(config, submission, message, &tasks, Output::to(path)?);
    }
    told_of("RabbitMQ", || again::submit(config, new, &again, &origin()))?;
    say(format_args!("job {id} runs again as job {new}"))?;
    Ok(ExitCode::SUCCESS)
}
