//! The streams that CRI gives by URL: exec, attach and port-forward, by WebSocket as a kubelet's clients may open them.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tungstenite::client::IntoClientRequest;
use tungstenite::{Error, Message, WebSocket};

use crate::pods::Node;
use crate::run::DEADLINE;

/// Kubernetes' protocol: the first byte of a message says which stream it is of.
const PROTOCOL: &str = "v4.channel.k8s.io";

/// The streams of exec and attach.
pub mod channel {
    /// Standard input.
    pub const STDIN: u8 = 0;
    /// Standard output, or the terminal.
    pub const STDOUT: u8 = 1;
    /// Standard error.
    pub const STDERR: u8 = 2;
    /// How it ended, as JSON.
    pub const ERROR: u8 = 3;
    /// The terminal's size, as JSON.
    pub const RESIZE: u8 = 4;
}

/// An open connection, and what has come by each of its streams.
#[derive(Debug)]
pub struct Streams {
    socket: WebSocket<TcpStream>,
    received: [Vec<u8>; 5],
    ended: bool,
}

impl Streams {
    /// Opens what containerd serves at `url`, in the node's network namespace.
    ///
    /// # Errors
    ///
    /// When it is not served.
    pub fn open(node: &Node, url: &str) -> Result<Self> {
        let url = url.replacen("http://", "ws://", 1);
        let mut request = url.as_str().into_client_request()?;
        let address = request.uri().authority().context("a URL without a host")?.to_string();
        request.headers_mut().insert("Sec-WebSocket-Protocol", PROTOCOL.parse()?);
        let stream = node.inside(move || Ok(TcpStream::connect(address)?))?;
        stream.set_read_timeout(Some(DEADLINE))?;
        let (socket, _) = tungstenite::client(request, stream)
            .map_err(|error| anyhow::anyhow!("containerd does not take the connection: {error}"))?;
        Ok(Self { socket, received: Default::default(), ended: false })
    }

    /// Writes to a stream.
    ///
    /// # Errors
    ///
    /// When the connection has ended.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let mut message = vec![channel];
        message.extend_from_slice(bytes);
        Ok(self.socket.send(Message::binary(message))?)
    }

    /// What has come by a stream until now.
    pub fn text(&self, channel: u8) -> String {
        String::from_utf8_lossy(&self.received[usize::from(channel)]).into_owned()
    }

    fn receive(&mut self) -> Result<()> {
        match self.socket.read() {
            Ok(Message::Binary(bytes)) => {
                if let Some((channel, bytes)) = bytes.split_first()
                    && let Some(received) = self.received.get_mut(usize::from(*channel))
                {
                    received.extend_from_slice(bytes);
                }
            }
            Ok(Message::Close(_))
            | Err(Error::ConnectionClosed | Error::AlreadyClosed | Error::Protocol(_)) => {
                self.ended = true;
            }
            Ok(_) => {}
            Err(error) => bail!("the connection broke: {error}; received: {:?}", self.received),
        }
        Ok(())
    }

    /// Reads until `word` has come by a stream.
    ///
    /// # Errors
    ///
    /// When the connection ends first, or nothing comes in time.
    pub fn expect(&mut self, channel: u8, word: &str) -> Result<()> {
        self.until(|streams| streams.text(channel).contains(word), word)
    }

    /// Reads until the connection ends, or the end of the process is told.
    ///
    /// # Errors
    ///
    /// When nothing comes in time.
    pub fn finish(&mut self) -> Result<()> {
        self.until(|streams| streams.ended || !streams.text(channel::ERROR).is_empty(), "the end")
    }

    fn until(&mut self, done: impl Fn(&Self) -> bool, what: &str) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        while !done(self) {
            if self.ended {
                bail!("it ended before {what:?}: {:?}", self.text(channel::STDOUT));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            self.socket.get_ref().set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            self.receive()?;
        }
        Ok(())
    }
}
