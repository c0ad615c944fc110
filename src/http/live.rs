//! Looks after the pages that somebody follows: as long as there are any, and for no more than a part of
//! the time, whatever they cost.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use crossbeam_channel::select;

use super::{Endpoint, views};
use crate::service::shared::Service;
use crate::threads::Signal;

/// How often it is looked.
const PERIOD: Duration = Duration::from_secs(2);
/// For each second of work it rests for so many.
const REST: u32 = 3;

/// Tells whoever follows a page of its changes, until `stop` is given.
pub fn follow(endpoint: &Endpoint, service: &Service, stop: &Signal) {
    let hub = endpoint.server.hub();
    loop {
        let (ids, topics) = hub.followed();
        if topics.is_empty() {
            select! {
                recv(hub.opened()) -> _ => {}
                recv(stop.receiver()) -> _ => return,
            }
            continue;
        }
        let begin = Instant::now();
        // If it panics, which the log has then, they are told the next time.
        let _ = catch_unwind(AssertUnwindSafe(|| {
            views::fragments(endpoint, service, &topics, stop, |place, content| {
                hub.tell(ids[place], &content);
                endpoint.server.tell();
            });
        }));
        if stop.comes_within(PERIOD.max(begin.elapsed() * REST)) {
            return;
        }
    }
}
