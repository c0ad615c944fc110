//! Asks the Celery workers who is running a task, when a start of it would end its job. What the
//! answers mean for the job is decided where everything else is decided.
//!
//! Suspicions are in the database, with the starts. The handler that writes one wakes this thread;
//! those that a replica left open when it died or was stopped are found at the beginning of a
//! session and periodically. Several replicas may ask about the same start.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context;
use crossbeam_channel::{Receiver, Sender, select};
use jiff::Timestamp;
use log::{debug, warn};
use uuid::Uuid;

use crate::broker::{Link, Question};
use crate::domain::job::{Command, Suspicion};
use crate::service::handler::MAX_FINDINGS;
use crate::service::handler::{self, Work};
use crate::service::shared::Service;
use crate::store::Store;
use crate::threads::{Calls, Signal};
use crate::wire::celery::{self, Execution};

/// How long the workers have to answer a question.
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// In how many rounds the workers are asked before one is taken for dead. A worker that RabbitMQ
/// lost sight of may take this many seconds to reconnect; Celery needs up to four. It is a count,
/// not a time, since time also passes while this process stands still.
const ROUNDS: u32 = 10;
/// The same when asking fails: when the connection is lost, until the session ends, and always
/// without the rights to ask.
const FAILED_ROUNDS: u32 = 60;

/// The thread's calls, for the watchdog.
#[derive(Debug, Default)]
pub struct Watched {
    pub celery: Calls,
    pub postgres: Arc<Calls>,
}

/// A suspicion that the workers are being asked about.
struct Open {
    suspicion: Suspicion,
    /// In how many rounds they have been asked.
    rounds: u32,
    /// In how many that failed.
    failed_rounds: u32,
}

/// What the workers have said to one question.
#[derive(Default)]
struct Said {
    answers: u32,
    executions: HashSet<Execution>,
}

/// The thread's part of the session.
pub struct Inquiry<'s> {
    pub service: &'s Service,
    /// Its calls are under the watchdog.
    pub store: Store,
    /// To the vhost of the tasks.
    pub link: &'s Link,
    pub handlers: Vec<Sender<Work>>,
    pub watched: &'s Watched,
    pub stop: Signal,
}

impl Inquiry<'_> {
    /// Looks for suspected starts on each of the `nudges` and periodically, and asks about them
    /// until they are judged. Ends when `stop` is given.
    pub fn run(&self, nudges: &Receiver<()>) {
        let mut open = Vec::new();
        let mut failing = false;
        loop {
            let round = self.round(&mut open);
            let wait = match &round {
                // Waiting for the answers was pause enough.
                Ok(()) if !open.is_empty() => Duration::ZERO,
                Ok(()) => self.service.config.timeout_check_period,
                Err(_) => ANSWER_TIME,
            };
            match round {
                Ok(()) => failing = false,
                Err(error) if failing => debug!("the workers still cannot be asked: {error:#}"),
                Err(error) => {
                    failing = true;
                    warn!("the workers cannot be asked what they run: {error:#}");
                }
            }
            select! {
                recv(self.stop.receiver()) -> _ => return,
                recv(nudges) -> _ => {}
                default(wait) => {}
            }
        }
    }

    /// Asks once about all that is open by now, and passes on what the workers say.
    fn round(&self, open: &mut Vec<Open>) -> anyhow::Result<()> {
        let found = self.suspicions()?;
        open.retain(|known| found.contains(&known.suspicion));
        for suspicion in found {
            if !open.iter().any(|known| known.suspicion == suspicion) {
                open.push(Open {
                    suspicion,
                    rounds: 0,
                    failed_rounds: 0,
                });
            }
        }
        if open.is_empty() {
            return Ok(());
        }
        let mut said = Said::default();
        let asked = self.ask(&mut said);
        for one in &mut *open {
            match asked {
                // The service is stopping, and some workers may not have answered.
                Ok(false) => return Ok(()),
                Ok(true) => one.rounds += 1,
                Err(_) => one.failed_rounds += 1,
            }
            let last = one.rounds >= ROUNDS || one.failed_rounds >= FAILED_ROUNDS;
            self.pass_on(&one.suspicion, &said, last);
        }
        asked.map(drop)
    }

    fn suspicions(&self) -> anyhow::Result<Vec<Suspicion>> {
        let mut connection = self.store.connection()?;
        Ok(connection.suspicions(MAX_FINDINGS.into())?)
    }

    /// Whether the workers had the time to answer.
    fn ask(&self, said: &mut Said) -> anyhow::Result<bool> {
        let key = Uuid::new_v4().to_string();
        let clock = self.service.revoke_clock.fetch_add(1, Ordering::Relaxed);
        let question = Question {
            message: celery::who_runs_what(&key, clock, Timestamp::now()),
            key,
        };
        let note = |_, answer: &[u8]| {
            said.answers += 1;
            said.executions.extend(celery::executions(answer));
            ControlFlow::Continue(())
        };
        let calls = &self.watched.celery;
        self.link
            .ask(&[question], ANSWER_TIME, calls, &self.stop, note)
            .context("asking the workers")
    }

    fn pass_on(&self, suspicion: &Suspicion, said: &Said, last: bool) {
        let Suspicion {
            job_id,
            task_id,
            at,
        } = suspicion;
        let executions = said.executions.iter();
        let of_task = executions.filter(|one| one.task_id == *task_id);
        let alive = of_task.count();
        debug!("job {job_id}: {alive} workers say that they run its task");
        if alive < 2 && !last {
            return;
        }
        if said.answers == 0 {
            warn!(
                "job {job_id}: no worker says what it runs, so whoever ran its task is taken for dead"
            );
        }
        let command = Command::Judge {
            task_id: task_id.clone(),
            at: *at,
            alive,
            last,
        };
        let handler = &self.handlers[handler::index(*job_id, self.handlers.len())];
        // If the handler is busy, the next round finds the same.
        let _ = handler.try_send(Work::Finding {
            job_id: *job_id,
            command,
        });
    }
}
