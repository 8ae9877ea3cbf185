"""Where the benchmark works: a mount namespace, and in it a file system that nobody else writes to.

By default that is a journalling ext4 on a loop device in an image below the data root, since that is what nodes have
and others' files on the same file system would disturb every figure.  Mounts end with this process and its children;
the image is the cache, and all that is left.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cknix_csi.run.namespace import enter_private_mounts
from cknix_csi.volumes.mountinfo import read_mount_table

_IMAGE_BYTES = 40 << 30
_BYTES_PER_INODE = 8192


class NoImage(Exception):
    """The image cannot be made or mounted; the message says why."""


@dataclass(frozen=True, slots=True)
class Room:
    path: Path
    filesystem: str
    """In words, for the report."""

    @property
    def stores(self) -> Path:
        return self.path / "stores"

    @property
    def scratch(self) -> Path:
        """What is in it goes at the end."""
        return self.path / "scratch"

    def settle(self) -> None:
        """Wait until all that was written or deleted here is on disk, so that nothing timed has to."""
        subprocess.run(["sync", "--file-system", self.path], check=True)


@contextmanager
def room(data_root: Path, *, image: bool) -> Iterator[Room]:
    """Enter a private mount namespace and prepare *data_root*.

    To be called once, while this process has one thread.  Raises OSError, BlockingIOError when another benchmark works
    there, and :class:`NoImage`.
    """
    data_root.mkdir(parents=True, exist_ok=True)
    lock = os.open(data_root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        enter_private_mounts()
        path = data_root / "files"
        path.mkdir(exist_ok=True)
        if image:
            _mount_image(data_root / "image.ext4", path)
        place = Room(path, _described(path, image=image))
        place.stores.mkdir(exist_ok=True)
        try:
            _emptied(place)
            yield place
        finally:
            _emptied(place)
            if image:
                # What was deleted within is then free outside as well.
                subprocess.run(["fstrim", path], check=False, capture_output=True)
                subprocess.run(["umount", "--lazy", "--recursive", path], check=True)
                path.rmdir()
    finally:
        os.close(lock)


def delete_cache(data_root: Path) -> None:
    """Delete what benchmarks keep in *data_root*, and it when nothing else is in there."""
    (data_root / "image.ext4").unlink(missing_ok=True)
    for name in ("files", "out"):
        shutil.rmtree(data_root / name, ignore_errors=True)
    if data_root.exists() and not any(data_root.iterdir()):
        data_root.rmdir()


def remove(path: Path) -> None:
    """Delete a tree, however large, by a process of its own."""
    subprocess.run(["rm", "--recursive", "--force", "--one-file-system", path], check=True)


def _emptied(place: Room) -> None:
    table = read_mount_table()
    below = [mount.target for mount in table.all() if mount.target.startswith(f"{place.path}/")]
    for target in reversed(below):
        subprocess.run(["umount", "--lazy", target], check=True)
    # GC roots of nodes that were killed say that a closure is in use which is not.
    for left in (place.scratch, *place.stores.glob("*/nix/var/nix/gcroots/cknix")):
        remove(left)
    place.scratch.mkdir()


def _mount_image(image: Path, at: Path) -> None:
    if not image.exists():
        making = image.with_suffix(".new")
        with making.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        _output("mkfs.ext4", "-q", "-F", "-i", str(_BYTES_PER_INODE), making)
        making.rename(image)
    device = _output("losetup", "--find", "--show", "--direct-io=on", image)
    try:
        _output("mount", "-t", "ext4", "-o", "noatime,noinit_itable", device, at)
    finally:
        _output("losetup", "--detach", device)  # once it is unmounted, however that comes about


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise NoImage(f"{command[0]}: {done.stderr.strip()}; --no-image works without an image")
    return done.stdout.strip()


def _described(path: Path, *, image: bool) -> str:
    device = path.stat().st_dev
    mounts = [mount for mount in read_mount_table().all() if path.is_relative_to(mount.target)]
    best = max(mounts, key=lambda mount: len(mount.target))
    journal = Path(f"/proc/fs/jbd2/{os.path.basename(best.source)}-8").exists()
    kind = best.fstype + (", journal" if journal else ", no journal" if best.fstype == "ext4" else "")
    return (
        f"{kind}, on a loop device with direct I/O"
        if image
        else f"{kind}, device {os.major(device)}:{os.minor(device)}"
    )
