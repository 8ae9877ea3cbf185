"""``cknix-csi run``: the node daemon's own code without Kubernetes."""
