//! The command line.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "what a command says goes to standard output, why it failed to standard error"
)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context, bail};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use crossbeam_channel::unbounded;
use jiff::SignedDuration;
use omotes_orchestrator::app;
use omotes_orchestrator::broker::Link;
use omotes_orchestrator::broker::dead_letters::{self, DeadLetter, Fate};
use omotes_orchestrator::client::{self, Order, Output};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::config::environment::Environment;
use omotes_orchestrator::domain::time_series::{Guard, PROTECTED};
use omotes_orchestrator::http;
use omotes_orchestrator::influx::Influx;
use omotes_orchestrator::service::time_series;
use omotes_orchestrator::store::Store;
use omotes_orchestrator::store::migrate::{self, Loss, REVISIONS, Revision};
use omotes_orchestrator::telemetry::logger;
use omotes_orchestrator::telemetry::report::{harmless, one_line, readable};
use omotes_orchestrator::wire;
use omotes_orchestrator::wire::job_result::ResultType;
use omotes_orchestrator::wire::job_submission::JobPriority;
use omotes_orchestrator::wire::workflow_parameter::ParameterType;
use serde_json::{Map, Value};
use signal_hook::consts::SIGINT;
use signal_hook::iterator::Signals;

mod cli;

/// Exit code of a job that was cancelled; as a shell reports Ctrl-C.
const EXIT_CANCELLED: u8 = 130;

/// glibc's gives large buffers back to the kernel at each message, which costs as much again as all
/// that is done with them.
#[cfg(unix)]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The OMOTES job orchestrator, between SDK clients and Celery workers.
///
/// Configured by environment variables and an `.env` file in the working directory;
/// config/README.md lists them. Without a command it runs the service.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the service (the default).
    Run,
    /// Ask the running service whether it is ready; exits with 0 if it is.
    Healthcheck,
    /// List, show, watch and cancel jobs.
    #[command(subcommand)]
    Jobs(cli::jobs::Command),
    /// Show how full RabbitMQ's queues are, who takes from them, and how that changes.
    Queues(cli::queues::Queues),
    /// Show the configuration in force and where each value comes from; passwords are not shown.
    ///
    /// Exits with 1 when it is faulty, and says why.
    Config(cli::configuration::Configuration),
    /// Look the deployment over: what is wrong with it, and what to do about it.
    ///
    /// Looks at each connection and its rights, mixed-up vhosts, queues declared otherwise, workflows
    /// without a worker, limits of RabbitMQ, the workflow definitions, the tables, clocks, InfluxDB,
    /// and dead letters. Changes nothing that lasts. Exits with 1 when there is a warning or an error.
    #[command(after_help = "Examples:\n  \
        omotes-orchestrator doctor\n  \
        omotes-orchestrator doctor --rabbitmqctl \"docker compose exec -T rabbitmq rabbitmqctl\"\n  \
        omotes-orchestrator doctor --json | jq '.[] | select(.severity == \"error\")'")]
    Doctor(cli::doctor::Doctor),
    /// Look at or change the revision of the database's tables.
    #[command(subcommand)]
    Db(Db),
    /// The workflow definitions.
    #[command(subcommand)]
    Workflows(Workflows),
    /// The time series of output ESDLs, and whether somebody needs them.
    #[command(subcommand)]
    TimeSeries(TimeSeries),
    /// The messages that could not be handled, of both vhosts.
    #[command(subcommand)]
    DeadLetters(DeadLetters),
    /// Submit a job and follow it to its end.
    ///
    /// Ctrl-C cancels the job. Exits with 0 when the job succeeded, 1 when it failed, 130 when it
    /// was cancelled.
    Submit(Submit),
    /// Print the completions of a shell, to be sourced or put where it looks for them.
    Completions { shell: clap_complete::Shell },
}

