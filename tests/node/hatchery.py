"""Starts the daemon without its two seconds of imports: a process that has imported the program forks it on demand.

What runs is ``cknix_csi.cli`` with arguments, environment, mount namespace and end of its own; only imports are shared,
and each long step of its event loop is noted, beside its log.
Where the command line itself matters, tests use that.  ``python -m tests.node.hatchery`` is the process.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.api.server import REPOSITORY
from tests.node import blocking

_MODULES = (
    "cknix_csi.cli",
    "cknix_csi.csi.daemon",
    "cknix_csi.csi.housekeeping",
    "cknix_csi.kube.cacheconfig",
    "cknix_csi.kube.client",
    "cknix_csi.kube.controllerplace",
    "cknix_csi.kube.expressions",
    "cknix_csi.monitoring",
    "cknix_csi.nix.fetcher",
    "cknix_csi.serve",
    "cknix_csi.volumes.ledger",
    "cknix_csi.volumes.volumes",
    "kubernetes_asyncio.client",
    "kubernetes_asyncio.config",
)
_CLONE_NEWNS = 0x20000
_PR_SET_PDEATHSIG = 1


class Hatched:
    """A daemon that was forked; answers as :class:`subprocess.Popen` does."""

    def __init__(self, hatchery: Hatchery, pid: int) -> None:
        self._hatchery = hatchery
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._hatchery.ask("poll", self.pid)
        return self.returncode

    def wait(self, timeout: float = 30.0) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"cknix-csi node, pid {self.pid}", timeout)
            time.sleep(0.002)
        return code

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Hatchery:
    """The process; daemons end with it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.node.hatchery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            text=True,
        )

    def start(self, namespace: Path, log: Path, environment: dict[str, str]) -> Hatched:
        """``cknix-csi node`` in the mount namespace *namespace*."""
        return Hatched(self, self.ask("start", str(namespace), str(log), environment))

    def ask(self, *question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    for module in _MODULES:
        importlib.import_module(module)
    gc.freeze()
    for line in sys.stdin:
        question, *arguments = json.loads(line)
        answer = _fork(*arguments) if question == "start" else _poll(*arguments)
        print(json.dumps(answer), flush=True)


def _poll(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _fork(namespace: str, log: str, environment: dict[str, str]) -> int:
    if pid := os.fork():
        return pid
    code = 70
    try:
        code = _become_daemon(namespace, log, environment)
    finally:
        os._exit(code)


def _become_daemon(namespace: str, log: str, environment: dict[str, str]) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, log, os.O_WRONLY | os.O_APPEND | os.O_CREAT),
        (2, log, os.O_WRONLY | os.O_APPEND | os.O_CREAT),
    ):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    opened = os.open(namespace, os.O_RDONLY)
    if libc.setns(opened, _CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "setns", namespace)
    os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    blocking.watch(Path(f"{log}.blocking"))
    from cknix_csi.cli import main as cknix_csi

    return cknix_csi(["node"])


if __name__ == "__main__":
    main()
