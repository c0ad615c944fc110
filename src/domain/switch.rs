//! What stands in the way of giving the place back to the Python service, as far as jobs, definitions and
//! settings say.

use std::collections::BTreeMap;

use crate::domain::text::one_line;
use crate::domain::vhost::Vhost;
use crate::domain::workflow::{Catalogue, Definition};

/// What another service finds when it starts on this database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InFlight {
    /// How many jobs have not ended, by their state in a word.
    pub by_state: BTreeMap<String, i64>,
    /// The same by workflow.
    pub by_workflow: BTreeMap<String, i64>,
    /// Those of which something is kept for later steps, by workflow.
    pub with_steps: BTreeMap<String, i64>,
    /// How many wait for their turn at a task queue with limits.
    pub held: i64,
    /// How many have no task, and do not wait for the turn of their first one either.
    pub without_task: i64,
    /// How many have an outcome that their client has not been told.
    pub untold: i64,
}

/// What is to be known before the Python service takes the place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remark {
    pub found: String,
    /// What to do about it.
    pub remedy: &'static str,
    /// In a few words, if it is in the way, and not only good to know.
    pub hinders: Option<String>,
}

impl Remark {
    fn in_the_way(found: String, remedy: &'static str, hinders: impl Into<String>) -> Remark {
        Remark {
            found,
            remedy,
            hinders: Some(hinders.into()),
        }
    }

    fn to_know(found: String, remedy: &'static str) -> Remark {
        Remark {
            found,
            remedy,
            hinders: None,
        }
    }
}

/// All that can be said without a look at RabbitMQ. `servers` is how many each connection has, `variables` are
/// those that are set.
pub fn back(
    in_flight: &InFlight,
    catalogue: &Catalogue,
    servers: &[(Vhost, usize)],
    variables: &[String],
) -> Vec<Remark> {
    let mut remarks = of_jobs(in_flight, Some(catalogue));
    remarks.extend(of_definitions(catalogue));
    remarks.extend(of_servers(servers));
    remarks.extend(of_variables(variables));
    remarks
}

/// Whether the place may be given back, and if not, why not.
pub fn verdict_back(reasons: &[String]) -> String {
    match reasons {
        [] => "Safe to go back: the Python service goes on where this one has stopped.".to_owned(),
        _ => format!(
            "Not yet back to the Python service: {}.",
            reasons.join("; ")
        ),
    }
}

/// Of jobs that have not ended.
pub fn of_jobs(in_flight: &InFlight, catalogue: Option<&Catalogue>) -> Vec<Remark> {
    let mut remarks = Vec::from_iter(of_jobs_with_steps(in_flight, catalogue));
    if in_flight.held > 0 {
        let wait = match in_flight.held {
            1 => "1 job waits for its turn".to_owned(),
            more => format!("{more} jobs wait for their turn"),
        };
        let them = if in_flight.held == 1 { "it" } else { "them" };
        remarks.push(Remark::in_the_way(
            format!("{wait} in Postgres, where the Python service would leave {them} for ever"),
            "Hand them over while this service runs: `jobs release --all --yes`. Lift the limits of their \
             queues first (`workflows limits`), so that no more have to wait.",
            wait,
        ));
    }
    if in_flight.untold > 0 {
        remarks.push(Remark::to_know(
            format!(
                "{} not told: the Python service does not know how, and decides anew",
                match in_flight.untold {
                    1 => "1 job has ended and its client is".to_owned(),
                    more => format!("{more} jobs have ended and their clients are"),
                }
            ),
            "Let this service run until they are told, where it matters that the history says the same.",
        ));
    }
    remarks
}

fn of_jobs_with_steps(in_flight: &InFlight, catalogue: Option<&Catalogue>) -> Option<Remark> {
    let of_steps = catalogue
        .map(Catalogue::tasks_by_workflow)
        .unwrap_or_default();
    let by_workflow = in_flight.by_workflow.iter();
    // Of one with a single task of another name nothing is kept, and it is the file that knows.
    let known = by_workflow.filter(|(workflow, _)| of_steps.contains_key(*workflow));
    let kept = in_flight.with_steps.iter();
    let jobs = known.chain(kept.filter(|(workflow, _)| !of_steps.contains_key(*workflow)));
    let jobs: Vec<_> = jobs
        .map(|(workflow, jobs)| format!("{jobs} of {}", one_line(workflow)))
        .collect();
    if jobs.is_empty() {
        return None;
    }
    Some(Remark::in_the_way(
        format!(
            "jobs of steps are in flight, {}: the Python service takes the result of the current step for \
             that of the job, or drops it where that task is no workflow of its own",
            jobs.join(", ")
        ),
        "Let them end first (`jobs list --workflow NAME`), or cancel them.",
        "jobs of several steps are in flight",
    ))
}

