//! Cancelling jobs, and changing those that wait for their turn.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Context, bail};
use jiff::Timestamp;
use uuid::Uuid;

use super::{Failure, bounded, counted};
use crate::broker::{DEADLINE, Delivered, Link, Publisher};
use crate::config::Config;
use crate::domain::job::{Origin, Priority};
use crate::domain::overview::{ClientQueue, Filter, JobState, JobView};
use crate::store::{Connection, TurnChange};
use crate::threads::{Calls, within_deadline};
use crate::wire::{self, CANCELS_QUEUE, Outgoing};

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

/// Asks these jobs to end for somebody, as their clients would, but for those that have ended or are not known.
///
/// # Errors
/// Postgres or RabbitMQ is not there, or no orchestrator has been on this vhost.
pub fn cancel(
    config: &Config,
    mut connection: Connection,
    ids: &[Uuid],
    origin: &Origin,
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
    // Others may need it while RabbitMQ takes its time.
    drop(connection);
    let live = all.iter().filter(|one| one.is_done);
    let live: Vec<_> = live.map(|one| one.id).collect();
    if let Asked::Nobody = ask_to_end(config, &live, origin)? {
        for one in all.iter_mut().filter(|one| one.is_done) {
            one.what = WAITS;
        }
    }
    Ok(all)
}

/// Who has been asked to end jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    Orchestrator,
    /// The cancels wait in RabbitMQ.
    Nobody,
}

const WAITS: &str =
    "is asked to end, but no orchestrator runs on this vhost: it goes on until one does";

/// Sends the cancels that clients would send, for somebody.
///
/// # Errors
/// RabbitMQ is not there, or no orchestrator has been on this vhost.
pub fn ask_to_end(config: &Config, ids: &[Uuid], origin: &Origin) -> anyhow::Result<Asked> {
    if ids.is_empty() {
        return Ok(Asked::Orchestrator);
    }
    let link = Link::open(&config.sdk_rabbitmq, "cancelling").context("nothing was cancelled")?;
    let count = counted(ids.len(), "job");
    let mut delivered = Vec::with_capacity(ids.len());
    let published = ids.chunks(AT_ONCE).try_for_each(|some| {
        delivered.extend(publish_cancels(&link, some, origin)?);
        Ok::<_, anyhow::Error>(())
    });
    let is_deserted = link.is_deserted(CANCELS_QUEUE);
    // What is confirmed stays so, whatever becomes of the connection.
    let _ = link.close_within(DEADLINE);
    let outcomes = ids.iter().zip(&delivered);
    let refused = outcomes.filter(|(_, one)| **one != Delivered::Yes);
    let missing: Vec<_> = refused.map(|(id, _)| id.to_string()).collect();
    let taken = delivered.len() - missing.len();
    published.with_context(|| {
        format!(
            "{taken} of {count} are asked to end; of the others some may have been, and some not; \
             asking again does no harm"
        )
    })?;
    match missing.is_empty() {
        true if is_deserted.unwrap_or(false) => Ok(Asked::Nobody),
        true => Ok(Asked::Orchestrator),
        false => bail!(
            "RabbitMQ has taken the cancels of {taken} of {count}, but not those of {}: is an \
             orchestrator running on this vhost?",
            bounded(&missing, ", ")
        ),
    }
}

/// Cancels that are sent within one deadline.
const AT_ONCE: usize = 500;

fn publish_cancels(link: &Link, ids: &[Uuid], origin: &Origin) -> anyhow::Result<Vec<Delivered>> {
    let messages: Vec<_> = ids
        .iter()
        .map(|id| Outgoing {
            // Without the orchestrator's queue the message would vanish.
            mandatory: true,
            ..wire::job_delete_for(*id, origin)
        })
        .collect();
    let calls = Calls::default();
    within_deadline(
        DEADLINE,
        || link.kill(),
        || Ok(Publisher::new(link, &calls).publish(&messages)?),
    )
}

/// What is in the queue of the client that waits for a job's result; None if RabbitMQ does not tell.
pub fn client_queue(config: &Config, id: Uuid) -> Option<ClientQueue> {
    let link = Link::open(&config.sdk_rabbitmq, "looking at queues").ok()?;
    let found = within_deadline(
        DEADLINE,
        || link.kill(),
        || link.client_queue(&wire::result_queue(id)),
    );
    let _ = link.close_within(DEADLINE);
    found.ok().flatten()
}

