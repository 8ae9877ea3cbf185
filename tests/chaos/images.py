"""Our image as it is, and as its next version could be."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.harness.__main__ import standard_images
from tests.cluster.image.build import PROJECT, build_image, images

NOW = "docker.io/library/cknix-csi:dev"
NEXT = "docker.io/library/cknix-csi:next"
NEXT_VERSION = "99.0.0"
PARTS = ("cknix_csi", "nix", "LICENSE", "README.md", "pyproject.toml", "requirements.lock")
#: The next version's ledger has a schema that this one does not know.
MORE_SCHEMA = """
MIGRATIONS = (*MIGRATIONS, ("CREATE TABLE of_the_next_version (word TEXT) STRICT",))
"""


@contextmanager
def all_of_them() -> Iterator[list[Path]]:
    """Archives of everything that the scenarios run, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=images()) as directory:
        archives = []
        for archive in (*standard_images(), next_version()):
            archives.append(Path(directory) / archive.name)
            archives[-1].hardlink_to(archive)  # others who build images remove what is old
        yield archives


def next_version() -> Path:
    """The archive of our image as its next version could be."""
    with tempfile.TemporaryDirectory(prefix="cknix-next-") as directory:
        project = Path(directory)
        for part in PARTS:
            source = PROJECT / part
            if source.is_dir():
                shutil.copytree(source, project / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, project / part)
        _edit(project / "pyproject.toml", r'^version = ".*"$', f'version = "{NEXT_VERSION}"')
        _edit(project / "cknix_csi/__init__.py", r'^__version__ = ".*"$', f'__version__ = "{NEXT_VERSION}"')
        with (project / "cknix_csi/volumes/ledger.py").open("a") as ledger:
            ledger.write(MORE_SCHEMA)
        return build_image(NEXT, project=project)


def _edit(file: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, file.read_text(), flags=re.MULTILINE)
    assert count == 1, f"{file} has {count} lines like {pattern}"
    file.write_text(text)
