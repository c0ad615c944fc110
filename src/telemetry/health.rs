//! The state of each part of the service, for `/health/ready`.

use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

/// What the service needs to be ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The session with its connections to RabbitMQ.
    Broker,
    /// Whether RabbitMQ takes messages: an alarm blocks its publishers.
    Publishing,
    Postgres,
    /// Whether messages get through, or one of the handlers is held up.
    Handling,
    /// Whether the tables are at this program's revision.
    Revisions,
}

impl Part {
    const ALL: [Part; 5] = [
        Part::Broker,
        Part::Publishing,
        Part::Postgres,
        Part::Handling,
        Part::Revisions,
    ];

    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Part::Broker => "broker",
            Part::Publishing => "publishing",
            Part::Postgres => "postgres",
            Part::Handling => "handling",
            Part::Revisions => "revisions",
        }
    }
}

/// Why a part does not work before it has been reported.
pub(super) const STARTING: &str = "starting";
/// What the fault of a part begins with that cannot be looked at while another does not work.
pub(super) const NOT_KNOWN: &str = "not known ";

/// How long the last news of Postgres stays valid; the probe asks far more often.
const MAX_SILENCE: SignedDuration = SignedDuration::from_secs(20);
/// How long a part that has refused work counts as faulty, whatever is seen from outside: a probe may
/// find room on a disk where a job's result finds none. Between two attempts at it is less.
const REFUSAL_LASTS: SignedDuration = SignedDuration::from_secs(20);

#[derive(Debug)]
struct Condition {
    /// Why the part does not work.
    fault: Option<String>,
    since: Timestamp,
    /// When this was last checked.
    checked: Timestamp,
    /// Whether the log has the cause of the fault in full.
    is_told: bool,
    /// When it last refused work that has not been done since.
    refused_at: Option<Timestamp>,
}

impl Condition {
    fn set(&mut self, fault: Option<String>, now: Timestamp) -> bool {
        let changed = self.fault.is_some() != fault.is_some();
        if changed {
            self.since = now;
        }
        self.is_told &= fault.is_some();
        if fault.is_none() {
            self.refused_at = None;
        }
        self.fault = fault;
        changed
    }
}

/// The state of a part, for display.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartView {
    pub part: Part,
    /// Why it does not work, if it does not.
    pub why: Option<String>,
    /// Since when it works, or does not.
    pub since: Timestamp,
}

/// The state of every part, shared between the threads that report it.
#[derive(Debug)]
pub struct Health(Mutex<[Condition; 5]>);

impl Health {
    /// Nothing is ready before it has been reported.
    pub fn starting(now: Timestamp) -> Health {
        Health(Mutex::new(Part::ALL.map(|_| Condition {
            fault: Some(STARTING.to_owned()),
            since: now,
            checked: now,
            is_told: false,
            refused_at: None,
        })))
    }

    /// Records that `part` works (None) or why it does not, as it was seen at `now`. Returns whether it
    /// has changed between the two.
    pub fn report(&self, part: Part, fault: Option<String>, now: Timestamp) -> bool {
        let condition = &mut self.lock()[part as usize];
        condition.checked = now;
        let refused = condition.refused_at;
        let refuses = refused.is_some_and(|at| now.duration_since(at) <= REFUSAL_LASTS);
        if refuses && fault.is_none() {
            return false;
        }
        condition.set(fault, now)
    }

    /// Records that `part` has refused work, and why. That counts for a while, or until
    /// [`Health::does_again`].
    pub fn refuses(&self, part: Part, fault: String, now: Timestamp) {
        let condition = &mut self.lock()[part as usize];
        condition.refused_at = Some(now);
        condition.set(Some(fault), now);
    }

    /// Records that `part` has done what it had refused.
    pub fn does_again(&self, part: Part, now: Timestamp) {
        self.lock()[part as usize].set(None, now);
    }

    /// Whether it is for the caller to tell the cause of this part's fault in full, with the stack
    /// trace: once until the part works again, whichever threads notice. It must have been reported.
    pub fn is_news(&self, part: Part) -> bool {
        let condition = &mut self.lock()[part as usize];
        let is_faulty = condition.fault.is_some();
        is_faulty && !mem::replace(&mut condition.is_told, true)
    }

