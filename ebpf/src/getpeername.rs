//! `cgroup/getpeername4`, `6`: the application sees the peer that it dialled, not the agent.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{context, dns, maps::DIALLED};

const PROCEED: i32 = 1;

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    if is_udp(&ctx) {
        if let Some(server) = dns::server_of(&ctx, &dns::read4(&ctx)) {
            dns::write4(&ctx, &server);
        }
        return PROCEED;
    }
    // SAFETY: the context is valid; a pointer that is not null is to the socket's storage.
    unsafe {
        let dialled = DIALLED.get_ptr_mut(&ctx);
        if !dialled.is_null() {
            (*ctx.sock_addr).user_ip4 = (*dialled).destination.address.words[3];
            (*ctx.sock_addr).user_port = u32::from((*dialled).destination.port.to_be());
        }
    }
    PROCEED
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    if is_udp(&ctx) {
        if let Some(server) = dns::server_of(&ctx, &dns::read6(&ctx)) {
            dns::write6(&ctx, &server);
        }
        return PROCEED;
    }
    // SAFETY: as above.
    unsafe {
        let dialled = DIALLED.get_ptr_mut(&ctx);
        if !dialled.is_null() {
            context::set_words(&raw mut (*ctx.sock_addr).user_ip6, (*dialled).destination.address.words);
            (*ctx.sock_addr).user_port = u32::from((*dialled).destination.port.to_be());
        }
    }
    PROCEED
}

#[inline(always)]
fn is_udp(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context is valid.
    unsafe { core::ptr::read_volatile(&raw const (*ctx.sock_addr).protocol) == dns::IPPROTO_UDP }
}
