//! Addresses as the kernel's programs hold them: IPv4 in its v4-mapped form, so that one key fits both families.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// `::ffff:0:0/96`, as the third word of an address lies in memory.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

/// An IP address: four words in network byte order.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Address {
    /// As they lie in memory.
    pub words: [u32; 4],
}

impl Address {
    /// No address.
    pub const NONE: Self = Self { words: [0; 4] };

    /// An IPv4 address, given as it lies in memory.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self {
            words: [0, 0, MAPPED, word],
        }
    }

    /// An IPv6 address, given as it lies in memory.
    #[inline(always)]
    pub const fn v6(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// Any address; an IPv4 address and its v4-mapped form are the same.
    pub const fn from_ip(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Self::v4(u32::from_ne_bytes(ip.octets())),
            IpAddr::V6(ip) => {
                let o = ip.octets();
                Self::v6([
                    u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
                    u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
                    u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
                    u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
                ])
            }
        }
    }

    /// The address as the standard library has it; v4-mapped becomes IPv4.
    pub const fn to_ip(self) -> IpAddr {
        if self.is_v4() {
            let o = self.words[3].to_ne_bytes();
            return IpAddr::V4(Ipv4Addr::new(o[0], o[1], o[2], o[3]));
        }
        let [a, b, c, d] = self.words;
        let bits = ((u32::from_be(a) as u128) << 96)
            | ((u32::from_be(b) as u128) << 64)
            | ((u32::from_be(c) as u128) << 32)
            | u32::from_be(d) as u128;
        IpAddr::V6(Ipv6Addr::from_bits(bits))
    }

    /// Whether it is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// Whether it is no address: all zero, or `0.0.0.0`.
    #[inline(always)]
    pub const fn is_none(&self) -> bool {
        self.words[0] == 0
            && self.words[1] == 0
            && (self.words[2] == 0 || self.words[2] == MAPPED)
            && self.words[3] == 0
    }

    /// Whether it is of `127.0.0.0/8`, or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            u32::from_be(self.words[3]) >> 24 == 127
        } else {
            self.words[0] == 0 && self.words[1] == 0 && self.words[2] == 0 && self.words[3] == 1u32.to_be()
        }
    }

    /// Whether both are the same address.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        self.words[3] == other.words[3]
            && self.words[2] == other.words[2]
            && self.words[1] == other.words[1]
            && self.words[0] == other.words[0]
    }
}

/// One end of a connection.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Endpoint {
    /// The address.
    pub address: Address,
    /// The port, as a number.
    pub port: u16,
    /// Always 0.
    pub reserved: u16,
}

impl Endpoint {
    /// An address and a port.
    #[inline(always)]
    pub const fn new(address: Address, port: u16) -> Self {
        Self {
            address,
            port,
            reserved: 0,
        }
    }

    /// From the standard library's form.
    pub const fn from_socket(address: core::net::SocketAddr) -> Self {
        Self::new(Address::from_ip(address.ip()), address.port())
    }

    /// As the standard library has it; v4-mapped becomes IPv4.
    pub const fn to_socket(self) -> core::net::SocketAddr {
        core::net::SocketAddr::new(self.address.to_ip(), self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_back_as_it_was_written() {
        for text in ["10.1.2.3", "127.0.0.1", "fd00::1:2", "::1"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(Address::from_ip(ip).to_ip(), ip);
            assert_eq!(Address::from_ip(ip).is_loopback(), ip.is_loopback());
        }
        let mapped: IpAddr = "::ffff:10.1.2.3".parse().unwrap();
        assert_eq!(Address::from_ip(mapped), Address::from_ip("10.1.2.3".parse().unwrap()));
    }

    #[test]
    fn no_address_is_recognised_in_both_families() {
        assert!(Address::NONE.is_none());
        assert!(Address::from_ip("0.0.0.0".parse().unwrap()).is_none());
        assert!(!Address::from_ip("::1".parse().unwrap()).is_none());
    }
}
