//! Whether a job's parameters fit the definition of its workflow.
//!
//! On the wire all numbers are doubles, a date and time is its seconds since 1970 and a duration
//! its seconds: so the SDKs write them, and so their workers read them.

use serde_json::{Map, Value};

use crate::domain::workflow::found;
use crate::proto::{
    WorkflowParameter,
    workflow_parameter::{Constraint, ParameterType, constraint::RelationType},
};

pub mod typed;

/// Each way in which `params` do not fit `definitions`, as a text.
///
/// A parameter may be missing if its definition has a default. Undefined parameters are left to the
/// worker.
pub fn faults(definitions: &[WorkflowParameter], params: &Map<String, Value>) -> Vec<String> {
    let misfits = misfits(definitions, params).into_iter();
    misfits.map(|(_, fault)| fault).collect()
}

/// The same, each with the parameter's key; the texts have values.
pub fn misfits(
    definitions: &[WorkflowParameter],
    params: &Map<String, Value>,
) -> Vec<(String, String)> {
    let given = |key: &str| params.get(key).filter(|value| !value.is_null());
    let mut faults = Vec::new();
    for definition in definitions {
        let key = &definition.key_name;
        let Some(kind) = &definition.parameter_type else {
            continue;
        };
        let Some(value) = given(key) else {
            if !has_default(kind) {
                faults.push((key.clone(), format!("{key} is missing")));
            }
            continue;
        };
        if let Some(expected) = misfit(kind, value) {
            let fault = format!("{key} is {}, expected {expected}", found(value));
            faults.push((key.clone(), fault));
            continue;
        }
        for constraint in &definition.constraints {
            let other_key = &constraint.other_key_name;
            if let Some(other) = given(other_key)
                && let Some(expected) = violated(constraint, value, other)
            {
                let fault = format!(
                    "{key} is {}, expected {expected} {other_key}, which is {}",
                    found(value),
                    found(other)
                );
                faults.push((key.clone(), fault));
            }
        }
    }
    faults
}

/// About how many bytes `params` take in memory, apart from their texts.
pub fn bytes(params: &Map<String, Value>) -> usize {
    /// An object has room for eleven members at least, and so has each part of a larger one, of
    /// which half may be free.
    const MEMBERS: usize = 5;
    const NODE: usize = 11 * (size_of::<String>() + size_of::<Value>());
    let below: usize = params.values().map(value_bytes).sum();
    params.len().div_ceil(MEMBERS) * NODE + below
}

fn value_bytes(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => 0,
        Value::Array(items) => {
            // Room for four at least, and half of it may be free.
            items.capacity() * size_of::<Value>() + items.iter().map(value_bytes).sum::<usize>()
        }
        Value::Object(members) => bytes(members),
    }
}

fn has_default(kind: &ParameterType) -> bool {
    match kind {
        ParameterType::StringParameter(kind) => kind.default.is_some(),
        ParameterType::BooleanParameter(kind) => kind.default.is_some(),
        ParameterType::IntegerParameter(kind) => kind.default.is_some(),
        ParameterType::FloatParameter(kind) => kind.default.is_some(),
        ParameterType::DatetimeParameter(kind) => kind.default.is_some(),
        ParameterType::DurationParameter(kind) => kind.default.is_some(),
    }
}

/// What was expected instead of `value`; None if it fits.
fn misfit(kind: &ParameterType, value: &Value) -> Option<String> {
    match kind {
        ParameterType::StringParameter(kind) => {
            let Some(text) = value.as_str() else {
                return Some("a text".to_owned());
            };
            let options = &kind.enum_options;
            let allowed =
                options.is_empty() || options.iter().any(|option| option.key_name == text);
            (!allowed).then(|| {
                let keys: Vec<_> = options
                    .iter()
                    .map(|option| option.key_name.as_str())
                    .collect();
                format!("one of {}", keys.join(", "))
            })
        }
        ParameterType::BooleanParameter(_) => {
            (!value.is_boolean()).then(|| "true or false".to_owned())
        }
        ParameterType::IntegerParameter(kind) => {
            let number = value.as_f64().filter(|number| number.fract() == 0.0);
            #[expect(
                clippy::cast_precision_loss,
                reason = "what comes over the wire is a double as well"
            )]
            let limit = |limit: Option<i64>| limit.map(|limit| limit as f64);
            misfit_number(
                number,
                "a whole number",
                limit(kind.minimum),
                limit(kind.maximum),
            )
        }
        ParameterType::FloatParameter(kind) => {
            misfit_single(value, "a number", kind.minimum, kind.maximum)
        }
        ParameterType::DatetimeParameter(_) => {
            misfit_number(value.as_f64(), "seconds since 1970", None, None)
        }
        ParameterType::DurationParameter(kind) => {
            misfit_single(value, "a number of seconds", kind.minimum, kind.maximum)
        }
    }
}

