//! Makes a frame's payload readable for amiquip and cheap to hold, without changing its length.
//!
//! amiquip ends the connection at a text that is not UTF-8, and drops the headers behind one; it
//! reads nested values recursively, and one byte on the wire can take hundreds in memory. RabbitMQ
//! passes all of that on from anybody who may publish.
//!
//! An array or a table has the same layout as a byte array, except for its type. So changing the
//! type is enough to make it opaque.

/// How deep headers may be nested. Real ones have a few levels; a dead letter adds two to those of
/// its message.
const MAX_DEPTH: usize = 32;
/// How many headers, and items in them, a message may have at all levels. Each may take some 700
/// bytes of memory. Celery's messages have about 25, and each time RabbitMQ dead-letters a message
/// it adds ten.
const MAX_VALUES: usize = 256;
/// The one header that replaces an unreadable table: a byte array.
const UNREADABLE: &[u8] = b"unreadable";
/// The types that AMQP gives to values and amiquip knows, of those that have something inside.
const TEXT: u8 = b'S';
const BYTES: u8 = b'x';
const ARRAY: u8 = b'A';
const TABLE: u8 = b'F';

/// What a method's argument or a property is.
#[derive(Debug, Clone, Copy)]
enum Field {
    Fixed(usize),
    ShortText,
    LongText,
    Table,
}

use Field::{Fixed, LongText, ShortText, Table};

/// The properties of a message, in the order of their flags: content type and encoding, headers,
/// delivery mode, priority, correlation id, reply to, expiration, message id, timestamp, type, user,
/// application and cluster id.
const PROPERTIES: [Field; 14] = [
    ShortText,
    ShortText,
    Table,
    Fixed(1),
    Fixed(1),
    ShortText,
    ShortText,
    ShortText,
    ShortText,
    Fixed(8),
    ShortText,
    ShortText,
    ShortText,
    ShortText,
];

/// The arguments of what a broker sends, as far as there are texts among them.
fn arguments(class: u16, method: u16) -> &'static [Field] {
    match (class, method) {
        // connection: start, secure, open-ok, close, blocked.
        (10, 10) => &[Fixed(2), Table, LongText, LongText],
        (10, 20) => &[LongText],
        (10, 41 | 60) => &[ShortText],
        (10, 50) => &[Fixed(2), ShortText],
        // channel: open-ok, close.
        (20, 11) => &[LongText],
        (20, 40) => &[Fixed(2), ShortText],
        // queue: declare-ok.
        (50, 11) => &[ShortText],
        // basic: consume-ok, cancel, cancel-ok, get-empty, return, deliver, get-ok.
        (60, 21 | 30 | 31 | 72) => &[ShortText],
        (60, 50) => &[Fixed(2), ShortText, ShortText, ShortText],
        (60, 60) => &[ShortText, Fixed(9), ShortText, ShortText],
        (60, 71) => &[Fixed(9), ShortText, ShortText],
        _ => &[],
    }
}

/// For the payload of a method frame. A truncated one is left as it is, for amiquip to refuse.
pub(super) fn make_method_readable(payload: &mut [u8]) {
    let Some((ids, mut rest)) = payload.split_first_chunk_mut::<4>() else {
        return;
    };
    let [class, method] = [[ids[0], ids[1]], [ids[2], ids[3]]].map(u16::from_be_bytes);
    for field in arguments(class, method) {
        match make_field_readable(*field, rest) {
            Some(behind) => rest = behind,
            None => return,
        }
    }
}

/// For the payload of a header frame. Truncated properties are left out.
pub(super) fn make_header_readable(payload: &mut [u8]) {
    // Class, weight, the body's size; then the flags of the properties that follow.
    let Some((head, mut rest)) = payload.split_first_chunk_mut::<14>() else {
        return;
    };
    let flags = u16::from_be_bytes([head[12], head[13]]);
    for (place, field) in PROPERTIES.iter().enumerate() {
        let flag = 1 << (15 - place);
        if flags & flag == 0 {
            continue;
        }
        match make_field_readable(*field, rest) {
            Some(behind) => rest = behind,
            None => {
                // amiquip ignores what follows the last property.
                let before = flags & !(flag | (flag - 1));
                head[12..].copy_from_slice(&before.to_be_bytes());
                return;
            }
        }
    }
}

