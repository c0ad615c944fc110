//! What operators do through the page: each form and what comes of it.

use std::net::TcpStream;

use omotes_orchestrator::wire::{DEAD_LETTERS_QUEUE, job_result::ResultType};
use rstest::rstest;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::browser::Browser;
use crate::harness::deployment::{Deployment, Service, eventually};
use crate::harness::operator::{Answer, Operator, exchange};
use crate::harness::peers::Client;
use crate::harness::proxy::{End, Proxy, Weather};
use crate::python::{CeleryWorker, PYTHON};
use crate::turns::{Scene, TASK};

pub const ANNA: &str = "anna:s3cret";
pub const BEN: &str = "ben:look";
pub const ACCOUNTS: [(&str, &str); 2] = [("HTTP_BASIC_AUTH", ANNA), ("HTTP_READONLY_AUTH", BEN)];

pub fn start(scene: &Scene) -> Service {
    let variables = [&scene.variables()[..], &ACCOUNTS].concat();
    scene.deployment.start_with(&variables)
}

/// What a confirmation of all that match is bound to.
struct Shown(String, String, String);

impl Shown {
    fn on(page: &Answer) -> Shown {
        let field = |name| page.field(name).unwrap().to_owned();
        Shown(field("shown"), field("at"), field("set"))
    }

    fn fields<'a>(&'a self, verb: &'a str, list: &'a str) -> [(&'a str, &'a str); 5] {
        let Shown(digest, at, set) = self;
        [
            ("do", verb),
            ("list", list),
            ("shown", digest),
            ("at", at),
            ("set", set),
        ]
    }
}

/// Jobs that are held, on a deployment whose queue is paused.
pub fn held_jobs(count: usize) -> (Scene, Service, Vec<Uuid>) {
    let scene = Scene::new(&json!({"paused": true}));
    let service = start(&scene);
    let jobs = scene.submit(count);
    scene.held(i64::try_from(count).unwrap());
    (scene, service, jobs)
}

pub fn turns(condition: &str) -> String {
    format!("SELECT count(*) FROM job_turn WHERE {condition}")
}

#[test]
fn jobs_that_wait_for_their_turn_are_changed() {
    let (scene, service, jobs) = held_jobs(3);
    let anna = Operator::at(&service, ANNA);
    let [one, two, three] = [0, 1, 2].map(|place: usize| jobs[place].to_string());
    let list = "state=REGISTERED&workflow=workflow_1";
    let sent = anna.send(&[("do", "hold"), ("id", &one), ("id", &two), ("list", list)]);
    let location = sent.header("Location").unwrap();
    assert!(
        location.starts_with(&format!("/?{list}&note=")),
        "{location}"
    );
    let page = anna.done(&sent, &format!("job {one} is held until it is released"));
    assert!(page.body.contains(&format!("job {two} is held")));
    scene.deployment.comes_to(2, &turns("on_hold"));
    service.logged(&format!(": hold {one}, {two}: job {one} is held until"));

    let sent = anna.send(&[("do", "release"), ("id", &two), ("job", &two)]);
    anna.done(&sent, &format!("job {two} waits for its turn"));
    assert!(
        sent.header("Location")
            .unwrap()
            .starts_with(&format!("/jobs/{two}?note="))
    );
    scene.deployment.comes_to(1, &turns("on_hold"));
    let sent = anna.send(&[("do", "priority"), ("id", &one), ("level", "high")]);
    anna.done(&sent, "has the priority high");
    let high = format!("SELECT count(*) FROM job WHERE job_id = '{one}' AND priority = 'HIGH'");
    scene.deployment.comes_to(1, &high);
    let sent = anna.send(&[("do", "first"), ("id", &three)]);
    anna.done(&sent, "is the next of its queue");
    let unknown = Uuid::nil().to_string();
    let sent = anna.send(&[("do", "hold"), ("id", &unknown)]);
    anna.done(&sent, &format!("job {unknown} is unknown"));

    // One at a time, so that their order is seen.
    anna.send(&[("do", "limit"), ("queue", TASK), ("max_running", "1")])
        .is(303, "");
    let sent = anna.send(&[("do", "resume"), ("queue", TASK)]);
    anna.done(&sent, "workflow_1: ");
    for job in [jobs[2], jobs[1]] {
        let task = scene.runs();
        assert_eq!(task.job, job);
        scene.ends(&task);
    }
    anna.send(&[("do", "release"), ("id", &one)]).is(303, "");
    let task = scene.runs();
    assert_eq!(task.job, jobs[0]);
    let sent = anna.send(&[("do", "hold"), ("id", &one)]);
    anna.done(&sent, "its task has been handed over to RabbitMQ");
    scene.ends(&task);
    scene.nothing_is_left();
}

