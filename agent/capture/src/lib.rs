//! Traffic to us: eBPF programs, pod network namespaces, listeners.
