//! Dead letters: copies of messages that could not be handled, with the reason.

use jiff::Timestamp;
use serde_json::{Map, Value};

use super::outgoing::to_clients;
use super::{DEAD_LETTERS_QUEUE, Outgoing};

/// A message that could not be handled, as it was and with what is known of it in its headers.
/// `properties` are the original's, as JSON; `time` is now.
pub fn dead_letter(
    queue: &str,
    reason: &str,
    time: Timestamp,
    properties: Map<String, Value>,
    body: Vec<u8>,
) -> Outgoing {
    /// Headers have to fit into one frame, 128 KiB by RabbitMQ's default. As AMQP writes them they
    /// may be three times as long as their JSON.
    const MAX_PROPERTIES: usize = 24 * 1024;
    const MAX_REASON: usize = 2000;
    let size = serde_json::to_vec(&properties).map_or(usize::MAX, |json| json.len());
    let properties = if size <= MAX_PROPERTIES {
        Value::Object(properties)
    } else {
        format!("left out: {size} bytes").into()
    };
    let reason: String = reason.chars().take(MAX_REASON).collect();
    let headers = [
        ("queue", Value::from(queue)),
        ("reason", reason.into()),
        ("time", time.to_string().into()),
        ("properties", properties),
    ];
    Outgoing {
        exchange: "",
        headers: headers
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        // The message that it is made of is gone once it is confirmed.
        mandatory: true,
        ..to_clients(DEAD_LETTERS_QUEUE.to_owned(), body)
    }
}

/// A dead letter that the broker refuses, with the beginning of its body only; None where that is
/// all of it. `why` is what the broker said.
pub fn cut_letter(letter: &Outgoing, why: &str) -> Option<Outgoing> {
    /// Less than any limit for messages that lets jobs through.
    const KEPT: usize = 8 * 1024;
    let kept = letter.body.get(..KEPT)?;
    let mut headers = letter.headers.clone();
    let size = letter.body.len();
    let cut = format!("the first {KEPT} of {size} bytes: {why}");
    headers.insert("cut".to_owned(), cut.into());
    Some(Outgoing {
        exchange: letter.exchange,
        routing_key: letter.routing_key.clone(),
        mandatory: letter.mandatory,
        with_message_id: letter.with_message_id,
        content_type: letter.content_type,
        content_encoding: letter.content_encoding,
        priority: letter.priority,
        correlation_id: letter.correlation_id.clone(),
        reply_to: letter.reply_to.clone(),
        headers,
        body: kept.to_vec(),
    })
}
