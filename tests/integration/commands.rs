//! What the command line says, and where, and that it takes what it shows.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use omotes_orchestrator::wire::job_result::ResultType;
use rstest::rstest;
use serde_json::Value;
use uuid::Uuid;

use crate::harness::deployment::{Deployment, eventually};
use crate::harness::operator::Operator;
use crate::harness::peers::{Client, Worker};

const ESDL: &str = "<esdl:EnergySystem xmlns:esdl='e' id='in'/>";

fn run(deployment: &Deployment, arguments: &[&str]) -> (Option<i32>, String, String) {
    parts(deployment.command(arguments).output().unwrap())
}

fn parts(output: Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// A command on a terminal of so many columns, and what it shows there.
fn on_terminal(deployment: &Deployment, columns: u16, arguments: &str) -> String {
    let command = deployment.command(&[]);
    let program = command.get_program().display().to_string();
    let line = format!("stty cols {columns} rows 40; exec {program} {arguments}");
    let variables = command
        .get_envs()
        .filter_map(|(name, value)| Some((name, value?)));
    let output = Command::new("script")
        .args(["-qec", &line, "/dev/null"])
        .envs(variables)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_job_is_a_line_and_its_short_id_is_taken_everywhere() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let client = Client::new(&deployment);
    let (job, mut submission) = client.submission("workflow_1");
    submission.job_reference =
        Some("a reference that is far too long for a line of a list".to_owned());
    client.listen(job);
    client.send(&submission);
    client.status(job);
    let shown = on_terminal(&deployment, 80, "jobs list");
    let lines: Vec<_> = shown.lines().map(str::trim_end).collect();
    assert_eq!(lines.len(), 2, "{shown}");
    assert!(
        lines.iter().all(|line| line.chars().count() <= 80),
        "{shown}"
    );
    let id = lines[1].split_whitespace().next().unwrap();
    assert_eq!(id, &job.to_string()[..8], "{shown}");
    assert!(lines[1].contains("waiting"), "{shown}");

    for state in ["waiting", "WAITING", "submitted"] {
        let (_, listed, _) = run(&deployment, &["jobs", "list", "--state", state]);
        assert!(listed.contains(&job.to_string()), "{state}: {listed}");
    }
    let (code, listed, said) = run(&deployment, &["jobs", "list", "--state", "running"]);
    assert_eq!((code, listed.as_str()), (Some(0), ""));
    assert!(
        said.starts_with("no job matches that has not ended"),
        "{said}"
    );
    let (code, _, said) = run(&deployment, &["jobs", "list", "--state", "timedout"]);
    assert_eq!(code, Some(2));
    assert!(said.contains("waiting, running, held, on-hold,"), "{said}");
    assert!(said.contains("timed-out"), "{said}");

    let (code, shown, said) = run(&deployment, &["jobs", "show", id]);
    assert_eq!(code, Some(0), "{said}");
    assert!(shown.contains(&job.to_string()), "{shown}");
    let (code, _, said) = run(&deployment, &["jobs", "show", "0000"]);
    assert_eq!(code, Some(1));
    assert_eq!(said, "omotes-orchestrator: no job's id begins with 0000\n");
    let (code, said, _) = run(&deployment, &["jobs", "cancel", &id[..4]]);
    assert_eq!(
        (code, said),
        (Some(0), format!("job {job} is asked to end\n"))
    );
    assert_eq!(client.outcome(job).0, ResultType::Cancelled);
    // It is as short once it has ended.
    deployment.no_jobs_left();
    let (_, said, _) = run(&deployment, &["jobs", "cancel", id]);
    assert_eq!(said, format!("job {job} has ended already\n"));
}

#[test]
fn an_id_that_may_be_several_is_told_with_those() {
    let deployment = Deployment::new();
    assert!(deployment.start().stop().success());
    let ids = [
        "abcd0000-0000-4000-8000-000000000001",
        "abcd0000-0000-4000-8000-000000000002",
    ];
    for id in ids {
        let sql = format!(
            "INSERT INTO job (job_id, workflow_type, status, registered_at, job_reference)
             VALUES ('{id}', 'workflow_1', 'REGISTERED', now(), 'study {id}')"
        );
        deployment.sql().batch_execute(&sql).unwrap();
    }
    for arguments in [&["show"][..], &["cancel"], &["hold"]] {
        let (code, _, said) = run(&deployment, &[&["jobs"], arguments, &["abcd"]].concat());
        assert_eq!(code, Some(1));
        for id in ids {
            assert!(said.contains(&format!("{id} study {id}")), "{said}");
        }
    }
    // Even a list shows as much as tells them apart.
    let shown = on_terminal(&deployment, 80, "jobs list");
    assert!(
        shown.contains(ids[0]) || shown.contains("abcd0000-0000-4000-8000-00000000000"),
        "{shown}"
    );
}

/// `submit` with these arguments, of an ESDL with this text.
fn submit(deployment: &Deployment, esdl: &str, arguments: &[&str]) -> Command {
    fs::write(deployment.folder.join("in.esdl"), esdl).unwrap();
    deployment.command(&[&["submit", "in.esdl", "--workflow"], arguments].concat())
}

#[rstest]
#[case::workflow(ESDL, &["simulater"], "there is no workflow simulater: did you mean simulator? There are")]
#[case::another_workflow(ESDL, &["x"], "grow_optimizer_with_pressure, ")]
#[case::key(
    ESDL, &["simulator", "--param", "timestpe=1h"],
    "timestpe is not known: did you mean timestep? There are timestep, start_time, end_time")]
