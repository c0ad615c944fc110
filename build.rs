//! Generates what the sources include: the protobuf messages of `src/proto/omotes.proto`, the chain of
//! database revisions found in `migrations/`, and of which commit this is.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    println!("cargo::rerun-if-changed=src/proto/omotes.proto");
    println!("cargo::rerun-if-changed=migrations");
    println!("cargo::rustc-env=OMOTES_BUILD={}", build());
    let messages = protox::compile(["src/proto/omotes.proto"], ["src/proto"])?;
    prost_build::Config::new()
        .enable_type_names()
        .compile_fds(messages)?;

    let chain = revision_chain(Path::new("migrations"))?;
    let mut code = String::from("&[\n");
    for revision in chain {
        let folder = fs::canonicalize(&revision.folder)?;
        writeln!(
            code,
            "    Revision {{ id: {:?}, slug: {:?}, up: include_str!({:?}), down: include_str!({:?}) }},",
            revision.id,
            revision.slug,
            folder.join("up.sql"),
            folder.join("down.sql"),
        )?;
    }
    code.push(']');
    fs::write(
        PathBuf::from(env::var("OUT_DIR")?).join("revisions.rs"),
        code,
    )?;
    Ok(())
}

/// What follows the version: the commit, as far as it is known. `OMOTES_COMMIT` names it where there is no
/// repository, as in an image. A debug build does not look for it, which would build all anew at each commit.
fn build() -> String {
    println!("cargo::rerun-if-env-changed=OMOTES_COMMIT");
    let given = env::var("OMOTES_COMMIT").unwrap_or_default();
    let is_release = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let commit = match given.trim() {
        "" if is_release => described(),
        "" => return " (debug build)".to_owned(),
        given => Some(given.to_owned()),
    };
    commit.map_or_else(String::new, |commit| format!(" ({commit})"))
}

/// What git says of the sources; None without git or without a repository of theirs.
fn described() -> Option<String> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").ok()?);
    // A repository around it that knows nothing of it is another one.
    git(&root, &["ls-files", "--error-unmatch", "build.rs"])?;
    for file in ["HEAD", "logs/HEAD"] {
        let path = root.join(git(&root, &["rev-parse", "--git-path", file])?);
        // Cargo takes one that is missing for changed.
        if path.exists() {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }
    println!("cargo::rerun-if-changed=src");
    git(&root, &["describe", "--always", "--dirty", "--tags"])
}

fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    let mut git = Command::new("git");
    let output = git.arg("-C").arg(root).args(arguments).output().ok()?;
    if !output.status.success() {
        return None;
    }
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (!text.is_empty()).then_some(text)
}

struct Revision {
    id: String,
    slug: String,
    revises: String,
    folder: PathBuf,
}

/// The folders of `migrations/` in the order in which they build on each other. Each `up.sql`
/// names the revision it builds on in its first line, `-- Revises: <id>`; the first one says
/// `nothing`.
fn revision_chain(directory: &Path) -> Result<Vec<Revision>, Failure> {
    let mut by_parent = HashMap::new();
    for entry in fs::read_dir(directory)? {
        let folder = entry?.path();
        if !folder.is_dir() {
            // What explains them.
            continue;
        }
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let (id, slug) = name
            .split_once('_')
            .ok_or_else(|| format!("migrations/{name}: expected <revision>_<slug>"))?;
        let up = fs::read_to_string(folder.join("up.sql"))?;
        let revises = up
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("-- Revises: "))
            .ok_or_else(|| {
                format!("migrations/{name}/up.sql: its first line must be `-- Revises: <revision>`")
            })?
            .trim()
            .to_owned();
        let revision = Revision {
            id: id.to_owned(),
            slug: slug.to_owned(),
            revises: revises.clone(),
            folder: folder.clone(),
        };
        if let Some(other) = by_parent.insert(revises, revision) {
            return Err(format!(
                "migrations: {name} and {}_{} both revise {}; the chain must not fork",
                other.id, other.slug, other.revises
            )
            .into());
        }
    }
    let mut chain: Vec<Revision> = Vec::new();
    let mut parent = "nothing".to_owned();
    while let Some(revision) = by_parent.remove(&parent) {
        parent.clone_from(&revision.id);
        chain.push(revision);
    }
    if let Some(stray) = by_parent.values().next() {
        return Err(format!(
            "migrations: {}_{} revises {}, which is not in the chain",
            stray.id, stray.slug, stray.revises
        )
        .into());
    }
    Ok(chain)
}
