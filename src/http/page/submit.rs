//! The form to submit a job, as the workflow definitions have it.

use maud::{Markup, html};

use super::layout::{Acting, Frame, Sheet};
use super::words::command;
use crate::http::submission::{Filled, PARAMETER};
use crate::proto::workflow_parameter::constraint::RelationType;
use crate::proto::workflow_parameter::{Constraint, ParameterType};
use crate::proto::{AvailableWorkflows, StringParameter, Workflow, WorkflowParameter};
use crate::telemetry::report::{harmless, one_line, readable};

/// The form, with what was filled in and why that is refused.
pub(in crate::http) fn submit(
    frame: &Frame<'_>,
    acting: &Acting,
    workflows: &AvailableWorkflows,
    filled: &Filled,
    faults: &[String],
) -> Sheet {
    let all = &workflows.workflows;
    let chosen = all
        .iter()
        .find(|workflow| workflow.type_name == filled.workflow);
    let content = html! {
        nav aria-label="Back" { a href="/" { "← all jobs" } }
        h1 { "Submit a job" }
        @if !faults.is_empty() {
            div.alarm #faults tabindex="-1" role="alert" {
                p { b { "Nothing was submitted." } }
                ul { @for fault in faults { li { (readable(fault)) } } }
                p.dim { "The file has to be chosen again." }
            }
        }
        (choice(all, chosen))
        @if let Some(workflow) = chosen { (form(frame, acting, workflow, filled, faults)) }
        @else if all.is_empty() {
            div.empty { p { b { "No workflow is defined." } " What the definition file says: " (command("omotes-orchestrator workflows list")) } }
        }
    };
    Sheet::new("Submit a job", content)
}

/// Which workflow; another one has other parameters.
fn choice(all: &[Workflow], chosen: Option<&Workflow>) -> Markup {
    html! {
        form.choose action="/submit" {
            label for="workflow" { "Workflow" }
            select #workflow name="workflow" {
                @if chosen.is_none() { option value="" { "Choose one" } }
                @for workflow in all {
                    @let name = &workflow.type_name;
                    option value=(name) selected[chosen.is_some_and(|one| one.type_name == *name)] {
                        (harmless(name))
                        @if !workflow.type_description.is_empty() { " – " (one_line(&workflow.type_description)) }
                    }
                }
            }
            button { "Choose" }
        }
    }
}

/// Whether any of the faults is that of a field, with whose name they begin.
pub(super) fn is_faulty(faults: &[String], name: &str) -> bool {
    faults.iter().any(|fault| {
        let rest = fault.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with(' '))
    })
}

fn form(
    frame: &Frame<'_>,
    acting: &Acting,
    workflow: &Workflow,
    filled: &Filled,
    faults: &[String],
) -> Markup {
    let is_faulty = |name: &str| is_faulty(faults, name);
    let name = one_line(&workflow.type_name);
    let example =
        format!("omotes-orchestrator submit model.esdl --workflow {name} --output result.esdl");
    html! {
        form.fields method="post" action="/submit" enctype="multipart/form-data" autocomplete="off" {
            input type="hidden" name="token" value=(acting.token);
            input type="hidden" name="ticket" value=(filled.ticket);
            input type="hidden" name="workflow" value=(workflow.type_name);
            div.field data-faulty[is_faulty("the ESDL file") || is_faulty("the file")] {
                label for="esdl" { "ESDL file" }
                input #esdl type="file" name="esdl" accept=".esdl,.xml,text/xml,application/xml" required;
            }
            @for (place, parameter) in workflow.parameters.iter().enumerate() {
                (field(place, parameter, filled, is_faulty(&parameter.key_name)))
            }
            div.field {
                label for="reference" { "Reference" }
                input #reference name="reference" maxlength="300" value=(filled.reference) aria-describedby="about-reference";
                span.dim #about-reference { "Your name for the job." }
            }
            div.field data-faulty[is_faulty("priority")] {
                label for="priority" { "Priority" }
                select #priority name="priority" {
                    @for level in ["medium", "high", "low"] {
                        option value=(level) selected[filled.priority == level] { (level) }
                    }
                }
            }
            div.field data-faulty[is_faulty("timeout")] {
                label for="timeout" { "Timeout" }
                input #timeout name="timeout" size="10" value=(filled.timeout) aria-describedby="about-timeout";
                span.dim #about-timeout { "How long it may run: 90s, 10m, 1h30m. Empty for what the workflow gives it." }
            }
            p.dim {
                "The job is shown here until its end and after. No client waits for its output: it is on the job's page as long as KEEP_RESULTS_SEC says. To have it in a file: "
                (command(&example))
            }
            div { button.primary { "Submit to " (name) } }
        }
        @if frame.parts.iter().any(|part| part.why.is_some()) {
            p.alarm { "Something does not work now: " a href="/" { "see what" } "." }
        }
    }
}

