//! Tells workers once more to stop what they compute for nobody: the job, or its attempt at a step, has ended.
//! They were told when it ended, but one may have been without a connection then.

use std::collections::{BTreeMap, BTreeSet};

use log::warn;

use super::ask;
use crate::broker::Link;
use crate::domain::worker::{InVain, Workers};
use crate::service::shared::Service;
use crate::telemetry::report::one_line;
use crate::threads::Signal;
use crate::wire::workers::Control;

/// How often a worker is told to stop the same task. One that goes on then has lost sight of it itself, as
/// when it has been given the task twice.
const MOST: u32 = 20;
/// Tasks that are told of at once.
const MOST_AT_ONCE: usize = 100;

/// How often each worker was told to stop each task.
#[derive(Debug, Default)]
pub(super) struct Revokes(BTreeMap<(String, String), u32>);

impl Revokes {
    /// Has those stop that compute in vain by this look.
    ///
    /// # Errors
    /// The connection is lost.
    pub(super) fn look(
        &mut self,
        service: &Service,
        link: &Link,
        workers: &Workers,
        stop: &Signal,
    ) -> anyhow::Result<()> {
        let in_vain: Vec<_> = workers.in_vain().collect();
        let mut due = self.due(&in_vain);
        due.truncate(MOST_AT_ONCE);
        if due.is_empty() {
            return Ok(());
        }
        let tasks: Vec<_> = due.iter().map(|one| one.task.id.clone()).collect();
        let hosts: BTreeSet<_> = due.iter().map(|one| one.worker.host.clone()).collect();
        let hosts = Vec::from_iter(hosts);
        ask(
            service,
            link,
            stop,
            &[Control::Revoke(&tasks)],
            Some(&hosts),
        )
        .map(drop)
    }

    /// Those that are to be told now, and the log's lines about them.
    fn due<'w>(&mut self, in_vain: &[InVain<'w>]) -> Vec<InVain<'w>> {
        let key = |one: &InVain<'_>| (one.worker.host.clone(), one.task.id.clone());
        self.0
            .retain(|known, _| in_vain.iter().any(|one| key(one) == *known));
        let mut due = Vec::new();
        for one in in_vain {
            let times = self.0.entry(key(one)).or_default();
            *times = times.saturating_add(1);
            let what = one.in_words(one.worker.last_seen);
            let task = one_line(&one.task.id);
            match *times {
                1 => warn!("{what}: told once more to stop task {task}"),
                times if times == MOST + 1 => warn!(
                    "{what}, though it was told {MOST} times to stop task {task}: only a restart of it helps"
                ),
                _ => {}
            }
            if *times <= MOST {
                due.push(*one);
            }
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use jiff::{SignedDuration, Timestamp};
    use uuid::Uuid;

    use super::*;
    use crate::domain::job::Outcome;
    use crate::domain::worker::{TaskEnd, TaskView, WorkerState, WorkerView};

    fn workers(state: WorkerState, ended: Option<i64>) -> Workers {
        let at = |second| Timestamp::from_second(second).unwrap();
        let task = TaskView {
            id: "task".to_owned(),
            name: "simulator".to_owned(),
            job_id: Some(Uuid::from_u128(7)),
            reference: None,
            workflow: None,
            step: None,
            since: at(0),
            ended: ended.map(|second| TaskEnd {
                outcome: Outcome::Cancelled,
                at: at(second),
            }),
        };
        let worker = WorkerView {
            host: "w@h".to_owned(),
            state,
            since: at(0),
            first_seen: at(0),
            last_seen: at(100),
            began_at: None,
            pool: None,
            pool_size: None,
            celery: None,
            queues: Vec::new(),
            tasks: vec![task],
            tasks_per_hour: None,
            ended: 0,
            failed: 0,
        };
        Workers {
            looked_at: Some(at(0) + SignedDuration::from_secs(100)),
            workers: vec![worker],
            lost_tasks: Vec::new(),
            more_lost_tasks: 0,
        }
    }

    fn due(revokes: &mut Revokes, workers: &Workers) -> usize {
        revokes.due(&workers.in_vain().collect::<Vec<_>>()).len()
    }

    #[test]
    fn what_has_not_ended_or_only_just_is_let_alone() {
        let mut revokes = Revokes::default();
        for (state, ended, expected) in [
            (WorkerState::Busy, None, 0),
            (WorkerState::Busy, Some(71), 0),
            (WorkerState::Busy, Some(70), 1),
            (WorkerState::Draining, Some(0), 1),
            // Nobody knows what it does.
            (WorkerState::Silent, Some(0), 0),
        ] {
            let workers = workers(state, ended);
            assert_eq!(due(&mut revokes, &workers), expected, "{state:?} {ended:?}");
        }
    }

    #[test]
    fn a_worker_is_told_so_often_only_and_anew_when_it_has_begun_anew() {
        let mut revokes = Revokes::default();
        let busy = workers(WorkerState::Busy, Some(0));
        let told: usize = (0..MOST + 5).map(|_| due(&mut revokes, &busy)).sum();
        assert_eq!(told, MOST as usize);
        assert_eq!(due(&mut revokes, &workers(WorkerState::Busy, None)), 0);
        assert_eq!(due(&mut revokes, &busy), 1);
    }
}
