//! Pages that are followed: what their readers are told, and that none of them costs anybody anything.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use omotes_orchestrator::wire::job_status_update::JobStatus;
use serde_json::Value;

use crate::acting::{ACCOUNTS, ANNA, BEN};
use crate::harness::deployment::{Deployment, PATIENCE, Service, eventually};
use crate::harness::operator::{Operator, exchange};
use crate::harness::peers::Client;

/// So many may follow at once.
const PLACES: usize = 256;

/// Somebody who follows a page.
struct Reader {
    stream: TcpStream,
    /// What has been heard, in which what is new of a page has been made the whole of it.
    text: String,
    /// What has arrived and is no whole event yet.
    arriving: String,
    /// The page as it was told last.
    page: String,
    patches: usize,
}

impl Reader {
    fn new(nobody: &Operator, path: &str) -> Reader {
        let mut stream = TcpStream::connect(nobody.address).unwrap();
        let request = nobody.bytes(&format!("GET {path}"), "", b"");
        stream.write_all(&request).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Reader {
            stream,
            text: String::new(),
            arriving: String::new(),
            page: String::new(),
            patches: 0,
        }
    }

    /// Reads until this is told, and forgets what was before it.
    #[track_caller]
    fn hears(&mut self, what: &str) {
        let mut chunk = [0; 65536];
        loop {
            if let Some(place) = self.text.find(what) {
                self.text.drain(..place + what.len());
                return;
            }
            let length = self.stream.read(&mut chunk).unwrap();
            assert!(length > 0, "{what:?} is not in {}", self.text);
            self.arriving += std::str::from_utf8(&chunk[..length]).unwrap();
            while let Some(end) = self.arriving.find("\n\n") {
                let event: String = self.arriving.drain(..end + 2).collect();
                self.take(&event);
            }
        }
    }

    /// As `script.js` does.
    fn take(&mut self, event: &str) {
        let data: Vec<_> = event
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .collect();
        let data = data.join("\n");
        if event.starts_with("event: patch\n") {
            self.patches += 1;
            let patch: Value = serde_json::from_str(&data).unwrap();
            let old: Vec<_> = self.page.split('<').collect();
            let number = |value: &Value| usize::try_from(value.as_u64().unwrap()).unwrap();
            let parts = patch[1].as_array().unwrap().iter().map(|part| match part {
                Value::String(text) => text.clone(),
                range => old[number(&range[0])..][..number(&range[1])].join("<"),
            });
            self.page = parts.collect::<Vec<_>>().join("<");
            self.text += &self.page;
            return;
        }
        if event.starts_with("event: page\n") {
            self.page = data;
        }
        self.text += event;
    }

    /// Whether it was let in.
    fn is_let_in(&mut self) -> bool {
        let mut head = [0; 12];
        self.stream.read_exact(&mut head).unwrap();
        &head == b"HTTP/1.1 200"
    }

    /// Reads to the end.
    fn ends(mut self) {
        let read = self.stream.read_to_end(&mut Vec::new());
        let reset = |error: &std::io::Error| error.kind() == ErrorKind::ConnectionReset;
        assert!(read.as_ref().err().is_none_or(reset), "{read:?}");
    }
}

fn submit(client: &Client, reference: &str) {
    let (job, mut submission) = client.submission("workflow_1");
    submission.job_reference = Some(reference.to_owned());
    client.listen(job);
    client.send(&submission);
    assert_eq!(client.status(job), JobStatus::Enqueued);
}

fn is_ready(service: &Service) {
    let begin = Instant::now();
    assert!(service.readiness().unwrap().0);
    assert!(begin.elapsed() < Duration::from_secs(2));
}

#[test]
fn all_who_follow_a_page_are_told_what_changes() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let client = Client::new(&deployment);
    let nobody = Operator::at(&service, "");
    let mut readers = [
        "/events",
        "/events",
        "/events?state=SUBMITTED",
        "/events?state=RUNNING",
    ]
    .map(|path| Reader::new(&nobody, path));
    for reader in &mut readers {
        reader.hears("Content-Type: text/event-stream");
        reader.hears("event: beat\ndata: 20");
        reader.hears("event: page\nid: ");
        reader.hears("No such jobs.");
    }
    submit(&client, "what is new <b>\u{202e}");
    let [first, second, waiting, mut running] = readers;
    for mut reader in [first, second, waiting] {
        reader.hears("what is new &lt;b&gt;\\u{202e}");
    }
    // It is told of what is on its page alone: of the count above the list, and of no row.
    running.hears("</b> waiting");
    running.hears("None matches the filter.");
    assert!(!running.text.contains("what is new"));
    assert!(running.patches > 0, "all of it was told again");
    // A job's own page, before there is one.
    let (job, submission) = client.submission("workflow_1");
    let mut reader = Reader::new(&nobody, &format!("/events/jobs/{job}"));
    reader.hears("is unknown");
    client.listen(job);
    client.send(&submission);
    reader.hears("Submitted</b>");
}

