//! What takes its time to count: the charts' figures and sizes, counted by one thread at a time while the others show those that it had before.

use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use log::debug;

use crate::store::StoreError;

/// For how long they are kept: they change slowly, and go through all jobs of a day.
const AGE: Duration = Duration::from_secs(20);
/// And so many times as long as counting took, so that it is next to nothing of the time.
const TIMES_AS_LONG: u32 = 300;
/// For how long they are done without where they took too long.
const PAUSE: Duration = Duration::from_secs(300);

/// What was counted last, nothing where that went wrong, and until when that is good enough.
#[derive(Debug)]
struct Known<T> {
    until: Option<Instant>,
    figures: Option<Arc<T>>,
}

#[derive(Debug)]
pub(super) struct Figures<T> {
    known: Mutex<Known<T>>,
    counting: Mutex<()>,
}

impl<T> Default for Figures<T> {
    fn default() -> Figures<T> {
        Figures {
            known: Mutex::new(Known {
                until: None,
                figures: None,
            }),
            counting: Mutex::default(),
        }
    }
}

impl<T> Figures<T> {
    /// The figures, as long as they are new enough, and while others count; new ones otherwise. A page is
    /// shown without them rather than not at all.
    pub(super) fn get(&self, count: impl FnOnce() -> Result<T, StoreError>) -> Option<Arc<T>> {
        let _counting = match self.counting.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return self.known(|known| known.figures.clone()),
        };
        let is_new = |known: &Known<T>| known.until.is_some_and(|until| Instant::now() < until);
        let new = self.known(|known| is_new(known).then(|| known.figures.clone()));
        if let Some(figures) = new {
            return figures;
        }
        let began = Instant::now();
        let counted = count();
        let age = match &counted {
            Err(StoreError::TooLong(_)) => PAUSE,
            Ok(_) | Err(_) => (began.elapsed() * TIMES_AS_LONG).clamp(AGE, PAUSE),
        };
        let counted = counted.inspect_err(|error| debug!("figures are left out: {error}"));
        let figures = counted.ok().map(Arc::new);
        self.known(|known| {
            *known = Known {
                until: Some(Instant::now() + age),
                figures: figures.clone(),
            };
        });
        figures
    }

    fn known<U>(&self, with: impl FnOnce(&mut Known<T>) -> U) -> U {
        with(&mut self.known.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use anyhow::anyhow;
    use crossbeam_channel::bounded;
    use jiff::Timestamp;

    use super::*;
    use crate::domain::activity::Activity;

    fn activity() -> Activity {
        Activity::new(Timestamp::UNIX_EPOCH, &[])
    }

    #[test]
    fn nobody_waits_while_somebody_counts() {
        let figures = Figures::default();
        let old = figures.get(|| Ok(activity())).unwrap();
        figures.known(|known| known.until = None);
        let (begun, begins) = bounded(0);
        let (done, ends) = bounded::<()>(0);
        thread::scope(|scope| {
            let counts = scope.spawn(|| {
                figures.get(|| {
                    begun.send(()).unwrap();
                    ends.recv().unwrap();
                    Ok(activity())
                })
            });
            begins.recv().unwrap();
            let meanwhile = figures.get(|| panic!("two count at once"));
            done.send(()).unwrap();
            assert!(Arc::ptr_eq(&meanwhile.unwrap(), &old));
            assert!(!Arc::ptr_eq(&counts.join().unwrap().unwrap(), &old));
        });
    }

    #[test]
    fn what_took_too_long_is_left_alone_for_a_while() {
        let until = |error: StoreError| {
            let figures: Figures<Activity> = Figures::default();
            assert!(figures.get(|| Err(error)).is_none());
            assert!(figures.get(|| panic!("it is counted again")).is_none());
            figures.known(|known| known.until.unwrap())
        };
        let failed = until(StoreError::Transient(anyhow!("a fault")));
        let long = until(StoreError::TooLong(anyhow!("canceled")));
        assert!(long > failed + PAUSE / 2);
    }
}
