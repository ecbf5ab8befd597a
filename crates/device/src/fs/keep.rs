//! Letting the guest keep what it has cached of a file for as long as the file is what it was.
//!
//! A FUSE file system says at each open whether the guest's cache of the file still counts. The library's policies say
//! always yes or always no. Always no has a program read anew, and its code translated anew by an emulator, each time
//! that it is executed; always yes lets a guest miss what the host has written. So it is asked here: yes where size and
//! times are those of the last open, and the times are old enough for the next change to show in them.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader,
    ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, FsOptions, OpenOptions, SetattrIn, SetattrValid, SetxattrFlags};
use virtiofsd::passthrough::PassthroughFs;

/// The coarsest clock of a file system's times, those of FAT.
const GRANULE: Duration = Duration::from_secs(2);

/// How many files are remembered; then all are forgotten, which costs the guest a reading of each.
const MOST: usize = 1 << 16;

/// The passed-through directory.
pub(super) struct Kept {
    files: PassthroughFs,
    /// What files were at their last open.
    seen: Mutex<HashMap<u64, Stamp>>,
}

/// Changes when a file does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    size: u64,
    modified: (u64, u32),
    changed: (u64, u32),
}

impl Stamp {
    fn of(attributes: &Attr) -> Self {
        Self {
            size: attributes.size,
            modified: (attributes.mtime, attributes.mtimensec),
            changed: (attributes.ctime, attributes.ctimensec),
        }
    }

    /// Whether a change from now on will change it.
    fn is_settled(&self, now: Duration) -> bool {
        let changed =
            Duration::new(self.changed.0, 0) + Duration::from_nanos(self.changed.1.into());
        changed.checked_add(GRANULE).is_some_and(|settled| settled < now)
    }
}

impl Kept {
    pub(super) fn new(files: PassthroughFs) -> Self {
        Self { files, seen: Mutex::default() }
    }

