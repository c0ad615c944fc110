//! The dead letters of a vhost, for the operator who looks after them.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use amiquip::{AmqpProperties, AmqpValue, Confirm, Delivery, FieldTable, Publish};
use anyhow::Context;
use serde_json::{Map, Value};

use super::link::give_back;
use super::publisher::OpenChannel;
use super::values::{amqp_to_json, without_copies};
use super::{DEADLINE, Link};
use crate::wire::DEAD_LETTERS_QUEUE;

/// A message that could not be handled; [`crate::wire::dead_letter`] wrote it, or RabbitMQ has put it there,
/// as it was, after too many deliveries.
pub struct DeadLetter {
    /// Its own message id, by which commands name it.
    pub id: String,
    /// The queue that the message came from.
    pub queue: String,
    pub reason: String,
    pub time: String,
    /// The original message's properties, as far as they were set; without what RabbitMQ changes at each
    /// delivery.
    pub properties: Value,
    pub body: Vec<u8>,
    /// If the body was cut: how much of it is missing, and why.
    pub cut: String,
}

/// What to do with a letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Leave,
    /// Back to the queue it came from, as it was.
    Requeue,
    Drop,
}

/// Goes once through the dead letters of a vhost and does with each what `fate` says. Returns why
/// some could not be requeued, with their places among all, from 0; these stay. Letters that somebody else is
/// looking at are not among them.
///
/// # Errors
/// The connection is lost. What was not requeued or dropped by then stays.
pub fn go_through(
    link: &Link,
    mut fate: impl FnMut(&DeadLetter) -> Fate,
) -> anyhow::Result<Vec<(usize, String)>> {
    // As it was declared, possibly with other arguments.
    link.declare_dead_letters()?;
    let channel = link.channel()?;
    let mut publishing = Publishing { link, open: None };
    let mut failed = Vec::new();
    let mut places = 0..;
    // Those that have been put at the end, where they are met once more.
    let mut renewed: HashMap<Letter, usize> = HashMap::new();
    // Not by the number that RabbitMQ tells: of a quorum queue it is that of a moment ago.
    for _ in 0..MOST {
        let Some(got) = channel.basic_get(DEAD_LETTERS_QUEUE, false)? else {
            break;
        };
        let delivery = &got.delivery;
        let met = renewed.get_mut(&Letter::of(delivery));
        if let Some(again) = met.filter(|count| **count > 0) {
            *again -= 1;
            continue;
        }
        let letter = DeadLetter::read(&delivery.properties, &delivery.body);
        let place = places.next();
        match fate(&letter) {
            Fate::Leave if is_worn(&delivery.properties) => {
                let fresh = unworn(&delivery.properties);
                if publishing.renew(fresh, &delivery.body) {
                    *renewed.entry(Letter::of(delivery)).or_default() += 1;
                    got.ack(&channel)?;
                }
            }
            // It returns to its place.
            Fate::Leave => {}
            Fate::Drop => got.ack(&channel)?,
            Fate::Requeue => {
                let original = original_properties(&delivery.properties);
                match publishing.requeue(&letter, &original)? {
                    None => got.ack(&channel)?,
                    Some(why) => failed.extend(place.map(|place| (place, why))),
                }
            }
        }
    }
    if let Some(open) = publishing.open {
        open.channel.close()?;
    }
    give_back(channel).context("going through the dead letters")?;
    Ok(failed)
}

/// Letters that are looked at, if they come faster than that.
const MOST: u32 = 1_000_000;

/// RabbitMQ gives a message of a quorum queue up after a number of deliveries, 20 unless it is told
/// otherwise, and looking at it is one. After half as many a letter is put in the place of itself.
const WORN: u64 = 10;
const DELIVERIES: &str = "x-delivery-count";

fn is_worn(properties: &AmqpProperties) -> bool {
    let headers = properties.headers().as_ref();
    let count = headers.and_then(|headers| headers.get(DELIVERIES));
    count.and_then(|count| amqp_to_json(count).as_u64()) >= Some(WORN)
}

fn unworn(properties: &AmqpProperties) -> AmqpProperties {
    let mut headers = properties.headers().clone().unwrap_or_default();
    headers.retain(|name, _| !COUNTS.contains(&name.as_str()));
    copied(properties, headers)
}

/// By which a letter is known again that has been put at the end.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Letter {
    id: Option<String>,
    bytes: usize,
    content: u64,
}

impl Letter {
    fn of(delivery: &Delivery) -> Letter {
        let mut hasher = DefaultHasher::new();
        delivery.body.hash(&mut hasher);
        // Several may have one id and one body.
        let properties = as_json(&unworn(&delivery.properties)).to_string();
        properties.hash(&mut hasher);
        Letter {
            id: delivery.properties.message_id().clone(),
            bytes: delivery.body.len(),
            content: hasher.finish(),
        }
    }
}

/// Publishes letters or what was in them, on a channel of its own, which is opened when it is needed.
struct Publishing<'l> {
    link: &'l Link,
    open: Option<OpenChannel>,
}

