//! Who follows which page, and what they are told: server-sent events. What is told of a page is made
//! once and shared by all who follow it; whoever reads slowly misses what has become old meanwhile.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, ErrorKind, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use jiff::Timestamp;

use super::Route;
use super::accounts::Access;

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
    /// What was told last, how often anything was, and what it says.
    newest: Option<Arc<[u8]>>,
    version: u64,
    says: u64,
}

#[derive(Default)]
struct Topics {
    by_id: BTreeMap<u64, Told>,
    readers: usize,
    last: u64,
}

/// All topics that somebody follows.
pub(super) struct Hub {
    topics: Mutex<Topics>,
    opened: (Sender<()>, Receiver<()>),
}

impl Default for Hub {
    fn default() -> Hub {
        Hub {
            topics: Mutex::default(),
            opened: bounded(1),
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
            version: 0,
            says: 0,
        });
        told.readers += 1;
        // One that is still there covers this one too.
        let _ = self.opened.0.try_send(());
        Some(Seat {
            hub: Arc::clone(self),
            id,
            seen: 0,
        })
    }

    /// Receives something when somebody has begun to follow a topic.
    pub(super) fn opened(&self) -> &Receiver<()> {
        &self.opened.1
    }

    /// The topics that somebody follows, with their ids.
    pub(super) fn followed(&self) -> (Vec<u64>, Vec<Topic>) {
        let topics = self.topics();
        let all = topics.by_id.iter();
        all.map(|(id, told)| (*id, told.topic.clone())).unzip()
    }

    /// What a topic's page shows now. Nobody is told what differs in nothing but how long something has
    /// lasted: their browsers count that themselves.
    pub(super) fn tell(&self, id: u64, content: &str) {
        let mut topics = self.topics();
        let Some(told) = topics.by_id.get_mut(&id) else {
            return;
        };
        let says = says(content);
        if told.newest.is_none() || told.says != says {
            told.newest = Some(event("page", content).into());
            told.version += 1;
            told.says = says;
        }
    }
}

/// One that follows a topic; gives its place free when dropped.
pub(super) struct Seat {
    hub: Arc<Hub>,
    id: u64,
    /// The version that it was told last.
    seen: u64,
}

