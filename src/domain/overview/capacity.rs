//! How many tasks of a queue are computed at once, and how long the present ones still take.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::{Overview, WorkflowRows};
use crate::domain::estimate::{Runs, Span};
use crate::domain::worker::{TaskView, WorkerState};

/// Workers that were last asked longer ago than this may do something else by now.
pub(super) const FRESH: SignedDuration = SignedDuration::from_mins(2);

/// Who takes a workflow's tasks.
#[derive(Debug, PartialEq)]
pub(super) struct Capacity {
    /// Processes, each of which computes one task.
    pub(super) processes: usize,
    /// How long those of them that compute something will still do so; None of what runs longer than all
    /// before it.
    pub(super) left: Vec<Option<Span>>,
}

impl Overview {
    /// Who takes the tasks of a workflow without several steps: as the workers themselves say or, where
    /// they say nothing, one process for each consumer of its queue, and what runs of the workflow.
    pub(super) fn capacity(&self, workflow: &str, runs: &Runs, now: Timestamp) -> Capacity {
        let queue = self.queue_of(workflow);
        let capacity = self.as_workers_say(queue, runs, now).unwrap_or_else(|| {
            let consumers = self.queues.as_ref();
            let consumers = consumers.and_then(|queues| queues.workers(queue));
            let elapsed = self.rows.get(workflow).map(|rows| rows.elapsed.iter());
            let elapsed = elapsed.into_iter().flatten();
            Capacity {
                processes: consumers.map_or(0, |consumers| consumers as usize),
                left: elapsed.map(|elapsed| runs.remaining(*elapsed)).collect(),
            }
        });
        let limits = self.turns.iter().find(|limits| limits.name == queue);
        Capacity {
            processes: limits.map_or(capacity.processes, |limits| {
                limits.workers(capacity.processes)
            }),
            ..capacity
        }
    }

    /// Whether all who take the tasks of a workflow compute what runs longer than all before it.
    pub(super) fn is_behind_overdue(&self, workflow: &str, now: Timestamp) -> bool {
        let runs = self.rows.get(workflow).and_then(|rows| rows.runs.as_ref());
        runs.is_some_and(|runs| {
            let Capacity { processes, left } = self.capacity(workflow, runs, now);
            processes > 0 && runs.waits(processes, &left, 1).is_none()
        })
    }

    /// Where the task of a job without several steps waits.
    pub(super) fn queue_of<'a>(&'a self, workflow: &'a str) -> &'a str {
        let tasks = self.tasks.get(workflow);
        let first = tasks.and_then(|tasks| tasks.first());
        first.map_or(workflow, String::as_str)
    }

    fn as_workers_say(&self, queue: &str, runs: &Runs, now: Timestamp) -> Option<Capacity> {
        let workers = self.workers.as_ref()?;
        if now.duration_since(workers.looked_at?) > FRESH {
            return None;
        }
        let mut capacity = Capacity {
            processes: 0,
            left: Vec::new(),
        };
        for worker in &workers.workers {
            let takes = match worker.state {
                WorkerState::Idle | WorkerState::Busy | WorkerState::BusyAndDeaf => {
                    worker.queues.iter().any(|one| one == queue)
                }
                WorkerState::Draining
                | WorkerState::Drained
                | WorkerState::Silent
                | WorkerState::Gone => false,
            };
            if takes {
                capacity.processes += worker.processes();
                let left = worker
                    .tasks
                    .iter()
                    .map(|task| self.left_of(task, runs, now));
                capacity.left.extend(left);
            }
        }
        (capacity.processes > 0).then_some(capacity)
    }

