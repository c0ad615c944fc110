//! The environment variables, which are the names and defaults that OMOTES deployments use.

use std::fmt;
use std::net::SocketAddr;
use std::num::{NonZeroU16, NonZeroU32};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use log::LevelFilter;

use crate::job::TimeoutResult;
use crate::logger::Format;

#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The vhost of the SDK clients.
    pub sdk_rabbitmq: RabbitMq,
    /// The vhost of the workers' events.
    pub task_rabbitmq: RabbitMq,
    /// The vhost of the Celery tasks.
    pub celery_rabbitmq: RabbitMq,
    pub task_result_queue: String,
    pub task_progress_queue: String,
    pub postgres: Postgres,
    /// None where there is none to look after.
    pub influxdb: Option<InfluxDb>,
    /// How often it is looked after.
    pub time_series_period: Duration,
    /// Whether it is only said what would be done to time series.
    pub time_series_dry_run: bool,
    pub workflow_config_path: PathBuf,
    /// How long job rows and inactive time series are kept.
    pub job_retention: Duration,
    /// How long after a job's end its client is told, at the latest, that its outcome was lost.
    pub outcome_lost: Duration,
    /// No timeout is enforced this long after the start.
    pub timeout_start_buffer: Duration,
    /// Period of the check for timeouts and for what is past its retention.
    pub timeout_check_period: Duration,
    /// As what a client is told of its job's timeout.
    pub timeout_result: TimeoutResult,
    /// Whether jobs are refused whose parameters do not fit their workflow's definition.
    pub reject_invalid_params: bool,
    /// Whether clients whose jobs wait without a worker are told so, by a progress of 0.0.
    pub no_worker_notice: bool,
    /// How long it is known that a finished job has been.
    pub history_retention: Duration,
    /// Starts allowed per job; the next one ends it.
    pub delivery_limit: usize,
    pub handler_threads: usize,
    /// Where the health endpoint listens; None switches it off.
    pub http_bind: Option<SocketAddr>,
    /// `user:password`, which everything but the health asks for.
    pub http_basic_auth: Option<Secret>,
    pub log_level: LevelFilter,
    pub log_format: Format,
}

/// How to reach one vhost.
#[derive(Debug, Clone, PartialEq)]
pub struct RabbitMq {
    pub host: String,
    pub port: u16,
    pub username: String,
    pub password: Secret,
    pub vhost: String,
}

/// `user@host:port/vhost`, for messages.
impl fmt::Display for RabbitMq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RabbitMq {
            host,
            port,
            username,
            vhost,
            password: _,
        } = self;
        write!(f, "{username}@{host}:{port}/{vhost}")
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Postgres {
    pub host: String,
    pub port: u16,
    pub database: String,
    /// None is the operating system's user.
    pub username: Option<String>,
    pub password: Option<Secret>,
}

/// `host:port/database`, for messages.
impl fmt::Display for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.host, self.port, self.database)
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

/// Every variable that is wrong, one line each.
#[derive(Debug, PartialEq, thiserror::Error)]
pub struct Faults(Vec<String>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.join("\n"))
    }
}

