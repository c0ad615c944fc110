//! Why a job waits, why it takes so long, or why it ended as it did: one sentence, and the facts that
//! it is drawn from.
//!
//! Whatever is not known leaves its clause out: without a look at RabbitMQ nothing is said of workers,
//! without five runs nothing of how long it takes.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use self::moments::clock;
use self::turn::{before_it, firsts, obstacle, seats};
use super::capacity::FRESH;
use super::{Concern, JobState, JobView, Outage, Overview, StepEnd, StepView, TurnView, spoken};
use crate::domain::estimate::{Runs, Span};
use crate::domain::job::{JobStatus, Outcome};
use crate::domain::text::{excerpt, harmless};
use crate::domain::worker::{LostTask, TaskView, WorkerState, WorkerView, Workers};

mod moments;
mod turn;

pub use self::moments::Moment;

/// Characters of a sentence, and of a fact.
const MAX_SENTENCE: usize = 200;
/// Characters of a name in it, and of what a worker says.
const MAX_NAME: usize = 60;
const MAX_WORDS: usize = 140;

/// How long a task takes to get to RabbitMQ, if nothing keeps it.
const SOON: SignedDuration = SignedDuration::from_secs(15);

/// Why a job is as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Why {
    /// Of at most about 200 characters, and without any that could pass for something else.
    pub sentence: String,
    /// What it is drawn from, each as short.
    pub evidence: Vec<String>,
    /// The points in time that the sentence names, and those of each piece of evidence.
    #[serde(skip)]
    pub moments: Vec<Vec<Moment>>,
}

impl Why {
    /// What it is drawn from, each with the points in time that it names.
    pub fn facts(&self) -> impl Iterator<Item = (&str, &[Moment])> {
        let moments = self.moments.iter().skip(1).map(Vec::as_slice);
        let moments = moments.chain(std::iter::repeat(&[][..]));
        self.evidence.iter().map(String::as_str).zip(moments)
    }

    /// The points in time that the sentence names.
    pub fn moments(&self) -> &[Moment] {
        self.moments.first().map_or(&[], Vec::as_slice)
    }
}

impl Overview {
    /// The workers, if they were looked at lately: they may do something else by now.
    pub fn seen_workers(&self, now: Timestamp) -> Option<&Workers> {
        let workers = self.workers.as_ref().filter(|_| !self.is_cut_off)?;
        (now.duration_since(workers.looked_at?) <= FRESH).then_some(workers)
    }

    /// Adds its estimate to each of these jobs, and why it is as it is.
    pub fn explain(&self, jobs: &mut [JobView], now: Timestamp) {
        self.estimate(jobs, now);
        for job in jobs {
            job.concern = concern(job, self, now);
            // Nobody can say how long an outage takes.
            if job.concern.is_some() || self.outage.is_some() {
                job.estimate = None;
            } else if job.estimate.is_none() {
                job.too_few_runs = self.too_few_runs(job);
            }
            job.why = Some(why(job, self, now));
        }
    }
}

/// What somebody should look at, of a job that has not ended.
fn concern(job: &JobView, overview: &Overview, now: Timestamp) -> Option<Concern> {
    if let JobState::Ended(_) = job.state {
        return None;
    }
    if lost(job, overview, now).is_some() {
        return Some(Concern::TaskLost);
    }
    let (worker, _) = computing(job, overview, now)?;
    (worker.state == WorkerState::Silent).then_some(Concern::WorkerSilent)
}

/// Its task, if no worker has it and it is in no queue.
fn lost<'o>(job: &JobView, overview: &'o Overview, now: Timestamp) -> Option<&'o LostTask> {
    let mut lost = overview.seen_workers(now)?.lost_tasks.iter();
    lost.find(|lost| job.task_id.as_deref() == Some(&lost.task_id))
}

/// `RabbitMQ does not answer (since 23:40)`.
fn in_outage(outage: &Outage, now: Timestamp) -> String {
    let since = outage.since;
    let since = since.map(|since| format!(" (since {})", clock(since, now)));
    format!("{}{}", outage.what, since.unwrap_or_default())
}

