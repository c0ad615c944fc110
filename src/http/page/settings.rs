//! What holds here that nobody sees otherwise: limits in force, and how much room Postgres takes.

use maud::{Markup, html};

use super::layout::Frame;
use super::prose::prose;
use super::words::command;
use crate::actions::counted;
use crate::config::Config;
use crate::domain::activity::{Sizes, room};
use crate::domain::switch::{Remark, verdict_back};
use crate::telemetry::trouble::trouble;

/// Closed at first.
pub(super) fn section(config: &Config, sizes: Option<&Sizes>) -> Markup {
    html! {
        details.queues {
            summary { "Limits in force, and how full it is" }
            div.card { dl {
                @for limit in config.limits() {
                    dt title=(limit.name) { (limit.what) } dd { (limit.in_words) }
                }
                @if let Some(sizes) = sizes {
                    dt { "Postgres" } dd { (sizes.total()) }
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
    let trouble = trouble(frame.parts).map(|trouble| trouble.what.to_owned());
    let known = remarks.iter().filter_map(|remark| remark.hinders.clone());
    let reasons: Vec<_> = trouble.into_iter().chain(known).collect();
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
            p.dim { "As far as this service knows, in part from a moment ago, or minutes where there are very many jobs. \
                Before the switch stop it, and ask: "
                (command("omotes-orchestrator doctor --before-switch=back")) }
        }
    }
}
