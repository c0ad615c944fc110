//! The story of a job, below its facts in `jobs show`.

use std::fmt::Write;

use omotes_orchestrator::config::{self, Config};
use omotes_orchestrator::domain::overview::Story;
use omotes_orchestrator::telemetry::report::{harmless, readable};

/// Calls parameters as the workflow definitions do, if they can be read.
pub(crate) fn name_parameters(config: &Config, story: &mut Story) {
    let catalogue = config::read_catalogue(&config.workflow_config_path).ok();
    let definition = catalogue
        .as_ref()
        .zip(story.job.workflow.as_deref())
        .and_then(|(catalogue, workflow)| catalogue.definition(workflow));
    if let Some(definition) = definition {
        story.name_parameters(&definition.parameters);
    }
}

/// What has happened to it, what it was given, and what it has left.
pub(crate) fn text(story: &Story) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "\nstory");
    for event in &story.events {
        let _ = writeln!(text, "  {:.0}  {}", event.at, event.what);
        for fact in &event.evidence {
            let _ = writeln!(text, "  {:<20}  - {fact}", "");
        }
    }
    if !story.parameters.is_empty() {
        let _ = writeln!(text, "\nparameters");
    }
    for one in &story.parameters {
        // It is the key that `--param` takes.
        let key = match one.name() == one.key {
            true => String::new(),
            false => format!(" ({})", harmless(&one.key)),
        };
        let _ = writeln!(text, "  {}{key}: {}", harmless(one.name()), one.text());
    }
    if !story.esdl_messages.is_empty() {
        let _ = writeln!(text, "\nmessages");
    }
    for one in &story.esdl_messages {
        let asset = one.asset.as_deref().map(harmless);
        let asset = asset.map(|asset| format!(" ({asset})")).unwrap_or_default();
        let lines = indented(&one.text);
        let _ = writeln!(text, "  {}{asset}: {}", one.severity, lines.trim_start());
    }
    if let Some(logs) = &story.logs {
        let _ = writeln!(text, "\nlogs\n{}", indented(logs));
    }
    text
}

fn indented(text: &str) -> String {
    let lines: Vec<_> = text.trim_end().lines().map(readable).collect();
    format!("  {}", lines.join("\n  "))
}
