//! Reads a definition file: a JSON list of workflows, with every fault by its path in the file.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::Value;

use super::node::{Node, check_queue_name, delivery_limit, queue_limit, timeout_ms, whole_number};
use super::steps::{Step, Steps};
use super::{Definition, Limits};
use crate::proto::{
    AvailableWorkflows, BooleanParameter, DateTimeParameter, DurationParameter, FloatParameter,
    IntegerParameter, StringEnum, StringParameter, Workflow, WorkflowParameter,
    workflow_parameter::{Constraint, ParameterType, constraint::RelationType},
};

/// What a definition file says, as far as it can be read, and all that is wrong with it.
pub(super) fn read(
    text: &str,
    faults: &mut Vec<String>,
) -> (AvailableWorkflows, HashMap<String, Definition>) {
    let mut workflows = Vec::new();
    let mut definitions = HashMap::new();
    let file: Value = match serde_json::from_str(text) {
        Ok(file) => file,
        Err(error) => {
            faults.push(format!("it is not JSON: {error}"));
            Value::Array(Vec::new())
        }
    };
    for node in (Node::root(&file)).items(faults) {
        let Some(workflow) = workflow(&node, faults) else {
            continue;
        };
        let definition = Definition {
            limits: limits_of(&node, faults),
            steps: steps_of(&node, &workflow, faults),
            parameters: workflow.parameters.clone(),
        };
        if definitions
            .insert(workflow.type_name.clone(), definition)
            .is_some()
        {
            faults.push(format!(
                "{}.workflow_type_name: {:?} stands in the file twice",
                node.path, workflow.type_name
            ));
        }
        workflows.push(workflow);
    }
    check_limits(&definitions, faults);
    (AvailableWorkflows { workflows }, definitions)
}

/// A queue that several workflows share has the same limits in all of them that state any.
fn check_limits(definitions: &HashMap<String, Definition>, faults: &mut Vec<String>) {
    let mut stated = BTreeMap::new();
    let mut by_name: Vec<_> = definitions.iter().collect();
    by_name.sort_by_key(|(name, _)| *name);
    for (name, definition) in by_name {
        let steps = definition.steps.all().iter().flat_map(Step::alternatives);
        for step in steps.filter(|step| step.limit.holds()) {
            let (first, limit) = *stated.entry(&step.task).or_insert((name, step.limit));
            if limit != step.limit {
                faults.push(format!(
                    "$: window, max_running or paused of the task {:?} differ between the \
                     workflows {first:?} and {name:?}",
                    step.task
                ));
            }
        }
    }
}

fn workflow(node: &Node<'_>, faults: &mut Vec<String>) -> Option<Workflow> {
    let type_name = node.required_text("workflow_type_name", faults)?;
    check_queue_name(
        &type_name,
        &format!("{}.workflow_type_name", node.path),
        faults,
    );
    let type_description = node.required_text("workflow_type_description_name", faults)?;
    let parameters = node
        .get("workflow_parameters")
        .map(|list| list.items(faults))
        .unwrap_or_default();
    let mut keys = HashSet::new();
    let parameters = parameters
        .iter()
        .filter_map(|node| {
            let parameter = parameter(node, faults)?;
            if !keys.insert(parameter.key_name.clone()) {
                faults.push(format!(
                    "{}.key_name: {:?} stands in this workflow twice",
                    node.path, parameter.key_name
                ));
            }
            Some(parameter)
        })
        .collect();
    Some(Workflow {
        type_name,
        type_description,
        parameters,
    })
}

/// What the definition says of the workflow's jobs; clients are not told.
fn limits_of(node: &Node<'_>, faults: &mut Vec<String>) -> Limits {
    Limits {
        delivery_limit: delivery_limit(node, faults),
        default_timeout_ms: timeout_ms(node, "default_timeout_sec", faults),
    }
}

/// The steps of a workflow: as defined, or the one of its own name.
fn steps_of(node: &Node<'_>, workflow: &Workflow, faults: &mut Vec<String>) -> Steps {
    let parameters = workflow.parameters.iter();
    let declared = parameters
        .map(|parameter| parameter.key_name.as_str())
        .collect();
    let limit = queue_limit(node, faults);
    if node.get("steps").is_some() && limit.holds() {
        faults.push(format!(
            "{}: window, max_running and paused stand in the step whose queue they are for",
            node.path
        ));
    }
    node.get("steps")
        .and_then(|steps| Steps::read(&steps, &declared, faults))
        .unwrap_or_else(|| Steps::of_workflow(&workflow.type_name, limit))
}

