//! The tasks that wait in RabbitMQ, and the queues of them that nobody takes.

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::{Overview, spoken};
use crate::domain::text::one_line;

/// Tasks that wait in RabbitMQ, as far as the database knows: of a workflow without several steps, or of a
/// step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queued {
    pub workflow: String,
    /// The step's number, from 1.
    pub step: Option<usize>,
    /// Where they wait, if that was kept: always of a step.
    pub queue: Option<String>,
    pub waiting: i64,
    /// When the one that has waited longest was put there.
    pub oldest: Timestamp,
}

/// A task queue in which something waits, and which nobody takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LonelyQueue {
    pub queue: String,
    /// `design, step 1`: whose tasks wait there. Empty if it is the workflow of the queue's own name alone.
    pub of: Vec<String>,
    /// Jobs whose tasks wait there and were never begun.
    pub waiting: i64,
    /// Since when the one of them that has waited longest waits.
    pub oldest: Option<Timestamp>,
    /// Messages in it: also tasks whose workers have gone.
    pub messages: u32,
    /// Since when jobs have been waiting without a worker, as far as is known.
    pub since: Timestamp,
}

impl Overview {
    /// Where the tasks of one kind wait.
    fn queue_of_kind<'a>(&'a self, queued: &'a Queued) -> &'a str {
        match &queued.queue {
            Some(queue) => queue,
            None => self.queue_of(&queued.workflow),
        }
    }

    /// The queues that nobody takes though something waits in them.
    pub fn lonely(&self) -> Vec<LonelyQueue> {
        let Some(queues) = &self.queues else {
            return Vec::new();
        };
        let lonely = queues.without_worker.iter().map(|(queue, since)| {
            let of_it = self.queued.iter();
            let of_it: Vec<_> = of_it
                .filter(|one| self.queue_of_kind(one) == queue)
                .collect();
            let name = |one: &&Queued| match one.step {
                Some(number) => format!("{}, step {number}", one_line(&one.workflow)),
                None => one_line(&one.workflow),
            };
            let mut of: Vec<_> = of_it.iter().map(name).collect();
            if of.is_empty() {
                of = self.users(queue);
            }
            of.dedup();
            if of == [one_line(queue)] {
                of.clear();
            }
            LonelyQueue {
                queue: queue.clone(),
                of,
                waiting: of_it.iter().map(|one| one.waiting).sum(),
                oldest: of_it.iter().map(|one| one.oldest).min(),
                messages: queues.waiting(queue),
                since: *since,
            }
        });
        lonely.collect()
    }

    /// The workflows that are defined with a task of this queue.
    fn users(&self, queue: &str) -> Vec<String> {
        let uses = |workflow: &&String| match self.tasks.get(*workflow) {
            Some(tasks) => tasks.iter().any(|task| task == queue),
            None => *workflow == queue,
        };
        let users = self.defined.iter().filter(uses);
        users.map(|workflow| one_line(workflow)).collect()
    }
}

impl LonelyQueue {
    /// ` (workflow design, step 1)`.
    pub fn users(&self) -> String {
        match &self.of[..] {
            [] => String::new(),
            [one] => format!(" (workflow {one})"),
            all => format!(" (workflows {})", all.join("; ")),
        }
    }

    /// `2 jobs wait`; of what was begun already, `1 task waits`.
    pub fn what_waits(&self) -> String {
        let (count, what) = match self.waiting {
            0 => (i64::from(self.messages), "task"),
            jobs => (jobs, "job"),
        };
        match count {
            1 => format!("1 {what} waits"),
            more => format!("{more} {what}s wait"),
        }
    }

    /// `has no worker, and 2 jobs wait, the oldest for 3 h 10 min`.
    pub fn in_words(&self, now: Timestamp) -> String {
        let time = |since: Timestamp| spoken(now.duration_since(since).max(SignedDuration::ZERO));
        let how_long = match (self.oldest, self.waiting) {
            (Some(oldest), ..=1) => format!(" for {}", time(oldest)),
            (Some(oldest), _) => format!(", the oldest for {}", time(oldest)),
            (None, _) => String::new(),
        };
        format!("has no worker, and {}{how_long}", self.what_waits())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::domain::overview::{Depth, Queue, Queues};
    use crate::domain::vhost::Vhost;

    fn at(minute: i64) -> Timestamp {
        Timestamp::from_second(minute * 60).unwrap()
    }

    fn queued(workflow: &str, step: Option<(usize, &str)>, waiting: i64, oldest: i64) -> Queued {
        Queued {
            workflow: workflow.to_owned(),
            step: step.map(|(number, _)| number),
            queue: step.map(|(_, task)| task.to_owned()),
            waiting,
            oldest: at(oldest),
        }
    }

    fn lonely(queue: &str, queued: Vec<Queued>) -> String {
        let overview = Overview {
            defined: ["design", "orphan", "simulate"].map(str::to_owned).to_vec(),
            tasks: BTreeMap::from([
                ("simulate".to_owned(), vec!["simulator".to_owned()]),
                (
                    "design".to_owned(),
                    vec!["optimiser".to_owned(), "simulator".to_owned()],
                ),
            ]),
            queued,
            queues: Some(Queues {
                at: at(200),
                queues: vec![Queue {
                    vhost: Vhost::Celery,
                    name: queue.to_owned(),
                    depth: Some(Depth {
                        messages: 1,
                        consumers: 0,
                    }),
                }],
                without_worker: BTreeMap::from([(queue.to_owned(), at(199))]),
            }),
            ..Overview::default()
        };
        let all = overview.lonely();
        assert_eq!(all.len(), 1);
        format!(
            "{}{} {}",
            all[0].queue,
            all[0].users(),
            all[0].in_words(at(200))
        )
    }

    #[test]
    fn it_is_told_who_waits_there_and_for_how_long() {
        let design = queued("design", Some((1, "optimiser")), 2, 10);
        assert_eq!(
            lonely("optimiser", vec![design.clone()]),
            "optimiser (workflow design, step 1) has no worker, and 2 jobs wait, the oldest for 3 h 10 min"
        );
        assert_eq!(
            lonely("orphan", vec![design, queued("orphan", None, 1, 195)]),
            "orphan has no worker, and 1 job waits for 5 min"
        );
        let both = vec![
            queued("design", Some((2, "simulator")), 1, 190),
            queued("simulate", None, 1, 180),
        ];
        assert_eq!(
            lonely("simulator", both),
            "simulator (workflows design, step 2; simulate) has no worker, and 2 jobs wait, \
             the oldest for 20 min"
        );
        // It was begun before, and its worker has gone.
        assert_eq!(
            lonely("optimiser", Vec::new()),
            "optimiser (workflow design) has no worker, and 1 task waits"
        );
    }
}
