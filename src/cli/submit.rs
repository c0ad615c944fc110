//! `submit`: submits one job and follows it to its end, as an SDK client would.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use std::{fs, thread};

use anyhow::Context;
use clap::{Args, ValueEnum};
use clap_complete::ArgValueCandidates;
use crossbeam_channel::unbounded;
use jiff::SignedDuration;
use omotes_orchestrator::actions::submission::Order;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::wire::job_result::ResultType;
use omotes_orchestrator::wire::job_submission::JobPriority;
use omotes_orchestrator::wire::{self, JobSubmission, Outgoing};
use signal_hook::consts::SIGINT;
use signal_hook::iterator::Signals;
use uuid::Uuid;

pub(super) use self::checks::{changes, tasks};
use self::output::Output;
use super::complete;
use super::jobs::origin::origin;

mod checks;
mod display;
mod follow;
pub(super) mod output;
mod takers;

/// Exit code of a job that was cancelled; as a shell reports Ctrl-C.
const EXIT_CANCELLED: u8 = 130;

#[derive(Args)]
pub(super) struct Submit {
    /// File with the input ESDL.
    esdl: PathBuf,
    /// Name of the workflow; `workflows list` has them.
    #[arg(long, value_name = "NAME", add = ArgValueCandidates::new(complete::workflows))]
    workflow: String,
    /// A parameter of the workflow, as its definition has it: a date such as 2026-01-31T12:00, in UTC
    /// unless it says otherwise, a length of time such as 1h30m, a number, true, a text.
    #[arg(long = "param", value_name = "KEY=VALUE", value_parser = parse_param)]
    params: Vec<(String, String)>,
    /// Your name for the job.
    #[arg(long, value_name = "TEXT")]
    reference: Option<String>,
    /// Its place in the queue before or behind others.
    #[arg(long, value_enum, default_value_t = PriorityOption::Medium)]
    priority: PriorityOption,
    /// How long the job may run: `90s`, `10m`, `1h30m`.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// File for the output ESDL, which goes to standard output otherwise.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Do not hold the ESDL, the workflow and its parameters against the definitions that are here, which
    /// may be others than the service has.
    #[arg(long)]
    unchecked: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum PriorityOption {
    Low,
    Medium,
    High,
}

pub(in crate::cli) fn parse_param(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
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
    let (params, tasks) = checks::check(config, &submit, &esdl)?;
    let order = Order {
        esdl,
        workflow: submit.workflow,
        params,
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
    let message = wire::for_somebody(wire::job_submission(&submission), &origin());
    follow_to_its_end(config, &submission, message, &tasks, output)
}

/// Submits this with its message, whose tasks go to these queues, and follows it to its end; the output ESDL goes to `output`.
///
/// # Errors
/// As [`follow::submit`].
pub(super) fn follow_to_its_end(
    config: &Config,
    submission: &JobSubmission,
    message: Outgoing,
    tasks: &[String],
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
        let result = follow::submit(config, (submission, message), tasks, output, &interrupts);
        handle.close();
        result
    })?;
    Ok(match result {
        ResultType::Succeeded => ExitCode::SUCCESS,
        ResultType::Timeout | ResultType::Error => ExitCode::FAILURE,
        ResultType::Cancelled => ExitCode::from(EXIT_CANCELLED),
    })
}
