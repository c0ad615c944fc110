//! Asks Celery's workers what they do, one replica for all in each period, and keeps what they say. On
//! connections of its own, so it is never in the way of jobs. What the answers mean is decided in
//! [`crate::domain::worker`]; the maintenance ends jobs whose tasks are lost.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use log::{debug, info, warn};
use uuid::Uuid;

use crate::broker::{DEADLINE, Link, Question};
use crate::domain::overview::{Depth, Queued};
use crate::domain::worker::{
    self, Absence, Answer, Depths, Look, News, RunningTask, Seen, WaitingTask, Worker, WorkerState,
};
use crate::service::shared::Service;
use crate::store::workers::{Known, Running, Waiting};
use crate::store::{Connection, Upkeep};
use crate::telemetry::report::one_line;
use crate::threads::{Calls, Signal, within_deadline};
use crate::wire::workers::{Control, control_queue};

mod in_vain;
pub mod steering;

/// How long the workers have to answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// How often each replica checks whether it is its turn.
const TURNS_IN_PERIOD: u32 = 3;

/// Looks in each period, when it is this replica's turn, until `stop` is given.
pub fn run(service: &Service, stop: &Signal) {
    let Some(period) = service.config.workers_period else {
        return;
    };
    let mut link = None;
    let mut failing = false;
    let mut revokes = in_vain::Revokes::default();
    while !stop.comes_within(period / TURNS_IN_PERIOD) {
        // The session and the probe log the same outages.
        let is_due = service.store.connection();
        match is_due.and_then(|mut connection| connection.claim(Upkeep::Workers, period)) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(error) => {
                debug!("the workers cannot be looked at: {error:#}");
                continue;
            }
        }
        // One that was there may have been lost with all others.
        let is_fresh = link.is_none();
        let open = || Link::open(&service.config.celery_rabbitmq, "asking the workers");
        let link_now = match link.take().map_or_else(open, Ok) {
            Ok(link) => link,
            Err(error) => {
                debug!("the workers cannot be asked: {error:#}");
                continue;
            }
        };
        let kill = || link_now.kill();
        match within_deadline(DEADLINE, kill, || {
            look(service, &link_now, &mut revokes, stop)
        }) {
            Ok(()) => {
                failing = false;
                link = Some(link_now);
            }
            Err(error) if failing || !is_fresh => {
                debug!("the workers could not be looked at: {error:#}");
            }
            Err(error) => {
                failing = true;
                warn!("the workers cannot be looked at, which is tried again: {error:#}");
            }
        }
    }
}

fn look(
    service: &Service,
    link: &Link,
    revokes: &mut in_vain::Revokes,
    stop: &Signal,
) -> anyhow::Result<()> {
    // No connection to the database is held while the workers are waited for.
    let Known {
        now: asked_at,
        workers: known,
        absences: before,
    } = service.store.connection()?.known_workers()?;
    let Some(mut answers) = ask(service, link, stop, &Control::LOOK, None)? else {
        return Ok(());
    };
    let mut connection = service.store.connection()?;
    let (now, running) = connection.running_tasks()?;
    // What has come of a task may be waiting unread.
    let queued = match service.health.parts(now) {
        (true, _) => connection.queued()?,
        (false, _) => Vec::new(),
    };
    drop(connection);
    let new: Vec<_> = answers
        .iter()
        .filter(|(host, answer)| worker::is_new(&known, host, answer, now))
        .map(|(host, _)| host.clone())
        .collect();
    if !new.is_empty()
        && let Some(more) = ask(service, link, stop, &[Control::Report], Some(&new))?
    {
        for (host, answer) in more {
            if let Some(known) = answers.get_mut(&host) {
                known.celery = answer.celery;
            }
        }
    }
    let queues = Queues(service.catalogue.get().tasks_by_workflow());
    let running = queues.of_running(running);
    let depths = depths(link, &running, &answers, &queues, &queued)?;
    let waiting = waiting(
        service, &queues, &queued, &depths, &before, &answers, asked_at,
    )?;
    let seen = Seen {
        asked_at,
        now,
        connected: connected(link, &known, &answers)?,
        waiting: waiting.tasks,
        more_waiting: waiting.more,
        others: others(service, &answers, &running)?,
        depths,
        answers,
        running,
    };
    let look = worker::look(known, &before, &seen);
    let mut connection = service.store.connection()?;
    connection.keep_look(&look, now)?;
    let workers = connection.workers()?;
    drop(connection);
    tell(&look);
    tell_more(&look);
    restore(service, link, &look, stop)?;
    revokes.look(service, link, &workers, stop)
}

