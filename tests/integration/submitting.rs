//! Jobs that are submitted through the page.

use crate::acting::{ACCOUNTS, ANNA, BEN};
use crate::harness::browser::Browser;
use crate::harness::deployment::{Deployment, Service, eventually};
use crate::harness::operator::{Answer, Operator};
use crate::harness::peers::{Client, Task, Worker};
use crate::harness::planted::workflows;

const ESDL: &str = "<?xml version='1.0'?><esdl:EnergySystem id='e'/>";

struct Scene {
    service: Service,
    worker: Worker,
    deployment: Deployment,
}

fn scene() -> Scene {
    let deployment = Deployment::new();
    let _client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "simulator");
    let file = workflows(&deployment);
    let own = [("WORKFLOW_CONFIG_PATH", file.to_str().unwrap())];
    let service = deployment.start_with(&[&own[..], &ACCOUNTS].concat());
    Scene {
        service,
        worker,
        deployment,
    }
}

/// A form with these fields and an ESDL.
fn send(operator: &Operator, fields: &[(&str, &str)], esdl: &str, headers: &str) -> Answer {
    let mut body = String::new();
    for (name, value) in fields {
        body +=
            &format!("--xyz\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n");
    }
    body += &format!(
        "--xyz\r\nContent-Disposition: form-data; name=\"esdl\"; filename=\"a.esdl\"\r\n\
         Content-Type: application/octet-stream\r\n\r\n{esdl}\r\n--xyz--\r\n"
    );
    let headers = format!(
        "Content-Type: multipart/form-data; boundary=xyz\r\nContent-Length: {}\r\n{headers}",
        body.len()
    );
    operator.request("POST /submit", &headers, body.as_bytes())
}

#[test]
fn a_job_is_submitted_as_its_workflow_is_defined() {
    let scene = scene();
    let Scene {
        service, worker, ..
    } = &scene;
    let anna = Operator::at(service, ANNA);
    anna.get("/submit").is(200, "Choose one");
    let page = anna.get("/submit?workflow=simulator");
    for text in [
        "min=\"60\" max=\"86400\" value=\"3600\"",
        "less than end_time",
        "Pipe classes at most",
        "A whole number from 1 to 20.",
        "<option value=\"gurobi\">Gurobi</option>",
        "type=\"datetime-local\"",
    ] {
        assert!(page.body.contains(text), "{text}: {}", page.body);
    }
    let token = page.field("token").unwrap();
    let fields = [
        ("token", token),
        ("workflow", "simulator"),
        ("reference", "mine <b>"),
        ("priority", "high"),
        ("timeout", "10m"),
        ("param.timestep", "900"),
        ("param.start_time", "2026-01-01T00:00"),
        ("param.end_time", "2026-02-01T00:00:00"),
        ("param.solver", "gurobi"),
        ("param.pipes", ""),
        ("param.losses", "false"),
    ];
    let sent = send(&anna, &fields, ESDL, "");
    assert_eq!(sent.status, 303, "{sent:?}");
    let location = sent.header("Location").unwrap().to_owned();
    let message = worker.take_message();
    let task = Task::of(&message);
    assert!(location.starts_with(&format!("/jobs/{}?note=", task.job)));
    let page = eventually("the job's page", || {
        Some(anna.get(&location)).filter(|page| page.status == 200)
    });
    let page = page.is(200, &format!("job {} is submitted to simulator", task.job));
    assert!(page.body.contains("mine &lt;b&gt;"), "{page:?}");
    assert!(page.body.contains("high priority"), "{page:?}");
    let line = service.logged(&format!("submit a job to simulator: job {}", task.job));
    assert!(line.contains("anna at 127.0.0.1:"), "{line}");
    let task = message.json().to_string();
    for text in ["EnergySystem", "900", "1767225600", "1769904000", "gurobi"] {
        assert!(task.contains(text), "{text}: {task}");
    }
    // What does not fit is said, all of it, and what was filled in is still there.
    let wrong = [
        ("token", token),
        ("workflow", "simulator"),
        ("reference", "mine <b>"),
        ("param.timestep", "59"),
        ("param.start_time", "2026-03-01T00:00"),
        ("param.end_time", "2026-02-01T00:00"),
        ("param.pipes", "21"),
    ];
    let page = send(&anna, &wrong, "no XML", "").is(400, "Nothing was submitted.");
    for text in [
        "timestep is 59.0, expected a number of seconds from 60 to 86400",
        "start_time is 1772323200.0, expected less than end_time",
        "pipes is 21.0, expected a whole number from 1 to 20",
        "the file is no ESDL",
        "value=\"mine &lt;b&gt;\"",
        "value=\"21\"",
    ] {
        assert!(page.body.contains(text), "{text}: {}", page.body);
    }
}

