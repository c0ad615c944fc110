//! What a batch publishes, and what becomes of it.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::Ordering;
use std::time::Instant;

use jiff::Timestamp;
use log::{info, warn};
use uuid::Uuid;

use super::closed::{Destination, Doubt};
use super::failure::{Refuser, Trouble};
use super::{Handler, Publishers};
use crate::broker::{Delivered, Found, PublishError, Publisher};
use crate::domain::job::{Publication, TaskInput};
use crate::domain::overview::Delivery;
use crate::store::KeptResult;
use crate::wire::{self, Outgoing, celery};

/// What a batch publishes, by connection.
#[derive(Default)]
pub(super) struct Outbox {
    pub(super) sdk: Vec<Outgoing>,
    celery: Vec<Outgoing>,
    /// The queues of the tasks among them.
    tasks_for: BTreeSet<String>,
}

impl Outbox {
    /// The output ESDLs of the results of these jobs.
    pub(super) fn results_for(&self, jobs: &[(Uuid, Delivery)]) -> Vec<KeptResult<'static>> {
        let queues = jobs.iter().map(|(job_id, _)| wire::result_queue(*job_id));
        let queues: BTreeSet<_> = queues.collect();
        let messages = self.sdk.iter();
        let theirs = messages.filter(|message| queues.contains(&message.routing_key));
        let results = theirs.filter_map(|message| wire::output_of_result(&message.body));
        results
            .map(|(job_id, esdl)| KeptResult {
                job_id,
                esdl: Cow::Owned(esdl),
            })
            .collect()
    }
}

/// How many queues of clients RabbitMQ is asked about at once.
const ASKED_AT_ONCE: usize = 16;

/// The queues of results that could not be told, because they are unavailable for now, and why one
/// of them is.
#[derive(Default)]
pub(super) struct Unavailable<'s> {
    pub(super) queues: BTreeSet<String>,
    pub(super) why: String,
    /// The queues of results that nobody is waiting for any more, or that are full.
    pub(super) gone: Vec<(String, Delivery)>,
    /// No replica takes them for lost meanwhile.
    _doubt: Option<Doubt<'s>>,
}

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

impl<'s> Handler<'s> {
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

