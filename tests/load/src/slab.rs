//! Places for connections that are numbered, reused, and found without a search.

/// Values by small numbers.
pub struct Slab<T> {
    places: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Slab<T> {
    /// An empty one.
    pub fn new() -> Self {
        Slab {
            places: Vec::new(),
            free: Vec::new(),
        }
    }

    /// The number that the next [`Slab::insert`] gives.
    pub fn next(&self) -> usize {
        self.free.last().copied().unwrap_or(self.places.len())
    }

    /// Puts a value at [`Slab::next`].
    pub fn insert(&mut self, value: T) {
        match self.free.pop() {
            Some(at) => self.places[at] = Some(value),
            None => self.places.push(Some(value)),
        }
    }

    /// The value at a number; `None` once it was removed.
    pub fn get_mut(&mut self, at: usize) -> Option<&mut T> {
        self.places.get_mut(at)?.as_mut()
    }

    /// Drops the value at a number, which may then be given again.
    pub fn remove(&mut self, at: usize) {
        if self.places.get_mut(at).and_then(Option::take).is_some() {
            self.free.push(at);
        }
    }
}
