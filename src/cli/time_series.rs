//! `time-series`: those of output ESDLs, and whether somebody needs them.

use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Subcommand;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::time_series::{Guard, PROTECTED};
use omotes_orchestrator::influx::Influx;
use omotes_orchestrator::service::time_series;
use omotes_orchestrator::telemetry::report::one_line;

use super::{Agreed, NOTHING_DONE, connect, say, say_aside};

#[derive(Subcommand)]
pub(super) enum Action {
    /// List what is known of them, and whether InfluxDB has a database for each.
    List,
    /// Keep them from now on, also those of a deleted job.
    Keep { esdl_id: String },
    /// Drop them now, without waiting for their retention.
    Drop {
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
            for guard in connection.guards()? {
                say(format_args!("{}", describe_series(&guard, &databases)))?;
            }
        }
        Action::Keep { esdl_id } => {
            if !connection.set_series_in_use(esdl_id, true)? {
                bail!("nothing is known of time series {esdl_id}");
            }
            say(format_args!("{}: kept", one_line(esdl_id)))?;
        }
        Action::Drop { esdl_id, agreed } => {
            let protected = time_series::protected(influxdb);
            if PROTECTED.contains(&esdl_id.as_str()) || protected.contains(esdl_id) {
                bail!("the database {esdl_id} is protected");
            }
            if !agreed.yes {
                let guards = connection.guards()?;
                let guard = guards.iter().find(|guard| guard.esdl_id == *esdl_id);
                let guard =
                    guard.with_context(|| format!("nothing is known of time series {esdl_id}"))?;
                say(format_args!(
                    "{}",
                    describe_series(guard, &influx.databases()?)
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
