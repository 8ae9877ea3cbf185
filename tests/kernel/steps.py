"""Mounts and closures whose every call is announced first, so that a test can make any of them the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cknix_csi.api.closure import Closure
from cknix_csi.api.limits import Limit
from cknix_csi.api.storepath import StorePath
from cknix_csi.volumes.closures import Closures
from cknix_csi.volumes.mountinfo import Mount, MountTable
from cknix_csi.volumes.mounts import KernelMounts, Upper
from cknix_csi.volumes.sized import KernelSizedStorage


class Stepped:
    """Counts calls; tells *before* and *after* the number, from 1, and the name of each.

    ``calls`` keeps the names.
    """

    def __init__(
        self, before: Callable[[int, str], None], after: Callable[[int, str], None] = lambda _number, _name: None
    ) -> None:
        self.calls: list[str] = []
        self._before = before
        self._after = after

    def enter(self, name: str) -> Callable[[], None]:
        """Announce a call; what it returns announces its end."""
        self.calls.append(name)
        number = len(self.calls)
        self._before(number, name)
        return lambda: self._after(number, name)


class SteppedMounts(KernelMounts):
    """The kernel's mounts, step by step."""

    def __init__(self, steps: Stepped) -> None:
        self._steps = steps

    def table(self) -> MountTable:
        end = self._steps.enter("table")
        table = super().table()
        end()
        return table

    def mounted(self, path: str) -> bool:
        end = self._steps.enter("mounted")
        mounted = super().mounted(path)
        end()
        return mounted

    def overlay(self, target: str, *, source: str, lower: Sequence[str], upper: Upper | None) -> None:
        end = self._steps.enter("overlay")
        super().overlay(target, source=source, lower=lower, upper=upper)
        end()

    def clone(self, source: str, target: str, *, writable: bool) -> None:
        end = self._steps.enter("clone")
        super().clone(source, target, writable=writable)
        end()

    def unmount(self, target: str) -> None:
        end = self._steps.enter("unmount")
        super().unmount(target)
        end()

    def unmount_one(self, mount: Mount) -> None:
        end = self._steps.enter("unmount_one")
        super().unmount_one(mount)
        end()


class SteppedSizedStorage(KernelSizedStorage):
    """The kernel's places of limited size, step by step; what happens within a step: test_sized_crash.py."""

    def __init__(self, steps: Stepped) -> None:
        super().__init__(KernelMounts())
        self._steps = steps

    def make(self, path: str, limit: Limit) -> Upper:
        end = self._steps.enter("make place")
        upper = super().make(path, limit)
        end()
        return upper

    def release(self, path: str) -> bool:
        end = self._steps.enter("release place")
        released = super().release(path)
        end()
        return released


class SteppedClosures:
    """A store's closures, step by step."""

    def __init__(self, closures: Closures, steps: Stepped) -> None:
        self._closures = closures
        self._steps = steps

    @property
    def store_dir(self) -> Path:
        return self._closures.store_dir

    async def hold(self, closure_id: str, root: StorePath) -> None:
        end = self._steps.enter("hold")
        await self._closures.hold(closure_id, root)
        end()

    async def release(self, closure_id: str) -> None:
        end = self._steps.enter("release")
        await self._closures.release(closure_id)
        end()

    async def held(self) -> dict[str, StorePath]:
        end = self._steps.enter("held")
        held = await self._closures.held()
        end()
        return held

    async def query(self, root: StorePath) -> Closure:
        end = self._steps.enter("query")
        closure = await self._closures.query(root)
        end()
        return closure

    async def write_state(self, closure: Closure, directory: Path) -> None:
        end = self._steps.enter("write_state")
        await self._closures.write_state(closure, directory)
        end()
