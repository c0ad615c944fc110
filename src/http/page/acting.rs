//! The forms by which operators act, and the pages that ask again before something is destroyed. Only
//! whoever may act is shown any of it.

use maud::{Markup, html};
use uuid::Uuid;

pub(in crate::http) use super::layout::Acting;
use super::layout::{Frame, Sheet, refused};
use super::letters;
pub(in crate::http) use super::letters::Letter;
use super::submit::{field, is_faulty};
use crate::actions::jobs::Matching;
use crate::actions::letters::Names;
use crate::actions::{TOLD, counted};
use crate::domain::overview::{Filter, JobState, JobView, Overview, QueueView};
use crate::domain::worker::{WorkerState, WorkerView};
use crate::http::form::{Back, Shown, Whole, carried};
use crate::http::submission::Filled;
use crate::proto::WorkflowParameter;
use crate::telemetry::report::{harmless, one_line, readable};

/// Jobs and letters that a page of confirmation names.
pub(in crate::http) const NAMED: usize = TOLD;

impl Acting {
    /// A form of these fields and buttons.
    fn form(&self, content: Markup) -> Markup {
        html! {
            // Firefox would give a row's form the hidden fields that the row at its place had before.
            form.act method="post" action="/act" autocomplete="off" {
                input type="hidden" name="token" value=(self.token);
                (self.back())
                (content)
            }
        }
    }

    fn back(&self) -> Markup {
        let (name, value) = self.back_field();
        html! { @if !value.is_empty() { input type="hidden" name=(name) value=(value); } }
    }

    fn back_field(&self) -> (&'static str, String) {
        match &self.back {
            Back::List(filter) => ("list", filter.query(filter.offset)),
            Back::Job(id) => ("job", id.to_string()),
        }
    }

