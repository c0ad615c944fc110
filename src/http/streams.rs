//! Who follows which page, and what they are told: server-sent events. What is told of a page is made
//! once and shared by all who follow it; whoever reads slowly misses what has become old meanwhile.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use jiff::Timestamp;

use super::Route;
use super::accounts::Access;
use super::editions::{Edition, Known, event};
use super::says::{Says, says};

/// So many pages are followed at once; others ask now and then.
pub(super) const MAX_STREAMS: usize = 256;
/// How often somebody who follows a page hears that it is still followed.
const BEAT: Duration = Duration::from_secs(10);
/// Who has taken nothing of what is written for so long is disconnected.
const PATIENCE: Duration = Duration::from_secs(30);
/// How much is read of what somebody sends who should only listen.
const MAX_IGNORED: usize = 64 * 1024;
const HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\n\
                    X-Accel-Buffering: no\r\nConnection: close\r\n\r\nretry: 2000\n\n";

/// A page that is followed, as it is for this account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Topic {
    pub(super) access: Access,
    pub(super) route: Route,
}

/// What is told of a topic.
struct Told {
    topic: Topic,
    readers: usize,
    /// What was told last, and what those know who were told before.
    newest: Option<Edition>,
    known: Vec<Known>,
    /// How often there was news, what it says, and when it was told.
    version: u64,
    says: Says,
    told_at: Option<Instant>,
    /// How often it was looked at, up to which of these somebody waits for one, and when it was last.
    looks: u64,
    promised: u64,
    seen_at: Option<Timestamp>,
    /// Nothing of it changes any more.
    has_ended: bool,
    turn: Turn,
}

/// When a topic is looked at.
#[derive(Debug, Clone, Copy)]
struct Turn {
    /// It is being looked at.
    is_on: bool,
    /// Somebody waits for a look that begins from now on.
    is_wanted: bool,
    /// As a rule; and not before, for looking has taken so long.
    due: Instant,
    rested: Instant,
    cost: Duration,
}

impl Turn {
    fn new(now: Instant) -> Turn {
        Turn {
            is_on: false,
            is_wanted: true,
            due: now,
            rested: now,
            cost: Duration::ZERO,
        }
    }

    fn at(&self) -> Instant {
        match self.is_wanted {
            true => self.rested,
            false => self.due,
        }
    }
}

/// What a page shows.
pub(super) struct Seen {
    pub(super) content: String,
    /// Nothing of it changes any more.
    pub(super) is_last: bool,
}

/// What is to be looked at next.
pub(super) enum Next {
    Look(u64, Topic),
    /// Nothing before then, if ever.
    Wait(Option<Instant>),
}

/// How often a page is looked at, as a rule.
const PERIOD: Duration = Duration::from_secs(2);
/// For each second that looking at a page and telling of it takes it is left alone for so many: for those
/// of all pages that cost no more, so that one that costs much is no burden to the others, and all together
/// take no more than a part of the time, which jobs have otherwise.
const REST: u32 = 50;
/// But as a rule for no longer than this, for somebody waits for a change,
const LONGEST_REST: Duration = Duration::from_secs(6);
/// and for no less than so many times as long.
const LEAST_REST: u32 = 3;
/// For how long nobody is told what differs in nothing but how long something has lasted.
const LASTS: Duration = Duration::from_secs(60);

fn rest(cost: Duration) -> Duration {
    (cost * REST).min(LONGEST_REST).max(cost * LEAST_REST)
}

#[derive(Default)]
struct Topics {
    by_id: BTreeMap<u64, Told>,
    readers: usize,
    last: u64,
    /// How long it has taken to tell readers since the last look.
    telling: Duration,
}

/// All topics that somebody follows.
pub(super) struct Hub {
    topics: Mutex<Topics>,
    wanted: (Sender<()>, Receiver<()>),
}

impl Default for Hub {
    fn default() -> Hub {
        Hub {
            topics: Mutex::default(),
            wanted: bounded(1),
        }
    }
}

