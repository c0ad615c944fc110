//! What a batch publishes, and what becomes of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::Ordering;
use std::time::Instant;

use jiff::Timestamp;
use log::{info, warn};
use uuid::Uuid;

use super::closed::Destination;
use super::failure::{Refuser, Trouble};
use super::{Handler, Publishers};
use crate::broker::{Delivered, PublishError, Publisher};
use crate::domain::job::{Publication, TaskInput};
use crate::wire::{self, Outgoing, celery};

/// What a batch publishes, by connection.
#[derive(Default)]
pub(super) struct Outbox {
    pub(super) sdk: Vec<Outgoing>,
    celery: Vec<Outgoing>,
    /// The queues of the tasks among them.
    tasks_for: BTreeSet<String>,
}

/// The clients' queues that took no result because they are unavailable for now, and why they are.
pub(super) type Unavailable = BTreeMap<String, String>;

/// The messages of a batch that did not arrive.
#[derive(Default)]
struct Undelivered<'m> {
    unroutable: Vec<&'m Outgoing>,
    rejected: Vec<&'m Outgoing>,
}

fn undelivered<'m>(
    messages: impl IntoIterator<Item = &'m Outgoing>,
    outcome: &[Delivered],
) -> Undelivered<'m> {
    let mut left = Undelivered::default();
    for (message, delivered) in messages.into_iter().zip(outcome) {
        match delivered {
            Delivered::Yes => {}
            Delivered::Unroutable => left.unroutable.push(message),
            Delivered::Rejected => left.rejected.push(message),
        }
    }
    left
}

