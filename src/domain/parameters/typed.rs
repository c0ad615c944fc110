//! Parameters as people write them on a command line: dates, lengths of time, numbers and texts, read as
//! the definitions of their workflow have them.

use jiff::civil;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Span, SpanRelativeTo, Timestamp};
use serde_json::{Map, Value};

use super::faults;
use crate::proto::{WorkflowParameter, workflow_parameter::ParameterType};

/// What was written, without a definition to go by: JSON where it parses as such, a text otherwise.
pub fn plain(written: &[(String, String)]) -> Map<String, Value> {
    let plain = |(key, text): &(String, String)| (key.clone(), json_or_text(text));
    written.iter().map(plain).collect()
}

/// The parameters that were written.
///
/// # Errors
/// All that does not fit the definitions, each as a text that names the parameter.
pub fn read(
    definitions: &[WorkflowParameter],
    written: &[(String, String)],
) -> Result<Map<String, Value>, Vec<String>> {
    let mut params = Map::new();
    let mut wrong = Vec::new();
    for (key, text) in written {
        let Some(definition) = definitions.iter().find(|one| one.key_name == *key) else {
            wrong.push(unknown(definitions, key));
            continue;
        };
        match definition
            .parameter_type
            .as_ref()
            .map_or_else(|| Ok(json_or_text(text)), |kind| value(kind, text))
        {
            Ok(value) => drop(params.insert(key.clone(), value)),
            Err(expected) => wrong.push(format!("{key} is {text:?}, expected {expected}")),
        }
    }
    // Of one that could not be read is said why, and not that it is missing.
    let is_told = |fault: &String| {
        let mut keys = written.iter().map(|(key, _)| key);
        keys.any(|key| !params.contains_key(key) && *fault == format!("{key} is missing"))
    };
    wrong.extend(
        faults(definitions, &params)
            .into_iter()
            .filter(|one| !is_told(one)),
    );
    match wrong.is_empty() {
        true => Ok(params),
        false => Err(wrong),
    }
}

fn json_or_text(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| Value::from(text))
}

fn value(kind: &ParameterType, text: &str) -> Result<Value, &'static str> {
    let json = json_or_text(text);
    match kind {
        // A text may look like a number.
        ParameterType::StringParameter(_) => Ok(match json {
            Value::String(_) | Value::Null => json,
            Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => text.into(),
        }),
        ParameterType::BooleanParameter(_)
        | ParameterType::IntegerParameter(_)
        | ParameterType::FloatParameter(_) => Ok(json),
        ParameterType::DatetimeParameter(_) => match json {
            Value::Number(_) | Value::Null => Ok(json),
            _ => seconds_since_1970(text).map(Value::from).ok_or(
                "a date such as 2026-01-31, 2026-01-31T12:00 (UTC) or 2026-01-31T12:00+01:00, or seconds \
                 since 1970",
            ),
        },
        ParameterType::DurationParameter(_) => match json {
            Value::Number(_) | Value::Null => Ok(json),
            _ => seconds(text)
                .map(Value::from)
                .ok_or("a length of time such as 15min, 1h, 1h30m or 2d, or a number of seconds"),
        },
    }
}

fn seconds_since_1970(text: &str) -> Option<f64> {
    let text = text.trim();
    let utc = |time: civil::DateTime| time.to_zoned(TimeZone::UTC).ok().map(|at| at.timestamp());
    let at = match text.parse::<Timestamp>() {
        Ok(at) => at,
        // Without an offset it is UTC, on whatever machine it is written.
        Err(_) => utc(text.parse::<civil::DateTime>().ok()?)?,
    };
    Some(at.as_duration().as_secs_f64())
}

/// The length of a time that people have written, with days of 24 hours.
pub fn length(text: &str) -> Option<SignedDuration> {
    let span: Span = text.trim().parse().ok()?;
    span.to_duration(SpanRelativeTo::days_are_24_hours()).ok()
}

fn seconds(text: &str) -> Option<f64> {
    length(text).map(|length| length.as_secs_f64())
}

/// Parameters that were written in place of some that a job has: nothing is missing.
///
/// # Errors
/// As [`read`].
pub fn read_some(
    definitions: &[WorkflowParameter],
    written: &[(String, String)],
) -> Result<Map<String, Value>, Vec<String>> {
    let is_written = |one: &&WorkflowParameter| written.iter().any(|(key, _)| *key == one.key_name);
    let wanted: Vec<_> = definitions.iter().filter(is_written).cloned().collect();
    let (known, others): (Vec<_>, Vec<_>) = written
        .iter()
        .cloned()
        .partition(|(key, _)| wanted.iter().any(|one| one.key_name == *key));
    let read = read(&wanted, &known);
    if others.is_empty() {
        return read;
    }
    let mut wrong = read.err().unwrap_or_default();
    wrong.extend(others.iter().map(|(key, _)| unknown(definitions, key)));
    Err(wrong)
}

/// That there is no such parameter, and which there are.
fn unknown(definitions: &[WorkflowParameter], key: &str) -> String {
    let names: Vec<_> = definitions
        .iter()
        .map(|one| one.key_name.as_str())
        .collect();
    if names.is_empty() {
        return format!("{key} is not known: the workflow has no parameters");
    }
    let meant = match did_you_mean(key, &names) {
        Some(name) => format!(": did you mean {name}?"),
        None => ".".to_owned(),
    };
    format!("{key} is not known{meant} There are {}", names.join(", "))
}

