//! What all threads share.

use std::process;
use std::sync::atomic::{AtomicBool, AtomicI64};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use jiff::Timestamp;
use log::info;
use uuid::Uuid;

use crate::config::Config;
use crate::domain::job::Rules;
use crate::domain::overview::{Filter, Outage, Overview, Page, Queues, Story};
use crate::domain::turns::{self, CurrentLimits, Limits};
use crate::domain::workflow::{Catalogue, CurrentCatalogue};
use crate::service::clients::ClientLooks;
use crate::service::looks::Looks;
use crate::store::{Connection, Store, StoreError, Upkeep};
use crate::telemetry::health::{Health, Part, PartView};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trouble::trouble;
use crate::wire::celery;

/// How long a page waits for Postgres: in an outage it is to say so before its reader has gone.
const VIEWERS_PATIENCE: Duration = Duration::from_secs(4);

/// What outlives a session.
pub struct Service {
    pub config: Config,
    pub store: Store,
    /// The same database, read-only, for pages, searches, metrics and the queue watch.
    pub views: Store,
    /// Whether `views` can connect, as far as is known; possibly to a standby.
    pub can_look_on: AtomicBool,
    pub catalogue: CurrentCatalogue,
    /// Receives something when the catalogue has been replaced.
    pub catalogue_news: Receiver<()>,
    /// What is allowed at task queues.
    pub limits: CurrentLimits,
    /// The same, as of when tasks were last counted in that have not waited for their turn.
    pub counted: CurrentLimits,
    pub health: Health,
    pub metrics: Metrics,
    /// RabbitMQ's queues, as last seen.
    pub queues: Mutex<Option<Queues>>,
    /// The state of the deployment as last seen, by what is defined and allowed.
    overviews: Looks<(Vec<String>, Limits), Overview>,
    /// Pages of jobs, as last seen.
    pages: Looks<Filter, Page>,
    /// What clients do whose jobs are looked at.
    clients: ClientLooks,
    /// This replica's name.
    pub host: String,
    pub celery_sender: celery::Sender,
    pub revoke_clock: AtomicI64,
    pub rules: Rules,
}

impl Service {
    /// One that is not connected to anything yet, and the sender that says that the catalogue has
    /// been replaced.
    ///
    /// # Errors
    /// There are too many handlers to count.
    pub fn new(config: Config, catalogue: Catalogue) -> anyhow::Result<(Service, Sender<()>)> {
        // One for each handler; one each for the probe, maintenance, time series, the inquiry, the look
        // at the workers, and for granting turns and hearing of them.
        let connections = u32::try_from(config.handler_threads)? + 7;
        // Behind a pooler the maintenance has two.
        let connections = connections + u32::from(config.postgres.is_pooled);
        let connections = connections + u32::from(config.alerts.is_some());
        // And those who act through the page.
        let connections = connections
            + if config.http_basic_auth.is_some() {
                2
            } else {
                0
            };
        let host = gethostname::gethostname().to_string_lossy().into_owned();
        let (catalogue_changed, catalogue_news) = bounded(1);
        let service = Service {
            store: Store::new(&config.postgres, connections),
            views: Store::for_viewers(&config.postgres)
                .impatient(VIEWERS_PATIENCE)
                .hasty(),
            can_look_on: AtomicBool::default(),
            catalogue: CurrentCatalogue::new(catalogue),
            catalogue_news,
            limits: CurrentLimits::default(),
            counted: CurrentLimits::default(),
            health: Health::starting(Timestamp::now()),
            metrics: Metrics::default(),
            queues: Mutex::default(),
            overviews: Looks::default(),
            pages: Looks::default(),
            clients: ClientLooks::default(),
            host: host.clone(),
            celery_sender: celery::Sender {
                origin: format!("gen{}@{host}", process::id()),
                reply_to: Uuid::new_v4(),
            },
            revoke_clock: AtomicI64::new(1),
            rules: Rules {
                delivery_limit: config.delivery_limit,
                retention: config.job_retention,
                outcome_lost: config.outcome_lost,
                outcome_delay: config.outcome_delay,
                timeout_result: config.timeout_result,
                reject_invalid_params: config.reject_invalid_params,
                keep_logs: config.keep_logs,
                keep_parameters: config.keep_parameters,
                fair_share_separator: config.fair_share_separator.clone(),
            },
            config,
        };
        Ok((service, catalogue_changed))
    }

    /// Calls a job's parameters as the definition of its workflow does, and says where its output is.
    pub fn complete(&self, story: &mut Story) {
        story.tell_whereabouts(self.config.keep_results, None);
        let catalogue = self.catalogue.get();
        let workflow = story.job.workflow.as_deref();
        if let Some(definition) = workflow.and_then(|name| catalogue.definition(name)) {
            story.name_parameters(&definition.parameters);
        }
    }