/// Why a job is as it is, as of what is known of the deployment.
fn why(job: &JobView, overview: &Overview, now: Timestamp) -> Why {
    let told = match job.state {
        JobState::Ended(outcome) => Telling::default().ended(job, outcome, now),
        JobState::Live(status) => Telling::default().live(job, status, overview, now),
    };
    told.done()
}

/// A sentence in the making: what comes first, what follows, and what it is drawn from.
#[derive(Debug, Default)]
struct Telling {
    clauses: Vec<String>,
    evidence: Vec<String>,
}

impl Telling {
    fn say(mut self, clause: impl Into<String>) -> Telling {
        self.clauses.push(clause.into());
        self
    }

    fn may_say(self, clause: Option<String>) -> Telling {
        match clause {
            Some(clause) => self.say(clause),
            None => self,
        }
    }

    fn fact(mut self, fact: impl Into<String>) -> Telling {
        self.evidence.push(fact.into());
        self
    }

    fn may_show(self, fact: Option<String>) -> Telling {
        match fact {
            Some(fact) => self.fact(fact),
            None => self,
        }
    }

    fn done(self) -> Why {
        let sentence = joined(self.clauses);
        let stop = match sentence.ends_with(['.', '…']) {
            true => "",
            false => ".",
        };
        let all = [sentence + stop].into_iter().chain(self.evidence);
        let bounded = all.map(|told| {
            let (text, mut moments) = moments::read(&told);
            let shown = excerpt(&text, MAX_SENTENCE).into_owned();
            let at = |text: &str, one: &Moment| text.get(one.place.clone()).map(str::to_owned);
            moments.retain(|one| at(&shown, one) == at(&text, one));
            (shown, moments)
        });
        let (mut texts, moments): (Vec<_>, _) = bounded.unzip();
        Why {
            sentence: texts.remove(0),
            evidence: texts,
            moments,
        }
    }

    fn live(
        self,
        job: &JobView,
        status: JobStatus,
        overview: &Overview,
        now: Timestamp,
    ) -> Telling {
        let telling = self.before(job);
        if let Some(turn) = &job.turn {
            return telling.held(job, turn, overview, now);
        }
        if let Some(step) = &job.step {
            return match (step.submitted_at, step.started_at) {
                (_, Some(since)) => telling.running(job, since, overview, now),
                (Some(since), None) => telling.waiting(job, &step.task, since, overview, now),
                (None, None) if job.granted_at.is_some() => telling.registered(job, now),
                (None, None) => telling.between(job, step, now),
            };
        }
        match (status, job.running_at, job.submitted_at) {
            (JobStatus::Running, Some(since), _) => telling.running(job, since, overview, now),
            (JobStatus::Running, None, _) => telling.say("Runs"),
            (JobStatus::Submitted, _, Some(since)) => {
                let workflow = job.workflow.as_deref().unwrap_or_default();
                let queue = job.queue.as_deref();
                let queue = queue.unwrap_or_else(|| overview.queue_of(workflow));
                telling.waiting(job, queue, since, overview, now)
            }
            (JobStatus::Submitted, _, None) => telling.say("Waits for a worker"),
            (JobStatus::Registered, ..) => telling.registered(job, now),
        }
    }

    /// What has become of the attempt before.
    fn before(self, job: &JobView) -> Telling {
        let Some(end) = &job.ends.step else {
            return self;
        };
        let words = end.why.as_deref().map(words);
        let words = words.map(|words| format!(": {words}"));
        self.fact(format!(
            "step {}, {}, {}{}",
            end.number,
            name(&end.title),
            end.outcome.in_words(),
            words.unwrap_or_default()
        ))
    }

