//! In which order findings are told to somebody at a terminal, and what they come to in one line. Pure.

use std::cmp::Reverse;

use super::{Finding, Role, Severity};
use crate::domain::text::{counted, excerpt};

/// Characters of the finding that the last line names; all of it stands above.
const NAMED: usize = 160;

/// What is wrong, the worst first but for what follows from a cause; and what is not.
pub fn sorted(findings: &[Finding]) -> (Vec<&Finding>, Vec<&Finding>) {
    let mut all: Vec<_> = findings.iter().collect();
    all.sort_by_key(|finding| match finding.role {
        Role::Verdict => (0, None),
        Role::Cause => (1, None),
        Role::Follows => (2, None),
        Role::Own => (3, Some(Reverse(finding.severity))),
    });
    all.into_iter()
        .partition(|one| one.role == Role::Verdict || one.severity > Severity::Note)
}

/// The last line: how much is wrong, and what comes first of that, or is the cause of others.
pub fn summary(findings: &[Finding]) -> String {
    let (wrong, _) = sorted(findings);
    let wrong: Vec<_> = wrong
        .into_iter()
        .filter(|one| one.role != Role::Verdict)
        .collect();
    let Some(first) = wrong.first() else {
        return "Nothing is wrong.".to_owned();
    };
    let named = [(Severity::Error, "error"), (Severity::Warning, "warning")];
    let counts = named.into_iter().filter_map(|(severity, noun)| {
        let count = wrong.iter().filter(|one| one.severity == severity).count();
        (count > 0).then(|| counted(count, noun))
    });
    let counts = counts.collect::<Vec<_>>().join(", ");
    let follow = wrong.iter().filter(|one| one.role == Role::Follows).count();
    let leads = match (first.role, wrong.len()) {
        (Role::Cause, _) => format!("; {follow} may follow from the first"),
        (_, 1) => String::new(),
        (_, _) => "; the first".to_owned(),
    };
    let found = excerpt(&first.found, NAMED);
    format!("{counts}{leads}: {}: {found}", first.part)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// The severity by the first letter; after `>` it is a cause, after `+` it follows, `=` is a verdict.
    fn finding(sign: &'static str) -> Finding {
        let (role, rest) = match sign.split_at(1) {
            (">", rest) => (Role::Cause, rest),
            ("+", rest) => (Role::Follows, rest),
            ("=", rest) => (Role::Verdict, rest),
            _ => (Role::Own, sign),
        };
        let severity = match &rest[..1] {
            "e" => Severity::Error,
            "w" => Severity::Warning,
            "n" => Severity::Note,
            _ => Severity::Ok,
        };
        Finding {
            role,
            ..Finding::new(sign, severity, "it is so", "")
        }
    }

    #[rstest]
    #[case::all_is_well(&["o1", "o2"], "| o1 o2", "Nothing is wrong.")]
    #[case::notes_before_what_is_well(&["o1", "n1", "o2"], "| n1 o1 o2", "Nothing is wrong.")]
    #[case::errors_before_warnings(
        &["o1", "w1", "o2", "e1", "w2", "e2", "n1"],
        "e1 e2 w1 w2 | n1 o1 o2",
        "2 errors, 2 warnings; the first: e1: it is so")]
    #[case::one_warning(&["o1", "w1"], "w1 | o1", "1 warning: w1: it is so")]
    #[case::what_follows_stays_behind_its_cause(
        &[">e1", "+w1", "+e2", "o1", "w2", "e3"],
        ">e1 +w1 +e2 e3 w2 | o1",
        "3 errors, 2 warnings; 2 may follow from the first: >e1: it is so")]
    #[case::a_verdict_is_none_of_them(
        &["=w0", "=o0", "o1", "e1"], "=w0 =o0 e1 | o1", "1 error: e1: it is so")]
    fn what_is_wrong_comes_first_and_last(
        #[case] signs: &[&'static str],
        #[case] order: &str,
        #[case] last: &str,
    ) {
        let findings: Vec<_> = signs.iter().map(|sign| finding(sign)).collect();
        let (wrong, right) = sorted(&findings);
        let names = |some: &[&Finding]| {
            some.iter()
                .map(|one| one.part)
                .collect::<Vec<_>>()
                .join(" ")
        };
        let told = format!("{} | {}", names(&wrong), names(&right));
        assert_eq!(told.trim_start(), order);
        assert_eq!(summary(&findings), last);
    }

    #[test]
    fn a_long_finding_is_cut_in_the_last_line() {
        let long = Finding::new("Postgres", Severity::Error, "x".repeat(500), "");
        let last = summary(&[long]);
        assert!(last.ends_with("xxx…") && last.len() < 200, "{last}");
    }
}
