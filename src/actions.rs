//! What operators do to jobs, queues and dead letters. The command line and the status page ask for
//! it in their ways, and both say of it what is said here; draining a worker is in
//! [`crate::service::workers`].

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use uuid::{Builder, Uuid};

pub mod again;
pub use crate::domain::text::counted;

pub mod jobs;
pub mod letters;
pub mod names;
pub mod queues;
pub mod submission;

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

/// A job's id, of version 5, that is always the same for these names: what is asked for once more by a
/// browser is then submitted once.
pub fn derived_id(namespace: Uuid, names: &[&[u8]]) -> Uuid {
    let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
    context.update(namespace.as_bytes());
    for name in names {
        context.update(name);
    }
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&context.finish().as_ref()[..16]);
    Builder::from_sha1_bytes(bytes).into_uuid()
}

/// Names a set of ids, in whatever order they are: what somebody agrees to is what they were shown.
pub fn digest(ids: impl IntoIterator<Item = impl AsRef<[u8]>>) -> String {
    let mut ids: Vec<_> = ids.into_iter().collect();
    ids.sort_unstable_by(|one, other| one.as_ref().cmp(other.as_ref()));
    let mut context = Context::new(&SHA256);
    for id in &ids {
        let id = id.as_ref();
        context.update(&u64::try_from(id.len()).unwrap_or(u64::MAX).to_be_bytes());
        context.update(id);
    }
    BASE64_URL_SAFE_NO_PAD.encode(context.finish())
}

/// Jobs and letters that a line of the log or a page names.
pub const TOLD: usize = 20;

/// The first of them.
pub fn bounded(texts: &[String], between: &str) -> String {
    let mut text = texts[..texts.len().min(TOLD)].join(between);
    if let Some(more) = texts.len().checked_sub(TOLD).filter(|more| *more > 0) {
        text += &format!("{between}and {more} more");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[test]
    fn an_id_is_derived_as_everywhere() {
        let dns = "6ba7b810-9dad-11d1-80b4-00c04fd430c8".parse().unwrap();
        let id = derived_id(dns, &[b"python", b".org"]);
        assert_eq!(id.to_string(), "886313e1-3b8a-5372-9b90-0c9aee199e5d");
    }

    #[rstest]
    #[case::in_another_order(&["b", "a"], true)]
    #[case::one_for_another(&["a", "c"], false)]
    #[case::one_more(&["a", "b", "b"], false)]
    #[case::one_less(&["a"], false)]
    #[case::none(&[], false)]
    #[case::run_together(&["ab", ""], false)]
    #[case::run_together_too(&["ab"], false)]
    fn a_digest_is_of_one_set(#[case] ids: &[&str], #[case] is_same: bool) {
        assert_eq!(digest(ids) == digest(["a", "b"]), is_same);
    }
}
