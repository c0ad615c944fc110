//! The environment variables, which are the names and defaults that OMOTES deployments use.

pub mod environment;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use log::LevelFilter;
use serde::Serialize;

use self::reader::Reader;
use crate::domain::job::TimeoutResult;
use crate::domain::vhost::Vhost;
use crate::domain::workflow::Catalogue;
use crate::text_file;
use crate::tls::{Roots, Tls};

pub mod limits;
mod reader;

#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Which variables are set.
    pub variables: Vec<String>,
    /// The vhost of the SDK clients.
    pub sdk_rabbitmq: RabbitMq,
    /// The vhost of the workers' events.
    pub task_rabbitmq: RabbitMq,
    /// The vhost of the Celery tasks.
    pub celery_rabbitmq: RabbitMq,
    pub task_result_queue: String,
    pub task_progress_queue: String,
    pub postgres: Postgres,
    /// None if there is none to clean up.
    pub influxdb: Option<InfluxDb>,
    /// How often it is scanned.
    pub time_series_period: Duration,
    /// Whether the scan only logs what it would do.
    pub time_series_dry_run: bool,
    pub workflow_config_path: PathBuf,
    /// How long job rows and inactive time series are kept.
    pub job_retention: Duration,
    /// How long after a job's end its client is told, at the latest, that its outcome was lost.
    pub outcome_lost: Duration,
    /// How long after a submission its client is told the job's outcome, at the earliest.
    pub outcome_delay: Duration,
    /// No timeout is enforced this long after the start.
    pub timeout_start_buffer: Duration,
    /// Period of the check for timeouts and for what is past its retention.
    pub timeout_check_period: Duration,
    /// How a timeout is reported to the client.
    pub timeout_result: TimeoutResult,
    /// Whether jobs are refused whose parameters do not fit their workflow's definition.
    pub reject_invalid_params: bool,
    /// Whether anything of workers' logs is kept of jobs that have ended.
    pub keep_logs: bool,
    /// For how long what clients submit is kept, for another run of it; zero if never.
    pub keep_inputs: Duration,
    /// For how long the output ESDL of a job is kept whose client has gone; zero if never.
    pub keep_results: Duration,
    /// Whether jobs' parameters are kept, for whoever looks at them.
    pub keep_parameters: bool,
    /// Whether clients whose jobs wait without a worker are told so, by a progress of 0.0.
    pub no_worker_notice: bool,
    /// With each such time that a task has waited for its turn, its priority rises by one level;
    /// never if it is zero.
    pub priority_aging: Duration,
    /// Ends the owner at the beginning of a job's reference.
    pub fair_share_separator: String,
    /// How often the workers are asked what they do; None if never.
    pub workers_period: Option<Duration>,
    /// For how long no worker may have a running job's task before the job ends; None if it never does
    /// for that.
    pub task_lost: Option<Duration>,
    /// How long the history of a finished job is kept.
    pub history_retention: Duration,
    /// Starts allowed per job; the next one ends it.
    pub delivery_limit: usize,
    pub handler_threads: usize,
    /// Where the health endpoint listens; None switches it off.
    pub http_bind: Option<SocketAddr>,
    /// `user:password`, which everything but the health asks for; whoever has it may act.
    pub http_basic_auth: Option<Secret>,
    /// The same of an account that may only look.
    pub http_readonly_auth: Option<Secret>,
    /// Who is told of troubles; None if nobody is.
    pub alerts: Option<Alerts>,
    pub log_level: LevelFilter,
    pub log_format: LogFormat,
}

/// Where troubles are told, and which.
#[derive(Debug, Clone, PartialEq)]
pub struct Alerts {
    /// Whoever has it can write there.
    pub url: Secret,
    /// Whose signature the receiver's certificate has.
    pub roots: Roots,
    /// How long most of them have to last before they are told.
    pub after: Duration,
    /// How long a job may wait before it is one.
    pub queue_age: Duration,
}

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// `<time> <level> <thread> <message>`.
    Text,
    /// An object with these, and with what else is known of the record: `job`, `reference`,
    /// `workflow`, `task`, `account`.
    Json,
}

/// How to reach one vhost.
#[derive(Debug, Clone, PartialEq)]
pub struct RabbitMq {
    /// One or more of the same cluster, of which any will do.
    pub servers: Vec<Address>,
    pub username: String,
    pub password: Secret,
    pub vhost: String,
    /// None for a connection without TLS.
    pub tls: Option<Tls>,
}

impl RabbitMq {
    /// `host:port`, of all servers.
    pub fn listed(&self) -> String {
        listed(&self.servers)
    }
}

/// `user@host:port/vhost`, with all servers, for messages.
impl fmt::Display for RabbitMq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RabbitMq {
            servers,
            username,
            vhost,
            password: _,
            tls: _,
        } = self;
        write!(f, "{username}@{}/{vhost}", listed(servers))
    }
}

