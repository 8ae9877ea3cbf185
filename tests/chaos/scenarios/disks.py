"""The disk of a node's data root is full, and freed again."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tests.chaos.leaks import DATA_ROOT
from tests.chaos.scenario import scenario
from tests.chaos.stage import Stage
from tests.cluster import driver


@scenario("disk-full")
def disk_full(stage: Stage) -> None:
    """The disk of a data root is full to the last block, and freed again"""
    known = stage.built()
    pods = stage.new(known)
    stage.create(pods)
    stage.started(pods)
    # Else collecting garbage would make room, however full the disk is.
    driver.on_daemon(stage.cluster, stage.victim, "nix-store", "--gc", "--store", driver.NODE_STORE)
    data = stage.victim.inside(DATA_ROOT)
    ballast = fill(data)
    try:
        cold = stage.new(stage.built(kibibytes=2000))
        # Whether these start depends on the last block: Nix's database needs a few of them to be opened.
        others = [*stage.new(known), *stage.new(known, read_only=False)]
        stage.create([*cold, *others])
        stage.told(cold, "free space", timeout=90)
        stage.before.require_readable()
        assert stage.cluster.phase(cold[0].name) == "Pending"
    finally:
        ballast.unlink()
    stage.started([*cold, *others], timeout=250)


def fill(data: Path) -> Path:
    """A file that leaves nothing of the disk that *data* is on, also of what is reserved for root."""
    ballast = data / "somebody-elses-data"
    with ballast.open("wb") as file:
        while (free := os.statvfs(data).f_bfree * os.statvfs(data).f_frsize) > 0:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), free)
            except OSError:
                break
    with ballast.open("ab", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    return ballast