impl Config {
    /// The configuration that `variable` gives, which looks a variable up by its name.
    ///
    /// # Errors
    /// All faults, each with the variable, its value and what was expected.
    pub fn read(variable: &dyn Fn(&str) -> Option<String>) -> Result<Config, Faults> {
        let mut reader = Reader {
            variable,
            faults: Vec::new(),
        };
        let config = Config {
            sdk_rabbitmq: reader.rabbitmq("SDK"),
            task_rabbitmq: reader.rabbitmq("TASK"),
            celery_rabbitmq: reader.rabbitmq("CELERY"),
            task_result_queue: reader
                .queue_name("TASK_RESULT_QUEUE_NAME", "omotes_task_result_events"),
            task_progress_queue: reader
                .queue_name("TASK_PROGRESS_QUEUE_NAME", "omotes_task_progress_events"),
            postgres: Postgres {
                host: reader.text("POSTGRESQL_HOST", "localhost"),
                port: reader.port("POSTGRESQL_PORT", 5432),
                database: reader.text("POSTGRESQL_DATABASE", "public"),
                username: variable("POSTGRESQL_USERNAME"),
                password: variable("POSTGRESQL_PASSWORD").map(Secret),
            },
            influxdb: reader.influxdb(),
            time_series_period: reader.period("TIME_SERIES_SCAN_SEC", 600),
            time_series_dry_run: reader.switch("TIME_SERIES_DRY_RUN"),
            job_retention: reader.seconds("JOB_RETENTION_SEC", 172_800),
            outcome_lost: reader.seconds("OUTCOME_LOST_SEC", 300),
            timeout_start_buffer: reader.seconds("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", 60),
            timeout_check_period: reader.period("TIMEOUT_JOB_HANDLER_RERUN_SEC", 30),
            timeout_result: reader.timeout_result(),
            reject_invalid_params: reader.switch("REJECT_INVALID_PARAMS"),
            no_worker_notice: reader.switch("NO_WORKER_NOTICE"),
            history_retention: reader.seconds("JOB_HISTORY_RETENTION_SEC", 30 * 24 * 60 * 60),
            workflow_config_path: reader
                .text("WORKFLOW_CONFIG_PATH", "config/workflow_config.json")
                .into(),
            delivery_limit: reader.count("DELIVERY_LIMIT_THRESHOLD_PER_JOB", 1, 1_000_000),
            handler_threads: reader.count("HANDLER_THREADS", 4, 256),
            http_bind: reader.http_bind(),
            http_basic_auth: reader.http_basic_auth(),
            log_level: reader.log_level(),
            log_format: reader.log_format(),
        };
        if reader.faults.is_empty() {
            Ok(config)
        } else {
            Err(Faults(reader.faults))
        }
    }

    /// The configuration of this process's environment.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn from_environment() -> Result<Config, Faults> {
        Config::read(&|name| {
            std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
        })
    }
}

struct Reader<'a> {
    variable: &'a dyn Fn(&str) -> Option<String>,
    faults: Vec<String>,
}

