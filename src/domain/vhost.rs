//! The three connections to RabbitMQ that a deployment names, each with a vhost of its own or not.

use serde::Serialize;

/// Which of the three a queue or an exchange belongs to, as the environment variables are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Vhost {
    /// What clients send and hear.
    Sdk,
    /// What workers tell of their tasks.
    Task,
    /// The tasks themselves, and what else goes to workers.
    Celery,
}

impl Vhost {
    pub const ALL: [Vhost; 3] = [Vhost::Sdk, Vhost::Task, Vhost::Celery];

    /// As the variables begin, and as messages name it.
    pub const fn name(self) -> &'static str {
        match self {
            Vhost::Sdk => "SDK",
            Vhost::Task => "TASK",
            Vhost::Celery => "CELERY",
        }
    }
}
