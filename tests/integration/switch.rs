//! `doctor --before-switch`: what the next service would find, planted in real servers.

use std::fs;
use std::process::Command;

use amiquip::QueueDeclareOptions;
use omotes_orchestrator::wire::job_status_update::JobStatus;
use rstest::rstest;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::deployment::{Deployment, setting};
use crate::harness::peers::{Client, Peer, Worker};
use crate::migrate::alembic;

const RUNS: &str = "warning Switch: an orchestrator runs";

/// The first line of what is said to somebody.
fn verdict(deployment: &Deployment, flag: &str, variables: &[(&str, &str)]) -> String {
    let mut command = deployment.command(&["doctor", flag]);
    command.envs(variables.iter().copied());
    let text = String::from_utf8(command.output().unwrap().stdout).unwrap();
    text.lines().next().unwrap().to_owned()
}

/// What is said of the switch beside the verdict: severity, part, and what was found.
fn of_switch(deployment: &Deployment, flag: &str, variables: &[(&str, &str)]) -> Vec<String> {
    let mut command = deployment.command(&["doctor", "--json", flag]);
    command.envs(variables.iter().copied());
    said_of_switch(command)
}

fn said_of_switch(mut command: Command) -> Vec<String> {
    let output = command.output().unwrap();
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    let of_switch = findings.iter().filter(|finding| {
        finding["part"].as_str().unwrap().starts_with("Switch") && finding["role"] != "verdict"
    });
    of_switch
        .map(|finding| {
            let text = |field: &str| finding[field].as_str().unwrap().to_owned();
            assert_eq!(text("remedy").is_empty(), text("severity") == "ok");
            format!("{} {}: {}", text("severity"), text("part"), text("found"))
        })
        .collect()
}

/// On the way back, but for the variables of this service that each test sets.
fn back(deployment: &Deployment) -> Vec<String> {
    let mut found = of_switch(deployment, "--before-switch", &[]);
    let before = found.len();
    found.retain(|one| {
        let unread = one.starts_with("note Switch back: the Python service does not read ");
        !(unread && one.ends_with(" OUTCOME_DELAY_MS, WORKERS_PERIOD_SEC"))
    });
    assert_eq!(found.len(), before - 1, "{found:#?}");
    found
}

/// That each finding begins like this, in any order, and that there is no other.
fn are(found: &[String], expected: &[&str]) {
    let is_there = |one: &&str| found.iter().any(|finding| finding.starts_with(*one));
    let all = expected.iter().all(is_there);
    assert!(
        all && found.len() == expected.len(),
        "{found:#?}, not {expected:#?}"
    );
}

#[test]
fn nothing_stands_in_the_way_of_a_quiet_deployment() {
    let deployment = Deployment::new();
    let quiet = "ok Switch: no orchestrator runs";
    let no_job = "ok Switch: no job is in flight";
    let found = back(&deployment);
    are(&found, &[quiet, "ok Switch: there are no tables", no_job]);
    alembic(&deployment, &["upgrade", "head"]);
    let found = back(&deployment);
    let left = "ok Switch: the tables are as the Python service left them at 543bc8f6ad87";
    are(&found, &[quiet, left, no_job]);

    let service = deployment.start();
    let as_they_are = "ok Switch: to the Python service the tables are at its last revision";
    are(&back(&deployment), &[RUNS, as_they_are, no_job]);
    let said = |flag: &str| verdict(&deployment, flag, &[]);
    assert_eq!(
        said("--before-switch=back"),
        "Not yet back to the Python service: an orchestrator runs."
    );
    assert_eq!(
        said("--before-switch=here"),
        "Not yet to this service: an orchestrator runs."
    );
    let (_, page) = service.get("/").unwrap();
    for what in [
        "nothing is in the way",
        "Safe to go back: the Python service goes on where",
    ] {
        assert!(page.contains(what), "{what}: {page}");
    }
    assert!(service.stop().success());
    are(&back(&deployment), &[quiet, as_they_are, no_job]);
    assert!(said("--before-switch=back").starts_with("Safe to go back: "));
    assert!(said("--before-switch=here").starts_with("Safe to come to this service: "));
    // Unasked, nothing is said of it.
    are(
        &said_of_switch(deployment.command(&["doctor", "--json"])),
        &[],
    );
}

#[test]
fn what_waits_for_the_next_service_is_told() {
    let deployment = Deployment::new();
    alembic(&deployment, &["upgrade", "aacf0b4d16ad"]);
    let client = Client::new(&deployment);
    client.submit("workflow_1");
    client.submit("workflow_1");
    client.cancel(Uuid::new_v4());
    deployment
        .sql()
        .batch_execute(
            "INSERT INTO job (job_id, workflow_type, status, registered_at)
             SELECT gen_random_uuid(), 'workflow_1', status, now()
             FROM unnest(ARRAY['REGISTERED', 'RUNNING', 'RUNNING']::jobstatus[]) AS status",
        )
        .unwrap();
    let expected = [
        "ok Switch: no orchestrator runs",
        "note Switch: messages wait: 2 in job_submissions, 1 in job_deletions",
        "ok Switch: the tables are as the Python service left them at aacf0b4d16ad",
        "note Switch: jobs are in flight: 1 registered, 2 running",
        "note Switch: 1 of them have no task",
    ];
    are(
        &of_switch(&deployment, "--before-switch=here", &[]),
        &expected,
    );
    are(&back(&deployment), &expected);
    // That is no matter on the way back alone.
    let back = of_switch(&deployment, "--before-switch=back", &[]);
    let is_of_here = |one: &String| one.contains("have no task") || one.contains("this one adds");
    assert!(!back.iter().any(is_of_here), "{back:#?}");
}

