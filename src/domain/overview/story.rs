//! The story of a job: what has happened to it, in order. Most of it is told from rows that are there for
//! other reasons.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::{AttemptView, ClientQueue, Delivery, JobState, JobView, Whereabouts, spoken};
use crate::domain::acts::{Act, Deed, Run, by};
use crate::domain::job::{Mark, Origin, Outcome, Priority, Progress, Verdict};
use crate::domain::text::{harmless, one_line};
use crate::proto::{EsdlMessage, WorkflowParameter, esdl_message::Severity};

/// Events of which a story has no more; those in its middle are left out.
const MAX_EVENTS: usize = 200;
/// Why a job ends later than by its timeout.
const PATIENCE: &str = "a timeout ends a job 5 s after it is over, to let what its worker has said go first, or with \
     the check that follows (TIMEOUT_JOB_HANDLER_RERUN_SEC)";
/// Characters that are shown of a parameter.
const MAX_VALUE: usize = 1000;

/// What the database has of a job beside its row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rows {
    pub attempts: Vec<AttemptView>,
    /// Of its current task, or its last one, oldest first.
    pub starts: Vec<(Timestamp, Verdict)>,
    pub seen: Vec<Seen>,
    /// Where its progress was, oldest first.
    pub marks: Vec<Mark>,
    /// The last progress of a job that has ended.
    pub last: Option<Progress>,
    /// Who asked it to end.
    pub ended_by: Option<Origin>,
    /// What somebody has done to it, oldest first, and how much of that is not kept.
    pub acts: Vec<Act>,
    pub acts_left_out: usize,
    /// Other runs of it, oldest first.
    pub runs: Vec<Run>,
    pub parameters: Option<Map<String, Value>>,
    pub whereabouts: Whereabouts,
    /// Whether what its client submitted is kept.
    pub can_run_again: bool,
    pub logs: Option<String>,
    pub esdl_messages: Vec<EsdlMessage>,
}

/// A worker that was seen with one of its tasks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    pub host: String,
    pub task_id: String,
    pub first_seen: Timestamp,
    pub last_seen: Timestamp,
}

/// A job in full.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Story {
    #[serde(flatten)]
    pub job: JobView,
    /// When workers began its task, or its last one, oldest first.
    pub started_at: Vec<Timestamp>,
    /// The tasks that it has had, oldest first, if its workflow has more than one plain step.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub attempts: Vec<AttemptView>,
    /// What has happened to it, in order.
    pub events: Vec<StoryEvent>,
    /// Who submitted it, if that was done through the page or by a command.
    pub submitted_by: Option<Origin>,
    /// Who cancelled it.
    pub cancelled_by: Option<Origin>,
    /// The job that this one runs again.
    pub runs_again: Option<Uuid>,
    /// Other runs of it, oldest first.
    pub run_again_as: Vec<Uuid>,
    pub parameters: Vec<ParameterView>,
    /// Of its result, without their middle if they are long.
    pub logs: Option<String>,
    pub esdl_messages: Vec<MessageView>,
    /// Size of its output ESDL, if that is kept because no client has taken it.
    pub kept_result: Option<i64>,
    /// Where its output ESDL is, in a sentence, as far as is known; see [`Story::tell_whereabouts`].
    pub whereabouts: Option<String>,
    /// Whether its client listens, or has the result, in a sentence, as far as is known.
    pub client: Option<String>,
    #[serde(skip)]
    known_whereabouts: Whereabouts,
    /// Whether what its client submitted is kept, for another run.
    pub can_run_again: bool,
}

/// Something that has happened to a job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StoryEvent {
    pub at: Timestamp,
    /// In one line, that may be shown as it is.
    pub what: String,
    /// What more is known of it, as harmless as that.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub evidence: Vec<String>,
}

/// A parameter of a job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ParameterView {
    pub key: String,
    /// As its workflow's definition calls it.
    pub title: Option<String>,
    pub value: Value,
}

/// What a worker says of the ESDL.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MessageView {
    pub severity: &'static str,
    pub text: String,
    /// The id of what it is about.
    pub asset: Option<String>,
}