    /// The same, and says what its client does. RabbitMQ is asked when somebody comes to look at this job; who goes
    /// on looking is told what was known then.
    pub fn complete_one(&self, story: &mut Story, comes: bool) {
        self.complete(story);
        if !story.asks_its_queue() {
            return;
        }
        let which = (story.job.id, story.job.ends.is_told);
        let (_, parts) = self.health.parts(Timestamp::now());
        let mut faults = parts.iter().filter(|part| part.why.is_some());
        let is_there = !faults.any(|part| part.part == Part::Broker);
        let queue = match comes && is_there {
            true => self.clients.ask(&self.config.sdk_rabbitmq, which),
            false => self.clients.last(which).filter(|_| is_there),
        };
        story.tell_whereabouts(self.config.keep_results, queue);
    }

    /// Reads what is allowed at task queues.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn read_limits(&self, connection: &mut Connection) -> Result<(), StoreError> {
        let limits = connection.queue_limits(self.catalogue.get().queue_limits())?;
        if limits != *self.limits.get() {
            info!("limits of task queues: {}", turns::in_words(&limits));
            self.limits.replace(limits);
        }
        Ok(())
    }

    /// Reports that there is no session, and that what only a session can tell is not known.
    pub fn no_session(&self, why: &anyhow::Error) {
        let now = Timestamp::now();
        let why = format!("{why:#}");
        self.health.report(Part::Broker, Some(why), now);
        for part in [Part::Publishing, Part::Handling] {
            let fault = "not known without a session with RabbitMQ".to_owned();
            self.health.report(part, Some(fault), now);
        }
    }

    /// The state of the deployment, without the single jobs; what Postgres knows of it as of a moment
    /// ago.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn overview(&self, connection: &mut Connection) -> Result<Overview, StoreError> {
        let now = self.overview_without_database();
        let limits = self.limits.get().as_ref().clone();
        let seen = self
            .overviews
            .at((now.defined.clone(), limits.clone()), || {
                self.overview_of_database(&now.defined, &limits, connection)
            })?;
        let seen = seen.as_ref().clone();
        Ok(Overview {
            has_rows: seen.has_rows,
            rows: seen.rows,
            queued: seen.queued,
            turns: seen.turns,
            workers: seen.workers,
            maintenance: seen.maintenance,
            ..now
        })
    }

    /// A page of the jobs that match `filter`, as of a moment ago.
    ///
    /// # Errors
    /// As [`Connection::jobs`].
    pub fn page(&self, connection: &mut Connection, filter: &Filter) -> Result<Page, StoreError> {
        let look = || {
            let turns = match filter.finished {
                true => Vec::new(),
                false => self.overview(connection)?.turns,
            };
            connection.jobs(filter, &turns)
        };
        Ok(self.pages.at(filter.clone(), look)?.as_ref().clone())
    }

    /// Has pages show what has just been done.
    pub fn look_anew(&self) {
        self.overviews.forget();
        self.pages.forget();
    }

    fn overview_of_database(
        &self,
        defined: &[String],
        limits: &Limits,
        connection: &mut Connection,
    ) -> Result<Overview, StoreError> {
        let mut maintenance = connection.maintenance_runs()?;
        if self.config.influxdb.is_none() {
            // It may have run earlier, and is not late now.
            maintenance.retain(|(task, _)| task != Upkeep::TimeSeries.name());
        }
        if self.config.alerts.is_none() {
            maintenance.retain(|(task, _)| task != Upkeep::Alerts.name());
        }
        let workers = match self.config.workers_period {
            Some(_) => Some(connection.workers()?),
            None => None,
        };
        Ok(Overview {
            has_rows: true,
            rows: connection.workflows(defined)?,
            queued: connection.queued()?,
            turns: connection.turns(limits, self.config.priority_aging)?,
            workers,
            maintenance,
            ..Overview::default()
        })
    }

    /// The same, as far as it is known without Postgres.
    pub fn overview_without_database(&self) -> Overview {
        let (connections, idle_connections) = self.store.connections();
        let catalogue = self.catalogue.get();
        let (_, parts) = self.health.parts(Timestamp::now());
        let is_cut_off = |part: &PartView| part.part == Part::Broker && part.why.is_some();
        let outage = trouble(&parts).and_then(|trouble| {
            let what = trouble.of_all_jobs()?;
            let since = Some(trouble.since);
            Some(Outage { what, since })
        });
        Overview {
            outage,
            is_cut_off: parts.iter().any(is_cut_off),
            defined: catalogue.names(),
            tasks: catalogue.tasks_by_workflow(),
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
