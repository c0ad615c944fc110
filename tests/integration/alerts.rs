//! Troubles are told to a webhook: each once, and its end, whatever the receiver is like.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rstest::rstest;
use serde_json::Value;

use crate::harness::deployment::{Deployment, Server, Service, eventually};
use crate::harness::peers::Client;

/// What a receiver does with a message.
#[derive(Clone, Copy)]
enum Manner {
    Takes,
    /// With a body of a megabyte, and more to come.
    Babbles,
    Hangs,
    Closes,
    Fails,
    /// The first two times.
    FailsAtFirst,
    Redirects,
}

/// A receiver on a port of its own, in a thread that ends with the test.
struct Receiver {
    port: u16,
    heard: Arc<Mutex<Vec<Value>>>,
    asked: Arc<AtomicUsize>,
}

impl Receiver {
    fn new(manner: Manner) -> Receiver {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let receiver = Receiver {
            port: listener.local_addr().unwrap().port(),
            heard: Arc::default(),
            asked: Arc::default(),
        };
        let (heard, asked) = (Arc::clone(&receiver.heard), Arc::clone(&receiver.asked));
        thread::spawn(move || {
            let mut open = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let count = asked.fetch_add(1, Ordering::SeqCst);
                let Some(message) = read(&stream) else {
                    continue;
                };
                if answer(manner, count, &mut stream) {
                    heard.lock().unwrap().push(message);
                }
                if let Manner::Hangs = manner {
                    open.push(stream);
                }
            }
        });
        receiver
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}/hooks/s3cret?token=s3cret", self.port)
    }

    /// `begin WorkerSilent x`, of all that it has taken.
    fn heard(&self) -> Vec<String> {
        let heard = self.heard.lock().unwrap();
        let text = |message: &Value, name: &str| message[name].as_str().unwrap().to_owned();
        let line = |message| {
            let words = ["event", "alert", "subject"].map(|name| text(message, name));
            words.join(" ").trim_end().to_owned()
        };
        heard.iter().map(line).collect()
    }

    /// The same, but for what a replica says of itself: it may take its time to start.
    fn heard_of_all(&self) -> Vec<String> {
        let mut heard = self.heard();
        heard.retain(|line| !line.contains("OrchestratorNotReady"));
        heard
    }

    fn hears(&self, line: &str) {
        eventually(line, || {
            self.heard().iter().any(|one| one == line).then_some(())
        });
    }
}