#[derive(Subcommand)]
enum Db {
    /// Apply revisions, by default all of them.
    Upgrade { revision: Option<String> },
    /// Undo the revisions after the given one; `base` undoes all.
    ///
    /// Says which tables and columns go, with how much in them, and does it with --yes alone. No replica
    /// may be connected.
    Downgrade {
        revision: String,
        #[command(flatten)]
        agreed: Agreed,
    },
    /// Show the revision that the database is at.
    Current,
    /// List all revisions.
    History,
    /// Make a folder for a new revision in `migrations/`, on top of the last one.
    Revision { message: String },
}

#[derive(Subcommand)]
enum TimeSeries {
    /// List what is known of them, and whether InfluxDB has a database for each.
    List,
    /// Keep them from now on, also those of a deleted job.
    Keep { esdl_id: String },
    /// Drop them now, without waiting for their retention.
    Drop {
        esdl_id: String,
        #[command(flatten)]
        agreed: Agreed,
    },
}

#[derive(Subcommand)]
enum DeadLetters {
    /// List them, a line each: id, time, connection, queue, size, reason.
    List,
    /// Show one of them: its reason, the message's properties, and the beginning of its body.
    Show {
        /// The id, or enough of its beginning to tell it from the others.
        id: String,
        /// File for the whole body.
        #[arg(long)]
        body: Option<PathBuf>,
    },
    /// Put them back into the queues they came from, as they were.
    Requeue(Which),
    /// Delete them; all of them with --yes alone.
    Drop {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        agreed: Agreed,
    },
}

/// Whether a command may do what cannot be undone.
#[derive(Args, Clone, Copy)]
struct Agreed {
    /// Do it. Without, it is only said what would go.
    #[arg(long)]
    yes: bool,
}

/// What a command says last that has done nothing for want of --yes.
const NOTHING_DONE: &str = "nothing was done: --yes does it";

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// Their ids, or enough of the beginning to tell them from the others.
    ids: Vec<String>,
    /// All that wait now.
    #[arg(long)]
    all: bool,
}

#[derive(Subcommand)]
enum Workflows {
    /// Check a definition file and print what clients would see.
    Check { file: PathBuf },
}

#[derive(Args)]
struct Submit {
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
    #[arg(long, value_enum, default_value_t = Priority::Medium)]
    priority: Priority,
    /// How long the job may run: `90s`, `10m`, `1h30m`.
    #[arg(long, value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// File for the output ESDL, which is printed otherwise.
    #[arg(long)]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Priority {
    Low,
    Medium,
    High,
}

