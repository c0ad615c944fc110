//! How connections to Postgres are opened, with TLS or without.

use std::error::Error as _;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use log::debug;
use postgres::config::SslMode;
use postgres::error::SqlState;
use postgres::{Client, NoTls};
use r2d2::ManageConnection;
use r2d2_postgres::PostgresConnectionManager;
use thiserror::Error;
use tls_of_postgres::MakeRustlsConnect;

use crate::config::{self, Encryption};
use crate::tls::Tls;

/// Opens the pool's connections, each with TLS or without, as `r2d2_postgres` opens them. Which of the
/// two, it leaves to whoever uses it; for an open connection it makes no difference.
#[derive(Debug)]
pub(super) struct Connector {
    config: config::Postgres,
    statement_timeout: &'static str,
    plain: PostgresConnectionManager<NoTls>,
}

impl Connector {
    /// No statement takes longer than `statement_timeout`, a time as Postgres writes it.
    pub(super) fn new(config: config::Postgres, statement_timeout: &'static str) -> Connector {
        let client = client_config(&config, statement_timeout);
        Connector {
            plain: PostgresConnectionManager::new(client, NoTls),
            config,
            statement_timeout,
        }
    }
}

/// Why there is no connection, with the whole cause chain.
#[derive(Debug, Error)]
#[error("{0:#}")]
pub(super) struct ConnectError(anyhow::Error);

impl ManageConnection for Connector {
    type Connection = Client;
    type Error = ConnectError;

    fn connect(&self) -> Result<Client, ConnectError> {
        connect(&self.config, self.statement_timeout).map_err(ConnectError)
    }

    fn is_valid(&self, client: &mut Client) -> Result<(), ConnectError> {
        let valid = self.plain.is_valid(client);
        valid.map_err(|error| ConnectError(error.into()))
    }

    fn has_broken(&self, client: &mut Client) -> bool {
        self.plain.has_broken(client)
    }
}

/// How long somebody who takes connections may take to say anything.
const SILENCE: Duration = Duration::from_secs(5);

/// Asks whether somebody answers at all, for connecting waits without end for the answer of a server
/// that is stopped, or of a proxy whose server is gone. Postgres says yes or no to an encryption
/// that is not used here, and makes no note of that in its log. Everything but silence is left to
/// the connection itself.
fn ask(config: &config::Postgres) -> anyhow::Result<()> {
    // https://www.postgresql.org/docs/current/protocol-message-formats.html, GSSENCRequest
    const QUESTION: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x30];
    let Ok(addresses) = (config.host.as_str(), config.port).to_socket_addrs() else {
        return Ok(());
    };
    for address in addresses {
        let Ok(mut socket) = TcpStream::connect_timeout(&address, config::CONNECT_TIMEOUT) else {
            continue;
        };
        socket.set_read_timeout(Some(SILENCE))?;
        let answer = socket
            .write_all(&QUESTION)
            .and_then(|()| socket.read(&mut [0]));
        if let Err(ErrorKind::WouldBlock | ErrorKind::TimedOut) =
            answer.map_err(|error| error.kind())
        {
            bail!("{address} takes connections, and says nothing for {SILENCE:?}");
        }
        return Ok(());
    }
    Ok(())
}

/// Connects; where `config` leaves a choice, in the second way if the first does not do, as libpq.
fn connect(config: &config::Postgres, statement_timeout: &str) -> anyhow::Result<Client> {
    ask(config)?;
    let mut client = client_config(config, statement_timeout);
    match &config.encryption {
        Encryption::Never => Ok(plain(&mut client)?),
        Encryption::WhereRequired(tls) => {
            let tls = rustls(tls)?;
            match plain(&mut client) {
                Err(refusal) if is_refusal(&refusal) => {
                    let encrypted = encrypted(client.ssl_mode(SslMode::Require), tls);
                    encrypted.with_context(|| format!("{:#}; with TLS", anyhow!(refusal)))
                }
                connected => Ok(connected?),
            }
        }
        Encryption::WhereOffered(tls) => {
            match encrypted(client.ssl_mode(SslMode::Prefer), rustls(tls)?) {
                Err(fault) if is_refusal(&fault) || may_be_of_tls(&fault) => {
                    let fault = format!("{:#}", anyhow!(fault));
                    debug!("Postgres at {config}: {fault}; trying without TLS");
                    plain(&mut client).map_err(|second| {
                        let second = anyhow!(second);
                        // Where the server has no TLS, the first time was without too.
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

/// Whether the server wants none of this user's connections, or none of this kind. A wrong password
/// is something else.
fn is_refusal(error: &postgres::Error) -> bool {
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

fn client_config(config: &config::Postgres, statement_timeout: &str) -> postgres::Config {
    let mut client = Client::configure();
    client
        .host(&config.host)
        .port(config.port)
        .dbname(&config.database)
        .application_name("omotes_orchestrator")
        // Once a lock on a job has been waited for, what its last holder has committed must be seen.
        // The last one lets go of the jobs that a replica has locked which hangs.
        .options(&format!(
            "-c default_transaction_isolation=read\\ committed \
             -c lock_timeout=30s -c statement_timeout={statement_timeout} \
             -c idle_in_transaction_session_timeout=1min",
        ))
        .connect_timeout(config::CONNECT_TIMEOUT)
        .keepalives_idle(Duration::from_secs(15))
        .keepalives_interval(Duration::from_secs(5))
        .keepalives_retries(3)
        .tcp_user_timeout(Duration::from_secs(30));
    if let Some(username) = &config.username {
        client.user(username);
    }
    if let Some(password) = &config.password {
        client.password(password.reveal());
    }
    client
}