    /// The page that asks again, for these fields.
    fn confirmation(&self, fields: &[(&str, &str)]) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.extend_pairs(fields);
        let (name, value) = self.back_field();
        // What matches is in the list's own field already.
        if !fields.iter().any(|(field, _)| *field == name) && !value.is_empty() {
            query.append_pair(name, &value);
        }
        format!("/confirm?{}", query.finish())
    }

    /// What can be done about a job, wherever it is shown.
    fn about_job(&self, job: &JobView) -> Markup {
        if !matches!(job.state, JobState::Live(_)) {
            return html! {};
        }
        let name = job_name(job);
        let id = job.id.to_string();
        // A list has room for the sign only.
        let face = |sign: &str, text: &str| {
            html! { span.icon aria-hidden="true" { (sign) } span.label { (text) } }
        };
        let button = |verb: &str, sign: &str, text: &str| {
            html! {
                button name="do" value=(verb) title=(text) aria-label={ (text) ": " (name) } { (face(sign, text)) }
            }
        };
        html! {
            @if let Some(turn) = &job.turn {
                (self.form(html! {
                    input type="hidden" name="id" value=(id);
                    @if turn.on_hold { (button("release", "▸", "Release")) } @else {
                        (button("first", "↑", "Move first"))
                        (button("hold", "‖", "Hold"))
                    }
                }))
            }
            a.button href=(self.confirmation(&[("do", "cancel"), ("id", &id)])) title="Cancel…"
                aria-label={ "Cancel: " (name) } { (face("✕", "Cancel…")) }
        }
    }

    /// In the list's last column.
    pub(super) fn cell(&self, job: &JobView) -> Markup {
        html! { td.does { div.actions { (self.about_job(job)) } } }
    }

    /// On a job's own page.
    pub(super) fn job(&self, job: &JobView) -> Markup {
        html! {
            div.actions {
                (self.about_job(job))
                @if job.turn.is_some() {
                    (self.form(html! {
                        input type="hidden" name="id" value=(job.id);
                        label { "Priority "
                            select name="level" {
                                @for level in ["high", "medium", "low"] {
                                    option value=(level) selected[is_level(job, level)] { (level) }
                                }
                            }
                        }
                        button name="do" value="priority" { "Set priority" }
                    }))
                }
            }
        }
    }

    /// To the form for another run of a job whose input is kept.
    pub(super) fn again(&self, job: &JobView) -> Markup {
        let id = job.id.to_string();
        html! { a.button href=(self.confirmation(&[("do", "again"), ("id", &id)])) { "Run again…" } }
    }

    /// Below the list: all that match its filter. Some of them may wait for their turn, where `turns` says
    /// that there are any that do.
    pub(super) fn matching(&self, filter: &Filter, total: i64, turns: bool) -> Markup {
        let all = filter.query(0);
        let link = |whole: Whole, text: &str| {
            let fields = [("do", whole.verb()), ("list", &all)];
            html! { a.button href=(self.confirmation(&fields)) { (text) } }
        };
        html! {
            @if !filter.finished && total > 0 {
                div.actions role="group" aria-label="All that match" {
                    span.dim { "All that match: " }
                    @if turns { (link(Whole::Hold, "Hold…")) (link(Whole::Release, "Release…")) }
                    (link(Whole::Cancel, "Cancel…"))
                }
            }
        }
    }

    /// In the last column of the queues with limits.
    pub(super) fn queue(&self, queue: &QueueView) -> Markup {
        let name = one_line(&queue.name);
        let (verb, text) = match queue.limit.is_paused {
            true => ("resume", "Resume"),
            false => ("pause", "Pause"),
        };
        html! { td.does { div.actions {
            (self.form(html! {
                input type="hidden" name="queue" value=(queue.name);
                button name="do" value=(verb) aria-label={ (text) ": " (name) } { (text) }
            }))
            (self.form(html! {
                input type="hidden" name="queue" value=(queue.name);
                (limit_fields(&name))
            }))
        } } }
    }

    /// Below them: any task queue.
    pub(super) fn any_queue(&self, overview: &Overview) -> Markup {
        let mut names: Vec<&str> = Vec::new();
        for workflow in &overview.defined {
            match overview.tasks.get(workflow) {
                Some(tasks) => names.extend(tasks.iter().map(String::as_str)),
                None => names.push(workflow),
            }
        }
        names.sort_unstable();
        names.dedup();
        html! {
            @if !names.is_empty() {
                details { summary { "Pause or limit a task queue" }
                    (self.form(html! {
                        label { "Task queue "
                            select name="queue" {
                                @for name in names { option value=(name) { (harmless(name)) } }
                            }
                        }
                        button name="do" value="pause" { "Pause" }
                        button name="do" value="resume" { "Resume" }
                        (limit_fields("the task queue"))
                    }))
                }
            }
        }
    }

    /// In the last column of the workers.
    pub(super) fn worker(&self, worker: &WorkerView) -> Markup {
        let action = match worker.state {
            WorkerState::Idle | WorkerState::Busy | WorkerState::BusyAndDeaf => {
                Some(("drain", "Drain"))
            }
            WorkerState::Draining | WorkerState::Drained => Some(("send-back", "Resume")),
            WorkerState::Silent | WorkerState::Gone => None,
        };
        html! { td.does { @if let Some((verb, text)) = action {
            (self.form(html! {
                input type="hidden" name="worker" value=(worker.host);
                button name="do" value=(verb) aria-label={ (text) ": " (one_line(&worker.host)) } { (text) }
            }))
        } } }
    }

    /// Below the dead letters.
    pub(super) fn letters(&self) -> Markup {
        html! { a.button href=(self.confirmation(&[("do", "requeue")])) { "Requeue…" } }
    }
}

