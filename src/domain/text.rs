//! Foreign texts, of which only the beginning is kept or repeated.

use std::borrow::Cow;

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
}
