//! `doctor`: what is wrong with a deployment, and what to do about it.

use std::fmt::Write;
use std::process::ExitCode;

use clap::Args;
use console::Style;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::config::environment::Environment;
use omotes_orchestrator::doctor::{Severity, examine};

use super::print;

#[derive(Args)]
pub(crate) struct Doctor {
    /// As JSON.
    #[arg(long)]
    json: bool,
    /// A command that runs RabbitMQ's rabbitmqctl, for what AMQP does not tell.
    #[arg(long, value_name = "COMMAND")]
    rabbitmqctl: Option<String>,
}

/// # Errors
/// Standard output is gone.
pub(crate) fn run(
    config: &Config,
    environment: &Environment,
    doctor: &Doctor,
) -> anyhow::Result<ExitCode> {
    let near_misses = environment.near_misses();
    let findings = examine(config, &near_misses, doctor.rabbitmqctl.as_deref());
    if doctor.json {
        print(&(serde_json::to_string_pretty(&findings)? + "\n"))?;
    } else {
        let mut text = String::new();
        for finding in &findings {
            let style = match finding.severity {
                Severity::Ok => Style::new().green(),
                Severity::Note => Style::new().cyan(),
                Severity::Warning => Style::new().yellow(),
                Severity::Error => Style::new().red(),
            };
            let severity = style.apply_to(format!("{:<8}", finding.severity.name()));
            let _ = writeln!(text, "{severity}{:<16}{}", finding.part, finding.found);
            if !finding.remedy.is_empty() {
                let _ = writeln!(text, "{:24}{}", "", finding.remedy);
            }
        }
        print(&text)?;
    }
    let worst = findings.iter().map(|finding| finding.severity).max();
    Ok(match worst {
        None | Some(Severity::Ok | Severity::Note) => ExitCode::SUCCESS,
        Some(Severity::Warning | Severity::Error) => ExitCode::FAILURE,
    })
}