/// A parameter, with what its definition says of it.
pub(super) fn field(
    place: usize,
    parameter: &WorkflowParameter,
    filled: &Filled,
    is_faulty: bool,
) -> Markup {
    let key = &parameter.key_name;
    let Some(kind) = &parameter.parameter_type else {
        return html! {};
    };
    let id = format!("param-{place}");
    let about = format!("about-{id}");
    let title = parameter.title.as_deref().filter(|title| !title.is_empty());
    let title = title.map_or_else(|| in_words(key), one_line);
    let description = parameter.description.as_deref().map(readable);
    let hints = hints(kind, &parameter.constraints);
    html! {
        div.field data-faulty[is_faulty] {
            label for=(id) { (title) @if title != *key { " " code.dim { (harmless(key)) } } }
            (input(&id, &about, parameter, kind, filled.param(key)))
            span.dim id=(about) {
                @if let Some(description) = description { (description) " " }
                (hints)
            }
        }
    }
}

/// `start_time` as people write it.
fn in_words(key: &str) -> String {
    let text = one_line(&key.replace('_', " "));
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_uppercase().chain(letters).collect(),
        None => text,
    }
}

fn input(
    id: &str,
    about: &str,
    parameter: &WorkflowParameter,
    kind: &ParameterType,
    filled: Option<&str>,
) -> Markup {
    let name = format!("{PARAMETER}{}", parameter.key_name);
    let number =
        |step: &str, minimum: Option<String>, maximum: Option<String>, default: Option<String>| {
            let is_required = default.is_none();
            let value = filled.map(str::to_owned).or(default).unwrap_or_default();
            html! { input id=(id) name=(name) type="number" step=(step) min=[minimum] max=[maximum]
            value=(value) required[is_required] aria-describedby=(about); }
        };
    let text = |limit: Option<f32>| limit.map(|limit| limit.to_string());
    match kind {
        ParameterType::StringParameter(kind) if kind.enum_options.is_empty() => {
            let value = filled.or(kind.default.as_deref()).unwrap_or_default();
            html! { input id=(id) name=(name) value=(value) required[kind.default.is_none()] aria-describedby=(about); }
        }
        ParameterType::StringParameter(kind) => options(id, about, &name, kind, filled),
        ParameterType::BooleanParameter(kind) => truth(id, about, &name, kind.default, filled),
        ParameterType::IntegerParameter(kind) => {
            let text = |limit: Option<i64>| limit.map(|limit| limit.to_string());
            number(
                "1",
                text(kind.minimum),
                text(kind.maximum),
                text(kind.default),
            )
        }
        ParameterType::FloatParameter(kind) => number(
            "any",
            text(kind.minimum),
            text(kind.maximum),
            text(kind.default),
        ),
        ParameterType::DurationParameter(kind) => number(
            "any",
            text(kind.minimum),
            text(kind.maximum),
            text(kind.default),
        ),
        ParameterType::DatetimeParameter(kind) => {
            let value = filled.or(kind.default.as_deref()).unwrap_or_default();
            html! { input id=(id) name=(name) type="datetime-local" step="1" value=(value)
            required[kind.default.is_none()] aria-describedby=(about); }
        }
    }
}

/// The option of a value that is none of the others: a browser would choose the first of these instead.
fn other(value: Option<&str>) -> Markup {
    html! {
        @if let Some(value) = value {
            option value=(value) selected { @if value.is_empty() { "(empty)" } @else { (one_line(value)) } }
        }
    }
}

fn truth(id: &str, about: &str, name: &str, default: Option<bool>, filled: Option<&str>) -> Markup {
    let of_default = default.map(|value| value.to_string());
    let chosen = filled.map(str::to_owned).or(of_default);
    let is_option = |text: &str| match text {
        "" => default.is_none(),
        text => ["true", "false"].contains(&text),
    };
    html! {
        select id=(id) name=(name) aria-describedby=(about) required[default.is_none()] {
            @if default.is_none() { option value="" { "Choose" } }
            (other(filled.filter(|text| !is_option(text))))
            @for value in ["true", "false"] {
                option value=(value) selected[chosen.as_deref() == Some(value)] { (value) }
            }
        }
    }
}

fn options(
    id: &str,
    about: &str,
    name: &str,
    kind: &StringParameter,
    filled: Option<&str>,
) -> Markup {
    let chosen = filled.or(kind.default.as_deref());
    let is_option = |key: &str| kind.enum_options.iter().any(|one| one.key_name == key);
    let has_default = kind.default.as_deref().is_some_and(is_option);
    let is_other = |text: &&str| !is_option(text) && (has_default || !text.is_empty());
    html! {
        select id=(id) name=(name) aria-describedby=(about) required[kind.default.is_none()] {
            @if !has_default {
                option value="" { @match &kind.default { Some(default) => { (one_line(default)) } None => { "Choose" } } }
            }
            (other(filled.filter(is_other)))
            @for option in &kind.enum_options {
                option value=(option.key_name) selected[chosen == Some(&option.key_name)] {
                    (one_line(if option.display_name.is_empty() { &option.key_name } else { &option.display_name }))
                }
            }
        }
    }
}

