//! Where the output ESDL of a job goes.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write, stdout};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tempfile::NamedTempFile;

/// Where an output ESDL goes, and can go: that is certain before there is one.
#[derive(Debug)]
pub(super) enum Output {
    /// Standard output, after all else.
    Printed,
    /// A new file that takes the place of what is at `path` as a whole, and only once it is complete.
    File { path: PathBuf, new: NamedTempFile },
    /// What cannot be replaced: a pipe, a device, a file in a folder where no other can be made.
    Inside { path: PathBuf, file: File },
}

impl Output {
    /// # Errors
    /// There is no such folder, or nothing can be written there; the error names the path.
    pub(super) fn to(path: &Path) -> anyhow::Result<Output> {
        Output::open(path).with_context(|| path.display().to_string())
    }

    fn open(path: &Path) -> anyhow::Result<Output> {
        // Opened once more, it would be written from its beginning where the shell has sent it to a file.
        let standard_output = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"];
        if standard_output.iter().any(|one| path == Path::new(one)) {
            return Ok(Output::Printed);
        }
        let given = path.to_owned();
        let old = fs::metadata(path).ok();
        if old.as_ref().is_some_and(fs::Metadata::is_dir) {
            bail!("it is a folder");
        }
        // /dev/fd/3 is a regular file where the shell has sent it to one.
        let is_file = old.as_ref().is_none_or(fs::Metadata::is_file) && !is_of_the_system(path);
        if !is_file {
            let file = OpenOptions::new().append(true).open(path)?;
            return Ok(Output::Inside { path: given, file });
        }
        // Whoever has put a link there wants it kept.
        let place = match &old {
            Some(_) => fs::canonicalize(path)?,
            None => given.clone(),
        };
        let folder = match place.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            Some(_) | None => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(".").suffix(".part");
        #[cfg(unix)]
        builder.permissions(permissions(old.as_ref()));
        match (builder.tempfile_in(folder), &old) {
            (Ok(new), Some(_)) => {
                // That it can be written is no matter of its folder.
                OpenOptions::new().append(true).open(&place)?;
                Ok(Output::File { path: place, new })
            }
            (Ok(new), None) => Ok(Output::File { path: place, new }),
            (Err(_), Some(_)) => Ok(Output::Inside {
                file: OpenOptions::new().write(true).open(&place)?,
                path: given,
            }),
            // The error of the file itself, which does not name another.
            (Err(_), None) => {
                let opened = OpenOptions::new().write(true).create_new(true).open(&place);
                drop(opened?);
                fs::remove_file(&place)?;
                bail!("no file can be made beside it")
            }
        }
    }

    /// Writes the output, and says where to.
    pub(super) fn write(self, esdl: &str) -> anyhow::Result<Option<String>> {
        let size = esdl.len();
        let (path, written) = match self {
            Output::Printed => {
                let mut out = stdout();
                let printed = writeln!(out, "{esdl}").and_then(|()| out.flush());
                return match printed {
                    // Its reader has had enough, as `head` has.
                    Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
                    Ok(()) | Err(_) => Ok(None),
                };
            }
            Output::File { path, mut new } => {
                let written = new.write_all(esdl.as_bytes()).and_then(|()| {
                    new.as_file().sync_all()?;
                    new.persist(&path)?;
                    Ok(())
                });
                (path, written)
            }
            Output::Inside { path, mut file } => {
                let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
                let is_replaced = is_file && !is_of_the_system(&path);
                let emptied = if is_replaced { file.set_len(0) } else { Ok(()) };
                let written = emptied.and_then(|()| file.write_all(esdl.as_bytes()));
                (path, written)
            }
        };
        written.with_context(|| path.display().to_string())?;
        let said = format!("output ESDL: {} ({size} bytes)", path.display());
        Ok(Some(said))
    }
}

/// Whether what is there stands for something else, such as a file that somebody writes into already.
fn is_of_the_system(path: &Path) -> bool {
    path.starts_with("/dev") || path.starts_with("/proc")
}

/// Those of a file that takes the place of `old`: its own, or what is usual.
#[cfg(unix)]
fn permissions(old: Option<&fs::Metadata>) -> fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    old.map_or_else(
        // Of which the process's umask is taken away.
        || fs::Permissions::from_mode(0o666),
        fs::Metadata::permissions,
    )
}
