//! How connections to Postgres are opened, with TLS or without.

use std::error::Error as _;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use log::{debug, info};
use postgres::config::SslMode;
use postgres::error::{DbError, SqlState};
use postgres::types::ToSql;
use postgres::{Client, NoTls, Row, Statement, ToStatement};
use r2d2::ManageConnection;
use r2d2_postgres::PostgresConnectionManager;
use thiserror::Error;
use tls_of_postgres::MakeRustlsConnect;

use super::is_refusal;
use crate::config::{self, Address, Encryption};
use crate::threads::Calls;
use crate::tls::Tls;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// A standby will do.
    Read,
    Write,
}

/// Opens the pool's connections, each with TLS or without, as `r2d2_postgres` opens them.
#[derive(Debug)]
pub(super) struct Connector {
    config: config::Postgres,
    statement_timeout: &'static str,
    access: Access,
    /// Which server of `config` the last connection was to: an old primary that comes back, and
    /// does not know that it has been replaced, is not returned to.
    last: AtomicUsize,
}

impl Connector {
    /// No statement takes longer than `statement_timeout`, a time as Postgres writes it. Where there
    /// are several servers, each connection is to one that takes writes.
    pub(super) fn new(
        config: config::Postgres,
        statement_timeout: &'static str,
        access: Access,
    ) -> Connector {
        Connector {
            statement_timeout,
            // Of several, one that does not take writes is about to be left.
            access: match config.servers.len() {
                1 => access,
                _ => Access::Write,
            },
            config,
            last: AtomicUsize::new(0),
        }
    }

    fn check(&self, session: &mut Session) -> anyhow::Result<()> {
        let server = session.server;
        match self.access {
            Access::Read => Ok(session.client.simple_query("").map(drop)?),
            Access::Write => match session.ask(unwritable)? {
                None => Ok(()),
                // Such a server is useless to a replica, which would keep messages from replicas
                // whose server does.
                Some(why) => {
                    let config::Postgres {
                        servers, database, ..
                    } = &self.config;
                    bail!("{}/{database} {why}", servers[server])
                }
            },
        }
    }

    /// Connects to the server of this number.
    fn open(&self, server: usize) -> anyhow::Result<Session> {
        let address = &self.config.servers[server];
        let is_pooled = self.config.is_pooled;
        let mut session = Session {
            client: connect(&self.config, address, self.statement_timeout)?,
            server,
            preamble: is_pooled.then(|| preamble(self.statement_timeout)),
            is_pooled,
            failed: false,
            calls: Arc::default(),
        };
        self.check(&mut session)?;
        if !is_pooled {
            session.client.batch_execute(&neutralised("false"))?;
        }
        Ok(session)
    }
}

/// Why there is no connection, with the whole cause chain.
#[derive(Debug, Error)]
#[error("{why:#}")]
pub(super) struct ConnectError {
    why: anyhow::Error,
    /// Whether somebody has said no, as [`is_denial`] has it.
    pub(super) is_denied: bool,
}

impl From<anyhow::Error> for ConnectError {
    fn from(why: anyhow::Error) -> Self {
        ConnectError {
            is_denied: is_denial(&why),
            why,
        }
    }
}

/// Whether the machine says that nobody listens there, or the server that it does not let this user in, or
/// has no such database: in a moment it says the same, unless somebody is about to start it.
fn is_denial(why: &anyhow::Error) -> bool {
    why.chain().any(|cause| {
        let refused = cause.downcast_ref::<io::Error>();
        let denied = cause.downcast_ref::<DbError>().map(|error| error.code());
        refused.is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused)
            || denied.is_some_and(|code| ["28", "3D"].contains(&&code.code()[..2]))
    })
}

impl ManageConnection for Connector {
    type Connection = Session;
    type Error = ConnectError;

    fn connect(&self) -> Result<Session, ConnectError> {
        let servers = &self.config.servers;
        if servers.len() == 1 {
            return Ok(self.open(0)?);
        }
        // One after the other, as libpq has it; unlike libpq, also after one that does not let this
        // user in.
        let last = self.last.load(Ordering::Relaxed);
        let (mut faults, mut is_denied) = (Vec::new(), true);
        for number in (last..servers.len()).chain(0..last) {
            match self.open(number) {
                Ok(session) => {
                    if number != last {
                        info!("Postgres: {} takes writes", servers[number]);
                    }
                    self.last.store(number, Ordering::Relaxed);
                    return Ok(session);
                }
                Err(fault) => {
                    is_denied &= is_denial(&fault);
                    faults.push(format!("{}: {fault:#}", servers[number]));
                }
            }
        }
        Err(ConnectError {
            why: anyhow!(faults.join("; ")),
            is_denied,
        })
    }

