//! What is due because time has passed: timeouts, jobs past their retention, old history. It only
//! finds the jobs; what becomes of them is decided where everything else is.

use std::convert::Infallible;
use std::sync::PoisonError;
use std::time::Instant;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use log::{debug, info, warn};
use uuid::Uuid;

use crate::busy::Busy;
use crate::handler::{self, Work};
use crate::job::Command;
use crate::session::Service;
use crate::store::{StoreError, Task};

/// How many jobs one round finds at most; the next round finds the others. A handler's queue of
/// findings has room for as many.
pub const MAX_FINDINGS: u16 = 1000;

/// A round every [`Config::timeout_check_period`] among all replicas, until `stop` is disconnected.
/// One that dies after it has claimed a round leaves it to the next.
///
/// What has been waiting while the service, RabbitMQ or Postgres was away is to be heard before
/// anything counts as overdue: so the start buffer begins with each session, and again after
/// Postgres was away.
pub fn run(service: &Service, handlers: &[Sender<Work>], busy: &Busy, stop: &Receiver<Infallible>) {
    let config = &service.config;
    let mut failing = false;
    let mut quiet_since = Instant::now();
    loop {
        match stop.recv_timeout(config.timeout_check_period) {
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
            Ok(never) => match never {},
        }
        let limits_too = quiet_since.elapsed() >= config.timeout_start_buffer;
        busy.touch();
        let found = round(service, limits_too);
        busy.idle();
        if found.is_err() {
            quiet_since = Instant::now();
        }
        match found {
            Ok(findings) => {
                failing = false;
                for (job_id, command) in findings {
                    let handler = handler::index(job_id, handlers.len());
                    // One that is held up has the last round's findings still to do.
                    if handlers[handler]
                        .try_send(Work::Finding { job_id, command })
                        .is_err()
                    {
                        debug!("job {job_id}: its handler is busy, left for the next round");
                    }
                }
            }
            Err(error) if failing => debug!("maintenance still fails: {error}"),
            Err(error) => {
                failing = true;
                warn!("maintenance fails, and is tried again: {error}");
            }
        }
    }
}

/// What is due now.
fn round(service: &Service, limits_too: bool) -> Result<Vec<(Uuid, Command)>, StoreError> {
    let config = &service.config;
    let mut connection = service.store.connection()?;
    let limit = i64::from(MAX_FINDINGS);
    let mut findings = Vec::new();
    if limits_too && connection.claim(Task::Limits, config.timeout_check_period)? {
        let timed_out = connection.timed_out(limit)?;
        findings.extend(timed_out.into_iter().map(|id| (id, Command::TimeOut)));
        // Never without the timeouts before them: a job that is past both has one outcome, also
        // when it is looked at again after a crash.
        let expired = connection.expired(config.job_retention, limit)?;
        let untold = connection.untold(config.outcome_lost, limit)?;
        let given_up = expired.into_iter().chain(untold);
        findings.extend(given_up.map(|id| (id, Command::Expire)));
    }
    if config.no_worker_notice {
        let queues = service.queues.lock();
        let queues = queues.unwrap_or_else(PoisonError::into_inner).clone();
        for workflow in queues
            .iter()
            .flat_map(|queues| queues.without_worker.keys())
        {
            let waiting = connection.waiting_without_notice(workflow, limit)?;
            findings.extend(waiting.into_iter().map(|id| (id, Command::NoWorker)));
        }
    }
    if connection.claim(Task::History, config.timeout_check_period)? {
        let forgotten = connection.forget(config.history_retention, limit)?;
        if forgotten > 0 {
            let retention = config.history_retention;
            info!("forgot {forgotten} jobs that ended longer than {retention:?} ago");
        }
    }
    Ok(findings)
}
