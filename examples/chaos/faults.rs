//! What befalls the service, as its seed has it.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use fastrand::Rng;
use omotes_orchestrator::config::Address;

use crate::people::pause;
use crate::proxy::{End, Proxy, Weather};

/// How long a node may take to be part of the cluster again.
const BACK: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    RabbitMq,
    Postgres,
}

/// Which links of a server are down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Down {
    /// To its peers: the other nodes, or the other Postgres.
    Peers,
    /// To those who use it too, as if it were off the network.
    All,
    /// Those to its peers in one direction alone: they do not hear it.
    ToPeers,
    /// It does not hear them.
    FromPeers,
}

impl Down {
    /// What `run.sh` is told, before `down` or `up`.
    fn links(self) -> &'static [[&'static str; 2]] {
        match self {
            Down::Peers => &[["link", "peers"]],
            Down::All => &[["link", "peers"], ["link", "clients"]],
            Down::ToPeers => &[["way", "mute"]],
            Down::FromPeers => &[["way", "deaf"]],
        }
    }

    fn words(self) -> &'static str {
        match self {
            Down::Peers => "cut off from its peers",
            Down::All => "cut off from all",
            Down::ToPeers => "not heard by its peers",
            Down::FromPeers => "deaf to its peers",
        }
    }
}

/// What there is that faults can befall.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    pub replicas: usize,
    pub nodes: usize,
    /// Whether servers have networks of their own, whose links can be cut.
    pub networks: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// SIGKILL and SIGTERM; the replica is started again.
    Kill(usize),
    Terminate(usize),
    /// SIGSTOP, and SIGCONT after so long.
    Hang(usize, Duration),
    Cut(usize, Line, End),
    /// The network to one replica is like that for so long, and then the connections are reset.
    Weather(usize, Line, Weather, Duration),
    /// Killed and started again; of a cluster one of its nodes.
    RestartRabbitMq(usize),
    RestartPostgres,
    /// A node is stopped for so long.
    HangNode(usize, Duration),
    /// A node and the others refuse each other for so long, by their cookies.
    IsolateNode(usize, Duration),
    /// No packet gets through to a node, or to the Postgres in use, for so long.
    CutOffNode(usize, Down, Duration),
    CutOffPostgres(Down, Duration),
    /// The primary is killed for good, and its standby promoted.
    FailOver,
}

impl Fault {
    pub fn random(random: &mut Rng, extent: Extent) -> Fault {
        let replica = random.usize(..extent.replicas);
        let line = if random.bool() {
            Line::RabbitMq
        } else {
            Line::Postgres
        };
        let time = Duration::from_millis(random.u64(500..4000));
        if extent.nodes > 1 && random.u32(..if extent.networks { 3 } else { 4 }) == 0 {
            let node = random.usize(..extent.nodes);
            return match (random.u32(..3), extent.networks) {
                (0, _) => Fault::RestartRabbitMq(node),
                (1, _) => Fault::HangNode(node, time * 2),
                (_, false) => Fault::IsolateNode(node, time * 3),
                (_, true) => Fault::cut_off(random, node, time * 5),
            };
        }
        match random.u32(..20) {
            0..=4 => Fault::Kill(replica),
            5..=6 => Fault::Terminate(replica),
            7..=8 => Fault::Hang(replica, time),
            9..=10 => Fault::Cut(replica, line, End::Fin),
            11..=12 => Fault::Cut(replica, line, End::Rst),
            13..=14 => Fault::Weather(replica, line, Weather::BlackHole, time),
            15 => Fault::Weather(
                replica,
                line,
                Weather::Delay(Duration::from_millis(100)),
                time,
            ),
            16 => Fault::Weather(replica, line, Weather::Throttle(20_000), time),
            17 if random.bool() => Fault::Weather(replica, line, Weather::Refuse, time),
            17 => Fault::Weather(replica, line, Weather::Reset, time),
            18 => Fault::RestartRabbitMq(0),
            _ => Fault::RestartPostgres,
        }
    }

    /// Some of it is over before anybody takes the server for gone.
    fn cut_off(random: &mut Rng, node: usize, time: Duration) -> Fault {
        let down = match random.u32(..4) {
            0 => Down::Peers,
            1 => Down::All,
            2 => Down::ToPeers,
            _ => Down::FromPeers,
        };
        match random.u32(..4) {
            0 => Fault::CutOffPostgres(down, time),
            _ => Fault::CutOffNode(node, down, time),
        }
    }