#[test]
fn a_job_is_cancelled_after_being_asked_again() {
    let (scene, service, jobs) = held_jobs(2);
    let anna = Operator::at(&service, ANNA);
    let job = jobs[0].to_string();
    let page = anna.get(&format!("/jobs/{job}"));
    let link = format!("/confirm?do=cancel&amp;id={job}&amp;job={job}");
    let page = page.is(200, &link);
    assert!(page.body.contains("aria-label=\"Cancel: owner/a job\""));
    let asked = anna
        .get(&link.replace("&amp;", "&"))
        .is(200, "Cancel 1 job?");
    // It must not change while it is read.
    assert!(!asked.body.contains("<script"), "{asked:?}");
    scene.held(2);
    let token = asked.field("token").unwrap();
    let fields = [
        ("do", "cancel"),
        ("id", &job),
        ("job", &job),
        ("token", token),
    ];
    let sent = anna.send_forged(&fields, "X-Forwarded-For: 192.0.2.7\r\n");
    anna.done(&sent, &format!("job {job} is asked to end"));
    assert_eq!(scene.client.outcome(jobs[0]).0, ResultType::Cancelled);
    let line = service.logged(&format!(": cancel {job}: job {job} is asked to end"));
    assert!(line.contains("anna at 127.0.0.1:"), "{line}");
    assert!(line.contains("which says it is for 192.0.2.7"), "{line}");
    scene.held(1);
    let path = format!("/confirm?do=cancel&id={job}");
    anna.get(&path).is(200, "has ended, or is unknown");
    let sent = anna.send(&[("do", "cancel"), ("id", &job)]);
    anna.done(&sent, &format!("job {job} has ended already"));
}

#[test]
fn limits_of_queues_are_set() {
    let scene = Scene::new(&json!({}));
    let service = start(&scene);
    let anna = Operator::at(&service, ANNA);
    let limits = |condition: &str| {
        let sql =
            format!("SELECT count(*) FROM queue_limit WHERE queue = '{TASK}' AND {condition}");
        scene.deployment.comes_to(1, &sql);
    };
    let sent = anna.send(&[("do", "pause"), ("queue", TASK)]);
    anna.done(&sent, "workflow_1: paused");
    limits("paused");
    service.logged("limits of task queues: workflow_1 paused");
    let fields = [
        ("queue", TASK),
        ("window", "3"),
        ("max_running", "unlimited"),
    ];
    let sent = anna.send(&[&fields[..], &[("do", "limit")]].concat());
    anna.done(&sent, "workflow_1: ");
    limits("paused AND max_waiting = 3 AND max_running = 0");
    let fields = [
        ("do", "limit"),
        ("queue", TASK),
        ("window", "default"),
        ("max_running", ""),
    ];
    anna.send(&fields).is(303, "");
    limits("max_waiting IS NULL AND max_running = 0");
    anna.send(&[("do", "resume"), ("queue", TASK)]).is(303, "");
    limits("NOT paused");
    let faults = [
        (
            "chain",
            "chain has steps: name one of their tasks, first, workflow_1",
        ),
        ("nothing<b>", "no workflow has the task nothing&lt;b&gt;"),
    ];
    for (queue, fault) in faults {
        anna.send(&[("do", "pause"), ("queue", queue)])
            .is(400, fault);
    }
}

