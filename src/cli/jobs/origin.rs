//! Who gives a command.

use omotes_orchestrator::domain::job::{Origin, Via};

/// The user and the host, for the story of a job; a container has no name for its user.
pub(crate) fn origin() -> Origin {
    let user = ["SUDO_USER", "USER", "LOGNAME", "USERNAME"]
        .into_iter()
        .find_map(|name| std::env::var(name).ok().filter(|user| !user.is_empty()));
    let host = gethostname::gethostname();
    Origin::new(
        Via::CommandLine,
        user.as_deref(),
        Some(&host.to_string_lossy()),
    )
}
