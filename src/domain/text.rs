//! Foreign texts: of which only the beginning is kept or repeated, and which must not pass for anything else where they
//! are shown.

use std::borrow::Cow;

use jiff::Timestamp;

/// A text's first `characters`; all of it, if it has no more.
pub fn beginning(text: &str, characters: usize) -> &str {
    match text.char_indices().nth(characters) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

/// The same for display, with an ellipsis if there was more.
pub fn excerpt(text: &str, characters: usize) -> Cow<'_, str> {
    match beginning(text, characters) {
        all if all.len() == text.len() => Cow::Borrowed(all),
        some => Cow::Owned(format!("{some}…")),
    }
}

/// A foreign text that should be a time, without fractions of seconds if it is one.
pub fn to_the_second(time: &str) -> String {
    match time.parse::<Timestamp>() {
        Ok(time) => format!("{time:.0}"),
        Err(_) => one_line(time),
    }
}

/// How much of a foreign text a line repeats, in characters.
const MAX_TEXT: usize = 300;

/// A foreign text for a log line: shortened, and without anything that could pass for another line
/// or another text.
pub fn one_line(text: &str) -> String {
    harmless(short(text))
}

/// A foreign text of any length, with its line breaks, and otherwise as [`one_line`].
pub fn readable(text: &str) -> String {
    text.split('\n')
        .map(|line| harmless(line.strip_suffix('\r').unwrap_or(line)))
        .collect::<Vec<_>>()
        .join("\n")
}

/// A text with escapes for everything that is invisible or changes how its neighbours are
/// displayed.
pub fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if is_harmless(character) {
            shown.push(character);
        } else {
            shown.extend(character.escape_default());
        }
    }
    shown
}

fn is_harmless(character: char) -> bool {
    match character {
        ' '..='~' => true,
        // Invisible letters and marks; Unicode calls them default-ignorable.
        '\u{34f}'
        | '\u{115f}'
        | '\u{1160}'
        | '\u{17b4}'
        | '\u{17b5}'
        | '\u{180b}'..='\u{180f}'
        | '\u{2028}'
        | '\u{2029}'
        | '\u{2800}'
        | '\u{3164}'
        | '\u{fe00}'..='\u{fe0f}'
        | '\u{ffa0}'
        | '\u{e0000}'..='\u{e0fff}' => false,
        // The standard library escapes controls, format characters (directions among them) and
        // unassigned ones; tested as the second character, since it also escapes a leading mark.
        // Spaces of other widths are harmless.
        other => {
            other.is_whitespace() && !other.is_control()
                || !format!("a{other}").escape_debug().any(|one| one == '\\')
        }
    }
}

/// As much of a text as a line repeats.
pub fn short(text: &str) -> &str {
    beginning(text, MAX_TEXT)
}

/// The line of a task's logs that says most of why it failed: the first one, or the one in which the last
/// of Python's stack traces names its exception. Empty if there is none.
pub fn telling_line(logs: &str) -> &str {
    let of_trace = logs.rsplit_once(TRACE).and_then(|(_, trace)| {
        let mut lines = trace.lines().skip(1);
        // What is in the trace is further in.
        lines.find(|line| line.starts_with(|first: char| !first.is_whitespace()))
    });
    let mut lines = logs.lines().map(str::trim).filter(|line| !line.is_empty());
    of_trace.or_else(|| lines.next()).unwrap_or_default().trim()
}

/// What Python's stack traces begin with.
const TRACE: &str = "Traceback (most recent call last):";

/// `1 job`, `2 jobs`.
pub fn counted(count: usize, noun: &str) -> String {
    match count {
        1 => format!("1 {noun}"),
        count => format!("{count} {noun}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("", "", "")]
    #[case("äö", "äö", "äö")]
    #[case("äöü", "äöü", "äöü")]
    #[case("äöüx", "äöü", "äöü…")]
    fn a_text_is_cut_between_characters(
        #[case] text: &str,
        #[case] first: &str,
        #[case] shown: &str,
    ) {
        assert_eq!(beginning(text, 3), first);
        assert_eq!(excerpt(text, 3), shown);
    }

    #[test]
    fn a_text_cannot_pass_for_another_line() {
        assert_eq!(
            one_line("it's \"fine\" é\\ 日本語"),
            "it's \"fine\" é\\ 日本語"
        );
        // As macOS writes them, with a mark of its own.
        assert_eq!(one_line("e\u{301}"), "e\u{301}");
        assert_eq!(one_line("10\u{a0}000"), "10\u{a0}000");
        assert_eq!(
            one_line("a\nb\u{1b}[0m\u{2028}"),
            "a\\nb\\u{1b}[0m\\u{2028}"
        );
        assert_eq!(one_line(&"x".repeat(1000)).len(), MAX_TEXT);
        assert_eq!(readable("a\r\nb\rc\t\u{1b}"), "a\nb\\rc\\t\\u{1b}");
    }

    /// Directions, joiners, spaces of no width, tags, fillers, selectors, and a byte order mark.
    #[rstest]
    fn a_text_cannot_pass_for_another(
        #[values(
            "202a", "202b", "202c", "202d", "202e", "2066", "2067", "2068", "2069", "200e", "200f",
            "61c", "200b", "200c", "200d", "2060", "2061", "feff", "ad", "180e", "e0001", "e0041",
            "3164", "115f", "ffa0", "34f", "fe0f", "e0100", "fff9", "85", "0", "7f", "2800"
        )]
        code: &str,
    ) {
        let character = char::from_u32(u32::from_str_radix(code, 16).unwrap()).unwrap();
        let shown = format!("a\\u{{{code}}}b");
        assert_eq!(one_line(&format!("a{character}b")), shown);
        assert_eq!(readable(&format!("a{character}b")), shown);
    }

    #[rstest]
    #[case::nothing("", "")]
    #[case::blank(" \n\t\n", "")]
    #[case::first_of_several("\n  no solution \r\nat all", "no solution")]
    #[case::trace(
        "went on\nTraceback (most recent call last):\n  File \"a\"\nValueError: no\n\n",
        "ValueError: no"
    )]
    #[case::trace_and_more(
        "Traceback (most recent call last):\n  File \"a\"\nValueError: no\nwith details\n\ndone\n",
        "ValueError: no"
    )]
    #[case::trace_of_another(
        "Traceback (most recent call last):\n  File \"a\"\nKeyError: 1\n\nDuring handling of the above \
         exception, another exception occurred:\n\nTraceback (most recent call last):\n  File \"b\"\n    \
         raise\nValueError: no\n",
        "ValueError: no"
    )]
    #[case::trace_that_is_cut(
        "went on\nTraceback (most recent call last):\n  File \"a\"",
        "went on"
    )]
    fn one_line_says_most(#[case] logs: &str, #[case] line: &str) {
        assert_eq!(telling_line(logs), line);
    }

    #[test]
    fn a_time_is_told_to_the_second() {
        assert_eq!(
            to_the_second("2026-01-31T12:00:00.123456Z"),
            "2026-01-31T12:00:00Z"
        );
        assert_eq!(to_the_second("yester\nday"), "yester\\nday");
    }
}
