//! Takes some of the messages out of a queue, and leaves the others where they are.

use anyhow::Context;

use super::Link;
use super::link::give_back;

/// Messages that are looked at.
const MOST: u32 = 100_000;

/// Goes once through a queue and drops those messages whose bodies are `stale`. Returns how many. Others
/// who consume the queue do not get at it meanwhile.
///
/// # Errors
/// The connection is lost, or it cannot be told of a message whether it is stale. What was not dropped by
/// then stays.
pub fn drop_some(
    link: &Link,
    queue: &str,
    mut stale: impl FnMut(&[u8]) -> anyhow::Result<bool>,
) -> anyhow::Result<usize> {
    let channel = link.channel()?;
    let mut dropped = 0;
    for _ in 0..MOST {
        let Some(got) = channel.basic_get(queue, false)? else {
            break;
        };
        // The others return to their places.
        if stale(&got.delivery.body)? {
            got.ack(&channel)?;
            dropped += 1;
        }
    }
    give_back(channel).context("going through a queue")?;
    Ok(dropped)
}
