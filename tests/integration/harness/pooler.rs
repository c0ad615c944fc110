//! A PgBouncer before a deployment's Postgres.

use std::fs::{self, File};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use super::deployment::{Deployment, eventually, free_port, setting};

/// Pools transactions; ended when dropped.
pub struct Pooler {
    pub port: u16,
    child: Child,
}

impl Pooler {
    /// Gives each transaction another session, as far as there are several.
    pub fn before(deployment: &Deployment, sessions: usize) -> Pooler {
        // What tests wait for comes earlier.
        Pooler::that_waits(deployment, sessions, 100)
    }

    /// Keeps what it is asked for so many seconds while there is no Postgres.
    pub fn that_waits(deployment: &Deployment, sessions: usize, seconds: u32) -> Pooler {
        let port = free_port();
        let user = setting("POSTGRES_USER");
        let users = deployment.folder.join("pgbouncer.users");
        let password = setting("POSTGRES_PASSWORD");
        fs::write(&users, format!("\"{user}\" \"{password}\"\n")).unwrap();
        // It knows the other roles from Postgres, and tries it again before a minute is over.
        let settings = format!(
            "[databases]\n\
             * = host=127.0.0.1 port={} auth_user={user}\n\
             [pgbouncer]\n\
             listen_addr = 127.0.0.1\n\
             listen_port = {port}\n\
             unix_socket_dir =\n\
             auth_type = scram-sha-256\n\
             auth_file = {}\n\
             pool_mode = transaction\n\
             default_pool_size = {sessions}\n\
             server_round_robin = 1\n\
             server_login_retry = 1\n\
             query_wait_timeout = {seconds}\n",
            deployment.postgres_port(),
            users.display(),
        );
        let file = deployment.folder.join("pgbouncer.ini");
        fs::write(&file, settings).unwrap();
        let log = File::create(deployment.folder.join("pgbouncer.log")).unwrap();
        let child = program()
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let pooler = Pooler { port, child };
        eventually("PgBouncer answers", || {
            TcpStream::connect(("127.0.0.1", port)).ok().map(drop)
        });
        pooler
    }

    /// What points a service to it.
    pub fn variables(&self) -> [(&'static str, String); 2] {
        [
            ("POSTGRESQL_PORT", self.port.to_string()),
            ("POSTGRESQL_POOLER", "transaction".to_owned()),
        ]
    }
}

/// PgBouncer, of the Debian that Postgres is of.
fn program() -> Command {
    let tree = std::env::var("OMOTES_POSTGRES_TREE").unwrap_or_default();
    if !tree.is_empty() {
        let mut command = Command::new("unshare");
        let enter = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/servers/enter");
        command.args(["--mount", enter, &tree, "postgres", "pgbouncer"]);
        return command;
    }
    let mut command = Command::new("pgbouncer");
    // Debian's is not where everybody looks.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin"));
    if is_root() {
        // It refuses to run as root.
        command.args(["-u", "postgres"]);
    }
    command
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output().unwrap();
    id.stdout == b"0\n"
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
