//! The steps of a workflow: what an entry's `steps` in the definition file says, with every fault by
//! its path in the file.

use std::collections::HashSet;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::DefinitionFaults;
use super::node::{Node, check_queue_name, delivery_limit, queue_limit, timeout_ms};
use crate::domain::turns::QueueLimit;

/// How many steps a workflow may have.
const MAX_STEPS: usize = 20;
/// How often a step may be tried.
const MAX_ATTEMPTS: u32 = 10;
/// Characters of a title, which leads messages of limited length.
const MAX_TITLE: usize = 100;

/// The steps of a workflow, at least one, in their order.
#[derive(Debug, Clone, PartialEq)]
pub struct Steps {
    steps: Vec<Step>,
    /// The definition that they come from, or one that says the same.
    source: Value,
}

/// A Celery task, and what is to be known for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The Celery task, and the name of its queue.
    pub task: String,
    /// What clients and operators call it.
    pub title: String,
    pub parameters: StepParameters,
    /// Its share of the job's progress, relative to the other steps'; above 0.
    pub weight: f64,
    /// How long it may run, in milliseconds from its START.
    pub timeout_ms: Option<u32>,
    /// Instead of the workflow's.
    pub delivery_limit: Option<usize>,
    /// How often it is tried, at least once.
    pub attempts: u32,
    /// How long after an ERROR the next attempt begins.
    pub retry_wait: Duration,
    pub on_error: OnError,
    /// Whether the time series of its output are kept when the job succeeds.
    pub keep_time_series: bool,
    /// What is allowed at its queue, unless an operator has set something else.
    pub limit: QueueLimit,
}

/// Which of a job's parameters a step's task gets.
#[derive(Debug, Clone, PartialEq)]
pub enum StepParameters {
    All,
    /// By the names that the task knows.
    These(Vec<(String, Argument)>),
}

/// Where the value of a step's parameter comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum Argument {
    /// The job's parameter of this name.
    OfJob(String),
    Constant(Value),
}

/// What follows when a step has failed and is not tried again.
#[derive(Debug, Clone, PartialEq)]
pub enum OnError {
    /// The job fails.
    Fail,
    /// The next step gets the input of the failed one.
    Continue,
    /// Another task gets it in the failed one's place.
    Fallback(Box<Step>),
}

impl Steps {
    /// The single step of a workflow that has none defined: the task of the workflow's own name.
    pub(super) fn of_workflow(name: &str, limit: QueueLimit) -> Steps {
        Steps {
            steps: vec![Step {
                task: name.to_owned(),
                title: name.to_owned(),
                parameters: StepParameters::All,
                weight: 1.0,
                timeout_ms: None,
                delivery_limit: None,
                attempts: 1,
                retry_wait: Duration::ZERO,
                on_error: OnError::Fail,
                keep_time_series: true,
                limit,
            }],
            source: json!([{ "task": name }]),
        }
    }

    /// Reads `steps` of a definition. `declared` are the workflow's parameters.
    pub(super) fn read(
        node: &Node<'_>,
        declared: &HashSet<&str>,
        faults: &mut Vec<String>,
    ) -> Option<Steps> {
        Reader {
            declared: Some(declared),
            faults,
        }
        .steps(node)
    }

    /// The definition, from which [`Steps::from_source`] makes the same steps: a job's steps stay
    /// as they were at its submission.
    pub fn source(&self) -> String {
        self.source.to_string()
    }

    /// # Errors
    /// The faults of a text that is not one of [`Steps::source`].
    pub fn from_source(source: &str) -> Result<Steps, DefinitionFaults> {
        let source: Value = serde_json::from_str(source)
            .map_err(|error| DefinitionFaults(vec![error.to_string()]))?;
        let mut faults = Vec::new();
        let steps = Reader {
            declared: None,
            faults: &mut faults,
        }
        .steps(&Node::root(&source));
        match steps {
            Some(steps) if faults.is_empty() => Ok(steps),
            Some(_) | None => Err(DefinitionFaults(faults)),
        }
    }

    pub fn all(&self) -> &[Step] {
        &self.steps
    }