/// Of what the Python service does not read in the definition file.
pub fn of_definitions(catalogue: &Catalogue) -> Vec<Remark> {
    let of_steps = catalogue.tasks_by_workflow();
    let mut names = catalogue.names();
    names.sort_unstable();
    let listed = |names: Vec<&String>| {
        let names: Vec<_> = names.into_iter().map(|name| one_line(name)).collect();
        names.join(", ")
    };
    let mut remarks = Vec::new();
    if !of_steps.is_empty() {
        remarks.push(Remark::in_the_way(
            format!(
                "of steps: {}. The Python service sends their jobs to queues of these names, where no worker \
                 may be",
                listed(of_steps.keys().collect())
            ),
            "Take them out of the file that the Python service reads, so that it refuses their jobs.",
            "the definition file has workflows of steps",
        ));
    }
    let ignored: Vec<_> = names
        .iter()
        .filter(|name| !of_steps.contains_key(*name))
        .filter(|name| catalogue.definition(name).is_some_and(says_more))
        .collect();
    if !ignored.is_empty() {
        remarks.push(Remark::to_know(
            format!(
                "with a limit, a timeout or a retry of their own, which the Python service ignores: {}",
                listed(ignored)
            ),
            "Nothing has to be done for it to start; their jobs run without these there.",
        ));
    }
    remarks
}

/// Whether a workflow of one task says something that the Python service does not read.
fn says_more(definition: &Definition) -> bool {
    let limits = &definition.limits;
    limits.delivery_limit.is_some()
        || limits.default_timeout_ms.is_some()
        || definition.steps.all().iter().any(|step| step.limit.holds())
        || definition.steps.plain().is_none()
}

/// Of connections that have several servers.
pub fn of_servers(servers: &[(Vhost, usize)]) -> Option<Remark> {
    let several = servers.iter().filter(|(_, count)| *count > 1);
    let several: Vec<_> = several
        .map(|(vhost, _)| format!("{}_RABBITMQ_HOSTNAME", vhost.name()))
        .collect();
    (!several.is_empty()).then(|| {
        Remark::in_the_way(
            format!(
                "several hosts in {}: the Python service takes them for one name",
                several.join(", ")
            ),
            "Give the Python service one of them.",
            "several hosts are set for one name",
        )
    })
}

/// What is of no interest: what the Python service reads too, without what follows a connection's
/// prefix.
const OF_PYTHON: [&str; 9] = [
    "TASK_RESULT_QUEUE_NAME",
    "TASK_PROGRESS_QUEUE_NAME",
    "JOB_RETENTION_SEC",
    "TIMEOUT_JOB_MANAGER_START_BUFFER_SEC",
    "TIMEOUT_JOB_HANDLER_RERUN_SEC",
    "DELIVERY_LIMIT_THRESHOLD_PER_JOB",
    "LOG_LEVEL",
    // This program's image sets these two; the Python service's has the file at the same place, and no page.
    "WORKFLOW_CONFIG_PATH",
    "HTTP_BIND",
];
const OF_PYTHONS_CONNECTIONS: [&str; 7] = [
    "_HOSTNAME",
    "_HOST",
    "_PORT",
    "_USERNAME",
    "_PASSWORD",
    "_VIRTUALHOST",
    "_DATABASE",
];

