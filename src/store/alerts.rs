//! Which troubles somebody has been told of. What one replica has told is kept for all of them, beside
//! when each did what it does for all.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::{Connection, StoreError};
use crate::domain::alerts::{Alert, Key};

/// What the marks of troubles begin with among the tasks.
const MARK: &str = "told ";

fn mark((alert, subject): &Key) -> String {
    format!("{MARK}{} {subject}", alert.name())
}

fn key(mark: &str) -> Option<Key> {
    let (name, subject) = mark.strip_prefix(MARK)?.split_once(' ')?;
    let alert = Alert::ALL.into_iter().find(|alert| alert.name() == name)?;
    Some((alert, subject.to_owned()))
}

/// Whether a task is none, but such a mark.
pub(super) fn is_mark(task: &str) -> bool {
    task.starts_with(MARK)
}

impl Connection {
    /// The troubles that were told and have not been told to be over, with since when they were.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn told_troubles(&mut self) -> Result<BTreeMap<Key, Timestamp>, StoreError> {
        let rows = self.client.query(
            "SELECT task, last_run FROM maintenance_run WHERE starts_with(task, $1)",
            &[&MARK],
        )?;
        let told = rows.iter();
        Ok(told
            .filter_map(|row| Some((key(row.get(0))?, row.get(1))))
            .collect())
    }

    /// Notes that a trouble was told.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn note_told(&mut self, key: &Key, since: Timestamp) -> Result<(), StoreError> {
        self.client.execute(
            "INSERT INTO maintenance_run (task, last_run) VALUES ($1, $2)
             ON CONFLICT (task) DO UPDATE SET last_run = $2",
            &[&mark(key), &since],
        )?;
        Ok(())
    }

    /// Notes that it was told that a trouble is over.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn note_over(&mut self, key: &Key) -> Result<(), StoreError> {
        self.client
            .execute("DELETE FROM maintenance_run WHERE task = $1", &[&mark(key)])?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_says_which_trouble_was_told() {
        for alert in Alert::ALL {
            for subject in ["", "worker-a b@host", "told x"] {
                let told = (alert, subject.to_owned());
                assert!(is_mark(&mark(&told)));
                assert_eq!(key(&mark(&told)), Some(told));
            }
        }
        assert!(!is_mark("time series"));
        assert_eq!(key("told Unknown x"), None);
    }
}
