//! Opening streams into a guest from any process on the host.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::Port;

/// How to reach a guest's vsock ports. Can be written down and handed to another process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VsockAddress {
    /// A Unix socket that takes a line `CONNECT port` and answers `OK …`: "hybrid vsock", as Firecracker, Cloud Hypervisor
    /// and our `device` role speak it.
    Hybrid(PathBuf),
}

impl VsockAddress {
    /// Opens a stream to `port`, blocking.
    ///
    /// # Errors
    ///
    /// When the machine has gone, or the guest does not listen there.
    pub fn connect_blocking(&self, port: Port) -> io::Result<UnixStream> {
        let Self::Hybrid(path) = self;
        let mut stream = UnixStream::connect(path)?;
        stream.write_all(request(port).as_bytes())?;
        // Byte by byte: what follows the line belongs to the caller.
        let mut line = Vec::new();
        let mut byte = [0];
        while line.len() <= LONGEST_ANSWER && stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
            line.push(byte[0]);
        }
        accepted(&line, path)?;
        Ok(stream)
    }

    /// Opens a stream to `port`.
    ///
    /// # Errors
    ///
    /// When the machine has gone, or the guest does not listen there.
    pub async fn connect(&self, port: Port) -> io::Result<tokio::net::UnixStream> {
        let Self::Hybrid(path) = self;
        let mut stream = tokio::net::UnixStream::connect(path).await?;
        stream.write_all(request(port).as_bytes()).await?;
        let mut line = Vec::new();
        let mut byte = [0];
        while line.len() <= LONGEST_ANSWER && stream.read(&mut byte).await? == 1 && byte[0] != b'\n'
        {
            line.push(byte[0]);
        }
        accepted(&line, path)?;
        Ok(stream)
    }
}

const LONGEST_ANSWER: usize = 32;

fn request(port: Port) -> String {
    format!("CONNECT {}\n", port.0)
}

fn accepted(line: &[u8], path: &Path) -> io::Result<()> {
    if line.starts_with(b"OK ") {
        return Ok(());
    }
    let text = format!("no listener in the guest behind {}", path.display());
    Err(io::Error::new(io::ErrorKind::ConnectionRefused, text))
}
