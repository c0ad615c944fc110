//! Replicas of the service under load while they, RabbitMQ, Postgres and the network between them
//! fail by a seeded schedule; a ledger on the clients' side says whether anything was lost.
//! `./run.sh chaos` starts it with what it needs.
#![allow(
    clippy::print_stderr,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a program that reports, and nobody's library"
)]

mod faults;
#[path = "../common/figures.rs"]
mod figures;
mod ledger;
mod people;
mod proxy;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use fastrand::Rng;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::wire::{CANCELS_QUEUE, SUBMISSIONS_QUEUE};
use uuid::Uuid;

use crate::faults::Site;
use crate::ledger::{Plan, Violation};
use crate::people::{Action, PROGRESS, RESULTS, WORKFLOW, World, pause};

/// How long after the last fault everything may take to come to its end.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Parser)]
struct Options {
    #[arg(long, default_value_t = 300)]
    jobs: usize,
    #[arg(long, default_value_t = 2)]
    replicas: usize,
    /// How long jobs are submitted and faults happen.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// The same seed makes the same plan of jobs and faults.
    #[arg(long, default_value_t = fastrand::u64(..1_000_000))]
    seed: u64,
    #[arg(long, default_value_t = 8)]
    workers: usize,
    /// So many clients more do nothing but keep the three queues of a job throughout, as the SDK
    /// does for two days.
    #[arg(long, default_value_t = 0)]
    idle_clients: usize,
    /// How many tasks may run at once.
    #[arg(long)]
    seats: Option<usize>,
    /// Writes a row with the figures of this run into this README, between its markers, in place of
    /// the one with the same command line.
    #[arg(long)]
    figures: Option<PathBuf>,
    /// RabbitMQ as a cluster of three nodes, and Postgres with a standby, which is promoted half-way.
    #[arg(long)]
    cluster: bool,
    /// Other versions of RabbitMQ and Postgres, such as 4.0,17, or `newest`: `run.sh` has started them.
    #[arg(long)]
    servers: Option<String>,
    /// The program that tests run: `run.sh` has built it.
    #[arg(long)]
    dev: bool,
    /// Each server has a network of its own, as `run.sh` has made them.
    #[arg(long, hide = true)]
    networks: bool,
    /// Where the private servers and the logs are.
    #[arg(long)]
    folder: PathBuf,
    /// The service.
    #[arg(long)]
    program: PathBuf,
}

fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    println!(
        "chaos: {} jobs, {} replicas, {} minutes, seed {}",
        options.jobs, options.replicas, options.minutes, options.seed
    );
    let config = Config::from_environment()?;
    let world: &World = Box::leak(Box::new(World::new(
        config.sdk_rabbitmq.clone(),
        config.celery_rabbitmq.clone(),
    )));
    let mut site = Site::new(
        &options.folder,
        &options.program,
        config.sdk_rabbitmq.servers.clone(),
        config.postgres.servers.clone(),
        options.replicas,
        options.networks,
    )?;
    if let Some(seats) = options.seats {
        site.limit(WORKFLOW, seats)?;
    }
    let idle = world.declare_idle_clients(options.idle_clients)?;
    let mut random = Rng::with_seed(options.seed);
    let length = Duration::from_secs_f64(options.minutes * 60.0);
    let actions = plan(&mut random, options.jobs, length);
    let began = Instant::now();
    let named = |name: String| thread::Builder::new().name(name);
    for number in 1..=options.workers {
        named(format!("worker-{number}")).spawn(|| world.work())?;
    }
    named("revokes".to_owned()).spawn(|| world.hear_revokes())?;
    named("collector".to_owned()).spawn(|| world.collect())?;
    let client = named("client".to_owned()).spawn(move || world.act(began, &actions))?;
    let counts = faults::run(&mut site, &mut random, began + length)?;
    if client.join().is_err() {
        bail!("the client panicked");
    }
    let mut violations = settle(world, &mut site, &config)?;
    let (summary, wrong) = report(world, &counts, &site.rabbitmq_kills, began.elapsed())?;
    violations.extend(wrong);
    if let Some(seats) = options.seats {
        let most = world.seats.lock().unwrap_or_else(PoisonError::into_inner).1;
        println!("at most {most} tasks at once, of {seats} allowed");
        if most > seats {
            violations.push(format!("{most} tasks ran at once"));
        }
    }
    let missing = world.missing(&idle)?;
    println!("{} queues of idle clients", idle.len());
    violations.extend(
        missing
            .iter()
            .map(|queue| format!("the queue {queue} of an idle client is gone")),
    );
    if !site.stop()? {
        violations.push("a replica did not end with 0".to_owned());
    }
    for violation in &violations {
        println!("VIOLATION {violation}");
    }
    println!(
        "{} violations; seed {}; logs in {}",
        violations.len(),
        options.seed,
        options.folder.display()
    );
    if let Some(readme) = &options.figures {
        let row = summary.row(&options, violations.len());
        figures::update(readme, |old| with_row(old, &row))?;
    }
    Ok(if violations.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What the client does, in order of time.
fn plan(random: &mut Rng, jobs: usize, length: Duration) -> Vec<(Duration, Action)> {
    let mut actions = Vec::new();
    for _ in 0..jobs {
        let job = Uuid::from_u128(random.u128(..));
        let time = length.mul_f64(random.f64());
        let plan = match random.u32(..100) {
            0..30 => Plan::Plain,
            30..44 => Plan::Steps,
            44..47 => Plan::FirstStepFails,
            47..50 => Plan::SecondStepFails,
            50..60 => Plan::Fails,
            60..66 => Plan::StepsCancelled,
            66..80 => Plan::Cancelled,
            80..86 => Plan::TooSlow,
            86..94 => Plan::Crashes,
            _ => Plan::UnknownWorkflow,
        };
        actions.push((time, Action::Submit(job, plan)));
        if matches!(plan, Plan::Cancelled | Plan::StepsCancelled) {
            // Around the time that a task takes, so that it meets everything else.
            let later = Duration::from_millis(random.u64(..400));
            actions.push((time + later, Action::Cancel(job)));
        }
    }
    for _ in 0..jobs / 20 {
        let time = length.mul_f64(random.f64());
        let mark = Uuid::from_u128(random.u128(..));
        actions.push((time, Action::Bad(random.usize(..4), mark)));
    }
    actions.sort_by_key(|(time, _)| *time);
    actions
}

/// Waits until everything has come to its end; what has not is a violation.
fn settle(world: &World, site: &mut Site, config: &Config) -> anyhow::Result<Vec<String>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        site.start_missing()?;
        let left = what_is_left(world, config).unwrap_or_else(|error| vec![format!("{error:#}")]);
        if left.is_empty() || Instant::now() > deadline {
            return Ok(left);
        }
        pause(Duration::from_millis(500));
    }
}

fn what_is_left(world: &World, config: &Config) -> anyhow::Result<Vec<String>> {
    let mut left = Vec::new();
    let waiting = world
        .waiting
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .len();
    if waiting > 0 {
        left.push(format!("{waiting} jobs without a result"));
    }
    let computing = world.computing.load(Ordering::Relaxed);
    if computing > 0 {
        left.push(format!("{computing} tasks are being computed"));
    }
    let queues = World::depth(&config.sdk_rabbitmq, &[SUBMISSIONS_QUEUE, CANCELS_QUEUE])?
        + World::depth(&config.celery_rabbitmq, &[RESULTS, PROGRESS, WORKFLOW])?;
    if queues > 0 {
        left.push(format!("{queues} messages in queues"));
    }
    let mut to_primary = postgres::Config::new();
    for server in &config.postgres.servers {
        to_primary.host(&server.host).port(server.port);
    }
    let mut client = to_primary
        .target_session_attrs(postgres::config::TargetSessionAttrs::ReadWrite)
        .dbname(&config.postgres.database)
        .user(config.postgres.username.as_deref().unwrap_or_default())
        .password(
            config
                .postgres
                .password
                .as_ref()
                .map_or("", |one| one.reveal()),
        )
        .connect(postgres::NoTls)
        .context("connecting to Postgres")?;
    let rows: i64 = client
        .query_one(
            "SELECT (SELECT count(*) FROM job) + (SELECT count(*) FROM job_starts)
                    + (SELECT count(*) FROM job_input) + (SELECT count(*) FROM job_turn)",
            &[],
        )?
        .get(0);
    if rows > 0 {
        left.push(format!(
            "{rows} rows in job, job_starts, job_input and job_turn"
        ));
    }
    Ok(left)
}

/// What a run comes to.
struct Summary {
    faults: usize,
    lost: usize,
    contradictory: usize,
    impossible: usize,
    told_once_more: usize,
    bad_messages: usize,
    dead_letters: usize,
    queues_lost: usize,
    time: Duration,
}

