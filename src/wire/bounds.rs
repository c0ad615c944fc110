//! What a message may hold, counted on its bytes before anything is made of them: two bytes on the
//! wire may become a hundred in memory, and one in the task's JSON become six.
//!
//! The limits are far above what OMOTES needs. Its workflows have a few dozen parameters, each a
//! number, a text or a truth value; its workers send a remark for an asset at most.

use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// Values in a submission's parameters, those in lists and objects counted. They take up to 160
/// bytes each.
const MAX_VALUES: usize = 100_000;
/// How many of these may be named members of an object. They take up to 640 bytes each.
const MAX_NAMED_VALUES: usize = 10_000;
/// Characters in a submission's texts of which JSON makes six.
const MAX_CONTROL_CHARACTERS: usize = 1_000_000;
/// Remarks about the energy system in a worker's result.
const MAX_ESDL_MESSAGES: usize = 100_000;

/// How deep prost goes before it refuses a message; what is deeper is never made.
const MAX_DEPTH: usize = 100;

/// The texts, lists and messages among a message's fields with their numbers, up to the first byte
/// that is not protobuf: further nobody reads.
pub(super) fn fields(mut bytes: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    std::iter::from_fn(move || {
        while !bytes.is_empty() {
            let (number, wire_type) = decode_key(&mut bytes).ok()?;
            if wire_type == WireType::LengthDelimited {
                let length = usize::try_from(decode_varint(&mut bytes).ok()?).ok()?;
                let (content, rest) = bytes.split_at_checked(length)?;
                bytes = rest;
                return Some((number, content));
            }
            skip_field(wire_type, number, &mut bytes, DecodeContext::default()).ok()?;
        }
        None
    })
}

/// A field that is a text, as prost reads it: the last one counts.
pub(super) fn field(bytes: &[u8], number: u32) -> Option<&[u8]> {
    let own = fields(bytes).filter(|(one, _)| *one == number);
    own.last().map(|(_, content)| content)
}

/// What a `JobSubmission` holds too much of.
pub(super) fn of_submission(body: &[u8]) -> Result<(), String> {
    const ESDL: u32 = 4;
    const PARAMS: u32 = 5;
    const REFERENCE: u32 = 6;
    let mut held = Held::default();
    for (number, content) in fields(body) {
        match number {
            ESDL | REFERENCE => held.take_text(content),
            PARAMS => held.take_object(content, MAX_DEPTH),
            _ => Ok(()),
        }?;
    }
    Ok(())
}

/// What a `TaskResult` holds too much of.
pub(super) fn of_result(body: &[u8]) -> Result<(), String> {
    const ESDL_MESSAGES: u32 = 7;
    let messages = fields(body).filter(|(number, _)| *number == ESDL_MESSAGES);
    limit(
        messages.take(MAX_ESDL_MESSAGES + 1).count(),
        MAX_ESDL_MESSAGES,
        "TaskResult: its esdl_messages are",
    )
}

fn limit(count: usize, most: usize, what: &str) -> Result<(), String> {
    match count <= most {
        true => Ok(()),
        false => Err(format!("{what} more than {}", thousands(most))),
    }
}

/// A number as people write it.
fn thousands(number: usize) -> String {
    match number {
        0..1000 => number.to_string(),
        more => format!("{},{:03}", thousands(more / 1000), more % 1000),
    }
}

/// What has been counted of a submission.
#[derive(Default)]
struct Held {
    values: usize,
    named_values: usize,
    control_characters: usize,
}

impl Held {
    /// A `google.protobuf.Struct`, of which no more than `depth` levels are of interest.
    fn take_object(&mut self, object: &[u8], depth: usize) -> Result<(), String> {
        const ENTRY: u32 = 1;
        const KEY: u32 = 1;
        const VALUE: u32 = 2;
        for (_, entry) in fields(object).filter(|(number, _)| *number == ENTRY) {
            self.named_values += 1;
            let what = "The submission's params_dict has names for";
            limit(self.named_values, MAX_NAMED_VALUES, what).map_err(|fault| fault + " values.")?;
            for (number, content) in fields(entry) {
                match number {
                    KEY => self.take_text(content),
                    VALUE => self.take_value(content, depth),
                    _ => Ok(()),
                }?;
            }
        }
        Ok(())
    }

    /// A `google.protobuf.Value`.
    fn take_value(&mut self, value: &[u8], depth: usize) -> Result<(), String> {
        const TEXT: u32 = 3;
        const OBJECT: u32 = 5;
        const LIST: u32 = 6;
        const ITEM: u32 = 1;
        self.values += 1;
        let what = "The submission's params_dict has";
        limit(self.values, MAX_VALUES, what).map_err(|fault| fault + " values.")?;
        let Some(depth) = depth.checked_sub(1) else {
            return Ok(());
        };
        for (number, content) in fields(value) {
            match number {
                TEXT => self.take_text(content),
                OBJECT => self.take_object(content, depth),
                LIST => fields(content)
                    .filter(|(number, _)| *number == ITEM)
                    .try_for_each(|(_, item)| self.take_value(item, depth)),
                _ => Ok(()),
            }?;
        }
        Ok(())
    }

    fn take_text(&mut self, text: &[u8]) -> Result<(), String> {
        // The others have a letter of their own in JSON.
        let long = |byte: &&u8| **byte < b' ' && !b"\x08\t\n\x0c\r".contains(byte);
        self.control_characters += text.iter().filter(long).count();
        let what = "The submission's texts have";
        limit(self.control_characters, MAX_CONTROL_CHARACTERS, what)
            .map_err(|fault| fault + " control characters.")
    }
}
