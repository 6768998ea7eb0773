//! What this process knows: deltas in, snapshots out.
