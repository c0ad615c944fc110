//! Postgres: its tables, rights, settings and clock.

use jiff::{SignedDuration, Timestamp};

use super::cause::Kind;
use super::{Findings, Severity};
use crate::config::Config;
use crate::domain::activity::{Sizes, room};
use crate::domain::overview::spoken;
use crate::service::handler::MAX_BATCH_MESSAGES;
use crate::store::inspection::Inspection;
use crate::store::migrate::{self, REVISIONS};
use crate::store::rights;
use crate::store::{Connection, Store, StoreError};
use crate::telemetry::report::one_line;

/// A larger difference between clocks makes times in the log and on the page misleading.
const MAX_SKEW: SignedDuration = SignedDuration::from_secs(5);

/// Checks Postgres.
pub(super) fn examine(
    config: &Config,
    findings: &mut Findings,
) -> Option<(Inspection, Connection)> {
    const PART: &str = "Postgres";
    let at = &config.postgres;
    let store = Store::for_viewers(at).hasty();
    let before = Timestamp::now();
    let inspected = store.connection().and_then(|mut connection| {
        let inspection = connection.inspect()?;
        Ok((inspection, connection))
    });
    let after = Timestamp::now();
    match inspected {
        Err(error) => {
            findings.add(
                PART,
                Severity::Error,
                format!("{at}: {}", one_line(&format!("{:#}", anyhow::Error::from(error)))),
                "Check POSTGRESQL_HOST, _PORT, _DATABASE, _USERNAME and _PASSWORD, and that the server \
                 runs and lets this host in.",
            );
            findings.is(Kind::Needed);
            None
        }
        Ok((inspection, mut connection)) => {
            findings.ok(PART, format!("{at} answers"));
            judge_database(&inspection, before, after, findings);
            judge_rights(&inspection, findings);
            judge_settings(&inspection, config.handler_threads, findings);
            let may_write = inspection.is_usable && inspection.lacks_to_work.is_empty();
            let may_write = may_write && inspection.unwritable.is_none();
            let is_locked = may_write && !try_writing(&mut connection, findings);
            // Whoever looks at a table's size waits for its locks, too.
            if inspection.is_usable && !is_locked {
                judge_sizes(connection.sizes(), findings);
            }
            Some((inspection, connection))
        }
    }
}

/// Returns whether the tables can be got at.
fn try_writing(connection: &mut Connection, findings: &mut Findings) -> bool {
    const PART: &str = "Postgres";
    let Err(error) = connection.try_writing() else {
        findings.ok(PART, "it takes what is written");
        return true;
    };
    let is_locked = matches!(error, StoreError::Locked(_));
    let why = one_line(&format!("{:#}", anyhow::Error::from(error)));
    let has = |sign: &str| why.to_lowercase().contains(sign);
    let remedy = if is_locked {
        "Somebody holds a lock: `pg_locks` and `pg_stat_activity` say who."
    } else if ["no space", "could not extend", "could not write", "disk"]
        .into_iter()
        .any(has)
    {
        "Give it room on its disk. Messages wait in RabbitMQ meanwhile, and all goes on by itself."
    } else {
        "See its log and its disk. Messages wait in RabbitMQ meanwhile, and all goes on by itself."
    };
    let found = format!("it does not take what is written: {why}");
    findings.add(PART, Severity::Error, found, remedy);
    findings.is(Kind::Needed);
    !is_locked
}

/// In the words of the status page.
fn judge_sizes(sizes: Result<Sizes, StoreError>, findings: &mut Findings) {
    const PART: &str = "Postgres";
    match sizes {
        Ok(sizes) => {
            let tables = sizes.tables.iter();
            let tables =
                tables.map(|(name, bytes)| format!("{} in {}", room(*bytes), one_line(name)));
            let tables = tables.collect::<Vec<_>>().join(", ");
            let room = match tables.is_empty() {
                true => sizes.total(),
                false => format!("{}: {tables}", sizes.total()),
            };
            findings.ok(PART, room);
        }
        Err(error) => {
            let why = one_line(&format!("{:#}", anyhow::Error::from(error)));
            let found = format!("how much room this database takes is not known: {why}");
            findings.add(PART, Severity::Note, found, "See its log, and try again.");
            findings.is(Kind::NotLookedAt);
        }
    }
}

/// `before` and `after` are this machine's times before and after reading the database's clock.
fn judge_database(
    inspection: &Inspection,
    before: Timestamp,
    after: Timestamp,
    findings: &mut Findings,
) {
    const PART: &str = "Postgres";
    let head = REVISIONS.last().map_or("", |revision| revision.id);
    match &inspection.revision {
        Some(Ok(applied)) if *applied == REVISIONS.len() => {
            findings.ok(PART, format!("the tables are at revision {head}"));
        }
        Some(Ok(applied)) => findings.add(
            PART,
            Severity::Note,
            format!(
                "the tables lack {} of the {} revisions",
                REVISIONS.len() - applied,
                REVISIONS.len()
            ),
            "The service applies them at its next start; `db upgrade` does now.",
        ),
        Some(Err(error)) => {
            findings.add(
                PART,
                Severity::Error,
                one_line(error),
                "The service does not start with these tables. Run the version that upgraded them, or \
                 have that one undo it: `db downgrade`.",
            );
            findings.is(Kind::Needed);
        }
        None => {}
    }
    if let Some(clock) = inspection.clock {
        let skew = match (clock < before, clock > after) {
            (true, _) => before.duration_since(clock),
            (_, true) => clock.duration_since(after),
            (false, false) => SignedDuration::ZERO,
        };
        if skew > MAX_SKEW {
            findings.add(
                PART,
                Severity::Warning,
                format!("its clock and this machine's differ by {}", spoken(skew)),
                "Keep both by NTP. All that is decided is decided by Postgres's clock; logs and the page are \
                 not.",
            );
        }
    }
}

