//! How fast the service is, held against what broker and library allow: load on private services,
//! and beside it, in the same run, the floor. `./run.sh bench` starts it with what it needs.
#![allow(
    clippy::print_stderr,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a program that reports, and nobody's library"
)]

mod crew;
mod crowd;
#[path = "../common/figures.rs"]
mod figures;
mod floor;
mod flow;
mod latency;
mod load;
mod report;
mod site;
mod soak;
mod viewers;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use omotes_orchestrator::config::Config;
use uuid::Uuid;

use crate::crew::Crew;
use crate::load::{HELD, Kind, Load, SEATS, WORKFLOW};
use crate::report::Report;
use crate::site::Site;
use crate::viewers::Viewers;

#[derive(Parser)]
struct Options {
    /// Shows the change against this report of an earlier run.
    #[arg(long)]
    compare: Option<PathBuf>,
    /// Where the report goes as JSON.
    #[arg(long, default_value = "target/bench/report.json")]
    output: PathBuf,
    /// Writes the figures of the report into this README too, between its markers.
    #[arg(long)]
    figures: Option<PathBuf>,
    /// Measures nothing: the figures are those of this report.
    #[arg(long, requires = "figures")]
    render: Option<PathBuf>,
    /// How many messages are in a backlog of 2 kB ESDLs, and how many in others in proportion.
    #[arg(long, default_value_t = 10_000)]
    messages: usize,
    /// Only these parts: sizes, one size as it is named, steps, turns, refusals, replicas, history, backlog, latency, crowd, page, pages, workers; the last one only if it is named here.
    #[arg(long)]
    only: Vec<String>,
    /// Instead of all that: moderate load for so many minutes, and what the service holds meanwhile.
    #[arg(long)]
    soak: Option<u64>,
    /// The service.
    #[arg(long)]
    program: PathBuf,
    #[arg(long)]
    folder: PathBuf,
    /// The environments with the workers' SDKs.
    #[arg(long, default_value = "target/venv")]
    venvs: PathBuf,
}

/// Bytes of an ESDL, and how many fewer messages of that size make a backlog.
const SIZES: [(&str, usize, usize); 4] = [
    ("2 kB", 2_000, 1),
    ("200 kB", 200_000, 5),
    ("1 MB", 1_000_000, 20),
    ("5 MB", 5_000_000, 100),
];

/// Whose processor time is measured.
const CPU_OF: [&str; 3] = ["the service", "RabbitMQ", "Postgres"];

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    if let (Some(report), Some(readme)) = (&options.render, &options.figures) {
        let report = Report::load(report).with_context(|| report.display().to_string())?;
        return figures::update(readme, |_| report.markdown());
    }
    let config = Config::from_environment()?;
    let mut bench = Bench {
        site: Site::new(&options.folder, &options.program),
        load: Load::new(&config),
        config,
        report: Report::default(),
    };
    let wanted = |part: &str| options.only.is_empty() || options.only.iter().any(|one| one == part);
    let messages = options.messages;
    // Creates tables and queues.
    bench.site.start(1)?;
    bench.site.stop()?;
    bench.load.declare()?;
    if let Some(minutes) = options.soak {
        return bench.soak(&options.folder, Duration::from_secs(60 * minutes));
    }
    for (name, bytes, fewer) in SIZES {
        if wanted("sizes") || wanted(name) {
            bench.throughput(name, bytes, (messages / fewer).max(20), 1)?;
        }
        if wanted("steps") || wanted(&format!("{name} steps")) {
            bench.steps(name, bytes, (messages / fewer).max(20))?;
        }
        if wanted("turns") || wanted(&format!("{name} turns")) {
            bench.turns(name, bytes, (messages / fewer).max(20))?;
        }
        if wanted("refusals") || wanted(&format!("{name} refusals")) {
            bench.refusals(name, bytes, (messages / fewer).max(20))?;
        }
    }
    if wanted("latency") {
        bench.latency()?;
    }
    if wanted("crowd") {
        bench.crowd()?;
    }
    if wanted("replicas") {
        bench.throughput("2 kB, 3 replicas", 2_000, messages, 3)?;
    }
    if wanted("backlog") {
        bench.throughput("2 kB, backlog 1,000", 2_000, 1_000, 1)?;
        bench.throughput("2 kB, backlog 100,000", 2_000, 100_000, 1)?;
    }
    if wanted("page") {
        bench.page()?;
    }
    if wanted("pages") {
        bench.pages(messages)?;
    }
    if wanted("history") {
        bench.site.fill_history(&bench.config.postgres, 1_000_000)?;
        bench.throughput("2 kB, a million in the history", 2_000, messages, 1)?;
    }
    if options.only.iter().any(|one| one == "workers") {
        bench.workers(&options.venvs, &options.folder)?;
    }
    bench.report.print();
    bench.report.save(&options.output)?;
    if let Some(readme) = &options.figures {
        figures::update(readme, |_| bench.report.markdown())?;
    }
    if let Some(path) = &options.compare {
        let before = Report::load(path).with_context(|| path.display().to_string())?;
        bench.report.compare(&before);
    }
    Ok(())
}

