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

fn client(room: usize) -> Client {
    Client {
        room,
        taken: Vec::new(),
    }
}

fn seen(content: &str) -> Seen {
    Seen {
        content: content.to_owned(),
        is_last: false,
    }
}

/// Looks at the only topic that is followed, which shows this.
fn look(hub: &Hub, now: Instant, shows: &Seen) -> bool {
    let Next::Look(id, _) = hub.next(now) else {
        panic!("nothing is to be looked at");
    };
    let is_told = hub.tell(id, shows, Timestamp::UNIX_EPOCH, now);
    hub.looked(id, Duration::ZERO, now);
    is_told
}

#[test]
fn all_who_follow_a_page_share_what_is_told_and_the_slow_get_the_newest() {
    let hub = Arc::new(Hub::default());
    let mut quick = Stream::new(hub.join(topic("a")).unwrap());
    let mut slow = Stream::new(hub.join(topic("a")).unwrap());
    assert_eq!(hub.topics_followed(), [topic("a")]);
    let mut now = Instant::now();
    look(&hub, now, &seen("first"));
    let first = [&mut quick.seat, &mut slow.seat].map(|seat| {
        let before = (seat.first, seat.known);
        let (newest, _) = seat.newest().unwrap();
        (seat.first, seat.known) = before;
        newest
    });
    assert!(Arc::ptr_eq(&first[0], &first[1]));
    let (mut reader, mut sluggard) = (client(usize::MAX), client(HEAD.len() + 3));
    goes_on(&mut quick, &mut reader);
    goes_on(&mut slow, &mut sluggard);
    let text = reader.text();
    assert!(text.starts_with(HEAD), "{text}");
    assert!(
        text.contains("event: page\nid: 1\ndata: first\n\n"),
        "{text}"
    );
    assert!(text.contains("event: beat\ndata: "), "{text}");
    for content in ["second", "third\nin two lines"] {
        now += PERIOD;
        assert!(look(&hub, now, &seen(content)));
        goes_on(&mut quick, &mut reader);
    }
    assert!(reader.text().contains("data: second\n\n"));
    sluggard.room = usize::MAX;
    goes_on(&mut slow, &mut sluggard);
    let text = sluggard.text();
    assert!(text.contains("data: first\n\n"), "{text}");
    assert!(!text.contains("second"), "{text}");
    assert!(
        text.contains("event: page\nid: 3\ndata: third\ndata: in two lines\n\n"),
        "{text}"
    );
}

/// What was told before may be older than the page that a browser has just loaded.
#[test]
fn whoever_joins_is_told_what_is_looked_at_after_that() {
    let hub = Arc::new(Hub::default());
    let mut old = hub.join(topic("a")).unwrap();
    let now = Instant::now();
    look(&hub, now, &seen("held"));
    assert!(old.newest().is_some());
    let mut early = hub.join(topic("a")).unwrap();
    assert!(early.newest().is_none());
    // It joins while a look is under way.
    let Next::Look(id, _) = hub.next(now) else {
        panic!("a look is wanted");
    };
    let mut late = hub.join(topic("a")).unwrap();
    hub.tell(id, &seen("waits"), Timestamp::UNIX_EPOCH, now);
    hub.looked(id, Duration::ZERO, now);
    assert!(early.newest().is_some() && old.newest().is_some());
    assert!(late.newest().is_none());
    // It is looked at at once, and only the one that waits for it is told.
    assert!(look(&hub, now, &seen("waits")));
    assert!(late.newest().is_some());
    assert!(early.newest().is_none() && old.newest().is_none());
    assert!(matches!(hub.next(now), Next::Wait(Some(_))));
    hub.look_anew();
    assert!(!look(&hub, now, &seen("waits")));
}

#[test]
fn what_lasts_longer_is_told_now_and_then() {
    let hub = Arc::new(Hub::default());
    let _seat = hub.join(topic("a")).unwrap();
    let begin = Instant::now();
    let told = [0, 2, 58, 60, 62, 120].map(|second| {
        let page = seen(&format!("runs for {second} s"));
        look(&hub, begin + Duration::from_secs(second), &page)
    });
    assert_eq!(told, [true, false, false, true, false, true]);
}