impl Hub {
    fn topics(&self) -> MutexGuard<'_, Topics> {
        self.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows a topic from now on; None when too many do so already.
    pub(super) fn join(self: &Arc<Self>, topic: Topic) -> Option<Seat> {
        let mut topics = self.topics();
        if topics.readers >= MAX_STREAMS {
            return None;
        }
        topics.readers += 1;
        let mut known = topics.by_id.iter();
        let known = known.find_map(|(id, told)| (told.topic == topic).then_some(*id));
        let id = known.unwrap_or(topics.last + 1);
        topics.last = topics.last.max(id);
        let told = topics.by_id.entry(id).or_insert(Told {
            topic,
            readers: 0,
            newest: None,
            known: Vec::new(),
            version: 0,
            says: Says::default(),
            told_at: None,
            looks: 0,
            promised: 0,
            seen_at: None,
            has_ended: false,
            turn: Turn::new(Instant::now()),
        });
        told.readers += 1;
        told.turn.is_wanted = true;
        // What a look finds that is under way may be older than the page that was loaded before this.
        let first = told.looks + u64::from(told.turn.is_on);
        told.promised = told.promised.max(first + 1);
        let seen = told.version;
        drop(topics);
        self.want();
        Some(Seat {
            hub: Arc::clone(self),
            id,
            seen,
            first: Some(first),
            known: None,
        })
    }

    /// Has all topics looked at once more: something has been done.
    pub(super) fn look_anew(&self) {
        for told in self.topics().by_id.values_mut() {
            told.turn.is_wanted = true;
        }
        self.want();
    }

    fn want(&self) {
        // One that is still there covers this one too.
        let _ = self.wanted.0.try_send(());
    }

    /// Receives something when somebody wants a look.
    pub(super) fn wanted(&self) -> &Receiver<()> {
        &self.wanted.1
    }

    /// What is to be looked at next; of several that are due the one that costs least. For each look
    /// [`Hub::looked`] is called.
    pub(super) fn next(&self, now: Instant) -> Next {
        let mut topics = self.topics();
        let all = topics.by_id.iter_mut();
        let due = all.filter(|(_, told)| told.turn.at() <= now);
        if let Some((id, told)) = due.min_by_key(|(_, told)| told.turn.cost) {
            told.turn.is_on = true;
            told.turn.is_wanted = false;
            return Next::Look(*id, told.topic.clone());
        }
        Next::Wait(topics.by_id.values().map(|told| told.turn.at()).min())
    }

    /// A topic has been looked at, which has cost so much.
    pub(super) fn looked(&self, id: u64, cost: Duration, now: Instant) {
        let mut topics = self.topics();
        let cost = cost + std::mem::take(&mut topics.telling);
        let others = topics.by_id.iter().filter(|(one, _)| **one != id);
        let costs = others.map(|(_, told)| told.turn.cost);
        let lesser: Duration = costs.filter(|one| *one <= cost).sum();
        if let Some(told) = topics.by_id.get_mut(&id) {
            told.turn.is_on = false;
            told.turn.cost = cost;
            told.turn.rested = now + rest(cost);
            told.turn.due = now + PERIOD.max(rest(lesser + cost));
        }
    }

    /// Telling those who are there takes its time too, which the next look is charged with.
    pub(super) fn telling(&self, tell: impl FnOnce()) {
        let began = Instant::now();
        tell();
        self.topics().telling += began.elapsed();
    }

    /// What a topic's page shows, as of then. Nobody is told at once what differs in nothing but how long
    /// something has lasted: most of it their browsers count themselves. Returns whether somebody is told.
    pub(super) fn tell(&self, id: u64, seen: &Seen, at: Timestamp, now: Instant) -> bool {
        let says = says(&seen.content);
        let mut topics = self.topics();
        let Some(told) = topics.by_id.get_mut(&id) else {
            return false;
        };
        told.seen_at = Some(at);
        let is_old = told.told_at.is_none_or(|told_at| now >= told_at + LASTS);
        let differs = says.news != told.says.news || (is_old && says.all != told.says.all);
        let is_news = told.newest.is_none() || differs || seen.is_last != told.has_ended;
        if !is_news && told.promised < told.looks + 1 {
            told.looks += 1;
            return false;
        }
        let known = told.known.clone();
        drop(topics);
        // Nobody waits for this, and nobody else tells anything meanwhile.
        let edition = Edition::new(&known, &seen.content, seen.is_last);
        let mut topics = self.topics();
        let Some(told) = topics.by_id.get_mut(&id) else {
            return false;
        };
        // With what it has shown: whoever waits for it has no use for the one before.
        told.looks += 1;
        told.has_ended = seen.is_last;
        // Of what is no news only those are told who wait for a look.
        match is_news {
            true => told.known.clear(),
            false => told.known.truncate(1),
        }
        told.known.push(edition.known());
        told.newest = Some(edition);
        if is_news {
            told.version += 1;
            told.says = says;
            told.told_at = Some(now);
        }
        true
    }

