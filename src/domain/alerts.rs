//! Which troubles somebody is told of, and when: each once when it has lasted, and once when it is over.
//! Pure. They bear the names of the alert rules for Prometheus (`examples/deployment/alerts.yml`).

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::domain::text::one_line;

/// How many troubles of one kind are told at a time: where everything is broken, more say no more.
const MOST: usize = 10;

/// A kind of trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Alert {
    NotReady,
    NoWorker,
    WorkerSilent,
    TasksLost,
    TasksInVain,
    JobsWaitLong,
    DeadLetters,
    RabbitMqAlarm,
}

impl Alert {
    pub const ALL: [Alert; 8] = [
        Alert::NotReady,
        Alert::NoWorker,
        Alert::WorkerSilent,
        Alert::TasksLost,
        Alert::TasksInVain,
        Alert::JobsWaitLong,
        Alert::DeadLetters,
        Alert::RabbitMqAlarm,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Alert::NotReady => "OrchestratorNotReady",
            Alert::NoWorker => "WorkflowWithoutWorker",
            Alert::WorkerSilent => "WorkerSilent",
            Alert::TasksLost => "TasksLost",
            Alert::TasksInVain => "TasksInVain",
            Alert::JobsWaitLong => "JobsWaitLong",
            Alert::DeadLetters => "OrchestratorDeadLetters",
            Alert::RabbitMqAlarm => "RabbitMqAlarm",
        }
    }

    pub fn severity(self) -> &'static str {
        match self {
            Alert::NotReady | Alert::NoWorker | Alert::RabbitMqAlarm => "critical",
            Alert::WorkerSilent
            | Alert::TasksLost
            | Alert::TasksInVain
            | Alert::JobsWaitLong
            | Alert::DeadLetters => "warning",
        }
    }

    /// Whether it may be over by itself in a moment, and is told only when it is not.
    fn has_to_last(self) -> bool {
        match self {
            Alert::NotReady
            | Alert::NoWorker
            | Alert::WorkerSilent
            | Alert::TasksLost
            | Alert::TasksInVain
            | Alert::RabbitMqAlarm => true,
            // Its time is over, or it stays until somebody acts.
            Alert::JobsWaitLong | Alert::DeadLetters => false,
        }
    }

    /// Where to look, unless the trouble itself says better.
    pub fn remedy(self) -> &'static str {
        match self {
            Alert::NotReady => "its /health/ready says why; omotes-orchestrator doctor",
            Alert::NoWorker => "start a worker that takes this queue; omotes-orchestrator queues",
            Alert::WorkerSilent => {
                "restart it: its task goes to another; omotes-orchestrator workers"
            }
            Alert::TasksLost => "omotes-orchestrator jobs show says what is known of it",
            Alert::TasksInVain => "restart the worker if it goes on; omotes-orchestrator workers",
            Alert::JobsWaitLong => "omotes-orchestrator jobs list says of each job why it waits",
            Alert::DeadLetters => "omotes-orchestrator dead-letters list",
            Alert::RabbitMqAlarm => "free disk or memory where RabbitMQ runs",
        }
    }
}

/// Which trouble: a kind, and what or whom it is about.
pub type Key = (Alert, String);

/// A trouble as it is seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    pub key: Key,
    pub since: Timestamp,
    /// A sentence.
    pub what: String,
    pub remedy: String,
}

/// What is seen at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    pub troubles: Vec<Trouble>,
    /// Of which kinds something is known: of others nobody says that they are over.
    pub known: BTreeSet<Alert>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Begins,
    Ends,
    /// Somebody tries out whether messages arrive.
    Test,
}

/// Something to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub event: Event,
    pub key: Key,
    pub since: Timestamp,
    pub what: String,
    pub remedy: String,
}

