//! Whether a page says something new, or only that something has lasted longer. Pure.

use std::hash::{DefaultHasher, Hash, Hasher};

/// Digests of what a page shows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Says {
    /// Without how long something has lasted, and when it was looked at.
    pub(super) news: u64,
    /// With that, but for what browsers count themselves.
    pub(super) all: u64,
}

/// The class of times that say no more than that somebody has looked.
const LOOKED: &str = "class=\"since looked\"";

pub(super) fn says(content: &str) -> Says {
    let (mut news, mut all) = (DefaultHasher::new(), DefaultHasher::new());
    let mut parts = content.split("<time");
    let first = parts.next().unwrap_or_default();
    lasting(first, &mut news);
    first.hash(&mut all);
    for part in parts {
        let (head, rest) = part.split_once('>').unwrap_or((part, ""));
        // Browsers count on what is within.
        let rest = rest.split_once("</time>").map_or(rest, |(_, rest)| rest);
        if !head.contains(LOOKED) {
            head.hash(&mut news);
        }
        lasting(rest, &mut news);
        (head, rest).hash(&mut all);
    }
    Says {
        news: news.finish(),
        all: all.finish(),
    }
}

/// Hashes a text without durations, as [`crate::domain::overview::spoken`] has them, and without the shares
/// that are drawn of them.
fn lasting(text: &str, hasher: &mut impl Hasher) {
    let mut rest = text;
    while let Some(place) = rest.find(|letter: char| letter.is_ascii_digit()) {
        let (before, from) = rest.split_at(place);
        before.hash(hasher);
        let end = from.find(|letter: char| !letter.is_ascii_digit() && letter != '.');
        let (number, after) = from.split_at(end.unwrap_or(from.len()));
        rest = match after_unit(after) {
            Some(after) => after_durations(after),
            None if before.ends_with("flex-grow: ") => after,
            None => {
                number.hash(hasher);
                after
            }
        };
    }
    rest.hash(hasher);
}

/// What comes after a unit of time, if a text begins with one.
fn after_unit(text: &str) -> Option<&str> {
    let units = [" s", " min", " h", " d"];
    let mut after = units.iter().filter_map(|unit| text.strip_prefix(unit));
    after.find(|after| !after.starts_with(|letter: char| letter.is_alphanumeric()))
}

/// `3 min 20 s` has two of them, and a moment later one.
fn after_durations(mut text: &str) -> &str {
    while let Some(next) = text.strip_prefix(' ') {
        let after = next.trim_start_matches(|letter: char| letter.is_ascii_digit());
        match after_unit(after).filter(|_| after.len() < next.len()) {
            Some(after) => text = after,
            None => break,
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::counted(
        "since <time class=\"since\" datetime=\"2026\">3 s</time>.",
        "3 s<",
        "4 s<"
    )]
    #[case::looked_at(
        "<time class=\"since looked\" datetime=\"2026-01-01\">3 s</time>",
        "01-01",
        "01-02"
    )]
    #[case::a_duration("<td>59 s</td>", "59 s", "1 min")]
    #[case::one_of_two_parts("<p>Runs for 3 min 59 s</p>", "3 min 59 s", "4 min")]
    #[case::days("<td>1 d 1 h</td>", "1 d 1 h", "1 d 2 h")]
    #[case::a_share("<i style=\"flex-grow: 0.1234\"></i>", "grow: 0.1234", "grow: 0.1235")]
    fn what_only_lasts_longer_is_no_news(#[case] page: &str, #[case] old: &str, #[case] new: &str) {
        let later = page.replace(old, new);
        assert_ne!(page, later);
        assert_eq!(says(page).news, says(&later).news);
    }

    #[rstest]
    #[case::a_number("<p>3 since <time>1 s</time></p>", "3", "4")]
    #[case::of_things("<p>3 dead letters</p>", "3", "4")]
    #[case::behind_a_duration("<p>3 s 4</p>", "4", "5")]
    #[case::a_width("<i style=\"width: 3.1%\"></i>", "3.1", "3.2")]
    #[case::another_time("<time datetime=\"2026-01-01\">", "01-01", "01-02")]
    #[case::after_a_time("<time>3 s</time> <b>a</b>", "<b>a", "<b>b")]
    fn all_else_is_news(#[case] page: &str, #[case] old: &str, #[case] new: &str) {
        assert_ne!(says(page).news, says(&page.replacen(old, new, 1)).news);
    }

    #[test]
    fn what_lasts_is_told_from_what_browsers_count() {
        let lasts = |text: &str| says(text).all;
        assert_ne!(lasts("<td>59 s</td>"), lasts("<td>1 min</td>"));
        assert_eq!(lasts("<time>59 s</time>"), lasts("<time>1 min</time>"));
    }
}
