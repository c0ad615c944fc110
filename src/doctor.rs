//! Looks a deployment over and says what is wrong with it, and what to do about it. It changes nothing
//! that lasts.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::broker::Link;
use crate::broker::inspection::{ExchangeKind, Standing};
use crate::config::{Config, RabbitMq};
use crate::domain::overview::{Depth, spoken};
use crate::domain::workflow::Catalogue;
use crate::influx::Influx;
use crate::service::handler::MAX_BATCH_MESSAGES;
use crate::store::Store;
use crate::store::inspection::Inspection;
use crate::store::migrate::REVISIONS;
use crate::store::rights;
use crate::telemetry::report::one_line;
use crate::text_file;
use crate::threads::within_deadline;
use crate::wire::{
    CANCELS_QUEUE, DEAD_LETTERS_QUEUE, OMOTES_EXCHANGE, PIDBOX_EXCHANGE, SUBMISSIONS_QUEUE,
};

mod limits;

/// How long a part may take to be looked at.
const DEADLINE: Duration = Duration::from_secs(10);
/// A clock that differs by more makes timeouts wrong that are read in a log or on the page.
const MAX_SKEW: SignedDuration = SignedDuration::from_secs(5);
/// What is tried to publish where the history has no result that is larger.
const USUAL_SIZE: usize = 16 * 1024 * 1024;
/// Above it, trying it out would be a burden.
const MAX_SIZE: usize = 128 * 1024 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Ok,
    /// It could not be found out, or is good to know.
    Note,
    Warning,
    Error,
}

impl Severity {
    pub fn name(self) -> &'static str {
        match self {
            Severity::Ok => "ok",
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Error => "error",
        }
    }
}

/// Something that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub part: &'static str,
    pub severity: Severity,
    /// What was found.
    pub found: String,
    /// What to do about it; empty when there is nothing to do.
    pub remedy: String,
}

/// What one look after the other finds.
#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(
        &mut self,
        part: &'static str,
        severity: Severity,
        found: impl Into<String>,
        remedy: &str,
    ) {
        self.0.push(Finding {
            part,
            severity,
            found: found.into(),
            remedy: remedy.to_owned(),
        });
    }

    fn ok(&mut self, part: &'static str, found: impl Into<String>) {
        self.add(part, Severity::Ok, found, "");
    }
}

/// Looks at everything. `rabbitmqctl` is a command that runs RabbitMQ's tool of this name, for what
/// AMQP does not tell; `near_misses` is what the environment says of names that are almost ours.
pub fn examine(config: &Config, near_misses: &[String], rabbitmqctl: Option<&str>) -> Vec<Finding> {
    let mut findings = Findings::default();
    for near_miss in near_misses {
        let remedy =
            "Put the name right, or take the variable away: what it was to set has its default.";
        findings.add("Configuration", Severity::Warning, near_miss, remedy);
    }
    let catalogue = workflows(config, &mut findings);
    let inspection = postgres(config, &mut findings);
    if let (Some(catalogue), Some(inspection)) = (&catalogue, &inspection) {
        undefined_workflows(catalogue, inspection, &mut findings);
    }
    let mut names = catalogue.as_ref().map_or_else(Vec::new, Catalogue::names);
    let of_jobs = inspection.iter().flat_map(|one| one.waiting.keys());
    names.extend(of_jobs.cloned());
    names.sort_unstable();
    names.dedup();
    let size = inspection
        .as_ref()
        .and_then(|inspection| inspection.largest_result);
    let size = usize::try_from(size.unwrap_or(0)).unwrap_or(MAX_SIZE);
    let size = size.clamp(USUAL_SIZE, MAX_SIZE);
    let seen = rabbitmq(config, &names, size, &mut findings);
    judge_vhosts(config, &seen, &mut findings);
    let waiting = inspection.as_ref().map(|inspection| &inspection.waiting);
    judge_workers(&names, &seen, waiting, &mut findings);
    influxdb(config, &mut findings);
    let longest = longest_job(catalogue.as_ref(), inspection.as_ref());
    limits::limits(rabbitmqctl, longest, config.job_retention, &mut findings);
    findings.0
}

