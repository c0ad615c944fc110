//! `alerts`: telling a webhook of troubles.

use std::process::ExitCode;

use anyhow::Context;
use clap::Subcommand;
use jiff::Timestamp;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::alerts::Message;
use omotes_orchestrator::telemetry::report::one_line;
use omotes_orchestrator::threads::Signal;
use omotes_orchestrator::webhook;

use super::{say, told_of};

#[derive(Subcommand)]
pub(crate) enum Action {
    /// Send a message that says that it is a test to ALERT_WEBHOOK_URL. Exits with 1 if it is not taken.
    Test,
}

/// # Errors
/// No receiver is configured, or it does not take the message.
pub(crate) fn run(config: &Config, action: &Action) -> anyhow::Result<ExitCode> {
    let Action::Test = action;
    let alerts = config.alerts.as_ref();
    let alerts = alerts.context("ALERT_WEBHOOK_URL is not set: nobody is told of troubles")?;
    let host = one_line(&webhook::host(alerts));
    let now = Timestamp::now();
    let here = gethostname::gethostname();
    let message = Message::test(now).json(&here.to_string_lossy(), now);
    // Whoever runs the command may interrupt it.
    let (_running, never) = Signal::pending();
    told_of(&host, || webhook::send(alerts, &message, &never))?;
    say(format_args!("{host} has taken a message"))?;
    Ok(ExitCode::SUCCESS)
}
