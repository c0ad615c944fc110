//! What viewers have been shown a moment ago. Every look at the jobs reads all that have not ended, and
//! any number of pages may be open: looking is to cost the database no more for that.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a look has shown is shown again for so many times as long as the look took, and as many times
/// longer as different looks are kept: all looking together takes a twentieth of a thread's time.
const TIMES_AS_LONG: u32 = 20;
/// But for no longer than this, whatever it costs: somebody may be waiting for a change.
const LONGEST: Duration = Duration::from_secs(2);
/// How many different looks are kept.
const MOST: u32 = 64;

/// Looks by what was looked for.
#[derive(Debug)]
pub struct Looks<K, V>(Mutex<Kept<K, V>>);

#[derive(Debug)]
struct Kept<K, V> {
    looks: Vec<Look<K, V>>,
    /// How often everything has been forgotten.
    forgotten: u64,
}

#[derive(Debug)]
struct Look<K, V> {
    at: K,
    until: Instant,
    seen: Arc<V>,
}

impl<K, V> Default for Looks<K, V> {
    fn default() -> Looks<K, V> {
        Looks(Mutex::new(Kept {
            looks: Vec::new(),
            forgotten: 0,
        }))
    }
}

impl<K: PartialEq, V> Looks<K, V> {
    /// What is seen `at` there: as it was a moment ago, or by a new `look`. Nobody waits for somebody
    /// else's look.
    ///
    /// # Errors
    /// Those of the look; nothing is kept of it.
    pub fn at<E>(&self, at: K, look: impl FnOnce() -> Result<V, E>) -> Result<Arc<V>, E> {
        let began = Instant::now();
        let forgotten = {
            let mut kept = self.kept();
            kept.looks.retain(|look| look.until > began);
            if let Some(look) = kept.looks.iter().find(|look| look.at == at) {
                return Ok(Arc::clone(&look.seen));
            }
            kept.forgotten
        };
        let seen = Arc::new(look()?);
        let mut kept = self.kept();
        let different = u32::try_from(kept.looks.len()).unwrap_or(u32::MAX);
        let time = began.elapsed() * TIMES_AS_LONG * different.saturating_add(1);
        let until = Instant::now() + time.min(LONGEST);
        // What was changed meanwhile may not have been seen.
        if kept.forgotten == forgotten && different < MOST {
            let seen = Arc::clone(&seen);
            kept.looks.push(Look { at, until, seen });
        }
        Ok(seen)
    }

    /// Has everybody look anew: something has been changed.
    pub fn forget(&self) {
        let mut kept = self.kept();
        kept.looks.clear();
        kept.forgotten += 1;
    }

    fn kept(&self) -> MutexGuard<'_, Kept<K, V>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::convert::Infallible;

    use super::*;

    /// A look that takes its time, counted.
    fn look(looks: &Cell<u32>, time: Duration) -> Result<u32, Infallible> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        looks.set(looks.get() + 1);
        Ok(looks.get())
    }

    #[test]
    fn a_look_that_took_long_is_kept_by_what_it_was_at_and_forgotten_on_demand() {
        let (all, count) = (Looks::default(), Cell::new(0));
        // Twenty times as long is long enough for the asserts.
        let long = || look(&count, Duration::from_millis(250));
        assert_eq!(*all.at("a", long).unwrap(), 1);
        assert_eq!(*all.at("a", long).unwrap(), 1);
        assert_eq!(*all.at("b", long).unwrap(), 2);
        assert_eq!(*all.at("a", long).unwrap(), 1);
        all.forget();
        assert_eq!(*all.at("a", long).unwrap(), 3);
    }

    #[test]
    fn what_was_changed_during_a_look_is_looked_at_again() {
        let (all, count) = (Looks::default(), Cell::new(0));
        let disturbed = || {
            all.forget();
            look(&count, Duration::from_millis(250))
        };
        assert_eq!(*all.at("a", disturbed).unwrap(), 1);
        let look = || look(&count, Duration::ZERO);
        assert_eq!(*all.at("a", look).unwrap(), 2);
    }

    #[test]
    fn a_look_that_took_no_time_is_not_kept_and_a_failed_one_neither() {
        let (all, count) = (Looks::default(), Cell::new(0));
        assert_eq!(all.at("a", || Err("gone")), Err("gone"));
        let short = || look(&count, Duration::ZERO);
        assert_eq!(*all.at("a", short).unwrap(), 1);
        let until = Instant::now() + Duration::from_secs(20);
        // Twenty times next to nothing.
        while *all.at("a", short).unwrap() == 1 {
            assert!(Instant::now() < until);
        }
    }

    #[test]
    fn there_is_room_for_so_many_only() {
        let (all, count) = (Looks::default(), Cell::new(0));
        // So many that more than there is room for would be kept for the longest time.
        let time = LONGEST / (MOST + MOST / 2);
        let most = (0..2 * MOST).map(|at| {
            all.at(at, || look(&count, time)).unwrap();
            all.kept().looks.len()
        });
        assert_eq!(most.max(), Some(MOST as usize));
    }
}
