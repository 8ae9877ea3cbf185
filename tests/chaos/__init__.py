"""What happens to volumes when parts of a cluster fail: `python -m tests.chaos`, on a real two-node Kubernetes."""
