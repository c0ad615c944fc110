//! Cancelling jobs, and changing those that wait for their turn.

use std::fmt;

use anyhow::{Context, bail};
use uuid::Uuid;

use super::{Failure, counted};
use crate::broker::{DEADLINE, Delivered, Link, Publisher};
use crate::config::Config;
use crate::domain::job::Priority;
use crate::domain::overview::{Filter, JobState, JobView};
use crate::store::{Connection, TurnChange};
use crate::threads::{Calls, within_deadline};
use crate::wire::{self, Outgoing};

/// What became of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Became {
    pub id: Uuid,
    pub is_done: bool,
    what: &'static str,
}

impl fmt::Display for Became {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "job {} {}", self.id, self.what)
    }
}

const ENDED: &str = "has ended already";
const UNKNOWN: &str = "is unknown";

/// Asks these jobs to end, as their clients would, but for those that have ended or are not known.
///
/// # Errors
/// Postgres or RabbitMQ is not there, or no orchestrator has been on this vhost.
pub fn cancel(
    config: &Config,
    connection: &mut Connection,
    ids: &[Uuid],
) -> Result<Vec<Became>, Failure> {
    let mut all = Vec::with_capacity(ids.len());
    for id in ids {
        let story = connection.story(*id).context("nothing was cancelled")?;
        let state = story.map(|story| story.job.state);
        let (is_done, what) = match state {
            Some(JobState::Live(_)) => (true, "is asked to end"),
            Some(JobState::Ended(_)) => (false, ENDED),
            None => (false, UNKNOWN),
        };
        let id = *id;
        all.push(Became { id, is_done, what });
    }
    let live: Vec<_> = all.iter().filter(|one| one.is_done).collect();
    let live: Vec<_> = live.iter().map(|one| one.id).collect();
    ask_to_end(config, &live)?;
    Ok(all)
}

/// Sends the cancels that clients would send.
///
/// # Errors
/// RabbitMQ is not there, or no orchestrator has been on this vhost.
pub fn ask_to_end(config: &Config, ids: &[Uuid]) -> anyhow::Result<()> {
    if ids.is_empty() {
        return Ok(());
    }
    let messages: Vec<_> = ids
        .iter()
        .map(|id| Outgoing {
            // Without the orchestrator's queue the message would vanish.
            mandatory: true,
            ..wire::job_delete(*id)
        })
        .collect();
    let link = Link::open(&config.sdk_rabbitmq, "cancelling").context("nothing was cancelled")?;
    let calls = Calls::default();
    let count = counted(ids.len(), "job");
    let published = within_deadline(
        DEADLINE,
        || link.kill(),
        || Ok(Publisher::new(&link, &calls).publish(&messages)?),
    );
    // What is confirmed stays so, whatever becomes of the connection.
    let _ = link.close_within(DEADLINE);
    let delivered = published.with_context(|| {
        format!(
            "some of {count} may have been asked to end, and some not; asking again does no harm"
        )
    })?;
    let taken = delivered.iter().filter(|one| **one == Delivered::Yes);
    match taken.count() {
        all if all == ids.len() => Ok(()),
        taken => bail!(
            "RabbitMQ has taken the cancels of {taken} of {count}: is an orchestrator running on this \
             vhost?"
        ),
    }
}

/// The jobs that match and have not ended, and of which `is_meant` says so; whichever part of the
/// list the filter is at.
///
/// # Errors
/// Postgres is not there.
pub fn unfinished(
    connection: &mut Connection,
    filter: &Filter,
    is_meant: impl Fn(&JobView) -> bool,
) -> Result<Vec<JobView>, Failure> {
    if filter.finished || matches!(filter.state, Some(JobState::Ended(_))) {
        return Err(Failure::Refused("these jobs have ended already".to_owned()));
    }
    let mut found = Vec::new();
    let mut filter = Filter {
        // As many as there are, so that none is missed because one before it ends meanwhile.
        limit: u16::MAX,
        offset: 0,
        ..filter.clone()
    };
    loop {
        let page = connection.jobs(&filter)?;
        let is_last = page.jobs.len() < usize::from(filter.limit);
        filter.offset += u32::from(filter.limit);
        let is_live = |job: &JobView| matches!(job.state, JobState::Live(_));
        let meant = page.jobs.into_iter();
        found.extend(meant.filter(|job| is_live(job) && is_meant(job)));
        if is_last {
            return Ok(found);
        }
    }
}

/// Changes what waits for its turn.
///
/// # Errors
/// Postgres is not there, or holds a lock for too long.
pub fn change_turns(
    connection: &mut Connection,
    ids: &[Uuid],
    change: TurnChange,
) -> Result<Vec<Became>, Failure> {
    let changed = connection.change_turns(ids, change).map_err(|error| {
        anyhow::Error::from(error)
            .context("whether it was done is not known; doing it again does no harm")
    })?;
    let mut all = Vec::with_capacity(ids.len());
    for id in ids {
        let is_done = changed.contains(id);
        let what = match is_done {
            true => done(change),
            false => match state_of(connection, *id)? {
                Some(JobState::Live(_)) => {
                    "does not wait for its turn: its task has been handed over to RabbitMQ"
                }
                Some(JobState::Ended(_)) => ENDED,
                None => UNKNOWN,
            },
        };
        let id = *id;
        all.push(Became { id, is_done, what });
    }
    Ok(all)
}

/// Why a job was not changed is in its state.
fn state_of(connection: &mut Connection, id: Uuid) -> anyhow::Result<Option<JobState>> {
    let story = connection.story(id);
    let story =
        story.context("what could be changed is changed; of the others nothing is known")?;
    Ok(story.map(|story| story.job.state))
}

fn done(change: TurnChange) -> &'static str {
    match change {
        TurnChange::Hold => "is held until it is released",
        TurnChange::Release => "waits for its turn",
        TurnChange::First => "is the next of its queue",
        TurnChange::Priority(Priority::Low) => "has the priority low",
        TurnChange::Priority(Priority::Medium) => "has the priority medium",
        TurnChange::Priority(Priority::High) => "has the priority high",
    }
}