/// The name that somebody may have meant.
pub fn did_you_mean<'n>(text: &str, names: &[&'n str]) -> Option<&'n str> {
    let distance = |name: &&str| strsim::osa_distance(&text.to_lowercase(), &name.to_lowercase());
    let nearest = names.iter().copied().min_by_key(distance)?;
    (distance(&nearest) <= nearest.len() / 4 + 1).then_some(nearest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::workflow::Catalogue;
    use rstest::rstest;
    use serde_json::json;

    #[test]
    fn what_is_written_in_place_of_others_is_checked_and_nothing_is_missing() {
        let file = json!([{
            "workflow_type_name": "w",
            "workflow_type_description_name": "W",
            "workflow_parameters": [
                {"parameter_type": "float", "key_name": "price", "maximum": 100.0},
                {"parameter_type": "string", "key_name": "name"},
            ],
        }]);
        let catalogue = Catalogue::parse(&file.to_string()).unwrap();
        let definitions = &catalogue.definition("w").unwrap().parameters;
        let read = |key: &str, text: &str| {
            let params = read_some(definitions, &[(key.to_owned(), text.to_owned())]);
            params.map(Value::Object).map_err(|wrong| wrong.join("; "))
        };
        assert_eq!(read("price", "5"), Ok(json!({"price": 5})));
        let slip = read("prise", "5").unwrap_err();
        assert!(
            slip.contains("did you mean price?") && slip.contains("name"),
            "{slip}"
        );
        assert!(read("price", "500").unwrap_err().contains("price"));
        assert!(read("price", "abc").unwrap_err().contains("price"));
    }

    fn read_as(kind: &str, text: &str) -> Result<Value, String> {
        let file = json!([{
            "workflow_type_name": "w",
            "workflow_type_description_name": "W",
            "workflow_parameters": [{"parameter_type": kind, "key_name": "start_time"}],
        }]);
        let catalogue = Catalogue::parse(&file.to_string()).unwrap();
        let definitions = &catalogue.definition("w").unwrap().parameters;
        read(definitions, &[("start_time".to_owned(), text.to_owned())])
            .map(|params| params["start_time"].clone())
            .map_err(|faults| faults.join("; "))
    }

    #[rstest]
    #[case("datetime", "2026-01-01", json!(1_767_225_600.0))]
    #[case("datetime", "2026-01-01T00:00", json!(1_767_225_600.0))]
    #[case("datetime", "2026-01-01 00:00:00", json!(1_767_225_600.0))]
    #[case("datetime", "2026-01-01T01:00:00+01:00", json!(1_767_225_600.0))]
    #[case("datetime", "2026-01-01T00:00:00Z", json!(1_767_225_600.0))]
    #[case("datetime", "1767225600", json!(1_767_225_600))]
    #[case("duration", "1h", json!(3600.0))]
    #[case("duration", "1h30m", json!(5400.0))]
    #[case("duration", "15 min", json!(900.0))]
    #[case("duration", "2d", json!(172_800.0))]
    #[case("duration", "PT15M", json!(900.0))]
    #[case("duration", "3600", json!(3600))]
    #[case("integer", "3", json!(3))]
    #[case("float", "0.5", json!(0.5))]
    #[case("boolean", "true", json!(true))]
    #[case("string", "7", json!("7"))]
    #[case("string", "true", json!("true"))]
    #[case("string", "a b", json!("a b"))]
    #[case("string", "\"a b\"", json!("a b"))]
    fn a_value_is_read_as_it_is_defined(
        #[case] kind: &str,
        #[case] text: &str,
        #[case] expected: Value,
    ) {
        assert_eq!(read_as(kind, text), Ok(expected));
    }

    #[rstest]
    #[case(
        "datetime",
        "tomorrow",
        "start_time is \"tomorrow\", expected a date such as"
    )]
    #[case(
        "datetime",
        "2026-02-30",
        "start_time is \"2026-02-30\", expected a date such as"
    )]
    #[case(
        "duration",
        "1 fortnight",
        "start_time is \"1 fortnight\", expected a length of time"
    )]
    #[case("integer", "3.5", "start_time is 3.5, expected a whole number")]
    #[case("integer", "three", "start_time is \"three\", expected a whole number")]
    #[case("boolean", "yes", "start_time is \"yes\", expected true or false")]
    fn what_cannot_be_read_is_told_once(
        #[case] kind: &str,
        #[case] text: &str,
        #[case] expected: &str,
    ) {
        let said = read_as(kind, text).unwrap_err();
        assert!(said.starts_with(expected), "{said}");
        assert!(!said.contains(';'), "{said}");
    }

    #[test]
    fn a_key_that_is_not_known_is_named_with_those_that_are() {
        let file = json!([{
            "workflow_type_name": "w",
            "workflow_type_description_name": "W",
            "workflow_parameters": [
                {"parameter_type": "duration", "key_name": "timestep", "default": 3600},
                {"parameter_type": "boolean", "key_name": "verbose"},
            ],
        }]);
        let catalogue = Catalogue::parse(&file.to_string()).unwrap();
        let definitions = &catalogue.definition("w").unwrap().parameters;
        let write = |key: &str| vec![(key.to_owned(), "1".to_owned())];
        assert_eq!(
            read(definitions, &write("timestpe")).unwrap_err(),
            [
                "timestpe is not known: did you mean timestep? There are timestep, verbose",
                "verbose is missing"
            ]
        );
        let other = read(definitions, &write("x")).unwrap_err();
        assert_eq!(other[0], "x is not known. There are timestep, verbose");
        assert!(read(&[], &write("x")).unwrap_err()[0].ends_with("has no parameters"));
    }
}
