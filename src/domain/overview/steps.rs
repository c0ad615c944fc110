//! What operators see of a job's steps.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::domain::estimate::{MIN_RUNS, Runs, Span};
use crate::domain::job::{Attempt, Outcome};
use crate::domain::workflow::Steps;

/// Where a job that has not ended is among its steps.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepView {
    /// From 1.
    pub number: usize,
    /// Of the step with its fallbacks, from 1.
    pub attempt: usize,
    pub title: String,
    /// The Celery task, and its queue; of the fallback, when that is its turn.
    pub task: String,
    /// How long its task may run.
    pub timeout_ms: Option<i64>,
    /// When its task is put on its queue, if it has to wait for that.
    pub due_at: Option<Timestamp>,
    /// When it was put on its queue; None while it waits to be tried again.
    pub submitted_at: Option<Timestamp>,
    /// When a worker first started it; None while it waits.
    pub started_at: Option<Timestamp>,
    /// The share of each step in the job's progress; all of them together are 1.
    pub shares: Vec<f64>,
}

impl StepView {
    /// `step 2 of 3, Simulate`, where there are several.
    pub fn name(&self) -> String {
        let count = self.shares.len();
        match count {
            1 => self.title.clone(),
            _ => format!("step {} of {count}, {}", self.number, self.title),
        }
    }

    /// What its job does.
    pub fn activity(&self) -> &'static str {
        match (self.submitted_at, self.started_at) {
            (_, Some(_)) => "running",
            (Some(_), None) => "waiting",
            (None, None) if self.attempt > 1 => "to be tried again",
            (None, None) => "waiting",
        }
    }

    /// How much of each step is done, with its share, at this progress of the whole.
    pub fn parts(&self, fraction: f64) -> Vec<(f64, f64)> {
        let mut before = 0.0;
        let mut parts = Vec::with_capacity(self.shares.len());
        for share in &self.shares {
            let done = (fraction - before) / share;
            // Of a share too small to be one it is not a number.
            let done = if done > 0.0 { done.min(1.0) } else { 0.0 };
            parts.push((*share, done));
            before += share;
        }
        parts
    }

    /// What is left of the job's run: of its step, and of those that follow, as the last runs of
    /// each took. None where that is not known; nothing in it where its step has been running for
    /// longer than all before it.
    pub fn left(&self, runs: &BTreeMap<usize, Runs>, now: Timestamp) -> Option<Option<Span>> {
        let own = runs.get(&self.number)?;
        let own = match self.started_at.map(|at| now.duration_since(at)) {
            Some(elapsed) => own.remaining(Duration::try_from(elapsed).unwrap_or_default()),
            None => Some(own.span()),
        };
        let following = self.number + 1..=self.shares.len();
        let following: Option<Vec<_>> = following
            .map(|number| runs.get(&number).map(Runs::span))
            .collect();
        let following = following?;
        Some(own.map(|own| {
            following.iter().fold(own, |sum, next| Span {
                median: sum.median.saturating_add(next.median),
                p90: sum.p90.saturating_add(next.p90),
            })
        }))
    }
}

impl StepView {
    /// Of how many runs what is left of the job would be known, if there were enough.
    pub(super) fn too_few(&self, counts: &BTreeMap<usize, usize>) -> Option<usize> {
        let steps = self.number..=self.shares.len();
        let fewest = steps.map(|number| counts.get(&number).copied().unwrap_or(0));
        fewest.min().filter(|count| *count < MIN_RUNS)
    }
}

/// How a job's attempt at a step ended.
#[derive(Debug, Clone, PartialEq)]
pub struct StepEnd {
    /// The step's, from 1.
    pub number: usize,
    pub title: String,
    pub outcome: Outcome,
    /// How often its task was started.
    pub starts: i64,
    /// The line of its logs that says most.
    pub why: Option<String>,
}

/// The share of each step in the whole.
pub fn shares(steps: &Steps) -> Vec<f64> {
    (0..steps.count())
        .map(|number| steps.share_before(number + 1) - steps.share_before(number))
        .collect()
}

/// One task of a job of several steps.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttemptView {
    /// The step's, from 1.
    pub step: usize,
    /// From 1.
    pub attempt: usize,
    pub title: String,
    pub task: String,
    pub task_id: Option<String>,
    /// When it is its turn, if it had to wait for that.
    pub due_at: Option<Timestamp>,
    pub submitted_at: Option<Timestamp>,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    /// None while it has not ended.
    #[serde(serialize_with = "name")]
    pub outcome: Option<Outcome>,
    pub starts: Option<i32>,
    pub output_bytes: Option<i64>,
    /// The line of all of its logs that says most of why it failed.
    pub why: Option<String>,
    /// Their beginning, if they are long.
    pub logs: Option<String>,
}

