//! RabbitMQ, through each of the three connections: rights, queues declared otherwise, mixed-up
//! vhosts, message size limits, workers.

use std::collections::BTreeMap;
use std::time::Duration;

use super::cause::Kind;
use super::fix::Fix;
use super::{Findings, Severity, cluster};
use crate::broker::Link;
use crate::broker::inspection::{ExchangeKind, Inspected, is_replicated_by};
use crate::config::Config;
use crate::domain::overview::Depth;
use crate::domain::text::counted;
use crate::domain::vhost::Vhost;
use crate::telemetry::report::one_line;
use crate::threads::within_deadline;
use crate::wire::{
    CANCELS_QUEUE, DEAD_LETTERS_QUEUE, OMOTES_EXCHANGE, PIDBOX_EXCHANGE, SUBMISSIONS_QUEUE,
};

/// How long checking a connection may take.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);

/// The state of the queues, by connection and name.
pub(super) type Seen = BTreeMap<(Vhost, String), Inspected>;

/// What was seen through one connection.
struct Look {
    queues: Vec<(String, Inspected)>,
    exchange: Option<(&'static str, Inspected)>,
    /// Of a new queue, declared as workers declare theirs.
    task_queue: Option<Inspected>,
    publishing: Inspected,
}

fn part(vhost: Vhost) -> &'static str {
    match vhost {
        Vhost::Sdk => "SDK RabbitMQ",
        Vhost::Task => "TASK RabbitMQ",
        Vhost::Celery => "CELERY RabbitMQ",
    }
}

/// Checks all three. `workflows` are those that may have tasks, `size` is the message size to try,
/// in bytes.
pub(super) fn examine(
    config: &Config,
    workflows: &[String],
    size: usize,
    findings: &mut Findings,
) -> Seen {
    let mut seen = Seen::new();
    for vhost in Vhost::ALL {
        let part = part(vhost);
        let rabbitmq = config.rabbitmq(vhost);
        let link = match Link::open(rabbitmq, "doctor") {
            Ok(link) => link,
            Err(error) => {
                unreachable(vhost, &format!("{error:#}"), findings);
                findings.is(Kind::Unreachable {
                    servers: rabbitmq.listed(),
                    why: error.root_cause().to_string(),
                });
                continue;
            }
        };
        findings.ok(part, format!("{rabbitmq} answers"));
        cluster::nodes(part, rabbitmq, findings);
        let look = within_deadline(
            DEADLINE,
            || link.kill(),
            || look(&link, vhost, config, workflows, size),
        );
        match look {
            Ok(look) => {
                judge(vhost, &look, config, workflows, size, findings);
                if rabbitmq.servers.len() > 1 {
                    judge_types(vhost, &link, &look, config, findings);
                }
                let queues = look.queues.into_iter();
                seen.extend(queues.map(|(queue, standing)| ((vhost, queue), standing)));
            }
            Err(error) => findings.add(
                part,
                Severity::Error,
                one_line(&format!("{error:#}")),
                "RabbitMQ took the connection and then did not do its work: look at its log and at its \
                 alarms for memory and disk.",
            ),
        }
    }
    seen
}

fn look(
    link: &Link,
    vhost: Vhost,
    config: &Config,
    workflows: &[String],
    size: usize,
) -> anyhow::Result<Look> {
    let ours = [
        SUBMISSIONS_QUEUE,
        CANCELS_QUEUE,
        &config.task_result_queue,
        &config.task_progress_queue,
        DEAD_LETTERS_QUEUE,
    ];
    // Queues that do not belong there are looked for as well.
    let names = ours.iter().map(|queue| ((*queue).to_owned(), false));
    let names = names.chain(workflows.iter().map(|queue| (queue.clone(), true)));
    let mut queues = Vec::new();
    for (queue, tasks) in names {
        let standing = if is_at_home(vhost, &queue, config, workflows) {
            link.inspect_queue(&queue, tasks)?
        } else {
            let depth = link.depths(&[&queue])?.into_iter().flatten().next();
            depth.map_or(Inspected::Absent, Inspected::Good)
        };
        queues.push((queue, standing));
    }
    let exchange = match vhost {
        Vhost::Sdk => Some((OMOTES_EXCHANGE, ExchangeKind::Direct)),
        Vhost::Task => None,
        Vhost::Celery => Some((PIDBOX_EXCHANGE, ExchangeKind::Fanout)),
    };
    let exchange =
        exchange.map(|(name, kind)| link.inspect_exchange(name, kind).map(|seen| (name, seen)));
    let task_queue = match vhost {
        Vhost::Sdk | Vhost::Task => None,
        Vhost::Celery => Some(link.inspect_new_task_queue()?),
    };
    Ok(Look {
        queues,
        exchange: exchange.transpose()?,
        task_queue,
        publishing: link.inspect_publishing(size)?,
    })
}

