//! Vhosts and a database for one test, and the service that runs on them.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use postgres::NoTls;
use serde_json::{Value, json};
use uuid::Uuid;

use super::pooler::Pooler;

/// How long a condition may take to come true on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Polls until `condition` gives a value.
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A port that nobody listens on.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// A variable that `./run.sh test` sets.
pub fn setting(name: &str) -> String {
    let name = format!("OMOTES_TEST_{name}");
    std::env::var(&name)
        .unwrap_or_else(|_| panic!("{name} is not set: `./run.sh test` starts the services"))
}

/// Two vhosts and a database, gone when dropped.
pub struct Deployment {
    pub name: String,
    pub folder: PathBuf,
    /// None where the servers are those that all tests share.
    own: Option<OwnServers>,
    /// What the service reaches Postgres through, with `./run.sh test --pooler`.
    pooler: Option<Pooler>,
}

/// Servers of one test alone, which may break them.
struct OwnServers {
    rabbitmq: u16,
    postgres: u16,
}

/// A server of one test alone.
#[derive(Debug, Clone, Copy)]
pub enum Server {
    RabbitMq,
    Postgres,
}

impl Server {
    pub const ALL: [Server; 2] = [Server::RabbitMq, Server::Postgres];

    fn name(self) -> &'static str {
        match self {
            Server::RabbitMq => "rabbitmq",
            Server::Postgres => "postgres",
        }
    }
}

impl Deployment {
    fn on(own: Option<OwnServers>) -> Deployment {
        let name = format!("test_{}", Uuid::new_v4().simple());
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(&name);
        fs::create_dir_all(&folder).unwrap();
        let mut deployment = Deployment {
            name,
            folder,
            own,
            pooler: None,
        };
        if std::env::var("OMOTES_TEST_POOLER").is_ok_and(|mode| mode == "transaction") {
            deployment.pooler = Some(Pooler::before(&deployment, 20));
        }
        deployment
    }

    /// One with servers of its own.
    pub fn with_own_servers() -> Deployment {
        Deployment::with_own(&Server::ALL, |_| {})
    }

    /// One with these servers of its own and none of the others, which find what `prepare` puts
    /// into [`Deployment::extra_folder`].
    pub fn with_own(servers: &[Server], prepare: impl FnOnce(&Deployment)) -> Deployment {
        let deployment = Deployment::on(Some(OwnServers {
            rabbitmq: free_port(),
            postgres: free_port(),
        }));
        prepare(&deployment);
        for server in servers {
            deployment.start_server(*server);
        }
        deployment
    }

