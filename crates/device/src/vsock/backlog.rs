//! Bytes on their way from the guest to a host that did not take them at once.

use std::io::{self, Write};

/// A byte queue, as long as the stream's credit at most; its owner counts that.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    bytes: Vec<u8>,
    written: usize,
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.written
    }

    /// Appends `len` bytes that `fill` writes.
    pub(super) fn push(&mut self, len: usize, fill: impl FnOnce(&mut [u8])) {
        // Moving the rest only when at least as much was written keeps the cost of a byte constant.
        if self.written > self.bytes.len() / 2 {
            self.bytes.drain(..self.written);
            self.written = 0;
        }
        let end = self.bytes.len();
        self.bytes.resize(end + len, 0);
        fill(&mut self.bytes[end..]);
    }

    /// Writes until `stream` blocks or all is written; gives back the memory then. Answers how much was written, and the
    /// error that stopped it.
    pub(super) fn flush(&mut self, mut stream: impl Write) -> (usize, io::Result<()>) {
        let start = self.written;
        let result = loop {
            if self.written == self.bytes.len() {
                break Ok(());
            }
            match stream.write(&self.bytes[self.written..]) {
                Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.written += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        let count = self.written - start;
        if self.written == self.bytes.len() {
            *self = Self::default();
        }
        (count, result)
    }
}

#[cfg(test)]
mod tests {
    use super::Backlog;
    use proptest::prelude::*;
    use std::io;

    /// Takes a few bytes, then blocks.
    struct Narrow<'a>(&'a mut Vec<u8>, usize);

    impl io::Write for Narrow<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.1 == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let n = bytes.len().min(self.1);
            self.1 -= n;
            self.0.extend_from_slice(&bytes[..n]);
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in(steps in proptest::collection::vec((0..100usize, 0..100usize), 0..100)) {
            let (mut backlog, mut out, mut sent) = (Backlog::default(), Vec::new(), Vec::new());
            let mut next = 0u8;
            for (push, take) in steps {
                backlog.push(push, |bytes| {
                    for byte in bytes {
                        *byte = next;
                        sent.push(next);
                        next = next.wrapping_add(1);
                    }
                });
                let before = backlog.len();
                let (count, _) = backlog.flush(Narrow(&mut out, take));
                prop_assert_eq!(before - count, backlog.len());
            }
            let rest = backlog.len();
            prop_assert_eq!(out.len() + rest, sent.len());
            prop_assert!(backlog.flush(Narrow(&mut out, rest)).1.is_ok());
            prop_assert!(backlog.is_empty());
            prop_assert_eq!(out, sent);
        }
    }
}