/// What is to be told now. `told` has the troubles that were told and are not known to be over, with since
/// when they were; most have to last for `after` before they are told.
pub fn messages(
    told: &BTreeMap<Key, Timestamp>,
    seen: &Seen,
    after: SignedDuration,
    now: Timestamp,
) -> Vec<Message> {
    let is_over = |(key, _): &(&Key, &Timestamp)| {
        seen.known.contains(&key.0) && !seen.troubles.iter().any(|trouble| trouble.key == **key)
    };
    let over = told.iter().filter(is_over);
    let mut messages: Vec<_> = over
        .map(|(key, since)| Message {
            event: Event::Ends,
            key: key.clone(),
            since: *since,
            what: String::new(),
            remedy: String::new(),
        })
        .collect();
    let mut oldest: Vec<_> = seen.troubles.iter().collect();
    oldest.sort_by_key(|trouble| (trouble.since, &trouble.key));
    for alert in Alert::ALL {
        let after = if alert.has_to_last() {
            after
        } else {
            SignedDuration::ZERO
        };
        let open = oldest.iter().filter(|trouble| trouble.key.0 == alert);
        let new = open
            .take(MOST)
            .filter(|trouble| !told.contains_key(&trouble.key))
            .filter(|trouble| now.duration_since(trouble.since) >= after);
        messages.extend(new.map(|trouble| Message {
            event: Event::Begins,
            key: trouble.key.clone(),
            since: trouble.since,
            what: trouble.what.clone(),
            remedy: trouble.remedy.clone(),
        }));
    }
    messages
}

impl Message {
    /// One that tries out the way.
    pub fn test(now: Timestamp) -> Message {
        Message {
            event: Event::Test,
            key: (Alert::NotReady, "test".to_owned()),
            since: now,
            what: "This is a test: nothing is wrong.".to_owned(),
            remedy: String::new(),
        }
    }