impl Story {
    pub fn new(job: JobView, rows: Rows) -> Story {
        let events = bounded(events(&job, &rows));
        let (submitted_by, runs_again) = match submission(&rows) {
            Some(act) => (act.by.clone(), act.deed.ran_again()),
            None => (None, None),
        };
        let parameters = rows.parameters.unwrap_or_default().into_iter();
        let messages = rows.esdl_messages.into_iter();
        Story {
            events,
            started_at: rows.starts.iter().map(|(at, _)| *at).collect(),
            attempts: rows.attempts,
            submitted_by,
            runs_again,
            run_again_as: rows.runs.iter().map(|run| run.id).collect(),
            cancelled_by: rows.ended_by,
            parameters: parameters
                .map(|(key, value)| ParameterView {
                    key,
                    title: None,
                    value,
                })
                .collect(),
            logs: rows.logs,
            kept_result: rows.whereabouts.kept.map(|kept| kept.bytes),
            whereabouts: None,
            client: None,
            known_whereabouts: rows.whereabouts,
            can_run_again: rows.can_run_again,
            esdl_messages: messages.map(MessageView::new).collect(),
            job,
        }
    }

    /// Says where its output is, where outputs are kept for this time, and what its client does, where that one's
    /// queue has been looked at or not.
    pub fn tell_whereabouts(&mut self, keeps: Duration, queue: Option<ClientQueue>) {
        let known = self.known_whereabouts;
        self.whereabouts = known.sentence(&self.job, keeps, queue);
        self.client = queue.and_then(|queue| queue.sentence(&self.job, known.delivery));
    }

    /// Whether a look at its client's queue says more.
    pub fn asks_its_queue(&self) -> bool {
        let Whereabouts { delivery, kept } = self.known_whereabouts;
        match self.job.state {
            JobState::Live(_) => true,
            JobState::Ended(_) => delivery == Some(Delivery::Queued) && kept.is_none(),
        }
    }

    /// Calls its parameters as its workflow's definition does, and puts them into its order.
    pub fn name_parameters(&mut self, definitions: &[WorkflowParameter]) {
        let place = |key: &str| definitions.iter().position(|one| one.key_name == key);
        for parameter in &mut self.parameters {
            let definition = place(&parameter.key).map(|place| &definitions[place]);
            parameter.title = definition.and_then(|one| one.title.clone());
        }
        self.parameters
            .sort_by_key(|one| place(&one.key).unwrap_or(usize::MAX));
    }
}

impl ParameterView {
    pub fn name(&self) -> &str {
        let title = self.title.as_deref();
        title.filter(|title| !title.is_empty()).unwrap_or(&self.key)
    }

    /// Its value in one line, that may be shown as it is.
    pub fn text(&self) -> String {
        let text = match &self.value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        harmless(&crate::domain::text::excerpt(&text, MAX_VALUE))
    }
}

