//! What RabbitMQ means by what it says when it closes a channel.

use anyhow::anyhow;
use thiserror::Error;

use crate::wire::TASK_QUEUE_MAX_PRIORITY;

/// Why a message is not published, or a queue not declared.
#[derive(Debug, Error)]
pub enum PublishError {
    /// The broker refuses one of the messages for what it is. Which of the others arrived is not
    /// known. The publisher can be used again.
    #[error("{0}")]
    Refused(String),
    /// A queue is unavailable for now.
    #[error("{0}")]
    Unavailable(String),
    /// The connection is lost.
    #[error(transparent)]
    Lost(anyhow::Error),
}

/// AMQP's PRECONDITION_FAILED: a message above the size limit, a queue with other arguments.
pub(super) const PRECONDITION_FAILED: u16 = 406;
/// AMQP's NOT_FOUND.
pub(super) const NOT_FOUND: u16 = 404;
/// The meaning of a queue type that RabbitMQ applies by default, which OMOTES's services never
/// name.
const DEFAULT_QUEUE_TYPE: &str = "the vhost's default queue type is not classic, as OMOTES needs it: \
     rabbitmqctl update_vhost_metadata VHOST --default-queue-type classic changes that, and where \
     RabbitMQ has no such command, making the vhost anew with rabbitmqctl add_vhost";
/// AMQP's RESOURCE_LOCKED: a queue is somebody's alone.
pub(super) const RESOURCE_LOCKED: u16 = 405;
/// AMQP's ACCESS_REFUSED, no rights on a queue, and RESOURCE_LOCKED.
pub(super) const NOT_OURS: [u16; 2] = [403, RESOURCE_LOCKED];

/// The code and the text with which the broker closed the channel.
pub(super) fn closed(error: &amiquip::Error) -> Option<(u16, &str)> {
    match error {
        amiquip::Error::ServerClosedChannel { code, message, .. } => Some((*code, message)),
        _ => None,
    }
}

/// Why a queue takes nothing for now, in the broker's words.
pub(super) fn unavailable(message: &str) -> String {
    format!("it is not available: {message}")
}

/// Whether a queue does not exist, according to the broker's answer to a question about it. What it
/// says of one whose node is down, or whose process has crashed, has the same code.
pub(super) fn is_missing(code: u16, message: &str) -> bool {
    code == NOT_FOUND && message.contains("no queue '")
}

/// Its text, if a message or an argument was refused.
pub(super) fn refusal(error: &amiquip::Error) -> Option<&str> {
    closed(error)
        .filter(|(code, _)| *code == PRECONDITION_FAILED)
        .map(|(_, message)| message)
}

/// Whether the cause is the vhost's default queue type: quorum queues have no priorities, and a
/// queue that exists as a classic one counts as declared otherwise.
fn is_default_queue_type(message: &str) -> bool {
    let no_priorities = message.contains("invalid arg 'x-max-priority'")
        && message.contains("of queue type rabbit_");
    no_priorities || message.contains("inequivalent arg 'x-queue-type'")
}

/// Whether a declaration without arguments was refused only because the queue is a quorum queue, or has an
/// argument that such queues are given, as RabbitMQ does by default.
pub(super) fn is_replicated(error: &amiquip::Error) -> bool {
    let message = refusal(error).unwrap_or_default();
    is_replicated_by(message)
}

/// The same of RabbitMQ's words.
pub fn is_replicated_by(message: &str) -> bool {
    let argument = message
        .split_once("inequivalent arg '")
        .and_then(|(_, rest)| rest.split_once('\''));
    let Some((argument, rest)) = argument else {
        return false;
    };
    match argument {
        "x-queue-type" => {
            let current = rest
                .split_once("but current is")
                .map(|(_, current)| current);
            current.is_some_and(|current| current.contains("'quorum'"))
        }
        "x-delivery-limit" | "x-quorum-initial-group-size" | "x-queue-leader-locator" => true,
        argument => argument.starts_with("x-dead-letter-"),
    }
}

/// The error of a declaration, with the remedy where that is known.
pub(super) fn explained(error: amiquip::Error) -> anyhow::Error {
    match closed(&error) {
        Some((PRECONDITION_FAILED, message)) if is_default_queue_type(message) => {
            anyhow!(error).context(DEFAULT_QUEUE_TYPE)
        }
        Some(_) | None => anyhow!(error),
    }
}

