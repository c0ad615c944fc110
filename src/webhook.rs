//! Tells somebody over HTTP, who may be anybody: one that hangs, answers without end, or never.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use crossbeam_channel::{bounded, select};
use serde_json::Value;
use ureq::http::Uri;

use crate::config::Alerts;
use crate::threads::Signal;

/// How long the receiver may take, from its name's resolution on.
const DEADLINE: Duration = Duration::from_secs(10);
/// By how much a resolver may exceed that.
const SLACK: Duration = Duration::from_secs(2);

/// Sends a message; None if `stop` is given before there is an answer. Nobody waits for longer than the
/// deadline, nor does the end of the process.
///
/// # Errors
/// The receiver was not reached, or has not taken the message. The text has nothing of the URL but
/// the host, since whoever has the rest can write there.
pub fn send(alerts: &Alerts, message: &Value, stop: &Signal) -> anyhow::Result<Option<()>> {
    let (answer, answered) = bounded(1);
    let (alerts, message) = (Arc::new(alerts.clone()), message.to_string());
    thread::Builder::new()
        .name("webhook".to_owned())
        .spawn(move || {
            // Whoever asked may have given up.
            let _ = answer.send(post(&alerts, &message));
        })?;
    select! {
        recv(answered) -> outcome => outcome.unwrap_or_else(|_| bail!("the thread has died")).map(Some),
        recv(stop.receiver()) -> _ => Ok(None),
        default(DEADLINE + SLACK) => bail!("no answer within {DEADLINE:?}"),
    }
}

/// Where the messages go, as far as it may be shown.
pub fn host(alerts: &Alerts) -> String {
    let uri = alerts.url.reveal().parse::<Uri>().ok();
    let host = uri.and_then(|uri| uri.host().map(str::to_owned));
    host.unwrap_or_else(|| "the receiver".to_owned())
}

fn post(alerts: &Alerts, message: &str) -> anyhow::Result<()> {
    let host = host(alerts);
    let mut config = ureq::Agent::config_builder()
        .timeout_global(Some(DEADLINE))
        .user_agent(concat!("omotes-orchestrator/", env!("CARGO_PKG_VERSION")))
        // A POST that is redirected is none any more.
        .max_redirects(0)
        .http_status_as_error(false);
    if alerts.url.reveal().starts_with("https:") {
        config = config.tls_config(alerts.roots.for_http().context("TLS")?);
    }
    let agent = config.build().new_agent();
    let response = agent
        .post(alerts.url.reveal())
        .header("Content-Type", "application/json")
        .send(message)
        .map_err(|error| anyhow!("{host}: {}", in_words(&error)))?;
    // What else it says is not read.
    match response.status() {
        status if status.is_success() => Ok(()),
        status => bail!("{host} answers {status}"),
    }
}

/// What went wrong, without the URL, which some of the library's texts have in them.
fn in_words(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(error) => error.to_string(),
        ureq::Error::Timeout(_) => format!("no answer within {DEADLINE:?}"),
        ureq::Error::HostNotFound => "there is no such host".to_owned(),
        ureq::Error::ConnectionFailed => "it cannot be reached".to_owned(),
        ureq::Error::Rustls(error) => error.to_string(),
        ureq::Error::Tls(why) => (*why).to_owned(),
        ureq::Error::Protocol(_) => "it does not speak HTTP".to_owned(),
        _ => "the message could not be sent".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::{env, fs};

    use rstest::rstest;
    use rustls::StreamOwned;
    use serde_json::json;
    use uuid::Uuid;

    use super::*;
    use crate::authority::{Authority, write};
    use crate::config::Secret;
    use crate::tls::Roots;
    use crate::tls::tests::server;

    /// A receiver that speaks TLS takes a message, if it is the one that is meant.
    #[rstest]
    #[case::its_authority("ca.pem", "localhost", "")]
    #[case::a_stranger("other.pem", "localhost", "UnknownIssuer")]
    #[case::another_name("ca.pem", "elsewhere", "not valid for name")]
    fn a_receiver_with_tls_is_checked(
        #[case] roots: &str,
        #[case] name: &str,
        #[case] fault: &str,
    ) {
        let folder = env::temp_dir().join(format!("webhook-{}", Uuid::new_v4()));
        fs::create_dir(&folder).unwrap();
        let authority = Authority::new();
        write(&folder, "ca.pem", &authority.pem());
        write(&folder, "other.pem", &Authority::new().pem());
        let tls = server(&authority.issue(name));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let receiver = thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            let mut stream = StreamOwned::new(tls, socket);
            let (mut heard, mut part) = (Vec::new(), [0; 1024]);
            while !heard.ends_with(b"}") {
                match stream.read(&mut part) {
                    Ok(count) if count > 0 => heard.extend_from_slice(&part[..count]),
                    // It has hung up.
                    Ok(_) | Err(_) => return false,
                }
            }
            let answer = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n";
            stream.write_all(answer).is_ok()
        });
        let alerts = Alerts {
            url: Secret::from(format!("https://localhost:{port}/s3cret")),
            roots: Roots::File(folder.join(roots)),
            after: Duration::ZERO,
            queue_age: Duration::ZERO,
        };
        let (_running, never) = Signal::pending();
        let sent = send(&alerts, &json!({"event": "test"}), &never);
        assert_eq!(receiver.join().unwrap(), fault.is_empty());
        match sent {
            Ok(sent) => assert!(fault.is_empty() && sent.is_some()),
            Err(error) => {
                let text = format!("{error:#}");
                assert!(!fault.is_empty() && text.contains(fault), "{text}");
                assert!(
                    text.starts_with("localhost: ") && !text.contains("s3cret"),
                    "{text}"
                );
            }
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}
