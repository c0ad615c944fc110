//! A socket that hands amiquip only what it can read, see [`super::readable`].

use std::io::{self, Read, Write};
use std::mem;

use amiquip::IoStream;
use mio_of_amiquip::{Evented, Poll, PollOpt, Ready, Token};

use super::readable::{make_header_readable, make_method_readable};

/// A frame's type, channel and size.
const HEAD: usize = 7;
/// The byte behind its payload.
const END: usize = 1;
const METHOD: u8 = 1;
const HEADER: u8 = 2;
/// How large a method or a message's properties may be. RabbitMQ's frames have 128 KiB unless it is
/// configured otherwise.
const MAX_GUARDED: usize = 16 * 1024 * 1024;

/// A socket whose frames are made readable. Body frames, nearly all of the traffic, pass through
/// untouched; of the others at most one incomplete frame is buffered.
pub(super) struct GuardedStream<S> {
    stream: S,
    /// An incomplete frame, or a complete one that is being handed on.
    held: Vec<u8>,
    /// How much of it has been handed on; None while it is incomplete.
    handed_on: Option<usize>,
    /// How many bytes of a body frame still pass through.
    passing: usize,
}

/// What a frame's head says.
struct Head {
    is_guarded: bool,
    /// With the head itself.
    length: usize,
}

impl Head {
    /// None while it is incomplete.
    fn read(bytes: &[u8]) -> Option<Head> {
        let [kind, _, _, size @ ..] = *bytes.first_chunk::<HEAD>()?;
        let size = u32::from_be_bytes(size) as usize;
        Some(Head {
            is_guarded: [METHOD, HEADER].contains(&kind),
            length: HEAD + size + END,
        })
    }
}

/// Makes a whole frame readable.
fn make_readable(frame: &mut [u8]) {
    let (kind, end) = (frame[0], frame.len() - END);
    let payload = &mut frame[HEAD..end];
    match kind {
        METHOD => make_method_readable(payload),
        HEADER => make_header_readable(payload),
        _ => {}
    }
}

impl<S: Read> GuardedStream<S> {
    pub(super) fn new(stream: S) -> GuardedStream<S> {
        GuardedStream {
            stream,
            held: Vec::new(),
            handed_on: None,
            passing: 0,
        }
    }

    /// How many bytes are missing to learn more about the buffered frame, or to complete it.
    fn missing(&self) -> io::Result<usize> {
        let wanted = match Head::read(&self.held) {
            Some(head) if head.length > MAX_GUARDED => {
                let fault = format!("RabbitMQ sends a frame of {} bytes", head.length);
                return Err(io::Error::new(io::ErrorKind::InvalidData, fault));
            }
            Some(head) => head.length,
            None => HEAD,
        };
        Ok(wanted - self.held.len())
    }

    /// Makes the given bytes readable, buffers an incomplete frame at their end, and returns how
    /// many bytes precede it.
    fn look_through(&mut self, bytes: &mut [u8]) -> usize {
        let mut at = 0;
        loop {
            let passing = self.passing.min(bytes.len() - at);
            self.passing -= passing;
            at += passing;
            let rest = &mut bytes[at..];
            match Head::read(rest) {
                Some(head) if !head.is_guarded => self.passing = head.length,
                Some(head) if head.length <= rest.len() => {
                    make_readable(&mut rest[..head.length]);
                    at += head.length;
                }
                Some(_) | None => {
                    self.held.extend_from_slice(rest);
                    return at;
                }
            }
        }
    }

    /// Reads more of a frame that the caller's buffer has no room for. Returns false at the end of
    /// the stream.
    fn fill(&mut self, missing: usize) -> io::Result<bool> {
        let mut rest = self.stream.by_ref().take(missing as u64);
        // What has come before an error stays.
        if rest.read_to_end(&mut self.held)? < missing {
            return Ok(false);
        }
        match Head::read(&self.held) {
            Some(head) if !head.is_guarded => {
                self.passing = head.length - self.held.len();
                self.handed_on = Some(0);
            }
            Some(head) if head.length == self.held.len() => {
                make_readable(&mut self.held);
                self.handed_on = Some(0);
            }
            Some(_) | None => {}
        }
        Ok(true)
    }
}

impl<S: Read> Read for GuardedStream<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(from) = self.handed_on {
                let count = buffer.len().min(self.held.len() - from);
                buffer[..count].copy_from_slice(&self.held[from..from + count]);
                self.handed_on = Some(from + count);
                if from + count == self.held.len() {
                    self.held.clear();
                    self.handed_on = None;
                }
                return Ok(count);
            }
            let missing = match self.passing {
                0 => self.missing()?,
                _ => 0,
            };
            let held = self.held.len();
            if held + missing > buffer.len() {
                if !self.fill(missing)? {
                    return Ok(0);
                }
                continue;
            }
            // Where there is nothing to read, it stays held.
            let read = self.stream.read(&mut buffer[held..])?;
            if read == 0 {
                return Ok(0);
            }
            buffer[..held].copy_from_slice(&mem::take(&mut self.held));
            let count = self.look_through(&mut buffer[..held + read]);
            if count > 0 {
                return Ok(count);
            }
        }
    }
}

