//! Another run of a job, as its client submitted it.

use anyhow::{Context, anyhow};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::Failure;
use crate::config::Config;
use crate::domain::job::Origin;
use crate::store::Connection;
use crate::wire::{self, JobSubmission};

/// What is said of a job whose input is not there.
pub fn not_kept(config: &Config, id: Uuid) -> String {
    let why = match config.keep_inputs.is_zero() {
        true => ": KEEP_INPUTS_SEC is 0",
        false => " any more",
    };
    format!("what was submitted as job {id} is not kept{why}")
}

/// What was submitted as this job, for another one with this id, and with the `parameters` for its
/// workflow in place of those.
///
/// # Errors
/// Postgres is not there, it is not kept, or those of `parameters`.
pub fn submission(
    config: &Config,
    connection: &mut Connection,
    (id, again): (Uuid, Uuid),
    parameters: impl FnOnce(&str) -> Result<Map<String, Value>, Failure>,
) -> Result<JobSubmission, Failure> {
    let kept = connection
        .kept_submission(id)
        .context("nothing was submitted")?;
    let Some(message) = kept else {
        return Err(Failure::Refused(not_kept(config, id)));
    };
    let submission = wire::submission_again(&message, again);
    let mut submission =
        submission.map_err(|error| anyhow!("what is kept of job {id}: {error}"))?;
    let parameters = parameters(&submission.workflow_type)?;
    wire::change_parameters(&mut submission, &parameters);
    Ok(submission)
}

/// Submits it under this id, for somebody; no client waits for its result.
///
/// # Errors
/// RabbitMQ is not there, or no orchestrator has been on this vhost.
pub fn submit(
    config: &Config,
    job_id: Uuid,
    submission: &JobSubmission,
    origin: &Origin,
) -> Result<(), Failure> {
    let message = wire::for_somebody(wire::job_submission(submission), origin);
    super::submission::send(config, job_id, message)
}
