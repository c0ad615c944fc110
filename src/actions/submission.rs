//! Submitting a job, as an SDK client would.

use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::Failure;
use crate::broker::{DEADLINE, Delivered, Link, Publisher};
use crate::config::Config;
use crate::domain::job::Origin;
use crate::threads::{Calls, within_deadline};
use crate::wire::job_submission::JobPriority;
use crate::wire::{self, JobSubmission, Outgoing};

/// A job to submit.
#[derive(Debug)]
pub struct Order {
    pub esdl: String,
    pub workflow: String,
    pub params: Map<String, Value>,
    pub reference: Option<String>,
    pub priority: JobPriority,
    /// How long the job may run.
    pub timeout: Option<Duration>,
}

impl Order {
    /// The message with which a client submits it.
    ///
    /// # Errors
    /// The timeout is none that it can have.
    pub fn submission(&self, job_id: Uuid) -> anyhow::Result<JobSubmission> {
        Ok(JobSubmission {
            uuid: job_id.to_string(),
            timeout_ms: self
                .timeout
                .map(|timeout| u32::try_from(timeout.as_millis()))
                .transpose()
                .context("the timeout is above 49 days")?,
            workflow_type: self.workflow.clone(),
            esdl: self.esdl.clone(),
            params_dict: Some(wire::protobuf_struct(&self.params)),
            job_reference: self.reference.clone(),
            job_priority: Some(self.priority.into()),
        })
    }
}

/// Submits a job under this id for somebody, for whose result nobody waits. An id that is known already is no other job.
///
/// # Errors
/// RabbitMQ is not there, or no orchestrator has been on this vhost.
pub fn submit(config: &Config, order: &Order, job_id: Uuid, by: &Origin) -> Result<(), Failure> {
    let refused = |error| Failure::Refused(format!("{error:#}"));
    let submission = order.submission(job_id).map_err(refused)?;
    let message = wire::for_somebody(wire::job_submission(&submission), by);
    drop(submission);
    send(config, job_id, message)
}

/// Sends the message with which this job is submitted.
///
/// # Errors
/// As [`submit`].
pub(super) fn send(config: &Config, job_id: Uuid, message: Outgoing) -> Result<(), Failure> {
    let message = Outgoing {
        // Without the orchestrator's queue it would vanish.
        mandatory: true,
        ..message
    };
    let link = Link::open(&config.sdk_rabbitmq, "submitting").context("nothing was submitted")?;
    let published = publish(&link, message);
    // What is confirmed stays so, whatever becomes of the connection.
    let _ = link.close_within(DEADLINE);
    published.with_context(|| format!("whether job {job_id} was submitted is not known"))?;
    Ok(())
}

fn publish(link: &Link, message: Outgoing) -> anyhow::Result<()> {
    let calls = Calls::default();
    let delivered = within_deadline(
        DEADLINE,
        || link.kill(),
        || Ok(Publisher::new(link, &calls).publish(&[message])?),
    )?;
    match delivered.first() {
        Some(Delivered::Yes) => Ok(()),
        Some(Delivered::Unroutable) => {
            bail!("there is no queue for it: is an orchestrator running on this vhost?")
        }
        Some(Delivered::Rejected) | None => bail!("RabbitMQ does not take it"),
    }
}
