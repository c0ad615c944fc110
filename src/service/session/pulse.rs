//! The thread that sees whether the connections still live.

use std::time::Duration;

use crossbeam_channel::Sender;

use super::links::Links;
use crate::broker::{Delivered, Publisher};
use crate::fault_point;
use crate::threads::{Calls, Signal};
use crate::wire;

/// How often each connection is asked for an answer.
const PERIOD: Duration = Duration::from_secs(5);

/// Since when the thread that sees whether the connections still live has been waiting for one.
#[derive(Default)]
pub(super) struct Pulse {
    pub(super) consuming: Calls,
    pub(super) publishing: Calls,
}

impl Pulse {
    /// Asks each connection for an answer from time to time, until `stop` is given, and tells
    /// when no replica answers the requests that are sent to their queue: an idle
    /// one would not notice that it is blocked, nor, where the broker has switched heartbeats off,
    /// that nobody is there any more.
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
                // Whoever is to look is looking already, or answers.
                let _ = nobody_answers.try_send(());
            }
            for publisher in &mut publishers {
                publisher.publish(&[wire::pulse()])?;
            }
        }
    }
}
