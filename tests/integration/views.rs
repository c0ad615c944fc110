//! What operators see: the page in a real browser, the API, metrics, and the command line.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use omotes_orchestrator::wire::job_submission::JobPriority;
use omotes_orchestrator::wire::{job_result::ResultType, job_status_update::JobStatus};
use rstest::rstest;
use serde_json::Value;
use uuid::Uuid;

use crate::harness::browser::Browser;
use crate::harness::deployment::{Deployment, Service, eventually};
use crate::harness::peers::{Client, Task, Worker, running_job};
use crate::harness::proxy::{End, Proxy, Weather};

const OUTPUT: &str = "<e id='out-1'/>";

fn json(service: &Service, path: &str) -> Value {
    let (status, body) = service.get(path).unwrap();
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

/// A job that its client has heard of, and the service's API knows.
fn submit(service: &Service, client: &Client, reference: &str) -> Uuid {
    let (job, mut submission) = client.submission("workflow_1");
    submission.job_reference = Some(reference.to_owned());
    client.listen(job);
    client.send(&submission);
    assert_eq!(client.status(job), JobStatus::Enqueued);
    eventually("the job's row", || {
        (service.get(&format!("/api/jobs/{job}"))?.0 == 200).then_some(())
    });
    job
}

#[rstest]
#[case::wide_and_light(1400, 900, false)]
#[case::narrow_and_dark(390, 800, true)]
fn the_page_follows_a_job_by_itself(#[case] width: u32, #[case] height: u32, #[case] dark: bool) {
    let deployment = Deployment::new();
    let service = deployment.start();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    // Whatever clients call their jobs, it is text.
    let job = submit(
        &service,
        &client,
        "<script>document.title = 'hacked'</script>",
    );
    let browser = Browser::new(width, height, dark);
    let page = format!("http://{}/", service.http());
    browser.open(&page);
    browser.shows("<script>document.title = 'hacked'</script>");
    browser.shows("waiting no. 1");
    assert_eq!(browser.run("return document.title"), "OMOTES jobs");
    let scheme = "return matchMedia('(prefers-color-scheme: dark)').matches";
    assert_eq!(browser.run(scheme), dark);
    // No page is wider than the window.
    let fits = "return document.documentElement.scrollWidth <= innerWidth";
    assert_eq!(browser.run(fits), true);

    // From here on nobody loads the page, and what is typed stays.
    let row = format!("document.getElementById('job-{job}')");
    browser.run(&format!(
        "{row}.mark = 'the same'; document.querySelector('input[name=text]').value = 'typed';"
    ));
    let task = worker.take();
    worker.start(&task);
    worker.progress(&task, 0.25);
    browser.shows("running");
    assert_eq!(browser.run(fits), true);
    browser.shows("25 %");
    let kept = "document.querySelector('input[name=text]').value";
    assert_eq!(
        browser.run(&format!("return [{row}.mark, {kept}]")),
        serde_json::json!(["the same", "typed"])
    );
    worker.succeed(&task, OUTPUT);
    browser.shows("No such jobs.");

    browser.open(&format!("{page}?finished=true&workflow=workflow_1"));
    browser.shows("succeeded");
    assert_eq!(browser.run(fits), true);
    browser.open(&format!("{page}jobs/{job}"));
    browser.shows("First started");
    assert_eq!(browser.run(fits), true);
    browser.shows(&task.id);
    assert!(!browser.text().contains("<esdl"), "{}", browser.text());
    assert_eq!(
        browser.run("return document.title"),
        "<script>document.title = 'hacked'</script>"
    );
    // Nothing of that page changes any more, but of the list.
    browser.open(&page);
    browser.shows("Not finished");
    assert!(service.stop().success());
    browser.shows("The orchestrator does not answer.");
}

#[test]
fn a_page_that_is_open_and_metrics_tell_of_an_outage() {
    let deployment = Deployment::new();
    let proxy = Proxy::new(deployment.postgres_door()).unwrap();
    let port = proxy.port().to_string();
    let service = deployment.start_with(&[("POSTGRESQL_PORT", &port)]);
    let browser = Browser::new(1400, 900, false);
    browser.open(&format!("http://{}/", service.http()));
    browser.shows("Not finished");
    proxy.set(Weather::Refuse);
    proxy.cut(End::Rst);
    browser.shows("Postgres does not answer");
    let (status, text) = service.get("/metrics").unwrap();
    assert_eq!(status, 200);
    // What is not known is no zero.
    assert!(!text.contains("omotes_orchestrator_oldest_waiting_job_seconds"));
    let letters = r#"omotes_orchestrator_queue_messages{connection="SDK",queue="job_submissions"}"#;
    assert!(text.contains(letters), "{text}");
    proxy.set(Weather::Fair);
    browser.shows("Not finished");
}

#[test]
fn the_log_is_json_and_says_more_on_a_signal() {
    let deployment = Deployment::new();
    let service = deployment.start_with(&[("LOG_FORMAT", "json"), ("LOG_LEVEL", "INFO")]);
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let job = submit(&service, &client, "a \"first\" try\n");
    let task = worker.take();
    worker.start(&task);
    worker.progress(&task, 0.25);
    assert_eq!(client.status(job), JobStatus::Running);
    assert_eq!(client.progress(job).0, 0.25);
    // A message is logged after its client has heard of it, but before the job's next is handled.
    worker.progress(&task, 0.375);
    assert_eq!(client.progress(job).0, 0.375);
    service.signal("-USR1");
    service.logged("the log's level is DEBUG now");
    worker.progress(&task, 0.5);
    service.logged("50 %");
    service.signal("-USR2");
    service.logged("the log's level is INFO now");
    let mut lines_of_job = 0;
    for line in service.log().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert!(line["thread"].is_string() && line["time"].is_string());
        assert!(!line["message"].as_str().unwrap().contains("25 %"));
        if line["job"] == job.to_string() {
            assert_eq!(line["reference"], "a \"first\" try\n");
            assert_eq!(line["workflow"], "workflow_1");
            assert_eq!(line["task"], task.id);
            lines_of_job += 1;
        }
    }
    // Submitted, running, 50 %; and perhaps 38 %.
    assert!(lines_of_job >= 3, "{lines_of_job}");
}

