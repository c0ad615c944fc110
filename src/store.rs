//! Postgres: all SQL is here and below, and in `migrations/`.
//!
//! A handler locks the jobs of its batch, loads their states, and writes back what
//! [`crate::domain::batch::decide`] made of them, all in one [`Transaction`]; each statement works on all
//! of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::anyhow;
use postgres::error::SqlState;
use postgres::types::ToSql;
use postgres::{Row, Statement};
use thiserror::Error;
use uuid::Uuid;

pub use self::batch::Loaded;
pub use self::connect::Session;
use self::connect::{Access, ConnectError, Connector, noted};
pub use self::kept::{KeptResult, KeptSubmission};
pub use self::turns::{LimitChange, LostGrant, QueueChange, TurnChange};
pub use self::upkeep::{Around, KnownQueues, Overdue, Sign, Upkeep};
use crate::config;
use crate::threads::Calls;

mod activity;
mod acts;
mod alerts;
mod batch;
mod connect;
mod holders;
mod ids;
pub mod inspection;
mod kept;
pub mod migrate;
pub mod rights;
mod rows;
mod starts;
mod steps;
mod story;
mod time_series;
mod turns;
mod upkeep;
pub mod views;
pub mod workers;

/// What went wrong with the database, by what can be done about it.
#[derive(Debug, Error)]
pub enum StoreError {
    /// It may succeed on a new connection.
    #[error(transparent)]
    Transient(anyhow::Error),
    /// Somebody else has held a lock for longer than `lock_timeout`: Postgres works, and every
    /// other replica has to wait as well.
    #[error(transparent)]
    Locked(anyhow::Error),
    /// Postgres has no room for so much at once, usually in its lock table. A smaller batch may
    /// succeed.
    #[error(transparent)]
    TooMuch(anyhow::Error),
    /// It took longer than the connection's `statement_timeout`, or somebody cancelled it.
    #[error(transparent)]
    TooLong(anyhow::Error),
    /// Postgres refuses the content, now and later: a NUL in a text, a value out of range.
    #[error("what is in Postgres, or should be, is refused: {0}")]
    Refused(String),
}

impl From<postgres::Error> for StoreError {
    fn from(error: postgres::Error) -> Self {
        if let Some(refusal) = error.as_db_error().filter(|_| is_refusal(&error)) {
            return StoreError::Refused(refusal.message().to_owned());
        }
        let code = error.code().cloned();
        // A plain error says no more than "db error"; what the server said is in its source.
        let error = anyhow!(error).context("Postgres");
        match code {
            Some(SqlState::LOCK_NOT_AVAILABLE) => StoreError::Locked(error),
            Some(SqlState::OUT_OF_MEMORY) => StoreError::TooMuch(error),
            Some(SqlState::QUERY_CANCELED) => StoreError::TooLong(error),
            Some(_) | None => StoreError::Transient(error),
        }
    }
}

/// Whether the content itself is refused: data exceptions (class 22) and limits of Postgres (class
/// 54), such as for a text too long to index.
fn is_refusal(error: &postgres::Error) -> bool {
    let code = error.code().map(SqlState::code);
    code.is_some_and(|code| code.starts_with("22") || code.starts_with("54"))
}

/// Connections to the database.
#[derive(Clone)]
pub struct Store {
    pool: r2d2::Pool<Connector>,
    last_failure: LastFailure,
    /// How long anybody waits for a connection.
    patience: Duration,
    /// The same where somebody says no.
    patience_with_no: Duration,
    /// The calls of whoever uses its connections.
    calls: Arc<Calls>,
}

/// Why the pool last failed to connect: the pool's own error has only the first link of its cause chain.
#[derive(Debug, Clone, Default)]
struct LastFailure(Arc<Mutex<Option<ConnectError>>>);

impl r2d2::HandleError<ConnectError> for LastFailure {
    fn handle_error(&self, error: ConnectError) {
        *self.lock() = Some(error);
    }
}

impl LastFailure {
    fn in_words(&self) -> String {
        match &*self.lock() {
            None => "all are in use, or there is no answer".to_owned(),
            Some(last) => last.to_string(),
        }
    }

    fn is_denial(&self) -> bool {
        self.lock().as_ref().is_some_and(|last| last.is_denied)
    }

    fn lock(&self) -> MutexGuard<'_, Option<ConnectError>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// At most `connections` connections, opened when needed, to a server that takes writes.
    pub fn new(config: &config::Postgres, connections: u32) -> Store {
        let connector = Connector::new(config.clone(), "35s", Access::Write);
        Store::open(connector, connections)
    }

    /// For pages, metrics and the like, possibly from a standby; statements that take longer than
    /// anybody waits for a page are cancelled.
    pub fn for_viewers(config: &config::Postgres) -> Store {
        Store::open(Connector::new(config.clone(), "5s", Access::Read), VIEWERS)
    }

