//! The HTTP endpoint towards those who are no HTTP clients.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use omotes_orchestrator::wire::job_status_update::JobStatus;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::TestRunner;

use crate::deployment::{Deployment, PATIENCE};
use crate::peers::Client;

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
    let service = deployment.start();
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
    assert!(!service.log().contains("panic"));
    assert!(service.stop().success());
}