fn name<S: serde::Serializer>(outcome: &Option<Outcome>, serializer: S) -> Result<S::Ok, S::Error> {
    outcome.map(Outcome::name).serialize(serializer)
}

impl AttemptView {
    /// Of a row: what the database has beside the attempt itself.
    pub fn new(attempt: Attempt, title: String, task: String) -> AttemptView {
        let Attempt {
            position,
            task_id,
            due_at,
            submitted_at,
            started_at,
            report,
        } = attempt;
        AttemptView {
            step: position.step + 1,
            attempt: position.attempt,
            title,
            task,
            task_id,
            due_at,
            submitted_at,
            started_at,
            finished_at: report.as_ref().map(|one| one.finished_at),
            outcome: report.as_ref().map(|one| one.outcome),
            starts: report.as_ref().map(|one| one.starts),
            output_bytes: report.as_ref().map(|one| one.output_bytes),
            why: report.as_ref().and_then(|one| one.why.clone()),
            logs: report.map(|one| one.logs).filter(|logs| !logs.is_empty()),
        }
    }

    /// How it ended, or what it does, as operators say it.
    pub fn state(&self) -> &'static str {
        match (self.outcome, self.started_at, self.submitted_at) {
            (Some(outcome), _, _) => outcome.in_words(),
            (None, Some(_), _) => "running",
            (None, None, Some(_)) => "waiting",
            (None, None, None) if self.attempt > 1 => "to be tried again",
            // As a rule it waits for its turn.
            (None, None, None) => "held",
        }
    }

    /// How long it was in its queue, so far or until it was taken.
    pub fn waited(&self, now: Timestamp) -> Option<SignedDuration> {
        let until = self.started_at.or(self.finished_at).unwrap_or(now);
        Some(until.duration_since(self.submitted_at?))
    }

    /// How long it ran, so far or until it ended.
    pub fn ran(&self, now: Timestamp) -> Option<SignedDuration> {
        let until = self.finished_at.unwrap_or(now);
        Some(until.duration_since(self.started_at?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::job::Position;
    use rstest::rstest;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn view(number: usize, started_at: Option<Timestamp>) -> StepView {
        StepView {
            number,
            attempt: 1,
            timeout_ms: None,
            due_at: None,
            title: "Simulate".to_owned(),
            task: "simulator".to_owned(),
            submitted_at: Some(at(0)),
            started_at,
            shares: vec![0.5, 0.25, 0.25],
        }
    }

    #[test]
    fn a_bar_is_cut_into_the_steps() {
        let parts = view(2, None).parts(0.625);
        assert_eq!(parts, [(0.5, 1.0), (0.25, 0.5), (0.25, 0.0)]);
        assert_eq!(view(2, None).name(), "step 2 of 3, Simulate");
        assert_eq!(view(2, None).activity(), "waiting");
    }

    #[rstest]
    #[case::never_begun(1, "waiting", "held")]
    #[case::begun_before(2, "to be tried again", "to be tried again")]
    fn what_has_no_task_yet_is_tried_again_only_if_it_was_tried(
        #[case] attempt: usize,
        #[case] activity: &str,
        #[case] state: &str,
    ) {
        let view = StepView {
            attempt,
            submitted_at: None,
            ..view(1, None)
        };
        assert_eq!(view.activity(), activity);
        let row = Attempt {
            position: Position {
                step: 0,
                fallback: 0,
                attempt,
            },
            task_id: None,
            due_at: None,
            submitted_at: None,
            started_at: None,
            report: None,
        };
        let row = AttemptView::new(row, "Simulate".to_owned(), "simulator".to_owned());
        assert_eq!(row.state(), state);
    }

    #[rstest]
    #[case::first_waits(1, None, Some(60))]
    #[case::second_runs(2, Some(5), Some(45))]
    #[case::last_runs(3, Some(5), Some(25))]
    #[case::longer_than_all_before(3, Some(100), None)]
    fn what_is_left_is_of_the_steps_that_are_left(
        #[case] number: usize,
        #[case] ran: Option<i64>,
        #[case] left: Option<u64>,
    ) {
        let runs = |seconds| Runs::new(vec![Duration::from_secs(seconds); 5]).unwrap();
        let runs = BTreeMap::from([(1, runs(10)), (2, runs(20)), (3, runs(30))]);
        let span = view(number, ran.map(|ran| at(1000 - ran))).left(&runs, at(1000));
        let span = span.expect("all of them have run before");
        assert_eq!(span.map(|span| span.median.as_secs()), left);
        assert_eq!(view(1, None).left(&BTreeMap::new(), at(0)), None);
    }
}
