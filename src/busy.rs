//! Since when a thread has been waiting for somebody else, for those who watch over it: neither
//! amiquip's calls nor those to Postgres have a deadline that holds in every case.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// One thing that a thread may be waiting for.
#[derive(Debug)]
pub struct Busy {
    epoch: Instant,
    /// Milliseconds after `epoch`, plus one; 0 while it waits for nothing. In the future where the
    /// wait may well take a while.
    since: AtomicU64,
}

impl Default for Busy {
    fn default() -> Self {
        Busy {
            epoch: Instant::now(),
            since: AtomicU64::new(0),
        }
    }
}

impl Busy {
    /// How long the current wait has lasted.
    pub fn for_how_long(&self) -> Option<Duration> {
        let since = self.since.load(Ordering::Relaxed).checked_sub(1)?;
        let waiting = self.epoch.elapsed();
        Some(waiting.saturating_sub(Duration::from_millis(since)))
    }

    /// A wait begins, in place of any other.
    pub fn touch(&self) {
        self.touch_for(Duration::ZERO);
    }

    /// A wait begins that counts only from `allowance` on.
    pub fn touch_for(&self, allowance: Duration) {
        let since = self.epoch.elapsed() + allowance;
        let millis = u64::try_from(since.as_millis()).unwrap_or(u64::MAX - 1);
        self.since.store(millis + 1, Ordering::Relaxed);
    }

    /// The wait is over.
    pub fn idle(&self) {
        self.since.store(0, Ordering::Relaxed);
    }
}
