//! What holds here that nobody sees otherwise: limits in force, and how much room Postgres takes.

use std::time::Duration;

use jiff::SignedDuration;
use maud::{Markup, html};

use super::layout::Frame;
use super::prose::prose;
use super::words::command;
use crate::actions::counted;
use crate::config::Config;
use crate::domain::activity::Sizes;
use crate::domain::overview::spoken;
use crate::domain::switch::{Remark, verdict_back};

/// Closed at first.
pub(super) fn section(config: &Config, sizes: Option<&Sizes>) -> Markup {
    html! {
        details.queues {
            summary { "Limits in force, and how full it is" }
            div.card { dl {
                @for (name, what, value) in limits(config) {
                    dt title=(name) { (what) } dd { (value) }
                }
                @if let Some(sizes) = sizes {
                    dt { "Postgres" } dd { (room(sizes.database)) " in this database" }
                    @for (table, bytes) in &sizes.tables { dt { "Table " code { (table) } } dd { (room(*bytes)) } }
                    dt { "Room left on its disk" } dd.dim { "Postgres does not say" }
                }
            } }
        }
    }
}

/// Whether the place may be given back to the Python service now, as far as this service knows; closed at first,
/// but for that.
pub(super) fn way_back(frame: &Frame<'_>, remarks: &[Remark]) -> Markup {
    let faulty = frame.parts.iter().filter(|part| part.why.is_some());
    let faulty = faulty.map(|part| format!("{} is not in order", part.part.name()));
    let known = remarks.iter().filter_map(|remark| remark.hinders.clone());
    let reasons: Vec<_> = faulty.chain(known).collect();
    let in_the_way = remarks.iter().filter(|remark| remark.hinders.is_some());
    let short = match reasons.len() {
        0 => "nothing is in the way".to_owned(),
        _ => format!("not yet, {}", counted(reasons.len(), "reason")),
    };
    html! {
        details.queues {
            summary { "Back to the Python service " span.dim { (short) } }
            p { (verdict_back(&reasons)) }
            ul { @for remark in in_the_way {
                li { (prose(&remark.found)) ". " span.dim { (prose(remark.remedy)) } }
            } }
            p.dim { "As far as this service knows. Before the switch stop it, and ask: "
                (command("omotes-orchestrator doctor --before-switch=back")) }
        }
    }
}

/// By their environment variables.
fn limits(config: &Config) -> Vec<(&'static str, &'static str, String)> {
    let kept = |time: Duration| match time.is_zero() {
        true => "not kept".to_owned(),
        false => long(time),
    };
    let starts = match config.delivery_limit {
        1 => "1; with a second one that counts the job ends".to_owned(),
        limit => format!("{limit}; with another one that counts the job ends"),
    };
    let lost = match config.task_lost {
        Some(time) => format!("when no worker has had its task for {}", long(time)),
        None => "never for that".to_owned(),
    };
    let asked = match config.workers_period {
        Some(period) => format!("every {}", long(period)),
        None => "never".to_owned(),
    };
    let faulty = match config.reject_invalid_params {
        true => "refused",
        false => "run, with a warning in the log",
    };
    let aging = match config.priority_aging.is_zero() {
        true => "never".to_owned(),
        false => format!("by a level each {}", long(config.priority_aging)),
    };
    vec![
        (
            "TIMEOUT_JOB_MANAGER_START_BUFFER_SEC",
            "Timeouts begin to be enforced",
            format!("{} after the start", long(config.timeout_start_buffer)),
        ),
        (
            "TIMEOUT_JOB_HANDLER_RERUN_SEC",
            "Timeouts are checked every",
            long(config.timeout_check_period),
        ),
        (
            "DELIVERY_LIMIT_THRESHOLD_PER_JOB",
            "Starts of a job",
            starts,
        ),
        ("TASK_LOST_SEC", "A job ends", lost),
        (
            "WORKERS_PERIOD_SEC",
            "Workers are asked what they do",
            asked,
        ),
        (
            "JOB_RETENTION_SEC",
            "A job may take, in all",
            long(config.job_retention),
        ),
        (
            "JOB_HISTORY_RETENTION_SEC",
            "Its history is kept for",
            long(config.history_retention),
        ),
        (
            "KEEP_INPUTS_SEC",
            "What is submitted is kept for",
            kept(config.keep_inputs),
        ),
        (
            "KEEP_RESULTS_SEC",
            "A result that nobody takes is kept for",
            kept(config.keep_results),
        ),
        (
            "OUTCOME_LOST_SEC",
            "An outcome is given up after",
            long(config.outcome_lost),
        ),
        (
            "REJECT_INVALID_PARAMS",
            "Jobs with faulty parameters are",
            faulty.to_owned(),
        ),
        ("PRIORITY_AGING_SEC", "Priority of held jobs rises", aging),
    ]
}

fn long(time: Duration) -> String {
    spoken(SignedDuration::try_from(time).unwrap_or(SignedDuration::MAX))
}

/// `12 MiB`, as a number that somebody can hold in mind.
fn room(bytes: i64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let (mut amount, mut unit) = (bytes, 0);
    while amount >= 10_240 && unit + 1 < UNITS.len() {
        amount /= 1024;
        unit += 1;
    }
    format!("{amount} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        let rooms = [0, 9_000, 10_239, 10_240, 50 << 20, 1 << 62].map(room);
        let expected = [
            "0 bytes",
            "9000 bytes",
            "10239 bytes",
            "10 KiB",
            "50 MiB",
            "4194304 TiB",
        ];
        assert_eq!(rooms, expected);
    }
}