impl Reader<'_> {
    fn text(&self, name: &str, default: &str) -> String {
        (self.variable)(name).unwrap_or_else(|| default.to_owned())
    }

    /// The variable as `parse` takes it, or `default` where it is unset or faulty.
    fn parsed<T>(
        &mut self,
        name: &str,
        default: T,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> T {
        let Some(value) = (self.variable)(name) else {
            return default;
        };
        parse(value.trim()).unwrap_or_else(|| {
            self.faults
                .push(format!("{name}: found {value:?}, expected {expected}"));
            default
        })
    }

    fn port(&mut self, name: &str, default: u16) -> u16 {
        self.parsed(name, default, "a port from 1 to 65535", |value| {
            NonZeroU16::from_str(value).ok().map(NonZeroU16::get)
        })
    }

    fn count(&mut self, name: &str, default: usize, maximum: usize) -> usize {
        let expected = format!("a whole number from 1 to {maximum}");
        self.parsed(name, default, &expected, |value| {
            let count = value.parse().ok()?;
            (1..=maximum).contains(&count).then_some(count)
        })
    }

    fn seconds(&mut self, name: &str, default: u64) -> Duration {
        let expected = "a whole number of seconds, up to 32 bits";
        self.parsed(name, Duration::from_secs(default), expected, |value| {
            let seconds: u32 = value.parse().ok()?;
            Some(Duration::from_secs(seconds.into()))
        })
    }

    fn period(&mut self, name: &str, default: u64) -> Duration {
        let expected = "a whole number of seconds from 1, up to 32 bits";
        self.parsed(name, Duration::from_secs(default), expected, |value| {
            let seconds: NonZeroU32 = value.parse().ok()?;
            Some(Duration::from_secs(seconds.get().into()))
        })
    }

    fn timeout_result(&mut self) -> TimeoutResult {
        let default = TimeoutResult::Cancelled;
        self.parsed(
            "TIMEOUT_RESULT_TYPE",
            default,
            "CANCELLED or TIMEOUT",
            |value| match value.to_uppercase().as_str() {
                "CANCELLED" => Some(TimeoutResult::Cancelled),
                "TIMEOUT" => Some(TimeoutResult::TimedOut),
                _ => None,
            },
        )
    }

    fn queue_name(&mut self, name: &str, default: &str) -> String {
        let expected = "the name of a queue, 1 to 255 bytes";
        self.parsed(name, default.to_owned(), expected, |value| {
            (1..=255).contains(&value.len()).then(|| value.to_owned())
        })
    }

    fn rabbitmq(&mut self, prefix: &str) -> RabbitMq {
        let name = |suffix| format!("{prefix}_RABBITMQ_{suffix}");
        RabbitMq {
            host: self.text(&name("HOSTNAME"), "localhost"),
            port: self.port(&name("PORT"), 5672),
            username: self.text(&name("USERNAME"), "omotes"),
            password: self.text(&name("PASSWORD"), "guest").into(),
            vhost: self.text(&name("VIRTUALHOST"), "omotes"),
        }
    }

    fn influxdb(&mut self) -> Option<InfluxDb> {
        let protected = self.text("TIME_SERIES_PROTECTED_DATABASES", "");
        let influxdb = InfluxDb {
            host: self.text("INFLUXDB_HOST", "localhost"),
            port: self.port("INFLUXDB_PORT", 8096),
            database: self.text("INFLUXDB_DATABASE", "omotes_timeseries"),
            protected: protected
                .split(',')
                .map(|name| name.trim().to_owned())
                .filter(|name| !name.is_empty())
                .collect(),
            username: (self.variable)("INFLUXDB_USERNAME"),
            password: (self.variable)("INFLUXDB_PASSWORD").map(Secret),
        };
        (!influxdb.host.is_empty()).then_some(influxdb)
    }

    /// Off unless switched on.
    fn switch(&mut self, name: &str) -> bool {
        self.parsed(name, false, "true or false", |value| {
            match value.to_lowercase().as_str() {
                "true" => Some(true),
                "false" => Some(false),
                _ => None,
            }
        })
    }

    fn http_bind(&mut self) -> Option<SocketAddr> {
        let default = Some(SocketAddr::from(([127, 0, 0, 1], 8080)));
        let expected = "an address and port such as 127.0.0.1:8080, or nothing";
        self.parsed("HTTP_BIND", default, expected, |value| match value {
            "" => Some(None),
            value => value.parse().ok().map(Some),
        })
    }

    fn http_basic_auth(&mut self) -> Option<Secret> {
        let value = (self.variable)("HTTP_BASIC_AUTH").filter(|value| !value.is_empty())?;
        match value.split_once(':') {
            Some((user, password)) if !user.is_empty() && !password.is_empty() => {}
            // Not shown, for it may be nothing but a password.
            Some(_) | None => self
                .faults
                .push("HTTP_BASIC_AUTH: expected user:password".to_owned()),
        }
        Some(Secret(value))
    }

    fn log_format(&mut self) -> Format {
        self.parsed(
            "LOG_FORMAT",
            Format::Text,
            "text or json",
            |value| match value.to_lowercase().as_str() {
                "text" => Some(Format::Text),
                "json" => Some(Format::Json),
                _ => None,
            },
        )
    }

    fn log_level(&mut self) -> LevelFilter {
        let expected = "DEBUG, INFO, WARNING, ERROR or CRITICAL";
        self.parsed("LOG_LEVEL", LevelFilter::Info, expected, |value| {
            match value.to_uppercase().as_str() {
                "DEBUG" => Some(LevelFilter::Debug),
                "INFO" => Some(LevelFilter::Info),
                "WARNING" | "WARN" => Some(LevelFilter::Warn),
                // Nothing is logged above an error.
                "ERROR" | "CRITICAL" => Some(LevelFilter::Error),
                _ => None,
            }
        })
    }
}

