//! The thread that checks whether the connections are alive.

use std::time::Duration;

use crossbeam_channel::Sender;

use super::links::Links;
use crate::broker::{Delivered, Publisher};
use crate::fault_point;
use crate::threads::{Calls, Signal};
use crate::wire;

/// How often each connection is asked for an answer.
const PERIOD: Duration = Duration::from_secs(5);

/// The thread's calls, for the watchdog.
#[derive(Default)]
pub(super) struct Pulse {
    pub(super) consuming: Calls,
    pub(super) publishing: Calls,
}

impl Pulse {
    /// Asks each connection for an answer periodically until `stop` is given: an idle connection
    /// would not notice that it is blocked or, where the broker has heartbeats switched off, that
    /// the peer is gone. Also reports when no replica holds the queue of requests.
    ///
    /// # Errors
    /// A connection is lost.
    pub(super) fn run(
        &self,
        links: &Links,
        nobody_answers: &Sender<()>,
        stop: &Signal,
    ) -> anyhow::Result<()> {
        let mut to_clients = Publisher::new(&links.sdk_out, &self.publishing);
        let mut publishers: Vec<_> = links
            .publishing()
            .skip(1)
            .map(|link| Publisher::new(link, &self.publishing))
            .collect();
        loop {
            if stop.comes_within(PERIOD) {
                return Ok(());
            }
            fault_point::reached("pulse");
            for link in [&links.sdk_in, &links.task_in] {
                let _call = self.consuming.begin();
                link.check()?;
            }
            let came_back = to_clients.publish(&[wire::pulse_for_requests()])?;
            if came_back.contains(&Delivered::Unroutable) {
                // Someone is already on it.
                let _ = nobody_answers.try_send(());
            }
            for publisher in &mut publishers {
                publisher.publish(&[wire::pulse()])?;
            }
        }
    }
}