    /// Whether everything works, and the answer of `/health/ready`.
    pub fn ready(&self, now: Timestamp) -> (bool, Value) {
        let (ready, parts) = self.parts(now);
        let parts = parts.into_iter().map(|part| {
            let mut value = json!({"ok": part.why.is_none(), "since": part.since.to_string()});
            if let Some(why) = part.why {
                value["why"] = why.into();
            }
            (part.part.name().to_owned(), value)
        });
        let parts: serde_json::Map<_, _> = parts.collect();
        (ready, json!({"ready": ready, "parts": parts}))
    }

    /// Whether everything works, and what is known of each part.
    pub fn parts(&self, now: Timestamp) -> (bool, Vec<PartView>) {
        let mut conditions = self.lock();
        for part in [Part::Postgres, Part::Revisions] {
            let condition = &mut conditions[part as usize];
            let silence = now.duration_since(condition.checked);
            // The probe is still waiting for an answer.
            if condition.fault.is_none() && silence > MAX_SILENCE {
                condition.fault = Some(format!(
                    "no answer for {:#}",
                    SignedDuration::from_secs(silence.as_secs())
                ));
                condition.since = condition.checked;
            }
        }
        let parts = Part::ALL
            .iter()
            .zip(conditions.iter())
            .map(|(part, condition)| PartView {
                part: *part,
                why: condition.fault.clone(),
                since: condition.since,
            })
            .collect();
        let ready = conditions.iter().all(|condition| condition.fault.is_none());
        (ready, parts)
    }

    fn lock(&self) -> MutexGuard<'_, [Condition; 5]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_is_when_every_part_works() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let health = Health::starting(at(0));
        for part in Part::ALL {
            assert!(!health.ready(at(5)).0);
            assert!(health.report(part, None, at(1)));
        }
        assert!(health.ready(at(5)).0);
        assert!(!health.report(Part::Broker, None, at(2)));
        assert!(health.report(Part::Postgres, Some("down".to_owned()), at(3)));
        assert!(!health.report(Part::Postgres, Some("still down".to_owned()), at(4)));
        let (ready, answer) = health.ready(at(5));
        assert!(!ready);
        assert_eq!(
            answer["parts"]["postgres"],
            json!({"ok": false, "why": "still down", "since": "1970-01-01T00:00:03Z"})
        );
        assert_eq!(
            answer["parts"]["broker"],
            json!({"ok": true, "since": "1970-01-01T00:00:01Z"})
        );
    }

    #[test]
    fn the_cause_of_an_outage_is_told_once() {
        let now = Timestamp::UNIX_EPOCH;
        let health = Health::starting(now);
        health.report(Part::Postgres, None, now);
        // Nothing is told of what works, and the next outage is news.
        assert!(!health.is_news(Part::Postgres));
        health.report(Part::Postgres, Some("down".to_owned()), now);
        assert!(health.is_news(Part::Postgres));
        assert!(!health.is_news(Part::Postgres));
        assert!(health.is_news(Part::Broker));
        health.report(Part::Postgres, None, now);
        health.report(Part::Postgres, Some("down again".to_owned()), now);
        assert!(health.is_news(Part::Postgres));
    }

    #[test]
    fn refused_work_counts_until_it_is_done_or_for_a_while() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let health = Health::starting(at(0));
        for part in Part::ALL {
            health.report(part, None, at(1));
        }
        health.refuses(Part::Postgres, "no space".to_owned(), at(2));
        // The probe found some.
        assert!(!health.report(Part::Postgres, None, at(5)));
        assert!(!health.ready(at(5)).0);
        health.does_again(Part::Postgres, at(6));
        assert!(health.ready(at(6)).0);
        health.refuses(Part::Postgres, "no space".to_owned(), at(7));
        health.refuses(Part::Postgres, "no space".to_owned(), at(12));
        assert!(!health.report(Part::Postgres, None, at(32)));
        assert_eq!(health.parts(at(32)).1[2].since, at(7));
        assert!(health.report(Part::Postgres, None, at(33)));
        health.report(Part::Revisions, None, at(33));
        assert!(health.ready(at(33)).0);
    }

    #[test]
    fn an_answer_that_does_not_come_is_a_fault() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let health = Health::starting(at(0));
        for part in Part::ALL {
            health.report(part, None, at(1));
        }
        assert!(health.ready(at(21)).0);
        let (ready, answer) = health.ready(at(22));
        assert!(!ready);
        assert_eq!(
            answer["parts"]["postgres"],
            json!({"ok": false, "why": "no answer for 21s", "since": "1970-01-01T00:00:01Z"})
        );
        assert!(health.report(Part::Postgres, None, at(23)));
    }
}
