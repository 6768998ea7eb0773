//! Ports that answer on both versions of IP.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
};

use socket2::{Domain, Socket, Type};

/// The longest queue that the kernel allows is `net.core.somaxconn`; this is more.
const BACKLOG: i32 = 4096;

/// Opens a nonblocking listener. At `[::]` it takes IPv4, too, whatever `net.ipv6.bindv6only` says; where the kernel has no
/// IPv6, it takes IPv4 alone.
///
/// # Errors
/// The port is taken, or the address is none of this machine's.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    match open(address) {
        Err(error) if address.ip().is_unspecified() && has_no_version_six(&error) => {
            open((Ipv4Addr::UNSPECIFIED, address.port()).into())
        }
        opened => opened,
    }
}

/// Whether a listener at one address takes what one at the other would: they are the same, or any of this machine.
pub fn is_same_place(one: SocketAddr, other: SocketAddr) -> bool {
    let both_any = one.ip().is_unspecified() && other.ip().is_unspecified();
    one == other || (both_any && one.port() == other.port())
}

fn open(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// The family is not compiled in or turned off (EAFNOSUPPORT), or no address of it may be bound (EADDRNOTAVAIL).
fn has_no_version_six(error: &io::Error) -> bool {
    const EAFNOSUPPORT: i32 = 97;
    error.raw_os_error() == Some(EAFNOSUPPORT) || error.kind() == io::ErrorKind::AddrNotAvailable
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, TcpStream};

    use super::*;

    #[test]
    fn any_address_is_one_of_both_versions() {
        let listener = listen((Ipv6Addr::UNSPECIFIED, 0).into()).unwrap();
        let port = listener.local_addr().unwrap().port();
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        if listener.local_addr().unwrap().is_ipv6() {
            TcpStream::connect((Ipv6Addr::LOCALHOST, port)).unwrap();
        }
        let taken = listen((Ipv6Addr::UNSPECIFIED, port).into()).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn what_another_version_opened_is_the_same_place() {
        let is_same = |one: &str, other: &str| is_same_place(one.parse().unwrap(), other.parse().unwrap());
        assert!(is_same("0.0.0.0:15020", "[::]:15020") && is_same("127.0.0.1:1", "127.0.0.1:1"));
        assert!(!is_same("0.0.0.0:15020", "[::]:15021") && !is_same("127.0.0.1:1", "0.0.0.0:1"));
    }
}