#[test]
fn a_worker_is_drained_and_sent_back() {
    let deployment = Deployment::new();
    let workflows = format!("{PYTHON}/workflows.json");
    let own = [
        ("WORKFLOW_CONFIG_PATH", workflows.as_str()),
        ("WORKERS_PERIOD_SEC", "5"),
    ];
    let service = deployment.start_with(&[&own[..], &ACCOUNTS].concat());
    let anna = Operator::at(&service, ANNA);
    let worker = CeleryWorker::new(&deployment, "4.3");
    let name = format!("worker-steerable@{}", worker.host);
    let page = |verb: &str| {
        let button = format!("value=\"{verb}\" aria-label=");
        eventually(&format!("a button to {verb}"), || {
            let page = anna.get("/");
            (page.body.contains(&name) && page.body.contains(&button)).then_some(())
        });
    };
    page("drain");
    let sent = anna.send(&[("do", "drain"), ("worker", &name)]);
    anna.done(&sent, "takes nothing more; it has nothing to finish");
    page("send-back");
    let sent = anna.send(&[("do", "send-back"), ("worker", &name)]);
    anna.done(&sent, "takes tasks from steerable");
    anna.send(&[("do", "drain"), ("worker", "nobody")])
        .is(400, "no worker is called nobody");
}

#[test]
fn dead_letters_are_requeued() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let service = deployment.start_with(&ACCOUNTS);
    let anna = Operator::at(&service, ANNA);
    for _ in 0..2 {
        client.peer.send("job_deletions", b"\xff");
    }
    let letters = || client.peer.queue_length(DEAD_LETTERS_QUEUE);
    eventually("two letters", || (letters() == 2).then_some(()));
    let page = eventually("the page knows of them", || {
        let page = anna.get("/");
        page.body.contains("2 messages").then_some(page)
    });
    page.is(200, "/dead-letters");
    // What they are is there before anything is done. A look may count as a delivery.
    let ben = Operator::at(&service, BEN);
    ben.get("/dead-letters").is(403, "");
    let page = ben.get("/").is(200, "dead-letters list");
    assert!(!page.body.contains("\"/dead-letters\""), "{}", page.body);
    let page = anna.get("/dead-letters").is(200, "2 dead letters");
    for what in [
        "job_deletions",
        "SDK",
        "failed to decode Protobuf message",
        "<td class=\"number\">1</td>",
        "/confirm?do=requeue",
    ] {
        assert!(page.body.contains(what), "{what}: {}", page.body);
    }
    assert_eq!(letters(), 2);
    let asked = anna
        .get("/confirm?do=requeue")
        .is(200, "Requeue 2 dead letters?");
    let letter = asked.field("letter").unwrap().to_owned();
    let shown = asked.field("shown").unwrap();
    // A beginning of an id is none.
    let sent = anna.send(&[("do", "requeue"), ("letter", &letter[..8])]);
    sent.is(400, "there is no dead letter");
    let sent = anna.send(&[("do", "requeue"), ("letter", &letter)]);
    let (id, _) = letter.rsplit_once('#').unwrap();
    anna.done(&sent, &format!("{id}: requeued"));
    let sent = anna.send(&[("do", "requeue"), ("letter", &letter)]);
    sent.is(400, "there is no dead letter");
    // It is as faulty as it was, and is a letter again: as many as before, but others.
    eventually("two letters again", || (letters() == 2).then_some(()));
    let sent = anna.send(&[("do", "requeue"), ("shown", shown)]);
    let again = sent.is(
        409,
        "There are others now than this form was for. Nothing was done.",
    );
    assert_eq!(letters(), 2);
    let shown = again.field("shown").unwrap();
    let sent = anna.send(&[("do", "requeue"), ("shown", shown)]);
    let page = anna.done(&sent, "2 dead letters requeued");
    assert_eq!(page.body.matches(": requeued").count(), 2, "{page:?}");
    service.logged(" asks: requeue all dead letters that were shown");
    service.logged(": requeue all dead letters that were shown: 2 dead letters requeued");
}

/// What somebody else is looking at is not requeued, and nobody is told that it was.
#[test]
fn a_letter_that_somebody_looks_at_is_not_said_to_be_requeued() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let service = deployment.start_with(&ACCOUNTS);
    let anna = Operator::at(&service, ANNA);
    let letters = || client.peer.queue_length(DEAD_LETTERS_QUEUE);
    client.peer.send("job_deletions", b"\xff");
    eventually("a letter", || (letters() == 1).then_some(()));
    let asked = anna
        .get("/confirm?do=requeue")
        .is(200, "Requeue 1 dead letter?");
    let letter = asked.field("letter").unwrap();
    let shown = asked.field("shown").unwrap();
    let held = client.peer.hold(DEAD_LETTERS_QUEUE);
    let sent = anna.send(&[("do", "requeue"), ("letter", letter)]);
    sent.is(400, "or somebody else is looking at it");
    let sent = anna.send(&[("do", "requeue"), ("shown", shown)]);
    sent.is(409, "or somebody else is looking at them now");
    client.peer.give_back(held);
    eventually("it is there again", || (letters() == 1).then_some(()));
    let sent = anna.send(&[("do", "requeue"), ("letter", letter)]);
    anna.done(&sent, "1 dead letter requeued");
}