#[test]
fn what_is_submitted_comes_from_the_form_alone() {
    let scene = scene();
    let Scene {
        service,
        deployment,
        ..
    } = &scene;
    let anna = Operator::at(service, ANNA);
    let token = anna.token();
    let fields = |token| [("token", token), ("workflow", "optimiser")];
    for wrong in ["", "x", &token[1..]] {
        send(&anna, &fields(wrong), ESDL, "").is(403, "token");
    }
    for headers in [
        "Origin: http://evil.example\r\n",
        "Sec-Fetch-Site: cross-site\r\n",
    ] {
        send(&anna, &fields(&token), ESDL, headers).is(403, "by another site");
    }
    for (account, status, why) in [
        ("", 401, "A user and a password are needed."),
        ("anna:wrong", 401, "A user and a password are needed."),
        (BEN, 403, "This account may only look."),
    ] {
        let other = Operator { account, ..anna };
        send(&other, &fields(&token), ESDL, "").is(status, why);
    }
    let ben = Operator {
        account: BEN,
        ..anna
    };
    ben.get("/submit").is(403, "This account may only look.");
    let page = ben.get("/");
    assert!(!page.body.contains("/submit"), "{page:?}");
    for (headers, status, why) in [
        (
            "Content-Type: text/plain\r\nContent-Length: 1\r\n",
            415,
            "multipart/form-data",
        ),
        (
            "Content-Type: multipart/form-data\r\nContent-Length: 1\r\n",
            400,
            "boundary is missing",
        ),
        (
            "Content-Type: multipart/form-data; boundary=a\r\nContent-Length: 16777217\r\n",
            413,
            "at most 16777216",
        ),
        (
            "Content-Type: multipart/form-data; boundary=a\r\n",
            411,
            "no Content-Length",
        ),
    ] {
        anna.request("POST /submit", headers, b"x").is(status, why);
    }
    send(&anna, &[("colour", "red")], ESDL, "").is(400, "colour is not known here");
    let unknown = [("token", token.as_str()), ("workflow", "<none>")];
    send(&anna, &unknown, ESDL, "").is(400, "there is no workflow &lt;none&gt;");
    assert_eq!(deployment.count("SELECT count(*) FROM job"), 0);
    assert_eq!(deployment.count("SELECT count(*) FROM job_history"), 0);
    // And this is what would have counted, as large as it may be.
    let large = format!("{ESDL}<!--{}-->", " ".repeat(15 << 20));
    send(&anna, &fields(&token), &large, "").is(303, "is submitted to optimiser");
    deployment.comes_to(1, "SELECT count(*) FROM job");
}

#[test]
fn the_form_works_in_a_browser() {
    let scene = scene();
    let Scene {
        service,
        worker,
        deployment,
    } = &scene;
    let file = deployment.folder.join("model.esdl");
    std::fs::write(&file, ESDL).unwrap();
    let browser = Browser::new(390, 844, false);
    browser.open(&format!("http://{ANNA}@{}/submit", service.http()));
    browser.shows("Choose one");
    browser.run(
        "const all = document.getElementById('workflow'); all.value = 'simulator'; \
         all.dispatchEvent(new Event('change', {bubbles: true})); \
         document.querySelector('.choose button').click()",
    );
    browser.shows("Pipe classes at most");
    browser.choose("input[type=file]", file.to_str().unwrap());
    browser.run(
        "document.querySelector('[name=\"param.end_time\"]').value = '2026-02-01T00:00'; \
         document.querySelector('[name=reference]').value = 'by hand'; \
         document.querySelector('button.primary').click()",
    );
    browser.shows("is submitted to simulator");
    // It is there as soon as it has arrived, without being loaded again.
    browser.shows("by hand");
    let task = worker.take();
    worker.start(&task);
    worker.progress(&task, 0.5);
    browser.shows("50 %");
}

/// A double click, and a form that is sent again because nobody knows what came of it.
#[test]
fn a_form_that_is_sent_twice_submits_one_job() {
    let scene = scene();
    let anna = Operator::at(&scene.service, ANNA);
    let page = anna.get("/submit?workflow=simulator");
    let fields = |reference| {
        [
            ("token", page.field("token").unwrap()),
            ("ticket", page.field("ticket").unwrap()),
            ("workflow", "simulator"),
            ("reference", reference),
            ("param.timestep", "900"),
            ("param.start_time", "2026-01-01T00:00"),
            ("param.end_time", "2026-02-01T00:00"),
            ("param.pipes", "3"),
            ("param.losses", "false"),
        ]
    };
    let job = |reference| {
        let sent = send(&anna, &fields(reference), ESDL, "");
        assert_eq!(sent.status, 303, "{sent:?}");
        let location = sent.header("Location").unwrap();
        location.split('?').next().unwrap().to_owned()
    };
    let first = job("one");
    assert_eq!(job("one"), first);
    // Somebody has gone back and filled in something else.
    let other = job("another");
    assert_ne!(other, first);
    let tasks = [(); 2].map(|()| Task::of(&scene.worker.take_message()).job);
    assert_eq!(tasks.map(|id| format!("/jobs/{id}")), [first, other]);
    let mut forged = fields("one");
    forged[1].1 = "00000000-0000-0000-0000-000000000000.1.x";
    send(&anna, &forged, ESDL, "").is(403, "Nothing was done");
}