fn limit_fields(name: &str) -> Markup {
    html! {
        label { "Window " input name="window" size="8" placeholder="unchanged"
            aria-label={ "Window of " (name) }; }
        label { "Running " input name="max_running" size="8" placeholder="unchanged"
            aria-label={ "Most that run, of " (name) }; }
        button name="do" value="limit" aria-label={ "Set limits of " (name) }
            title="A number of tasks, unlimited, or default." { "Set" }
    }
}

fn is_level(job: &JobView, level: &str) -> bool {
    let now = job.priority.unwrap_or_default();
    now.name().eq_ignore_ascii_case(level)
}

fn job_name(job: &JobView) -> String {
    match job.reference.is_empty() {
        true => job.id.to_string(),
        false => one_line(&job.reference),
    }
}

/// What it is asked again before.
struct Asked<'a> {
    whole: Whole,
    jobs: &'a [JobView],
    /// The jobs, and others.
    count: usize,
    /// Why it is asked once more.
    notice: Option<&'a str>,
    /// Those of the form.
    fields: Markup,
}

/// Asks again before something is done to these jobs.
fn asking(frame: &Frame<'_>, acting: &Acting, asked: &Asked<'_>) -> String {
    let Asked {
        whole,
        jobs,
        count,
        notice,
        fields,
    } = asked;
    let count = *count;
    let (verb, follows, none) = match whole {
        Whole::Cancel => (
            "Cancel",
            "Their workers stop, and what they have computed is lost. Clients are told that they were cancelled.",
            "There is none that has not ended.",
        ),
        Whole::Hold => (
            "Hold",
            "They wait until they are released, whatever their queues allow. What runs goes on.",
            "There is none that waits for its turn and is not on hold.",
        ),
        Whole::Release => (
            "Release",
            "They wait for their turn again.",
            "There is none that is on hold.",
        ),
    };
    let what = format!("{verb} {}", counted(count, "job"));
    let class = match whole {
        Whole::Cancel => "danger",
        Whole::Hold | Whole::Release => "primary",
    };
    let named = &jobs[..jobs.len().min(NAMED)];
    let content = html! {
        @if let Some(notice) = notice { p.alarm role="alert" { (notice) } }
        h1 { (what) "?" }
        p { (follows) }
        ul { @for job in named { li {
            a href={ "/jobs/" (job.id) } { (job_name(job)) } " "
            span.dim { (harmless(job.workflow.as_deref().unwrap_or("–"))) ", " (harmless(&job.state_text())) }
        } } }
        @if count > named.len() { p.dim { "and " (count - named.len()) " more" } }
        @if count == 0 { p { (none) } } @else {
            (acting.form(html! { (fields) button class=(class) { (what) } }))
        }
        (leave(acting))
    };
    Sheet::new(format!("{verb}?"), content).document(frame)
}

fn leave(acting: &Acting) -> Markup {
    html! { p { a href=(acting.back.path()) { "← leave everything as it is" } } }
}

pub(in crate::http) fn confirm_cancel(
    frame: &Frame<'_>,
    acting: &Acting,
    jobs: &[JobView],
) -> String {
    let fields = html! {
        input type="hidden" name="do" value="cancel";
        @for job in jobs { input type="hidden" name="id" value=(job.id); }
    };
    let asked = Asked {
        whole: Whole::Cancel,
        jobs,
        count: jobs.len(),
        notice: None,
        fields,
    };
    asking(frame, acting, &asked)
}

pub(in crate::http) fn confirm_matching(
    frame: &Frame<'_>,
    acting: &Acting,
    whole: Whole,
    found: &Matching,
    shown: &Shown,
    notice: Option<&str>,
) -> String {
    let fields = html! {
        input type="hidden" name="do" value=(whole.verb());
        input type="hidden" name="shown" value=(shown.digest);
        input type="hidden" name="at" value=(shown.at.as_microsecond());
        @if let Some(set) = carried(&found.ids) { input type="hidden" name="set" value=(set); }
    };
    let asked = Asked {
        whole,
        jobs: &found.first,
        count: found.ids.len(),
        notice,
        fields,
    };
    asking(frame, acting, &asked)
}