impl MessageView {
    fn new(message: EsdlMessage) -> MessageView {
        let severity = match message.severity() {
            Severity::Debug => "debug",
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        MessageView {
            severity,
            text: message.technical_message,
            asset: message.esdl_object_id.filter(|id| !id.is_empty()),
        }
    }
}

/// Of those in the middle only how many they are, if there are too many.
fn bounded(mut events: Vec<StoryEvent>) -> Vec<StoryEvent> {
    if events.len() > MAX_EVENTS {
        let half = MAX_EVENTS / 2;
        let left_out = events.len() - MAX_EVENTS;
        let gap = event(
            events[half].at,
            format!("{left_out} events are left out here"),
        );
        events.splice(half..half + left_out, [gap]);
    }
    events
}

fn event(at: Timestamp, what: impl Into<String>) -> StoryEvent {
    StoryEvent {
        at,
        what: what.into(),
        evidence: Vec::new(),
    }
}

impl StoryEvent {
    fn with(mut self, fact: Option<String>) -> StoryEvent {
        self.evidence.extend(fact);
        self
    }
}

/// All that has happened to a job, oldest first.
fn events(job: &JobView, rows: &Rows) -> Vec<StoryEvent> {
    let mut events = Vec::new();
    events.extend(beginning(job, rows));
    match rows.attempts.is_empty() {
        true => events.extend(of_task(job, rows)),
        false => {
            for (place, attempt) in rows.attempts.iter().enumerate() {
                let before = place.checked_sub(1).map(|before| &rows.attempts[before]);
                events.extend(of_attempt(job, rows, attempt, before));
            }
            // Those that began an attempt are in its own row.
            let first = |at: &Timestamp| {
                let mut begun = rows.attempts.iter().filter_map(|one| one.started_at);
                begun.any(|started_at| started_at == *at)
            };
            let starts = rows.starts.iter().enumerate();
            let again = starts.filter(|(_, (at, _))| !first(at));
            events.extend(again.map(|(number, _)| of_start(job, rows, number)));
        }
    }
    events.extend(of_progress(job, rows));
    events.extend(of_acts(rows));
    // Before its end whatever has happened at the same time.
    events.sort_by_key(|event| event.at);
    events.extend(end(job, rows));
    events.extend(rows.runs.iter().map(|run| {
        let what = format!("Run again as job {} by {}", run.id, by(run.by.as_ref()));
        event(run.at, what)
    }));
    events
}

/// The act by which it was submitted, if it was one.
fn submission(rows: &Rows) -> Option<&Act> {
    let is_submission = |act: &&Act| matches!(act.deed, Deed::Submitted | Deed::RanAgain(_));
    rows.acts.first().filter(is_submission)
}

/// What somebody has done to it since its submission.
fn of_acts(rows: &Rows) -> Vec<StoryEvent> {
    let told = |act: &Act| {
        let who = by(act.by.as_ref());
        let (what, fact) = match act.deed {
            Deed::Submitted | Deed::RanAgain(_) => return None,
            Deed::Held => (format!("Put on hold by {who}"), None),
            Deed::Released => (format!("Released by {who}"), None),
            Deed::LetGo => {
                let whatever = "whatever its queue allows".to_owned();
                (format!("Released by {who}"), Some(whatever))
            }
            Deed::MovedFirst => (format!("Moved before all others by {who}"), None),
            Deed::Prioritised { was, priority } => {
                let was = was.map(|was| format!("it was {}", level(was)));
                let what = format!("Given the priority {} by {who}", level(priority));
                (what, was)
            }
        };
        Some(event(act.at, what).with(fact))
    };
    let mut events: Vec<_> = rows.acts.iter().filter_map(told).collect();
    if let (Some(last), left_out @ 1..) = (events.last_mut(), rows.acts_left_out) {
        let more = format!("{left_out} more acts are not kept");
        last.evidence.push(more);
    }
    events
}

/// What it was submitted with, whatever somebody has made of it.
fn first_priority(job: &JobView, rows: &Rows) -> Option<Priority> {
    let first = rows.acts.iter().find_map(|act| match act.deed {
        Deed::Prioritised { was, .. } => Some(was),
        Deed::Submitted
        | Deed::RanAgain(_)
        | Deed::Held
        | Deed::Released
        | Deed::LetGo
        | Deed::MovedFirst => None,
    });
    first.unwrap_or(job.priority)
}

fn level(priority: Priority) -> &'static str {
    match priority {
        Priority::Low => "low",
        Priority::Medium => "medium",
        Priority::High => "high",
    }
}

fn beginning(job: &JobView, rows: &Rows) -> Option<StoryEvent> {
    let at = job.registered_at?;
    let workflow = job.workflow.as_deref().map(one_line).unwrap_or_default();
    let at_once = rows.attempts.is_empty() && job.submitted_at == Some(at);
    let what = match (at_once, &job.queue) {
        (true, Some(queue)) => format!(
            "Submitted to `{workflow}`, and handed over to `{}` at once",
            one_line(queue)
        ),
        (true, None) => format!("Submitted to `{workflow}`, and handed over at once"),
        (false, _) => format!("Submitted to `{workflow}`"),
    };
    let submission = submission(rows);
    let who = submission.map(|act| format!("by {}", by(act.by.as_ref())));
    let again = submission.and_then(|act| act.deed.ran_again());
    let again = again.map(|of| format!("runs again what job {of} was"));
    let priority = first_priority(job, rows);
    let priority = priority.map(|priority| format!("its priority is {}", level(priority)));
    let timeout = job.timeout_ms.filter(|timeout| *timeout > 0);
    let timeout = timeout.map(|timeout| {
        let timeout = spoken(SignedDuration::from_millis(timeout));
        format!("it may run for {timeout}")
    });
    let event = event(at, what).with(who).with(again);
    Some(event.with(priority).with(timeout))
}

