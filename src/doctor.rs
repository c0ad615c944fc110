//! Checks a deployment and says what is wrong with it and what to do about it. Checking changes nothing
//! that lasts.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::config::{self, Config};
use crate::domain::text::counted;
use crate::domain::workflow::Catalogue;
use crate::influx::Influx;
use crate::store::inspection::Inspection;
use crate::telemetry::report::one_line;

mod cause;
mod cluster;
mod fix;
mod jobs;
mod limits;
mod orchestrator;
mod postgres;
mod rabbitmq;
mod service;
mod summary;
mod switch;

use self::cause::Kind;
pub use self::cause::Role;
pub use self::fix::Fix;
pub use self::summary::{sorted, summary};
pub use self::switch::Switch;

/// The size of the trial message, unless the history has a larger result.
const USUAL_SIZE: usize = 16 * 1024 * 1024;
/// A larger trial message would be a burden.
const MAX_SIZE: usize = 128 * 1024 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Ok,
    /// It could not be checked, or is good to know.
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

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub part: &'static str,
    pub severity: Severity,
    /// What was found.
    pub found: String,
    /// What to do about it; empty when there is nothing to do.
    pub remedy: String,
    pub role: Role,
    #[serde(skip)]
    kind: Kind,
    /// In a few words each, why there can be no switch of services yet.
    #[serde(skip)]
    hinders: Vec<String>,
    /// What puts it right without a loss.
    #[serde(skip)]
    pub fix: Option<Fix>,
}

impl Finding {
    fn new(
        part: &'static str,
        severity: Severity,
        found: impl Into<String>,
        remedy: &str,
    ) -> Finding {
        Finding {
            part,
            severity,
            found: found.into(),
            remedy: remedy.to_owned(),
            role: Role::Own,
            kind: Kind::Other,
            hinders: Vec::new(),
            fix: None,
        }
    }
}

/// The findings so far.
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
        self.0.push(Finding::new(part, severity, found, remedy));
    }

    /// Says what the last one is.
    fn is(&mut self, kind: Kind) {
        if let Some(last) = self.0.last_mut() {
            last.kind = kind;
        }
    }

    /// Says that the last one is in the way of a switch.
    fn hinders(&mut self, why: impl Into<String>) {
        if let Some(last) = self.0.last_mut() {
            last.hinders.push(why.into());
        }
    }

    /// Says what puts the last one right.
    fn fix(&mut self, fix: Fix) {
        if let Some(last) = self.0.last_mut() {
            last.fix = Some(fix);
        }
    }

    fn ok(&mut self, part: &'static str, found: impl Into<String>) {
        self.add(part, Severity::Ok, found, "");
    }
}

/// Checks everything. `rabbitmqctl` is a command that runs RabbitMQ's tool of this name, for what
/// AMQP does not tell; `near_misses` are warnings about variables with almost the right name.
/// `switch` is what is to be made of the deployment next, if anything.
pub fn examine(
    config: &Config,
    near_misses: &[String],
    rabbitmqctl: Option<&str>,
    switch: Option<&Switch>,
) -> Vec<Finding> {
    let mut findings = Findings::default();
    for near_miss in near_misses {
        let remedy =
            "Put the name right, or take the variable away: what it was to set has its default.";
        findings.add("Configuration", Severity::Warning, near_miss, remedy);
    }
    let catalogue = workflows(config, &mut findings);
    let looked = postgres::examine(config, &mut findings);
    let (inspection, connection) = looked.unzip();
    if let (Some(inspection), Some(mut connection), None) = (&inspection, connection, switch)
        && inspection.is_usable
    {
        jobs::examine(
            config,
            catalogue.as_ref(),
            inspection,
            &mut connection,
            &mut findings,
        );
    }
    if let (Some(catalogue), Some(inspection)) = (&catalogue, &inspection) {
        undefined_workflows(catalogue, inspection, &mut findings);
    }
    let steps = catalogue.as_ref().map(Catalogue::tasks_by_workflow);
    let names = task_queues(catalogue.as_ref(), inspection.as_ref(), steps.as_ref());
    let size = inspection
        .as_ref()
        .and_then(|inspection| inspection.largest_result);
    let size = usize::try_from(size.unwrap_or(0)).unwrap_or(MAX_SIZE);
    let size = size.clamp(USUAL_SIZE, MAX_SIZE);
    let seen = rabbitmq::examine(config, &names, size, &mut findings);
    rabbitmq::judge_vhosts(config, &seen, &mut findings);
    let jobs = inspection.as_ref().map(|one| rabbitmq::Jobs {
        waiting: &one.waiting,
        handed_over: handed_over(one, steps.as_ref()),
    });
    rabbitmq::judge_workers(&names, &seen, jobs.as_ref(), &mut findings);
    if switch.is_none() {
        // Before a switch none may run, which is told there.
        orchestrator::examine(config, &seen, inspection.as_ref(), &mut findings);
    }
    influxdb(config, &mut findings);
    let longest = longest_job(catalogue.as_ref(), inspection.as_ref());
    limits::limits(rabbitmqctl, longest, config.job_retention, &mut findings);
    if let Some(switch) = switch {
        let scene = switch::Scene {
            config,
            catalogue: catalogue.as_ref(),
            inspection: inspection.as_ref(),
            seen: &seen,
        };
        switch::examine(switch, &scene, &mut findings);
    }
    if let Some(command) = rabbitmqctl {
        cluster::deliveries(config, command, &mut findings);
    }
    cause::without_noise(&mut findings.0);
    cause::lead(&mut findings.0);
    findings.0
}

