//! Reads each environment variable, and notes what is wrong with it.

use std::net::SocketAddr;
use std::num::{NonZeroU16, NonZeroU32};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use log::LevelFilter;
use ureq::http::Uri;

use super::{
    Address, Alerts, Config, Encryption, InfluxDb, LogFormat, Postgres, QUEUE_AGE, RabbitMq,
    Secret, Setting,
};
use crate::domain::job::TimeoutResult;
use crate::domain::vhost::Vhost;
use crate::text_file;
use crate::tls::{Check, Identity, Roots, Tls};

/// libpq's `sslmode`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum SslMode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// Why a message does not show what was found.
const NOT_SHOWN: &str = " (what was found is not shown, for it may be a password)";

/// Whether a value can be shown: it is no password, and contains none, even if somebody has
/// confused two variables.
fn may_be_shown(name: &str, value: &str) -> bool {
    if value.is_empty() {
        return true;
    }
    if ["PASSWORD", "_AUTH", "_URL"]
        .iter()
        .any(|end| name.ends_with(end))
    {
        return false;
    }
    if ["PASSWORD_FILE", "_AUTH_FILE", "_URL_FILE"]
        .iter()
        .any(|end| name.ends_with(end))
    {
        // A password has no folder that is there; `/` is, and some begin with it.
        let folder = Path::new(value).parent();
        return folder.is_some_and(|folder| folder.file_name().is_some() && folder.is_dir());
    }
    // The name and the password before a URL's host; a key that stands where its file should.
    let is_key = value.contains(['\n', '\r']) || value.contains("-----BEGIN");
    let has_user = value.contains('@') && value.contains(':');
    !is_key && !has_user
}

fn port(text: &str) -> Option<u16> {
    NonZeroU16::from_str(text).ok().map(NonZeroU16::get)
}