/// What the workers answer to all of these questions; None when the service is stopping.
fn ask(
    service: &Service,
    link: &Link,
    stop: &Signal,
    questions: &[Control<'_>],
    workers: Option<&[String]>,
) -> anyhow::Result<Option<BTreeMap<String, Answer>>> {
    let asked_at = Instant::now();
    let mut last = asked_at;
    let mut answers = BTreeMap::new();
    let mut missing = workers.map(<[String]>::len);
    let messages = messages(questions, workers, || {
        service.revoke_clock.fetch_add(1, Ordering::Relaxed)
    });
    let note = |place: usize, answer: &[u8]| {
        questions[place].note(answer, &mut answers);
        last = Instant::now();
        if let Some(missing) = &mut missing {
            *missing = missing.saturating_sub(1);
            if *missing == 0 {
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    };
    let asked = link.ask(&messages, ANSWER_TIME, &Calls::default(), stop, note)?;
    debug!(
        "{} workers have answered, the last one after {:.0?}",
        answers.len(),
        last - asked_at
    );
    Ok(asked.then_some(answers))
}

fn messages(
    questions: &[Control<'_>],
    workers: Option<&[String]>,
    mut clock: impl FnMut() -> i64,
) -> Vec<Question> {
    let now = Timestamp::now();
    let question = |question: &Control<'_>| {
        let key = Uuid::new_v4().to_string();
        Question {
            message: question.message(workers, &key, clock(), now),
            key,
        }
    };
    questions.iter().map(question).collect()
}

/// The tasks of workflows that do not have just the one of their own name.
struct Queues(BTreeMap<String, Vec<String>>);

impl Queues {
    /// Where the task of a job is: where it was put, if that is kept.
    fn of<'a>(&'a self, workflow: &'a str, kept: Option<&'a str>) -> &'a str {
        match (kept, self.0.get(workflow).map(Vec::as_slice)) {
            (Some(queue), _) => queue,
            (None, Some([task])) => task,
            (None, _) => workflow,
        }
    }

    fn of_running(&self, running: Vec<Running>) -> Vec<RunningTask> {
        let task = |running: Running| RunningTask {
            queue: self
                .of(&running.workflow, running.queue.as_deref())
                .to_owned(),
            ..running.task
        };
        running.into_iter().map(task).collect()
    }

    fn of_queued<'a>(&'a self, queued: &'a Queued) -> &'a str {
        self.of(&queued.workflow, queued.queue.as_deref())
    }
}

/// Tasks that should be in queues in which there is nothing, and those that nobody had before.
#[derive(Default)]
struct OfEmptyQueues {
    tasks: Vec<WaitingTask>,
    /// How many more should be there than `tasks` has, by their queues.
    more: BTreeMap<String, i64>,
}

fn waiting(
    service: &Service,
    queues: &Queues,
    queued: &[Queued],
    depths: &Depths,
    before: &[Absence],
    answers: &BTreeMap<String, Answer>,
    asked_at: Timestamp,
) -> anyhow::Result<OfEmptyQueues> {
    let is_empty = |queue: &str| depths.get(queue).is_some_and(|depth| depth.messages == 0);
    let of_empty = queued.iter().filter(|one| is_empty(queues.of_queued(one)));
    let (kept, derived): (Vec<_>, Vec<_>) = of_empty.partition(|one| one.queue.is_some());
    if kept.is_empty() && derived.is_empty() && before.is_empty() {
        return Ok(OfEmptyQueues::default());
    }
    let kept: Vec<_> = kept.iter().filter_map(|one| one.queue.as_deref()).collect();
    let derived: Vec<_> = derived.iter().map(|one| one.workflow.as_str()).collect();
    let absent: Vec<_> = before.iter().map(|one| one.task_id.as_str()).collect();
    let with_workers = with_workers(answers);
    let begun: Vec<_> = with_workers.iter().copied().collect();
    let mut connection = service.store.connection()?;
    let rows = connection.waiting_tasks(&kept, &derived, &absent, &begun, asked_at)?;
    let mut found = OfEmptyQueues::default();
    let mut counts: BTreeMap<(Option<String>, String), i64> = BTreeMap::new();
    for (waiting, count) in rows {
        let Waiting {
            workflow,
            queue: kept,
            task,
        } = waiting;
        let queue = queues.of(&workflow, kept.as_deref()).to_owned();
        let queue_is_kept = kept.is_some();
        let is_begun = with_workers.contains(task.task_id.as_str());
        let is_counted = task.submitted_at < asked_at && !is_begun;
        let left = counts
            .entry((kept.is_none().then_some(workflow), queue.clone()))
            .or_insert(count);
        *left -= i64::from(is_counted);
        found.tasks.push(WaitingTask {
            queue,
            queue_is_kept,
            ..task
        });
    }
    for ((_, queue), left) in counts {
        if left > 0 && is_empty(&queue) {
            *found.more.entry(queue).or_default() += left;
        }
    }
    Ok(found)
}

/// The tasks that workers say they have.
fn with_workers(answers: &BTreeMap<String, Answer>) -> BTreeSet<&str> {
    let tasks = answers.values().filter_map(|answer| answer.tasks.as_ref());
    tasks.flatten().map(|task| task.id.as_str()).collect()
}

/// The jobs of tasks that workers have though those do not run, without those of other orchestrators.
fn others(
    service: &Service,
    answers: &BTreeMap<String, Answer>,
    running: &[RunningTask],
) -> anyhow::Result<BTreeMap<String, Uuid>> {
    let said: Vec<_> = worker::unknown_jobs(answers, running).collect();
    if said.is_empty() {
        return Ok(BTreeMap::new());
    }
    let ids: Vec<_> = said.iter().map(|(_, job)| *job).collect();
    let known = service.store.connection()?.known_jobs(&ids)?;
    let own = said.into_iter().filter(|(_, job)| known.contains(job));
    Ok(own.map(|(task, job)| (task.to_owned(), job)).collect())
}

/// Which of those who have not answered RabbitMQ knows.
fn connected(
    link: &Link,
    known: &BTreeMap<String, Worker>,
    answers: &BTreeMap<String, Answer>,
) -> anyhow::Result<BTreeSet<String>> {
    let silent = known
        .values()
        .filter(|worker| worker.state != WorkerState::Gone && !answers.contains_key(&worker.host));
    let silent: Vec<_> = silent.map(|worker| worker.host.clone()).collect();
    let queues: Vec<_> = silent.iter().map(|host| control_queue(host)).collect();
    let queues: Vec<_> = queues.iter().map(String::as_str).collect();
    let is_there = link.may_have(&queues)?;
    let there = silent.into_iter().zip(is_there);
    Ok(there
        .filter(|(_, is_there)| *is_there)
        .map(|(host, _)| host)
        .collect())
}

/// The queues of those tasks that nobody has, and those in which tasks should wait.
fn depths(
    link: &Link,
    running: &[RunningTask],
    answers: &BTreeMap<String, Answer>,
    all: &Queues,
    queued: &[Queued],
) -> anyhow::Result<Depths> {
    let with_workers = with_workers(answers);
    let absent = running
        .iter()
        .filter(|task| !with_workers.contains(task.task_id.as_str()));
    let queues: BTreeSet<&str> = absent.map(|task| task.queue.as_str()).collect();
    let of_queued = queued.iter().map(|one| all.of_queued(one)).collect();
    let queues: Vec<&str> = queues.union(&of_queued).copied().collect();
    if queues.is_empty() {
        return Ok(Depths::new());
    }
    let (known, unknown): (Vec<_>, Vec<_>) = queues
        .iter()
        .zip(link.depths(&queues)?)
        .partition(|(_, depth)| depth.is_some());
    let mut depths: Depths = known
        .into_iter()
        .filter_map(|(queue, depth)| Some(((*queue).to_owned(), depth?)))
        .collect();
    // What waited in a queue that somebody has deleted went with it. One that is known by the definitions alone
    // may never have been there.
    let kept = |queue: &str| {
        let mut kept = queued.iter().filter_map(|one| one.queue.as_deref());
        kept.any(|kept| kept == queue)
    };
    let unknown = unknown.into_iter().map(|(queue, _)| *queue);
    let unknown: Vec<_> = unknown.filter(|queue| kept(queue)).collect();
    let there = link.may_have(&unknown)?;
    let gone = unknown.iter().zip(there).filter(|(_, there)| !there);
    depths.extend(gone.map(|(queue, _)| ((*queue).to_owned(), Depth::default())));
    Ok(depths)
}

/// The log's lines.
fn tell(look: &Look) {
    for news in &look.news {
        match news {
            News::Appeared(host) => {
                let worker = look.workers.iter().find(|worker| worker.host == *host);
                let queues = worker.map(|worker| &worker.queues);
                let queues: Vec<_> = queues
                    .into_iter()
                    .flatten()
                    .map(|one| one_line(one))
                    .collect();
                info!(
                    "worker {}: new, takes {}",
                    one_line(host),
                    queues.join(", ")
                );
            }
            News::Restarted(host) => info!("worker {}: started again", one_line(host)),
            News::Silent(host) => warn!(
                "worker {}: does not answer, though it is connected to RabbitMQ",
                one_line(host)
            ),
            News::Back(host) => info!("worker {}: answers again", one_line(host)),
            News::Gone(host) => info!("worker {}: gone", one_line(host)),
            News::Absent {
                job_id,
                task_id,
                since,
            } => warn!(
                "job {job_id}: no worker has its task {} since {since:.0}, nor does it wait in its queue",
                one_line(task_id)
            ),
        }
    }
}

/// How many more there are of those that were told of one by one just now.
fn tell_more(look: &Look) {
    let is_absence = |news: &News| matches!(news, News::Absent { .. });
    if look.more_absent > 0 && look.news.iter().any(is_absence) {
        warn!(
            "{} more jobs have tasks that no worker has, nor do they wait in their queues",
            look.more_absent
        );
    }
}

/// Sends workers back to queues that they have forgotten.
fn restore(service: &Service, link: &Link, look: &Look, stop: &Signal) -> anyhow::Result<()> {
    for (host, queue) in &look.restored {
        info!(
            "worker {}: sent back to {}, which it had forgotten",
            one_line(host),
            one_line(queue)
        );
        let hosts = std::slice::from_ref(host);
        ask(
            service,
            link,
            stop,
            &[Control::AddConsumer(queue)],
            Some(hosts),
        )?;
    }
    Ok(())
}

/// Everything that is known of the workers, and of those that an operator may mean by `host`: Celery's
/// name of a worker, or what follows the `@` of it.
///
/// # Errors
/// None is known by that name, or several are; or the connection is lost.
pub fn find(connection: &mut Connection, host: &str) -> anyhow::Result<Worker> {
    let mut known = connection.known_workers()?.workers;
    if let Some(worker) = known.remove(host) {
        return Ok(worker);
    }
    let suffix = |worker: &Worker| worker.host.split_once('@').map(|(_, host)| host.to_owned());
    let named: Vec<_> = known
        .values()
        .filter(|worker| suffix(worker).as_deref() == Some(host))
        .collect();
    if let [worker] = named[..] {
        return Ok(worker.clone());
    }
    let names = known.keys().map(|name| one_line(name)).collect::<Vec<_>>();
    anyhow::bail!(
        "{} worker is called {}; known are {}",
        if named.is_empty() {
            "no"
        } else {
            "more than one"
        },
        one_line(host),
        if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        }
    )
}
