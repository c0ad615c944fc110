//! What the service as a whole needs of Postgres: that it is reachable, at this program's revision,
//! and takes writes.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::anyhow;
use jiff::Timestamp;
use log::{debug, info, warn};

use crate::service::shared::Service;
use crate::store::migrate::{self, REVISIONS};
use crate::store::{Connection, StoreError};
use crate::telemetry::health::Part;
use crate::threads::{Backoff, Signal};

/// Between attempts to connect.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_secs(15);
/// The same where another server may have been promoted meanwhile.
const LAST_PAUSE_OF_SEVERAL: Duration = Duration::from_secs(2);
/// How often Postgres is looked at for `/health/ready`.
const PROBE_PERIOD: Duration = Duration::from_secs(5);
const LOCKED: &str = "somebody has locked the tables";

fn pauses(service: &Service) -> Backoff {
    let longest = match service.config.postgres.servers.len() {
        1 => LAST_PAUSE,
        _ => LAST_PAUSE_OF_SEVERAL,
    };
    Backoff::new(FIRST_PAUSE, longest)
}

/// Waits for Postgres and brings its tables to this program's revision, or until `stop` is given.
///
/// # Errors
/// Something that an operator has to put right.
pub fn prepare(service: &Service, stop: &Signal) -> anyhow::Result<()> {
    let mut backoff = pauses(service);
    loop {
        let error = match service.store.connection() {
            Ok(mut connection) => {
                match connection.revisions(|client| migrate::upgrade(client, None)) {
                    Ok(applied) => {
                        for revision in applied {
                            info!(
                                "database: applied revision {}_{}",
                                revision.id, revision.slug
                            );
                        }
                        let now = Timestamp::now();
                        service.health.report(Part::Postgres, None, now);
                        service.health.report(Part::Revisions, None, now);
                        return Ok(());
                    }
                    Err(error) if goes_away(&error) => error,
                    Err(error) => return Err(error.context(service.config.postgres.to_string())),
                }
            }
            Err(
                StoreError::Transient(error)
                | StoreError::Locked(error)
                | StoreError::TooMuch(error)
                | StoreError::TooLong(error),
            ) => error,
            Err(refused @ StoreError::Refused(_)) => return Err(refused.into()),
        };
        let fault = format!("{}: {error:#}", service.config.postgres);
        warn!("waiting for Postgres at {fault}");
        service
            .health
            .report(Part::Postgres, Some(fault), Timestamp::now());
        if backoff.stopped_by(stop) {
            return Ok(());
        }
    }
}

/// Whether a failed upgrade may work later: Postgres went away or somebody holds a lock.
fn goes_away(error: &anyhow::Error) -> bool {
    error
        .chain()
        .find_map(|cause| cause.downcast_ref::<postgres::Error>())
        .is_some_and(|error| match error.code() {
            // Connection, transaction rollback, resources, lock not available, intervention.
            Some(code) => ["08", "40", "53", "55", "57"].contains(&&code.code()[..2]),
            None => true,
        })
}

/// Waits for a Postgres that takes writes: without one, a session would only keep messages from
/// other replicas, and hand them back in the end. False when the service stops.
pub fn wait(service: &Service, stop: &Signal) -> bool {
    let mut backoff = pauses(service);
    let mut locked = false;
    let mut has_failed = false;
    let writes = || service.store.connection()?.check_writing();
    while let Err(error) = writes() {
        has_failed = true;
        let is_locked = matches!(error, StoreError::Locked(_));
        let error = anyhow!(error);
        if is_locked {
            // Unlike an outage, nobody else notices it.
            let error = error.context(LOCKED);
            if !locked {
                warn!("nothing is taken from RabbitMQ for now: {error:#}");
            }
            postgres_is_faulty(service, &error, Timestamp::now());
            service.no_session(&error);
            backoff.reset();
        } else {
            debug!("no session without Postgres: {error:#}");
            postgres_is_faulty(service, &error, Timestamp::now());
        }
        locked = is_locked;
        if backoff.stopped_by(stop) {
            return false;
        }
    }
    if has_failed {
        service.health.does_again(Part::Postgres, Timestamp::now());
    }
    true
}

fn postgres_is_faulty(service: &Service, error: &anyhow::Error, since: Timestamp) {
    let fault = format!("{}: {error:#}", service.config.postgres);
    service.health.report(Part::Postgres, Some(fault), since);
}

/// Probes Postgres periodically, so that an idle service notices too when it is gone or takes no writes.
pub fn probe(service: &Service, stop: &Signal) {
    let mut locked_since = None;
    loop {
        let asked = Timestamp::now();
        match service.store.connection() {
            Ok(mut connection) => {
                service.can_look_on.store(true, Ordering::Relaxed);
                locked_since = look(service, &mut connection, (asked, locked_since));
            }
            Err(error) => {
                service.can_look_on.store(false, Ordering::Relaxed);
                postgres_is_faulty(service, &anyhow!(error), asked);
                let unknown = Some("not known while Postgres does not answer".to_owned());
                service.health.report(Part::Revisions, unknown, asked);
                if service.views.connection().is_ok() {
                    service.can_look_on.store(true, Ordering::Relaxed);
                }
            }
        }
        if stop.comes_within(PROBE_PERIOD) {
            return;
        }
    }
}

/// Looks at the tables' revision and whether they could be written to. Returns since when somebody has
/// locked them: one lock is no fault, as long as the next look finds none.
fn look(
    service: &Service,
    connection: &mut Connection,
    (asked, locked_since): (Timestamp, Option<Timestamp>),
) -> Option<Timestamp> {
    let revisions = match connection.revisions(migrate::current) {
        Ok(applied) if applied == REVISIONS.len() => None,
        Ok(_) => Some("the tables are not at this program's revision".to_owned()),
        Err(error) => Some(format!("{error:#}")),
    };
    let is_current = revisions.is_none();
    service.health.report(Part::Revisions, revisions, asked);
    // Of other tables nothing follows.
    let writes = match is_current {
        true => connection.check_writing(),
        false => Ok(()),
    };
    match (writes, locked_since) {
        (Ok(()), _) => {
            let now = Timestamp::now();
            service.health.report(Part::Postgres, None, now);
            None
        }
        (Err(StoreError::Locked(_)), None) => Some(asked),
        (Err(StoreError::Locked(error)), Some(since)) => {
            postgres_is_faulty(service, &error.context(LOCKED), since);
            Some(since)
        }
        (Err(error), _) => {
            postgres_is_faulty(service, &anyhow!(error), asked);
            None
        }
    }
}
