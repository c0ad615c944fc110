//! What all threads share.

use std::sync::atomic::{AtomicBool, AtomicI64};
use std::sync::{Mutex, PoisonError};

use crossbeam_channel::Receiver;
use jiff::Timestamp;

use crate::config::Config;
use crate::domain::job::Rules;
use crate::domain::overview::{Overview, Queues};
use crate::domain::workflow::CurrentCatalogue;
use crate::store::{Connection, Store, StoreError, Task};
use crate::telemetry::health::{Health, Part};
use crate::telemetry::metrics::Metrics;
use crate::wire::celery;

/// What outlives a session.
pub struct Service {
    pub config: Config,
    pub store: Store,
    /// The same database, for those who look on.
    pub views: Store,
    /// Whether those who look on get a connection, as far as is known: from a standby, say, too.
    pub can_look_on: AtomicBool,
    pub catalogue: CurrentCatalogue,
    /// Something comes in when the catalogue has been replaced.
    pub catalogue_news: Receiver<()>,
    pub health: Health,
    pub metrics: Metrics,
    /// RabbitMQ's queues, as they were a moment ago.
    pub queues: Mutex<Option<Queues>>,
    /// What this replica calls itself.
    pub host: String,
    pub celery_sender: celery::Sender,
    pub revoke_clock: AtomicI64,
    pub rules: Rules,
}

impl Service {
    /// Notes that there is no session: what only one can know is not known.
    pub fn no_session(&self, why: &anyhow::Error) {
        let now = Timestamp::now();
        let why = format!("{why:#}");
        self.health.report(Part::Broker, Some(why), now);
        for part in [Part::Publishing, Part::Handling] {
            let fault = "not known without a session with RabbitMQ".to_owned();
            self.health.report(part, Some(fault), now);
        }
    }

    /// What is going on in the deployment, but for the single jobs.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn overview(&self, connection: &mut Connection) -> Result<Overview, StoreError> {
        let overview = self.overview_without_database();
        let mut maintenance = connection.maintenance_runs()?;
        if self.config.influxdb.is_none() {
            // It may have been done before, and is not late now.
            maintenance.retain(|(task, _)| task != Task::TimeSeries.name());
        }
        Ok(Overview {
            has_rows: true,
            rows: connection.workflows(&overview.defined)?,
            maintenance,
            ..overview
        })
    }

    /// The same as far as it is known without Postgres.
    pub fn overview_without_database(&self) -> Overview {
        let (connections, idle_connections) = self.store.connections();
        Overview {
            defined: self.catalogue.get().names(),
            queues: self
                .queues
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            connections,
            idle_connections,
            ..Overview::default()
        }
    }
}
