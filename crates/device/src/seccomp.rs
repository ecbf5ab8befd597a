//! The system calls that a device process may make. Any other ends it, with a line in the kernel's log.

use std::collections::BTreeMap;
use std::env::consts::ARCH;

use libc::{
    AF_UNIX, CLONE_THREAD, FIONBIO, PR_CAP_AMBIENT, PR_CAPBSET_READ, PR_SET_NAME, PROT_EXEC, c_long,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::Error;

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

/// `PR_SET_VMA`: newer allocators name their memory.
const PR_SET_VMA: i32 = 0x5356_4d41;

/// Answered as a kernel answers that does not have them; the C library then does without. A filter cannot look into
/// clone3's arguments, and newer C libraries try fchmodat2 first.
const ABSENT: &[c_long] = &[libc::SYS_clone3, libc::SYS_fchmodat2];

/// What any program of several threads needs.
const PROCESS: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
];

/// Descriptors, sockets, events.
const STREAMS: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_epoll_create1,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_getsockopt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Files, and acting as the user that the guest names.
const FILES: &[c_long] = &[
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_copy_file_range,
    libc::SYS_faccessat,
    libc::SYS_fallocate,
    libc::SYS_fchdir,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_flock,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_newfstatat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setxattr,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_sync_file_range,
    libc::SYS_syncfs,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];

/// Limits the calling thread, and all that it starts, to the calls above, for good.
pub(crate) fn limit(with_files: bool) -> Result<(), Error> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| Error::Seccomp { source };
    for program in programs(with_files).map_err(|error| failed(error.into()))? {
        seccompiler::apply_filter(&program).map_err(|error| failed(error.into()))?;
    }
    Ok(())
}

fn programs(with_files: bool) -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    let arch: TargetArch = ARCH.try_into()?;
    let unconditional = |calls: &[c_long]| calls.iter().map(|&call| (call, Vec::new())).collect();
    let absent = SeccompFilter::new(
        unconditional(ABSENT),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        arch,
    )?;
    let mut rules: Rules = limited()?;
    let files = if with_files { FILES } else { &[] };
    // Those that are absent, too: of two filters' answers the strictest holds, and death is stricter.
    rules.append(&mut unconditional(&[PROCESS, STREAMS, files, ABSENT].concat()));
    let allowed =
        SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, arch)?;
    // The one that forbids most comes last: it forbids filters, too.
    Ok([absent.try_into()?, allowed.try_into()?])
}

/// Calls that are allowed with certain arguments only.
fn limited() -> Result<Rules, seccompiler::BackendError> {
    let bits = |flags: i32| u64::from(flags.cast_unsigned());
    // Memory is never made executable.
    let no_exec = || only(2, SeccompCmpOp::MaskedEq(bits(PROT_EXEC)), 0);
    Ok(BTreeMap::from([
        (libc::SYS_clone, vec![only(0, SeccompCmpOp::MaskedEq(bits(CLONE_THREAD)), CLONE_THREAD)?]),
        (libc::SYS_ioctl, vec![only_bits(1, SeccompCmpOp::Eq, FIONBIO)?]),
        (libc::SYS_mmap, vec![no_exec()?]),
        (libc::SYS_mprotect, vec![no_exec()?]),
        (
            libc::SYS_prctl,
            vec![
                only(0, SeccompCmpOp::Eq, PR_SET_NAME)?,
                only(0, SeccompCmpOp::Eq, PR_SET_VMA)?,
                // libcap-ng looks at all sets before it changes one.
                only(0, SeccompCmpOp::Eq, PR_CAPBSET_READ)?,
                only(0, SeccompCmpOp::Eq, PR_CAP_AMBIENT)?,
            ],
        ),
        (libc::SYS_socketpair, vec![only(0, SeccompCmpOp::Eq, AF_UNIX)?]),
    ]))
}

fn only(
    index: u8,
    test: SeccompCmpOp,
    value: i32,
) -> Result<SeccompRule, seccompiler::BackendError> {
    only_bits(index, test, u64::from(value.cast_unsigned()))
}

fn only_bits(
    index: u8,
    test: SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(index, SeccompCmpArgLen::Dword, test, value)?])
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_filter_is_one_that_the_kernel_can_take() {
        for with_files in [false, true] {
            for program in super::programs(with_files).unwrap() {
                assert!(program.len() < 4096, "BPF_MAXINSNS");
            }
        }
    }
}
