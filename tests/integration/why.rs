//! The one sentence that says of a job why it is as it is: on the page, in the API, and on the command
//! line.

use amiquip::ConsumerOptions;
use omotes_orchestrator::wire::{job_result::ResultType, job_status_update::JobStatus};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::acting::{ACCOUNTS, ANNA};
use crate::harness::deployment::{Deployment, Service, eventually};
use crate::harness::operator::Operator;
use crate::harness::peers::{Client, Peer, Worker, running_job};
use crate::turns::Scene;

fn json(service: &Service, path: &str) -> Option<Value> {
    let (status, body) = service.get(path)?;
    (status == 200).then(|| serde_json::from_str(&body).unwrap())
}

/// Waits until a job's sentence begins with this, and has it in the list as well.
fn says(service: &Service, job: Uuid, sentence: &str) -> Value {
    eventually(&format!("{job}: {sentence}"), || {
        let story = json(service, &format!("/api/jobs/{job}"))?;
        let is = |why: &Value| why["sentence"].as_str().unwrap().starts_with(sentence);
        let list = |finished| {
            let page = json(service, &format!("/api/jobs?finished={finished}"))?;
            let jobs = page["jobs"].as_array().unwrap();
            let job = jobs.iter().find(|one| one["id"] == job.to_string())?;
            is(&job["why"]).then_some(())
        };
        let is_listed = || list(false).or_else(|| list(true)).is_some();
        (is(&story["why"]) && is_listed()).then(|| story["why"].clone())
    })
}

#[test]
fn a_held_job_names_what_holds_it() {
    let scene = Scene::new(&json!({"max_running": 1}));
    let service = scene.start();
    let jobs = scene.submit(3);
    let task = scene.runs();
    assert_eq!(task.job, jobs[0]);
    scene.held(2);
    let seat = format!(
        "Held: `max_running` 1 of `workflow_1` is used by job {}",
        &jobs[0].to_string()[..8]
    );
    let why = says(&service, jobs[1], &format!("{seat}; it is the next"));
    let facts = why["evidence"].as_array().unwrap();
    let owner = |fact: &Value| fact == "its owner is owner";
    assert!(facts.iter().any(owner), "{facts:?}");
    let before_it = format!("{seat}; 1 job goes first ({})", &jobs[1].to_string()[..8]);
    let why = says(&service, jobs[2], &before_it);
    let facts = why["evidence"].as_array().unwrap();
    let named = format!("before it: {}", jobs[1]);
    assert!(facts.iter().any(|fact| *fact == named), "{facts:?}");
    for arguments in [
        &["jobs", "list"][..],
        &["jobs", "show", &jobs[2].to_string()],
    ] {
        let said = scene.does(arguments);
        assert!(said.contains(&before_it), "{said}");
    }
    for path in ["/".to_owned(), format!("/jobs/{}", jobs[2])] {
        let (_, page) = service.get(&path).unwrap();
        let page = page.replace("<code>", "`").replace("</code>", "`");
        assert!(page.contains(&before_it), "{page}");
    }

    let paused = "Held: `workflow_1` is paused by ";
    scene.does(&["workflows", "pause", "workflow_1"]);
    says(&service, jobs[1], paused);
    scene.does(&["jobs", "hold", &jobs[1].to_string()]);
    eventually("it is told that somebody holds it", || {
        let job = json(&service, &format!("/api/jobs/{}", jobs[1]))?;
        let sentence = job["why"]["sentence"].as_str()?;
        sentence
            .contains(" does not let it go since ")
            .then_some(())
    });
    says(&service, jobs[2], paused);
}

#[test]
fn a_waiting_job_tells_its_place_and_whether_anybody_takes_it() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let client = Client::new(&deployment);
    // It takes no messages but when it is told to.
    let _worker = Worker::new(&deployment, "workflow_1");
    let first = client.submit("workflow_1");
    says(&service, first, "Waits: no worker takes `workflow_1`");
    let peer = Peer::new(&deployment, &deployment.celery_vhost());
    let options = ConsumerOptions::default();
    let _consumer = peer.channel.basic_consume("workflow_1", options).unwrap();
    says(&service, first, "Waits: it is the next at `workflow_1`.");
    let second = client.submit("workflow_1");
    says(&service, second, "Waits: 1 job goes first at `workflow_1`.");
}

