//! What was done to each job and what its client heard: whether the one goes with the other.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Instant;

use omotes_orchestrator::domain::job::{CRASH_LOOP_LOGS, LOST_LOGS};
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
    /// Two steps, of which both succeed.
    Steps,
    /// The same, and its client changes its mind.
    StepsCancelled,
    /// Two steps, of which the first fails.
    FirstStepFails,
    SecondStepFails,
}

impl Plan {
    /// Whether nothing but its tasks ends it.
    pub fn runs_to_its_end(self) -> bool {
        match self {
            Plan::Plain
            | Plan::Fails
            | Plan::Steps
            | Plan::FirstStepFails
            | Plan::SecondStepFails => true,
            Plan::Cancelled
            | Plan::StepsCancelled
            | Plan::TooSlow
            | Plan::Crashes
            | Plan::UnknownWorkflow => false,
        }
    }

    pub fn has_steps(self) -> bool {
        match self {
            Plan::Steps | Plan::StepsCancelled | Plan::FirstStepFails | Plan::SecondStepFails => {
                true
            }
            Plan::Plain
            | Plan::Fails
            | Plan::Cancelled
            | Plan::TooSlow
            | Plan::Crashes
            | Plan::UnknownWorkflow => false,
        }
    }
}

#[derive(Debug)]
pub struct Record {
    /// Since when its client has been at it.
    pub begun: Instant,
    /// When its client was through with it.
    pub over: Option<Instant>,
    /// Each result that came, in their order.
    pub results: Vec<(ResultType, String)>,
    /// How often each of its tasks was started.
    pub starts: BTreeMap<String, u32>,
    /// Workers have delivered these, and the broker has confirmed them.
    pub delivered: Vec<ResultType>,
    /// What the workers of its first step have put out.
    pub outputs: BTreeSet<String>,
    /// What its second step has been given.
    pub inputs: BTreeSet<String>,
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
    pub fn new(begun: Instant) -> Record {
        Record {
            begun,
            over: None,
            results: Vec::new(),
            starts: BTreeMap::new(),
            delivered: Vec::new(),
            outputs: BTreeSet::new(),
            inputs: BTreeSet::new(),
            queue_lost: false,
        }
    }

    /// Its client has got a result.
    pub fn hear(&mut self, result_type: ResultType, logs: String, now: Instant) {
        self.over.get_or_insert(now);
        self.results.push((result_type, logs));
    }

    /// RabbitMQ does not know the queue of the result.
    pub fn lose_queue(&mut self, now: Instant) {
        self.over.get_or_insert(now);
        self.queue_lost = true;
    }

    /// Whether RabbitMQ itself was killed while it lived. Nothing else makes RabbitMQ lose anything.
    fn lived_through(&self, kills: &[Range<Instant>]) -> bool {
        kills
            .iter()
            .any(|kill| self.begun < kill.end && self.over.is_none_or(|over| kill.start < over))
    }

    /// How often a result was told once more.
    pub fn duplicates(&self) -> usize {
        self.results.len().saturating_sub(1)
    }

    /// Whether the result got lost in RabbitMQ, and its client was told so.
    pub fn result_lost(&self) -> bool {
        let worked = !self.delivered.is_empty() || self.crashed();
        let first = self.results.first();
        worked
            && first
                .is_some_and(|(kind, logs)| *kind == ResultType::Error && logs.ends_with(LOST_LOGS))
    }

    /// Whether a task was started twice, as a broker that is killed gives its tasks out again,
    /// whatever the plan.
    fn crashed(&self) -> bool {
        self.starts.values().any(|starts| *starts > 1)
    }