/// Of a job whose workflow is one plain step, and which has not been held.
fn of_task<'r>(job: &'r JobView, rows: &'r Rows) -> impl Iterator<Item = StoryEvent> + use<'r> {
    let later = job.submitted_at.filter(|at| Some(*at) != job.registered_at);
    let handed_over = later.map(|at| {
        let queue = job.queue.as_deref().or(job.workflow.as_deref());
        let queue = queue.map(one_line).unwrap_or_default();
        event(at, format!("Handed over to `{queue}`"))
    });
    let starts = (0..rows.starts.len()).map(|number| of_start(job, rows, number));
    // In rows of earlier versions.
    let only = job.running_at.filter(|_| rows.starts.is_empty());
    let only = only.map(|at| event(at, "Started"));
    handed_over.into_iter().chain(only).chain(starts)
}

fn of_start(job: &JobView, rows: &Rows, number: usize) -> StoryEvent {
    let (at, verdict) = rows.starts[number];
    let next = rows.starts.get(number + 1).map(|(at, _)| *at);
    let place = on(rows, job.task_id.as_deref(), at, next);
    let (what, why) = match (verdict, number) {
        (Verdict::Counts, 0) => ("Started", None),
        (Verdict::Counts, _) => (
            "Started again",
            Some("the worker before it is taken for dead"),
        ),
        (Verdict::Interrupted, _) => (
            "Started again",
            Some("a connection to RabbitMQ was lost, so it does not count"),
        ),
        (Verdict::Copy, _) => (
            "Started again",
            Some("the workers before it still run it, so it does not count"),
        ),
        (Verdict::Suspected, _) => (
            "Started again",
            Some("the workers are asked whether one of them has died"),
        ),
    };
    event(at, format!("{what}{place}")).with(why.map(str::to_owned))
}

/// ` on worker-simulator@host`, where one was seen with the task from then on, and before the next
/// start.
fn on(rows: &Rows, task: Option<&str>, from: Timestamp, to: Option<Timestamp>) -> String {
    let seen = rows.seen.iter().filter(|one| {
        Some(one.task_id.as_str()) == task
            && one.last_seen >= from
            && to.is_none_or(|to| one.first_seen < to)
    });
    match seen.max_by_key(|one| one.first_seen) {
        Some(seen) => format!(" on {}", one_line(&seen.host)),
        None => String::new(),
    }
}

fn of_attempt(
    job: &JobView,
    rows: &Rows,
    attempt: &AttemptView,
    before: Option<&AttemptView>,
) -> Vec<StoryEvent> {
    let mut events = Vec::new();
    let again = match attempt.attempt {
        1 => String::new(),
        number => format!(", attempt {number}"),
    };
    let is_whole = rows.attempts.iter().all(|one| one.step == 1) && attempt.title == attempt.task;
    let name = match is_whole && again.is_empty() {
        true => String::new(),
        false => {
            let title = one_line(&attempt.title);
            format!("Step {}, {title}{again}: ", attempt.step)
        }
    };
    let task = one_line(&attempt.task);
    let say = |text: &str| match name.is_empty() {
        true => capitalised(text),
        false => format!("{name}{text}"),
    };
    let ended_before = before.and_then(|one| one.finished_at).or(job.registered_at);
    let waits_since = attempt.due_at.or_else(|| {
        let turn = job.turn.as_ref().filter(|_| attempt.submitted_at.is_none());
        turn.map(|turn| turn.since)
    });
    // What is due later than the end before it has been put off until then.
    let is_put_off = waits_since > ended_before && attempt.attempt > 1;
    if let (Some(due), Some(at), true) = (waits_since, ended_before, is_put_off) {
        events.push(event(at, say(&format!("is tried again at {due:.0}"))));
    } else if let Some(at) = waits_since {
        events.push(event(
            at,
            say(&format!("held until it is its turn at `{task}`")),
        ));
    }
    if let Some(at) = attempt.submitted_at {
        events.push(event(at, say(&format!("handed over to `{task}`"))));
    }
    if let Some(at) = attempt.started_at {
        let host = on(rows, attempt.task_id.as_deref(), at, None);
        events.push(event(at, say(&format!("started{host}"))));
    }
    // The end of the last one is that of the job.
    let is_last = rows.attempts.last() == Some(attempt);
    if let (Some(at), Some(outcome), false) = (attempt.finished_at, attempt.outcome, is_last) {
        let why = attempt.why.as_deref().map(one_line);
        let starts = attempt.starts.filter(|starts| *starts > 1);
        let starts = starts.map(|starts| format!("its task was started {starts} times"));
        events.push(event(at, say(outcome.in_words())).with(why).with(starts));
    }
    events
}