struct Bench {
    site: Site,
    load: Load,
    config: Config,
    report: Report,
}

impl Bench {
    /// Four backlogs, one after the other, each waiting before the service starts: submissions, the
    /// starts of their tasks, progress, results.
    fn throughput(
        &mut self,
        name: &str,
        esdl: usize,
        jobs: usize,
        replicas: usize,
    ) -> anyhow::Result<()> {
        let ids: Vec<Uuid> = (0..jobs).map(|_| Uuid::new_v4()).collect();
        let mut tasks = Vec::new();
        for kind in Kind::ALL {
            if esdl > SIZES[0].1 && matches!(kind, Kind::Start | Kind::Progress) {
                // They carry none.
                continue;
            }
            let prepared = self.load.prepare(kind, &ids, &tasks, esdl);
            self.load.publish(kind, &ids, prepared)?;
            let what = format!("{name}: {}", kind.name());
            let new_tasks = self.backlog(&what, kind, jobs, replicas)?;
            tasks = new_tasks.unwrap_or(tasks);
        }
        let peak = self.site.peak_memory();
        self.report.cost(&format!("{name}: peak RSS, MiB"), peak);
        Ok(())
    }

    /// Jobs of two steps: their submissions, the results of their first steps, which are handed over,
    /// and those of their second ones.
    fn steps(&mut self, name: &str, esdl: usize, jobs: usize) -> anyhow::Result<()> {
        let ids: Vec<Uuid> = (0..jobs).map(|_| Uuid::new_v4()).collect();
        let mut tasks = Vec::new();
        for kind in Kind::OF_STEPS {
            let prepared = self.load.prepare(kind, &ids, &tasks, esdl);
            self.load.publish(kind, &ids, prepared)?;
            let what = format!("{name}, two steps: {}", kind.name());
            let new_tasks = self.backlog(&what, kind, jobs, 1)?;
            tasks = new_tasks.unwrap_or(tasks);
        }
        let peak = self.site.peak_memory();
        let what = format!("{name}, two steps: peak RSS, MiB");
        self.report.cost(&what, peak);
        Ok(())
    }

    /// Submissions whose tasks have to wait for their turn, and their turns.
    fn turns(&mut self, name: &str, esdl: usize, jobs: usize) -> anyhow::Result<()> {
        let ids: Vec<Uuid> = (0..jobs).map(|_| Uuid::new_v4()).collect();
        let prepared = self.load.prepare(Kind::Held, &ids, &[], esdl);
        self.load.publish(Kind::Held, &ids, prepared)?;
        let what = format!("{name}: {}", Kind::Held.name());
        self.backlog(&what, Kind::Held, jobs, 1)?;
        self.site.command(&["workflows", "resume", HELD])?;
        self.site.start(1)?;
        let measured = self.load.measure(Kind::Turn, jobs, &self.site)?;
        self.site.stop()?;
        self.load.take_tasks(Kind::Turn, jobs)?;
        self.site.command(&["workflows", "pause", HELD])?;
        let what = format!("{name}: {}", Kind::Turn.name());
        self.report
            .bare_rate(&format!("{what} per second"), measured.rate);
        let peak = self.site.peak_memory();
        self.report.cost(&format!("{what}, peak RSS, MiB"), peak);
        self.site.fill_jobs(&self.config.postgres, 0, 0)
    }

