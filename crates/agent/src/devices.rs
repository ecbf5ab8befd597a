//! Which devices a container may use: an eBPF program of the kind `BPF_PROG_TYPE_CGROUP_DEVICE`.
//!
//! The kernel asks the program at each open and mknod. It gets the type, the access wanted and the device's number,
//! and answers 1 for yes. Rules are applied from the last to the first, and the first that matches decides; where
//! none does the answer is no.

use protocol::oci::{LinuxDeviceCgroup, LinuxDeviceType};

const READ: u32 = 2;
const WRITE: u32 = 4;
const MKNOD: u32 = 1;
const ALL: u32 = READ | WRITE | MKNOD;

const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// A rule in the kernel's terms; nothing means any.
#[derive(Debug, Clone, Copy)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    access: u32,
    major: Option<u32>,
    minor: Option<u32>,
}

impl Rule {
    fn matches_all(&self) -> bool {
        let any = self.kind.is_none() && self.major.is_none() && self.minor.is_none();
        any && self.access == ALL
    }
}

const fn allow(access: u32, major: Option<u32>, minor: Option<u32>) -> Rule {
    Rule { allow: true, kind: Some(CHARACTER), access, major, minor }
}

/// What runc lets every container do: make any node, which by itself opens nothing, and use the harmless devices.
const ALWAYS: [Rule; 11] = [
    allow(MKNOD, None, None),
    Rule { kind: Some(BLOCK), ..allow(MKNOD, None, None) },
    allow(ALL, Some(1), Some(3)),
    allow(ALL, Some(1), Some(5)),
    allow(ALL, Some(1), Some(7)),
    allow(ALL, Some(1), Some(8)),
    allow(ALL, Some(1), Some(9)),
    allow(ALL, Some(5), Some(0)),
    allow(ALL, Some(5), Some(1)),
    allow(ALL, Some(5), Some(2)),
    // The terminals of devpts.
    allow(ALL, Some(136), None),
];

/// The program for the spec's rules, one instruction a word.
pub(crate) fn filter(rules: &[LinuxDeviceCgroup]) -> Vec<u64> {
    let given = rules.iter().filter_map(rule);
    let rules: Vec<Rule> = given.chain(ALWAYS).collect();
    // r2: the type, r3: the access, r4: the major, r5: the minor number; see struct bpf_cgroup_dev_ctx.
    let mut program =
        vec![load(2, 0), and(2, 0xffff), load(3, 0), shift_right(3, 16), load(4, 4), load(5, 8)];
    for rule in rules.iter().rev() {
        program.extend(block(rule));
        // The kernel refuses a program with instructions that are never reached.
        if rule.matches_all() {
            return program;
        }
    }
    program.extend([move_value(0, 0), EXIT]);
    program
}

fn rule(given: &LinuxDeviceCgroup) -> Option<Rule> {
    let kind = match given.typ() {
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
        None | Some(LinuxDeviceType::A) => None,
        // The kernel asks nobody about pipes.
        Some(LinuxDeviceType::P) => return None,
    };
    let access = given.access().as_deref().unwrap_or("rwm").chars().fold(0, |access, letter| {
        access
            | match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => 0,
            }
    });
    // Negative is any, as is nothing.
    let number = |value: Option<i64>| value.and_then(|value| u32::try_from(value).ok());
    let (major, minor) = (number(given.major()), number(given.minor()));
    Some(Rule { allow: given.allow(), kind, access, major, minor })
}

/// The instructions that answer if the rule matches, and else fall through.
fn block(rule: &Rule) -> Vec<u64> {
    // Each test jumps over what is left of the block; how far is known when all is there.
    let mut tests = Vec::new();
    if let Some(kind) = rule.kind {
        tests.push(Test::Differs(2, kind));
    }
    if rule.access != ALL {
        // Matches if nothing is wanted that the rule does not speak of.
        tests.push(Test::Exceeds(3, rule.access));
    }
    tests.extend(rule.major.map(|major| Test::Differs(4, major)));
    tests.extend(rule.minor.map(|minor| Test::Differs(5, minor)));
    let answer = [move_value(0, u32::from(rule.allow)), EXIT];
    let mut instructions: Vec<u64> = Vec::new();
    for test in tests.iter().rev() {
        let rest = i16::try_from(instructions.len() + answer.len()).expect("a block is short");
        let mut before = test.instructions(rest);
        before.append(&mut instructions);
        instructions = before;
    }
    instructions.extend(answer);
    instructions
}

enum Test {
    Differs(u8, u32),
    Exceeds(u8, u32),
}

