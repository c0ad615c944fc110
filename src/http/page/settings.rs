//! What holds here that nobody sees otherwise: limits in force, and how much room Postgres takes.

use maud::{Markup, html};

use crate::config::Config;
use crate::domain::activity::{Sizes, room};

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