    /// Submissions that are refused, whose clients are told so after a while, and at once.
    fn refusals(&mut self, name: &str, esdl: usize, jobs: usize) -> anyhow::Result<()> {
        for delay in ["1000", "0"] {
            let ids: Vec<Uuid> = (0..jobs).map(|_| Uuid::new_v4()).collect();
            let prepared = self.load.prepare(Kind::Refused, &ids, &[], esdl);
            self.load.publish(Kind::Refused, &ids, prepared)?;
            self.site.variables = vec![("OUTCOME_DELAY_MS", delay)];
            let what = format!("{name}: {} told after {delay} ms", Kind::Refused.name());
            self.backlog(&what, Kind::Refused, jobs, 1)?;
            let peak = self.site.peak_memory();
            self.report.cost(&format!("{what}, peak RSS, MiB"), peak);
        }
        self.site.variables.clear();
        Ok(())
    }

    /// Has a backlog that is waiting worked off by the service, and by the floor. Returns the tasks
    /// that it has led to.
    fn backlog(
        &mut self,
        what: &str,
        kind: Kind,
        jobs: usize,
        replicas: usize,
    ) -> anyhow::Result<Option<Vec<(Uuid, String)>>> {
        self.site.start(replicas)?;
        let measured = self.load.measure(kind, jobs, &self.site)?;
        self.site.stop()?;
        let samples = self.load.samples(kind)?;
        let tasks = kind.has_task().then(|| self.load.take_tasks(kind, jobs));
        self.load.purge()?;
        let floor = floor::run(&self.config, jobs, &samples)?;
        self.report
            .rate(&format!("{what} per second"), measured.rate, floor);
        for (whose, cpu) in CPU_OF.iter().zip(measured.cpu) {
            self.report
                .cost(&format!("{what}, CPU ms each of {whose}"), cpu);
        }
        tasks.transpose()
    }

    fn latency(&mut self) -> anyhow::Result<()> {
        // What it takes, not what it is made to wait.
        self.site.variables = vec![("OUTCOME_DELAY_MS", "0")];
        self.site.start(1)?;
        self.report.cost("idle: RSS, MiB", self.site.memory());
        // Of what it can do, as just measured or, where that was left out, as an earlier run had it.
        let half = self
            .report
            .value("2 kB: submissions per second")
            .unwrap_or(3000.0)
            / 2.0;
        for (name, workflow, rate) in [
            ("idle", WORKFLOW, 0.0),
            ("idle, with turns", SEATS, 0.0),
            ("half load", WORKFLOW, half),
        ] {
            let latencies = latency::measure(&self.config, &self.load, workflow, rate)?;
            for (way, times) in [
                ("submission to task", latencies.submissions),
                ("result to client", latencies.results),
            ] {
                self.percentiles(&format!("{name}: {way}"), times);
            }
        }
        self.site.stop()?;
        self.site.variables.clear();
        self.load.purge()?;
        // Those that only bothered have not ended.
        self.site.fill_jobs(&self.config.postgres, 0, 0)
    }

    /// Whether it matters how many tasks wait for their turn.
    fn crowd(&mut self) -> anyhow::Result<()> {
        for held in [100, 100_000] {
            let first: Vec<Uuid> = (0..=crowd::SAMPLES).map(|_| Uuid::new_v4()).collect();
            let postgres = self.config.postgres.clone();
            self.site.fill_jobs(&postgres, 0, 0)?;
            self.site.fill_held(&postgres, &first, held)?;
            self.site.variables = vec![("OUTCOME_DELAY_MS", "0")];
            self.site.start(1)?;
            let (config, load) = (&self.config, &self.load);
            let times = crowd::measure(config, load, &self.site, &first);
            self.site.stop()?;
            let times = times?;
            for (what, times) in [
                ("submission to its client", times.submissions),
                ("result to the next task", times.starts),
                ("page", times.pages),
                ("list of jobs", times.lists),
            ] {
                self.percentiles(&format!("{held} tasks wait more: {what}"), times);
            }
            self.load.purge()?;
        }
        let unlimited = ["workflows", "limit", HELD, "--max-running", "default"];
        self.site.command(&unlimited)?;
        self.site.variables.clear();
        self.site.fill_jobs(&self.config.postgres, 0, 0)
    }

