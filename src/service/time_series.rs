//! Retires time series that nobody needs any more: scans InfluxDB periodically and does what
//! [`crate::domain::time_series::plan`] says.

use std::collections::HashSet;

use anyhow::Context;
use log::{debug, info, warn};

use crate::config::{Config, InfluxDb};
use crate::domain::time_series;
use crate::influx::Influx;
use crate::store::{Store, Upkeep};
use crate::telemetry::report::one_line;
use crate::threads::Signal;

/// A scan every [`Config::time_series_period`] among all replicas, until `stop` is given. Jobs do
/// not depend on it: an outage of InfluxDB is logged once, and the scan is tried again the next
/// time.
pub fn run(store: &Store, config: &Config, influxdb: &InfluxDb, stop: &Signal) {
    let influx = Influx::new(influxdb);
    let mut failing = false;
    let mut foreign_before = 0;
    loop {
        if stop.comes_within(config.time_series_period) {
            return;
        }
        match scan(store, config, influxdb, &influx) {
            Ok(None) => {}
            Ok(Some(foreign)) => {
                if failing {
                    info!("time series: InfluxDB answers again");
                }
                failing = false;
                if foreign != foreign_before {
                    info!("time series: {foreign} databases are not OMOTES's and are left alone");
                }
                foreign_before = foreign;
            }
            Err(error) if failing => debug!("time series: {error:#}"),
            Err(error) => {
                failing = true;
                warn!("time series are not looked after for now: {error:#}");
            }
        }
    }
}

/// One scan, unless another replica does it. Returns how many databases are not jobs'.
fn scan(
    store: &Store,
    config: &Config,
    influxdb: &InfluxDb,
    influx: &Influx,
) -> anyhow::Result<Option<usize>> {
    if !store
        .connection()?
        .claim(Upkeep::TimeSeries, config.time_series_period)?
    {
        return Ok(None);
    }
    let databases = influx.databases()?;
    let mut connection = store.connection()?;
    // Read after the databases, so that the row of a job that succeeded meanwhile is seen.
    let guards = connection.guards()?;
    let (now, oldest_running) = connection.oldest_running()?;
    let plan = time_series::plan(
        &databases,
        &guards,
        &protected(influxdb),
        oldest_running,
        now,
        config.job_retention,
    );
    let dry = config.time_series_dry_run;
    let would = if dry { "dry run, would be " } else { "" };
    for database in &plan.mark {
        let database = one_line(database);
        info!("time series {database}: no job has claimed them yet, {would}marked");
    }
    if !dry {
        connection.mark_series(&plan.mark, now)?;
    }
    for database in &plan.drop {
        info!(
            "time series {}: nobody needs them, {would}dropped",
            one_line(database)
        );
        if !dry {
            connection
                .delete_retired_series(database, || influx.drop_database(database))
                .with_context(|| format!("dropping {}", one_line(database)))?;
        }
    }
    for esdl_id in &plan.forget {
        let name = one_line(esdl_id);
        info!("time series {name}: deleted, and in no database here, {would}forgotten");
        if !dry {
            connection.delete_retired_series(esdl_id, || Ok(()))?;
        }
    }
    Ok(Some(plan.foreign))
}

/// The databases that the configuration protects.
pub fn protected(influxdb: &InfluxDb) -> HashSet<String> {
    let own = [influxdb.database.clone()];
    influxdb.protected.iter().cloned().chain(own).collect()
}