impl Summary {
    /// A row of a table in Markdown.
    fn row(&self, options: &Options, violations: usize) -> String {
        let Summary {
            faults,
            lost,
            contradictory,
            impossible,
            told_once_more,
            bad_messages,
            dead_letters,
            queues_lost,
            time,
        } = self;
        let Options {
            jobs,
            replicas,
            minutes,
            seed,
            idle_clients,
            cluster,
            networks,
            servers,
            dev,
            ..
        } = options;
        let (cluster, how) = match (cluster, networks) {
            (false, _) => ("", ""),
            (true, true) => ("--cluster ", ""),
            (true, false) => ("--cluster ", ", by cookies"),
        };
        let servers = servers
            .as_deref()
            .map_or(String::new(), |versions| format!("--servers {versions} "));
        let dev = if *dev { "--dev " } else { "" };
        let run = format!(
            "{cluster}{servers}{dev}--jobs {jobs} --replicas {replicas} --minutes {minutes}"
        );
        let seconds = time.as_secs();
        format!(
            "| `{run} --idle-clients {idle_clients} --seed {seed}`{how} | {faults} | {lost} | {contradictory} | \
             {impossible} | {violations} | {told_once_more} | {bad_messages}, {dead_letters} | \
             {queues_lost} | {seconds} s |\n"
        )
    }
}

/// A table with this row, in place of one that begins with the same cell.
fn with_row(table: &str, row: &str) -> String {
    let cell = |line: &str| line.split(" | ").next().map(str::to_owned);
    let mut lines: Vec<_> = table.split_inclusive('\n').map(str::to_owned).collect();
    match lines.iter_mut().find(|line| cell(line) == cell(row)) {
        Some(line) => row.clone_into(line),
        None => {
            let end = lines.iter().rposition(|line| line.starts_with('|'));
            lines.insert(end.map_or(lines.len(), |end| end + 1), row.to_owned());
        }
    }
    lines.concat()
}

/// Says what happened. Returns what it comes to, and what must not have happened.
fn report(
    world: &World,
    faults: &BTreeMap<String, usize>,
    rabbitmq_kills: &[Range<Instant>],
    time: Duration,
) -> anyhow::Result<(Summary, Vec<String>)> {
    world.sweep()?;
    let mut letters = World::dead_letters(&world.sdk)?;
    letters.extend(World::dead_letters(&world.celery)?);
    let bad = world.bad.lock().unwrap_or_else(PoisonError::into_inner);
    let mut violations = ledger::stray_letters(&bad, &letters);
    let records = world.records.lock().unwrap_or_else(PoisonError::into_inner);
    let mut outcomes: BTreeMap<String, usize> = BTreeMap::new();
    let (mut duplicates, mut lost, mut contradictory, mut impossible) = (0, 0, 0, 0);
    for (job, (plan, record)) in records.iter() {
        let outcome = record
            .results
            .first()
            .map_or("nothing", |(kind, _)| kind.as_str_name());
        *outcomes.entry(format!("{plan:?}: {outcome}")).or_default() += 1;
        duplicates += record.duplicates();
        if let Err(violation) = record.check(*plan, rabbitmq_kills) {
            match &violation {
                Violation::Lost => lost += 1,
                Violation::Contradictory(_) => contradictory += 1,
                Violation::Impossible(_) => impossible += 1,
            }
            violations.push(format!("job {job}: {violation:?}"));
        }
    }
    println!("jobs by plan and outcome:");
    for (what, count) in &outcomes {
        println!("  {count:6} {what}");
    }
    println!("{} faults:", faults.values().sum::<usize>());
    for (what, count) in faults {
        println!("  {count:6} {what}");
    }
    println!(
        "{} jobs: {lost} lost, {contradictory} contradictory, {impossible} impossible, {duplicates} \
         results told once more",
        records.len()
    );
    let queues_lost = records.values().filter(|(_, record)| record.queue_lost);
    let queues_lost = queues_lost.count();
    let results_lost = records.values().filter(|(_, record)| record.result_lost());
    println!(
        "{queues_lost} queues of clients and {} results lost by RabbitMQ",
        results_lost.count()
    );
    println!(
        "{} bad messages, {} dead letters; {:.0} s",
        bad.len(),
        letters.len(),
        time.as_secs_f64()
    );
    let summary = Summary {
        faults: faults.values().sum(),
        lost,
        contradictory,
        impossible,
        told_once_more: duplicates,
        bad_messages: bad.len(),
        dead_letters: letters.len(),
        queues_lost,
        time,
    };
    Ok((summary, violations))
}
