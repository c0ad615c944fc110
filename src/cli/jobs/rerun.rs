//! `jobs rerun`: another run of a job, as its client submitted it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use omotes_orchestrator::actions::again;
use omotes_orchestrator::config::Config;
use serde_json::Value;
use uuid::Uuid;

use super::origin::origin;
use crate::cli::submit::{self, output::Output, parse_param};
use crate::cli::{connect, say, told_of};

#[derive(Args)]
pub(crate) struct Rerun {
    id: Uuid,
    /// A parameter in place of the job's own: JSON where it parses as such, a text otherwise.
    #[arg(long = "param", value_name = "KEY=VALUE", value_parser = parse_param)]
    params: Vec<(String, Value)>,
    /// Follow it to its end, as `submit` does, and write its output ESDL to this file.
    #[arg(long)]
    output: Option<PathBuf>,
}

/// # Errors
/// Postgres or RabbitMQ is not there, or its input is not kept.
pub(super) fn run(config: &Config, rerun: Rerun) -> anyhow::Result<ExitCode> {
    let parameters = rerun.params.into_iter().collect();
    let mut connection = connect(config)?;
    let (new, submission) = again::submission(config, &mut connection, rerun.id, &parameters)?;
    drop(connection);
    if let Some(path) = &rerun.output {
        return submit::follow_to_its_end(config, &submission, Output::to(path)?);
    }
    told_of("RabbitMQ", || again::submit(config, &submission, &origin()))?;
    say(format_args!("job {} runs again as job {new}", rerun.id))?;
    Ok(ExitCode::SUCCESS)
}
