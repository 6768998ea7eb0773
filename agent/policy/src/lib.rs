//! May it? Verdicts with their reasons; pure.
