//! The command line.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rstest::rstest;
use serde_json::{Value, json};

use crate::harness::deployment::{Deployment, close_a_connection, eventually, management, setting};
use crate::harness::peers::{Client, Worker};

const INPUT: &str = "<esdl:EnergySystem xmlns:esdl='e' id='in'/>";

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
    fs::write(deployment.folder.join("in.esdl"), INPUT).unwrap();
    let arguments = [
        "submit",
        "in.esdl",
        "--workflow",
        "workflow_2",
        "--param",
        "integer_example=3",
        "--param",
        "string_example=key1",
        "--param",
        "float_example_basic=0.5",
        "--param",
        "datetime_example=2026-01-01",
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
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let message = worker.take_message();
    assert_eq!(message.properties.priority(), &Some(6));
    let body = message.json();
    assert_eq!(body[0][1], "mine");
    assert_eq!(body[0][2], INPUT);
    assert_eq!(
        body[0][3],
        json!({"integer_example": 3.0, "string_example": "key1", "float_example_basic": 0.5,
               "datetime_example": 1_767_225_600.0})
    );
    let job = body[0][0]["__value__"]["hex"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let id = message.properties.correlation_id().clone().unwrap();
    let task = crate::harness::peers::Task { job, id };
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
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
    let said = String::from_utf8(output.stderr).unwrap();
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
    fs::write(deployment.folder.join("in.esdl"), INPUT).unwrap();
    let child = deployment
        .command(&["submit", "in.esdl", "--workflow", "workflow_1"])
        .stderr(Stdio::piped())
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
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("result CANCELLED"), "{said}");
}

/// What a child has said on standard error, line by line, until one has this text.
fn heard(said: &mut impl Iterator<Item = std::io::Result<String>>, text: &str) -> String {
    let lines = said.map(Result::unwrap);
    let mut all = String::new();
    for line in lines {
        all += &format!("{line}\n");
        if line.contains(text) {
            return all;
        }
    }
    panic!("{text:?} is not in {all}");
}

fn interrupt(child: &Child) {
    let id = child.id().to_string();
    let sent = Command::new("kill").args(["-INT", &id]).status().unwrap();
    assert!(sent.success());
}

#[test]
fn a_job_is_followed_on_when_rabbitmq_is_back() {
    let deployment = Deployment::with_own_servers();
    let service = deployment.start();
    let submit = |more: &[&str]| Stub(submitting(&deployment, more).spawn().unwrap());
    let mut child = submit(&["--output", "out.esdl"]);
    let mut other = submit(&[]);
    let [mut said, mut other_said] = [&mut child, &mut other]
        .map(|child| BufReader::new(child.0.stderr.take().unwrap()).lines());
    for said in [&mut said, &mut other_said] {
        heard(said, "status ENQUEUED");
    }
    // Queues that are so new would not outlive a kill.
    deployment.rabbitmqctl(&["stop_app"]);
    heard(&mut said, "is followed again as soon as RabbitMQ answers");
    // Whoever has enough of it is told how to learn more.
    heard(
        &mut other_said,
        "is followed again as soon as RabbitMQ answers",
    );
    interrupt(&other.0);
    heard(&mut other_said, "once more gives up");
    interrupt(&other.0);
    let last = heard(&mut other_said, "is followed no further");
    assert!(last.contains("`jobs show "), "{last}");
    assert!(last.contains("NOT cancelled"), "{last}");
    assert_eq!(other.0.wait().unwrap().code(), Some(1));

    deployment.rabbitmqctl(&["start_app"]);
    service.wait_until_ready();
    let worker = Worker::of_existing(&deployment, "workflow_1");
    heard(&mut said, "RabbitMQ answers again");
    for _ in 0..2 {
        worker.succeed(&worker.take(), "<e id='out'/>");
    }
    heard(&mut said, "result SUCCEEDED");
    assert!(child.0.wait().unwrap().success());
    let written = fs::read_to_string(deployment.folder.join("out.esdl")).unwrap();
    assert_eq!(written, "<e id='out'/>");
}

