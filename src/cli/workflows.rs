//! `workflows`: the definitions.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use omotes_orchestrator::config::{self, Config};
use omotes_orchestrator::domain::workflow::Catalogue;
use omotes_orchestrator::telemetry::report::harmless;
use omotes_orchestrator::wire::workflow_parameter::ParameterType;

use super::say;

#[derive(Subcommand)]
pub(super) enum Action {
    /// Check a definition file and print what clients would see.
    Check { file: PathBuf },
}

/// # Errors
/// All that is wrong with the definitions.
pub(super) fn run(action: &Action) -> anyhow::Result<ExitCode> {
    match action {
        Action::Check { file } => show(&config::read_catalogue(file)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The workflows that the definitions have, none where those cannot be read.
pub(super) fn defined(config: &Config) -> Vec<String> {
    let catalogue = config::read_catalogue(&config.workflow_config_path).ok();
    catalogue.map_or_else(Vec::new, |catalogue| catalogue.names())
}

fn show(catalogue: &Catalogue) -> anyhow::Result<()> {
    for workflow in &catalogue.announcement().workflows {
        let (name, description) = (&workflow.type_name, &workflow.type_description);
        say(format_args!(
            "{}: {}",
            harmless(name),
            harmless(description)
        ))?;
        for parameter in &workflow.parameters {
            let kind = match &parameter.parameter_type {
                Some(ParameterType::StringParameter(one)) => format!("string {one:?}"),
                Some(ParameterType::BooleanParameter(one)) => format!("boolean {one:?}"),
                Some(ParameterType::IntegerParameter(one)) => format!("integer {one:?}"),
                Some(ParameterType::FloatParameter(one)) => format!("float {one:?}"),
                Some(ParameterType::DatetimeParameter(one)) => format!("datetime {one:?}"),
                Some(ParameterType::DurationParameter(one)) => format!("duration {one:?}"),
                None => "of no type".to_owned(),
            };
            say(format_args!(
                "  {}: {}",
                harmless(&parameter.key_name),
                harmless(&kind)
            ))?;
            for constraint in &parameter.constraints {
                say(format_args!(
                    "    {} {}",
                    constraint.relation().as_str_name().to_lowercase(),
                    harmless(&constraint.other_key_name)
                ))?;
            }
        }
    }
    Ok(())
}