impl Handler<'_> {
    /// Turns these publications into messages, in their order. `inputs` are the input ESDLs of
    /// tasks that are in the database.
    pub(super) fn write_out(
        &self,
        publications: Vec<Publication<'_>>,
        mut inputs: HashMap<Uuid, String>,
        outbox: &mut Outbox,
    ) -> Result<(), Trouble> {
        publications
            .into_iter()
            .try_for_each(|publication| self.write_one(publication, &mut inputs, outbox))
    }

    fn write_one(
        &self,
        publication: Publication<'_>,
        inputs: &mut HashMap<Uuid, String>,
        outbox: &mut Outbox,
    ) -> Result<(), Trouble> {
        match publication {
            Publication::Task {
                job_id,
                task_id,
                assignment,
            } => {
                let kept;
                let esdl = match &assignment.input {
                    TaskInput::Given(esdl) => esdl,
                    TaskInput::Held(esdl) => &**esdl,
                    TaskInput::Kept => {
                        kept = inputs.remove(&job_id).ok_or_else(|| Trouble::Refused {
                            reason: format!("the input of job {job_id} is not in job_input"),
                            by: Refuser::Database,
                        })?;
                        &kept
                    }
                };
                let sender = &self.common.service.celery_sender;
                outbox
                    .tasks_for
                    .insert(assignment.task.clone().into_owned());
                let task = celery::task(sender, job_id, task_id, &assignment, esdl);
                outbox.celery.push(task);
            }
            Publication::Revoke { task_id } => {
                let clock = self
                    .common
                    .service
                    .revoke_clock
                    .fetch_add(1, Ordering::Relaxed);
                // Workers compare it with their own clocks, which have nothing to do with
                // Postgres's.
                let revoke = celery::revoke(&task_id, clock, Timestamp::now());
                outbox.celery.push(revoke);
            }
            Publication::Status { job_id, status } => {
                outbox.sdk.push(wire::status_update(job_id, status));
            }
            Publication::Progress {
                job_id,
                fraction,
                message,
            } => outbox
                .sdk
                .push(wire::progress_update(job_id, fraction, &message)),
            Publication::Result {
                job_id,
                result_type,
                output_esdl,
                logs,
                esdl_messages,
            } => outbox.sdk.push(wire::job_result(
                job_id,
                result_type,
                output_esdl,
                &logs,
                &esdl_messages,
            )),
        }
        Ok(())
    }

    pub(super) fn publish(&mut self, outbox: &Outbox) -> Result<Unavailable, Trouble> {
        let published = self.publish_all(outbox);
        if let Err(Trouble::Refused { .. } | Trouble::Closed) = published {
            let Publishers { sdk, celery, .. } = &mut self.publishers;
            [sdk, celery].into_iter().for_each(Publisher::abandon);
        }
        published
    }

    fn count_published<'d>(&self, outcomes: impl Iterator<Item = &'d Delivered>) {
        let [mut confirmed, mut unroutable, mut rejected] = [0; 3];
        for outcome in outcomes {
            match outcome {
                Delivered::Yes => confirmed += 1,
                Delivered::Unroutable => unroutable += 1,
                Delivered::Rejected => rejected += 1,
            }
        }
        let metrics = &self.common.service.metrics;
        metrics.published("confirmed", confirmed);
        metrics.published("unroutable", unroutable);
        metrics.published("rejected", rejected);
    }

    /// Publishes everything and waits for the confirms of all connections together.
    fn publish_all(&mut self, outbox: &Outbox) -> Result<Unavailable, Trouble> {
        for queue in &outbox.tasks_for {
            self.declare(queue)?;
        }
        let Publishers { sdk, celery, .. } = &mut self.publishers;
        celery.send(&outbox.celery)?;
        sdk.send(&outbox.sdk)?;
        // Both before either is examined, lest a confirm be taken for the next batch's.
        let (to_celery, to_sdk) = (celery.confirm(), sdk.confirm());
        let (to_celery, to_sdk) = (to_celery?, to_sdk?);
        self.count_published(to_celery.iter().chain(&to_sdk));
        let to_celery = undelivered(&outbox.celery, &to_celery);
        let to_sdk = undelivered(&outbox.sdk, &to_sdk);
        if let Some(task) = to_celery
            .rejected
            .iter()
            .find(|task| task.exchange.is_empty())
        {
            return Err(Trouble::Refused {
                reason: format!("the task queue {:?} takes nothing more", task.routing_key),
                by: Refuser::Broker,
            });
        }
        for revoke in to_celery.rejected {
            warn!("{}: a worker's queue takes no revoke", revoke.exchange);
        }
        if !to_celery.unroutable.is_empty() {
            self.publish_tasks_again(&to_celery.unroutable)?;
        }
        let mut results = to_sdk.unroutable;
        for message in to_sdk.rejected {
            warn!("a queue for {} takes nothing more", message.routing_key);
            if message.mandatory {
                results.push(message);
            }
        }
        match results.is_empty() {
            true => Ok(Unavailable::new()),
            false => self.publish_by_queue_name(&results),
        }
    }

    fn declare(&mut self, queue: &str) -> Result<(), Trouble> {
        if !self.declared.contains(queue) {
            match self.publishers.celery.declare_task_queue(queue) {
                Ok(()) => {}
                Err(PublishError::Unavailable(why)) => return Err(self.close(queue, &why)),
                Err(error @ (PublishError::Refused(_) | PublishError::Lost(_))) => {
                    return Err(error.into());
                }
            }
            self.declared.insert(queue.to_owned());
        }
        Ok(())
    }

    /// A task queue takes nothing for now.
    fn close(&mut self, queue: &str, why: &str) -> Trouble {
        self.declared.remove(queue);
        let (number, now) = (self.number, Instant::now());
        let queue = Destination::TaskQueue(queue.to_owned());
        self.common.closed.close(number, &queue, why, now);
        Trouble::Closed
    }

    /// A task is returned when somebody has deleted its queue since it was declared.
    fn publish_tasks_again(&mut self, tasks: &[&Outgoing]) -> Result<(), Trouble> {
        let queues: BTreeSet<_> = tasks.iter().map(|task| &task.routing_key).collect();
        for queue in queues {
            warn!("the task queue {queue:?} was deleted, or is not there; it is declared again");
            self.declared.remove(queue);
            self.declare(queue)?;
        }
        let outcome = self.publishers.celery.publish_to_queues(tasks)?;
        match undelivered(tasks.iter().copied(), &outcome)
            .unroutable
            .first()
        {
            None => Ok(()),
            Some(task) => {
                let why = "it was deleted again right after it was declared";
                Err(self.close(&task.routing_key, why))
            }
        }
    }

    /// A broker restart removes the bindings of clients that are offline while their queues stay:
    /// these can still be reached through the default exchange. A queue whose node is down is not
    /// reached, like one that does not exist, but will be there again.
    fn publish_by_queue_name(&mut self, results: &[&Outgoing]) -> Result<Unavailable, Trouble> {
        let outcome = self.publishers.sdk.publish_to_queues(results)?;
        let left = undelivered(results.iter().copied(), &outcome);
        let mut unavailable = Unavailable::new();
        for result in left.unroutable {
            let queue = &result.routing_key;
            match self.publishers.sdk.why_unavailable(queue)? {
                None => info!("nobody is waiting any more in {queue}"),
                Some(why) => drop(unavailable.insert(queue.clone(), why)),
            }
        }
        for result in left.rejected {
            warn!("{} takes no result", result.routing_key);
        }
        Ok(unavailable)
    }
}
