//! Two jobs beside each other.

use maud::{Markup, html};

use super::layout::{Frame, Sheet};
use super::words::name;
use crate::domain::overview::{Line, Story};

/// What two jobs have in common, and what differs.
pub(in crate::http) fn compare(
    frame: &Frame<'_>,
    [one, other]: &[Story; 2],
    lines: &[Line],
) -> Sheet {
    let differing = lines.iter().filter(|line| line.one != line.other).count();
    let content = html! {
        (super::layout::troubles(frame, &[]))
        nav aria-label="Back" { a href="/" { "← all jobs" } }
        h1 { "Two jobs compared" }
        p.dim { (differing) " of " (lines.len()) " lines differ; they are marked." }
        div.card tabindex="0" role="region" aria-label="Comparison" { table.compared {
            thead { tr {
                th scope="col" { "" }
                (heading(one))
                (heading(other))
            } }
            tbody { @for line in lines {
                @let differs = line.one != line.other;
                tr {
                    th scope="row" class=[differs.then_some("warn")] {
                        @if differs { span title="differs" { "≠ " } } (line.what) }
                    td { (line.one.as_deref().unwrap_or("–")) }
                    td { (line.other.as_deref().unwrap_or("–")) }
                }
            } }
        } }
    };
    Sheet::new("Two jobs compared", content)
}

fn heading(story: &Story) -> Markup {
    let id = story.job.id;
    html! {
        th scope="col" { a href={ "/jobs/" (id) } { code { (&id.to_string()[..8]) } } " " span.dim { (name(&story.job)) } }
    }
}