#[test]
fn the_api_tells_of_jobs_in_their_order() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let done = running_job(&client, &worker, None);
    worker.succeed(&done, OUTPUT);
    assert_eq!(client.outcome(done.job).0, ResultType::Succeeded);
    let running = running_job(&client, &worker, Some(60_000));
    worker.progress(&running, 0.5);
    let waiting = submit(&service, &client, "a normal one");
    let (urgent, mut submission) = client.submission("workflow_1");
    submission.job_priority = Some(JobPriority::High.into());
    client.listen(urgent);
    client.send(&submission);
    assert_eq!(client.status(urgent), JobStatus::Enqueued);

    // Clients hear of it before it is committed.
    let jobs = eventually("all jobs and the progress", || {
        let page = json(&service, "/api/jobs");
        let progress = &page["jobs"][0]["progress"]["fraction"];
        (page["total"] == 3 && *progress == 0.5).then_some(page)
    });
    let ids: Vec<_> = (0..3).map(|row| jobs["jobs"][row]["id"].as_str()).collect();
    let expected = [running.job, urgent, waiting].map(|id| id.to_string());
    assert_eq!(ids, expected.each_ref().map(|id| Some(id.as_str())));
    assert_eq!(jobs["jobs"][0]["state"], "RUNNING");
    assert_eq!(jobs["jobs"][0]["timeout_ms"], 60_000);
    assert_eq!(jobs["jobs"][1]["priority"], "HIGH");
    assert_eq!(jobs["jobs"][2]["position"], 2);

    let filtered = json(&service, "/api/jobs?state=submitted&text=normal&limit=1");
    assert_eq!(filtered["total"], 1);
    assert_eq!(filtered["jobs"][0]["id"], waiting.to_string());
    let finished = json(&service, "/api/jobs?finished=true");
    assert_eq!(finished["jobs"][0]["state"], "SUCCEEDED");
    let one = json(&service, &format!("/api/jobs/{}", running.job));
    assert_eq!(one["started_at"].as_array().unwrap().len(), 1);
    // As of a moment ago.
    eventually("two that wait", || {
        let overview = json(&service, "/api/overview");
        let workflows = overview["workflows"].as_array().unwrap();
        let of_jobs = workflows.iter().find(|one| one["name"] == "workflow_1");
        (of_jobs.unwrap()["waiting"] == 2).then_some(())
    });
    for (path, status, text) in [
        ("/api/jobs?state=done", 400, "state=done: expected one of"),
        ("/api/jobs/123", 404, "123 is no job id"),
        (&format!("/jobs/{}", Uuid::nil()), 404, "is unknown"),
        ("/nothing", 404, "there are /"),
    ] {
        let (found, body) = service.get(path).unwrap();
        assert_eq!(found, status, "{path}");
        assert!(body.contains(text), "{path}: {body}");
    }
}