fn judge(
    vhost: Vhost,
    look: &Look,
    config: &Config,
    workflows: &[String],
    size: usize,
    findings: &mut Findings,
) {
    let part = part(vhost);
    for (queue, standing) in &look.queues {
        if is_at_home(vhost, queue, config, workflows) {
            judge_queue(part, queue, standing, findings);
        }
    }
    if let Some((exchange, standing)) = &look.exchange {
        judge_queue(part, exchange, standing, findings);
    }
    // Without the right to that name nothing is known; the names that matter have been checked.
    if let Some(Inspected::Otherwise(words)) = &look.task_queue {
        findings.add(
            part,
            Severity::Error,
            format!("no task queue can be declared: {}", one_line(words)),
            "Each job ends with an error, and workers cannot declare their queues either. Set the vhost's \
             default queue type to classic, and look at RabbitMQ's policies and limits for this vhost.",
        );
    }
    judge_publishing(part, size, &look.publishing, findings);
}

/// Judges the types of the core queues.
fn judge_types(vhost: Vhost, link: &Link, look: &Look, config: &Config, findings: &mut Findings) {
    let is_core = |queue: &str| is_at_home(vhost, queue, config, &[]);
    let there = look
        .queues
        .iter()
        .filter_map(|(queue, standing)| match standing {
            Inspected::Good(_) if is_core(queue) => Some(queue.as_str()),
            Inspected::Good(_)
            | Inspected::Absent
            | Inspected::Otherwise(_)
            | Inspected::Forbidden(_) => None,
        });
    let there: Vec<_> = there.collect();
    let part = part(vhost);
    let judged = within_deadline(
        DEADLINE,
        || link.kill(),
        || cluster::types(part, link, &there, findings),
    );
    if let Err(error) = judged {
        let found = format!("the types of its queues are not known: {error:#}");
        findings.add(part, Severity::Note, one_line(&found), "");
    }
}

fn unreachable(vhost: Vhost, error: &str, findings: &mut Findings) {
    let prefix = vhost.name();
    let first = match error.contains("Connection refused") {
        true => "As a rule RabbitMQ does not run there: start it. If it does, check",
        false => "Check",
    };
    findings.add(
        part(vhost),
        Severity::Error,
        one_line(error),
        &format!(
            "{first} {prefix}_RABBITMQ_HOSTNAME, _PORT, _USERNAME, _PASSWORD and _VIRTUALHOST, that the vhost \
             exists, and that the user has rights on it (`rabbitmqctl list_permissions -p VHOST`)."
        ),
    );
}

/// Whether a queue belongs in the vhost of this connection.
fn is_at_home(vhost: Vhost, queue: &str, config: &Config, workflows: &[String]) -> bool {
    match vhost {
        Vhost::Sdk => [SUBMISSIONS_QUEUE, CANCELS_QUEUE, DEAD_LETTERS_QUEUE].contains(&queue),
        Vhost::Task => {
            queue == config.task_result_queue
                || queue == config.task_progress_queue
                || queue == DEAD_LETTERS_QUEUE
        }
        Vhost::Celery => workflows.iter().any(|workflow| workflow == queue),
    }
}

