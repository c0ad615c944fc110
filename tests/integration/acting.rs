//! What operators do through the page: each form and what comes of it, and that nobody else's counts.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use omotes_orchestrator::wire::{DEAD_LETTERS_QUEUE, job_result::ResultType};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::TestRunner;
use rstest::rstest;
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use uuid::Uuid;

use crate::harness::browser::Browser;
use crate::harness::deployment::{Deployment, PATIENCE, Service, eventually};
use crate::harness::operator::{Answer, Operator, exchange};
use crate::harness::peers::Client;
use crate::harness::proxy::{End, Proxy, Weather};
use crate::python::{CeleryWorker, PYTHON};
use crate::turns::{Scene, TASK};

const ANNA: &str = "anna:s3cret";
const BEN: &str = "ben:look";
const ACCOUNTS: [(&str, &str); 2] = [("HTTP_BASIC_AUTH", ANNA), ("HTTP_READONLY_AUTH", BEN)];

fn start(scene: &Scene) -> Service {
    let variables = [&scene.variables()[..], &ACCOUNTS].concat();
    scene.deployment.start_with(&variables)
}

/// What a confirmation of all that match is bound to.
struct Shown(String, String);

impl Shown {
    fn on(page: &Answer) -> Shown {
        let field = |name| page.field(name).unwrap().to_owned();
        Shown(field("shown"), field("at"))
    }

    fn fields<'a>(&'a self, list: &'a str) -> [(&'a str, &'a str); 4] {
        let Shown(digest, at) = self;
        [
            ("do", "cancel-all"),
            ("list", list),
            ("shown", digest),
            ("at", at),
        ]
    }
}

/// Jobs that are held, on a deployment whose queue is paused.
fn held_jobs(count: usize) -> (Scene, Service, Vec<Uuid>) {
    let scene = Scene::new(&json!({"paused": true}));
    let service = start(&scene);
    let jobs = scene.submit(count);
    scene.held(i64::try_from(count).unwrap());
    (scene, service, jobs)
}