    /// How long the status page takes, and what it is made of.
    fn page(&mut self) -> anyhow::Result<()> {
        const REQUESTS: usize = 200;
        let (live, finished) = (10_000, 100_000);
        let postgres = self.config.postgres.clone();
        self.site.fill_jobs(&postgres, live, finished)?;
        self.site.start(1)?;
        let address = self.site.page()?;
        for (name, path) in [
            ("page", ""),
            ("page of finished jobs", "?finished=true"),
            (
                "page of a text in no finished job",
                "?finished=true&text=nothing",
            ),
            ("metrics", "metrics"),
        ] {
            let mut times = Vec::with_capacity(REQUESTS);
            for _ in 0..REQUESTS {
                let began = Instant::now();
                let mut answer = ureq::get(format!("{address}{path}")).call()?;
                answer.body_mut().read_to_string()?;
                times.push(began.elapsed());
            }
            self.percentiles(
                &format!("10,000 jobs, 100,000 in the history: {name}"),
                times,
            );
        }
        self.site.stop()?;
        self.site.fill_jobs(&postgres, 0, 0)
    }

    /// What open pages cost jobs, where there are many of these, and how long the list takes beside
    /// them.
    fn pages(&mut self, jobs: usize) -> anyhow::Result<()> {
        const ROUNDS: usize = 4;
        const PAGES: usize = 200;
        let (live, finished) = (10_000, 1_000_000);
        self.site.fill_jobs(&self.config.postgres, live, finished)?;
        self.site.start(1)?;
        let (config, load) = (&self.config, &self.load);
        let flows = flow::beside_pages(config, load, &self.site, (ROUNDS, jobs), PAGES)?;
        for (pages, flow) in [0, PAGES].iter().zip(flows) {
            let name = format!("10,000 live, {pages} pages open: jobs, start to end");
            self.report
                .bare_rate(&format!("{name}, per second"), flow.jobs / flow.seconds);
            for (whose, cpu) in CPU_OF.iter().zip(flow.cpu) {
                self.report
                    .cost(&format!("{name}, CPU ms each of {whose}"), cpu / flow.jobs);
            }
        }
        let told = flows[1].bytes / flows[1].seconds / 1000.0;
        self.report.cost("told each page, kB per second", told);
        let viewers = Viewers::open(&self.site.page()?, PAGES)?;
        let times = crowd::requests(&self.site.page()?);
        drop(viewers);
        self.percentiles(
            "10,000 live, 1,000,000 in the history, 200 pages open: page",
            times?,
        );
        self.site.stop()?;
        self.load.purge()?;
        self.site.fill_jobs(&self.config.postgres, 0, 0)
    }

    /// How soon real workers answer where there are many, and how soon it is seen what becomes of one.
    fn workers(&mut self, venvs: &Path, folder: &Path) -> anyhow::Result<()> {
        self.site.start(1)?;
        let celery = self.config.celery_rabbitmq.clone();
        let mut crew = Crew::start(&celery, venvs, folder)?;
        crew::sees(&self.site, "idle")?;
        self.answers("idle", crew::ask(&celery)?);
        let cpu = self.site.cpu();
        crew::give_work(&self.config, &self.site)?;
        self.answers("all compute", crew::ask(&celery)?);
        for sdk in crew::SDKS {
            for (signal, state) in [("-STOP", "silent"), ("-KILL", "gone")] {
                let time = crew.seen_after(sdk, signal, state, &self.site)?;
                let name = format!(
                    "{} workers that compute: one of {sdk} {state}, s",
                    crew::WORKERS
                );
                self.report.cost(&name, time.as_secs_f64());
            }
        }
        let spent = self.site.cpu()[0] - cpu[0];
        self.report.cost(
            "CPU of the service meanwhile, ms",
            spent.as_secs_f64() * 1000.0,
        );
        self.site.stop()?;
        drop(crew);
        self.site.fill_jobs(&self.config.postgres, 0, 0)
    }

    fn answers(&mut self, what: &str, answers: crew::Answers) {
        let name = format!("{} workers, {what}", crew::WORKERS);
        self.report.bare_rate(
            &format!("{name}: have answered, at the worst look"),
            answers.fewest as f64,
        );
        self.percentiles(&format!("{name}: answer"), answers.times);
    }

    fn percentiles(&mut self, what: &str, mut times: Vec<Duration>) {
        times.sort_unstable();
        for percent in [50, 99] {
            let time: Duration = times[(times.len() - 1) * percent / 100];
            let name = format!("{what}, p{percent} ms");
            self.report.cost(&name, time.as_secs_f64() * 1000.0);
        }
    }

    fn soak(&mut self, folder: &Path, time: Duration) -> anyhow::Result<()> {
        self.site.start(1)?;
        soak::run(&self.config, &self.load, &self.site, folder, time)?;
        self.site.stop()?;
        self.load.purge()
    }
}
