//! What is checked of a job before it is submitted: whoever runs the command can still put it right.

use anyhow::{anyhow, bail};
use omotes_orchestrator::config::{self, Config};
use omotes_orchestrator::domain::esdl;
use omotes_orchestrator::domain::parameters::typed;
use omotes_orchestrator::domain::text::{harmless, one_line};
use omotes_orchestrator::domain::workflow::Catalogue;
use serde_json::{Map, Value};

use super::Submit;
use crate::cli::warn;

/// The parameters of a job that is worth submitting, and the queues that its tasks go to.
///
/// # Errors
/// All that is wrong with it.
pub(super) fn check(
    config: &Config,
    submit: &Submit,
    esdl: &str,
) -> anyhow::Result<(Map<String, Value>, Vec<String>)> {
    let catalogue = config::read_catalogue(&config.workflow_config_path);
    let name = &submit.workflow;
    let tasks = tasks_in(catalogue.as_ref().ok(), name);
    if submit.unchecked {
        return Ok((typed::plain(&submit.params), tasks));
    }
    let mut faults = Vec::new();
    if let Some(fault) = esdl::fault(esdl) {
        let file = submit.esdl.display();
        faults.push(format!("{file} is no ESDL: {}", one_line(&fault)));
    }
    let params = match &catalogue {
        Ok(catalogue) => params(catalogue, submit, &mut faults),
        Err(error) => {
            let error = one_line(&format!("{error:#}"));
            warn(&format!("its parameters are not checked: {error}"));
            typed::plain(&submit.params)
        }
    };
    if !faults.is_empty() {
        faults.push("nothing was submitted; --unchecked does all the same".to_owned());
        bail!("{}", faults.join("\n"));
    }
    Ok((params, tasks))
}

/// The queues that the tasks of a workflow go to, as far as is known here.
pub(in crate::cli) fn tasks(config: &Config, workflow: &str) -> Vec<String> {
    let catalogue = config::read_catalogue(&config.workflow_config_path);
    tasks_in(catalogue.ok().as_ref(), workflow)
}

fn tasks_in(catalogue: Option<&Catalogue>, workflow: &str) -> Vec<String> {
    match catalogue {
        Some(catalogue) => catalogue.tasks_of(workflow),
        None => vec![workflow.to_owned()],
    }
}

fn params(catalogue: &Catalogue, submit: &Submit, faults: &mut Vec<String>) -> Map<String, Value> {
    let name = &submit.workflow;
    let Some(definition) = catalogue.definition(name) else {
        faults.push(no_workflow(catalogue, name));
        return Map::new();
    };
    match typed::read(&definition.parameters, &submit.params) {
        Ok(params) => params,
        Err(wrong) => {
            faults.extend(wrong.iter().map(|one| harmless(one)));
            Map::new()
        }
    }
}

/// Parameters that are written in place of some that a job of this workflow has.
///
/// # Errors
/// All that is wrong with them.
pub(in crate::cli) fn changes(
    config: &Config,
    workflow: &str,
    written: &[(String, String)],
) -> anyhow::Result<Map<String, Value>> {
    if written.is_empty() {
        return Ok(Map::new());
    }
    let catalogue = match config::read_catalogue(&config.workflow_config_path) {
        Ok(catalogue) => catalogue,
        Err(error) => {
            let error = one_line(&format!("{error:#}"));
            warn(&format!("the parameters are not checked: {error}"));
            return Ok(typed::plain(written));
        }
    };
    let Some(definition) = catalogue.definition(workflow) else {
        bail!(
            "{}\nnothing was submitted; --unchecked does all the same",
            no_workflow(&catalogue, workflow)
        );
    };
    typed::read_some(&definition.parameters, written).map_err(|wrong| {
        let wrong: Vec<_> = wrong.iter().map(|one| harmless(one)).collect();
        anyhow!(
            "{}\nnothing was submitted; --unchecked does all the same",
            wrong.join("\n")
        )
    })
}

fn no_workflow(catalogue: &Catalogue, name: &str) -> String {
    let names = catalogue.names();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let name_shown = one_line(name);
    if names.is_empty() {
        return format!("there is no workflow {name_shown}: none is defined");
    }
    let meant = match typed::did_you_mean(name, &names) {
        Some(meant) => format!(": did you mean {}?", one_line(meant)),
        None => ".".to_owned(),
    };
    // As many as there are: whoever reads this looks for theirs.
    let known = harmless(&names.join(", "));
    format!("there is no workflow {name_shown}{meant} There are {known}")
}
