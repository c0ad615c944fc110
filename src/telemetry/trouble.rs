//! The one root cause of what does not work, and what to do about it. Pure.
//!
//! Without Postgres there is no session with RabbitMQ, without a session nothing is published, and then
//! no message gets through: five parts that do not work are one thing to be done.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::health::{NOT_KNOWN, Part, PartView, STARTING};

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

/// By how much a fault may seem older than its cause, which is noticed when it is looked for.
const SLACK: SignedDuration = SignedDuration::from_secs(15);

/// What the fault of a handler has in it whose messages a queue does not take.
const TAKES_NOTHING: &str = "wait for it unacknowledged";

/// And of one that waits for an answer of Postgres.
const WAITS_FOR_POSTGRES: &str = "has been waiting for Postgres for";

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
    // What Postgres has refused is still refused when there has just been room for something else.
    let is_full = cause.part == Part::Handling && says_one_of(why, NO_ROOM);
    let faulty = parts.iter().filter(|part| part.why.is_some());
    let (follows, others) = faulty
        .filter(|part| part.part != cause.part)
        .cloned()
        .partition(|part| follows(cause, part));
    let (what, remedy) = match why == STARTING {
        true => (
            "The orchestrator is starting",
            "If this takes more than a few seconds, see its log.",
        ),
        false if is_full => of_postgres(why),
        false => says(cause.part, why),
    };
    Some(Trouble {
        cause: match is_full {
            true => Part::Postgres,
            false => cause.part,
        },
        what,
        since: cause.since,
        why: why.clone(),
        remedy,
        follows,
        others,
    })
}

