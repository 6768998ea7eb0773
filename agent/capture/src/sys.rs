//! The system calls that no library of ours has: bpf(2) for links, and a few socket options.
//!
//! aya can pin links, but not update those of cgroups and of `sk_lookup`; here all three kinds are treated alike.
#![expect(unsafe_code, reason = "raw system calls; each says why it is sound")]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;

const BPF_F_BEFORE: u32 = 1 << 3;

const BPF_LINK_TYPE_CGROUP: u32 = 3;
const BPF_LINK_TYPE_NETNS: u32 = 5;
const BPF_LINK_TYPE_TCX: u32 = 11;

/// Where a program is attached (`enum bpf_attach_type`).
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum AttachType {
    SockOps = 3,
    Connect4 = 10,
    Connect6 = 11,
    SendMsg4 = 14,
    SendMsg6 = 15,
    RecvMsg4 = 19,
    RecvMsg6 = 20,
    GetPeerName4 = 29,
    GetPeerName6 = 30,
    SkLookup = 36,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// What a program is attached to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target<'a> {
    /// A cgroup, or a network namespace.
    File(BorrowedFd<'a>),
    /// A network interface, by its index here; in front of what is there.
    Interface(u32),
}

/// What a link is still attached to; 0 where that is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Attached {
    Cgroup(u64),
    Netns(u32),
    Interface(u32),
    Other(u32),
}

impl Attached {
    pub(crate) fn is_gone(self) -> bool {
        matches!(self, Self::Cgroup(0) | Self::Netns(0) | Self::Interface(0))
    }
}

/// `union bpf_attr`, as bytes: larger than the kernel's, which accepts that as long as the rest is zero.
#[repr(C, align(8))]
struct Attr([u8; 128]);

impl Attr {
    fn new() -> Self {
        Self([0; 128])
    }

