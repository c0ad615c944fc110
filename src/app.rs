//! The service as a whole: what is started, in which order, and how it stops.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use crossbeam_channel::{Receiver, Sender, bounded, select, unbounded};
use log::{error, info, warn};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use crate::config::{self, Config};
use crate::http::{self, Endpoint};
use crate::service::database;
use crate::service::handler::{ForWantOfPostgres, panic_text};
use crate::service::queues;
use crate::service::session;
use crate::service::shared::Service;
use crate::service::time_series;
use crate::service::workers;
use crate::telemetry::logger;
use crate::threads::{Backoff, Pending, Signal};

/// The longest time between a stop signal and the end of the process. Docker kills after ten
/// seconds.
const EXIT_DEADLINE: Duration = Duration::from_millis(4800);
/// Between attempts to connect, doubled each time and jittered.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_secs(15);
/// After a session that lasted this long, the next attempt is made without delay.
const GOOD_SESSION: Duration = Duration::from_secs(60);

/// Runs the service until SIGTERM, SIGINT or SIGQUIT.
///
/// # Errors
/// Something that an operator has to put right: the workflow definitions, the HTTP address, the
/// database's revision.
pub fn run(config: Config) -> anyhow::Result<()> {
    let catalogue = config::read_catalogue(&config.workflow_config_path)?;
    let endpoint = Endpoint::listen(&config)?;
    let (service, catalogue_changed) = Service::new(config, catalogue)?;
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGUSR1, SIGUSR2])?;
    let signals_handle = signals.handle();
    let (stop, stopped) = Signal::pending();
    let (finished, all_finished) = Signal::pending();
    let (signal, signalled) = unbounded();

    thread::scope(|scope| {
        let service = &service;
        named("signals").spawn_scoped(scope, move || {
            signals
                .forever()
                .for_each(|number| heed(number, service, &catalogue_changed, &signal));
        })?;
        named("stop").spawn_scoped(scope, || {
            // Moved here so that the end of this thread is the end of the stop signal's life.
            let stop = stop;
            wait_for_end(&signalled, &all_finished, stop);
        })?;
        let mut aside = Vec::new();
        if let Some(endpoint) = &endpoint {
            aside.extend(start_http(scope, endpoint, service, &stopped)?);
        }

        let outcome = database::prepare(service, &stopped).and_then(|()| {
            aside.push(named("probe").spawn_scoped(scope, || {
                restarted(&stopped, || database::probe(service, &stopped));
            })?);
            aside.push(named("queues").spawn_scoped(scope, || {
                restarted(&stopped, || queues::run(service, &stopped));
            })?);
            aside.push(named("workers").spawn_scoped(scope, || {
                restarted(&stopped, || workers::run(service, &stopped));
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
            // The service has been stopped, and so have these threads. They may be waiting for an
            // answer, which counts towards the deadline.
            for thread in aside {
                // A panic has been logged where it happened.
                let _ = thread.join();
            }
        }
        drop(finished);
        signals_handle.close();
        if let Some(endpoint) = &endpoint {
            endpoint.stop();
        }
        outcome
    })?;
    info!("stopped");
    Ok(())
}

/// Acts on a signal; those that end the service go to `stop`.
fn heed(number: i32, service: &Service, catalogue_changed: &Sender<()>, stop: &Sender<i32>) {
    match number {
        SIGHUP => reload(service, catalogue_changed),
        SIGUSR1 => logger::change_level(true),
        SIGUSR2 => logger::change_level(false),
        // Its receiver outlives the signals.
        _ => drop(stop.send(number)),
    }
}

/// Starts the threads of the HTTP endpoint. Returns those that end with the service.
fn start_http<'scope>(
    scope: &'scope Scope<'scope, '_>,
    endpoint: &'scope Endpoint,
    service: &'scope Service,
    stopped: &Signal,
) -> anyhow::Result<Vec<ScopedJoinHandle<'scope, ()>>> {
    let mut threads = Vec::new();
    let mut lane = |name| -> anyhow::Result<_> {
        let (questions, asked) = bounded(http::MAX_WAITING);
        let stopped = stopped.clone();
        // The endpoint lives as long as these receivers of its questions.
        let answer = move || http::answer(endpoint, service, &asked, &stopped);
        threads.push(named(name).spawn_scoped(scope, answer)?);
        Ok(questions)
    };
    let acts = service.config.http_basic_auth.is_some();
    let mut of_operators = |name| match acts {
        true => lane(name),
        // Nobody is let through to it.
        false => Ok(bounded(0).0),
    };
    let lanes = http::Lanes {
        actions: of_operators("act")?,
        slow_actions: of_operators("act-slowly")?,
        pages: lane("page")?,
        searches: lane("search")?,
        metrics: lane("metrics")?,
    };
    named("http").spawn_scoped(scope, move || http::serve(endpoint, service, &lanes))?;
    let stopped = stopped.clone();
    let follow = move || http::follow_pages(endpoint, service, &stopped);
    threads.push(named("live").spawn_scoped(scope, follow)?);
    Ok(threads)
}

fn named(name: &str) -> thread::Builder {
    thread::Builder::new().name(name.to_owned())
}

/// Runs a thread's body, and restarts it after a panic, which has been logged.
fn restarted(stopped: &Signal, body: impl Fn()) {
    while catch_unwind(AssertUnwindSafe(&body)).is_err() {
        if stopped.comes_within(LAST_PAUSE) {
            return;
        }
    }
}

/// Reloads the workflow definitions. Faulty ones change nothing.
fn reload(service: &Service, changed: &Sender<()>) {
    match config::read_catalogue(&service.config.workflow_config_path) {
        Ok(catalogue) => {
            info!(
                "workflow definitions read again: {} workflows",
                catalogue.announcement().workflows.len()
            );
            service.catalogue.replace(catalogue);
            // A notification that is still waiting covers this change too.
            let _ = changed.try_send(());
        }
        Err(error) => error!("the workflow definitions stay as they were: {error:#}"),
    }
}

/// Stops the service on the first signal, and ends the process on the second or when stopping takes
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

/// One session after the other, until `stopped` is given.
fn run_sessions(service: &Service, stopped: &Signal) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LAST_PAUSE);
    loop {
        if stopped.is_given() || !database::wait(service, stopped) {
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
        if failure.is::<ForWantOfPostgres>() {
            // It follows from what the log has.
            warn!("the session with RabbitMQ has ended, for want of Postgres: {failure:#}");
        } else if service.metrics.sessions() > sessions {
            error!("the session with RabbitMQ has ended, a new one follows: {failure:?}");
        } else {
            warn!("still no session with RabbitMQ: {failure:#}");
        }
        if started.elapsed() > GOOD_SESSION {
            backoff.reset();
        }
        if backoff.stopped_by(stopped) {
            return;
        }
    }
}
