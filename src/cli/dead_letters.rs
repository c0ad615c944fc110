//! `dead-letters`: the messages that could not be handled, of both vhosts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand};
use comfy_table::{Cell, CellAlignment, ColumnConstraint};
use omotes_orchestrator::actions::counted;
use omotes_orchestrator::actions::letters::{self, Letters, Names};
use omotes_orchestrator::broker::dead_letters::{DeadLetter, Fate};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::text::to_the_second;
use omotes_orchestrator::domain::vhost::Vhost;
use omotes_orchestrator::telemetry::report::{harmless, one_line, readable};
use omotes_orchestrator::wire;

use super::{Agreed, NOTHING_DONE, print, say, say_aside, table, told_of};

/// Whoever runs the command may interrupt it.
const PATIENCE: Duration = Duration::from_hours(24);

/// What the reason says of one whose content cannot be read.
const UNDECODABLE: &str = "failed to decode";
const COMES_BACK: &str = "what could not be decoded comes straight back if it is put back: `dead-letters show` has \
                          it, `drop` deletes it";

#[derive(Subcommand)]
pub(super) enum Action {
    /// List them, a line each: id, time, connection, queue, size, reason.
    List,
    /// Show one of them: its reason, the message's properties, and the beginning of its body.
    Show {
        /// The id, or an unambiguous beginning of it.
        id: String,
        /// File for the whole body.
        #[arg(long)]
        body: Option<PathBuf>,
    },
    /// Put them back into the queues they came from, unchanged.
    Requeue(Which),
    /// Delete them; all of them with --yes alone.
    Drop {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        agreed: Agreed,
    },
}

#[derive(Args)]
#[group(required = true, multiple = false)]
pub(super) struct Which {
    /// Their ids, or unambiguous beginnings.
    ids: Vec<String>,
    /// All that are there now.
    #[arg(long)]
    all: bool,
}

/// # Errors
/// RabbitMQ is not there, or an id names no letter.
pub(super) fn run(config: &Config, action: &Action) -> anyhow::Result<ExitCode> {
    let letters = told_of("RabbitMQ", || Letters::open(config, PATIENCE))?;
    let unasked = match action {
        Action::Drop { which, agreed } => which.all && !agreed.yes,
        Action::List | Action::Show { .. } | Action::Requeue(_) => false,
    };
    let known = known_letters(&letters, unasked || matches!(action, Action::List))?;
    let is_about_all = match action {
        Action::List => true,
        Action::Requeue(which) | Action::Drop { which, .. } => which.all,
        Action::Show { .. } => false,
    };
    if is_about_all && known.all.is_empty() {
        say_aside(format_args!("there are no dead letters"));
    }
    if unasked && !known.all.is_empty() {
        would_delete(known.all.len());
        return Ok(ExitCode::FAILURE);
    }
    let code = match action {
        Action::List => ExitCode::SUCCESS,
        Action::Show { id, body } => {
            let name = letters::named(id, &known.all)?;
            show(&letters, &name, body.as_deref())?;
            ExitCode::SUCCESS
        }
        Action::Requeue(which) => settle(&letters, (which, &known), Fate::Requeue)?,
        Action::Drop { which, .. } => settle(&letters, (which, &known), Fate::Drop)?,
    };
    letters.close()?;
    Ok(code)
}

/// Does it with these, and says what became of each. Exits with 1 if one stays.
fn settle(
    letters: &Letters,
    (which, known): (&Which, &Names),
    fate: Fate,
) -> anyhow::Result<ExitCode> {
    let names = which.resolve(&known.all)?;
    let mut code = ExitCode::SUCCESS;
    let mut settled = Vec::new();
    let outcome = letters.settle(&names, known, fate, &mut settled);
    for letter in settled {
        match letter.failure {
            None => say(format_args!("{letter}"))?,
            Some(_) => {
                say_aside(format_args!("{letter}"));
                code = ExitCode::FAILURE;
            }
        }
    }
    outcome?;
    Ok(code)
}

