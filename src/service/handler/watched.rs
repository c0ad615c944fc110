//! What a handler thread is doing, for those who watch over it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use super::Work;
use crate::busy::Busy;
use crate::telemetry::report::one_line;
use crate::wire::{self, Inbox};

/// What a handler thread is waiting for, or what it is busy with itself.
#[derive(Debug, Default)]
pub struct Watched {
    pub sdk: Busy,
    pub celery: Busy,
    pub task: Busy,
    pub postgres: Busy,
    /// Since when it has been at one step without waiting for anybody.
    own: Busy,
    step: Mutex<Step>,
    /// Why its batch does not get through, and is tried again.
    trouble: Mutex<Option<String>>,
}

#[derive(Debug, Default)]
enum Step {
    #[default]
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

/// A handler that waits for longer than this may well have messages of a while ago in hand.
const HELD_UP: Duration = Duration::from_secs(2);

impl Watched {
    /// Whether its batch has been waiting for longer than usual.
    pub fn is_held_up(&self) -> bool {
        let busy = [
            &self.sdk,
            &self.celery,
            &self.task,
            &self.postgres,
            &self.own,
        ];
        let mut times = busy.into_iter().filter_map(Busy::for_how_long);
        times.any(|time| time > HELD_UP) || lock(&self.trouble).is_some()
    }

    pub(super) fn set_trouble(&self, trouble: Option<String>) {
        *lock(&self.trouble) = trouble;
    }

    /// Why its batch does not get through.
    pub fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }

    /// It reads what is to be done.
    pub(super) fn reads(&self, work: &Work) {
        self.own.touch();
        if let Work::Message { inbox, received } = work {
            *lock(&self.step) = Step::Reading {
                inbox: *inbox,
                message_id: received.message_id().map(str::to_owned),
                bytes: received.body.len(),
                job: wire::job_id(&received.body),
            };
        }
    }

    /// It decides about a command for a job.
    pub(super) fn decides(&self, job: Uuid, about: &'static str) {
        self.own.touch();
        *lock(&self.step) = Step::Deciding { about, job };
    }

    /// It waits for others: for Postgres, a confirm, its next message.
    pub(super) fn waits(&self) {
        self.own.idle();
    }

    pub(super) fn waits_for_postgres(&self) {
        self.waits();
        self.postgres.touch();
    }

    /// It has got what it was waiting for, and does the next step with its batch.
    pub(super) fn goes_on(&self) {
        self.postgres.idle();
        *lock(&self.step) = Step::Batch;
        self.own.touch();
    }

    /// For how long it has been at something without waiting for anybody, and at what.
    pub fn busy_itself(&self) -> Option<(Duration, String)> {
        let time = self.own.for_how_long()?;
        let what = match &*lock(&self.step) {
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
        let waits = [
            ("an answer on the SDK connection", &self.sdk),
            ("an answer on the CELERY connection", &self.celery),
            ("an answer on the TASK connection", &self.task),
            ("Postgres", &self.postgres),
        ];
        let waits = waits.into_iter().find_map(|(what, busy)| {
            let time = busy.for_how_long()?;
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