#[test]
fn of_those_that_were_shown_all_that_still_match_are_cancelled() {
    let (scene, service, jobs) = held_jobs(4);
    let others = [scene.submit_as("other"), scene.submit_as("other")];
    scene.held(6);
    let anna = Operator::at(&service, ANNA);
    let list = "text=owner%2F";
    anna.get(&format!("/?{list}"))
        .is(200, "/confirm?do=cancel-all&amp;list=text%3Downer%252F");
    let asked = anna
        .get("/confirm?do=cancel-all&list=text%3Downer%252F")
        .is(200, "Cancel 4 jobs?");
    let shown = Shown::on(&asked);
    let Shown(digest, at, set) = &shown;
    // Meanwhile one more has come, which is not meant, though one has gone whose place it takes; and another
    // has come to match, which was there.
    let late = scene.submit_as("owner");
    scene.client.cancel(jobs[0]);
    assert_eq!(scene.client.outcome(jobs[0]).0, ResultType::Cancelled);
    let renamed = |job, to: &str| {
        let rename = format!("UPDATE job SET job_reference = '{to}' WHERE job_id = '{job}'");
        scene.deployment.sql().execute(&rename, &[]).unwrap();
    };
    renamed(others[0], "owner/was another");
    renamed(jobs[1], "no longer");
    scene.held(6);
    // Which ones were shown is not known of these, and others are there now.
    let forged = format!("{set}{}", &set[..22]);
    for set in [None, Some(forged.as_str()), Some("AAAAAAAAAAAAAAAAAAAAAA")] {
        let fields = [
            ("do", "cancel-all"),
            ("list", list),
            ("shown", digest),
            ("at", at),
        ];
        let set = set.map(|set| ("set", set));
        let fields: Vec<_> = fields.into_iter().chain(set).collect();
        let again = anna.send(&fields);
        let code = again.status;
        assert!([400, 409].contains(&code), "{again:?}");
        scene.held(6);
    }
    let sent = anna.send(&shown.fields("cancel-all", list));
    let page = anna.done(&sent, "2 jobs asked to end");
    for told in [
        "1 of the 4 that were shown had ended meanwhile",
        "1 of the 4 that were shown had been changed meanwhile",
        "left alone: 1 job that had come to match meanwhile",
    ] {
        assert!(page.body.contains(told), "{told}: {page:?}");
    }
    for job in [jobs[2], jobs[3]] {
        assert!(page.body.contains(&format!("job {job}")), "{page:?}");
        service.logged(&format!("job {job}"));
    }
    scene.held(4);
    let left = [others[0], others[1], jobs[1], late];
    let ids = left.map(|job| format!("'{job}'")).join(", ");
    let left = format!("SELECT count(*) FROM job WHERE job_id IN ({ids})");
    scene.deployment.comes_to(4, &left);
    let cancelled = "SELECT count(*) FROM job_history WHERE outcome = 'CANCELLED'";
    scene.deployment.comes_to(3, cancelled);
    // Somebody else who has been shown the same comes too late.
    let sent = anna.send(&shown.fields("cancel-all", list));
    let page = anna.done(&sent, "nothing was done");
    let ended = "3 of the 4 that were shown had ended meanwhile";
    assert!(page.body.contains(ended), "{page:?}");
    scene.held(4);
    anna.send(&shown.fields("cancel-all", "finished=true"))
        .is(400, "these jobs have ended already");
    // Without what was shown, it is shown.
    anna.send(&[("do", "cancel-all")]).is(409, "Cancel 4 jobs?");
}

