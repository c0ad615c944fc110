//! How much was done and waited, drawn.

use std::fmt::Write as _;

use maud::{Markup, PreEscaped, html};

use crate::domain::activity::{Activity, Course, Stretch};

const HEIGHT: f64 = 40.0;

/// The charts of the last hour and the last day.
pub(super) fn charts(activity: &Activity) -> Markup {
    let Activity { hour, day, .. } = activity;
    html! {
        section.charts aria-label="Throughput and waiting" {
            (done(hour, "last hour")) (waiting(hour, "last hour"))
            (done(day, "last day")) (waiting(day, "last day"))
        }
    }
}

fn done(course: &Course, when: &str) -> Markup {
    let sum = |of: fn(&Stretch) -> i64| course.stretches.iter().map(of).sum::<i64>();
    let (succeeded, failed) = (sum(|one| one.succeeded), sum(|one| one.failed));
    let most = most(course, |one| one.succeeded + one.failed);
    let mut bars = String::new();
    for (place, stretch) in course.stretches.iter().enumerate() {
        let good = height(stretch.succeeded, most);
        let bad = height(stretch.failed, most);
        for (class, height, top) in [
            ("good", good, HEIGHT - good),
            ("bad", bad, HEIGHT - good - bad),
        ] {
            if height > 0.0 {
                let _ = write!(
                    bars,
                    "<rect class=\"{class}\" x=\"{place}.1\" y=\"{top:.1}\" width=\".8\" height=\"{height:.1}\"/>"
                );
            }
        }
    }
    let text = match failed {
        0 => format!("{succeeded} succeeded"),
        _ => format!("{succeeded} succeeded, {failed} failed"),
    };
    figure("Done", when, &text, course, &bars)
}

fn waiting(course: &Course, when: &str) -> Markup {
    let most = most(course, |one| one.waiting);
    let mut line = format!("M0 {HEIGHT}");
    for (place, stretch) in course.stretches.iter().enumerate() {
        let top = HEIGHT - height(stretch.waiting, most);
        let _ = write!(line, "V{top:.1}H{}", place + 1);
    }
    let area = format!("<path class=\"waits\" d=\"{line}V{HEIGHT}Z\"/>");
    let now = course.stretches.last().map_or(0, |one| one.waiting);
    let peak = course.stretches.iter().map(|one| one.waiting).max();
    let text = format!("{now} now, {} at most", peak.unwrap_or(0));
    figure("Waiting", when, &text, course, &area)
}

#[expect(clippy::cast_precision_loss, reason = "pixels")]
fn most(course: &Course, of: impl Fn(&Stretch) -> i64) -> f64 {
    course.stretches.iter().map(of).max().unwrap_or(0).max(1) as f64
}

/// One is to be seen beside a thousand.
#[expect(clippy::cast_precision_loss, reason = "pixels")]
fn height(count: i64, most: f64) -> f64 {
    match count {
        0 => 0.0,
        count => (count as f64 / most * HEIGHT).max(1.5),
    }
}

fn figure(what: &str, when: &str, text: &str, course: &Course, drawing: &str) -> Markup {
    let width = course.stretches.len();
    html! {
        figure.chart {
            figcaption { b { (what) } " " span.dim { (when) } span.figures { (text) } }
            svg viewBox={ "0 0 " (width) " " (HEIGHT) } preserveAspectRatio="none" role="img"
                aria-label={ (what) ", " (when) ": " (text) } { (PreEscaped(drawing)) }
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::domain::activity::Counted;
    use crate::domain::job::Outcome;

    #[test]
    fn a_chart_says_in_words_what_it_shows() {
        let rows = [
            (719, Counted::Ended(Outcome::Succeeded, 1000)),
            (719, Counted::Ended(Outcome::Failed, 1)),
            (0, Counted::Waiting(7)),
            (10, Counted::Waiting(-4)),
        ];
        let activity = Activity::new(Timestamp::UNIX_EPOCH, &rows);
        let page = charts(&activity).into_string();
        for text in [
            "aria-label=\"Done, last hour: 1000 succeeded, 1 failed\"",
            "aria-label=\"Waiting, last day: 3 now, 7 at most\"",
            "viewBox=\"0 0 30 40\"",
            "viewBox=\"0 0 48 40\"",
            // What is far less is still seen.
            "height=\"1.5\"",
        ] {
            assert!(page.contains(text), "{text}: {page}");
        }
    }
}
