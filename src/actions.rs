//! What operators do to jobs, queues and dead letters. The command line and the status page ask for
//! it in their ways, and both say of it what is said here; draining a worker is in
//! [`crate::service::workers`].

pub mod jobs;
pub mod letters;
pub mod queues;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// It cannot be done, whoever asks.
    #[error("{0}")]
    Refused(String),
    /// A service has failed; the text says what is certain all the same.
    #[error("{0:#}")]
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::Failed(error)
    }
}

impl From<crate::store::StoreError> for Failure {
    fn from(error: crate::store::StoreError) -> Failure {
        Failure::Failed(error.into())
    }
}

/// `1 job`, `2 jobs`.
pub fn counted(count: usize, noun: &str) -> String {
    match count {
        1 => format!("1 {noun}"),
        count => format!("{count} {noun}s"),
    }
}