    /// For counting.
    pub fn kind(self) -> String {
        match self {
            Fault::Kill(_) => "replica killed".to_owned(),
            Fault::Terminate(_) => "replica terminated".to_owned(),
            Fault::Hang(..) => "replica stopped for a while".to_owned(),
            Fault::Cut(_, line, end) => format!("{line:?} cut ({end:?})"),
            Fault::Weather(_, line, Weather::BlackHole, _) => format!("{line:?} silent"),
            Fault::Weather(_, line, Weather::Delay(_), _) => format!("{line:?} delayed"),
            Fault::Weather(_, line, Weather::Throttle(_), _) => format!("{line:?} throttled"),
            Fault::Weather(_, line, Weather::Refuse | Weather::Fair, _) => {
                format!("{line:?} refused")
            }
            Fault::Weather(_, line, Weather::Reset, _) => format!("{line:?} reset"),
            Fault::RestartRabbitMq(_) => "RabbitMQ killed and started".to_owned(),
            Fault::RestartPostgres => "Postgres killed and started".to_owned(),
            Fault::HangNode(..) => "RabbitMQ's node stopped for a while".to_owned(),
            Fault::IsolateNode(..) => "RabbitMQ's node refused by the others".to_owned(),
            Fault::CutOffNode(_, down, _) => {
                format!("RabbitMQ's node {}", down.words())
            }
            Fault::CutOffPostgres(down, _) => format!("Postgres {}", down.words()),
            Fault::FailOver => "Postgres killed, its standby promoted".to_owned(),
        }
    }
}

/// The private servers, and the replicas with their lines to them.
pub struct Site {
    pub folder: PathBuf,
    /// Where RabbitMQ's nodes are, and Postgres and its standby.
    pub rabbitmq: Vec<Address>,
    pub postgres: Vec<Address>,
    /// Whether each has a network of its own.
    networks: bool,
    /// Whether the standby has been promoted.
    has_failed_over: bool,
    /// When RabbitMQ was killed, and was there again.
    pub rabbitmq_kills: Vec<Range<Instant>>,
    program: PathBuf,
    replicas: Vec<Replica>,
}

struct Replica {
    child: Option<Child>,
    rabbitmq: Vec<Proxy>,
    postgres: Vec<Proxy>,
}

impl Site {
    pub fn new(
        folder: &Path,
        program: &Path,
        rabbitmq: Vec<Address>,
        postgres: Vec<Address>,
        replicas: usize,
        networks: bool,
    ) -> anyhow::Result<Site> {
        let proxies = |servers: &[Address]| -> anyhow::Result<Vec<Proxy>> {
            let proxy = |server: &Address| anyhow::Ok(Proxy::new(resolved(server)?)?);
            servers.iter().map(proxy).collect()
        };
        let replicas = (0..replicas)
            .map(|_| {
                anyhow::Ok(Replica {
                    child: None,
                    rabbitmq: proxies(&rabbitmq)?,
                    postgres: proxies(&postgres)?,
                })
            })
            .collect::<Result<_, _>>()?;
        let mut site = Site {
            folder: folder.to_owned(),
            rabbitmq,
            postgres,
            networks,
            has_failed_over: false,
            rabbitmq_kills: Vec::new(),
            program: program.to_owned(),
            replicas,
        };
        site.start_missing()?;
        Ok(site)
    }

    /// What there is that faults can befall.
    fn extent(&self) -> Extent {
        Extent {
            replicas: self.replicas.len(),
            nodes: self.rabbitmq.len(),
            networks: self.networks,
        }
    }

