//! Text files that people write, in whatever editor they have.

use std::fs;
use std::path::Path;

use thiserror::Error;

/// Why what is in a file is no text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum NotText {
    /// As PowerShell's `>` writes it.
    #[error("it is in UTF-16, expected UTF-8")]
    Utf16,
    #[error("line {0} is not in UTF-8")]
    Line(usize),
}

/// The text of a file, without the byte order mark that some editors put before it. Errors do not
/// name the file.
///
/// # Errors
/// The file cannot be read, or is in another encoding.
pub fn read(path: &Path) -> anyhow::Result<String> {
    Ok(decode(fs::read(path)?)?)
}

fn decode(bytes: Vec<u8>) -> Result<String, NotText> {
    // A text that anybody writes begins with an ASCII character, of which UTF-16 makes a zero and
    // that character, in this order or the other.
    let is_utf16 = matches!(
        bytes[..],
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, 1..=255, ..] | [1..=255, 0, ..]
    );
    if is_utf16 {
        return Err(NotText::Utf16);
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(match text.strip_prefix('\u{feff}') {
            Some(rest) => rest.to_owned(),
            None => text,
        }),
        Err(error) => {
            let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let breaks = before.iter().filter(|byte| **byte == b'\n').count();
            Err(NotText::Line(breaks + 1))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::plain(b"a\nb", Ok("a\nb"))]
    #[case::empty(b"", Ok(""))]
    #[case::one_character(b"a", Ok("a"))]
    #[case::marked(b"\xef\xbb\xbf[]", Ok("[]"))]
    #[case::marked_twice(b"\xef\xbb\xbf\xef\xbb\xbf", Ok("\u{feff}"))]
    #[case::nothing_but_the_mark(b"\xef\xbb\xbf", Ok(""))]
    #[case::little_endian(b"\xff\xfe[\0]\0", Err(NotText::Utf16))]
    #[case::big_endian(b"\xfe\xff\0[\0]", Err(NotText::Utf16))]
    #[case::little_endian_unmarked(b"[\0]\0", Err(NotText::Utf16))]
    #[case::big_endian_unmarked(b"\0[\0]", Err(NotText::Utf16))]
    #[case::latin_1(b"a\nb\ncaf\xe9", Err(NotText::Line(3)))]
    fn a_text_is_read_whatever_editor_wrote_it(
        #[case] bytes: &[u8],
        #[case] text: Result<&str, NotText>,
    ) {
        assert_eq!(decode(bytes.to_vec()), text.map(str::to_owned));
    }
}
