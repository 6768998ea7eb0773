//! The committed code is what the `.proto` files say.

#![allow(clippy::unwrap_used)]

use std::{fs, path::Path};

#[test]
fn the_generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = [
        "istio/workload.proto",
        "istio/authorization.proto",
        "istio/ca.proto",
        "envoy/discovery.proto",
    ];
    let descriptors = protox::compile(files.map(|file| root.join(file)), [root]).unwrap();
    let out = tempfile::tempdir().unwrap();
    tonic_prost_build::configure()
        .bytes(".")
        .btree_map(".")
        .emit_rerun_if_changed(false)
        .out_dir(out.path())
        .compile_fds(descriptors)
        .unwrap();
    let generated = root.join("src/generated");
    for entry in fs::read_dir(out.path()).unwrap() {
        let entry = entry.unwrap();
        let committed = generated.join(entry.file_name());
        let current = fs::read_to_string(entry.path()).unwrap();
        // Packages that are only imported come out empty.
        if current.trim().is_empty() {
            continue;
        }
        if std::env::var_os("UPDATE_PROTO").is_some() {
            fs::write(&committed, &current).unwrap();
        }
        assert!(
            fs::read_to_string(&committed).is_ok_and(|text| text == current),
            "{} is stale: UPDATE_PROTO=1 cargo test -p proto",
            committed.display()
        );
    }
}
