//! What a page shows now, told by what it has shown: most of it is as it was. Pure.

use std::collections::HashMap;
use std::fmt::Write as _;

/// Where a text is cut into pieces, by whoever follows the page too (`script.js`).
const CUT: char = '<';
/// So many pieces that come elsewhere are worth naming them; fewer are told again.
const WORTH: usize = 4;

/// How `new` is made of the pieces of `old`, in JSON: the number of the first of them and how many there
/// are, or a text that is not in it. What they yield, joined by [`CUT`], is `new`. None where that is no
/// shorter to tell.
pub(super) fn patch(old: &str, new: &str) -> Option<String> {
    let old: Vec<&str> = old.split(CUT).collect();
    let pieces: Vec<&str> = new.split(CUT).collect();
    let mut places: HashMap<(&str, &str), Vec<usize>> = HashMap::with_capacity(old.len());
    for (place, pair) in old.windows(2).enumerate() {
        places.entry((pair[0], pair[1])).or_default().push(place);
    }
    let run = |from: usize, begin: usize| {
        let pairs = old[from.min(old.len())..].iter().zip(&pieces[begin..]);
        pairs.take_while(|(one, other)| one == other).count()
    };
    let mut ops = Ops::new(new.len());
    let (mut at, mut expected) = (0, 0);
    while at < pieces.len() {
        // What follows in its place, or behind what has been inserted or left out.
        let here = (expected, run(expected, at));
        let (from, count) = match here.1 {
            0 => elsewhere(&places, &pieces[at..], expected)
                .map_or(here, |from| (from, run(from, at))),
            _ => here,
        };
        let is_in_place = from == expected;
        if count >= WORTH || (count > 0 && is_in_place) {
            ops.copy(from, count);
            (at, expected) = (at + count, from + count);
        } else {
            ops.text(pieces[at]);
            (at, expected) = (at + 1, expected + 1);
        }
        if ops.json.len() >= new.len() {
            return None;
        }
    }
    Some(ops.end()).filter(|json| json.len() < new.len())
}

/// Where in the old text what comes next begins, rather behind `expected` than before it.
fn elsewhere(
    places: &HashMap<(&str, &str), Vec<usize>>,
    pieces: &[&str],
    expected: usize,
) -> Option<usize> {
    let places = places.get(&(*pieces.first()?, *pieces.get(1)?))?;
    let behind = places.partition_point(|place| *place < expected);
    places.get(behind).or(places.first()).copied()
}

/// Operations, as they are written down.
struct Ops {
    json: String,
    /// Pieces that are in no other text.
    text: Option<String>,
}

impl Ops {
    fn new(room: usize) -> Ops {
        let mut json = String::with_capacity(room.min(4096));
        json.push('[');
        Ops { json, text: None }
    }

    fn copy(&mut self, from: usize, count: usize) {
        self.flush();
        self.separate();
        // Writing to a string does not fail.
        let _ = write!(self.json, "[{from},{count}]");
    }

    fn text(&mut self, piece: &str) {
        match &mut self.text {
            Some(text) => {
                text.push(CUT);
                text.push_str(piece);
            }
            None => self.text = Some(piece.to_owned()),
        }
    }

    fn flush(&mut self) {
        if let Some(text) = self.text.take() {
            self.separate();
            self.json
                .push_str(&serde_json::Value::String(text).to_string());
        }
    }

    fn separate(&mut self) {
        if self.json.len() > 1 {
            self.json.push(',');
        }
    }

    fn end(mut self) -> String {
        self.flush();
        self.json.push(']');
        self.json
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// As `script.js` does.
    fn applied(old: &str, patch: &str) -> String {
        let old: Vec<&str> = old.split(CUT).collect();
        let ops: Vec<Value> = serde_json::from_str(patch).unwrap();
        let number = |value: &Value| usize::try_from(value.as_u64().unwrap()).unwrap();
        let parts = ops.iter().map(|op| match op {
            Value::String(text) => text.clone(),
            range => {
                let from = number(&range[0]);
                old[from..from + number(&range[1])].join("<")
            }
        });
        parts.collect::<Vec<_>>().join("<")
    }

    fn row(job: &str, progress: &str) -> String {
        format!(
            "<tr id=\"job-{job}\"><th scope=\"row\"><a href=\"/jobs/{job}\">a \"name\" of {job}</a></th>\
             <td class=\"state\"><span><span>running</span></span></td><td>{progress}</td>\
             <td class=\"why\"><span title=\"…\">Runs on worker-{job}</span></td></tr>"
        )
    }

    fn table(rows: &[(&str, &str)]) -> String {
        let rows: String = rows
            .iter()
            .map(|(job, progress)| row(job, progress))
            .collect();
        format!("<table><tbody>{rows}</tbody></table>")
    }

    #[test]
    fn only_what_is_new_is_told() {
        let names: Vec<String> = (0..50).map(|number| number.to_string()).collect();
        let rows: Vec<_> = names.iter().map(|name| (name.as_str(), "10 %")).collect();
        let old = table(&rows);
        let told = |rows: &[(&str, &str)]| {
            let new = table(rows);
            let patch = patch(&old, &new).unwrap();
            assert_eq!(applied(&old, &patch), new);
            patch.len()
        };
        assert!(told(&rows) < 20);
        let mut other = rows.clone();
        other[7].1 = "20 %";
        assert!(told(&other) < 60);
        let mut longer = rows.clone();
        longer.insert(3, ("new", "0 %"));
        assert!(told(&longer) < 2 * row("new", "0 %").len());
        let mut shorter = rows.clone();
        shorter.drain(5..9);
        assert!(told(&shorter) < 60);
        let mut moved = rows.clone();
        let last = moved.pop().unwrap();
        moved.insert(0, last);
        assert!(told(&moved) < 60);
    }

    #[test]
    fn what_is_all_new_is_told_as_a_whole() {
        let new = table(&[("a", "1"), ("b", "2")]).replace('<', "\u{1}<");
        assert_eq!(patch(&table(&[("c", "3")]), &new), None);
        assert_eq!(patch("", "<p>a</p>"), None);
    }

    proptest! {
        #[test]
        fn a_patch_yields_the_new_text(
            old in "([a-c<\"\n]|<td>|</td>|ü😀){0,60}",
            new in "([a-c<\"\n]|<td>|</td>|ü😀){0,60}",
        ) {
            if let Some(patch) = patch(&old, &new) {
                prop_assert!(!patch.contains('\n'));
                prop_assert_eq!(applied(&old, &patch), new);
            }
        }
    }
}
