//! Two jobs beside each other.

use maud::{Markup, html};

use super::layout::{Frame, Sheet};
use super::prose::said;
use super::words::name;
use crate::domain::overview::{Line, Story, WHY};

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
                    td { (cell(line.what.as_str(), line.one.as_deref(), one)) }
                    td { (cell(line.what.as_str(), line.other.as_deref(), other)) }
                }
            } }
        } }
    };
    Sheet::new("Two jobs compared", content)
}

/// A value; the sentence of a job has names and times in it.
fn cell(what: &str, value: Option<&str>, story: &Story) -> Markup {
    let why = story.job.why.as_ref();
    match why.filter(|why| what == WHY && value == Some(why.sentence.as_str())) {
        Some(why) => said(&why.sentence, why.moments()),
        None => html! { (value.unwrap_or("–")) },
    }
}

fn heading(story: &Story) -> Markup {
    let id = story.job.id;
    html! {
        th scope="col" { a href={ "/jobs/" (id) } { code { (&id.to_string()[..8]) } } " " span.dim { (name(&story.job)) } }
    }
}
