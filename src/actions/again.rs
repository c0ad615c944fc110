//! Another run of a job, as its client submitted it.

use anyhow::{Context, anyhow};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::Failure;
use crate::config::Config;
use crate::domain::job::Origin;
use crate::store::Connection;
use crate::wire::{self, JobSubmission, Outgoing};

/// What is said of a job whose input is not there.
pub fn not_kept(config: &Config, id: Uuid) -> String {
    let why = match config.keep_inputs.is_zero() {
        true => ": KEEP_INPUTS_SEC is 0",
        false => " any more",
    };
    format!("what was submitted as job {id} is not kept{why}")
}

/// Another run of a job.
#[derive(Debug)]
pub struct Again {
    pub submission: JobSubmission,
    of: Uuid,
    /// Whose that was, where its message has said so.
    sender: Option<String>,
}

impl Again {
    /// The message that submits it, for somebody.
    pub fn message(&self, by: &Origin) -> Outgoing {
        let message = wire::for_somebody(wire::job_submission(&self.submission), by);
        wire::for_another_run(message, self.of, self.sender.as_deref())
    }
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
    parameters: impl FnOnce(&JobSubmission) -> Result<Map<String, Value>, Failure>,
) -> Result<Again, Failure> {
    let kept = connection
        .kept_submission(id)
        .context("nothing was submitted")?;
    let Some(kept) = kept else {
        return Err(Failure::Refused(not_kept(config, id)));
    };
    let submission = wire::submission_again(&kept.message, again);
    let mut submission =
        submission.map_err(|error| anyhow!("what is kept of job {id}: {error}"))?;
    let parameters = parameters(&submission)?;
    wire::change_parameters(&mut submission, &parameters);
    Ok(Again {
        submission,
        of: id,
        sender: kept.sender,
    })
}

/// Submits it under this id, for somebody; no client waits for its result.
///
/// # Errors
/// RabbitMQ is not there, or no orchestrator has been on this vhost.
pub fn submit(config: &Config, job_id: Uuid, again: &Again, by: &Origin) -> Result<(), Failure> {
    super::submission::send(config, job_id, again.message(by))
}