/// Judges a queue or an exchange in the vhost where it belongs.
fn judge_queue(part: &'static str, name: &str, standing: &Inspected, findings: &mut Findings) {
    match standing {
        Inspected::Absent => {}
        Inspected::Good(depth) if name == DEAD_LETTERS_QUEUE && depth.messages > 0 => findings.add(
            part,
            Severity::Warning,
            match depth.messages {
                1 => format!("1 message that could not be handled waits in {name}"),
                more => format!("{more} messages that could not be handled wait in {name}"),
            },
            "`dead-letters list` shows them; `dead-letters requeue` or `drop` takes them away.",
        ),
        Inspected::Good(_) => {}
        // Nobody but the service declares it, and that is content with any.
        Inspected::Otherwise(words) if is_replicated_by(words) && name == DEAD_LETTERS_QUEUE => {}
        Inspected::Otherwise(words) if is_replicated_by(words) => findings.add(
            part,
            Severity::Error,
            format!("{name} is a quorum queue, which clients and workers cannot declare again: {}", one_line(words)),
            "Set quorum_queue.property_equivalence.relaxed_checks_on_redeclaration = true in rabbitmq.conf \
             (from RabbitMQ 3.11.16 on), and the vhost's default queue type to classic.",
        ),
        Inspected::Otherwise(words) => findings.add(
            part,
            Severity::Error,
            format!("{name} is declared otherwise: {}", one_line(words)),
            "Stop whoever declares it so, and delete it when it is empty; it is declared anew. Task queues \
             are durable with x-max-priority 10, all others durable without arguments.",
        ),
        Inspected::Forbidden(words) => findings.add(
            part,
            Severity::Error,
            format!("no rights on {name}: {}", one_line(words)),
            "Give the user the rights to configure, write and read: `rabbitmqctl set_permissions -p VHOST \
             USER '.*' '.*' '.*'`.",
        ),
    }
}

fn judge_publishing(
    part: &'static str,
    size: usize,
    standing: &Inspected,
    findings: &mut Findings,
) {
    let size = size / 1024 / 1024;
    match standing {
        Inspected::Good(_) | Inspected::Absent => {
            findings.ok(part, format!("a message of {size} MiB is taken"));
        }
        Inspected::Otherwise(words) => findings.add(
            part,
            Severity::Error,
            format!("a message of {size} MiB is not taken: {}", one_line(words)),
            "Raise max_message_size in rabbitmq.conf. Results and tasks above it end their jobs with an \
             error.",
        ),
        Inspected::Forbidden(words) => findings.add(
            part,
            Severity::Error,
            format!("no right to publish: {}", one_line(words)),
            "Give the user the right to write: `rabbitmqctl set_permissions -p VHOST USER '.*' '.*' '.*'`.",
        ),
    }
}

fn in_use(standing: Option<&Inspected>) -> Option<Depth> {
    match standing {
        Some(Inspected::Good(depth)) if depth.messages > 0 || depth.consumers > 0 => Some(*depth),
        Some(
            Inspected::Good(_)
            | Inspected::Absent
            | Inspected::Otherwise(_)
            | Inspected::Forbidden(_),
        )
        | None => None,
    }
}

/// Reports queues that are used in a vhost where they do not belong, and not where they do.
pub(super) fn judge_vhosts(config: &Config, seen: &Seen, findings: &mut Findings) {
    let home = |queue: &str| match queue {
        SUBMISSIONS_QUEUE | CANCELS_QUEUE => Vhost::Sdk,
        _ if queue == config.task_result_queue || queue == config.task_progress_queue => {
            Vhost::Task
        }
        _ => Vhost::Celery,
    };
    for ((vhost, queue), standing) in seen {
        let here = config.rabbitmq(*vhost);
        // If several connections share a vhost, the first one reports.
        let first = Vhost::ALL
            .into_iter()
            .find(|one| config.rabbitmq(*one) == here);
        if first != Some(*vhost) {
            continue;
        }
        let home = home(queue);
        let there = config.rabbitmq(home);
        if queue == DEAD_LETTERS_QUEUE || here == there || in_use(Some(standing)).is_none() {
            continue;
        }
        if in_use(seen.get(&(home, queue.clone()))).is_none() {
            let name = home.name();
            findings.add(
                part(home),
                Severity::Warning,
                format!(
                    "{queue} is used in the vhost {} of {}, not in {} of {name}",
                    here.vhost,
                    vhost.name(),
                    there.vhost
                ),
                &format!(
                    "Somebody is connected to the wrong vhost: compare {name}_RABBITMQ_VIRTUALHOST with \
                     what clients and workers have."
                ),
            );
        }
    }
}

/// What is known of jobs.
pub(super) struct Jobs<'i> {
    /// Those that wait, by workflow.
    pub(super) waiting: &'i BTreeMap<String, i64>,
    /// Tasks that are wanted, by queue.
    pub(super) handed_over: BTreeMap<String, i64>,
}