    fn open(connector: Connector, connections: u32) -> Store {
        let last_failure = LastFailure::default();
        let pool = r2d2::Pool::builder()
            .max_size(connections)
            .min_idle(Some(0))
            .connection_timeout(config::CONNECT_TIMEOUT)
            // Whoever waits for the connection reports the failure.
            .error_handler(Box::new(last_failure.clone()))
            .build_unchecked(connector);
        Store {
            pool,
            last_failure,
            patience: config::CONNECT_TIMEOUT,
            patience_with_no: config::CONNECT_TIMEOUT,
            calls: Arc::default(),
        }
    }

    /// One whose users wait only a moment where nobody listens, or they are not let in: trying again does
    /// not change that, as a rule.
    pub fn hasty(self) -> Store {
        Store {
            patience_with_no: PATIENCE_WITH_NO,
            ..self
        }
    }

    /// One whose users wait no longer than this for a connection. What is opened too late for one of
    /// them is there for the next.
    pub fn impatient(self, patience: Duration) -> Store {
        Store { patience, ..self }
    }

    /// The same pool for one thread: `calls` shows a watchdog since when one has been going on.
    pub fn watched_by(&self, calls: &Arc<Calls>) -> Store {
        Store {
            calls: calls.clone(),
            ..self.clone()
        }
    }

    /// How many connections are open, and how many of them are idle.
    pub fn connections(&self) -> (u32, u32) {
        let state = self.pool.state();
        (state.connections, state.idle_connections)
    }

    /// A connection on which nothing has failed so far; to a server that takes writes, unless the
    /// store is for viewers.
    ///
    /// # Errors
    /// [`StoreError::Transient`], after its patience, [`config::CONNECT_TIMEOUT`] as a rule, without one.
    pub fn connection(&self) -> Result<Connection, StoreError> {
        let _call = self.calls.begin();
        let mut client = self.pooled()?;
        // It is not why the next one fails.
        self.last_failure.lock().take();
        client.calls = self.calls.clone();
        Ok(Connection {
            client,
            statements: HashMap::new(),
        })
    }
}

impl Store {
    /// A connection of the pool, which goes on trying meanwhile.
    fn pooled(&self) -> Result<r2d2::PooledConnection<Connector>, StoreError> {
        let first = self.patience.min(self.patience_with_no);
        let more = self.patience - first;
        let mut got = self.pool.get_timeout(first);
        let is_given_up = !more.is_zero() && self.last_failure.is_denial();
        if got.is_err() && !more.is_zero() && !is_given_up {
            got = self.pool.get_timeout(more);
        }
        got.map_err(|_| {
            let why = self.last_failure.in_words();
            let patience = self.patience;
            StoreError::Transient(match is_given_up {
                true => anyhow!("no connection to Postgres: {why}"),
                false => anyhow!("no connection to Postgres within {patience:?}: {why}"),
            })
        })
    }
}

/// How long a server that says no is waited for where people wait: it may be about to start.
const PATIENCE_WITH_NO: Duration = Duration::from_secs(1);

/// Status page, pages that are followed, searches, metrics, the queue watch, and two for those who act.
const VIEWERS: u32 = 7;

/// One connection with the statements prepared on it so far.
pub struct Connection {
    client: r2d2::PooledConnection<Connector>,
    statements: HashMap<&'static str, Statement>,
}

