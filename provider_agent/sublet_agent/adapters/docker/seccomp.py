"""The system calls that a job may make: an allow list, everything else is refused.

Beyond what is merely not listed (mount, bpf, ptrace, keyctl, userfaultfd, perf_event_open, ...):
- `clone` may make threads and processes but no namespaces; `clone3`, whose flags a filter can't
  see, answers "not there", and the C library then uses `clone`.
- io_uring answers "not there" too: it would do reads and writes behind the filter's back.
- `socket` knows Unix, IPv4, IPv6 and netlink, so no AF_VSOCK (it reaches the hypervisor even
  without a network), no AF_PACKET, no AF_ALG.
- 32-bit calls are not in the list at all.
"""

from __future__ import annotations

import json
import platform
from typing import Any

_EPERM = 1
_ENOSYS = 38
_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}; NEWTIME is clone3 only
_SOCKET_FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK
_PERSONALITIES = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)
_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}

_ALLOWED = {
    "files": """
        access chdir chmod chown close close_range copy_file_range creat dup dup2 dup3 faccessat
        faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl
        fdatasync fgetxattr flistxattr flock fremovexattr fsetxattr fstat fstatfs fsync ftruncate
        futimesat getcwd getdents getdents64 getxattr ioctl lchown lgetxattr link linkat listxattr
        llistxattr lremovexattr lseek lsetxattr lstat mkdir mkdirat mknod mknodat newfstatat open
        openat openat2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink
        readlinkat readv removexattr rename renameat renameat2 rmdir sendfile setxattr splice stat
        statfs statx symlink symlinkat sync sync_file_range syncfs tee truncate umask unlink
        unlinkat utime utimensat utimes vmsplice write writev cachestat
        inotify_add_watch inotify_init inotify_init1 inotify_rm_watch
        fanotify_mark io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit""",
    "memory": """
        brk get_mempolicy madvise mbind memfd_create mincore mlock mlock2 mlockall mmap mprotect
        mremap msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_madvise
        remap_file_pages set_mempolicy set_mempolicy_home_node membarrier map_shadow_stack""",
    "processes and threads": """
        arch_prctl capget capset execve execveat exit exit_group fork vfork futex futex_requeue
        futex_wait futex_waitv futex_wake get_robust_list get_thread_area getcpu getegid geteuid
        getgid getgroups getpgid getpgrp getpid getppid getpriority getresgid getresuid getrlimit
        getrusage getsid gettid getuid pidfd_open pidfd_send_signal prctl prlimit64 restart_syscall
        rseq sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
        sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr
        sched_setparam sched_setscheduler sched_yield set_robust_list set_thread_area
        set_tid_address setfsgid setfsuid setgid setgroups setpgid setpriority setregid setresgid
        setresuid setreuid setrlimit setsid setuid landlock_add_rule landlock_create_ruleset
        landlock_restrict_self seccomp sysinfo times uname wait4 waitid ioprio_get ioprio_set""",
    "signals": """
        kill pause rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
        rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sigaltstack signalfd signalfd4 tgkill tkill
        """,
    "waiting and time": """
        alarm clock_getres clock_gettime clock_nanosleep epoll_create epoll_create1 epoll_ctl
        epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 getitimer gettimeofday nanosleep poll
        ppoll pselect6 select setitimer time timer_create timer_delete timer_getoverrun
        timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime getrandom""",
    "talking": """
        accept accept4 bind connect getpeername getsockname getsockopt listen pipe pipe2 recvfrom
        recvmmsg recvmsg sendmmsg sendmsg sendto setsockopt shutdown
        mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink
        msgctl msgget msgrcv msgsnd semctl semget semop semtimedop shmat shmctl shmdt shmget""",
}


def profile() -> dict[str, Any]:
    """Return the profile in Docker's own form, for this machine's architecture."""
    names = sorted({name for group in _ALLOWED.values() for name in group.split()})
    rules: list[dict[str, Any]] = [
        {"names": names, "action": "SCMP_ACT_ALLOW"},
        {
            "names": ["clone"],
            "action": "SCMP_ACT_ALLOW",
            "args": [_argument(0, _NAMESPACE_FLAGS, "SCMP_CMP_MASKED_EQ", 0)],
        },
        {
            "names": ["clone3", "io_uring_setup", "io_uring_enter", "io_uring_register"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": _ENOSYS,
        },
    ]
    for call in ("socket", "socketpair"):
        rules += [_allow_if(call, family) for family in _SOCKET_FAMILIES]
    rules += [_allow_if("personality", persona) for persona in _PERSONALITIES]
    machine = platform.machine()
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": _EPERM,
        "architectures": [_ARCHITECTURES[machine]] if machine in _ARCHITECTURES else [],
        "syscalls": rules,
    }


def profile_json() -> str:
    """Return the profile as the engine takes it in `seccomp=...`."""
    return json.dumps(profile(), separators=(",", ":"), sort_keys=True)


def _allow_if(call: str, value: int) -> dict[str, Any]:
    return {
        "names": [call],
        "action": "SCMP_ACT_ALLOW",
        "args": [_argument(0, value, "SCMP_CMP_EQ", 0)],
    }


def _argument(index: int, value: int, operator: str, second: int) -> dict[str, Any]:
    return {"index": index, "value": value, "valueTwo": second, "op": operator}
