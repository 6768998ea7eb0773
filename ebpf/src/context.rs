//! Fields of the kernel's contexts, read and written one by one.
//!
//! The verifier accepts only a field's own offset from the context's pointer. Left alone, the compiler merges reads of
//! different fields in two branches into one read of a computed address, which is refused ("dereference of modified ctx
//! ptr"). So whatever is needed is read before any branch, and volatile.

/// An IPv6 address of a context.
///
/// # Safety
/// The pointer must be to a field of a valid context or socket.
#[inline(always)]
pub unsafe fn words(field: *const [u32; 4]) -> [u32; 4] {
    let word = field.cast::<u32>();
    // SAFETY: the caller's promise.
    unsafe {
        [
            core::ptr::read_volatile(word),
            core::ptr::read_volatile(word.add(1)),
            core::ptr::read_volatile(word.add(2)),
            core::ptr::read_volatile(word.add(3)),
        ]
    }
}

/// Replaces an IPv6 address of a context.
///
/// # Safety
/// The pointer must be to a writable field of a valid context.
#[inline(always)]
pub unsafe fn set_words(field: *mut [u32; 4], words: [u32; 4]) {
    let word = field.cast::<u32>();
    // SAFETY: the caller's promise.
    unsafe {
        core::ptr::write_volatile(word, words[0]);
        core::ptr::write_volatile(word.add(1), words[1]);
        core::ptr::write_volatile(word.add(2), words[2]);
        core::ptr::write_volatile(word.add(3), words[3]);
    }
}