    fn held(self, job: &JobView, turn: &TurnView, overview: &Overview, now: Timestamp) -> Telling {
        let TurnView {
            queue,
            owner,
            since,
            on_hold,
            hold,
        } = turn;
        let shown = name(queue);
        let telling = self
            .fact(format!("held at {shown} since {}", clock(*since, now)))
            .may_show((!owner.is_empty()).then(|| format!("its owner is {}", name(owner))));
        if *on_hold {
            let who = hold.as_ref().map(|hold| {
                let (who, since) = (name(&hold.by.name()), clock(hold.at, now));
                format!("Held: {who} does not let it go since {since}")
            });
            let nobody = || "Held: an operator does not let it go".to_owned();
            return telling.say(who.unwrap_or_else(nobody));
        }
        let view = overview.turns.iter().find(|view| view.name == *queue);
        let Some(view) = view else {
            return telling.say(format!("Held: waits for its turn at `{shown}`"));
        };
        let telling = telling
            .fact(format!(
                "{shown}: {} held, {} waiting in RabbitMQ, {} running",
                view.held, view.waiting, view.running
            ))
            .may_show(seats(&view.seats))
            .may_show(firsts(job.id, view));
        let obstacle = format!("Held: {}", obstacle(view, &shown, now));
        if view.limit.is_paused {
            return telling.say(obstacle);
        }
        let wait = job.estimate.and_then(|estimate| estimate.wait);
        let outage = overview.outage.as_ref();
        let clauses = |is_named| {
            let clauses = [
                Some(obstacle.clone()),
                outage.map(|outage| in_outage(outage, now)),
                before_it(job.id, owner, view, is_named),
                no_worker(queue, overview, now),
                wait.map(about),
            ];
            clauses.into_iter().flatten().collect::<Vec<_>>()
        };
        let mut said = clauses(true);
        // The names are among its facts too.
        if moments::read(&said.join("; ")).0.chars().count() >= MAX_SENTENCE {
            said = clauses(false);
        }
        said.into_iter().fold(telling, Telling::say)
    }

    /// In its queue, where a worker takes it.
    fn waiting(
        self,
        job: &JobView,
        queue: &str,
        since: Timestamp,
        overview: &Overview,
        now: Timestamp,
    ) -> Telling {
        let shown = name(queue);
        let telling = self.fact(format!("in the queue {shown} since {}", clock(since, now)));
        let queues = overview.queues.as_ref();
        let workers = queues.and_then(|queues| queues.workers(queue));
        let telling = telling.may_show(workers.map(|workers| match workers {
            1 => format!("{shown} has 1 worker"),
            workers => format!("{shown} has {workers} workers"),
        }));
        if let Some(outage) = &overview.outage {
            return telling.say(format!("Waits: {}", in_outage(outage, now)));
        }
        if let Some(lost) = lost(job, overview, now) {
            return telling.say(format!(
                "Its task is lost: it is in no queue, and no worker says that it has it, since {}",
                clock(lost.since, now)
            ));
        }
        if let Some(nobody) = no_worker(queue, overview, now) {
            return telling
                .say(format!("Waits: {nobody}"))
                .may_say(last_seen(queue, overview, now));
        }
        let go_first = job.position.map(|position| match position {
            ..=1 => format!("Waits: it is the next at `{shown}`"),
            2 => format!("Waits: 1 job goes first at `{shown}`"),
            more => format!("Waits: {} jobs go first at `{shown}`", more - 1),
        });
        let wait = job.estimate.and_then(|estimate| estimate.wait);
        telling
            .say(go_first.unwrap_or_else(|| format!("Waits for a worker of `{shown}`")))
            .may_say(all_busy(queue, overview, now))
            .may_say(wait.map(about).or_else(|| behind(job, overview, now)))
    }

    /// Its next attempt has no task yet.
    fn between(self, job: &JobView, step: &StepView, now: Timestamp) -> Telling {
        let before = job.ends.step.as_ref().map(|end| end.outcome.in_words());
        let what = match step.attempt {
            1 => step.name(),
            attempt => format!("attempt {attempt} of {}", step.name()),
        };
        let what = name(&what);
        let begins = match step.due_at {
            Some(due) if due > now => format!(
                "Waits between attempts: {what} begins in {}",
                spoken(due.duration_since(now))
            ),
            Some(due) if now.duration_since(due) > SOON => {
                return self.stalled(job, &format!("Waits for {what}"), due, now);
            }
            Some(_) => format!("Waits: it is time for {what}, which is about to begin"),
            None => format!("Waits: {what} has no task yet"),
        };
        let because = before.map(|before| format!("the one before it {before}"));
        self.say(begins)
            .may_say(because.filter(|_| step.attempt > 1))
    }

