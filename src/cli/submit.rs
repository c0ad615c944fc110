//! `submit`: submits one job and follows it to its end, as an SDK client would.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use std::{fs, thread};

use anyhow::Context;
use clap::{Args, ValueEnum};
use crossbeam_channel::unbounded;
use jiff::SignedDuration;
use omotes_orchestrator::actions::submission::Order;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::wire::JobSubmission;
use omotes_orchestrator::wire::job_result::ResultType;
use omotes_orchestrator::wire::job_submission::JobPriority;
use serde_json::{Map, Value};
use signal_hook::consts::SIGINT;
use signal_hook::iterator::Signals;
use uuid::Uuid;

use self::output::Output;

mod display;
mod follow;
pub(super) mod output;

/// Exit code of a job that was cancelled; as a shell reports Ctrl-C.
const EXIT_CANCELLED: u8 = 130;

#[derive(Args)]
pub(super) struct Submit {
    /// File with the input ESDL.
    esdl: PathBuf,
    /// Name of the workflow.
    #[arg(long)]
    workflow: String,
    /// A parameter of the workflow: JSON where it parses as such, a text otherwise.
    #[arg(long = "param", value_name = "KEY=VALUE", value_parser = parse_param)]
    params: Vec<(String, Value)>,
    /// Your name for the job.
    #[arg(long)]
    reference: Option<String>,
    #[arg(long, value_enum, default_value_t = PriorityOption::Medium)]
    priority: PriorityOption,
    /// How long the job may run: `90s`, `10m`, `1h30m`.
    #[arg(long, value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// File for the output ESDL, which is printed otherwise.
    #[arg(long)]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum PriorityOption {
    Low,
    Medium,
    High,
}

pub(in crate::cli) fn parse_param(text: &str) -> Result<(String, Value), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
    Ok((key.to_owned(), value))
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let duration: SignedDuration = text
        .parse()
        .map_err(|error: jiff::Error| error.to_string())?;
    duration
        .try_into()
        .map_err(|error: jiff::Error| error.to_string())
}

/// # Errors
/// The ESDL cannot be read, the output not be written, or RabbitMQ is not there.
pub(super) fn run(config: &Config, submit: Submit) -> anyhow::Result<ExitCode> {
    let esdl =
        fs::read_to_string(&submit.esdl).with_context(|| submit.esdl.display().to_string())?;
    let order = Order {
        esdl,
        workflow: submit.workflow,
        params: submit.params.into_iter().collect::<Map<_, _>>(),
        reference: submit.reference,
        priority: match submit.priority {
            PriorityOption::Low => JobPriority::Low,
            PriorityOption::Medium => JobPriority::Medium,
            PriorityOption::High => JobPriority::High,
        },
        timeout: submit.timeout,
    };
    // A pipe is waited for, which Ctrl-C still ends.
    let output = match &submit.output {
        Some(path) => Output::to(path)?,
        None => Output::Printed,
    };
    let submission = order.submission(Uuid::new_v4())?;
    follow_to_its_end(config, &submission, output)
}

/// Submits this and follows it to its end; the output ESDL goes to `output`.
///
/// # Errors
/// As [`follow::submit`].
pub(super) fn follow_to_its_end(
    config: &Config,
    submission: &JobSubmission,
    output: Output,
) -> anyhow::Result<ExitCode> {
    let (interrupt, interrupts) = unbounded();
    let mut signals = Signals::new([SIGINT])?;
    let handle = signals.handle();
    let result = thread::scope(|scope| {
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn_scoped(scope, move || {
                for signal in signals.forever() {
                    // Its receiver lives as long as signals can come.
                    let _ = interrupt.send(signal);
                }
            })?;
        let result = follow::submit(&config.sdk_rabbitmq, submission, output, &interrupts);
        handle.close();
        result
    })?;
    Ok(match result {
        ResultType::Succeeded => ExitCode::SUCCESS,
        ResultType::Timeout | ResultType::Error => ExitCode::FAILURE,
        ResultType::Cancelled => ExitCode::from(EXIT_CANCELLED),
    })
}
