//! The service as a whole: what is started, in which order, and how it stops.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use crossbeam_channel::{Receiver, Sender, bounded, select, unbounded};
use jiff::Timestamp;
use log::{debug, error, info, warn};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;
use uuid::Uuid;

use crate::config::Config;
use crate::domain::job::Rules;
use crate::domain::workflow::{Catalogue, CurrentCatalogue};
use crate::http;
use crate::service::handler::panic_text;
use crate::service::queues;
use crate::service::session;
use crate::service::shared::Service;
use crate::service::time_series;
use crate::store::migrate::{self, REVISIONS};
use crate::store::{Store, StoreError};
use crate::telemetry::health::{Health, Part};
use crate::telemetry::logger;
use crate::telemetry::metrics::Metrics;
use crate::text_file;
use crate::threads::{Pending, Signal};
use crate::wire::celery;

/// Between a stop signal and the end of the process, whatever is still going on then. Docker kills
/// after ten seconds.
const EXIT_DEADLINE: Duration = Duration::from_millis(4800);
/// Between attempts to connect, doubled each time and jittered.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_secs(15);
/// A session that lasted this long was a good one: the next attempt does not wait.
const GOOD_SESSION: Duration = Duration::from_secs(60);
/// How often Postgres is looked at for `/health/ready`.
const PROBE_PERIOD: Duration = Duration::from_secs(5);

/// Reads the workflow definitions.
///
/// # Errors
/// The file cannot be read, or all that is wrong with what is in it.
pub fn read_catalogue(path: &std::path::Path) -> anyhow::Result<Catalogue> {
    let name = || format!("workflow definitions {}", path.display());
    let text = text_file::read(path).with_context(name)?;
    Catalogue::parse(&text).with_context(name)
}

/// Runs the service until SIGTERM, SIGINT or SIGQUIT.
///
/// # Errors
/// Something that only somebody else can put right: the workflow definitions, the HTTP address,
/// the database's revision.
pub fn run(config: Config) -> anyhow::Result<()> {
    let catalogue = read_catalogue(&config.workflow_config_path)?;
    let server = config.http_bind.map(http::listen).transpose()?;
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
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGUSR1, SIGUSR2])?;
    let signals_handle = signals.handle();
    let (stop, stopped) = Signal::pending();
    let (finished, all_finished) = Signal::pending();
    let (signal, signalled) = unbounded();

    thread::scope(|scope| {
        let named = |name: &str| thread::Builder::new().name(name.to_owned());
        let service = &service;
        named("signals").spawn_scoped(scope, move || {
            for number in signals.forever() {
                match number {
                    SIGHUP => reload(service, &catalogue_changed),
                    SIGUSR1 => logger::change_level(true),
                    SIGUSR2 => logger::change_level(false),
                    // Its receiver lives as long as signals can come.
                    _ => drop(signal.send(number)),
                }
            }
        })?;
        named("stop").spawn_scoped(scope, || {
            // Moved here so that the end of this thread is the end of the service's life.
            let stop = stop;
            wait_for_end(&signalled, &all_finished, stop);
        })?;
        let mut aside = Vec::new();
        if let Some(server) = &server {
            let mut lane = |name| -> anyhow::Result<_> {
                let (questions, asked) = bounded(http::MAX_WAITING);
                let stopped = stopped.clone();
                // The endpoint is there as long as its questions are answered, who have these ends.
                let answer = move || http::answer(server, service, &asked, &stopped);
                aside.push(named(name).spawn_scoped(scope, answer)?);
                Ok(questions)
            };
            let lanes = http::Lanes {
                pages: lane("page")?,
                searches: lane("search")?,
                metrics: lane("metrics")?,
            };
            named("http").spawn_scoped(scope, move || http::serve(server, service, &lanes))?;
        }

        let outcome = prepare_database(service, &stopped).and_then(|()| {
            aside.push(named("probe").spawn_scoped(scope, || {
                restarted(&stopped, || probe(service, &stopped));
            })?);
            aside.push(named("queues").spawn_scoped(scope, || {
                restarted(&stopped, || queues::run(service, &stopped));
            })?);
            if let Some(influxdb) = &service.config.influxdb {
                aside.push(named("time-series").spawn_scoped(scope, || {
                    time_series::run(&service.store, &service.config, influxdb, &stopped);
                })?);
            }
            run_sessions(service, &stopped);
            Ok(())
        });
        if outcome.is_ok() {
            // The service has been stopped, and so have these. They may be waiting for an answer,
            // which counts towards the deadline.
            for thread in aside {
                // A panic has been logged where it happened.
                let _ = thread.join();
            }
        }
        drop(finished);
        signals_handle.close();
        if let Some(server) = &server {
            server.stop();
        }
        outcome
    })?;
    info!("stopped");
    Ok(())
}

