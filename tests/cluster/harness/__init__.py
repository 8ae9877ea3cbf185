"""A real Kubernetes for tests, on a machine that can reach nothing but package registries.

`Cluster` is what tests use; `python -m tests.cluster.harness` is for people.  Components are built from source
(`components`), nodes are sets of namespaces (`namespaces`, `node`), images are made by `tests.cluster.image`.
"""

from .cluster import Cluster
from .command import CommandFailed
from .node import Node
from .waiting import WaitTimeout

__all__ = ["Cluster", "CommandFailed", "Node", "WaitTimeout"]
