"""Layers and docker-archives, written with `tarfile`: the same content always gives the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..harness.cache import written_beside

EPOCH = 1_700_000_000  # every file's time: a build has none of its own
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Layer:
    """An uncompressed tar of files, with its digest kept beside it."""

    tar: Path

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal; computed once."""
        kept = self.tar.with_suffix(".sha256")
        if not kept.exists():
            with self.tar.open("rb") as content:
                kept.write_text(hashlib.file_digest(content, "sha256").hexdigest())
        return kept.read_text()


class LayerWriter:
    """Writes a layer's tar: everything belongs to root."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar

    def directory(self, path: str, mode: int = 0o755) -> None:
        """An empty directory, if the layers below do not have it with something in it."""
        self._add(path, tarfile.DIRTYPE, mode)

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._add(path, tarfile.SYMTYPE, 0o777, target=target)

    def file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """A file."""
        self._add(path, tarfile.REGTYPE, mode, content=content)

    def tree(self, source: Path, path: str) -> None:
        """Everything below the directory *source*, at *path*."""
        self.directory(path)
        for entry in sorted(source.iterdir()):
            inside = f"{path}/{entry.name}"
            if entry.is_symlink():
                self.link(inside, os.readlink(entry))
            elif entry.is_dir():
                self.tree(entry, inside)
            else:
                self.file(inside, entry.read_bytes(), 0o755 if entry.stat().st_mode & 0o100 else 0o644)

    def _add(self, path: str, kind: bytes, mode: int, *, target: str = "", content: bytes = b"") -> None:
        member = tarfile.TarInfo(path.lstrip("/"))
        member.type, member.mode, member.linkname, member.size, member.mtime = kind, mode, target, len(content), EPOCH
        self._tar.addfile(member, io.BytesIO(content))


def write_archive(path: Path, references: Sequence[str], layers: Sequence[Layer], config: Mapping[str, object]) -> Path:
    """Write an image as a docker-archive: what `ctr images import`, `docker load` and `podman load` take."""
    image = {
        "architecture": ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.digest}" for layer in layers]},
    }
    image_json = json.dumps(image).encode()
    image_name = f"{hashlib.sha256(image_json).hexdigest()}.json"
    names = [f"{layer.digest}.tar" for layer in layers]
    manifest = [{"Config": image_name, "RepoTags": list(references), "Layers": names}]
    with written_beside(path) as partial, tarfile.open(partial, "w") as archive:
        writer = LayerWriter(archive)
        writer.file("manifest.json", json.dumps(manifest).encode())
        writer.file(image_name, image_json)
        for name, layer in zip(names, layers, strict=True):
            archive.add(layer.tar, name)
    return path
