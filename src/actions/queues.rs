//! What is allowed at task queues.

use std::collections::BTreeSet;
use std::time::Duration;

use super::Failure;
use crate::domain::job::Origin;
use crate::domain::overview::QueueView;
use crate::domain::turns::{Limits, QueueLimit};
use crate::domain::workflow::Catalogue;
use crate::store::{Connection, LimitChange, QueueChange};
use crate::telemetry::report::one_line;

/// A limit as operators write it.
///
/// # Errors
/// What was expected.
pub fn parse_change(text: &str) -> Result<QueueChange, String> {
    match text {
        "default" => Ok(QueueChange::AsDefined),
        "unlimited" => Ok(QueueChange::Unlimited),
        number => match number.parse() {
            Ok(limit) if limit > 0 && i32::try_from(limit).is_ok() => Ok(QueueChange::To(limit)),
            Ok(_) | Err(_) => {
                Err("expected a number of tasks, at least 1, unlimited or default".to_owned())
            }
        },
    }
}

/// Changes what is allowed at a queue for somebody, and returns what is allowed then.
///
/// # Errors
/// Nobody knows the queue, or Postgres is not there.
pub fn change_limits(
    catalogue: &Catalogue,
    connection: &mut Connection,
    name: &str,
    (changes, by): (&[LimitChange], &Origin),
) -> Result<QueueLimit, Failure> {
    check_name(catalogue, connection, name)?;
    let changed = connection
        .change_limits(name, changes, by)
        .and_then(|()| connection.queue_limits(catalogue.queue_limits()));
    let limits = changed.map_err(|error| {
        anyhow::Error::from(error)
            .context("whether it was done is not known; doing it again does no harm")
    })?;
    Ok(limits.get(name).copied().unwrap_or_default())
}

/// Whether anything may wait at this queue.
fn check_name(
    catalogue: &Catalogue,
    connection: &mut Connection,
    name: &str,
) -> Result<(), Failure> {
    let tasks = catalogue.tasks();
    if tasks.contains(name) || at_rest(connection)?.iter().any(|queue| queue.name == name) {
        return Ok(());
    }
    let listed = |names: BTreeSet<&str>| {
        let names: Vec<_> = names.into_iter().map(one_line).collect();
        names.join(", ")
    };
    Err(Failure::Refused(match catalogue.definition(name) {
        Some(definition) => format!(
            "{} has steps: name one of their tasks, {}",
            one_line(name),
            listed(definition.steps.tasks().collect())
        ),
        None => format!(
            "no workflow has the task {}; there are {}",
            one_line(name),
            listed(tasks)
        ),
    }))
}

/// The queues at which something waits or has had its turn, whatever their limits.
///
/// # Errors
/// Postgres is not there.
pub fn at_rest(connection: &mut Connection) -> Result<Vec<QueueView>, Failure> {
    Ok(connection.turns(&Limits::new(), Duration::ZERO)?)
}
