"""cknix: Nix closures as Kubernetes volumes.

``cknix_csi.cli`` is the entry point; docs/architecture.md describes the packages and who may import whom.
"""

__version__ = "0.1.0"