#[test]
fn a_job_that_is_refused_fails_the_command() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    fs::write(deployment.folder.join("in.esdl"), INPUT).unwrap();
    let (code, _, said) = check(
        &deployment,
        &["submit", "in.esdl", "--workflow", "nonsense", "--unchecked"],
    );
    assert_eq!(code, Some(1));
    assert!(said.contains("Workflow type nonsense is unknown"), "{said}");
}

/// `submit` of a small ESDL to workflow_1, with these arguments.
fn submitting(deployment: &Deployment, more: &[&str]) -> Command {
    fs::write(deployment.folder.join("in.esdl"), INPUT).unwrap();
    let arguments = ["submit", "in.esdl", "--workflow", "workflow_1"];
    let mut command = deployment.command(&[&arguments, more].concat());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn no_result_is_lost_among_many() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let worker = Worker::new(&deployment, "workflow_1");
    for round in 0..60 {
        let name = format!("{round}.esdl");
        let child = submitting(&deployment, &["--output", &name])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let task = worker.take();
        worker.succeed(&task, &format!("<e id='out-{round}'/>"));
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert_eq!(output.status.code(), Some(0), "round {round}: {said}");
        // The test's worker is no consumer.
        let said = said.replace("warning: no worker takes", "");
        assert!(!said.contains("warning"), "round {round}: {said}");
        let result = fs::read_to_string(deployment.folder.join(&name)).unwrap();
        assert_eq!(result, format!("<e id='out-{round}'/>"));
    }
    // Neither half a file nor a queue is left.
    let files = fs::read_dir(&deployment.folder).unwrap();
    let strays = files
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(".esdl") && !name.ends_with(".log"))
        .filter(|name| !name.starts_with("pgbouncer."));
    assert_eq!(strays.collect::<Vec<_>>(), Vec::<String>::new());
    let queues = deployment.queues();
    assert!(
        !queues.iter().any(|queue| queue.starts_with("jobs.")),
        "{queues:?}"
    );
}

#[test]
fn what_fails_after_the_result_is_only_told() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let worker = Worker::new(&deployment, "workflow_1");
    let child = submitting(&deployment, &["--output", "out.esdl"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let task = worker.take();
    // Its queues may not be deleted any more.
    let rights = format!(
        "permissions/{}/{}",
        deployment.sdk_vhost(),
        setting("RABBITMQ_USER")
    );
    let body = json!({"configure": "^$", "write": ".*", "read": ".*"});
    management("PUT", &rights, Some(body));
    worker.succeed(&task, "<e id='out'/>");
    let output = child.wait_with_output().unwrap();
    let warned = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{warned}");
    let warning = "warning: the job's queues could not be deleted";
    assert!(warned.contains(warning), "{warned}");
    assert!(warned.contains("result SUCCEEDED"), "{warned}");
    let written = fs::read_to_string(deployment.folder.join("out.esdl")).unwrap();
    assert_eq!(written, "<e id='out'/>");
}

#[rstest]
#[case::no_folder("missing/out.esdl", "missing/out.esdl: No such file or directory")]
#[case::a_folder("folder", "folder: it is a folder")]
#[case::a_file_as_folder("in.esdl/out.esdl", "in.esdl/out.esdl: Not a directory")]
fn an_output_that_cannot_be_written_is_told_before_the_job_is_submitted(
    #[case] path: &str,
    #[case] fault: &str,
) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    fs::create_dir(deployment.folder.join("folder")).unwrap();
    // No service: a job that is submitted would stay in its queue.
    let mut command = submitting(&deployment, &["--output", path]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let code = eventually("the command ends, or has submitted the job", || {
        if client.peer.queue_length("job_submissions") > 0 {
            child.kill().unwrap();
        }
        child.try_wait().unwrap()
    });
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(client.peer.queue_length("job_submissions"), 0);
    assert_eq!(code.code(), Some(1));
    assert!(said.contains(fault), "{said}");
}

/// What is in the file before, while and after a job runs whose output goes there.
#[rstest]
#[case::new(None)]
#[case::old(Some("what was there"))]
fn an_output_file_is_whole_or_as_it_was(#[case] before: Option<&str>) {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let worker = Worker::new(&deployment, "workflow_1");
    let file = deployment.folder.join("real.esdl");
    if let Some(before) = before {
        fs::write(&file, before).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        symlink("real.esdl", deployment.folder.join("out.esdl")).unwrap();
    }
    let name = before.map_or("real.esdl", |_| "out.esdl");
    let submit = || {
        let mut command = submitting(&deployment, &["--output", name]);
        command.stdout(Stdio::piped()).spawn().unwrap()
    };
    let child = submit();
    let task = worker.take();
    assert_eq!(fs::read_to_string(&file).ok().as_deref(), before);
    worker.fail(&task);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(1));
    assert_eq!(fs::read_to_string(&file).ok().as_deref(), before);

    let child = submit();
    worker.succeed(&worker.take(), "<e id='out'/>");
    assert!(child.wait_with_output().unwrap().status.success());
    assert_eq!(fs::read_to_string(&file).unwrap(), "<e id='out'/>");
    if before.is_some() {
        // It is the same file to whoever has it.
        assert!(deployment.folder.join("out.esdl").is_symlink());
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
    }
}