/// Of variables that the Python service does not read.
pub fn of_variables(variables: &[String]) -> Vec<Remark> {
    let is_of_python = |name: &&str| {
        OF_PYTHON.contains(name) || OF_PYTHONS_CONNECTIONS.iter().any(|end| name.ends_with(end))
    };
    let ours = variables.iter().map(String::as_str);
    let ours = ours.filter(|name| !is_of_python(name));
    // Without these it does not reach its servers.
    let is_vital =
        |name: &&str| name.ends_with("_PASSWORD_FILE") || name.ends_with("_RABBITMQ_TLS");
    let (vital, others): (Vec<_>, Vec<_>) = ours.partition(is_vital);
    let mut remarks = Vec::new();
    if !vital.is_empty() {
        remarks.push(Remark::in_the_way(
            format!("the Python service does not read {}", vital.join(", ")),
            "Give it the passwords in variables, and servers that it reaches without TLS.",
            "passwords or TLS are set in a way that it does not read",
        ));
    }
    if !others.is_empty() {
        remarks.push(Remark::to_know(
            format!("the Python service does not read {}", others.join(", ")),
            "Nothing has to be done for it to start; what they set has no effect there.",
        ));
    }
    remarks
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    #[rstest]
    #[case::its_own("SDK_RABBITMQ_PORT", None)]
    #[case::a_shared_one("JOB_RETENTION_SEC", None)]
    #[case::a_password("POSTGRESQL_PASSWORD_FILE", Some(true))]
    #[case::tls("TASK_RABBITMQ_TLS", Some(true))]
    #[case::a_file_of_tls("TASK_RABBITMQ_TLS_CA_FILE", Some(false))]
    #[case::the_images("HTTP_BIND", None)]
    #[case::one_of_ours("HANDLER_THREADS", Some(false))]
    fn a_variable_of_this_service_alone_is_told(
        #[case] name: &str,
        #[case] is_in_the_way: Option<bool>,
    ) {
        let remarks = of_variables(&[name.to_owned()]);
        let found = remarks.first().map(|remark| remark.hinders.is_some());
        assert_eq!(found, is_in_the_way);
    }

    fn jobs(workflow: &str) -> BTreeMap<String, i64> {
        BTreeMap::from([(workflow.to_owned(), 2)])
    }

    #[rstest]
    #[case::nothing(InFlight::default(), false, 1, &[], &[])]
    #[case::plain_jobs(InFlight { by_workflow: jobs("plain"), ..InFlight::default() }, false, 1, &[], &[])]
    #[case::untold(InFlight { untold: 1, ..InFlight::default() }, false, 1, &["LOG_FORMAT"], &[])]
    #[case::held(
        InFlight { held: 2, ..InFlight::default() }, false, 1, &[], &["2 jobs wait for their turn"])]
    #[case::one_held(
        InFlight { held: 1, ..InFlight::default() }, false, 1, &[], &["1 job waits for its turn"])]
    #[case::steps_that_are_kept(
        InFlight { with_steps: jobs("gone"), ..InFlight::default() }, false, 1, &[],
        &["jobs of several steps are in flight"])]
    #[case::all(
        InFlight { by_workflow: jobs("chain"), held: 2, ..InFlight::default() }, true, 2,
        &["SDK_RABBITMQ_TLS"],
        &[
            "jobs of several steps are in flight", "2 jobs wait for their turn",
            "the definition file has workflows of steps", "several hosts are set for one name",
            "passwords or TLS are set in a way that it does not read",
        ])]
    fn whatever_is_in_the_way_is_a_reason(
        #[case] in_flight: InFlight,
        #[case] has_steps: bool,
        #[case] servers: usize,
        #[case] variables: &[&str],
        #[case] expected: &[&str],
    ) {
        let mut file = vec![
            json!({"workflow_type_name": "plain", "workflow_type_description_name": "", "default_timeout_sec": 5}),
        ];
        if has_steps {
            let steps = json!([{"task": "first"}, {"task": "second"}]);
            file.push(json!({"workflow_type_name": "chain", "workflow_type_description_name": "", "steps": steps}));
        }
        let catalogue = Catalogue::parse(&json!(file).to_string()).unwrap();
        let variables: Vec<_> = variables.iter().map(|name| (*name).to_owned()).collect();
        let remarks = back(&in_flight, &catalogue, &[(Vhost::Sdk, servers)], &variables);
        let reasons: Vec<_> = remarks.into_iter().filter_map(|one| one.hinders).collect();
        assert_eq!(reasons, expected);
        let verdict = verdict_back(&reasons);
        assert_eq!(verdict.starts_with("Safe to go back: "), reasons.is_empty());
        assert!(verdict.ends_with('.') && reasons.iter().all(|one| verdict.contains(one)));
    }
}