/// Jobs that match a filter, of which some are shown.
#[derive(Debug)]
pub struct Matching {
    pub ids: Vec<Uuid>,
    pub first: Vec<JobView>,
}

/// The ids of the jobs that match, have not ended, and were registered by `until`; as many of the
/// jobs themselves as are `shown`. If they are to be held or released, only of those that can be.
///
/// # Errors
/// Postgres is not there.
pub fn matching(
    connection: &mut Connection,
    filter: &Filter,
    change: Option<TurnChange>,
    until: Timestamp,
    shown: usize,
) -> Result<Matching, Failure> {
    check_live(filter)?;
    let on_hold = change.map(|change| change == TurnChange::Release);
    let ids = connection.live_ids(filter, on_hold, until)?;
    // By their ids: any number of those that it is not about may come before them in the list.
    let first = match &ids[..ids.len().min(shown)] {
        [] => Vec::new(),
        some => connection.live_jobs(some)?,
    };
    Ok(Matching { ids, first })
}

/// Jobs that somebody has agreed to do something to, and that are still such.
#[derive(Debug)]
pub struct Meant {
    pub ids: Vec<Uuid>,
    /// What has become of the others, in lines for whoever has agreed.
    pub others: Vec<String>,
}

/// Those of the `confirmed` jobs that are among the `matching` ones.
///
/// # Errors
/// Postgres is not there.
pub fn meant(
    connection: &mut Connection,
    confirmed: &[Uuid],
    matching: &[Uuid],
) -> Result<Meant, Failure> {
    let confirmed: BTreeSet<Uuid> = confirmed.iter().copied().collect();
    let matching: BTreeSet<Uuid> = matching.iter().copied().collect();
    let left: Vec<Uuid> = confirmed.difference(&matching).copied().collect();
    let live = connection.count_live(&left)?;
    let more = matching.difference(&confirmed).count();
    let of_all = confirmed.len();
    let told = [
        (left.len() - live, "had ended meanwhile"),
        (live, "had been changed meanwhile, and no longer match"),
    ];
    let told = told.into_iter().filter(|(count, _)| *count > 0);
    let mut others: Vec<_> = told
        .map(|(count, what)| format!("{count} of the {of_all} that were shown {what}"))
        .collect();
    if more > 0 {
        let new = counted(more, "job");
        others.push(format!(
            "left alone: {new} that had come to match meanwhile"
        ));
    }
    let ids = confirmed.intersection(&matching).copied().collect();
    Ok(Meant { ids, others })
}

fn check_live(filter: &Filter) -> Result<(), Failure> {
    match filter.finished || matches!(filter.state, Some(JobState::Ended(_))) {
        true => Err(Failure::Refused("these jobs have ended already".to_owned())),
        false => Ok(()),
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
    check_live(filter)?;
    let mut found = Vec::new();
    let mut filter = Filter {
        // As many as there are, so that none is missed because one before it ends meanwhile.
        limit: u16::MAX,
        offset: 0,
        ..filter.clone()
    };
    loop {
        let page = connection.jobs(&filter, &[])?;
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

/// Changes what waits for its turn, for somebody.
///
/// # Errors
/// Postgres is not there, or holds a lock for too long.
pub fn change_turns(
    connection: &mut Connection,
    ids: &[Uuid],
    change: TurnChange,
    by: &Origin,
) -> Result<Vec<Became>, Failure> {
    let changed = connection.change_turns(ids, change, by).map_err(|error| {
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

/// Changes the turns of any number of jobs, some at a time, so that no handler waits for all of them and
/// Postgres has locks for them.
///
/// # Errors
/// As [`change_turns`]; the text says how many had been changed by then.
pub fn change_all_turns(
    connection: &mut Connection,
    ids: &[Uuid],
    change: TurnChange,
    by: &Origin,
) -> Result<Vec<Became>, Failure> {
    const SOME: usize = 100;
    let mut all = Vec::with_capacity(ids.len());
    for some in ids.chunks(SOME) {
        match change_turns(connection, some, change, by) {
            Ok(became) => all.extend(became),
            Err(failure) => {
                let done = all.iter().filter(|one: &&Became| one.is_done).count();
                let of = counted(ids.len(), "job");
                let so_far =
                    format!("{done} of {of} were changed before this; asking again goes on");
                return Err(match failure {
                    Failure::Failed(error) => Failure::Failed(error.context(so_far)),
                    refused @ Failure::Refused(_) => refused,
                });
            }
        }
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
