"""Our own ``cknix_csi.nix`` on one real Nix: what the tests of evaluation, builds, databases and roots share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.api.expression import Data
from cknix_csi.api.progress import Progress
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.nix import Evaluation, Nix, NixOptions
from cknix_csi.nix.store import Store
from tests.nixes import NixEnv, host_busybox

DEMO = Path(__file__).parents[2] / "nix/demo"
SYSTEM = "x86_64-linux"


class Room:
    """One store, worked on by our code and by the Nix commands themselves (``env.run``)."""

    def __init__(self, env: NixEnv, monkeypatch: pytest.MonkeyPatch) -> None:
        self.env = env
        self.store = Store.chroot(env.root)
        self._search_path = {"cknix-demo": DEMO, "cknix-demo-busybox": host_busybox()}
        for name in ("PATH", "NIX_CONF_DIR", "TMPDIR"):
            monkeypatch.setenv(name, env.environ[name])
        monkeypatch.delenv("NIX_PATH", raising=False)

    def nix(self, **options: Any) -> Nix:
        defaults: dict[str, Any] = {"home": self.env.directory / "cknix-home", "search_path": self._search_path}
        return Nix(self.store, NixOptions(**{**defaults, **options}))

    async def evaluate(self, expr: str, system: str = SYSTEM, **options: Any) -> Evaluation:
        return await self.nix(**options).evaluate(Data("expr", expr), system)

    async def flake(self, reference: str, system: str = SYSTEM, **options: Any) -> Evaluation:
        return await self.nix(**options).evaluate(Data("flakeRef", reference), system)

    async def build(self, expr: str, **options: Any) -> tuple[StorePath, list[Progress]]:
        evaluation = await self.evaluate(expr)
        seen: list[Progress] = []
        await self.nix(**options).build(evaluation, progress=seen.append)
        return evaluation.result, seen

    async def demo(self, attribute: str) -> StorePath:
        """Build an attribute of the demo packages."""
        path, _ = await self.build(f"(import <cknix-demo> {{ }}).{attribute}")
        return path

    def is_valid(self, path: StorePath | str) -> bool:
        """What Nix itself says."""
        return self.env.run("nix-store", "--check-validity", str(path), check=False).returncode == 0

    def closure(self, path: StorePath | str) -> list[str]:
        return sorted(self.env.lines("nix-store", "-qR", str(path)))

    def path_infos(self, path: StorePath | str) -> dict[str, dict[str, Any]]:
        """``nix path-info --json -r``, by path, whatever shape this version gives it."""
        output = self.env.run("nix", "path-info", "--json", "-r", str(path)).stdout
        found = json.loads(output)
        if isinstance(found, list):
            return {entry["path"]: entry for entry in found}
        found = found.get("info", found)
        return {path if path.startswith("/") else f"/nix/store/{path}": entry for path, entry in found.items()}


def wrap(
    env: NixEnv, monkeypatch: pytest.MonkeyPatch, script: str, name: str = "nix-store", real: str = "nix-store"
) -> None:
    """What our code starts as *name* becomes *script*, in which ``$real`` is the *real* program of Nix."""
    directory = env.directory / "wrapped"
    directory.mkdir(exist_ok=True)
    program = directory / name
    program.write_text(f"#!/bin/sh\nreal={env.nix.program(real)}\nexport directory={env.directory}\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def write_flake(directory: Path, text: str) -> str:
    """A flake without inputs of its own; returns its reference."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "flake.nix").write_text(text)
    return f"path:{directory}"


def alive(pids: Iterable[int]) -> list[int]:
    """Those of *pids* that run: neither gone nor dead and not yet reaped."""
    running = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            running.append(pid)
    return running


def processes_of(marker: str) -> list[int]:
    """Processes, of any session and namespace, whose command line holds *marker* (this one apart)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in command:
                found.append(int(entry.name))
    return alive(found)