    fn is_valid(&self, session: &mut Session) -> Result<(), ConnectError> {
        Ok(self.check(session)?)
    }

    fn has_broken(&self, session: &mut Session) -> bool {
        session.failed || session.client.is_closed()
    }
}

/// A connection that records whether anything has failed on it. Then it counts as lost even if it
/// still answers: it may lead to a server that has become a standby, or have been opened under a
/// setting that has been corrected since.
pub struct Session {
    client: Client,
    /// Its number in the configuration.
    server: usize,
    /// What a transaction has to begin with where a pooler may give each of them another session:
    /// then nothing is done outside of a transaction, and nothing is prepared for the next one.
    preamble: Option<String>,
    is_pooled: bool,
    failed: bool,
    /// Of whoever uses it.
    pub(super) calls: Arc<Calls>,
}

/// Passes an outcome on after recording in `failed` whether it makes the connection suspect.
pub(super) fn noted<T>(
    failed: &mut bool,
    outcome: Result<T, postgres::Error>,
) -> Result<T, postgres::Error> {
    *failed |= outcome.as_ref().is_err_and(|error| !is_refusal(error));
    outcome
}

impl Session {
    pub(super) fn is_pooled(&self) -> bool {
        self.is_pooled
    }

    /// Keeps the pooler from giving this session to others, by a transaction without an end. It has
    /// no snapshot between its statements, and so keeps Postgres from nothing.
    pub(super) fn pin(&mut self) -> Result<(), postgres::Error> {
        let Some(preamble) = self.preamble.take() else {
            return Ok(());
        };
        let endless = "SET LOCAL idle_in_transaction_session_timeout = 0";
        self.batch_execute(&format!("BEGIN; {preamble}; {endless}"))
    }

    /// Asks something, in a transaction of its own where there is a pooler.
    fn ask<T>(
        &mut self,
        ask: impl FnOnce(&mut Client) -> Result<T, postgres::Error>,
    ) -> Result<T, postgres::Error> {
        let Session {
            client, preamble, ..
        } = self;
        let Some(preamble) = preamble else {
            return ask(client);
        };
        client.batch_execute(&format!("BEGIN; {preamble}"))?;
        let answer = ask(client);
        // The first error says more.
        let ended = client.batch_execute(if answer.is_ok() { "COMMIT" } else { "ROLLBACK" });
        answer.and_then(|answer| ended.map(|()| answer))
    }

    pub(super) fn execute<S: ?Sized + ToStatement>(
        &mut self,
        sql: &S,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<u64, postgres::Error> {
        self.query_with(|client| client.execute(sql, params))
    }

    pub(super) fn query(
        &mut self,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, postgres::Error> {
        self.query_with(|client| client.query(sql, params))
    }

    pub(super) fn query_one(
        &mut self,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, postgres::Error> {
        self.query_with(|client| client.query_one(sql, params))
    }

    pub(super) fn prepare(&mut self, sql: &str) -> Result<Statement, postgres::Error> {
        self.query_with(|client| client.prepare(sql))
    }

    pub(super) fn batch_execute(&mut self, sql: &str) -> Result<(), postgres::Error> {
        self.query_with(|client| client.batch_execute(sql))
    }

    /// A transaction, the connection's failure flag, and its calls.
    pub(super) fn transaction(
        &mut self,
    ) -> Result<(postgres::Transaction<'_>, &mut bool, &Calls), postgres::Error> {
        let Session {
            client,
            server: _,
            preamble,
            is_pooled: _,
            failed,
            calls,
        } = self;
        let call = calls.begin();
        let transaction = noted(failed, begin(client, preamble.as_deref()))?;
        drop(call);
        Ok((transaction, failed, calls))
    }

    /// A transaction as part of [`Session::work`].
    pub(super) fn begin(&mut self) -> Result<postgres::Transaction<'_>, postgres::Error> {
        begin(&mut self.client, self.preamble.as_deref())
    }

    /// Closes the connection when it is dropped.
    pub(super) fn give_up(&mut self) {
        self.failed = true;
    }

    /// Lends the plain client for a question.
    pub(super) fn query_with<T>(
        &mut self,
        ask: impl FnOnce(&mut Client) -> Result<T, postgres::Error>,
    ) -> Result<T, postgres::Error> {
        let calls = Arc::clone(&self.calls);
        let _call = calls.begin();
        let answer = self.ask(ask);
        noted(&mut self.failed, answer)
    }

    /// The same for work with any kind of error.
    pub(super) fn work<T>(
        &mut self,
        work: impl FnOnce(&mut Session) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let calls = Arc::clone(&self.calls);
        let _call = calls.begin();
        let outcome = work(self);
        self.failed |= outcome.is_err();
        outcome
    }
}

fn begin<'c>(
    client: &'c mut Client,
    preamble: Option<&str>,
) -> Result<postgres::Transaction<'c>, postgres::Error> {
    let mut transaction = client.transaction()?;
    if let Some(preamble) = preamble {
        transaction.batch_execute(preamble)?;
    }
    Ok(transaction)
}