    /// How many there are, not counting fallbacks.
    pub fn count(&self) -> usize {
        self.steps.len()
    }

    /// The step of a workflow that has just one, about which nothing has to be kept while it runs:
    /// when it has ended, so has the job.
    pub fn plain(&self) -> Option<&Step> {
        match self.steps.as_slice() {
            [step] if step.timeout_ms.is_none() && !step.may_need_its_input_again() => Some(step),
            _ => None,
        }
    }

    /// The step with this number, from 0, or its fallback of this depth.
    pub fn get(&self, number: usize, fallback: usize) -> Option<&Step> {
        (0..fallback).try_fold(self.steps.get(number)?, |step, _| step.fallback())
    }

    /// All tasks, those of fallbacks too.
    pub fn tasks(&self) -> impl Iterator<Item = &str> {
        self.steps
            .iter()
            .flat_map(Step::alternatives)
            .map(|step| step.task.as_str())
    }

    /// The part of the whole that the steps before this one are.
    pub fn share_before(&self, number: usize) -> f64 {
        let weight = |steps: &[Step]| steps.iter().map(|step| step.weight).sum::<f64>();
        let before = self.steps.get(..number).unwrap_or(&self.steps);
        weight(before) / weight(&self.steps)
    }
}

impl Step {
    pub fn fallback(&self) -> Option<&Step> {
        match &self.on_error {
            OnError::Fallback(step) => Some(step),
            OnError::Fail | OnError::Continue => None,
        }
    }

    /// It and its fallbacks, in their order.
    pub fn alternatives(&self) -> impl Iterator<Item = &Step> {
        std::iter::successors(Some(self), |step| step.fallback())
    }

    /// Whether its input may be needed once more, for another attempt or another task.
    pub fn may_need_its_input_again(&self) -> bool {
        self.attempts > 1 || self.on_error != OnError::Fail
    }

    /// What its task gets of a job's parameters. A parameter that the job has not got is left out,
    /// as clients leave it out.
    pub fn arguments(&self, of_job: &Map<String, Value>) -> Map<String, Value> {
        let StepParameters::These(wanted) = &self.parameters else {
            return of_job.clone();
        };
        let value = |argument: &Argument| match argument {
            Argument::OfJob(name) => of_job.get(name).cloned(),
            Argument::Constant(value) => Some(value.clone()),
        };
        wanted
            .iter()
            .filter_map(|(name, argument)| Some((name.clone(), value(argument)?)))
            .collect()
    }
}

/// What may stand in a step.
const STEP_KEYS: &[&str] = &[
    "task",
    "title",
    "parameters",
    "weight",
    "timeout_sec",
    "delivery_limit",
    "retry",
    "on_error",
    "keep_time_series",
    "window",
    "max_running",
    "paused",
];

struct Reader<'r> {
    /// The workflow's parameters; None where they have been looked up already.
    declared: Option<&'r HashSet<&'r str>>,
    faults: &'r mut Vec<String>,
}