#[test]
fn a_running_job_tells_how_it_does() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let task = running_job(&client, &worker, Some(3_600_000));
    worker.progress(&task, 0.5);
    let why = eventually("its last word", || {
        let why = says(&service, task.job, "Runs for ");
        let said = why["sentence"].as_str().unwrap().to_owned();
        said.contains("last word").then_some(said)
    });
    assert!(why.ends_with("; times out in 59 min."), "{why}");
}

#[test]
fn a_job_that_failed_tells_its_logs() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let task = running_job(&client, &worker, None);
    worker.fail(&task);
    assert_eq!(client.outcome(task.job).0, ResultType::Error);
    says(&service, task.job, "Failed: the worker's logs.");
    let output = deployment.command(&["jobs", "list", "--finished"]).output();
    let said = String::from_utf8(output.unwrap().stdout).unwrap();
    assert!(said.contains("Failed: the worker's logs."), "{said}");

    let (refused, submission) = client.submission("no such workflow");
    client.listen(refused);
    client.send(&submission);
    says(&service, refused, "Refused: ");
}

#[test]
fn a_job_that_failed_in_its_second_step_says_so() {
    let scene = Scene::new(&json!({}));
    let service = scene.start();
    let first = Worker::new(&scene.deployment, "first");
    let (job, submission) = scene.client.submission("chain");
    scene.client.listen(job);
    scene.client.send(&submission);
    let task = first.take();
    first.start(&task);
    first.succeed(&task, "<e id='out'/>");
    let task = scene.runs();
    says(&service, job, "Runs step 2 of 2, workflow_1 for ");
    scene.worker.fail(&task);
    says(
        &service,
        job,
        "Failed in step 2, workflow_1: the worker's logs.",
    );
}

#[test]
fn a_job_that_did_not_end_by_itself_tells_what_ended_it() {
    let deployment = Deployment::new();
    let variables = [
        ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1"),
        ("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "0"),
    ];
    let service = deployment.start_with(&variables);
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let waiting = client.submit("workflow_1");
    assert_eq!(client.status(waiting), JobStatus::Enqueued);
    client.cancel(waiting);
    says(&service, waiting, "Cancelled by a client while it waited.");
    worker.take();
    let running = running_job(&client, &worker, None);
    client.cancel(running.job);
    says(&service, running.job, "Cancelled by a client after ");
    let slow = running_job(&client, &worker, Some(1));
    says(&service, slow.job, "Timed out after ");
    let deadly = running_job(&client, &worker, None);
    worker.start(&deadly);
    says(
        &service,
        deadly.job,
        "Lost its workers: they crashed, or were stopped; its task was started",
    );
}

/// In one look at those that have ended.
#[test]
fn a_cancelled_job_names_who_cancelled_it() {
    let deployment = Deployment::new();
    let service = deployment.start_with(&ACCOUNTS);
    let client = Client::new(&deployment);
    let _worker = Worker::new(&deployment, "workflow_1");
    let jobs = [(); 2].map(|()| client.submit("workflow_1").to_string());
    deployment.comes_to(2, "SELECT count(*) FROM job WHERE status = 'SUBMITTED'");
    let anna = Operator::at(&service, ANNA);
    let sent = anna.send(&[("do", "cancel"), ("id", &jobs[0])]);
    anna.done(&sent, "is asked to end");
    let mut command = deployment.command(&["jobs", "cancel", &jobs[1]]);
    command.env("USER", "ben").env_remove("SUDO_USER");
    assert!(command.output().unwrap().status.success());
    let are_told = |what: &str, text: &dyn Fn() -> String| {
        for who in ["anna", "ben"] {
            let sentence = format!("Cancelled by {who} while it waited.");
            eventually(&format!("{what}: {sentence}"), || {
                text().contains(&sentence).then_some(())
            });
        }
    };
    are_told("page", &|| anna.get("/?finished=true").body);
    are_told("API", &|| anna.get("/api/jobs?finished=true").body);
    are_told("command", &|| {
        let output = deployment.command(&["jobs", "list", "--finished"]).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    });
}

/// However many have ended, and whatever else is kept of them.
#[test]
fn who_cancelled_them_is_looked_up_of_those_on_the_page() {
    let deployment = Deployment::new();
    let service = deployment.start_with(&[("TIMEOUT_JOB_HANDLER_RERUN_SEC", "600")]);
    let mut sql = deployment.sql();
    sql.batch_execute(
        r#"INSERT INTO job_history (job_id, workflow_type, registered_at, submitted_at, finished_at, starts,
                                   outcome, result_bytes)
           SELECT gen_random_uuid(), 'workflow_1', ended - interval '1 min', ended - interval '1 min', ended, 0,
                  CASE number % 2 WHEN 0 THEN 'CANCELLED' ELSE 'EXPIRED' END, 0
           FROM (SELECT number, now() - number * interval '1 ms' AS ended
                 FROM generate_series(1, 100000) AS number) AS times;
           INSERT INTO job_story (job_id, ended_by)
           SELECT job_id, '{"via": "page", "who": "anna", "from": null}' FROM job_history"#,
    )
    .unwrap();
    sql.batch_execute("VACUUM ANALYZE job_history, job_story")
        .unwrap();
    let looks = "SELECT idx_scan FROM pg_stat_user_tables WHERE relname = 'job_story'";
    let read =
        "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'job_story'";
    let before = (deployment.count(looks), deployment.count(read));
    for offset in [0, 50, 90_000] {
        let page = json(
            &service,
            &format!("/api/jobs?finished=true&offset={offset}"),
        )
        .unwrap();
        let jobs = page["jobs"].as_array().unwrap();
        assert_eq!(jobs.len(), 50);
        for job in jobs {
            let expected = match job["state"].as_str().unwrap() {
                "CANCELLED" => "Cancelled by anna while it waited.",
                _ => "Given up.",
            };
            assert_eq!(job["why"]["sentence"], expected);
        }
    }
    // Only of those that were cancelled.
    deployment.at_least(before.0 + 75, looks);
    assert!(deployment.count(looks) - before.0 < 140);
    let read = deployment.count(read) - before.1;
    assert!(read < 500, "{read} rows looked up for three pages");
}