    fn registered(self, job: &JobView, now: Timestamp) -> Telling {
        match job.granted_at {
            Some(at) if now.duration_since(at) > SOON => self.stalled(job, "Has its turn", at, now),
            Some(at) => self
                .fact(format!("it has its turn since {}", clock(at, now)))
                .say("Has its turn: its task is on its way to RabbitMQ"),
            None => self.say("Registered without a task: its submission is not done with yet"),
        }
    }

    /// Its time has come, and something keeps its task: what that is may have been told to its client.
    fn stalled(self, job: &JobView, what: &str, since: Timestamp, now: Timestamp) -> Telling {
        let told = job.progress.as_ref().filter(|told| told.at >= since);
        let told = told.map(|told| words(&told.message));
        self.say(format!(
            "{what} since {}; its task is not in RabbitMQ yet",
            clock(since, now)
        ))
        .may_say(told.filter(|told| !told.is_empty()))
    }

    fn running(
        self,
        job: &JobView,
        since: Timestamp,
        overview: &Overview,
        now: Timestamp,
    ) -> Telling {
        let ran = now.duration_since(since);
        let telling = self.fact(format!("runs since {}", clock(since, now)));
        let again = (job.starts > 1).then(|| format!("started {} times", job.starts));
        if let Some(lost) = lost(job, overview, now) {
            return telling
                .say(format!(
                    "Its task is lost: no worker has had it since {}",
                    clock(lost.since, now)
                ))
                .may_say(last_word(job, since, now))
                .may_say(again);
        }
        let what = job.step.as_ref().filter(|step| step.shares.len() > 1);
        let what = what.map(|step| format!(" {}", name(&step.name())));
        let host = computing(job, overview, now).map(|(worker, _)| worker);
        let silent = host.filter(|worker| worker.state == WorkerState::Silent);
        let silent = silent.map(|worker| {
            let since = clock(worker.last_seen, now);
            format!("its worker has not answered since {since}")
        });
        let restart = silent.as_ref().map(|_| {
            "restart it, and the task goes to another, as far as its delivery limit allows"
                .to_owned()
        });
        let outage = overview.outage.as_ref();
        let outage = outage.map(|outage| {
            let outage = in_outage(outage, now);
            format!("whether it still does is not known: {outage}")
        });
        let is_known = silent.is_none() && outage.is_none();
        let host = host.map(|worker| format!(" on {}", name(&worker.host)));
        let (what, host) = (what.unwrap_or_default(), host.unwrap_or_default());
        telling
            .say(format!("Runs{what}{host} for {}", spoken(ran)))
            .may_say(silent)
            .may_say(restart)
            .may_say(outage)
            .may_say(pace(job, ran, overview).filter(|_| is_known))
            .may_say(last_word(job, since, now))
            .may_say(deadline(job, since, now))
            .may_say(again)
    }

    fn ended(self, job: &JobView, outcome: Outcome, now: Timestamp) -> Telling {
        let ran = job.ran(now).map(spoken);
        let after = ran.as_ref().map(|ran| format!(" after {ran}"));
        let after = after.unwrap_or_default();
        let step = job
            .ends
            .step
            .as_ref()
            .filter(|step| step.outcome == outcome);
        // Of a job of several steps these are the starts of all its tasks.
        let starts = step.map_or(job.starts, |step| step.starts);
        let why = job.ends.why.as_deref();
        let why = why.or_else(|| step.and_then(|step| step.why.as_deref()));
        let reason = why.map(words);
        let telling = self
            .may_show(job.finished_at.map(|at| format!("ended at {at:.0}")))
            .may_show(ran.map(|ran| format!("ran for {ran}")))
            .may_show(reason.clone());
        let said = reason.map(|reason| format!(": {reason}"));
        let said = said.unwrap_or_default();
        let place = step.and_then(|step| place(job, step)).unwrap_or_default();
        let told = (!job.ends.is_told).then(|| "its client may not have been told yet".to_owned());
        let telling = match outcome {
            Outcome::Succeeded => telling.say(format!("Succeeded{after}")),
            Outcome::Failed => telling.say(failed(&place, &said)),
            Outcome::Cancelled => telling.say(cancelled(job, &after)),
            Outcome::CrashLoop => telling
                .say(format!(
                    "Lost its workers{place}: they crashed, or were stopped"
                ))
                .may_say((starts > 1).then(|| format!("its task was started {starts} times"))),
            Outcome::Rejected => telling.say(format!("Refused{said}")),
            Outcome::TimedOut => telling.say(format!("Timed out{place}{after}{said}")),
            Outcome::Expired => telling.say(format!("Given up{said}")),
            Outcome::Lost => telling.say(format!("Lost{place}{said}")),
        };
        telling.may_say(told)
    }
}