fn judge_rights(inspection: &Inspection, findings: &mut Findings) {
    const PART: &str = "Postgres";
    let head = matches!(inspection.revision, Some(Ok(applied)) if applied == REVISIONS.len());
    let to_upgrade = match head {
        // Needed by the next version that has a revision.
        true => Severity::Note,
        false => Severity::Error,
    };
    // The Python service upgrades as well, as far as it knows.
    let kind = match inspection.revision {
        Some(Ok(applied)) if migrate::has_all_of_python(applied) => Kind::NeededHere,
        Some(Ok(_) | Err(_)) | None => Kind::Other,
    };
    for (severity, kind, lacks) in [
        (Severity::Error, Kind::Other, &inspection.lacks_to_work),
        (to_upgrade, kind, &inspection.lacks_to_upgrade),
    ] {
        if lacks.is_empty() {
            continue;
        }
        let what: Vec<_> = lacks.iter().map(|lack| lack.what.as_str()).collect();
        let found = format!("the user lacks {}", what.join("; "));
        let statements = rights::statements(lacks);
        findings.add(
            PART,
            severity,
            one_line(&found),
            &format!("As a superuser, in this database: {statements}"),
        );
        findings.is(kind);
    }
}

/// `handlers` is how many threads of a replica lock the jobs of a batch each.
fn judge_settings(inspection: &Inspection, handlers: usize, findings: &mut Findings) {
    const PART: &str = "Postgres";
    if let Some(why) = &inspection.unwritable {
        findings.add(
            PART,
            Severity::Error,
            format!("it {why}"),
            "Point POSTGRESQL_HOST to the primary, or reset the setting of the role, the database or the \
             server. Messages wait, or go to other replicas, until it takes writes.",
        );
        findings.is(Kind::Needed);
    }
    let settings = &inspection.settings;
    if settings.synchronous_commit == "off" {
        findings.add(
            PART,
            Severity::Warning,
            "synchronous_commit is off for this role, database or server",
            "The service sets it to on for its own connections; a Python service would lose what it has \
             acknowledged in a crash of Postgres. Reset it.",
        );
    }
    for (name, is_on) in [
        ("fsync", settings.fsync),
        ("full_page_writes", settings.full_page_writes),
    ] {
        if !is_on {
            findings.add(
                PART,
                Severity::Note,
                format!("{name} is off"),
                "After a crash of its machine the database may be damaged. Switch it on.",
            );
        }
    }
    let wanted = i64::try_from(handlers * MAX_BATCH_MESSAGES).unwrap_or(i64::MAX);
    if let Some(locks) = settings.locks.filter(|locks| *locks < wanted) {
        findings.add(
            PART,
            Severity::Warning,
            format!(
                "it has room for {locks} locks, and {handlers} handlers may want {wanted} at once, in \
                 each replica"
            ),
            "Raise max_locks_per_transaction, or lower HANDLER_THREADS. Where there are too few, batches \
             are divided, and others who use this server may be refused.",
        );
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::doctor::Finding;

    #[rstest]
    #[case::in_between(1, false)]
    #[case::a_little_before(-4, false)]
    #[case::far_before(-6, true)]
    #[case::far_after(8, true)]
    fn a_clock_that_differs_is_told(#[case] second: i64, #[case] is_found: bool) {
        let at = |second| Timestamp::from_second(second).unwrap();
        let inspection = Inspection {
            clock: Some(at(second)),
            ..Inspection::default()
        };
        let mut findings = Findings::default();
        judge_database(&inspection, at(0), at(2), &mut findings);
        let skew = |finding: &Finding| finding.found.contains("clock");
        assert_eq!(findings.0.iter().any(skew), is_found);
    }

    #[test]
    fn how_full_it_is_is_told_with_the_largest_tables() {
        let mut findings = Findings::default();
        let tables = [("job_history", 5 << 20), ("job", 20_000)];
        let sizes = Sizes {
            database: 9_133_000,
            tables: tables.map(|(name, bytes)| (name.to_owned(), bytes)).into(),
        };
        judge_sizes(Ok(sizes), &mut findings);
        judge_sizes(Ok(Sizes::default()), &mut findings);
        let found: Vec<_> = findings.0.iter().map(|one| one.found.as_str()).collect();
        let full = "8918 KiB in this database: 5120 KiB in job_history, 19 KiB in job";
        assert_eq!(found, [full, "0 bytes in this database"]);
    }
}
