//! The streams of a device: found by ports or by token, and those that have something for the guest in turn.

use std::collections::{HashMap, VecDeque};

use super::connection::{Connection, Ports};

/// The most streams at once; what comes beyond is refused. A guest can thereby make us hold this many credit windows.
pub(super) const MOST_STREAMS: usize = 1024;

/// The first port on the host's side for streams that the host opens; the guest sees it as its peer's.
const FIRST_PORT: u32 = 1 << 30;

/// A name for a stream that is never another's later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token {
    slot: u32,
    generation: u32,
}

impl Token {
    pub(super) fn to_u64(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    #[expect(clippy::cast_possible_truncation, reason = "the halves of a u64")]
    pub(super) fn from_u64(token: u64) -> Self {
        Self { slot: token as u32, generation: (token >> 32) as u32 }
    }
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    queued: bool,
    connection: Option<Connection>,
}

/// All streams.
#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_ports: HashMap<Ports, Token>,
    turns: VecDeque<Token>,
    last_port: u32,
}

impl Table {
    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.slots.len() - self.free.len() == MOST_STREAMS
    }

    /// Adds a stream; the table must not be full.
    pub(super) fn insert(&mut self, connection: Connection) -> Token {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).expect("at most MOST_STREAMS")
        });
        let entry = &mut self.slots[index(slot)];
        let token = Token { slot, generation: entry.generation };
        if !connection.is_greeting() {
            self.by_ports.insert(connection.ports(), token);
        }
        entry.connection = Some(connection);
        token
    }

    pub(super) fn get(&mut self, token: Token) -> Option<&mut Connection> {
        let slot = self.slots.get_mut(index(token.slot))?;
        if slot.generation == token.generation { slot.connection.as_mut() } else { None }
    }

    /// The stream that the guest knows by these ports.
    pub(super) fn find(&self, ports: Ports) -> Option<Token> {
        self.by_ports.get(&ports).copied()
    }

    pub(super) fn tokens(&self) -> Vec<Token> {
        let used = self.slots.iter().enumerate().filter(|(_, slot)| slot.connection.is_some());
        used.filter_map(|(at, slot)| {
            Some(Token { slot: u32::try_from(at).ok()?, generation: slot.generation })
        })
        .collect()
    }

    /// Has a client's stream ask the guest for `port`, under a port on our side that no other stream to it has.
    pub(super) fn request(&mut self, token: Token, port: u32) {
        let ports = loop {
            self.last_port = self.last_port.wrapping_add(1) % FIRST_PORT;
            let ports = Ports { host: FIRST_PORT + self.last_port, guest: port };
            if !self.by_ports.contains_key(&ports) {
                break ports;
            }
        };
        if let Some(connection) = self.get(token) {
            connection.request(ports);
            self.by_ports.insert(ports, token);
        }
    }

    /// Takes in that a stream was changed: one that is over is dropped, one that has something for the guest gets a
    /// turn.
    pub(super) fn changed(&mut self, token: Token) {
        let Some(slot) = self.slots.get_mut(index(token.slot)) else { return };
        let Some(connection) = &slot.connection else { return };
        if slot.generation != token.generation {
            return;
        }
        if connection.is_forgotten() && self.by_ports.get(&connection.ports()) == Some(&token) {
            self.by_ports.remove(&connection.ports());
        }
        if connection.is_over() {
            *slot = Slot { generation: slot.generation.wrapping_add(1), ..Slot::default() };
            self.free.push(token.slot);
        } else if connection.wants_turn() && !slot.queued {
            slot.queued = true;
            self.turns.push_back(token);
        }
    }

    /// The next stream that has something for the guest.
    pub(super) fn next_turn(&mut self) -> Option<Token> {
        loop {
            let token = self.turns.pop_front()?;
            let slot = self.slots.get_mut(index(token.slot))?;
            if slot.generation == token.generation {
                slot.queued = false;
                return Some(token);
            }
        }
    }

    /// Gives back a turn that could not be used.
    pub(super) fn return_turn(&mut self, token: Token) {
        if let Some(slot) = self.slots.get_mut(index(token.slot)) {
            slot.queued = true;
            self.turns.push_front(token);
        }
    }
}

fn index(slot: u32) -> usize {
    usize::try_from(slot).expect("at most MOST_STREAMS")
}
