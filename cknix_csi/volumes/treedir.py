"""A directory of trees, one per closure: what views and farms have in common, whatever is in a tree."""

from __future__ import annotations

import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from cknix_csi.api.storepath import InvalidStorePath, StorePath
from cknix_csi.volumes.failures import explained
from cknix_csi.volumes.mountinfo import Mount
from cknix_csi.volumes.mounts import BY_DESCRIPTOR
from cknix_csi.volumes.trash import Trash

_BUILDING = ".building-"


class TreeDirectory(ABC):
    """The trees in *directory*, which exists; what is no longer wanted goes to *trash*.

    A part of :class:`~cknix_csi.volumes.trees.Trees`, where the methods are explained.
    """

    noun: ClassVar[str]
    source_prefix: ClassVar[str]
    """How the source of an overlay of such a tree begins in the mount table; the closure's id follows."""

    def __init__(self, directory: str, trash: Trash) -> None:
        self._directory = directory
        self._trash = trash
        self._building: set[str] = set()
        self._trusted: set[str] = set()

    @abstractmethod
    def look(self, closure_id: str) -> str | None:
        """What is wrong with a tree that exists, None when it is whole.  Raises StoreDamaged, VolumeFailed."""

    def path(self, closure_id: str) -> str:
        return f"{self._directory}/{closure_id}"

    def mountpoint(self, closure_id: str) -> str:
        return f"{self._directory}/{closure_id}/m"

    def source(self, closure_id: str) -> str:
        return self.source_prefix + closure_id

    def exists(self, closure_id: str) -> bool:
        """True when there is a tree, whole or not."""
        return os.path.lexists(self.path(closure_id))

    def trusts(self, closure_id: str) -> bool:
        """True when the tree is there and need not be looked at: it has been since it last was without a user."""
        return closure_id in self._trusted and self.exists(closure_id)

    def flaw(self, closure_id: str) -> str | None:
        """:meth:`look`; what is whole is trusted from now on."""
        found = self.look(closure_id)
        if found is None:
            self._trusted.add(closure_id)
        return found

    def distrust(self, closure_id: str) -> None:
        """Nobody uses the tree for a while: it must be looked at before it is used again."""
        self._trusted.discard(closure_id)

    def ids(self) -> Iterator[str]:
        """The closures that have a tree; anything else in the directory is not ours and not named."""
        for name in os.listdir(self._directory):
            if closure_id := closure_named(name):
                yield closure_id

    def abandoned(self) -> Iterator[str]:
        """Paths of trees whose building ended half-way, in an earlier process."""
        for name in os.listdir(self._directory):
            if name.startswith(_BUILDING) and name not in self._building:
                yield f"{self._directory}/{name}"

    def reserve(self) -> str:
        """A path to build a tree at, beside the finished ones; end with ``complete`` or :meth:`abandon`."""
        name = f"{_BUILDING}{uuid.uuid4().hex}"
        self._building.add(name)
        return f"{self._directory}/{name}"

    def abandon(self, building: str) -> None:
        """Throw away what was made of *building*.  Raises VolumeFailed."""
        if os.path.lexists(building):
            self._trash.take(building)
        self._building.discard(os.path.basename(building))

    def discard(self, closure_id: str) -> None:
        """Throw away the tree, if there is one; the caller knows that no mount uses it.  Raises VolumeFailed."""
        self._trusted.discard(closure_id)
        if self.exists(closure_id):
            self._trash.take(self.path(closure_id))

    def _place(self, building: str, closure_id: str) -> None:
        """Rename what was built, and is whole, to where trees are.  Raises OutOfSpace, VolumeFailed."""
        with explained(f"complete the {self.noun} of {closure_id}"):
            os.rename(building, self.path(closure_id))
        self._building.discard(os.path.basename(building))
        self._trusted.add(closure_id)

    def _overlaid(self, mount: Mount) -> str | None:
        """The closure whose tree *mount*, an overlay, shows; None for a foreign one, and another data root's is."""
        if not mount.source.startswith(self.source_prefix):
            return None
        layer = mount.super_option("lowerdir+")
        if layer is not None and not layer.startswith((f"{self._directory}/", BY_DESCRIPTOR)):
            return None
        return closure_named(mount.source.removeprefix(self.source_prefix))


def closure_named(name: str) -> str | None:
    """*name* where it is a closure's id."""
    try:
        return StorePath.from_basename(name).basename
    except InvalidStorePath:
        return None