    /// Holds what its client heard against what was done to it. `kills` are RabbitMQ's, each from its
    /// end until it was there again.
    ///
    /// # Errors
    /// What does not go together.
    pub fn check(&self, plan: Plan, kills: &[Range<Instant>]) -> Result<(), Violation> {
        // Byte for byte, and no step after one that has failed.
        if let Some(input) = self.inputs.difference(&self.outputs).next() {
            let what = format!("the second step was given {input}: {self:?}");
            return Err(Violation::Impossible(what));
        }
        let broker_died = self.lived_through(kills);
        let Some((result_type, logs)) = self.results.first() else {
            if self.queue_lost && broker_died {
                return Ok(());
            }
            return Err(Violation::Lost);
        };
        if self.results.iter().any(|other| *other != self.results[0]) {
            return Err(Violation::Contradictory(format!("{:?}", self.results)));
        }
        if self.result_lost() && broker_died {
            return Ok(());
        }
        let may_crash = plan == Plan::Crashes || broker_died;
        let says_so = match plan.has_steps() {
            true => logs.contains(CRASH_LOOP_LOGS),
            false => logs == CRASH_LOOP_LOGS,
        };
        let crash_loop = says_so && self.crashed() && may_crash;
        let delivered = self.delivered.contains(result_type);
        let possible = match (plan, result_type) {
            (Plan::UnknownWorkflow, ResultType::Error) => logs.contains("is unknown by"),
            (Plan::UnknownWorkflow, _) => false,
            (Plan::Cancelled | Plan::StepsCancelled | Plan::TooSlow, ResultType::Cancelled) => true,
            (
                Plan::Plain
                | Plan::Cancelled
                | Plan::TooSlow
                | Plan::Crashes
                | Plan::Steps
                | Plan::StepsCancelled,
                ResultType::Succeeded,
            ) => delivered,
            (Plan::FirstStepFails, ResultType::Error) if !self.inputs.is_empty() => false,
            (Plan::Fails | Plan::FirstStepFails | Plan::SecondStepFails, ResultType::Error) => {
                delivered || crash_loop
            }
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
    use std::time::Duration;

    use super::*;

    fn record(results: &[ResultType], delivered: &[ResultType]) -> Record {
        let begun = Instant::now();
        Record {
            over: Some(begun + Duration::from_secs(10)),
            results: results.iter().map(|one| (*one, String::new())).collect(),
            delivered: delivered.to_vec(),
            ..Record::new(begun)
        }
    }

    /// A kill of RabbitMQ in these seconds of a job that lives from 0 to 10.
    fn kill(record: &Record, from: i64, to: i64) -> Range<Instant> {
        let at = |seconds: i64| {
            let far = Duration::from_secs(seconds.unsigned_abs());
            match seconds {
                ..0 => record.begun - far,
                0.. => record.begun + far,
            }
        };
        at(from)..at(to)
    }

    #[test]
    fn what_was_heard_must_go_with_what_was_done() {
        use ResultType::{Cancelled, Error, Succeeded};
        let check = |record: &Record, plan| record.check(plan, &[]);
        assert_eq!(check(&record(&[], &[]), Plan::Plain), Err(Violation::Lost));
        let told_twice = record(&[Succeeded, Succeeded], &[Succeeded]);
        assert_eq!(check(&told_twice, Plan::Plain), Ok(()));
        assert_eq!(told_twice.duplicates(), 1);
        let violated = |record: Record, plan| check(&record, plan).is_err();
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
        assert!(check(&looped, Plan::Crashes).is_err());
        looped.starts.insert("task".to_owned(), 2);
        assert_eq!(check(&looped, Plan::Crashes), Ok(()));
        // Only its own plan or RabbitMQ gives a task out again.
        assert!(check(&looped, Plan::Plain).is_err());
        assert_eq!(looped.check(Plan::Plain, &[kill(&looped, 1, 2)]), Ok(()));
    }

    /// Whether that a result or a queue was lost is put down to RabbitMQ, which was killed then.
    #[test]
    fn only_a_rabbitmq_that_was_killed_meanwhile_may_lose_something() {
        use ResultType::{Error, Succeeded};
        let mut result = record(&[Error], &[Succeeded]);
        result.results[0].1 = format!("The job succeeded, but its result {LOST_LOGS}");
        assert!(result.result_lost());
        let mut queue = record(&[], &[]);
        queue.lose_queue(queue.begun);
        for lost in [&result, &queue] {
            assert!(lost.check(Plan::Plain, &[]).is_err());
            for (from, to, excused) in [
                (-5, -1, false),
                (-5, 1, true),
                (3, 4, true),
                (9, 12, true),
                (-5, 12, true),
                (10, 12, false),
                (11, 12, false),
            ] {
                let other = kill(lost, -9, -8);
                let outcome = lost.check(Plan::Plain, &[other, kill(lost, from, to)]);
                assert_eq!(outcome.is_ok(), excused, "{from} to {to}: {outcome:?}");
            }
        }
        // Nor does a kill excuse the loss of what nobody had delivered.
        result.delivered.clear();
        let killed = [kill(&result, 3, 4)];
        assert!(result.check(Plan::Plain, &killed).is_err());
    }

    #[test]
    fn a_second_step_has_the_output_of_the_first() {
        let stepped = |plan, outputs: &[&str], inputs: &[&str], result| {
            let mut record = record(&[result], &[result]);
            record.outputs = outputs.iter().map(|one| (*one).to_owned()).collect();
            record.inputs = inputs.iter().map(|one| (*one).to_owned()).collect();
            record.check(plan, &[]).is_ok()
        };
        let (done, failed) = (ResultType::Succeeded, ResultType::Error);
        assert!(stepped(Plan::Steps, &["a", "b"], &["a"], done));
        assert!(!stepped(Plan::Steps, &["a"], &["a", "c"], done));
        assert!(!stepped(Plan::Steps, &["a"], &["a"], failed));
        assert!(stepped(Plan::FirstStepFails, &[], &[], failed));
        assert!(!stepped(Plan::FirstStepFails, &[], &["a"], failed));
        assert!(!stepped(Plan::FirstStepFails, &["a"], &["a"], failed));
        assert!(stepped(Plan::SecondStepFails, &["a"], &["a"], failed));
    }

    #[test]
    fn dead_letters_are_the_bad_messages() {
        let [sent, other] = [Uuid::from_u128(1), Uuid::from_u128(2)];
        let marks = BTreeSet::from([sent]);
        assert!(stray_letters(&marks, &[Some(sent), Some(sent)]).is_empty());
        assert_eq!(stray_letters(&marks, &[Some(other), None]).len(), 3);
    }
}
