"""The layers of our image: Debian, locked dependencies, our wheel.  Each is kept until what it is made from changes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from packaging.markers import Marker

from ..harness.cache import built_beside, cache_root, progress
from ..harness.command import pip, run
from . import recipe
from .archive import EPOCH, Layer, LayerWriter

MIRROR_VARIABLE = "CKNIX_TEST_DEBIAN_MIRROR"
GLIBC = range(17, 42)  # manylinux_2_X that the suite's C library satisfies


def debian_layer() -> tuple[Layer, Path]:
    """The root file system, as a layer and as a directory in which its programs can be run."""
    key = digest(json.dumps([recipe.SUITE, recipe.PACKAGES, recipe.EXCLUDED]))
    directory = cache_root() / f"image-debian-{key}"
    if not directory.is_dir():
        progress(f"image: Debian {recipe.SUITE}")
        forget("image-debian-*")
        with built_beside(directory) as partial:
            tar = partial / "layer.tar"
            options = ["--quiet", "--variant=essential", "--skip=output/dev", f"--include={','.join(recipe.PACKAGES)}"]
            options += [f"--dpkgopt=path-exclude={path}" for path in recipe.EXCLUDED]
            source = f"deb {mirror()} {recipe.SUITE} main"
            environment = {"SOURCE_DATE_EPOCH": str(EPOCH)}
            run(["mmdebstrap", *options, recipe.SUITE, tar, source], env=environment, timeout=900)
            (partial / "root").mkdir()
            run(["tar", "--extract", "--file", tar, "--directory", partial / "root"])
    return Layer(directory / "layer.tar"), directory / "root"


def mirror() -> str:
    """Where this machine gets its Debian packages."""
    if given := os.environ.get(MIRROR_VARIABLE):
        return given
    debian = ("Created-By: Packages", "Origin: Debian", "Label: Debian")
    found = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", *debian])
    if not found:
        raise LookupError(f"apt knows no Debian mirror: run `apt-get update`, or give one in {MIRROR_VARIABLE}")
    return found.splitlines()[0]


def dependencies_layer(root: Path, lock: Path) -> Layer:
    """What *lock* pins for the image's Python, compiled by it."""
    requirements = for_image(lock.read_text())
    directory = cache_root() / f"image-python-{digest(requirements, recipe.PYTHON, root.parent.name)}"
    if not directory.is_dir():
        progress("image: Python dependencies")
        forget("image-python-*")
        with built_beside(directory) as partial, tempfile.TemporaryDirectory() as scratch:
            locked = Path(scratch) / "requirements.txt"
            locked.write_text(requirements)
            installed = Path(scratch) / "installed"
            options = ("--quiet", "--no-deps", "--no-compile", "--require-hashes", *for_image_only())
            pip("install", *options, "--target", installed, "--requirement", locked)
            python_layer(partial / "layer.tar", root, installed, add_search_path)
    return Layer(directory / "layer.tar")


def for_image_only() -> list[str]:
    """Options that make pip take what the image's Python can run, not what its own can."""
    options = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", recipe.PYTHON]
    options += ["--ignore-requires-python"]  # that, pip would judge by its own Python all the same
    for system in (*(f"manylinux_2_{minor}" for minor in reversed(GLIBC)), "manylinux2014", "linux"):
        options += ["--platform", f"{system}_{platform.machine()}"]
    return options


def add_search_path(layer: LayerWriter) -> None:
    """Every Python of the image finds what is in our prefix."""
    layer.file(f"{recipe.SITE}/cknix.pth", f"{recipe.PREFIX}\n".encode())


def for_image(lock: str) -> str:
    """The lines of a lock file that hold for the image's Python.  (pip would judge by the Python that it runs on.)"""
    environment = {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": platform.machine(),
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{recipe.PYTHON}.0",
        "python_version": recipe.PYTHON,
        "sys_platform": "linux",
    }
    kept = []
    for requirement in re.split(r"\n(?=\S)", lock.replace("\\\n", " ")):
        name, *hashes = re.split(r"\s(?=--hash)", re.sub(r"(^|\s)#.*", "", requirement))
        pinned, _, marker = name.partition(";")
        if pinned.strip() and (not marker or Marker(marker.strip()).evaluate(environment)):
            kept.append(" ".join([pinned.strip(), *(part.strip() for part in hashes)]))
    return "\n".join(kept)


def application_layer(root: Path, project: Path, directory: Path) -> Layer:
    """Our wheel, built from the tree as it is, in a layer below *directory*."""
    wheels, installed = directory / "wheel", directory / "installed"
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, project)
    (wheel,) = wheels.iterdir()
    zipfile.ZipFile(wheel).extractall(installed)  # all that installing is, here; pip would add the wheel's own path
    return python_layer(directory / "application.tar", root, installed, lambda layer: add_program(layer, root))


def add_program(layer: LayerWriter, root: Path) -> None:
    """The program on PATH, the users that builds run as, and the directories that volumes are mounted on."""
    layer.file(recipe.PROGRAM, recipe.PROGRAM_TEXT.encode(), mode=0o755)
    group, first = recipe.BUILD_GROUP, recipe.BUILD_GROUP_ID
    names = [f"{group}{number}" for number in range(1, recipe.BUILD_USERS + 1)]
    users = [
        f"{name}:x:{first + number}:{first}:Nix build user {number}:/var/empty:/usr/sbin/nologin\n"
        for number, name in enumerate(names, start=1)
    ]
    for file, lines in (("passwd", users), ("group", [f"{group}:x:{first}:{','.join(names)}\n"])):
        layer.file(f"/etc/{file}", (root / "etc" / file).read_bytes() + "".join(lines).encode())
    for path in recipe.DIRECTORIES:
        layer.directory(path)


def python_layer(tar: Path, root: Path, installed: Path, extra: Callable[[LayerWriter], None]) -> Layer:
    """Pack what was *installed*, compiled by the Python of *root*."""
    shutil.rmtree(installed / "bin", ignore_errors=True)  # programs that would look for this machine's Python
    compile_with(root, installed)
    with tarfile.open(tar, "w") as archive:
        layer = LayerWriter(archive)
        layer.tree(installed, recipe.PREFIX)
        extra(layer)
    return Layer(tar)


def compile_with(root: Path, installed: Path) -> None:
    """Compile Python files as they will be found in the image, in a mount namespace that ends with the command."""
    script = """
        mount --bind "$2" "$1/mnt"
        exec chroot "$1" python3 -m compileall -q -f --invalidation-mode unchecked-hash -s /mnt -p "$3" /mnt
    """
    run(["unshare", "--mount", "sh", "-ec", script, "sh", root, installed, recipe.PREFIX], timeout=600)


def forget(pattern: str) -> None:
    """Remove layers of former recipes: they are large, and quickly made again."""
    for directory in cache_root().glob(pattern):
        shutil.rmtree(directory)


def digest(*parts: str) -> str:
    """A short key for what a layer is made from."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