impl<S: Write> Write for GuardedStream<S> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl<S: IoStream> IoStream for GuardedStream<S> {}

impl<S: IoStream> Evented for GuardedStream<S> {
    fn register(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        options: PollOpt,
    ) -> io::Result<()> {
        self.stream.register(poll, token, interest, options)
    }

    fn reregister(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        options: PollOpt,
    ) -> io::Result<()> {
        self.stream.reregister(poll, token, interest, options)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        self.stream.deregister(poll)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::super::readable::tests::{any_frame, frame};
    use super::*;

    /// Gives so many bytes at a time, and nothing at all for once after each time.
    struct Pieces {
        bytes: VecDeque<u8>,
        sizes: Vec<usize>,
        reads: usize,
        most: usize,
    }

    impl Pieces {
        fn new(bytes: &[u8], sizes: &[usize]) -> Pieces {
            Pieces {
                bytes: bytes.iter().copied().collect(),
                sizes: sizes.to_vec(),
                reads: 0,
                most: 0,
            }
        }
    }

    impl Read for Pieces {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.reads += 1;
            self.most = self.most.max(buffer.len());
            if self.reads.is_multiple_of(2) && !self.bytes.is_empty() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let size = self.sizes[self.reads / 2 % self.sizes.len()].min(buffer.len());
            (&mut self.bytes).take(size as u64).read(buffer)
        }
    }

    /// Everything, read with buffers of these sizes.
    fn read_all(stream: &mut GuardedStream<Pieces>, buffers: &[usize]) -> Vec<u8> {
        let mut all = Vec::new();
        for size in buffers.iter().cycle() {
            let mut buffer = vec![0; *size];
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => all.extend(&buffer[..count]),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
        all
    }

    proptest! {
        #[test]
        fn frames_are_made_readable_however_they_come(
            frames in prop::collection::vec(any_frame(), 0..8),
            sizes in prop::collection::vec(1_usize..400, 1..10),
            buffers in prop::collection::vec(1_usize..600, 1..10),
        ) {
            let mut expected = frames.clone();
            expected.iter_mut().for_each(|frame| make_readable(frame));
            let pieces = Pieces::new(&frames.concat(), &sizes);
            let mut stream = GuardedStream::new(pieces);
            prop_assert_eq!(read_all(&mut stream, &buffers), expected.concat());
            prop_assert!(stream.held.is_empty());
        }
    }

    #[test]
    fn a_frame_larger_than_any_buffer_is_kept_until_it_is_whole() {
        let mut payload =
            b"\0\x3c\0\0\0\0\0\0\0\0\0\x07\x20\0\0\x01\xff\xf0\x01aS\0\x01\xff\xe9".to_vec();
        payload.resize(payload.len() + 0x1ffe9, 0xff);
        let frame = [frame(2, &payload), frame(3, &[0xff; 100])].concat();
        let mut stream = GuardedStream::new(Pieces::new(&frame, &[4096]));
        let read = read_all(&mut stream, &[4096]);
        let questions = read.iter().filter(|byte| **byte == b'?').count();
        assert_eq!((read.len(), questions), (frame.len(), 0x1ffe9));
    }

    #[test]
    fn what_is_no_frame_goes_through() {
        // How a broker answers that speaks another version.
        let mut stream = GuardedStream::new(Pieces::new(b"AMQP\0\0\x09\x01", &[5]));
        assert_eq!(read_all(&mut stream, &[4096]), b"AMQP\0\0\x09\x01");
    }

    #[test]
    fn a_frame_without_bounds_is_an_error() {
        let head = b"\x01\0\0\xff\xff\xff\xff..............";
        let mut stream = GuardedStream::new(Pieces::new(head, &[20]));
        let mut buffer = [0; 4096];
        let fault = stream.read(&mut buffer).unwrap_err();
        assert_eq!(
            fault.to_string(),
            "RabbitMQ sends a frame of 4294967303 bytes"
        );
    }

    #[test]
    fn small_frames_cost_no_reads_of_their_own() {
        // A message's three frames.
        let deliver = b"\0\x3c\0\x3c\x01t\0\0\0\0\0\0\0\x01\0\x00\x01k";
        let header = b"\0\x3c\0\0\0\0\0\0\0\0\0\x64\0\0";
        let message = [frame(1, deliver), frame(2, header), frame(3, &[b'x'; 100])].concat();
        let bytes = message.repeat(1000);
        let mut stream = GuardedStream::new(Pieces::new(&bytes, &[4096]));
        assert_eq!(read_all(&mut stream, &[4096 + 100]), bytes);
        // One that reads, one that finds nothing.
        assert!(
            stream.stream.reads <= 2 * (bytes.len() / 4096 + 2),
            "{}",
            stream.stream.reads
        );
    }
}