    #[cfg(test)]
    fn topics_followed(&self) -> Vec<Topic> {
        let topics = self.topics();
        topics
            .by_id
            .values()
            .map(|told| told.topic.clone())
            .collect()
    }
}

/// One that follows a topic; gives its place free when dropped.
pub(super) struct Seat {
    hub: Arc<Hub>,
    id: u64,
    /// The version that it was told last.
    seen: u64,
    /// It waits for a look after so many.
    first: Option<u64>,
    /// The edition that it has.
    known: Option<u64>,
}

impl Seat {
    /// What was told since, if anything was, of several the last; and whether that is the end.
    fn newest(&mut self) -> Option<(Arc<[u8]>, bool)> {
        let topics = self.hub.topics();
        let told = topics.by_id.get(&self.id)?;
        let is_news = match self.first {
            Some(first) => told.looks > first,
            None => told.version != self.seen,
        };
        if !is_news {
            return None;
        }
        self.first = None;
        self.seen = told.version;
        let newest = told.newest.as_ref()?;
        let bytes = newest.told(self.known);
        self.known = Some(newest.number());
        Some((bytes, told.has_ended))
    }

    /// When what it follows was last looked at.
    pub(super) fn seen_at(&self) -> Option<Timestamp> {
        let topics = self.hub.topics();
        topics.by_id.get(&self.id)?.seen_at
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut topics = self.hub.topics();
        topics.readers -= 1;
        if let Some(told) = topics.by_id.get_mut(&self.id) {
            told.readers -= 1;
            if told.readers == 0 {
                topics.by_id.remove(&self.id);
            }
        }
    }
}

/// Tells that all works, the time, and that of the last look, if there was one.
fn beat(seat: &Seat) -> Vec<u8> {
    let now = Timestamp::now();
    let seen_at = seat.seen_at();
    let seen_at = seen_at.map_or(String::new(), |at| format!(" {at:.0}"));
    event("beat", None, &format!("{now:.0}{seen_at}")).into_bytes()
}

/// What is written to somebody who follows a page. It never has more in hand than one event, which it
/// shares with the others.
pub(super) struct Stream {
    seat: Seat,
    bytes: Arc<[u8]>,
    sent: usize,
    ignored: usize,
    beat_at: Instant,
    stuck_at: Instant,
    /// After what is being written nothing comes any more.
    ends: bool,
}

impl Stream {
    pub(super) fn new(seat: Seat) -> Stream {
        let now = Instant::now();
        Stream {
            seat,
            bytes: HEAD.as_bytes().into(),
            sent: 0,
            ignored: 0,
            beat_at: now,
            stuck_at: now + PATIENCE,
            ends: false,
        }
    }

    /// When something is to be done without an event.
    pub(super) fn due(&self) -> Instant {
        match self.sent < self.bytes.len() {
            true => self.stuck_at,
            false => self.beat_at,
        }
    }

    /// Writes what there is to be written. Returns when this was the end.
    ///
    /// # Errors
    /// `WouldBlock` as long as it goes on.
    pub(super) fn go_on(&mut self, client: &mut (impl Read + Write)) -> io::Result<()> {
        let now = Instant::now();
        loop {
            while self.sent < self.bytes.len() {
                match client.write(&self.bytes[self.sent..]) {
                    Ok(0) => return Ok(()),
                    Ok(length) => {
                        self.sent += length;
                        self.stuck_at = now + PATIENCE;
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) if now >= self.stuck_at => return Ok(()),
                    Err(error) => return Err(error),
                }
            }
            if self.ends {
                return Ok(());
            }
            let next = match self.seat.newest() {
                Some((newest, is_last)) => {
                    self.ends = is_last;
                    // A beat follows, with the time of this.
                    self.beat_at = now;
                    newest
                }
                None if now >= self.beat_at => {
                    self.beat_at = now + BEAT;
                    beat(&self.seat).into()
                }
                None => return self.listen(client),
            };
            self.bytes = next;
            self.sent = 0;
            self.stuck_at = now + PATIENCE;
        }
    }

    /// Notices that the client has gone.
    fn listen(&mut self, client: &mut impl Read) -> io::Result<()> {
        let mut chunk = [0; 1024];
        while self.ignored < MAX_IGNORED {
            match client.read(&mut chunk) {
                Ok(0) => break,
                Ok(length) => self.ignored += length,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