impl Seat {
    /// What was told since, if anything was; of several the last.
    fn newest(&mut self) -> Option<Arc<[u8]>> {
        let topics = self.hub.topics();
        let told = topics.by_id.get(&self.id)?;
        if told.version == self.seen {
            return None;
        }
        self.seen = told.version;
        told.newest.clone()
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

/// As it goes over the wire.
fn event(name: &str, data: &str) -> Vec<u8> {
    let mut text = String::with_capacity(data.len() + data.len() / 16 + 64);
    text.push_str("event: ");
    text.push_str(name);
    for line in data.split(['\n', '\r']) {
        text.push_str("\ndata: ");
        text.push_str(line);
    }
    text.push_str("\n\n");
    text.into_bytes()
}

/// A digest of what a page says, without what is within its `time` elements.
fn says(content: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    let mut parts = content.split("<time");
    parts.next().hash(&mut hasher);
    for part in parts {
        let (head, rest) = part.split_once('>').unwrap_or((part, ""));
        let rest = rest.split_once("</time>").map_or(rest, |(_, rest)| rest);
        (head, rest).hash(&mut hasher);
    }
    hasher.finish()
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
            let next = match self.seat.newest() {
                Some(newest) => newest,
                None if now >= self.beat_at => {
                    self.beat_at = now + BEAT;
                    event("beat", &format!("{:.0}", Timestamp::now())).into()
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
mod tests {
    use super::*;
    use crate::domain::overview::Filter;

    /// A client that takes so many bytes and says nothing.
    struct Client {
        room: usize,
        taken: Vec<u8>,
    }

    impl Client {
        fn text(&mut self) -> String {
            String::from_utf8(std::mem::take(&mut self.taken)).unwrap()
        }
    }

    impl Write for Client {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let length = bytes.len().min(self.room);
            if length == 0 {
                return Err(ErrorKind::WouldBlock.into());
            }
            self.room -= length;
            self.taken.extend(&bytes[..length]);
            Ok(length)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Read for Client {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(ErrorKind::WouldBlock.into())
        }
    }

    fn topic(workflow: &str) -> Topic {
        Topic {
            access: Access::Open,
            route: Route::Page(Filter {
                workflow: Some(workflow.to_owned()),
                ..Filter::default()
            }),
        }
    }

    fn goes_on(stream: &mut Stream, client: &mut Client) {
        let error = stream.go_on(client).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn all_who_follow_a_page_share_what_is_told_and_the_slow_get_the_newest() {
        let hub = Arc::new(Hub::default());
        let mut quick = Stream::new(hub.join(topic("a")).unwrap());
        let mut slow = Stream::new(hub.join(topic("a")).unwrap());
        let (ids, topics) = hub.followed();
        assert_eq!(topics, [topic("a")]);
        let mut reader = Client {
            room: usize::MAX,
            taken: Vec::new(),
        };
        let mut sluggard = Client {
            room: HEAD.len() + 3,
            taken: Vec::new(),
        };
        hub.tell(ids[0], "first");
        goes_on(&mut quick, &mut reader);
        goes_on(&mut slow, &mut sluggard);
        assert!(Arc::ptr_eq(&quick.bytes, &slow.bytes) || !quick.bytes.is_empty());
        let text = reader.text();
        assert!(text.starts_with(HEAD), "{text}");
        assert!(text.contains("event: page\ndata: first\n\n"), "{text}");
        assert!(text.contains("event: beat\ndata: "), "{text}");
        for content in ["second", "third\nin two lines"] {
            hub.tell(ids[0], content);
            goes_on(&mut quick, &mut reader);
        }
        assert!(reader.text().contains("data: second\n\n"));
        sluggard.room = usize::MAX;
        goes_on(&mut slow, &mut sluggard);
        let text = sluggard.text();
        assert!(text.contains("data: first\n\n"), "{text}");
        assert!(!text.contains("second"), "{text}");
        assert!(
            text.contains("event: page\ndata: third\ndata: in two lines\n\n"),
            "{text}"
        );
    }

    #[test]
    fn whoever_takes_nothing_is_let_go() {
        let hub = Arc::new(Hub::default());
        let mut stream = Stream::new(hub.join(topic("a")).unwrap());
        let mut client = Client {
            room: 3,
            taken: Vec::new(),
        };
        goes_on(&mut stream, &mut client);
        stream.stuck_at = Instant::now();
        stream.go_on(&mut client).unwrap();
        drop(stream);
        assert!(hub.followed().0.is_empty());
    }

    #[test]
    fn places_are_few_and_are_given_free() {
        let hub = Arc::new(Hub::default());
        let mut seats: Vec<_> = (0..MAX_STREAMS)
            .map(|number| hub.join(topic(&format!("{}", number % 3))).unwrap())
            .collect();
        assert!(hub.join(topic("x")).is_none());
        assert_eq!(hub.followed().1.len(), 3);
        seats.pop();
        assert!(hub.join(topic("x")).is_some());
        drop(seats);
        assert!(hub.followed().1.is_empty());
    }

    #[test]
    fn what_only_lasts_longer_is_no_news() {
        let page = |ago: &str, count: u8| {
            format!("<p>{count} since <time class=\"since\" datetime=\"2026\">{ago}</time>.</p>")
        };
        assert_eq!(says(&page("3 s", 1)), says(&page("4 s", 1)));
        assert_ne!(says(&page("3 s", 1)), says(&page("3 s", 2)));
        assert_ne!(says("<time datetime=\"a\">"), says("<time datetime=\"b\">"));
    }
}
