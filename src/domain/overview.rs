//! What operators see of the deployment: jobs, workflows, queues. The page, the API and the command
//! line present it in their ways. Pure; the rows come from [`crate::store::views`].

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use uuid::Uuid;

use crate::domain::estimate::{MIN_RUNS, Runs, Span};
use crate::domain::job::{JobStatus, Origin, Outcome, Priority, Progress};
use crate::domain::vhost::Vhost;
use crate::domain::worker::Workers;

pub use self::amber::{Amber, Ambers};
use self::capacity::Capacity;
pub use self::compare::{Line, WHY, compare};
pub use self::named::{JobName, short_ids};
pub use self::queued::{LonelyQueue, Queued};
pub use self::steps::{AttemptView, StepEnd, StepView, shares};
pub use self::story::{MessageView, ParameterView, Rows, Seen, Story, StoryEvent};
pub use self::turns::{QueueView, SEATS, TOLD, TurnView};
pub use self::whereabouts::{ClientQueue, Delivery, Kept, Whereabouts};
pub use self::why::{Moment, Why};

mod amber;
mod capacity;
mod compare;
mod named;
mod queued;
mod steps;
mod story;
mod turns;
mod whereabouts;
mod why;

/// Which jobs to show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Finished jobs instead of live ones.
    pub finished: bool,
    pub state: Option<JobState>,
    pub workflow: Option<String>,
    /// In the id, the reference, or the last message.
    pub text: Option<String>,
    /// Only the job with this id.
    pub id: Option<Uuid>,
    pub limit: u16,
    pub offset: u32,
}

/// The default and the maximum number of jobs shown at once.
pub const DEFAULT_LIMIT: u16 = 50;
pub const MAX_LIMIT: u16 = 1000;

impl Default for Filter {
    fn default() -> Filter {
        Filter {
            finished: false,
            state: None,
            workflow: None,
            text: None,
            id: None,
            limit: DEFAULT_LIMIT,
            offset: 0,
        }
    }
}

impl Filter {
    /// What a query such as `finished=true&workflow=simulator` asks for. Empty values count as
    /// missing, as forms send them.
    ///
    /// # Errors
    /// Which part is not understood.
    pub fn parse(query: &str) -> Result<Filter, String> {
        let mut filter = Filter::default();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let faulty = |expected: &str| format!("{name}={value}: expected {expected}");
            match &*name {
                _ if value.is_empty() => {}
                _ if value.contains('\0') => return Err(format!("{name}: no text has a NUL")),
                "state" => {
                    let states = || format!("one of {}", JobState::names());
                    let state = JobState::named(&value).ok_or_else(|| faulty(&states()))?;
                    filter.state = Some(state);
                }
                "workflow" => filter.workflow = Some(value.into_owned()),
                "text" => filter.text = Some(value.into_owned()),
                "finished" => {
                    filter.finished = value.parse().map_err(|_| faulty("true or false"))?;
                }
                "limit" => {
                    let limit = value.parse().ok();
                    let limit = limit.filter(|limit| (1..=MAX_LIMIT).contains(limit));
                    filter.limit =
                        limit.ok_or_else(|| faulty(&format!("a number from 1 to {MAX_LIMIT}")))?;
                }
                "offset" => {
                    filter.offset = value.parse().map_err(|_| faulty("a whole number"))?;
                }
                _ => return Err(format!("{name} is not known here")),
            }
        }
        filter.finished |= matches!(filter.state, Some(JobState::Ended(_)));
        Ok(filter)
    }

    /// The query that asks for the same from another job on.
    pub fn query(&self, offset: u32) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        if self.finished {
            query.append_pair("finished", "true");
        }
        if let Some(state) = self.state {
            query.append_pair("state", state.name());
        }
        if let Some(workflow) = &self.workflow {
            query.append_pair("workflow", workflow);
        }
        if let Some(text) = &self.text {
            query.append_pair("text", text);
        }
        if self.limit != DEFAULT_LIMIT {
            query.append_pair("limit", &self.limit.to_string());
        }
        if offset > 0 {
            query.append_pair("offset", &offset.to_string());
        }
        query.finish()
    }
}

/// The state of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobState {
    Live(JobStatus),
    Ended(Outcome),
}

impl JobState {
    pub fn all() -> impl Iterator<Item = JobState> {
        let live = JobStatus::ALL.iter().copied().map(JobState::Live);
        live.chain(Outcome::ALL.iter().copied().map(JobState::Ended))
    }

