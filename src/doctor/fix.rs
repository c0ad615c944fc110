//! What `doctor --fix` puts right. Only what loses nothing, whatever else goes on meanwhile: what the
//! service itself declares at its start, and tasks of jobs that have ended for good.

use std::fmt;
use std::time::Duration;

use anyhow::Context;

use crate::broker::Link;
use crate::broker::stale::drop_some;
use crate::config::Config;
use crate::domain::text::counted;
use crate::store::Store;
use crate::telemetry::report::one_line;
use crate::threads::within_deadline;
use crate::wire::celery;

/// How long one step may take.
const DEADLINE: Duration = Duration::from_secs(10);
/// And going through a queue, whose tasks may be large.
const GOING_THROUGH: Duration = Duration::from_secs(300);

/// Something that can be put right without a loss.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fix {
    /// The queues and exchanges of the service.
    Declare,
    /// The tasks of ended jobs in this queue.
    DropStale(String),
}

/// What would be done.
impl fmt::Display for Fix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fix::Declare => {
                f.write_str("declare the queues and exchanges that the service declares")
            }
            Fix::DropStale(queue) => write!(
                f,
                "drop the tasks in {} whose jobs have ended; all others stay where they are",
                one_line(queue)
            ),
        }
    }
}

impl Fix {
    /// Does it, and says what was done.
    ///
    /// # Errors
    /// RabbitMQ or Postgres is not there; doing it again does no harm.
    pub fn apply(&self, config: &Config) -> anyhow::Result<String> {
        match self {
            Fix::Declare => declare(config),
            Fix::DropStale(queue) => drop_stale(config, queue),
        }
    }
}

fn declare(config: &Config) -> anyhow::Result<String> {
    let with = |rabbitmq, declare: &dyn Fn(&Link) -> anyhow::Result<()>| {
        let link = Link::open(rabbitmq, "doctor, declaring")?;
        within_deadline(DEADLINE, || link.kill(), || declare(&link))?;
        link.close_within(DEADLINE)
    };
    with(&config.sdk_rabbitmq, &|link| {
        link.declare_for_clients()?;
        Ok(link.declare_dead_letters()?)
    })?;
    with(&config.task_rabbitmq, &|link| {
        link.declare_for_workers(&[&config.task_result_queue, &config.task_progress_queue])?;
        Ok(link.declare_dead_letters()?)
    })?;
    with(&config.celery_rabbitmq, &|link| link.declare_pidbox())?;
    Ok("the queues and exchanges of the service are declared".to_owned())
}

fn drop_stale(config: &Config, queue: &str) -> anyhow::Result<String> {
    let store = Store::new(&config.postgres, 1).hasty();
    let mut connection = store.connection().context("nothing was dropped")?;
    let link = Link::open(&config.celery_rabbitmq, "doctor, dropping stale tasks")?;
    let has_ended = |body: &[u8]| match celery::job_of_task(body) {
        // Once a job has ended for good, no task of it is wanted any more, whichever it is.
        Some(job) => Ok(connection.has_ended(job)?),
        None => Ok(false),
    };
    let dropped = within_deadline(
        GOING_THROUGH,
        || link.kill(),
        || drop_some(&link, queue, has_ended),
    )?;
    link.close_within(DEADLINE)?;
    Ok(format!(
        "{} of jobs that have ended {} dropped from {}",
        counted(dropped, "task"),
        if dropped == 1 { "was" } else { "were" },
        one_line(queue)
    ))
}