/// As many clauses as there is room for, of which the first says most: none is cut off in its middle.
fn joined(clauses: Vec<String>) -> String {
    let length = |told: &str| moments::read(told).0.chars().count();
    let mut clauses = clauses.into_iter();
    let mut sentence = clauses.next().unwrap_or_default();
    for clause in clauses {
        let longer = format!("{sentence}; {clause}");
        if length(&longer) < MAX_SENTENCE {
            sentence = longer;
        }
    }
    sentence
}

/// `Failed: no solution`; what says itself that it failed says it once.
fn failed(place: &str, said: &str) -> String {
    let words = said.strip_prefix(": ").unwrap_or_default();
    let rest = words
        .split_at_checked("failed".len())
        .filter(|(word, _)| word.eq_ignore_ascii_case("failed"))
        .map(|(_, rest)| rest)
        .filter(|rest| !rest.starts_with(char::is_alphanumeric));
    match (place, rest) {
        ("", Some(rest)) => format!("Failed{rest}"),
        _ => format!("Failed{place}{said}"),
    }
}

/// That nobody takes from a queue.
fn no_worker(queue: &str, overview: &Overview, now: Timestamp) -> Option<String> {
    let queues = overview.queues.as_ref();
    let queues = queues.filter(|queues| queues.workers(queue) == Some(0))?;
    let since = queues.without_worker.get(queue);
    let since = since.map(|since| format!(" since {}", clock(*since, now)));
    Some(format!(
        "no worker takes `{}`{}",
        name(queue),
        since.unwrap_or_default()
    ))
}

/// The worker that took from this queue last, if none does now.
fn last_seen(queue: &str, overview: &Overview, now: Timestamp) -> Option<String> {
    let workers = overview.seen_workers(now)?.workers.iter();
    let its = workers.filter(|worker| worker.queues.iter().any(|one| one == queue));
    let last = its.max_by_key(|worker| worker.last_seen)?;
    let host = name(&last.host);
    Some(match last.state {
        WorkerState::Draining => format!("{host} takes no more, for an operator drains it"),
        WorkerState::Drained => format!("{host} is drained"),
        WorkerState::Idle
        | WorkerState::Busy
        | WorkerState::BusyAndDeaf
        | WorkerState::Silent
        | WorkerState::Gone => format!("last seen {host}, {} ago", ago(last.last_seen, now)),
    })
}

/// Why it is not known how long a job waits, if that is for what runs before it.
fn behind(job: &JobView, overview: &Overview, now: Timestamp) -> Option<String> {
    let workflow = job.workflow.as_deref().filter(|_| job.step.is_none())?;
    let is_behind = overview.is_behind_overdue(workflow, now);
    is_behind.then(|| {
        "for how long nobody knows: what runs there takes longer than all before it".to_owned()
    })
}

/// That all who take from a queue have something to do, if all are known: each of a worker's processes
/// computes a task.
fn all_busy(queue: &str, overview: &Overview, now: Timestamp) -> Option<String> {
    let consumers = overview.queues.as_ref()?.workers(queue)?;
    let known = overview.seen_workers(now)?.workers.iter();
    let takes = |worker: &&WorkerView| match worker.state {
        WorkerState::Idle | WorkerState::Busy | WorkerState::BusyAndDeaf => {
            worker.queues.iter().any(|one| one == queue)
        }
        WorkerState::Draining | WorkerState::Drained | WorkerState::Silent | WorkerState::Gone => {
            false
        }
    };
    let its: Vec<_> = known.filter(takes).collect();
    let is_busy = |worker: &&WorkerView| match worker.state {
        WorkerState::Busy => worker.tasks.len() >= worker.processes(),
        // It does not answer for what it computes.
        state => state == WorkerState::BusyAndDeaf,
    };
    if u32::try_from(its.len()).ok()? != consumers || !its.iter().all(is_busy) {
        return None;
    }
    match consumers {
        0 => None,
        1 => Some("its worker is busy".to_owned()),
        all => Some(format!("all {all} workers are busy")),
    }
}

