//! A guest's memory: a memfd, made by us so that it can be filled and copied without the hypervisor's help.

use std::fs::File;
use std::io::{self, Seek};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek, sendfile};

/// The smallest piece that is kept or left out.
const PAGE: usize = 4096;

const MIB: u64 = 1 << 20;

/// Memory that is all zeros and takes no room yet.
pub(crate) fn create(mib: u32) -> io::Result<File> {
    let memory = File::from(memfd_create("guest-memory", MemfdFlags::CLOEXEC)?);
    memory.set_len(u64::from(mib) * MIB)?;
    Ok(memory)
}

/// Copies what `from` holds into `to`, of the same size and all zeros; leaves holes where `from` has holes.
pub(crate) fn fill(from: &File, to: &File) -> io::Result<()> {
    for_each_extent(from, |start, end| {
        let mut offset = start;
        (&*to).seek(io::SeekFrom::Start(start))?;
        while offset < end {
            let count = usize::try_from(end - offset).unwrap_or(usize::MAX);
            if sendfile(to, from, Some(&mut offset), count)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    })
}

/// Copies what `from` holds into the empty file `to`, but no page of zeros.
pub(crate) fn save(from: &File, to: &File) -> io::Result<()> {
    to.set_len(from.metadata()?.len())?;
    let mut buffer = vec![0; 512 * PAGE];
    for_each_extent(from, |start, end| {
        let mut offset = start;
        while offset < end {
            let count = usize::try_from(end - offset).unwrap_or(usize::MAX).min(buffer.len());
            from.read_exact_at(&mut buffer[..count], offset)?;
            for (number, page) in (0_u64..).zip(buffer[..count].chunks(PAGE)) {
                if page.iter().any(|&byte| byte != 0) {
                    to.write_all_at(page, offset + number * PAGE as u64)?;
                }
            }
            offset += count as u64;
        }
        Ok(())
    })
}

/// Calls `act` with the start and the end of each part of `file` that is not a hole.
fn for_each_extent(file: &File, mut act: impl FnMut(u64, u64) -> io::Result<()>) -> io::Result<()> {
    let mut end = 0;
    loop {
        let start = match seek(file, SeekFrom::Data(end)) {
            Ok(start) => start,
            // Nothing but a hole from here on.
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        end = seek(file, SeekFrom::Hole(start))?;
        act(start, end)?;
    }
}

#[cfg(test)]
mod tests {
    use super::{PAGE, create, fill, save};
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn a_copy_of_a_copy_is_the_same_and_no_larger_than_what_is_in_it() {
        let memory = create(16).unwrap();
        memory.write_all_at(&[7; 3 * PAGE], 5 << 20).unwrap();
        memory.write_all_at(&vec![0; 8 * PAGE], 9 << 20).unwrap();
        memory.write_all_at(b"end", (16 << 20) - 3).unwrap();
        assert_eq!(memory.metadata().unwrap().blocks() * 512, 12 * PAGE as u64);

        let saved = tempfile::tempfile().unwrap();
        save(&memory, &saved).unwrap();
        let again = create(16).unwrap();
        fill(&saved, &again).unwrap();

        let size = again.metadata().unwrap();
        assert_eq!(size.len(), 16 << 20);
        assert_eq!(size.blocks() * 512, 4 * PAGE as u64);
        let (mut before, mut after) = (vec![0; 16 << 20], vec![0; 16 << 20]);
        memory.read_exact_at(&mut before, 0).unwrap();
        again.read_exact_at(&mut after, 0).unwrap();
        assert!(before == after);
    }
}
