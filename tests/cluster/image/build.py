"""Building the images: ours, and the small ones that tests and manifests need."""

from __future__ import annotations

import tarfile
import tempfile
import time
from pathlib import Path

from ..harness.cache import cache_root, exclusive, progress
from ..harness.command import run
from ..harness.components import CSI_PROVISIONER, PAUSE
from ..harness.node import PAUSE_IMAGE
from . import recipe
from .archive import Layer, LayerWriter, write_archive
from .layers import application_layer, debian_layer, dependencies_layer

PROJECT = Path(__file__).resolve().parents[3]
BUSYBOX_IMAGE = "docker.io/library/busybox:1.37"
ANY_IMAGE = "docker.io/library/ubuntu:24.04"  # what an example says for "an image of yours"; here it is busybox too
PROVISIONER_IMAGE = f"registry.k8s.io/sig-storage/csi-provisioner:v{CSI_PROVISIONER.version}"
KEPT_BUILDS = 2  # a running test may still be reading the one before the last


def build_image(*references: str, project: Path = PROJECT) -> Path:
    """Build our image from the tree *project*; returns a docker-archive with the given names (or the default one)."""
    with exclusive("image"), tempfile.TemporaryDirectory(prefix="cknix-image-") as scratch:
        started = time.monotonic()
        debian, root = debian_layer()
        dependencies = dependencies_layer(root, project / "requirements.lock")
        progress("image: our wheel")
        application = application_layer(root, project, Path(scratch))
        layers = [debian, dependencies, application]
        names = references or (recipe.REFERENCE,)
        archive = images() / f"cknix-csi-{application.digest[:12]}.tar"
        write_archive(archive, names, layers, recipe.CONFIG)
        forget_older_builds(archive.parent)
        progress(f"image: {', '.join(names)} built in {time.monotonic() - started:.1f} s")
        return archive


def forget_older_builds(directory: Path) -> None:
    """Keep the last few archives only; every one is the size of a root file system."""
    builds = sorted(directory.glob("cknix-csi-*.tar"), key=lambda path: path.stat().st_mtime, reverse=True)
    for build in builds[KEPT_BUILDS:]:
        build.unlink()


def build_pause_image() -> Path:
    """What holds a pod's namespaces: one static program."""
    PAUSE.build()
    with tempfile.TemporaryDirectory(prefix="cknix-image-") as scratch:
        layer = Path(scratch) / "layer.tar"
        with tarfile.open(layer, "w") as tar:
            LayerWriter(tar).file("/pause", (PAUSE.programs / "pause").read_bytes(), mode=0o755)
        return write_archive(images() / "pause.tar", [PAUSE_IMAGE], [Layer(layer)], {"Entrypoint": ["/pause"]})


def build_provisioner_image() -> Path:
    """Upstream's external-provisioner, by the name that upstream's image has."""
    CSI_PROVISIONER.build()
    program = (CSI_PROVISIONER.programs / "csi-provisioner").read_bytes()
    with tempfile.TemporaryDirectory(prefix="cknix-image-") as scratch:
        layer = Path(scratch) / "layer.tar"
        with tarfile.open(layer, "w") as tar:
            LayerWriter(tar).file("/csi-provisioner", program, mode=0o755)
        config = {"Entrypoint": ["/csi-provisioner"]}
        return write_archive(images() / "csi-provisioner.tar", [PROVISIONER_IMAGE], [Layer(layer)], config)


def build_busybox_image() -> Path:
    """Debian's static busybox under all of its names, and the few files that programs look for."""
    with tempfile.TemporaryDirectory(prefix="cknix-image-") as scratch:
        layer = Path(scratch) / "layer.tar"
        with tarfile.open(layer, "w") as tar:
            add_busybox(LayerWriter(tar))
        config = {"Cmd": ["sh"], "Env": ["PATH=/bin"]}
        return write_archive(images() / "busybox.tar", [BUSYBOX_IMAGE, ANY_IMAGE], [Layer(layer)], config)


def add_busybox(writer: LayerWriter) -> None:
    """The files of an image in which a shell and its usual programs run."""
    with exclusive("image"):
        _, root = debian_layer()
    busybox = root / "usr" / "bin" / "busybox"
    writer.file("/bin/busybox", busybox.read_bytes(), mode=0o755)
    for applet in sorted(set(run([busybox, "--list"]).split()) - {"busybox"}):
        writer.link(f"/bin/{applet}", "busybox")
    writer.file("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    writer.file("/etc/group", b"root:x:0:\n")
    writer.directory("/root")
    writer.directory("/tmp", mode=0o1777)


def images() -> Path:
    """Where archives are kept."""
    return cache_root() / "images"
