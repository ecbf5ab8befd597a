//! As much of the ELF format (elf(5)) as kernels and their modules need: 64 bits, little endian.
//!
//! All reading is bounds-checked: a damaged file gives `None`, never a panic.

use std::ops::Range;

const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const SECTION_HEADER_SIZE: usize = 64;

/// The note by which a kernel says where a hypervisor may enter it directly: `XEN_ELFNOTE_PHYS32_ENTRY`.
const PVH_NOTE: (&[u8], u32) = (b"Xen\0", 18);

/// An ELF file for x86-64.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Elf<'a> {
    bytes: &'a [u8],
}

/// A section of an ELF file.
#[derive(Debug)]
pub(crate) struct Section {
    /// Where its header is in the file.
    pub(crate) header: Range<usize>,
    /// Where its contents are in the file.
    pub(crate) contents: Range<usize>,
}

impl<'a> Elf<'a> {
    /// Looks at the identification and the machine only.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        const X86_64: u16 = 62;
        let ours = bytes.get(..6)? == b"\x7fELF\x02\x01" && u16_at(bytes, 18)? == X86_64;
        ours.then_some(Self { bytes })
    }

    /// Whether the kernel asks for a dynamic linker before it runs this program.
    pub(crate) fn is_dynamic(self) -> Option<bool> {
        Some(self.segments()?.any(|(kind, _)| kind == PT_INTERP))
    }

    /// Whether a hypervisor may enter this kernel by the PVH protocol.
    pub(crate) fn has_pvh_entry(self) -> Option<bool> {
        Some(
            self.segments()?
                .filter(|(kind, _)| *kind == PT_NOTE)
                .filter_map(|(_, range)| self.bytes.get(range))
                .any(|notes| has_note(notes).unwrap_or(false)),
        )
    }

    /// The kinds of all segments, and where each is in the file.
    fn segments(self) -> Option<impl Iterator<Item = (u32, Range<usize>)> + 'a> {
        let bytes = self.bytes;
        let table = usize_at(bytes, 32)?;
        let size = usize::from(u16_at(bytes, 54)?);
        let count = usize::from(u16_at(bytes, 56)?);
        Some((0..count).filter_map(move |index| {
            let header = table.checked_add(index.checked_mul(size)?)?;
            let start = usize_at(bytes, header.checked_add(8)?)?;
            let end = start.checked_add(usize_at(bytes, header.checked_add(32)?)?)?;
            Some((u32_at(bytes, header)?, start..end))
        }))
    }

    /// The section with this name.
    pub(crate) fn section(self, name: &str) -> Option<Section> {
        let table = usize_at(self.bytes, 40)?;
        let count = usize::from(u16_at(self.bytes, 60)?);
        let names = self.section_at(table, usize::from(u16_at(self.bytes, 62)?))?.contents;
        (0..count).filter_map(|index| self.section_at(table, index)).find(|section| {
            let offset = u32_at(self.bytes, section.header.start).unwrap_or(0) as usize;
            let text = names.start.checked_add(offset).and_then(|start| self.bytes.get(start..));
            text.is_some_and(|text| {
                text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
            })
        })
    }

    fn section_at(self, table: usize, index: usize) -> Option<Section> {
        let header = table.checked_add(index.checked_mul(SECTION_HEADER_SIZE)?)?;
        let start = usize_at(self.bytes, header.checked_add(24)?)?;
        let end = start.checked_add(usize_at(self.bytes, header.checked_add(32)?)?)?;
        let end_of_header = header.checked_add(SECTION_HEADER_SIZE)?;
        (end <= self.bytes.len())
            .then_some(Section { header: header..end_of_header, contents: start..end })
    }
}

fn has_note(mut notes: &[u8]) -> Option<bool> {
    loop {
        if notes.is_empty() {
            return Some(false);
        }
        let name_size = u32_at(notes, 0)? as usize;
        let size = u32_at(notes, 4)? as usize;
        let kind = u32_at(notes, 8)?;
        let name = notes.get(12..12_usize.checked_add(name_size)?)?;
        if (name, kind) == PVH_NOTE {
            return Some(true);
        }
        let next = 12_usize
            .checked_add(name_size.checked_next_multiple_of(4)?)?
            .checked_add(size.checked_next_multiple_of(4)?)?;
        notes = notes.get(next..)?;
    }
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_le_bytes(field.try_into().ok()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(field.try_into().ok()?))
}

fn usize_at(bytes: &[u8], at: usize) -> Option<usize> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    usize::try_from(u64::from_le_bytes(field.try_into().ok()?)).ok()
}

#[cfg(test)]
mod tests {
    use super::Elf;

    #[test]
    fn this_test_is_a_dynamic_program_without_a_kernel_entry() {
        let bytes = std::fs::read("/proc/self/exe").unwrap();
        let elf = Elf::parse(&bytes).unwrap();
        assert_eq!(elf.is_dynamic(), Some(true));
        assert_eq!(elf.has_pvh_entry(), Some(false));
        assert!(elf.section(".text").is_some_and(|text| text.contents.len() > 1000));
        assert!(elf.section(".no-such-section").is_none());
    }

    #[test]
    fn a_truncated_file_is_refused_and_does_not_panic() {
        let bytes = std::fs::read("/proc/self/exe").unwrap();
        for length in 0..200 {
            if let Some(elf) = Elf::parse(&bytes[..length]) {
                assert!(elf.section(".text").is_none());
                assert_ne!(elf.has_pvh_entry(), Some(true));
            }
        }
    }
}
