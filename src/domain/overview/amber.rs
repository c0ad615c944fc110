//! Jobs that somebody should look at though nothing has failed. Pure.

use jiff::{SignedDuration, Timestamp};

use super::{Concern, JobState, JobView};
use crate::domain::job::JobStatus;
use crate::domain::text::counted;

/// A worker that computes says something now and then; one that has not for so long is looked at.
const SILENCE: SignedDuration = SignedDuration::from_mins(10);

/// How many jobs of one kind are named.
const NAMED: usize = 3;

/// What somebody should look at though nothing has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amber {
    /// It runs for longer than all of its workflow before it.
    Overdue,
    /// Its worker has said nothing for long.
    Silent,
    /// What the workers say.
    Of(Concern),
}

impl Amber {
    pub fn of(job: &JobView, now: Timestamp) -> Option<Amber> {
        if let Some(concern) = job.concern {
            return Some(Amber::Of(concern));
        }
        if job.state != JobState::Live(JobStatus::Running) {
            return None;
        }
        let began = match &job.step {
            Some(step) => step.started_at?,
            None => job.running_at?,
        };
        let last_word = job
            .progress
            .as_ref()
            .map_or(began, |said| said.at.max(began));
        if now.duration_since(last_word) > SILENCE {
            return Some(Amber::Silent);
        }
        let estimate = job.estimate?;
        estimate.run.is_none().then_some(Amber::Overdue)
    }

    /// As its job is called for it.
    pub fn word(self) -> &'static str {
        match self {
            Amber::Overdue => "overdue",
            Amber::Silent => "silent",
            Amber::Of(Concern::WorkerSilent) => "worker silent",
            Amber::Of(Concern::TaskLost) => "lost",
        }
    }

    /// Of the job, or of several.
    fn meanings(self, jobs: usize) -> &'static str {
        match (self, jobs) {
            (_, ..=1) => self.meaning(),
            (Amber::Overdue, _) => "They run for longer than all of their workflows before them.",
            (Amber::Silent, _) => {
                "Their workers have reported no progress for more than ten minutes."
            }
            (Amber::Of(_), _) => self.meaning(),
        }
    }

    pub fn meaning(self) -> &'static str {
        match self {
            Amber::Overdue => "It runs for longer than all of its workflow before it.",
            Amber::Silent => "Its worker has reported no progress for more than ten minutes.",
            Amber::Of(Concern::WorkerSilent) => {
                "Its worker does not answer, though it is connected to RabbitMQ."
            }
            Amber::Of(Concern::TaskLost) => "No worker has its task, and it is in no queue.",
        }
    }
}

/// All jobs that are so for the same reason.
#[derive(Debug)]
pub struct Ambers<'j> {
    pub amber: Amber,
    jobs: Vec<&'j JobView>,
}

impl<'j> Ambers<'j> {
    /// Those that are overdue or silent, by that: of others the workers' own matters tell.
    pub fn among(jobs: &'j [JobView], now: Timestamp) -> Vec<Ambers<'j>> {
        let mut kinds: Vec<Ambers<'_>> = Vec::new();
        for job in jobs {
            let amber = match Amber::of(job, now) {
                Some(amber @ (Amber::Overdue | Amber::Silent)) => amber,
                Some(Amber::Of(_)) | None => continue,
            };
            match kinds.iter_mut().find(|kind| kind.amber == amber) {
                Some(kind) => kind.jobs.push(job),
                None => kinds.push(Ambers {
                    amber,
                    jobs: vec![job],
                }),
            }
        }
        kinds
    }

    /// `1 job is`, `2 jobs are`.
    pub fn subject(&self) -> String {
        let count = self.jobs.len();
        let is = if count == 1 { "is" } else { "are" };
        format!("{} {is}", counted(count, "job"))
    }

    /// The first ones, and how many more there are.
    pub fn named(&self) -> (&[&'j JobView], usize) {
        let (first, more) = self.jobs.split_at(NAMED.min(self.jobs.len()));
        (first, more.len())
    }

    /// `They run for longer than all of their workflows before them.`
    pub fn meaning(&self) -> &'static str {
        self.amber.meanings(self.jobs.len())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use uuid::Uuid;

    use super::*;
    use crate::domain::estimate::Span;
    use crate::domain::job::Progress;
    use crate::domain::overview::Estimate;
    use crate::domain::overview::tests::waiting;

    const NOW: i64 = 10_000;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// One that has run for an hour, said something a minute ago, and is to run for a minute more.
    fn running() -> JobView {
        let minute = SignedDuration::from_mins(1).unsigned_abs();
        let left = Span {
            median: minute,
            p90: minute,
        };
        JobView {
            state: JobState::Live(JobStatus::Running),
            running_at: Some(at(NOW - 3600)),
            progress: Some(Progress {
                fraction: 0.5,
                message: String::new(),
                at: at(NOW - 60),
            }),
            estimate: Some(Estimate {
                wait: None,
                run: Some(left),
            }),
            ..waiting(0)
        }
    }

    fn change(change: impl FnOnce(&mut JobView)) -> JobView {
        let mut job = running();
        change(&mut job);
        job
    }

    fn overdue() -> JobView {
        change(|job| {
            job.estimate = Some(Estimate {
                wait: None,
                run: None,
            });
        })
    }

    #[rstest]
    #[case::it_runs_as_ever(running(), None)]
    #[case::longer_than_all_before(overdue(), Some("overdue"))]
    #[case::without_estimate(change(|job| job.estimate = None), None)]
    #[case::silent(change(|job| job.progress = None), Some("silent"))]
    #[case::silent_and_overdue(JobView { progress: None, ..overdue() }, Some("silent"))]
    #[case::began_just_now(
        change(|job| (job.progress, job.running_at) = (None, Some(at(NOW - 600)))), None)]
    #[case::what_workers_say_goes_first(
        change(|job| job.concern = Some(Concern::TaskLost)), Some("lost"))]
    #[case::it_waits(waiting(1), None)]
    fn what_somebody_should_look_at(#[case] job: JobView, #[case] expected: Option<&str>) {
        assert_eq!(Amber::of(&job, at(NOW)).map(Amber::word), expected);
    }

    #[test]
    fn jobs_are_told_together_and_the_first_by_name() {
        let silent = change(|job| job.progress = None);
        let lost = change(|job| job.concern = Some(Concern::TaskLost));
        let mut jobs = vec![overdue(), silent, lost];
        jobs.extend((1..=4).map(|number| JobView {
            id: Uuid::from_u128(number),
            ..overdue()
        }));
        let kinds = Ambers::among(&jobs, at(NOW));
        let told = kinds.iter().map(|one| {
            let (first, more) = one.named();
            format!(
                "{} {}, {} and {more}: {}",
                one.subject(),
                one.amber.word(),
                first.len(),
                one.meaning()
            )
        });
        assert_eq!(
            told.collect::<Vec<_>>(),
            [
                "5 jobs are overdue, 3 and 2: They run for longer than all of their workflows before them.",
                "1 job is silent, 1 and 0: Its worker has reported no progress for more than ten minutes.",
            ]
        );
    }
}
