//! Which time series to give up: a pure decision over what InfluxDB has, what the guard rows say,
//! and the time.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

/// A row of `esdl_time_series_info`: what is known of the series of one output ESDL.
#[derive(Debug, Clone, PartialEq)]
pub struct Guard {
    pub esdl_id: String,
    /// Since when they have been retired. None while they are in use.
    pub deactivated_at: Option<Timestamp>,
    /// The job that made them. None if a scan found a database that no job has claimed.
    pub job_id: Option<Uuid>,
}

/// Databases that are never touched, whatever a guard row says: InfluxDB's own, and the one that
/// OMOTES keeps its profiles in. The configured one is another.
pub const PROTECTED: [&str; 2] = ["_internal", "omotes_timeseries"];

/// What a scan is to do, in the order of the databases and rows.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// Databases without a row that look like a job's: they get one, deactivated now, and are
    /// dropped when no job has claimed them within the retention.
    pub mark: Vec<String>,
    /// Databases whose retention has passed, with their rows.
    pub drop: Vec<String>,
    /// Rows of deleted series that are in no database here, and whose retention has passed.
    pub forget: Vec<String>,
    /// How many databases are not jobs'.
    pub foreign: usize,
}

/// What to do about `databases`. `oldest_running` is the time of the first start of the job that
/// has been running for longest.
pub fn plan(
    databases: &[String],
    guards: &[Guard],
    protected: &HashSet<String>,
    oldest_running: Option<Timestamp>,
    now: Timestamp,
    retention: Duration,
) -> Plan {
    let is_protected = |name: &str| PROTECTED.contains(&name) || protected.contains(name);
    let due = |guard: &Guard| {
        let Some(deactivated_at) = guard.deactivated_at else {
            return false;
        };
        let past = deactivated_at
            .checked_add(retention)
            .is_ok_and(|end| end <= now);
        // A database that no job has claimed may still be a running job's, which claims it when it
        // succeeds. No job that began after the scan can have made it before.
        let may_be_claimed =
            guard.job_id.is_none() && oldest_running.is_some_and(|start| start <= deactivated_at);
        past && !may_be_claimed
    };
    let by_id: HashMap<_, _> = guards
        .iter()
        .map(|guard| (guard.esdl_id.as_str(), guard))
        .collect();
    let mut plan = Plan::default();
    for database in databases {
        if is_protected(database) {
            continue;
        }
        match by_id.get(database.as_str()) {
            Some(guard) if due(guard) => plan.drop.push(database.clone()),
            Some(_) => {}
            // A job's output ESDL has a UUID; what is called otherwise is not a job's.
            None if is_uuid(database) => plan.mark.push(database.clone()),
            None => plan.foreign += 1,
        }
    }
    let present: HashSet<_> = databases.iter().collect();
    plan.forget = guards
        .iter()
        .filter(|guard| !present.contains(&guard.esdl_id) && due(guard))
        .map(|guard| guard.esdl_id.clone())
        .collect();
    plan
}

/// As ESDL editors write it: somebody else's hash, which is as long, is none.
fn is_uuid(name: &str) -> bool {
    let hyphenated = |id: Uuid| id.hyphenated().to_string();
    Uuid::try_parse(name).is_ok_and(|id| hyphenated(id).eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const ID: &str = "6f0a1f0e-2f5e-4d0b-9b6a-0f3f3b7c5a11";

    #[test]
    fn a_hash_is_no_uuid() {
        assert!(is_uuid(ID) && is_uuid(&ID.to_uppercase()));
        assert!(!is_uuid(&ID.replace('-', "")));
        assert!(!is_uuid(&format!("{{{ID}}}")));
        assert!(!is_uuid("telegraf"));
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// The plan for a database of this name, with a row deactivated then and of a job or not, when
    /// the oldest job has been running since then. It is second 1000, the retention 100 seconds.
    fn check(
        database: Option<&str>,
        guard: Option<(Option<i64>, bool)>,
        oldest_running: Option<i64>,
    ) -> &'static str {
        let name = database.unwrap_or(ID);
        let guards: Vec<_> = guard
            .map(|(deactivated_at, of_a_job)| Guard {
                esdl_id: name.to_owned(),
                deactivated_at: deactivated_at.map(at),
                job_id: of_a_job.then(|| Uuid::from_u128(1)),
            })
            .into_iter()
            .collect();
        let databases: Vec<_> = database.map(str::to_owned).into_iter().collect();
        let protected = HashSet::from(["configured".to_owned()]);
        let retention = Duration::from_secs(100);
        let running = oldest_running.map(at);
        let Plan {
            mark,
            drop,
            forget,
            foreign,
        } = plan(
            &databases,
            &guards,
            &protected,
            running,
            at(1000),
            retention,
        );
        match (mark.len(), drop.len(), forget.len(), foreign) {
            (0, 0, 0, 0) => "leave",
            (1, 0, 0, 0) => "mark",
            (0, 1, 0, 0) => "drop",
            (0, 0, 1, 0) => "forget",
            (0, 0, 0, 1) => "foreign",
            other => panic!("{other:?}"),
        }
    }

    #[rstest]
    #[case::unknown(Some(ID), None, None, "mark")]
    #[case::unknown_while_jobs_run(Some(ID), None, Some(1), "mark")]
    #[case::somebody_elses(Some("grafana"), None, None, "foreign")]
    #[case::in_use(Some(ID), Some((None, true)), None, "leave")]
    #[case::deleted_now(Some(ID), Some((Some(1000), true)), None, "leave")]
    #[case::deleted_within_retention(Some(ID), Some((Some(901), true)), None, "leave")]
    #[case::deleted_long_ago(Some(ID), Some((Some(900), true)), None, "drop")]
    #[case::deleted_while_others_run(Some(ID), Some((Some(900), true)), Some(1), "drop")]
    #[case::named_by_a_row(Some("not-a-uuid"), Some((Some(900), true)), None, "drop")]
    #[case::marked_long_ago(Some(ID), Some((Some(900), false)), None, "drop")]
    #[case::a_running_jobs_perhaps(Some(ID), Some((Some(900), false)), Some(900), "leave")]
    #[case::no_running_jobs(Some(ID), Some((Some(900), false)), Some(901), "drop")]
    #[case::influxdbs_own(Some("_internal"), None, None, "leave")]
    #[case::influxdbs_own_marked(Some("_internal"), Some((Some(1), false)), None, "leave")]
    #[case::omotes_marked(Some("omotes_timeseries"), Some((Some(1), true)), None, "leave")]
    #[case::configured_marked(Some("configured"), Some((Some(1), true)), None, "leave")]
    #[case::kept_elsewhere(None, Some((None, true)), None, "leave")]
    #[case::kept_elsewhere_and_deleted(None, Some((Some(901), true)), None, "leave")]
    #[case::kept_elsewhere_and_deleted_long_ago(None, Some((Some(900), true)), None, "forget")]
    fn each_database_and_row_has_its_fate(
        #[case] database: Option<&str>,
        #[case] guard: Option<(Option<i64>, bool)>,
        #[case] oldest_running: Option<i64>,
        #[case] fate: &str,
    ) {
        assert_eq!(check(database, guard, oldest_running), fate);
    }
}
