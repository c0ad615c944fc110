//! What a handler thread is doing, for the watchdog.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::Work;
use crate::telemetry::report::one_line;
use crate::threads::{Call, Calls};
use crate::wire::{self, Inbox};

/// What a handler thread is waiting for, or busy with.
#[derive(Debug)]
pub struct Watched {
    pub sdk: Calls,
    pub celery: Calls,
    pub task: Calls,
    pub postgres: Arc<Calls>,
    /// Waiting for its next message, or to try again.
    next: Calls,
    /// The current step and its beginning; meaningful while no call is going on.
    step: Mutex<(Instant, Step)>,
    /// Why its batch fails and is being retried.
    trouble: Mutex<Option<String>>,
}

#[derive(Debug)]
enum Step {
    Batch,
    Reading {
        inbox: Inbox,
        message_id: Option<String>,
        bytes: usize,
        job: Option<Uuid>,
    },
    Deciding {
        /// The command's name.
        about: &'static str,
        job: Uuid,
    },
}

impl Default for Watched {
    fn default() -> Self {
        Watched {
            sdk: Calls::default(),
            celery: Calls::default(),
            task: Calls::default(),
            postgres: Arc::default(),
            next: Calls::default(),
            step: Mutex::new((Instant::now(), Step::Batch)),
            trouble: Mutex::default(),
        }
    }
}

/// A handler that waits for longer than this may hold messages that arrived a while ago.
const HELD_UP: Duration = Duration::from_secs(2);

impl Watched {
    /// Whether its batch has been waiting for longer than usual.
    pub fn is_held_up(&self) -> bool {
        let own = self.busy_itself().map(|(time, _)| time);
        let waits = self.calls().filter_map(|(_, calls)| calls.current());
        waits.chain(own).any(|time| time > HELD_UP) || lock(&self.trouble).is_some()
    }

    /// The calls that somebody else has to answer.
    fn calls(&self) -> impl Iterator<Item = (&'static str, &Calls)> {
        [
            ("an answer on the SDK connection", &self.sdk),
            ("an answer on the CELERY connection", &self.celery),
            ("an answer on the TASK connection", &self.task),
            ("Postgres", &self.postgres),
        ]
        .into_iter()
    }

    pub(super) fn set_trouble(&self, trouble: Option<String>) {
        *lock(&self.trouble) = trouble;
    }

    /// Why its batch fails, if it does.
    pub fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }

    /// Marks it as idle until this is dropped.
    pub(super) fn rests(&self) -> Call<'_> {
        self.next.begin()
    }

    /// It decodes a message.
    pub(super) fn reads(&self, work: &Work) {
        self.is_at(match work {
            Work::Message { inbox, received } => Step::Reading {
                inbox: *inbox,
                message_id: received.message_id().map(str::to_owned),
                bytes: received.body.len(),
                job: wire::job_id(&received.body),
            },
            Work::Finding { .. } | Work::WorkflowsChanged => Step::Batch,
        });
    }

    /// It decides about a command for a job.
    pub(super) fn decides(&self, job: Uuid, about: &'static str) {
        self.is_at(Step::Deciding { about, job });
    }

    /// It goes on to its batch's next step.
    pub(super) fn goes_on(&self) {
        self.is_at(Step::Batch);
    }

    fn is_at(&self, step: Step) {
        *lock(&self.step) = (Instant::now(), step);
    }

    /// For how long it has been busy without waiting for anybody, and with what.
    pub fn busy_itself(&self) -> Option<(Duration, String)> {
        let (since, step) = &*lock(&self.step);
        let calls = self.calls().map(|(_, calls)| calls).chain([&self.next]);
        let idle: Option<Vec<_>> = calls.map(Calls::idle).collect();
        let time = idle?.into_iter().chain([since.elapsed()]).min()?;
        let what = match step {
            Step::Batch => "handling a batch".to_owned(),
            Step::Reading {
                inbox,
                message_id,
                bytes,
                job,
            } => {
                let id = one_line(message_id.as_deref().unwrap_or("without id"));
                let job = job.map(|job| format!(" for job {job}"));
                let job = job.unwrap_or_default();
                let inbox = inbox.name();
                format!("reading message {id} of {bytes} bytes from {inbox}{job}")
            }
            Step::Deciding { about, job } => format!("deciding about {about} for job {job}"),
        };
        Some((time, what))
    }

    /// What it is doing, in one line.
    pub fn doing(&self) -> String {
        let waits = self.calls().find_map(|(what, calls)| {
            let time = calls.current()?;
            Some(format!("has been waiting for {what} for {time:.0?}"))
        });
        let own = || {
            let (time, what) = self.busy_itself()?;
            Some(format!("has been {what} for {time:.0?}"))
        };
        waits.or_else(own).unwrap_or_else(|| "is idle".to_owned())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