    /// Lets only so many tasks of a queue run at once, as soon as the tables are there.
    ///
    /// # Errors
    /// They are not.
    pub fn limit(&self, queue: &str, tasks: usize) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let done = Command::new(&self.program)
                .args(["workflows", "limit", queue, "--max-running"])
                .arg(tasks.to_string())
                .stderr(Stdio::null())
                .status()?;
            if done.success() {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the limit cannot be set");
            pause(Duration::from_millis(200));
        }
    }

    /// Starts replicas that do not run.
    pub fn start_missing(&mut self) -> anyhow::Result<()> {
        for (number, replica) in self.replicas.iter_mut().enumerate() {
            let runs = match &mut replica.child {
                Some(child) => child.try_wait()?.is_none(),
                None => false,
            };
            if runs {
                continue;
            }
            let log = File::options()
                .create(true)
                .append(true)
                .open(self.folder.join(format!("replica-{}.log", number + 1)))?;
            let child = Command::new(&self.program)
                .arg("run")
                .envs(replica.variables())
                .stdin(Stdio::null())
                .stderr(log)
                .spawn()
                .with_context(|| self.program.display().to_string())?;
            replica.child = Some(child);
        }
        Ok(())
    }

    /// Lets it happen, and mends what does not mend by itself.
    pub fn inflict(&mut self, fault: Fault) -> anyhow::Result<()> {
        match fault {
            Fault::Kill(which) => self.end(which, "-KILL")?,
            Fault::Terminate(which) => self.end(which, "-TERM")?,
            Fault::Hang(which, time) => {
                self.signal(which, "-STOP")?;
                pause(time);
                self.signal(which, "-CONT")?;
            }
            Fault::Cut(which, line, end) => {
                self.line(which, line).iter().for_each(|one| one.cut(end));
            }
            Fault::Weather(which, line, weather, time) => {
                let set = |weather| {
                    self.line(which, line)
                        .iter()
                        .for_each(|one| one.set(weather))
                };
                set(weather);
                pause(time);
                set(Weather::Fair);
                self.line(which, line)
                    .iter()
                    .for_each(|one| one.cut(End::Rst));
            }
            Fault::RestartRabbitMq(_)
            | Fault::HangNode(..)
            | Fault::IsolateNode(..)
            | Fault::CutOffNode(..) => {
                let began = Instant::now();
                self.inflict_on_rabbitmq(fault)?;
                let time = began.elapsed().as_secs_f64();
                eprintln!("RabbitMQ was there again after {time:.1} s");
                self.rabbitmq_kills.push(began..Instant::now());
            }
            Fault::RestartPostgres => {
                let (folder, port) = self.primary();
                restart(&folder, port)?;
            }
            Fault::CutOffPostgres(down, time) => {
                // The promoted standby has no peer.
                let down = if self.has_failed_over {
                    Down::All
                } else {
                    down
                };
                cut_off(&self.primary().0, down, time)?;
            }
            Fault::FailOver => {
                private("kill", &self.folder.join("postgres"), &[])?;
                self.has_failed_over = true;
                private("promote", &self.primary().0, &[])?;
            }
        }
        self.start_missing()
    }

    fn inflict_on_rabbitmq(&self, fault: Fault) -> anyhow::Result<()> {
        match fault {
            Fault::RestartRabbitMq(node) => restart(&self.node(node), self.rabbitmq[node].port)?,
            Fault::CutOffNode(node, down, time) => cut_off(&self.node(node), down, time)?,
            Fault::HangNode(node, time) => {
                private("signal", &self.node(node), &["-STOP"])?;
                pause(time);
                private("signal", &self.node(node), &["-CONT"])?;
            }
            Fault::IsolateNode(node, time) => {
                let others = self.rabbitmq.iter().enumerate();
                let others = others.filter(|(other, _)| *other != node);
                let names = others.map(|(_, server)| format!("omotes{}@localhost", server.port));
                let names = names.collect::<Vec<_>>().join(",");
                // Nodes of different cookies refuse each other.
                let part = format!(
                    "[begin erlang:set_cookie(N, strangers), erlang:disconnect_node(N) end || N <- [{names}]]."
                );
                private("ctl", &self.node(node), &["eval", &part])?;
                pause(time);
                let join =
                    format!("[erlang:set_cookie(N, erlang:get_cookie()) || N <- [{names}]].");
                private("ctl", &self.node(node), &["eval", &join])?;
            }
            Fault::Kill(_)
            | Fault::Terminate(_)
            | Fault::Hang(..)
            | Fault::Cut(..)
            | Fault::Weather(..)
            | Fault::RestartPostgres
            | Fault::CutOffPostgres(..)
            | Fault::FailOver => {}
        }
        self.wait_for_all_nodes()
    }

    /// Waits until all nodes are in the cluster, and starts those again that do not come back.
    fn wait_for_all_nodes(&self) -> anyhow::Result<()> {
        if self.rabbitmq.len() == 1 {
            return Ok(());
        }
        for node in 0..self.rabbitmq.len() {
            let all = self.rabbitmq.len().to_string();
            let deadline = Instant::now() + BACK;
            let is_back = || {
                let running = ["eval", "length(rabbit_nodes:all_running())."];
                let answer = private("ctl", &self.node(node), &running);
                answer.is_ok_and(|answer| answer.trim() == all)
            };
            while !is_back() {
                if Instant::now() > deadline {
                    eprintln!("node {node} is not back, and is started again");
                    restart(&self.node(node), self.rabbitmq[node].port)?;
                    break;
                }
                pause(Duration::from_millis(500));
            }
        }
        Ok(())
    }

    fn node(&self, node: usize) -> PathBuf {
        match node {
            0 => self.folder.join("rabbitmq"),
            _ => self
                .folder
                .join(format!("node-{}", node + 1))
                .join("rabbitmq"),
        }
    }

    /// The folder and the port of the Postgres that takes writes.
    fn primary(&self) -> (PathBuf, u16) {
        match self.has_failed_over {
            false => (self.folder.join("postgres"), self.postgres[0].port),
            true => (self.folder.join("standby/postgres"), self.postgres[1].port),
        }
    }

    fn line(&self, which: usize, line: Line) -> &[Proxy] {
        match line {
            Line::RabbitMq => &self.replicas[which].rabbitmq,
            Line::Postgres => &self.replicas[which].postgres,
        }
    }

    fn signal(&self, which: usize, signal: &str) -> anyhow::Result<()> {
        if let Some(child) = &self.replicas[which].child {
            let id = child.id().to_string();
            Command::new("kill").args([signal, &id]).status()?;
        }
        Ok(())
    }

    fn end(&mut self, which: usize, signal: &str) -> anyhow::Result<()> {
        self.signal(which, signal)?;
        if let Some(mut child) = self.replicas[which].child.take() {
            child.wait()?;
        }
        Ok(())
    }

    /// Ends all replicas in good order; false if one did not end well.
    pub fn stop(&mut self) -> anyhow::Result<bool> {
        let mut well = true;
        for which in 0..self.replicas.len() {
            self.signal(which, "-TERM")?;
            if let Some(mut child) = self.replicas[which].child.take() {
                well &= child.wait()?.success();
            }
        }
        Ok(well)
    }
}

