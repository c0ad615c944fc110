//! `doctor`: what is wrong with a deployment, and what to do about it.

use std::fmt::Write;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use console::Style;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::config::environment::Environment;
use omotes_orchestrator::doctor::{Severity, Switch, examine};

use super::{print, told_after_a_while};

#[derive(Args)]
pub(crate) struct Doctor {
    /// As JSON.
    #[arg(long)]
    json: bool,
    /// A command that runs RabbitMQ's rabbitmqctl, for what AMQP does not tell.
    #[arg(long, value_name = "COMMAND")]
    rabbitmqctl: Option<String>,
    /// Also what is to be known before the Python service is replaced by this one (`here`), or this one
    /// by it (`back`); both where none is named.
    #[arg(
        long,
        value_enum,
        value_name = "DIRECTION",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "back"
    )]
    before_switch: Option<Direction>,
}

/// All that matters on the way here matters on the way back.
#[derive(Clone, Copy, ValueEnum)]
enum Direction {
    Here,
    Back,
}

/// # Errors
/// Standard output is gone.
pub(crate) fn run(
    config: &Config,
    environment: &Environment,
    doctor: &Doctor,
) -> anyhow::Result<ExitCode> {
    let near_misses = environment.near_misses();
    let switch = doctor
        .before_switch
        .map(|direction| switch(direction, environment));
    const NEWS: &str = "still looking: not all that is asked answers at once";
    let findings = told_after_a_while(NEWS, || {
        examine(
            config,
            &near_misses,
            doctor.rabbitmqctl.as_deref(),
            switch.as_ref(),
        )
    });
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

fn switch(direction: Direction, environment: &Environment) -> Switch {
    let settings = Config::settings(&|name| environment.variable(name));
    let given = settings.into_iter().filter(|setting| setting.is_given);
    Switch {
        may_be_back: matches!(direction, Direction::Back),
        variables: given.map(|setting| setting.name).collect(),
    }
}
