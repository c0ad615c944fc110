//! Requests for the workflows that are sent to the queue of this name through the default exchange,
//! as the TypeScript SDK does. One replica holds that queue, exclusively, as the Python service
//! does; the others take it over when that replica goes.

use anyhow::Context;
use crossbeam_channel::{Receiver, Sender, select};
use log::{info, warn};

use crate::broker::{self, Claim, Handled, Link, Mark, Received, Source};
use crate::service::handler::Work;
use crate::threads::Signal;
use crate::wire::{OMOTES_EXCHANGE, WORKFLOW_REQUESTS_HELD_KEY, WORKFLOW_REQUESTS_KEY};

/// Tries to claim the queue.
///
/// # Errors
/// The connection is lost.
pub(crate) fn claim(link: &Link) -> anyhow::Result<Claim> {
    let mark = Mark {
        exchange: OMOTES_EXCHANGE,
        key: WORKFLOW_REQUESTS_HELD_KEY,
    };
    link.claim_queue(WORKFLOW_REQUESTS_KEY, mark)
}

/// The thread that holds the queue, or waits for it.
pub(crate) struct Answering<'l> {
    /// The queue belongs to this connection.
    pub(crate) link: &'l Link,
    pub(crate) source: Source<'l>,
    /// To a handler, which tells all clients the workflows.
    pub(crate) announcer: Sender<Work>,
    /// Receives something while no replica holds the queue.
    pub(crate) vacant: Receiver<()>,
}

impl Answering<'_> {
    /// Consumes the queue, as soon as `claim` or a later one holds it, until `stop` is given;
    /// the rest is as with [`broker::consume`].
    ///
    /// # Errors
    /// The queue, once it was consumed, or the connection is gone.
    pub(crate) fn run(
        self,
        mut claimed: Claim,
        stop: &Signal,
        done: &Receiver<Handled>,
        mut hand_over: impl FnMut(usize, Received) + Send,
    ) -> anyhow::Result<()> {
        let queue = self.source.queue;
        let mut last_warning = None;
        loop {
            let why = match claimed {
                Claim::Refused(why) => why,
                Claim::Held { marker } => {
                    info!("requests that are sent to {queue} are answered here");
                    let mut consumed = false;
                    let ended =
                        broker::consume(self.link, &[self.source], stop, done, |place, request| {
                            consumed = true;
                            hand_over(place, request);
                        });
                    match ended {
                        // It may be a queue that this user may not read.
                        Err(error) if !consumed && self.link.check().is_ok() => {
                            self.link.delete_queue(&marker).context("a mark")?;
                            format!("{error:#}")
                        }
                        ended => return ended,
                    }
                }
            };
            if last_warning.as_ref() != Some(&why) {
                warn!("{queue}: not ours for now, it is tried again: {why}");
                last_warning = Some(why);
            }
            select! {
                recv(stop.receiver()) -> _ => return Ok(()),
                recv(self.vacant) -> _ => {}
            }
            claimed = claim(self.link)?;
            if matches!(claimed, Claim::Held { .. }) {
                // Requests sent since the previous holder went have been lost.
                let _ = self.announcer.send(Work::WorkflowsChanged);
            }
        }
    }
}
