//! `time-series`: those of output ESDLs, and whether somebody needs them.

use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Subcommand;
use omotes_orchestrator::actions::bounded;
use omotes_orchestrator::config::{Config, InfluxDb};
use omotes_orchestrator::domain::time_series::{Guard, PROTECTED};
use omotes_orchestrator::influx::Influx;
use omotes_orchestrator::service::time_series;
use omotes_orchestrator::store::Connection;
use omotes_orchestrator::telemetry::report::one_line;

use super::{Agreed, NOTHING_DONE, connect, say, say_aside};

#[derive(Subcommand)]
pub(super) enum Action {
    /// List what is known of them, and whether InfluxDB has a database for each.
    List,
    /// Keep them from now on, also those of a deleted job.
    Keep {
        /// The id of the ESDL, or an unambiguous beginning of it.
        esdl_id: String,
    },
    /// Drop them now, without waiting for their retention.
    Drop {
        /// The id of the ESDL, or an unambiguous beginning of it.
        esdl_id: String,
        #[command(flatten)]
        agreed: Agreed,
    },
}

/// # Errors
/// InfluxDB or Postgres is not there, or nothing is known of the series.
pub(super) fn run(config: &Config, action: &Action) -> anyhow::Result<ExitCode> {
    let influxdb = config.influxdb.as_ref();
    let influxdb =
        influxdb.context("INFLUXDB_HOST is empty: there is no InfluxDB to look after")?;
    let influx = Influx::new(influxdb);
    let mut connection = connect(config)?;
    match action {
        Action::List => {
            let databases = influx.databases()?;
            let guards = connection.guards()?;
            if guards.is_empty() {
                say_aside(format_args!("nothing is known of any time series"));
            }
            for guard in guards {
                say(format_args!("{}", describe_series(&guard, &databases)))?;
            }
        }
        Action::Keep { esdl_id } => {
            let esdl_id = &named(&mut connection, esdl_id)?.esdl_id;
            if !connection.set_series_in_use(esdl_id, true)? {
                bail!("nothing is known of time series {esdl_id}");
            }
            say(format_args!("{}: kept", one_line(esdl_id)))?;
        }
        Action::Drop { esdl_id, agreed } => {
            refuse_protected(influxdb, esdl_id)?;
            let guard = named(&mut connection, esdl_id)?;
            let esdl_id = &guard.esdl_id;
            refuse_protected(influxdb, esdl_id)?;
            if !agreed.yes {
                say(format_args!(
                    "{}",
                    describe_series(&guard, &influx.databases()?)
                ))?;
                say_aside(format_args!("these would be dropped; {NOTHING_DONE}"));
                return Ok(ExitCode::FAILURE);
            }
            if !connection.set_series_in_use(esdl_id, false)? {
                bail!("nothing is known of time series {esdl_id}");
            }
            connection.delete_retired_series(esdl_id, || influx.drop_database(esdl_id))?;
            say(format_args!("{}: dropped", one_line(esdl_id)))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// That a database is none that may be dropped.
fn refuse_protected(influxdb: &InfluxDb, name: &str) -> anyhow::Result<()> {
    let protected = time_series::protected(influxdb);
    if PROTECTED.contains(&name) || protected.iter().any(|one| one == name) {
        bail!("the database {name} is protected");
    }
    Ok(())
}

/// The one that is called so, or else the only one whose id begins so.
fn named(connection: &mut Connection, name: &str) -> anyhow::Result<Guard> {
    let mut guards = connection.guards()?;
    if let Some(place) = guards.iter().position(|guard| guard.esdl_id == name) {
        return Ok(guards.swap_remove(place));
    }
    guards.retain(|guard| !name.is_empty() && guard.esdl_id.starts_with(name));
    match guards.len() {
        0 => bail!("nothing is known of time series {name}"),
        1 => Ok(guards.remove(0)),
        _ => {
            let ids: Vec<_> = guards
                .iter()
                .map(|guard| one_line(&guard.esdl_id))
                .collect();
            bail!(
                "{name} is the beginning of several: {}",
                bounded(&ids, ", ")
            )
        }
    }
}

/// The time series of an ESDL in a line; `databases` are those that InfluxDB has.
fn describe_series(guard: &Guard, databases: &[String]) -> String {
    let place = match databases.contains(&guard.esdl_id) {
        true => "in InfluxDB",
        false => "not in InfluxDB",
    };
    let job = match guard.job_id {
        Some(job) => format!("of job {job}"),
        None => "claimed by no job".to_owned(),
    };
    let state = match guard.deactivated_at {
        Some(since) => format!("not needed since {since:.0}"),
        None => "in use".to_owned(),
    };
    format!("{}: {state}, {job}, {place}", one_line(&guard.esdl_id))
}
