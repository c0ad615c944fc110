//! The database's revisions: one chain, of which the first ones are the Python service's.
//!
//! The Python service's are recorded in Alembic's own table, which never goes past its head, so
//! that the Python service can be started on the same database at any time. Ours are recorded in
//! `orchestrator_version` and only add to what is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Context, bail, ensure};
use postgres::Transaction;

use super::connect::Session;
use super::rights;

/// One step of the schema: a folder of `migrations/`.
#[derive(Debug)]
pub struct Revision {
    pub id: &'static str,
    /// What it does, in a few words.
    pub slug: &'static str,
    up: &'static str,
    down: &'static str,
}

/// All revisions, each building on the one before it.
pub static REVISIONS: &[Revision] = include!(concat!(env!("OUT_DIR"), "/revisions.rs"));

/// The last revision of the Python service.
pub const ALEMBIC_HEAD: &str = "543bc8f6ad87";
/// Held while revisions are inspected or applied, so that replicas can start at the same time.
const LOCK_KEY: i64 = 0x6f6d_6f74_6573_6462;

/// Which of the two tables records a revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ledger {
    Alembic,
    Own,
}

impl Ledger {
    fn of(position: usize) -> Ledger {
        let alembic_head = REVISIONS.iter().position(|one| one.id == ALEMBIC_HEAD);
        if Some(position) <= alembic_head {
            Ledger::Alembic
        } else {
            Ledger::Own
        }
    }

    fn table(self) -> &'static str {
        match self {
            Ledger::Alembic => "alembic_version",
            Ledger::Own => "orchestrator_version",
        }
    }
}

/// Applies all revisions up to and including `target`, by default the last one, and returns those
/// that were applied. All of them or none are.
///
/// # Errors
/// The target is unknown or behind the database, the database is not in a state of this chain, or the
/// user lacks rights that this or the service's work needs; the text says what to do.
pub fn upgrade(client: &mut Session, target: Option<&str>) -> anyhow::Result<&'static [Revision]> {
    let end = match target {
        Some(id) => position(id)? + 1,
        None => REVISIONS.len(),
    };
    let mut transaction = locked(client)?;
    let applied = applied(&mut transaction)?;
    ensure!(
        applied <= end,
        "the database is at {} already, which is past {}; `db downgrade` goes back",
        name(applied),
        name(end)
    );
    if applied < end {
        let lacks = rights::to_upgrade(&mut transaction)?;
        rights::ensure_none(&user(&mut transaction)?, &lacks)
            .with_context(|| format!("the tables cannot be upgraded to {}", name(end)))?;
    }
    for (position, revision) in REVISIONS.iter().enumerate().take(end).skip(applied) {
        transaction
            .batch_execute(revision.up)
            .with_context(|| format!("revision {}_{}", revision.id, revision.slug))?;
        record(&mut transaction, position + 1)?;
    }
    let lacks = rights::to_work(&mut transaction)?;
    rights::ensure_none(&user(&mut transaction)?, &lacks)?;
    transaction.commit()?;
    Ok(&REVISIONS[applied..end])
}

fn user(transaction: &mut Transaction<'_>) -> Result<String, postgres::Error> {
    let row = transaction.query_one("SELECT quote_ident(current_user)", &[])?;
    Ok(row.get(0))
}

/// Undoes all revisions after `target`, or all of them for `base`, if `agree` agrees to what is
/// lost. Returns the undone revisions in the order of the chain; None if `agree` did not agree.
/// `agree` is not asked if there is nothing to undo.
///
/// # Errors
/// As [`upgrade`]; or somebody else is connected to the tables.
pub fn downgrade(
    client: &mut Session,
    target: &str,
    agree: impl FnOnce(&[Loss]) -> bool,
) -> anyhow::Result<Option<&'static [Revision]>> {
    let end = match target {
        "base" => 0,
        id => position(id)? + 1,
    };
    // A replica that starts waits for the same lock.
    let mut transaction = locked(client)?;
    let applied = applied(&mut transaction)?;
    ensure!(
        applied >= end,
        "the database is at {}, which is before {}; `db upgrade` goes forward",
        name(applied),
        name(end)
    );
    if applied == end {
        return Ok(Some(&[]));
    }
    let lacks = rights::to_upgrade(&mut transaction)?;
    rights::ensure_none(&user(&mut transaction)?, &lacks)?;
    nobody_else(&mut transaction)?;
    let before = columns(&mut transaction)?;
    // Tried first in a transaction: what is lost cannot be counted afterwards.
    let mut trial = transaction.transaction()?;
    undo(&mut trial, applied, end)?;
    let after = columns(&mut trial)?;
    trial.rollback()?;
    if !agree(&losses(&mut transaction, &before, &after)?) {
        return Ok(None);
    }
    undo(&mut transaction, applied, end)?;
    transaction.commit()?;
    Ok(Some(&REVISIONS[end..applied]))
}