/// How long opening a connection, or one step of it, may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn read(variables: &[(&str, &str)]) -> Result<Config, Faults> {
        Config::read(&|name| {
            variables
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_defaults_are_those_in_force() {
        let config = read(&[]).unwrap();
        assert_eq!(config.sdk_rabbitmq, config.celery_rabbitmq);
        assert_eq!(
            config.task_rabbitmq.to_string(),
            "omotes@localhost:5672/omotes"
        );
        assert_eq!(config.task_rabbitmq.password.reveal(), "guest");
        assert_eq!(config.task_result_queue, "omotes_task_result_events");
        assert_eq!(config.task_progress_queue, "omotes_task_progress_events");
        assert_eq!(config.postgres.to_string(), "localhost:5432/public");
        assert_eq!(config.postgres.username, None);
        assert_eq!(config.delivery_limit, 1);
        assert_eq!(config.http_bind, Some("127.0.0.1:8080".parse().unwrap()));
        assert_eq!(config.log_level, LevelFilter::Info);
    }

    #[test]
    fn each_connection_has_its_own_variables() {
        let config = read(&[
            ("TASK_RABBITMQ_HOSTNAME", "rabbit"),
            ("TASK_RABBITMQ_PORT", "5673"),
            ("TASK_RABBITMQ_VIRTUALHOST", "omotes_celery"),
            ("CELERY_RABBITMQ_USERNAME", "celery"),
        ])
        .unwrap();
        assert_eq!(
            config.task_rabbitmq.to_string(),
            "omotes@rabbit:5673/omotes_celery"
        );
        assert_eq!(
            config.celery_rabbitmq.to_string(),
            "celery@localhost:5672/omotes"
        );
    }

    #[test]
    fn an_empty_host_switches_influxdb_off() {
        assert_eq!(read(&[("INFLUXDB_HOST", "")]).unwrap().influxdb, None);
        let config = read(&[("TIME_SERIES_PROTECTED_DATABASES", "a, b,")]).unwrap();
        assert_eq!(config.influxdb.unwrap().protected, ["a", "b"]);
    }

    #[test]
    fn an_empty_bind_switches_http_off() {
        assert_eq!(read(&[("HTTP_BIND", "")]).unwrap().http_bind, None);
    }

    #[rstest]
    #[case("debug", LevelFilter::Debug)]
    #[case("Info", LevelFilter::Info)]
    #[case("WARNING", LevelFilter::Warn)]
    #[case("error", LevelFilter::Error)]
    #[case("CRITICAL", LevelFilter::Error)]
    fn levels_have_pythons_names(#[case] name: &str, #[case] level: LevelFilter) {
        assert_eq!(read(&[("LOG_LEVEL", name)]).unwrap().log_level, level);
    }

    #[test]
    fn all_faults_are_reported_at_once() {
        let faults = read(&[
            ("SDK_RABBITMQ_PORT", "fivesixseventwo"),
            ("POSTGRESQL_PORT", "0"),
            ("DELIVERY_LIMIT_THRESHOLD_PER_JOB", "-1"),
            ("JOB_RETENTION_SEC", "2 days"),
            ("TIMEOUT_JOB_HANDLER_RERUN_SEC", "0"),
            ("TIMEOUT_RESULT_TYPE", "ERROR"),
            ("HTTP_BIND", "8080"),
            ("LOG_LEVEL", "LOUD"),
            ("TASK_RESULT_QUEUE_NAME", ""),
        ])
        .unwrap_err();
        assert_eq!(
            faults.to_string(),
            "SDK_RABBITMQ_PORT: found \"fivesixseventwo\", expected a port from 1 to 65535\n\
             TASK_RESULT_QUEUE_NAME: found \"\", expected the name of a queue, 1 to 255 bytes\n\
             POSTGRESQL_PORT: found \"0\", expected a port from 1 to 65535\n\
             JOB_RETENTION_SEC: found \"2 days\", expected a whole number of seconds, up to 32 bits\n\
             TIMEOUT_JOB_HANDLER_RERUN_SEC: found \"0\", expected a whole number of seconds from 1, up to 32 bits\n\
             TIMEOUT_RESULT_TYPE: found \"ERROR\", expected CANCELLED or TIMEOUT\n\
             DELIVERY_LIMIT_THRESHOLD_PER_JOB: found \"-1\", expected a whole number from 1 to 1000000\n\
             HTTP_BIND: found \"8080\", expected an address and port such as 127.0.0.1:8080, or nothing\n\
             LOG_LEVEL: found \"LOUD\", expected DEBUG, INFO, WARNING, ERROR or CRITICAL"
        );
    }

    #[test]
    fn a_password_is_not_shown() {
        let config = read(&[
            ("SDK_RABBITMQ_PASSWORD", "hunter2"),
            ("POSTGRESQL_PASSWORD", "hunter2"),
        ]);
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}
