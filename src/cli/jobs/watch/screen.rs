//! What is on the screen of `jobs watch`, and what keys do about it. Knows no terminal.

use std::borrow::Cow;

use console::{strip_ansi_codes, truncate_str};
use crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use jiff::Timestamp;
use omotes_orchestrator::domain::overview::{JobView, Page};
use omotes_orchestrator::telemetry::report::one_line;
use uuid::Uuid;

use super::super::facts;
use super::Selection;
use crate::cli::jobs::list;

/// Lines beside those of jobs: a title, a heading, and what is said below.
const FRAME: u16 = 3;
const KEYS: &str = "q quit  / filter  f finished  Enter show  c cancel";

/// A line of the screen.
pub(super) enum Line {
    Plain(String),
    Marked(String),
    Dim(String),
}

/// What is to be done after a key.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Stay,
    End,
    /// Something else is to be listed.
    Look,
    Cancel(Uuid),
}

enum Mode {
    List,
    /// Typing what to list.
    Filter(String),
    /// Asked whether to cancel this job.
    Cancel(Uuid),
    /// Looking at one job.
    Job(Uuid),
}

pub(super) struct Screen {
    list: Selection,
    page: Option<(Page, Timestamp)>,
    selected: Option<Uuid>,
    /// The first job that is shown, and how many are.
    top: usize,
    height: usize,
    mode: Mode,
    said: String,
}

impl Screen {
    pub(super) fn new(list: Selection) -> Screen {
        Screen {
            list,
            page: None,
            selected: None,
            top: 0,
            height: 1,
            mode: Mode::List,
            said: String::new(),
        }
    }

    /// What is to be listed.
    pub(super) fn list(&self) -> &Selection {
        &self.list
    }

    pub(super) fn show(&mut self, page: Page, now: Timestamp) {
        let before = self.place();
        self.page = Some((page, now));
        if self.place_of(self.selected).is_none() {
            // Whatever is now in its place.
            self.select(before);
        }
    }

    pub(super) fn say(&mut self, text: String) {
        self.said = text;
    }

    fn jobs(&self) -> &[JobView] {
        self.page.as_ref().map_or(&[], |(page, _)| &page.jobs)
    }

    fn place_of(&self, id: Option<Uuid>) -> Option<usize> {
        let id = id?;
        self.jobs().iter().position(|job| job.id == id)
    }

    fn place(&self) -> usize {
        self.place_of(self.selected).unwrap_or(0)
    }

    fn select(&mut self, place: usize) {
        let last = self.jobs().len().saturating_sub(1);
        self.selected = self.jobs().get(place.min(last)).map(|job| job.id);
    }