fn undo(transaction: &mut Transaction<'_>, applied: usize, end: usize) -> anyhow::Result<()> {
    for (position, revision) in REVISIONS.iter().enumerate().take(applied).skip(end).rev() {
        transaction
            .batch_execute(revision.down)
            .with_context(|| format!("undoing revision {}_{}", revision.id, revision.slug))?;
        record(transaction, position)?;
    }
    Ok(())
}

/// What is lost when a revision is undone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loss {
    Table {
        table: String,
        rows: i64,
    },
    Column {
        column: String,
        values: i64,
    },
    /// What does not fit into the type is cut to it.
    Type {
        column: String,
        from: String,
        to: String,
    },
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |count: &i64| if *count == 1 { "" } else { "s" };
        match self {
            Loss::Table { table, rows } => write!(f, "table {table}: {rows} row{}", plural(rows)),
            Loss::Column { column, values } => {
                write!(f, "column {column}: {values} value{}", plural(values))
            }
            Loss::Type { column, from, to } => write!(f, "column {column}: {from} becomes {to}"),
        }
    }
}

/// Checks that no replica and no Python service is connected: it would go on without its tables.
/// Sessions of another user may not be visible.
fn nobody_else(transaction: &mut Transaction<'_>) -> anyhow::Result<()> {
    let row = transaction.query_one(
        "SELECT count(*),
                coalesce(string_agg(DISTINCT coalesce(host(client_addr), 'this machine'), ', '), '')
         FROM pg_stat_activity
         WHERE application_name = current_setting('application_name')
           AND datname = current_database() AND pid <> pg_backend_pid()",
        &[],
    )?;
    let (connections, hosts): (i64, String) = (row.get(0), row.get(1));
    ensure!(
        connections == 0,
        "others are connected as omotes_orchestrator, from {hosts} ({connections} connections): stop all \
         replicas, and commands such as `jobs watch`, before the tables are taken from them"
    );
    Ok(())
}

/// Types by table and column, of the schema that the tables are in.
type Columns = BTreeMap<(String, String), String>;

/// All tables except the records of revisions.
fn columns(transaction: &mut Transaction<'_>) -> anyhow::Result<Columns> {
    let ledgers = [Ledger::Alembic.table(), Ledger::Own.table()];
    let rows = transaction.query(
        "SELECT table_name::text, column_name::text, data_type::text
         FROM information_schema.columns
         WHERE table_schema = current_schema() AND table_name <> ALL ($1)",
        &[&ledgers.as_slice()],
    )?;
    let columns = rows.iter();
    Ok(columns
        .map(|row| ((row.get(0), row.get(1)), row.get(2)))
        .collect())
}

/// What is in `before` and not in `after`.
fn losses(
    transaction: &mut Transaction<'_>,
    before: &Columns,
    after: &Columns,
) -> anyhow::Result<Vec<Loss>> {
    let left: BTreeSet<_> = after.keys().map(|(table, _)| table).collect();
    let tables: BTreeSet<_> = before.keys().map(|(table, _)| table).collect();
    let mut losses = Vec::new();
    for table in tables.difference(&left) {
        losses.push(Loss::Table {
            rows: count(transaction, table, "*")?,
            table: (*table).clone(),
        });
    }
    for ((table, column), from) in before.iter().filter(|((table, _), _)| left.contains(table)) {
        let name = format!("{table}.{column}");
        match after.get(&(table.clone(), column.clone())) {
            Some(to) if to == from => {}
            Some(to) => losses.push(Loss::Type {
                column: name,
                from: from.clone(),
                to: to.clone(),
            }),
            None => losses.push(Loss::Column {
                values: count(transaction, table, column)?,
                column: name,
            }),
        }
    }
    Ok(losses)
}

/// How many rows of a table have a value in a column; `*` counts all. The names come from the
/// revisions.
fn count(transaction: &mut Transaction<'_>, table: &str, column: &str) -> anyhow::Result<i64> {
    let sql = format!("SELECT count({column}) FROM {table}");
    Ok(transaction.query_one(&sql, &[])?.get(0))
}

/// How many of [`REVISIONS`] the database has.
///
/// # Errors
/// As [`upgrade`].
pub fn current(client: &mut Session) -> anyhow::Result<usize> {
    applied(&mut client.begin()?)
}

/// Whether a database with so many of [`REVISIONS`] has any of this program's own.
pub fn has_own(applied: usize) -> bool {
    applied
        .checked_sub(1)
        .is_some_and(|last| Ledger::of(last) == Ledger::Own)
}

/// Whether a database with so many of [`REVISIONS`] has all of the Python service's.
pub fn has_all_of_python(applied: usize) -> bool {
    Ledger::of(applied) == Ledger::Own
}

fn position(id: &str) -> anyhow::Result<usize> {
    REVISIONS
        .iter()
        .position(|revision| revision.id == id)
        .with_context(|| format!("there is no revision {id:?}; `db history` lists them"))
}

/// The name of a database with the first `applied` revisions.
fn name(applied: usize) -> &'static str {
    match applied.checked_sub(1) {
        Some(last) => REVISIONS[last].id,
        None => "base",
    }
}

