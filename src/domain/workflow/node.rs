//! Values in a definition file, and what is wrong with them.

use std::time::Duration;

use serde_json::Value;

use crate::domain::text::excerpt;
use crate::domain::turns::QueueLimit;

/// A workflow's name is also the name of its task queue, which AMQP limits to this many bytes.
const MAX_TYPE_NAME: usize = 255;

/// A value in the file, with the path that leads to it.
pub(super) struct Node<'a> {
    pub(super) path: String,
    pub(super) value: &'a Value,
}

impl<'a> Node<'a> {
    pub(super) fn root(value: &'a Value) -> Self {
        Node {
            path: "$".to_owned(),
            value,
        }
    }

    /// The value under `key`; null counts as absent.
    pub(super) fn get(&self, key: &str) -> Option<Node<'a>> {
        let value = self.value.get(key).filter(|value| !value.is_null())?;
        Some(Node {
            path: format!("{}.{key}", self.path),
            value,
        })
    }

    pub(super) fn items(&self, faults: &mut Vec<String>) -> Vec<Node<'a>> {
        match self.value.as_array() {
            Some(items) => items
                .iter()
                .enumerate()
                .map(|(index, value)| Node {
                    path: format!("{}[{index}]", self.path),
                    value,
                })
                .collect(),
            None => {
                faults.push(self.expected("a list"));
                Vec::new()
            }
        }
    }

    pub(super) fn expected(&self, what: &str) -> String {
        format!(
            "{}: found {}, expected {what}",
            self.path,
            found(self.value)
        )
    }

    /// The optional value under `key`, read by `read`; a value that it rejects is a fault.
    pub(super) fn optional<T>(
        &self,
        key: &str,
        what: &str,
        faults: &mut Vec<String>,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Option<T> {
        let node = self.get(key)?;
        let value = read(node.value);
        if value.is_none() {
            faults.push(node.expected(what));
        }
        value
    }

    pub(super) fn text(&self, key: &str, faults: &mut Vec<String>) -> Option<String> {
        self.optional(key, "a text", faults, |value| {
            value.as_str().map(str::to_owned)
        })
    }

    pub(super) fn required_text(&self, key: &str, faults: &mut Vec<String>) -> Option<String> {
        if !self.value.is_object() {
            faults.push(self.expected("an object"));
            return None;
        }
        match self.get(key) {
            Some(_) => self.text(key, faults),
            None => {
                faults.push(format!("{}: {key} is missing, expected a text", self.path));
                None
            }
        }
    }
}

/// A value as a message shows it: short.
pub(crate) fn found(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".to_owned(),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) => format!("{:?}", excerpt(text, 60)),
    }
}

/// Checks the name of a Celery task, which is also the name of its queue.
pub(super) fn check_queue_name(name: &str, path: &str, faults: &mut Vec<String>) {
    if name.starts_with("amq.") {
        faults.push(format!(
            "{path}: found {:?}, expected something else than amq.…, for it names a queue, and \
             RabbitMQ keeps such names to itself",
            excerpt(name, 60)
        ));
    }
    if name.is_empty() || name.len() > MAX_TYPE_NAME || name.contains('\0') {
        faults.push(format!(
            "{path}: found {} bytes, expected 1 to {MAX_TYPE_NAME} without NUL, for it names a \
             queue",
            name.len()
        ));
    }
}

pub(super) fn delivery_limit(node: &Node<'_>, faults: &mut Vec<String>) -> Option<usize> {
    let expected = "a whole number of starts, at least 1";
    node.optional("delivery_limit", expected, faults, |value| {
        let limit = usize::try_from(whole_number(value)?).ok()?;
        (limit > 0).then_some(limit)
    })
}

/// What is allowed at a task queue.
pub(super) fn queue_limit(node: &Node<'_>, faults: &mut Vec<String>) -> QueueLimit {
    let mut tasks = |key| {
        let expected = "a whole number of tasks, at least 1";
        node.optional(key, expected, faults, |value| {
            // Postgres's integers have a sign.
            let limit = i32::try_from(whole_number(value)?).ok()?;
            u32::try_from(limit).ok().filter(|limit| *limit > 0)
        })
    };
    QueueLimit {
        window: tasks("window"),
        max_running: tasks("max_running"),
        is_paused: node
            .optional("paused", "true or false", faults, Value::as_bool)
            .unwrap_or(false),
    }
}

/// A time in seconds, as milliseconds.
pub(super) fn timeout_ms(node: &Node<'_>, key: &str, faults: &mut Vec<String>) -> Option<u32> {
    let expected = "a number of seconds above 0, up to 49 days";
    node.optional(key, expected, faults, |value| {
        let timeout = Duration::try_from_secs_f64(value.as_f64()?).ok()?;
        let millis = u32::try_from(timeout.as_millis()).ok()?;
        (millis > 0).then_some(millis)
    })
}

pub(super) fn whole_number(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| {
        // 3.0 is a whole number too; beyond 2^53 a double no longer says which one it means.
        let number = value.as_f64()?;
        let exact = number.fract() == 0.0 && number.abs() <= 9_007_199_254_740_992.0;
        #[expect(clippy::cast_possible_truncation, reason = "checked just above")]
        exact.then_some(number as i64)
    })
}