#[test]
fn jobs_are_estimated_from_those_before_them() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let job = submit(&service, &client, "the next one");
    let path = format!("/api/jobs/{job}");
    assert_eq!(json(&service, &path)["estimate"], Value::Null);
    let runs =
        "INSERT INTO job_history (job_id, workflow_type, running_at, finished_at, starts, outcome,
                                  result_bytes)
         SELECT gen_random_uuid(), 'workflow_1', now() - minutes * interval '1 minute', now(), 1,
                'SUCCEEDED', 1
         FROM generate_series(1, 5) AS minutes";
    deployment.sql().batch_execute(runs).unwrap();
    eventually("an estimate", || {
        let estimate = &json(&service, &path)["estimate"];
        let is_there = estimate["run"]["median_seconds"] == 180.0;
        // Nobody takes it.
        is_there.then(|| assert_eq!(estimate["wait"], Value::Null))
    });
    let consumer = worker
        .peer
        .channel
        .basic_consume("workflow_1", Default::default());
    eventually("a worker is seen", || {
        let wait = &json(&service, &path)["estimate"]["wait"];
        (wait["median_seconds"] == 0.0).then_some(())
    });
    drop(consumer);
}

#[test]
fn a_password_protects_everything_but_the_health() {
    let deployment = Deployment::new();
    let service = deployment.start_with(&[("HTTP_BASIC_AUTH", "operator:s3cret")]);
    for path in ["/", "/metrics", "/api/jobs", "/jobs/1", "/nothing"] {
        assert_eq!(service.get(path).unwrap().0, 401, "{path}");
    }
    for path in ["/health/live", "/health/ready"] {
        assert_eq!(service.get(path).unwrap().0, 200, "{path}");
    }
    let status = |user: &str| {
        let header = format!("Basic {}", BASE64_STANDARD.encode(user));
        let request = ureq::get(format!("http://{}/", service.http()));
        let request = request.header("Authorization", header).config();
        let response = request.http_status_as_error(false).build().call();
        response.unwrap().status().as_u16()
    };
    assert_eq!(status("operator:s3cret"), 200);
    for wrong in ["operator:s3creT", "operator:", "", "operator:s3cret2"] {
        assert_eq!(status(wrong), 401, "{wrong}");
    }
}

