//! The connections of a session.

use std::sync::Arc;

use crate::broker::Link;
use crate::broker::intake::Intake;
use crate::config::Config;
use crate::telemetry::report::with_causes;
use crate::wire::Inbox;

/// The connections of a session. A blocked publisher must not block the consumers, hence the two
/// directions of each vhost.
pub(super) struct Links {
    pub(super) sdk_in: Link,
    pub(super) sdk_out: Link,
    pub(super) task_in: Link,
    pub(super) celery_out: Link,
    /// For dead letters of worker events, if their vhost is not that of the Celery tasks.
    task_out: Option<Link>,
}

impl Links {
    pub(super) fn open(config: &Config, intake: &Arc<Intake>) -> anyhow::Result<Links> {
        let Config {
            sdk_rabbitmq,
            task_rabbitmq,
            celery_rabbitmq,
            ..
        } = config;
        Ok(Links {
            sdk_in: Link::open_gated(sdk_rabbitmq, "SDK, consuming", intake)?,
            sdk_out: Link::open(sdk_rabbitmq, "SDK, publishing")?,
            task_in: Link::open_gated(task_rabbitmq, "TASK, consuming", intake)?,
            celery_out: Link::open(celery_rabbitmq, "CELERY, publishing")?,
            task_out: (task_rabbitmq != celery_rabbitmq)
                .then(|| Link::open(task_rabbitmq, "TASK, publishing"))
                .transpose()?,
        })
    }

    pub(super) fn task_out(&self) -> &Link {
        self.task_out.as_ref().unwrap_or(&self.celery_out)
    }

    /// The connection on which a queue is consumed.
    pub(super) fn consuming(&self, inbox: Inbox) -> &Link {
        match inbox {
            Inbox::Submissions
            | Inbox::Cancels
            | Inbox::WorkflowRequests
            | Inbox::NamedWorkflowRequests => &self.sdk_in,
            Inbox::Progress | Inbox::Results => &self.task_in,
        }
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Link> {
        [&self.sdk_in, &self.sdk_out, &self.task_in, &self.celery_out]
            .into_iter()
            .chain(&self.task_out)
    }

    pub(super) fn publishing(&self) -> impl Iterator<Item = &Link> {
        [&self.sdk_out, &self.celery_out]
            .into_iter()
            .chain(&self.task_out)
    }

    pub(super) fn kill(&self) {
        self.all().for_each(Link::kill);
    }

    /// Closes all connections; returns what had ended those that had ended before.
    pub(super) fn close(self) -> Vec<String> {
        let Links {
            sdk_in,
            sdk_out,
            task_in,
            celery_out,
            task_out,
        } = self;
        [sdk_in, task_in, sdk_out, celery_out]
            .into_iter()
            .chain(task_out)
            .filter_map(|link| link.close().err())
            .map(|error| with_causes(&error))
            .collect()
    }
}
