"""Whatever a killed process leaves of a place of limited size, the next one can throw away."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from cknix_csi.api.limits import Limit, Medium
from cknix_csi.volumes import loop, mounts, sized, syscalls
from cknix_csi.volumes.mounts import KernelMounts
from cknix_csi.volumes.sized import KernelSizedStorage
from tests.kernel.node import mounts_below
from tests.kernel.test_sized import MIB, Pod, left, loops, no_loop_device_stays, wait_until

STORAGE = KernelSizedStorage(KernelMounts())
FILES = {str(module.__file__) for module in (loop, mounts, sized, syscalls)}
_ROUNDS = 2

__all__ = ["no_loop_device_stays"]


def killed_at(step: int, operation: Callable[[], object]) -> bool:
    """Run *operation* in a process of its own that kills itself at its *step*th call; False if it ended before that.

    Counted is each call that the code of the volumes makes, of its own functions and of the system's; those of one
    line at most _ROUNDS times, for there may be any number of loop devices to look at, and of moments to wait.
    """
    child = os.fork()
    if child == 0:
        try:
            done: Counter[tuple[str, int, str]] = Counter()

            def count(frame: FrameType, event: str, _: object) -> None:
                if event in {"call", "c_call"} and frame.f_code.co_filename in FILES:
                    done[frame.f_code.co_filename, frame.f_lineno, event] += 1
                    if sum(min(count, _ROUNDS) for count in done.values()) == step:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(count)
            operation()
            sys.setprofile(None)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in {0, -signal.SIGKILL}
    return status != 0


@pytest.mark.parametrize("limit", [Limit(64 * MIB), Limit(MIB, Medium.MEMORY)], ids=["disk", "memory"])
def test_what_a_killed_make_leaves_is_released_and_made_again(scratch: Path, limit: Limit) -> None:
    path = scratch / "volumes/csi-a/0123456789abcdef"
    seen: set[tuple[bool, ...]] = set()
    step = 0
    while True:
        step += 1
        path.mkdir(parents=True)
        killed = killed_at(step, lambda: STORAGE.make(str(path), limit))
        seen.add(((path / sized.IMAGE).exists(), (path / sized.SPACE).exists(), bool(mounts_below(path))))
        STORAGE.release(str(path))
        assert mounts_below(path) == [], f"killed at {step}"
        # A device that never had a mount ends with the process that had it open, which mkfs may outlive.
        wait_until(lambda: loops(path) == [])
        shutil.rmtree(path)
        if not killed:
            break
        if step % 10 == 0:
            pod = Pod(scratch, limit)
            (pod.volume / "new").write_text("works")
            pod.end()
            shutil.rmtree(path)
    on_disk = limit.medium is Medium.DISK
    assert {(False, False, False), (False, True, False), (on_disk, True, True)} <= seen
    assert (True, True, False) in seen or not on_disk
    assert step > (60 if on_disk else 25)


@pytest.mark.parametrize("limit", [Limit(MIB), Limit(MIB, Medium.MEMORY)], ids=["disk", "memory"])
def test_a_killed_release_is_finished_by_the_next(scratch: Path, limit: Limit) -> None:
    step = 0
    killed = True
    path = str(scratch / "volumes/csi-a/0123456789abcdef")
    while killed:
        step += 1
        pod = Pod(scratch, limit)
        KernelMounts().unmount(str(pod.volume))
        killed = killed_at(step, lambda: STORAGE.release(path))
        STORAGE.release(path)
        assert left(scratch) == [], f"killed at {step}"
        shutil.rmtree(path)
    assert step > 15


def test_a_volume_survives_the_process_that_made_it(scratch: Path) -> None:
    assert not killed_at(10_000, lambda: Pod(scratch, Limit(MIB)))
    [device] = loops(scratch)
    pod = scratch / "volumes/csi-a/0123456789abcdef"
    (pod / "m/new").write_text("works")
    assert STORAGE.usage(str(pod)) is not None
    KernelMounts().unmount(str(pod / "m"))
    STORAGE.release(str(pod))
    assert left(scratch) == []
    assert device["autoclear"] is True
