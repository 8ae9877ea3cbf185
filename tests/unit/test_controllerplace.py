"""What a node does not get done when it hears of the controller's place, on an API server in memory."""

from __future__ import annotations

import asyncio
import errno
import logging

import pytest

from cknix_csi.kube.api import Json, core
from cknix_csi.kube.controllerplace import follow_controller
from cknix_csi.volumes.failures import VolumeFailed
from tests.unit.fakeapi import FakeApi

PLACE: Json = {"metadata": {"resourceVersion": "1"}, "data": {"node": "node-b"}}


@pytest.mark.parametrize(
    "failure", [OSError(errno.EMFILE, "Too many open files"), VolumeFailed("move: Invalid cross-device link")]
)
async def test_what_cannot_be_done_is_told_once_and_tried_again(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    api = FakeApi()
    api.objects[core("configmaps", "s")] = {
        "kind": "ConfigMapList",
        "metadata": {"resourceVersion": "1"},
        "items": [PLACE],
    }
    done = asyncio.Event()
    told: list[str] = []

    async def moved(node: str) -> None:
        told.append(node)
        if len(told) < 4:
            raise failure
        done.set()

    following = asyncio.create_task(follow_controller(api, "s", moved, again_seconds=0.001))
    waiting = asyncio.create_task(done.wait())
    await asyncio.wait({following, waiting}, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    assert done.is_set()
    assert not following.done()
    following.cancel()
    await asyncio.wait({following})
    assert set(told) == {"node-b"}
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == [f"what follows from the controller being on node node-b is not done: {failure}"]
