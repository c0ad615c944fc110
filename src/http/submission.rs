//! What the form to submit a job asks for: fields to an order, checked against the workflow's definition.
//! Pure.

use std::time::Duration;

use jiff::civil::DateTime;
use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use serde_json::{Map, Value};

use super::upload::{self, Field};
use crate::actions::submission::Order;
use crate::domain::parameters;
use crate::domain::workflow::Catalogue;
use crate::proto::WorkflowParameter;
use crate::proto::workflow_parameter::ParameterType;
use crate::telemetry::report::one_line;
use crate::wire::job_submission::JobPriority;

/// What comes before a parameter's key in the name of its field.
pub(super) const PARAMETER: &str = "param.";
/// Characters of a text field.
const MAX_TEXT: usize = 10_000;

/// What was filled in, as it was.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Filled {
    pub(super) token: String,
    /// The id of its job, sealed.
    pub(super) ticket: String,
    pub(super) workflow: String,
    pub(super) reference: String,
    pub(super) priority: String,
    pub(super) timeout: String,
    /// By the parameters' keys.
    pub(super) params: Vec<(String, String)>,
}

impl Filled {
    /// What makes it another job.
    pub(super) fn content(&self) -> String {
        let Filled {
            token: _,
            ticket: _,
            workflow,
            reference,
            priority,
            timeout,
            params,
        } = self;
        format!("{:?}", (workflow, reference, priority, timeout, params))
    }

    /// What a parameter was filled in with.
    pub(super) fn param(&self, key: &str) -> Option<&str> {
        let mut params = self.params.iter();
        params.find_map(|(one, text)| (one == key).then_some(text.as_str()))
    }
}

/// Reads a form, and the file that comes with it.
///
/// # Errors
/// What is wrong with it.
pub(super) fn read<'b>(content_type: &str, body: &'b [u8]) -> Result<(Filled, &'b [u8]), String> {
    let mut filled = Filled::default();
    let mut esdl: &[u8] = &[];
    for Field { name, content } in upload::fields(content_type, body)? {
        if name == "esdl" {
            esdl = content;
            continue;
        }
        let shown = one_line(&name);
        let text = std::str::from_utf8(content).map_err(|_| format!("{shown}: no text"))?;
        if text.len() > MAX_TEXT || text.contains('\0') {
            return Err(format!(
                "{shown}: at most {MAX_TEXT} characters, and no NUL"
            ));
        }
        let text = text.to_owned();
        match (name.as_str(), name.strip_prefix(PARAMETER)) {
            (_, Some(key)) => filled.params.push((key.to_owned(), text)),
            ("token", None) => filled.token = text,
            ("ticket", None) => filled.ticket = text,
            ("workflow", None) => filled.workflow = text,
            ("reference", None) => filled.reference = text,
            ("priority", None) => filled.priority = text,
            ("timeout", None) => filled.timeout = text,
            (_, None) => return Err(format!("{shown} is not known here")),
        }
    }
    Ok((filled, esdl))
}

/// What is to be submitted.
///
/// # Errors
/// Everything that does not fit.
pub(super) fn order(
    filled: &Filled,
    esdl: &[u8],
    catalogue: &Catalogue,
) -> Result<Order, Vec<String>> {
    let mut faults = Vec::new();
    let mut params = Map::new();
    match catalogue.definition(&filled.workflow) {
        None => faults.push(format!(
            "there is no workflow {}",
            one_line(&filled.workflow)
        )),
        Some(definition) => {
            params = values(filled, &definition.parameters);
            faults = parameters::faults(&definition.parameters, &params);
            let known = |key: &str| definition.parameters.iter().any(|one| one.key_name == key);
            let unknown = filled.params.iter().filter(|(key, _)| !known(key));
            faults.extend(unknown.map(|(key, _)| format!("{} is not known here", one_line(key))));
        }
    }
    let priority = match filled.priority.as_str() {
        "low" => JobPriority::Low,
        "" | "medium" => JobPriority::Medium,
        "high" => JobPriority::High,
        other => {
            faults.push(format!(
                "priority is {}, expected low, medium or high",
                one_line(other)
            ));
            JobPriority::Medium
        }
    };
    let timeout = timeout(&filled.timeout).unwrap_or_else(|fault| {
        faults.push(fault);
        None
    });
    let esdl = text_of(esdl).unwrap_or_else(|fault| {
        faults.push(fault.to_owned());
        String::new()
    });
    match faults.is_empty() {
        true => Ok(Order {
            esdl,
            workflow: filled.workflow.clone(),
            params,
            reference: Some(filled.reference.clone()).filter(|text| !text.is_empty()),
            priority,
            timeout,
        }),
        false => Err(faults),
    }
}