#[test]
fn slow_readers_hold_up_nobody_and_are_few() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let client = Client::new(&deployment);
    let nobody = Operator::at(&service, "");
    let mut lively = Reader::new(&nobody, "/events");
    lively.hears("event: page\n");
    let before = service.peak_memory();
    // They never read, and have pages of their own in part.
    let slow: Vec<_> = (1..PLACES)
        .map(|number| Reader::new(&nobody, &format!("/events?limit={}", 1 + number % 5)))
        .collect();
    let full = eventually("no place is left", || {
        let mut one = Reader::new(&nobody, "/events");
        (!one.is_let_in()).then_some(one)
    });
    drop(full);
    nobody
        .request("GET /events", "", b"")
        .is(503, "Too many pages are followed already");
    for number in 0..5 {
        submit(&client, &format!("{number}{}", "x".repeat(1_000_000)));
        lively.hears(&format!("{number}xxxxx"));
        is_ready(&service);
    }
    nobody.get("/").is(200, "4xxxxx");
    // What is told is shared, and a reference as long as this is shown in part.
    let grown = service.peak_memory().saturating_sub(before);
    assert!(grown < 200 << 20, "{grown} bytes more");
    let page = nobody.get("/");
    assert!(page.body.len() < 100_000, "{}", page.body.len());
    drop(slow);
    eventually("there is a place again", || {
        Reader::new(&nobody, "/events").is_let_in().then_some(())
    });
}

#[test]
fn a_stop_does_not_wait_for_readers() {
    let deployment = Deployment::new();
    let mut service = deployment.start();
    let nobody = Operator::at(&service, "");
    let readers: Vec<_> = (0..50)
        .map(|_| {
            let mut reader = Reader::new(&nobody, "/events");
            reader.hears("event: page\n");
            reader
        })
        .collect();
    let begin = Instant::now();
    service.signal("-TERM");
    assert!(service.wait().success());
    assert!(begin.elapsed() < Duration::from_secs(5));
    for reader in readers {
        reader.ends();
    }
}

#[test]
fn pages_are_followed_by_those_who_may_see_them() {
    let deployment = Deployment::new();
    let service = deployment.start_with(&ACCOUNTS);
    let anna = Operator::at(&service, ANNA);
    let account = |account| Operator { account, ..anna };
    for other in ["", "anna:wrong"] {
        let request = account(other).bytes("GET /events", "", b"");
        let stream = TcpStream::connect(anna.address).unwrap();
        exchange(stream, &request).is(401, "A user and a password are needed.");
    }
    for headers in [
        "Sec-Fetch-Site: cross-site\r\n",
        "Origin: http://evil.example\r\n",
    ] {
        anna.request("GET /events", headers, b"")
            .is(403, "by another site");
    }
    anna.get("/events?text=a").is(400, "is not followed");
    anna.get("/events?limit=201").is(400, "is not followed");
    anna.get("/events?colour=red")
        .is(400, "colour is not known");
    anna.get("/events/jobs/1").is(404, "1 is no job id");
    anna.get("/events/").is(404, "there are /");
    anna.request("POST /events", "Content-Length: 0\r\n", b"")
        .is(405, "only GET and HEAD");
    let head = anna.request("HEAD /events", "", b"");
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    // The forms are for those who may act.
    let mut anna = Reader::new(&anna, "/events");
    anna.hears("action=\"/act\"");
    let mut ben = Reader::new(&account(BEN), "/events");
    ben.hears("event: page\n");
    ben.hears("</section>");
    ben.hears("\n\n");
    assert!(!ben.text.contains("/act"), "{}", ben.text);
}

/// Who follows a page is told of an outage, and of its end.
#[test]
fn readers_are_told_of_an_outage() {
    use crate::harness::proxy::{End, Proxy, Weather};
    let deployment = Deployment::new();
    let proxy = Proxy::new(deployment.postgres_door()).unwrap();
    let port = proxy.port().to_string();
    let service = deployment.start_with(&[("POSTGRESQL_PORT", &port)]);
    let mut reader = Reader::new(&Operator::at(&service, ""), "/events");
    reader.hears("No such jobs.");
    proxy.set(Weather::Refuse);
    proxy.cut(End::Rst);
    reader.hears("No jobs can be shown.");
    proxy.set(Weather::Fair);
    reader.hears("No such jobs.");
}