#[test]
fn an_output_may_be_a_device() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let worker = Worker::new(&deployment, "workflow_1");
    let log = deployment.folder.join("said");
    for into_a_file in [false, true] {
        let mut command = submitting(&deployment, &["--output", "/dev/stdout"]);
        let child = match into_a_file {
            false => command.stdout(Stdio::piped()),
            true => command.stdout(fs::File::create(&log).unwrap()),
        }
        .spawn()
        .unwrap();
        worker.succeed(&worker.take(), "<e id='out'/>");
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let said = match into_a_file {
            false => String::from_utf8(output.stdout).unwrap(),
            true => fs::read_to_string(&log).unwrap(),
        };
        assert_eq!(said, "<e id='out'/>\n");
    }
}

#[test]
fn what_is_shown_of_a_job_is_harmless() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let worker = Worker::new(&deployment, "workflow_1");
    let child = submitting(&deployment, &["--reference", "a\u{202e}b"])
        .spawn()
        .unwrap();
    let task = worker.take();
    worker.start(&task);
    worker.progress_saying(&task, 7.5, "gpj\u{202e}.exe\n\u{1b}[2J");
    let list = eventually("the progress in the list", || {
        let (_, said, _) = check(&deployment, &["jobs", "list"]);
        said.contains("gpj").then_some(said)
    });
    let (_, shown, _) = check(&deployment, &["jobs", "show", &task.job.to_string()]);
    let (_, page) = service.get("/").unwrap();
    assert!(
        page.contains("gpj\\u{202e}.exe") && page.contains("100 %"),
        "{page}"
    );
    assert!(
        !page.contains(['\u{202e}', '\u{1b}']) && !page.contains("750 %"),
        "{page}"
    );
    worker.succeed(&task, "<e id='out'/>");
    let said = String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap();
    for said in [list, shown, said] {
        assert!(said.contains("100 %") && !said.contains("750 %"), "{said}");
        assert!(said.contains("gpj\\u{202e}.exe\\n\\u{1b}[2J"), "{said}");
        assert!(!said.contains(['\u{202e}', '\u{1b}']), "{said}");
    }
}

#[test]
fn the_script_reads_settings_as_the_service_does() {
    let deployment = Deployment::new();
    let table: Vec<(String, Value)> =
        serde_json::from_str(include_str!("../env-lines.json")).unwrap();
    let file = deployment.folder.join("lines");
    for (line, expected) in table {
        fs::write(&file, &line).unwrap();
        let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/run.sh"))
            .args(["private", "variable", file.to_str().unwrap(), "NAME"])
            .env_remove("NAME")
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let read = String::from_utf8(output.stdout).unwrap();
        match expected {
            Value::String(value) => {
                assert_eq!(output.status.code(), Some(0), "{line:?}: {said}");
                assert_eq!(read, value, "{line:?}");
            }
            Value::Null => {
                assert_eq!(
                    (output.status.code(), read.as_str()),
                    (Some(0), ""),
                    "{line:?}"
                );
            }
            _ => {
                assert_eq!(output.status.code(), Some(1), "{line:?}");
                assert!(said.contains("lines, line 1: "), "{line:?}: {said}");
                assert!(
                    !said.contains("val ") && !said.contains("hunter2"),
                    "{said}"
                );
            }
        }
    }
    fs::write(&file, "NAME=1\nOTHER=2\n# x\nNAME='3'\n").unwrap();
    let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/run.sh"))
        .args(["private", "variable", file.to_str().unwrap(), "NAME"])
        .env_remove("NAME")
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"3");
}