    /// What is in it comes into the server's own folder, and what is in `conf` there into its
    /// configuration.
    pub fn extra_folder(&self, server: Server) -> PathBuf {
        let folder = self.folder.join(format!("{}.extra", server.name()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    pub fn start_server(&self, server: Server) {
        let port = match server {
            Server::RabbitMq => self.rabbitmq_port(),
            Server::Postgres => self.postgres_port(),
        };
        self.private("start", server, &[&port.to_string()]);
    }

    /// Ends it with SIGKILL.
    pub fn kill_server(&self, server: Server) {
        self.private("kill", server, &[]);
    }

    /// Returns what it prints.
    pub fn rabbitmqctl(&self, arguments: &[&str]) -> String {
        self.private("ctl", Server::RabbitMq, arguments)
    }

    /// Lets its RabbitMQ take messages of up to so many bytes.
    pub fn limit_messages(&self, bytes: usize) {
        // The second is what RabbitMQ 3 looks at.
        let script = format!(
            "persistent_term:put(max_message_size, {bytes}), \
             application:set_env(rabbit, max_message_size, {bytes})."
        );
        self.rabbitmqctl(&["eval", &script]);
    }

    /// Sends its RabbitMQ a signal.
    pub fn signal_rabbitmq(&self, name: &str) {
        self.private("signal", Server::RabbitMq, &[name]);
    }

    /// Lets no file of Postgres grow beyond so many bytes, or "unlimited": writing then fails as on
    /// a full disk, with Postgres's hint to look for free space.
    pub fn limit_files(&self, bytes: &str) {
        self.private("limit", Server::Postgres, &[bytes]);
    }

    /// Where one of its own servers is.
    pub fn folder_of(&self, server: Server) -> PathBuf {
        self.folder.join(server.name())
    }

    /// Runs one of its Postgres's programs as the server's user, in the server's folder.
    pub fn run_postgres(&self, program: &str, arguments: &[&str]) -> Output {
        let arguments = [&[program], arguments].concat();
        self.private_output("run", Server::Postgres, &arguments)
    }

    fn private(&self, command: &str, server: Server, arguments: &[&str]) -> String {
        let output = self.private_output(command, server, arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command} {server:?}: {text}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn private_output(&self, command: &str, server: Server, arguments: &[&str]) -> Output {
        let folder = self.folder_of(server);
        Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/run.sh"))
            .args(["private", command, folder.to_str().unwrap()])
            .args(arguments)
            .env("PGPASSWORD", setting("POSTGRES_PASSWORD"))
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    pub fn new() -> Deployment {
        let deployment = Deployment::on(None);
        let user = setting("RABBITMQ_USER");
        for vhost in [deployment.sdk_vhost(), deployment.celery_vhost()] {
            management("PUT", &format!("vhosts/{vhost}"), Some(json!({})));
            let all = json!({"configure": ".*", "write": ".*", "read": ".*"});
            management("PUT", &format!("permissions/{vhost}/{user}"), Some(all));
        }
        server_client("postgres")
            .batch_execute(&format!("CREATE DATABASE {}", deployment.name))
            .unwrap();
        deployment
    }

    /// With the service beside the pooler, for tests of what a pooler does otherwise.
    pub fn without_pooler(mut self) -> Deployment {
        self.pooler = None;
        self
    }

    pub fn sdk_vhost(&self) -> String {
        match self.own {
            None => self.name.clone(),
            Some(_) => "omotes".to_owned(),
        }
    }

    pub fn celery_vhost(&self) -> String {
        format!("{}_celery", self.sdk_vhost())
    }

    /// Makes the vhost of the tasks anew, with these settings.
    pub fn make_celery_vhost_anew(&self, settings: &Value) {
        self.make_vhost_anew(&self.celery_vhost(), settings);
    }

    pub fn make_vhost_anew(&self, vhost: &str, settings: &Value) {
        management("DELETE", &format!("vhosts/{vhost}"), None);
        management("PUT", &format!("vhosts/{vhost}"), Some(settings.clone()));
        let all = json!({"configure": ".*", "write": ".*", "read": ".*"});
        let user = setting("RABBITMQ_USER");
        management("PUT", &format!("permissions/{vhost}/{user}"), Some(all));
    }

    pub fn rabbitmq_port(&self) -> u16 {
        match &self.own {
            None => setting("RABBITMQ_PORT").parse().unwrap(),
            Some(own) => own.rabbitmq,
        }
    }

    pub fn postgres_port(&self) -> u16 {
        match &self.own {
            None => setting("POSTGRES_PORT").parse().unwrap(),
            Some(own) => own.postgres,
        }
    }

    /// Where the service reaches Postgres.
    pub fn postgres_door(&self) -> u16 {
        match &self.pooler {
            None => self.postgres_port(),
            Some(pooler) => pooler.port,
        }
    }

    pub fn database(&self) -> &str {
        match self.own {
            None => &self.name,
            Some(_) => "omotes",
        }
    }

    /// The names of the queues of the SDK clients' vhost.
    pub fn queues(&self) -> Vec<String> {
        let queues = management(
            "GET",
            &format!("queues/{}?columns=name", self.sdk_vhost()),
            None,
        );
        let queues = queues.as_array().unwrap().iter();
        queues
            .map(|queue| queue["name"].as_str().unwrap().to_owned())
            .collect()
    }

    pub fn sql(&self) -> postgres::Client {
        client(self.postgres_port(), self.database())
    }

    /// The first column of the first row.
    pub fn count(&self, sql: &str) -> i64 {
        self.sql().query_one(sql, &[]).unwrap().get(0)
    }

    /// Waits until the first column of the first row is `expected`: what clients and workers hear
    /// comes before its commit. However far there is to go, each step may take its time.
    pub fn comes_to(&self, expected: i64, sql: &str) {
        let mut client = self.sql();
        let mut nearest = i64::MAX;
        while nearest != 0 {
            nearest = eventually(&format!("{expected} from {sql}"), || {
                let count: i64 = client.query_one(sql, &[]).unwrap().get(0);
                let distance = (expected - count).abs();
                (distance < nearest).then_some(distance)
            });
        }
    }

    /// Waits until the first column of the first row is at least `least`.
    pub fn at_least(&self, least: i64, sql: &str) {
        let mut client = self.sql();
        eventually(&format!("{least} or more from {sql}"), || {
            let count: i64 = client.query_one(sql, &[]).unwrap().get(0);
            (count >= least).then_some(())
        });
    }

    /// Waits until no job is left; it goes right after its client has been told.
    pub fn no_jobs_left(&self) {
        self.comes_to(
            0,
            "SELECT (SELECT count(*) FROM job) + (SELECT count(*) FROM job_starts)",
        );
    }

    /// Waits until the only replica has looked for what is due in a round that began after this call,
    /// and has handed what it found to its handlers, where it goes before any message.
    pub fn looked_for_what_is_due(&self) {
        let forgotten =
            "INSERT INTO job_history (job_id, finished_at, starts, outcome, result_bytes)
                         VALUES ($1, now() - interval '100 years', 0, 'CANCELLED', 0)";
        // The first may be forgotten by a round that had begun; what a round has found is handed on
        // before the next one begins.
        for _ in 0..3 {
            let mark = Uuid::new_v4();
            self.sql().execute(forgotten, &[&mark]).unwrap();
            let sql = format!("SELECT count(*) FROM job_history WHERE job_id = '{mark}'");
            self.comes_to(0, &sql);
        }
    }

    /// The environment of a service or a command on this deployment.
    pub fn variables(&self) -> Vec<(String, String)> {
        let mut variables = vec![
            ("POSTGRESQL_PORT", self.postgres_door().to_string()),
            ("POSTGRESQL_USERNAME", setting("POSTGRES_USER")),
            ("POSTGRESQL_PASSWORD", setting("POSTGRES_PASSWORD")),
            ("POSTGRESQL_DATABASE", self.database().to_owned()),
            ("INFLUXDB_PORT", setting("INFLUXDB_PORT")),
            ("INFLUXDB_USERNAME", setting("INFLUXDB_USER")),
            ("INFLUXDB_PASSWORD", setting("INFLUXDB_PASSWORD")),
            ("HTTP_BIND", "127.0.0.1:0".to_owned()),
            ("LOG_LEVEL", "DEBUG".to_owned()),
            // Tests that are about them set them.
            ("OUTCOME_DELAY_MS", "0".to_owned()),
            ("WORKERS_PERIOD_SEC", "0".to_owned()),
            ("RUST_BACKTRACE", "1".to_owned()),
            (
                "WORKFLOW_CONFIG_PATH",
                concat!(
                    env!("CARGO_MANIFEST_DIR"),
                    "/tests/wire/available_workflows.config.json"
                )
                .to_owned(),
            ),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect::<Vec<_>>();
        if let Some(pooler) = &self.pooler {
            let more = pooler.variables();
            variables.extend(more.map(|(name, value)| (name.to_owned(), value)));
        }
        for (prefix, vhost) in [
            ("SDK", self.sdk_vhost()),
            ("TASK", self.celery_vhost()),
            ("CELERY", self.celery_vhost()),
        ] {
            for (suffix, value) in [
                ("PORT", self.rabbitmq_port().to_string()),
                ("USERNAME", setting("RABBITMQ_USER")),
                ("PASSWORD", setting("RABBITMQ_PASSWORD")),
                ("VIRTUALHOST", vhost),
            ] {
                variables.push((format!("{prefix}_RABBITMQ_{suffix}"), value));
            }
        }
        variables
    }

    /// The binary with these arguments, on this deployment and on nothing else.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_omotes-orchestrator"));
        command
            .args(arguments)
            .current_dir(&self.folder)
            .env_clear()
            .envs(self.variables());
        command
    }

    /// That the commands which need Postgres find it with these variables.
    pub fn commands_find_postgres(&self, variables: &[(&str, String)]) {
        for arguments in [
            &["db", "upgrade"][..],
            &["db", "current"],
            &["jobs", "list"],
            &["doctor"],
        ] {
            let mut command = self.command(arguments);
            command.envs(variables.iter().map(|(name, value)| (name, value)));
            let output = command.output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() || arguments == ["doctor"], "{said}");
            assert!(!said.contains("error Postgres"), "{said}");
        }
    }

    /// A running service that is ready.
    pub fn start(&self) -> Service {
        self.start_with(&[])
    }

    /// One that handles the messages of each queue strictly in their order.
    pub fn start_single_file(&self) -> Service {
        self.start_with(&[("HANDLER_THREADS", "1")])
    }

    pub fn start_with(&self, variables: &[(&str, &str)]) -> Service {
        let service = self.launch(variables);
        service.wait_until_ready();
        service
    }

    /// A service that may or may not become ready.
    pub fn launch(&self, variables: &[(&str, &str)]) -> Service {
        let mut command = self.command(&["run"]);
        command.envs(variables.iter().copied());
        self.launch_command(command)
    }

    pub fn launch_command(&self, mut command: Command) -> Service {
        let log = self.folder.join(format!("{}.log", Uuid::new_v4()));
        let child = command
            .stdin(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Service { child, log }
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        let broken = thread::panicking();
        if self.own.is_some() {
            for server in Server::ALL {
                self.private(if broken { "stop" } else { "remove" }, server, &[]);
            }
        }
        if broken {
            eprintln!("what is left of the test: {}", self.folder.display());
            return;
        }
        if self.own.is_some() {
            fs::remove_dir_all(&self.folder).unwrap();
            return;
        }
        for vhost in [self.sdk_vhost(), self.celery_vhost()] {
            management("DELETE", &format!("vhosts/{vhost}"), None);
        }
        server_client("postgres")
            .batch_execute(&format!("DROP DATABASE {} WITH (FORCE)", self.name))
            .unwrap();
        fs::remove_dir_all(&self.folder).unwrap();
    }
}

/// A process of the service, killed when dropped.
pub struct Service {
    child: Child,
    log: PathBuf,
}

impl Service {
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Waits for a line of the log with this text.
    pub fn logged(&self, text: &str) -> String {
        eventually(&format!("{text:?} in {}", self.log.display()), || {
            let log = self.log();
            let line = log.lines().find(|line| line.contains(text));
            line.map(str::to_owned)
        })
    }

    pub fn http(&self) -> SocketAddr {
        let line = self.logged("status page at http://");
        let (_, rest) = line.split_once("http://").unwrap();
        rest.split('/').next().unwrap().parse().unwrap()
    }

    /// Status and body of an answer; None while nobody listens.
    pub fn get(&self, path: &str) -> Option<(u16, String)> {
        let mut response = ureq::get(format!("http://{}{path}", self.http()))
            .config()
            .http_status_as_error(false)
            .build()
            .call()
            .ok()?;
        let status = response.status().as_u16();
        Some((status, response.body_mut().read_to_string().ok()?))
    }

    /// What `/health/ready` says.
    pub fn readiness(&self) -> Option<(bool, Value)> {
        let (status, body) = self.get("/health/ready")?;
        Some((status == 200, serde_json::from_str(&body).ok()?))
    }

    pub fn wait_until_ready(&self) {
        eventually(&format!("ready: {}", self.log.display()), || {
            self.readiness()?.0.then_some(())
        });
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The names of its threads.
    pub fn threads(&self) -> Vec<String> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.id())).unwrap();
        threads
            .filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("comm")).ok())
            .map(|name| name.trim().to_owned())
            .collect()
    }

    /// The most memory that the process has had, in MiB.
    pub fn peak_memory(&self) -> u64 {
        self.peak_memory_if_running().unwrap()
    }

    fn peak_memory_if_running(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
        let kibibytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        Some(kibibytes / 1024)
    }

    pub fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        let sent = Command::new("kill").args([name, &id]).status().unwrap();
        assert!(sent.success());
    }

