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
