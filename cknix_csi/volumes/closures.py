"""What the volumes need to know of a store; implemented by whoever owns one."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cknix_csi.api.closure import Closure
from cknix_csi.api.storepath import StorePath


class Closures(Protocol):
    """One Nix store: where its objects are, what is in a closure, and which closures must not be collected.

    All methods may be called again after they were cut short, and finish before they return.
    """

    @property
    def store_dir(self) -> Path:
        """The directory that holds the store objects."""

    async def hold(self, closure_id: str, root: StorePath) -> None:
        """Keep *root* and all it refers to from being collected, under the name *closure_id*.  Idempotent."""

    async def release(self, closure_id: str) -> None:
        """End what :meth:`hold` began.  Idempotent."""

    async def held(self) -> dict[str, StorePath]:
        """What is held now, by any process: closure id to root."""

    async def query(self, root: StorePath) -> Closure:
        """The closure of *root* from the store's database.  Raises a CknixError when *root* is not valid."""

    async def write_state(self, closure: Closure, directory: Path) -> None:
        """Write a Nix database with exactly *closure* to *directory*``/nix/var/nix/db``; that directory may exist."""