/// Compared as the 32 bits that the definition has: with all 64, 0.1 would be below a minimum of
/// 0.1.
fn misfit_single(
    value: &Value,
    what: &str,
    minimum: Option<f32>,
    maximum: Option<f32>,
) -> Option<String> {
    #[expect(clippy::cast_possible_truncation, reason = "see above")]
    let number = value.as_f64().map(|number| number as f32);
    misfit_number(number, what, minimum, maximum)
}

fn misfit_number<N: PartialOrd + std::fmt::Display>(
    number: Option<N>,
    what: &str,
    minimum: Option<N>,
    maximum: Option<N>,
) -> Option<String> {
    let too_small = minimum
        .as_ref()
        .zip(number.as_ref())
        .is_some_and(|(limit, number)| number < limit);
    let too_large = maximum
        .as_ref()
        .zip(number.as_ref())
        .is_some_and(|(limit, number)| number > limit);
    (number.is_none() || too_small || too_large).then(|| match (minimum, maximum) {
        (None, None) => what.to_owned(),
        (Some(minimum), None) => format!("{what} from {minimum}"),
        (None, Some(maximum)) => format!("{what} up to {maximum}"),
        (Some(minimum), Some(maximum)) => format!("{what} from {minimum} to {maximum}"),
    })
}