#[rstest]
#[case::kept_by_the_database(true)]
#[case::known_by_the_file(false)]
fn jobs_of_steps_stand_in_the_way_back(#[case] is_kept: bool) {
    let deployment = Deployment::new();
    let file = deployment.folder.join("workflows.json");
    let step = |task: &str| json!({"task": task});
    let steps = match is_kept {
        true => json!([step("optimiser"), step("simulator")]),
        false => json!([step("optimiser")]),
    };
    let with_steps = json!([
        {"workflow_type_name": "chain", "workflow_type_description_name": "", "steps": steps},
        {"workflow_type_name": "limited", "workflow_type_description_name": "",
         "default_timeout_sec": 5},
        {"workflow_type_name": "retried", "workflow_type_description_name": "",
         "steps": [{"task": "retried", "retry": {"attempts": 2}}]},
        {"workflow_type_name": "plain", "workflow_type_description_name": ""},
    ]);
    fs::write(&file, with_steps.to_string()).unwrap();
    let variables = [("WORKFLOW_CONFIG_PATH", file.to_str().unwrap())];
    let found = |flag: &str| of_switch(&deployment, flag, &variables);
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "optimiser");
    let service = deployment.start_with(&variables);
    let job = client.submit("chain");
    worker.start(&worker.take());
    assert_eq!(client.status(job), JobStatus::Enqueued);
    assert_eq!(client.status(job), JobStatus::Running);
    assert!(service.stop().success());

    let here = [
        "ok Switch: no orchestrator runs",
        "ok Switch: to the Python service the tables are",
        "note Switch: jobs are in flight: 1 running",
    ];
    are(&found("--before-switch=here"), &here);
    let in_flight = "warning Switch back: jobs of steps are in flight, 1 of chain:";
    let others = [
        "note Switch back: with a limit, a timeout or a retry of their own, which the Python service ignores: limited, retried",
        "note Switch back: the Python service does not read ",
    ];
    let defined = "warning Switch back: of steps: chain. ";
    let expected = [&here[..], &others, &[in_flight, defined]].concat();
    are(&found("--before-switch=back"), &expected);
    assert_eq!(
        verdict(&deployment, "--before-switch=back", &variables),
        "Not yet back to the Python service: jobs of several steps are in flight; the definition file has \
         workflows of steps."
    );
    // Once the file knows it no more, the database still does, or nobody.
    let plain = json!([{"workflow_type_name": "chain", "workflow_type_description_name": ""}]);
    fs::write(&file, plain.to_string()).unwrap();
    let kept = match is_kept {
        true => vec![in_flight],
        false => vec![],
    };
    let expected = [&here[..], &others[1..], &kept].concat();
    are(&found("--before-switch=back"), &expected);
}

#[test]
fn what_would_stop_the_python_service_is_told() {
    let deployment = Deployment::new();
    assert!(deployment.start().stop().success());
    let sdk = Peer::new(&deployment, &deployment.sdk_vhost());
    sdk.declare("request_available_workflows");
    sdk.declare("omotes_dead_letters");
    sdk.send_safely("omotes_dead_letters", b"a letter");
    let password = deployment.folder.join("password");
    fs::write(&password, setting("RABBITMQ_PASSWORD")).unwrap();
    let variables = [
        ("TASK_RABBITMQ_HOSTNAME", "127.0.0.1,localhost"),
        ("SDK_RABBITMQ_PASSWORD_FILE", password.to_str().unwrap()),
    ];
    let mut command = deployment.command(&["doctor", "--json", "--before-switch"]);
    command.envs(variables).env_remove("SDK_RABBITMQ_PASSWORD");
    are(
        &said_of_switch(command),
        &[
            "ok Switch: no orchestrator runs",
            "ok Switch: to the Python service the tables are",
            "ok Switch: no job is in flight",
            "note Switch back: the Python service never looks at what is in omotes_dead_letters",
            "error Switch back: the queue request_available_workflows belongs to nobody",
            "warning Switch back: several hosts in TASK_RABBITMQ_HOSTNAME:",
            "warning Switch back: the Python service does not read SDK_RABBITMQ_PASSWORD_FILE",
            "note Switch back: the Python service does not read ",
        ],
    );
    let said = verdict(&deployment, "--before-switch=back", &variables[..1]);
    assert_eq!(
        said,
        "Not yet back to the Python service: request_available_workflows is in the way; several hosts are set \
         for one name."
    );
    // As the Python service declares it.
    let exclusive = QueueDeclareOptions {
        exclusive: true,
        ..QueueDeclareOptions::default()
    };
    let refused = sdk
        .channel
        .queue_declare("request_available_workflows", exclusive);
    assert!(refused.is_err());
}

#[test]
fn an_outcome_that_is_still_to_be_told_is_told_of() {
    let deployment = Deployment::new();
    assert!(deployment.start().stop().success());
    deployment
        .sql()
        .batch_execute(
            "INSERT INTO job (job_id, workflow_type, status, registered_at)
             VALUES (gen_random_uuid(), 'workflow_1', 'RUNNING', now());
             INSERT INTO job_history (job_id, finished_at, starts, outcome, result_bytes)
             SELECT job_id, now(), 1, 'CANCELLED', 0 FROM job",
        )
        .unwrap();
    are(
        &back(&deployment),
        &[
            "ok Switch: no orchestrator runs",
            "ok Switch: to the Python service the tables are",
            "note Switch: jobs are in flight: 1 running",
            "note Switch back: 1 job has ended and its client is not told",
        ],
    );
}