/// Has `run.sh` do something with a server; returns what it prints.
fn private(command: &str, folder: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("./run.sh")
        .args(["private", command])
        .arg(folder)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    let done = output.status.success();
    ensure!(done, "{} does not {command}", folder.display());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn restart(folder: &Path, port: u16) -> anyhow::Result<()> {
    private("kill", folder, &[])?;
    private("start", folder, &[&port.to_string()])?;
    Ok(())
}

fn resolved(server: &Address) -> anyhow::Result<SocketAddr> {
    let mut addresses = (server.host.as_str(), server.port).to_socket_addrs()?;
    addresses.next().context("a server without an address")
}

/// Takes links of a server down for so long.
fn cut_off(folder: &Path, down: Down, time: Duration) -> anyhow::Result<()> {
    for [kind, link] in down.links() {
        private(kind, folder, &[link, "down"])?;
    }
    pause(time);
    for [kind, link] in down.links() {
        private(kind, folder, &[link, "up"])?;
    }
    Ok(())
}

impl Replica {
    /// Where its servers are.
    fn variables(&self) -> Vec<(String, String)> {
        let ports = |proxies: &[Proxy]| -> Vec<String> {
            proxies
                .iter()
                .map(|proxy| proxy.port().to_string())
                .collect()
        };
        let of_rabbitmq = ports(&self.rabbitmq);
        let hosts: Vec<_> = of_rabbitmq
            .iter()
            .map(|port| format!("127.0.0.1:{port}"))
            .collect();
        let of_postgres = ports(&self.postgres);
        let mut variables = vec![
            (
                "POSTGRESQL_HOST".to_owned(),
                vec!["127.0.0.1"; of_postgres.len()].join(","),
            ),
            ("POSTGRESQL_PORT".to_owned(), of_postgres.join(",")),
        ];
        for vhost in ["SDK", "TASK", "CELERY"] {
            variables.push((format!("{vhost}_RABBITMQ_HOSTNAME"), hosts.join(",")));
        }
        variables
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for replica in &mut self.replicas {
            if let Some(child) = &mut replica.child {
                // It may have ended by itself.
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

/// One fault after the other, until the end.
pub fn run(
    site: &mut Site,
    random: &mut Rng,
    end: Instant,
) -> anyhow::Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    let half = Instant::now() + end.saturating_duration_since(Instant::now()) / 2;
    while Instant::now() < end {
        pause(Duration::from_millis(random.u64(200..2500)));
        let mut fault = Fault::random(random, site.extent());
        if site.postgres.len() > 1 && !site.has_failed_over && Instant::now() > half {
            fault = Fault::FailOver;
        }
        eprintln!("{}: {fault:?}", thread::current().name().unwrap_or("main"));
        site.inflict(fault)?;
        *counts.entry(fault.kind()).or_default() += 1;
    }
    Ok(counts)
}