/// The worker that says it computes the job's task.
fn computing<'o>(
    job: &JobView,
    overview: &'o Overview,
    now: Timestamp,
) -> Option<(&'o WorkerView, &'o TaskView)> {
    let workers = overview.seen_workers(now)?.workers.iter();
    let mut tasks = workers.flat_map(|worker| worker.tasks.iter().map(move |task| (worker, task)));
    tasks.find(|(_, task)| job.task_id.as_deref() == Some(&task.id))
}

/// How it does beside those before it.
fn pace(job: &JobView, ran: SignedDuration, overview: &Overview) -> Option<String> {
    let rows = overview.rows.get(job.workflow.as_deref()?)?;
    let runs: &Runs = match &job.step {
        Some(step) => rows.step_runs.get(&step.number)?,
        None => rows.runs.as_ref()?,
    };
    let ran = Duration::try_from(ran).unwrap_or_default();
    match runs.remaining(ran) {
        None => Some("longer than all of those before it".to_owned()),
        Some(_) if ran >= runs.span().p90 => Some("longer than 90 % of those before it".to_owned()),
        Some(left) => Some(format!("{} left", about(left))),
    }
}

/// When its worker last said something; before it ran, the orchestrator did.
fn last_word(job: &JobView, since: Timestamp, now: Timestamp) -> Option<String> {
    let progress = job.progress.as_ref().filter(|said| said.at > since)?;
    Some(format!("last word {} ago", ago(progress.at, now)))
}

/// When its timeout ends it: of its step, or of a job whose one step runs. That of a job with several
/// does not run while it waits, which is not known here.
fn deadline(job: &JobView, since: Timestamp, now: Timestamp) -> Option<String> {
    let timeout = match &job.step {
        Some(step) => step.timeout_ms,
        None => job.timeout_ms,
    };
    let timeout = SignedDuration::from_millis(timeout.filter(|timeout| *timeout > 0)?);
    let left = timeout.saturating_sub(now.duration_since(since));
    Some(match left.is_positive() {
        true => format!("times out in {}", spoken(left)),
        false => "its timeout is over".to_owned(),
    })
}

fn cancelled(job: &JobView, after: &str) -> String {
    let who = job.ends.cancelled_by.as_ref();
    let who = who.map(|who| format!(" by {}", name(&who.name())));
    let who = who.unwrap_or_default();
    let was_submitted = job.submitted_at.is_some() || job.registered_at != job.finished_at;
    match (job.registered_at.filter(|_| was_submitted), job.running_at) {
        (None, _) => format!("Cancelled{who} before it was submitted"),
        (Some(_), None) => format!("Cancelled{who} while it waited"),
        (Some(_), Some(_)) => format!("Cancelled{who}{after}"),
    }
}

/// ` in step 2, Simulate`, of a job of several.
fn place(job: &JobView, step: &StepEnd) -> Option<String> {
    let is_only = step.number == 1 && job.workflow.as_ref() == Some(&step.title);
    let place = || format!(" in step {}, {}", step.number, name(&step.title));
    (!is_only).then(place)
}

/// `about 40 min`.
fn about(span: Span) -> String {
    let time = SignedDuration::try_from(span.median).unwrap_or(SignedDuration::MAX);
    format!("about {}", spoken(time))
}

fn ago(time: Timestamp, now: Timestamp) -> String {
    spoken(now.duration_since(time))
}

fn name(text: &str) -> String {
    harmless(&excerpt(text, MAX_NAME))
}

fn words(text: &str) -> String {
    let text = text.trim_end_matches('.');
    harmless(&excerpt(text, MAX_WORDS))
}

#[cfg(test)]
mod tests;
