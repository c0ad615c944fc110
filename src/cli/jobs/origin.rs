//! Who gives a command.

use std::fs;
use std::os::unix::fs::MetadataExt;

use omotes_orchestrator::domain::job::{Origin, Via};

/// The user and the host, for the story of a job.
pub(crate) fn origin() -> Origin {
    let user = ["SUDO_USER", "USER", "LOGNAME", "USERNAME"]
        .into_iter()
        .find_map(|name| std::env::var(name).ok().filter(|user| !user.is_empty()));
    let host = gethostname::gethostname();
    Origin::new(
        Via::CommandLine,
        user.or_else(system_user).as_deref(),
        Some(&host.to_string_lossy()),
    )
}

/// The system's name for whoever this process belongs to: in a container there are no variables with it.
fn system_user() -> Option<String> {
    let uid = fs::metadata("/proc/self").ok()?.uid();
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let named = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    });
    Some(named.unwrap_or_else(|| format!("user {uid}")))
}