    /// Ends it as the kernel would: at once.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to stop and waits until it has.
    pub fn stop(mut self) -> ExitStatus {
        self.signal("-TERM");
        self.wait()
    }

    /// Asks it to stop and waits until it has; how it ended, and the most memory it had until then,
    /// in MiB.
    pub fn stop_watched(mut self) -> (ExitStatus, u64) {
        self.signal("-TERM");
        let mut peak = 0;
        let status = eventually("the service ends", || {
            peak = self.peak_memory_if_running().unwrap_or(peak);
            self.child.try_wait().unwrap()
        });
        (status, peak)
    }

    pub fn wait(&mut self) -> ExitStatus {
        eventually("the service ends", || self.child.try_wait().unwrap())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let last = lines.len().saturating_sub(40);
            eprintln!(
                "end of {}:\n{}",
                self.log.display(),
                lines[last..].join("\n")
            );
        }
    }
}

/// A call of RabbitMQ's management API, which must succeed.
pub fn management(method: &str, path: &str, body: Option<Value>) -> Value {
    let url = format!(
        "http://127.0.0.1:{}/api/{path}",
        setting("RABBITMQ_MANAGEMENT_PORT")
    );
    let credentials = format!(
        "{}:{}",
        setting("RABBITMQ_USER"),
        setting("RABBITMQ_PASSWORD")
    );
    let encoded = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, credentials);
    let authorization = format!("Basic {encoded}");
    let request = ureq::http::Request::builder()
        .method(method)
        .uri(&url)
        .header("Authorization", authorization)
        .header("Content-Type", "application/json")
        .body(body.map(|body| body.to_string()).unwrap_or_default())
        .unwrap();
    let mut response = ureq::run(request).unwrap_or_else(|error| panic!("{method} {url}: {error}"));
    let text = response.body_mut().read_to_string().unwrap();
    serde_json::from_str(&text).unwrap_or(Value::Null)
}