    pub fn name(self) -> &'static str {
        match self {
            JobState::Live(status) => status.name(),
            JobState::Ended(outcome) => outcome.name(),
        }
    }

    /// By its name or as operators say it, in any case.
    pub fn named(name: &str) -> Option<JobState> {
        JobState::all()
            .find(|state| state.name().eq_ignore_ascii_case(name) || is_said(state.text(), name))
    }

    /// As operators say it.
    pub fn text(self) -> &'static str {
        match self {
            JobState::Live(JobStatus::Registered) => "registered",
            JobState::Live(JobStatus::Submitted) => "waiting",
            JobState::Live(JobStatus::Running) => "running",
            JobState::Ended(Outcome::Succeeded) => "succeeded",
            JobState::Ended(Outcome::Failed) => "failed",
            JobState::Ended(Outcome::Cancelled) => "cancelled",
            JobState::Ended(Outcome::CrashLoop) => "crashed too often",
            JobState::Ended(Outcome::Rejected) => "refused",
            JobState::Ended(Outcome::TimedOut) => "timed out",
            JobState::Ended(Outcome::Expired) => "expired",
            JobState::Ended(Outcome::Lost) => "lost",
        }
    }

    pub fn tone(self) -> Tone {
        match self {
            JobState::Live(_) => Tone::Plain,
            JobState::Ended(Outcome::Succeeded) => Tone::Good,
            JobState::Ended(Outcome::Cancelled) => Tone::Dim,
            JobState::Ended(
                Outcome::Failed
                | Outcome::CrashLoop
                | Outcome::Rejected
                | Outcome::TimedOut
                | Outcome::Expired
                | Outcome::Lost,
            ) => Tone::Bad,
        }
    }

    pub fn names() -> String {
        JobState::all()
            .map(JobState::name)
            .collect::<Vec<_>>()
            .join(", ")
    }
}

/// How a state is displayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    Plain,
    Good,
    Dim,
    Bad,
}

impl Serialize for JobState {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// A job as operators see it; without its ESDL, which is the client's alone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JobView {
    pub id: Uuid,
    pub reference: String,
    /// None when a cancel was all that ever came for this job.
    pub workflow: Option<String>,
    pub state: JobState,
    #[serde(serialize_with = "priority")]
    pub priority: Option<Priority>,
    pub task_id: Option<String>,
    /// On which queue its task was put, of a workflow of one plain step, as far as that is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<String>,
    pub registered_at: Option<Timestamp>,
    pub submitted_at: Option<Timestamp>,
    /// When a worker first started it.
    pub running_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    /// How long it may run; None when nothing limits it.
    pub timeout_ms: Option<i64>,
    pub starts: i64,
    pub progress: Option<Progress>,
    /// Size of the output ESDL and the logs together.
    pub result_bytes: Option<i64>,
    /// The jobs of its task queue that will be taken before it, and itself.
    pub position: Option<i64>,
    pub estimate: Option<Estimate>,
    /// Of how many runs there would be an estimate, if there were enough.
    #[serde(skip)]
    pub too_few_runs: Option<usize>,
    /// What somebody should look at, as the workers say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concern: Option<Concern>,
    /// Where it is, if its workflow has more than one plain step and it has not ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<StepView>,
    /// While its task waits for its turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub turn: Option<TurnView>,
    /// When its task was granted its turn, where tasks have to wait for that.
    #[serde(skip)]
    pub granted_at: Option<Timestamp>,
    #[serde(skip)]
    pub ends: End,
    /// Why it waits, why it takes so long, or why it ended as it did.
    pub why: Option<Why>,
}

/// What somebody should look at though its job has not failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Concern {
    /// No worker has its task, and it is in no queue.
    TaskLost,
    /// Its worker does not answer.
    WorkerSilent,
}

/// What is known of how a job ended, or an attempt of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct End {
    /// Whether its client knows; false as long as it has not ended.
    pub is_told: bool,
    /// The line of what its client is told that says most.
    pub why: Option<String>,
    /// The attempt that ended last, if its workflow has more than one plain step.
    pub step: Option<StepEnd>,
    /// Who cancelled it, if that is known.
    pub cancelled_by: Option<Origin>,
}

