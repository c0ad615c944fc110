//! Messages that stay unacknowledged until a queue takes something again.

use std::mem;
use std::time::{Duration, Instant};

use log::error;

use super::closed::{Destination, Load};
use super::failure::Trouble;
use super::item::Item;
use super::{Handler, MAX_BATCH_BYTES, MAX_BATCH_MESSAGES, Work, letters};
use crate::broker::Delivered;
use crate::telemetry::report::one_line;
use crate::threads::Signal;
use crate::wire::Inbox;

/// How many surplus messages are returned to the end of their queue at once, how long until the
/// next time, and how many bytes per second at most.
const PUT_BACK_MESSAGES: usize = 100;
const PUT_BACK_BYTES: usize = 1024 * 1024;
const PUT_BACK_PAUSE: Duration = Duration::from_millis(100);
const PUT_BACK_BYTES_PER_SECOND: usize = 8 * 1024 * 1024;
/// How long they stay when even that fails.
const PUT_BACK_RETRY: Duration = Duration::from_secs(5);

impl Handler<'_> {
    /// A message that cannot even become a dead letter is not acknowledged.
    pub(super) fn hold(&self, item: &mut Item, reason: &str) {
        let reason = one_line(reason);
        error!(
            "{}: cannot even become a dead letter: {reason}",
            item.label()
        );
        if let Some(inbox) = item.inbox() {
            let queue = Destination::DeadLetters(inbox.vhost());
            let now = Instant::now();
            self.common.closed.close(self.number, &queue, &reason, now);
            item.stalled_on = Some(queue);
        }
    }

    /// Tells the other handlers how much waits here.
    pub(super) fn count_stalled(&mut self) {
        if self.stalled.is_empty() && self.common.closed.is_empty() {
            return;
        }
        self.stalled.retain(|_, items| !items.is_empty());
        let mut load = Load::default();
        for (queue, items) in &self.stalled {
            load.messages.insert(queue.clone(), items.len());
            for item in items {
                load.bytes += item.held();
                if let Some(inbox) = item.inbox()
                    && item.is_whole()
                {
                    *load.by_inbox.entry(inbox).or_default() += 1;
                }
            }
        }
        self.common.closed.count(self.number, load);
    }

    /// When the stalled messages next need attention.
    pub(super) fn due(&self) -> Option<Instant> {
        let closed = &self.common.closed;
        let retry = self.stalled.keys().map(|queue| {
            // Another handler may have found it open meanwhile.
            closed.due(queue).unwrap_or_else(Instant::now)
        });
        let put_back = match self.stalled.is_empty() || closed.excess().is_empty() {
            true => None,
            false => Some(self.put_back_at),
        };
        retry.chain(put_back).min()
    }

    /// Retries what is due, and returns what is too much.
    pub(super) fn look_after_stalled(&mut self, stop: &Signal) -> Result<(), Trouble> {
        let closed = &self.common.closed;
        let queues: Vec<_> = self.stalled.keys().cloned().collect();
        for queue in queues {
            let queue_of_each = queue == Destination::ClientQueues;
            let mut left = self.stalled.remove(&queue).unwrap_or_default();
            while !left.is_empty() && !closed.is_closed(&queue, Instant::now()) {
                let mut bytes = 0;
                let fits = |item: &&Item| {
                    bytes += item.size();
                    bytes < MAX_BATCH_BYTES
                };
                let batch = left.iter().take(MAX_BATCH_MESSAGES).take_while(fits);
                let rest = left.split_off(batch.count().max(1));
                self.handle_all(mem::replace(&mut left, rest), stop)?;
            }
            let stalled = self.stalled.entry(queue).or_default();
            // Those of one queue wait for the same, but those of clients do not: each has its turn.
            if queue_of_each {
                left.append(stalled);
                *stalled = left;
            } else {
                stalled.append(&mut left);
            }
        }
        if Instant::now() >= self.put_back_at {
            self.put_back(&closed.excess())?;
        }
        self.count_stalled();
        Ok(())
    }

    /// Returns some of the stalled messages to the end of their queues, so that others are
    /// delivered. Their order no longer matters: dead letters have none, a submission may come
    /// after its cancel, and of a job whose outcome is to be told nothing else counts.
    fn put_back(&mut self, inboxes: &[Inbox]) -> Result<(), Trouble> {
        let (mut bytes, mut failed) = (0, false);
        for inbox in inboxes {
            let mut chosen = Vec::new();
            for (queue, items) in &mut self.stalled {
                for item in mem::take(items) {
                    let fits = chosen.len() < PUT_BACK_MESSAGES && bytes < PUT_BACK_BYTES;
                    if fits && item.inbox() == Some(*inbox) && item.is_whole() {
                        bytes += item.held();
                        chosen.push((queue.clone(), item));
                    } else {
                        items.push(item);
                    }
                }
            }
            let messages: Vec<_> = chosen
                .iter()
                .filter_map(|(_, item)| match &item.work {
                    Work::Message { received, .. } => Some(received.as_ref()),
                    Work::Finding { .. } | Work::WorkflowsChanged => None,
                })
                .collect();
            let name = &self.common.queue_names[inbox];
            let publisher = self.publishers.towards(inbox.vhost());
            let outcome = letters::put_back(publisher, name, &messages)?;
            for ((queue, item), delivered) in chosen.into_iter().zip(outcome) {
                if delivered == Delivered::Yes {
                    self.finish(item);
                } else {
                    failed = true;
                    self.stalled.entry(queue).or_default().push(item);
                }
            }
        }
        let pause = match failed {
            true => PUT_BACK_RETRY,
            false => {
                let seconds = bytes as f64 / PUT_BACK_BYTES_PER_SECOND as f64;
                PUT_BACK_PAUSE.max(Duration::from_secs_f64(seconds))
            }
        };
        self.put_back_at = Instant::now() + pause;
        Ok(())
    }
}