    /// How long a task still takes. Of a workflow that is not known well enough, or a step's, as long as
    /// those of the workflow that waits for it: they share a queue.
    fn left_of(&self, task: &TaskView, runs: &Runs, now: Timestamp) -> Option<Span> {
        let rows = task.workflow.as_ref().filter(|_| task.step.is_none());
        let rows = rows.and_then(|workflow| self.rows.get(workflow));
        let of_its_own = rows.and_then(|WorkflowRows { runs, .. }| runs.as_ref());
        let elapsed = Duration::try_from(now.duration_since(task.since)).unwrap_or_default();
        of_its_own.unwrap_or(runs).remaining(elapsed)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rstest::rstest;

    use super::*;
    use crate::domain::overview::Depth;
    use crate::domain::overview::{Queue, QueueView, Queues};
    use crate::domain::turns::QueueLimit;
    use crate::domain::vhost::Vhost;
    use crate::domain::worker::{WorkerView, Workers};

    const NOW: i64 = 1000;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn runs(seconds: u64) -> Runs {
        Runs::new(vec![Duration::from_secs(seconds); 5]).unwrap()
    }

    /// With what it computes: workflows, and since when.
    fn worker(state: WorkerState, queue: &str, pool: i64, tasks: &[(&str, i64)]) -> WorkerView {
        let tasks = tasks.iter().map(|(workflow, since)| TaskView {
            id: String::new(),
            name: (*workflow).to_owned(),
            job_id: None,
            reference: None,
            workflow: Some((*workflow).to_owned()),
            step: None,
            since: at(*since),
            ended: None,
        });
        WorkerView {
            host: "host".to_owned(),
            state,
            since: at(0),
            first_seen: at(0),
            last_seen: at(0),
            began_at: None,
            pool: None,
            pool_size: Some(pool),
            celery: None,
            queues: vec![queue.to_owned()],
            tasks: tasks.collect(),
            tasks_per_hour: None,
            ended: 0,
            failed: 0,
        }
    }

    /// RabbitMQ sees three consumers; one job runs since 40 seconds.
    fn overview(looked_at: i64, workers: Vec<WorkerView>) -> Overview {
        let rows = |seconds, elapsed| WorkflowRows {
            elapsed,
            runs: Some(runs(seconds)),
            ..WorkflowRows::default()
        };
        let running = vec![Duration::from_secs(40)];
        Overview {
            rows: BTreeMap::from([
                ("simulator".to_owned(), rows(100, running)),
                ("optimiser".to_owned(), rows(500, Vec::new())),
            ]),
            queues: Some(Queues {
                at: at(NOW),
                queues: vec![Queue {
                    vhost: Vhost::Celery,
                    name: "simulator".to_owned(),
                    depth: Some(Depth {
                        messages: 0,
                        consumers: 3,
                    }),
                }],
                without_worker: BTreeMap::new(),
            }),
            workers: Some(Workers {
                looked_at: Some(at(looked_at)),
                workers,
                lost_tasks: Vec::new(),
                more_lost_tasks: 0,
            }),
            ..Overview::default()
        }
    }

    #[rstest]
    #[case::nobody_has_said_anything(NOW, vec![], 3, &[60])]
    #[case::what_was_said_is_old(
        NOW - 600, vec![worker(WorkerState::Idle, "simulator", 8, &[])], 3, &[60]
    )]
    #[case::each_process_counts(
        NOW, vec![worker(WorkerState::Busy, "simulator", 2, &[("simulator", 990)])], 2, &[90]
    )]
    #[case::what_others_have_it_do(
        NOW, vec![worker(WorkerState::Busy, "simulator", 1, &[("optimiser", 900)])], 1, &[400]
    )]
    #[case::of_a_workflow_that_nobody_knows(
        NOW, vec![worker(WorkerState::Busy, "simulator", 1, &[("new", 970)])], 1, &[70]
    )]
    #[case::who_takes_nothing(
        NOW,
        vec![
            worker(WorkerState::Draining, "simulator", 4, &[]),
            worker(WorkerState::Silent, "simulator", 4, &[]),
            worker(WorkerState::Idle, "optimiser", 4, &[]),
            worker(WorkerState::Idle, "simulator", 1, &[]),
        ],
        1,
        &[]
    )]
    fn who_takes_its_tasks(
        #[case] looked_at: i64,
        #[case] workers: Vec<WorkerView>,
        #[case] processes: usize,
        #[case] left: &[u64],
    ) {
        let found = overview(looked_at, workers).capacity("simulator", &runs(100), at(NOW));
        let medians = found.left.iter().map(|left| left.unwrap().median.as_secs());
        assert_eq!(medians.collect::<Vec<_>>(), left);
        assert_eq!(found.processes, processes);
    }

    #[test]
    fn a_workflow_may_have_a_task_of_another_name() {
        let mut overview = overview(NOW, Vec::new());
        let tasks = vec!["simulator".to_owned()];
        overview.tasks.insert("simulate".to_owned(), tasks);
        assert_eq!(overview.queue_of("simulate"), "simulator");
        assert_eq!(overview.queue_of("optimiser"), "optimiser");
        let found = overview.capacity("simulate", &runs(100), at(NOW));
        assert_eq!(found.processes, 3);
    }

    #[test]
    fn seats_are_fewer_than_processes() {
        let workers = vec![worker(WorkerState::Idle, "simulator", 8, &[])];
        let mut overview = overview(NOW, workers);
        overview.turns.push(QueueView {
            name: "simulator".to_owned(),
            limit: QueueLimit {
                max_running: Some(2),
                ..QueueLimit::default()
            },
            held: 0,
            on_hold: 0,
            waiting: 0,
            running: 0,
            oldest_waiting: None,
            seats: Vec::new(),
            is_paused_by_operator: false,
            acts: Default::default(),
            order: Vec::new(),
        });
        let found = overview.capacity("simulator", &runs(100), at(NOW));
        assert_eq!(found.processes, 2);
    }
}