fn priority<S: serde::Serializer>(
    priority: &Option<Priority>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    priority.map(Priority::name).serialize(serializer)
}

/// The estimate for a job that has not ended.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// Until it starts; None when it has, or when its workflow has no worker.
    pub wait: Option<Span>,
    /// From its start to its end, or what is left of that; None when it has been running for longer
    /// than all before it.
    pub run: Option<Span>,
}

/// The words that [`JobView::shown`] has for jobs that have not ended.
pub const SHOWN: [&str; 6] = [
    "registered",
    "waiting",
    "running",
    "held",
    "on hold",
    "to be tried again",
];

/// All words for a state, as they are typed.
pub fn state_words() -> Vec<String> {
    let ended = JobState::all().filter(|state| matches!(state, JobState::Ended(_)));
    let words = SHOWN.into_iter().chain(ended.map(JobState::text));
    words.map(|word| word.replace(' ', "-")).collect()
}

/// Whether somebody means this word by what they write, in any case and however they join its parts.
pub fn is_said(word: &str, text: &str) -> bool {
    word.eq_ignore_ascii_case(&text.trim().replace(['-', '_'], " "))
}

impl JobView {
    /// Its state in a word or two, as lists show it: of a job with steps, what its step does.
    pub fn shown(&self) -> &'static str {
        match (&self.turn, &self.step) {
            (Some(turn), _) => turn.text(),
            (None, Some(step)) => step.activity(),
            (None, None) => self.state.text(),
        }
    }

    /// Its state, with its step where there are several.
    pub fn state_text(&self) -> String {
        match &self.step {
            Some(step) => format!("{}, {}", self.shown(), step.name()),
            None => self.shown().to_owned(),
        }
    }

    /// How long it waited for a worker, or has waited for its turn.
    pub fn waited(&self, now: Timestamp) -> Option<SignedDuration> {
        let until = self.running_at.or(self.finished_at).unwrap_or(now);
        let held_since = self.turn.as_ref().map(|turn| turn.since);
        Some(until.duration_since(self.submitted_at.or(held_since)?))
    }

    /// How long it ran, so far or until it ended.
    pub fn ran(&self, now: Timestamp) -> Option<SignedDuration> {
        let until = self.finished_at.unwrap_or(now);
        Some(until.duration_since(self.running_at?))
    }
}

impl JobView {
    /// The estimate in words.
    pub fn expectation(&self) -> Option<String> {
        let Some(Estimate { wait, run }) = self.estimate else {
            let runs = self.too_few_runs?;
            return Some(format!(
                "no estimate: after {MIN_RUNS} successful runs; so far {runs}"
            ));
        };
        // Of a later step only what is left to compute is known, not how long it waits.
        if let Some(step) = &self.step {
            let left = run.map(|left| format!("takes {left} more"));
            let longer = || "runs longer than those before it".to_owned();
            return left.or_else(|| step.started_at.map(|_| longer()));
        }
        match self.state {
            JobState::Live(JobStatus::Running) => Some(match run {
                Some(left) => format!("ends in {left}"),
                None => "runs longer than those before it".to_owned(),
            }),
            JobState::Live(JobStatus::Registered | JobStatus::Submitted) => {
                let run = format!("takes {}", run?);
                Some(match wait {
                    Some(wait) => format!("starts in {wait}, {run}"),
                    None => run,
                })
            }
            JobState::Ended(_) => None,
        }
    }
}

/// `2 min to 3 min`: median and 90th percentile.
impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |time| spoken(SignedDuration::try_from(time).unwrap_or(SignedDuration::MAX));
        let (median, p90) = (text(self.median), text(self.p90));
        match median == p90 {
            true => f.write_str(&median),
            false => write!(f, "{median} to {p90}"),
        }
    }
}

/// A page of the jobs that match a filter.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Page {
    pub jobs: Vec<JobView>,
    /// The total, counted no further than [`MAX_COUNT`].
    pub total: i64,
}

/// Where counting ends.
pub const MAX_COUNT: i64 = 100_000;

/// A queue as RabbitMQ sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Queue {
    /// By which connection it is looked at.
    #[serde(rename = "connection")]
    pub vhost: Vhost,
    pub name: String,
    /// None when there is no such queue.
    pub depth: Option<Depth>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Depth {
    /// Waiting for a consumer.
    pub messages: u32,
    pub consumers: u32,
}

