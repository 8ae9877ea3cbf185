"""Views, overlays and mounts against the real kernel, in a mount namespace of their own; needs root."""
