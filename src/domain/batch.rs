//! Folds [`job::decide`] over a batch of messages: each is decided in the state in which the
//! previous one leaves its job. The result is a [`Plan`], to be written, published and committed as
//! a whole.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use uuid::Uuid;

use crate::domain::job::{
    self, Attempt, ClientStatus, Command, Context, Decision, Ended, Ending, Event, Job,
    Publication, State, TaskInput, TimeSeries, Turn,
};

/// A message of a batch and what it asks for.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Its place in the batch.
    pub place: usize,
    pub job_id: Uuid,
    pub command: &'a Command,
    /// Whether it is handled again because its outcome may now be told.
    pub has_waited: bool,
}

/// What is to be done about a batch.
#[derive(Debug, Default)]
pub struct Plan<'a> {
    pub transitions: Vec<Transition<'a>>,
    pub series: SeriesChanges,
    /// To be sent before the commit, in this order.
    pub publications: Vec<Publication<'a>>,
    /// To be sent after the commit, in this order.
    pub announcements: Vec<Publication<'a>>,
    /// The jobs to settle once their clients have been told.
    pub ending: BTreeSet<Uuid>,
    /// Those jobs of the batch that have a course, of which settling removes more.
    pub with_course: BTreeSet<Uuid>,
    /// Whether a job of it waits for its turn, or had one: there may be something to grant.
    pub concerns_turns: bool,
    pub waits: Vec<Wait>,
    pub stalled: Vec<Stalled>,
    /// Jobs of which nothing is to be kept for their clients any more.
    pub given_up: Vec<Uuid>,
    pub reports: Vec<Report<'a>>,
}

/// A job's state before and after a batch.
#[derive(Debug, PartialEq)]
pub struct Transition<'a> {
    pub job_id: Uuid,
    pub before: &'a State,
    pub after: State,
}

/// A guard row to write.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    pub esdl_id: String,
    pub job_id: Uuid,
    pub reference: String,
}

/// What a batch does to the guard rows of time series.
#[derive(Debug, Default, PartialEq)]
pub struct SeriesChanges {
    /// In use from now on.
    pub keep: Vec<Series>,
    /// In use from now on, unless they are another job's.
    pub hold: Vec<Series>,
    /// Retired from now on, and perhaps not known before.
    pub retire_late: Vec<Series>,
    /// Jobs whose series are retired from now on.
    pub retire: Vec<Uuid>,
    /// Single ones of them.
    pub retire_these: Vec<(Uuid, String)>,
}

/// A message whose outcome may not be told yet.
#[derive(Debug, PartialEq)]
pub struct Wait {
    /// Its place in the batch.
    pub place: usize,
    pub time: Duration,
    /// The logs of the refusal, if it is a refused submission.
    pub refusal: Option<String>,
}

/// A message that is not handled, because a task queue takes nothing for now.
#[derive(Debug, PartialEq)]
pub struct Stalled {
    /// Its place in the batch.
    pub place: usize,
    pub queue: String,
}

/// What became of a message, to be logged and counted after the commit.
#[derive(Debug)]
pub struct Report<'a> {
    /// The message's place in the batch.
    pub place: usize,
    pub subject: Subject,
    pub command: &'a Command,
    pub event: Event,
    /// The logs of the refusal, if it is a refused submission.
    pub refusal: Option<String>,
}

/// The job that a report is about.
#[derive(Debug, Clone, PartialEq)]
pub struct Subject {
    pub id: Uuid,
    /// The client's own name for it; empty if there is none.
    pub reference: String,
    /// Empty if it is not known.
    pub workflow: String,
}