fn show(letters: &Letters, name: &str, body: Option<&Path>) -> anyhow::Result<()> {
    let mut shown = Ok(());
    let mut count = 0;
    letters.look(|vhost, letter| {
        if letters::name(vhost, letter) == name {
            count += 1;
            if count == 1 {
                shown = show_letter(vhost, letter, body);
            }
        }
    })?;
    shown?;
    match count {
        0 | 1 => Ok(()),
        more => say(format_args!("copies:     {more}, alike in all")),
    }
}

fn would_delete(letters: usize) {
    let letters = counted(letters, "dead letter");
    say_aside(format_args!("this would delete {letters}; {NOTHING_DONE}"));
}

/// The names of all dead letters; they are printed if they are to be listed.
fn known_letters(letters: &Letters, listed: bool) -> anyhow::Result<Names> {
    let mut known = Vec::new();
    let mut rows = Vec::new();
    let mut has_undecodable = false;
    letters.look(|vhost, letter| {
        known.push(letters::name(vhost, letter));
        let reason = one_line(&letter.reason);
        has_undecodable |= reason.contains(UNDECODABLE);
        rows.push([
            Cell::new(to_the_second(&letter.time)),
            Cell::new(vhost.name()),
            Cell::new(one_line(&letter.queue)),
            Cell::new(letter.body.len()).set_alignment(CellAlignment::Right),
            Cell::new(reason),
        ]);
    })?;
    let known = Names::new(known);
    if listed && !known.all.is_empty() {
        let mut table = table(&["id", "time", "connection", "queue", "bytes", "reason"]);
        for (name, cells) in known.all.iter().zip(rows) {
            let id = Cell::new(one_line(known.shown(name)));
            table.add_row(std::iter::once(id).chain(cells));
        }
        // Ids are copied.
        if let Some(ids) = table.column_mut(0) {
            ids.set_constraint(ColumnConstraint::ContentWidth);
        }
        print(&format!("{}\n", table.trim_fmt()))?;
        if has_undecodable {
            say_aside(format_args!("{COMES_BACK}"));
        }
    }
    Ok(known)
}

impl Which {
    /// The selected letters among the known ones.
    fn resolve(&self, known: &[String]) -> anyhow::Result<Vec<String>> {
        if self.all {
            return Ok(known.to_vec());
        }
        Ok(letters::all_named(&self.ids, known, letters::named)?)
    }
}

fn show_letter(vhost: Vhost, letter: &DeadLetter, body: Option<&Path>) -> anyhow::Result<()> {
    /// How much of the body is printed, in bytes.
    const PREVIEW: usize = 500;
    say(format_args!("id:         {}", one_line(&letter.id)))?;
    say(format_args!("time:       {}", one_line(&letter.time)))?;
    say(format_args!(
        "queue:      {} ({})",
        one_line(&letter.queue),
        vhost.name()
    ))?;
    say(format_args!("reason:     {}", harmless(&letter.reason)))?;
    if !letter.cut.is_empty() {
        say(format_args!("cut:        {}", harmless(&letter.cut)))?;
    }
    say(format_args!(
        "properties: {}",
        readable(&format!("{:#}", letter.properties))
    ))?;
    if let Some(job) = wire::job_id(&letter.body) {
        say(format_args!("job:        {job}"))?;
    }
    let size = letter.body.len();
    match body {
        Some(file) => {
            fs::write(file, &letter.body).with_context(|| file.display().to_string())?;
            say(format_args!(
                "body:       {size} bytes, in {}",
                file.display()
            ))?;
        }
        None => {
            let preview = letter.body[..size.min(PREVIEW)].escape_ascii();
            let more = if size > PREVIEW { "…" } else { "" };
            say(format_args!("body:       {size} bytes: {preview}{more}"))?;
        }
    }
    Ok(())
}
