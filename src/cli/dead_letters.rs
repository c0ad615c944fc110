//! `dead-letters`: the messages that could not be handled, of both vhosts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use omotes_orchestrator::broker::Link;
use omotes_orchestrator::broker::dead_letters::{self, DeadLetter, Fate};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::vhost::Vhost;
use omotes_orchestrator::telemetry::report::{harmless, one_line, readable};
use omotes_orchestrator::wire;

use super::{Agreed, NOTHING_DONE, say, say_aside, told_of};

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
    let mut links = vec![(
        Vhost::Sdk,
        told_of("RabbitMQ", || {
            Link::open(&config.sdk_rabbitmq, "dead letters")
        })?,
    )];
    if config.task_rabbitmq != config.sdk_rabbitmq {
        links.push((
            Vhost::Task,
            Link::open(&config.task_rabbitmq, "dead letters")?,
        ));
    }
    let unasked = match action {
        Action::Drop { which, agreed } => which.all && !agreed.yes,
        Action::List | Action::Show { .. } | Action::Requeue(_) => false,
    };
    let known = known_letters(&links, unasked || matches!(action, Action::List))?;
    if unasked && !known.is_empty() {
        would_delete(known.len());
        return Ok(ExitCode::FAILURE);
    }
    let (which, fate, done) = match action {
        Action::List => return Ok(ExitCode::SUCCESS),
        Action::Show { id, .. } => (vec![named(id, &known)?], Fate::Leave, "shown"),
        Action::Requeue(which) => (which.resolve(known)?, Fate::Requeue, "requeued"),
        Action::Drop { which, .. } => (which.resolve(known)?, Fate::Drop, "dropped"),
    };
    let mut code = ExitCode::SUCCESS;
    for (vhost, link) in links {
        let mut meant = Vec::new();
        let mut shown = Ok(());
        let failed = dead_letters::go_through(&link, |letter| {
            if !which.contains(&letter.id) {
                return Fate::Leave;
            }
            if let Action::Show { body, .. } = action {
                shown = show_letter(vhost, letter, body.as_deref());
            }
            meant.push(letter.id.clone());
            fate
        })?;
        shown?;
        for id in meant.iter().filter(|_| fate != Fate::Leave) {
            match failed.get(id) {
                None => say(format_args!("{id}: {done}"))?,
                Some(why) => {
                    say_aside(format_args!("{id}: it stays, for {why}"));
                    code = ExitCode::FAILURE;
                }
            }
        }
        link.close()?;
    }
    Ok(code)
}

fn would_delete(letters: usize) {
    let noun = if letters == 1 { "letter" } else { "letters" };
    say_aside(format_args!(
        "this would delete {letters} dead {noun}; {NOTHING_DONE}"
    ));
}

/// The ids of all dead letters; a line for each is printed if they are to be listed.
fn known_letters(links: &[(Vhost, Link)], listed: bool) -> anyhow::Result<Vec<String>> {
    let mut known = Vec::new();
    for (vhost, link) in links {
        let mut printed = Ok(());
        dead_letters::go_through(link, |letter| {
            if listed && printed.is_ok() {
                printed = say(format_args!(
                    "{} {} {} {} {} bytes: {}",
                    one_line(&letter.id),
                    one_line(&letter.time),
                    vhost.name(),
                    one_line(&letter.queue),
                    letter.body.len(),
                    one_line(&letter.reason)
                ));
            }
            known.push(letter.id.clone());
            Fate::Leave
        })?;
        printed?;
    }
    Ok(known)
}

impl Which {
    /// The selected letters among the known ones.
    fn resolve(&self, known: Vec<String>) -> anyhow::Result<Vec<String>> {
        if self.all {
            return Ok(known);
        }
        self.ids.iter().map(|id| named(id, &known)).collect()
    }
}

/// The one of `known` with this beginning.
fn named(beginning: &str, known: &[String]) -> anyhow::Result<String> {
    let mut fitting = known.iter().filter(|id| id.starts_with(beginning));
    match (fitting.next(), fitting.next()) {
        (Some(id), None) => Ok(id.clone()),
        (Some(_), Some(_)) => bail!("{beginning:?} is the beginning of several ids"),
        (None, _) => bail!("there is no dead letter {beginning:?}"),
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
