//! Properties and header values: AMQP to JSON and back, and of messages that are republished.

use amiquip::{AmqpProperties, AmqpValue, FieldTable};
use serde_json::{Map, Number, Value};
use uuid::Uuid;

use crate::wire::Outgoing;

/// The properties of a received message for republishing: without its user id, which the broker
/// accepts from that user alone, and without CC and BCC, since those copies have been delivered.
pub(super) fn republished(original: &AmqpProperties) -> AmqpProperties {
    type Copy = fn(&AmqpProperties, AmqpProperties) -> Option<AmqpProperties>;
    let copies: [Copy; 11] = [
        |from, to| Some(to.with_content_type(from.content_type().clone()?)),
        |from, to| Some(to.with_content_encoding(from.content_encoding().clone()?)),
        |from, to| Some(to.with_delivery_mode((*from.delivery_mode())?)),
        |from, to| Some(to.with_priority((*from.priority())?)),
        |from, to| Some(to.with_correlation_id(from.correlation_id().clone()?)),
        |from, to| Some(to.with_reply_to(from.reply_to().clone()?)),
        |from, to| Some(to.with_expiration(from.expiration().clone()?)),
        |from, to| Some(to.with_message_id(from.message_id().clone()?)),
        |from, to| Some(to.with_timestamp((*from.timestamp())?)),
        |from, to| Some(to.with_type_(from.type_().clone()?)),
        |from, to| Some(to.with_app_id(from.app_id().clone()?)),
    ];
    let properties = AmqpProperties::default();
    let properties = copies.iter().fold(properties, |properties, copy| {
        copy(original, properties.clone()).unwrap_or(properties)
    });
    match original.headers() {
        None => properties,
        Some(headers) => properties.with_headers(without_copies(headers.clone())),
    }
}

/// Headers without CC and BCC.
pub(super) fn without_copies(mut headers: FieldTable) -> FieldTable {
    for name in ["CC", "BCC"] {
        headers.remove(name);
    }
    headers
}

pub(super) fn properties(message: &Outgoing) -> AmqpProperties {
    let mut properties = AmqpProperties::default()
        .with_delivery_mode(2)
        .with_priority(message.priority)
        .with_headers(json_to_table(&message.headers));
    if message.with_message_id {
        properties = properties.with_message_id(Uuid::new_v4().simple().to_string());
    }
    if let Some(content_type) = message.content_type {
        properties = properties.with_content_type(content_type.to_owned());
    }
    if let Some(encoding) = message.content_encoding {
        properties = properties.with_content_encoding(encoding.to_owned());
    }
    if let Some(id) = &message.correlation_id {
        properties = properties.with_correlation_id(id.clone());
    }
    if let Some(queue) = &message.reply_to {
        properties = properties.with_reply_to(queue.clone());
    }
    properties
}

fn json_to_table(object: &Map<String, Value>) -> FieldTable {
    object
        .iter()
        .map(|(key, value)| (key.clone(), json_to_amqp(value)))
        .collect()
}

fn json_to_amqp(value: &Value) -> AmqpValue {
    match value {
        Value::Null => AmqpValue::Void,
        Value::Bool(value) => AmqpValue::Boolean(*value),
        // As Celery's library does: the smaller integer where it fits.
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(number), _) => {
                i32::try_from(number).map_or(AmqpValue::LongLongInt(number), AmqpValue::LongInt)
            }
            (None, Some(number)) => AmqpValue::Double(number),
            (None, None) => AmqpValue::Void,
        },
        Value::String(text) => AmqpValue::LongString(text.clone()),
        Value::Array(items) => AmqpValue::FieldArray(items.iter().map(json_to_amqp).collect()),
        Value::Object(object) => AmqpValue::FieldTable(json_to_table(object)),
    }
}

pub(super) fn table_to_json(table: &FieldTable) -> Value {
    table
        .iter()
        .map(|(key, value)| (key.clone(), amqp_to_json(value)))
        .collect::<Map<_, _>>()
        .into()
}

pub(super) fn amqp_to_json(value: &AmqpValue) -> Value {
    match value {
        AmqpValue::Boolean(value) => (*value).into(),
        AmqpValue::ShortShortInt(number) => (*number).into(),
        AmqpValue::ShortShortUInt(number) => (*number).into(),
        AmqpValue::ShortInt(number) => (*number).into(),
        AmqpValue::ShortUInt(number) => (*number).into(),
        AmqpValue::LongInt(number) => (*number).into(),
        AmqpValue::LongUInt(number) => (*number).into(),
        AmqpValue::LongLongInt(number) => (*number).into(),
        AmqpValue::Float(number) => double(f64::from(*number)),
        AmqpValue::Double(number) => double(*number),
        AmqpValue::DecimalValue(decimal) => format!("{decimal:?}").into(),
        AmqpValue::LongString(text) => text.as_str().into(),
        AmqpValue::FieldArray(items) => items.iter().map(amqp_to_json).collect::<Vec<_>>().into(),
        AmqpValue::Timestamp(seconds) => (*seconds).into(),
        AmqpValue::FieldTable(table) => table_to_json(table),
        AmqpValue::ByteArray(bytes) => String::from_utf8_lossy(bytes).into(),
        AmqpValue::Void => Value::Null,
    }
}

/// JSON has no NaN and no infinity; their names stand for them.
fn double(number: f64) -> Value {
    Number::from_f64(number).map_or_else(|| number.to_string().into(), Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_back_goes_nowhere_else() {
        let headers = ["CC", "BCC", "kept"].map(|name| (name.to_owned(), AmqpValue::Void));
        let original = AmqpProperties::default()
            .with_user_id("somebody".to_owned())
            .with_message_id("id".to_owned())
            .with_priority(3)
            .with_headers(FieldTable::from(headers));
        let kept = FieldTable::from([("kept".to_owned(), AmqpValue::Void)]);
        let expected = AmqpProperties::default()
            .with_message_id("id".to_owned())
            .with_priority(3)
            .with_headers(kept);
        assert_eq!(republished(&original), expected);
    }
}
