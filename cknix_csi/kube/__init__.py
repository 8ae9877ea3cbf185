"""Kubernetes as both processes see it: one connection, and the few objects that are read, watched and written."""