impl Publishing<'_> {
    /// Publishes this to a queue. Returns whether RabbitMQ has it, and whether there is no such queue.
    fn publish(
        &mut self,
        queue: &str,
        properties: AmqpProperties,
        body: &[u8],
    ) -> anyhow::Result<(bool, bool)> {
        let open = match &mut self.open {
            Some(open) => open,
            none => none.insert(OpenChannel::new(self.link)?),
        };
        let publish = Publish {
            body,
            routing_key: queue.to_owned(),
            mandatory: true,
            immediate: false,
            properties,
        };
        open.channel.basic_publish("", publish)?;
        let confirm = open.confirms.recv_timeout(DEADLINE).context("no confirm")?;
        // A returned message arrives before its confirm.
        let is_returned = open.returns.try_iter().next().is_some();
        Ok((
            matches!(confirm, Confirm::Ack(_)) && !is_returned,
            is_returned,
        ))
    }

    /// Puts a letter at the end of the others. Returns whether it is there; what is refused stays.
    fn renew(&mut self, properties: AmqpProperties, body: &[u8]) -> bool {
        match self.publish(DEAD_LETTERS_QUEUE, properties, body) {
            Ok((is_there, _)) => is_there,
            Err(_) => {
                self.open = None;
                false
            }
        }
    }

    /// Publishes the original message. Returns why that is not possible.
    fn requeue(
        &mut self,
        letter: &DeadLetter,
        properties: &AmqpProperties,
    ) -> anyhow::Result<Option<String>> {
        let queue = &letter.queue;
        if queue.is_empty() {
            return Ok(Some("it does not say which queue it came from".to_owned()));
        }
        if !letter.cut.is_empty() {
            return Ok(Some(format!("it is not the whole message: {}", letter.cut)));
        }
        let otherwise = match self.publish(queue, properties.clone(), &letter.body)? {
            (true, _) => return Ok(None),
            (false, true) => format!("there is no queue {queue:?} on this vhost any more"),
            (false, false) => format!("the queue {queue:?} takes nothing more"),
        };
        let unavailable = self.link.look_for(&[queue])?[0].why_unavailable();
        let unavailable = unavailable.map(|why| format!("the queue {queue:?}: {why}"));
        Ok(Some(unavailable.unwrap_or(otherwise)))
    }
}

/// The properties of a message that RabbitMQ has put among the dead letters, without what it has added and
/// without a past expiration.
fn as_it_was(letter: AmqpProperties, mut headers: FieldTable) -> AmqpProperties {
    headers.retain(|name, _| {
        let is_added = ADDED.iter().any(|added| name.starts_with(added));
        !is_added && !COUNTS.contains(&name.as_str())
    });
    copied(&letter, headers)
}

/// Properties of a message that is published in place of another, without that one's user id, which RabbitMQ
/// takes from that user alone, and without the copies that its sender has asked for.
fn copied(letter: &AmqpProperties, headers: FieldTable) -> AmqpProperties {
    let texts: [(Option<String>, With); 7] = [
        (
            letter.content_type().clone(),
            AmqpProperties::with_content_type,
        ),
        (
            letter.content_encoding().clone(),
            AmqpProperties::with_content_encoding,
        ),
        (
            letter.correlation_id().clone(),
            AmqpProperties::with_correlation_id,
        ),
        (letter.reply_to().clone(), AmqpProperties::with_reply_to),
        (letter.message_id().clone(), AmqpProperties::with_message_id),
        (letter.type_().clone(), AmqpProperties::with_type_),
        (letter.app_id().clone(), AmqpProperties::with_app_id),
    ];
    let mut properties = AmqpProperties::default()
        .with_delivery_mode(2)
        .with_headers(without_copies(headers));
    if let Some(priority) = *letter.priority() {
        properties = properties.with_priority(priority);
    }
    if let Some(timestamp) = *letter.timestamp() {
        properties = properties.with_timestamp(timestamp);
    }
    texts
        .into_iter()
        .fold(properties, |properties, (text, with)| match text {
            Some(text) => with(properties, text),
            None => properties,
        })
}

/// Properties as the letters that [`crate::wire::dead_letter`] writes have them.
fn as_json(properties: &AmqpProperties) -> Value {
    let texts = [
        ("content_type", properties.content_type()),
        ("content_encoding", properties.content_encoding()),
        ("correlation_id", properties.correlation_id()),
        ("reply_to", properties.reply_to()),
        ("message_id", properties.message_id()),
        ("type", properties.type_()),
        ("app_id", properties.app_id()),
    ];
    let texts = texts.into_iter();
    let mut all: Map<String, Value> = texts
        .filter_map(|(name, text)| Some((name.to_owned(), Value::from(text.clone()?))))
        .collect();
    let numbers = [
        ("priority", properties.priority().map(u64::from)),
        ("timestamp", *properties.timestamp()),
    ];
    let numbers = numbers.into_iter();
    all.extend(numbers.filter_map(|(name, number)| Some((name.to_owned(), number?.into()))));
    if let Some(headers) = properties.headers() {
        let headers = AmqpValue::FieldTable(headers.clone());
        all.insert("headers".to_owned(), amqp_to_json(&headers));
    }
    Value::Object(all)
}

