"""A scratch node, and independent eyes on what it mounted: findmnt, find, diff, sha256sum."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from cknix_csi.api.limits import Limit
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.storepath import StorePath
from cknix_csi.volumes.closures import Closures
from cknix_csi.volumes.mounts import Mounts
from cknix_csi.volumes.probe import TITLES, Finding, ProbeResult
from cknix_csi.volumes.sized import SizedStorage
from cknix_csi.volumes.volumes import PublishRequest, Volumes
from cknix_csi.volumes.warm import COLD, Warm
from tests.kernel.store import FakeStore, fill_of_all_shapes, fill_small


def run(*command: str | Path, check: bool = True) -> str:
    """Output of a command; names that are not UTF-8 come as surrogates."""
    done = subprocess.run(command, capture_output=True, check=False)
    if check and done.returncode != 0:
        raise AssertionError(f"{command} answered {done.returncode}: {os.fsdecode(done.stderr)}")
    return os.fsdecode(done.stdout)


def node_without(*properties: str) -> ProbeResult:
    """What a probe finds on a node where everything works but *properties*."""
    assert set(properties) <= set(TITLES)
    findings = {name: Finding(name not in properties, f"because of {name}") for name in TITLES}
    return ProbeResult(kernel="of a test", **findings)


class Node:
    """Directories of a node below *scratch*: ``data``, ``pods``, and a fake store."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.data = scratch / "data"
        self.pods = scratch / "pods"
        for directory in (self.data, self.pods):
            directory.mkdir(exist_ok=True)
        self.store = FakeStore(scratch / "nix")
        self.probed = node_without("idmapped_overlay", "reflink")
        self.volumes = self._volumes()
        self.shapes: StorePath
        self.small: StorePath

    def fill(self) -> None:
        """Two closures that share nothing, and a store path in neither."""
        self.shapes = fill_of_all_shapes(self.store)
        self.small = fill_small(self.store, "small-1.0")
        fill_small(self.store, "secret-of-somebody-else")

    async def restart(
        self,
        *,
        closures: Closures | None = None,
        mounts: Mounts | None = None,
        sized: SizedStorage | None = None,
        keep_warm: Warm = COLD,
    ) -> None:
        """Another process's view of the same directories, optionally through parts that misbehave."""
        await self.volumes.emptied()
        await self.volumes.close()
        self.volumes = self._volumes(closures, mounts, sized, keep_warm)

    def _volumes(
        self,
        closures: Closures | None = None,
        mounts: Mounts | None = None,
        sized: SizedStorage | None = None,
        keep_warm: Warm = COLD,
    ) -> Volumes:
        closures = self.store if closures is None else closures
        probed = self.probed
        return Volumes(self.data, closures, mounts, sized=sized, prober=lambda *_: probed, keep_warm=keep_warm)

    def request(
        self,
        root: StorePath,
        name: str = "a",
        *,
        writable: bool = False,
        limit: Limit | None = None,
        presentation: Presentation | None = None,
        host_users: bool = True,
    ) -> PublishRequest:
        return PublishRequest(f"csi-{name}", self.pods / name, root, writable, limit, presentation, host_users)

    async def publish(
        self,
        root: StorePath,
        name: str = "a",
        *,
        writable: bool = False,
        limit: Limit | None = None,
        presentation: Presentation | None = None,
        host_users: bool = True,
    ) -> Path:
        request = self.request(
            root, name, writable=writable, limit=limit, presentation=presentation, host_users=host_users
        )
        await self.volumes.publish(request)
        return request.target

    async def unpublish(self, name: str = "a") -> None:
        await self.volumes.unpublish(f"csi-{name}", self.pods / name)

    async def left(self) -> list[str]:
        """Everything that volumes have left on this node; empty when there are none."""
        await self.volumes.emptied()
        await self.volumes.close()
        found = [f"mount {target}" for target in mounts_below(self.scratch)]
        for name in ("views", "farms", "volumes", "trash"):
            directory = self.data / name
            found += [f"{name}/{entry}" for entry in os.listdir(directory)] if directory.exists() else []
        found += [f"target {entry}" for entry in os.listdir(self.pods)]
        found += [f"root {name}" for name in self.store.roots()]
        return found


def mounts_below(directory: Path) -> list[str]:
    """Mount points under *directory*, as findmnt reports them, parents first."""
    output = run("findmnt", "--raw", "--noheadings", "--output", "TARGET", "--kernel")
    targets = [unescape_findmnt(line) for line in output.splitlines()]
    return [target for target in targets if f"{target}/".startswith(f"{directory}/")]


def mount_ids(target: Path) -> list[str]:
    """The ids of the mounts stacked on *target*."""
    output = run("findmnt", "--noheadings", "--output", "ID", "--kernel", "--mountpoint", target, check=False)
    return output.split()


def unescape_findmnt(text: str) -> str:
    r"""findmnt --raw writes what is not printable as ``\xHH``."""
    raw = os.fsencode(text)
    parts = raw.split(b"\\x")
    return os.fsdecode(parts[0] + b"".join(bytes((int(part[:2], 16),)) + part[2:] for part in parts[1:]))


def metadata(directory: Path, *, content: bool = False) -> list[str]:
    """Type, mode, owner, size, time and link target of all in *directory*, by find; with digests of files' content."""
    said = r"%P\t%y %m %U:%G %T@ %l"
    # A directory's size is its file system's business.
    lines = run("find", directory, "-type", "d", "-printf", rf"{said}\0", "-o", "-printf", rf"{said} %s\0").split("\0")
    if content:
        digests = run("find", directory, "-type", "f", "-exec", "sha256sum", "--zero", "{}", "+")
        lines += digests.replace(str(directory), "").split("\0")
    return sorted(lines)


def require_shows(volume: Path, store: FakeStore, paths: Iterable[StorePath]) -> None:
    """*volume* shows exactly *paths*, equal to the store in every entry's metadata and content."""
    names = {path.basename for path in paths}
    assert set(os.listdir(volume / "store")) == names | {".links"}
    for name in names:
        original, shown = store.store_dir / name, volume / "store" / name
        assert metadata(shown) == metadata(original)
        run("diff", "--recursive", "--no-dereference", original, shown)
