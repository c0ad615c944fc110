//! RabbitMQ as a cluster: nodes that do not answer, core queues that are on one node only, and quorum queues
//! that are not as OMOTES needs them.

use serde::Deserialize;
use serde_json::Value;

use super::limits::{evaluate, rabbitmqctl};
use super::{Finding, Findings, Severity};
use crate::broker::Link;
use crate::config::{Config, RabbitMq};
use crate::domain::vhost::Vhost;
use crate::telemetry::report::one_line;
use crate::wire::DEAD_LETTERS_QUEUE;

/// What a quorum queue has from RabbitMQ 4 on, where nobody says otherwise.
const DEFAULT_DELIVERY_LIMIT: i64 = 20;
/// Looking at a dead letter is a delivery.
const ENOUGH_LOOKS: i64 = 10_000;
const SET_UP: &str = "examples/deployment/cluster has a set-up to load.";

/// Tries each of several nodes by itself.
pub(super) fn nodes(part: &'static str, rabbitmq: &RabbitMq, findings: &mut Findings) {
    if rabbitmq.servers.len() < 2 {
        return;
    }
    for server in &rabbitmq.servers {
        let alone = RabbitMq {
            servers: vec![server.clone()],
            ..rabbitmq.clone()
        };
        let tried = Link::open(&alone, "doctor").and_then(Link::close);
        if let Err(error) = tried {
            findings.add(
                part,
                Severity::Warning,
                format!(
                    "{server}, one of {} nodes, does not answer: {}",
                    rabbitmq.servers.len(),
                    one_line(&format!("{error:#}"))
                ),
                "The others serve, but another loss may stop everything: look at that node's log and at \
                 `rabbitmqctl cluster_status`. If it is gone for good, take it out of the variable too.",
            );
        }
    }
}

/// Judges the type of core queues that are there, which matters where there are several nodes.
pub(super) fn types(
    part: &'static str,
    link: &Link,
    queues: &[&str],
    findings: &mut Findings,
) -> anyhow::Result<()> {
    for queue in queues {
        if !link.is_quorum_queue(queue)? {
            findings.add(
                part,
                Severity::Warning,
                format!("{queue} is a classic queue, which is on one node of the cluster"),
                &format!(
                    "While that node is down there is no service: make it a quorum queue. {SET_UP}"
                ),
            );
        }
    }
    Ok(())
}

/// A queue as `rabbitmqctl list_queues` tells of it.
#[derive(Debug, Deserialize)]
struct Listed {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    policy: String,
    #[serde(default)]
    arguments: Value,
}

/// A policy as `rabbitmqctl list_policies` tells of it.
#[derive(Debug, Deserialize)]
struct Policy {
    name: String,
    /// JSON, as a text in most versions.
    definition: Value,
}

impl Policy {
    fn get(&self, name: &str) -> Option<Value> {
        let definition = match &self.definition {
            Value::String(text) => serde_json::from_str(text).unwrap_or_default(),
            definition => definition.clone(),
        };
        definition.get(name).cloned()
    }
}

/// Judges after how many deliveries RabbitMQ gives messages of core queues up, and what becomes of them then.
pub(super) fn deliveries(config: &Config, command: &str, findings: &mut Findings) {
    const PART: &str = "RabbitMQ";
    let core = [
        (Vhost::Sdk, crate::wire::SUBMISSIONS_QUEUE),
        (Vhost::Sdk, crate::wire::CANCELS_QUEUE),
        (Vhost::Sdk, DEAD_LETTERS_QUEUE),
        (Vhost::Task, config.task_result_queue.as_str()),
        (Vhost::Task, &config.task_progress_queue),
        (Vhost::Task, DEAD_LETTERS_QUEUE),
    ];
    let judged = || -> anyhow::Result<Vec<Finding>> {
        let version = evaluate(command, "rabbit_misc:version().")?;
        let default = default_limit(&version);
        let mut found = Vec::new();
        for vhost in [Vhost::Sdk, Vhost::Task] {
            let name = &config.rabbitmq(vhost).vhost;
            let quoted = format!("'{}'", name.replace('\'', "'\\''"));
            let list =
                |what: &str| rabbitmqctl(command, &format!("-q list_{what} --formatter json"));
            let listed = list(&format!("queues -p {quoted} name type policy arguments"))?;
            let listed: Vec<Listed> = serde_json::from_str(listed.trim())?;
            let policies = list(&format!("policies -p {quoted}"))?;
            let policies: Vec<Policy> = serde_json::from_str(policies.trim())?;
            let ours = listed.iter().filter(|queue| {
                let mut names = core.iter().filter(|(of, _)| *of == vhost);
                names.any(|(_, name)| *name == queue.name)
            });
            found.extend(ours.filter_map(|queue| {
                let policy = policies.iter().find(|one| one.name == queue.policy);
                judge_deliveries(PART, queue, policy, default)
            }));
        }
        Ok(found)
    };
    match judged() {
        Ok(found) => findings.0.extend(found),
        Err(error) => findings.add(
            PART,
            Severity::Note,
            format!(
                "the delivery limits of its queues are not known: {}",
                one_line(&format!("{error:#}"))
            ),
            "Look at `rabbitmqctl list_queues -p VHOST name type policy` and `list_policies`: core queues \
             that are quorum queues need a dead-letter exchange into omotes_dead_letters.",
        ),
    }
}

