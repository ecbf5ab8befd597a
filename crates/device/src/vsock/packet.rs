//! The header of a virtio-vsock packet: virtio 1.2, section 5.10.6.

/// The length of a header on the wire.
pub(super) const HEADER_SIZE: usize = 44;

/// The host's context id, see vsock(7).
pub(super) const HOST: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only type we speak.
pub(super) const STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the packet will receive no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of the packet will send no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both: the sender of the packet closes.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet says: `VIRTIO_VSOCK_OP_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

impl Operation {
    fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    fn to_wire(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// A header, its operation not yet judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// A header for `operation` with all else zero.
    pub(super) fn of(operation: Operation) -> Self {
        Self { kind: STREAM, op: operation.to_wire(), ..Self::default() }
    }

    /// From the host to the guest with context id `cid`.
    pub(super) fn addressed(self, cid: u64) -> Self {
        Self { src_cid: HOST, dst_cid: cid, ..self }
    }

    /// What the packet says; nothing where the specification has no such operation.
    pub(super) fn operation(&self) -> Option<Operation> {
        Operation::from_wire(self.op)
    }

    pub(super) fn parse(bytes: &[u8; HEADER_SIZE]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            kind: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    pub(super) fn bytes(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_SIZE], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

#[cfg(test)]
mod tests {
    use super::{HEADER_SIZE, Header, Operation};
    use proptest::prelude::*;

    #[test]
    fn the_layout_is_that_of_the_specification() {
        let mut header = Header::of(Operation::Data);
        (header.src_cid, header.dst_cid) = (3, 2);
        (header.src_port, header.dst_port) = (0x0102_0304, 5);
        (header.len, header.flags, header.buf_alloc, header.fwd_cnt) = (6, 7, 8, 9);
        let expected: [u8; HEADER_SIZE] = [
            3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1, 5, 0, 0, 0, 6, 0, 0, 0, 1,
            0, 5, 0, 7, 0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0,
        ];
        assert_eq!(header.bytes(), expected);
    }

    proptest! {
        #[test]
        fn whatever_a_guest_writes_is_read_as_it_is(bytes in proptest::array::uniform32(any::<u8>()), tail in proptest::array::uniform12(any::<u8>())) {
            let mut wire = [0; HEADER_SIZE];
            wire[..32].copy_from_slice(&bytes);
            wire[32..].copy_from_slice(&tail);
            let header = Header::parse(&wire);
            prop_assert_eq!(header.bytes(), wire);
            if let Some(operation) = header.operation() {
                prop_assert_eq!(Header::of(operation).operation(), Some(operation));
            }
        }
    }
}
