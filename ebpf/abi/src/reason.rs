//! Why a hook dropped, refused or let through what it did: the label of every counter.

macro_rules! reasons {
    ($( $(#[doc = $doc:literal])+ $name:ident = $number:literal, $label:literal; )*) => {
        /// Why a hook decided as it did.
        #[repr(u32)]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Reason { $( $(#[doc = $doc])+ $name = $number, )* }

        impl Reason {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Self] = &[ $( Self::$name, )* ];

            /// Its name in metrics and in the log.
            pub const fn label(self) -> &'static str {
                match self { $( Self::$name => $label, )* }
            }

            /// The reason of this label, which another version of the agent may have said.
            pub fn from_label(label: &str) -> Option<Self> {
                match label { $( $label => Some(Self::$name), )* _ => None }
            }

            /// The reason of this number.
            pub const fn from_number(number: u32) -> Option<Self> {
                match number { $( $number => Some(Self::$name), )* _ => None }
            }
        }
    };
}

reasons! {
    /// connect: sent to the agent.
    Captured = 1, "captured";
    /// connect: refused, because the network namespace is not known (a pod not told of yet, or a nested namespace).
    UnknownNamespace = 2, "unknown_namespace";
    /// connect: refused, because the pod has no address of the destination's family.
    NoAddressOfFamily = 3, "no_address_of_family";
    /// connect: refused, because the kernel had no memory for the original destination.
    NoStorage = 4, "no_storage";
    /// lookup: refused, because the agent does not listen (it is down, or the address is not a pod's).
    NoListener = 5, "no_listener";
    /// lookup: let through to the application, because a process of the host opened it.
    ProbeAdmitted = 6, "probe_admitted";
    /// guard: TCP of a socket that is not the agent's (raw and packet sockets, sockets of another cgroup).
    ForeignSocket = 7, "tcp_foreign_socket";
    /// guard: TCP without a socket (forwarded, from a nested namespace).
    NoSocket = 8, "tcp_no_socket";
    /// guard: TCP of the agent's socket, but changed on its way (NAT or redirection inside the pod).
    Altered = 9, "tcp_altered";
    /// guard: a fragment of TCP.
    Fragment = 10, "tcp_fragment";
    /// guard: too short, or not what it claims to be.
    Malformed = 11, "malformed";
    /// guard: an Ethernet type that is neither IP nor ARP.
    UnknownEtherType = 12, "unknown_ethertype";
    /// guard: a VLAN tag.
    Vlan = 13, "vlan";
    /// guard: a protocol that carries others inside it, TCP perhaps (IPIP, GRE, AH, ESP, ...).
    Encapsulation = 14, "encapsulation";
    /// guard: more IPv6 extension headers than are looked through, or ones that no header may follow.
    ExtensionHeaders = 15, "ipv6_extension_headers";
    /// guard: not TCP, and the pod's setting forbids that.
    NonTcpForbidden = 16, "non_tcp_forbidden";
    /// host side: a packet to the pod that claims to come from the pod itself.
    OwnSource = 17, "spoofed_own_address";
    /// host side: a packet to the pod that claims to belong to a connection of the agent's inside the pod.
    Impersonation = 18, "impersonated_flow";
    /// guard: the interface is not in the map (the agent is half-way through enrolling or releasing).
    UnknownInterface = 19, "unknown_interface";
    /// connect: not captured, because the destination is excluded.
    ExcludedOutbound = 20, "excluded_outbound";
    /// host side: a connection to an excluded port of the pod began; it reaches the application directly.
    ExcludedInbound = 21, "excluded_inbound";
    /// Bytes that excluded connections sent, when they have ended.
    ExcludedSent = 22, "excluded_bytes_sent";
    /// Bytes that they received, likewise.
    ExcludedReceived = 23, "excluded_bytes_received";
    /// DNS: a datagram to a name server was sent to the agent.
    DnsCaptured = 40, "dns_captured";
    /// DNS: it went to the name server itself, because the agent does not listen.
    DnsNoListener = 41, "dns_no_listener";
    /// DNS: it went to the name server itself, because the pod asks more of them than are told apart.
    DnsTooManyServers = 42, "dns_too_many_servers";
}

/// What became of what a hook counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It went where it was to go: to the agent, or as a probe to the application.
    Served,
    /// It went past the agent, as somebody allowed or for want of an agent; or bytes that did.
    PassedBy,
    /// It was dropped or refused.
    Dropped,
}

impl Reason {
    /// What became of what is counted under it.
    pub const fn outcome(self) -> Outcome {
        match self {
            Self::Captured | Self::ProbeAdmitted | Self::DnsCaptured => Outcome::Served,
            Self::ExcludedOutbound
            | Self::ExcludedInbound
            | Self::ExcludedSent
            | Self::ExcludedReceived
            | Self::DnsNoListener
            | Self::DnsTooManyServers => Outcome::PassedBy,
            Self::UnknownNamespace
            | Self::NoAddressOfFamily
            | Self::NoStorage
            | Self::NoListener
            | Self::ForeignSocket
            | Self::NoSocket
            | Self::Altered
            | Self::Fragment
            | Self::Malformed
            | Self::UnknownEtherType
            | Self::Vlan
            | Self::Encapsulation
            | Self::ExtensionHeaders
            | Self::NonTcpForbidden
            | Self::OwnSource
            | Self::Impersonation
            | Self::UnknownInterface => Outcome::Dropped,
        }
    }
}

impl Outcome {
    /// What became of what is counted under a label. One that is not known here is called dropped, so that it is seen.
    pub fn of_label(label: &str) -> Self {
        Reason::from_label(label).map_or(Self::Dropped, Reason::outcome)
    }
}
