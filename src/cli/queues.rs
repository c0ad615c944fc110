//! `queues`: the depth of RabbitMQ's queues, their consumers, and how both change. Throughput that
//! leaves the depth unchanged does not show: AMQP does not tell it.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use comfy_table::{Cell, CellAlignment};
use crossbeam_channel::after;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::overview::{Depth, Queue};
use omotes_orchestrator::service::queues::Watch;
use omotes_orchestrator::telemetry::report::one_line;
use serde_json::json;

use super::workflows::defined;
use super::{connect, overview, print, say_aside, table, told_of};

#[derive(Args)]
pub(crate) struct Queues {
    /// Seconds between two measurements, from which the change per second is computed. AMQP does
    /// not tell how much goes in and out meanwhile. With 0 there is one, at once.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(0..=3600))]
    interval: u64,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// # Errors
/// RabbitMQ is not there.
pub(crate) fn run(config: &Config, queues: &Queues) -> anyhow::Result<ExitCode> {
    let watch = told_of("RabbitMQ", || Watch::open(config))?;
    // Jobs may have workflows that the definitions here do not.
    let of_jobs =
        connect(config).and_then(|mut connection| overview(config, &mut connection, None));
    let (workflows, tasks) = match of_jobs {
        Ok(overview) => (overview.rows.into_keys().collect(), overview.tasks),
        Err(_) => {
            let (workflows, tasks, _) = defined(config);
            (workflows, tasks)
        }
    };
    let mut workflows: Vec<String> = workflows;
    workflows.extend(tasks.into_values().flatten());
    workflows.sort_unstable();
    workflows.dedup();
    let before = watch.look(config, &workflows)?;
    let now = match queues.interval {
        0 => before.clone(),
        seconds => {
            let _ = after(Duration::from_secs(seconds)).recv();
            watch.look(config, &workflows)?
        }
    };
    let looks: Vec<_> = before
        .iter()
        .zip(&now)
        .filter_map(|(before, now)| Some((now, before.depth?, now.depth?)))
        .map(|(queue, before, now)| (queue, now, change(before, now, queues.interval)))
        .collect();
    if queues.json {
        let looks = looks.iter().map(|(queue, depth, change)| {
            let Queue { vhost, name, .. } = queue;
            json!({"connection": vhost, "name": name, "messages": depth.messages,
                   "consumers": depth.consumers, "change_per_second": change})
        });
        let looks: Vec<_> = looks.collect();
        print(&(serde_json::to_string_pretty(&looks)? + "\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    if looks.is_empty() {
        say_aside(format_args!(
            "none of the queues is there: no orchestrator has been on these vhosts, and no worker"
        ));
        return Ok(ExitCode::SUCCESS);
    }
    let mut header = vec!["connection", "queue", "messages", "consumers"];
    header.extend((queues.interval > 0).then_some("change/s"));
    let mut table = table(&header);
    for (queue, depth, change) in looks {
        let number = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let mut row = vec![
            Cell::new(queue.vhost.name()),
            Cell::new(one_line(&queue.name)),
            number(depth.messages.to_string()),
            number(depth.consumers.to_string()),
        ];
        row.extend(change.map(|change| number(format!("{change:+.1}"))));
        table.add_row(row);
    }
    print(&format!("{}\n", table.trim_fmt()))?;
    Ok(ExitCode::SUCCESS)
}

/// None where there was no time in between.
fn change(before: Depth, now: Depth, seconds: u64) -> Option<f64> {
    let change = f64::from(now.messages) - f64::from(before.messages);
    (seconds > 0).then(|| change / seconds as f64)
}