#[test]
fn metrics_are_prometheus_own_and_tell_what_happened() {
    let deployment = Deployment::new();
    let service = deployment.start_with(&[
        ("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "0"),
        ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
        ("WORKERS_PERIOD_SEC", "5"),
    ]);
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let task = running_job(&client, &worker, None);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    let refused = client.submit("no such workflow");
    assert_eq!(client.outcome(refused).0, ResultType::Error);
    submit(&service, &client, "a job that waits");
    let expected = [
        r#"omotes_orchestrator_messages_total{queue="submissions",outcome="submitted"} 2"#,
        r#"omotes_orchestrator_messages_total{queue="results",outcome="ended"} 1"#,
        r#"omotes_orchestrator_jobs_ended_total{workflow="workflow_1",outcome="SUCCEEDED"} 1"#,
        // What a client makes up is no label.
        r#"omotes_orchestrator_jobs_ended_total{workflow="other",outcome="REJECTED"} 1"#,
        r#"omotes_orchestrator_jobs{workflow="workflow_1",state="waiting"} 1.0"#,
        r#"omotes_orchestrator_part_up{part="broker"} 1.0"#,
        r#"omotes_orchestrator_sessions_total 1"#,
        "# TYPE omotes_orchestrator_maintenance_last_run_timestamp_seconds gauge",
        r#"omotes_orchestrator_queue_messages{connection="SDK",queue="omotes_dead_letters"} 0.0"#,
    ];
    let text = eventually("all that has happened", || {
        let (status, text) = service.get("/metrics")?;
        let complete = expected
            .iter()
            .all(|line| text.lines().any(|one| one == *line));
        let complete = complete && text.contains("omotes_orchestrator_lost_tasks");
        (status == 200 && complete).then_some(text)
    });
    assert_eq!(promtool(&["check", "metrics"], &text), "");
    // What the examples ask for is there.
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/deployment");
    for file in ["alerts.yml", "grafana.json"] {
        let asked = fs::read_to_string(format!("{examples}/{file}")).unwrap();
        let names: BTreeSet<&str> = asked
            .split(|character: char| !character.is_alphanumeric() && character != '_')
            .filter(|word| word.starts_with("omotes_orchestrator_"))
            .collect();
        assert!(names.len() > 5, "{names:?}");
        for name in names {
            let is_it = |line: &str| {
                let rest = line.strip_prefix(name);
                rest.is_some_and(|rest| rest.starts_with(['{', ' ']))
            };
            assert!(text.lines().any(is_it), "{file} asks for {name}");
        }
    }
    promtool(
        &["check", "config", &format!("{examples}/prometheus.yml")],
        "",
    );
}

/// What it says of the input, which is in order.
fn promtool(arguments: &[&str], input: &str) -> String {
    let mut promtool = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool, which ./run.sh test installs");
    let mut stdin = promtool.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    let output = promtool.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text_of(&output));
    text_of(&output)
}

#[test]
fn a_client_that_waits_without_a_worker_is_told_once() {
    let deployment = Deployment::new();
    let service = deployment.start_with(&[
        ("NO_WORKER_NOTICE", "true"),
        ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
    ]);
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let job = submit(&service, &client, "nobody there");
    let (fraction, message) = client.progress(job);
    assert_eq!(fraction, 0.0);
    assert_eq!(
        message,
        "Waiting: no worker for this workflow is connected."
    );
    let line = service.logged("jobs wait, and there is no worker");
    assert!(line.contains("task queue workflow_1"), "{line}");
    let page = service.get("/").unwrap().1;
    assert!(page.contains("has no worker, and 1 job waits"), "{page}");
    // It still waits, and is looked at again.
    deployment.looked_for_what_is_due();
    let task = worker.take();
    worker.start(&task);
    assert_eq!(client.status(job), JobStatus::Running);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    client.heard_nothing_more(&worker, job);
}

fn text_of(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8(both).unwrap()
}

