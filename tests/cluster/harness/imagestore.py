"""What containerd makes of a set of images, kept between runs.

Importing an image writes it twice, with a sync: for a few hundred megabytes on each of several nodes that is most of a
cluster's start.  So a set of images is imported once, and nodes get it as hard links: nothing ever writes to a blob or
to an unpacked layer; only the databases of containerd's parts change, and those are copied.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import tarfile
from collections.abc import Sequence
from pathlib import Path

from .cache import built_beside, cache_root, exclusive, progress
from .command import run
from .components import CONTAINERD
from .node import Node
from .scratch import Scratch

CONTAINERD_DIRECTORY = "/var/lib/containerd"
KEPT_SETS = 2


def imported(images: Sequence[Path]) -> Path:
    """containerd's directory with *images* (docker-archives) in it; not to be written to."""
    directory = cache_root() / f"imagestore-{CONTAINERD.version}-{identity(images)}"
    with exclusive("imagestore"):
        if not directory.is_dir():
            progress(f"importing {', '.join(image.name for image in images)}")
            forget_all_but(KEPT_SETS - 1)
            with built_beside(directory) as partial:
                import_all(images, partial)
        directory.touch()
    return directory


def identity(images: Sequence[Path]) -> str:
    """A short key for what the images are: their manifests name every file of theirs by its digest."""
    manifests = hashlib.sha256()
    for image in images:
        with tarfile.open(image) as archive:
            manifest = archive.extractfile("manifest.json")
            assert manifest is not None, f"{image} is not a docker-archive"
            manifests.update(manifest.read())
    return manifests.hexdigest()[:12]


def import_all(images: Sequence[Path], target: Path) -> None:
    """Import *images* on a node that is there for nothing else, and move what its containerd has made to *target*."""
    scratch = Scratch(target.parent)
    node = Node(scratch.name, 0, scratch.directory)
    try:
        scratch.create()
        node.boot()
        node.start_runtime()
        for image in images:
            node.import_image(image)
        node.kill("containerd", signal.SIGTERM)
        node.halt()
        node.path(CONTAINERD_DIRECTORY).rename(target / "containerd")
    finally:
        node.halt()
        scratch.remove()


def furnish(node: Node, store: Path) -> None:
    """Give a *node* whose containerd does not run yet everything that is in *store*."""
    directory = node.path(CONTAINERD_DIRECTORY)
    linked = ["--link"] if store.stat().st_dev == directory.parent.stat().st_dev else []
    run(["cp", "--archive", *linked, store / "containerd", directory])
    for database in directory.glob("*/*"):
        if database.is_file():
            own = database.read_bytes()
            database.unlink()
            database.write_bytes(own)


def forget_all_but(count: int) -> None:
    """Remove the sets of images that were not used for longest."""
    stores = sorted(cache_root().glob("imagestore-*/"), key=lambda path: path.stat().st_mtime, reverse=True)
    for store in stores[count:]:
        shutil.rmtree(store)
