//! How much is in hand, in bytes. RabbitMQ limits what it delivers by count only, and a few messages
//! may be as large as thousands of others. So a consuming connection stops reading while there is
//! enough in hand, and TCP holds back the rest. If that lasts for two heartbeats the connection is
//! lost, as RabbitMQ would see to ten seconds later; the messages go back and come again.

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mio::net::TcpStream;
use mio::{Evented, Poll, PollOpt, Ready, Registration, SetReadiness, Token};

/// The bytes of the messages that are in hand, of all connections that share the limit.
pub struct Intake {
    limit: usize,
    in_hand: AtomicUsize,
    /// Wake the connections' threads to read on.
    wakers: Mutex<Vec<SetReadiness>>,
}

impl Intake {
    /// Nothing more is read once `limit` bytes are in hand: together with one message, and what the
    /// socket buffers hold, that is the most there can be.
    pub fn new(limit: usize) -> Arc<Intake> {
        Arc::new(Intake {
            limit,
            in_hand: AtomicUsize::new(0),
            wakers: Mutex::new(Vec::new()),
        })
    }

    pub(super) fn take(&self, bytes: usize) {
        self.in_hand.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn give_back(&self, bytes: usize) {
        let before = self.in_hand.fetch_sub(bytes, Ordering::Relaxed);
        if before >= self.limit && !self.is_full() {
            let wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
            for waker in wakers.iter() {
                // Readiness is told when it changes. A connection that is gone needs no telling.
                let _ = waker.set_readiness(Ready::empty());
                let _ = waker.set_readiness(Ready::readable());
            }
        }
    }

    /// Whether nothing more is read for now.
    pub fn is_full(&self) -> bool {
        self.in_hand.load(Ordering::Relaxed) >= self.limit
    }
}

/// A socket that is not read while there is enough in hand.
pub(super) struct GatedStream {
    stream: TcpStream,
    intake: Arc<Intake>,
    woken: Registration,
}

impl GatedStream {
    pub(super) fn new(stream: TcpStream, intake: &Arc<Intake>) -> GatedStream {
        let (woken, waker) = Registration::new2();
        let mut wakers = intake.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        wakers.push(waker);
        GatedStream {
            stream,
            intake: Arc::clone(intake),
            woken,
        }
    }
}

impl Read for GatedStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.intake.is_full() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.stream.read(buffer)
    }
}

impl Write for GatedStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl amiquip::IoStream for GatedStream {}

impl Evented for GatedStream {
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