/// Returns what follows the field; None if it is truncated.
fn make_field_readable(field: Field, bytes: &mut [u8]) -> Option<&mut [u8]> {
    let (before, length) = match field {
        Fixed(length) => (0, length),
        ShortText => (1, usize::from(*bytes.first()?)),
        LongText | Table => (4, length_at(bytes, 0)?),
    };
    let (_, rest) = bytes.split_at_mut_checked(before)?;
    let (content, behind) = rest.split_at_mut_checked(length)?;
    match field {
        Fixed(_) => {}
        ShortText | LongText => make_utf8(content),
        Table => make_table_readable(content),
    }
    Some(behind)
}

/// The length that is written there.
fn length_at(bytes: &[u8], place: usize) -> Option<usize> {
    let length = bytes.get(place..)?.first_chunk()?;
    usize::try_from(u32::from_be_bytes(*length)).ok()
}

/// Puts a question mark in the place of each byte that does not belong there.
fn make_utf8(text: &mut [u8]) {
    let mut from = 0;
    while let Err(error) = str::from_utf8(&text[from..]) {
        let bad = from + error.valid_up_to();
        from = error.error_len().map_or(text.len(), |length| bad + length);
        text[bad..from].fill(b'?');
    }
}

/// Makes opaque what is unreadable: malformed or too deeply nested arrays and tables; all of them
/// if there are too many values; the whole table if that is not enough. So what a dead letter says
/// of itself can be read even if its message's properties cannot.
fn make_table_readable(content: &mut [u8]) {
    let readable = walk(content, MAX_DEPTH).or_else(|Unreadable| walk(content, 1));
    if readable.is_err() {
        make_opaque(content);
    }
}

/// One entry with all of it, except for the bytes that its own head takes.
fn make_opaque(content: &mut [u8]) {
    /// The lengths of the key and of the value, and the type.
    const FRAME: usize = 1 + 1 + 4;
    let Some(room) = content.len().checked_sub(FRAME) else {
        // Which amiquip takes for an empty table.
        content.fill(0);
        return;
    };
    let key = &UNREADABLE[..UNREADABLE.len().min(room)];
    let length = u32::try_from(room - key.len()).unwrap_or(u32::MAX);
    let beginning = [
        &[key.len() as u8] as &[u8],
        key,
        &[BYTES],
        &length.to_be_bytes(),
    ]
    .concat();
    content[..beginning.len()].copy_from_slice(&beginning);
}

/// A table whose entries, or an array whose items, are being read.
#[derive(Clone, Copy)]
struct Container {
    /// Where its type is; nowhere for the outermost.
    type_at: Option<usize>,
    end: usize,
    has_keys: bool,
}

enum Found {
    /// A value that ends there.
    Value { end: usize },
    /// One with others inside, the first of which begins there.
    Container { inside: Container, start: usize },
}

/// It is broken at the outermost level, or has too many values.
struct Unreadable;

/// Walks once through everything in a table, makes texts UTF-8, and makes opaque whatever is
/// malformed or nested too deeply.
fn walk(table: &mut [u8], max_depth: usize) -> Result<(), Unreadable> {
    let mut open = vec![Container {
        type_at: None,
        end: table.len(),
        has_keys: true,
    }];
    let mut at = 0;
    let mut values = 0;
    while let Some(innermost) = open.last().copied() {
        if at == innermost.end {
            open.pop();
            continue;
        }
        let opaque = match next_value(table, at, innermost) {
            Some(Found::Value { end }) => {
                at = end;
                None
            }
            Some(Found::Container { inside, start }) if open.len() < max_depth => {
                open.push(inside);
                at = start;
                None
            }
            Some(Found::Container { inside, .. }) => Some(inside),
            None => open.pop(),
        };
        if let Some(container) = opaque {
            table[container.type_at.ok_or(Unreadable)?] = BYTES;
            at = container.end;
        }
        values += 1;
        if values > MAX_VALUES {
            return Err(Unreadable);
        }
    }
    Ok(())
}