/// Asks which dead letters are requeued.
pub(in crate::http) fn confirm_requeue(
    frame: &Frame<'_>,
    acting: &Acting,
    first: &[Letter],
    names: &Names,
    digest: &str,
    notice: Option<&str>,
) -> String {
    let count = names.all.len();
    let what = counted(count, "dead letter");
    let requeue = |letter: &Letter| {
        let alike = names
            .all
            .iter()
            .filter(|name| **name == letter.name)
            .count();
        let text = match alike {
            1 => "Requeue this one".to_owned(),
            alike => format!("Requeue the {alike} that are alike"),
        };
        acting.form(html! {
            input type="hidden" name="letter" value=(letter.name);
            button name="do" value="requeue"
                aria-label={ (text) ": " (one_line(names.shown(&letter.name))) } { (text) }
        })
    };
    let content = html! {
        @if let Some(notice) = notice { p.alarm role="alert" { (notice) } }
        h1 { "Requeue " (what) "?" }
        p { "They go back to the queues they came from, as they were, and are handled again." }
        @if count == 0 { p { "There is none, or somebody else is looking at them now." } } @else {
            (letters::table(first, names, Some(&requeue)))
            (acting.form(html! {
                input type="hidden" name="shown" value=(digest);
                button name="do" value="requeue" { "Requeue " (what) }
            }))
        }
        (leave(acting))
    };
    Sheet::new("Requeue?", content).document(frame)
}

/// Another run of a job that is asked for.
pub(in crate::http) struct Rerun<'a> {
    pub(in crate::http) id: Uuid,
    pub(in crate::http) workflow: &'a str,
    pub(in crate::http) reference: &'a str,
    pub(in crate::http) definitions: &'a [WorkflowParameter],
    pub(in crate::http) filled: &'a Filled,
    /// Why what was filled in is refused.
    pub(in crate::http) faults: &'a [String],
}

/// Asks with which parameters a job is to run again.
pub(in crate::http) fn confirm_again(
    frame: &Frame<'_>,
    acting: &Acting,
    rerun: &Rerun<'_>,
) -> String {
    let Rerun {
        id,
        workflow,
        reference,
        definitions,
        filled,
        faults,
    } = rerun;
    let name = match reference.is_empty() {
        true => format!("job {id}"),
        false => one_line(reference),
    };
    let content = html! {
        h1 { "Run " (name) " again?" }
        @if !faults.is_empty() {
            div.alarm #faults tabindex="-1" role="alert" {
                p { b { "Nothing was submitted." } }
                ul { @for fault in *faults { li { (readable(fault)) } } }
            }
        }
        p { "It becomes a new job of " (one_line(workflow)) ", with the same ESDL, reference, priority and timeout. "
            "No client waits for its output: it is on the new job's page as long as KEEP_RESULTS_SEC says." }
        form.fields method="post" action="/act" autocomplete="off" {
            input type="hidden" name="token" value=(acting.token);
            input type="hidden" name="do" value="again";
            input type="hidden" name="id" value=(id);
            input type="hidden" name="job" value=(id);
            // The same form that is sent twice asks for one job.
            input type="hidden" name="at" value=(frame.now.as_microsecond());
            @for (place, parameter) in definitions.iter().enumerate() {
                (field(place, parameter, filled, is_faulty(faults, &parameter.key_name)))
            }
            div { button.primary { "Run again" } }
        }
        (leave(acting))
    };
    Sheet::new("Run again?", content).document(frame)
}

/// A job that a confirmation was asked for is not there.
pub(in crate::http) fn gone(ids: &[Uuid]) -> String {
    let ids: Vec<_> = ids.iter().map(Uuid::to_string).collect();
    refused(
        "Nothing to cancel",
        &format!("job {} has ended, or is unknown", ids.join(", ")),
    )
}
