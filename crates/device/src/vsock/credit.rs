//! Flow control of a stream, virtio 1.2 section 5.10.6.3: each side tells how much it can hold and how much it has passed
//! on; the other never has more than that under way. All counters wrap.

/// How much the guest may send us ahead of what the host has taken, for each stream. What the host does not take at
/// once waits in our memory, so this is also the most that a stream can make us hold.
pub(super) const WINDOW: u32 = 256 * 1024;

/// What the guest can still take.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    buf_alloc: u32,
    fwd_cnt: u32,
    sent: u32,
}

impl Outgoing {
    /// Takes in what the guest said in a header.
    pub(super) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.buf_alloc = buf_alloc;
        self.fwd_cnt = fwd_cnt;
    }

    /// The bytes that may be sent now. A guest that claims to have taken more than it was sent gets nothing.
    pub(super) fn free(&self) -> u32 {
        self.buf_alloc.saturating_sub(self.sent.wrapping_sub(self.fwd_cnt))
    }

    pub(super) fn send(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }
}

/// What the guest sent and where it is.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    received: u32,
    forwarded: u32,
    told: u32,
}

impl Incoming {
    /// Counts `bytes` more from the guest; `false` where it had no credit for them.
    pub(super) fn admit(&mut self, bytes: u32) -> bool {
        let waiting = self.received.wrapping_sub(self.forwarded);
        if bytes > WINDOW - waiting {
            return false;
        }
        self.received = self.received.wrapping_add(bytes);
        true
    }

    /// Counts `bytes` that have left our memory.
    pub(super) fn forward(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// The `fwd_cnt` of a header.
    pub(super) fn fwd_cnt(&self) -> u32 {
        self.forwarded
    }

    /// Notes that a header went to the guest.
    pub(super) fn tell(&mut self) {
        self.told = self.forwarded;
    }

    /// Whether the guest should hear of the room there is: it thinks that half is taken and it is not so any more.
    pub(super) fn is_due(&self) -> bool {
        self.received.wrapping_sub(self.told) >= WINDOW / 2 && self.forwarded != self.told
    }
}

#[cfg(test)]
mod tests {
    use super::{Incoming, Outgoing, WINDOW};
    use proptest::prelude::*;

    #[test]
    fn counters_wrap() {
        let mut credit = Outgoing { buf_alloc: 10, fwd_cnt: u32::MAX - 1, sent: u32::MAX - 1 };
        credit.send(4);
        assert_eq!(credit.free(), 6);
        credit.update(10, 2);
        assert_eq!(credit.free(), 10);
    }

    #[test]
    fn a_lie_about_what_was_taken_gives_no_credit() {
        let mut credit = Outgoing::default();
        credit.update(1000, 1);
        assert_eq!(credit.free(), 0);
    }

    #[test]
    fn a_guest_beyond_its_credit_is_noticed() {
        let mut credit = Incoming::default();
        assert!(credit.admit(WINDOW));
        assert!(!credit.admit(1));
        credit.forward(1);
        assert!(credit.admit(1));
        assert!(!credit.admit(u32::MAX));
    }

    proptest! {
        #[test]
        fn never_more_than_the_window_waits_and_an_honest_guest_never_starves(
            steps in proptest::collection::vec((0..WINDOW, 0..WINDOW), 1..200),
            start in any::<u32>(),
        ) {
            let mut ours = Incoming { received: start, forwarded: start, told: start };
            let mut guest = Outgoing { buf_alloc: WINDOW, fwd_cnt: start, sent: start };
            let mut waiting = 0;
            for (send, take) in steps {
                let send = send.min(guest.free());
                prop_assert!(ours.admit(send));
                guest.send(send);
                waiting += send;
                let take = take.min(waiting);
                ours.forward(take);
                waiting -= take;
                prop_assert!(waiting <= WINDOW);
                if ours.is_due() {
                    guest.update(WINDOW, ours.fwd_cnt());
                    ours.tell();
                }
                prop_assert!(guest.free() > 0 || waiting > 0);
            }
        }
    }
}
