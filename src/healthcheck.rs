//! Asks a running service how it is, as `/health/ready` says it, and which limits are in force there.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::Value;

use crate::config::Secret;
use crate::config::limits::Limit;
use crate::domain::text::one_line;
use crate::domain::turns;

/// How long an answer may take, which comes from memory.
const PATIENCE: Duration = Duration::from_secs(5);

/// What came of asking.
#[derive(Debug)]
pub enum Answer {
    /// Nobody listens there.
    Nobody,
    /// Somebody takes the connection, and says nothing.
    Silence(String),
    /// It is no service of this kind that answers, or talks in another way.
    Stranger(String),
    Service(Report),
}

/// What a service says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub is_ready: bool,
    /// None of one that does not tell.
    pub version: Option<String>,
    pub trouble: Option<Trouble>,
    /// All of it, as it came.
    pub text: String,
}

/// What does not work, by its cause.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    pub what: String,
    pub why: String,
    pub remedy: String,
    /// What does not work for another reason, each with why.
    pub others: Vec<String>,
}

/// `There is no session with RabbitMQ: Connection refused`.
impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

/// What is in force at a service, as `/api/limits` has it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct InForce {
    pub version: String,
    pub host: String,
    pub limits: Vec<Limit>,
    /// Those of task queues.
    pub queues: turns::Limits,
}

/// Where a service that listens at `bind` answers on this machine.
pub fn url(bind: SocketAddr) -> String {
    at(bind, "/health/ready")
}

fn at(bind: SocketAddr, path: &str) -> String {
    format!("http://{}{path}", reached(bind))
}

fn reached(bind: SocketAddr) -> SocketAddr {
    let mut address = bind;
    match bind.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        IpAddr::V4(_) | IpAddr::V6(_) => {}
    }
    address
}

/// Asks whoever listens at `bind`.
pub fn ask(bind: SocketAddr) -> Answer {
    // Port 0 is any that is free, and nobody knows which.
    if bind.port() == 0 {
        return Answer::Nobody;
    }
    let read = get(&url(bind), None).map(|(status, text)| (status == 200, text));
    match read {
        // Whether anybody is there its errors do not tell.
        Err(_) if !somebody_listens(bind) => Answer::Nobody,
        Err(ureq::Error::Timeout(_)) => Answer::Silence(format!("no answer within {PATIENCE:?}")),
        Err(error) => Answer::Stranger(one_line(&error.to_string())),
        Ok((is_ready, text)) => match report(is_ready, &text) {
            Some(report) => Answer::Service(report),
            None => Answer::Stranger(one_line(&text)),
        },
    }
}

/// The status and the body of an answer.
fn get(url: &str, account: Option<&Secret>) -> Result<(u16, String), ureq::Error> {
    let mut request = ureq::get(url);
    if let Some(account) = account {
        let account = BASE64_STANDARD.encode(account.reveal());
        request = request.header("Authorization", format!("Basic {account}"));
    }
    let mut response = request
        .config()
        // A proxy of the environment's would be asked for a service on its own machine.
        .proxy(None)
        .timeout_global(Some(PATIENCE))
        .http_status_as_error(false)
        .build()
        .call()?;
    let status = response.status().as_u16();
    Ok((status, response.body_mut().read_to_string()?))
}