/// Reads the variables one after the other.
pub(super) struct Reader<'a> {
    variable: &'a dyn Fn(&str) -> Option<String>,
    pub(super) faults: Vec<String>,
    /// The settings read so far.
    pub(super) settings: Vec<Setting>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(variable: &'a dyn Fn(&str) -> Option<String>) -> Reader<'a> {
        Reader {
            variable,
            faults: Vec::new(),
            settings: Vec::new(),
        }
    }

    /// All of it, with the default in place of what is faulty.
    pub(super) fn config(&mut self) -> Config {
        let reader = self;
        let config = Config {
            variables: Vec::new(),
            sdk_rabbitmq: reader.rabbitmq(Vhost::Sdk),
            task_rabbitmq: reader.rabbitmq(Vhost::Task),
            celery_rabbitmq: reader.rabbitmq(Vhost::Celery),
            task_result_queue: reader
                .queue_name("TASK_RESULT_QUEUE_NAME", "omotes_task_result_events"),
            task_progress_queue: reader
                .queue_name("TASK_PROGRESS_QUEUE_NAME", "omotes_task_progress_events"),
            postgres: reader.postgres(),
            influxdb: reader.influxdb(),
            time_series_period: reader.period("TIME_SERIES_SCAN_SEC", 600),
            time_series_dry_run: reader.switch("TIME_SERIES_DRY_RUN"),
            job_retention: reader.seconds("JOB_RETENTION_SEC", 172_800),
            outcome_lost: reader.seconds("OUTCOME_LOST_SEC", 300),
            outcome_delay: reader.outcome_delay(),
            timeout_start_buffer: reader.seconds("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", 60),
            timeout_check_period: reader.period("TIMEOUT_JOB_HANDLER_RERUN_SEC", 30),
            timeout_result: reader.timeout_result(),
            reject_invalid_params: reader.switch("REJECT_INVALID_PARAMS"),
            keep_logs: reader.switch_from("KEEP_LOGS", "true"),
            keep_inputs: reader.seconds("KEEP_INPUTS_SEC", 0),
            keep_results: reader.seconds("KEEP_RESULTS_SEC", 0),
            keep_parameters: reader.switch_from("KEEP_PARAMETERS", "true"),
            no_worker_notice: reader.switch("NO_WORKER_NOTICE"),
            priority_aging: reader.seconds("PRIORITY_AGING_SEC", 3600),
            fair_share_separator: reader.text("FAIR_SHARE_SEPARATOR", "/"),
            workers_period: reader.workers_period(),
            task_lost: reader.task_lost(),
            history_retention: reader.seconds("JOB_HISTORY_RETENTION_SEC", 30 * 24 * 60 * 60),
            workflow_config_path: reader
                .text("WORKFLOW_CONFIG_PATH", "config/workflow_config.json")
                .into(),
            delivery_limit: reader.count("DELIVERY_LIMIT_THRESHOLD_PER_JOB", 1, 1_000_000),
            handler_threads: reader.count("HANDLER_THREADS", 4, 256),
            http_bind: reader.http_bind(),
            http_basic_auth: reader.http_account("HTTP_BASIC_AUTH"),
            http_readonly_auth: reader.http_account("HTTP_READONLY_AUTH"),
            alerts: reader.alerts(),
            log_level: reader.log_level(),
            log_format: reader.log_format(),
        };
        reader.check_accounts(&config);
        reader.check_what_is_kept(&config);
        config
    }

    /// A submission is kept as a whole.
    fn check_what_is_kept(&mut self, config: &Config) {
        if !config.keep_parameters && !config.keep_inputs.is_zero() {
            self.faults.push(
                "KEEP_INPUTS_SEC: with it parameters are kept too, which KEEP_PARAMETERS=false forbids"
                    .to_owned(),
            );
        }
    }

    /// The variable's value, if it is set. All lookups go through here.
    fn given(&mut self, name: &str, default: &str) -> Option<String> {
        let value = (self.variable)(name);
        let text = value.as_deref().unwrap_or(default);
        self.settings.push(Setting {
            name: name.to_owned(),
            value: match may_be_shown(name, text) {
                true => text.to_owned(),
                false => format!("{:?}", Secret(text.to_owned())),
            },
            is_given: value.is_some(),
        });
        value
    }

    fn text(&mut self, name: &str, default: &str) -> String {
        self.given(name, default)
            .unwrap_or_else(|| default.to_owned())
    }

    /// The variable, or `default` where it is unset or faulty, as `parse` takes it.
    fn parsed<T>(
        &mut self,
        name: &str,
        default: &str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> T {
        let value = self.given(name, default);
        let parsed = value.as_ref().and_then(|value| parse(value.trim()));
        if let (Some(value), None) = (&value, &parsed) {
            self.faults.push(match may_be_shown(name, value) {
                true => format!("{name}: found {value:?}, expected {expected}"),
                false => format!("{name}: expected {expected}{NOT_SHOWN}"),
            });
        }
        parsed
            .or_else(|| parse(default))
            .expect("a default is of its own kind")
    }

    fn port(&mut self, name: &str, default: u16) -> u16 {
        let expected = self.expected_port(name);
        self.parsed(name, &default.to_string(), expected, port)
    }

    fn expected_port(&self, name: &str) -> &'static str {
        match (self.variable)(name) {
            Some(value) if value.trim_start().starts_with("tcp://") => {
                "a port from 1 to 65535; this is how Kubernetes tells of a service whose name the variable \
                 happens to begin with: `enableServiceLinks: false` in the pod's spec switches that off"
            }
            Some(_) | None => "a port from 1 to 65535",
        }
    }

    /// Servers as libpq takes them: hosts between commas, and a port for all or one for each.
    fn addresses(&mut self, hosts_name: &str, ports_name: &str, default: u16) -> Vec<Address> {
        let hosts = self.hosts(hosts_name);
        let expected = self.expected_port(ports_name);
        let ports = self.parsed(ports_name, &default.to_string(), expected, |value| {
            let ports: Option<Vec<_>> = value.split(',').map(|one| port(one.trim())).collect();
            ports
        });
        if ports.len() != 1 && ports.len() != hosts.len() {
            self.faults.push(format!(
                "{ports_name}: found {} ports, expected one, or as many as there are hosts in \
                 {hosts_name}, {}",
                ports.len(),
                hosts.len()
            ));
        }
        hosts
            .into_iter()
            .zip(ports.into_iter().cycle())
            .map(|(host, port)| Address { host, port })
            .collect()
    }

    /// Servers of a cluster: hosts between commas, each with a port of its own behind a colon or
    /// with that of all.
    fn nodes(&mut self, hosts_name: &str, port_name: &str, default: u16) -> Vec<Address> {
        let hosts = self.hosts(hosts_name);
        let port_of_all = self.port(port_name, default);
        let mut nodes = Vec::new();
        for text in hosts {
            let (host, its_port) = match text.rsplit_once(':') {
                // It has been found fault with.
                Some(_) if text.contains("://") || text.contains('@') => (&*text, None),
                // An IPv6 address without a port.
                Some((rest, _)) if rest.contains(':') && !rest.ends_with(']') => (&*text, None),
                Some((host, its_port)) => (host, Some(its_port)),
                None => (&*text, None),
            };
            let found = its_port.map_or(Some(port_of_all), port);
            if found.is_none() {
                self.faults.push(format!(
                    "{hosts_name}: found {text:?}, expected a host, or host:port with a port from 1 \
                     to 65535"
                ));
            }
            nodes.push(Address {
                host: host.trim_matches(['[', ']']).to_owned(),
                port: found.unwrap_or(default),
            });
        }
        nodes
    }

    /// Hosts between commas.
    fn hosts(&mut self, name: &str) -> Vec<String> {
        let text = self.host(name);
        let hosts: Vec<_> = text.split(',').map(|host| host.trim().to_owned()).collect();
        if hosts.iter().any(String::is_empty) && may_be_shown(name, &text) {
            self.faults.push(format!(
                "{name}: found {text:?}, expected a host, or several between commas, none of them \
                 empty"
            ));
        }
        hosts
    }

    /// The name or the address of a host, or a folder with a socket.
    fn host(&mut self, name: &str) -> String {
        let host = self.text(name, "localhost");
        // In a URL, or before an @, there may be a password, and hosts are shown.
        if host.contains("://") || host.contains('@') {
            let fault = format!("{name}: expected a host's name or address, not a URL{NOT_SHOWN}");
            self.faults.push(fault);
        }
        host
    }

    fn count(&mut self, name: &str, default: usize, maximum: usize) -> usize {
        let expected = format!("a whole number from 1 to {maximum}");
        self.parsed(name, &default.to_string(), &expected, |value| {
            let count = value.parse().ok()?;
            (1..=maximum).contains(&count).then_some(count)
        })
    }

    fn seconds(&mut self, name: &str, default: u64) -> Duration {
        let expected = "a whole number of seconds, up to 32 bits";
        self.parsed(name, &default.to_string(), expected, |value| {
            let seconds: u32 = value.parse().ok()?;
            Some(Duration::from_secs(seconds.into()))
        })
    }

    fn period(&mut self, name: &str, default: u64) -> Duration {
        let expected = "a whole number of seconds from 1, up to 32 bits";
        self.parsed(name, &default.to_string(), expected, |value| {
            let seconds: NonZeroU32 = value.parse().ok()?;
            Some(Duration::from_secs(seconds.get().into()))
        })
    }

    fn workers_period(&mut self) -> Option<Duration> {
        let expected = "a whole number of seconds from 5 to 60, or 0";
        let period = self.parsed("WORKERS_PERIOD_SEC", "15", expected, |value| {
            let seconds = value.parse().ok()?;
            (seconds == 0 || (5..=60).contains(&seconds)).then(|| Duration::from_secs(seconds))
        });
        Some(period).filter(|period| !period.is_zero())
    }

    /// At least four looks: fewer might miss a task that changes hands.
    fn task_lost(&mut self) -> Option<Duration> {
        let expected = "a whole number of seconds from 60, up to 32 bits, or 0";
        let time = self.parsed("TASK_LOST_SEC", "0", expected, |value| {
            let seconds: u32 = value.parse().ok()?;
            (seconds == 0 || seconds >= 60).then(|| Duration::from_secs(seconds.into()))
        });
        Some(time).filter(|time| !time.is_zero())
    }

    /// A message whose outcome waits stays unacked, and RabbitMQ closes the channel of a consumer
    /// that does not acknowledge for 30 minutes: hence the limit.
    fn outcome_delay(&mut self) -> Duration {
        let expected = "a whole number of milliseconds, up to 600000";
        self.parsed("OUTCOME_DELAY_MS", "1000", expected, |value| {
            let millis = value.parse().ok().filter(|millis| *millis <= 600_000)?;
            Some(Duration::from_millis(millis))
        })
    }

    fn timeout_result(&mut self) -> TimeoutResult {
        self.parsed(
            "TIMEOUT_RESULT_TYPE",
            "CANCELLED",
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
        self.parsed(name, default, expected, |value| {
            (1..=255).contains(&value.len()).then(|| value.to_owned())
        })
    }

    /// The file that a variable names; an empty name is none.
    fn path(&mut self, name: &str) -> Option<PathBuf> {
        let path = self.given(name, "").filter(|path| !path.is_empty())?;
        if path.contains(['\n', '\r']) {
            let fault =
                format!("{name}: expected the path of a file, not what is in it{NOT_SHOWN}");
            self.faults.push(fault);
            return None;
        }
        Some(PathBuf::from(path))
    }

    /// The variable's value, or the content of the file that `<name>_FILE` names.
    fn password(&mut self, name: &str, default: &str) -> Option<Secret> {
        let value = self.given(name, default);
        let file_name = format!("{name}_FILE");
        let Some(path) = self.path(&file_name) else {
            return value.map(Secret);
        };
        // The file's content is in force.
        self.settings.retain(|setting| setting.name != name);
        let (file, more) = match may_be_shown(&file_name, &path.to_string_lossy()) {
            true => (format!("{}: ", path.display()), ""),
            false => (String::new(), NOT_SHOWN),
        };
        if value.is_some_and(|value| !value.is_empty()) {
            self.faults.push(if more.is_empty() {
                format!(
                    "{file_name}: found {}, but {name} is set too",
                    path.display()
                )
            } else {
                format!("{file_name}: set, but {name} is set too")
            });
            return None;
        }
        match text_file::read(&path) {
            Ok(text) => {
                let line = text.strip_suffix('\n').unwrap_or(&text);
                Some(Secret(line.strip_suffix('\r').unwrap_or(line).to_owned()))
            }
            Err(error) => {
                self.faults
                    .push(format!("{file_name}: {file}{error:#}{more}"));
                None
            }
        }
    }

    /// The authorities in a file.
    fn roots(&mut self, name: &str, path: PathBuf) -> Roots {
        let roots = Roots::File(path);
        if let Err(error) = roots.read() {
            self.faults.push(format!("{name}: {error:#}"));
        }
        roots
    }

    fn identity(&mut self, certificate_name: &str, key_name: &str) -> Option<Identity> {
        let (certificate, key) = match (self.path(certificate_name), self.path(key_name)) {
            (Some(certificate), Some(key)) => (certificate, key),
            (None, None) => return None,
            (Some(_), None) => {
                self.faults.push(format!(
                    "{key_name}: not set, although {certificate_name} is"
                ));
                return None;
            }
            (None, Some(_)) => {
                self.faults.push(format!(
                    "{certificate_name}: not set, although {key_name} is"
                ));
                return None;
            }
        };
        let identity = Identity { certificate, key };
        if let Err(error) = identity.check() {
            self.faults
                .push(format!("{certificate_name}, {key_name}: {error:#}"));
        }
        Some(identity)
    }

    fn rabbitmq(&mut self, vhost: Vhost) -> RabbitMq {
        let name = |suffix| format!("{}_RABBITMQ_{suffix}", vhost.name());
        let tls = self.rabbitmq_tls(&name);
        let default_port = if tls.is_some() { 5671 } else { 5672 };
        RabbitMq {
            servers: self.nodes(&name("HOSTNAME"), &name("PORT"), default_port),
            username: self.text(&name("USERNAME"), "omotes"),
            password: self
                .password(&name("PASSWORD"), "guest")
                .unwrap_or_else(|| Secret("guest".to_owned())),
            vhost: self.text(&name("VIRTUALHOST"), "omotes"),
            tls,
        }
    }

    fn rabbitmq_tls(&mut self, name: &dyn Fn(&'static str) -> String) -> Option<Tls> {
        let switch = name("TLS");
        let files = ["TLS_CA_FILE", "TLS_CERT_FILE", "TLS_KEY_FILE"].map(name);
        if !self.switch(&switch) {
            // Whoever configures certificates does not want the password sent without TLS.
            for file in files {
                if self.path(&file).is_some() {
                    self.faults
                        .push(format!("{file}: set, although {switch} is not true"));
                }
            }
            return None;
        }
        let [authorities, certificate, key] = files;
        let roots = match self.path(&authorities) {
            Some(path) => self.roots(&authorities, path),
            None => Roots::System,
        };
        Some(Tls {
            check: Check::Name(roots),
            identity: self.identity(&certificate, &key),
        })
    }

    fn postgres(&mut self) -> Postgres {
        Postgres {
            servers: self.addresses("POSTGRESQL_HOST", "POSTGRESQL_PORT", 5432),
            encryption: self.postgres_encryption(),
            database: self.text("POSTGRESQL_DATABASE", "public"),
            username: self.given("POSTGRESQL_USERNAME", ""),
            password: self.password("POSTGRESQL_PASSWORD", ""),
            is_pooled: self.parsed(
                "POSTGRESQL_POOLER",
                "none",
                "none or transaction",
                |value| match value {
                    "none" => Some(false),
                    "transaction" => Some(true),
                    _ => None,
                },
            ),
        }
    }

    /// With the meanings that libpq gives to `sslmode` and `sslrootcert`.
    fn postgres_encryption(&mut self) -> Encryption {
        const MODE: &str = "POSTGRESQL_SSLMODE";
        const ROOTS: &str = "POSTGRESQL_SSLROOTCERT";
        let roots = match self.path(ROOTS) {
            None => None,
            Some(path) if path.as_os_str() == "system" => Some(Roots::System),
            Some(path) => Some(self.roots(ROOTS, path)),
        };
        let system = roots == Some(Roots::System);
        let default = if system { "verify-full" } else { "prefer" };
        let expected = "disable, allow, prefer, require, verify-ca or verify-full";
        let mode = self.parsed(MODE, default, expected, |value| match value {
            "disable" => Some(SslMode::Disable),
            "allow" => Some(SslMode::Allow),
            "prefer" => Some(SslMode::Prefer),
            "require" => Some(SslMode::Require),
            "verify-ca" => Some(SslMode::VerifyCa),
            "verify-full" => Some(SslMode::VerifyFull),
            _ => None,
        });
        let identity = self.identity("POSTGRESQL_SSLCERT", "POSTGRESQL_SSLKEY");
        // Anybody can have a certificate that one of the system's authorities has signed.
        if system && mode != SslMode::VerifyFull {
            self.faults.push(format!(
                "{MODE}: expected verify-full, as {ROOTS} is system"
            ));
        }
        if roots.is_none() && [SslMode::VerifyCa, SslMode::VerifyFull].contains(&mode) {
            self.faults.push(format!(
                "{ROOTS}: not set, expected a PEM file, or system, as {MODE} is one that verifies"
            ));
        }
        let check = match roots {
            None => Check::Nothing,
            Some(roots) if mode == SslMode::VerifyFull => Check::Name(roots),
            Some(roots) => Check::Authority(roots),
        };
        let tls = Tls { check, identity };
        match mode {
            SslMode::Disable => Encryption::Never,
            SslMode::Allow => Encryption::WhereRequired(tls),
            SslMode::Prefer => Encryption::WhereOffered(tls),
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => Encryption::Always(tls),
        }
    }

    fn influxdb(&mut self) -> Option<InfluxDb> {
        let protected = self.text("TIME_SERIES_PROTECTED_DATABASES", "");
        let influxdb = InfluxDb {
            host: self.host("INFLUXDB_HOST"),
            port: self.port("INFLUXDB_PORT", 8096),
            database: self.text("INFLUXDB_DATABASE", "omotes_timeseries"),
            protected: protected
                .split(',')
                .map(|name| name.trim().to_owned())
                .filter(|name| !name.is_empty())
                .collect(),
            username: self.given("INFLUXDB_USERNAME", ""),
            password: self.password("INFLUXDB_PASSWORD", ""),
        };
        (!influxdb.host.is_empty()).then_some(influxdb)
    }

    /// Off unless switched on.
    fn switch(&mut self, name: &str) -> bool {
        self.switch_from(name, "false")
    }

    fn switch_from(&mut self, name: &str, default: &'static str) -> bool {
        self.parsed(name, default, "true or false", |value| {
            match value.to_lowercase().as_str() {
                "true" => Some(true),
                "false" => Some(false),
                _ => None,
            }
        })
    }

    fn http_bind(&mut self) -> Option<SocketAddr> {
        let expected = "an address and port such as 127.0.0.1:8080, or nothing";
        self.parsed(
            "HTTP_BIND",
            "127.0.0.1:8080",
            expected,
            |value| match value {
                "" => Some(None),
                value => value.parse().ok().map(Some),
            },
        )
    }

    /// `user:password`.
    fn http_account(&mut self, name: &str) -> Option<Secret> {
        let account = self.password(name, "")?;
        let is_in_file =
            (self.variable)(&format!("{name}_FILE")).is_some_and(|file| !file.is_empty());
        match account.reveal().split_once(':') {
            // As the template has it. An empty file is a secret that is missing.
            None if account.reveal().is_empty() && !is_in_file => return None,
            Some((user, password)) if !user.is_empty() && !password.is_empty() => {}
            // Not shown, since it may be just a password.
            Some(_) | None => self.faults.push(format!("{name}: expected user:password")),
        }
        Some(account)
    }

    /// Who acts is told by the user's name, so each account has another one.
    fn check_accounts(&mut self, config: &Config) {
        let user = |account: &Option<Secret>| {
            let name = account.as_ref()?.reveal().split(':').next()?;
            Some(name.to_owned())
        };
        let reader = user(&config.http_readonly_auth);
        if reader.is_some() && user(&config.http_basic_auth) == reader {
            let fault = "HTTP_READONLY_AUTH: expected another user than that of HTTP_BASIC_AUTH";
            self.faults.push(fault.to_owned());
        }
    }

    fn alerts(&mut self) -> Option<Alerts> {
        const URL: &str = "ALERT_WEBHOOK_URL";
        let url = self.password(URL, "");
        let roots = match self.path("ALERT_WEBHOOK_CA_FILE") {
            Some(path) => self.roots("ALERT_WEBHOOK_CA_FILE", path),
            None => Roots::System,
        };
        let after = self.seconds("ALERT_AFTER_SEC", 120);
        let queue_age = self.seconds("ALERT_QUEUE_AGE_SEC", QUEUE_AGE.as_secs());
        let url = url.filter(|url| !url.reveal().is_empty())?;
        let parsed = url.reveal().parse::<Uri>().ok();
        let is_one = parsed.is_some_and(|uri| {
            let scheme = uri.scheme_str().unwrap_or_default();
            let host = uri.host().unwrap_or_default();
            ["http", "https"].contains(&scheme) && !host.is_empty()
        });
        if !is_one {
            let fault = format!("{URL}: expected http://… or https://…{NOT_SHOWN}");
            self.faults.push(fault);
        }
        Some(Alerts {
            url,
            roots,
            after,
            queue_age,
        })
    }

    fn log_format(&mut self) -> LogFormat {
        self.parsed("LOG_FORMAT", "text", "text or json", |value| {
            match value.to_lowercase().as_str() {
                "text" => Some(LogFormat::Text),
                "json" => Some(LogFormat::Json),
                _ => None,
            }
        })
    }

    fn log_level(&mut self) -> LevelFilter {
        let expected = "DEBUG, INFO, WARNING, ERROR or CRITICAL";
        self.parsed("LOG_LEVEL", "INFO", expected, |value| {
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
