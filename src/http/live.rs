//! Looks after the pages that somebody follows: as long as there are any, and for no more than a part of
//! the time, whatever they cost.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use crossbeam_channel::{after, never, select};
use jiff::Timestamp;
use log::debug;

use super::streams::{Hub, Next, Seen, Topic};
use super::{Endpoint, views};
use crate::service::shared::Service;
use crate::threads::Signal;

/// Tells whoever follows a page of its changes, until `stop` is given.
pub fn follow(endpoint: &Endpoint, service: &Service, stop: &Signal) {
    let hub = endpoint.server.hub();
    while !stop.is_given() {
        let look = |topic: &Topic| views::fragment(endpoint, service, topic);
        match step(hub, look) {
            Step::Told => endpoint.server.tell(),
            Step::Nothing => {}
            Step::Wait(until) => {
                let timer = until.map_or_else(never, |until| {
                    after(until.saturating_duration_since(Instant::now()))
                });
                select! {
                    recv(hub.wanted()) -> _ => {}
                    recv(timer) -> _ => {}
                    recv(stop.receiver()) -> _ => return,
                }
            }
        }
    }
}

enum Step {
    Told,
    Nothing,
    Wait(Option<Instant>),
}

/// Looks at the topic that is due, if one is. One that cannot be seen for now is in nobody's way, and its
/// readers hear by the beats that it is not.
fn step(hub: &Hub, look: impl Fn(&Topic) -> Result<Seen, String>) -> Step {
    let begin = Instant::now();
    let (id, topic) = match hub.next(begin) {
        Next::Look(id, topic) => (id, topic),
        Next::Wait(until) => return Step::Wait(until),
    };
    let at = Timestamp::now();
    // If it panics, the log has that.
    let seen = catch_unwind(AssertUnwindSafe(|| look(&topic)));
    let now = Instant::now();
    let is_told = match seen {
        Ok(Ok(seen)) => hub.tell(id, &seen, at, now),
        Ok(Err(error)) => {
            debug!("a page is not followed for now: {error}");
            false
        }
        Err(_) => false,
    };
    let end = Instant::now();
    hub.looked(id, end - begin, end);
    match is_told {
        true => Step::Told,
        false => Step::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::http::Route;
    use crate::http::accounts::Access;

    #[test]
    fn a_page_that_cannot_be_seen_is_in_nobodys_way() {
        let hub = Arc::new(Hub::default());
        let topic = |route| Topic {
            access: Access::Open,
            route,
        };
        let routes = [Route::Overview, Route::Workers, Route::Metrics];
        let seats = routes.map(|route| hub.join(topic(route)).unwrap());
        let look = |topic: &Topic| match topic.route {
            Route::Overview => panic!("a fault"),
            Route::Workers => Err("it takes too long".to_owned()),
            _ => Ok(Seen {
                content: "seen".to_owned(),
                is_last: false,
            }),
        };
        let mut told = 0;
        while let Step::Told | Step::Nothing = step(&hub, look).count(&mut told) {}
        assert_eq!(told, 1);
        let seen_at = seats.each_ref().map(|seat| seat.seen_at().is_some());
        assert_eq!(seen_at, [false, false, true]);
    }

    impl Step {
        fn count(self, told: &mut u32) -> Step {
            *told += u32::from(matches!(self, Step::Told));
            self
        }
    }
}
