"""From a closure to a mounted directory: views, private overlays, mounts, the mount table.  No gRPC, no Kubernetes.

``volumes.py`` is the front door; what every module relies on is the kernel's mount table and the directories below the
data root, never something remembered.
"""
