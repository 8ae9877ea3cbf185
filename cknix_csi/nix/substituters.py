"""Binary caches a store may fetch from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheEndpoint:
    """A binary cache and the key whose signatures are believed."""

    url: str
    """As Nix takes it in ``substituters``, for example ``http://cknix-cache.cknix-system.svc``."""
    public_key: str
    """``<name>:<base64>``, as in ``trusted-public-keys``."""
