//! Who holds what messages wait for: sessions of others that have locked rows or tables for a while.

use std::net::IpAddr;

use jiff::{SignedDuration, Timestamp};
use postgres::Row;

use super::{Connection, StoreError};
use crate::domain::overview::spoken;
use crate::domain::text::one_line;

/// How many are named.
const MOST: i64 = 3;

impl Connection {
    /// Sessions of others that have had a lock on tables of ours for some seconds, and more than one to read
    /// them; the oldest first.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn holders(&mut self) -> Result<Vec<String>, StoreError> {
        let rows = self.client.query(
            "SELECT pid, application_name, usename::text AS name, client_addr, state, xact_start,
                    clock_timestamp() AS now
             FROM pg_stat_activity
             WHERE datname = current_database() AND pid <> pg_backend_pid()
               AND application_name IS DISTINCT FROM current_setting('application_name')
               -- Of other users nothing more may be told than that they are there.
               AND (xact_start IS NULL OR xact_start < clock_timestamp() - interval '5 seconds')
               AND pid IN (
                   SELECT pid FROM pg_locks JOIN pg_class ON pg_class.oid = relation
                   WHERE granted AND mode <> 'AccessShareLock'
                     AND pg_locks.database = (SELECT oid FROM pg_database
                                              WHERE datname = current_database())
                     AND relnamespace = (SELECT relnamespace FROM pg_class
                                         WHERE oid = to_regclass('job')))
             ORDER BY xact_start, pid LIMIT $1",
            &[&MOST],
        )?;
        let holders: Result<Vec<_>, postgres::Error> = rows.iter().map(holder).collect();
        Ok(holders?)
    }
}

/// `psql (process 4711, user anna, from 10.0.0.7), whose transaction is 40 s old and idle`; harmless.
fn holder(row: &Row) -> Result<String, postgres::Error> {
    let pid: i32 = row.try_get("pid")?;
    let program: Option<&str> = row.try_get("application_name")?;
    let program = program.filter(|name| !name.is_empty());
    let mut told = format!("{} (process {pid}", one_line(program.unwrap_or("somebody")));
    if let Some(user) = row.try_get::<_, Option<&str>>("name")? {
        told = told + ", user " + &one_line(user);
    }
    if let Some(from) = row.try_get::<_, Option<IpAddr>>("client_addr")? {
        told += &format!(", from {from}");
    }
    told.push(')');
    let since: Option<Timestamp> = row.try_get("xact_start")?;
    let now: Timestamp = row.try_get("now")?;
    let state: Option<&str> = row.try_get("state")?;
    if let Some(since) = since {
        let age = spoken(now.duration_since(since).max(SignedDuration::ZERO));
        let is_idle = state.is_some_and(|state| state.starts_with("idle"));
        let idle = if is_idle { " and idle" } else { "" };
        told += &format!(", whose transaction is {age} old{idle}");
    }
    Ok(told)
}