fn text_of(esdl: &[u8]) -> Result<String, &'static str> {
    const NO_ESDL: &str = "the file is no ESDL: it is not XML";
    if esdl.is_empty() {
        return Err("the ESDL file is missing, or empty");
    }
    let text = std::str::from_utf8(esdl).map_err(|_| NO_ESDL)?;
    let bare = text.trim_start_matches('\u{feff}');
    match bare.trim_start().starts_with('<') && !text.contains('\0') {
        true => Ok(bare.to_owned()),
        false => Err(NO_ESDL),
    }
}

fn timeout(text: &str) -> Result<Option<Duration>, String> {
    /// What has room in a submission.
    const LONGEST: Duration = Duration::from_millis(u32::MAX as u64);
    let text = text.trim();
    if text.is_empty() {
        return Ok(None);
    }
    let parsed: Option<SignedDuration> = text.parse().ok();
    let parsed = parsed.and_then(|time| Duration::try_from(time).ok());
    match parsed.filter(|time| !time.is_zero() && *time <= LONGEST) {
        Some(time) => Ok(Some(time)),
        None => Err(format!(
            "timeout is {}, expected a length of time such as 90s, 10m or 1h30m, and at most 49 days",
            one_line(text)
        )),
    }
}

/// What was filled in, as values; what is none of its kind stays a text, for which it is refused. What was
/// left empty is left out.
fn values(filled: &Filled, definitions: &[WorkflowParameter]) -> Map<String, Value> {
    let mut values = Map::new();
    for definition in definitions {
        let key = &definition.key_name;
        let Some(text) = filled.param(key).filter(|text| !text.is_empty()) else {
            continue;
        };
        let value = match &definition.parameter_type {
            None | Some(ParameterType::StringParameter(_)) => None,
            Some(ParameterType::BooleanParameter(_)) => text.parse().ok().map(Value::Bool),
            Some(
                ParameterType::IntegerParameter(_)
                | ParameterType::FloatParameter(_)
                | ParameterType::DurationParameter(_),
            ) => {
                let number = text.trim().parse().ok();
                number
                    .and_then(serde_json::Number::from_f64)
                    .map(Value::Number)
            }
            Some(ParameterType::DatetimeParameter(_)) => seconds(text).map(Value::from),
        };
        let value = value.unwrap_or_else(|| Value::from(text));
        values.insert(key.clone(), value);
    }
    values
}

/// A job's parameters, as the fields of a form have them.
pub(super) fn written(
    definitions: &[WorkflowParameter],
    params: &Map<String, Value>,
) -> Vec<(String, String)> {
    let fields = definitions.iter().filter_map(|definition| {
        let value = params.get(&definition.key_name)?;
        let text = match (value, &definition.parameter_type) {
            (Value::Null, _) => return None,
            (Value::String(text), _) => text.clone(),
            (Value::Number(seconds), Some(ParameterType::DatetimeParameter(_))) => time(seconds)?,
            (value, _) => value.to_string(),
        };
        Some((definition.key_name.clone(), text))
    });
    fields.collect()
}

