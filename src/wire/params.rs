//! A job's parameters: protobuf's Struct to JSON and back.

use prost_types::value::Kind;
use serde_json::{Map, Value};

use crate::domain::text::excerpt;

/// A value of the parameters that JSON cannot express.
pub(super) struct Misfit {
    found: f64,
    /// The path to it, last step first. Built only for a misfit: a path for each value would cost
    /// the length of all keys above it.
    path: Vec<String>,
}

impl Misfit {
    fn below(mut self, step: String) -> Misfit {
        self.path.push(step);
        self
    }

    pub(super) fn text(mut self) -> String {
        self.path.reverse();
        format!(
            "The parameter params_dict{} is {}, which is no finite number.",
            excerpt(&self.path.concat(), 300),
            self.found
        )
    }
}

/// A protobuf Struct as JSON, all numbers as doubles.
///
/// # Errors
/// A number is not finite.
pub(super) fn json_object(object: prost_types::Struct) -> Result<Map<String, Value>, Misfit> {
    let members = object.fields.into_iter();
    members
        .map(|(key, value)| match json_value(value) {
            Ok(value) => Ok((key, value)),
            Err(misfit) => Err(misfit.below(format!(".{}", excerpt(&key, 60)))),
        })
        .collect()
}

/// JSON as a protobuf Struct, for a client's parameters.
pub fn protobuf_struct(object: &Map<String, Value>) -> prost_types::Struct {
    prost_types::Struct {
        fields: object
            .iter()
            .map(|(key, value)| (key.clone(), protobuf_value(value)))
            .collect(),
    }
}

fn protobuf_value(value: &Value) -> prost_types::Value {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(value) => Kind::BoolValue(*value),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(items) => Kind::ListValue(prost_types::ListValue {
            values: items.iter().map(protobuf_value).collect(),
        }),
        Value::Object(object) => Kind::StructValue(protobuf_struct(object)),
    };
    prost_types::Value { kind: Some(kind) }
}

fn json_value(value: prost_types::Value) -> Result<Value, Misfit> {
    match value.kind {
        None | Some(Kind::NullValue(_)) => Ok(Value::Null),
        Some(Kind::BoolValue(value)) => Ok(Value::Bool(value)),
        Some(Kind::StringValue(value)) => Ok(Value::String(value)),
        Some(Kind::NumberValue(found)) => {
            let path = Vec::new();
            let number = serde_json::Number::from_f64(found);
            number.map(Value::Number).ok_or(Misfit { found, path })
        }
        Some(Kind::ListValue(list)) => {
            let items = list.values.into_iter().enumerate();
            items
                .map(|(index, value)| {
                    json_value(value).map_err(|misfit| misfit.below(format!("[{index}]")))
                })
                .collect::<Result<_, _>>()
                .map(Value::Array)
        }
        Some(Kind::StructValue(object)) => json_object(object).map(Value::Object),
    }
}
