//! A small, Kubernetes-shaped API.
