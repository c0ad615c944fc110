//! That nobody acts through the page in others' names, whatever is sent.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use omotes_orchestrator::wire::job_result::ResultType;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::TestRunner;
use serde_json::json;
use socket2::{Domain, Socket, Type};

use crate::acting::{ACCOUNTS, ANNA, BEN, held_jobs, start, turns};
use crate::harness::deployment::{Deployment, PATIENCE, eventually};
use crate::harness::operator::{Operator, exchange};
use crate::turns::Scene;

/// Whatever is sent, nobody is asked to end.
#[test]
fn a_form_of_somebody_else_does_not_count() {
    let (scene, service, jobs) = held_jobs(1);
    let anna = Operator::at(&service, ANNA);
    let job = jobs[0].to_string();
    let token = anna.token();
    // It may end like that by itself.
    let last = if token.ends_with('A') { 'E' } else { 'A' };
    let forged = format!("{}{last}", &token[..token.len() - 1]);
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
