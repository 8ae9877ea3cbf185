"""Small disks for stores, and closures of known sizes to fill them with."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.api.storepath import StorePath
from tests.nixes import NixEnv

MEBIBYTE = 1024 * 1024
CLONE_NEWNS = 0x20000
MS_REC_PRIVATE = (1 << 14) | (1 << 18)


def fill(env: NixEnv, closures: Mapping[str, Sequence[str]], sizes: Mapping[str, int]) -> dict[str, StorePath]:
    """Make closures of the names given, each a file that refers to data of *sizes* bytes; all paths by name."""
    scratch = env.directory / "data"
    scratch.mkdir(exist_ok=True)
    for name, size in sizes.items():
        (scratch / name).write_bytes(os.urandom(size))
    data = "".join(f'{name} = builtins.path {{ path = "{scratch / name}"; name = "{name}"; }}; ' for name in sizes)
    roots = "".join(
        f'{name} = builtins.toFile "{name}" "{name} {" ".join(f"${{data.{part}}}" for part in parts)}"; '
        for name, parts in closures.items()
    )
    lines = env.run(
        "nix-instantiate",
        *("--eval", "--strict", "--read-write-mode", "--expr"),
        f"let data = {{ {data} }}; roots = {{ {roots} }}; all = data // roots; "
        'in builtins.concatStringsSep " " (map (name: "${name}=${all.${name}}") (builtins.attrNames all))',
    )
    words = lines.stdout.strip().strip('"').split()
    return {name: StorePath.parse(path) for name, _, path in (word.partition("=") for word in words)}


def on_small_disk(target: Path, kind: str, mebibytes: int, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run *body* where *target* is a file system of its own, in a mount namespace that this thread alone sees."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk: run as root")
    failures: list[BaseException] = []

    def work() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            # Of this thread and of the threads and processes that it starts.
            assert libc.unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
            assert libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC_PRIVATE), None) == 0
            with small_disk(target, target.with_name("image"), kind, mebibytes):
                asyncio.run(body())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


@contextmanager
def small_disk(target: Path, image: Path, kind: str, mebibytes: int) -> Iterator[None]:
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "small-disk", str(target)]
    else:
        with image.open("wb") as file:
            file.truncate(mebibytes * MEBIBYTE)
        subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True)
        command = ["mount", "-o", "loop", str(image), str(target)]
    subprocess.run(command, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(target)], check=True)
