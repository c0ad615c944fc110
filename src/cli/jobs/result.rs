//! `jobs result`: the output ESDL that no client has taken.

use std::path::Path;
use std::process::ExitCode;

use anyhow::bail;
use omotes_orchestrator::config::Config;
use uuid::Uuid;

use crate::cli::submit::output::Output;
use crate::cli::{connect, say_aside};

/// # Errors
/// Postgres is not there, no such result is kept, or it cannot be written.
pub(super) fn run(config: &Config, id: Uuid, output: Option<&Path>) -> anyhow::Result<ExitCode> {
    let output = match output {
        Some(path) => Output::to(path)?,
        None => Output::Printed,
    };
    let Some(esdl) = connect(config)?.kept_result(id)? else {
        let why = match config.keep_results.is_zero() {
            true => ": KEEP_RESULTS_SEC is 0",
            false => "; those of jobs are whose clients had gone, for KEEP_RESULTS_SEC",
        };
        bail!("no output ESDL of job {id} is kept{why}");
    };
    if let Some(said) = output.write(&esdl)? {
        say_aside(format_args!("{said}"));
    }
    Ok(ExitCode::SUCCESS)
}