fn locked(client: &mut Session) -> anyhow::Result<Transaction<'_>> {
    let mut transaction = client.begin()?;
    transaction
        .execute("SELECT pg_advisory_xact_lock($1)", &[&LOCK_KEY])
        .context("waiting for another replica that applies revisions")?;
    // A revision may have to go through a long table.
    transaction.batch_execute("SET LOCAL statement_timeout = 0")?;
    Ok(transaction)
}

fn applied(transaction: &mut Transaction<'_>) -> anyhow::Result<usize> {
    let alembic = recorded(transaction, Ledger::Alembic)?;
    let own = recorded(transaction, Ledger::Own)?;
    let Some(alembic) = alembic else {
        let stray: bool = transaction
            .query_one("SELECT to_regclass('job') IS NOT NULL", &[])?
            .get(0);
        ensure!(
            !stray && own.is_none(),
            "the database has a table `job` or `orchestrator_version`, but `alembic_version` does \
             not say which revision it is at. If the tables are the Python service's, insert its \
             revision there; if they are another program's, use another database"
        );
        return Ok(0);
    };
    let Ok(alembic_position) = position(&alembic) else {
        bail!(
            "`alembic_version` says {alembic:?}, a revision that this program does not know. A \
             newer Python service has upgraded the database: use a version of this program that \
             knows it, or take the database back with that service's `alembic downgrade \
             {ALEMBIC_HEAD}`"
        );
    };
    ensure!(
        Ledger::of(alembic_position) == Ledger::Alembic,
        "`alembic_version` says {alembic:?}, which belongs into `orchestrator_version`; set it to \
         {ALEMBIC_HEAD:?}"
    );
    let Some(own) = own else {
        return Ok(alembic_position + 1);
    };
    ensure!(
        alembic == ALEMBIC_HEAD,
        "`alembic_version` says {alembic:?} and `orchestrator_version` {own:?}, which builds on \
         {ALEMBIC_HEAD:?}. Somebody ran Alembic's downgrade on tables that had been upgraded \
         further: restore them from a backup, or run `alembic upgrade head` with the Python service"
    );
    match position(&own) {
        Ok(position) if Ledger::of(position) == Ledger::Own => Ok(position + 1),
        Ok(_) | Err(_) => bail!(
            "`orchestrator_version` says {own:?}, a revision that this program does not know. A \
             newer version of it has upgraded the database: use that one, or take the database \
             back with that one's `db downgrade {}`",
            name(REVISIONS.len())
        ),
    }
}

fn recorded(transaction: &mut Transaction<'_>, ledger: Ledger) -> anyhow::Result<Option<String>> {
    let table = ledger.table();
    let exists: bool = transaction
        .query_one("SELECT to_regclass($1::text) IS NOT NULL", &[&table])?
        .get(0);
    if !exists {
        return Ok(None);
    }
    let readable: bool = transaction
        .query_one("SELECT has_table_privilege($1::text, 'SELECT')", &[&table])?
        .get(0);
    if !readable {
        // Then this is probably not the only such table.
        let lacks = rights::to_work(transaction)?;
        rights::ensure_none(&user(transaction)?, &lacks)?;
    }
    let rows = transaction.query(&format!("SELECT version_num FROM {table}"), &[])?;
    ensure!(
        rows.len() <= 1,
        "`{table}` has {} rows, expected one: two chains of revisions were mixed",
        rows.len()
    );
    Ok(rows.first().map(|row| row.get(0)))
}

/// Records in both tables that the first `applied` revisions are in place, as Alembic itself would.
fn record(transaction: &mut Transaction<'_>, applied: usize) -> anyhow::Result<()> {
    let ledger_of_last = applied.checked_sub(1).map(Ledger::of);
    for ledger in [Ledger::Alembic, Ledger::Own] {
        let table = ledger.table();
        if ledger == Ledger::Own && ledger_of_last != Some(Ledger::Own) {
            transaction.batch_execute(&format!("DROP TABLE IF EXISTS {table}"))?;
            continue;
        }
        transaction.batch_execute(&format!(
            "CREATE TABLE IF NOT EXISTS {table} (
                 version_num varchar(32) NOT NULL,
                 CONSTRAINT {table}_pkc PRIMARY KEY (version_num)
             )"
        ))?;
        if ledger_of_last != Some(ledger) && ledger_of_last.is_some() {
            continue;
        }
        transaction.batch_execute(&format!("DELETE FROM {table}"))?;
        if ledger_of_last.is_some() {
            transaction.execute(
                &format!("INSERT INTO {table} (version_num) VALUES ($1)"),
                &[&name(applied)],
            )?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_python_services_revisions_come_first() {
        let alembic: Vec<_> = REVISIONS
            .iter()
            .enumerate()
            .filter(|(position, _)| Ledger::of(*position) == Ledger::Alembic)
            .map(|(_, revision)| revision.id)
            .collect();
        assert_eq!(
            alembic,
            [
                "aacf0b4d16ad",
                "60506a3a582f",
                "93fd48ba9ee8",
                "b3e9e4d8d50e",
                ALEMBIC_HEAD
            ]
        );
        assert!(REVISIONS.len() > alembic.len());
    }
}