/// Only those on the page are looked up, and not all that wait for their turn.
#[test]
fn a_page_of_a_hundred_thousand_looks_up_few() {
    let deployment = Deployment::new();
    let service = deployment.start_with(&[("TIMEOUT_JOB_HANDLER_RERUN_SEC", "600")]);
    let mut sql = deployment.sql();
    sql.batch_execute(
        "CREATE TEMPORARY TABLE new AS
             SELECT gen_random_uuid() AS id, number FROM generate_series(1, 100000) AS number;
         INSERT INTO queue_limit (queue, paused, changed_at) VALUES ('workflow_1', true, now());
         INSERT INTO job (job_id, workflow_type, status, registered_at, priority)
             SELECT id, 'workflow_1', 'REGISTERED', now() + number * interval '1 ms', 'MEDIUM'
             FROM new;
         INSERT INTO job_turn (job_id, queue, owner, priority, held_at)
             SELECT id, 'workflow_1', 'owner ' || number % 50, 'MEDIUM', now() FROM new;
         INSERT INTO job_input (job_id, steps, parameters, reference)
             SELECT id, '[{\"task\": \"workflow_1\"}]', '{}', 'null' FROM new;
         INSERT INTO job_step (job_id, number, attempt, fallback, title, task)
             SELECT id, 1, 1, 0, 'workflow_1', 'workflow_1' FROM new;",
    )
    .unwrap();
    sql.batch_execute("VACUUM ANALYZE job, job_turn, job_input, job_step")
        .unwrap();
    let looks = "SELECT sum(idx_scan)::bigint FROM pg_stat_user_tables
                 WHERE relname IN ('job_input', 'job_step')";
    let before = deployment.count(looks);
    for offset in [0, 50, 90_000] {
        let page = json(&service, &format!("/api/jobs?offset={offset}")).unwrap();
        assert_eq!(page["total"], 100_000);
        let jobs = page["jobs"].as_array().unwrap();
        assert_eq!(jobs.len(), 50);
        for job in jobs {
            let sentence = job["why"]["sentence"].as_str().unwrap();
            assert!(sentence.starts_with("Held: "), "{sentence}");
        }
    }
    let looks = deployment.count(looks) - before;
    assert!(looks < 10_000, "{looks} rows looked up for three pages");
}