fn turns(condition: &str) -> String {
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
    page.is(200, "/confirm?do=requeue");
    let asked = anna
        .get("/confirm?do=requeue")
        .is(200, "Requeue 2 dead letters?");
    let letter = asked.field("letter").unwrap().to_owned();
    let shown = asked.field("shown").unwrap();
    // A beginning of an id is none.
    let sent = anna.send(&[("do", "requeue"), ("letter", &letter[..8])]);
    sent.is(400, "there is no dead letter");
    let sent = anna.send(&[("do", "requeue"), ("letter", &letter)]);
    anna.done(&sent, &format!("{letter}: requeued"));
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
fn all_that_match_are_cancelled_if_they_are_those_that_were_shown() {
    let (scene, service, jobs) = held_jobs(3);
    let others = [scene.submit_as("other"), scene.submit_as("other")];
    scene.held(5);
    let anna = Operator::at(&service, ANNA);
    let list = "text=owner%2F";
    anna.get(&format!("/?{list}"))
        .is(200, "/confirm?do=cancel-all&amp;list=text%3Downer%252F");
    let asked = anna
        .get(&format!(
            "/confirm?do=cancel-all&list={}",
            list.replace('%', "%25").replace('=', "%3D")
        ))
        .is(200, "Cancel 3 jobs?");
    let shown = Shown::on(&asked);
    // Meanwhile one more has come, which is not meant, though one has gone whose place it takes.
    let late = scene.submit_as("owner");
    scene.client.cancel(jobs[0]);
    assert_eq!(scene.client.outcome(jobs[0]).0, ResultType::Cancelled);
    scene.held(5);
    let again = anna.send(&shown.fields(list)).is(
        409,
        "There are others now than this form was for. Nothing was done.",
    );
    assert!(again.body.contains("Cancel 3 jobs?"), "{again:?}");
    scene.held(5);
    // Two operators at once, who have been shown the same.
    let shown = Shown::on(&again);
    let last = scene.submit_as("owner");
    scene.held(6);
    let token = anna.token();
    let fields = [&shown.fields(list)[..], &[("token", &token)]].concat();
    let answers = thread::scope(|scope| {
        let send = || anna.send_forged(&fields, "");
        let threads = [scope.spawn(send), scope.spawn(send)];
        threads.map(|thread| thread.join().unwrap())
    });
    let (done, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|one| one.status == 303);
    let page = anna.done(done[0], "3 jobs asked to end");
    for job in [jobs[1], jobs[2], late] {
        assert!(page.body.contains(&format!("job {job}")), "{page:?}");
        service.logged(&format!("job {job}"));
    }
    assert!(refused.iter().all(|one| one.status == 409), "{refused:?}");
    scene.held(3);
    let others = [others[0], others[1], last];
    let ids = others.map(|job| format!("'{job}'")).join(", ");
    let left = format!("SELECT count(*) FROM job WHERE job_id IN ({ids})");
    scene.deployment.comes_to(3, &left);
    let cancelled = "SELECT count(*) FROM job_history WHERE outcome = 'CANCELLED'";
    scene.deployment.comes_to(4, cancelled);
    anna.send(&shown.fields("finished=true"))
        .is(400, "these jobs have ended already");
    // Without what was shown, it is shown.
    anna.send(&[("do", "cancel-all")]).is(409, "Cancel 3 jobs?");
}

/// Whatever is sent, nobody is asked to end.
#[test]
fn a_form_of_somebody_else_does_not_count() {
    let (scene, service, jobs) = held_jobs(1);
    let anna = Operator::at(&service, ANNA);
    let job = jobs[0].to_string();
    let token = anna.token();
    let forged = format!("{}A", &token[..token.len() - 1]);
    let (since, tag) = token.split_once('.').unwrap();
    let old = format!("{}.{tag}", since.parse::<i64>().unwrap() - 86400);
    let post = |token: &str, headers: &str| {
        let fields = [("do", "cancel"), ("id", &job), ("token", token)];
        anna.send_forged(&fields, headers)
    };
    for token in ["", "x", &forged, &old, &token[1..]] {
        post(token, "").is(403, "token");
    }
    service.logged(": a form is refused: The form has no token.");
    let elsewhere = "by another site";
    for headers in [
        "Origin: http://evil.example\r\n",
        "Origin: null\r\n",
        "Sec-Fetch-Site: cross-site\r\n",
        "Sec-Fetch-Site: same-site\r\n",
        "Sec-Fetch-Site: cross-site\r\nOrigin: http://localhost\r\n",
    ] {
        post(&token, headers).is(403, elsewhere);
    }
    let line = format!("GET /confirm?do=cancel&id={job}");
    anna.request(&line, "Sec-Fetch-Site: cross-site\r\n", b"")
        .is(403, elsewhere);
    // Nor without an account, with a wrong one, or with one that may only look.
    for (account, status, why) in [
        ("", 401, "A user and a password are needed."),
        ("anna:wrong", 401, "A user and a password are needed."),
        (BEN, 403, "This account may only look."),
    ] {
        let other = Operator { account, ..anna };
        let fields = [("do", "cancel"), ("id", &job), ("token", &token)];
        let answer = other.send_forged(&fields, "").is(status, why);
        assert!(answer.body.starts_with("<!DOCTYPE html>"), "{answer:?}");
    }
    let ben = Operator {
        account: BEN,
        ..anna
    };
    for path in ["/", &format!("/jobs/{job}")] {
        let page = ben.get(path).is(200, "owner/a job");
        assert!(!page.body.contains("/act") && !page.body.contains("/confirm"));
    }
    ben.get(&format!("/confirm?do=cancel&id={job}"))
        .is(403, "may only look");
    service.logged(": POST /act is refused: This account may only look.");
    let line = service.logged(&format!(
        ": GET /confirm?do=cancel&id={job} is refused: This acc"
    ));
    assert!(line.contains("ben at 127.0.0.1:"), "{line}");
    // A browser on plain HTTP says nothing of where it was sent from.
    let line = format!("GET /confirm?do=cancel&id={job}");
    anna.request(&line, "", b"").is(403, "is not known");
    let page = anna.get("/");
    let (pass, _) = page.header("Set-Cookie").unwrap().split_once(';').unwrap();
    let pass = format!("Cookie: {pass}\r\n");
    anna.request(&line, &pass, b"").is(200, "Cancel 1 job?");
    scene.held(1);
    let requests = scene.client.peer.queue_length("job_deletions");
    assert_eq!(requests, 0);
    // And this is what would have counted, of another replica's page too.
    let other = start(&scene);
    let token = Operator::at(&other, ANNA).token();
    let origin = format!("Origin: http://{}\r\n", anna.address);
    let sent = post(&token, &origin);
    anna.done(&sent, "is asked to end");
    assert_eq!(scene.client.outcome(jobs[0]).0, ResultType::Cancelled);
}

#[test]
fn without_an_account_nobody_acts() {
    let scene = Scene::new(&json!({"paused": true}));
    let service = scene.deployment.start_with(&scene.variables());
    let jobs = scene.submit(1);
    scene.held(1);
    let job = jobs[0].to_string();
    let nobody = Operator::at(&service, "");
    let page = nobody.get("/").is(200, "owner/a job");
    assert!(!page.body.contains("/act") && !page.body.contains("/confirm"));
    let fields = [("do", "cancel"), ("id", job.as_str())];
    nobody
        .send_forged(&fields, "")
        .is(403, "set HTTP_BASIC_AUTH");
    nobody
        .get(&format!("/confirm?do=cancel&id={job}"))
        .is(403, "set HTTP_BASIC_AUTH");
    assert!(!service.threads().iter().any(|name| name.starts_with("act")));
    scene.held(1);
}

#[test]
fn a_note_that_nobody_has_sealed_is_not_shown() {
    let (_scene, service, _) = held_jobs(1);
    let anna = Operator::at(&service, ANNA);
    for query in [
        "note=all+is+well&seal=",
        "note=all+is+well&seal=1.x",
        "seal=&note=all+is+well",
    ] {
        let page = anna.get(&format!("/?{query}")).is(200, "OMOTES jobs");
        assert!(!page.body.contains("all is well"), "{query}");
    }
}

#[test]
fn a_body_is_bounded_and_what_is_wrong_with_it_is_said() {
    let deployment = Deployment::new();
    let service = deployment.start_with(&ACCOUNTS);
    let anna = Operator::at(&service, ANNA);
    for (headers, length, status, why) in [
        (
            "Content-Length: 1048576\r\n",
            1_048_576,
            413,
            "at most 65536 bytes",
        ),
        (
            "Content-Length: 999999999999999999999\r\n",
            0,
            413,
            "too long",
        ),
        ("", 0, 411, "no Content-Length"),
        (
            "Transfer-Encoding: chunked\r\n",
            10,
            411,
            "no Content-Length",
        ),
        (
            "Content-Length: +3\r\n",
            3,
            400,
            "Content-Length is no number",
        ),
        (
            "Content-Length: 3\r\nContent-Length: 4\r\n",
            4,
            400,
            "is no number",
        ),
        ("Content-Length: 0\r\n", 0, 400, "do is missing"),
        ("Content-Length: 65536\r\n", 65536, 400, "is not known here"),
        (
            "Expect: 100-continue\r\nContent-Length: 3\r\n",
            3,
            400,
            "xxx is not known here",
        ),
    ] {
        let headers = format!("{headers}Content-Type: application/x-www-form-urlencoded\r\n");
        let answer = anna.request("POST /act", &headers, &vec![b'x'; length]);
        answer.is(status, why);
    }
    anna.request(
        "POST /act",
        "Content-Type: text/plain\r\nContent-Length: 0\r\n",
        b"",
    )
    .is(
        415,
        "text/plain: expected application/x-www-form-urlencoded",
    );
    anna.request("POST /jobs/1", "Content-Length: 0\r\n", b"")
        .is(405, "only GET and HEAD");
    anna.request("PUT /", "", b"").is(405, "only GET and HEAD");
    anna.get("/act").is(405, "only POST");
    anna.get("/nothing").is(404, "there are /");
    anna.get("/?state=done")
        .is(400, "state=done: expected one of");
    anna.send(&[("do", "cancel"), ("id", "<1>")])
        .is(400, "id=&lt;1&gt;: expected a job");
}

/// With a right password before them, some bytes of a form are others, or are missing from some place
/// on.
#[test]
fn garbage_in_forms_disturbs_nothing() {
    let deployment = Deployment::new();
    let service = deployment.start_with(&ACCOUNTS);
    let anna = Operator::at(&service, ANNA);
    let body = format!(
        "do=cancel-all&list=text%3Da&shown=x&at=3&id=%zz&queue=x&token={}",
        anna.token()
    );
    let headers = format!(
        "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\
         Origin: http://{}\r\nX-Forwarded-For: ::1\r\nCookie: omotes_pass=1.x\r\n",
        body.len(),
        anna.address
    );
    let whole = anna.bytes("POST /act", &headers, body.as_bytes());
    let credentials = b"Authorization: ";
    let place = whole
        .windows(credentials.len())
        .position(|part| part == credentials);
    let fixed = place.unwrap() + 60;
    let rest = whole.len() - fixed;
    let changes = prop::collection::vec((any::<Index>(), any::<u8>()), 0..6);
    TestRunner::default()
        .run(
            &(changes, any::<Index>(), any::<bool>()),
            |(changes, length, is_cut)| {
                let mut bytes = whole.clone();
                for (place, byte) in changes {
                    bytes[fixed + place.index(rest)] = byte;
                }
                if is_cut {
                    bytes.truncate(fixed + length.index(rest));
                }
                let mut stream = TcpStream::connect(anna.address).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.write_all(&bytes).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                // It may have hung up in the middle of it, but it says something or hangs up.
                if let Err(error) = stream.read_to_end(&mut Vec::new()) {
                    prop_assert!(error.kind() != ErrorKind::WouldBlock, "no answer: {error}");
                }
                Ok(())
            },
        )
        .unwrap();
    assert!(service.readiness().unwrap().0);
    assert!(!service.log().contains("panic"));
    anna.send(&[("do", "cancel-all")])
        .is(409, "There is none that has not ended.");
}

#[test]
fn a_slow_body_holds_up_nobody() {
    let (scene, service, jobs) = held_jobs(1);
    let anna = Operator::at(&service, ANNA);
    let job = jobs[0].to_string();
    let token = anna.token();
    let body = format!("do=hold&id={job}&token={token}");
    let headers = format!(
        "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n",
        body.len()
    );
    let (first, last) = body.split_at(20);
    let begun = |_| {
        let mut stream = TcpStream::connect(anna.address).unwrap();
        let part = anna.bytes("POST /act", &headers, first.as_bytes());
        stream.write_all(&part).unwrap();
        stream
    };
    let mut slow: Vec<_> = (0..50).map(begun).collect();
    assert!(service.readiness().unwrap().0);
    let one = slow.pop().unwrap();
    let answer = exchange(one, last.as_bytes());
    anna.done(&answer, "is held until it is released");
    scene.deployment.comes_to(1, &turns("on_hold"));
    // The others are disconnected, without an answer.
    for mut stream in slow {
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        assert!(answer.is_empty(), "{read:?}: {answer:?}");
    }
}

/// A connection from this address of this machine.
fn from(source: [u8; 4], to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((source, 0)).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.into()
}

#[test]
fn wrong_passwords_are_slow_and_hold_up_nobody() {
    let deployment = Deployment::new();
    let service = deployment.start_with(&ACCOUNTS);
    let anna = Operator::at(&service, ANNA);
    let guess = Operator {
        account: "anna:guess",
        ..anna
    };
    let request = guess.bytes("GET /", "", b"");
    let page = anna.get("/");
    let cookie = page.header("Set-Cookie").unwrap();
    assert!(cookie.ends_with("; HttpOnly; SameSite=Strict"), "{cookie}");
    let (pass, _) = cookie.split_once(';').unwrap();
    let begin = Instant::now();
    let mut guesses: Vec<_> = (0..5)
        .map(|_| {
            let mut stream = from([127, 0, 0, 1], anna.address);
            stream.write_all(&request).unwrap();
            stream
        })
        .collect();
    service.logged("127.0.0.1 has given several wrong passwords over HTTP, for anna");
    // What follows is not looked at, even if it were right.
    let right = anna.bytes("GET /", "", b"");
    // But for those with another account, as scripts have,
    let reader = Operator {
        account: BEN,
        ..anna
    };
    reader.request("GET /", "", b"").is(200, "OMOTES jobs");
    // and for a browser that has had the right password, and for its account alone.
    let pass = format!("Cookie: other=1; {pass}\r\n");
    anna.request("GET /", &pass, b"").is(200, "OMOTES jobs");
    let ben = Operator {
        account: "ben:guess",
        ..anna
    };
    let begun = |one: &Operator| {
        let mut stream = from([127, 0, 0, 1], anna.address);
        stream.write_all(&one.bytes("GET /", &pass, b"")).unwrap();
        stream
    };
    let of_ben: Vec<_> = (0..5).map(|_| begun(&ben)).collect();
    service.logged("has given several wrong passwords over HTTP, for ben");
    ben.request("GET /", &pass, b"")
        .is(429, "Too many wrong passwords");
    drop(of_ben);
    let answer = exchange(from([127, 0, 0, 1], anna.address), &right);
    let answer = answer.is(
        429,
        "Too many wrong passwords for this account from this address.",
    );
    assert_eq!(answer.header("Retry-After"), Some("2"));
    exchange(from([127, 0, 0, 2], anna.address), &right).is(200, "OMOTES jobs");
    assert!(service.readiness().unwrap().0);
    assert!(begin.elapsed() < Duration::from_secs(2));
    let answer = exchange(guesses.remove(0), b"");
    answer.is(401, "A user and a password are needed.");
    assert!(begin.elapsed() >= Duration::from_secs(2));
    eventually("anna may look again", || {
        (anna.get("/").status == 200).then_some(())
    });
}

#[test]
fn what_is_written_in_a_reference_stays_there() {
    let scene = Scene::new(&json!({"paused": true}));
    let service = start(&scene);
    let hostile = "\"><form action=//evil><button>\u{202e}x</button><input name=token value='";
    let job = scene.submit_as(hostile);
    scene.held(1);
    let anna = Operator::at(&service, ANNA);
    for path in [
        "/".to_owned(),
        format!("/jobs/{job}"),
        format!("/confirm?do=cancel&id={job}"),
        "/confirm?do=cancel-all&list=text%3Devil".to_owned(),
    ] {
        let page = anna.get(&path).is(200, "&lt;form action=//evil&gt;");
        assert!(!page.body.contains("<form action=//evil"), "{path}");
        assert!(!page.body.contains('\u{202e}'), "{path}");
        assert_eq!(page.body.matches("aria-label=\"\"").count(), 0, "{path}");
    }
    // Nor does what is asked for.
    anna.get("/?text=%22%3E%3Cform%3E")
        .is(200, "&quot;&gt;&lt;form&gt;");
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
    browser.run("document.querySelector('footer').textContent = 'old'");
    browser.shows(", version ");
    let kept = "const all = document.querySelector('details'); \
                return [all.open, all.querySelector('input[name=window]').value]";
    assert_eq!(browser.run(kept), json!([true, "7"]));
    // What is chosen stays chosen, though the options before it become others.
    let chosen = browser.run(
        "const all = document.querySelector('details select'); \
         all.options[0].remove(); all.value = [...all.options].pop().value; \
         all.dispatchEvent(new Event('input', {bubbles: true})); return all.value",
    );
    browser.run("document.querySelector('footer').textContent = 'old'");
    browser.shows(", version ");
    let still = browser.run("return document.querySelector('details select').value");
    assert_eq!(still, chosen);
    browser.run("document.querySelector('a.button[href*=\"do=cancel&\"]').click()");
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
