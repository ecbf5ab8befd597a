//! A driver without machines, for tests of what is above this crate.
