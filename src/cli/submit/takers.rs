//! Whether somebody takes what is submitted: an orchestrator the job, a worker its task. Without one the
//! job waits, and whoever waits for it is told what for.

use std::thread;

use crossbeam_channel::{Receiver, Sender, unbounded};
use omotes_orchestrator::broker::Link;
use omotes_orchestrator::config::RabbitMq;
use omotes_orchestrator::telemetry::report::one_line;
use omotes_orchestrator::wire::SUBMISSIONS_QUEUE;

/// What to say if no orchestrator takes submissions.
///
/// # Errors
/// The connection is lost.
pub(super) fn of_submissions(link: &Link) -> anyhow::Result<Option<&'static str>> {
    let nobody = link.is_deserted(SUBMISSIONS_QUEUE)?;
    Ok(nobody
        .then_some("no orchestrator runs on this vhost: the job waits in RabbitMQ until one does"))
}

/// Who takes the tasks.
pub(super) struct Workers {
    celery: RabbitMq,
    tasks: Vec<String>,
    told: Sender<String>,
    news: Receiver<String>,
}

impl Workers {
    pub(super) fn new(celery: &RabbitMq, tasks: &[String]) -> Workers {
        let (told, news) = unbounded();
        Workers {
            celery: celery.clone(),
            tasks: tasks.to_vec(),
            told,
            news,
        }
    }

    /// What there is to say of them.
    pub(super) fn news(&self) -> &Receiver<String> {
        &self.news
    }

    /// Looks at the queues of the tasks. Nobody waits for it: it ends with the process, and what cannot be
    /// looked at is no fault of the job's.
    pub(super) fn look(&self) {
        let (celery, tasks, told) = (self.celery.clone(), self.tasks.clone(), self.told.clone());
        let look = move || {
            if let Ok(lonely) = without_worker(&celery, &tasks) {
                for task in lonely {
                    let task = one_line(&task);
                    // The job may have ended.
                    let _ = told.send(format!(
                        "no worker takes {task}: the job waits until one does"
                    ));
                }
            }
        };
        let _ = thread::Builder::new()
            .name("workers".to_owned())
            .spawn(look);
    }
}

fn without_worker(celery: &RabbitMq, tasks: &[String]) -> anyhow::Result<Vec<String>> {
    let link = Link::open(celery, "looking for workers")?;
    let names: Vec<_> = tasks.iter().map(String::as_str).collect();
    let depths = link.depths_in_time(&names)?;
    link.close()?;
    // Of one that is not there nothing is known: there may be no right to it.
    let lonely = tasks.iter().zip(depths);
    let lonely = lonely.filter(|(_, depth)| depth.is_some_and(|depth| depth.consumers == 0));
    Ok(lonely.map(|(task, _)| task.clone()).collect())
}
