//! A standby of a deployment's own Postgres, which every commit waits for.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::deployment::{Deployment, Server, client, eventually, setting};

/// Stopped when dropped; its folder is in the primary's and goes with it.
pub struct Standby {
    pub port: u16,
    data: PathBuf,
    /// Where the programs of the primary's version are.
    programs: PathBuf,
    database: String,
}

impl Standby {
    /// Begins to stream from the deployment's Postgres, whose commits wait for it from then on.
    pub fn of(deployment: &Deployment) -> Standby {
        let folder = fs::canonicalize(deployment.folder_of(Server::Postgres)).unwrap();
        let pid_file = fs::read_to_string(folder.join("data/postmaster.pid")).unwrap();
        let pid = pid_file.lines().next().unwrap();
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let standby = Standby {
            port: listener.local_addr().unwrap().port(),
            data: folder.join("standby"),
            programs: program.parent().unwrap().to_owned(),
            database: deployment.database().to_owned(),
        };
        drop(listener);
        let primary = format!(
            "host=127.0.0.1 port={} user={} application_name=standby",
            deployment.postgres_port(),
            setting("POSTGRES_USER")
        );
        let data = standby.data.to_str().unwrap();
        standby.run(
            "pg_basebackup",
            &[
                "-d", &primary, "-D", data, "-R", "-X", "stream", "-c", "fast",
            ],
        );
        let options = format!(
            "-p {} -c listen_addresses=127.0.0.1 -c unix_socket_directories={data} \
             -c max_connections=300",
            standby.port
        );
        let output = format!("{data}/output");
        standby.run(
            "pg_ctl",
            &[
                "-D", data, "-l", &output, "-w", "-t", "60", "-o", &options, "start",
            ],
        );
        let mut sql = deployment.sql();
        sql.batch_execute("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
            .unwrap();
        sql.batch_execute("SELECT pg_reload_conf()").unwrap();
        deployment.comes_to(
            1,
            "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'",
        );
        standby
    }

    /// Makes it the primary, which waits for no other standby.
    pub fn promote(&self) {
        self.sql().query_one("SELECT pg_promote()", &[]).unwrap();
    }

    pub fn sql(&self) -> postgres::Client {
        client(self.port, &self.database)
    }

    /// Waits until the first column of the first row is `expected`.
    pub fn comes_to(&self, expected: i64, sql: &str) {
        let mut client = self.sql();
        eventually(&format!("{expected} from {sql}"), || {
            let count: i64 = client.query_one(sql, &[]).unwrap().get(0);
            (count == expected).then_some(())
        });
    }

    /// Runs one of Postgres's programs as the user whom the primary's folder belongs to.
    fn run(&self, program: &str, arguments: &[&str]) {
        let output = self.command(program, arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program}: {text}");
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let program = self.programs.join(program);
        let uid = |path: &Path| fs::metadata(path).unwrap().uid();
        let folder = self.data.parent().unwrap();
        // Postgres refuses to run as root.
        let mut command = if uid(folder) == uid(Path::new("/proc/self")) {
            Command::new(program)
        } else {
            let mut command = Command::new("runuser");
            command.args(["-u", "postgres", "--"]).arg(program);
            command
        };
        command
            .args(arguments)
            .current_dir(folder)
            .env("PGPASSWORD", setting("POSTGRES_PASSWORD"))
            .stdin(Stdio::null());
        command
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        let data = self.data.to_str().unwrap();
        let stop = ["-D", data, "-m", "immediate", "-w", "stop"];
        // It may not have started.
        let _ = self.command("pg_ctl", &stop).output();
    }
}
