//! The kernel, in the form that a hypervisor boots fastest.
//!
//! Distributions ship a bzImage: a small program that decompresses the real kernel. Under emulation that program is
//! slow (0.4 s of a 2 s boot were measured), and it is needless, since QEMU enters an ELF kernel directly where that
//! has a PVH note. So the payload is taken out here, once.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::elf::{Elf, u16_at, u32_at};
use crate::error::host;
use crate::{Error, tool};

/// What a kernel file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelFormat {
    /// An ELF file that is entered by the PVH protocol.
    Pvh,
    /// A self-decompressing image, entered by the Linux/x86 boot protocol.
    BzImage,
}

/// A kernel that can be booted.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) format: KernelFormat,
    /// What `uname -r` will say.
    pub(crate) release: String,
    pub(crate) bytes: Vec<u8>,
}

impl Kernel {
    /// Reads a bzImage or an ELF kernel, and takes a bzImage's payload out where that can be booted.
    pub(crate) fn read(path: &Path) -> Result<Self, Error> {
        let bytes = fs::read(path).map_err(host("read", path))?;
        let bad = |reason: &str| Error::Kernel { path: path.to_owned(), reason: reason.to_owned() };
        if let Some(elf) = Elf::parse(&bytes) {
            if elf.has_pvh_entry() != Some(true) {
                return Err(bad(
                    "it is an ELF file without a PVH entry (build it with CONFIG_PVH=y)",
                ));
            }
            let release = banner(&bytes).ok_or_else(|| bad("it has no version"))?;
            return Ok(Self { format: KernelFormat::Pvh, release, bytes });
        }
        let image = BzImage::parse(&bytes)
            .ok_or_else(|| bad("it is neither a bzImage nor an ELF file for x86-64"))?;
        let release = image.release.ok_or_else(|| bad("it has no version"))?.to_owned();
        let payload = image.payload.ok_or_else(|| bad("it is cut short"))?;
        let unpacked = decompress(payload, path)?;
        let can_be_entered = Elf::parse(&unpacked).and_then(Elf::has_pvh_entry) == Some(true);
        Ok(if can_be_entered {
            let bytes = unpacked.into_owned();
            Self { format: KernelFormat::Pvh, release, bytes }
        } else {
            Self { format: KernelFormat::BzImage, release, bytes }
        })
    }
}

/// The parts of a bzImage (the kernel's Documentation/arch/x86/boot.rst).
struct BzImage<'a> {
    release: Option<&'a str>,
    payload: Option<&'a [u8]>,
}

impl<'a> BzImage<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        // Since protocol 2.08, Linux 2.6.26, the header tells where the payload is.
        let ours = u16_at(bytes, 0x1fe)? == 0xaa55
            && bytes.get(0x202..0x206)? == b"HdrS"
            && u16_at(bytes, 0x206)? >= 0x208;
        if !ours {
            return None;
        }
        let setup_sectors = match bytes.get(0x1f1)? {
            0 => 4,
            &sectors => usize::from(sectors),
        };
        let start = (setup_sectors + 1) * 512 + u32_at(bytes, 0x248)? as usize;
        let payload = bytes.get(start..start.checked_add(u32_at(bytes, 0x24c)? as usize)?);
        let version = bytes.get(usize::from(u16_at(bytes, 0x20e)?) + 0x200..);
        Some(Self { release: version.and_then(first_word), payload })
    }
}

/// The release in the banner that every kernel has: "Linux version 6.1.0-…".
fn banner(bytes: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    // The first hit may be the format that the banner is made by; a release starts with a digit.
    bytes
        .windows(BANNER.len())
        .enumerate()
        .filter(|(_, window)| *window == BANNER)
        .filter_map(|(at, _)| first_word(&bytes[at + BANNER.len()..]))
        .find(|word| word.starts_with(|first: char| first.is_ascii_digit()))
        .map(str::to_owned)
}

fn first_word(bytes: &[u8]) -> Option<&str> {
    let head = &bytes[..bytes.len().min(200)];
    let end = head.iter().position(|byte| matches!(byte, b' ' | 0 | b'\n'))?;
    std::str::from_utf8(&head[..end]).ok().filter(|word| !word.is_empty())
}

