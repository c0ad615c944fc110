//! What befalls the service, as its seed has it.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use fastrand::Rng;

use crate::people::pause;
use crate::proxy::{End, Proxy, Weather};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    RabbitMq,
    Postgres,
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
    /// Killed and started again.
    RestartRabbitMq,
    RestartPostgres,
}

impl Fault {
    pub fn random(random: &mut Rng, replicas: usize) -> Fault {
        let replica = random.usize(..replicas);
        let line = if random.bool() {
            Line::RabbitMq
        } else {
            Line::Postgres
        };
        let time = Duration::from_millis(random.u64(500..4000));
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
            18 => Fault::RestartRabbitMq,
            _ => Fault::RestartPostgres,
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
            Fault::RestartRabbitMq => "RabbitMQ killed and started".to_owned(),
            Fault::RestartPostgres => "Postgres killed and started".to_owned(),
        }
    }
}

/// The private servers, and the replicas with their lines to them.
pub struct Site {
    pub folder: PathBuf,
    pub rabbitmq: u16,
    pub postgres: u16,
    /// When RabbitMQ was killed, and was there again.
    pub rabbitmq_kills: Vec<Range<Instant>>,
    program: PathBuf,
    replicas: Vec<Replica>,
}

struct Replica {
    child: Option<Child>,
    rabbitmq: Proxy,
    postgres: Proxy,
}

impl Site {
    pub fn new(
        folder: &Path,
        program: &Path,
        rabbitmq: u16,
        postgres: u16,
        replicas: usize,
    ) -> anyhow::Result<Site> {
        let replicas = (0..replicas)
            .map(|_| {
                anyhow::Ok(Replica {
                    child: None,
                    rabbitmq: Proxy::new(rabbitmq)?,
                    postgres: Proxy::new(postgres)?,
                })
            })
            .collect::<Result<_, _>>()?;
        let mut site = Site {
            folder: folder.to_owned(),
            rabbitmq,
            postgres,
            rabbitmq_kills: Vec::new(),
            program: program.to_owned(),
            replicas,
        };
        site.start_missing()?;
        Ok(site)
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
                .envs([
                    ("SDK_RABBITMQ_PORT", replica.rabbitmq.port().to_string()),
                    ("TASK_RABBITMQ_PORT", replica.rabbitmq.port().to_string()),
                    ("CELERY_RABBITMQ_PORT", replica.rabbitmq.port().to_string()),
                    ("POSTGRESQL_PORT", replica.postgres.port().to_string()),
                ])
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
            Fault::Cut(which, line, end) => self.line(which, line).cut(end),
            Fault::Weather(which, line, weather, time) => {
                self.line(which, line).set(weather);
                pause(time);
                self.line(which, line).set(Weather::Fair);
                self.line(which, line).cut(End::Rst);
            }
            Fault::RestartRabbitMq => {
                let killed = Instant::now();
                self.restart("rabbitmq", self.rabbitmq)?;
                let time = killed.elapsed().as_secs_f64();
                eprintln!("RabbitMQ was there again after {time:.1} s");
                self.rabbitmq_kills.push(killed..Instant::now());
            }
            Fault::RestartPostgres => self.restart("postgres", self.postgres)?,
        }
        self.start_missing()
    }

    fn line(&self, which: usize, line: Line) -> &Proxy {
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

    fn restart(&self, server: &str, port: u16) -> anyhow::Result<()> {
        for (command, arguments) in [("kill", vec![]), ("start", vec![port.to_string()])] {
            let folder = self.folder.join(server);
            let status = Command::new("./run.sh")
                .args(["private", command])
                .arg(folder)
                .args(arguments)
                .stdin(Stdio::null())
                .status()?;
            ensure!(status.success(), "{server} does not {command}");
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
    replicas: usize,
    end: Instant,
) -> anyhow::Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    while Instant::now() < end {
        pause(Duration::from_millis(random.u64(200..2500)));
        let fault = Fault::random(random, replicas);
        eprintln!("{}: {fault:?}", thread::current().name().unwrap_or("main"));
        site.inflict(fault)?;
        *counts.entry(fault.kind()).or_default() += 1;
    }
    Ok(counts)
}
