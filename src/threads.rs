//! What threads tell each other: that it is time to stop, and since when they have been waiting for
//! somebody who may never answer.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};

/// A signal that is given once, to any number of threads, and stays given: by dropping the
/// [`Pending`] that belongs to it. So whoever is to give it cannot die without doing so.
#[derive(Debug, Clone)]
pub struct Signal(Receiver<Infallible>);

/// A [`Signal`] that has not been given yet.
#[derive(Debug)]
pub struct Pending {
    _sender: Sender<Infallible>,
}

impl Signal {
    pub fn pending() -> (Pending, Signal) {
        let (sender, receiver) = bounded(0);
        (Pending { _sender: sender }, Signal(receiver))
    }

    pub fn is_given(&self) -> bool {
        matches!(self.0.try_recv(), Err(TryRecvError::Disconnected))
    }

    /// Waits for it; false when it has not come in this time.
    #[must_use]
    pub fn comes_within(&self, time: Duration) -> bool {
        matches!(
            self.0.recv_timeout(time),
            Err(RecvTimeoutError::Disconnected)
        )
    }

    /// To wait for it among other things: nothing is ever received, but it is ready once the signal
    /// is given.
    pub fn receiver(&self) -> &Receiver<Infallible> {
        &self.0
    }
}

/// The calls that one thread makes to somebody else, one at a time, for a watchdog: neither amiquip's
/// calls nor those to Postgres have a deadline that holds in every case.
#[derive(Debug)]
pub struct Calls {
    epoch: Instant,
    /// When the current one began, in milliseconds after `epoch`, plus one; 0 where there is none. In
    /// the future where it may well take a while.
    begun: AtomicU64,
    /// When the last one ended, in milliseconds after `epoch`.
    ended: AtomicU64,
}

/// A call that goes on until this is dropped.
#[must_use]
#[derive(Debug)]
pub struct Call<'c>(&'c Calls);

impl Default for Calls {
    fn default() -> Self {
        Calls {
            epoch: Instant::now(),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
        }
    }
}

impl Calls {
    pub fn begin(&self) -> Call<'_> {
        self.begin_within(Duration::ZERO)
    }

    /// Begins a call that may take so much longer than others.
    pub fn begin_within(&self, allowance: Duration) -> Call<'_> {
        self.begun
            .store(self.millis(allowance) + 1, Ordering::Relaxed);
        Call(self)
    }

    /// For how long the current call has lasted, without what it may take longer than others.
    pub fn current(&self) -> Option<Duration> {
        let begun = self.begun.load(Ordering::Relaxed).checked_sub(1)?;
        Some(
            self.epoch
                .elapsed()
                .saturating_sub(Duration::from_millis(begun)),
        )
    }

    /// Takes the current call, if there is one, for one that begins now.
    pub fn restart(&self) {
        let now = self.millis(Duration::ZERO) + 1;
        let begun = |begun| (begun != 0).then_some(now);
        // Fails where there is none.
        let _ = self
            .begun
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, begun);
    }

    /// For how long there has been no call, if there is none.
    pub fn idle(&self) -> Option<Duration> {
        let ended = Duration::from_millis(self.ended.load(Ordering::Relaxed));
        match self.current() {
            Some(_) => None,
            None => Some(self.epoch.elapsed().saturating_sub(ended)),
        }
    }

    fn millis(&self, later: Duration) -> u64 {
        let time = self.epoch.elapsed() + later;
        u64::try_from(time.as_millis()).unwrap_or(u64::MAX - 1)
    }
}

impl Call<'_> {
    /// The answer has been making progress.
    pub fn goes_on(&self, allowance: Duration) {
        let begun = self.0.millis(allowance) + 1;
        self.0.begun.store(begun, Ordering::Relaxed);
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0
            .ended
            .store(self.0.millis(Duration::ZERO), Ordering::Relaxed);
        self.0.begun.store(0, Ordering::Relaxed);
    }
}

/// The pauses between attempts: each about twice as long as the one before, up to a longest.
#[derive(Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    pub fn new(first: Duration, longest: Duration) -> Backoff {
        Backoff {
            first,
            longest,
            next: first,
        }
    }

    /// Whether there has been no pause yet.
    pub fn is_fresh(&self) -> bool {
        self.next == self.first
    }

    /// Begins anew with the shortest pause.
    pub fn reset(&mut self) {
        self.next = self.first;
    }

    /// Waits for the next pause; true when `stop` comes within it.
    #[must_use]
    pub fn stopped_by(&mut self, stop: &Signal) -> bool {
        // What many wait for at once is not asked for by all at once.
        let pause = self.next.mul_f64(0.5 + fastrand::f64());
        self.next = (self.next * 2).min(self.longest);
        stop.comes_within(pause)
    }
}

/// Runs `body`, and `kill` when it takes too long, which is to free every call that it waits in.
///
/// # Errors
/// Those of `body`, with the time that it has taken when that is too long.
pub fn within_deadline<T>(
    time: Duration,
    kill: impl FnOnce() + Send,
    body: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let (running, done) = Signal::pending();
    thread::scope(|scope| {
        let deadline = thread::Builder::new()
            .name("deadline".to_owned())
            .spawn_scoped(scope, move || {
                let is_over = !done.comes_within(time);
                if is_over {
                    kill();
                }
                is_over
            })?;
        let outcome = body();
        drop(running);
        match deadline.join() {
            Ok(true) => outcome.with_context(|| format!("not done within {time:?}")),
            Ok(false) | Err(_) => outcome,
        }
    })
}
