//! What the service as a whole needs of Postgres: that it is reachable, at this program's revision,
//! and takes writes.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::anyhow;
use jiff::Timestamp;
use log::{debug, info, warn};

use crate::service::shared::Service;
use crate::store::StoreError;
use crate::store::migrate::{self, REVISIONS};
use crate::telemetry::health::Part;
use crate::threads::{Backoff, Signal};

/// Between attempts to connect.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_secs(15);
/// The same where another server may have been promoted meanwhile.
const LAST_PAUSE_OF_SEVERAL: Duration = Duration::from_secs(2);
/// How often Postgres is looked at for `/health/ready`.
const PROBE_PERIOD: Duration = Duration::from_secs(5);

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
    let writes = || service.store.connection()?.check_writing();
    while let Err(error) = writes() {
        let is_locked = matches!(error, StoreError::Locked(_));
        let error = anyhow!(error);
        if is_locked {
            // Unlike an outage, nobody else notices it.
            let error = error.context("somebody has locked the tables");
            if !locked {
                warn!("nothing is taken from RabbitMQ for now: {error:#}");
            }
            service.no_session(&error);
            backoff.reset();
        } else {
            debug!("no session without Postgres: {error:#}");
        }
        locked = is_locked;
        if backoff.stopped_by(stop) {
            return false;
        }
    }
    true
}

/// Probes Postgres periodically, so that an idle service notices too when it is gone.
pub fn probe(service: &Service, stop: &Signal) {
    loop {
        let (postgres, revisions) = match service.store.connection() {
            Ok(mut connection) => match connection.revisions(migrate::current) {
                Ok(applied) if applied == REVISIONS.len() => (None, None),
                Ok(_) => (
                    None,
                    Some("the tables are not at this program's revision".to_owned()),
                ),
                Err(error) => (None, Some(format!("{error:#}"))),
            },
            Err(error) => {
                let fault = format!("{}: {:#}", service.config.postgres, anyhow!(error));
                (
                    Some(fault),
                    Some("not known while Postgres does not answer".to_owned()),
                )
            }
        };
        let now = Timestamp::now();
        let works = postgres.is_none();
        service.can_look_on.store(works, Ordering::Relaxed);
        service.health.report(Part::Postgres, postgres, now);
        service.health.report(Part::Revisions, revisions, now);
        if !works && service.views.connection().is_ok() {
            service.can_look_on.store(true, Ordering::Relaxed);
        }
        if stop.comes_within(PROBE_PERIOD) {
            return;
        }
    }
}