/// Why this server, or this session with it, takes no writes, if it takes none.
pub(super) fn unwritable(client: &mut Client) -> Result<Option<String>, postgres::Error> {
    let row = client.query_one(
        "SELECT pg_is_in_recovery(), current_setting('transaction_read_only') = 'on',
                (SELECT source FROM pg_settings WHERE name = 'default_transaction_read_only')",
        &[],
    )?;
    let source: &str = row.try_get(2)?;
    Ok(match (row.try_get(0)?, row.try_get(1)?) {
        (true, _) => Some(
            "is a standby and takes no writes: POSTGRESQL_HOST has to be the primary".to_owned(),
        ),
        (false, true) => Some(format!(
            "is read-only: default_transaction_read_only is on, which somebody has set (source: \
             {source})"
        )),
        (false, false) => None,
    })
}

/// Overrides settings of a role or a database that the service cannot work with, beside those in
/// [`client_config`]. Not every version of Postgres has each of them.
///
/// A commit that does not wait for the disk can be lost in a crash, long after its message was
/// acknowledged. All other values of synchronous_commit wait for this server's disk, and some for
/// standbys too; that choice is left to whoever made it.
///
/// The statement has them last for a transaction, or for a session if not `is_local`.
fn neutralised(is_local: &str) -> String {
    format!(
        "SELECT set_config(name, harmless, {is_local})
         FROM (VALUES ('synchronous_commit', 'off', 'on'),
                      ('idle_session_timeout', NULL, '0'),
                      ('transaction_timeout', NULL, '0')) AS wanted (name, harmful, harmless)
         WHERE CASE WHEN harmful IS NULL THEN current_setting(name, true) IS NOT NULL
                    ELSE current_setting(name, true) = harmful END"
    )
}

/// What holds for every transaction: as statements, where settings of the session are others'. And
/// what was prepared there goes, since each client's names are the same: a row that outlives its
/// transaction has its statement closed wherever the next one happens to be.
fn preamble(statement_timeout: &str) -> String {
    format!(
        "SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
         DEALLOCATE ALL;
         SET LOCAL lock_timeout = '30s';
         SET LOCAL statement_timeout = '{statement_timeout}';
         SET LOCAL idle_in_transaction_session_timeout = '1min';
         SET LOCAL jit = off;
         {}",
        neutralised("true")
    )
}

/// How long a server that accepts connections may stay silent.
const SILENCE: Duration = Duration::from_secs(5);

/// Checks that somebody answers at all, since connecting waits without end for a stopped server, or
/// for a proxy whose server is gone. Postgres answers yes or no to a kind of encryption that is not
/// used here, without a line in its log. Everything but silence is left to the real connection.
///
/// Whoever gives no answer for `patience` is left, even before there is a connection.
fn ask(server: &Address, patience: Duration) -> anyhow::Result<()> {
    // https://www.postgresql.org/docs/current/protocol-message-formats.html, GSSENCRequest
    const QUESTION: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x30];
    let Ok(addresses) = (server.host.as_str(), server.port).to_socket_addrs() else {
        return Ok(());
    };
    let mut unanswered = None;
    for address in addresses {
        let mut socket = match TcpStream::connect_timeout(&address, patience) {
            Ok(socket) => socket,
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                unanswered = Some(address);
                continue;
            }
            Err(_) => continue,
        };
        let silence = patience.min(SILENCE);
        socket.set_read_timeout(Some(silence))?;
        let answer = socket
            .write_all(&QUESTION)
            .and_then(|()| socket.read(&mut [0]));
        if let Err(ErrorKind::WouldBlock | ErrorKind::TimedOut) =
            answer.map_err(|error| error.kind())
        {
            bail!("{address} takes connections, and says nothing for {silence:?}");
        }
        return Ok(());
    }
    match unanswered {
        Some(address) => bail!("{address} takes no connection within {patience:?}"),
        None => Ok(()),
    }
}