fn parameter(node: &Node<'_>, faults: &mut Vec<String>) -> Option<WorkflowParameter> {
    let key_name = node.required_text("key_name", faults);
    let kind = node.required_text("parameter_type", faults)?;
    let parameter_type = match kind.as_str() {
        "string" => ParameterType::StringParameter(StringParameter {
            default: node.text("default", faults),
            enum_options: enum_options(node, faults),
        }),
        "boolean" => ParameterType::BooleanParameter(BooleanParameter {
            default: node.optional("default", "true or false", faults, Value::as_bool),
        }),
        "integer" => {
            let read = |key, faults: &mut _| {
                node.optional(key, "a whole number of 64 bits", faults, whole_number)
            };
            ParameterType::IntegerParameter(IntegerParameter {
                default: read("default", faults),
                minimum: read("minimum", faults),
                maximum: read("maximum", faults),
            })
        }
        "float" => ParameterType::FloatParameter(FloatParameter {
            default: float(node, "default", faults),
            minimum: float(node, "minimum", faults),
            maximum: float(node, "maximum", faults),
        }),
        "datetime" => ParameterType::DatetimeParameter(DateTimeParameter {
            default: node.optional("default", "an ISO 8601 date and time", faults, |value| {
                let text = value.as_str()?;
                is_iso_8601(text).then(|| text.to_owned())
            }),
        }),
        "duration" => ParameterType::DurationParameter(DurationParameter {
            default: float(node, "default", faults),
            minimum: float(node, "minimum", faults),
            maximum: float(node, "maximum", faults),
        }),
        other => {
            faults.push(format!(
                "{}.parameter_type: found {other:.60?}, expected string, boolean, integer, float, \
                 datetime or duration",
                node.path
            ));
            return None;
        }
    };
    Some(WorkflowParameter {
        key_name: key_name?,
        title: node.text("title", faults),
        description: node.text("description", faults),
        parameter_type: Some(parameter_type),
        constraints: constraints(node, faults),
    })
}

fn enum_options(node: &Node<'_>, faults: &mut Vec<String>) -> Vec<StringEnum> {
    let Some(list) = node.get("enum_options") else {
        return Vec::new();
    };
    let options = list.items(faults);
    options
        .iter()
        .filter_map(|option| {
            let key_name = option.required_text("key_name", faults)?;
            let display_name = option.required_text("display_name", faults)?;
            Some(StringEnum {
                key_name,
                display_name,
            })
        })
        .collect()
}

fn constraints(node: &Node<'_>, faults: &mut Vec<String>) -> Vec<Constraint> {
    let Some(list) = node.get("constraints") else {
        return Vec::new();
    };
    let constraints = list.items(faults);
    constraints
        .iter()
        .filter_map(|constraint| {
            let other_key_name = constraint.required_text("other_key_name", faults)?;
            let relation = constraint.required_text("relation", faults)?;
            match RelationType::from_str_name(&relation.to_uppercase()) {
                Some(relation) => Some(Constraint {
                    other_key_name,
                    relation: relation.into(),
                }),
                None => {
                    faults.push(format!(
                        "{}.relation: found {relation:.60?}, expected greater, greater_or_eq, \
                         smaller, smaller_or_eq or eq",
                        constraint.path
                    ));
                    None
                }
            }
        })
        .collect()
}

/// A number on the wire has 32 bits.
#[expect(
    clippy::cast_possible_truncation,
    reason = "losing digits to 32 bits is what the contract asks for; overflow is a fault"
)]
fn float(node: &Node<'_>, key: &str, faults: &mut Vec<String>) -> Option<f32> {
    node.optional(key, "a number of 32 bits", faults, |value| {
        value
            .as_f64()
            .map(|number| number as f32)
            .filter(|number| number.is_finite())
    })
}

