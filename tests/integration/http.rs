//! The HTTP endpoint towards those who are no HTTP clients.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use omotes_orchestrator::wire::job_status_update::JobStatus;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::TestRunner;

use crate::harness::deployment::{Deployment, PATIENCE, eventually};
use crate::harness::peers::Client;

const REQUEST: &[u8] = b"GET /health/ready?x=%41 HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\
    Content-Length: 5\r\nExpect: 100-continue\r\nConnection: keep-alive\r\n\r\nhello";
const CONNECTIONS: usize = 200;

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A request of which some bytes are others, or are missing from some place on.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let changes = prop::collection::vec((any::<Index>(), any::<u8>()), 0..8);
    let near = (changes, any::<Index>()).prop_map(|(changes, length)| {
        let mut bytes = REQUEST.to_vec();
        for (place, byte) in changes {
            bytes[place.index(REQUEST.len())] = byte;
        }
        bytes.truncate(length.index(REQUEST.len() + 1));
        bytes
    });
    prop_oneof![near, prop::collection::vec(any::<u8>(), 0..2000)]
}

#[test]
fn garbage_slow_clients_and_many_connections_disturb_nothing() {
    let deployment = Deployment::new();
    let mut service = deployment.start();
    let address = service.http();
    // They have begun to ask, and hold on.
    let slow: Vec<_> = (0..CONNECTIONS)
        .map(|number| {
            let mut stream = connect(address);
            let part = &REQUEST[..number % REQUEST.len()];
            stream.write_all(part).unwrap();
            stream
        })
        .collect();
    TestRunner::default()
        .run(&request(), |bytes| {
            let mut stream = connect(address);
            let answered = stream
                .write_all(&bytes)
                .and_then(|()| stream.shutdown(Shutdown::Write))
                .and_then(|()| stream.read_to_end(&mut Vec::new()));
            // It may have hung up in the middle of it, but it says something or hangs up.
            if let Err(error) = answered {
                prop_assert!(error.kind() != ErrorKind::WouldBlock, "no answer: {error}");
            }
            Ok(())
        })
        .unwrap();
    assert!(service.readiness().unwrap().0);
    // As many at once want what the database has.
    let mut asking: Vec<_> = ["/", "/metrics", "/api/jobs?finished=true"]
        .iter()
        .cycle()
        .take(CONNECTIONS)
        .map(|path| {
            let mut stream = connect(address);
            write!(stream, "GET {path} HTTP/1.1\r\n\r\n").unwrap();
            stream
        })
        .collect();
    let client = Client::new(&deployment);
    let job = client.submit("workflow_1");
    assert_eq!(client.status(job), JobStatus::Enqueued);
    for stream in &mut asking {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let status = answer.split(' ').nth(1).unwrap_or_default();
        // The last ones may have been too many.
        assert!(["200", "503"].contains(&status), "{answer}");
    }
    drop(slow);
    assert!(service.readiness().unwrap().0);
    service.signal("-TERM");
    assert!(service.wait().success());
    assert!(!service.log().contains("panic"));
}

/// Searches go through all of the history, and whoever only wants numbers does not wait for them.
#[test]
fn metrics_and_pages_do_not_wait_for_searches() {
    const SEARCHES: usize = 8;
    let deployment = Deployment::new();
    let service = deployment.start();
    deployment
        .sql()
        .batch_execute(
            "INSERT INTO job_history (job_id, job_reference, finished_at, starts, outcome, result_bytes)
             SELECT gen_random_uuid(), repeat('reference ', 10), now(), 0, 'FAILED', 0
             FROM generate_series(1, 300000)",
        )
        .unwrap();
    let address = service.http();
    let ask = |path: &str| {
        let mut stream = connect(address);
        write!(stream, "GET {path} HTTP/1.1\r\n\r\n").unwrap();
        stream
    };
    let searches: Vec<_> = (0..SEARCHES)
        .map(|_| ask("/api/jobs?finished=true&text=nowhere"))
        .collect();
    let others = ["/metrics", "/api/jobs", "/health/ready"].map(ask);
    for mut stream in others {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
    let answered = |stream: &TcpStream| {
        stream.set_nonblocking(true).unwrap();
        stream.peek(&mut [0]).is_ok()
    };
    let left = searches.iter().filter(|stream| !answered(stream)).count();
    assert!(left > 0, "all searches were answered before");
    eventually("a search is answered", || {
        answered(&searches[0]).then_some(())
    });
}

#[test]
fn a_search_that_takes_too_long_says_so() {
    let deployment = Deployment::new();
    let service = deployment.start();
    // Only what is looked for goes to this row's text, which takes a minute to read.
    deployment
        .sql()
        .batch_execute(
            "CREATE FUNCTION slow() RETURNS varchar LANGUAGE sql VOLATILE
                 AS 'SELECT pg_sleep(60)::text::varchar';
             ALTER TABLE job_history RENAME TO kept;
             CREATE VIEW job_history AS SELECT job_id, workflow_type, celery_id, registered_at,
                 submitted_at, running_at, finished_at, starts, outcome, result_bytes, why,
                 slow() AS job_reference FROM kept;
             INSERT INTO kept (job_id, finished_at, starts, outcome, result_bytes)
             VALUES (gen_random_uuid(), now(), 0, 'FAILED', 0)",
        )
        .unwrap();
    let (status, answer) = service.get("/api/jobs?finished=true&text=nowhere").unwrap();
    assert_eq!(status, 503, "{answer}");
    assert!(answer.contains("Ask for less"), "{answer}");
    let (status, answer) = service.get("/?finished=true&text=nowhere").unwrap();
    assert_eq!(status, 503, "{answer}");
    assert!(answer.contains("Ask for less"), "{answer}");
}
