//! The threads of a session.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

use anyhow::{Context, anyhow};
use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::service::handler::panic_text;
use crate::threads::{Pending, Signal};

/// How a thread ended.
pub(super) struct Ended {
    pub(super) thread: String,
    pub(super) outcome: anyhow::Result<()>,
}

/// Starts the threads of a session. They are known by their names.
pub(super) struct Recruits<'scope, 'env> {
    scope: &'scope thread::Scope<'scope, 'env>,
    /// Given when the threads are to end.
    pub(super) stop: Signal,
    pending: Pending,
    report: Sender<Ended>,
    reports: Receiver<Ended>,
    running: BTreeSet<String>,
}

/// The threads of a session, all of which have been started.
pub(super) struct Crew {
    /// Those that have not reported their end yet.
    pub(super) running: BTreeSet<String>,
    pub(super) reports: Receiver<Ended>,
    /// Dropped to stop them.
    pub(super) stop: Option<Pending>,
}

impl<'scope, 'env> Recruits<'scope, 'env> {
    pub(super) fn new(scope: &'scope thread::Scope<'scope, 'env>) -> Self {
        let (pending, stop) = Signal::pending();
        let (report, reports) = unbounded();
        Recruits {
            scope,
            stop,
            pending,
            report,
            reports,
            running: BTreeSet::new(),
        }
    }

    /// Starts a thread whose end, also by a panic, is reported.
    ///
    /// # Errors
    /// The system has no room for another one. What has been started ends, since this is dropped.
    pub(super) fn start(
        &mut self,
        name: impl Into<String>,
        body: impl FnOnce() -> anyhow::Result<()> + Send + 'scope,
    ) -> anyhow::Result<()> {
        let thread = name.into();
        let (report, name) = (self.report.clone(), thread.clone());
        thread::Builder::new()
            .name(name.clone())
            .spawn_scoped(self.scope, move || {
                // The panic hook has logged where it came from.
                let outcome = catch_unwind(AssertUnwindSafe(body))
                    .unwrap_or_else(|panic| Err(anyhow!("panicked: {}", panic_text(&*panic))));
                // The watchdog is there until all threads have reported.
                let _ = report.send(Ended {
                    thread: name,
                    outcome,
                });
            })
            .context("starting a thread")?;
        self.running.insert(thread);
        Ok(())
    }

    pub(super) fn all_started(self) -> Crew {
        Crew {
            running: self.running,
            reports: self.reports,
            stop: Some(self.pending),
        }
    }
}
