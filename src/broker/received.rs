//! A message as a handler has it: its content, and how much of the bytes in flight it takes.

use std::mem;
use std::sync::Arc;

use amiquip::{AmqpProperties, AmqpValue, Delivery, FieldTable};
use serde_json::{Map, Value};

use super::intake::{Intake, Share};
use super::values::table_to_json;

/// What a message counts as, in bytes, whose content is gone.
const RELEASED: usize = 1024;

/// A message as it was delivered.
#[derive(Debug)]
pub struct Received {
    /// Identifies the delivery to its consumer.
    pub tag: u64,
    pub body: Vec<u8>,
    pub redelivered: bool,
    pub(super) properties: AmqpProperties,
    /// Its part of what its connection may have in flight, for as long as it is not dropped.
    pub(super) share: Option<Share>,
}

impl Received {
    /// Takes the content of a delivery, which counts in `intake` from now on.
    pub(super) fn of(delivery: &mut Delivery, intake: Option<&Arc<Intake>>) -> Received {
        let mut received = Received {
            tag: delivery.delivery_tag(),
            body: mem::take(&mut delivery.body),
            redelivered: delivery.redelivered,
            properties: mem::take(&mut delivery.properties),
            share: None,
        };
        received.share = intake.map(|intake| intake.share(received.size()));
        received
    }

    /// About how many bytes of memory it takes: its body, and its properties as amiquip holds them.
    pub fn size(&self) -> usize {
        let own = &self.properties;
        let texts = [
            own.content_type(),
            own.content_encoding(),
            own.correlation_id(),
            own.reply_to(),
            own.expiration(),
            own.message_id(),
            own.type_(),
            own.user_id(),
            own.app_id(),
            own.cluster_id(),
        ];
        let texts: usize = texts.into_iter().flatten().map(String::len).sum();
        let headers = own.headers().as_ref().map_or(0, table_size);
        self.body.len() + size_of_val(self) + texts + headers
    }

    pub fn message_id(&self) -> Option<&str> {
        self.properties.message_id().as_deref()
    }

    /// Who sent it: its `user-id`, which RabbitMQ has checked, or its `app-id`.
    pub fn sender(&self) -> Option<&str> {
        let properties = [self.properties.user_id(), self.properties.app_id()];
        let texts = properties.into_iter().flatten().map(String::as_str);
        texts.into_iter().find(|text| !text.trim().is_empty())
    }

    /// A header that is a text.
    pub fn header(&self, name: &str) -> Option<&str> {
        match self.properties.headers().as_ref()?.get(name)? {
            AmqpValue::LongString(text) => Some(text),
            _ => None,
        }
    }

    pub fn correlation_id(&self) -> Option<&str> {
        self.properties.correlation_id().as_deref()
    }

    /// Drops everything but its id, about `RELEASED` bytes.
    pub fn release(&mut self) {
        self.body = Vec::new();
        let id = self.properties.message_id().clone();
        self.properties = match id {
            Some(id) => AmqpProperties::default().with_message_id(id),
            None => AmqpProperties::default(),
        };
        if let Some(share) = &mut self.share {
            share.shrink(RELEASED);
        }
    }

    /// The message's properties as JSON, those that are set.
    pub fn properties(&self) -> Map<String, Value> {
        let own = &self.properties;
        let text = |text: &Option<String>| text.clone().map(Value::String);
        [
            ("content_type", text(own.content_type())),
            ("content_encoding", text(own.content_encoding())),
            ("headers", own.headers().as_ref().map(table_to_json)),
            ("delivery_mode", own.delivery_mode().map(Value::from)),
            ("priority", own.priority().map(Value::from)),
            ("correlation_id", text(own.correlation_id())),
            ("reply_to", text(own.reply_to())),
            ("expiration", text(own.expiration())),
            ("message_id", text(own.message_id())),
            ("timestamp", own.timestamp().map(Value::from)),
            ("type", text(own.type_())),
            ("user_id", text(own.user_id())),
            ("app_id", text(own.app_id())),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)))
        .collect()
    }
}

/// Memory that a table takes beyond its own struct. `readable.rs` bounds its depth.
fn table_size(table: &FieldTable) -> usize {
    /// A node of a B-tree has room for eleven entries, and is at least half full when it is not
    /// the only one.
    const NODE: usize = 11 * size_of::<(String, AmqpValue)>();
    let entries = table
        .iter()
        .map(|(key, value)| key.len() + value_size(value));
    table.len().div_ceil(6) * NODE + entries.sum::<usize>()
}

/// Memory that a value takes beyond its own struct.
fn value_size(value: &AmqpValue) -> usize {
    match value {
        AmqpValue::LongString(text) => text.len(),
        AmqpValue::ByteArray(bytes) => bytes.len(),
        AmqpValue::FieldTable(table) => table_size(table),
        AmqpValue::FieldArray(items) => {
            size_of_val(items.as_slice()) + items.iter().map(value_size).sum::<usize>()
        }
        AmqpValue::Boolean(_)
        | AmqpValue::ShortShortInt(_)
        | AmqpValue::ShortShortUInt(_)
        | AmqpValue::ShortInt(_)
        | AmqpValue::ShortUInt(_)
        | AmqpValue::LongInt(_)
        | AmqpValue::LongUInt(_)
        | AmqpValue::LongLongInt(_)
        | AmqpValue::Float(_)
        | AmqpValue::Double(_)
        | AmqpValue::DecimalValue(_)
        | AmqpValue::Timestamp(_)
        | AmqpValue::Void => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_headers(headers: FieldTable) -> Received {
        Received {
            tag: 1,
            body: vec![0; 1000],
            redelivered: false,
            properties: AmqpProperties::default().with_headers(headers),
            share: None,
        }
    }

    #[test]
    fn headers_count_as_they_are_held() {
        let plain = with_headers(FieldTable::new()).size();
        assert!((1000..2000).contains(&plain), "{plain}");
        let bytes = AmqpValue::ByteArray(vec![0; 100_000]);
        let large = with_headers(FieldTable::from([("a".to_owned(), bytes)])).size() - plain;
        assert!((100_000..102_000).contains(&large), "{large}");
        // A table with one header in each, which on the wire takes eight bytes.
        let nested = (0..20).fold(AmqpValue::Void, |inner, _| {
            AmqpValue::FieldTable(FieldTable::from([(String::new(), inner)]))
        });
        let nested = with_headers(FieldTable::from([("a".to_owned(), nested)])).size() - plain;
        assert!((10_000..20_000).contains(&nested), "{nested}");
    }
}
