//! The one root cause of what does not work, and what to do about it. Pure.
//!
//! Without Postgres there is no session with RabbitMQ, without a session nothing is published, and then
//! no message gets through: five parts that do not work are one thing to be done.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::health::{Part, PartView, STARTING};

/// What does not work, by its cause.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    pub cause: Part,
    pub what: &'static str,
    pub since: Timestamp,
    /// What was seen of it.
    pub why: String,
    /// What to do.
    pub remedy: &'static str,
    /// The parts that do not work, or of which nothing is known, because of it.
    pub follows: Vec<PartView>,
    /// Those that have another cause.
    pub others: Vec<PartView>,
}

/// Causes before what may follow from them.
const RANKS: [Part; 5] = [
    Part::Postgres,
    Part::Revisions,
    Part::Broker,
    Part::Publishing,
    Part::Handling,
];

/// The trouble that all parts are in, taken together, if any is.
pub fn trouble(parts: &[PartView]) -> Option<Trouble> {
    let fault = |rank: &Part| {
        let mut parts = parts.iter();
        parts.find_map(|part| Some((part, part.why.as_ref().filter(|_| part.part == *rank)?)))
    };
    let (cause, why) = RANKS.iter().find_map(fault)?;
    let faulty = parts.iter().filter(|part| part.why.is_some());
    let (follows, others) = faulty
        .filter(|part| part.part != cause.part)
        .cloned()
        .partition(|part| explains(cause.part, part.part));
    let (what, remedy) = match why == STARTING {
        true => (
            "The orchestrator is starting",
            "If this takes more than a few seconds, see its log.",
        ),
        false => says(cause.part),
    };
    Some(Trouble {
        cause: cause.part,
        what,
        since: cause.since,
        why: why.clone(),
        remedy,
        follows,
        others,
    })
}

/// Whether a part does not work without another.
fn explains(cause: Part, part: Part) -> bool {
    match (cause, part) {
        (Part::Postgres, Part::Broker | Part::Publishing | Part::Handling | Part::Revisions)
        | (Part::Revisions, Part::Broker | Part::Publishing | Part::Handling)
        | (Part::Broker, Part::Publishing | Part::Handling)
        | (Part::Publishing, Part::Handling) => true,
        (Part::Postgres, Part::Postgres)
        | (Part::Revisions, Part::Revisions | Part::Postgres)
        | (Part::Broker, Part::Broker | Part::Postgres | Part::Revisions)
        | (Part::Publishing, Part::Publishing | Part::Broker | Part::Postgres | Part::Revisions)
        | (Part::Handling, _) => false,
    }
}

/// What is wrong, and what to do.
fn says(cause: Part) -> (&'static str, &'static str) {
    match cause {
        Part::Postgres => (
            "Postgres does not answer",
            "See that it runs, and can be reached from here; `omotes-orchestrator doctor` says what \
             is wrong. Messages wait in RabbitMQ meanwhile, and all goes on by itself.",
        ),
        Part::Revisions => (
            "The tables are not as this version needs them",
            "`omotes-orchestrator db current` says how they are; a restart upgrades them.",
        ),
        Part::Broker => (
            "There is no session with RabbitMQ",
            "What was seen of it is below. As a rule RabbitMQ does not run, or cannot be reached from \
             here; `omotes-orchestrator doctor` says what is wrong. Workers go on with what they \
             have, and all goes on by itself.",
        ),
        Part::Publishing => (
            "RabbitMQ takes no messages",
            "`rabbitmq-diagnostics alarms` names what it lacks, memory or disk: free some.",
        ),
        Part::Handling => (
            "Messages do not get through",
            "See what holds them up; if it lasts, restart this replica. Nothing is lost by that.",
        ),
    }
}

impl Trouble {
    /// For the API.
    pub fn json(&self) -> Value {
        let names =
            |parts: &[PartView]| -> Vec<_> { parts.iter().map(|part| part.part.name()).collect() };
        json!({
            "cause": self.cause.name(),
            "what": self.what,
            "since": self.since.to_string(),
            "why": self.why,
            "remedy": self.remedy,
            "follows": names(&self.follows),
            "others": names(&self.others),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    /// Parts in the order in which the page has them, of which these do not work.
    fn parts(faulty: &[Part]) -> Vec<PartView> {
        let all = [
            Part::Broker,
            Part::Publishing,
            Part::Postgres,
            Part::Handling,
            Part::Revisions,
        ];
        let view = |(second, part): (i64, Part)| PartView {
            part,
            why: faulty
                .contains(&part)
                .then(|| format!("{} is down", part.name())),
            since: Timestamp::from_second(second).unwrap(),
        };
        (0..).zip(all).map(view).collect()
    }

    #[rstest]
    #[case::all(
        &[Part::Broker, Part::Publishing, Part::Postgres, Part::Handling, Part::Revisions],
        Part::Postgres, &[Part::Broker, Part::Publishing, Part::Handling, Part::Revisions], &[])]
    #[case::postgres_alone(&[Part::Postgres], Part::Postgres, &[], &[])]
    #[case::rabbitmq(
        &[Part::Broker, Part::Publishing, Part::Handling],
        Part::Broker, &[Part::Publishing, Part::Handling], &[])]
    #[case::alarm(
        &[Part::Publishing, Part::Handling], Part::Publishing, &[Part::Handling], &[])]
    #[case::handling(&[Part::Handling], Part::Handling, &[], &[])]
    #[case::revisions(
        &[Part::Handling, Part::Revisions], Part::Revisions, &[Part::Handling], &[])]
    fn one_cause_leads(
        #[case] faulty: &[Part],
        #[case] cause: Part,
        #[case] follows: &[Part],
        #[case] others: &[Part],
    ) {
        let trouble = trouble(&parts(faulty)).unwrap();
        let names = |parts: &[PartView]| parts.iter().map(|one| one.part).collect::<Vec<_>>();
        assert_eq!(trouble.cause, cause);
        assert_eq!(trouble.why, format!("{} is down", cause.name()));
        assert_eq!(names(&trouble.follows), follows);
        assert_eq!(names(&trouble.others), others);
    }

    #[test]
    fn nothing_is_wrong_with_what_works_or_starts() {
        assert_eq!(trouble(&parts(&[])), None);
        let mut starting = parts(&[Part::Postgres]);
        starting[2].why = Some(STARTING.to_owned());
        let trouble = trouble(&starting).unwrap();
        assert_eq!(trouble.what, "The orchestrator is starting");
    }

    /// What leads is never said to follow from what it leads.
    #[test]
    fn causes_go_before_what_follows() {
        for (place, cause) in RANKS.iter().enumerate() {
            for (other_place, other) in RANKS.iter().enumerate() {
                assert!(!explains(*cause, *other) || place < other_place);
            }
        }
    }
}