fn workflows(config: &Config, findings: &mut Findings) -> Option<Catalogue> {
    const PART: &str = "Workflows";
    let path = config.workflow_config_path.display();
    let parsed =
        text_file::read(&config.workflow_config_path).and_then(|text| Ok(Catalogue::parse(&text)?));
    match parsed {
        Ok(catalogue) => {
            findings.ok(PART, format!("{path} defines {}", catalogue.names().len()));
            Some(catalogue)
        }
        Err(error) => {
            findings.add(
                PART,
                Severity::Error,
                format!("{path}: {}", one_line(&format!("{error:#}"))),
                "Put the file right, or WORKFLOW_CONFIG_PATH; `workflows check FILE` tells all that \
                 is wrong. The service does not start with it.",
            );
            None
        }
    }
}

fn postgres(config: &Config, findings: &mut Findings) -> Option<Inspection> {
    const PART: &str = "Postgres";
    let at = &config.postgres;
    let store = Store::for_viewers(at);
    let before = Timestamp::now();
    let inspected = store
        .connection()
        .and_then(|mut connection| connection.inspect());
    let after = Timestamp::now();
    match inspected {
        Err(error) => {
            findings.add(
                PART,
                Severity::Error,
                format!("{at}: {}", one_line(&format!("{:#}", anyhow::Error::from(error)))),
                "Check POSTGRESQL_HOST, _PORT, _DATABASE, _USERNAME and _PASSWORD, and that the server \
                 runs and lets this host in.",
            );
            None
        }
        Ok(inspection) => {
            findings.ok(PART, format!("{at} answers"));
            judge_database(&inspection, before, after, findings);
            judge_rights(&inspection, findings);
            judge_settings(&inspection, config.handler_threads, findings);
            Some(inspection)
        }
    }
}

/// `before` and `after` are this machine's times around the look at the database's.
fn judge_database(
    inspection: &Inspection,
    before: Timestamp,
    after: Timestamp,
    findings: &mut Findings,
) {
    const PART: &str = "Postgres";
    let head = REVISIONS.last().map_or("", |revision| revision.id);
    match &inspection.revision {
        Some(Ok(applied)) if *applied == REVISIONS.len() => {
            findings.ok(PART, format!("the tables are at revision {head}"));
        }
        Some(Ok(applied)) => findings.add(
            PART,
            Severity::Note,
            format!("the tables lack {} of the {} revisions", REVISIONS.len() - applied, REVISIONS.len()),
            "The service applies them at its next start; `db upgrade` does now.",
        ),
        Some(Err(error)) => findings.add(
            PART,
            Severity::Error,
            one_line(error),
            "The service does not start with these tables. Run the version that upgraded them, or have \
             that one undo it: `db downgrade`.",
        ),
        None => {}
    }
    if let Some(clock) = inspection.clock {
        let skew = match (clock < before, clock > after) {
            (true, _) => before.duration_since(clock),
            (_, true) => clock.duration_since(after),
            (false, false) => SignedDuration::ZERO,
        };
        if skew > MAX_SKEW {
            findings.add(
                PART,
                Severity::Warning,
                format!("its clock and this machine's differ by {}", spoken(skew)),
                "Keep both by NTP. All that is decided is decided by Postgres's clock; logs and the page are \
                 not.",
            );
        }
    }
}

fn judge_rights(inspection: &Inspection, findings: &mut Findings) {
    const PART: &str = "Postgres";
    let head = matches!(inspection.revision, Some(Ok(applied)) if applied == REVISIONS.len());
    let to_upgrade = match head {
        // Needed by the next version that has a revision.
        true => Severity::Note,
        false => Severity::Error,
    };
    for (severity, lacks) in [
        (Severity::Error, &inspection.lacks_to_work),
        (to_upgrade, &inspection.lacks_to_upgrade),
    ] {
        if lacks.is_empty() {
            continue;
        }
        let what: Vec<_> = lacks.iter().map(|lack| lack.what.as_str()).collect();
        let found = format!("the user lacks {}", what.join("; "));
        let statements = rights::statements(lacks);
        findings.add(
            PART,
            severity,
            one_line(&found),
            &format!("As a superuser, in this database: {statements}"),
        );
    }
}

