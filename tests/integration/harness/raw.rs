//! Just enough AMQP 0-9-1 to publish what no library would.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::harness::deployment::{Deployment, PATIENCE, setting};

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const END: u8 = 0xce;
/// The flags of the properties that are sent here, in their order.
const CONTENT_TYPE: u16 = 1 << 15;
const HEADERS: u16 = 1 << 13;
const MESSAGE_ID: u16 = 1 << 7;

pub fn short(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()], text].concat()
}

pub fn long(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap();
    [&length.to_be_bytes(), bytes].concat()
}

/// An entry of a table, with the type and the bytes of its value.
pub fn entry(key: &[u8], kind: u8, value: &[u8]) -> Vec<u8> {
    [&short(key), [kind].as_slice(), value].concat()
}

/// The bytes of a message's properties: these and no others.
pub struct Properties {
    pub content_type: Vec<u8>,
    /// The entries of the table.
    pub headers: Vec<u8>,
    pub message_id: Vec<u8>,
}

impl Properties {
    fn bytes(&self) -> Vec<u8> {
        [
            &(CONTENT_TYPE | HEADERS | MESSAGE_ID).to_be_bytes(),
            short(&self.content_type).as_slice(),
            &long(&self.headers),
            &short(&self.message_id),
        ]
        .concat()
    }
}

/// A connection with a channel that waits for each confirm.
pub struct RawPublisher {
    stream: TcpStream,
}

impl RawPublisher {
    pub fn new(deployment: &Deployment, vhost: &str) -> RawPublisher {
        let stream = TcpStream::connect(("127.0.0.1", deployment.rabbitmq_port())).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut publisher = RawPublisher { stream };
        publisher.stream.write_all(b"AMQP\0\0\x09\x01").unwrap();
        publisher.expect(10, 10);
        let login = format!(
            "\0{}\0{}",
            setting("RABBITMQ_USER"),
            setting("RABBITMQ_PASSWORD")
        );
        let start_ok = [
            long(b""),
            short(b"PLAIN"),
            long(login.as_bytes()),
            short(b"en_US"),
        ];
        publisher.method(0, 10, 11, &start_ok.concat());
        let tune = publisher.expect(10, 30);
        // As the server wants it, but without heartbeats.
        publisher.method(0, 10, 31, &[&tune[..6], &[0, 0]].concat());
        let open = [short(vhost.as_bytes()), short(b""), vec![0]];
        publisher.method(0, 10, 40, &open.concat());
        publisher.expect(10, 41);
        publisher.method(1, 20, 10, &short(b""));
        publisher.expect(20, 11);
        publisher.method(1, 85, 10, &[0]);
        publisher.expect(85, 11);
        publisher
    }

    fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let size = u32::try_from(payload.len()).unwrap();
        let frame = [
            &[kind] as &[u8],
            &channel.to_be_bytes(),
            &size.to_be_bytes(),
            payload,
            &[END],
        ];
        self.stream.write_all(&frame.concat()).unwrap();
    }

    fn method(&mut self, channel: u16, class: u16, method: u16, arguments: &[u8]) {
        let payload = [&class.to_be_bytes(), &method.to_be_bytes(), arguments].concat();
        self.frame(METHOD, channel, &payload);
    }

    /// The arguments of the next method, which is to be this one.
    fn expect(&mut self, class: u16, method: u16) -> Vec<u8> {
        let mut head = [0; 7];
        self.stream.read_exact(&mut head).unwrap();
        let size = u32::from_be_bytes(head[3..].try_into().unwrap());
        let mut rest = vec![0; size as usize + 1];
        self.stream.read_exact(&mut rest).unwrap();
        assert_eq!(rest.pop(), Some(END));
        let expected = [class.to_be_bytes(), method.to_be_bytes()].concat();
        assert!(
            head[0] == METHOD && rest.starts_with(&expected),
            "not {class}, {method}: {}",
            String::from_utf8_lossy(&rest)
        );
        rest.split_off(4)
    }

    /// Publishes and waits for the confirm.
    pub fn publish(&mut self, exchange: &str, key: &[u8], properties: &Properties, body: &[u8]) {
        let arguments = [vec![0, 0], short(exchange.as_bytes()), short(key), vec![0]];
        self.method(1, 60, 40, &arguments.concat());
        let size = (body.len() as u64).to_be_bytes();
        let header = [&[0, 60, 0, 0], size.as_slice(), &properties.bytes()];
        self.frame(HEADER, 1, &header.concat());
        if !body.is_empty() {
            self.frame(BODY, 1, body);
        }
        self.expect(60, 80);
    }
}
