//! The command line: which commands there are, and what they share.

use std::fmt;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use comfy_table::{ContentArrangement, Table, presets};
use console::Term;
use omotes_orchestrator::VERSION;
use omotes_orchestrator::app;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::config::environment::Environment;
use omotes_orchestrator::domain::overview::{Outage, Overview, Queues};
use omotes_orchestrator::healthcheck;
use omotes_orchestrator::service::queues::Watch;
use omotes_orchestrator::store::{Connection, Store};
use omotes_orchestrator::telemetry::logger;
use omotes_orchestrator::telemetry::report::{one_line, readable};
use omotes_orchestrator::threads::Signal;

mod alerts;
mod complete;
mod configuration;
mod db;
mod dead_letters;
mod doctor;
mod jobs;
mod man;
mod queues;
mod submit;
mod time_series;
mod turns;
mod workers;
mod workflows;

/// The OMOTES job orchestrator, between SDK clients and Celery workers.
///
/// Configured by environment variables and an `.env` file in the working directory;
/// config/README.md lists them. Without a command it runs the service.
#[derive(Parser)]
#[command(version = VERSION)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the service (the default).
    Run,
    /// Ask the running service whether it is ready; exits with 0 if it is.
    Healthcheck,
    /// List, show, watch, hold, reorder and cancel jobs.
    #[command(subcommand)]
    Jobs(jobs::Action),
    /// Show the depth of RabbitMQ's queues, their consumers, and how both change.
    Queues(queues::Queues),
    /// Show the Celery workers and what they do; drain one, send it back to its queues.
    ///
    /// What they were last asked by the service, and by remote control. Counts are those of the last hour:
    /// tasks begun, and, of the tasks that a worker was seen with, how many have ended and failed.
    #[command(after_help = "Examples:\n  \
        omotes-orchestrator workers\n  \
        omotes-orchestrator workers --json | jq -r '.workers[] | select(.state == \"silent\") | .host'\n  \
        omotes-orchestrator workers drain worker-simulator@a1b2c3")]
    Workers(workers::Command),
    /// Show the configuration in force and where each value comes from; passwords are not shown.
    ///
    /// Exits with 1 when it is faulty, and says why. It is that of this shell: --running asks the service that runs
    /// for the limits that it has, and says which are other ones here.
    #[command(after_help = "Examples:\n  \
        omotes-orchestrator config\n  \
        omotes-orchestrator config --running\n  \
        docker compose exec orchestrator omotes-orchestrator config --running")]
    Config(configuration::Configuration),
    /// Check the deployment: what is wrong with it, and what to do about it.
    ///
    /// Checks each connection and its rights, whether an orchestrator runs and how it says that it is, whether
    /// Postgres takes what is written, mixed-up vhosts, queues declared otherwise, workflows without a worker,
    /// paused queues that jobs wait for, jobs that wait for long, that are overdue or silent, silent workers,
    /// tasks that nobody has or wants, how much room the database takes, limits of RabbitMQ, the workflow
    /// definitions, the tables, clocks, InfluxDB, and dead letters. The service is asked at HTTP_BIND: best run
    /// this where one runs. What is wrong comes first, and before all what several findings follow from; the last
    /// line sums it up. Without --fix it changes nothing that lasts. Exits with 1 when there is a warning or an
    /// error.
    #[command(after_help = "Examples:\n  \
        omotes-orchestrator doctor\n  \
        omotes-orchestrator doctor --rabbitmqctl \"docker compose exec -T rabbitmq rabbitmqctl\"\n  \
        omotes-orchestrator doctor --fix\n  \
        omotes-orchestrator doctor --before-switch=back\n  \
        omotes-orchestrator doctor --json | jq '.[] | select(.severity == \"error\")'")]
    Doctor(doctor::Doctor),
    /// Show or change the revision of the database's tables.
    #[command(subcommand)]
    Db(db::Action),
    /// The workflow definitions, and what is allowed at their task queues.
    #[command(subcommand)]
    Workflows(workflows::Action),
    /// The time series of output ESDLs: list, keep, drop.
    #[command(subcommand)]
    TimeSeries(time_series::Action),
    /// The messages that could not be handled, of both vhosts.
    #[command(subcommand)]
    DeadLetters(dead_letters::Action),
    /// Tell a webhook of troubles.
    #[command(subcommand)]
    Alerts(alerts::Action),
    /// Submit a job and follow it to its end.
    ///
    /// What becomes of it is told on standard error, and its output ESDL printed to standard output. Ctrl-C
    /// cancels the job. Exits with 0 when the job succeeded, 1 when it failed, 130 when it
    /// was cancelled.
    #[command(after_help = "Examples:\n  \
        omotes-orchestrator submit in.esdl --workflow simulator --param timestep=1h > out.esdl\n  \
        omotes-orchestrator submit in.esdl --workflow simulator --param start_time=2026-01-01 --output out.esdl")]
    Submit(submit::Submit),
    /// Print the completions of a shell, to be sourced or put where it looks for them.
    ///
    /// They ask this program for the names of workflows, states, jobs and workers. Source them anew with
    /// each version.
    #[command(after_help = "Examples:\n  \
        source <(omotes-orchestrator completions bash)\n  \
        omotes-orchestrator completions fish > ~/.config/fish/completions/omotes-orchestrator.fish")]
    Completions {
        /// The shell that reads them.
        shell: clap_complete::Shell,
    },
    /// Print the manual of a command, or write that of all.
    #[command(after_help = "Examples:\n  \
        omotes-orchestrator man jobs list | man -l -\n  \
        omotes-orchestrator man --all /usr/local/share/man/man1")]
    Man(man::Manual),
}