#[test]
fn beats_have_the_time_of_the_last_look() {
    let hub = Arc::new(Hub::default());
    let mut stream = Stream::new(hub.join(topic("a")).unwrap());
    let mut reader = client(usize::MAX);
    goes_on(&mut stream, &mut reader);
    let text = reader.text();
    assert!(text.contains("event: beat\ndata: 20"), "{text}");
    assert!(!text.contains(" 1970"), "{text}");
    look(&hub, Instant::now(), &seen("first"));
    goes_on(&mut stream, &mut reader);
    let text = reader.text();
    assert!(text.contains("Z 1970-01-01T00:00:00Z\n\n"), "{text}");
}

#[test]
fn a_page_that_costs_much_rests_for_itself() {
    let hub = Arc::new(Hub::default());
    let _seats = ["cheap", "dear"].map(|name| hub.join(topic(name)).unwrap());
    let mut now = Instant::now();
    let cost_of = |one: &Topic| match *one == topic("dear") {
        true => Duration::from_secs(5),
        false => Duration::from_millis(10),
    };
    let mut looks = [0, 0];
    let end = now + Duration::from_secs(200);
    while now < end {
        match hub.next(now) {
            Next::Look(id, topic) => {
                let cost = cost_of(&topic);
                looks[usize::from(cost > PERIOD)] += 1;
                now += cost;
                hub.looked(id, cost, now);
            }
            Next::Wait(until) => now = until.unwrap(),
        }
    }
    assert!((70..=100).contains(&looks[0]), "{looks:?}");
    assert!((9..=11).contains(&looks[1]), "{looks:?}");
}

#[test]
fn looking_takes_a_fiftieth_of_the_time_and_nobody_waits_long() {
    for (cost, share, wait) in [(10, 0.005, 2.0), (100, 0.02, 5.0), (1000, 0.2, 6.0)] {
        let hub = Arc::new(Hub::default());
        let _seat = hub.join(topic("a")).unwrap();
        let (begin, cost) = (Instant::now(), Duration::from_millis(cost));
        let (mut now, mut looks) = (begin, 0);
        while now < begin + Duration::from_secs(100) {
            match hub.next(now) {
                Next::Look(id, _) => {
                    looks += 1;
                    now += cost;
                    hub.looked(id, cost, now);
                }
                Next::Wait(until) => now = until.unwrap(),
            }
        }
        let time = (now - begin).as_secs_f64();
        let taken = (cost * looks).as_secs_f64() / time;
        assert!(taken <= share * 1.2, "{taken} of the time for {cost:?}");
        let apart = time / f64::from(looks) - cost.as_secs_f64();
        assert!(apart <= wait * 1.1, "{apart} s apart for {cost:?}");
    }
}

#[test]
fn what_has_ended_is_told_once_and_closed() {
    let hub = Arc::new(Hub::default());
    let mut stream = Stream::new(hub.join(topic("a")).unwrap());
    let mut reader = client(usize::MAX);
    let now = Instant::now();
    look(&hub, now, &seen("runs"));
    goes_on(&mut stream, &mut reader);
    let last = Seen {
        is_last: true,
        ..seen("runs")
    };
    assert!(look(&hub, now + PERIOD, &last));
    stream.go_on(&mut reader).unwrap();
    let text = reader.text();
    assert!(
        text.ends_with("data: runs\n\nevent: end\ndata: \n\n"),
        "{text}"
    );
}

#[test]
fn whoever_takes_nothing_is_let_go() {
    let hub = Arc::new(Hub::default());
    let mut stream = Stream::new(hub.join(topic("a")).unwrap());
    let mut client = client(3);
    goes_on(&mut stream, &mut client);
    stream.stuck_at = Instant::now();
    stream.go_on(&mut client).unwrap();
    drop(stream);
    assert!(hub.topics_followed().is_empty());
}

#[test]
fn places_are_few_and_are_given_free() {
    let hub = Arc::new(Hub::default());
    let mut seats: Vec<_> = (0..MAX_STREAMS)
        .map(|number| hub.join(topic(&format!("{}", number % 3))).unwrap())
        .collect();
    assert!(hub.join(topic("x")).is_none());
    assert_eq!(hub.topics_followed().len(), 3);
    seats.pop();
    assert!(hub.join(topic("x")).is_some());
    drop(seats);
    assert!(hub.topics_followed().is_empty());
}