/// The queues of all tasks that are defined, and of jobs. `steps` has the tasks of workflows that do not have
/// just the one of their own name.
fn task_queues(
    catalogue: Option<&Catalogue>,
    inspection: Option<&Inspection>,
    steps: Option<&BTreeMap<String, Vec<String>>>,
) -> Vec<String> {
    // In which queues the jobs of several steps wait, RabbitMQ tells.
    let of_jobs = inspection
        .into_iter()
        .flat_map(|one| one.waiting.keys())
        .filter(|name| !steps.is_some_and(|steps| steps.contains_key(*name)));
    let mut names: Vec<String> = of_jobs.cloned().collect();
    let tasks = catalogue.into_iter().flat_map(Catalogue::tasks);
    names.extend(tasks.map(str::to_owned));
    names.sort_unstable();
    names.dedup();
    names
}

/// How many tasks are wanted in each queue. `steps` has the tasks of workflows that do not have just the
/// one of their own name.
fn handed_over(
    inspection: &Inspection,
    steps: Option<&BTreeMap<String, Vec<String>>>,
) -> BTreeMap<String, i64> {
    let mut queues = BTreeMap::new();
    for ((workflow, step), count) in &inspection.handed_over {
        let tasks = steps.and_then(|steps| steps.get(workflow));
        let queue = match (step, tasks.map(Vec::as_slice)) {
            (Some(task), _) | (None, Some([task])) => task,
            (None, Some(_) | None) => workflow,
        };
        *queues.entry(queue.clone()).or_default() += count;
    }
    queues
}

fn workflows(config: &Config, findings: &mut Findings) -> Option<Catalogue> {
    const PART: &str = "Workflows";
    match config::read_catalogue(&config.workflow_config_path) {
        Ok(catalogue) => {
            let path = config.workflow_config_path.display();
            findings.ok(
                PART,
                format!(
                    "{path} defines {}",
                    counted(catalogue.names().len(), "workflow")
                ),
            );
            let steps = catalogue.tasks_by_workflow();
            let steps: Vec<_> = steps.keys().map(|name| one_line(name)).collect();
            if !steps.is_empty() {
                let names = steps.join(", ");
                let text = format!("{names}: of steps that the Python service cannot run");
                findings.ok(PART, text);
            }
            Some(catalogue)
        }
        Err(error) => {
            findings.add(
                PART,
                Severity::Error,
                one_line(&format!("{error:#}")),
                "Put the file right, or WORKFLOW_CONFIG_PATH; `workflows check FILE` tells all that \
                 is wrong. The service does not start with it.",
            );
            findings.is(Kind::Needed);
            None
        }
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
            Ok(()) => findings.ok(PART, format!("{at} answers, with {}", counted(databases.len(), "database"))),
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