#[test]
fn the_command_line_lists_shows_and_cancels() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let done: Task = running_job(&client, &worker, None);
    worker.succeed(&done, OUTPUT);
    assert_eq!(client.outcome(done.job).0, ResultType::Succeeded);
    let waiting = submit(&service, &client, "two\nlines");
    let run = |arguments: &[&str]| {
        let output = deployment.command(arguments).output().unwrap();
        (output.status.code().unwrap(), text_of(&output))
    };
    let (code, list) = run(&["jobs", "list"]);
    assert_eq!(code, 0, "{list}");
    let row = list.lines().nth(1).unwrap();
    assert!(row.contains(&waiting.to_string()), "{list}");
    assert!(
        row.contains("two\\nlines") && row.contains("waiting, no. 1"),
        "{list}"
    );
    assert!(
        !list.contains('\u{1b}'),
        "no colour but on a terminal: {list:?}"
    );
    let (_, finished) = run(&["jobs", "list", "--state", "succeeded", "--json"]);
    let finished: Value = serde_json::from_str(&finished).unwrap();
    assert_eq!(finished["jobs"][0]["id"], done.job.to_string());
    let (code, story) = run(&["jobs", "show", &done.job.to_string()]);
    assert_eq!(code, 0, "{story}");
    assert!(
        story.contains("succeeded") && story.contains(&done.id),
        "{story}"
    );
    let (code, queues) = run(&["queues", "--interval", "1", "--json"]);
    assert_eq!(code, 0, "{queues}");
    let queues: Value = serde_json::from_str(&queues).unwrap();
    let queues = queues.as_array().unwrap();
    let tasks = queues.iter().find(|queue| queue["name"] == "workflow_1");
    assert_eq!(tasks.unwrap()["messages"], 1);
    let (code, queues) = run(&["queues", "--interval", "0"]);
    assert_eq!(code, 0, "{queues}");
    let header = queues.lines().next().unwrap();
    let columns: Vec<_> = header.split_whitespace().collect();
    assert_eq!(columns, ["CONNECTION", "QUEUE", "MESSAGES", "CONSUMERS"]);

    let (code, text) = run(&[
        "jobs",
        "cancel",
        &waiting.to_string(),
        &done.job.to_string(),
    ]);
    assert_eq!(code, 1);
    assert_eq!(
        text,
        format!(
            "job {waiting} is asked to end\njob {} has ended already\n",
            done.job
        )
    );
    assert_eq!(client.outcome(waiting).0, ResultType::Cancelled);
    let (code, text) = run(&["jobs", "show", &Uuid::nil().to_string()]);
    assert_eq!(code, 1);
    assert!(text.ends_with("is unknown\n"), "{text}");
    let (code, completions) = run(&["completions", "bash"]);
    assert_eq!(code, 0);
    assert!(completions.contains("omotes-orchestrator"));
}

/// Nobody goes through all that ever ended to find that a workflow has had no success, whatever Postgres
/// believes of how many each has.
#[test]
fn how_long_a_workflow_takes_is_found_by_an_index_of_its_own() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let mut sql = deployment.sql();
    sql.batch_execute(
        "INSERT INTO job_history (job_id, workflow_type, registered_at, submitted_at, running_at,
                                  finished_at, starts, outcome, result_bytes)
         SELECT gen_random_uuid(), 'workflow_1', ended, ended, ended, ended, 1, 'SUCCEEDED', 1
         FROM (SELECT now() - interval '2 days' - number * interval '1 second' AS ended
               FROM generate_series(1, 200000) AS number) AS times",
    )
    .unwrap();
    sql.batch_execute("VACUUM ANALYZE job_history").unwrap();
    let read = "SELECT seq_tup_read + (SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes
                                       WHERE relname = 'job_history')
                FROM pg_stat_user_tables WHERE relname = 'job_history'";
    let looks = "SELECT idx_scan FROM pg_stat_user_tables WHERE relname = 'job_history'";
    let before = (deployment.count(read), deployment.count(looks));
    eventually("looks are counted", || {
        let overview = json(&service, "/api/overview");
        let workflows = overview["workflows"].as_array().unwrap();
        assert!(workflows.len() > 5, "{overview}");
        (deployment.count(looks) > before.1 + 50).then_some(())
    });
    let read = deployment.count(read) - before.0;
    assert!(read < 100_000, "{read} rows read");
}
