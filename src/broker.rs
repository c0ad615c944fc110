//! RabbitMQ: the only folder that names amiquip.
//!
//! amiquip blocks without end when the broker stops reading (an alarm) or answering, and what
//! frees it is the socket being shut down under it. So a [`Link`] keeps a second handle of its
//! socket as a kill switch, for whoever watches over the calls.

use std::time::Duration;

mod consumer;
pub mod dead_letters;
mod guarded_stream;
pub mod inspection;
pub mod intake;
mod link;
mod majority;
mod presence;
mod publisher;
mod questions;
mod readable;
mod received;
mod refusals;
pub mod stale;
mod tls_stream;
mod topology;
mod unacked;
mod values;
mod window;

pub use self::consumer::{Handled, Source, consume};
pub use self::link::{Link, Node};
pub use self::majority::{Heard, Majority};
pub use self::presence::Found;
pub use self::publisher::{Delivered, Publisher};
pub use self::questions::Question;
pub use self::received::Received;
pub use self::refusals::PublishError;
pub use self::topology::{Claim, Mark};

/// How long the broker may take over anything it is asked; a blocked one takes for ever.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// The library, as it names itself in the log.
pub const LIBRARY: &str = "amiquip";
/// What to check when a broker accepts connections and then does nothing. One that has to recover
/// more queues than it may open files stays like that.
const STUCK: &str = "RabbitMQ may be recovering its queues, or be short of file descriptors: see its \
                     log, `rabbitmqctl status`, and `ulimit -n` where it runs";