    fn u32(mut self, offset: usize, value: u32) -> Self {
        self.0[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, offset: usize, value: u64) -> Self {
        self.0[offset..offset + 8].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn fd(self, offset: usize, fd: BorrowedFd<'_>) -> Self {
        self.u32(offset, fd.as_raw_fd() as u32)
    }

    /// # Safety
    /// Pointers in the attribute must be valid for what the command does with them.
    unsafe fn call(mut self, command: libc::c_int) -> io::Result<libc::c_int> {
        // SAFETY: the attribute is initialised and as long as said; the rest is the caller's promise.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_mut_ptr(), self.0.len()) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(result as libc::c_int)
        }
    }

    /// # Safety
    /// As `call`, and the command must return a new file descriptor.
    unsafe fn open(self, command: libc::c_int) -> io::Result<OwnedFd> {
        // SAFETY: the caller's promise; the descriptor is new and ours.
        unsafe { self.call(command).map(|fd| OwnedFd::from_raw_fd(fd)) }
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Opens what is pinned there; `None` if nothing is.
pub(crate) fn pinned(path: &Path) -> io::Result<Option<OwnedFd>> {
    let path = c_path(path)?;
    // SAFETY: the path lives until the call is over.
    match unsafe { Attr::new().u64(0, path.as_ptr() as u64).open(BPF_OBJ_GET) } {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

pub(crate) fn pin(object: impl AsFd, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: the path lives until the call is over.
    unsafe {
        Attr::new()
            .u64(0, path.as_ptr() as u64)
            .fd(8, object.as_fd())
            .call(BPF_OBJ_PIN)
            .map(drop)
    }
}

pub(crate) fn link_create(program: impl AsFd, target: Target<'_>, kind: AttachType) -> io::Result<OwnedFd> {
    let attr = Attr::new().fd(0, program.as_fd()).u32(8, kind as u32);
    let attr = match target {
        Target::File(fd) => attr.fd(4, fd),
        Target::Interface(index) => attr.u32(4, index).u32(12, BPF_F_BEFORE),
    };
    // SAFETY: no pointers.
    unsafe { attr.open(BPF_LINK_CREATE) }
}

/// Replaces the link's program atomically.
pub(crate) fn link_update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let attr = Attr::new().fd(0, link.as_fd()).fd(4, program.as_fd());
    // SAFETY: no pointers.
    unsafe { attr.call(BPF_LINK_UPDATE).map(drop) }
}

/// Detaches at once, whoever else holds the link.
pub(crate) fn link_detach(link: impl AsFd) -> io::Result<()> {
    // SAFETY: no pointers.
    unsafe { Attr::new().fd(0, link.as_fd()).call(BPF_LINK_DETACH).map(drop) }
}

pub(crate) fn link_attached(link: impl AsFd) -> io::Result<Attached> {
    let mut info = Attr::new();
    let attr = Attr::new()
        .fd(0, link.as_fd())
        .u32(4, info.0.len() as u32)
        .u64(8, info.0.as_mut_ptr() as u64);
    // SAFETY: the kernel writes at most the length given, and `info` lives until the call is over.
    unsafe { attr.call(BPF_OBJ_GET_INFO_BY_FD)? };
    let u32_at = |offset: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&info.0[offset..offset + 4]);
        u32::from_ne_bytes(bytes)
    };
    // struct bpf_link_info: type, id, prog_id, padding, then what the type has.
    Ok(match u32_at(0) {
        BPF_LINK_TYPE_CGROUP => Attached::Cgroup(u64::from(u32_at(16)) | u64::from(u32_at(20)) << 32),
        BPF_LINK_TYPE_NETNS => Attached::Netns(u32_at(16)),
        BPF_LINK_TYPE_TCX => Attached::Interface(u32_at(16)),
        other => Attached::Other(other),
    })
}

/// Takes an entry out of a map.
pub(crate) fn map_take<K: aya::Pod, V: aya::Pod>(map: impl AsFd, key: &K) -> io::Result<Option<V>> {
    map_read(BPF_MAP_LOOKUP_AND_DELETE_ELEM, map, key)
}

/// Reads an entry of a map.
pub(crate) fn map_get<K: aya::Pod, V: aya::Pod>(map: impl AsFd, key: &K) -> io::Result<Option<V>> {
    map_read(BPF_MAP_LOOKUP_ELEM, map, key)
}

fn map_read<K: aya::Pod, V: aya::Pod>(command: libc::c_int, map: impl AsFd, key: &K) -> io::Result<Option<V>> {
    let mut value = std::mem::MaybeUninit::<V>::uninit();
    let attr = Attr::new()
        .fd(0, map.as_fd())
        .u64(8, std::ptr::from_ref(key) as u64)
        .u64(16, value.as_mut_ptr() as u64);
    // SAFETY: key and value are of the map's sizes (both are types of `abi`), and live until the call is over.
    match unsafe { attr.call(command) } {
        // SAFETY: the kernel has written the whole value; any bytes are a valid `Pod`.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The cookie of the socket's network namespace.
pub(crate) fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: value and length are ours and of the right sizes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Binding to port 0 leaves the choice of the port to connect, which knows the destination.
pub(crate) fn set_bind_address_no_port(socket: impl AsFd) -> io::Result<()> {
    const IP_BIND_ADDRESS_NO_PORT: libc::c_int = 24;
    let on: libc::c_int = 1;
    // SAFETY: the value is ours and of the length given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_IP,
            IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether the kernel has tcx: asks what is attached to the loopback device, which is always there.
pub(crate) fn tcx_query() -> io::Result<bool> {
    const BPF_PROG_QUERY: libc::c_int = 16;
    let attr = Attr::new().u32(0, 1).u32(4, AttachType::TcxIngress as u32);
    // SAFETY: no pointers: a count of 0 asks for the count alone.
    match unsafe { attr.call(BPF_PROG_QUERY) } {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// How a thread gets processors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scheduling {
    /// Before all that is not: `SCHED_RR`, the lowest priority.
    Urgent,
    /// As others, with the nice value that it has; in slices of so many nanoseconds.
    Usual { slice: u64 },
}

/// Schedules this thread so; what it starts is usual.
pub(crate) fn schedule(how: Scheduling) -> io::Result<()> {
    // SAFETY: an argument by value. It can't fail for the caller itself.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let (policy, priority, slice) = match how {
        Scheduling::Urgent => (libc::SCHED_RR, 1, 0),
        Scheduling::Usual { slice } => (libc::SCHED_OTHER, 0, slice),
    };
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: policy.cast_unsigned(),
        sched_flags: libc::SCHED_FLAG_RESET_ON_FORK as u64,
        sched_nice: nice,
        sched_priority: priority,
        sched_runtime: slice,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the attributes are ours, of the size that they say; 0 is this thread.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives back what loading the programs needed for a moment: several MiB, for the kernel's types among others.
pub(crate) fn return_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: may be called at any time, by any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