#[test]
fn all_that_match_are_held_and_released() {
    let (scene, service, jobs) = held_jobs(3);
    let other = scene.submit_as("other");
    scene.held(4);
    let anna = Operator::at(&service, ANNA);
    let list = "text=owner%2F";
    for verb in ["hold", "release"] {
        anna.get(&format!("/?{list}")).is(
            200,
            &format!("/confirm?do={verb}-all&amp;list=text%3Downer%252F"),
        );
    }
    let confirm = |verb: &str| anna.get(&format!("/confirm?do={verb}&list=text%3Downer%252F"));
    let send = |verb: &str, page: &Answer| anna.send(&Shown::on(page).fields(verb, list));
    confirm("release-all").is(200, "There is none that is on hold.");
    let asked = confirm("hold-all").is(200, "Hold 3 jobs?");
    // Meanwhile one of them is held by somebody else.
    let one = jobs[0].to_string();
    anna.send(&[("do", "hold"), ("id", &one)]).is(303, "");
    let page = anna.done(
        &send("hold-all", &asked),
        "2 jobs held until they are released",
    );
    let changed = "1 of the 3 that were shown had been changed meanwhile";
    assert!(page.body.contains(changed), "{page:?}");
    service.logged(": hold all jobs with text=owner%2F, as shown at ");
    scene.deployment.comes_to(3, &turns("on_hold"));
    let of_other = turns(&format!("on_hold AND job_id = '{other}'"));
    scene.deployment.comes_to(0, &of_other);
    let asked = confirm("release-all").is(200, "Release 3 jobs?");
    anna.done(&send("release-all", &asked), "3 jobs released");
    scene.deployment.comes_to(0, &turns("on_hold"));
    anna.get("/confirm?do=hold-all&list=finished%3Dtrue")
        .is(400, "these jobs have ended already");
    // Without what was shown, it is shown.
    anna.send(&[("do", "hold-all")]).is(409, "Hold 4 jobs?");
}

/// Any number of those that it is not about come before them in the list.
#[test]
fn those_that_are_meant_are_named_wherever_they_are() {
    let (scene, service, jobs) = held_jobs(2);
    let running = "INSERT INTO job (job_id, celery_id, workflow_type, status, registered_at,
                                    running_at, timeout_after_ms, job_reference)
                   SELECT gen_random_uuid(), 'task', 'workflow_1', 'RUNNING', now(), now(),
                          86400000, ''
                   FROM generate_series(1, 1100)";
    scene.deployment.sql().batch_execute(running).unwrap();
    let anna = Operator::at(&service, ANNA);
    let page = anna.get("/confirm?do=hold-all").is(200, "Hold 2 jobs?");
    for job in jobs {
        assert!(page.body.contains(&format!("/jobs/{job}")), "{page:?}");
    }
}

#[test]
fn nothing_is_half_done_unsaid_while_a_service_is_down() {
    let deployment = Deployment::new();
    let postgres = Proxy::new(deployment.postgres_door()).unwrap();
    let rabbitmq = Proxy::new(deployment.rabbitmq_port()).unwrap();
    let ports = [&postgres, &rabbitmq].map(|proxy| proxy.port().to_string());
    let scene = Scene::on(deployment, &json!({"paused": true}));
    let own = [
        ("POSTGRESQL_PORT", ports[0].as_str()),
        ("SDK_RABBITMQ_PORT", ports[1].as_str()),
    ];
    let variables = [&scene.variables()[..], &ACCOUNTS, &own].concat();
    let service = scene.deployment.start_with(&variables);
    let job = scene.submit(1)[0];
    scene.held(1);
    let anna = Operator::at(&service, ANNA);
    let id = job.to_string();
    let token = anna.token();
    let send = |verb: &str| anna.send_forged(&[("do", verb), ("id", &id), ("token", &token)], "");
    postgres.set(Weather::Refuse);
    postgres.cut(End::Rst);
    send("hold").is(503, "nothing was done");
    send("cancel").is(503, "nothing was done");
    anna.get(&format!("/confirm?do=cancel&id={id}"))
        .is(503, "Postgres");
    postgres.set(Weather::Fair);
    eventually("Postgres is back", || {
        (send("hold").status == 303).then_some(())
    });
    scene.deployment.comes_to(1, &turns("on_hold"));

    rabbitmq.set(Weather::Refuse);
    rabbitmq.cut(End::Rst);
    send("cancel").is(503, "nothing was cancelled");
    anna.get("/confirm?do=requeue").is(503, "RabbitMQ");
    service.logged(&format!("cancel {id}: failed: nothing was cancelled"));
    scene.held(1);
    rabbitmq.set(Weather::Fair);
    let sent = eventually("RabbitMQ is back", || {
        Some(send("cancel")).filter(|one| one.status == 303)
    });
    anna.done(&sent, "is asked to end");
    assert_eq!(scene.client.outcome(job).0, ResultType::Cancelled);
}

