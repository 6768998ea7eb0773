//! Texts that many resources repeat, each kept once.

use std::{collections::HashSet, sync::Arc};

/// Texts before they are looked through for the first time.
const FEW: usize = 1024;

/// Gives equal texts the same memory. What nothing else holds any more is let go when their number has doubled.
#[derive(Debug)]
pub(crate) struct Interner {
    texts: HashSet<Arc<str>>,
    sweep_at: usize,
}

impl Default for Interner {
    fn default() -> Self {
        Self {
            texts: HashSet::new(),
            sweep_at: FEW,
        }
    }
}

impl Interner {
    pub(crate) fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        if self.texts.len() >= self.sweep_at {
            self.texts.retain(|text| Arc::strong_count(text) > 1);
            self.sweep_at = (self.texts.len() * 2).max(FEW);
        }
        let text: Arc<str> = text.into();
        self.texts.insert(text.clone());
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_are_one_and_forgotten_ones_are_let_go() {
        let mut interner = Interner::default();
        let kept = interner.get("kept");
        assert!(Arc::ptr_eq(&kept, &interner.get("kept")));
        for number in 0..100 * FEW {
            interner.get(&number.to_string());
        }
        assert!(interner.texts.len() <= FEW);
        assert!(Arc::ptr_eq(&kept, &interner.get("kept")));
    }
}
