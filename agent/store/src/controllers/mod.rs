//! What the API does by itself: garbage collection, namespaces, bootstrap objects.