#[rstest]
#[case::a_quote_left_open(
    "A=1\nSDK_RABBITMQ_PASSWORD=\"hunter2\n",
    ".env, line 2: SDK_RABBITMQ_PASSWORD: its quote is not closed on the line"
)]
#[case::no_name("\nhunter2\n", ".env, line 2: expected NAME=value")]
fn a_faulty_line_of_settings_is_told_without_what_is_in_it(
    #[case] settings: &str,
    #[case] fault: &str,
) {
    let deployment = Deployment::new();
    fs::write(deployment.folder.join(".env"), settings).unwrap();
    for arguments in [&["config"][..], &["doctor"], &["healthcheck"], &["run"]] {
        let (code, printed, said) = check(&deployment, arguments);
        assert_eq!(code, Some(1));
        assert!(said.contains(fault), "{said}");
        assert!(!(said + &printed).contains("hunter2"));
    }
}

/// A text in what an editor on Windows may write.
#[rstest]
#[case::marked(b"\xef\xbb\xbf", None)]
#[case::utf_16(b"\xff\xfe", Some("it is in UTF-16, expected UTF-8"))]
fn files_are_read_whatever_editor_wrote_them(#[case] mark: &[u8], #[case] fault: Option<&str>) {
    let deployment = Deployment::new();
    let write = |name: &str, text: &str| {
        let body: Vec<u8> = match fault {
            None => text.into(),
            Some(_) => text.encode_utf16().flat_map(u16::to_le_bytes).collect(),
        };
        fs::write(deployment.folder.join(name), [mark, &body].concat()).unwrap();
    };
    write(
        "workflows.json",
        r#"[{"workflow_type_name": "w", "workflow_type_description_name": "d"}]"#,
    );
    let (code, printed, said) = check(&deployment, &["workflows", "check", "workflows.json"]);
    assert_eq!(code, Some(i32::from(fault.is_some())), "{said}");
    assert!(
        fault.map_or(printed == "w: d\n", |fault| said.contains(fault)),
        "{said}"
    );

    write("secret", "hunter2\r\n");
    let mut command = deployment.command(&["config"]);
    command
        .env_remove("INFLUXDB_PASSWORD")
        .env("INFLUXDB_PASSWORD_FILE", "./secret");
    let output = command.output().unwrap();
    assert_eq!(output.status.success(), fault.is_none());

    write(".env", "HANDLER_THREADS=7\r\n");
    let (code, printed, said) = check(&deployment, &["config", "--json"]);
    assert_eq!(code, Some(i32::from(fault.is_some())), "{said}");
    assert!(
        fault.map_or(printed.contains(r#""value": "7""#), |fault| said
            .contains(fault)),
        "{said}"
    );
}

#[test]
fn a_name_that_is_almost_one_is_told_wherever_somebody_looks() {
    let deployment = Deployment::new();
    fs::write(
        deployment.folder.join(".env"),
        "JOB_RETENTON_SEC=hunter2\nPOSTGRES_PASSWORD=x\n",
    )
    .unwrap();
    let warning = "JOB_RETENTON_SEC is set, and nobody reads it: did you mean JOB_RETENTION_SEC?";
    let (code, _, said) = check(&deployment, &["config"]);
    assert_eq!(code, Some(0));
    assert_eq!(said, format!("warning: {warning}\n"));
    let (code, printed, _) = check(&deployment, &["doctor"]);
    assert_eq!(code, Some(1));
    assert!(printed.contains(warning), "{printed}");
    let service = deployment.start();
    service.logged(warning);
    let log = service.log();
    assert_eq!(log.matches("did you mean").count(), 1, "{log}");
    assert!(!log.contains("hunter2") && !printed.contains("hunter2"));
}

/// Whatever is in a password, nobody sees it when it is not the right one, nor before.
#[rstest]
fn no_command_shows_a_password(
    #[values(
        "us$er#1",
        "hunter2 # x",
        "'hunter2'",
        "hunter2\\",
        "hunter2@host:5672/x?y=z",
        "%68unter2",
        "\u{202e}hunter2",
        "a\"b\"hunter2"
    )]
    password: &str,
) {
    let deployment = Deployment::new();
    let quoted = password.replace('\\', "\\\\").replace('"', "\\\"");
    let names = [
        "SDK_RABBITMQ_PASSWORD",
        "TASK_RABBITMQ_PASSWORD",
        "CELERY_RABBITMQ_PASSWORD",
        "INFLUXDB_PASSWORD",
        "POSTGRESQL_PASSWORD",
    ];
    let lines = names.map(|name| format!("{name}=\"{quoted}\"\n"));
    let auth = format!("HTTP_BASIC_AUTH=\"operator:{quoted}\"\n");
    fs::write(deployment.folder.join(".env"), lines.concat() + &auth).unwrap();
    for (arguments, to_postgres) in [
        (&["config"][..], true),
        (&["config", "--json"], true),
        (&["db", "current"], true),
        (&["doctor"], false),
        (&["queues"], false),
        (&["dead-letters", "list"], false),
        (&["time-series", "list"], false),
        (&["healthcheck"], false),
    ] {
        let mut command = deployment.command(arguments);
        for name in &names[..if to_postgres { 5 } else { 4 }] {
            command.env_remove(name);
        }
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        let leaked = said.contains(password) || said.contains("unter2") || said.contains("us$er");
        assert!(!leaked, "{arguments:?}: {said}");
    }
}