#[case::date(
    ESDL, &["simulator", "--param", "start_time=tomorrow", "--param", "end_time=2026-01-02"],
    "start_time is \"tomorrow\", expected a date such as 2026-01-31")]
#[case::order(
    ESDL,
    &["simulator_constrained", "--param", "timestep=1h", "--param", "start_time=2026-01-02",
      "--param", "end_time=2026-01-01"],
    "expected less than end_time")]
#[case::missing(ESDL, &["simulator", "--param", "timestep=1h"], "start_time is missing\nend_time is missing")]
#[case::no_esdl("{}", &["workflow_1"], "in.esdl is no ESDL: it is no XML")]
#[case::another_document("<a/>", &["workflow_1"], "in.esdl is no ESDL: it has no EnergySystem")]
fn what_cannot_work_is_not_submitted(
    #[case] esdl: &str,
    #[case] arguments: &[&str],
    #[case] expected: &str,
) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let mut command = submit(&deployment, esdl, arguments);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("the command ends, or has submitted the job", || {
        if client.peer.queue_length("job_submissions") > 0 {
            child.kill().unwrap();
        }
        child.try_wait().unwrap()
    });
    let (code, printed, said) = parts(child.wait_with_output().unwrap());
    assert_eq!((code, printed.as_str()), (Some(1), ""), "{said}");
    assert!(said.contains(expected), "{said}");
    assert!(
        said.ends_with("nothing was submitted; --unchecked does all the same\n"),
        "{said}"
    );
    assert_eq!(client.peer.queue_length("job_submissions"), 0);
}

#[test]
fn dates_and_times_are_sent_as_seconds_and_the_result_alone_is_printed() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let worker = Worker::new(&deployment, "simulator");
    let arguments = [
        "simulator",
        "--param",
        "timestep=15min",
        "--param",
        "start_time=2026-01-01T01:00+01:00",
        "--param",
        "end_time=2026-01-02",
    ];
    let mut command = submit(&deployment, ESDL, &arguments);
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let message = worker.take_message();
    let params = &message.json()[0][3];
    assert_eq!(params["timestep"], 900.0);
    assert_eq!(params["start_time"], 1_767_225_600.0);
    assert_eq!(params["end_time"], 1_767_312_000.0);
    let task = crate::harness::peers::Task::of(&message);
    worker.start(&task);
    worker.succeed(&task, "<e id='out'/>");
    let (code, printed, said) = parts(child.wait_with_output().unwrap());
    assert_eq!(
        (code, printed.as_str()),
        (Some(0), "<e id='out'/>\n"),
        "{said}"
    );
    assert!(said.contains("result SUCCEEDED"), "{said}");
}