/// Asks the service that listens at `bind` which limits are in force there, with an account that may look if it
/// wants one.
///
/// # Errors
/// It does not say; the text has why, and what helps.
pub fn limits(bind: SocketAddr, account: Option<&Secret>) -> anyhow::Result<InForce> {
    const NOBODY: &str =
        "nobody listens there: ask where the service runs, or set HTTP_BIND as it has it";
    let url = at(bind, "/api/limits");
    if bind.port() == 0 {
        bail!("{url}: {NOBODY}");
    }
    let (status, text) = match get(&url, account) {
        Ok(answer) => answer,
        // As above.
        Err(_) if !somebody_listens(bind) => bail!("{url}: {NOBODY}"),
        Err(error) => bail!("{url}: {}", one_line(&error.to_string())),
    };
    match (status, account) {
        (200, _) => {
            let other = || format!("{url}: no orchestrator answers, but: {}", one_line(&text));
            serde_json::from_str(&text).with_context(other)
        }
        (401, None) => bail!(
            "{url}: it wants an account: set HTTP_READONLY_AUTH, or HTTP_BASIC_AUTH, as the service has it"
        ),
        (401, Some(_)) => bail!(
            "{url}: it does not take the account of HTTP_READONLY_AUTH, or without that of HTTP_BASIC_AUTH, as set here"
        ),
        (404, _) => {
            bail!("{url}: it does not say: it is of an earlier version, or no orchestrator")
        }
        (status, _) => bail!("{url}: {status}: {}", said(&text)),
    }
}

/// Why a service has refused, as it says.
fn said(text: &str) -> String {
    let body: Option<Value> = serde_json::from_str(text).ok();
    let error = body.as_ref().and_then(|body| body.get("error")?.as_str());
    one_line(error.unwrap_or(text))
}

fn somebody_listens(bind: SocketAddr) -> bool {
    TcpStream::connect_timeout(&reached(bind), PATIENCE).is_ok()
}

/// Reads what a service says; None of anything else.
fn report(is_ready: bool, text: &str) -> Option<Report> {
    let body: Value = serde_json::from_str(text).ok()?;
    let parts = body.get("parts")?.as_object()?;
    if body.get("ready")?.as_bool()? != is_ready {
        return None;
    }
    let words = |value: &Value, name: &str| Some(one_line(value.get(name)?.as_str()?));
    let why = |part: &str| {
        let why = words(parts.get(part)?, "why")?;
        Some(format!("{part}: {why}"))
    };
    let trouble = body.get("trouble").and_then(|trouble| {
        let others = trouble.get("others").and_then(Value::as_array);
        let others = others.into_iter().flatten().filter_map(Value::as_str);
        Some(Trouble {
            what: words(trouble, "what")?,
            why: words(trouble, "why")?,
            remedy: words(trouble, "remedy")?,
            others: others.filter_map(why).collect(),
        })
    });
    Some(Report {
        is_ready,
        version: words(&body, "version"),
        trouble,
        text: text.trim().to_owned(),
    })
}

