//! QEMU's control protocol, QMP: JSON objects, a line each, over a Unix socket
//! (<https://www.qemu.org/docs/master/interop/qmp-spec.html>).

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream as StdUnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Interest};
use tokio::net::UnixStream;

use crate::log::escaped;

/// The longest line that is accepted. The longest that we ask for, a list of vCPUs, takes some 100 bytes each.
const LONGEST_LINE: u64 = 1 << 20;

/// Events that nobody asked for are kept, for who asks later, but no more than these.
const EVENTS: usize = 64;

/// A connection to QEMU's monitor.
///
/// All calls are cancel safe: an answer that nobody waited for is skipped by the next call.
#[derive(Debug)]
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
    line: Vec<u8>,
    events: VecDeque<Event>,
    last_id: u64,
}

/// What QMP answers other than success.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    /// QEMU refused a command.
    #[error("{0}")]
    Refused(String),
    /// The connection ended, or what came over it was not QMP.
    #[error(transparent)]
    Broken(#[from] io::Error),
}

/// Something that happened in a machine.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Event {
    /// Its name: `DEVICE_DELETED`.
    #[serde(rename = "event")]
    pub(crate) name: String,
    /// Its members.
    #[serde(default)]
    pub(crate) data: Value,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Message {
    Event(Event),
    Success { id: Option<u64>, r#return: Value },
    Failure { id: Option<u64>, error: Failure },
    Greeting {},
}

#[derive(Deserialize)]
struct Failure {
    desc: String,
}

impl Qmp {
    /// Takes over a connected socket, waits for QEMU's greeting and enters the command mode.
    pub(crate) async fn connect(stream: StdUnixStream) -> Result<Self, QmpError> {
        stream.set_nonblocking(true)?;
        let stream = BufReader::new(UnixStream::from_std(stream)?);
        let mut qmp = Self { stream, line: Vec::new(), events: VecDeque::new(), last_id: 0 };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs a command and answers what it returns.
    pub(crate) async fn execute(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<Value, QmpError> {
        self.execute_with(command, arguments, None).await
    }

    /// Gives QEMU a descriptor, which later commands name by `name`.
    pub(crate) async fn send_fd(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), QmpError> {
        self.execute_with("getfd", json!({ "fdname": name }), Some(fd)).await.map(drop)
    }

    async fn execute_with(
        &mut self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, QmpError> {
        self.last_id += 1;
        let id = self.last_id;
        let request = json!({ "execute": command, "arguments": arguments, "id": id });
        tracing::trace!(%request, "to QEMU");
        self.send(format!("{request}\n").as_bytes(), fd).await?;
        loop {
            match self.receive().await? {
                Message::Success { id: Some(of), r#return } if of == id => return Ok(r#return),
                Message::Failure { id: Some(of), error } if of == id => {
                    return Err(QmpError::Refused(escaped(&error.desc)));
                }
                Message::Event(event) => self.keep(event),
                // The greeting, or the answer to a command whose caller went away.
                _ => {}
            }
        }
    }

    /// Waits for an event that `wanted` accepts; one that has come already counts.
    pub(crate) async fn event(
        &mut self,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event, QmpError> {
        if let Some(at) = self.events.iter().position(&wanted)
            && let Some(event) = self.events.remove(at)
        {
            return Ok(event);
        }
        loop {
            match self.receive().await? {
                Message::Event(event) if wanted(&event) => return Ok(event),
                Message::Event(event) => self.keep(event),
                _ => {}
            }
        }
    }

    /// Forgets the events that have come so far.
    pub(crate) fn forget_events(&mut self) {
        self.events.clear();
    }

    fn keep(&mut self, event: Event) {
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// Sends a whole request in one message, as a cancelled caller must not leave half of one behind.
    async fn send(&mut self, request: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let stream = self.stream.get_ref();
        let fds = fd.as_slice();
        let sent = stream
            .async_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                if !fds.is_empty() {
                    ancillary.push(SendAncillaryMessage::ScmRights(fds));
                }
                let bytes = [IoSlice::new(request)];
                Ok(sendmsg(stream, &bytes, &mut ancillary, SendFlags::NOSIGNAL)?)
            })
            .await?;
        if sent == request.len() {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::WriteZero, "QEMU does not read its monitor"))
    }

    async fn receive(&mut self) -> io::Result<Message> {
        // `self.line` outlives this call, so what a cancelled read has taken is not lost.
        let room = LONGEST_LINE.saturating_sub(self.line.len() as u64);
        (&mut self.stream).take(room).read_until(b'\n', &mut self.line).await?;
        let bad = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
        if !self.line.ends_with(b"\n") {
            return Err(match self.line.len() as u64 {
                LONGEST_LINE.. => bad("a line from QEMU is too long"),
                _ => io::ErrorKind::UnexpectedEof.into(),
            });
        }
        let line = std::mem::take(&mut self.line);
        tracing::trace!(line = %String::from_utf8_lossy(&line).trim_end(), "from QEMU");
        serde_json::from_slice(&line).map_err(|_not_qmp| bad("a line from QEMU is not QMP"))
    }
}

#[cfg(test)]
mod tests {
    use super::{Qmp, QmpError};
    use serde_json::{Value, json};
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;
    use tokio::time::timeout;

    /// A QEMU that greets, accepts the capabilities and then answers each request with the next script.
    fn qemu(scripts: &'static [&'static str]) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut stream = theirs.try_clone().unwrap();
            let mut lines = BufReader::new(theirs).lines();
            stream.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n").unwrap();
            let answers =
                std::iter::once("{\"return\": {}, \"id\": ID}\r\n").chain(scripts.iter().copied());
            for answer in answers {
                let Some(Ok(line)) = lines.next() else { return };
                let request: Value = serde_json::from_str(&line).unwrap();
                let answer = answer.replace("ID", &request["id"].to_string());
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        ours
    }

    #[tokio::test]
    async fn a_command_gets_its_own_answer() {
        let mut qmp = Qmp::connect(qemu(&[
            "{\"return\": {\"late\": true}, \"id\": 77}\r\n{\"event\": \"RESUME\", \"timestamp\": {}}\r\n\
             {\"return\": {\"running\": true}, \"id\": ID}\r\n",
        ]))
        .await
        .unwrap();
        let answer = qmp.execute("query-status", json!({})).await.unwrap();
        assert_eq!(answer, json!({ "running": true }));
        // The event that came in between is still there.
        let event = qmp.event(|event| event.name == "RESUME").await.unwrap();
        assert_eq!(event.data, Value::Null);
    }

    #[tokio::test]
    async fn a_refusal_is_told_in_qemus_words_without_its_escapes() {
        let mut qmp = Qmp::connect(qemu(&[
            "{\"id\": ID, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\\u001b[2J\"}}\r\n",
        ]))
        .await
        .unwrap();
        let error = qmp.execute("device_add", json!({})).await.unwrap_err();
        assert!(matches!(error, QmpError::Refused(words) if words == "no\\u{1b}[2J"));
    }

    #[tokio::test]
    async fn the_end_of_qemu_is_an_error_and_so_is_nonsense() {
        for script in ["", "hello\n"] {
            let scripts: &'static [&'static str] =
                if script.is_empty() { &[] } else { &["hello\n"] };
            let mut qmp = Qmp::connect(qemu(scripts)).await.unwrap();
            let error = qmp.execute("query-status", json!({})).await.unwrap_err();
            assert!(matches!(error, QmpError::Broken(_)));
        }
    }

    #[tokio::test]
    async fn a_cancelled_wait_loses_no_bytes() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let connecting = tokio::spawn(Qmp::connect(ours));
        theirs.write_all(b"{\"QMP\": {}}\n{\"return\": {}, \"id\": 1}\n").unwrap();
        let mut qmp = connecting.await.unwrap().unwrap();
        theirs.write_all(b"{\"event\": \"STO").unwrap();
        let waited = timeout(Duration::from_millis(20), qmp.event(|_| true)).await;
        assert!(waited.is_err());
        theirs.write_all(b"P\"}\n").unwrap();
        assert_eq!(qmp.event(|_| true).await.unwrap().name, "STOP");
    }
}
