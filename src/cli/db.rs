//! `db`: the revision of the database's tables.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Subcommand;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::store::migrate::{self, Loss, REVISIONS, Revision};

use super::{Agreed, NOTHING_DONE, connect, say, say_aside};

#[derive(Subcommand)]
pub(super) enum Action {
    /// Apply revisions, by default all of them.
    Upgrade {
        /// The last revision to apply.
        revision: Option<String>,
    },
    /// Undo the revisions after the given one; `base` undoes all.
    ///
    /// Says which tables and columns go, with how much in them, and does it with --yes alone. No replica
    /// may be connected.
    Downgrade {
        /// The revision that is left as the last one, or `base`.
        revision: String,
        #[command(flatten)]
        agreed: Agreed,
    },
    /// Show the revision that the database is at.
    Current,
    /// List all revisions.
    History,
    /// Make a folder for a new revision in `migrations/`, on top of the last one.
    Revision {
        /// What it does, of which its folder gets its name.
        message: String,
    },
}

/// `config` is asked for where a command needs it.
///
/// # Errors
/// Postgres is not there, or a revision cannot be applied or undone.
pub(super) fn run(
    action: Action,
    config: impl FnOnce() -> anyhow::Result<Config>,
) -> anyhow::Result<ExitCode> {
    match action {
        Action::Upgrade { revision } => {
            let upgrade = |client: &mut _| migrate::upgrade(client, revision.as_deref());
            let applied = connect(&config()?)?.revisions(upgrade)?;
            report_revisions("applied", applied)?;
        }
        Action::Downgrade { revision, agreed } => {
            return downgrade(&config()?, &revision, agreed);
        }
        Action::Current => match connect(&config()?)?
            .revisions(migrate::current)?
            .checked_sub(1)
        {
            Some(last) if last + 1 == REVISIONS.len() => {
                say(format_args!("{} (head)", describe(&REVISIONS[last])))?;
            }
            Some(last) => say(format_args!("{}", describe(&REVISIONS[last])))?,
            None => say(format_args!("base"))?,
        },
        Action::History => {
            for revision in REVISIONS {
                say(format_args!("{}", describe(revision)))?;
            }
        }
        Action::Revision { message } => {
            let folder = new_revision(Path::new("migrations"), &message)?;
            say(format_args!("{}", folder.display()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn downgrade(config: &Config, revision: &str, agreed: Agreed) -> anyhow::Result<ExitCode> {
    let mut printed = Ok(());
    let agree = |losses: &[Loss]| {
        let mut losses = losses.iter();
        printed = losses.try_for_each(|loss| say(format_args!("{loss}")));
        agreed.yes
    };
    let downgrade = |client: &mut _| migrate::downgrade(client, revision, agree);
    let undone = connect(config)?.revisions(downgrade)?;
    printed?;
    match undone {
        Some(undone) => {
            report_revisions("undone", undone)?;
            Ok(ExitCode::SUCCESS)
        }
        None => {
            say_aside(format_args!("this is what would go; {NOTHING_DONE}"));
            Ok(ExitCode::FAILURE)
        }
    }
}

fn describe(revision: &Revision) -> String {
    format!("{} {}", revision.id, revision.slug.replace('_', " "))
}

fn report_revisions(what: &str, revisions: &[Revision]) -> anyhow::Result<()> {
    for revision in revisions {
        say(format_args!("{what} {}", describe(revision)))?;
    }
    if revisions.is_empty() {
        say(format_args!("nothing to do"))?;
    }
    Ok(())
}

/// Makes the folder of a revision that builds on the last one.
fn new_revision(migrations: &Path, message: &str) -> anyhow::Result<PathBuf> {
    if !migrations.is_dir() {
        bail!("there is no migrations/ here: run this where the sources are");
    }
    let head = REVISIONS.last().map_or("nothing", |revision| revision.id);
    let id = &uuid::Uuid::new_v4().simple().to_string()[..12];
    let slug = message
        .to_lowercase()
        .split(|character: char| !character.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join("_");
    if slug.is_empty() {
        bail!("the message {message:?} has no letter or digit to name the folder with");
    }
    let folder = migrations.join(format!("{id}_{slug}"));
    fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
    fs::write(folder.join("up.sql"), format!("-- Revises: {head}\n"))?;
    fs::write(folder.join("down.sql"), "")?;
    Ok(folder)
}
