//! Sentences, in which names and times are shown as what they are.

use std::ops::Range;

use jiff::Timestamp;
use maud::{Markup, html};

use super::words::{at, stamp};
use crate::domain::overview::Moment;

/// A sentence, in which what is between backticks is shown as what it is, a name or what is typed, and a point
/// in time that is written out in full in the reader's own time zone.
pub(super) fn prose(text: &str) -> Markup {
    said(text, &[])
}

/// The same of one that tells points in time in short.
pub(super) fn said(text: &str, moments: &[Moment]) -> Markup {
    html! {
        @for piece in pieces(text, moments) {
            @match piece {
                Piece::Text(text) => (text),
                Piece::Code(text) => code { (text) },
                Piece::Time(time) => (at(time)),
                Piece::Clock(text, time) => time.clock.day[text.contains('-')] datetime=(stamp(time)) { (text) " UTC" },
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Piece<'t> {
    Text(&'t str),
    Code(&'t str),
    /// Written out in full.
    Time(Timestamp),
    /// In short.
    Clock(&'t str, Timestamp),
}

fn pieces<'t>(text: &'t str, moments: &[Moment]) -> Vec<Piece<'t>> {
    let mut parts: Vec<&str> = text.split('`').collect();
    if parts.len().is_multiple_of(2) {
        // They do not belong together.
        parts = vec![text];
    }
    let mut pieces = Vec::new();
    let mut begin = 0;
    for (place, part) in parts.into_iter().enumerate() {
        let end = begin + part.len();
        if place % 2 == 1 {
            pieces.push(Piece::Code(part));
        } else {
            add_text(&mut pieces, text, begin..end, moments);
        }
        begin = end + 1;
    }
    pieces
}

/// Adds a part of a text, with the times in it.
fn add_text<'t>(
    pieces: &mut Vec<Piece<'t>>,
    text: &'t str,
    part: Range<usize>,
    moments: &[Moment],
) {
    let is_in = |one: &&Moment| part.start <= one.place.start && one.place.end <= part.end;
    let clocks = moments.iter().filter(is_in).map(|one| {
        let shown = &text[one.place.clone()];
        (one.place.clone(), Piece::Clock(shown, one.at))
    });
    let mut times: Vec<_> = clocks.chain(stamps(text, &part)).collect();
    times.sort_by_key(|(place, _)| place.start);
    let mut done = part.start;
    for (place, time) in times.into_iter().filter(|(place, _)| !place.is_empty()) {
        if place.start > done {
            pieces.push(Piece::Text(&text[done..place.start]));
        }
        done = place.end;
        pieces.push(time);
    }
    if done < part.end {
        pieces.push(Piece::Text(&text[done..part.end]));
    }
}

/// What is written like `2026-01-31T12:00:00Z`.
fn stamps<'t>(
    text: &'t str,
    part: &Range<usize>,
) -> impl Iterator<Item = (Range<usize>, Piece<'t>)> + use<'t> {
    const LENGTH: usize = "2026-01-31T12:00:00Z".len();
    let begin = part.start;
    text[part.clone()]
        .match_indices('Z')
        .filter_map(move |(last, _)| {
            let end = begin + last + 1;
            let place = end.checked_sub(LENGTH).filter(|first| *first >= begin)?..end;
            let time: Timestamp = text.get(place.clone())?.parse().ok()?;
            Some((place, Piece::Time(time)))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn noon() -> Timestamp {
        "2026-01-31T12:00:00Z".parse().unwrap()
    }

    #[rstest]
    #[case::nothing("", vec![])]
    #[case::plain("a job", vec![Piece::Text("a job")])]
    #[case::a_name("a `b` c", vec![Piece::Text("a "), Piece::Code("b"), Piece::Text(" c")])]
    #[case::half_a_name("a `b", vec![Piece::Text("a `b")])]
    #[case::a_time(
        "at 2026-01-31T12:00:00Z.",
        vec![Piece::Text("at "), Piece::Time(noon()), Piece::Text(".")]
    )]
    #[case::a_time_and_a_name(
        "`q` 2026-01-31T12:00:00Z",
        vec![Piece::Code("q"), Piece::Text(" "), Piece::Time(noon())]
    )]
    #[case::no_time("éééééééééééééééééééZ Z", vec![Piece::Text("éééééééééééééééééééZ Z")])]
    #[case::a_time_that_is_a_name(
        "`2026-01-31T12:00:00Z`", vec![Piece::Code("2026-01-31T12:00:00Z")]
    )]
    fn names_and_times_are_told_apart(#[case] text: &str, #[case] expected: Vec<Piece<'_>>) {
        let pieces = pieces(text, &[]);
        let pieces = pieces.into_iter().filter(|one| *one != Piece::Text(""));
        assert_eq!(pieces.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_time_in_short_is_the_readers_too() {
        let text = "é: `q` since 12:00, 2026-01-30 11:00.";
        let place = |shown: &str| {
            let begin = text.find(shown).unwrap();
            begin..begin + shown.len()
        };
        let moments = ["12:00", "2026-01-30 11:00"].map(|shown| Moment {
            place: place(shown),
            at: noon(),
        });
        assert_eq!(
            said(text, &moments).into_string(),
            "é: <code>q</code> since <time class=\"clock\" datetime=\"2026-01-31T12:00:00Z\">12:00 UTC</time>, \
             <time class=\"clock day\" datetime=\"2026-01-31T12:00:00Z\">2026-01-30 11:00 UTC</time>."
        );
        // A text that has been cut since.
        let beyond = Moment {
            place: 90..95,
            at: noon(),
        };
        assert_eq!(said("short", &[beyond]).into_string(), "short");
    }
}