    /// As it is sent. `text` is what chat programs show; `id` is the same for a trouble's beginning, its end,
    /// and a message that is sent twice.
    pub fn json(&self, host: &str, now: Timestamp) -> Value {
        let (alert, subject) = &self.key;
        let (name, severity) = match self.event {
            Event::Begins | Event::Ends => (alert.name(), alert.severity()),
            Event::Test => ("Test", "none"),
        };
        let about = match subject.is_empty() {
            true => String::new(),
            false => format!(" ({})", one_line(subject)),
        };
        let (event, text) = match self.event {
            Event::Begins => ("begin", format!("{name}{about}: {}", self.what)),
            Event::Ends => ("end", format!("{name}{about} is over.")),
            Event::Test => ("test", self.what.clone()),
        };
        let mut value = json!({
            "event": event,
            "alert": name,
            "subject": subject,
            "severity": severity,
            "since": format!("{:.0}", self.since),
            "at": format!("{now:.0}"),
            "text": text,
            "remedy": self.remedy,
            "replica": host,
            "id": format!("{name}/{subject}/{}", self.since.as_second()),
        });
        if self.event != Event::Begins {
            // What to do about it is no longer of interest.
            value
                .as_object_mut()
                .map(|members| members.remove("remedy"));
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn trouble(alert: Alert, subject: &str, since: i64) -> Trouble {
        Trouble {
            key: (alert, subject.to_owned()),
            since: at(since),
            what: "It is so.".to_owned(),
            remedy: alert.remedy().to_owned(),
        }
    }

    fn seen(troubles: &[(Alert, &str, i64)]) -> Seen {
        let troubles = troubles
            .iter()
            .map(|(alert, subject, since)| trouble(*alert, subject, *since));
        Seen {
            troubles: troubles.collect(),
            known: Alert::ALL.into(),
        }
    }

    fn told(keys: &[(Alert, &str)]) -> BTreeMap<Key, Timestamp> {
        let keys = keys.iter();
        keys.map(|(alert, subject)| ((*alert, (*subject).to_owned()), at(0)))
            .collect()
    }

    /// As `begin WorkerSilent a`, at second 1000, for what has to last 120 seconds.
    fn said(told: &BTreeMap<Key, Timestamp>, seen: &Seen) -> Vec<String> {
        let messages = messages(told, seen, SignedDuration::from_secs(120), at(1000));
        let text = |message: &Message| {
            let value = message.json("host", at(1000));
            let text = |name: &str| value[name].as_str().unwrap().to_owned();
            format!("{} {} {}", text("event"), text("alert"), text("subject"))
        };
        messages.iter().map(text).collect()
    }

    use Alert::*;

    #[rstest]
    #[case::nothing(&[], &[], &[])]
    #[case::it_has_lasted(&[], &[(WorkerSilent, "a", 880)], &["begin WorkerSilent a"])]
    #[case::it_has_not_lasted(&[], &[(WorkerSilent, "a", 881)], &[])]
    #[case::told(&[(WorkerSilent, "a")], &[(WorkerSilent, "a", 0)], &[])]
    #[case::over(&[(WorkerSilent, "a")], &[], &["end WorkerSilent a"])]
    #[case::another(
        &[(WorkerSilent, "a")], &[(WorkerSilent, "b", 0)],
        &["end WorkerSilent a", "begin WorkerSilent b"])]
    #[case::again_before_it_has_lasted(&[(NoWorker, "w")], &[(NoWorker, "w", 999)], &[])]
    #[case::letters_at_once(&[], &[(DeadLetters, "SDK", 1000)], &["begin OrchestratorDeadLetters SDK"])]
    #[case::a_long_wait_at_once(&[], &[(JobsWaitLong, "", 1000)], &["begin JobsWaitLong "])]
    #[case::each_kind_for_itself(
        &[(TasksLost, "j")], &[(TasksLost, "j", 0), (NotReady, "h", 0), (RabbitMqAlarm, "", 990)],
        &["begin OrchestratorNotReady h"])]
    fn each_trouble_is_told_once_and_its_end(
        #[case] before: &[(Alert, &str)],
        #[case] now: &[(Alert, &str, i64)],
        #[case] expected: &[&str],
    ) {
        assert_eq!(said(&told(before), &seen(now)), expected);
    }

    #[test]
    fn of_what_is_not_known_nobody_says_that_it_is_over() {
        let before = told(&[(DeadLetters, "SDK"), (WorkerSilent, "a")]);
        let mut blind = seen(&[]);
        blind.known.remove(&DeadLetters);
        assert_eq!(said(&before, &blind), ["end WorkerSilent a"]);
    }

    #[test]
    fn where_all_is_broken_not_all_is_told() {
        let hosts: Vec<_> = (0..50).map(|host| format!("host{host:02}")).collect();
        let silent = |since: i64| -> Vec<_> {
            let hosts = hosts.iter();
            hosts
                .map(|host| (WorkerSilent, host.as_str(), since))
                .collect()
        };
        let first = said(&told(&[]), &seen(&silent(0)));
        assert_eq!(first.len(), MOST);
        // Once those are told, no more follow as long as they last.
        let keys: Vec<_> = hosts[..MOST]
            .iter()
            .map(|host| (WorkerSilent, host.as_str()))
            .collect();
        assert_eq!(said(&told(&keys), &seen(&silent(0))), Vec::<String>::new());
    }

    #[test]
    fn a_message_says_what_and_since_when() {
        let begin = messages(
            &told(&[]),
            &seen(&[(NoWorker, "simulator", 60)]),
            SignedDuration::ZERO,
            at(120),
        );
        let value = begin[0].json("host1", at(120));
        assert_eq!(
            value,
            json!({
                "event": "begin", "alert": "WorkflowWithoutWorker", "subject": "simulator",
                "severity": "critical", "since": "1970-01-01T00:01:00Z", "at": "1970-01-01T00:02:00Z",
                "text": "WorkflowWithoutWorker (simulator): It is so.",
                "remedy": "start a worker that takes this queue; omotes-orchestrator queues",
                "replica": "host1", "id": "WorkflowWithoutWorker/simulator/60",
            })
        );
        let end = Message {
            event: Event::Ends,
            ..begin[0].clone()
        }
        .json("host1", at(180));
        assert_eq!(end["id"], value["id"]);
        assert_eq!(end["text"], "WorkflowWithoutWorker (simulator) is over.");
        assert_eq!(end.get("remedy"), None);
    }
}