/// Answers a shell that asks for completions, and ends the process then.
pub(crate) fn complete() {
    complete::answer();
}

/// # Errors
/// The command failed. One that has succeeded and has bad news returns another exit code.
pub(crate) fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let environment = Environment::with_file(Path::new(".env"))?;
    let config = || environment.config().context("configuration");
    match cli.command.unwrap_or(Command::Run) {
        Command::Run => serve(config()?, &environment),
        Command::Healthcheck => match config()?.http_bind {
            Some(address) => healthcheck::check(address).map(|()| ExitCode::SUCCESS),
            None => bail!("HTTP_BIND is empty, so nobody can be asked"),
        },
        Command::Jobs(command) => jobs::run(&config()?, command),
        Command::Config(configuration) => configuration::run(&configuration, &environment),
        Command::Doctor(doctor) => doctor::run(&config()?, &environment, &doctor),
        Command::Queues(queues) => queues::run(&config()?, &queues),
        Command::Workers(workers) => workers::run(&config()?, &workers),
        Command::Completions { shell } => {
            print(&complete::script(shell)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Man(manual) => man::run(&manual),
        Command::Db(command) => db::run(command, config),
        Command::Workflows(command) => workflows::run(&command, config),
        Command::TimeSeries(command) => time_series::run(&config()?, &command),
        Command::DeadLetters(command) => dead_letters::run(&config()?, &command),
        Command::Alerts(action) => alerts::run(&config()?, &action),
        Command::Submit(submit) => submit::run(&config()?, submit),
    }
}

/// Runs the service to its end.
fn serve(config: Config, environment: &Environment) -> anyhow::Result<ExitCode> {
    logger::start(config.log_level, config.log_format);
    for near_miss in environment.near_misses() {
        log::warn!("{near_miss}");
    }
    Ok(match app::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With the cause chain, and a stack trace where RUST_BACKTRACE asks for one.
            log::error!("{error:?}");
            ExitCode::FAILURE
        }
    })
}

/// Consent to what cannot be undone.
#[derive(Args, Clone, Copy)]
pub(crate) struct Agreed {
    /// Do it. Without this, only show what would go.
    #[arg(long)]
    pub(crate) yes: bool,
}

/// The last words of a command that has done nothing for want of --yes.
pub(crate) const NOTHING_DONE: &str = "nothing was done: --yes does it";

/// # Errors
/// Postgres is not there.
pub(crate) fn connect(config: &Config) -> anyhow::Result<Connection> {
    told_of(&format!("Postgres at {}", config.postgres), || {
        connect_quietly(config)
    })
}

/// The same, without a word when Postgres takes its time.
///
/// # Errors
/// The same.
pub(crate) fn connect_quietly(config: &Config) -> anyhow::Result<Connection> {
    let store = Store::new(&config.postgres, 1).hasty();
    store
        .connection()
        .with_context(|| config.postgres.to_string())
}

