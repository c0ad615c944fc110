//! How operators name a job: by its id, or by as much of its beginning as no other job has.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

/// Digits of an id that name a job, at the least.
const FEWEST: usize = 4;
/// Digits of an id, in all.
const ALL: usize = 32;
/// Digits that lists show.
const SHOWN: usize = 8;

/// A job's id, or its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobName {
    first: Uuid,
    last: Uuid,
    digits: usize,
}

impl JobName {
    /// The id, if it is a whole one.
    pub fn whole(&self) -> Option<Uuid> {
        (self.digits == ALL).then_some(self.first)
    }

    /// The first and the last id that begin so.
    pub fn range(&self) -> (Uuid, Uuid) {
        (self.first, self.last)
    }
}

impl From<Uuid> for JobName {
    fn from(id: Uuid) -> JobName {
        JobName {
            first: id,
            last: id,
            digits: ALL,
        }
    }
}

impl FromStr for JobName {
    type Err = String;

    fn from_str(text: &str) -> Result<JobName, String> {
        // As they are shown, and as they may be cut off in what somebody copies from.
        let text = text.trim().trim_end_matches(['…', '.']);
        let digits: String = text.chars().filter(|one| *one != '-').collect();
        let is_hex = digits.chars().all(|one| one.is_ascii_hexdigit());
        if !is_hex || !(FEWEST..=ALL).contains(&digits.len()) {
            return Err(format!(
                "expected a job's id, or at least the first {FEWEST} digits of it"
            ));
        }
        let filled = |fill: &str| {
            let rest = fill.repeat(ALL - digits.len());
            Uuid::parse_str(&format!("{digits}{rest}")).map_err(|error| error.to_string())
        };
        Ok(JobName {
            first: filled("0")?,
            last: filled("f")?,
            digits: digits.len(),
        })
    }
}

/// What was typed, as far as it counts.
impl fmt::Display for JobName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.whole() {
            Some(id) => write!(f, "{id}"),
            None => f.write_str(&self.first.simple().to_string()[..self.digits]),
        }
    }
}

/// As many digits of each id as tell them apart, and some more.
pub fn short_ids(ids: &[Uuid]) -> Vec<String> {
    let texts: Vec<_> = ids.iter().map(Uuid::to_string).collect();
    let mut sorted: Vec<_> = texts.iter().map(String::as_str).collect();
    sorted.sort_unstable();
    sorted.dedup();
    let common = sorted.windows(2).map(|two| {
        let pairs = two[0].bytes().zip(two[1].bytes());
        pairs.take_while(|(one, other)| one == other).count()
    });
    let enough = common.max().map_or(SHOWN, |common| SHOWN.max(common + 1));
    texts
        .iter()
        .map(|text| text[..enough.min(text.len())].to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::whole("0e9b1c2d-0000-4000-8000-000000000001", true)]
    #[case::whole_without_dashes("0E9B1C2D000040008000000000000001", true)]
    #[case::as_listed("0e9b1c2d", true)]
    #[case::shortest("0e9b", true)]
    #[case::beyond_a_dash("0e9b1c2d-00", true)]
    #[case::copied_with_dots("0e9b1c2d…", true)]
    #[case::of_another("0e9b1c2e", false)]
    #[case::longer("0e9b1c2d-0000-4000-8000-000000000002", false)]
    fn a_job_is_named_by_a_beginning(#[case] text: &str, #[case] is_meant: bool) {
        let id = Uuid::parse_str("0e9b1c2d-0000-4000-8000-000000000001").unwrap();
        let (first, last) = text.parse::<JobName>().unwrap().range();
        assert_eq!((first..=last).contains(&id), is_meant);
    }

    #[rstest]
    #[case::too_short("0e9")]
    #[case::too_long("0e9b1c2d-0000-4000-8000-0000000000011")]
    #[case::no_id("study-7")]
    #[case::nothing("")]
    fn what_is_no_id_is_said_to_be_none(#[case] text: &str) {
        let said = text.parse::<JobName>().unwrap_err();
        assert!(said.contains("at least the first 4"), "{said}");
    }

    #[test]
    fn ids_are_shown_as_long_as_they_have_to_be() {
        let id = |text: &str| Uuid::parse_str(text).unwrap();
        let one = id("0e9b1c2d-0000-4000-8000-000000000001");
        let other = id("1e9b1c2d-0000-4000-8000-000000000001");
        let twin = id("0e9b1c2d-0100-4000-8000-000000000001");
        assert_eq!(
            short_ids(&[one, other, one]),
            ["0e9b1c2d", "1e9b1c2d", "0e9b1c2d"]
        );
        assert_eq!(short_ids(&[one, twin]), ["0e9b1c2d-00", "0e9b1c2d-01"]);
        assert_eq!(short_ids(&[]), Vec::<String>::new());
    }
}
