"""What befalls a helper does not end the work that it stands beside; a bug does."""

from __future__ import annotations

import asyncio
import errno
import logging

import pytest

from cknix_csi.api.errors import CknixError
from cknix_csi.beside import beside

LIMIT = 10.0


def world() -> list[Exception]:
    """What may befall a helper, also as a TaskGroup in it would tell."""
    full = OSError(errno.EMFILE, "Too many open files")
    away = CknixError("the API server is away")
    return [full, away, ExceptionGroup("", [full, ExceptionGroup("", [away])])]


@pytest.mark.parametrize("failure", world(), ids=["os", "cknix", "group"])
async def test_a_helper_that_fails_begins_again_and_the_work_goes_on(failure: Exception) -> None:
    begun = asyncio.Event()
    tries: list[int] = []

    async def helper() -> None:
        tries.append(1)
        if len(tries) <= 3:
            raise failure
        begun.set()
        await asyncio.Event().wait()

    async with asyncio.timeout(LIMIT):
        await beside({"helping": helper}, _until(begun), first_pause=0.001)
    assert len(tries) == 4


async def test_a_helper_that_fails_again_and_again_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    enough = asyncio.Event()
    tries: list[int] = []

    async def helper() -> None:
        tries.append(1)
        if len(tries) == 5:
            enough.set()
        raise OSError(errno.EMFILE, "Too many open files")

    async with asyncio.timeout(LIMIT):
        await beside({"following pods": helper}, _until(enough), first_pause=0.001)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["following pods failed, and begins again in 0 s: [Errno 24] Too many open files"]


@pytest.mark.parametrize("bug", [KeyError("kind"), ExceptionGroup("", [OSError("away"), KeyError("kind")])])
async def test_a_bug_of_a_helper_ends_the_work(bug: Exception) -> None:
    async def helper() -> None:
        raise bug

    with pytest.raises(ExceptionGroup) as raised:
        await beside({"helping": helper}, _until(asyncio.Event()), first_pause=0.001)
    assert raised.group_contains(KeyError, match="kind")


async def test_what_the_work_cannot_do_is_told_alone() -> None:
    async def work() -> None:
        raise CknixError("kubelet does not take the driver")

    with pytest.raises(CknixError, match="kubelet does not take"):
        await beside({"helping": asyncio.Event().wait}, work())  # type: ignore[dict-item]


async def test_a_helper_that_fails_when_it_is_to_end_has_ended() -> None:
    begun = asyncio.Event()

    async def helper() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError(errno.EIO, "Input/output error")

    async with asyncio.timeout(LIMIT):
        await beside({"helping": helper}, _until(begun), first_pause=60.0)


async def _until(event: asyncio.Event) -> None:
    await event.wait()
