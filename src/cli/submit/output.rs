//! Where the output ESDL of a job goes.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write, stdout};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tempfile::NamedTempFile;

/// Where an output ESDL goes; that it can be written is checked before there is one.
#[derive(Debug)]
pub(in crate::cli) enum Output {
    /// Standard output, after all else.
    Printed,
    /// A new file that replaces the one at `path` atomically, once it is complete.
    File { path: PathBuf, new: NamedTempFile },
    /// What cannot be replaced: a pipe, a device, a file in a folder where no other can be made.
    Inside { path: PathBuf, file: File },
}

impl Output {
    /// # Errors
    /// There is no such folder, or nothing can be written there; the error names the path.
    pub(in crate::cli) fn to(path: &Path) -> anyhow::Result<Output> {
        Output::open(path).with_context(|| path.display().to_string())
    }

    fn open(path: &Path) -> anyhow::Result<Output> {
        // If the shell has redirected it to a file, opening it again would overwrite from the
        // beginning.
        let standard_output = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"];
        if standard_output.iter().any(|one| path == Path::new(one)) {
            return Ok(Output::Printed);
        }
        let given = path.to_owned();
        let old = fs::metadata(path).ok();
        if old.as_ref().is_some_and(fs::Metadata::is_dir) {
            bail!("it is a folder");
        }
        // /dev/fd/3 is a regular file if the shell has redirected it to one.
        let is_file = old.as_ref().is_none_or(fs::Metadata::is_file) && !is_of_the_system(path);
        if !is_file {
            let file = OpenOptions::new().append(true).open(path)?;
            return Ok(Output::Inside { path: given, file });
        }
        // A symbolic link is kept; its target is replaced.
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
                // The file's own permissions decide, not its folder's.
                OpenOptions::new().append(true).open(&place)?;
                Ok(Output::File { path: place, new })
            }
            (Ok(new), None) => Ok(Output::File { path: place, new }),
            (Err(_), Some(_)) => Ok(Output::Inside {
                file: OpenOptions::new().write(true).open(&place)?,
                path: given,
            }),
            // The file's own error, not that of the temporary file.
            (Err(_), None) => {
                let opened = OpenOptions::new().write(true).create_new(true).open(&place);
                drop(opened?);
                fs::remove_file(&place)?;
                bail!("no file can be made beside it")
            }
        }
    }

    /// Writes the output, and says where to.
    pub(in crate::cli) fn write(self, esdl: &str) -> anyhow::Result<Option<String>> {
        let size = esdl.len();
        let (path, written) = match self {
            Output::Printed => {
                let mut out = stdout();
                let printed = writeln!(out, "{esdl}").and_then(|()| out.flush());
                return match printed {
                    // Its reader has gone, as `head` does.
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

/// Whether the path stands for something else, such as a file that is being written already.
fn is_of_the_system(path: &Path) -> bool {
    path.starts_with("/dev") || path.starts_with("/proc")
}

/// The permissions of a file that replaces `old`: the same, or the usual ones.
#[cfg(unix)]
fn permissions(old: Option<&fs::Metadata>) -> fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    old.map_or_else(
        // The process's umask is subtracted from these.
        || fs::Permissions::from_mode(0o666),
        fs::Metadata::permissions,
    )
}
