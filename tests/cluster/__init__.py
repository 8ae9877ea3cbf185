"""Tests against a real Kubernetes: what a user sees."""