/// Each start of a task changes its job's row, for which room is kept beside it: with an index of what
/// changes, each would write to all indexes.
#[test]
fn what_a_start_changes_is_in_no_index() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let touched = "SELECT count(*) FROM pg_indexes
                   WHERE tablename = 'job'
                     AND indexdef ~ 'status|running_at|submitted_at|celery_id|progress'";
    assert_eq!(deployment.count(touched), 0);
}

/// Its row is there until its client has been told.
#[test]
fn a_job_that_has_ended_takes_no_place() {
    let deployment = Deployment::new();
    let variables = [
        ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "600"),
        ("OUTCOME_LOST_SEC", "600"),
    ];
    let service = deployment.start_with(&variables);
    let (ended, waits) = (Uuid::new_v4(), Uuid::new_v4());
    let mut sql = deployment.sql();
    for (job, since) in [(ended, 2_i32), (waits, 1)] {
        sql.execute(
            "INSERT INTO job (job_id, workflow_type, status, registered_at, submitted_at, celery_id)
             VALUES ($1, 'workflow_1', 'SUBMITTED', now() - make_interval(mins => $2),
                     now() - make_interval(mins => $2), $3)",
            &[&job, &since, &job.to_string()],
        )
        .unwrap();
    }
    let place = |job| json(&service, &format!("/api/jobs/{job}")).unwrap()["position"].clone();
    assert_eq!((place(ended), place(waits)), (json!(1), json!(2)));
    let history = "INSERT INTO job_history (job_id, finished_at, starts, outcome, result_bytes)
                   VALUES ($1, now(), 0, 'CANCELLED', 0)";
    sql.execute(history, &[&ended]).unwrap();
    assert_eq!((place(ended), place(waits)), (Value::Null, json!(1)));
}

/// Neither a line of them, nor those of a step.
#[test]
fn no_logs_are_kept_where_none_may_be() {
    let scene = Scene::new(&json!({}));
    let variables = [&scene.variables()[..], &[("KEEP_LOGS", "false")]].concat();
    let service = scene.deployment.start_with(&variables);
    let first = Worker::new(&scene.deployment, "first");
    for workflow in ["chain", "workflow_1"] {
        let (job, submission) = scene.client.submission(workflow);
        scene.client.listen(job);
        scene.client.send(&submission);
        if workflow == "chain" {
            let task = first.take();
            first.start(&task);
            first.succeed(&task, "<e id='out'/>");
        }
        let task = scene.runs();
        scene.worker.fail(&task);
        let result = scene.client.result(job);
        assert!(result.logs.contains("the worker's logs"), "{}", result.logs);
        let place = match workflow {
            "chain" => " in step 2, workflow_1",
            _ => "",
        };
        says(&service, job, &format!("Failed{place}."));
    }
    scene.deployment.no_jobs_left();
    let kept = "SELECT (SELECT count(*) FROM job_history WHERE why IS NOT NULL)
                     + (SELECT count(*) FROM job_step
                        WHERE logs <> '' OR why IS NOT NULL OR esdl_messages LIKE '%remark%')";
    assert_eq!(scene.deployment.count(kept), 0);
}

#[test]
fn a_workflow_whose_task_has_another_name_is_told_by_its_own_queue() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let definitions = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/development.json");
    let service = deployment.start_with(&[("WORKFLOW_CONFIG_PATH", definitions)]);
    eventually("nobody has made its queue", || {
        let overview = json(&service, "/api/overview")?;
        let queues = overview["queues"]["queues"].as_array()?.iter();
        let queue = queues.clone().find(|queue| queue["name"] == "simulator")?;
        queue["depth"].is_null().then_some(())
    });
    let job = client.submit("simulate");
    says(&service, job, "Waits: no worker takes `simulator`");
    let peer = Peer::new(&deployment, &deployment.celery_vhost());
    let _worker = peer
        .channel
        .basic_consume("simulator", ConsumerOptions::default())
        .unwrap();
    eventually("its worker is seen", || {
        let overview = json(&service, "/api/overview")?;
        let mut workflows = overview["workflows"].as_array()?.iter();
        let workflow = workflows.find(|one| one["name"] == "simulate")?;
        (workflow["workers"] == 1).then_some(())
    });
}
