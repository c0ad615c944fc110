//! Bounds the bytes in flight. RabbitMQ limits what it delivers by count only, and a few messages
//! may be as large as thousands of others. So a consuming connection stops reading while enough is
//! in flight, and TCP's back-pressure holds back the rest. If more is waiting, RabbitMQ gives the
//! connection up after 30 seconds of that, and the messages are redelivered.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use amiquip::IoStream;
use mio_of_amiquip::{Evented, Poll, PollOpt, Ready, Registration, SetReadiness, Token};

/// A connection that reads nothing for two heartbeats counts as lost, so a little is read even
/// then.
const TRICKLE_PERIOD: Duration = Duration::from_secs(1);
const TRICKLE: usize = 4 * 1024;
/// amiquip reads for as long as there is something to read, and neither acknowledges nor sends
/// heartbeats meanwhile. When decrypting is slower than RabbitMQ that never ends, so after a number
/// of bytes the stream once says that there is nothing to read.
const TURN: usize = 1024 * 1024;

/// The bytes in flight, bodies and properties, of all connections that share the limit.
pub struct Intake {
    limit: AtomicUsize,
    in_hand: AtomicUsize,
    /// Wake the connections' threads to read on.
    wakers: Mutex<Vec<SetReadiness>>,
}

impl Intake {
    /// Reading stops once `limit` bytes are in flight: together with one message and the socket
    /// buffers, that is the maximum.
    pub fn new(limit: usize) -> Arc<Intake> {
        Arc::new(Intake {
            limit: AtomicUsize::new(limit),
            in_hand: AtomicUsize::new(0),
            wakers: Mutex::new(Vec::new()),
        })
    }

    /// So many bytes count as in flight until what is returned is dropped.
    pub(super) fn share(self: &Arc<Self>, bytes: usize) -> Share {
        self.in_hand.fetch_add(bytes, Ordering::Relaxed);
        Share {
            intake: Arc::clone(self),
            bytes,
        }
    }

    fn give_back(&self, bytes: usize) {
        let before = self.in_hand.fetch_sub(bytes, Ordering::Relaxed);
        if before >= self.limit.load(Ordering::Relaxed) && !self.is_full() {
            self.wake();
        }
    }

    /// Lifts the limit, for the end of the session.
    pub(super) fn open(&self) {
        self.limit.store(usize::MAX, Ordering::Relaxed);
        self.wake();
    }

    /// Lets the connections check whether they may read; to be called periodically.
    pub fn wake(&self) {
        let wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        wakers.iter().for_each(tell);
    }

    /// Whether reading is paused.
    pub fn is_full(&self) -> bool {
        self.in_hand.load(Ordering::Relaxed) >= self.limit.load(Ordering::Relaxed)
    }
}

/// A message's part of the bytes in flight.
pub(super) struct Share {
    intake: Arc<Intake>,
    bytes: usize,
}

impl Share {
    /// Gives back all but so many bytes.
    pub(super) fn shrink(&mut self, bytes: usize) {
        self.intake.give_back(self.bytes.saturating_sub(bytes));
        self.bytes = self.bytes.min(bytes);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.intake.give_back(self.bytes);
    }
}

impl fmt::Debug for Share {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} bytes", self.bytes)
    }
}

/// Makes a connection's thread read.
fn tell(waker: &SetReadiness) {
    // Changing the readiness wakes it. A connection that is gone needs no waking.
    let _ = waker.set_readiness(Ready::empty());
    let _ = waker.set_readiness(Ready::readable());
}

/// A socket that is not read while enough is in flight.
pub(super) struct GatedStream<S> {
    stream: S,
    intake: Arc<Intake>,
    woken: Registration,
    waker: SetReadiness,
    last_read: Instant,
    /// How many bytes have been read in this turn.
    read: usize,
}

impl<S: IoStream> GatedStream<S> {
    pub(super) fn new(stream: S, intake: &Arc<Intake>) -> GatedStream<S> {
        let (woken, waker) = Registration::new2();
        let mut wakers = intake.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        wakers.push(waker.clone());
        GatedStream {
            stream,
            intake: Arc::clone(intake),
            woken,
            waker,
            last_read: Instant::now(),
            read: 0,
        }
    }
}

impl<S: IoStream> Read for GatedStream<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.read >= TURN {
            self.read = 0;
            tell(&self.waker);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let size = if !self.intake.is_full() {
            buffer.len()
        } else if self.last_read.elapsed() >= TRICKLE_PERIOD {
            buffer.len().min(TRICKLE)
        } else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let read = self.stream.read(&mut buffer[..size])?;
        self.last_read = Instant::now();
        self.read += read;
        Ok(read)
    }
}

impl<S: IoStream> Write for GatedStream<S> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl<S: IoStream> IoStream for GatedStream<S> {}

impl<S: IoStream> Evented for GatedStream<S> {
    fn register(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        options: PollOpt,
    ) -> io::Result<()> {
        self.stream.register(poll, token, interest, options)?;
        self.woken.register(poll, token, Ready::readable(), options)
    }

    fn reregister(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        options: PollOpt,
    ) -> io::Result<()> {
        self.stream.reregister(poll, token, interest, options)?;
        self.woken
            .reregister(poll, token, Ready::readable(), options)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        self.stream.deregister(poll)?;
        poll.deregister(&self.woken)
    }
}

#[cfg(test)]
mod tests {
    use mio_of_amiquip::Events;

    use super::*;

    /// A source that always has something to read.
    struct Endless;

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            Ok(buffer.len())
        }
    }

    impl Write for Endless {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            Ok(buffer.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl IoStream for Endless {}

    impl Evented for Endless {
        fn register(&self, _: &Poll, _: Token, _: Ready, _: PollOpt) -> io::Result<()> {
            Ok(())
        }

        fn reregister(&self, _: &Poll, _: Token, _: Ready, _: PollOpt) -> io::Result<()> {
            Ok(())
        }

        fn deregister(&self, _: &Poll) -> io::Result<()> {
            Ok(())
        }
    }

    /// How many bytes are read before the pause.
    fn turn(stream: &mut GatedStream<Endless>) -> usize {
        let mut buffer = [0; 4096];
        let mut total = 0;
        while let Ok(read) = stream.read(&mut buffer) {
            total += read;
            assert!(total <= TURN, "nobody else has a turn");
        }
        total
    }

    #[test]
    fn reading_leaves_room_for_writing_and_goes_on() {
        let intake = Intake::new(1);
        let mut stream = GatedStream::new(Endless, &intake);
        let poll = Poll::new().unwrap();
        poll.register(&stream, Token(0), Ready::readable(), PollOpt::edge())
            .unwrap();
        let mut events = Events::with_capacity(1);
        for _ in 0..3 {
            assert_eq!(turn(&mut stream), TURN);
            poll.poll(&mut events, Some(Duration::from_secs(60)))
                .unwrap();
            assert!(!events.is_empty(), "nobody tells that it goes on");
        }
    }

    #[test]
    fn nothing_is_read_while_there_is_enough_in_hand() {
        let intake = Intake::new(10);
        let mut stream = GatedStream::new(Endless, &intake);
        let poll = Poll::new().unwrap();
        poll.register(&stream, Token(0), Ready::readable(), PollOpt::edge())
            .unwrap();
        let mut share = intake.share(10);
        assert_eq!(turn(&mut stream), 0);
        share.shrink(9);
        let mut events = Events::with_capacity(1);
        poll.poll(&mut events, Some(Duration::from_secs(60)))
            .unwrap();
        assert!(!events.is_empty(), "nobody tells that it goes on");
        assert_eq!(turn(&mut stream), TURN);
    }
}