/// A process that is killed with the test.
struct Stub(Child);

impl Stub {
    fn start(deployment: &Deployment) -> Stub {
        let program = Path::new(env!("CARGO_BIN_EXE_omotes-orchestrator"));
        let worker = program.with_file_name("examples").join("worker");
        assert!(worker.exists(), "`cargo build --example worker` makes it");
        let mut command = Command::new(worker);
        command
            .args(["--workflow", "simulator", "--seconds", "0.1"])
            .current_dir(&deployment.folder)
            .env_clear()
            .envs(deployment.variables());
        Stub(command.spawn().unwrap())
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_stub_worker_does_what_jobs_ask_for() {
    let deployment = Deployment::new();
    let definitions = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/development.json");
    let variables = [
        ("WORKFLOW_CONFIG_PATH", definitions),
        ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
    ];
    let _service = deployment.start_with(&variables);
    fs::write(deployment.folder.join("in.esdl"), INPUT).unwrap();
    let submit = |outcome: &str| {
        let parameter = format!("outcome={outcome}");
        let arguments = ["submit", "in.esdl", "--workflow", "simulate", "--param"];
        let mut command = deployment.command(&arguments);
        command.args([&parameter, "--param", "seconds=0.1"]);
        command.env("WORKFLOW_CONFIG_PATH", definitions);
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut stub = Stub::start(&deployment);
    let [good, bad] = ["succeed", "fail"].map(|outcome| {
        let output = submit(outcome).wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), said)
    });
    assert_eq!(good.0, Some(0), "{}", good.1);
    assert!(good.1.contains("Computed for 0.1 seconds."), "{}", good.1);
    assert_eq!(bad.0, Some(1), "{}", bad.1);
    assert!(bad.1.contains("as the job asks for"), "{}", bad.1);

    let mut crashing = submit("crash");
    let outcome = eventually("the job ends for its workers died", || {
        if stub.0.try_wait().unwrap().is_some() {
            stub = Stub::start(&deployment);
        }
        crashing.try_wait().unwrap()
    });
    assert_eq!(outcome.code(), Some(1));

    close_a_connection(&deployment.celery_vhost(), "worker, tasks");
    assert!(submit("succeed").wait().unwrap().success());
}