impl Reader<'_> {
    fn steps(&mut self, node: &Node<'_>) -> Option<Steps> {
        let items = node.items(self.faults);
        let is_list = node.value.is_array();
        if is_list && (items.is_empty() || items.len() > MAX_STEPS) {
            let expected = format!("1 to {MAX_STEPS} steps");
            self.faults.push(node.expected(&expected));
        }
        let last = items.len().saturating_sub(1);
        let steps: Vec<_> = items
            .iter()
            .enumerate()
            .filter_map(|(number, item)| self.step(item, number == last, &mut Vec::new()))
            .collect();
        (steps.len() == items.len() && !steps.is_empty()).then(|| Steps {
            steps,
            source: node.value.clone(),
        })
    }

    /// Reads a step; `instead_of` are the tasks that it is a fallback of.
    fn step(
        &mut self,
        node: &Node<'_>,
        is_last: bool,
        instead_of: &mut Vec<String>,
    ) -> Option<Step> {
        self.check_keys(node, STEP_KEYS);
        let task = node.required_text("task", self.faults)?;
        check_queue_name(&task, &format!("{}.task", node.path), self.faults);
        if instead_of.contains(&task) {
            self.faults.push(format!(
                "{}.task: {task:?} would be its own fallback",
                node.path
            ));
            return None;
        }
        if !instead_of.is_empty() && node.get("weight").is_some() {
            self.faults.push(format!(
                "{}.weight: a fallback has the weight of the step that it replaces",
                node.path
            ));
        }
        let title = node.optional(
            "title",
            &format!("a text of 1 to {MAX_TITLE} characters in one line"),
            self.faults,
            |value| {
                let title = value.as_str()?;
                let fits = (1..=MAX_TITLE).contains(&title.chars().count());
                (fits && !title.contains(char::is_control)).then(|| title.to_owned())
            },
        );
        instead_of.push(task.clone());
        let (attempts, retry_wait) = self.retry(node);
        Some(Step {
            title: title.unwrap_or_else(|| task.clone()),
            parameters: self.parameters(node),
            weight: node
                .optional("weight", "a number above 0", self.faults, |value| {
                    let weight = value.as_f64()?;
                    (weight > 0.0 && weight <= 1e9).then_some(weight)
                })
                .unwrap_or(1.0),
            timeout_ms: timeout_ms(node, "timeout_sec", self.faults),
            delivery_limit: delivery_limit(node, self.faults),
            attempts,
            retry_wait,
            on_error: self.on_error(node, is_last, instead_of),
            keep_time_series: node
                .optional(
                    "keep_time_series",
                    "true or false",
                    self.faults,
                    Value::as_bool,
                )
                .unwrap_or(true),
            limit: queue_limit(node, self.faults),
            task,
        })
    }

    fn check_keys(&mut self, node: &Node<'_>, known: &[&str]) {
        let keys = node.value.as_object().into_iter().flat_map(Map::keys);
        for key in keys.filter(|key| !known.contains(&key.as_str())) {
            self.faults.push(format!(
                "{}: {key:.60?} is unknown here, expected {}",
                node.path,
                known.join(", ")
            ));
        }
    }

    fn retry(&mut self, node: &Node<'_>) -> (u32, Duration) {
        let Some(retry) = node.get("retry") else {
            return (1, Duration::ZERO);
        };
        if !retry.value.is_object() {
            self.faults.push(retry.expected("an object"));
            return (1, Duration::ZERO);
        }
        self.check_keys(&retry, &["attempts", "wait_sec"]);
        let expected = format!("a whole number from 1 to {MAX_ATTEMPTS}");
        if retry.get("attempts").is_none() {
            let path = &retry.path;
            self.faults
                .push(format!("{path}: attempts is missing, expected {expected}"));
        }
        let attempts = retry.optional("attempts", &expected, self.faults, |value| {
            let attempts = u32::try_from(value.as_u64()?).ok()?;
            (1..=MAX_ATTEMPTS).contains(&attempts).then_some(attempts)
        });
        let expected = "a number of seconds from 0 up to 49 days";
        let wait = retry.optional("wait_sec", expected, self.faults, |value| {
            let wait = Duration::try_from_secs_f64(value.as_f64()?).ok()?;
            u32::try_from(wait.as_millis()).is_ok().then_some(wait)
        });
        (attempts.unwrap_or(1), wait.unwrap_or_default())
    }

    fn on_error(
        &mut self,
        node: &Node<'_>,
        is_last: bool,
        instead_of: &mut Vec<String>,
    ) -> OnError {
        let Some(node) = node.get("on_error") else {
            return OnError::Fail;
        };
        match node.value {
            Value::String(word) if word == "fail" => OnError::Fail,
            Value::String(word) if word == "continue" && !is_last => OnError::Continue,
            Value::String(word) if word == "continue" => {
                let expected = "fail or a fallback, for no step follows";
                self.faults.push(node.expected(expected));
                OnError::Fail
            }
            Value::Object(_) if node.get("fallback").is_some() => {
                self.check_keys(&node, &["fallback"]);
                node.get("fallback")
                    .and_then(|step| self.step(&step, is_last, instead_of))
                    .map_or(OnError::Fail, |step| OnError::Fallback(Box::new(step)))
            }
            _ => {
                let expected = r#""fail", "continue" or an object with "fallback""#;
                self.faults.push(node.expected(expected));
                OnError::Fail
            }
        }
    }

    fn parameters(&mut self, node: &Node<'_>) -> StepParameters {
        let Some(node) = node.get("parameters") else {
            return StepParameters::All;
        };
        match node.value {
            Value::Array(_) => {
                let items = node.items(self.faults);
                let mut names = Vec::with_capacity(items.len());
                for item in &items {
                    if let Some(name) = self.of_job(item) {
                        names.push((name.clone(), Argument::OfJob(name)));
                    }
                }
                StepParameters::These(names)
            }
            Value::Object(map) => {
                let mut arguments = Vec::with_capacity(map.len());
                for (name, value) in map {
                    let item = Node {
                        path: format!("{}.{name}", node.path),
                        value,
                    };
                    if let Some(argument) = self.argument(&item) {
                        arguments.push((name.clone(), argument));
                    }
                }
                StepParameters::These(arguments)
            }
            _ => {
                let expected = "a list of the job's parameters or an object";
                self.faults.push(node.expected(expected));
                StepParameters::All
            }
        }
    }

    fn argument(&mut self, node: &Node<'_>) -> Option<Argument> {
        match node.value {
            Value::Object(map) if map.contains_key("value") => {
                self.check_keys(node, &["value"]);
                map.get("value").cloned().map(Argument::Constant)
            }
            Value::String(_) => self.of_job(node).map(Argument::OfJob),
            _ => {
                let expected = r#"a parameter's name or {"value": …}"#;
                self.faults.push(node.expected(expected));
                None
            }
        }
    }

    /// The name of a parameter that the workflow declares.
    fn of_job(&mut self, node: &Node<'_>) -> Option<String> {
        let Some(name) = node.value.as_str() else {
            self.faults.push(node.expected("a parameter's name"));
            return None;
        };
        if self
            .declared
            .is_some_and(|declared| !declared.contains(name))
        {
            let expected = "a parameter that the workflow declares";
            self.faults.push(node.expected(expected));
        }
        Some(name.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::workflow::Catalogue;
    use rstest::rstest;
    use serde_json::json;

    /// A file whose workflow `w`, with the parameters `p` and `q`, has these steps.
    fn file(steps: &str) -> String {
        format!(
            r#"[{{"workflow_type_name": "w", "workflow_type_description_name": "W",
                 "workflow_parameters": [{{"key_name": "p", "parameter_type": "string"}},
                                         {{"key_name": "q", "parameter_type": "string"}}],
                 "steps": {steps}}}]"#
        )
    }

    fn steps(steps: &str) -> Steps {
        let catalogue = Catalogue::parse(&file(steps)).unwrap();
        catalogue.definition("w").unwrap().steps.clone()
    }

    #[test]
    fn an_entry_without_steps_is_the_step_of_its_name() {
        let file = r#"[{"workflow_type_name": "w", "workflow_type_description_name": "W"}]"#;
        let catalogue = Catalogue::parse(file).unwrap();
        let own = &catalogue.definition("w").unwrap().steps;
        assert_eq!(own.plain().unwrap().task, "w");
        let same = steps(r#"[{"task": "w"}]"#);
        assert_eq!(same.all(), own.all());
        assert!(same.plain().is_some());
    }

    #[test]
    fn what_is_in_the_file_is_known() {
        let steps = steps(
            r#"[{"task": "a", "title": "A", "parameters": ["p"], "weight": 3, "timeout_sec": 1.5,
                 "delivery_limit": 4, "retry": {"attempts": 2, "wait_sec": 0.5},
                 "on_error": "continue", "keep_time_series": false, "window": 3, "paused": true},
                {"task": "b", "parameters": {"x": "q", "y": {"value": [1]}},
                 "on_error": {"fallback": {"task": "c", "on_error": {"fallback": {"task": "d"}}}}}]"#,
        );
        let [a, b] = steps.all() else { panic!() };
        let p = StepParameters::These(vec![("p".to_owned(), Argument::OfJob("p".to_owned()))]);
        let whole = Step {
            limit: QueueLimit {
                window: Some(3),
                max_running: None,
                is_paused: true,
            },
            task: "a".to_owned(),
            title: "A".to_owned(),
            parameters: p,
            weight: 3.0,
            timeout_ms: Some(1500),
            delivery_limit: Some(4),
            attempts: 2,
            retry_wait: Duration::from_millis(500),
            on_error: OnError::Continue,
            keep_time_series: false,
        };
        assert_eq!(*a, whole);
        assert_eq!(b.title, "b");
        assert_eq!(Vec::from_iter(steps.tasks()), ["a", "b", "c", "d"]);
        assert_eq!(steps.get(1, 2).unwrap().task, "d");
        assert_eq!(steps.get(1, 3), None);
        assert!((steps.share_before(1) - 0.75).abs() < 1e-9);
        let job = json!({"p": 1, "q": 2, "r": 3});
        let job = job.as_object().unwrap();
        let arguments = |step: &Step| Value::Object(step.arguments(job));
        assert_eq!(arguments(a), json!({"p": 1}));
        assert_eq!(arguments(b), json!({"x": 2, "y": [1]}));
        assert_eq!(Value::Object(b.arguments(&Map::new())), json!({"y": [1]}));
        assert_eq!(Steps::from_source(&steps.source()), Ok(steps));
    }

    /// A row in the database that somebody has changed.
    #[rstest]
    #[case("", "EOF while parsing a value at line 1 column 0")]
    #[case("null", "$: found null, expected a list")]
    #[case("[]", "$: found a list of 0, expected 1 to 20 steps")]
    #[case("[{}]", "$[0]: task is missing, expected a text")]
    fn a_source_that_is_none_is_an_error(#[case] source: &str, #[case] fault: &str) {
        assert_eq!(Steps::from_source(source).unwrap_err().to_string(), fault);
    }

    #[rstest]
    #[case::one(r#"[{"task": "a"}]"#, true)]
    #[case::limit(r#"[{"task": "a", "delivery_limit": 1, "parameters": []}]"#, true)]
    #[case::two(r#"[{"task": "a"}, {"task": "a"}]"#, false)]
    #[case::timeout(r#"[{"task": "a", "timeout_sec": 1}]"#, false)]
    #[case::retry(r#"[{"task": "a", "retry": {"attempts": 2}}]"#, false)]
    #[case::fallback(r#"[{"task": "a", "on_error": {"fallback": {"task": "b"}}}]"#, false)]
    fn one_step_of_which_nothing_is_to_be_kept_is_plain(#[case] text: &str, #[case] plain: bool) {
        assert_eq!(steps(text).plain().is_some(), plain);
    }

    #[rstest]
    #[case::no_list("3", "$[0].steps: found 3, expected a list")]
    #[case::none("[]", "$[0].steps: found a list of 0, expected 1 to 20 steps")]
    #[case::no_object("[7]", "$[0].steps[0]: found 7, expected an object")]
    #[case::no_task("[{}]", "$[0].steps[0]: task is missing, expected a text")]
    #[case::empty_task(
        r#"[{"task": ""}]"#,
        "$[0].steps[0].task: found 0 bytes, expected 1 to 255 without NUL, for it names a queue"
    )]
    #[case::rabbitmqs_task(
        r#"[{"task": "amq.x"}]"#,
        r#"$[0].steps[0].task: found "amq.x", expected something else than amq.…, for it names a queue, and RabbitMQ keeps such names to itself"#
    )]
    #[case::unknown_key(
        r#"[{"task": "a", "wieght": 1}]"#,
        r#"$[0].steps[0]: "wieght" is unknown here, expected task, title, parameters, weight, timeout_sec, delivery_limit, retry, on_error, keep_time_series, window, max_running, paused"#
    )]
    #[case::title(
        r#"[{"task": "a", "title": "two\nlines"}]"#,
        r#"$[0].steps[0].title: found "two\nlines", expected a text of 1 to 100 characters in one line"#
    )]
    #[case::weight(
        r#"[{"task": "a", "weight": 0}]"#,
        "$[0].steps[0].weight: found 0, expected a number above 0"
    )]
    #[case::timeout(
        r#"[{"task": "a", "timeout_sec": 0}]"#,
        "$[0].steps[0].timeout_sec: found 0, expected a number of seconds above 0, up to 49 days"
    )]
    #[case::limit(
        r#"[{"task": "a", "delivery_limit": 0}]"#,
        "$[0].steps[0].delivery_limit: found 0, expected a whole number of starts, at least 1"
    )]
    #[case::retry(
        r#"[{"task": "a", "retry": 3}]"#,
        "$[0].steps[0].retry: found 3, expected an object"
    )]
    #[case::no_attempts(
        r#"[{"task": "a", "retry": {"wait_sec": 1}}]"#,
        "$[0].steps[0].retry: attempts is missing, expected a whole number from 1 to 10"
    )]
    #[case::attempts(
        r#"[{"task": "a", "retry": {"attempts": 11}}]"#,
        "$[0].steps[0].retry.attempts: found 11, expected a whole number from 1 to 10"
    )]
    #[case::wait(
        r#"[{"task": "a", "retry": {"attempts": 2, "wait_sec": -1}}]"#,
        "$[0].steps[0].retry.wait_sec: found -1, expected a number of seconds from 0 up to 49 days"
    )]
    #[case::unknown_key_of_retry(
        r#"[{"task": "a", "retry": {"attempts": 2, "wait": 1}}]"#,
        r#"$[0].steps[0].retry: "wait" is unknown here, expected attempts, wait_sec"#
    )]
    #[case::on_error(
        r#"[{"task": "a", "on_error": "ignore"}]"#,
        r#"$[0].steps[0].on_error: found "ignore", expected "fail", "continue" or an object with "fallback""#
    )]
    #[case::nothing_to_continue_with(
        r#"[{"task": "a", "on_error": "continue"}]"#,
        r#"$[0].steps[0].on_error: found "continue", expected fail or a fallback, for no step follows"#
    )]
    #[case::cycle(
        r#"[{"task": "a", "on_error": {"fallback": {"task": "b", "on_error": {"fallback": {"task": "a"}}}}}]"#,
        r#"$[0].steps[0].on_error.fallback.on_error.fallback.task: "a" would be its own fallback"#
    )]
    #[case::weight_of_fallback(
        r#"[{"task": "a", "on_error": {"fallback": {"task": "b", "weight": 2}}}]"#,
        "$[0].steps[0].on_error.fallback.weight: a fallback has the weight of the step that it replaces"
    )]
    #[case::keep(
        r#"[{"task": "a", "keep_time_series": "no"}]"#,
        r#"$[0].steps[0].keep_time_series: found "no", expected true or false"#
    )]
    #[case::parameters(
        r#"[{"task": "a", "parameters": 1}]"#,
        "$[0].steps[0].parameters: found 1, expected a list of the job's parameters or an object"
    )]
    #[case::undeclared(
        r#"[{"task": "a", "parameters": ["p", "z"]}]"#,
        r#"$[0].steps[0].parameters[1]: found "z", expected a parameter that the workflow declares"#
    )]
    #[case::undeclared_by_name(
        r#"[{"task": "a", "parameters": {"x": "z"}}]"#,
        r#"$[0].steps[0].parameters.x: found "z", expected a parameter that the workflow declares"#
    )]
    #[case::neither_name_nor_constant(
        r#"[{"task": "a", "parameters": {"x": 1}}]"#,
        r#"$[0].steps[0].parameters.x: found 1, expected a parameter's name or {"value": …}"#
    )]
    fn a_fault_is_named(#[case] steps: &str, #[case] fault: &str) {
        let faults = Catalogue::parse(&file(steps)).unwrap_err();
        assert_eq!(faults.to_string(), fault);
    }

    #[test]
    fn there_are_at_most_twenty_steps() {
        let many = |count| format!("[{}]", vec![r#"{"task": "a"}"#; count].join(","));
        assert_eq!(steps(&many(20)).count(), 20);
        let faults = Catalogue::parse(&file(&many(21))).unwrap_err();
        let expected = "$[0].steps: found a list of 21, expected 1 to 20 steps";
        assert_eq!(faults.to_string(), expected);
    }
}
