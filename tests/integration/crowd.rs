//! Turns of very many tasks, and of very large ones.

use std::fs;

use omotes_orchestrator::wire::job_result::ResultType;
use rstest::rstest;
use serde_json::{Value, json};

use crate::harness::deployment::{Deployment, eventually};
use crate::python::{CeleryWorker, SdkClient};
use crate::turns::{HELD, Scene, TASK};

/// Of a reference of a megabyte the owner is as much as is kept of one, and the job has its turn.
#[test]
fn an_owner_may_be_a_megabyte() {
    let scene = Scene::new(&json!({"max_running": 1}));
    let _service = scene.start();
    let first = scene.submit(1)[0];
    let task = scene.runs();
    assert_eq!(task.job, first);
    let (job, mut submission) = scene.client.submission(TASK);
    scene.client.listen(job);
    submission.job_reference = Some("ü".repeat(500_000) + "/a job");
    scene.client.send(&submission);
    scene.held(1);
    let of_one = "SELECT max(octet_length(owner))::bigint FROM job_turn";
    let bytes = scene.deployment.count(of_one);
    assert!(bytes < 1000, "an owner of {bytes} bytes");
    let said = scene.does(&["jobs", "list"]);
    assert!(said.contains(&job.to_string()[..8]), "{said}");
    assert!(said.len() < 10_000, "{} bytes", said.len());
    scene.ends(&task);
    let task = scene.runs();
    assert_eq!(task.job, job);
    scene.worker.succeed(&task, "<e id='out'/>");
    assert_eq!(scene.client.outcome(job).0, ResultType::Succeeded);
    scene.nothing_is_left();
}

/// They do not fit into one batch of a handler.
#[test]
fn large_inputs_have_their_turns_at_once() {
    let scene = Scene::new(&json!({"paused": true}));
    let service = scene
        .deployment
        .start_with(&[&scene.variables()[..], &[("HANDLER_THREADS", "1")]].concat());
    for _ in 0..20 {
        let (_, mut submission) = scene.client.submission(TASK);
        submission.esdl = "<e>".to_owned() + &"x".repeat(1_000_000) + "</e>";
        scene.client.send(&submission);
    }
    scene.held(20);
    scene.does(&["workflows", "resume", TASK]);
    eventually("all tasks", || (scene.worker.waiting() == 20).then_some(()));
    let log = service.log();
    assert!(!log.contains("nobody has handed it over"), "{log}");
}

/// Nobody reads them all to find it, whatever Postgres believes of their owners.
#[rstest]
#[case::of_one_owner(1)]
#[case::of_many_owners(50)]
fn the_next_of_a_hundred_thousand_is_found_by_an_index(#[case] owners: i32) {
    let scene = Scene::new(&json!({"max_running": 1}));
    // What another service has left is looked for with that period.
    let rarely = [("TIMEOUT_JOB_HANDLER_RERUN_SEC", "600")];
    let _service = scene
        .deployment
        .start_with(&[&scene.variables()[..], &rarely].concat());
    let first = scene.submit(1)[0];
    let task = scene.runs();
    assert_eq!(task.job, first);
    let plant = "INSERT INTO job_turn (job_id, queue, owner, priority, held_at)
                 SELECT gen_random_uuid(), 'workflow_1', 'owner ' || number % $1::integer, 'LOW',
                        now()
                 FROM generate_series(1, 100000) AS number";
    scene.deployment.sql().execute(plant, &[&owners]).unwrap();
    let mut vacuum = scene.deployment.sql();
    vacuum.batch_execute("VACUUM ANALYZE job_turn").unwrap();
    let read = "SELECT seq_tup_read + (SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes
                                       WHERE relname = 'job_turn')
                FROM pg_stat_user_tables WHERE relname = 'job_turn'";
    let by_index = "SELECT idx_scan FROM pg_stat_user_tables WHERE relname = 'job_turn'";
    // What was looked for before Postgres knew of so many has been counted by then.
    let counted = scene.deployment.count(by_index);
    scene.deployment.at_least(counted + 50, by_index);
    let before = (
        scene.deployment.count(read),
        scene.deployment.count(by_index),
    );
    let jobs: Vec<_> = (0..3).map(|_| scene.client.submit(TASK)).collect();
    let mut task = task;
    for _ in &jobs {
        scene.ends(&task);
        task = scene.runs();
        assert!(jobs.contains(&task.job));
    }
    // Each of the turns, and what each second looks for, has been counted by then.
    scene.deployment.at_least(before.1 + 100, by_index);
    let read = scene.deployment.count(read) - before.0;
    assert!(read < 100_000, "{read} rows read");
}

/// With the SDK's clients and Celery's workers.
#[test]
fn one_job_beside_a_flood_of_five_hundred() {
    let deployment = Deployment::new();
    let file = deployment.folder.join("workflows.json");
    let mut workflows: Value =
        serde_json::from_str(include_str!("../python/workflows.json")).unwrap();
    for workflow in workflows.as_array_mut().unwrap() {
        workflow["window"] = json!(2);
    }
    fs::write(&file, workflows.to_string()).unwrap();
    let _service = deployment.start_with(&[("WORKFLOW_CONFIG_PATH", file.to_str().unwrap())]);
    let order = |owner: &str| {
        json!({
            "workflow": "steerable",
            "params": {"behaviour": "succeed", "number": 1.5},
            "reference": format!("{owner}/a job"),
        })
    };
    let flood = SdkClient::new(&deployment, "4.3", &vec![order("flood"); 500]);
    deployment.comes_to(498, HELD);
    let _workers = [
        CeleryWorker::new(&deployment, "4.3"),
        CeleryWorker::new(&deployment, "4.3"),
    ];
    deployment.at_least(
        20,
        "SELECT count(*) FROM job_history WHERE outcome = 'SUCCEEDED'",
    );
    let one = SdkClient::new(&deployment, "4.3", &[order("new")]);
    // Whatever is decided before it is committed knows nothing of it.
    let known_at: String = eventually("the new one is known", || {
        let sql = "SELECT clock_timestamp()::text
                   FROM (SELECT job_reference FROM job UNION ALL
                         SELECT job_reference FROM job_history) AS known
                   WHERE job_reference = 'new/a job' LIMIT 1";
        let row = deployment.sql().query_opt(sql, &[]).unwrap();
        row.map(|row| row.get(0))
    });
    for client in [one, flood] {
        for story in client.stories() {
            assert_eq!(story["result"], "SUCCEEDED", "{story}");
        }
    }
    deployment.comes_to(
        501,
        "SELECT count(*) FROM job_history WHERE outcome = 'SUCCEEDED'",
    );
    let starts = deployment.count(&format!(
        "SELECT count(*) FROM job_history AS other, job_history AS new
         WHERE new.job_reference = 'new/a job'
           AND other.running_at BETWEEN '{known_at}' AND new.running_at"
    ));
    assert!(
        starts <= 3,
        "{starts} starts from its submission to its own"
    );
}
