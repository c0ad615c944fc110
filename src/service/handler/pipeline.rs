//! One attempt at a batch: lock, load, decide, write, publish, commit, tell, settle.

use std::collections::BTreeSet;
use std::mem;
use std::time::Instant;

use jiff::Timestamp;
use log::debug;
use uuid::Uuid;

use super::closed::Destination;
use super::failure::Trouble;
use super::item::Item;
use super::outbox::{Outbox, Untold};
use super::{Common, Handler, MAX_BATCH_BYTES, letters};
use crate::domain::batch::{self, Asked, Plan, Stalled, Wait};
use crate::domain::job::{Context, Event};
use crate::domain::vhost::Vhost;
use crate::domain::workflow::Catalogue;
use crate::fault_point;
use crate::store::{Connection, Loaded};
use crate::telemetry::metrics::Stage;
use crate::telemetry::report;
use crate::wire::{self, Inbox};

impl Handler<'_> {
    pub(super) fn attempt(&mut self, batch: &mut [Item]) -> Result<(), Trouble> {
        let mut told = Outbox::default();
        for item in &mut *batch {
            item.waits_for = None;
            if item.list_workflows {
                self.common.service.metrics.workflows_told();
                debug!("telling clients the workflows");
                let catalogue = self.common.service.catalogue.get();
                let announcement = wire::available_workflows(catalogue.announcement());
                told.sdk.push(announcement);
            }
        }
        if batch.iter().all(|item| item.job.is_none()) {
            self.publish(&told)?;
        } else {
            self.attempt_jobs(batch, &mut told)?;
        }
        self.put_aside(batch)
    }

    fn attempt_jobs(&mut self, batch: &mut [Item], told: &mut Outbox) -> Result<(), Trouble> {
        // Dropped on any error, and closed if the error was the connection's.
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.store.connection()?,
        };
        let Committed {
            ending,
            waits,
            stalled,
        } = self.transact(batch, told, &mut connection)?;
        for Stalled { place, queue } in stalled {
            batch[place].waits_for = Some(Destination::TaskQueue(queue));
        }
        fault_point::reached("after commit");
        let mut stopwatch = self.common.service.metrics.stopwatch();
        let untold = self.publish(told)?;
        stopwatch.lap(Stage::Tell);
        fault_point::reached("after telling");
        let (ending, waiting): (Vec<_>, Vec<_>) = ending
            .into_iter()
            .partition(|job_id| !untold.queues.contains(&wire::result_queue(*job_id)));
        if !ending.is_empty() {
            connection.settle(&ending)?;
            stopwatch.lap(Stage::Settle);
            fault_point::reached("after settling");
        }
        self.connection = Some(connection);
        for wait in waits {
            let item = &mut batch[wait.place];
            item.wait = Some(wait.time);
            if let Some(logs) = wait.refusal {
                item.is_refused(logs);
            }
        }
        self.wait_for_clients(batch, &waiting, &untold);
        Ok(())
    }

    /// Keeps the messages that led to the outcomes of these jobs until their clients' queues are
    /// available again. A finding is made again.
    fn wait_for_clients(&self, batch: &mut [Item], jobs: &[Uuid], untold: &Untold<'_>) {
        let of_these = |item: &&mut Item| {
            let job = item.job.as_ref().map(|(job_id, _)| job_id);
            item.inbox().is_some() && job.is_some_and(|job_id| jobs.contains(job_id))
        };
        let mut some = false;
        for item in batch.iter_mut().filter(of_these) {
            item.waits_for = Some(Destination::ClientQueues);
            // What else there is to do about it has been done.
            item.has_waited = true;
            some = true;
        }
        if some {
            let (closed, now) = (&self.common.closed, Instant::now());
            closed.close(self.number, &Destination::ClientQueues, &untold.why, now);
        }
    }

    /// Puts aside the messages of a batch that are to be; those that cannot be for now wait.
    fn put_aside(&mut self, batch: &mut [Item]) -> Result<(), Trouble> {
        let Common {
            service,
            queue_names,
            closed,
            ..
        } = self.common;
        let metrics = &service.metrics;
        for vhost in [Vhost::Sdk, Vhost::Task] {
            let (mut items, letters): (Vec<_>, Vec<_>) = batch
                .iter_mut()
                .filter(|item| item.waits_for.is_none())
                .filter(|item| item.inbox().map(Inbox::vhost) == Some(vhost))
                .filter_map(|item| {
                    let (inbox, received, reason) = item.letter()?;
                    let letter = wire::dead_letter(
                        &queue_names[&inbox],
                        reason,
                        Timestamp::now(),
                        received.properties(),
                        received.body.clone(),
                    );
                    Some((item, letter))
                })
                .unzip();
            if items.is_empty() {
                continue;
            }
            let queue = Destination::DeadLetters(vhost);
            let mut outcome = vec![Some(String::new()); items.len()];
            if !closed.is_closed(&queue, Instant::now()) {
                let is_there = self.letters_taken.contains(&vhost);
                let publisher = self.publishers.towards(vhost);
                outcome = letters::put_aside(publisher, &letters, is_there)?;
                let refused = outcome.iter().flatten().count();
                metrics.published("confirmed", outcome.len() - refused);
                metrics.published("rejected", refused);
                let now = Instant::now();
                if outcome.contains(&None) {
                    closed.took(&queue, now);
                }
                match outcome.iter().flatten().next() {
                    None => drop(self.letters_taken.insert(vhost)),
                    Some(why) => {
                        self.letters_taken.remove(&vhost);
                        closed.close(self.number, &queue, why, now);
                    }
                }
            }
            for (item, why) in items.iter_mut().zip(outcome) {
                if why.is_none() {
                    item.is_put_aside(metrics);
                }
                // If its client is to be told later, the message is handled once more anyway.
                if item.wait.is_none() {
                    item.job = None;
                    item.list_workflows = false;
                    item.waits_for = why.map(|_| queue.clone());
                }
            }
        }
        Ok(())
    }

    /// Decides about a batch and commits the result. Adds to `told` what clients are to hear of it
    /// now.
    fn transact(
        &mut self,
        batch: &[Item],
        told: &mut Outbox,
        connection: &mut Connection,
    ) -> Result<Committed, Trouble> {
        let ids: BTreeSet<Uuid> = asked(batch).map(|asked| asked.job_id).collect();
        let ids = Vec::from_iter(ids);
        let mut stopwatch = self.common.service.metrics.stopwatch();
        let mut transaction = connection.transaction()?;
        transaction.lock(&ids)?;
        stopwatch.lap(Stage::Lock);
        let loaded = transaction.load(&ids)?;
        stopwatch.lap(Stage::Load);

        let catalogue = self.common.service.catalogue.get();
        let mut plan = self.decide(batch, &loaded, &catalogue);
        stopwatch.lap(Stage::Decide);

        transaction.write(&plan.transitions, &plan.series, loaded.now)?;
        stopwatch.lap(Stage::Write);
        fault_point::reached("before publish");
        if batch.iter().map(|item| item.work.size()).sum::<usize>() > MAX_BATCH_BYTES {
            // Publishing may take longer than the minute for which a transaction may be idle.
            transaction.take_time()?;
        }
        // Only now, since what Postgres refuses must not have been asked of anybody. And before the
        // commit, since a committed task must have been published.
        let mut outbox = Outbox::default();
        self.write_out(mem::take(&mut plan.publications), &mut outbox);
        self.publish(&outbox)?;
        stopwatch.lap(Stage::Publish);
        fault_point::reached("after publish");
        transaction.commit()?;
        stopwatch.lap(Stage::Commit);
        self.report(batch, &plan, &catalogue);
        self.write_out(plan.announcements, told);
        Ok(Committed {
            ending: plan.ending.into_iter().collect(),
            waits: plan.waits,
            stalled: plan.stalled,
        })
    }

    fn decide<'a>(
        &self,
        batch: &'a [Item],
        loaded: &'a Loaded,
        catalogue: &'a Catalogue,
    ) -> Plan<'a> {
        let common = self.common;
        // The watchdog and the log of a panic name the job.
        let asked = asked(batch).inspect(|asked| {
            self.watched.decides(asked.job_id, asked.command.name());
            fault_point::reached(asked.command.reference());
        });
        let context = || Context {
            now: loaded.now,
            session_begun: loaded.session_begun,
            new_task_id: Uuid::new_v4(),
            catalogue,
            rules: &common.service.rules,
        };
        let is_closed = |queue: &str| {
            !common.closed.is_empty() && {
                let queue = Destination::TaskQueue(queue.to_owned());
                common.closed.is_closed(&queue, Instant::now())
            }
        };
        let plan = batch::decide(asked, &loaded.states, context, is_closed);
        self.watched.goes_on();
        plan
    }

    /// Logs and counts what has been committed.
    fn report(&self, batch: &[Item], plan: &Plan<'_>, catalogue: &Catalogue) {
        let common = self.common;
        for report in &plan.reports {
            common
                .service
                .metrics
                .message(batch[report.place].inbox(), &report.event);
            report::log(&report.subject, &report.event, report.command);
            if let Event::Suspected { .. } = report.event {
                // Full when it has been woken already.
                let _ = common.inquiry.try_send(());
            }
        }
        let known = |workflow: &str| catalogue.definition(workflow).is_some();
        plan.ended()
            .for_each(|ended| common.service.metrics.job_ended(ended, known));
    }
}

/// What follows from a committed batch; each field as in [`Plan`].
struct Committed {
    ending: Vec<Uuid>,
    waits: Vec<Wait>,
    stalled: Vec<Stalled>,
}

/// What a batch asks for.
fn asked(batch: &[Item]) -> impl Iterator<Item = Asked<'_>> {
    batch.iter().enumerate().filter_map(|(place, item)| {
        let (job_id, command) = item.job.as_ref()?;
        Some(Asked {
            place,
            job_id: *job_id,
            command,
            has_waited: item.has_waited,
        })
    })
}
