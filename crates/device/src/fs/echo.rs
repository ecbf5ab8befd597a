//! Requests that are to do nothing: by them the agent has the guest's kernel tell its watchers, inotify(7), of what the
//! host has changed.
//!
//! The guest's kernel tells watchers of a file's change when it has asked for one and got the answer. The agent asks to set
//! the time of the last change to [`ECHO_TIME`], and here that becomes the question what the file's attributes
//! are, whose answer has the same form. So nothing changes on the host, and the guest learns what the host has changed.

use virtio_queue::DescriptorChain;
use virtiofsd::descriptor_utils::Reader;
use vm_memory::{Bytes, GuestAddress};

use super::backend::Mapped;
use crate::ECHO_TIME;

/// `enum fuse_opcode` of the kernel's include/uapi/linux/fuse.h.
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;

/// `struct fuse_in_header`, and as much as counts of `struct fuse_setattr_in`.
const HEADER: usize = 40;
const BODY: usize = 64;

/// `FATTR_ATIME` and `FATTR_MTIME`: times that the request names.
const TIMES: u32 = 1 << 4 | 1 << 5;

/// Turns a request to set that time into one for the attributes. Any other stays as it is.
pub(super) fn disarm(memory: &Mapped, chain: &DescriptorChain<&Mapped>) {
    let Some(first) = chain.clone().readable().next() else { return };
    let Some(opcode) = first.addr().0.checked_add(4).map(GuestAddress) else { return };
    if memory.read_obj::<u32>(opcode).ok() != Some(SETATTR) {
        return;
    }
    let mut bytes = [0; HEADER + BODY];
    let Ok(mut request) = Reader::new(memory, chain.clone()) else { return };
    if std::io::Read::read_exact(&mut request, &mut bytes).is_ok() && is_echo(&bytes[HEADER..]) {
        // The guest's own memory, and its own request: what it finds there afterwards is its affair.
        drop(memory.write_obj(GETATTR, opcode));
    }
}

fn is_echo(body: &[u8]) -> bool {
    let number = |at: usize| body.get(at..at + 4).map(|four| [four[0], four[1], four[2], four[3]]);
    let u32_at = |at: usize| number(at).map(u32::from_le_bytes);
    let seconds =
        u32_at(40).zip(u32_at(44)).map(|(low, high)| u64::from(high) << 32 | u64::from(low));
    let (time, nanoseconds) = ECHO_TIME;
    // valid, padding, fh (8), size (8), lock_owner (8), atime (8), mtime (8), ctime (8), atimensec, mtimensec.
    u32_at(0).is_some_and(|valid| valid & TIMES != 0 && valid & !TIMES == 0)
        && seconds == Some(time)
        && u32_at(60) == Some(nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::{BODY, is_echo};
    use crate::ECHO_TIME;

    fn body(valid: u32, seconds: u64, nanoseconds: u32) -> [u8; BODY] {
        let mut body = [0; BODY];
        body[..4].copy_from_slice(&valid.to_le_bytes());
        body[40..48].copy_from_slice(&seconds.to_le_bytes());
        body[60..].copy_from_slice(&nanoseconds.to_le_bytes());
        body
    }

    #[test]
    fn only_the_one_time_alone_is_an_echo() {
        let (seconds, nanoseconds) = ECHO_TIME;
        assert!(is_echo(&body(1 << 5, seconds, nanoseconds)));
        assert!(is_echo(&body(1 << 5 | 1 << 4, seconds, nanoseconds)));
        // With a size (1 << 3), or as now (1 << 8), it is somebody's wish.
        assert!(!is_echo(&body(1 << 5 | 1 << 3, seconds, nanoseconds)));
        assert!(!is_echo(&body(1 << 5 | 1 << 8, seconds, nanoseconds)));
        assert!(!is_echo(&body(1 << 5, seconds - 1, nanoseconds)));
        assert!(!is_echo(&body(1 << 5, seconds, 0)));
    }
}