fn decompress<'a>(payload: &'a [u8], path: &Path) -> Result<Cow<'a, [u8]>, Error> {
    if payload.starts_with(&LZ4_LEGACY) {
        return unpack_lz4(payload).map(Cow::Owned).ok_or_else(|| Error::Kernel {
            path: path.to_owned(),
            reason: "its LZ4 payload is damaged".to_owned(),
        });
    }
    if Elf::parse(payload).is_some() {
        return Ok(Cow::Borrowed(payload));
    }
    let Some((tool, args)) = tool::compression(payload) else {
        // LZO, or something newer: the image can still decompress itself.
        return Ok(Cow::Borrowed(payload));
    };
    // All but gzip have the size appended, which their tools would take for garbage.
    let packed =
        if tool.program == "gzip" { payload } else { &payload[..payload.len().saturating_sub(4)] };
    tool.run(args, packed, &format!("decompress {}", path.display())).map(Cow::Owned)
}

const LZ4_LEGACY: [u8; 4] = 0x184c_2102_u32.to_le_bytes();

/// Unpacks the legacy LZ4 frames of a kernel: blocks of at most 8 MiB, each behind its size, and at the end the whole
/// size (<https://github.com/lz4/lz4/blob/v1.9.4/doc/lz4_Frame_format.md#legacy-frame>).
fn unpack_lz4(payload: &[u8]) -> Option<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let (mut rest, size) = payload.get(4..)?.split_last_chunk::<4>()?;
    let size = u32::from_le_bytes(*size) as usize;
    let mut unpacked = Vec::new();
    while unpacked.len() < size {
        let (length, tail) = rest.split_first_chunk::<4>()?;
        let (block, tail) = tail.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        unpacked.append(&mut lz4_flex::block::decompress(block, BLOCK).ok()?);
        rest = tail;
    }
    (unpacked.len() == size).then_some(unpacked)
}

#[cfg(test)]
mod tests {
    use super::{Kernel, KernelFormat};
    use std::fs;

    /// A bzImage whose payload is `payload`, as far as a reader of headers can tell.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        bytes[0x1f1] = 1;
        bytes[0x1fe..0x200].copy_from_slice(&0xaa55_u16.to_le_bytes());
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        bytes[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        let version = b"6.1.0-test (somebody) #1";
        bytes[0x300..0x300 + version.len()].copy_from_slice(version);
        bytes[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    /// An ELF file for x86-64 with one note.
    fn elf(kind: u32) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        bytes[32] = 64; // program headers
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64] = 4; // PT_NOTE
        bytes[72] = 64 + 56;
        bytes[96] = 24;
        for word in [4, 8, kind] {
            bytes.extend_from_slice(&u32::to_le_bytes(word));
        }
        bytes.extend_from_slice(b"Xen\0\0\0\0\0\0\0\0\0");
        bytes.extend_from_slice(b"Linux version %s\0Linux version 6.1.0-test (x)\0");
        bytes
    }

    fn lz4(bytes: &[u8]) -> Vec<u8> {
        let block = lz4_flex::block::compress(bytes);
        let size = |length: usize| u32::try_from(length).unwrap().to_le_bytes();
        [&super::LZ4_LEGACY[..], &size(block.len()), &block, &size(bytes.len())].concat()
    }

    fn read(bytes: &[u8]) -> Result<Kernel, crate::Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinuz");
        fs::write(&path, bytes).unwrap();
        Kernel::read(&path)
    }

    #[test]
    fn a_payload_with_a_pvh_note_is_taken_out() {
        let kernel = read(&bzimage(&lz4(&elf(18)))).unwrap();
        assert_eq!(kernel.format, KernelFormat::Pvh);
        assert_eq!(kernel.release, "6.1.0-test");
        assert_eq!(kernel.bytes, elf(18));
    }

    #[test]
    fn a_kernel_that_cannot_be_entered_directly_stays_a_bzimage() {
        let image = bzimage(&lz4(&elf(17)));
        let kernel = read(&image).unwrap();
        assert_eq!(kernel.format, KernelFormat::BzImage);
        assert_eq!(kernel.bytes, image);
    }

    #[test]
    fn an_elf_kernel_is_taken_as_it_is() {
        let kernel = read(&elf(18)).unwrap();
        assert_eq!((kernel.format, &*kernel.release), (KernelFormat::Pvh, "6.1.0-test"));
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_a_reason() {
        for (bytes, reason) in [
            (b"hello".to_vec(), "neither a bzImage nor an ELF file"),
            (elf(17), "without a PVH entry"),
            (bzimage(&lz4(&elf(18)))[..1030].to_vec(), "cut short"),
            (bzimage(&[&super::LZ4_LEGACY[..], b"garbage garbage"].concat()), "damaged"),
        ] {
            let error = read(&bytes).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