type With = fn(AmqpProperties, String) -> AmqpProperties;

/// The beginnings of the headers that RabbitMQ adds to a message that it has dead-lettered.
const ADDED: [&str; 3] = ["x-death", "x-first-death-", "x-last-death-"];
/// And those that it adds to a message of a quorum queue that it has delivered.
const COUNTS: [&str; 2] = [DELIVERIES, "x-acquired-count"];
const FIRST_QUEUE: &str = "x-first-death-queue";
const FIRST_REASON: &str = "x-first-death-reason";

impl DeadLetter {
    fn read(properties: &AmqpProperties, body: &[u8]) -> DeadLetter {
        let header = |name: &str| properties.headers().as_ref()?.get(name);
        let text = |name| match header(name) {
            Some(AmqpValue::LongString(text)) => text.clone(),
            Some(_) | None => String::new(),
        };
        let id = properties.message_id().clone().unwrap_or_default();
        let of_rabbitmq = text(FIRST_QUEUE);
        if !of_rabbitmq.is_empty() {
            return DeadLetter {
                id,
                queue: of_rabbitmq,
                reason: match text(FIRST_REASON).as_str() {
                    "delivery_limit" => {
                        "delivered too often without an end (delivery_limit)".to_owned()
                    }
                    reason => format!("given up by RabbitMQ ({reason})"),
                },
                time: String::new(),
                properties: as_json(&original_properties(properties)),
                body: body.to_vec(),
                cut: String::new(),
            };
        }
        DeadLetter {
            id,
            queue: text("queue"),
            reason: text("reason"),
            time: text("time"),
            properties: header("properties").map_or(Value::Null, amqp_to_json),
            body: body.to_vec(),
            cut: text("cut"),
        }
    }
}

/// The properties that the letter's header says the message had. Without its user id, which the
/// broker takes from that user alone, and without the copies that its sender has asked for: they
/// were delivered.
fn original_properties(letter: &AmqpProperties) -> AmqpProperties {
    if let Some(headers) = letter.headers()
        && headers.contains_key(FIRST_QUEUE)
    {
        return as_it_was(letter.clone(), headers.clone());
    }
    let none = FieldTable::new();
    let table = match letter
        .headers()
        .as_ref()
        .and_then(|headers| headers.get("properties"))
    {
        Some(AmqpValue::FieldTable(table)) => table,
        Some(_) | None => &none,
    };
    let text = |name: &str| match table.get(name) {
        Some(AmqpValue::LongString(text)) => Some(text.clone()),
        Some(_) | None => None,
    };
    let number = |name: &str| amqp_to_json(table.get(name)?).as_u64();
    let small = |name| number(name).and_then(|number| u8::try_from(number).ok());
    let mut properties =
        AmqpProperties::default().with_delivery_mode(small("delivery_mode").unwrap_or(2));
    if let Some(AmqpValue::FieldTable(headers)) = table.get("headers") {
        properties = properties.with_headers(without_copies(headers.clone()));
    }
    if let Some(priority) = small("priority") {
        properties = properties.with_priority(priority);
    }
    if let Some(timestamp) = number("timestamp") {
        properties = properties.with_timestamp(timestamp);
    }
    let texts: [(&str, With); 8] = [
        ("content_type", AmqpProperties::with_content_type),
        ("content_encoding", AmqpProperties::with_content_encoding),
        ("correlation_id", AmqpProperties::with_correlation_id),
        ("reply_to", AmqpProperties::with_reply_to),
        ("expiration", AmqpProperties::with_expiration),
        ("message_id", AmqpProperties::with_message_id),
        ("type", AmqpProperties::with_type_),
        ("app_id", AmqpProperties::with_app_id),
    ];
    texts
        .into_iter()
        .fold(properties, |properties, (name, with)| match text(name) {
            Some(text) => with(properties, text),
            None => properties,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RabbitMQ takes a user id from that user alone, and delivers copies to whoever they name.
    #[test]
    fn what_is_put_in_the_place_of_a_letter_is_as_we_may_publish_it() {
        let mut headers = FieldTable::new();
        for name in ["CC", FIRST_QUEUE, DELIVERIES, "x-acquired-count"] {
            headers.insert(name.to_owned(), AmqpValue::LongLongInt(12));
        }
        let worn = AmqpProperties::default()
            .with_user_id("anna".to_owned())
            .with_message_id("an id".to_owned())
            .with_headers(headers);
        assert!(is_worn(&worn));
        let fresh = unworn(&worn);
        assert!(!is_worn(&fresh));
        assert_eq!(*fresh.user_id(), None);
        assert_eq!(fresh.message_id().as_deref(), Some("an id"));
        let names = fresh.headers().as_ref().unwrap().keys();
        assert_eq!(names.collect::<Vec<_>>(), [FIRST_QUEUE]);
    }
}