    /// Whether a file is what it was at its last open; remembers what it is.
    fn is_as_it_was(&self, ctx: Context, inode: u64) -> bool {
        let Ok((attributes, _)) = self.files.getattr(ctx, inode, None) else { return false };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let stamp = Stamp::of(&attributes);
        let mut seen = self.seen();
        if !stamp.is_settled(now) {
            seen.remove(&inode);
            return false;
        }
        if seen.len() >= MOST {
            seen.clear();
        }
        seen.insert(inode, stamp) == Some(stamp)
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<u64, Stamp>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has the directory itself do what is asked.
macro_rules! passed_on {
    ($(fn $name:ident $(<$kind:ident: $bound:path>)? ($($value:ident: $type:ty),*) -> $answer:ty;)*) => {
        $(fn $name $(<$kind: $bound>)? (&self, $($value: $type),*) -> $answer {
            self.files.$name($($value),*)
        })*
    };
}

impl FileSystem for Kept {
    type Inode = <PassthroughFs as FileSystem>::Inode;
    type Handle = <PassthroughFs as FileSystem>::Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    fn open(
        &self,
        ctx: Context,
        inode: Self::Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Self::Handle>, OpenOptions)> {
        // Before it is opened: what changes in between then shows at the next open.
        let keep = self.is_as_it_was(ctx, inode);
        let (handle, mut options) = self.files.open(ctx, inode, kill_priv, flags)?;
        options.set(OpenOptions::KEEP_CACHE, keep);
        Ok((handle, options))
    }

    fn forget(&self, ctx: Context, inode: Self::Inode, count: u64) {
        self.seen().remove(&inode);
        self.files.forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(Self::Inode, u64)>) {
        for (inode, _) in &requests {
            self.seen().remove(inode);
        }
        self.files.batch_forget(ctx, requests);
    }

    fn destroy(&self) {
        self.seen().clear();
        self.files.destroy();
    }

    passed_on! {
        fn init(capable: FsOptions) -> io::Result<FsOptions>;
        fn lookup(ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<Entry>;
        fn getattr(ctx: Context, inode: Self::Inode, handle: Option<Self::Handle>) -> io::Result<(Attr, Duration)>;
        fn setattr(ctx: Context, inode: Self::Inode, attr: SetattrIn, handle: Option<Self::Handle>, valid: SetattrValid) -> io::Result<(Attr, Duration)>;
        fn readlink(ctx: Context, inode: Self::Inode) -> io::Result<Vec<u8>>;
        fn symlink(ctx: Context, target: &CStr, parent: Self::Inode, name: &CStr, extensions: Extensions) -> io::Result<Entry>;
        fn mknod(ctx: Context, parent: Self::Inode, name: &CStr, mode: u32, rdev: u32, umask: u32, extensions: Extensions) -> io::Result<Entry>;
        fn mkdir(ctx: Context, parent: Self::Inode, name: &CStr, mode: u32, umask: u32, extensions: Extensions) -> io::Result<Entry>;
        fn unlink(ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<()>;
        fn rmdir(ctx: Context, parent: Self::Inode, name: &CStr) -> io::Result<()>;
        fn rename(ctx: Context, from: Self::Inode, old: &CStr, to: Self::Inode, new: &CStr, flags: u32) -> io::Result<()>;
        fn link(ctx: Context, inode: Self::Inode, parent: Self::Inode, name: &CStr) -> io::Result<Entry>;
        fn create(ctx: Context, parent: Self::Inode, name: &CStr, mode: u32, kill_priv: bool, flags: u32, umask: u32, extensions: Extensions) -> io::Result<(Entry, Option<Self::Handle>, OpenOptions)>;
        fn read<W: ZeroCopyWriter>(ctx: Context, inode: Self::Inode, handle: Self::Handle, to: W, size: u32, offset: u64, owner: Option<u64>, flags: u32) -> io::Result<usize>;
        fn write<R: ZeroCopyReader>(ctx: Context, inode: Self::Inode, handle: Self::Handle, from: R, size: u32, offset: u64, owner: Option<u64>, delayed: bool, kill_priv: bool, flags: u32) -> io::Result<usize>;
        fn flush(ctx: Context, inode: Self::Inode, handle: Self::Handle, owner: u64) -> io::Result<()>;
        fn fsync(ctx: Context, inode: Self::Inode, data_only: bool, handle: Self::Handle) -> io::Result<()>;
        fn fallocate(ctx: Context, inode: Self::Inode, handle: Self::Handle, mode: u32, offset: u64, length: u64) -> io::Result<()>;
        fn release(ctx: Context, inode: Self::Inode, flags: u32, handle: Self::Handle, flush: bool, flock: bool, owner: Option<u64>) -> io::Result<()>;
        fn statfs(ctx: Context, inode: Self::Inode) -> io::Result<libc::statvfs64>;
        fn setxattr(ctx: Context, inode: Self::Inode, name: &CStr, value: &[u8], flags: u32, extra: SetxattrFlags) -> io::Result<()>;
        fn getxattr(ctx: Context, inode: Self::Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(ctx: Context, inode: Self::Inode, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(ctx: Context, inode: Self::Inode, name: &CStr) -> io::Result<()>;
        fn opendir(ctx: Context, inode: Self::Inode, flags: u32) -> io::Result<(Option<Self::Handle>, OpenOptions)>;
        fn readdir(ctx: Context, inode: Self::Inode, handle: Self::Handle, size: u32, offset: u64) -> io::Result<Self::DirIter>;
        fn fsyncdir(ctx: Context, inode: Self::Inode, data_only: bool, handle: Self::Handle) -> io::Result<()>;
        fn releasedir(ctx: Context, inode: Self::Inode, flags: u32, handle: Self::Handle) -> io::Result<()>;
        fn access(ctx: Context, inode: Self::Inode, mask: u32) -> io::Result<()>;
        fn lseek(ctx: Context, inode: Self::Inode, handle: Self::Handle, offset: u64, whence: u32) -> io::Result<u64>;
        fn copyfilerange(ctx: Context, from: Self::Inode, from_handle: Self::Handle, from_offset: u64, to: Self::Inode, to_handle: Self::Handle, to_offset: u64, length: u64, flags: u64) -> io::Result<usize>;
        fn syncfs(ctx: Context, inode: Self::Inode) -> io::Result<()>;
    }
}

#[cfg(test)]
mod tests {
    use super::Stamp;
    use std::time::Duration;

    #[test]
    fn times_that_the_next_change_could_leave_alone_prove_nothing() {
        let stamp = Stamp { size: 1, modified: (90, 0), changed: (100, 500_000_000) };
        assert!(!stamp.is_settled(Duration::from_secs(100)));
        assert!(!stamp.is_settled(Duration::from_millis(102_400)));
        assert!(stamp.is_settled(Duration::from_millis(102_501)));
        assert!(!Stamp { changed: (u64::MAX, 0), ..stamp }.is_settled(Duration::from_secs(1)));
    }
}