/// A parameter's default, as its field has it.
fn default(definition: &WorkflowParameter) -> Option<String> {
    match definition.parameter_type.as_ref()? {
        ParameterType::StringParameter(kind) => kind.default.clone(),
        ParameterType::BooleanParameter(kind) => kind.default.map(|one| one.to_string()),
        ParameterType::IntegerParameter(kind) => kind.default.map(|one| one.to_string()),
        ParameterType::FloatParameter(kind) => kind.default.map(|one| one.to_string()),
        ParameterType::DurationParameter(kind) => kind.default.map(|one| one.to_string()),
        ParameterType::DatetimeParameter(kind) => kind.default.clone(),
    }
}

/// The time in UTC that is so many seconds after 1970.
fn time(seconds: &serde_json::Number) -> Option<String> {
    let since = SignedDuration::try_from_secs_f64(seconds.as_f64()?).ok()?;
    let time = Timestamp::from_duration(since).ok()?;
    Some(time.strftime("%Y-%m-%dT%H:%M:%S").to_string())
}

/// What was filled in otherwise than a job has it; what was left empty stays as it was.
///
/// # Errors
/// Everything that does not fit then.
pub(super) fn changes(
    filled: &[(String, String)],
    definitions: &[WorkflowParameter],
    own: &Map<String, Value>,
) -> Result<Map<String, Value>, Vec<String>> {
    let before = written(definitions, own);
    let is_untouched = |(key, text): &&(String, String)| {
        let definition = definitions.iter().find(|one| one.key_name == *key);
        definition.is_some_and(|definition| {
            let own = before.iter().find(|(one, _)| one == key);
            // A field is filled in with the default of what the job has not.
            let own = own.map(|(_, own)| own.clone());
            let own = own.or_else(|| default(definition));
            own.is_some_and(|own| is_given_back(definition, &own, text))
        })
    };
    let changed = filled.iter().filter(|one| !is_untouched(one));
    let changed = Filled {
        params: changed.cloned().collect(),
        ..Filled::default()
    };
    let known = |key: &str| definitions.iter().any(|one| one.key_name == key);
    let unknown = changed.params.iter().filter(|(key, _)| !known(key));
    let mut faults: Vec<_> = unknown
        .map(|(key, _)| format!("{} is not known here", one_line(key)))
        .collect();
    let values = values(&changed, definitions);
    if !values.is_empty() {
        let mut all = own.clone();
        all.extend(values.clone());
        faults.extend(parameters::faults(definitions, &all));
    }
    match faults.is_empty() {
        true => Ok(values),
        false => Err(faults),
    }
}

/// Whether a field with `own` that nobody touches gives `text` back: an `input` has no line breaks, and a
/// browser leaves out seconds that are 0.
fn is_given_back(definition: &WorkflowParameter, own: &str, text: &str) -> bool {
    let is_time = matches!(
        definition.parameter_type,
        Some(ParameterType::DatetimeParameter(_))
    );
    if is_time && let (Some(own), Some(time)) = (second(own), second(text)) {
        return own == time;
    }
    let letters = |text: &str| text.replace(['\r', '\n'], "");
    letters(own) == letters(text)
}

/// The seconds since 1970 of a time in UTC.
fn seconds(text: &str) -> Option<f64> {
    #[expect(
        clippy::cast_precision_loss,
        reason = "what comes over the wire is a double as well"
    )]
    second(text).map(|second| second as f64)
}

