//! Publishes the dead letters of messages that cannot be handled, in the vhost they came from.

use log::error;

use crate::broker::{Delivered, PublishError, Publisher, Received};
use crate::wire::{self, Outgoing};

/// Publishes dead letters, first declaring their queue unless that `is_there`. Returns for each why
/// it was not taken; only the source of one that was taken may be acknowledged.
///
/// # Errors
/// [`PublishError::Lost`] alone.
pub(super) fn publish(
    publisher: &mut Publisher<'_>,
    letters: &[Outgoing],
    is_there: bool,
) -> Result<Vec<Option<String>>, PublishError> {
    // A queue whose node hangs takes what is published and never confirms it.
    if !is_there && let Some(why) = declare(publisher)? {
        return Ok(vec![Some(why); letters.len()]);
    }
    let mut outcome = publish_once(publisher, letters)?;
    let gone: Vec<usize> = places(&outcome, Delivered::Unroutable);
    if !gone.is_empty() {
        // Somebody has deleted the queue since it was declared.
        if let Some(why) = declare(publisher)? {
            return reasons(publisher, &outcome, &why);
        }
        let again: Vec<_> = gone.iter().map(|place| letters[*place].clone()).collect();
        for (place, delivered) in gone.into_iter().zip(publish_once(publisher, &again)?) {
            outcome[place] = delivered;
        }
    }
    let unroutable = "it was deleted again right after it was declared";
    reasons(publisher, &outcome, unroutable)
}

fn reasons(
    publisher: &Publisher<'_>,
    outcome: &[Result<Delivered, String>],
    unroutable: &str,
) -> Result<Vec<Option<String>>, PublishError> {
    let unavailable = match places(outcome, Delivered::Rejected).is_empty() {
        true => None,
        false => publisher.look_for(&[wire::DEAD_LETTERS_QUEUE])?[0].why_unavailable(),
    };
    let rejected = unavailable.unwrap_or_else(|| "it takes nothing more".to_owned());
    let reason = |delivered: &Result<Delivered, String>| match delivered {
        Ok(Delivered::Yes) => None,
        Ok(Delivered::Unroutable) => Some(unroutable.to_owned()),
        Ok(Delivered::Rejected) => Some(rejected.clone()),
        Err(reason) => Some(reason.clone()),
    };
    Ok(outcome.iter().map(reason).collect())
}

fn places(outcome: &[Result<Delivered, String>], wanted: Delivered) -> Vec<usize> {
    let places = outcome.iter().enumerate();
    places
        .filter(|(_, delivered)| **delivered == Ok(wanted))
        .map(|(place, _)| place)
        .collect()
}

/// Declares the queue; returns why that is not possible for now.
fn declare(publisher: &Publisher<'_>) -> Result<Option<String>, PublishError> {
    match publisher.declare_dead_letters() {
        Ok(()) => Ok(None),
        Err(PublishError::Refused(why) | PublishError::Unavailable(why)) => Ok(Some(why)),
        Err(error @ PublishError::Lost(_)) => Err(error),
    }
}

/// Publishes the letters, each as whole as the broker takes it.
fn publish_once(
    publisher: &mut Publisher<'_>,
    letters: &[Outgoing],
) -> Result<Vec<Result<Delivered, String>>, PublishError> {
    match publisher.publish(letters) {
        Ok(outcome) => return Ok(outcome.into_iter().map(Ok).collect()),
        Err(PublishError::Refused(_) | PublishError::Unavailable(_)) => {}
        Err(error @ PublishError::Lost(_)) => return Err(error),
    }
    // AMQP says neither which one was refused nor which of the others arrived: better twice than
    // not at all.
    letters
        .iter()
        .map(|letter| {
            let mut outcome = publisher.publish(std::slice::from_ref(letter));
            // The broker's message size limit may have been lowered since this one arrived.
            if let Err(PublishError::Refused(reason)) = &outcome
                && let Some(cut) = wire::cut_letter(letter, reason)
            {
                error!("a dead letter has only the beginning of its message: {reason}");
                outcome = publisher.publish(&[cut]);
            }
            match outcome {
                Ok(outcome) => Ok(outcome.first().copied().ok_or_else(String::new)),
                Err(PublishError::Refused(why) | PublishError::Unavailable(why)) => Ok(Err(why)),
                Err(error @ PublishError::Lost(_)) => Err(error),
            }
        })
        .collect()
}

/// Returns messages to the end of the queue that they came from, and tells what became of each
/// copy. Only the originals of those that arrived may be acknowledged.
///
/// # Errors
/// [`PublishError::Lost`] alone.
pub(super) fn put_back(
    publisher: &mut Publisher<'_>,
    queue: &str,
    messages: &[&Received],
) -> Result<Vec<Delivered>, PublishError> {
    match publisher.put_back(queue, messages) {
        Ok(outcome) => Ok(outcome),
        Err(error @ PublishError::Lost(_)) => Err(error),
        Err(PublishError::Refused(_) | PublishError::Unavailable(_)) if messages.len() == 1 => {
            Ok(vec![Delivered::Rejected])
        }
        Err(PublishError::Refused(_) | PublishError::Unavailable(_)) => {
            let mut outcome = Vec::new();
            for message in messages {
                outcome.extend(put_back(publisher, queue, &[*message])?);
            }
            Ok(outcome)
        }
    }
}
