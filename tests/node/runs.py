"""``cknix-csi run`` as a user starts it, on a data root of its own, and what it must not leave."""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import nixes
from tests.cluster.harness.scratch import scratch_base
from tests.nixes import NixEnv

REPOSITORY = Path(__file__).parents[2]
HELLO = REPOSITORY / "yaml/test/expression.yaml"
GREETING = "every path below /nix/store here is a part of this program's closure."
LIMIT = 60.0
"""Seconds after which a state that was waited for counts as not reached."""


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def problems(self) -> list[str]:
        """What it complained about, without its own name."""
        return [line.removeprefix("cknix-csi run: ") for line in self.err.splitlines()]


class Runs:
    """Starts runs on one data root, with one Nix."""

    def __init__(self, env: NixEnv) -> None:
        self.env = env
        self.data_root = env.root
        self.environ = {**env.environ, "CKNIX_DATA_ROOT": str(env.root)}
        self._started: list[subprocess.Popen[str]] = []

    def __call__(
        self,
        *argv: str,
        options: Sequence[str] = ("-f", str(HELLO)),
        stdin: str = "",
        quiet: bool = True,
        cwd: Path = REPOSITORY,
        environ: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> Ran:
        """Run it to its end; *before* are words in front of the program, such as ``unshare --mount``."""
        done = subprocess.run(
            [*before, *self.command(*argv, options=[*options, *(["-q"] if quiet else [])])],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env=self.environ | dict(environ or {}),
            timeout=LIMIT,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    @staticmethod
    def command(*argv: str, options: Sequence[str] = ("-f", str(HELLO))) -> list[str]:
        return [sys.executable, "-m", "cknix_csi.cli", "run", *options, *(["--", *argv] if argv else [])]

    def start(
        self, *argv: str, options: Sequence[str] = ("-f", str(HELLO)), hangup: str = "default"
    ) -> subprocess.Popen[str]:
        """Start it in a process group of its own; it is ended with the test.  *hangup*: ``ignore``, as with nohup."""
        process = subprocess.Popen(
            # Said each time, since these tests may run under nohup themselves.
            ["env", f"--{hangup}-signal=HUP", *self.command(*argv, options=options)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=self.environ,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def package(self, text: str) -> tuple[str, str]:
        """Options for what *text* means among the demo packages."""
        return "--expr", f"with import <cknix-demo> {{}}; {text}"

    def scratches(self) -> list[Path]:
        """The directories of runs that live, or were killed."""
        directory = self.data_root / "runs"
        return sorted(directory.iterdir()) if directory.exists() else []

    def roots(self) -> list[str]:
        """GC roots below the data root's own directory of them."""
        found = []
        for directory, directories, names in os.walk(self.data_root / "nix/var/nix/gcroots/cknix"):
            found += [name for name in (*directories, *names) if Path(directory, name).is_symlink()]
        return sorted(found)

    def processes(self) -> list[int]:
        """Processes that have the data root in their environment or arguments."""
        marker = os.fsencode(self.data_root)
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    told = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                    if marker in told and (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                        found.append(int(entry.name))
        return found

    def mounts(self) -> list[str]:
        """Mounts of this machine that have to do with the data root."""
        return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(self.data_root) in line]

    def traces(self) -> dict[str, object]:
        """All that a run leaves besides the store: nothing, when none is under way."""
        temporary = [path.name for path in (self.env.directory / "tmp").iterdir()]
        found = {
            "scratches": self.scratches(),
            "GC roots": self.roots(),
            "processes": self.processes(),
            "mounts": self.mounts(),
            "temporary files": temporary,
        }
        return {what: values for what, values in found.items() if values}

    def store_digest(self) -> str:
        """Names, modes, times, targets and contents of all store objects."""
        digest = hashlib.sha256()
        store = self.data_root / "nix/store"
        for path in sorted(store.rglob("*")):
            status = path.lstat()
            content = b""
            if stat.S_ISLNK(status.st_mode):
                content = os.fsencode(path.readlink())
            elif stat.S_ISREG(status.st_mode):
                content = path.read_bytes()
            digest.update(repr((str(path), status.st_mode, status.st_size, status.st_mtime_ns, content)).encode())
        return digest.hexdigest()

    def end(self) -> None:
        """End what a failed test left running."""
        for process in self._started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_until(state: Callable[[], object], what: str) -> None:
    """Wait for *state* to be true."""
    deadline = time.monotonic() + LIMIT
    while not state():
        assert time.monotonic() < deadline, f"not reached in {LIMIT:.0f} s: {what}"
        time.sleep(0.02)


def script(*lines: str | Path) -> tuple[str, ...]:
    """A command that runs shell *lines*."""
    return ("sh", "-euc", "\n".join(map(str, lines)))


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


def runs_with(suite: str) -> Iterator[Runs]:
    """The body of a fixture: runs with the Nix of a Debian suite, which leave nothing whatever becomes of the test."""
    if os.geteuid() != 0:
        pytest.skip("cknix-csi run mounts file systems: run as root")
    # On a disk: an overlay cannot be the upper layer of another.
    directory = Path(tempfile.mkdtemp(prefix="cknix-run-", dir=scratch_base())).resolve()
    runs = Runs(NixEnv(nixes.nix(suite), directory))
    try:
        yield runs
    finally:
        runs.end()
        # Only a broken run mounts anything that is seen here.
        for line in reversed(runs.mounts()):
            subprocess.run(["umount", "--lazy", line.split()[4]], check=True)
        nixes.remove(directory)