/// Decides about a batch. `before` has the states of its jobs in the database, `context` returns
/// the context of each decision, with a fresh task id.
pub fn decide<'a, 'c>(
    batch: impl IntoIterator<Item = Asked<'a>>,
    before: &'a HashMap<Uuid, State>,
    mut context: impl FnMut() -> Context<'c>,
) -> Plan<'a> {
    let before = |job_id: Uuid| before.get(&job_id).unwrap_or(&State::Unknown);
    let mut after: HashMap<Uuid, State> = HashMap::new();
    let mut plan = Plan::default();
    for asked in batch {
        let Asked {
            place,
            job_id,
            command,
            ..
        } = asked;
        let state = after.get(&job_id).unwrap_or_else(|| before(job_id));
        let settled;
        let state = match state {
            // It will be told and settled with this batch.
            State::Ending(job) if plan.ending.contains(&job_id) => {
                settled = State::Ended(job.ended.clone());
                &settled
            }
            state => state,
        };
        let context = context();
        let decision = job::decide(job_id, state, command, &context);
        let mut queues = decision.publications.iter().filter_map(task_queue);
        if let Some(queue) = queues.find(|queue| (context.is_closed)(queue)) {
            let queue = queue.to_owned();
            plan.stalled.push(Stalled { place, queue });
            continue;
        }
        let next = decision.next.as_ref().unwrap_or(state);
        if next.job().is_some_and(|job| job.course.is_some()) {
            plan.with_course.insert(job_id);
        }
        plan.concerns_turns |= turn(state).or(turn(next)).is_some();
        let subject = subject(job_id, next, command);
        if let Some(next) = plan.add(&asked, subject, decision) {
            after.insert(job_id, next);
        }
    }
    let transitions = after.into_iter().map(|(job_id, after)| Transition {
        job_id,
        before: before(job_id),
        after,
    });
    plan.transitions = transitions.collect();
    plan
}

impl<'a> Plan<'a> {
    /// Adds what is decided about one message, and returns the next state of its job.
    fn add(
        &mut self,
        asked: &Asked<'a>,
        subject: Subject,
        decision: Decision<'a>,
    ) -> Option<State> {
        let Asked {
            place,
            job_id,
            command,
            has_waited,
        } = *asked;
        let Decision {
            next,
            publications,
            announcements,
            wait: time,
            time_series,
            gives_up_kept,
            event,
        } = decision;
        if gives_up_kept {
            self.given_up.push(job_id);
        }
        let refusal = refusal(command, &announcements);
        if !time.is_zero() {
            self.waits.push(Wait {
                place,
                time,
                refusal: refusal.clone(),
            });
        } else if announcements.iter().any(Publication::tells_outcome) {
            self.ending.insert(job_id);
        }
        self.publications.extend(publications);
        // A task is revoked at once, so it has been revoked already when the outcome's time comes.
        let is_now = |announcement: &Publication<'_>| match announcement.tells_outcome() {
            true => time.is_zero(),
            false => !has_waited,
        };
        self.announcements
            .extend(announcements.into_iter().filter(is_now));
        for change in time_series {
            self.series.note(job_id, change);
        }
        match event {
            // It was logged and counted before its message waited.
            Event::Ended(_) if has_waited => {}
            event => self.reports.push(Report {
                place,
                subject,
                command,
                event,
                refusal,
            }),
        }
        next
    }

    /// Whether all that is published is that submissions are accepted whose tasks wait for their turn.
    /// It is told once more when they come again, so the commit need not wait for its arrival.
    pub fn only_accepts(&self) -> bool {
        self.publications
            .iter()
            .all(|publication| match publication {
                Publication::Status { status, .. } => match status {
                    ClientStatus::Enqueued => true,
                    ClientStatus::Running | ClientStatus::Cancelled => false,
                },
                Publication::Task { .. }
                | Publication::Revoke { .. }
                | Publication::Progress { .. }
                | Publication::Result { .. } => false,
            })
    }

    /// The queues at which one task of the batch begins to wait for its turn, and only one: with its
    /// job.
    pub fn single_newcomers(&self) -> impl Iterator<Item = (&str, Uuid)> {
        let mut newcomers: BTreeMap<&str, Vec<Uuid>> = BTreeMap::new();
        for transition in &self.transitions {
            let State::Live(Job { course, .. }) = &transition.after else {
                continue;
            };
            let since_before = turn(transition.before).map(|turn| turn.since);
            if let Some(course) = course
                && let Some(Turn { since, grant: None }) = course.turn
                && since_before != Some(since)
            {
                let queue = course.step().task.as_str();
                newcomers.entry(queue).or_default().push(transition.job_id);
            }
        }
        let newcomers = newcomers.into_iter();
        newcomers.filter_map(|(queue, jobs)| match jobs[..] {
            [job] => Some((queue, job)),
            _ => None,
        })
    }

    /// The jobs whose tasks get an input ESDL that is in the database.
    pub fn jobs_that_need_their_input(&self) -> impl Iterator<Item = Uuid> {
        let publications = self.publications.iter();
        publications.filter_map(|publication| match publication {
            Publication::Task {
                job_id, assignment, ..
            } => (assignment.input == TaskInput::Kept).then_some(*job_id),
            Publication::Revoke { .. }
            | Publication::Status { .. }
            | Publication::Progress { .. }
            | Publication::Result { .. } => None,
        })
    }

    /// The jobs that end with this batch. A job that had ended before is not among them, even if
    /// its client may be told something else now.
    pub fn ended(&self) -> impl Iterator<Item = &Ended> {
        self.transitions.iter().filter_map(|transition| {
            match (transition.before, &transition.after) {
                (State::Ending(_) | State::Ended(_), _) | (_, State::Unknown | State::Live(_)) => {
                    None
                }
                (
                    State::Unknown | State::Live(_),
                    State::Ending(Ending { ended, .. }) | State::Ended(ended),
                ) => Some(ended),
            }
        })
    }
}