/// All queues at a point in time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Queues {
    pub at: Timestamp,
    pub queues: Vec<Queue>,
    /// Since when jobs have been waiting for a workflow that has no worker.
    pub without_worker: BTreeMap<String, Timestamp>,
}

impl Queues {
    /// How many workers a workflow has; None when that was not looked at.
    pub fn workers(&self, workflow: &str) -> Option<u32> {
        let mut queues = self.queues.iter();
        let queue = queues.find(|queue| queue.vhost == Vhost::Celery && queue.name == workflow)?;
        Some(queue.depth.map_or(0, |depth| depth.consumers))
    }

    /// How many tasks wait for a worker in this queue.
    pub fn waiting(&self, task: &str) -> u32 {
        let mut queues = self.queues.iter();
        let queue = queues.find(|queue| queue.vhost == Vhost::Celery && queue.name == task);
        queue
            .and_then(|queue| queue.depth)
            .map_or(0, |depth| depth.messages)
    }

    /// How many messages are in the queues of this name, of all vhosts together.
    pub fn messages_in(&self, queue: &str) -> u32 {
        let queues = self.queues.iter().filter(|one| one.name == queue);
        queues
            .filter_map(|queue| queue.depth)
            .map(|depth| depth.messages)
            .sum()
    }
}

/// What the database says of a workflow.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct WorkflowRows {
    /// Jobs by status.
    pub registered: i64,
    pub submitted: i64,
    pub running: i64,
    pub oldest_waiting: Option<Timestamp>,
    /// For how long the running jobs have been running.
    pub elapsed: Vec<Duration>,
    pub runs: Option<Runs>,
    /// Those of its steps, by their number from 1.
    pub step_runs: BTreeMap<usize, Runs>,
    /// How many runs there are, also where they are too few; and of its steps.
    pub count: usize,
    pub step_counts: BTreeMap<usize, usize>,
}

/// A workflow with its jobs and its workers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WorkflowView {
    pub name: String,
    /// Whether the definitions have it.
    pub defined: bool,
    pub waiting: i64,
    pub running: i64,
    pub oldest_waiting: Option<Timestamp>,
    /// Consumers of its task queue, or of that of its queues which has the fewest; None when that
    /// is not known.
    pub workers: Option<u32>,
    /// Since when jobs have been waiting without a worker.
    pub without_worker_since: Option<Timestamp>,
    /// From start to end, as of its last runs.
    pub run: Option<Span>,
}

/// The whole deployment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Overview {
    /// Whether Postgres has answered. If not, nothing is known of `rows` and `maintenance`.
    pub has_rows: bool,
    pub rows: BTreeMap<String, WorkflowRows>,
    /// Names that the definitions have.
    pub defined: Vec<String>,
    /// The tasks of those that do not have just the one of their own name.
    pub tasks: BTreeMap<String, Vec<String>>,
    /// Whether there is no session with RabbitMQ, so that what was seen of workers may not be so any
    /// more.
    pub is_cut_off: bool,
    /// Why nothing goes on, if that is so.
    pub outage: Option<Outage>,
    /// None before RabbitMQ has been looked at.
    pub queues: Option<Queues>,
    /// The tasks that wait there, as far as Postgres knows.
    pub queued: Vec<Queued>,
    /// The queues where tasks wait for their turn, or might have to.
    pub turns: Vec<QueueView>,
    /// None when nobody looks at them, or Postgres does not answer.
    pub workers: Option<Workers>,
    /// When each maintenance task was last begun.
    pub maintenance: Vec<(String, Timestamp)>,
    /// Connections to Postgres, of which so many are idle.
    pub connections: u32,
    pub idle_connections: u32,
}

/// What keeps all jobs from going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outage {
    /// In a clause, such as `RabbitMQ does not answer`.
    pub what: &'static str,
    pub since: Option<Timestamp>,
}

