//! `jobs result`: the output ESDL that no client has taken.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{anyhow, bail};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::job::Outcome;
use omotes_orchestrator::domain::overview::{JobName, JobState, Story};

use super::{tell_whereabouts, the_one};
use crate::cli::submit::output::Output;
use crate::cli::{connect, say_aside};

/// # Errors
/// Postgres is not there, no such result is kept, or it cannot be written.
pub(super) fn run(
    config: &Config,
    name: &JobName,
    output: Option<&Path>,
) -> anyhow::Result<ExitCode> {
    let output = match output {
        Some(path) => Output::to(path)?,
        None => Output::Printed,
    };
    let mut connection = connect(config)?;
    let id = the_one(&mut connection, name)?;
    let Some(esdl) = connection.kept_result(id)? else {
        let Some(mut story) = connection.story(id)? else {
            bail!("job {id} is unknown");
        };
        drop(connection);
        tell_whereabouts(config, &mut story);
        return Err(why_not(config, &story));
    };
    if let Some(said) = output.write(&esdl)? {
        say_aside(format_args!("{said}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// Why no output is kept of a job, in one sentence.
fn why_not(config: &Config, story: &Story) -> anyhow::Error {
    let id = story.job.id;
    if let Some(whereabouts) = &story.whereabouts {
        let (first, rest) = whereabouts.split_at(1);
        return anyhow!(
            "the output ESDL of job {id} is not here: {}{rest}",
            first.to_lowercase()
        );
    }
    match story.job.state {
        JobState::Live(_) => anyhow!("job {id} has not ended"),
        JobState::Ended(Outcome::Succeeded) if config.keep_results.is_zero() => {
            anyhow!("no output ESDL of job {id} is kept: KEEP_RESULTS_SEC is 0")
        }
        JobState::Ended(Outcome::Succeeded) => anyhow!("no output ESDL of job {id} is kept"),
        ended => anyhow!("job {id} has no output ESDL; its state is {}", ended.text()),
    }
}