/// Reports task queues with jobs and no consumer, and with tasks that nobody wants any more.
pub(super) fn judge_workers(
    queues: &[String],
    seen: &Seen,
    jobs: Option<&Jobs<'_>>,
    findings: &mut Findings,
) {
    for queue in queues {
        let depth = match seen.get(&(Vhost::Celery, queue.clone())) {
            Some(Inspected::Good(depth)) => *depth,
            Some(Inspected::Absent) => Depth {
                messages: 0,
                consumers: 0,
            },
            Some(Inspected::Otherwise(_) | Inspected::Forbidden(_)) | None => continue,
        };
        // Workers drop what is stale when they get at it.
        if depth.consumers == 0 {
            let tasks = i64::from(depth.messages);
            let wanted = jobs.map(|jobs| jobs.handed_over.get(queue).copied().unwrap_or(0));
            let waiting = jobs.and_then(|jobs| jobs.waiting.get(queue)).copied();
            // Without Postgres it is not known whose tasks they are.
            let (waiting, what) = match wanted {
                Some(wanted) => (waiting.unwrap_or(0).max(wanted), "job"),
                None => (tasks, "task"),
            };
            let stale = wanted.map_or(0, |wanted| tasks.saturating_sub(wanted).max(0));
            judge_queue_without_worker(queue, (waiting, what), stale, findings);
        }
    }
}

fn judge_queue_without_worker(
    queue: &str,
    (waiting, what): (i64, &str),
    stale: i64,
    findings: &mut Findings,
) {
    let shown = one_line(queue);
    let number = |count: i64| usize::try_from(count).unwrap_or(0);
    if waiting > 0 {
        let verb = if waiting == 1 { "waits" } else { "wait" };
        findings.add(
            part(Vhost::Celery),
            Severity::Error,
            format!(
                "{} {verb} for {shown}, which has no worker",
                counted(number(waiting), what)
            ),
            "Start a worker that consumes the queue of this name, in the vhost of \
             CELERY_RABBITMQ_VIRTUALHOST.",
        );
        findings.is(Kind::NoWorker);
    }
    if stale > 0 {
        let found = match stale {
            1 => format!("1 task in {shown} is of a job that has ended, or was started before"),
            more => {
                format!(
                    "{more} tasks in {shown} are of jobs that have ended, or were started before"
                )
            }
        };
        findings.add(
            part(Vhost::Celery),
            Severity::Warning,
            found,
            "One whose worker gave it back goes on when a worker starts. One whose job has ended \
             would be begun and be told to stop; `doctor --fix` takes only these away.",
        );
        findings.fix(Fix::DropStale(queue.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::that_does_not_run(
        "a:5672: Connection refused (os error 111)",
        "As a rule RabbitMQ does not run there"
    )]
    #[case::that_refuses_the_user(
        "ACCESS_REFUSED: login was refused",
        "Check SDK_RABBITMQ_HOSTNAME"
    )]
    fn what_to_do_about_a_rabbitmq(#[case] error: &str, #[case] remedy: &str) {
        let mut findings = Findings::default();
        unreachable(Vhost::Sdk, error, &mut findings);
        let told = &findings.0[0].remedy;
        assert!(told.starts_with(remedy), "{told}");
        assert!(told.contains("SDK_RABBITMQ_HOSTNAME"), "{told}");
    }

    /// Two of these three tasks may be of jobs that have ended.
    #[test]
    fn without_postgres_tasks_are_told_and_no_jobs() {
        let depth = Depth {
            messages: 3,
            consumers: 0,
        };
        let seen = Seen::from([((Vhost::Celery, "orphan".to_owned()), Inspected::Good(depth))]);
        let told = |jobs: Option<&Jobs<'_>>| {
            let mut findings = Findings::default();
            judge_workers(&["orphan".to_owned()], &seen, jobs, &mut findings);
            let found = findings.0.into_iter().map(|one| one.found);
            found.collect::<Vec<_>>()
        };
        assert_eq!(told(None), ["3 tasks wait for orphan, which has no worker"]);
        let jobs = Jobs {
            waiting: &BTreeMap::from([("orphan".to_owned(), 1)]),
            handed_over: BTreeMap::from([("orphan".to_owned(), 1)]),
        };
        assert_eq!(
            told(Some(&jobs)),
            [
                "1 job waits for orphan, which has no worker",
                "2 tasks in orphan are of jobs that have ended, or were started before"
            ]
        );
    }
}