/// The value at this place; None if it is truncated or of a type that amiquip does not know.
fn next_value(table: &mut [u8], mut at: usize, container: Container) -> Option<Found> {
    let bytes = &mut table[..container.end];
    if container.has_keys {
        let start = at + 1;
        at = start + usize::from(*bytes.get(at)?);
        make_utf8(bytes.get_mut(start..at)?);
    }
    let kind = *bytes.get(at)?;
    let start = at + 1;
    let (start, length) = match kind {
        b'V' => (start, 0),
        b't' | b'b' | b'B' => (start, 1),
        b's' | b'U' | b'u' => (start, 2),
        b'I' | b'i' | b'f' => (start, 4),
        b'D' => (start, 5),
        b'l' | b'L' | b'd' | b'T' => (start, 8),
        TEXT | BYTES | ARRAY | TABLE => (start + 4, length_at(bytes, start)?),
        _ => return None,
    };
    let end = start.checked_add(length)?;
    let content = bytes.get_mut(start..end)?;
    match kind {
        TEXT => make_utf8(content),
        ARRAY | TABLE => {
            let inside = Container {
                type_at: Some(at),
                end,
                has_keys: kind == TABLE,
            };
            return Some(Found::Container { inside, start });
        }
        _ => {}
    }
    Some(Found::Value { end })
}

