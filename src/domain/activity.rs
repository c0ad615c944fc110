//! How much was done, and how much waited, over the last hour and the last day. Pure; the rows come from
//! `store/activity.rs`.

use jiff::{SignedDuration, Timestamp};

use crate::domain::job::Outcome;

/// What is counted together at the least.
pub const WIDTH: SignedDuration = SignedDuration::from_mins(2);
/// As many of these are a day, and so many of them an hour.
pub const COUNT: usize = 720;
const HOUR: usize = 30;
/// How many are one bar of a day.
const JOINED: usize = 15;

/// A stretch of time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stretch {
    /// Jobs that ended in it.
    pub succeeded: i64,
    /// With anything but a success or a cancel.
    pub failed: i64,
    /// Those that waited, at the most seen.
    pub waiting: i64,
}

/// Stretches of equal length, one after the other; the last one ends now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Course {
    pub begin: Timestamp,
    pub width: SignedDuration,
    pub stretches: Vec<Stretch>,
}

/// The last hour and the last day.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Activity {
    pub hour: Course,
    pub day: Course,
    /// How the jobs of the last hour ended.
    pub ended: Vec<(Outcome, i64)>,
}

/// How much room the database takes, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sizes {
    pub database: i64,
    /// Of the largest tables, with their indexes.
    pub tables: Vec<(String, i64)>,
}

impl Sizes {
    /// `12 MiB in this database`.
    pub fn total(&self) -> String {
        format!("{} in this database", room(self.database))
    }
}

/// `12 MiB`, as a number that somebody can hold in mind.
pub fn room(bytes: i64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let (mut amount, mut unit) = (bytes, 0);
    while amount >= 10_240 && unit + 1 < UNITS.len() {
        amount /= 1024;
        unit += 1;
    }
    format!("{amount} {}", UNITS[unit])
}

/// What the database counts in one of [`COUNT`] stretches, by its number; before the first one is -1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// By how much more jobs waited at its end than at its beginning.
    Waiting(i64),
    Ended(Outcome, i64),
}

impl Activity {
    /// When the first stretch of a day begins that ends at `now`.
    pub fn begin(now: Timestamp) -> Timestamp {
        let day = WIDTH * i32::try_from(COUNT).unwrap_or(i32::MAX);
        now.checked_sub(day).unwrap_or(Timestamp::MIN)
    }

    pub fn new(begin: Timestamp, rows: &[(i32, Counted)]) -> Activity {
        let mut stretches = vec![Stretch::default(); COUNT];
        let mut changes = vec![0; COUNT];
        let mut waiting = 0;
        let mut ended: Vec<(Outcome, i64)> = Vec::new();
        for (number, counted) in rows {
            // What has come since the question was asked belongs to the last one.
            let place = usize::try_from(*number).ok().map(|one| one.min(COUNT - 1));
            match (place, *counted) {
                (None, Counted::Waiting(change)) => waiting += change,
                (None, Counted::Ended(..)) => {}
                (Some(place), Counted::Waiting(change)) => changes[place] += change,
                (Some(place), Counted::Ended(outcome, count)) => {
                    match outcome {
                        Outcome::Succeeded => stretches[place].succeeded += count,
                        Outcome::Cancelled => {}
                        Outcome::Failed
                        | Outcome::CrashLoop
                        | Outcome::Rejected
                        | Outcome::TimedOut
                        | Outcome::Expired
                        | Outcome::Lost => stretches[place].failed += count,
                    }
                    if place >= COUNT - HOUR {
                        match ended.iter_mut().find(|(one, _)| *one == outcome) {
                            Some((_, sum)) => *sum += count,
                            None => ended.push((outcome, count)),
                        }
                    }
                }
            }
        }
        for (stretch, change) in stretches.iter_mut().zip(changes) {
            waiting += change;
            stretch.waiting = waiting.max(0);
        }
        ended.sort_by_key(|(outcome, _)| Outcome::ALL.iter().position(|one| one == outcome));
        let hour = &stretches[COUNT - HOUR..];
        let before = WIDTH * i32::try_from(COUNT - HOUR).unwrap_or(i32::MAX);
        Activity {
            hour: Course {
                begin: begin.checked_add(before).unwrap_or(Timestamp::MAX),
                width: WIDTH,
                stretches: hour.to_vec(),
            },
            day: Course {
                begin,
                width: WIDTH * i32::try_from(JOINED).unwrap_or(i32::MAX),
                stretches: stretches.chunks(JOINED).map(joined).collect(),
            },
            ended,
        }
    }
}

fn joined(some: &[Stretch]) -> Stretch {
    Stretch {
        succeeded: some.iter().map(|one| one.succeeded).sum(),
        failed: some.iter().map(|one| one.failed).sum(),
        waiting: some.iter().map(|one| one.waiting).max().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waited_is_summed_up_and_what_ended_is_counted() {
        let last = i32::try_from(COUNT).unwrap() - 1;
        let rows = [
            // Two waited before; one of them began at the first stretch, one more came at the last.
            (-1, Counted::Waiting(2)),
            (0, Counted::Waiting(-1)),
            (last, Counted::Waiting(1)),
            (0, Counted::Ended(Outcome::Succeeded, 3)),
            (last, Counted::Ended(Outcome::Failed, 2)),
            (last + 1, Counted::Ended(Outcome::Cancelled, 1)),
            (last, Counted::Ended(Outcome::Succeeded, 1)),
        ];
        let activity = Activity::new(Timestamp::UNIX_EPOCH, &rows);
        let (hour, day) = (&activity.hour, &activity.day);
        assert_eq!((hour.stretches.len(), day.stretches.len()), (HOUR, 48));
        assert_eq!(day.width, SignedDuration::from_mins(30));
        assert_eq!(hour.begin, "1970-01-01T23:00:00Z".parse().unwrap());
        let stretch = |succeeded, failed, waiting| Stretch {
            succeeded,
            failed,
            waiting,
        };
        assert_eq!(day.stretches[0], stretch(3, 0, 1));
        assert_eq!(day.stretches[47], stretch(1, 2, 2));
        assert_eq!(hour.stretches[0], stretch(0, 0, 1));
        let ended = [
            (Outcome::Succeeded, 1),
            (Outcome::Failed, 2),
            (Outcome::Cancelled, 1),
        ];
        let mut expected = ended.to_vec();
        expected.sort_by_key(|(outcome, _)| Outcome::ALL.iter().position(|one| one == outcome));
        assert_eq!(activity.ended, expected);
    }

    #[test]
    fn nothing_is_a_flat_line() {
        let activity = Activity::new(Timestamp::UNIX_EPOCH, &[(3, Counted::Waiting(-1))]);
        assert!(activity.day.stretches.iter().all(|one| one.waiting == 0));
        assert!(activity.ended.is_empty());
    }

    #[test]
    fn sizes_are_short() {
        let rooms = [0, 9_000, 10_239, 10_240, 50 << 20, 1 << 62].map(room);
        let expected = [
            "0 bytes",
            "9000 bytes",
            "10239 bytes",
            "10 KiB",
            "50 MiB",
            "4194304 TiB",
        ];
        assert_eq!(rooms, expected);
    }
}
