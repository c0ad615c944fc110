//! Generates what the sources include: the protobuf messages of `src/proto/omotes.proto` and the
//! chain of database revisions found in `migrations/`.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    println!("cargo::rerun-if-changed=src/proto/omotes.proto");
    println!("cargo::rerun-if-changed=migrations");
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