fn listed(servers: &[Address]) -> String {
    let servers: Vec<_> = servers.iter().map(Address::to_string).collect();
    servers.join(",")
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// A name, an IP address or, of Postgres, the folder of a socket.
    pub host: String,
    pub port: u16,
}

/// `host:port`, for messages.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Address { host, port } = self;
        write!(f, "{host}:{port}")
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Postgres {
    /// One or more; of several, the one is used that takes writes.
    pub servers: Vec<Address>,
    pub database: String,
    /// None stands for the operating system's user.
    pub username: Option<String>,
    pub password: Option<Secret>,
    /// Of connections by TCP; see [`Postgres::encryption_to`].
    pub encryption: Encryption,
    /// A pooler stands before it, which may give each transaction another session.
    pub is_pooled: bool,
}

impl Postgres {
    /// When connections to one of the servers are in TLS: a socket in the file system needs none,
    /// and has none.
    pub fn encryption_to(&self, server: &Address) -> &Encryption {
        match server.host.starts_with('/') {
            true => &Encryption::Never,
            false => &self.encryption,
        }
    }
}

/// When connections to Postgres are in TLS.
#[derive(Debug, Clone, PartialEq)]
pub enum Encryption {
    Never,
    /// If Postgres refuses them otherwise.
    WhereRequired(Tls),
    /// If Postgres can, and nothing goes wrong with it.
    WhereOffered(Tls),
    Always(Tls),
}

/// `host:port/database`, with all servers, for messages.
impl fmt::Display for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", listed(&self.servers), self.database)
    }
}

/// InfluxDB 1.x, which holds the time series of output ESDLs.
#[derive(Debug, Clone, PartialEq)]
pub struct InfluxDb {
    pub host: String,
    pub port: u16,
    /// Never dropped, as are those of `protected`.
    pub database: String,
    pub protected: Vec<String>,
    pub username: Option<String>,
    pub password: Option<Secret>,
}

/// A text that no message shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text, for the connection that needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Secret(text)
    }
}

/// All faulty variables, one line each.
#[derive(Debug, PartialEq, thiserror::Error)]
pub struct Faults(Vec<String>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.join("\n"))
    }
}

impl Config {
    /// How many servers each connection to RabbitMQ has.
    pub fn servers(&self) -> [(Vhost, usize); 3] {
        Vhost::ALL.map(|vhost| (vhost, self.rabbitmq(vhost).servers.len()))
    }

    /// One of the three connections.
    pub fn rabbitmq(&self, vhost: Vhost) -> &RabbitMq {
        match vhost {
            Vhost::Sdk => &self.sdk_rabbitmq,
            Vhost::Task => &self.task_rabbitmq,
            Vhost::Celery => &self.celery_rabbitmq,
        }
    }

    /// Reads the configuration through `variable`, which looks a variable up by its name, and the
    /// files that it names.
    ///
    /// # Errors
    /// All faults, each with the variable, its value and what was expected.
    pub fn read(variable: &dyn Fn(&str) -> Option<String>) -> Result<Config, Faults> {
        let mut reader = Reader::new(variable);
        let mut config = reader.config();
        let given = reader.settings.iter().filter(|one| one.is_given);
        config.variables = given.map(|one| one.name.clone()).collect();
        if reader.faults.is_empty() {
            Ok(config)
        } else {
            Err(Faults(reader.faults))
        }
    }

    /// All variables with their values in force, in the order in which they are read; faulty ones
    /// too.
    pub fn settings(variable: &dyn Fn(&str) -> Option<String>) -> Vec<Setting> {
        let mut reader = Reader::new(variable);
        reader.config();
        reader.settings
    }

    /// The configuration of this process's environment, without a file beside it.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn from_environment() -> Result<Config, Faults> {
        Config::read(&Config::variable)
    }

    /// A variable of this process's environment.
    pub fn variable(name: &str) -> Option<String> {
        std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
    }
}

/// A variable as it is in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setting {
    pub name: String,
    /// The default where it is not set. Not that of a password.
    pub value: String,
    pub is_given: bool,
}

/// Reads the workflow definitions.
///
/// # Errors
/// The file cannot be read, or all that is wrong with what is in it.
pub fn read_catalogue(path: &Path) -> anyhow::Result<Catalogue> {
    let name = || format!("workflow definitions {}", path.display());
    let text = text_file::read(path).with_context(name)?;
    Catalogue::parse(&text).with_context(name)
}

/// How long a job may wait before that is a trouble, where nobody says.
pub const QUEUE_AGE: Duration = Duration::from_hours(1);

/// How long opening a connection, or one step of it, may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests;