fn read(stream: &TcpStream) -> Option<Value> {
    let mut reader = BufReader::new(stream);
    let (mut line, mut length) = (String::new(), 0);
    loop {
        line.clear();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let lower = line.to_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(serde_json::from_slice(&body).unwrap())
}

/// Whether it takes the message.
fn answer(manner: Manner, count: usize, stream: &mut TcpStream) -> bool {
    let (status, is_taken) = match manner {
        Manner::Hangs | Manner::Closes => return false,
        Manner::Fails => ("500 Internal Server Error", false),
        Manner::FailsAtFirst if count < 2 => ("500 Internal Server Error", false),
        Manner::Redirects => ("302 Found\r\nLocation: /elsewhere", false),
        Manner::Babbles | Manner::Takes | Manner::FailsAtFirst => ("200 OK", true),
    };
    let length = match manner {
        Manner::Babbles => 1_u64 << 40,
        _ => 0,
    };
    let mut text = format!("HTTP/1.1 {status}\r\n");
    let _ = write!(
        text,
        "Content-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    // It may not want to hear it all.
    let _ = stream.write_all(text.as_bytes());
    if let Manner::Babbles = manner {
        let _ = stream.write_all(&vec![b'x'; 1 << 20]);
    }
    is_taken
}

fn start(deployment: &Deployment, receiver: &Receiver, more: &[(&str, &str)]) -> Service {
    let url = receiver.url();
    let own = [
        ("ALERT_WEBHOOK_URL", url.as_str()),
        ("ALERT_AFTER_SEC", "2"),
    ];
    deployment.start_with(&[&own, more].concat())
}

#[test]
fn a_trouble_and_its_end_are_told_once_by_one_of_the_replicas() {
    let deployment = Deployment::new();
    let receiver = Receiver::new(Manner::Takes);
    let replicas = [(); 2].map(|()| start(&deployment, &receiver, &[]));
    let client = Client::new(&deployment);
    client.peer.send("job_submissions", b"\xff");
    receiver.hears("begin OrchestratorDeadLetters SDK");
    // Another trouble, which is told after this one by whoever tells: nothing was told twice until then.
    client.submit("workflow_1");
    receiver.hears("begin WorkflowWithoutWorker workflow_1");
    client.peer.delete_queue("omotes_dead_letters");
    client.peer.declare("omotes_dead_letters");
    receiver.hears("end OrchestratorDeadLetters SDK");
    assert_eq!(
        receiver.heard_of_all(),
        [
            "begin OrchestratorDeadLetters SDK",
            "begin WorkflowWithoutWorker workflow_1",
            "end OrchestratorDeadLetters SDK"
        ]
    );
    let letters = |message: &&Value| message["alert"] == "OrchestratorDeadLetters";
    let ids: Vec<_> = {
        let heard = receiver.heard.lock().unwrap();
        let letters = heard.iter().filter(letters);
        letters.map(|one| one["id"].clone()).collect()
    };
    assert_eq!(ids[0], ids[1]);
    // What was told is known to those who come after.
    for replica in replicas {
        assert!(!replica.log().contains("s3cret"), "{}", replica.log());
        assert!(replica.stop().success());
    }
    let next = start(&deployment, &receiver, &[]);
    deployment.sql().batch_execute("UPDATE job SET registered_at = now() - interval '2 hours', submitted_at = now() - interval '2 hours'").unwrap();
    receiver.hears("begin JobsWaitLong");
    assert_eq!(receiver.heard_of_all().len(), 4, "{:?}", receiver.heard());
    drop(next);
}

#[test]
fn that_postgres_is_away_is_told_without_it() {
    let deployment = Deployment::with_own_servers();
    let receiver = Receiver::new(Manner::Takes);
    let replicas = [(); 2].map(|()| start(&deployment, &receiver, &[("ALERT_AFTER_SEC", "20")]));
    // One of them has taken it on to tell.
    deployment.comes_to(
        1,
        "SELECT count(*) FROM maintenance_run WHERE task = 'alerts'",
    );
    deployment.kill_server(Server::Postgres);
    let begins = || {
        let heard = receiver.heard();
        heard
            .iter()
            .filter(|one| one.starts_with("begin OrchestratorNotReady"))
            .count()
    };
    eventually("somebody tells", || (begins() == 1).then_some(()));
    let message = receiver.heard.lock().unwrap().last().unwrap().clone();
    let text = message["text"].as_str().unwrap();
    assert!(text.contains("Postgres does not answer"), "{text}");
    deployment.start_server(Server::Postgres);
    for replica in &replicas {
        replica.wait_until_ready();
    }
    eventually("its end", || {
        let heard = receiver.heard();
        heard
            .iter()
            .any(|one| one.starts_with("end OrchestratorNotReady"))
            .then_some(())
    });
    let last = receiver.heard();
    assert_eq!(begins(), 1, "{last:?}");
}

#[rstest]
#[case::babbles(Manner::Babbles)]
#[case::fails_at_first(Manner::FailsAtFirst)]
fn a_receiver_may_be_odd(#[case] manner: Manner) {
    let deployment = Deployment::new();
    let receiver = Receiver::new(manner);
    let _service = start(&deployment, &receiver, &[]);
    let client = Client::new(&deployment);
    client.peer.send("job_submissions", b"\xff");
    receiver.hears("begin OrchestratorDeadLetters SDK");
}

#[rstest]
#[case::hangs(Manner::Hangs, "no answer within 10s")]
#[case::closes(Manner::Closes, "")]
#[case::fails(Manner::Fails, "127.0.0.1 answers 500")]
#[case::redirects(Manner::Redirects, "127.0.0.1 answers 302")]
fn a_receiver_that_takes_nothing_holds_up_nothing(#[case] manner: Manner, #[case] why: &str) {
    let deployment = Deployment::new();
    let receiver = Receiver::new(manner);
    let service = start(&deployment, &receiver, &[]);
    let client = Client::new(&deployment);
    client.peer.send("job_submissions", b"\xff");
    eventually("it is asked", || {
        (receiver.asked.load(Ordering::SeqCst) > 0).then_some(())
    });
    // A job goes through, and a stop, while it is being asked.
    let worker = crate::harness::peers::Worker::new(&deployment, "workflow_1");
    let job = client.submit("workflow_1");
    worker.succeed(&worker.take(), "<e id='out'/>");
    client.outcome(job);
    if !why.is_empty() {
        service.logged(&format!(
            "which is tried again: 127.0.0.1{}",
            match manner {
                Manner::Hangs => ": ",
                _ => " ",
            }
        ));
        service.logged(why.rsplit("127.0.0.1 ").next().unwrap());
    }
    assert!(!service.log().contains("s3cret"), "{}", service.log());
    let begun = Instant::now();
    assert!(service.stop().success());
    assert!(
        begun.elapsed() < Duration::from_secs(4),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(receiver.heard(), Vec::<String>::new());
}

#[test]
fn the_way_can_be_tried_out() {
    let deployment = Deployment::new();
    let run = |url: &str| {
        let mut command = deployment.command(&["alerts", "test"]);
        let output = command.env("ALERT_WEBHOOK_URL", url).output().unwrap();
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(!said.contains("s3cret"), "{said}");
        (output.status.code(), said)
    };
    let receiver = Receiver::new(Manner::Takes);
    let (code, said) = run(&receiver.url());
    assert_eq!(
        (code, said.as_str()),
        (Some(0), "127.0.0.1 has taken a message\n")
    );
    assert_eq!(receiver.heard(), ["test Test test"]);
    let (code, said) = run(&Receiver::new(Manner::Fails).url());
    assert_eq!(code, Some(1));
    assert!(said.contains("127.0.0.1 answers 500"), "{said}");
    let (code, said) = run("ftp://host/s3cret");
    assert_eq!(code, Some(1));
    assert!(
        said.contains("ALERT_WEBHOOK_URL: expected http://"),
        "{said}"
    );
    let (code, said) = run("");
    assert_eq!(code, Some(1));
    assert!(said.contains("ALERT_WEBHOOK_URL is not set"), "{said}");
    let mut config = deployment.command(&["config"]);
    let shown = config
        .env("ALERT_WEBHOOK_URL", receiver.url())
        .output()
        .unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(
        shown.contains("ALERT_WEBHOOK_URL") && !shown.contains("s3cret"),
        "{shown}"
    );
}

#[test]
fn nothing_is_there_for_it_where_nobody_is_told() {
    let deployment = Deployment::new();
    let service = deployment.start();
    assert!(!service.threads().contains(&"alerts".to_owned()));
}
