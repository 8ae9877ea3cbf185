"""Where the managed store is: one value that Nix commands and mounts share."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from cknix_csi.api.storepath import InvalidStorePath, StorePath


@dataclass(frozen=True, slots=True)
class Store:
    """A Nix store with logical paths under ``/nix/store``.

    A chroot store (Nix manual, "Local Store", ``root``) keeps its objects in ``<root>/nix/store``, so that the
    machine's own ``/nix`` is never touched.
    """

    root: Path | None
    """Root of a chroot store; None for the host's own store behind its daemon."""
    uri: str
    """What Nix commands get as ``--store``."""
    physical: Path
    """The directory that holds the store objects."""
    state: Path
    """The ``nix/var/nix`` directory."""

    @classmethod
    def chroot(cls, root: Path) -> Store:
        """The chroot store below *root* (absolute).  Nothing is created."""
        if not root.is_absolute():
            raise ValueError(f"the root of a chroot store must be absolute, not {root}")
        return cls(root, f"local?root={quote(str(root), safe='/')}", root / "nix/store", root / "nix/var/nix")

    @property
    def database(self) -> Path:
        return self.state / "db/db.sqlite"

    @property
    def gcroots(self) -> Path:
        """The directory of this program's own GC roots."""
        return self.state / "gcroots/cknix"

    def prepare(self) -> None:
        """Make the directory of GC roots as Nix would at its first command, but also when several begin at once.

        Nix looks for the directory, makes it and then its link, and gives up when another process's link is there.
        """
        link = self.state / "gcroots/profiles"
        link.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            link.symlink_to(self.state / "profiles")

    def physical_path(self, path: StorePath) -> Path:
        return self.physical / path.basename


def is_basename(name: str) -> bool:
    """True when *name* is that of a store path, without its directory."""
    try:
        StorePath.from_basename(name)
    except InvalidStorePath:
        return False
    return True