/// Which RabbitMQ the tests run on.
pub fn rabbitmq_version() -> [u32; 2] {
    let overview = management("GET", "overview?columns=rabbitmq_version", None);
    let version = overview["rabbitmq_version"].as_str().unwrap();
    let mut parts = version.split('.').map(|part| part.parse().unwrap());
    [(); 2].map(|()| parts.next().unwrap())
}

/// Whether it knows its queues by Khepri, and no longer by Mnesia.
pub fn has_khepri() -> bool {
    rabbitmq_version() >= [4, 3]
}

/// A superuser's connection to a database of the server that all tests share.
pub fn server_client(database: &str) -> postgres::Client {
    client(setting("POSTGRES_PORT").parse().unwrap(), database)
}

/// The same of any server that the tests have started.
pub fn client(port: u16, database: &str) -> postgres::Client {
    postgres::Config::new()
        .host("127.0.0.1")
        .port(port)
        .user(&setting("POSTGRES_USER"))
        .password(setting("POSTGRES_PASSWORD"))
        .dbname(database)
        .connect(NoTls)
        .unwrap()
}

/// Closes a connection to a vhost whose name says this, as an operator might.
pub fn close_a_connection(vhost: &str, purpose: &str) {
    let connections = eventually("the broker lists the connections", || {
        let list = management("GET", &format!("vhosts/{vhost}/connections"), None);
        let names: Vec<String> = list
            .as_array()?
            .iter()
            .filter(|one| {
                let information = one["client_properties"]["information"].as_str();
                information.is_some_and(|information| information.contains(purpose))
            })
            .filter_map(|one| Some(one["name"].as_str()?.to_owned()))
            .collect();
        (!names.is_empty()).then_some(names)
    });
    // One will do: a session ends as a whole, and its others with it.
    let encoded = connections[0].replace(' ', "%20").replace('>', "%3E");
    management("DELETE", &format!("connections/{encoded}"), None);
}