#[test]
fn who_waits_for_a_job_is_told_that_nobody_takes_it() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let mut command = submit(&deployment, ESDL, &["workflow_1"]);
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    let first = said.next().unwrap().unwrap();
    assert_eq!(
        first,
        "warning: no orchestrator runs on this vhost: the job waits in RabbitMQ until one does"
    );
    let second = said.next().unwrap().unwrap();
    let job: Uuid = second.split_whitespace().nth(1).unwrap().parse().unwrap();
    let service = deployment.start();
    let mut rest = said.map(|line| line.unwrap());
    let nobody = "warning: no worker takes workflow_1: the job waits until one does";
    assert!(rest.any(|line| line == nobody));
    assert!(service.stop().success());
    let (code, printed, _) = run(&deployment, &["jobs", "cancel", &job.to_string()]);
    assert_eq!(code, Some(0));
    assert!(
        printed.contains("but no orchestrator runs on this vhost"),
        "{printed}"
    );
    drop(client);
    let _service = deployment.start();
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

/// And with the commit, where the build knows it.
#[test]
fn the_version_is_more_than_a_number() {
    let deployment = Deployment::new();
    let (code, version, _) = run(&deployment, &["--version"]);
    assert_eq!(code, Some(0));
    let more = version.strip_prefix(concat!("omotes-orchestrator ", env!("CARGO_PKG_VERSION")));
    let more = more.unwrap().trim();
    assert!(more.starts_with('(') && more.ends_with(')'), "{version}");
}

#[test]
fn empty_lists_say_so_beside_standard_output() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    for (arguments, expected) in [
        (&["jobs", "list"][..], "no job waits or runs"),
        (&["jobs", "list", "--finished"], "no job has ended yet"),
        (&["dead-letters", "list"], "there are no dead letters"),
        (
            &["dead-letters", "requeue", "--all"],
            "there are no dead letters",
        ),
        (
            &["dead-letters", "drop", "--all"],
            "there are no dead letters",
        ),
        (
            &["time-series", "list"],
            "nothing is known of any time series",
        ),
        (&["workers"], "no worker is known"),
        (&["jobs", "cancel", "--workflow", "x"], "no job matches"),
    ] {
        let (code, printed, said) = run(&deployment, arguments);
        assert_eq!(
            (code, printed.as_str()),
            (Some(0), ""),
            "{arguments:?}: {said}"
        );
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
}

