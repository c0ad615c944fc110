//! A standby of a deployment's own Postgres, which every commit waits for.

use std::fs;

use super::deployment::{Deployment, Server, client, eventually, free_port, setting};

/// Stopped when dropped; its folder is in the primary's and goes with it.
pub struct Standby<'a> {
    pub port: u16,
    data: String,
    primary: &'a Deployment,
}

impl Standby<'_> {
    /// Begins to stream from the deployment's Postgres, whose commits wait for it from then on.
    pub fn of(deployment: &Deployment) -> Standby<'_> {
        let folder = fs::canonicalize(deployment.folder_of(Server::Postgres)).unwrap();
        let standby = Standby {
            port: free_port(),
            data: folder.join("standby").to_str().unwrap().to_owned(),
            primary: deployment,
        };
        let data = &standby.data;
        let primary = format!(
            "host=127.0.0.1 port={} user={} application_name=standby",
            deployment.postgres_port(),
            setting("POSTGRES_USER")
        );
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
        client(self.port, self.primary.database())
    }

    /// Waits until the first column of the first row is `expected`.
    pub fn comes_to(&self, expected: i64, sql: &str) {
        let mut client = self.sql();
        eventually(&format!("{expected} from {sql}"), || {
            let count: i64 = client.query_one(sql, &[]).unwrap().get(0);
            (count == expected).then_some(())
        });
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        let output = self.primary.run_postgres(program, arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program}: {text}");
    }
}

impl Drop for Standby<'_> {
    fn drop(&mut self) {
        let stop = ["-D", &self.data, "-m", "immediate", "-w", "stop"];
        // It may not have started.
        self.primary.run_postgres("pg_ctl", &stop);
    }
}
