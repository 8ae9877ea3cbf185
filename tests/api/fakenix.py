"""A Nix that does what the expression says, in files that outlive the process: for tests of the controller only.

The text is words ``key=value``:

* ``result=NAME`` the name of the result (needed);
* ``evaluate=fail``, ``build=fail`` fail with a log; ``evaluate=gate``, ``build=gate`` wait for :meth:`Gates.open`;
* ``build=hang`` exceeds the deadline; ``build=full`` finds the disk full until the gate is open;
* ``#`` ends the text: what follows makes an expression longer, or another one.

Every call is a line of JSON in the journal.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cknix_csi.api.closure import Closure, PathInfo
from cknix_csi.api.errors import BuildFailed, CknixError, DeadlineExceeded, EvaluationFailed, OutOfSpace
from cknix_csi.api.expression import Data
from cknix_csi.api.progress import Progress
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.nix import Evaluation

_BASE32 = "0123456789abcdfghijklmnpqrsvwxyz"
LOG = "building…\nstep 1\nerror: builder for 'x' failed with exit code 1"


def store_path(name: str) -> StorePath:
    """The path every fake result of this *name* has."""
    digest = hashlib.sha256(name.encode()).digest()
    return StorePath("".join(_BASE32[byte % 32] for byte in digest), name)


@dataclass(frozen=True, slots=True)
class World:
    """The files that a fake Nix and the test that watches it share."""

    directory: Path

    @property
    def journal(self) -> Path:
        return self.directory / "journal"

    @property
    def valid(self) -> Path:
        return self.directory / "valid"

    def prepare(self) -> None:
        for name in ("valid", "gates", "root", "substituter"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        self.journal.touch()

    def open(self, gate: str) -> None:
        """Let whatever waits for *gate* (a result's name) go on, now and later."""
        (self.directory / "gates" / gate).touch()

    def is_open(self, gate: str) -> bool:
        return (self.directory / "gates" / gate).exists()

    def collect(self, name: str) -> None:
        """Make the result *name* vanish, as a garbage collection or a new disk would."""
        (self.valid / store_path(name).basename).unlink()

    def offer(self, name: str) -> None:
        """Let a substituter have the result *name*."""
        (self.directory / "substituter" / store_path(name).basename).touch()

    def note(self, event: str, name: str) -> None:
        with self.journal.open("a") as journal:
            journal.write(json.dumps({"event": event, "name": name, "pid": os.getpid()}) + "\n")

    def noted(self, event: str, name: str | None = None) -> int:
        """How often *event* has happened (to *name*)."""
        lines = [json.loads(line) for line in self.journal.read_text().splitlines()]
        return sum(line["event"] == event and name in (None, line["name"]) for line in lines)


TAKEN = "registered, and not on the disk any more"


class FakeNix:
    def __init__(self, world: World) -> None:
        self._world = world
        self._builds: dict[str, str] = {}

    async def evaluate(self, data: Data, system: str) -> Evaluation:
        if data.kind == "storePath":
            return Evaluation(StorePath.parse(data.text))
        words = dict(word.split("=", 1) for word in data.text.partition("#")[0].split())
        name = words["result"]
        self._world.note("evaluate", name)
        mode = words.get("evaluate", "")
        if mode == "fail":
            raise EvaluationFailed("error: attribute 'helo' missing\n       at expr:1:25")
        if mode == "crash":
            raise RuntimeError("a bug in the program")
        if mode == "gate":
            await self._gate(name, "evaluate")
        self._builds[name] = words.get("build", "")
        path = store_path(name)
        return Evaluation(path, (f"/nix/store/{path.hash}-{name}.drv!out",))

    async def build(self, evaluation: Evaluation, *, progress: Callable[[Progress], None]) -> None:
        path = evaluation.result
        if not evaluation.derivations:
            if not (self._world.valid / path.basename).exists():
                raise BuildFailed(f"{path} is not in the store and no substituter has it")
            return
        name = path.name
        self._world.note("build", name)
        mode = self._builds[name]
        progress(Progress(0, 3, (name,)))
        if mode == "fail":
            raise BuildFailed(LOG)
        if mode == "hang":
            raise DeadlineExceeded(f"the build of {path} did not end within 1s and was stopped")
        if mode == "full" and not self._world.is_open(name):
            raise OutOfSpace("No space left on device")
        if mode == "gate":
            progress(Progress(1, 3, (name,)))
            await self._gate(name, "build")
        taken = mode == "taken" and not self._world.noted("built", name)
        (self._world.valid / path.basename).write_text(TAKEN if taken else "")
        self._world.note("built", name)

    async def substitute(self, path: StorePath) -> None:
        self._world.note("substitute", path.name)
        if not (self._world.directory / "substituter" / path.basename).exists():
            raise BuildFailed(f"{path} is not in the store and no substituter has it")
        (self._world.valid / path.basename).touch()

    async def _gate(self, name: str, what: str) -> None:
        try:
            while not self._world.is_open(name):
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            self._world.note(f"{what} cancelled", name)
            raise


class FakeClosures:
    def __init__(self, world: World) -> None:
        self._world = world

    async def is_valid(self, path: StorePath) -> bool:
        file = self._world.valid / path.basename
        return file.exists() and file.read_text() != TAKEN

    async def query(self, root: StorePath) -> Closure:
        if not (self._world.valid / root.basename).exists():
            raise CknixError(f"{root} is not valid")
        return Closure(root, (PathInfo(root, f"sha256:{'0' * 64}", 1234, ()),))
