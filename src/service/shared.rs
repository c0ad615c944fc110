//! What all threads share.

use std::process;
use std::sync::atomic::{AtomicBool, AtomicI64};
use std::sync::{Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded};
use jiff::Timestamp;
use uuid::Uuid;

use crate::config::Config;
use crate::domain::job::Rules;
use crate::domain::overview::{Overview, Queues};
use crate::domain::workflow::{Catalogue, CurrentCatalogue};
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
    /// One that is not connected to anything yet, and where to say that the catalogue has been
    /// replaced.
    ///
    /// # Errors
    /// There are too many handlers to count.
    pub fn new(config: Config, catalogue: Catalogue) -> anyhow::Result<(Service, Sender<()>)> {
        // One for each handler; one each for the probe, maintenance, time series and the inquiry.
        let connections = u32::try_from(config.handler_threads)? + 4;
        let host = gethostname::gethostname().to_string_lossy().into_owned();
        let (catalogue_changed, catalogue_news) = bounded(1);
        let service = Service {
            store: Store::new(&config.postgres, connections),
            views: Store::for_viewers(&config.postgres),
            can_look_on: AtomicBool::default(),
            catalogue: CurrentCatalogue::new(catalogue),
            catalogue_news,
            health: Health::starting(Timestamp::now()),
            metrics: Metrics::default(),
            queues: Mutex::default(),
            host: host.clone(),
            celery_sender: celery::Sender {
                origin: format!("gen{}@{host}", process::id()),
                reply_to: Uuid::new_v4(),
            },
            revoke_clock: AtomicI64::new(1),
            rules: Rules {
                delivery_limit: config.delivery_limit,
                retention: config.job_retention,
                telling: config.outcome_lost,
                outcome_delay: config.outcome_delay,
                timeout_result: config.timeout_result,
                reject_invalid_params: config.reject_invalid_params,
            },
            config,
        };
        Ok((service, catalogue_changed))
    }

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