#[rstest]
#[case::wide(1400)]
#[case::narrow(390)]
fn the_forms_work_in_a_browser(#[case] width: u32) {
    let (scene, service, jobs) = held_jobs(1);
    let browser = Browser::new(width, 900, false);
    browser.open(&format!(
        "http://{ANNA}@{}/?state=REGISTERED",
        service.http()
    ));
    browser.shows("owner/a job");
    let fits = "return document.documentElement.scrollWidth <= innerWidth";
    assert_eq!(browser.run(fits), true);
    let unlabelled = "return [...document.querySelectorAll('form.act input:not([type=hidden]), \
                      form.act select')].filter((one) => !one.labels.length \
                      && !one.getAttribute('aria-label')).length";
    assert_eq!(browser.run(unlabelled), 0);
    browser.run("document.querySelector('button[value=hold]').click()");
    browser.shows(&format!("job {} is held until it is released", jobs[0]));
    assert_eq!(browser.run(fits), true);
    scene.deployment.comes_to(1, &turns("on_hold"));
    // What is typed and opened stays, though the page goes on.
    browser.run(
        "document.querySelector('details').open = true; \
         document.querySelector('details input[name=window]').value = '7'",
    );
    let rows = |count: usize| {
        scene.submit(1);
        eventually("one more job on the page", || {
            let rows = browser.run("return document.querySelectorAll('.jobs tbody tr').length");
            (rows == count).then_some(())
        });
    };
    rows(2);
    let kept = "const all = document.querySelector('details'); \
                return [all.open, all.querySelector('input[name=window]').value]";
    assert_eq!(browser.run(kept), json!([true, "7"]));
    // What is chosen stays chosen, though the options before it become others.
    let chosen = browser.run(
        "const all = document.querySelector('details select'); \
         all.options[0].remove(); all.value = [...all.options].pop().value; \
         all.dispatchEvent(new Event('input', {bubbles: true})); return all.value",
    );
    rows(3);
    let still = browser.run("return document.querySelector('details select').value");
    assert_eq!(still, chosen);
    // On hold, it is the last of the list by now.
    let cancel = format!("a.button[href*=\"do=cancel&id={}\"]", jobs[0]);
    browser.run(&format!("document.querySelector('{cancel}').click()"));
    browser.shows("Cancel 1 job?");
    assert_eq!(browser.run(fits), true);
    browser.run("document.querySelector('button.danger').click()");
    browser.shows("is asked to end");
    assert_eq!(
        browser.run("return location.search.startsWith('?state=REGISTERED&note=')"),
        true
    );
    assert_eq!(scene.client.outcome(jobs[0]).0, ResultType::Cancelled);
}

#[test]
fn one_who_is_no_browser_is_answered_in_json() {
    let scene = Scene::new(&json!({"paused": true}));
    let json_log = [("LOG_FORMAT", "json")];
    let variables = [&scene.variables()[..], &ACCOUNTS, &json_log].concat();
    let service = scene.deployment.start_with(&variables);
    let jobs = scene.submit(1);
    scene.held(1);
    let anna = Operator::at(&service, ANNA);
    let token = anna.token();
    let body = format!("do=hold&id={}&token={token}", jobs[0]);
    let request = anna.bytes(
        "POST /act",
        &format!(
            "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n",
            body.len()
        ),
        body.as_bytes(),
    );
    let request = String::from_utf8(request).unwrap();
    let request = request.replace("Accept: text/html", "Accept: */*");
    let stream = TcpStream::connect(anna.address).unwrap();
    let answer = exchange(stream, request.as_bytes()).is(200, "is held until it is released");
    assert_eq!(answer.header("Content-Type"), Some("application/json"));
    let line = service.logged(&format!(": hold {}: ", jobs[0]));
    let line: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(line["account"], "anna");
}