impl Test {
    /// Jumps over the `rest` of the block if the test holds.
    fn instructions(&self, rest: i16) -> Vec<u64> {
        match *self {
            Self::Differs(register, value) => vec![jump_if_not(register, value, rest)],
            Self::Exceeds(register, access) => {
                vec![move_register(1, register), and(1, !access & ALL), jump_if_not(1, 0, rest)]
            }
        }
    }
}

// eBPF's instruction set: opcode, registers, offset and immediate value in one little-endian word.

pub(crate) const EXIT: u64 = 0x95;

/// One instruction.
pub(crate) fn instruction(opcode: u8, target: u8, source: u8, offset: i16, value: u32) -> u64 {
    let registers = target | source << 4;
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = value.to_le_bytes();
    u64::from_le_bytes([opcode, registers, low, high, a, b, c, d])
}

/// `target = *(u32 *)(r1 + offset)`: only before r1 is used for anything else.
fn load(target: u8, offset: i16) -> u64 {
    instruction(0x61, target, 1, offset, 0)
}

fn and(target: u8, value: u32) -> u64 {
    instruction(0x54, target, 0, 0, value)
}

fn shift_right(target: u8, bits: u32) -> u64 {
    instruction(0x74, target, 0, 0, bits)
}

/// The register, as 32 bits, becomes `value`.
pub(crate) fn move_value(target: u8, value: u32) -> u64 {
    instruction(0xb4, target, 0, 0, value)
}

fn move_register(target: u8, source: u8) -> u64 {
    instruction(0xbc, target, source, 0, 0)
}

/// Jumps over `over` instructions unless the register, as 32 bits, is `value`.
fn jump_if_not(register: u8, value: u32, over: i16) -> u64 {
    instruction(0x56, register, 0, over, value)
}

#[cfg(test)]
mod tests {
    use super::{ALL, BLOCK, CHARACTER, MKNOD, READ, WRITE, filter};
    use protocol::oci::LinuxDeviceCgroup;
    use serde_json::{Value, json};

    /// Runs the few instructions that there are, as the kernel would.
    fn asked(rules: &Value, kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(rules.clone()).unwrap();
        let program = filter(&rules);
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0_u32; 6];
        let mut at = 0;
        loop {
            let [opcode, names, low, high, a, b, c, d] = program[at].to_le_bytes();
            let (target, source) = (usize::from(names & 15), usize::from(names >> 4));
            let offset = usize::try_from(i16::from_le_bytes([low, high])).unwrap();
            let value = u32::from_le_bytes([a, b, c, d]);
            at += 1;
            match opcode {
                0x61 => registers[target] = context[offset / 4],
                0x54 => registers[target] &= value,
                0x74 => registers[target] >>= value,
                0xb4 => registers[target] = value,
                0xbc => registers[target] = registers[source],
                0x56 => at += if registers[target] == value { 0 } else { offset },
                0x95 => return registers[0] == 1,
                _ => panic!("opcode {opcode:#x}"),
            }
        }
    }

    #[test]
    fn nothing_but_the_harmless_devices_is_allowed_by_default() {
        let none = json!([{"allow": false, "access": "rwm"}]);
        assert!(asked(&none, CHARACTER, READ | WRITE, 1, 3));
        assert!(asked(&none, CHARACTER, READ, 136, 7));
        assert!(asked(&none, BLOCK, MKNOD, 8, 0));
        assert!(!asked(&none, BLOCK, READ, 8, 0));
        assert!(!asked(&none, CHARACTER, READ, 1, 1));
        assert!(!asked(&json!([]), BLOCK, READ, 8, 0));
    }

    #[test]
    fn a_rule_allows_what_it_speaks_of_and_no_more() {
        let rules = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": 8, "access": "r"},
        ]);
        assert!(asked(&rules, BLOCK, READ, 8, 5));
        assert!(!asked(&rules, BLOCK, READ | WRITE, 8, 5));
        assert!(!asked(&rules, BLOCK, READ, 9, 5));
        assert!(!asked(&rules, CHARACTER, READ, 8, 5));
    }

    #[test]
    fn the_last_rule_that_matches_decides() {
        let rules = json!([
            {"allow": true, "access": "rwm"},
            {"allow": false, "type": "c", "major": 10, "minor": 200, "access": "rwm"},
        ]);
        assert!(asked(&rules, BLOCK, ALL, 8, 0));
        assert!(!asked(&rules, CHARACTER, READ, 10, 200));
        assert!(asked(&rules, CHARACTER, READ, 10, 201));
    }
}
