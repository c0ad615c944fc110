//! How long jobs will probably wait and run, from how long others of their workflow ran. Pure.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use serde::Serialize;

/// With fewer runs there is no estimate.
pub const MIN_RUNS: usize = 5;
/// How many of the last runs count.
pub const MAX_RUNS: i64 = 100;

/// How long the last successful runs of a workflow took.
#[derive(Debug, Clone, PartialEq)]
pub struct Runs(Vec<Duration>);

/// The median and the 90th percentile.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Span {
    #[serde(rename = "median_seconds", serialize_with = "seconds")]
    pub median: Duration,
    #[serde(rename = "p90_seconds", serialize_with = "seconds")]
    pub p90: Duration,
}

fn seconds<S: serde::Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}

impl Runs {
    /// None if there are too few runs.
    pub fn new(mut runs: Vec<Duration>) -> Option<Runs> {
        runs.sort_unstable();
        (runs.len() >= MIN_RUNS).then_some(Runs(runs))
    }

    pub fn span(&self) -> Span {
        Span {
            median: quantile(&self.0, 50),
            p90: quantile(&self.0, 90),
        }
    }

    /// The remaining time of a job that has been running for this long: from those runs that took
    /// longer. None if none did.
    pub fn remaining(&self, elapsed: Duration) -> Option<Span> {
        let longer = self.0.partition_point(|run| *run <= elapsed);
        let longer = &self.0[longer..];
        (!longer.is_empty()).then(|| Span {
            median: quantile(longer, 50).saturating_sub(elapsed),
            p90: quantile(longer, 90).saturating_sub(elapsed),
        })
    }

    /// How long the first `waiting` jobs of a queue wait, in the order in which so many processes take
    /// them, some of which compute something for the times in `left`. What runs longer than all before it
    /// (None) may end at any time, or not for hours: nobody counts on its process. None where there is no
    /// other.
    pub fn waits(
        &self,
        processes: usize,
        left: &[Option<Span>],
        waiting: usize,
    ) -> Option<Vec<Span>> {
        let known: Vec<_> = left.iter().copied().flatten().collect();
        // More may be running than there are processes now, such as jobs of a worker that died.
        let overdue = (left.len() - known.len()).min(processes.saturating_sub(known.len()));
        let processes = processes - overdue;
        if processes == 0 {
            return None;
        }
        let medians = self.starts(processes, &known, waiting, |span| span.median);
        let p90s = self.starts(processes, &known, waiting, |span| span.p90);
        let both = medians.into_iter().zip(p90s);
        Some(both.map(|(median, p90)| Span { median, p90 }).collect())
    }

    fn starts(
        &self,
        processes: usize,
        left: &[Span],
        waiting: usize,
        of: impl Fn(Span) -> Duration,
    ) -> Vec<Duration> {
        let each = of(self.span());
        let mut busy: Vec<Duration> = left.iter().copied().map(&of).collect();
        busy.sort_unstable();
        busy.truncate(processes);
        busy.resize(processes, Duration::ZERO);
        let mut free: BinaryHeap<Reverse<Duration>> = busy.into_iter().map(Reverse).collect();
        let mut starts = Vec::with_capacity(waiting);
        while starts.len() < waiting
            && let Some(Reverse(start)) = free.pop()
        {
            starts.push(start);
            free.push(Reverse(start.saturating_add(each)));
        }
        starts
    }
}

/// The nearest-rank percentile of times in ascending order, of which there is at least one.
fn quantile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() * percent).div_ceil(100) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn secs(seconds: &[u64]) -> Vec<Duration> {
        seconds.iter().copied().map(Duration::from_secs).collect()
    }

    fn runs() -> Runs {
        Runs::new(secs(&[50, 10, 20, 40, 30, 60, 70, 80, 90, 100, 110])).unwrap()
    }

    #[test]
    fn too_few_runs_say_nothing() {
        assert_eq!(Runs::new(secs(&[1, 2, 3, 4])), None);
        assert!(Runs::new(secs(&[1, 2, 3, 4, 5])).is_some());
    }

    #[rstest]
    #[case::at_the_start(0, Some((60, 100)))]
    #[case::halfway(65, Some((25, 45)))]
    #[case::late(105, Some((5, 5)))]
    #[case::later_than_all(110, None)]
    fn what_is_left_is_as_for_runs_that_took_longer(
        #[case] elapsed: u64,
        #[case] left: Option<(u64, u64)>,
    ) {
        let left = left.map(|(median, p90)| Span {
            median: Duration::from_secs(median),
            p90: Duration::from_secs(p90),
        });
        assert_eq!(runs().remaining(Duration::from_secs(elapsed)), left);
    }

    #[rstest]
    #[case::idle_workers(2, &[], &[0, 0, 60, 60])]
    #[case::one_is_busy(2, &[50], &[0, 30, 60, 90])]
    #[case::all_are_busy(1, &[0], &[60, 120])]
    #[case::more_run_than_there_are_workers(1, &[0, 50], &[30, 90])]
    #[case::one_of_two_is_overdue(2, &[200, 50], &[30, 90])]
    #[case::one_is_overdue_and_one_idle(2, &[200], &[0, 60])]
    #[case::of_a_worker_that_died_one_is_overdue(1, &[200, 50], &[30, 90])]
    fn a_job_waits_for_those_before_it(
        #[case] workers: usize,
        #[case] running: &[u64],
        #[case] medians: &[u64],
    ) {
        let left = secs(running)
            .into_iter()
            .map(|elapsed| runs().remaining(elapsed));
        let waits = runs().waits(workers, &Vec::from_iter(left), medians.len());
        let waits: Vec<_> = waits.unwrap().iter().map(|wait| wait.median).collect();
        assert_eq!(waits, secs(medians));
    }

    #[rstest]
    #[case(&[7], 7, 7)]
    #[case(&[1, 2], 1, 2)]
    #[case(&[1, 2, 3], 2, 3)]
    #[case(&[1, 2, 3, 4, 5], 3, 5)]
    #[case(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 5, 9)]
    fn so_many_in_a_hundred_stay_within(
        #[case] times: &[u64],
        #[case] half: u64,
        #[case] nine_of_ten: u64,
    ) {
        let [half, nine_of_ten] = [half, nine_of_ten].map(Duration::from_secs);
        assert_eq!(quantile(&secs(times), 50), half);
        assert_eq!(quantile(&secs(times), 90), nine_of_ten);
    }

    #[test]
    fn behind_what_is_overdue_nobody_knows() {
        assert_eq!(runs().waits(1, &[None], 3), None);
        assert_eq!(runs().waits(2, &[None, None, None], 3), None);
    }

    #[test]
    fn without_workers_nobody_knows() {
        assert_eq!(runs().waits(0, &[], 3), None);
    }
}
