//! The programs: loaded with this node's constants and maps, and attached to nothing yet.

use std::os::fd::{AsFd, OwnedFd};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    programs::{CgroupSockAddr, ProgramError, SchedClassifier, SkLookup, SockOps},
};

use crate::{
    agents::AgentCgroup,
    cgroup::Cgroup,
    error::{CaptureError, Tried},
    maps::{Maps, PINNED},
    pins::Pins,
};

/// What the programs are told when they are loaded.
pub(crate) struct Constants<'a> {
    pub(crate) agent: AgentCgroup,
    pub(crate) pods: &'a Cgroup,
    /// The cookie of the node's network namespace; 0 where tc programs can't ask for one.
    pub(crate) node_cookie: u64,
    /// 0: off. The verifier then removes the code.
    pub(crate) log_level: u8,
}

/// Loaded programs.
pub(crate) struct Programs {
    pub(crate) connect4: OwnedFd,
    pub(crate) connect6: OwnedFd,
    pub(crate) getpeername4: OwnedFd,
    pub(crate) getpeername6: OwnedFd,
    pub(crate) sendmsg4: OwnedFd,
    pub(crate) sendmsg6: OwnedFd,
    pub(crate) recvmsg4: OwnedFd,
    pub(crate) recvmsg6: OwnedFd,
    pub(crate) sock_ops_pods: OwnedFd,
    pub(crate) sock_ops_agent: OwnedFd,
    pub(crate) steer: OwnedFd,
    pub(crate) proof: OwnedFd,
    pub(crate) guard: OwnedFd,
}

/// Loads the object; its maps are those that are pinned, where some are.
pub(crate) fn load(
    object: &[u8],
    pins: &Pins,
    constants: &Constants<'_>,
) -> Result<(Programs, Maps, Ebpf), CaptureError> {
    let pods_level = constants.pods.level as i32;
    let agent_level = constants.agent.level as i32;
    let mut loader = EbpfLoader::new();
    loader
        .override_global("AGENT_CGROUP", &constants.agent.id, true)
        .override_global("AGENT_LEVEL", &agent_level, true)
        .override_global("PODS_CGROUP", &constants.pods.id, true)
        .override_global("PODS_LEVEL", &pods_level, true)
        .override_global("NODE_COOKIE", &constants.node_cookie, true)
        .override_global("AYA_LOG_LEVEL", &constants.log_level, true)
        // DIALLED, the sockets' storage, is only for the programs.
        .allow_unsupported_maps();
    for name in PINNED {
        loader.map_pin_path(name, pins.maps().join(name));
    }
    // The library wants the object aligned, whatever the caller did.
    let aligned = Aligned::new(object);
    let mut ebpf = loader.load(aligned.bytes()).map_err(object_error)?;
    let programs = Programs {
        connect4: cgroup_sock_addr(&mut ebpf, "connect4")?,
        connect6: cgroup_sock_addr(&mut ebpf, "connect6")?,
        getpeername4: cgroup_sock_addr(&mut ebpf, "getpeername4")?,
        getpeername6: cgroup_sock_addr(&mut ebpf, "getpeername6")?,
        sendmsg4: cgroup_sock_addr(&mut ebpf, "sendmsg4")?,
        sendmsg6: cgroup_sock_addr(&mut ebpf, "sendmsg6")?,
        recvmsg4: cgroup_sock_addr(&mut ebpf, "recvmsg4")?,
        recvmsg6: cgroup_sock_addr(&mut ebpf, "recvmsg6")?,
        sock_ops_pods: sock_ops(&mut ebpf, "sock_ops_pods")?,
        sock_ops_agent: sock_ops(&mut ebpf, "sock_ops_agent")?,
        steer: sk_lookup(&mut ebpf, "steer")?,
        proof: classifier(&mut ebpf, "proof")?,
        guard: classifier(&mut ebpf, "guard")?,
    };
    let maps = Maps::take(&mut ebpf)?;
    Ok((programs, maps, ebpf))
}

macro_rules! program {
    ($function:ident, $type:ty) => {
        fn $function(ebpf: &mut Ebpf, name: &'static str) -> Result<OwnedFd, CaptureError> {
            let refused = |error: ProgramError| CaptureError::Verifier {
                program: name,
                error: Box::new(error),
            };
            let program = ebpf.program_mut(name).ok_or(CaptureError::Missing(name))?;
            let program: &mut $type = program.try_into().map_err(refused)?;
            program.load().map_err(refused)?;
            let fd = program.fd().map_err(refused)?;
            fd.as_fd()
                .try_clone_to_owned()
                .tried(|| "duplicating a program's descriptor".into())
        }
    };
}

program!(cgroup_sock_addr, CgroupSockAddr);
program!(sock_ops, SockOps);
program!(sk_lookup, SkLookup);
program!(classifier, SchedClassifier);

fn object_error(error: EbpfError) -> CaptureError {
    CaptureError::Object(Box::new(error))
}

/// A copy of bytes that begins at a multiple of eight.
struct Aligned {
    words: Vec<u64>,
    length: usize,
}

impl Aligned {
    fn new(bytes: &[u8]) -> Self {
        let words = bytes
            .chunks(8)
            .map(|chunk| {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                u64::from_ne_bytes(word)
            })
            .collect();
        Self {
            words,
            length: bytes.len(),
        }
    }

    #[expect(unsafe_code, reason = "a view of the words as bytes")]
    fn bytes(&self) -> &[u8] {
        // SAFETY: the words are at least `length` bytes long, and any byte is initialised.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.length) }
    }
}