/// The meaning of the broker's refusal to declare a task queue.
pub(super) fn task_queue_refusal(queue: &str, code: u16, message: &str) -> PublishError {
    match code {
        // It exists on a node of the cluster that is down.
        NOT_FOUND => PublishError::Unavailable(unavailable(message)),
        PRECONDITION_FAILED if is_default_queue_type(message) => PublishError::Refused(format!(
            "the task queue {queue:?} cannot be declared with x-max-priority = \
                 {TASK_QUEUE_MAX_PRIORITY}, as its workers do: {DEFAULT_QUEUE_TYPE} ({message})"
        )),
        PRECONDITION_FAILED => PublishError::Refused(format!(
            "the task queue {queue:?} exists, but not as durable with x-max-priority = \
             {TASK_QUEUE_MAX_PRIORITY}: {message}"
        )),
        _ => PublishError::Refused(format!("the task queue {queue:?} is not ours: {message}")),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(
        "'x-queue-type'",
        "received none but current is the value 'quorum' of type 'longstr'",
        true
    )]
    #[case("'x-queue-type'", "received 'classic' but current is 'quorum'", true)]
    #[case(
        "'x-delivery-limit'",
        "received none but current is the value '20' of type 'long'",
        true
    )]
    #[case(
        "'x-dead-letter-exchange'",
        "received none but current is the value ''",
        true
    )]
    #[case("'x-queue-type'", "received 'quorum' but current is 'classic'", false)]
    #[case("'x-message-ttl'", "received none but current is the value '5'", false)]
    #[case("'durable'", "received 'true' but current is 'false'", false)]
    fn what_makes_it_a_quorum_queue_is_no_fault(
        #[case] argument: &str,
        #[case] words: &str,
        #[case] expected: bool,
    ) {
        let message = format!(
            "PRECONDITION_FAILED - inequivalent arg {argument} for queue 'w' in vhost 'v': {words}"
        );
        assert_eq!(is_replicated_by(&message), expected);
    }

    /// What RabbitMQ says; the first four are of RabbitMQ 3.10.
    #[rstest]
    #[case::no_priorities(
        406,
        "PRECONDITION_FAILED - invalid arg 'x-max-priority' for queue 'w' in vhost 'v' of queue type \
         rabbit_quorum_queue",
        "default queue type"
    )]
    #[case::exists_as_classic(
        406,
        "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'w' in vhost 'v': received \
         'quorum' but current is 'classic'",
        "default queue type"
    )]
    #[case::other_arguments(
        406,
        "PRECONDITION_FAILED - inequivalent arg 'x-max-priority' for queue 'w' in vhost 'v': received \
         the value '10' of type 'signedint' but current is none",
        "exists, but not as durable"
    )]
    #[case::somebodys_alone(
        405,
        "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'w' in vhost 'v'",
        "is not ours"
    )]
    #[case::no_rights(403, "ACCESS_REFUSED - access to queue 'w' refused", "is not ours")]
    fn a_task_queue_that_is_refused_is_explained(
        #[case] code: u16,
        #[case] message: &str,
        #[case] expected: &str,
    ) {
        match task_queue_refusal("w", code, message) {
            PublishError::Refused(why) => {
                assert!(why.contains(expected), "{why}");
                assert!(why.contains("the task queue \"w\""), "{why}");
                assert!(why.contains(message), "{why}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[rstest]
    #[case::missing("NOT_FOUND - no queue 'w' in vhost 'v'", true)]
    #[case::node_down(
        "NOT_FOUND - home node 'rabbit@b' of durable queue 'w' in vhost 'v' is down or inaccessible",
        false
    )]
    #[case::crashed(
        "NOT_FOUND - queue 'w' in vhost 'v' process is stopped by supervisor",
        false
    )]
    #[case::timeout(
        "NOT_FOUND - failed to perform operation on queue 'w' in vhost 'v' due to timeout",
        false
    )]
    fn a_queue_that_is_missing_is_not_one_that_is_down(
        #[case] message: &str,
        #[case] missing: bool,
    ) {
        assert_eq!(is_missing(404, message), missing);
        assert!(!is_missing(405, message));
    }

    #[rstest]
    #[case(
        "NOT_FOUND - home node 'rabbit@b' of durable queue 'w' in vhost 'v' is down or inaccessible"
    )]
    #[case("NOT_FOUND - queue 'w' in vhost 'v' process is stopped by supervisor")]
    fn a_task_queue_that_is_not_there_may_come_back(#[case] message: &str) {
        let refusal = task_queue_refusal("w", 404, message);
        assert!(
            matches!(refusal, PublishError::Unavailable(_)),
            "{refusal:?}"
        );
    }
}
