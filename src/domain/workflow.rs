//! The workflow definitions: from the configuration file to what clients are told.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

pub(crate) use self::node::found;
use crate::domain::turns;
use crate::proto::{AvailableWorkflows, WorkflowParameter};

pub use self::steps::{Argument, OnError, Step, StepParameters, Steps};

mod definitions;
mod node;
mod steps;

/// The workflows that jobs can be submitted for.
#[derive(Debug, Clone, PartialEq)]
pub struct Catalogue {
    announcement: AvailableWorkflows,
    definitions: HashMap<String, Definition>,
}

/// What a decision about a job needs to know of its workflow.
#[derive(Debug, Clone, PartialEq)]
pub struct Definition {
    pub limits: Limits,
    pub steps: Steps,
    pub parameters: Vec<WorkflowParameter>,
}

/// What a workflow's definition says of its jobs beside their parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Instead of the common limit.
    pub delivery_limit: Option<usize>,
    /// Where the client gives no timeout, in milliseconds.
    pub default_timeout_ms: Option<u32>,
}

/// All faults of a definition file, one line each.
#[derive(Debug, PartialEq, thiserror::Error)]
pub struct DefinitionFaults(Vec<String>);

impl fmt::Display for DefinitionFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.join("\n"))
    }
}

impl Catalogue {
    /// Reads the text of a definition file: a JSON list of workflows.
    ///
    /// # Errors
    /// Every fault in it, with its path in the file, what was found and what was expected.
    pub fn parse(text: &str) -> Result<Catalogue, DefinitionFaults> {
        let mut faults = Vec::new();
        let (announcement, definitions) = definitions::read(text, &mut faults);
        if faults.is_empty() {
            Ok(Catalogue {
                announcement,
                definitions,
            })
        } else {
            Err(DefinitionFaults(faults))
        }
    }

    pub fn definition(&self, workflow_type: &str) -> Option<&Definition> {
        self.definitions.get(workflow_type)
    }

    /// The longest timeout that a workflow gives its jobs.
    pub fn longest_default_timeout_ms(&self) -> Option<u32> {
        let definitions = self.definitions.values();
        definitions
            .filter_map(|definition| definition.limits.default_timeout_ms)
            .max()
    }

    /// All workflows' names.
    pub fn names(&self) -> Vec<String> {
        let workflows = self.announcement.workflows.iter();
        workflows
            .map(|workflow| workflow.type_name.clone())
            .collect()
    }

    /// The task queues of all workflows.
    pub fn tasks(&self) -> BTreeSet<&str> {
        let definitions = self.definitions.values();
        definitions
            .flat_map(|definition| definition.steps.tasks())
            .collect()
    }

    /// The tasks of a workflow; of one that is not defined, that of its name.
    pub fn tasks_of(&self, workflow: &str) -> Vec<String> {
        let Some(definition) = self.definition(workflow) else {
            return vec![workflow.to_owned()];
        };
        definition.steps.tasks().map(str::to_owned).collect()
    }

    /// The tasks of the workflows that do not have just the one of their own name.
    pub fn tasks_by_workflow(&self) -> BTreeMap<String, Vec<String>> {
        let definitions = self.definitions.iter();
        definitions
            .map(|(name, definition)| {
                let tasks = definition.steps.tasks().map(str::to_owned);
                (name.clone(), tasks.collect::<Vec<_>>())
            })
            .filter(|(name, tasks)| tasks.as_slice() != std::slice::from_ref(name))
            .collect()
    }

    /// The workflows of whose jobs nothing is kept of their single step, and whose task this is.
    pub fn plain_workflows_of(&self, task: &str) -> Vec<&str> {
        let is_its = |definition: &Definition| {
            let step = definition.steps.plain();
            step.is_some_and(|step| step.task == task)
        };
        let definitions = self.definitions.iter();
        definitions
            .filter(|(_, definition)| is_its(definition))
            .map(|(name, _)| name.as_str())
            .collect()
    }

    /// What the definitions allow at task queues; those without limits are not among them.
    pub fn queue_limits(&self) -> turns::Limits {
        let definitions = self.definitions.values();
        definitions
            .flat_map(|definition| definition.steps.all())
            .flat_map(Step::alternatives)
            .filter(|step| step.limit.holds())
            .map(|step| (step.task.clone(), step.limit))
            .collect()
    }

    /// What clients are told.
    pub fn announcement(&self) -> &AvailableWorkflows {
        &self.announcement
    }
}

/// The catalogue in force, which changes when its file is read again.
#[derive(Debug)]
pub struct CurrentCatalogue(RwLock<Arc<Catalogue>>);

impl CurrentCatalogue {
    pub fn new(catalogue: Catalogue) -> CurrentCatalogue {
        CurrentCatalogue(RwLock::new(Arc::new(catalogue)))
    }

    pub fn get(&self) -> Arc<Catalogue> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn replace(&self, catalogue: Catalogue) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(catalogue);
    }
}
