//! Kubernetes and Istio objects to model values; pure.
