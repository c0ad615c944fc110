//! Points in time in a sentence: told in UTC, of which a page makes the reader's own time.

use std::ops::Range;

use jiff::{SignedDuration, Timestamp};

/// What stands around one until all is said: no text that comes from elsewhere has these.
const BEGIN: char = '\u{1}';
const MIDDLE: char = '\u{2}';
const END: char = '\u{3}';

/// A point in time in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// Which bytes of the text.
    pub place: Range<usize>,
    pub at: Timestamp,
}

/// The time of day, with the day where that is not today's; to be [`read`].
pub(super) fn clock(time: Timestamp, now: Timestamp) -> String {
    let is_today = now.duration_since(time) < SignedDuration::from_hours(20);
    let form = if is_today { "%H:%M" } else { "%Y-%m-%d %H:%M" };
    let (text, second) = (time.strftime(form), time.as_second());
    format!("{BEGIN}{text}{MIDDLE}{second}{END}")
}

/// The text as it is shown, and where in it which points in time are.
pub(super) fn read(told: &str) -> (String, Vec<Moment>) {
    let mut parts = told.split(BEGIN);
    let mut text = parts.next().unwrap_or_default().to_owned();
    let mut moments = Vec::new();
    for part in parts {
        let marked = part.split_once(END);
        let marked = marked.and_then(|(time, rest)| Some((time.split_once(MIDDLE)?, rest)));
        let Some(((clock, second), rest)) = marked else {
            text += part;
            continue;
        };
        let begin = text.len();
        text += clock;
        let at = second.parse().ok().map(Timestamp::from_second);
        if let Some(Ok(at)) = at {
            let place = begin..text.len();
            moments.push(Moment { place, at });
        }
        text += rest;
    }
    (text, moments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_where_it_is_said() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let now = at(20_000 * 86_400 + 3 * 3600);
        let (lately, long_ago) = (at(now.as_second() - 120), at(now.as_second() - 100_000));
        let told = format!("since {} é; {}", clock(lately, now), clock(long_ago, now));
        let (text, moments) = read(&told);
        assert_eq!(text, "since 02:58 é; 2024-10-02 23:13");
        let said = moments.iter().map(|one| (&text[one.place.clone()], one.at));
        assert_eq!(
            said.collect::<Vec<_>>(),
            [("02:58", lately), ("2024-10-02 23:13", long_ago)]
        );
        assert_eq!(read("nothing"), ("nothing".to_owned(), Vec::new()));
    }
}
