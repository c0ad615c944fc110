//! The command line.

use std::fs;
use std::process::{Command, Stdio};

use crate::deployment::{Deployment, eventually};
use crate::peers::Worker;

fn check(deployment: &Deployment, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = deployment.command(arguments).output().unwrap();
    (
        output.status.code(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn all_faults_of_the_configuration_are_reported_at_once() {
    let deployment = Deployment::new();
    let mut service = deployment.launch(&[
        ("SDK_RABBITMQ_PORT", "amqp"),
        ("POSTGRESQL_PORT", "70000"),
        ("JOB_RETENTION_SEC", "-5"),
        ("DELIVERY_LIMIT_THRESHOLD_PER_JOB", "0"),
        ("LOG_LEVEL", "LOUD"),
        ("SDK_RABBITMQ_PASSWORD", "hunter2"),
    ]);
    assert_eq!(service.wait().code(), Some(1));
    let log = service.log();
    assert_eq!(log.matches("expected").count(), 5, "{log}");
    assert!(
        log.contains("SDK_RABBITMQ_PORT: found \"amqp\", expected a port from 1 to 65535"),
        "{log}"
    );
    assert!(!log.contains("hunter2"));
}

#[test]
fn a_file_of_settings_is_read_and_the_environment_goes_before_it() {
    let deployment = Deployment::new();
    fs::write(
        deployment.folder.join(".env"),
        "LOG_LEVEL=LOUD\nHANDLER_THREADS=many\nPOSTGRESQL_PORT=nonsense\n",
    )
    .unwrap();
    let (code, _, said) = check(&deployment, &["healthcheck"]);
    assert_eq!(code, Some(1));
    // LOG_LEVEL and POSTGRESQL_PORT are set by the environment.
    assert!(said.contains("HANDLER_THREADS: found \"many\""), "{said}");
    assert!(
        !said.contains("LOG_LEVEL") && !said.contains("POSTGRESQL_PORT"),
        "{said}"
    );
}

#[test]
fn the_configuration_in_force_is_shown_with_where_it_comes_from() {
    let deployment = Deployment::new();
    let settings = "LOG_LEVEL=ERROR\nHANDLER_THREADS=7\nHTTP_BASIC_AUTH=operator:hunter2\n";
    fs::write(deployment.folder.join(".env"), settings).unwrap();
    let (code, shown, _) = check(&deployment, &["config"]);
    assert_eq!(code, Some(0), "{shown}");
    let row = |name: &str| -> Vec<&str> {
        let row = shown
            .lines()
            .find(|line| line.trim_start().starts_with(name));
        row.unwrap().split_whitespace().skip(1).collect()
    };
    assert_eq!(row("HANDLER_THREADS"), ["7", ".env"]);
    assert_eq!(row("LOG_LEVEL"), ["DEBUG", "environment"]);
    assert_eq!(row("JOB_RETENTION_SEC"), ["172800", "default"]);
    assert_eq!(row("HTTP_BASIC_AUTH"), ["***", ".env"]);
    assert_eq!(row("POSTGRESQL_PASSWORD "), ["***", "environment"]);
    let file = deployment.folder.join(".env");
    fs::write(file, "HANDLER_THREADS=many\n").unwrap();
    let (code, shown, said) = check(&deployment, &["config", "--json"]);
    assert_eq!(code, Some(1));
    assert!(shown.contains(r#""value": "many""#), "{shown}");
    assert!(said.contains("HANDLER_THREADS: found"), "{said}");
}

#[test]
fn a_faulty_definition_file_stops_the_start_with_its_path() {
    let deployment = Deployment::new();
    let file = deployment.folder.join("workflows.json");
    fs::write(&file, r#"[{"workflow_type_name": 7}]"#).unwrap();
    let mut service = deployment.launch(&[("WORKFLOW_CONFIG_PATH", file.to_str().unwrap())]);
    assert_eq!(service.wait().code(), Some(1));
    let log = service.log();
    assert!(
        log.contains("$[0].workflow_type_name: found 7, expected a text"),
        "{log}"
    );
    assert!(log.contains(file.to_str().unwrap()), "{log}");
}

#[test]
fn definitions_can_be_checked_before_they_are_deployed() {
    let deployment = Deployment::new();
    let good = concat!(env!("CARGO_MANIFEST_DIR"), "/config/workflow_config.json");
    let (code, said, _) = check(&deployment, &["workflows", "check", good]);
    assert_eq!(code, Some(0));
    assert!(
        said.contains("simulator: Conceptual Design - Simulation\n  timestep: duration"),
        "{said}"
    );
    assert!(said.contains("    smaller end_time"), "{said}");
    let missing = deployment.folder.join("missing.json");
    let (code, _, said) = check(
        &deployment,
        &["workflows", "check", missing.to_str().unwrap()],
    );
    assert_eq!(code, Some(1));
    assert!(said.contains("missing.json: No such file"), "{said}");
}

#[test]
fn the_healthcheck_tells_whether_the_service_is_ready() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let bind = service.http().to_string();
    let mut command = deployment.command(&["healthcheck"]);
    assert!(command.env("HTTP_BIND", &bind).status().unwrap().success());
    assert!(service.stop().success());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains(&bind), "{said}");
}

#[test]
fn the_health_endpoint_answers_what_it_knows() {
    let deployment = Deployment::new();
    let service = deployment.start();
    assert_eq!(service.get("/health/live").unwrap().0, 200);
    assert_eq!(service.get("/health/ready?x=1").unwrap().0, 200);
    assert_eq!(service.get("/elsewhere").unwrap().0, 404);
    let url = format!("http://{}/health/ready", service.http());
    let refused = ureq::post(url).send_empty().unwrap_err();
    assert!(matches!(refused, ureq::Error::StatusCode(405)), "{refused}");
}

#[test]
fn a_job_is_submitted_and_followed() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let worker = Worker::new(&deployment, "workflow_2");
    fs::write(deployment.folder.join("in.esdl"), "<e id='in'/>").unwrap();
    let arguments = [
        "submit",
        "in.esdl",
        "--workflow",
        "workflow_2",
        "--param",
        "integer_example=3",
        "--param",
        "string_example=key1",
        "--reference",
        "mine",
        "--priority",
        "high",
        "--timeout",
        "1h30m",
        "--output",
        "out.esdl",
    ];
    let child = deployment
        .command(&arguments)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let message = worker.take_message();
    assert_eq!(message.properties.priority(), &Some(6));
    let body = message.json();
    assert_eq!(body[0][1], "mine");
    assert_eq!(body[0][2], "<e id='in'/>");
    assert_eq!(
        body[0][3],
        serde_json::json!({"integer_example": 3.0, "string_example": "key1"})
    );
    let job = body[0][0]["__value__"]["hex"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let id = message.properties.correlation_id().clone().unwrap();
    let task = crate::peers::Task { job, id };
    let timeout = "SELECT timeout_after_ms FROM job";
    let row = eventually("the row", || {
        deployment.sql().query_opt(timeout, &[]).unwrap()
    });
    assert_eq!(row.get::<_, i64>(0), 90 * 60 * 1000);
    worker.start(&task);
    worker.progress(&task, 0.5);
    // In different queues: the result must not overtake the progress.
    eventually("the progress is on its way", || {
        (worker.peer.queue_length("omotes_task_progress_events") == 0).then_some(())
    });
    worker.succeed(&task, "<e id='out'/>");
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let said = String::from_utf8(output.stdout).unwrap();
    for line in [
        "submitted to workflow_2",
        "status ENQUEUED",
        "result SUCCEEDED",
        "the worker's logs",
    ] {
        assert!(said.contains(line), "{said}");
    }
    assert_eq!(
        fs::read_to_string(deployment.folder.join("out.esdl")).unwrap(),
        "<e id='out'/>"
    );
}

#[test]
fn ctrl_c_cancels_the_job() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let worker = Worker::new(&deployment, "workflow_1");
    fs::write(deployment.folder.join("in.esdl"), "<e id='in'/>").unwrap();
    let child = deployment
        .command(&["submit", "in.esdl", "--workflow", "workflow_1"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let task = worker.take();
    let id = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &id])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(worker.revoked(), task.id);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("result CANCELLED"), "{said}");
}

#[test]
fn a_job_that_is_refused_fails_the_command() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    fs::write(deployment.folder.join("in.esdl"), "<e id='in'/>").unwrap();
    let (code, said, _) = check(
        &deployment,
        &["submit", "in.esdl", "--workflow", "nonsense"],
    );
    assert_eq!(code, Some(1));
    assert!(said.contains("Workflow type nonsense is unknown"), "{said}");
}