fn parse_param(text: &str) -> Result<(String, Value), String> {
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

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command.unwrap_or(Command::Run)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("omotes-orchestrator: {}", readable(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    let environment = Environment::with_file(Path::new(".env"))?;
    let config = || environment.config().context("configuration");
    match command {
        Command::Run => {
            let config = config()?;
            logger::start(config.log_level, config.log_format);
            for near_miss in environment.near_misses() {
                log::warn!("{near_miss}");
            }
            if let Err(error) = app::run(config) {
                // With the cause chain, and a stack trace where RUST_BACKTRACE asks for one.
                log::error!("{error:?}");
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Healthcheck => match config()?.http_bind {
            Some(address) => http::check(address)?,
            None => bail!("HTTP_BIND is empty, so nobody can be asked"),
        },
        Command::Jobs(command) => return cli::jobs::run(&config()?, command),
        Command::Config(configuration) => {
            return cli::configuration::run(&configuration, &environment);
        }
        Command::Doctor(doctor) => return cli::doctor::run(&config()?, &environment, &doctor),
        Command::Queues(queues) => return cli::queues::run(&config()?, &queues),
        Command::Completions { shell } => {
            let mut completions = Vec::new();
            let mut command = Cli::command();
            let name = command.get_name().to_owned();
            clap_complete::generate(shell, &mut command, name, &mut completions);
            cli::print(&String::from_utf8_lossy(&completions))?;
        }
        Command::Db(Db::History) => {
            for revision in REVISIONS {
                println!("{}", describe(revision));
            }
        }
        Command::Db(Db::Revision { message }) => {
            let folder = new_revision(Path::new("migrations"), &message)?;
            println!("{}", folder.display());
        }
        Command::Db(command) => return database(&config()?, &command),
        Command::Workflows(Workflows::Check { file }) => {
            show_workflows(&app::read_catalogue(&file)?);
        }
        Command::TimeSeries(command) => return time_series(&config()?, &command),
        Command::DeadLetters(command) => return dead_letters(&config()?, &command),
        Command::Submit(submit) => return follow(&config()?, submit),
    }
    Ok(ExitCode::SUCCESS)
}

fn database(config: &Config, command: &Db) -> anyhow::Result<ExitCode> {
    let store = Store::new(&config.postgres, 1);
    let mut connection = store
        .connection()
        .with_context(|| config.postgres.to_string())?;
    match command {
        Db::Upgrade { revision } => {
            let upgrade = |client: &mut _| migrate::upgrade(client, revision.as_deref());
            let applied = connection.revisions(upgrade)?;
            report_revisions("applied", applied);
        }
        Db::Downgrade { revision, agreed } => {
            let agree = |losses: &[Loss]| {
                for loss in losses {
                    println!("{loss}");
                }
                agreed.yes
            };
            let downgrade = |client: &mut _| migrate::downgrade(client, revision, agree);
            let Some(undone) = connection.revisions(downgrade)? else {
                eprintln!("this is what would go; {NOTHING_DONE}");
                return Ok(ExitCode::FAILURE);
            };
            report_revisions("undone", undone);
        }
        Db::Current => match connection.revisions(migrate::current)?.checked_sub(1) {
            Some(last) if last + 1 == REVISIONS.len() => {
                println!("{} (head)", describe(&REVISIONS[last]));
            }
            Some(last) => println!("{}", describe(&REVISIONS[last])),
            None => println!("base"),
        },
        Db::History | Db::Revision { .. } => unreachable!("they need no database"),
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(revision: &Revision) -> String {
    format!("{} {}", revision.id, revision.slug.replace('_', " "))
}

fn report_revisions(what: &str, revisions: &[Revision]) {
    for revision in revisions {
        println!("{what} {}", describe(revision));
    }
    if revisions.is_empty() {
        println!("nothing to do");
    }
}

/// Makes the folder of a revision that builds on the last one.
fn new_revision(migrations: &Path, message: &str) -> anyhow::Result<PathBuf> {
    if !migrations.is_dir() {
        bail!("there is no migrations/ here: run this where the sources are");
    }
    let head = REVISIONS.last().map_or("nothing", |revision| revision.id);
    let id = &uuid::Uuid::new_v4().simple().to_string()[..12];
    let slug = message
        .to_lowercase()
        .split(|character: char| !character.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join("_");
    if slug.is_empty() {
        bail!("the message {message:?} has no letter or digit to name the folder with");
    }
    let folder = migrations.join(format!("{id}_{slug}"));
    fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
    fs::write(folder.join("up.sql"), format!("-- Revises: {head}\n"))?;
    fs::write(folder.join("down.sql"), "")?;
    Ok(folder)
}

fn time_series(config: &Config, command: &TimeSeries) -> anyhow::Result<ExitCode> {
    let influxdb = config.influxdb.as_ref();
    let influxdb =
        influxdb.context("INFLUXDB_HOST is empty: there is no InfluxDB to look after")?;
    let influx = Influx::new(influxdb);
    let store = Store::new(&config.postgres, 1);
    let mut connection = store
        .connection()
        .with_context(|| config.postgres.to_string())?;
    match command {
        TimeSeries::List => {
            let databases = influx.databases()?;
            for guard in connection.guards()? {
                println!("{}", describe_series(&guard, &databases));
            }
        }
        TimeSeries::Keep { esdl_id } => {
            if !connection.set_series_in_use(esdl_id, true)? {
                bail!("nothing is known of time series {esdl_id}");
            }
            println!("{}: kept", one_line(esdl_id));
        }
        TimeSeries::Drop { esdl_id, agreed } => {
            let protected = time_series::protected(influxdb);
            if PROTECTED.contains(&esdl_id.as_str()) || protected.contains(esdl_id) {
                bail!("the database {esdl_id} is protected");
            }
            if !agreed.yes {
                let guards = connection.guards()?;
                let guard = guards.iter().find(|guard| guard.esdl_id == *esdl_id);
                let guard =
                    guard.with_context(|| format!("nothing is known of time series {esdl_id}"))?;
                println!("{}", describe_series(guard, &influx.databases()?));
                eprintln!("these would be dropped; {NOTHING_DONE}");
                return Ok(ExitCode::FAILURE);
            }
            if !connection.set_series_in_use(esdl_id, false)? {
                bail!("nothing is known of time series {esdl_id}");
            }
            connection.delete_retired_series(esdl_id, || influx.drop_database(esdl_id))?;
            println!("{}: dropped", one_line(esdl_id));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The time series of an ESDL in a line; `databases` are those that InfluxDB has.
fn describe_series(guard: &Guard, databases: &[String]) -> String {
    let place = match databases.contains(&guard.esdl_id) {
        true => "in InfluxDB",
        false => "not in InfluxDB",
    };
    let job = match guard.job_id {
        Some(job) => format!("of job {job}"),
        None => "claimed by no job".to_owned(),
    };
    let state = match guard.deactivated_at {
        Some(since) => format!("not needed since {since:.0}"),
        None => "in use".to_owned(),
    };
    format!("{}: {state}, {job}, {place}", one_line(&guard.esdl_id))
}

fn dead_letters(config: &Config, command: &DeadLetters) -> anyhow::Result<ExitCode> {
    let mut links = vec![("SDK", Link::open(&config.sdk_rabbitmq, "dead letters")?)];
    if config.task_rabbitmq != config.sdk_rabbitmq {
        links.push(("TASK", Link::open(&config.task_rabbitmq, "dead letters")?));
    }
    let unasked = match command {
        DeadLetters::Drop { which, agreed } => which.all && !agreed.yes,
        DeadLetters::List | DeadLetters::Show { .. } | DeadLetters::Requeue(_) => false,
    };
    let known = known_letters(&links, unasked || matches!(command, DeadLetters::List))?;
    if unasked && !known.is_empty() {
        let letters = if known.len() == 1 {
            "letter"
        } else {
            "letters"
        };
        eprintln!(
            "this would delete {} dead {letters}; {NOTHING_DONE}",
            known.len()
        );
        return Ok(ExitCode::FAILURE);
    }
    let (which, fate, done) = match command {
        DeadLetters::List => return Ok(ExitCode::SUCCESS),
        DeadLetters::Show { id, .. } => (vec![named(id, &known)?], Fate::Leave, "shown"),
        DeadLetters::Requeue(which) => (which.resolve(known)?, Fate::Requeue, "requeued"),
        DeadLetters::Drop { which, .. } => (which.resolve(known)?, Fate::Drop, "dropped"),
    };
    let mut code = ExitCode::SUCCESS;
    for (name, link) in links {
        let mut meant = Vec::new();
        let mut shown = Ok(());
        let failed = dead_letters::go_through(&link, |letter| {
            if !which.contains(&letter.id) {
                return Fate::Leave;
            }
            if let DeadLetters::Show { body, .. } = command {
                shown = show_letter(name, letter, body.as_deref());
            }
            meant.push(letter.id.clone());
            fate
        })?;
        shown?;
        for id in meant {
            match failed.get(&id) {
                None if fate == Fate::Leave => {}
                None => println!("{id}: {done}"),
                Some(why) => {
                    eprintln!("{id}: it stays, for {why}");
                    code = ExitCode::FAILURE;
                }
            }
        }
        link.close()?;
    }
    Ok(code)
}

/// The ids of all dead letters; a line for each is printed if they are to be listed.
fn known_letters(links: &[(&str, Link)], listed: bool) -> anyhow::Result<Vec<String>> {
    let mut known = Vec::new();
    for (name, link) in links {
        dead_letters::go_through(link, |letter| {
            if listed {
                println!(
                    "{} {} {name} {} {} bytes: {}",
                    one_line(&letter.id),
                    one_line(&letter.time),
                    one_line(&letter.queue),
                    letter.body.len(),
                    one_line(&letter.reason)
                );
            }
            known.push(letter.id.clone());
            Fate::Leave
        })?;
    }
    Ok(known)
}

impl Which {
    /// The letters that are meant, of those that are known.
    fn resolve(&self, known: Vec<String>) -> anyhow::Result<Vec<String>> {
        if self.all {
            return Ok(known);
        }
        self.ids.iter().map(|id| named(id, &known)).collect()
    }
}

/// The one of `known` that begins like this.
fn named(beginning: &str, known: &[String]) -> anyhow::Result<String> {
    let mut fitting = known.iter().filter(|id| id.starts_with(beginning));
    match (fitting.next(), fitting.next()) {
        (Some(id), None) => Ok(id.clone()),
        (Some(_), Some(_)) => bail!("{beginning:?} is the beginning of several ids"),
        (None, _) => bail!("there is no dead letter {beginning:?}"),
    }
}

fn show_letter(vhost: &str, letter: &DeadLetter, body: Option<&Path>) -> anyhow::Result<()> {
    /// How much of the body is printed, in bytes.
    const PREVIEW: usize = 500;
    println!("id:         {}", one_line(&letter.id));
    println!("time:       {}", one_line(&letter.time));
    println!("queue:      {} ({vhost})", one_line(&letter.queue));
    println!("reason:     {}", harmless(&letter.reason));
    if !letter.cut.is_empty() {
        println!("cut:        {}", harmless(&letter.cut));
    }
    println!(
        "properties: {}",
        readable(&format!("{:#}", letter.properties))
    );
    if let Some(job) = wire::job_id(&letter.body) {
        println!("job:        {job}");
    }
    let size = letter.body.len();
    match body {
        Some(file) => {
            fs::write(file, &letter.body).with_context(|| file.display().to_string())?;
            println!("body:       {size} bytes, in {}", file.display());
        }
        None => {
            let preview = letter.body[..size.min(PREVIEW)].escape_ascii();
            let more = if size > PREVIEW { "…" } else { "" };
            println!("body:       {size} bytes: {preview}{more}");
        }
    }
    Ok(())
}

fn show_workflows(catalogue: &omotes_orchestrator::domain::workflow::Catalogue) {
    for workflow in &catalogue.announcement().workflows {
        let (name, description) = (&workflow.type_name, &workflow.type_description);
        println!("{}: {}", harmless(name), harmless(description));
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
            println!("  {}: {}", harmless(&parameter.key_name), harmless(&kind));
            for constraint in &parameter.constraints {
                println!(
                    "    {} {}",
                    constraint.relation().as_str_name().to_lowercase(),
                    harmless(&constraint.other_key_name)
                );
            }
        }
    }
}

fn follow(config: &Config, submit: Submit) -> anyhow::Result<ExitCode> {
    let esdl =
        fs::read_to_string(&submit.esdl).with_context(|| submit.esdl.display().to_string())?;
    let order = Order {
        esdl,
        workflow: submit.workflow,
        params: submit.params.into_iter().collect::<Map<_, _>>(),
        reference: submit.reference,
        priority: match submit.priority {
            Priority::Low => JobPriority::Low,
            Priority::Medium => JobPriority::Medium,
            Priority::High => JobPriority::High,
        },
        timeout: submit.timeout,
    };
    // A pipe is waited for, which Ctrl-C still ends.
    let output = match &submit.output {
        Some(path) => Output::to(path)?,
        None => Output::Printed,
    };
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
        let result = client::submit(&config.sdk_rabbitmq, &order, output, &interrupts);
        handle.close();
        result
    })?;
    Ok(match result {
        ResultType::Succeeded => ExitCode::SUCCESS,
        ResultType::Timeout | ResultType::Error => ExitCode::FAILURE,
        ResultType::Cancelled => ExitCode::from(EXIT_CANCELLED),
    })
}