fn default_limit(version: &str) -> Option<i64> {
    let digits: String = version
        .chars()
        .skip_while(|one| !one.is_ascii_digit())
        .take_while(char::is_ascii_digit)
        .collect();
    let major: u32 = digits.parse().unwrap_or(4);
    (major >= 4).then_some(DEFAULT_DELIVERY_LIMIT)
}

fn judge_deliveries(
    part: &'static str,
    queue: &Listed,
    policy: Option<&Policy>,
    default: Option<i64>,
) -> Option<Finding> {
    if queue.kind != "quorum" && !queue.kind.contains("quorum_queue") {
        return None;
    }
    let of_policy = |name: &str| policy.and_then(|policy| policy.get(name));
    let arguments = queue.arguments.to_string();
    let limit = of_policy("delivery-limit").and_then(|limit| limit.as_i64());
    let limit = limit.or(default).filter(|limit| *limit >= 0)?;
    let (found, remedy) = if queue.name == DEAD_LETTERS_QUEUE {
        if limit >= ENOUGH_LOOKS {
            return None;
        }
        (
            format!(
                "{}: RabbitMQ drops a letter that has been looked at {limit} times",
                queue.name
            ),
            format!("Give it a delivery-limit of 1,000,000 by a policy. {SET_UP}"),
        )
    } else {
        let is_kept = of_policy("dead-letter-exchange").is_some()
            || arguments.contains("x-dead-letter-exchange");
        if is_kept {
            return None;
        }
        (
            format!(
                "{}: RabbitMQ drops a message that it has delivered {limit} times",
                queue.name
            ),
            format!(
                "Give it a dead-letter exchange into {DEAD_LETTERS_QUEUE} by a policy. {SET_UP}"
            ),
        )
    };
    Some(Finding::new(part, Severity::Warning, found, &remedy))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    #[rstest]
    #[case::classic("job_submissions", "classic", json!({}), Some(20), false)]
    #[case::default_of_4("job_submissions", "quorum", json!({}), Some(20), true)]
    #[case::no_limit_in_3("job_submissions", "quorum", json!({}), None, false)]
    #[case::as_3_names_it("job_submissions", "rabbit_quorum_queue", json!({}), Some(20), true)]
    #[case::unlimited("job_submissions", "quorum", json!({"delivery-limit": -1}), Some(20), false)]
    #[case::kept("job_submissions", "quorum", json!({"dead-letter-exchange": ""}), Some(20), false)]
    #[case::letters("omotes_dead_letters", "quorum", json!({}), Some(20), true)]
    #[case::letters_kept("omotes_dead_letters", "quorum", json!({"delivery-limit": 1_000_000}), Some(20), false)]
    fn a_limit_that_loses_messages_is_told(
        #[case] name: &str,
        #[case] kind: &str,
        #[case] policy: Value,
        #[case] default: Option<i64>,
        #[case] told: bool,
    ) {
        let queue = Listed {
            name: name.to_owned(),
            kind: kind.to_owned(),
            policy: "a policy".to_owned(),
            arguments: Value::Null,
        };
        for definition in [Value::String(policy.to_string()), policy] {
            let policy = Policy {
                name: "a policy".to_owned(),
                definition,
            };
            let found = judge_deliveries("RabbitMQ", &queue, Some(&policy), default);
            assert_eq!(found.is_some(), told);
        }
    }

    #[rstest]
    #[case("\"3.13.7\"\n", None)]
    #[case("\"4.0.5\"\n", Some(20))]
    #[case("<<\"4.3.6\">>", Some(20))]
    fn the_limit_came_with_rabbitmq_4(#[case] version: &str, #[case] limit: Option<i64>) {
        assert_eq!(default_limit(version), limit);
    }
}
