//! One agent follows another on a node, and no connection fails for it: upgrade, crash, drain.
//!
//! ```text
//!  undercurrent node                 the holder: started first, tiny, one thread; keeps duplicates of all listeners
//!    └── undercurrent node --worker  the worker: everything else; its standard input is its holder's socket
//!
//!  STATE_DIR/handover.sock (0600)    where the holder of a new agent finds the one in charge
//!
//!  new worker     new holder                 old holder     old worker
//!     │               ├── Hello ──────────────►│                │  serves
//!     │◄── Hold… All ─┤◄────── Hold… All ──────┤                │
//!     │ loads knowledge and certificates       │                │
//!     ├── Ready ─────►├── Ready ──────────────►├── Yield ──────►│  stops being in charge: agent.sock, readiness,
//!     │◄── Yielded ───┤◄────────── Yielded ────┤◄── Yielded ────┤  records, annotations; serves on, accepts on
//!     │ programs, pods, agent.sock             │                │
//!     ├── Serving ───►├── Serving ────────────►├── Drain ──────►│  accepts no more, GOAWAY; ends with its last
//!     │               │                        │ lets go, ends  │  connection, at the latest after --drain
//! ```
//! **Listeners** are passed by SCM_RIGHTS and never shut down, so their accept queues live on whoever polls them: between
//! the old worker's last accept and the new one's first, connections wait. In eBPF mode the steering map holds the same
//! sockets, so that nothing changes for it. **Pins**: links get the new programs one by one, maps of the same layout are
//! kept; until it has ended, the old agent's cgroup counts as an agent's (`capture`: `takes_over`). An agent with another
//! layout of maps replaces them, and refuses new connections for the moment that telling it of the pods takes.
//!
//! **Why the holder is the worker's parent** and not a process beside it: in a container it is the first process, so that
//! it lives exactly as long as the container; the kernel tells it of the worker's death, and kills the worker with it
//! (no worker is ever without a holder, so killing the recorded process ends the agent); and it is upgraded with it.
//! It runs code of its own only: what kills a worker (a bug, memory) does not kill it.
//!
//! **Who is in charge** is never in doubt: exactly one worker answers pod events and writes. A CNI ADD in between meets a
//! closed socket or is told to ask again ([`admin::ASK_AGAIN`]), and the plugin does until its time is over; what the old
//! one had recorded the new one reads after `Yielded`.
//!
//! Under failure:
//! - The new agent dies before `Serving`: the old one hears it by the closed socket and is in charge again. After: its
//!   holder starts it again, as the one in charge, and the old one drains.
//! - The new one has no knowledge: it is not `Ready`, waits, and the old one serves on. No certificates: for a minute.
//! - The old worker hangs: its holder answers for it after 10 s. The old holder hangs or speaks another version: the new
//!   agent starts as if nobody were there.
//! - The worker crashes: connections inside it are lost; new ones wait in the queues, and are served by the worker that the
//!   holder starts, at once and then with back-off; after six crashes in a row the holder ends, too, and they are refused.
//! - The holder is killed: its worker dies with it, as the whole agent did before there were holders.
//! - SIGTERM without a successor drains as before: pods stay captured, new connections are refused once it has ended. With
//!   one that is about to take over, the old agent waits for it, up to 30 s.
//! - A pod that is gone while no worker runs keeps its namespace's memory until one runs again and lets its listeners go.
//!
//! Held by the tests of [`machine`] (every order of events) and `tests/scenarios/upgrade.rs` (under load).

mod holder;
mod link;
mod machine;
mod store;
mod wire;

pub use holder::{HolderConfig, run as hold};
pub use link::{Attached, Link, Order, attach};
pub use wire::{Former, Message};