/// Runs a thread's body, and after a panic, which the log has, again.
fn restarted(stopped: &Signal, body: impl Fn()) {
    while catch_unwind(AssertUnwindSafe(&body)).is_err() {
        if stopped.comes_within(LAST_PAUSE) {
            return;
        }
    }
}

/// Reads the workflow definitions again. Faulty ones change nothing.
fn reload(service: &Service, changed: &Sender<()>) {
    match read_catalogue(&service.config.workflow_config_path) {
        Ok(catalogue) => {
            info!(
                "workflow definitions read again: {} workflows",
                catalogue.announcement().workflows.len()
            );
            service.catalogue.replace(catalogue);
            // News that is still waiting will tell this one too.
            let _ = changed.try_send(());
        }
        Err(error) => error!("the workflow definitions stay as they were: {error:#}"),
    }
}

/// Ends the service on the first signal, and the process on the second or when the service takes
/// too long. Returns, dropping `stop`, when the service has ended.
fn wait_for_end(signalled: &Receiver<i32>, all_finished: &Signal, stop: Pending) {
    select! {
        recv(signalled) -> number => info!("stopping on signal {}", number.unwrap_or_default()),
        recv(all_finished.receiver()) -> _ => return,
    }
    drop(stop);
    select! {
        recv(all_finished.receiver()) -> _ => {}
        recv(signalled) -> number => {
            warn!("a second signal: exiting at once");
            process::exit(128 + number.unwrap_or_default());
        }
        default(EXIT_DEADLINE) => {
            warn!("exiting with work in hand, which goes back to the queues");
            process::exit(0);
        }
    }
}

/// Waits for Postgres and brings its tables to this program's revision.
fn prepare_database(service: &Service, stopped: &Signal) -> anyhow::Result<()> {
    let mut pause = FIRST_PAUSE;
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
        if !wait(&mut pause, stopped) {
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

/// One session after the other, until `stopped` is given.
fn run_sessions(service: &Service, stopped: &Signal) {
    let mut pause = FIRST_PAUSE;
    loop {
        if stopped.is_given() {
            return;
        }
        let started = Instant::now();
        let sessions = service.metrics.sessions();
        let outcome = catch_unwind(AssertUnwindSafe(|| session::run(service, stopped)));
        let outcome =
            outcome.unwrap_or_else(|panic| Err(anyhow!("panicked: {}", panic_text(&*panic))));
        let Err(failure) = outcome else {
            return;
        };
        if stopped.is_given() {
            warn!("the session with RabbitMQ was lost while stopping: {failure:#}");
            return;
        }
        service.no_session(&failure);
        if service.metrics.sessions() > sessions {
            error!("the session with RabbitMQ has ended, a new one follows: {failure:?}");
        } else {
            warn!("still no session with RabbitMQ: {failure:#}");
        }
        if started.elapsed() > GOOD_SESSION {
            pause = FIRST_PAUSE;
        }
        if !wait(&mut pause, stopped) || !wait_for_postgres(service, stopped) {
            return;
        }
    }
}

/// Waits for a Postgres that takes writes, without which a session would only keep messages from
/// other replicas. False when the service stops.
fn wait_for_postgres(service: &Service, stopped: &Signal) -> bool {
    let mut pause = FIRST_PAUSE;
    let writes = || service.store.connection()?.check_writing();
    while let Err(error) = writes() {
        debug!("no session without Postgres: {:#}", anyhow!(error));
        if !wait(&mut pause, stopped) {
            return false;
        }
    }
    true
}

/// Waits for about `pause`, which becomes longer for the next time. False when the service stops.
fn wait(pause: &mut Duration, stopped: &Signal) -> bool {
    let jittered = pause.mul_f64(0.5 + fastrand::f64());
    *pause = (*pause * 2).min(LAST_PAUSE);
    !stopped.comes_within(jittered)
}

/// Looks at Postgres from time to time, for an idle service too is to know that it is gone.
fn probe(service: &Service, stopped: &Signal) {
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
        if stopped.comes_within(PROBE_PERIOD) {
            return;
        }
    }
}