impl Overview {
    pub fn workflows(&self) -> Vec<WorkflowView> {
        let defined = self.defined.iter().cloned();
        let names: std::collections::BTreeSet<_> =
            self.rows.keys().cloned().chain(defined).collect();
        let none = WorkflowRows::default();
        let view = |name: String| {
            let rows = self.rows.get(&name).unwrap_or(&none);
            let queues = self.queues.as_ref();
            let own = std::slice::from_ref(&name);
            let tasks = self.tasks.get(&name).map_or(own, Vec::as_slice);
            WorkflowView {
                defined: self.defined.contains(&name),
                waiting: rows.registered + rows.submitted,
                running: rows.running,
                oldest_waiting: rows.oldest_waiting,
                workers: queues.and_then(|queues| {
                    tasks
                        .iter()
                        .map(|task| queues.workers(task))
                        .min()
                        .flatten()
                }),
                without_worker_since: queues.and_then(|queues| {
                    let since = |task: &String| queues.without_worker.get(task).copied();
                    tasks.iter().filter_map(since).min()
                }),
                run: rows.runs.as_ref().map(Runs::span),
                name,
            }
        };
        names.into_iter().map(view).collect()
    }

    /// Since when the oldest waiting job has been waiting.
    pub fn oldest_waiting(&self) -> Option<Timestamp> {
        self.rows
            .values()
            .filter_map(|rows| rows.oldest_waiting)
            .min()
    }

    /// Of how many runs there would be an estimate for a job that has not ended, if there were enough.
    fn too_few_runs(&self, job: &JobView) -> Option<usize> {
        let rows = self.rows.get(job.workflow.as_ref()?)?;
        match (job.state, &job.step) {
            (JobState::Ended(_), _) => None,
            (JobState::Live(_), Some(step)) => step.too_few(&rows.step_counts),
            (JobState::Live(_), None) => rows.runs.is_none().then_some(rows.count),
        }
    }

    /// Adds its estimate to each of these jobs.
    fn estimate(&self, jobs: &mut [JobView], now: Timestamp) {
        for job in &mut *jobs {
            if let Some(turn) = job.turn.as_ref().filter(|turn| !turn.on_hold) {
                job.position = turn.place(job.id, &self.turns);
            }
        }
        let mut waits: BTreeMap<&str, Option<Vec<Span>>> = BTreeMap::new();
        let last = |workflow: &str| {
            let positions = jobs
                .iter()
                .filter(|job| job.workflow.as_deref() == Some(workflow));
            positions.filter_map(|job| job.position).max().unwrap_or(0)
        };
        for (workflow, rows) in &self.rows {
            let Some(runs) = &rows.runs else { continue };
            let Capacity { processes, left } = self.capacity(workflow, runs, now);
            let last = usize::try_from(last(workflow)).unwrap_or(0);
            waits.insert(workflow, runs.waits(processes, &left, last));
        }
        for job in jobs {
            if let Some(step) = &job.step {
                let rows = job.workflow.as_ref().and_then(|name| self.rows.get(name));
                let left = rows.and_then(|rows| step.left(&rows.step_runs, now));
                job.estimate = left.map(|run| Estimate { wait: None, run });
                continue;
            }
            let Some((rows, waits)) = job
                .workflow
                .as_deref()
                .and_then(|workflow| Some((self.rows.get(workflow)?, waits.get(workflow)?)))
            else {
                continue;
            };
            let Some(runs) = &rows.runs else { continue };
            job.estimate = match job.state {
                JobState::Live(JobStatus::Running) => {
                    let elapsed = job.ran(now).unwrap_or_default();
                    let elapsed = Duration::try_from(elapsed).unwrap_or_default();
                    Some(Estimate {
                        wait: None,
                        run: runs.remaining(elapsed),
                    })
                }
                JobState::Live(JobStatus::Submitted | JobStatus::Registered) => Some(Estimate {
                    wait: job.position.and_then(|position| {
                        let before = usize::try_from(position - 1).ok()?;
                        waits.as_ref()?.get(before).copied()
                    }),
                    run: Some(runs.span()),
                }),
                JobState::Ended(_) => None,
            };
        }
    }
}

/// A length of time as people say it: `5 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`.
pub fn spoken(time: SignedDuration) -> String {
    let seconds = time.as_secs().max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, 1..10) => two(minutes, "min", seconds % 60, "s"),
        (0, 0, _) => format!("{minutes} min"),
        (0, _, _) => two(hours, "h", minutes % 60, "min"),
        (_, _, _) => two(days, "d", hours % 24, "h"),
    }
}

fn two(large: i64, large_unit: &str, small: i64, small_unit: &str) -> String {
    match small {
        0 => format!("{large} {large_unit}"),
        _ => format!("{large} {large_unit} {small} {small_unit}"),
    }
}

#[cfg(test)]
mod tests;