/// What RabbitMQ has in its queues can be looked at through this, if it answers. Where it does not, that
/// is told, for then nothing is known of workers.
pub(crate) fn watch(config: &Config) -> Option<Watch> {
    match told_of("RabbitMQ", || Watch::open(config)) {
        Ok(watch) => Some(watch),
        Err(error) => {
            let error = one_line(&format!("{error:#}"));
            warn(&format!(
                "nothing is known of workers without RabbitMQ: {error}"
            ));
            None
        }
    }
}

/// For how long nobody is told that somebody does not answer.
const SILENCE: Duration = Duration::from_millis(1500);

/// Asks somebody, and says so on standard error if there is no answer for a while.
pub(crate) fn told_of<T>(whom: &str, ask: impl FnOnce() -> T) -> T {
    told_after_a_while(&format!("{whom} does not answer; still trying"), ask)
}

/// Does something, and says this on standard error if it takes a while.
pub(crate) fn told_after_a_while<T>(news: &str, ask: impl FnOnce() -> T) -> T {
    let (asking, answered) = Signal::pending();
    thread::scope(|scope| {
        scope.spawn(move || {
            if !answered.comes_within(SILENCE) {
                say_aside(format_args!("{news}"));
            }
        });
        let answer = ask();
        drop(asking);
        answer
    })
}

/// The state of the deployment. Without RabbitMQ it has no workers, and without the workflow
/// definitions only the workflows of jobs.
///
/// # Errors
/// The connection is lost.
pub(crate) fn overview(
    config: &Config,
    connection: &mut Connection,
    watch: Option<&Watch>,
) -> anyhow::Result<Overview> {
    let (defined, tasks, limits) = workflows::defined(config);
    let limits = connection.queue_limits(limits)?;
    let turns = connection.turns(&limits, config.priority_aging)?;
    let rows = connection.workflows(&defined)?;
    let mut names: Vec<_> = rows.keys().cloned().collect();
    names.extend(tasks.values().flatten().cloned());
    names.sort_unstable();
    names.dedup();
    let queues = watch.and_then(|watch| watch.look(config, &names).ok());
    let workers = match config.workers_period {
        Some(_) => Some(connection.workers()?),
        None => None,
    };
    Ok(Overview {
        queued: connection.queued()?,
        workers,
        has_rows: true,
        rows,
        defined,
        tasks,
        turns,
        is_cut_off: queues.is_none(),
        outage: queues.is_none().then_some(Outage {
            what: "RabbitMQ does not answer",
            since: None,
        }),
        queues: queues.map(|queues| Queues {
            at: jiff::Timestamp::now(),
            queues,
            without_worker: Default::default(),
        }),
        ..Overview::default()
    })
}

/// How wide a line of standard output may be; None where it is no terminal.
pub(crate) fn width() -> Option<u16> {
    io::stdout().is_terminal().then(|| Term::stdout().size().1)
}

/// A table as wide as the terminal; without wrapping where there is none.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.iter().map(|text| text.to_uppercase()));
    if let Some(columns) = width() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
        table.set_width(columns);
    }
    table
}

/// Prints to standard error why a command has failed.
pub(crate) fn complain(error: &anyhow::Error) {
    let error = readable(&format!("{error:#}"));
    say_aside(format_args!("omotes-orchestrator: {error}"));
}

/// A warning on standard error, beside what the command prints.
pub(crate) fn warn(warning: &str) {
    say_aside(format_args!("warning: {warning}"));
}

/// A line on standard error.
pub(crate) fn say_aside(line: fmt::Arguments<'_>) {
    // Nobody may be there to read it.
    let _ = writeln!(io::stderr(), "{line}");
}

/// Prints a line, as [`print`] does.
///
/// # Errors
/// The same.
pub(crate) fn say(line: fmt::Arguments<'_>) -> anyhow::Result<()> {
    print(&format!("{line}\n"))
}

/// Prints to standard output. A reader that has gone, as `head` does, is no failure.
///
/// # Errors
/// It cannot be written to.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    print_on(text).map(drop)
}

/// The same; false when the reader has gone.
///
/// # Errors
/// The same.
pub(crate) fn print_on(text: &str) -> anyhow::Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true).context("standard output"),
    }
}
