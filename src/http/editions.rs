//! What is told of a page, as it goes over the wire: all of it, or what is new to whoever has heard the
//! last of it. Made once, for all who follow it.

use std::sync::Arc;

use super::patch::patch;

/// A page as it was told once.
#[derive(Debug, Clone)]
pub(super) struct Known {
    number: u64,
    content: Arc<str>,
}

/// A page as it is told.
#[derive(Debug)]
pub(super) struct Edition {
    known: Known,
    whole: Arc<[u8]>,
    /// The same for whoever knows the one of this number.
    patches: Vec<(u64, Arc<[u8]>)>,
}

impl Edition {
    /// The next one, for whoever knows one of these. With it the page has ended if it `is_last`.
    pub(super) fn new(known: &[Known], content: &str, is_last: bool) -> Edition {
        // Events have no other ends of lines, so that a page comes back without.
        let content: Arc<str> = content.replace('\r', "\n").into();
        let number = known.iter().map(|one| one.number).max().unwrap_or(0) + 1;
        let encoded = |name, data: &str| -> Arc<[u8]> {
            let mut text = event(name, Some(number), data);
            if is_last {
                text.push_str(&event("end", None, ""));
            }
            text.into_bytes().into()
        };
        let patches = known.iter().filter_map(|one| {
            let ops = patch(&one.content, &content)?;
            Some((
                one.number,
                encoded("patch", &format!("[{},{ops}]", one.number)),
            ))
        });
        Edition {
            patches: patches.collect(),
            whole: encoded("page", &content),
            known: Known { number, content },
        }
    }

    pub(super) fn number(&self) -> u64 {
        self.known.number
    }

    pub(super) fn known(&self) -> Known {
        self.known.clone()
    }

    /// For whoever knows the one of this number, or nothing.
    pub(super) fn told(&self, known: Option<u64>) -> Arc<[u8]> {
        let mut patches = self.patches.iter();
        let patch = patches.find(|(number, _)| Some(*number) == known);
        Arc::clone(patch.map_or(&self.whole, |(_, bytes)| bytes))
    }
}

/// As it goes over the wire.
pub(super) fn event(name: &str, id: Option<u64>, data: &str) -> String {
    let mut text = String::with_capacity(data.len() + data.len() / 16 + 64);
    text.push_str("event: ");
    text.push_str(name);
    if let Some(id) = id {
        text.push_str("\nid: ");
        text.push_str(&id.to_string());
    }
    for line in data.split('\n') {
        text.push_str("\ndata: ");
        text.push_str(line);
    }
    text.push_str("\n\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_knows_the_last_is_told_what_is_new_and_others_all() {
        let row = |text: &str| format!("<tr><td class=\"why\">{text}</td></tr>").repeat(20);
        let text =
            |edition: &Edition, known| String::from_utf8(edition.told(known).to_vec()).unwrap();
        let first = Edition::new(&[], &row("waits\r\nhere"), false);
        assert!(text(&first, None).starts_with("event: page\nid: 1\ndata: <tr>"));
        assert!(!text(&first, None).contains('\r'));
        let content = format!("{}<p>new</p>", row("waits\n\nhere"));
        let second = Edition::new(&[first.known()], &content, true);
        let patch = text(&second, Some(first.number()));
        assert_eq!(
            patch,
            "event: patch\nid: 2\ndata: [1,[[0,81],\"p>new</p>\"]]\n\nevent: end\ndata: \n\n"
        );
        for known in [None, Some(7)] {
            assert!(text(&second, known).starts_with("event: page\nid: 2\ndata: <tr>"));
        }
        let third = Edition::new(&[first.known(), second.known()], &content, false);
        assert_eq!(third.number(), 3);
        assert!(text(&third, Some(1)).starts_with("event: patch\nid: 3\ndata: [1,"));
        assert!(text(&third, Some(2)).starts_with("event: patch\nid: 3\ndata: [2,"));
    }
}
