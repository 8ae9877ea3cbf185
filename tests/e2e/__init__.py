"""Upstream's own end-to-end tests of storage drivers, against a cluster of `tests.cluster` with cknix on it."""