    pub(super) fn publish(&mut self, outbox: &Outbox) -> Result<Unavailable<'s>, Trouble> {
        let published = self.publish_all(outbox);
        if let Err(Trouble::Refused { .. } | Trouble::Closed) = published {
            let Publishers { sdk, celery, .. } = &mut self.publishers;
            [sdk, celery].into_iter().for_each(Publisher::abandon);
        }
        published
    }

    /// Sends what [`Plan::only_accepts`](crate::domain::batch::Plan::only_accepts) is true of;
    /// [`Handler::confirm_acceptances`] must follow.
    pub(super) fn send_acceptances(&mut self, outbox: &Outbox) -> Result<(), Trouble> {
        Ok(self.publishers.sdk.send(&outbox.sdk)?)
    }

    /// Waits until it has arrived.
    pub(super) fn confirm_acceptances(&mut self, outbox: &Outbox) -> Result<(), Trouble> {
        let outcome = self.publishers.sdk.confirm()?;
        self.count_published(outcome.iter());
        for message in undelivered(&outbox.sdk, &outcome).rejected {
            warn!("a queue for {} takes nothing more", message.routing_key);
        }
        Ok(())
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
    fn publish_all(&mut self, outbox: &Outbox) -> Result<Unavailable<'s>, Trouble> {
        self.declare(outbox.tasks_for.iter())?;
        let Publishers { sdk, celery, .. } = &mut self.publishers;
        celery.send(&outbox.celery)?;
        sdk.send(&outbox.sdk)?;
        // Both before either is examined, lest a confirm be taken for the next batch's.
        let (to_celery, to_sdk) = (celery.confirm(), sdk.confirm());
        let (to_celery, to_sdk) = (to_celery?, to_sdk?);
        self.count_published(to_celery.iter().chain(&to_sdk));
        let to_celery = undelivered(&outbox.celery, &to_celery);
        let to_sdk = undelivered(&outbox.sdk, &to_sdk);
        let is_task = |message: &&Outgoing| message.exchange.is_empty();
        let (tasks, revokes): (Vec<_>, Vec<_>) = to_celery.rejected.into_iter().partition(is_task);
        if !tasks.is_empty() {
            return Err(self.rejected(&tasks)?);
        }
        for revoke in revokes {
            warn!("{}: a worker's queue takes no revoke", revoke.exchange);
        }
        if !to_celery.unroutable.is_empty() {
            self.publish_tasks_again(&to_celery.unroutable)?;
        }
        for queue in &outbox.tasks_for {
            self.rejecting.remove(queue);
        }
        let mut results = to_sdk.unroutable;
        for message in to_sdk.rejected {
            warn!("a queue for {} takes nothing more", message.routing_key);
            if message.mandatory {
                results.push(message);
            }
        }
        match results.is_empty() {
            true => Ok(Unavailable::default()),
            false => self.publish_by_queue_name(&results),
        }
    }

    /// Declares task queues that are not known to exist.
    fn declare<'q>(&mut self, queues: impl Iterator<Item = &'q String>) -> Result<(), Trouble> {
        let unknown = queues.filter(|queue| !self.declared.contains(*queue));
        let unknown: Vec<_> = unknown.map(String::as_str).collect();
        let outcomes = self.publishers.celery.declare_task_queues(&unknown)?;
        let mut outcome = Ok(());
        for (queue, declared) in unknown.into_iter().zip(outcomes) {
            match declared {
                Ok(()) => drop(self.declared.insert(queue.to_owned())),
                Err(PublishError::Unavailable(why)) => outcome = Err(self.close(queue, &why)),
                Err(error @ PublishError::Lost(_)) => return Err(error.into()),
                // Found out again when what is for closed queues is left out.
                Err(PublishError::Refused(_)) if outcome.is_err() => {}
                Err(error @ PublishError::Refused(_)) => outcome = Err(error.into()),
            }
        }
        outcome
    }

    /// What it means that these tasks were rejected. If a queue is not full, but its node was down or
    /// it was made anew meanwhile, a copy of its task may turn up there. So the batch is repeated,
    /// which gives the task another id.
    fn rejected(&mut self, tasks: &[&Outgoing]) -> Result<Trouble, PublishError> {
        let queues: BTreeSet<_> = tasks.iter().map(|task| task.routing_key.as_str()).collect();
        let queues = Vec::from_iter(queues);
        let found = self.publishers.celery.look_for(&queues)?;
        let mut trouble = None;
        let mut full = "";
        for (queue, found) in queues.into_iter().zip(found) {
            if let Some(why) = found.why_unavailable() {
                trouble = Some(self.close(queue, &why));
            } else if self.rejecting.insert(queue.to_owned()) {
                self.declared.remove(queue);
                trouble = trouble.or(Some(Trouble::Closed));
            } else {
                full = queue;
            }
        }
        Ok(trouble.unwrap_or_else(|| Trouble::Refused {
            reason: format!("the task queue {full:?} takes nothing more"),
            by: Refuser::Broker,
        }))
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
        for queue in &queues {
            warn!("the task queue {queue:?} was deleted, or is not there; it is declared again");
            self.declared.remove(*queue);
        }
        self.declare(queues.into_iter())?;
        let outcome = self.publishers.celery.publish_to_queues(tasks)?;
        let left = undelivered(tasks.iter().copied(), &outcome);
        if !left.rejected.is_empty() {
            return Err(self.rejected(&left.rejected)?);
        }
        match left.unroutable.first() {
            None => Ok(()),
            Some(task) => {
                let why = "it was deleted again right after it was declared";
                Err(self.close(&task.routing_key, why))
            }
        }
    }

    /// A broker restart removes the bindings of clients that are offline while their queues stay:
    /// these can still be reached through the default exchange. A queue whose node is down is not
    /// reached, like one that does not exist or is full, but will be there again.
    fn publish_by_queue_name(&mut self, results: &[&Outgoing]) -> Result<Unavailable<'s>, Trouble> {
        let mut unavailable = Unavailable {
            _doubt: Some(self.common.closed.doubt()),
            ..Unavailable::default()
        };
        let full = self.publish_or_ask(results, &mut unavailable)?;
        // The node may have been back by the time of the answer.
        for result in self.publish_or_ask(&full, &mut unavailable)? {
            warn!("{} takes no result", result.routing_key);
            let full = (result.routing_key.clone(), Delivery::FullQueue);
            unavailable.gone.push(full);
        }
        Ok(unavailable)
    }

    /// Returns the results that were rejected by queues that are there; adds to `unavailable` the queues
    /// that will be there again.
    fn publish_or_ask<'m>(
        &mut self,
        results: &[&'m Outgoing],
        unavailable: &mut Unavailable<'_>,
    ) -> Result<Vec<&'m Outgoing>, Trouble> {
        let outcome = self.publishers.sdk.publish_to_queues(results)?;
        let left = undelivered(results.iter().copied(), &outcome);
        let unroutable = left.unroutable.into_iter().map(|result| (result, false));
        let rejected = left.rejected.into_iter().map(|result| (result, true));
        let now = Instant::now();
        let (silent, mut left): (Vec<_>, Vec<_>) = unroutable
            .chain(rejected)
            .partition(|(result, _)| self.asking.is_silent(&result.routing_key, now));
        for (result, _) in silent {
            unavailable.add(
                &result.routing_key,
                &Found::Silent.why_unavailable().unwrap_or_default(),
            );
        }
        // Each has its turn if not all can be asked about.
        fastrand::shuffle(&mut left);
        let mut full = Vec::new();
        for some in left.chunks(ASKED_AT_ONCE) {
            let queues: Vec<_> = some
                .iter()
                .map(|(result, _)| result.routing_key.as_str())
                .collect();
            if !self.asking.may_ask(Instant::now()) {
                unavailable.add_unasked(&queues);
                continue;
            }
            let found = self.publishers.sdk.look_for(&queues)?;
            for ((result, is_rejected), found) in some.iter().zip(&found) {
                let queue = &result.routing_key;
                match (found, is_rejected) {
                    (Found::There, false) => {
                        unavailable.add(queue, "it was not there a moment ago")
                    }
                    (Found::There | Found::NotOurs, true) => full.push(*result),
                    (Found::Missing, _) | (Found::NotOurs, false) => {
                        info!("nobody is waiting any more in {queue}");
                        unavailable.gone.push((queue.clone(), Delivery::NoQueue));
                    }
                    (Found::Unavailable(_) | Found::Silent, _) => {
                        if *found == Found::Silent {
                            self.asking.is_not_answered(queue, Instant::now());
                        }
                        unavailable.add(queue, &found.why_unavailable().unwrap_or_default());
                    }
                }
            }
        }
        Ok(full)
    }
}

impl Unavailable<'_> {
    fn add(&mut self, queue: &str, why: &str) {
        self.why = format!("{queue}: {why}");
        self.queues.insert(queue.to_owned());
    }

    fn add_unasked(&mut self, queues: &[&str]) {
        if self.why.is_empty() {
            let why = "it takes nothing, and RabbitMQ does not answer about others like it";
            self.why = format!("{}: {why}", queues[0]);
        }
        let queues = queues.iter().map(|&queue| queue.to_owned());
        self.queues.extend(queues);
    }
}
