//! How much is in hand, in bytes. RabbitMQ limits what it delivers by count only, and a few messages
//! may be as large as thousands of others. So a consuming connection stops reading while there is
//! enough in hand, and TCP holds back the rest. While more is waiting, RabbitMQ gives the connection
//! up after 30 seconds of that; the messages go back and come again.

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use amiquip::IoStream;
use mio_of_amiquip::{Evented, Poll, PollOpt, Ready, Registration, SetReadiness, Token};

/// A connection that reads nothing for two heartbeats counts as lost, so a little is read all the
/// same.
const TRICKLE_PERIOD: Duration = Duration::from_secs(5);
const TRICKLE: usize = 4 * 1024;

/// The bytes of the messages that are in hand, of all connections that share the limit.
pub struct Intake {
    limit: AtomicUsize,
    in_hand: AtomicUsize,
    /// Wake the connections' threads to read on.
    wakers: Mutex<Vec<SetReadiness>>,
}

impl Intake {
    /// Nothing more is read once `limit` bytes are in hand: together with one message, and what the
    /// socket buffers hold, that is the most there can be.
    pub fn new(limit: usize) -> Arc<Intake> {
        Arc::new(Intake {
            limit: AtomicUsize::new(limit),
            in_hand: AtomicUsize::new(0),
            wakers: Mutex::new(Vec::new()),
        })
    }

    pub(super) fn take(&self, bytes: usize) {
        self.in_hand.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn give_back(&self, bytes: usize) {
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

    /// Lets connections look whether they may read; to be called from time to time.
    pub fn wake(&self) {
        let wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        for waker in wakers.iter() {
            // Readiness is told when it changes. A connection that is gone needs no telling.
            let _ = waker.set_readiness(Ready::empty());
            let _ = waker.set_readiness(Ready::readable());
        }
    }

    /// Whether nothing more is read for now.
    pub fn is_full(&self) -> bool {
        self.in_hand.load(Ordering::Relaxed) >= self.limit.load(Ordering::Relaxed)
    }
}

/// A socket that is not read while there is enough in hand.
pub(super) struct GatedStream<S> {
    stream: S,
    intake: Arc<Intake>,
    woken: Registration,
    last_read: Instant,
}

impl<S: IoStream> GatedStream<S> {
    pub(super) fn new(stream: S, intake: &Arc<Intake>) -> GatedStream<S> {
        let (woken, waker) = Registration::new2();
        let mut wakers = intake.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        wakers.push(waker);
        GatedStream {
            stream,
            intake: Arc::clone(intake),
            woken,
            last_read: Instant::now(),
        }
    }
}

impl<S: IoStream> Read for GatedStream<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let size = if !self.intake.is_full() {
            buffer.len()
        } else if self.last_read.elapsed() >= TRICKLE_PERIOD {
            buffer.len().min(TRICKLE)
        } else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let read = self.stream.read(&mut buffer[..size])?;
        self.last_read = Instant::now();
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