fn capitalised(text: &str) -> String {
    let mut rest = text.chars();
    let first = rest.next().map(|first| first.to_ascii_uppercase());
    first.into_iter().chain(rest).collect()
}

fn of_progress<'r>(job: &'r JobView, rows: &'r Rows) -> impl Iterator<Item = StoryEvent> + use<'r> {
    let last = rows.last.as_ref().or(job.progress.as_ref());
    let last = last.map(|last| Mark {
        at: last.at,
        fraction: last.fraction,
        message: last.message.clone(),
    });
    let last_mark = rows.marks.last().map(|mark| mark.at);
    let last = last.filter(|last| Some(last.at) > last_mark);
    rows.marks.iter().cloned().chain(last).map(|mark| {
        let percent = mark.fraction.clamp(0.0, 1.0) * 100.0;
        let what = match mark.message.trim() {
            "" => format!("{percent:.0} %"),
            message => format!("{percent:.0} %: {}", one_line(message)),
        };
        event(mark.at, what)
    })
}

fn end(job: &JobView, rows: &Rows) -> Option<StoryEvent> {
    let JobState::Ended(outcome) = job.state else {
        return None;
    };
    let by = rows.ended_by.as_ref();
    let what = match outcome {
        Outcome::Succeeded => "Succeeded".to_owned(),
        Outcome::Failed => "Failed".to_owned(),
        Outcome::Cancelled => match by {
            Some(by) => format!("Cancelled by {by}"),
            None => "Cancelled".to_owned(),
        },
        Outcome::CrashLoop => {
            let lost = match lost_workers(job, rows) {
                ..=1 => "its worker was lost".to_owned(),
                more => format!("its workers were lost, {more} times"),
            };
            format!("Ended by the orchestrator: {lost}, by a crash or a stop")
        }
        Outcome::Rejected => "Refused by the orchestrator".to_owned(),
        Outcome::TimedOut => "Ended by the orchestrator: it timed out".to_owned(),
        Outcome::Expired => {
            "Given up by the orchestrator: it was unfinished for too long".to_owned()
        }
        Outcome::Lost => "Given up by the orchestrator: it was lost".to_owned(),
    };
    let patience = (outcome == Outcome::TimedOut).then(|| PATIENCE.to_owned());
    let why = job.ends.why.as_deref().map(one_line);
    let bytes = job.result_bytes.filter(|bytes| *bytes > 0);
    let size = bytes.map(|bytes| format!("its result has {bytes} bytes"));
    let end = event(job.finished_at?, what);
    Some(end.with(why).with(patience).with(size))
}

/// How many workers were taken for dead that had begun its last task. What began it first has not followed
/// another, and excused starts no dead one.
fn lost_workers(job: &JobView, rows: &Rows) -> usize {
    let counts = |(_, verdict): &&(Timestamp, Verdict)| match verdict {
        Verdict::Counts | Verdict::Suspected => true,
        Verdict::Interrupted | Verdict::Copy => false,
    };
    let known = rows.starts.iter().filter(counts).count();
    let all = usize::try_from(job.starts).unwrap_or_default();
    let started = if known > 0 { known } else { all };
    started.saturating_sub(1)
}

#[cfg(test)]
mod tests;