impl Connection {
    /// The same for the batches of a handler, for as long as it lives. Each of their statements looks
    /// up rows by their keys, whatever the tables hold, so it is planned once instead of each time,
    /// which would take longer than its execution; and never by reading a whole table, which is
    /// best only while that is as good as empty. Has no effect behind a pooler, where nothing lives
    /// that long.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn for_batches(mut self) -> Result<Connection, StoreError> {
        if !self.client.is_pooled() {
            // Others who take it from the pool ask for other things.
            self.client.give_up();
            self.client.batch_execute(
                "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off",
            )?;
        }
        Ok(self)
    }

    /// Works on the revisions, see [`migrate`].
    ///
    /// # Errors
    /// Those of `work`.
    pub fn revisions<T>(
        &mut self,
        work: impl FnOnce(&mut Session) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        self.client.work(work)
    }

    /// Checks that Postgres would write a batch, without changing anything.
    ///
    /// # Errors
    /// It would not: it is a standby, its disk is full, the tables are locked, or the connection is lost.
    pub fn check_writing(&mut self) -> Result<(), StoreError> {
        let mut transaction = self.transaction()?;
        transaction.check_tables()?;
        // A transaction with an id of its own is written to the WAL, and its commit waits for that.
        transaction.execute("SELECT txid_current()", &[])?;
        transaction.commit()
    }

    /// Deletes the rows of these jobs, which have ended, and whose clients have been told;
    /// `with_course` if some of them have rows for their steps too, of which logs and messages stay if
    /// `keeps_logs`.
    ///
    /// # Errors
    /// The connection is lost; whether they are deleted is not known.
    pub fn settle(
        &mut self,
        job_ids: &[Uuid],
        with_course: bool,
        keeps_logs: bool,
    ) -> Result<(), StoreError> {
        let sql = match (with_course, keeps_logs) {
            (false, _) => {
                "WITH starts AS (DELETE FROM job_starts WHERE job_id = ANY($1))
                 DELETE FROM job WHERE job_id = ANY($1)"
            }
            (true, false) => {
                "WITH starts AS (DELETE FROM job_starts WHERE job_id = ANY($1)),
                      inputs AS (DELETE FROM job_input WHERE job_id = ANY($1)),
                      turns AS (DELETE FROM job_turn WHERE job_id = ANY($1)),
                      steps AS (UPDATE job_step SET logs = NULL, esdl_messages = NULL
                                WHERE job_id = ANY($1))
                 DELETE FROM job WHERE job_id = ANY($1)"
            }
            (true, true) => {
                "WITH starts AS (DELETE FROM job_starts WHERE job_id = ANY($1)),
                      inputs AS (DELETE FROM job_input WHERE job_id = ANY($1)),
                      turns AS (DELETE FROM job_turn WHERE job_id = ANY($1))
                 DELETE FROM job WHERE job_id = ANY($1)"
            }
        };
        if self.client.is_pooled() {
            self.client.execute(sql, &[&job_ids])?;
            return Ok(());
        }
        let statement = match self.statements.get(sql) {
            Some(statement) => statement.clone(),
            None => self.client.prepare(sql)?,
        };
        self.client.execute(&statement, &[&job_ids])?;
        self.statements.insert(sql, statement);
        Ok(())
    }

    /// Begins a transaction, which is rolled back when dropped.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn transaction(&mut self) -> Result<Transaction<'_>, StoreError> {
        let keeps_statements = !self.client.is_pooled();
        let (inner, failed, calls) = self.client.transaction()?;
        Ok(Transaction {
            inner,
            calls,
            statements: &mut self.statements,
            keeps_statements,
            failed,
        })
    }
}

pub struct Transaction<'a> {
    inner: postgres::Transaction<'a>,
    calls: &'a Calls,
    statements: &'a mut HashMap<&'static str, Statement>,
    /// Whether the next transaction is in the same session.
    keeps_statements: bool,
    /// Of the connection.
    failed: &'a mut bool,
}

impl Transaction<'_> {
    /// Checks that nobody has locked the tables against the writing of a batch. Whoever takes messages
    /// while they are locked can only hand them back, and of a quorum queue that is possible only so often.
    ///
    /// # Errors
    /// [`StoreError::Locked`], after a second, or the connection is lost.
    fn check_tables(&mut self) -> Result<(), StoreError> {
        self.execute("SET LOCAL lock_timeout = '1s'", &[])?;
        self.execute(
            "LOCK TABLE job, job_history, job_story, job_starts, job_step, job_input, esdl_time_series_info
             IN ROW EXCLUSIVE MODE",
            &[],
        )?;
        Ok(())
    }

    /// Commits the transaction.
    ///
    /// # Errors
    /// The connection is lost; whether it was committed is not known.
    pub fn commit(self) -> Result<(), StoreError> {
        let _call = self.calls.begin();
        Ok(noted(self.failed, self.inner.commit())?)
    }

    fn execute(
        &mut self,
        sql: &'static str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<u64, StoreError> {
        let statement = self.prepared(sql)?;
        let _call = self.calls.begin();
        let rows = self.inner.execute(&statement, params);
        Ok(noted(self.failed, rows)?)
    }

    fn query(
        &mut self,
        sql: &'static str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        let statement = self.prepared(sql)?;
        let _call = self.calls.begin();
        let rows = self.inner.query(&statement, params);
        Ok(noted(self.failed, rows)?)
    }

    fn prepared(&mut self, sql: &'static str) -> Result<Statement, StoreError> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        let _call = self.calls.begin();
        let statement = noted(self.failed, self.inner.prepare(sql))?;
        if self.keeps_statements {
            self.statements.insert(sql, statement.clone());
        }
        Ok(statement)
    }
}

fn expect_rows(what: &str, rows: u64, expected: usize) -> Result<(), StoreError> {
    if usize::try_from(rows) == Ok(expected) {
        Ok(())
    } else {
        Err(StoreError::Transient(anyhow!(
            "{what}: {rows} of {expected} rows were as they had been loaded; somebody else \
             changed the others"
        )))
    }
}