/// The same, without fractions.
fn second(text: &str) -> Option<i64> {
    let time: DateTime = text.trim().parse().ok()?;
    let time = time.to_zoned(TimeZone::UTC).ok()?;
    Some(time.timestamp().as_second())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    const ESDL: &[u8] = b"\xef\xbb\xbf<?xml version='1.0'?><esdl/>";

    fn catalogue() -> Catalogue {
        let parameter = |key: &str, kind: &str| json!({"key_name": key, "parameter_type": kind});
        let file = json!([{
            "workflow_type_name": "w",
            "workflow_type_description_name": "W",
            "workflow_parameters": [
                parameter("text", "string"),
                parameter("truth", "boolean"),
                parameter("whole", "integer"),
                parameter("number", "float"),
                parameter("time", "datetime"),
                {"key_name": "length", "parameter_type": "duration", "default": 3600, "minimum": 60},
            ],
        }]);
        Catalogue::parse(&file.to_string()).unwrap()
    }

    fn filled() -> Filled {
        let params = [
            ("text", "a<b>"),
            ("truth", "false"),
            ("whole", "3"),
            ("number", "1.5"),
            ("time", "2026-01-01T00:00"),
            ("length", ""),
        ];
        Filled {
            workflow: "w".to_owned(),
            params: params
                .map(|(key, text)| (key.to_owned(), text.to_owned()))
                .into(),
            ..Filled::default()
        }
    }

    #[test]
    fn what_is_filled_in_becomes_an_order() {
        let filled = Filled {
            reference: "mine".to_owned(),
            priority: "high".to_owned(),
            timeout: "1h30m".to_owned(),
            ..filled()
        };
        let order = order(&filled, ESDL, &catalogue()).unwrap();
        assert_eq!(order.esdl, "<?xml version='1.0'?><esdl/>");
        assert_eq!(order.reference.as_deref(), Some("mine"));
        assert_eq!(order.priority, JobPriority::High);
        assert_eq!(order.timeout, Some(Duration::from_secs(5400)));
        let expected = json!({
            "text": "a<b>", "truth": false, "whole": 3.0, "number": 1.5, "time": 1_767_225_600.0,
        });
        assert_eq!(Value::Object(order.params), expected);
    }

    #[rstest]
    #[case("whole", "3.5", "whole is 3.5, expected a whole number")]
    #[case("whole", "many", "whole is \"many\", expected a whole number")]
    #[case("number", "NaN", "number is \"NaN\", expected a number")]
    #[case("truth", "yes", "truth is \"yes\", expected true or false")]
    #[case("time", "soon", "time is \"soon\", expected seconds since 1970")]
    #[case("length", "59", "length is 59.0, expected a number of seconds from 60")]
    #[case("text", "", "text is missing")]
    #[case("other", "1", "other is not known here")]
    fn what_does_not_fit_is_told(#[case] key: &str, #[case] text: &str, #[case] fault: &str) {
        let mut filled = filled();
        filled.params.retain(|(one, _)| one != key);
        filled.params.push((key.to_owned(), text.to_owned()));
        assert_eq!(order(&filled, ESDL, &catalogue()).unwrap_err(), [fault]);
    }

    #[rstest]
    #[case(b"", "missing, or empty")]
    #[case(b"\xff\xfe<\0", "not XML")]
    #[case(b"PK\x03\x04", "not XML")]
    #[case(b"<e>\0</e>", "not XML")]
    fn what_is_no_esdl_is_refused(#[case] esdl: &[u8], #[case] fault: &str) {
        let faults = order(&filled(), esdl, &catalogue()).unwrap_err();
        assert!(faults.len() == 1 && faults[0].contains(fault), "{faults:?}");
    }

    #[test]
    fn all_that_is_wrong_is_told_at_once() {
        let filled = Filled {
            workflow: "x".to_owned(),
            priority: "top".to_owned(),
            timeout: "50d".to_owned(),
            ..Filled::default()
        };
        let faults = order(&filled, b"", &catalogue()).unwrap_err();
        assert_eq!(faults.len(), 4, "{faults:?}");
    }

    #[test]
    fn what_is_changed_of_a_job_is_what_was_filled_in_otherwise() {
        let file = json!([{
            "workflow_type_name": "w",
            "workflow_type_description_name": "W",
            "workflow_parameters": [
                {"key_name": "price", "parameter_type": "float", "maximum": 100.0},
                {"key_name": "rate", "parameter_type": "float", "default": 0.5},
                {"key_name": "start", "parameter_type": "datetime"},
                {"key_name": "fast", "parameter_type": "boolean"},
            ],
        }]);
        let catalogue = Catalogue::parse(&file.to_string()).unwrap();
        let definitions = &catalogue.definition("w").unwrap().parameters;
        let own = json!({"price": 1.5, "start": 86_400.0, "fast": true, "other": [1]});
        let own = own.as_object().unwrap();
        let text = |key: &str, text: &str| (key.to_owned(), text.to_owned());
        let before = written(definitions, own);
        let expected = [
            text("price", "1.5"),
            text("start", "1970-01-02T00:00:00"),
            text("fast", "true"),
        ];
        assert_eq!(before, expected);
        let changed = |more: &[(String, String)]| {
            let mut filled = before.clone();
            filled.retain(|(key, _)| !more.iter().any(|(one, _)| one == key));
            filled.extend_from_slice(more);
            changes(&filled, definitions, own).map(Value::Object)
        };
        assert_eq!(changed(&[]), Ok(json!({})));
        assert_eq!(
            changed(&[text("rate", "0.5"), text("price", "")]),
            Ok(json!({}))
        );
        assert_eq!(changed(&[text("price", "2")]), Ok(json!({"price": 2.0})));
        let start = changed(&[text("start", "1970-01-01T00:01")]);
        assert_eq!(start, Ok(json!({"start": 60.0})));
        let faults = changed(&[text("price", "500")]).unwrap_err();
        assert!(faults[0].contains("price is 500"), "{faults:?}");
        let faults = changed(&[text("prise", "5")]).unwrap_err();
        assert_eq!(faults, ["prise is not known here"]);
    }

    #[rstest]
    #[case("string", json!({}), json!("a\r\nb\n"), "ab")]
    #[case("string", json!({"default": "d"}), json!(""), "")]
    #[case("string", json!({"default": "a\nb"}), json!(null), "ab")]
    #[case("boolean", json!({"default": true}), json!("a\nb"), "a\r\nb")]
    #[case("boolean", json!({"default": true}), json!(1.0), "1.0")]
    #[case("float", json!({"default": 1.5}), json!(null), "1.5")]
    #[case("datetime", json!({}), json!(86_400.0), "1970-01-02T00:00")]
    #[case("datetime", json!({}), json!(86_400.75), "1970-01-02T00:00")]
    #[case("datetime", json!({}), json!(86_401.75), "1970-01-02T00:00:01")]
    #[case("datetime", json!({}), json!(-0.5), "1969-12-31T23:59:59")]
    #[case("datetime", json!({}), json!("1970-01-02 00:00:00"), "1970-01-02T00:00")]
    #[case("datetime", json!({"default": "1970-01-02T00:00:00"}), json!(1e300), "1970-01-02T00:00")]
    fn what_a_browser_makes_of_a_field_that_nobody_touches_is_no_change(
        #[case] kind: &str,
        #[case] more: Value,
        #[case] own: Value,
        #[case] given_back: &str,
    ) {
        let mut parameter = json!({"key_name": "x", "parameter_type": kind});
        let members = parameter.as_object_mut().unwrap();
        members.extend(more.as_object().unwrap().clone());
        let file = json!([{
            "workflow_type_name": "w",
            "workflow_type_description_name": "W",
            "workflow_parameters": [parameter],
        }]);
        let catalogue = Catalogue::parse(&file.to_string()).unwrap();
        let definitions = &catalogue.definition("w").unwrap().parameters;
        let own = json!({"x": own});
        let filled = [("x".to_owned(), given_back.to_owned())];
        let changed = changes(&filled, definitions, own.as_object().unwrap());
        assert_eq!(changed, Ok(Map::new()));
    }
}
