"""What the specs' pods ask for: one image of ours, with a shell and upstream's agnhost, under all those names."""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

from tests.cluster.harness.command import run
from tests.cluster.harness.components import KUBERNETES_E2E
from tests.cluster.image.archive import Layer, LayerWriter, write_archive
from tests.cluster.image.build import add_busybox, images

REPOSITORY = "registry.k8s.io/e2e-test-images/"
WANTED = ("agnhost", "busybox", "jessie-dnsutils", "nginx")
"""Of nginx and jessie-dnsutils the specs use the shell only."""


def build_image() -> Path:
    """The archive of that image."""
    KUBERNETES_E2E.build()
    programs = KUBERNETES_E2E.programs
    references = names(run([programs / "e2e.test", "-list-images"]))
    with tempfile.TemporaryDirectory(prefix="cknix-image-") as scratch:
        layer = Path(scratch) / "layer.tar"
        with tarfile.open(layer, "w") as tar:
            writer = LayerWriter(tar)
            add_busybox(writer)
            writer.file("/agnhost", (programs / "agnhost").read_bytes(), mode=0o755)
        config = {"Entrypoint": ["/agnhost"], "Cmd": ["pause"], "Env": ["PATH=/bin"]}
        return write_archive(images() / "e2e.tar", references, [Layer(layer)], config)


def names(listed: str) -> list[str]:
    """Those of the image names in *listed*, a line each, that this image stands in for."""
    return sorted({line for line in listed.split() if line.removeprefix(REPOSITORY).partition(":")[0] in WANTED})