fn is_iso_8601(text: &str) -> bool {
    text.parse::<jiff::civil::DateTime>().is_ok() || text.parse::<jiff::Timestamp>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::workflow::{Catalogue, Limits};
    use base64::prelude::{BASE64_STANDARD, Engine};
    use prost::Message;
    use rstest::rstest;

    #[test]
    fn the_recorded_announcement_comes_out_byte_for_byte() {
        let captures: Value =
            serde_json::from_str(include_str!("../../../tests/wire/captures.json")).unwrap();
        let recorded = captures["available_workflows"][0]["body_b64"]
            .as_str()
            .unwrap();
        let config = include_str!("../../../tests/wire/available_workflows.config.json");
        let catalogue = Catalogue::parse(config).unwrap();
        let encoded = catalogue.announcement().encode_to_vec();
        assert_eq!(BASE64_STANDARD.encode(encoded), recorded);
    }

    #[test]
    fn what_is_in_the_file_is_known() {
        let catalogue = Catalogue::parse(
            r#"[{"workflow_type_name": "a", "workflow_type_description_name": "A", "more": 1},
                {"workflow_type_name": "b", "workflow_type_description_name": "B",
                 "delivery_limit": 3, "default_timeout_sec": 1.5}]"#,
        )
        .unwrap();
        let limits = |name| Some(catalogue.definition(name)?.limits);
        assert_eq!(limits("a"), Some(Limits::default()));
        let own = Limits {
            delivery_limit: Some(3),
            default_timeout_ms: Some(1500),
        };
        assert_eq!(limits("b"), Some(own));
        assert_eq!(limits("A"), None);
    }

    #[test]
    fn what_is_allowed_at_queues_is_known() {
        let catalogue = Catalogue::parse(
            r#"[{"workflow_type_name": "a", "workflow_type_description_name": "A",
                 "max_running": 1},
                {"workflow_type_name": "b", "workflow_type_description_name": "B",
                 "steps": [{"task": "a"}, {"task": "c", "paused": true,
                            "on_error": {"fallback": {"task": "d", "window": 2}}}]}]"#,
        )
        .unwrap();
        let limits = crate::domain::turns::in_words(&catalogue.queue_limits());
        assert_eq!(
            limits,
            "a at most 1 running; c paused; d at most 2 waiting in RabbitMQ"
        );
    }

    /// `parameter` put into an otherwise faultless file.
    fn with_parameter(parameter: &str) -> String {
        format!(
            r#"[{{"workflow_type_name": "w", "workflow_type_description_name": "W",
                  "workflow_parameters": [{parameter}]}}]"#
        )
    }

    #[rstest]
    #[case::not_json("[", "it is not JSON: EOF while parsing a list at line 1 column 1")]
    #[case::no_list("{}", "$: found an object, expected a list")]
    #[case::no_object("[7]", "$[0]: found 7, expected an object")]
    #[case::no_name("[{}]", "$[0]: workflow_type_name is missing, expected a text")]
    #[case::no_description(
        r#"[{"workflow_type_name": "a"}]"#,
        "$[0]: workflow_type_description_name is missing, expected a text"
    )]
    #[case::name_of_wrong_type(
        r#"[{"workflow_type_name": 3}]"#,
        "$[0].workflow_type_name: found 3, expected a text"
    )]
    #[case::name_of_rabbitmqs(
        r#"[{"workflow_type_name": "amq.a", "workflow_type_description_name": "A"}]"#,
        "$[0].workflow_type_name: found \"amq.a\", expected something else than amq.…, for it names a \
         queue, and RabbitMQ keeps such names to itself"
    )]
    #[case::empty_name(
        r#"[{"workflow_type_name": "", "workflow_type_description_name": "A"}]"#,
        "$[0].workflow_type_name: found 0 bytes, expected 1 to 255 without NUL, for it names a queue"
    )]
    #[case::same_name_twice(
        r#"[{"workflow_type_name": "a", "workflow_type_description_name": "A"},
            {"workflow_type_name": "a", "workflow_type_description_name": "B"}]"#,
        r#"$[1].workflow_type_name: "a" stands in the file twice"#
    )]
    #[case::no_start_allowed(
        r#"[{"workflow_type_name": "a", "workflow_type_description_name": "A",
             "delivery_limit": 0}]"#,
        "$[0].delivery_limit: found 0, expected a whole number of starts, at least 1"
    )]
    #[case::timeout_too_long(
        r#"[{"workflow_type_name": "a", "workflow_type_description_name": "A",
             "default_timeout_sec": 1e10}]"#,
        "$[0].default_timeout_sec: found 10000000000.0, expected a number of seconds above 0, up to 49 days"
    )]
    #[case::no_task_allowed(
        r#"[{"workflow_type_name": "a", "workflow_type_description_name": "A", "window": 0}]"#,
        "$[0].window: found 0, expected a whole number of tasks, at least 1"
    )]
    #[case::negative_limit(
        r#"[{"workflow_type_name": "a", "workflow_type_description_name": "A",
             "max_running": -1}]"#,
        "$[0].max_running: found -1, expected a whole number of tasks, at least 1"
    )]
    #[case::pause_of_wrong_type(
        r#"[{"workflow_type_name": "a", "workflow_type_description_name": "A", "paused": 1}]"#,
        "$[0].paused: found 1, expected true or false"
    )]
    #[case::limit_of_no_queue(
        r#"[{"workflow_type_name": "a", "workflow_type_description_name": "A", "window": 1,
             "steps": [{"task": "b"}]}]"#,
        "$[0]: window, max_running and paused stand in the step whose queue they are for"
    )]
    #[case::two_limits_of_a_queue(
        r#"[{"workflow_type_name": "a", "workflow_type_description_name": "A", "window": 1},
            {"workflow_type_name": "b", "workflow_type_description_name": "B",
             "steps": [{"task": "a", "window": 2}]}]"#,
        r#"$: window, max_running or paused of the task "a" differ between the workflows "a" and "b""#
    )]
    #[case::parameters_no_list(
        r#"[{"workflow_type_name": "a", "workflow_type_description_name": "A",
             "workflow_parameters": "x"}]"#,
        r#"$[0].workflow_parameters: found "x", expected a list"#
    )]
    fn a_fault_is_named(#[case] file: &str, #[case] fault: &str) {
        assert_eq!(Catalogue::parse(file).unwrap_err().to_string(), fault);
    }

    #[rstest]
    #[case::unknown_type(
        r#"{"key_name": "k", "parameter_type": "colour"}"#,
        r#"$[0].workflow_parameters[0].parameter_type: found "colour", expected string, boolean, integer, float, datetime or duration"#
    )]
    #[case::fraction(
        r#"{"key_name": "k", "parameter_type": "integer", "minimum": 1.5}"#,
        "$[0].workflow_parameters[0].minimum: found 1.5, expected a whole number of 64 bits"
    )]
    #[case::no_number(
        r#"{"key_name": "k", "parameter_type": "duration", "default": "1h"}"#,
        r#"$[0].workflow_parameters[0].default: found "1h", expected a number of 32 bits"#
    )]
    #[case::beyond_32_bits(
        r#"{"key_name": "k", "parameter_type": "float", "maximum": 1e39}"#,
        "$[0].workflow_parameters[0].maximum: found 1e+39, expected a number of 32 bits"
    )]
    #[case::no_date(
        r#"{"key_name": "k", "parameter_type": "datetime", "default": "soon"}"#,
        r#"$[0].workflow_parameters[0].default: found "soon", expected an ISO 8601 date and time"#
    )]
    #[case::no_boolean(
        r#"{"key_name": "k", "parameter_type": "boolean", "default": 0}"#,
        "$[0].workflow_parameters[0].default: found 0, expected true or false"
    )]
    #[case::relation(
        r#"{"key_name": "k", "parameter_type": "float",
            "constraints": [{"other_key_name": "o", "relation": "near"}]}"#,
        r#"$[0].workflow_parameters[0].constraints[0].relation: found "near", expected greater, greater_or_eq, smaller, smaller_or_eq or eq"#
    )]
    #[case::option_without_display_name(
        r#"{"key_name": "k", "parameter_type": "string", "enum_options": [{"key_name": "o"}]}"#,
        "$[0].workflow_parameters[0].enum_options[0]: display_name is missing, expected a text"
    )]
    #[case::same_key_twice(
        r#"{"key_name": "k", "parameter_type": "string"}, {"key_name": "k", "parameter_type": "float"}"#,
        r#"$[0].workflow_parameters[1].key_name: "k" stands in this workflow twice"#
    )]
    fn a_parameters_fault_is_named(#[case] parameter: &str, #[case] fault: &str) {
        let file = with_parameter(parameter);
        assert_eq!(Catalogue::parse(&file).unwrap_err().to_string(), fault);
    }

    #[test]
    fn all_faults_are_reported_at_once() {
        let file = with_parameter(
            r#"{"parameter_type": "integer", "default": "x", "minimum": []},
               {"key_name": "k", "parameter_type": "?"}"#,
        );
        assert_eq!(
            Catalogue::parse(&file).unwrap_err().to_string(),
            "$[0].workflow_parameters[0]: key_name is missing, expected a text\n\
             $[0].workflow_parameters[0].default: found \"x\", expected a whole number of 64 bits\n\
             $[0].workflow_parameters[0].minimum: found a list of 0, expected a whole number of 64 bits\n\
             $[0].workflow_parameters[1].parameter_type: found \"?\", expected string, boolean, \
             integer, float, datetime or duration"
        );
    }

    #[test]
    fn a_whole_double_is_an_integer_and_a_relation_has_any_case() {
        let file = with_parameter(
            r#"{"key_name": "k", "parameter_type": "integer", "default": 3.0, "title": null,
                "constraints": [{"other_key_name": "o", "relation": "Smaller_Or_Eq"}]}"#,
        );
        let catalogue = Catalogue::parse(&file).unwrap();
        let parameter = &catalogue.announcement().workflows[0].parameters[0];
        assert_eq!(
            parameter.parameter_type,
            Some(ParameterType::IntegerParameter(IntegerParameter {
                default: Some(3),
                minimum: None,
                maximum: None,
            }))
        );
        assert_eq!(
            parameter.constraints[0].relation(),
            RelationType::SmallerOrEq
        );
        assert_eq!(parameter.title, None);
    }
}
