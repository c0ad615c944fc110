//! What was done to each job and what its client heard: whether the one goes with the other.

use std::collections::{BTreeMap, BTreeSet};

use omotes_orchestrator::job::{CRASH_LOOP_LOGS, LOST_LOGS};
use omotes_orchestrator::wire::job_result::ResultType;
use uuid::Uuid;

/// What is going to happen to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Plan {
    Plain,
    /// Its worker reports an error.
    Fails,
    /// Its client changes its mind.
    Cancelled,
    /// Its task takes longer than its client allows.
    TooSlow,
    /// Its worker dies over it.
    Crashes,
    UnknownWorkflow,
}

#[derive(Debug, Default)]
pub struct Record {
    /// Each result that came, in their order.
    pub results: Vec<(ResultType, String)>,
    /// How often each of its tasks was started.
    pub starts: BTreeMap<String, u32>,
    /// Workers have delivered these, and the broker has confirmed them.
    pub delivered: Vec<ResultType>,
    /// RabbitMQ has forgotten the queue that the client had declared.
    pub queue_lost: bool,
}

/// What is wrong about a job.
#[derive(Debug, PartialEq, Eq)]
pub enum Violation {
    /// Its client waits for ever.
    Lost,
    /// Its client has heard different outcomes.
    Contradictory(String),
    /// Its client has heard what cannot be.
    Impossible(String),
}

impl Record {
    /// How often a result was told once more.
    pub fn duplicates(&self) -> usize {
        self.results.len().saturating_sub(1)
    }

    /// Whether the result got lost in RabbitMQ, and its client was told so.
    pub fn result_lost(&self) -> bool {
        let worked = !self.delivered.is_empty() || self.crashed();
        let told = self.results.first();
        worked
            && told
                .is_some_and(|(kind, logs)| *kind == ResultType::Error && logs.ends_with(LOST_LOGS))
    }

    /// Whether a task was started twice, as a broker that is killed gives its tasks out again,
    /// whatever the plan.
    fn crashed(&self) -> bool {
        self.starts.values().any(|starts| *starts > 1)
    }

    pub fn check(&self, plan: Plan) -> Result<(), Violation> {
        let Some((result_type, logs)) = self.results.first() else {
            if self.queue_lost {
                return Ok(());
            }
            return Err(Violation::Lost);
        };
        if self.results.iter().any(|other| *other != self.results[0]) {
            return Err(Violation::Contradictory(format!("{:?}", self.results)));
        }
        if self.result_lost() {
            return Ok(());
        }
        let crash_loop = logs == CRASH_LOOP_LOGS && self.crashed();
        let delivered = self.delivered.contains(result_type);
        let possible = match (plan, result_type) {
            (Plan::UnknownWorkflow, ResultType::Error) => logs.contains("is unknown by"),
            (Plan::UnknownWorkflow, _) => false,
            (Plan::Cancelled | Plan::TooSlow, ResultType::Cancelled) => true,
            (
                Plan::Plain | Plan::Cancelled | Plan::TooSlow | Plan::Crashes,
                ResultType::Succeeded,
            ) => delivered,
            (Plan::Fails, ResultType::Error) => delivered || crash_loop,
            (_, ResultType::Error) => crash_loop,
            (_, ResultType::Succeeded | ResultType::Cancelled | ResultType::Timeout) => false,
        };
        if possible {
            Ok(())
        } else {
            Err(Violation::Impossible(format!("{plan:?}: {self:?}")))
        }
    }
}

/// Dead letters that do not go with the bad messages that were sent.
pub fn stray_letters(sent: &BTreeSet<Uuid>, found: &[Option<Uuid>]) -> Vec<String> {
    let found_marks: BTreeSet<_> = found.iter().flatten().copied().collect();
    let missing = sent
        .difference(&found_marks)
        .map(|mark| format!("the bad message {mark} is no dead letter"));
    let unknown = found
        .iter()
        .filter(|mark| mark.is_none_or(|mark| !sent.contains(&mark)))
        .map(|mark| format!("a dead letter that nobody sent: {mark:?}"));
    missing.chain(unknown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(results: &[ResultType], delivered: &[ResultType]) -> Record {
        Record {
            results: results.iter().map(|one| (*one, String::new())).collect(),
            starts: BTreeMap::new(),
            delivered: delivered.to_vec(),
            queue_lost: false,
        }
    }

    #[test]
    fn what_was_heard_must_go_with_what_was_done() {
        use ResultType::{Cancelled, Error, Succeeded};
        assert_eq!(record(&[], &[]).check(Plan::Plain), Err(Violation::Lost));
        let told_twice = record(&[Succeeded, Succeeded], &[Succeeded]);
        assert_eq!(told_twice.check(Plan::Plain), Ok(()));
        assert_eq!(told_twice.duplicates(), 1);
        let violated = |record: Record, plan| record.check(plan).is_err();
        assert!(violated(
            record(&[Succeeded, Cancelled], &[Succeeded]),
            Plan::Cancelled
        ));
        let mut otherwise = record(&[Error, Error], &[Error]);
        otherwise.results[1].1 = CRASH_LOOP_LOGS.to_owned();
        assert!(violated(otherwise, Plan::Fails));
        assert!(violated(record(&[Succeeded], &[]), Plan::Plain));
        assert!(violated(record(&[Cancelled], &[]), Plan::Plain));
        assert!(violated(record(&[Error], &[]), Plan::Crashes));
        let mut looped = record(&[Error], &[]);
        looped.results[0].1 = CRASH_LOOP_LOGS.to_owned();
        looped.starts.insert("task".to_owned(), 1);
        assert!(looped.check(Plan::Crashes).is_err());
        looped.starts.insert("task".to_owned(), 2);
        assert_eq!(looped.check(Plan::Crashes), Ok(()));
        let mut lost = record(&[Error], &[]);
        lost.results[0].1 = format!("The job succeeded, but its result {LOST_LOGS}");
        assert!(lost.check(Plan::Plain).is_err());
        lost.delivered.push(Succeeded);
        assert_eq!(lost.check(Plan::Plain), Ok(()));
        assert!(lost.result_lost());
    }

    #[test]
    fn dead_letters_are_the_bad_messages() {
        let [sent, other] = [Uuid::from_u128(1), Uuid::from_u128(2)];
        let marks = BTreeSet::from([sent]);
        assert!(stray_letters(&marks, &[Some(sent), Some(sent)]).is_empty());
        assert_eq!(stray_letters(&marks, &[Some(other), None]).len(), 3);
    }
}