/// Its range, and what it has to be beside others.
fn hints(kind: &ParameterType, constraints: &[Constraint]) -> String {
    let range =
        |what: &str, minimum: Option<String>, maximum: Option<String>| match (minimum, maximum) {
            (None, None) => what.to_owned(),
            (Some(minimum), None) => format!("{what} from {minimum}"),
            (None, Some(maximum)) => format!("{what} up to {maximum}"),
            (Some(minimum), Some(maximum)) => format!("{what} from {minimum} to {maximum}"),
        };
    let single = |limit: Option<f32>| limit.map(|limit| limit.to_string());
    let whole = |limit: Option<i64>| limit.map(|limit| limit.to_string());
    let mut hints = match kind {
        ParameterType::StringParameter(_) | ParameterType::BooleanParameter(_) => Vec::new(),
        ParameterType::IntegerParameter(kind) => {
            vec![range(
                "A whole number",
                whole(kind.minimum),
                whole(kind.maximum),
            )]
        }
        ParameterType::FloatParameter(kind) => {
            vec![range(
                "A number",
                single(kind.minimum),
                single(kind.maximum),
            )]
        }
        ParameterType::DurationParameter(kind) => {
            vec![range(
                "A number of seconds",
                single(kind.minimum),
                single(kind.maximum),
            )]
        }
        ParameterType::DatetimeParameter(_) => vec!["In UTC".to_owned()],
    };
    hints.extend(constraints.iter().map(|constraint| {
        let relation = match constraint.relation() {
            RelationType::Greater => "more than",
            RelationType::GreaterOrEq => "at least",
            RelationType::Smaller => "less than",
            RelationType::SmallerOrEq => "at most",
            RelationType::Eq => "the same as",
        };
        format!("{relation} {}", one_line(&constraint.other_key_name))
    }));
    match hints.is_empty() {
        true => String::new(),
        false => format!("{}.", hints.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;
    use crate::domain::workflow::Catalogue;

    #[rstest]
    #[case("string", json!({}), Some("b"), &["", "a", "*b"])]
    #[case("string", json!({}), Some("c"), &["", "*c", "a", "b"])]
    #[case("string", json!({}), Some(""), &["", "a", "b"])]
    #[case("string", json!({"default": "b"}), None, &["a", "*b"])]
    #[case("string", json!({"default": "b"}), Some("c\nd"), &["*c\nd", "a", "b"])]
    #[case("string", json!({"default": "b"}), Some(""), &["*", "a", "b"])]
    #[case("string", json!({"default": "d"}), None, &["", "a", "b"])]
    #[case("boolean", json!({}), None, &["", "true", "false"])]
    #[case("boolean", json!({}), Some("1.0"), &["", "*1.0", "true", "false"])]
    #[case("boolean", json!({"default": true}), Some("false"), &["true", "*false"])]
    #[case("boolean", json!({"default": true}), Some("1.0"), &["*1.0", "true", "false"])]
    #[case("boolean", json!({"default": true}), Some(""), &["*", "true", "false"])]
    fn what_was_filled_in_is_chosen_even_if_it_is_no_option(
        #[case] kind: &str,
        #[case] more: Value,
        #[case] value: Option<&str>,
        #[case] expected: &[&str],
    ) {
        let mut parameter = json!({"key_name": "x", "parameter_type": kind});
        let members = parameter.as_object_mut().unwrap();
        members.extend(more.as_object().unwrap().clone());
        if kind == "string" {
            let option = |key: &str| json!({"key_name": key, "display_name": key});
            members.insert("enum_options".to_owned(), json!([option("a"), option("b")]));
        }
        let file = json!([{
            "workflow_type_name": "w",
            "workflow_type_description_name": "W",
            "workflow_parameters": [parameter],
        }]);
        let catalogue = Catalogue::parse(&file.to_string()).unwrap();
        let parameter = &catalogue.definition("w").unwrap().parameters[0];
        let filled = Filled {
            params: value
                .map(|value| ("x".to_owned(), value.to_owned()))
                .into_iter()
                .collect(),
            ..Filled::default()
        };
        let page = field(0, parameter, &filled, false).into_string();
        // The selected one has a star before it.
        let options = page.split("<option value=\"").skip(1).map(|option| {
            let (value, rest) = option.split_once('"').unwrap();
            let star = if rest.starts_with(" selected") {
                "*"
            } else {
                ""
            };
            format!("{star}{value}")
        });
        assert_eq!(options.collect::<Vec<_>>(), expected);
    }
}