/// `handlers` is how many threads of a replica lock the jobs of a batch each.
fn judge_settings(inspection: &Inspection, handlers: usize, findings: &mut Findings) {
    const PART: &str = "Postgres";
    if let Some(why) = &inspection.unwritable {
        findings.add(
            PART,
            Severity::Error,
            format!("it {why}"),
            "Point POSTGRESQL_HOST to the primary, or reset the setting of the role, the database or the \
             server. Messages wait, or go to other replicas, until it takes writes.",
        );
    }
    let settings = &inspection.settings;
    if settings.synchronous_commit == "off" {
        findings.add(
            PART,
            Severity::Warning,
            "synchronous_commit is off for this role, database or server",
            "The service sets it to on for its own connections; a Python service would lose what it has \
             acknowledged in a crash of Postgres. Reset it.",
        );
    }
    for (name, is_on) in [
        ("fsync", settings.fsync),
        ("full_page_writes", settings.full_page_writes),
    ] {
        if !is_on {
            findings.add(
                PART,
                Severity::Note,
                format!("{name} is off"),
                "After a crash of its machine the database may be damaged. Switch it on.",
            );
        }
    }
    let wanted = i64::try_from(handlers * MAX_BATCH_MESSAGES).unwrap_or(i64::MAX);
    if let Some(locks) = settings.locks.filter(|locks| *locks < wanted) {
        findings.add(
            PART,
            Severity::Warning,
            format!(
                "it has room for {locks} locks, and {handlers} handlers may want {wanted} at once, in \
                 each replica"
            ),
            "Raise max_locks_per_transaction, or lower HANDLER_THREADS. Where there are too few, batches \
             are divided, and others who use this server may be refused.",
        );
    }
}

fn undefined_workflows(catalogue: &Catalogue, inspection: &Inspection, findings: &mut Findings) {
    let undefined: Vec<_> = inspection
        .waiting
        .keys()
        .filter(|name| catalogue.definition(name).is_none())
        .map(|name| one_line(name))
        .collect();
    if !undefined.is_empty() {
        findings.add(
            "Workflows",
            Severity::Warning,
            format!(
                "there are jobs of {}, which the file does not define",
                undefined.join(", ")
            ),
            "Define them, or cancel these jobs; no new ones are accepted.",
        );
    }
}

