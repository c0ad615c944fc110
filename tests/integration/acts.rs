//! Who has done what: kept with the job, and with the task queue.

use amiquip::{AmqpProperties, Exchange, Publish, QueueDeclareOptions};
use omotes_orchestrator::wire::{self, job_result::ResultType};
use prost::Message;
use serde_json::{Value, json};
use std::process::Command;
use uuid::Uuid;

use crate::acting::{ACCOUNTS, ANNA};
use crate::harness::deployment::{Service, eventually};
use crate::harness::operator::Operator;
use crate::harness::peers::Task;
use crate::story::story;
use crate::turns::{Scene, TASK};

fn start(scene: &Scene, more: &[(&str, &str)]) -> Service {
    let variables = [&scene.variables()[..], &ACCOUNTS, more].concat();
    scene.deployment.start_with(&variables)
}

fn what(service: &Service, job: Uuid) -> Vec<String> {
    let story = story(service, job);
    let events = story["events"].as_array().unwrap().iter();
    events
        .map(|event| event["what"].as_str().unwrap().to_owned())
        .collect()
}

fn overview(service: &Service) -> Value {
    let anna = Operator::at(service, ANNA);
    serde_json::from_str(&anna.get("/api/overview").body).unwrap()
}

/// What a command says that ben gives.
fn as_ben(scene: &Scene, arguments: &[&str]) -> String {
    let mut command = scene.deployment.command(arguments);
    command.envs(scene.variables()).env("USER", "ben");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn acts(scene: &Scene, job: Uuid) -> i64 {
    let acts = format!("SELECT count(*) FROM job_act WHERE job_id = '{job}'");
    scene.deployment.count(&acts)
}

#[test]
fn what_is_done_to_a_job_is_kept_with_it() {
    let scene = Scene::new(&json!({"paused": true}));
    let service = start(&scene, &[]);
    let job = scene.submit(1)[0];
    scene.held(1);
    assert_eq!(acts(&scene, job), 0, "its client has submitted it");
    let id = job.to_string();
    let anna = Operator::at(&service, ANNA);
    let sent = anna.send(&[("do", "priority"), ("id", &id), ("level", "high")]);
    anna.done(&sent, "has the priority high");
    as_ben(&scene, &["jobs", "priority", &id, "low"]);
    let sent = anna.send(&[("do", "first"), ("id", &id)]);
    anna.done(&sent, "is the next of its queue");
    as_ben(&scene, &["jobs", "hold", &id]);
    // What is so already is not done once more.
    as_ben(&scene, &["jobs", "hold", &id]);

    let told = story(&service, job);
    assert_eq!(told["turn"]["hold"]["who"], "ben", "{told}");
    let why = told["why"]["sentence"].as_str().unwrap();
    assert!(
        why.starts_with("Held: ben does not let it go since "),
        "{why}"
    );
    let facts = told["events"][0]["evidence"].to_string();
    assert!(facts.contains("its priority is medium"), "{facts}");
    let listed = as_ben(&scene, &["jobs", "list", "--json"]);
    assert!(listed.contains("Held: ben does not let it go"), "{listed}");

    as_ben(&scene, &["jobs", "release", &id]);
    as_ben(&scene, &["jobs", "release", "--all", "--yes"]);
    let task = scene.runs();
    scene.ends(&task);
    scene.deployment.no_jobs_left();
    let host = gethostname::gethostname();
    let ben = format!("by ben, by the command line, from {}", host.display());
    let anna = "by anna, by the status page, from 127.0.0.1";
    let expected = [
        format!("Given the priority high {anna}"),
        format!("Given the priority low {ben}"),
        format!("Moved before all others {anna}"),
        format!("Put on hold {ben}"),
        format!("Released {ben}"),
        format!("Released {ben}"),
    ];
    let events = what(&service, job);
    assert_eq!(events[2..8], expected, "{events:?}");
    let shown = scene.does(&["jobs", "show", &id]);
    for event in expected {
        assert!(shown.contains(&event), "{event}: {shown}");
    }
    let page = Operator::at(&service, ANNA).get(&format!("/jobs/{id}"));
    page.is(200, "Put on hold by ben");
}

#[test]
fn no_loop_of_acts_makes_a_row_grow() {
    let scene = Scene::new(&json!({"paused": true}));
    let service = start(&scene, &[]);
    let job = scene.submit(1)[0];
    scene.held(1);
    let id = job.to_string();
    let anna = Operator::at(&service, ANNA);
    let token = anna.token();
    let act = |verb: &str, more: &[(&str, &str)]| {
        let fields = [&[("do", verb), ("id", &id), ("token", &token)], more].concat();
        assert_eq!(anna.send_forged(&fields, "").status, 303);
    };
    for _ in 0..10 {
        act("hold", &[]);
        act("release", &[]);
    }
    act("priority", &[("level", "high")]);
    for _ in 0..40 {
        act("hold", &[]);
        act("release", &[]);
    }
    assert_eq!(acts(&scene, job), 51);
    let told = story(&service, job);
    let facts = told["events"][0]["evidence"].to_string();
    assert!(facts.contains("its priority is medium"), "{facts}");
    let events = told["events"].to_string();
    assert!(events.contains("50 more acts are not kept"), "{events}");
}

#[test]
fn it_is_known_who_has_paused_a_queue_and_since_when() {
    let scene = Scene::new(&json!({"window": 1}));
    let service = start(&scene, &[]);
    as_ben(&scene, &["workflows", "pause", TASK]);
    let anna = Operator::at(&service, ANNA);
    let sent = anna.send(&[("do", "limit"), ("queue", TASK), ("window", "7")]);
    anna.done(&sent, "at most 7 waiting");
    let job = scene.submit(1)[0];
    scene.held(1);

    let turns = overview(&service)["turns"][0]["acts"].clone();
    assert_eq!(turns["paused"]["who"], "ben", "{turns}");
    assert_eq!(turns["limited"]["who"], "anna", "{turns}");
    let sentence = || {
        let why = &story(&service, job)["why"];
        why["sentence"].as_str().unwrap().to_owned()
    };
    let paused = format!("Held: `{TASK}` is paused by ben since ");
    assert!(sentence().starts_with(&paused), "{}", sentence());
    let limits = scene.does(&["workflows", "limits"]);
    let page = anna.get("/").body;
    for text in [
        "paused by ben, by the command line, from ",
        "limited by anna, by the status page, from 127.0.0.1, at ",
    ] {
        assert!(limits.contains(text), "{text}: {limits}");
        assert!(page.contains(text), "{text}: {page}");
    }

    // As an earlier version does: then nobody knows.
    let mut sql = scene.deployment.sql();
    let earlier = "UPDATE queue_limit SET paused = true, changed_at = clock_timestamp()";
    sql.batch_execute(earlier).unwrap();
    let nobody = format!("Held: `{TASK}` is paused by an operator.");
    eventually("nobody knows", || (sentence() == nobody).then_some(()));

    as_ben(&scene, &["workflows", "resume", TASK]);
    let task = scene.runs();
    assert_eq!(task.job, job);
    let limits = scene.does(&["workflows", "limits"]);
    assert!(limits.contains("resumed by ben"), "{limits}");
}

/// In a container there are no variables with it.
#[test]
fn whoever_has_no_name_in_the_environment_has_the_systems() {
    let scene = Scene::new(&json!({"paused": true}));
    let service = start(&scene, &[]);
    let job = scene.submit(1)[0];
    scene.held(1);
    scene.does(&["jobs", "hold", &job.to_string()]);
    let name = Command::new("id").arg("-un").output().unwrap();
    let name = String::from_utf8(name.stdout).unwrap();
    let events = what(&service, job);
    let expected = format!("Put on hold by {}, by the command line", name.trim());
    assert!(events.last().unwrap().starts_with(&expected), "{events:?}");
}

/// Submitted by a client that says whose it is, and ended.
fn of_carol(scene: &Scene) -> Uuid {
    let (job, mut submission) = scene.client.submission(TASK);
    let parameters = json!({"price": 1.5});
    submission.params_dict = Some(wire::protobuf_struct(parameters.as_object().unwrap()));
    scene.client.listen(job);
    let properties = AmqpProperties::default()
        .with_delivery_mode(2)
        .with_app_id("carol".to_owned());
    let body = submission.encode_to_vec();
    let publish = Publish::with_properties(&body, "job_submissions", properties);
    let channel = &scene.client.peer.channel;
    Exchange::direct(channel).publish(publish).unwrap();
    let task = scene.runs();
    scene.ends(&task);
    scene.deployment.no_jobs_left();
    job
}

fn with_price() -> Scene {
    Scene::new(&json!({"workflow_parameters": [
        {"parameter_type": "float", "key_name": "price", "default": 1.0, "maximum": 100.0},
    ]}))
}

const KEEPS: [(&str, &str); 2] = [("KEEP_RESULTS_SEC", "600"), ("KEEP_INPUTS_SEC", "600")];

/// The task that is next, and what it is given.
fn given(scene: &Scene) -> (Task, String) {
    let message = scene.worker.take_message();
    let task = Task::of(&message);
    scene.worker.start(&task);
    (task, message.json().to_string())
}

#[test]
fn another_run_leaves_a_trace_and_is_the_same_owners() {
    let scene = with_price();
    let service = start(&scene, &KEEPS);
    let job = of_carol(&scene);
    let id = job.to_string();
    as_ben(&scene, &["workflows", "pause", TASK]);
    as_ben(&scene, &["jobs", "rerun", &id, "--param", "price=2"]);
    scene.held(1);
    let owner = "SELECT count(*) FROM job_turn WHERE owner = 'carol'";
    assert_eq!(scene.deployment.count(owner), 1);
    as_ben(&scene, &["workflows", "resume", TASK]);
    let (task, _) = given(&scene);
    scene.worker.succeed(&task, "<e id='again'/>");
    scene.deployment.no_jobs_left();

    let again = task.job.to_string();
    let told = story(&service, task.job);
    assert_eq!(told["runs_again"], json!(id), "{told}");
    assert_eq!(told["submitted_by"]["who"], "ben");
    let facts = told["events"][0]["evidence"].to_string();
    assert!(
        facts.contains(&format!("runs again what job {id} was")),
        "{facts}"
    );
    let told = story(&service, job);
    assert_eq!(told["run_again_as"], json!([again]), "{told}");
    assert!(told["submitted_by"].is_null());
    let last = what(&service, job).pop().unwrap();
    assert!(
        last.starts_with(&format!("Run again as job {again} by ben")),
        "{last}"
    );
    for (one, other, name) in [(&id, &again, "run again as"), (&again, &id, "runs again")] {
        let shown = scene.does(&["jobs", "show", one]);
        let mut lines = shown.lines();
        let line = lines.find(|line| line.starts_with(&format!("{name} ")));
        assert!(
            line.is_some_and(|line| line.ends_with(other.as_str())),
            "{shown}"
        );
        let page = Operator::at(&service, ANNA).get(&format!("/jobs/{one}"));
        page.is(200, &format!("href=\"/jobs/{other}\""))
            .is(200, &format!("href=\"/jobs/{id}/compare/{again}\""));
    }
    let compared = Operator::at(&service, ANNA).get(&format!("/jobs/{id}/compare/{again}"));
    let compared = compared.is(200, "≠ </span>parameter price");
    assert!(
        compared.body.contains("<td>1.5</td><td>2.0</td>"),
        "{compared:?}"
    );
    let unknown = format!("/jobs/{id}/compare/{}", Uuid::new_v4());
    Operator::at(&service, ANNA).get(&unknown).is(404, "");
    let compared = format!("/api/jobs/{id}/compare/{again}");
    let compared = Operator::at(&service, ANNA).get(&compared).is(200, "");
    let lines: Value = serde_json::from_str(&compared.body).unwrap();
    let line = json!({"what": "parameter price", "one": "1.5", "other": "2.0"});
    assert!(lines.as_array().unwrap().contains(&line), "{lines}");
    let unknown = format!("/api{unknown}");
    Operator::at(&service, ANNA)
        .get(&unknown)
        .is(404, "is unknown");
    let table = scene.does(&["jobs", "compare", &id, &again]);
    let heading = table.lines().next().unwrap();
    assert!(
        heading.contains(&id[..8]) && heading.contains(&again[..8]),
        "{table}"
    );
}

#[test]
fn a_job_that_is_submitted_by_somebody_says_by_whom() {
    let scene = Scene::new(&json!({}));
    let service = start(&scene, &[]);
    let file = scene.deployment.folder.join("in.esdl");
    std::fs::write(&file, "<esdl/>").unwrap();
    let output = scene.deployment.folder.join("out.esdl");
    let [file, output] = [&file, &output].map(|path| path.to_str().unwrap());
    let arguments = [
        "submit",
        file,
        "--workflow",
        TASK,
        "--unchecked",
        "--output",
        output,
    ];
    let mut command = scene.deployment.command(&arguments);
    let child = command
        .envs(scene.variables())
        .env("USER", "ben")
        .spawn()
        .unwrap();
    let (task, _) = given(&scene);
    scene.worker.succeed(&task, "<e id='out'/>");
    assert!(child.wait_with_output().unwrap().status.success());
    let told = story(&service, task.job);
    assert_eq!(told["submitted_by"]["who"], "ben", "{told}");
    assert!(told["runs_again"].is_null());
    let facts = told["events"][0]["evidence"].to_string();
    assert!(
        facts.contains("by ben, by the command line, from "),
        "{facts}"
    );
}

/// As that of a submission, with what the job has filled in.
#[test]
fn the_form_for_another_run_has_its_parameters_and_is_checked() {
    let scene = with_price();
    let service = start(&scene, &KEEPS);
    let job = of_carol(&scene);
    let id = job.to_string();
    let anna = Operator::at(&service, ANNA);
    let page = anna.get(&format!("/jobs/{id}")).is(200, "Run again…");
    let link = format!("/confirm?do=again&amp;id={id}&amp;job={id}");
    assert!(page.body.contains(&link), "{page:?}");
    let form = anna.get(&link.replace("&amp;", "&")).is(200, "again?");
    assert_eq!(form.field("param.price"), None);
    assert!(form.body.contains("name=\"param.price\"") && form.body.contains("value=\"1.5\""));
    let at = form.field("at").unwrap().to_owned();
    let send = |price: &str| {
        let fields = [
            ("do", "again"),
            ("id", id.as_str()),
            ("job", id.as_str()),
            ("at", at.as_str()),
            ("param.price", price),
        ];
        anna.send(&fields)
    };
    for price in ["500", "abc"] {
        let refused = send(price).is(400, "Nothing was submitted.");
        assert!(
            refused.body.contains(&format!("value=\"{price}\"")),
            "{refused:?}"
        );
    }
    anna.send(&[
        ("do", "again"),
        ("id", &id),
        ("job", &id),
        ("param.prise", "5"),
    ])
    .is(400, "prise is not known here");
    let count = "SELECT count(*) FROM job";
    assert_eq!(scene.deployment.count(count), 0);
    anna.done(&send("60"), "runs again as job ");
    let (task, text) = given(&scene);
    assert!(text.contains("\"price\":60.0"), "{text}");
    scene.worker.succeed(&task, "<e id='again'/>");
    scene.deployment.no_jobs_left();
    // As it was.
    anna.done(&send("1.5"), "runs again as job ");
    let (task, text) = given(&scene);
    assert!(text.contains("\"price\":1.5"), "{text}");
    scene.worker.fail(&task);
    scene.deployment.no_jobs_left();
}

/// No client has them, which would delete them.
#[test]
fn the_time_series_of_another_run_go_with_its_history() {
    let scene = Scene::new(&json!({}));
    let keeps = [("KEEP_INPUTS_SEC", "600")];
    let service = start(&scene, &keeps);
    let job = of_carol(&scene);
    let id = job.to_string();
    for output in ["<e id='of-another-run'/>", "<e id='out'/>"] {
        scene.does(&["jobs", "rerun", &id]);
        let (task, _) = given(&scene);
        scene.worker.succeed(&task, output);
        scene.deployment.no_jobs_left();
    }
    let used = "SELECT count(*) FROM esdl_time_series_info WHERE deactivated_at IS NULL";
    assert_eq!(scene.deployment.count(used), 2);
    // What the client has is still its own, though another run has the same.
    let own = format!("{used} AND job_id = '{id}' AND esdl_id = 'out'");
    assert_eq!(scene.deployment.count(&own), 1);
    service.stop();
    let forgets = [&keeps[..], &[("JOB_HISTORY_RETENTION_SEC", "1")]].concat();
    let _service = start(&scene, &forgets);
    scene
        .deployment
        .comes_to(0, "SELECT count(*) FROM job_history");
    scene.deployment.comes_to(1, used);
    assert_eq!(scene.deployment.count(&own), 1);
    scene.deployment.comes_to(0, "SELECT count(*) FROM job_act");
}

/// What an earlier version leaves of a job that it has forgotten.
#[test]
fn acts_of_jobs_that_nobody_knows_are_swept() {
    let scene = Scene::new(&json!({}));
    let mut sql = scene.deployment.sql();
    let service = start(&scene, &[]);
    sql.batch_execute(
        "INSERT INTO job_act (job_id, number, at, act) VALUES (gen_random_uuid(), 1, now(), 'AGAIN');
         INSERT INTO esdl_time_series_info (row_id, esdl_id, job_id)
         SELECT gen_random_uuid(), 'e', job_id FROM job_act",
    )
    .unwrap();
    scene.deployment.comes_to(0, "SELECT count(*) FROM job_act");
    let retired = "SELECT count(*) FROM esdl_time_series_info WHERE deactivated_at IS NOT NULL";
    assert_eq!(scene.deployment.count(retired), 1);
    drop(service);
}

#[test]
fn it_is_told_where_an_output_is_as_far_as_is_known() {
    let scene = Scene::new(&json!({}));
    let service = start(&scene, &[]);
    let job = scene.submit(1)[0];
    let id = job.to_string();
    let refusal = |id: &str| {
        let output = scene.deployment.command(&["jobs", "result", id]).output();
        let output = output.unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refusal(&id).contains(&format!("job {id} has not ended")));
    let task = scene.runs();
    scene.worker.succeed(&task, "<e id='out'/>");
    scene.deployment.no_jobs_left();

    let waits = "nobody has taken it";
    let known = story(&service, job)["whereabouts"].to_string();
    assert!(known.contains(waits), "{known}");
    let page = Operator::at(&service, ANNA).get(&format!("/jobs/{id}"));
    page.is(200, waits);
    assert!(scene.does(&["jobs", "show", &id]).contains(waits));
    let said = refusal(&id);
    assert!(
        said.contains("is not here: it has waited in RabbitMQ"),
        "{said}"
    );
    assert!(said.contains(waits), "{said}");
    assert_eq!(scene.client.outcome(job).0, ResultType::Succeeded);
    assert!(
        scene
            .does(&["jobs", "show", &id])
            .contains("Its client has taken it")
    );
    let queue = format!("jobs.{id}.result");
    scene.client.peer.delete_queue(&queue);
    assert!(
        scene
            .does(&["jobs", "show", &id])
            .contains("is gone by now")
    );

    // What its client does is said of other ends, and before the end.
    let failing = scene.submit(1)[0];
    let client = |job| story(&service, job)["client"].clone();
    let away = "It does not listen just now: the result will wait in its queue.";
    assert_eq!(client(failing), away);
    let shown = scene.does(&["jobs", "show", &failing.to_string()]);
    assert!(shown.contains(away), "{shown}");
    let task = scene.runs();
    scene.worker.fail(&task);
    scene.deployment.no_jobs_left();
    let waits = client(failing);
    let waits = waits.as_str().unwrap();
    assert!(waits.starts_with("It has not taken the result"), "{waits}");
    let page = Operator::at(&service, ANNA).get(&format!("/jobs/{failing}"));
    // Since when, in its reader's own time zone.
    let (said, since) = waits.split_once(" since ").unwrap();
    let since = since.trim_end_matches('.');
    page.is(
        200,
        &format!("{said} since <time class=\"at\" datetime=\"{since}\">"),
    );
    assert_eq!(scene.client.outcome(failing).0, ResultType::Error);
    eventually("it is known to be taken", || {
        (client(failing) == "It has taken the result from its queue.").then_some(())
    });
    // One that is a connection's alone lets nobody look.
    let alone = scene.submit(1)[0];
    let queue = format!("jobs.{alone}.result");
    scene.client.peer.delete_queue(&queue);
    let exclusive = QueueDeclareOptions {
        exclusive: true,
        ..QueueDeclareOptions::default()
    };
    let channel = &scene.client.peer.channel;
    channel.queue_declare(queue.as_str(), exclusive).unwrap();
    assert_eq!(
        client(alone),
        "It is connected: nobody else may look into its queue."
    );
    let nobodys = scene.submit(1)[0];
    let queue = format!("jobs.{nobodys}.result");
    scene.client.peer.delete_queue(&queue);
    let nobody = "It has no queue for the result: nobody waits for that.";
    assert_eq!(client(nobodys), nobody);
    // Looking has made none.
    assert_eq!(client(nobodys), nobody);

    // A row of an earlier version says nothing.
    let mut sql = scene.deployment.sql();
    sql.batch_execute("UPDATE job_story SET delivery = NULL")
        .unwrap();
    assert_eq!(story(&service, job)["whereabouts"], Value::Null);
    assert!(refusal(&id).contains(&format!("no output ESDL of job {id} is kept")));
}
