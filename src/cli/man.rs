//! `man`: the manual, a page for each command.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use clap_mangen::Man;

use super::{complete, print, say};

#[derive(Args)]
pub(crate) struct Manual {
    /// The command, such as `jobs list`; without one it is the page of the program.
    command: Vec<String>,
    /// Write the pages of all commands into this folder, such as /usr/local/share/man/man1.
    #[arg(long, value_name = "FOLDER", conflicts_with = "command")]
    all: Option<PathBuf>,
}

/// # Errors
/// There is no such command, or the folder cannot be written to.
pub(crate) fn run(manual: &Manual) -> anyhow::Result<ExitCode> {
    let mut root = complete::commands();
    root.build();
    if let Some(folder) = &manual.all {
        clap_mangen::generate_to(root, folder).with_context(|| folder.display().to_string())?;
        say(format_args!("the pages are in {}", folder.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut command = &root;
    for name in &manual.command {
        command = command
            .find_subcommand(name)
            .with_context(|| format!("there is no command {}", manual.command.join(" ")))?;
    }
    let mut page = Vec::new();
    Man::new(command.clone()).render(&mut page)?;
    print(&String::from_utf8_lossy(&page))?;
    Ok(ExitCode::SUCCESS)
}
