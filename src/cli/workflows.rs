//! `workflows`: the definitions.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use clap_complete::ArgValueCandidates;
use jiff::SignedDuration;
use omotes_orchestrator::config::{self, Config};
use omotes_orchestrator::domain::overview::{shares, spoken};
use omotes_orchestrator::domain::turns::Limits;
use omotes_orchestrator::domain::workflow::{
    Argument, Catalogue, OnError, Step, StepParameters, Steps,
};
use omotes_orchestrator::telemetry::report::{harmless, percent};
use omotes_orchestrator::wire::workflow_parameter::ParameterType;

use super::{complete, print, say, table, turns};

#[derive(Subcommand)]
pub(super) enum Action {
    /// Check a definition file and print what clients would see.
    Check {
        /// The definition file.
        file: PathBuf,
    },
    /// List the workflows that are defined, with their tasks and parameters.
    List {
        /// Only the tasks, one in a line: the names of the queues that workers take.
        #[arg(long)]
        tasks: bool,
    },
    /// Show what is allowed at task queues, and what waits for its turn there.
    Limits,
    /// Let no more tasks go to a queue: they wait for their turn. What is there goes on.
    Pause {
        /// The task queue: the workflow's name, or the task of one of its steps.
        #[arg(add = ArgValueCandidates::new(complete::tasks))]
        name: String,
    },
    /// Let tasks go to a queue again.
    Resume {
        /// As for `pause`.
        #[arg(add = ArgValueCandidates::new(complete::tasks))]
        name: String,
    },
    /// Limit how many tasks go to a queue; the others wait for their turn. All replicas heed it at
    /// once.
    #[command(after_help = "Examples:\n  \
        omotes-orchestrator workflows limit optimizer --max-running 1\n  \
        omotes-orchestrator workflows limit simulator --window 4\n  \
        omotes-orchestrator workflows limit simulator --window default --max-running unlimited")]
    Limit(turns::Limit),
}

/// # Errors
/// All that is wrong with the definitions; nobody knows the queue; Postgres is not there.
pub(super) fn run(
    action: &Action,
    config: impl FnOnce() -> anyhow::Result<Config>,
) -> anyhow::Result<ExitCode> {
    match action {
        Action::Check { file } => {
            show(&config::read_catalogue(file)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Action::List { tasks } => {
            let catalogue = config::read_catalogue(&config()?.workflow_config_path)?;
            let text = match tasks {
                true => catalogue
                    .tasks()
                    .iter()
                    .map(|task| format!("{}\n", harmless(task)))
                    .collect(),
                false => list(&catalogue),
            };
            print(&text)?;
            Ok(ExitCode::SUCCESS)
        }
        Action::Limits => turns::limits(&config()?),
        Action::Pause { name } => turns::pause(&config()?, name, true),
        Action::Resume { name } => turns::pause(&config()?, name, false),
        Action::Limit(limit) => turns::limit(&config()?, limit),
    }
}

/// The workflows that the definitions have, the tasks of those that do not have just the one of
/// their own name, and what is allowed at queues. Nothing where the definitions cannot be read.
pub(super) fn defined(config: &Config) -> (Vec<String>, BTreeMap<String, Vec<String>>, Limits) {
    let catalogue = config::read_catalogue(&config.workflow_config_path).ok();
    let known = catalogue.map(|catalogue| {
        let tasks = catalogue.tasks_by_workflow();
        (catalogue.names(), tasks, catalogue.queue_limits())
    });
    known.unwrap_or_default()
}

fn list(catalogue: &Catalogue) -> String {
    let mut table = table(&["workflow", "description", "tasks", "parameters"]);
    let tasks = catalogue.tasks_by_workflow();
    for workflow in &catalogue.announcement().workflows {
        let own = std::slice::from_ref(&workflow.type_name);
        let tasks = tasks.get(&workflow.type_name).map_or(own, Vec::as_slice);
        let parameters = workflow.parameters.iter();
        let parameters: Vec<_> = parameters.map(|one| one.key_name.as_str()).collect();
        let line = [
            workflow.type_name.as_str(),
            workflow.type_description.as_str(),
            &tasks.join(", "),
            &parameters.join(", "),
        ];
        table.add_row(line.map(harmless));
    }
    match catalogue.announcement().workflows.is_empty() {
        true => "no workflow is defined\n".to_owned(),
        false => format!("{table}\n"),
    }
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
        if let Some(definition) = catalogue.definition(name) {
            draw(&definition.steps, name)?;
        }
    }
    Ok(())
}

/// Draws the way of a job through its steps.
fn draw(steps: &Steps, workflow: &str) -> anyhow::Result<()> {
    if steps.tasks().eq([workflow]) && steps.plain().is_some() {
        return Ok(());
    }
    for (place, (step, share)) in steps.all().iter().zip(shares(steps)).enumerate() {
        let number = place + 1;
        let share = percent(share);
        say(format_args!(
            "  {number}. {}: task {}, {share} of the progress{}",
            harmless(&step.title),
            harmless(&step.task),
            details(step)
        ))?;
        for fallback in step.alternatives().skip(1) {
            say(format_args!(
                "     or, if that fails, {}: task {}{}",
                harmless(&fallback.title),
                harmless(&fallback.task),
                details(fallback)
            ))?;
        }
        let last = step.alternatives().last().map(|step| &step.on_error);
        match last {
            Some(OnError::Continue) => {
                say(format_args!("     or, if that fails, on with its input"))?
            }
            Some(OnError::Fail | OnError::Fallback(_)) | None => {}
        }
        if number < steps.count() {
            say(format_args!("     ↓ its output ESDL"))?;
        }
    }
    let of_python_service = match steps.tasks().eq([workflow]) {
        true => "runs this task, once and without its timeout",
        false => "cannot run these steps",
    };
    say(format_args!("  The Python service {of_python_service}."))
}

/// What is special about a step.
fn details(step: &Step) -> String {
    let mut text = String::new();
    if let StepParameters::These(parameters) = &step.parameters {
        let names = parameters.iter().map(|(name, argument)| match argument {
            Argument::OfJob(of_job) if of_job == name => harmless(name),
            Argument::OfJob(of_job) => format!("{} = {}", harmless(name), harmless(of_job)),
            Argument::Constant(value) => {
                format!("{} = {}", harmless(name), harmless(&value.to_string()))
            }
        });
        let names: Vec<_> = names.collect();
        let _ = match names.is_empty() {
            true => write!(text, ", no parameters"),
            false => write!(text, ", parameters {}", names.join(", ")),
        };
    }
    if let Some(timeout) = step.timeout_ms {
        let timeout = spoken(SignedDuration::from_millis(timeout.into()));
        let _ = write!(text, ", at most {timeout}");
    }
    if let Some(limit) = step.delivery_limit {
        let _ = write!(text, ", started at most {limit} times");
    }
    if step.attempts > 1 {
        let wait = SignedDuration::try_from(step.retry_wait).unwrap_or_default();
        let _ = write!(text, ", {} attempts, {} apart", step.attempts, spoken(wait));
    }
    if !step.keep_time_series {
        text.push_str(", its time series are given up");
    }
    text
}