/// How the queues stand on each connection, by connection and name.
type Seen = BTreeMap<(&'static str, String), Standing>;

fn rabbitmq(config: &Config, workflows: &[String], size: usize, findings: &mut Findings) -> Seen {
    let results = config.task_result_queue.as_str();
    let progress = config.task_progress_queue.as_str();
    let ours = [
        SUBMISSIONS_QUEUE,
        CANCELS_QUEUE,
        results,
        progress,
        DEAD_LETTERS_QUEUE,
    ];
    let mut seen = Seen::new();
    for (part, name, rabbitmq) in [
        ("SDK RabbitMQ", "SDK", &config.sdk_rabbitmq),
        ("TASK RabbitMQ", "TASK", &config.task_rabbitmq),
        ("CELERY RabbitMQ", "CELERY", &config.celery_rabbitmq),
    ] {
        let link = match Link::open(rabbitmq, "doctor") {
            Ok(link) => link,
            Err(error) => {
                unreachable(part, name, &format!("{error:#}"), findings);
                continue;
            }
        };
        findings.ok(part, format!("{rabbitmq} answers"));
        // What does not belong there is looked for as well.
        let queues = ours.iter().map(|queue| ((*queue).to_owned(), false));
        let queues = queues.chain(workflows.iter().map(|queue| (queue.clone(), true)));
        let looked = within_deadline(
            DEADLINE,
            || link.kill(),
            || {
                let mut standings = Vec::new();
                for (queue, tasks) in queues {
                    let standing = if expected_here(name, &queue, config, workflows) {
                        link.inspect_queue(&queue, tasks)?
                    } else {
                        let depth = link.depths(&[&queue])?.into_iter().flatten().next();
                        depth.map_or(Standing::Absent, Standing::Good)
                    };
                    standings.push((standing, queue));
                }
                let exchange = match name {
                    "SDK" => Some((OMOTES_EXCHANGE, ExchangeKind::Direct)),
                    "CELERY" => Some((PIDBOX_EXCHANGE, ExchangeKind::Fanout)),
                    _ => None,
                };
                let exchange = match exchange {
                    Some((exchange, kind)) => {
                        Some((link.inspect_exchange(exchange, kind)?, exchange))
                    }
                    None => None,
                };
                Ok((standings, exchange, link.inspect_publishing(size)?))
            },
        );
        match looked {
            Ok((standings, exchange, publishing)) => {
                for (standing, queue) in standings {
                    if expected_here(name, &queue, config, workflows) {
                        judge_queue(part, &queue, &standing, findings);
                    }
                    seen.insert((name, queue), standing);
                }
                if let Some((standing, exchange)) = exchange {
                    judge_queue(part, exchange, &standing, findings);
                }
                judge_publishing(part, size, &publishing, findings);
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

fn unreachable(part: &'static str, prefix: &str, error: &str, findings: &mut Findings) {
    findings.add(
        part,
        Severity::Error,
        one_line(error),
        &format!(
            "Check {prefix}_RABBITMQ_HOSTNAME, _PORT, _USERNAME, _PASSWORD and _VIRTUALHOST, that the vhost \
             exists, and that the user has rights on it (`rabbitmqctl list_permissions -p VHOST`)."
        ),
    );
}

/// Whether a queue belongs into the vhost of this connection.
fn expected_here(connection: &str, queue: &str, config: &Config, workflows: &[String]) -> bool {
    match connection {
        "SDK" => [SUBMISSIONS_QUEUE, CANCELS_QUEUE, DEAD_LETTERS_QUEUE].contains(&queue),
        "TASK" => {
            queue == config.task_result_queue
                || queue == config.task_progress_queue
                || queue == DEAD_LETTERS_QUEUE
        }
        _ => workflows.iter().any(|workflow| workflow == queue),
    }
}

/// Judges a queue, or an exchange, that is where it belongs.
fn judge_queue(part: &'static str, name: &str, standing: &Standing, findings: &mut Findings) {
    match standing {
        Standing::Absent => {}
        Standing::Good(depth) if name == DEAD_LETTERS_QUEUE && depth.messages > 0 => findings.add(
            part,
            Severity::Warning,
            format!("{} messages that could not be handled wait in {name}", depth.messages),
            "`dead-letters list` shows them; `dead-letters requeue` or `drop` takes them away.",
        ),
        Standing::Good(_) => {}
        Standing::Otherwise(words) => findings.add(
            part,
            Severity::Error,
            format!("{name} is declared otherwise: {}", one_line(words)),
            "Stop whoever declares it so, and delete it when it is empty; it is declared anew. Task queues \
             are durable with x-max-priority 10, all others durable without arguments.",
        ),
        Standing::Forbidden(words) => findings.add(
            part,
            Severity::Error,
            format!("no rights on {name}: {}", one_line(words)),
            "Give the user the rights to configure, write and read: `rabbitmqctl set_permissions -p VHOST \
             USER '.*' '.*' '.*'`.",
        ),
    }
}

fn judge_publishing(part: &'static str, size: usize, standing: &Standing, findings: &mut Findings) {
    let size = size / 1024 / 1024;
    match standing {
        Standing::Good(_) | Standing::Absent => {
            findings.ok(part, format!("a message of {size} MiB is taken"));
        }
        Standing::Otherwise(words) => findings.add(
            part,
            Severity::Error,
            format!("a message of {size} MiB is not taken: {}", one_line(words)),
            "Raise max_message_size in rabbitmq.conf. Results and tasks above it end their jobs with an \
             error.",
        ),
        Standing::Forbidden(words) => findings.add(
            part,
            Severity::Error,
            format!("no right to publish: {}", one_line(words)),
            "Give the user the right to write: `rabbitmqctl set_permissions -p VHOST USER '.*' '.*' '.*'`.",
        ),
    }
}

fn in_use(standing: Option<&Standing>) -> Option<Depth> {
    match standing {
        Some(Standing::Good(depth)) if depth.messages > 0 || depth.consumers > 0 => Some(*depth),
        Some(
            Standing::Good(_) | Standing::Absent | Standing::Otherwise(_) | Standing::Forbidden(_),
        )
        | None => None,
    }
}

/// Queues that are used in a vhost where they do not belong, and not where they do.
fn judge_vhosts(config: &Config, seen: &Seen, findings: &mut Findings) {
    let vhosts: [(&'static str, &'static str, &RabbitMq); 3] = [
        ("SDK RabbitMQ", "SDK", &config.sdk_rabbitmq),
        ("TASK RabbitMQ", "TASK", &config.task_rabbitmq),
        ("CELERY RabbitMQ", "CELERY", &config.celery_rabbitmq),
    ];
    let home = |queue: &str| -> usize {
        match queue {
            SUBMISSIONS_QUEUE | CANCELS_QUEUE => 0,
            _ if queue == config.task_result_queue || queue == config.task_progress_queue => 1,
            _ => 2,
        }
    };
    for ((connection, queue), standing) in seen {
        let (home_part, home_name, home_vhost) = vhosts[home(queue)];
        // Of connections to the same vhost the first one tells.
        let same = |one: &str| vhosts.iter().find(|(_, name, _)| *name == one);
        let Some((_, _, here)) = same(connection) else {
            continue;
        };
        let first = vhosts.iter().find(|(_, _, vhost)| vhost == here);
        if first.is_some_and(|(_, name, _)| name != connection) {
            continue;
        }
        if queue == DEAD_LETTERS_QUEUE || *here == home_vhost || in_use(Some(standing)).is_none() {
            continue;
        }
        if in_use(seen.get(&(home_name, queue.clone()))).is_none() {
            findings.add(
                home_part,
                Severity::Warning,
                format!(
                    "{queue} is used in the vhost {} of {connection}, not in {} of {home_name}",
                    here.vhost, home_vhost.vhost
                ),
                &format!(
                    "Somebody is connected to the wrong vhost: compare {home_name}_RABBITMQ_VIRTUALHOST with \
                     what clients and workers have."
                ),
            );
        }
    }
}

fn judge_workers(
    workflows: &[String],
    seen: &Seen,
    waiting: Option<&BTreeMap<String, i64>>,
    findings: &mut Findings,
) {
    for workflow in workflows {
        let depth = match seen.get(&("CELERY", workflow.clone())) {
            Some(Standing::Good(depth)) => *depth,
            Some(Standing::Absent) => Depth {
                messages: 0,
                consumers: 0,
            },
            Some(Standing::Otherwise(_) | Standing::Forbidden(_)) | None => continue,
        };
        let jobs = waiting.and_then(|waiting| waiting.get(workflow)).copied();
        let jobs = jobs.unwrap_or(0).max(depth.messages.into());
        if depth.consumers == 0 && jobs > 0 {
            findings.add(
                "CELERY RabbitMQ",
                Severity::Error,
                format!(
                    "{jobs} jobs wait for {}, which has no worker",
                    one_line(workflow)
                ),
                "Start a worker that consumes the queue of this name, in the vhost of \
                 CELERY_RABBITMQ_VIRTUALHOST.",
            );
        }
    }
}

fn influxdb(config: &Config, findings: &mut Findings) {
    const PART: &str = "InfluxDB";
    let Some(influxdb) = &config.influxdb else {
        findings.ok(PART, "switched off");
        return;
    };
    let at = format!("{}:{}", influxdb.host, influxdb.port);
    let influx = Influx::new(influxdb);
    match influx.databases() {
        Err(error) => findings.add(
            PART,
            Severity::Warning,
            format!("{at}: {}", one_line(&format!("{error:#}"))),
            "Check INFLUXDB_HOST, _PORT, _USERNAME and _PASSWORD. Jobs go on without it; time series are not \
             looked after. An empty INFLUXDB_HOST switches it off.",
        ),
        Ok(databases) => match influx.check_rights() {
            Ok(()) => findings.ok(PART, format!("{at} answers, with {} databases", databases.len())),
            Err(error) => findings.add(
                PART,
                Severity::Warning,
                format!("{at}: {}", one_line(&format!("{error:#}"))),
                "Make the user an administrator (`GRANT ALL PRIVILEGES TO user`): only one may list and drop \
                 all databases.",
            ),
        },
    }
}

/// The longest that a job may run, or has run, in milliseconds, with what says so.
fn longest_job(
    catalogue: Option<&Catalogue>,
    inspection: Option<&Inspection>,
) -> Option<(i64, &'static str)> {
    let default = catalogue.and_then(Catalogue::longest_default_timeout_ms);
    let of_jobs = inspection.and_then(|inspection| inspection.longest_timeout_ms);
    let run = inspection.and_then(|inspection| inspection.longest_run_ms);
    [
        (default.map(i64::from), "the timeout of a workflow"),
        (of_jobs, "the timeout of a job"),
        (run, "a job that has run for so long"),
    ]
    .into_iter()
    .filter_map(|(time, what)| Some((time?, what)))
    .max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::in_between(1, false)]
    #[case::a_little_before(-4, false)]
    #[case::far_before(-6, true)]
    #[case::far_after(8, true)]
    fn a_clock_that_differs_is_told(#[case] second: i64, #[case] told: bool) {
        let at = |second| Timestamp::from_second(second).unwrap();
        let inspection = Inspection {
            clock: Some(at(second)),
            ..Inspection::default()
        };
        let mut findings = Findings::default();
        judge_database(&inspection, at(0), at(2), &mut findings);
        let skew = |finding: &Finding| finding.found.contains("clock");
        assert_eq!(findings.0.iter().any(skew), told);
    }
}