impl Plan<'_> {
    /// The attempts at jobs' steps that end with this batch, each with its workflow.
    pub fn ended_attempts(&self) -> impl Iterator<Item = (&str, &Attempt)> {
        self.transitions.iter().flat_map(|transition| {
            let ended_before = transition.before.job().map_or(0, ended_attempts);
            let job = transition.after.job();
            let course = job.and_then(|job| Some((job, job.course.as_ref()?)));
            let attempts = course.into_iter().flat_map(|(job, course)| {
                let attempts = course.attempts();
                attempts.map(move |attempt| (job.workflow_type.as_str(), attempt))
            });
            attempts
                .filter(|(_, attempt)| attempt.report.is_some())
                .skip(ended_before)
        })
    }
}

fn turn(state: &State) -> Option<&Turn> {
    state.job()?.course.as_ref()?.turn.as_ref()
}

fn ended_attempts(job: &Job) -> usize {
    job.course.as_ref().map_or(0, |course| {
        let attempts = course.attempts();
        attempts.filter(|attempt| attempt.report.is_some()).count()
    })
}

impl SeriesChanges {
    fn note(&mut self, job_id: Uuid, change: TimeSeries<'_>) {
        let (esdl_id, reference, rows) = match change {
            TimeSeries::Keep { esdl_id, reference } => (esdl_id, reference, &mut self.keep),
            TimeSeries::Hold { esdl_id, reference } => (esdl_id, reference, &mut self.hold),
            TimeSeries::RetireLate { esdl_id, reference } => {
                (esdl_id, reference, &mut self.retire_late)
            }
            TimeSeries::Retire => return self.retire.push(job_id),
            TimeSeries::RetireThese(esdl_ids) => {
                return self
                    .retire_these
                    .extend(esdl_ids.into_iter().map(|esdl_id| (job_id, esdl_id)));
            }
        };
        rows.push(Series {
            esdl_id,
            job_id,
            reference: reference.into_owned(),
        });
    }
}

fn subject(id: Uuid, state: &State, command: &Command) -> Subject {
    let reference = match state.reference() {
        "" => command.reference(),
        reference => reference,
    };
    let workflow = state.workflow_type().or(command.workflow_type());
    Subject {
        id,
        reference: reference.to_owned(),
        workflow: workflow.unwrap_or_default().to_owned(),
    }
}

/// The logs of a submission's refusal.
fn refusal(command: &Command, announcements: &[Publication<'_>]) -> Option<String> {
    let Command::Submit(_) = command else {
        return None;
    };
    announcements
        .iter()
        .find_map(|announcement| match announcement {
            Publication::Result { logs, .. } => Some(logs.clone().into_owned()),
            Publication::Task { .. }
            | Publication::Revoke { .. }
            | Publication::Status { .. }
            | Publication::Progress { .. } => None,
        })
}

/// The queue that a publication is for, if it is a task.
fn task_queue<'p>(publication: &'p Publication<'_>) -> Option<&'p str> {
    match publication {
        Publication::Task { assignment, .. } => Some(&assignment.task),
        Publication::Revoke { .. }
        | Publication::Status { .. }
        | Publication::Progress { .. }
        | Publication::Result { .. } => None,
    }
}

#[cfg(test)]
mod tests;