#[test]
fn the_limits_of_the_running_service_are_told_and_those_that_differ() {
    let deployment = Deployment::new();
    assert!(deployment.start().stop().success());
    let (code, _, said) = run(
        &deployment,
        &["workflows", "limit", "workflow_1", "--window", "7"],
    );
    assert_eq!(code, Some(0), "{said}");
    let service = deployment.start_with(&[
        ("JOB_RETENTION_SEC", "7200"),
        ("HTTP_BASIC_AUTH", "anna:hunter2"),
        ("HTTP_READONLY_AUTH", "ben:looks"),
    ]);
    let bind = service.http().to_string();
    let ask = |arguments: &[&str], variables: &[(&str, &str)]| {
        let mut command = deployment.command(&[&["config", "--running"], arguments].concat());
        let variables = variables.iter().copied();
        command.envs(variables).env("HTTP_BIND", &bind);
        let (code, shown, said) = parts(command.output().unwrap());
        for secret in ["hunter2", "looks", "guess"] {
            assert!(
                !shown.contains(secret) && !said.contains(secret),
                "{shown}{said}"
            );
        }
        (code, shown, said)
    };
    let (code, shown, said) = ask(&[], &[]);
    assert_eq!((code, shown.as_str()), (Some(1), ""));
    let account =
        "it wants an account: set HTTP_READONLY_AUTH, or HTTP_BASIC_AUTH, as the service has it";
    assert!(said.contains(account), "{said}");
    let (code, _, said) = ask(&[], &[("HTTP_READONLY_AUTH", "ben:guess")]);
    assert_eq!(code, Some(1));
    let refused = "/api/limits: it does not take the account of HTTP_READONLY_AUTH";
    assert!(said.contains(refused), "{said}");

    let ben = ("HTTP_READONLY_AUTH", "ben:looks");
    let (code, shown, said) = ask(&[], &[ben]);
    assert_eq!(code, Some(0), "{said}");
    let mut rows = shown.lines().map(str::trim_start);
    let row = rows.find(|line| line.starts_with("JOB_RETENTION_SEC"));
    let cells: Vec<_> = row.unwrap().split("  ").map(str::trim).collect();
    let cells: Vec<_> = cells.into_iter().filter(|one| !one.is_empty()).collect();
    assert_eq!(
        cells,
        ["JOB_RETENTION_SEC", "7200", "A job may take, in all", "2 h"]
    );
    assert!(shown.contains("\n\nin force at the service on "), "{shown}");
    let queue = shown.lines().find(|line| line.contains("workflow_1"));
    let at_most = "at most 7 waiting in RabbitMQ";
    assert!(
        queue.is_some_and(|line| line.trim_end().ends_with(at_most)),
        "{shown}"
    );
    let differs = "warning: JOB_RETENTION_SEC is 7200 at the service, and 172800 here\n";
    assert_eq!(said, differs);
    let (_, shown, _) = ask(&["--json"], &[("HTTP_BASIC_AUTH", "anna:hunter2")]);
    let answer: Value = serde_json::from_str(&shown).unwrap();
    let limits = answer["limits"].as_array().unwrap();
    let others: Vec<_> = limits
        .iter()
        .filter(|one| one.get("here").is_some())
        .collect();
    assert_eq!(others.len(), 1, "{shown}");
    assert_eq!(others[0]["here"], "172800");
    assert_eq!(answer["queues"]["workflow_1"]["window"], 7);
    let (_, _, said) = ask(&[], &[ben, ("JOB_RETENTION_SEC", "7200")]);
    assert_eq!(said, "here they are the same\n");

    // The page's list, of which the API says no more.
    Operator::at(&service, "ben:looks")
        .get("/api/limits")
        .is(200, "\"2 h\"");
    Operator::at(&service, "").get("/api/limits").is(401, "");
    assert!(service.stop().success());
    let (code, _, said) = ask(&[], &[ben]);
    assert_eq!(code, Some(1));
    assert!(said.contains("nobody listens there"), "{said}");
}

/// Whoever reads takes a line, or nothing, and goes.
#[rstest]
fn a_reader_that_goes_is_no_failure(#[values(0, 1)] lines: usize) {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let client = Client::new(&deployment);
    client.status(client.submit("workflow_1"));
    for arguments in [
        &["jobs", "list"][..],
        &["jobs", "list", "--json"],
        &["jobs", "watch"],
        &["doctor"],
        &["queues", "--interval", "1"],
        &["config"],
        &["workflows", "list"],
        &["workflows", "check", "workflows.json"],
        &["db", "history"],
        &["completions", "bash"],
        &["man"],
        &["--help"],
        &["jobs", "list", "--help"],
    ] {
        let definitions = concat!(env!("CARGO_MANIFEST_DIR"), "/config/workflow_config.json");
        fs::copy(definitions, deployment.folder.join("workflows.json")).unwrap();
        let mut command = deployment.command(arguments);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut reader = BufReader::new(child.stdout.take().unwrap());
        for _ in 0..lines {
            reader.read_line(&mut String::new()).unwrap();
        }
        drop(reader);
        let code = eventually(&format!("{arguments:?} ends"), || child.try_wait().unwrap());
        let mut said = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        assert!(
            !said.contains("panicked") && !said.contains("roken pipe"),
            "{arguments:?}: {said}"
        );
        assert!(matches!(code.code(), Some(0 | 1)), "{arguments:?}: {code}");
    }
}

