//! The limits and times that jobs are subject to, as they are in force: for the status page, the API, and whoever
//! compares a running service with the environment of a shell. Pure, and without any secret.

use std::time::Duration;

use jiff::SignedDuration;
use serde::{Deserialize, Serialize};

use super::Config;
use crate::domain::overview::spoken;

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Its environment variable.
    pub name: String,
    /// What it limits.
    pub what: String,
    /// As the variable has it.
    pub value: String,
    pub in_words: String,
}

impl Limit {
    fn new(name: &str, what: &str, value: impl ToString, in_words: String) -> Limit {
        Limit {
            name: name.to_owned(),
            what: what.to_owned(),
            value: value.to_string(),
            in_words,
        }
    }
}

impl Config {
    /// All of them, in the order in which they are shown.
    pub fn limits(&self) -> Vec<Limit> {
        let mut limits = self.limits_of_runs();
        limits.extend(self.limits_of_what_is_kept());
        let aging = match self.priority_aging.is_zero() {
            true => "never".to_owned(),
            false => format!("by a level each {}", long(self.priority_aging)),
        };
        let faulty = match self.reject_invalid_params {
            true => "refused",
            false => "run, with a warning in the log",
        };
        limits.extend([
            Limit::new(
                "REJECT_INVALID_PARAMS",
                "Jobs with faulty parameters are",
                self.reject_invalid_params,
                faulty.to_owned(),
            ),
            Limit::new(
                "PRIORITY_AGING_SEC",
                "Priority of held jobs rises",
                self.priority_aging.as_secs(),
                aging,
            ),
        ]);
        limits
    }

    fn limits_of_runs(&self) -> Vec<Limit> {
        let starts = match self.delivery_limit {
            1 => "1; with a second one that counts the job ends".to_owned(),
            limit => format!("{limit}; with another one that counts the job ends"),
        };
        let lost = match self.task_lost {
            Some(time) => format!("when no worker has had its task for {}", long(time)),
            None => "never for that".to_owned(),
        };
        let asked = match self.workers_period {
            Some(period) => format!("every {}", long(period)),
            None => "never".to_owned(),
        };
        vec![
            Limit::new(
                "TIMEOUT_JOB_MANAGER_START_BUFFER_SEC",
                "Timeouts begin to be enforced",
                self.timeout_start_buffer.as_secs(),
                format!("{} after the start", long(self.timeout_start_buffer)),
            ),
            Limit::new(
                "TIMEOUT_JOB_HANDLER_RERUN_SEC",
                "Timeouts are checked every",
                self.timeout_check_period.as_secs(),
                long(self.timeout_check_period),
            ),
            Limit::new(
                "DELIVERY_LIMIT_THRESHOLD_PER_JOB",
                "Starts of a job",
                self.delivery_limit,
                starts,
            ),
            Limit::new(
                "TASK_LOST_SEC",
                "A job ends",
                self.task_lost.unwrap_or_default().as_secs(),
                lost,
            ),
            Limit::new(
                "WORKERS_PERIOD_SEC",
                "Workers are asked what they do",
                self.workers_period.unwrap_or_default().as_secs(),
                asked,
            ),
        ]
    }

    fn limits_of_what_is_kept(&self) -> Vec<Limit> {
        let kept = |time: Duration| match time.is_zero() {
            true => "not kept".to_owned(),
            false => long(time),
        };
        let of =
            |name, what, time: Duration, in_words| Limit::new(name, what, time.as_secs(), in_words);
        vec![
            of(
                "JOB_RETENTION_SEC",
                "A job may take, in all",
                self.job_retention,
                long(self.job_retention),
            ),
            of(
                "JOB_HISTORY_RETENTION_SEC",
                "Its history is kept for",
                self.history_retention,
                long(self.history_retention),
            ),
            of(
                "KEEP_INPUTS_SEC",
                "What is submitted is kept for",
                self.keep_inputs,
                kept(self.keep_inputs),
            ),
            of(
                "KEEP_RESULTS_SEC",
                "A result that nobody takes is kept for",
                self.keep_results,
                kept(self.keep_results),
            ),
            of(
                "OUTCOME_LOST_SEC",
                "An outcome is given up after",
                self.outcome_lost,
                long(self.outcome_lost),
            ),
        ]
    }
}

fn long(time: Duration) -> String {
    spoken(SignedDuration::try_from(time).unwrap_or(SignedDuration::MAX))
}

/// The variables that are other ones here than where these limits are in force, each with its value here; that is
/// None of one that only the other side knows.
pub fn differing<'l>(running: &'l [Limit], here: &'l [Limit]) -> Vec<(&'l Limit, Option<&'l str>)> {
    let pairs = running.iter().map(|limit| {
        let own = here.iter().find(|own| own.name == limit.name);
        (limit, own.map(|own| own.value.as_str()))
    });
    pairs
        .filter(|(limit, own)| *own != Some(&limit.value))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn config(variables: &[(&str, &str)]) -> Config {
        let variables: BTreeMap<_, _> = variables.iter().copied().collect();
        Config::read(&|name| variables.get(name).map(|value| (*value).to_owned())).unwrap()
    }

    /// So that they can be compared with those of a shell, or set there.
    #[test]
    fn a_limit_has_the_value_of_its_variable() {
        let settings = Config::settings(&|_| None);
        let default = |name: &str| settings.iter().find(|one| one.name == name);
        for limit in config(&[]).limits() {
            let default = default(&limit.name).unwrap();
            assert_eq!(limit.value, default.value, "{limit:?}");
        }
        let set: Vec<_> = config(&[]).limits();
        let set = set.iter().map(|limit| match limit.name.as_str() {
            "REJECT_INVALID_PARAMS" => (limit.name.as_str(), "true"),
            "WORKERS_PERIOD_SEC" => (limit.name.as_str(), "45"),
            name => (name, "7777"),
        });
        let set: Vec<_> = set.collect();
        for (limit, (name, value)) in config(&set).limits().iter().zip(&set) {
            assert_eq!((limit.name.as_str(), limit.value.as_str()), (*name, *value));
        }
    }

    #[test]
    fn what_differs_is_told_with_what_it_is_here() {
        let running = config(&[("JOB_RETENTION_SEC", "7200"), ("TASK_LOST_SEC", "600")]).limits();
        let mut here = config(&[("JOB_RETENTION_SEC", "7201")]).limits();
        // Of an earlier version.
        here.retain(|limit| limit.name != "KEEP_RESULTS_SEC");
        let told = differing(&running, &here);
        let told: Vec<_> = told
            .iter()
            .map(|(limit, own)| (limit.name.as_str(), limit.in_words.as_str(), *own))
            .collect();
        assert_eq!(
            told,
            [
                (
                    "TASK_LOST_SEC",
                    "when no worker has had its task for 10 min",
                    Some("0")
                ),
                ("JOB_RETENTION_SEC", "2 h", Some("7201")),
                ("KEEP_RESULTS_SEC", "not kept", None),
            ]
        );
        assert_eq!(differing(&here, &here), []);
    }
}
