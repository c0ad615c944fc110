//! Why a batch did not go through.

use std::any::Any;

use anyhow::bail;
use thiserror::Error;

use super::panic_text;
use crate::broker::PublishError;
use crate::store::StoreError;

/// Why a batch did not go through.
pub(super) enum Trouble {
    /// Postgres does not work for this replica; the same batch may succeed later.
    Database(anyhow::Error),
    /// Postgres works, but somebody else holds a lock: another replica would fare no better.
    Locked(anyhow::Error),
    /// A smaller batch may succeed.
    TooMuch(anyhow::Error),
    /// A task queue takes nothing for now. The batch succeeds without its messages, or with tasks
    /// of new ids.
    Closed,
    /// Something in the batch is refused.
    Refused { reason: String, by: Refuser },
    /// The session is ending.
    Session(anyhow::Error),
    /// The service is stopping and the batch is not done.
    Stopped,
}

/// Why a session ends of which the log has the cause already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("what is in hand is left to other replicas until Postgres works again")]
pub struct ForWantOfPostgres;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refuser {
    Broker,
    Database,
    /// A panic.
    Ourselves,
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Transient(error) | StoreError::TooLong(error) => Trouble::Database(error),
            StoreError::Locked(error) => Trouble::Locked(error),
            StoreError::TooMuch(error) => Trouble::TooMuch(error),
            StoreError::Refused(reason) => Trouble::Refused {
                reason,
                by: Refuser::Database,
            },
        }
    }
}

impl From<PublishError> for Trouble {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::Lost(error) => Trouble::Session(error),
            PublishError::Refused(reason) | PublishError::Unavailable(reason) => Trouble::Refused {
                reason,
                by: Refuser::Broker,
            },
        }
    }
}

impl Trouble {
    /// What remains to do about trouble that retrying does not help.
    pub(super) fn end(self) -> anyhow::Result<()> {
        match self {
            Trouble::Stopped => Ok(()),
            Trouble::Session(error)
            | Trouble::Database(error)
            | Trouble::Locked(error)
            | Trouble::TooMuch(error) => Err(error),
            Trouble::Closed => bail!("a queue takes nothing"),
            Trouble::Refused { reason, .. } => bail!(reason),
        }
    }
}

/// What is said about a message that made us panic.
pub(super) fn fault_in_ourselves(panic: &(dyn Any + Send)) -> String {
    format!("a fault in the orchestrator: {}", panic_text(panic))
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    /// What a session adds to it does not hide it, and no other end is taken for it.
    #[test]
    fn a_session_that_ends_for_want_of_postgres_is_known_by_it() {
        let error = anyhow!("no space").context(ForWantOfPostgres);
        assert!(
            error
                .context("connections: closed")
                .is::<ForWantOfPostgres>()
        );
        assert!(
            !anyhow!("Postgres")
                .context("the connection was lost")
                .is::<ForWantOfPostgres>()
        );
    }
}
