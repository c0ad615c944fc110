//! Draining a worker, and sending it back to its queues, with its own word that it has done so.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::slice;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};

use super::messages;
use crate::broker::{DEADLINE, Link};
use crate::config::Config;
use crate::domain::worker::{Answer, Wish, Worker, WorkerState};
use crate::store::Connection;
use crate::telemetry::report::one_line;
use crate::threads::{Calls, Signal, within_deadline};
use crate::wire::workers::Control;

/// How long a worker has for an answer, and to do what it was told.
const ANSWER_TIME: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(12);

/// What a worker has confirmed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Steered {
    pub host: String,
    /// From which it takes tasks now.
    pub queues: BTreeSet<String>,
    /// How many tasks it computes.
    pub tasks: usize,
}

impl Steered {
    pub fn in_words(&self, wish: Wish) -> String {
        let host = one_line(&self.host);
        match wish {
            Wish::Drained => format!(
                "{host}: takes nothing more; {}",
                match self.tasks {
                    0 => "it has nothing to finish".to_owned(),
                    1 => "it finishes the task that it has".to_owned(),
                    more => format!("it finishes the {more} tasks that it has"),
                }
            ),
            Wish::Resumed => {
                let queues: Vec<_> = self.queues.iter().map(|one| one_line(one)).collect();
                format!("{host}: takes tasks from {}", queues.join(", "))
            }
        }
    }
}

/// Has a worker take no more tasks, or take tasks again.
///
/// # Errors
/// It is gone, has not confirmed it, or nothing is known of its queues; or a connection is lost.
pub fn steer(
    config: &Config,
    mut connection: Connection,
    worker: &Worker,
    wish: Wish,
    stop: &Signal,
) -> anyhow::Result<Steered> {
    check(worker).map_err(anyhow::Error::msg)?;
    // Before it is told: the service sends those back that are wished to be.
    connection.wish(&worker.host, wish)?;
    // Others may need it while the worker takes its time.
    drop(connection);
    let link = Link::open(&config.celery_rabbitmq, "steering a worker")?;
    let steered = within_deadline(DEADLINE, || link.kill(), || tell(&link, worker, wish, stop));
    // What the worker has confirmed stays so, whatever becomes of the connection.
    let _ = link.close_within(DEADLINE);
    steered
}

/// Whether there is a worker to be told anything.
///
/// # Errors
/// Why there is none.
pub fn check(worker: &Worker) -> Result<(), String> {
    let name = one_line(&worker.host);
    if worker.state == WorkerState::Gone {
        return Err(format!("the worker {name} is gone"));
    }
    if worker.serves.is_empty() {
        return Err(format!("nothing is known of the queues of {name}"));
    }
    Ok(())
}

/// Tells it until it says that it is so.
fn tell(link: &Link, worker: &Worker, wish: Wish, stop: &Signal) -> anyhow::Result<Steered> {
    let since = Instant::now();
    let mut answers = ask(
        link,
        worker,
        &[Control::ActiveQueues, Control::Active],
        stop,
    )?;
    while since.elapsed() < PATIENCE {
        let wrong: BTreeSet<String> = match (&answers.queues, wish) {
            (Some(queues), Wish::Drained) => queues.clone(),
            (Some(queues), Wish::Resumed) => worker.serves.difference(queues).cloned().collect(),
            // It may not have heard the question.
            (None, Wish::Drained) => worker.queues.clone(),
            (None, Wish::Resumed) => worker.serves.clone(),
        };
        if let (Some(queues), Some(tasks), true) =
            (&answers.queues, &answers.tasks, wrong.is_empty())
        {
            return Ok(Steered {
                host: worker.host.clone(),
                queues: queues.clone(),
                tasks: tasks.len(),
            });
        }
        let orders: Vec<_> = wrong
            .iter()
            .map(|queue| match wish {
                Wish::Drained => Control::CancelConsumer(queue),
                Wish::Resumed => Control::AddConsumer(queue),
            })
            .collect();
        if !orders.is_empty() {
            ask(link, worker, &orders, stop)?;
        }
        answers = ask(
            link,
            worker,
            &[Control::ActiveQueues, Control::Active],
            stop,
        )?;
    }
    bail!(
        "{} has not confirmed it within {PATIENCE:?}; if it is busy or held up, it may still hear of it",
        one_line(&worker.host)
    )
}

fn ask(
    link: &Link,
    worker: &Worker,
    questions: &[Control<'_>],
    stop: &Signal,
) -> anyhow::Result<Answer> {
    let mut answers = BTreeMap::new();
    let mut missing = questions.len();
    let messages = messages(questions, Some(slice::from_ref(&worker.host)), || 1);
    let note = |place: usize, answer: &[u8]| {
        questions[place].note(answer, &mut answers);
        missing -= 1;
        match missing {
            0 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    };
    let is_complete = link.ask(&messages, ANSWER_TIME, &Calls::default(), stop, note)?;
    ensure!(
        is_complete,
        "the service stops before {} has confirmed it",
        one_line(&worker.host)
    );
    Ok(answers.remove(&worker.host).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;
    use rstest::rstest;

    /// Before anything is asked of a service: that it cannot be done is certain then.
    #[rstest]
    #[case(WorkerState::Busy, &["a"], Ok(()))]
    #[case(WorkerState::Silent, &["a"], Ok(()))]
    #[case(WorkerState::Gone, &["a"], Err("the worker w\\n is gone"))]
    #[case(WorkerState::Busy, &[], Err("nothing is known of the queues of w\\n"))]
    fn only_a_worker_that_is_there_is_steered(
        #[case] state: WorkerState,
        #[case] serves: &[&str],
        #[case] expected: Result<(), &str>,
    ) {
        let worker = Worker {
            state,
            serves: serves.iter().map(|queue| (*queue).to_owned()).collect(),
            ..Worker::new("w\n", Timestamp::UNIX_EPOCH)
        };
        assert_eq!(check(&worker), expected.map_err(str::to_owned));
    }
}