#[cfg(test)]
pub(super) mod tests {
    use amq_protocol::frame::{
        AMQPContentHeader, AMQPFrame, generation::gen_content_header_frame, parse_frame,
    };
    use amq_protocol::protocol::AMQPClass;
    use amq_protocol::protocol::basic::{AMQPMethod, AMQPProperties};
    use amq_protocol::types::{AMQPValue, DecimalValue, FieldTable};
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    pub(in crate::broker) fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let size = u32::try_from(payload.len()).unwrap();
        [
            &[kind, 0, 1] as &[u8],
            &size.to_be_bytes(),
            payload,
            &[0xce],
        ]
        .concat()
    }

    /// The payload of a header frame with these bytes behind the flags.
    fn header_payload(flags: u16, properties: &[u8]) -> Vec<u8> {
        [
            b"\0\x3c\0\0\0\0\0\0\0\0\0\x07" as &[u8],
            &flags.to_be_bytes(),
            properties,
        ]
        .concat()
    }

    /// What amiquip makes of a header frame with this payload, when that has been made readable.
    fn read(payload: &[u8]) -> AMQPProperties {
        let mut readable = payload.to_vec();
        make_header_readable(&mut readable);
        assert_eq!(readable.len(), payload.len());
        match parse_frame(&frame(2, &readable)) {
            Ok(([], AMQPFrame::Header(1, 60, header))) => header.properties,
            other => panic!("{other:?}"),
        }
    }

    fn long(bytes: &[u8]) -> Vec<u8> {
        [
            &u32::try_from(bytes.len()).unwrap().to_be_bytes() as &[u8],
            bytes,
        ]
        .concat()
    }

    /// What amiquip makes of headers with these entries, when another property follows.
    fn read_headers(entries: &[u8]) -> FieldTable {
        let properties = [&long(entries), b"\x02id" as &[u8]].concat();
        let properties = read(&header_payload(1 << 13 | 1 << 7, &properties));
        assert_eq!(properties.message_id().as_deref(), Some("id"));
        properties.headers().clone().unwrap()
    }

    fn text(text: &str) -> AMQPValue {
        AMQPValue::LongString(text.to_owned())
    }

    fn table<const N: usize>(entries: [(&str, AMQPValue); N]) -> FieldTable {
        entries
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect()
    }

    #[rstest]
    #[case::good(b"\x01aS\0\0\0\x02\xc3\xa4\x01bV", table([("a", text("ä")), ("b", AMQPValue::Void)]))]
    #[case::key(b"\x02k\xffV\x01bV", table([("k?", AMQPValue::Void), ("b", AMQPValue::Void)]))]
    #[case::text(b"\x01aS\0\0\0\x03\xffx\xc3\x01bV", table([("a", text("?x?")), ("b", AMQPValue::Void)]))]
    #[case::text_in_an_array(b"\x01aA\0\0\0\x06S\0\0\0\x01\xff", table([("a", AMQPValue::FieldArray(vec![text("?")]))]))]
    #[case::key_in_a_table(b"\x01aF\0\0\0\x03\x01\xffV", table([("a", AMQPValue::FieldTable(table([("?", AMQPValue::Void)])))]))]
    #[case::unknown_type_in_a_table(b"\x01aF\0\0\0\x03\x01b~\x01bV", table([("a", AMQPValue::ByteArray(b"\x01b~".to_vec())), ("b", AMQPValue::Void)]))]
    #[case::array_that_breaks_off(b"\x01aA\0\0\0\x02I\0\x01bV", table([("a", AMQPValue::ByteArray(b"I\0".to_vec())), ("b", AMQPValue::Void)]))]
    #[case::unknown_type(b"\x01a~\x01b~x....................", table([("unreadable", AMQPValue::ByteArray(b"...........".to_vec()))]))]
    #[case::short_and_broken(b"\x03a", FieldTable::new())]
    #[case::just_long_enough(b"\xffabcde", table([("", AMQPValue::ByteArray(Vec::new()))]))]
    fn headers(#[case] entries: &[u8], #[case] expected: FieldTable) {
        assert_eq!(read_headers(entries), expected);
    }

    /// Arrays in arrays.
    fn nested(depth: u32) -> Vec<u8> {
        let inside = (0..depth).rev();
        let arrays =
            inside.flat_map(|inside| [b"A" as &[u8], &(5 * inside).to_be_bytes()].concat());
        [b"\x01a" as &[u8], &arrays.collect::<Vec<_>>()].concat()
    }

    #[test]
    fn what_is_too_deep_is_opaque_from_there_on() {
        let depth = |value: &AMQPValue| {
            let mut depth = 0;
            let mut value = value;
            while let AMQPValue::FieldArray(items) = value
                && let Some(item) = items.first()
            {
                value = item;
                depth += 1;
            }
            (depth, value.clone())
        };
        let limit = u32::try_from(MAX_DEPTH).unwrap() - 1;
        let empty = AMQPValue::FieldArray(Vec::new());
        assert_eq!(
            depth(&read_headers(&nested(limit))["a"]),
            (MAX_DEPTH - 2, empty)
        );
        let (levels, rest) = depth(&read_headers(&nested(26_000))["a"]);
        assert_eq!(levels, MAX_DEPTH - 1);
        assert!(matches!(rest, AMQPValue::ByteArray(bytes) if bytes.len() > 129_000));
    }

    fn voids(count: usize) -> Vec<u8> {
        let entry = |number: usize| {
            [
                &[2, b'a' + (number / 20) as u8],
                &[b'a' + (number % 20) as u8, b'V'] as &[u8],
            ]
            .concat()
        };
        (0..count).flat_map(entry).collect()
    }

    #[test]
    fn too_many_values_are_opaque() {
        let array =
            |count: usize| [b"\x01xA" as &[u8], &long(&vec![b'V'; count]), b"\x01yV"].concat();
        let most = read_headers(&array(MAX_VALUES - 2));
        assert_eq!(
            most["x"],
            AMQPValue::FieldArray(vec![AMQPValue::Void; MAX_VALUES - 2])
        );
        let more = read_headers(&array(MAX_VALUES - 1));
        assert_eq!(more["x"], AMQPValue::ByteArray(vec![b'V'; MAX_VALUES - 1]));
        assert_eq!(more["y"], AMQPValue::Void);

        assert_eq!(read_headers(&voids(MAX_VALUES)).len(), MAX_VALUES);
        let more = read_headers(&voids(MAX_VALUES + 1));
        assert_eq!(more.keys().collect::<Vec<_>>(), ["unreadable"]);
    }

    #[rstest]
    #[case::content_type(1 << 15 | 1 << 7, b"\x02\xff\xfe\x02id", "??", "id")]
    #[case::message_id_breaks_off(1 << 15 | 1 << 7, b"\x02ct\x03id", "ct", "")]
    #[case::nothing_is_there(1 << 15 | 1 << 7, b"", "", "")]
    #[case::headers_break_off(1 << 15 | 1 << 13 | 1 << 7, b"\x02ct\0\0\xff\xff\x02id", "ct", "")]
    fn properties(
        #[case] flags: u16,
        #[case] bytes: &[u8],
        #[case] content_type: &str,
        #[case] message_id: &str,
    ) {
        let properties = read(&header_payload(flags, bytes));
        let is = |property: &Option<String>| property.clone().unwrap_or_default();
        assert_eq!(is(properties.content_type()), content_type);
        assert_eq!(is(properties.message_id()), message_id);
    }

    #[rstest]
    #[case::deliver(
        b"\0\x3c\0\x3c\x03t\xffg\0\0\0\0\0\0\0\x01\0\x01\xfe\x02k\xff",
        b"\0\x3c\0\x3c\x03t?g\0\0\0\0\0\0\0\x01\0\x01?\x02k?"
    )]
    #[case::get_ok(
        b"\0\x3c\0\x47\0\0\0\0\0\0\0\xff\0\x01\xff\x01\xfe\0\0\0\xff",
        b"\0\x3c\0\x47\0\0\0\0\0\0\0\xff\0\x01?\x01?\0\0\0\xff"
    )]
    #[case::returned(
        b"\0\x3c\0\x32\x01\x38\x01\xff\x01\xff\x01\xff",
        b"\0\x3c\0\x32\x01\x38\x01?\x01?\x01?"
    )]
    #[case::close(
        b"\0\x14\0\x28\x01\x94\x03no\xff\0\x3c\0\xff",
        b"\0\x14\0\x28\x01\x94\x03no?\0\x3c\0\xff"
    )]
    #[case::ack_has_no_texts(
        b"\0\x3c\0\x50\xff\xff\xff\xff\xff\xff\xff\xff\0",
        b"\0\x3c\0\x50\xff\xff\xff\xff\xff\xff\xff\xff\0"
    )]
    #[case::breaks_off(b"\0\x3c\0\x3c\x09t\xff", b"\0\x3c\0\x3c\x09t\xff")]
    fn methods(#[case] payload: &[u8], #[case] expected: &[u8]) {
        let mut readable = payload.to_vec();
        make_method_readable(&mut readable);
        assert_eq!(readable, expected);
    }

    fn value() -> impl Strategy<Value = AMQPValue> {
        let plain = prop_oneof![
            any::<bool>().prop_map(AMQPValue::Boolean),
            any::<i8>().prop_map(AMQPValue::ShortShortInt),
            any::<u8>().prop_map(AMQPValue::ShortShortUInt),
            any::<i16>().prop_map(AMQPValue::ShortInt),
            any::<u16>().prop_map(AMQPValue::ShortUInt),
            any::<i32>().prop_map(AMQPValue::LongInt),
            any::<u32>().prop_map(AMQPValue::LongUInt),
            any::<i64>().prop_map(AMQPValue::LongLongInt),
            (-1e9_f32..1e9).prop_map(AMQPValue::Float),
            (-1e9_f64..1e9).prop_map(AMQPValue::Double),
            (any::<u8>(), any::<u32>())
                .prop_map(|(scale, value)| AMQPValue::DecimalValue(DecimalValue { scale, value })),
            ".{0,20}".prop_map(AMQPValue::LongString),
            any::<u64>().prop_map(AMQPValue::Timestamp),
            prop::collection::vec(any::<u8>(), 0..20).prop_map(AMQPValue::ByteArray),
            Just(AMQPValue::Void),
        ];
        plain.prop_recursive(4, 30, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(AMQPValue::FieldArray),
                prop::collection::btree_map(".{0,8}", inner, 0..5).prop_map(AMQPValue::FieldTable),
            ]
        })
    }

    /// A good header frame, and what is in it.
    fn header() -> impl Strategy<Value = (AMQPProperties, Vec<u8>)> {
        let headers = prop::collection::btree_map(".{0,8}", value(), 0..6);
        let short = || prop::option::of(".{0,60}");
        (
            headers,
            short(),
            short(),
            short(),
            prop::option::of(any::<u64>()),
        )
            .prop_map(|(headers, content_type, message_id, app_id, timestamp)| {
                let mut properties = AMQPProperties::default().with_headers(headers);
                if let Some(text) = content_type {
                    properties = properties.with_content_type(text);
                }
                if let Some(text) = message_id {
                    properties = properties.with_message_id(text);
                }
                if let Some(text) = app_id {
                    properties = properties.with_app_id(text);
                }
                if let Some(timestamp) = timestamp {
                    properties = properties.with_timestamp(timestamp).with_priority(3);
                }
                let mut bytes = vec![0; 64 * 1024];
                let (_, length) =
                    gen_content_header_frame((&mut bytes, 0), 1, 60, 7, &properties).unwrap();
                bytes.truncate(length);
                (properties, bytes)
            })
    }

    /// Frames as a broker might send them, good ones and others.
    pub(in crate::broker) fn any_frame() -> impl Strategy<Value = Vec<u8>> {
        let changed = (
            header(),
            prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        );
        let bytes = || prop::collection::vec(any::<u8>(), 0..300);
        let short = || prop::collection::vec(any::<u8>(), 0..20);
        prop_oneof![
            changed.prop_map(|((_, mut bytes), changes)| {
                // Its own frame stays what it is.
                let end = bytes.len() - 1;
                for (place, byte) in changes {
                    bytes[19..end][place.index(end - 19)] = byte;
                }
                bytes
            }),
            (any::<u16>(), bytes())
                .prop_map(|(flags, bytes)| frame(2, &header_payload(flags, &bytes))),
            (short(), short(), short(), any::<[u8; 9]>()).prop_map(
                |(tag, exchange, key, fixed)| {
                    let [tag, exchange, key] = [tag, exchange, key]
                        .map(|text| [&[text.len() as u8] as &[u8], &text].concat());
                    frame(
                        1,
                        &[b"\0\x3c\0\x3c" as &[u8], &tag, &fixed, &exchange, &key].concat(),
                    )
                }
            ),
            bytes().prop_map(|bytes| frame(3, &bytes)),
            Just(frame(8, &[])),
        ]
    }

    proptest! {
        #[test]
        fn good_headers_are_left_as_they_are((properties, bytes) in header()) {
            let mut readable = bytes.clone();
            let end = bytes.len() - 1;
            make_header_readable(&mut readable[7..end]);
            prop_assert_eq!(&readable, &bytes);
            let (rest, parsed) = parse_frame(&readable).unwrap();
            prop_assert!(rest.is_empty());
            let header = AMQPContentHeader { class_id: 60, weight: 0, body_size: 7, properties };
            prop_assert_eq!(parsed, AMQPFrame::Header(1, 60, Box::new(header)));
        }

        #[test]
        fn whatever_comes_can_be_read(bytes in any_frame()) {
            let mut readable = bytes.clone();
            let payload = 7..bytes.len() - 1;
            match bytes[0] {
                1 => make_method_readable(&mut readable[payload.clone()]),
                2 => make_header_readable(&mut readable[payload.clone()]),
                _ => {}
            }
            match parse_frame(&readable) {
                Ok(([], AMQPFrame::Method(1, AMQPClass::Basic(AMQPMethod::Deliver(_)))
                    | AMQPFrame::Header(..) | AMQPFrame::Body(..) | AMQPFrame::Heartbeat(1))) => {}
                other => prop_assert!(false, "{:?}", other),
            }
            let mut again = readable.clone();
            match bytes[0] {
                1 => make_method_readable(&mut again[payload]),
                2 => make_header_readable(&mut again[payload]),
                _ => {}
            }
            prop_assert_eq!(again, readable);
        }
    }
}