/// Asks the service that listens at `bind` whether it is ready.
///
/// # Errors
/// It is not, or does not answer; the first line says why.
pub fn check(bind: SocketAddr) -> anyhow::Result<()> {
    let why = match ask(bind) {
        Answer::Service(report) if report.is_ready => return Ok(()),
        Answer::Service(report) => {
            let why = report.trouble.map(|trouble| format!(": {trouble}"));
            format!("not ready{}\n{}", why.unwrap_or_default(), report.text)
        }
        Answer::Nobody => "nobody listens there".to_owned(),
        Answer::Silence(why) => {
            format!("somebody takes the connection, and does not answer: {why}")
        }
        Answer::Stranger(said) => format!("no orchestrator answers, but: {said}"),
    };
    bail!("{}: {why}", url(bind))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::process::Command;
    use std::{env, thread};

    use rstest::rstest;
    use serde_json::json;

    use super::*;

    /// What comes of asking somebody who answers this.
    fn asked(status: &'static str, body: String) -> anyhow::Result<()> {
        answered(status, body, check)
    }

    fn answered<T>(status: &'static str, body: String, ask: impl FnOnce(SocketAddr) -> T) -> T {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
            let length = body.len();
            write!(
                stream,
                "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
            )
            .unwrap();
        });
        let came = ask(address);
        server.join().unwrap();
        came
    }

    #[test]
    fn what_is_wrong_is_said_first_and_in_words() {
        let body = json!({
            "ready": false,
            "parts": {
                "postgres": {"ok": false, "why": "no room"},
                "handling": {"ok": false, "why": "held up"},
            },
            "trouble": {"what": "Postgres does not answer", "why": "no room", "remedy": "Give it some.",
                        "others": ["handling"]},
        });
        let text = format!("{body:#}");
        let report = report(false, &text).unwrap();
        assert_eq!(report.trouble.unwrap().others, ["handling: held up"]);
        let why = format!("{:#}", asked("503 Not", text).unwrap_err());
        let (first, rest) = why.split_once('\n').unwrap();
        let words = "/health/ready: not ready: Postgres does not answer: no room";
        assert!(first.ends_with(words), "{why}");
        assert!(rest.starts_with('{'), "{why}");
    }

    #[rstest]
    #[case::ready("200 OK", r#"{"ready": true, "parts": {}}"#, None)]
    #[case::somebody_else(
        "200 OK",
        "<html>Welcome to nginx</html>",
        Some("no orchestrator answers, but: <html>")
    )]
    #[case::a_proxy(
        "503 No",
        r#"{"ready": true, "parts": {}}"#,
        Some("no orchestrator answers")
    )]
    fn others_are_not_taken_for_the_service(
        #[case] status: &'static str,
        #[case] body: &str,
        #[case] expected: Option<&str>,
    ) {
        let checked = asked(status, body.to_owned());
        match expected {
            None => checked.unwrap(),
            Some(expected) => {
                let why = format!("{:#}", checked.unwrap_err());
                assert!(why.contains(expected), "{why}");
            }
        }
    }

    #[rstest]
    #[case::an_earlier_version("404 No", r#"{"error": "there are /"}"#, "an earlier version")]
    #[case::an_account("401 No", r#"{"error": "Who are you?"}"#, "set HTTP_READONLY_AUTH")]
    #[case::many_guesses(
        "429 No",
        r#"{"error": "Too many guesses."}"#,
        "429: Too many guesses."
    )]
    #[case::somebody_else("200 OK", "<html>", "no orchestrator answers, but: <html>")]
    #[case::a_proxy("502 Bad", "<html>", "502: <html>")]
    fn why_the_limits_are_not_known_is_said(
        #[case] status: &'static str,
        #[case] body: &str,
        #[case] expected: &str,
    ) {
        let why = answered(status, body.to_owned(), |bind| {
            limits(bind, None).unwrap_err()
        });
        assert!(format!("{why:#}").contains(expected), "{why:#}");
    }

    /// The same in a process that has a proxy set, which nobody is.
    #[test]
    fn a_proxy_is_not_asked() {
        let ran = Command::new(env::current_exe().unwrap())
            .arg("others_are_not_taken_for_the_service")
            .env("HTTP_PROXY", "http://127.0.0.1:9")
            .env_remove("NO_PROXY")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success() && said.contains("3 passed"), "{said}");
    }

    #[rstest]
    #[case::of_all("")]
    #[case::of_the_body("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")]
    fn whoever_says_nothing_is_told_from_nobody(#[case] beginning: &'static str) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let takes = listener.try_clone().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = takes.accept().unwrap();
            stream.write_all(beginning.as_bytes()).unwrap();
            // Until whoever asks gives up.
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let answer = ask(address);
        assert!(matches!(answer, Answer::Silence(_)), "{answer:?}");
        server.join().unwrap();
        drop(listener);
        assert!(matches!(ask(address), Answer::Nobody));
    }

    #[rstest]
    #[case::no_http("SSH-2.0-OpenSSH_9.2\r\n")]
    #[case::an_end("")]
    fn whoever_talks_otherwise_does_not_hang(#[case] said: &'static str) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
            stream.write_all(said.as_bytes()).unwrap();
            drop(stream);
            // To see whether anybody listens.
            listener.accept().unwrap();
        });
        let answer = ask(address);
        assert!(matches!(answer, Answer::Stranger(_)), "{answer:?}");
        server.join().unwrap();
    }
}