/// What is offered for the last of these words.
fn offered(deployment: &Deployment, words: &[&str], variables: &[(&str, &str)]) -> Vec<String> {
    let mut command = deployment.command(&[&["--", "omotes-orchestrator"], words].concat());
    command
        .env("OMOTES_ORCHESTRATOR_COMPLETE", "bash")
        .env("_CLAP_COMPLETE_INDEX", words.len().to_string())
        .env("_CLAP_IFS", "\n")
        .envs(variables.iter().copied());
    let (code, printed, said) = parts(command.output().unwrap());
    assert_eq!((code, said.as_str()), (Some(0), ""));
    printed.lines().map(str::to_owned).collect()
}

#[test]
fn shells_are_offered_what_there_is() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let client = Client::new(&deployment);
    let job = client.submit("workflow_1");
    client.status(job);
    let offers = |words: &[&str]| offered(&deployment, words, &[]);
    assert_eq!(
        offers(&["jobs", "show", ""]).first(),
        Some(&job.to_string())
    );
    assert_eq!(
        offers(&["jobs", "cancel", &job.to_string()[..5]]),
        [job.to_string()]
    );
    assert_eq!(
        offers(&["jobs", "list", "--state", "t"]),
        ["to-be-tried-again", "timed-out"]
    );
    assert_eq!(
        offers(&["submit", "x", "--workflow", "simu"]),
        ["simulator", "simulator_constrained"]
    );
    assert!(offers(&["work"]).contains(&"workers".to_owned()));
    // Without Postgres there is nothing to offer, and nothing to wait for.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port().to_string();
    let begun = Instant::now();
    let away = offered(
        &deployment,
        &["jobs", "show", ""],
        &[("POSTGRESQL_PORT", &port)],
    );
    assert!(!away.contains(&job.to_string()), "{away:?}");
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    for shell in ["bash", "zsh", "fish"] {
        let (code, script, said) = run(&deployment, &["completions", shell]);
        assert_eq!(code, Some(0), "{said}");
        assert!(script.contains("OMOTES_ORCHESTRATOR_COMPLETE"), "{script}");
    }
}

#[test]
fn there_is_a_page_of_the_manual_for_each_command() {
    let deployment = Deployment::new();
    let (code, page, said) = run(&deployment, &["man", "jobs", "list"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        page.contains(".TH") && page.contains("\\-\\-state"),
        "{page}"
    );
    let (code, _, said) = run(&deployment, &["man", "nonsense"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("there is no command nonsense"), "{said}");
    let (code, _, said) = run(&deployment, &["man", "--all", "."]);
    assert_eq!(code, Some(0), "{said}");
    for page in ["omotes-orchestrator.1", "omotes-orchestrator-jobs-list.1"] {
        assert!(deployment.folder.join(page).exists(), "{page}");
    }
}

/// Every argument of every command says what it is.
#[test]
fn nothing_is_left_unexplained() {
    let deployment = Deployment::new();
    let mut commands = vec![Vec::new()];
    while let Some(words) = commands.pop() {
        let arguments: Vec<&str> = words.iter().map(String::as_str).chain(["--help"]).collect();
        let (code, help, _) = run(&deployment, &arguments);
        assert_eq!(code, Some(0), "{arguments:?}");
        let mut lines = help.lines().peekable();
        let mut section = String::new();
        while let Some(line) = lines.next() {
            if !line.starts_with(' ') && line.ends_with(':') {
                section = line.to_owned();
            }
            let entry = line.trim();
            match section.as_str() {
                "Commands:" if line.starts_with("  ") && !line.starts_with("   ") => {
                    let name = entry.split_whitespace().next().unwrap();
                    assert!(
                        entry.split_whitespace().count() > 1,
                        "{arguments:?}: {entry}"
                    );
                    if name != "help" {
                        commands.push(words.iter().cloned().chain([name.to_owned()]).collect());
                    }
                }
                "Arguments:" | "Options:"
                    if entry.starts_with(['[', '<', '-'])
                        && !entry.starts_with("[possible")
                        && !entry.starts_with("[default")
                        && line.starts_with("  ") =>
                {
                    let is_beside = entry.contains("  ");
                    let below = lines.peek().map_or("", |line| line.trim());
                    let is_explained = is_beside || !below.is_empty() && !below.starts_with('[');
                    assert!(is_explained, "{arguments:?}: {entry}");
                }
                _ => {}
            }
        }
    }
}
