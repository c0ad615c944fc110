//! `config`: which configuration is in force, and where it comes from; or which limits the running service has.

use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use comfy_table::Cell;
use omotes_orchestrator::config::environment::Environment;
use omotes_orchestrator::config::limits::{Limit, differing};
use omotes_orchestrator::config::{Config, Setting};
use omotes_orchestrator::healthcheck::{self, InForce};
use omotes_orchestrator::telemetry::report::harmless;
use serde_json::json;

use super::{print, say_aside, table, warn};

#[derive(Args)]
pub(crate) struct Configuration {
    /// As JSON.
    #[arg(long)]
    json: bool,
    /// The limits and times that are in force at the service that runs, as it says at HTTP_BIND, and which of
    /// them are other ones here. Where it wants an account, HTTP_READONLY_AUTH or HTTP_BASIC_AUTH is given.
    #[arg(long)]
    running: bool,
}

/// # Errors
/// The configuration is faulty; what is in force is shown all the same. Or the service does not answer.
pub(crate) fn run(
    configuration: &Configuration,
    environment: &Environment,
) -> anyhow::Result<ExitCode> {
    if configuration.running {
        return running(&environment.config()?, configuration.json);
    }
    let settings = Config::settings(&|name| environment.variable(name));
    let source = |setting: &Setting| match setting.is_given {
        true if environment.is_from_file(&setting.name) => ".env",
        true => "environment",
        false => "default",
    };
    if configuration.json {
        let settings: Vec<_> = settings
            .iter()
            .map(|one| json!({"name": one.name, "value": one.value, "source": source(one)}))
            .collect();
        print(&(serde_json::to_string_pretty(&settings)? + "\n"))?;
    } else {
        let mut table = table(&["variable", "value", "from"]);
        for setting in &settings {
            let value = harmless(&setting.value);
            let row = [&setting.name, value.as_str(), source(setting)];
            table.add_row(row.map(Cell::new));
        }
        print(&format!("{}\n", table.trim_fmt()))?;
    }
    for near_miss in environment.near_misses() {
        warn(&near_miss);
    }
    environment.config()?;
    Ok(ExitCode::SUCCESS)
}

/// What is in force at the running service, and what differs from that here.
fn running(config: &Config, json: bool) -> anyhow::Result<ExitCode> {
    let bind = config
        .http_bind
        .context("HTTP_BIND is empty, so nobody can be asked")?;
    let accounts = [&config.http_readonly_auth, &config.http_basic_auth];
    let account = accounts.into_iter().find_map(Option::as_ref);
    let service = healthcheck::limits(bind, account)?;
    let here = config.limits();
    let differing = differing(&service.limits, &here);
    match json {
        true => {
            let all = as_json(&service, &differing);
            print(&(serde_json::to_string_pretty(&all)? + "\n"))?;
        }
        false => print(&as_table(&service))?,
    }
    for (limit, own) in &differing {
        let (name, value) = (harmless(&limit.name), harmless(&limit.value));
        warn(&match own {
            Some(own) => format!("{name} is {value} at the service, and {own} here"),
            None => format!("{name} is {value} at the service, and not known here"),
        });
    }
    if differing.is_empty() {
        say_aside(format_args!("here they are the same"));
    }
    Ok(ExitCode::SUCCESS)
}

fn as_table(service: &InForce) -> String {
    let mut limits = table(&["variable", "value", "what it limits", "in words"]);
    for limit in &service.limits {
        let row = [&limit.name, &limit.value, &limit.what, &limit.in_words];
        limits.add_row(row.map(|text| Cell::new(harmless(text))));
    }
    let mut text = format!("{}\n", limits.trim_fmt());
    if !service.queues.is_empty() {
        let mut queues = table(&["task queue", "limits"]);
        for (name, limit) in &service.queues {
            queues.add_row([harmless(name), limit.to_string()]);
        }
        text += &format!("\n{}\n", queues.trim_fmt());
    }
    let (host, version) = (harmless(&service.host), harmless(&service.version));
    text + &format!("\nin force at the service on {host}, version {version}\n")
}

/// Each with its value here where that is another one.
fn as_json(service: &InForce, differing: &[(&Limit, Option<&str>)]) -> serde_json::Value {
    let limits = service.limits.iter().map(|limit| {
        let mut row = json!(limit);
        if let Some((_, own)) = differing.iter().find(|(other, _)| *other == limit) {
            row["here"] = json!(own);
        }
        row
    });
    json!({
        "version": service.version,
        "host": service.host,
        "limits": limits.collect::<Vec<_>>(),
        "queues": service.queues,
    })
}