/// Whether a part is at fault because of `cause`: it does not work without that, and did before.
fn follows(cause: &PartView, part: &PartView) -> bool {
    let why = part.why.as_deref().unwrap_or_default();
    let is_older = cause.since.duration_since(part.since) > SLACK;
    explains(cause.part, part.part) && (!is_older || why == STARTING || why.starts_with(NOT_KNOWN))
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
fn says(cause: Part, why: &str) -> (&'static str, &'static str) {
    match cause {
        Part::Postgres => of_postgres(why),
        Part::Revisions if why.starts_with(NOT_KNOWN) => (
            "The tables have not been looked at since Postgres answers again",
            "Nothing has to be done: they are within seconds.",
        ),
        Part::Revisions => (
            "The tables are not as this version needs them",
            "`omotes-orchestrator db current` says how they are; a restart upgrades them.",
        ),
        Part::Broker => (
            "There is no session with RabbitMQ",
            "As a rule RabbitMQ does not run, or cannot be reached from here: start it, or see what keeps \
             it away; `omotes-orchestrator doctor` says what is wrong. Workers go on with what they \
             have, and all goes on by itself.",
        ),
        Part::Publishing => (
            "RabbitMQ takes no messages",
            "`rabbitmq-diagnostics alarms` names what it lacks, memory or disk: free some.",
        ),
        Part::Handling if why.contains(TAKES_NOTHING) => (
            "Tasks wait, for a queue takes none",
            "See why RabbitMQ refuses what is for that queue: it may be full by a limit of its own, or \
             have lost the node that it is on. All goes on by itself.",
        ),
        Part::Handling if says_one_of(why, LOCKED) => (
            "Messages wait for a lock that somebody holds in Postgres",
            "`pg_locks` and `pg_stat_activity` say who: have it committed or rolled back, or end it with \
             `pg_terminate_backend`. All goes on by itself then.",
        ),
        Part::Handling if why.contains(WAITS_FOR_POSTGRES) => (
            "Messages wait for Postgres",
            "As a rule somebody holds a lock: `pg_locks` and `pg_stat_activity` say who; or its disk is slow. \
             All goes on by itself.",
        ),
        Part::Handling => (
            "Messages do not get through",
            "See what holds them up; if it lasts, restart this replica. Nothing is lost by that.",
        ),
    }
}

const FAULTY: &str = "Postgres does not do what is needed of it";
const FULL: &str = "Postgres has no room on its disk";

/// What the fault has in it, in lower case, of a Postgres in which somebody holds a lock.
const LOCKED: &[&str] = &["locked the tables", "lock timeout"];
/// And of one that has no room.
const NO_ROOM: &[&str] = &[
    "no space left",
    "could not extend",
    "could not write",
    "disk full",
];

fn says_one_of(why: &str, signs: &[&str]) -> bool {
    let why = why.to_lowercase();
    signs.iter().any(|sign| why.contains(sign))
}

/// What faults of Postgres have in them, in lower case, and what to do about those.
const REMEDIES: &[(&[&str], &str)] = &[
    (
        LOCKED,
        "Somebody holds a lock: `pg_locks` and `pg_stat_activity` say who. Messages wait in RabbitMQ \
         meanwhile, and all goes on by itself.",
    ),
    (
        NO_ROOM,
        "Give it room on its disk. Messages wait in RabbitMQ meanwhile, and all goes on by itself.",
    ),
    (
        &[
            "password",
            "pg_hba",
            "role \"",
            "permission denied",
            "database \"",
        ],
        "Hold POSTGRESQL_USERNAME, POSTGRESQL_PASSWORD and POSTGRESQL_DATABASE against what it has; \
         `omotes-orchestrator doctor` says what is wrong.",
    ),
    (
        &["too many c", "connection slots", "no more connections"],
        "Raise its `max_connections`, or see in `pg_stat_activity` who has them all.",
    ),
    (
        &["read-only", "standby", "takes no writes", "recovery mode"],
        "See why it takes no writes, or name the server that does in POSTGRESQL_HOST.",
    ),
];

/// What faults of a Postgres that is not there have in them, in lower case.
const ABSENT: &[&str] = &[
    "refused",
    "reset by peer",
    "broken pipe",
    "connection closed",
    "timed out",
    "no answer",
    "unreachable",
    "no route",
    "lookup",
    "resolve",
    "unexpected eof",
    "starting up",
    "shutting down",
    "administrator command",
    "postmaster exit",
    "crash of another server process",
];

/// What is wrong with Postgres, and what to do. Its own words may be in any language: for those that are
/// not understood there is what helps as a rule.
fn of_postgres(why: &str) -> (&'static str, &'static str) {
    let has = |signs: &[&str]| says_one_of(why, signs);
    if let Some((signs, remedy)) = REMEDIES.iter().find(|(signs, _)| has(signs)) {
        let what = match *signs == NO_ROOM {
            true => FULL,
            false => FAULTY,
        };
        return (what, remedy);
    }
    match has(ABSENT) {
        true => (
            "Postgres does not answer",
            "See that it runs, and can be reached from here; `omotes-orchestrator doctor` says what \
             is wrong. Messages wait in RabbitMQ meanwhile, and all goes on by itself.",
        ),
        false => (
            FAULTY,
            "What it says is below; `omotes-orchestrator doctor` says what is wrong. Messages wait in \
             RabbitMQ meanwhile, and all goes on by itself.",
        ),
    }
}

impl Trouble {
    /// In a clause, if no job can go on: a trouble of messages may be one of a single job.
    pub fn of_all_jobs(&self) -> Option<&'static str> {
        match self.cause {
            _ if self.why == STARTING => None,
            Part::Broker => Some("RabbitMQ does not answer"),
            Part::Publishing => Some("RabbitMQ takes no messages"),
            Part::Postgres if says_one_of(&self.why, NO_ROOM) => Some(FULL),
            Part::Postgres => Some(FAULTY),
            Part::Handling | Part::Revisions => None,
        }
    }

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

    /// The fault of handling that there is before, or after, the one of Postgres.
    #[rstest]
    #[case::older("held up", 0, false)]
    #[case::older_by_a_look("held up", 90, true)]
    #[case::younger("held up", 200, true)]
    #[case::not_known("not known without a session with RabbitMQ", 0, true)]
    #[case::starting(STARTING, 0, true)]
    fn what_was_there_before_does_not_follow(
        #[case] why: &str,
        #[case] since: i64,
        #[case] is_following: bool,
    ) {
        let mut parts = parts(&[Part::Postgres, Part::Handling]);
        parts[2].since = Timestamp::from_second(100).unwrap();
        parts[3].since = Timestamp::from_second(since).unwrap();
        parts[3].why = Some(why.to_owned());
        let trouble = trouble(&parts).unwrap();
        assert_eq!(trouble.cause, Part::Postgres);
        assert_eq!(trouble.follows.len(), usize::from(is_following));
        assert_eq!(trouble.others.len(), usize::from(!is_following));
    }

    #[rstest]
    #[case::killed(
        "error connecting to server: Connection refused (os error 111)",
        "does not answer",
        "it runs"
    )]
    #[case::silent("no answer for 21s", "does not answer", "it runs")]
    #[case::stopping(
        "FATAL: the database system is shutting down",
        "does not answer",
        "it runs"
    )]
    #[case::killed_meanwhile(
        "db error: FATAL: terminating connection due to unexpected postmaster exit",
        "does not answer",
        "it runs"
    )]
    #[case::crashed(
        "db error: WARNING: terminating connection because of crash of another server process",
        "does not answer",
        "it runs"
    )]
    #[case::password(
        "FATAL: password authentication failed for user \"omotes\"",
        "does not do",
        "PASSWORD"
    )]
    #[case::connections(
        "FATAL: sorry, too many clients already",
        "does not do",
        "max_connections"
    )]
    #[case::slots(
        "FATAL: remaining connection slots are reserved",
        "does not do",
        "max_connections"
    )]
    #[case::read_only(
        "db/omotes is read-only: default_transaction_read_only is on",
        "does not do",
        "_HOST"
    )]
    #[case::standby("db/omotes is a standby and takes no writes", "does not do", "_HOST")]
    #[case::full(
        "could not extend file \"base/1\": No space left on device",
        "has no room",
        "room"
    )]
    #[case::locked(
        "somebody has locked the tables: lock timeout",
        "does not do",
        "pg_locks"
    )]
    #[case::foreign("FATAL: etwas anderes", "does not do", "below")]
    fn what_to_do_is_by_the_fault(#[case] why: &str, #[case] what: &str, #[case] remedy: &str) {
        let mut parts = parts(&[Part::Postgres]);
        parts[2].why = Some(why.to_owned());
        let trouble = trouble(&parts).unwrap();
        assert!(
            trouble.what.starts_with(&format!("Postgres {what}")),
            "{}",
            trouble.what
        );
        assert!(trouble.remedy.contains(remedy), "{}", trouble.remedy);
    }

    /// After an outage of Postgres they are looked at a little later than it is.
    #[test]
    fn tables_of_which_nothing_is_known_need_no_remedy() {
        let mut parts = parts(&[Part::Revisions]);
        parts[4].why = Some("not known while Postgres does not answer".to_owned());
        let trouble = trouble(&parts).unwrap();
        assert_eq!(trouble.cause, Part::Revisions);
        assert_eq!(
            trouble.what,
            "The tables have not been looked at since Postgres answers again"
        );
        assert!(
            trouble.remedy.starts_with("Nothing has to be done"),
            "{}",
            trouble.remedy
        );
    }

    #[test]
    fn nothing_is_wrong_with_what_works_or_starts() {
        assert_eq!(trouble(&parts(&[])), None);
        let mut starting = parts(&[Part::Postgres]);
        starting[2].why = Some(STARTING.to_owned());
        let trouble = trouble(&starting).unwrap();
        assert_eq!(trouble.what, "The orchestrator is starting");
    }

    /// Between two attempts at what it has refused, Postgres may look well.
    #[test]
    fn a_full_disk_leads_while_a_message_waits_for_room() {
        let mut parts = parts(&[Part::Handling]);
        parts[3].why = Some("could not extend file \"base/1\": No space left on device".to_owned());
        let trouble = trouble(&parts).unwrap();
        assert_eq!(trouble.cause, Part::Postgres);
        assert_eq!(trouble.what, "Postgres has no room on its disk");
        assert_eq!(trouble.of_all_jobs(), Some(trouble.what));
        assert!(
            trouble.remedy.starts_with("Give it room"),
            "{}",
            trouble.remedy
        );
    }

    #[test]
    fn a_lock_in_postgres_is_named_as_what_messages_wait_for() {
        let mut parts = parts(&[Part::Handling]);
        for (why, what) in [
            ("canceling statement due to lock timeout", "a lock"),
            (
                "handler-2 has been waiting for Postgres for 15s",
                "wait for Postgres",
            ),
        ] {
            parts[3].why = Some(why.to_owned());
            let trouble = trouble(&parts).unwrap();
            assert_eq!(trouble.cause, Part::Handling);
            assert!(trouble.what.contains(what), "{}", trouble.what);
            assert!(trouble.remedy.contains("pg_locks"), "{}", trouble.remedy);
            assert_eq!(trouble.of_all_jobs(), None);
        }
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