/// Connects; if `config` leaves a choice, it falls back to the second way as libpq does.
fn connect(
    config: &config::Postgres,
    server: &Address,
    statement_timeout: &str,
) -> anyhow::Result<Client> {
    let patience = Patience::of(config);
    ask(server, patience.connect)?;
    let mut client = client_config(config, server, &patience, statement_timeout);
    match config.encryption_to(server) {
        Encryption::Never => Ok(plain(&mut client)?),
        Encryption::WhereRequired(tls) => {
            let tls = rustls(tls)?;
            match plain(&mut client) {
                Err(refusal) if is_unwelcome(&refusal) => {
                    let encrypted = encrypted(client.ssl_mode(SslMode::Require), tls);
                    encrypted.with_context(|| format!("{:#}; with TLS", anyhow!(refusal)))
                }
                connected => Ok(connected?),
            }
        }
        Encryption::WhereOffered(tls) => {
            match encrypted(client.ssl_mode(SslMode::Prefer), rustls(tls)?) {
                Err(fault) if is_unwelcome(&fault) || may_be_of_tls(&fault) => {
                    let fault = format!("{:#}", anyhow!(fault));
                    debug!("Postgres at {server}: {fault}; trying without TLS");
                    plain(&mut client).map_err(|second| {
                        let second = anyhow!(second);
                        // If the server has no TLS, the first attempt was without as well.
                        if format!("{second:#}") == fault {
                            second
                        } else {
                            second.context(format!("{fault}; without TLS"))
                        }
                    })
                }
                connected => Ok(connected?),
            }
        }
        Encryption::Always(tls) => Ok(encrypted(client.ssl_mode(SslMode::Require), rustls(tls)?)?),
    }
}

fn plain(client: &mut postgres::Config) -> Result<Client, postgres::Error> {
    let client = client.ssl_mode(SslMode::Disable).clone();
    PostgresConnectionManager::new(client, NoTls).connect()
}

fn encrypted(client: &postgres::Config, tls: MakeRustlsConnect) -> Result<Client, postgres::Error> {
    PostgresConnectionManager::new(client.clone(), tls).connect()
}

fn rustls(tls: &Tls) -> anyhow::Result<MakeRustlsConnect> {
    Ok(MakeRustlsConnect::new(tls.client_config()?))
}

/// Whether the server rejects this user's connections, or this kind of connection. A wrong password
/// is something else.
fn is_unwelcome(error: &postgres::Error) -> bool {
    error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION)
}

/// Whether the server was there, and then TLS was not what it or this client wanted.
fn may_be_of_tls(error: &postgres::Error) -> bool {
    let cause = error
        .source()
        .and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| {
        [
            // rustls's own, and a host that cannot be the name in a certificate.
            ErrorKind::InvalidData,
            ErrorKind::InvalidInput,
            // The other side hung up.
            ErrorKind::UnexpectedEof,
            ErrorKind::ConnectionReset,
            ErrorKind::ConnectionAborted,
            ErrorKind::BrokenPipe,
        ]
        .contains(&cause.kind())
    })
}

/// How long a server that cannot be reached is waited for.
struct Patience {
    connect: Duration,
    /// Until the first keepalive, and between the three that follow.
    keepalives: [Duration; 2],
    /// For the acknowledgement of what has been sent.
    sent: Duration,
}

impl Patience {
    /// Where there is another server, it should be found within ten seconds of its promotion; the
    /// pool may pause for five.
    fn of(config: &config::Postgres) -> Patience {
        let seconds = Duration::from_secs;
        match config.servers.len() {
            1 => Patience {
                connect: config::CONNECT_TIMEOUT,
                keepalives: [seconds(15), seconds(5)],
                sent: seconds(30),
            },
            _ => Patience {
                connect: seconds(3),
                keepalives: [seconds(3), seconds(1)],
                sent: seconds(8),
            },
        }
    }
}

fn client_config(
    config: &config::Postgres,
    server: &Address,
    patience: &Patience,
    statement_timeout: &str,
) -> postgres::Config {
    let mut client = Client::configure();
    client
        .host(&server.host)
        .port(server.port)
        .dbname(&config.database)
        .application_name("omotes_orchestrator")
        .connect_timeout(patience.connect)
        .keepalives_idle(patience.keepalives[0])
        .keepalives_interval(patience.keepalives[1])
        .keepalives_retries(3)
        .tcp_user_timeout(patience.sent);
    // A pooler takes no options, and has a transaction begin with them; see `preamble`.
    if !config.is_pooled {
        // After waiting for a lock on a job, what its previous holder committed must be visible.
        // The last but one releases the jobs that a hanging replica has locked. To compile a
        // statement takes longer than any of ours does.
        client.options(&format!(
            "-c default_transaction_isolation=read\\ committed \
             -c lock_timeout=30s -c statement_timeout={statement_timeout} \
             -c idle_in_transaction_session_timeout=1min -c jit=off",
        ));
    }
    if let Some(username) = &config.username {
        client.user(username);
    }
    if let Some(password) = &config.password {
        client.password(password.reveal());
    }
    client
}