    /// What a key does.
    pub(super) fn take(&mut self, event: Event) -> Step {
        let Event::Key(key) = event else {
            // The size has changed, perhaps.
            return Step::Stay;
        };
        if key.kind == KeyEventKind::Release {
            return Step::Stay;
        }
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return match key.code {
                KeyCode::Char('c' | 'd') => Step::End,
                _ => Step::Stay,
            };
        }
        self.said.clear();
        match std::mem::replace(&mut self.mode, Mode::List) {
            Mode::List => self.in_list(key),
            Mode::Filter(text) => self.in_filter(text, key),
            Mode::Cancel(id) => match key.code {
                KeyCode::Char('y' | 'Y') => {
                    self.say(format!("asking job {id} to end"));
                    Step::Cancel(id)
                }
                _ => {
                    self.say("nothing was cancelled".to_owned());
                    Step::Stay
                }
            },
            // Any key leads back.
            Mode::Job(_) => Step::Stay,
        }
    }

    fn in_list(&mut self, key: KeyEvent) -> Step {
        let place = self.place();
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Step::End,
            KeyCode::Up | KeyCode::Char('k') => self.select(place.saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => self.select(place + 1),
            KeyCode::PageUp => self.select(place.saturating_sub(self.height)),
            KeyCode::PageDown | KeyCode::Char(' ') => self.select(place + self.height),
            KeyCode::Home | KeyCode::Char('g') => self.select(0),
            KeyCode::End | KeyCode::Char('G') => self.select(usize::MAX),
            KeyCode::Char('/') => {
                self.mode = Mode::Filter(self.list.text.clone().unwrap_or_default());
            }
            KeyCode::Char('f') => {
                self.list.finished = !self.list.finished;
                // Of those that have ended none is in a state of those that have not.
                self.list.state = None;
                return Step::Look;
            }
            KeyCode::Enter => {
                if let Some(id) = self.selected {
                    self.mode = Mode::Job(id);
                }
            }
            KeyCode::Char('c') => self.ask_whether_to_cancel(),
            _ => {}
        }
        Step::Stay
    }

    fn ask_whether_to_cancel(&mut self) {
        match self.selected {
            None => self.say("there is no job to cancel".to_owned()),
            Some(_) if self.list.filter().finished => {
                self.say("these jobs have ended already".to_owned());
            }
            Some(id) => self.mode = Mode::Cancel(id),
        }
    }

    fn in_filter(&mut self, mut text: String, key: KeyEvent) -> Step {
        match key.code {
            KeyCode::Enter => {
                self.list.text = Some(text).filter(|text| !text.is_empty());
                return Step::Look;
            }
            KeyCode::Esc => {
                self.list.text = None;
                return Step::Look;
            }
            KeyCode::Backspace => drop(text.pop()),
            KeyCode::Char(character) => text.push(character),
            _ => {}
        }
        self.mode = Mode::Filter(text);
        Step::Stay
    }

    /// As many lines as the screen has.
    pub(super) fn lines(&mut self, columns: u16, rows: u16, now: Timestamp) -> Vec<Line> {
        self.height = usize::from(rows.saturating_sub(FRAME)).max(1);
        let cut = |text: &str| truncate_str(text, columns.into(), "…").into_owned();
        let mut lines = vec![Line::Dim(cut(&self.title(now)))];
        match self.mode {
            Mode::Job(id) => {
                lines.extend(self.job(id, now).iter().map(|line| Line::Plain(cut(line))))
            }
            Mode::List | Mode::Filter(_) | Mode::Cancel(_) => {
                lines.extend(self.body(now).into_iter().map(
                    |(text, is_selected)| match is_selected {
                        true => Line::Marked(cut(&text)),
                        false => Line::Plain(cut(&text)),
                    },
                ));
            }
        }
        let last = usize::from(rows.saturating_sub(1));
        lines.truncate(last);
        lines.resize_with(last, || Line::Plain(String::new()));
        lines.push(self.last_line(cut));
        lines
    }

    fn title(&self, now: Timestamp) -> String {
        let kind = match self.list.filter().finished {
            true => "ended",
            false => "waiting or running",
        };
        let text = match &self.list.text {
            Some(text) => format!(", with {}", one_line(text)),
            None => String::new(),
        };
        match &self.page {
            None => format!("looking for jobs{text}"),
            Some((page, at)) => {
                let place = match page.jobs.is_empty() {
                    true => 0,
                    false => self.place() + 1,
                };
                let age = now.duration_since(*at).as_secs();
                let age = if age > 5 {
                    format!(", as of {age} s ago")
                } else {
                    String::new()
                };
                format!("{place}/{} jobs {kind}{text}{age}", page.total)
            }
        }
    }

    /// The heading and the jobs that fit, and which of them is selected.
    fn body(&mut self, now: Timestamp) -> Vec<(String, bool)> {
        let Some((page, _)) = &self.page else {
            return Vec::new();
        };
        if page.jobs.is_empty() {
            return vec![(self.list.nothing().to_owned(), false)];
        }
        let text = list::lines(&page.jobs, &self.list, now);
        let place = self.place();
        let highest = (place + 1).saturating_sub(self.height);
        self.top = self.top.clamp(highest, place.max(highest));
        let mut lines = text.lines();
        let heading = lines.next().unwrap_or_default().to_owned();
        let jobs = lines.enumerate().skip(self.top).take(self.height);
        let jobs = jobs.map(|(number, line)| (line.to_owned(), number == place));
        [(heading, false)].into_iter().chain(jobs).collect()
    }

    fn job(&self, id: Uuid, now: Timestamp) -> Vec<String> {
        let mut jobs = self.jobs().iter();
        let Some(job) = jobs.find(|job| job.id == id) else {
            return vec![format!("job {id} is no longer in the list")];
        };
        let mut lines = vec![format!("{:<19}{id}", "job")];
        if let Some(why) = &job.why {
            lines.push(format!("{:<19}{}", "why", why.sentence));
            let facts = why.evidence.iter();
            lines.extend(facts.map(|fact| format!("{:<19}- {fact}", "")));
        }
        for (name, value) in facts(job, now) {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                lines.push(format!("{name:<19}{}", strip_ansi_codes(&value)));
            }
        }
        lines
    }

    fn last_line(&self, cut: impl Fn(&str) -> String) -> Line {
        let text: Cow<'_, str> = match &self.mode {
            Mode::Filter(text) => format!("/{text}_  (Enter lists, Esc lists all)").into(),
            Mode::Cancel(id) => {
                let mut jobs = self.jobs().iter();
                let reference = jobs
                    .find(|job| job.id == *id)
                    .map(|job| one_line(&job.reference));
                let reference = reference.unwrap_or_default();
                format!("cancel job {id} {reference}? y cancels it, any other key does not").into()
            }
            Mode::List | Mode::Job(_) if !self.said.is_empty() => self.said.as_str().into(),
            Mode::List => KEYS.into(),
            Mode::Job(_) => "any key leads back".into(),
        };
        Line::Dim(cut(&text))
    }
}