/// What was expected of `value`, with regard to the other one; None if that is so. Only numbers
/// have an order.
fn violated(constraint: &Constraint, value: &Value, other: &Value) -> Option<&'static str> {
    let numbers = value.as_f64().zip(other.as_f64());
    let fails =
        |holds: fn(f64, f64) -> bool| numbers.is_some_and(|(value, other)| !holds(value, other));
    let (fails, expected) = match constraint.relation() {
        RelationType::Greater => (fails(|a, b| a > b), "more than"),
        RelationType::GreaterOrEq => (fails(|a, b| a >= b), "at least"),
        RelationType::Smaller => (fails(|a, b| a < b), "less than"),
        RelationType::SmallerOrEq => (fails(|a, b| a <= b), "at most"),
        RelationType::Eq => (value != other, "the same as"),
    };
    fails.then_some(expected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::workflow::Catalogue;
    use rstest::rstest;
    use serde_json::json;

    fn faults_of(definitions: Value, params: Value) -> Vec<String> {
        let file = json!([{
            "workflow_type_name": "w",
            "workflow_type_description_name": "W",
            "workflow_parameters": definitions,
        }]);
        let catalogue = Catalogue::parse(&file.to_string()).unwrap();
        let definition = catalogue.definition("w").unwrap();
        faults(&definition.parameters, params.as_object().unwrap())
    }

    /// The one fault of the parameter `x`, defined as `kind` and `more`; empty if it fits.
    fn fault(kind: &str, more: Value, x: Value) -> String {
        let mut definition = json!({"parameter_type": kind, "key_name": "x"});
        definition
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let faults = faults_of(json!([definition]), json!({"x": x}));
        assert!(faults.len() <= 1, "{faults:?}");
        faults.concat()
    }

    #[rstest]
    #[case("string", json!({}), json!("a"), "")]
    #[case("string", json!({}), json!(1.0), "x is 1.0, expected a text")]
    #[case("string", json!({}), json!(null), "x is missing")]
    #[case("string", json!({"default": "d"}), json!(null), "")]
    #[case("integer", json!({}), json!("x".repeat(61)), &format!("x is \"{}…\", expected a whole number", "x".repeat(60)))]
    #[case("boolean", json!({}), json!(false), "")]
    #[case("boolean", json!({}), json!("true"), "x is \"true\", expected true or false")]
    #[case("boolean", json!({"default": true}), json!(null), "")]
    #[case("integer", json!({}), json!(3.0), "")]
    #[case("integer", json!({}), json!(3.5), "x is 3.5, expected a whole number")]
    #[case("integer", json!({}), json!("3"), "x is \"3\", expected a whole number")]
    #[case("integer", json!({"minimum": 3}), json!(3.0), "")]
    #[case("integer", json!({"minimum": 3}), json!(2.0), "x is 2.0, expected a whole number from 3")]
    #[case("integer", json!({"maximum": 3}), json!(4.0), "x is 4.0, expected a whole number up to 3")]
    #[case("integer", json!({"default": 1}), json!(null), "")]
    #[case("float", json!({"minimum": 0.1, "maximum": 0.3}), json!(0.1), "")]
    #[case("float", json!({"minimum": 0.1, "maximum": 0.3}), json!(0.3), "")]
    #[case("float", json!({"minimum": 0.1, "maximum": 0.3}), json!(0.4), "x is 0.4, expected a number from 0.1 to 0.3")]
    #[case("float", json!({}), json!([1.0]), "x is a list of 1, expected a number")]
    #[case("float", json!({"default": 1}), json!(null), "")]
    #[case("datetime", json!({}), json!(1_767_225_600.0), "")]
    #[case("datetime", json!({}), json!("2026-01-01"), "x is \"2026-01-01\", expected seconds since 1970")]
    #[case("datetime", json!({"default": "2026-01-01T00:00:00"}), json!(null), "")]
    #[case("duration", json!({"minimum": 900}), json!(900.0), "")]
    #[case("duration", json!({"minimum": 900}), json!(899.0), "x is 899.0, expected a number of seconds from 900")]
    #[case("duration", json!({}), json!({}), "x is an object, expected a number of seconds")]
    #[case("duration", json!({"default": 1}), json!(null), "")]
    fn a_value_fits_or_the_fault_says_why(
        #[case] kind: &str,
        #[case] more: Value,
        #[case] x: Value,
        #[case] expected: &str,
    ) {
        assert_eq!(fault(kind, more, x), expected);
    }

    #[test]
    fn only_the_options_of_a_text_are_allowed() {
        let options = json!({"enum_options": [
            {"key_name": "a", "display_name": "A"},
            {"key_name": "b", "display_name": "B"},
        ]});
        assert_eq!(fault("string", options.clone(), json!("b")), "");
        let expected = "x is \"B\", expected one of a, b";
        assert_eq!(fault("string", options, json!("B")), expected);
    }

    #[rstest]
    #[case("greater", 2.0, "x is 2.0, expected more than y, which is 2.0")]
    #[case("greater", 3.0, "")]
    #[case("greater_or_eq", 1.0, "x is 1.0, expected at least y, which is 2.0")]
    #[case("greater_or_eq", 2.0, "")]
    #[case("smaller", 2.0, "x is 2.0, expected less than y, which is 2.0")]
    #[case("smaller", 1.0, "")]
    #[case("smaller_or_eq", 3.0, "x is 3.0, expected at most y, which is 2.0")]
    #[case("smaller_or_eq", 2.0, "")]
    #[case("eq", 3.0, "x is 3.0, expected the same as y, which is 2.0")]
    #[case("eq", 2.0, "")]
    fn a_constraint_looks_at_another_value(
        #[case] relation: &str,
        #[case] x: f64,
        #[case] expected: &str,
    ) {
        let definitions = json!([
            {"parameter_type": "datetime", "key_name": "x",
             "constraints": [{"other_key_name": "y", "relation": relation}]},
            {"parameter_type": "datetime", "key_name": "y", "default": "2026-01-01T00:00:00"},
        ]);
        let faults = faults_of(definitions.clone(), json!({"x": x, "y": 2.0}));
        assert_eq!(faults.concat(), expected);
        assert_eq!(faults_of(definitions, json!({"x": x})).concat(), "");
    }

    #[test]
    fn every_fault_is_told_and_what_is_not_defined_is_left_alone() {
        let definitions = json!([
            {"parameter_type": "boolean", "key_name": "a"},
            {"parameter_type": "boolean", "key_name": "b"},
        ]);
        assert_eq!(
            faults_of(definitions, json!({"b": 1.0, "c": 2.0})),
            ["a is missing", "b is 1.0, expected true or false"]
        );
    }
}
