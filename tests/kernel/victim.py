"""A driver process that ends by SIGKILL, at a step or never.

Its operations are a JSON list of {do: publish|unpublish|forget_unused, name, root, writable, limit: [bytes, medium]},
all begun at once, or where views are kept warm (as many as *warm* says) one after the other.  Step 0 kills nothing.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

from cknix_csi.api.limits import Limit, Medium
from cknix_csi.api.storepath import StorePath
from cknix_csi.volumes.warm import COLD, Warm
from tests.kernel.node import Node
from tests.kernel.steps import Stepped, SteppedClosures, SteppedMounts, SteppedSizedStorage


async def main(scratch: str, operations: str, step: str, when: str, warm: str = "") -> None:
    def die(number: int, _: str) -> None:
        if number == int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    def live(_number: int, _name: str) -> None:
        pass

    node = Node(Path(scratch))
    steps = Stepped(die, live) if when == "before" else Stepped(live, die)
    await node.restart(
        closures=SteppedClosures(node.store, steps),
        mounts=SteppedMounts(steps),
        sized=SteppedSizedStorage(steps),
        keep_warm=Warm(int(warm)) if warm else COLD,
    )
    begun = [functools.partial(do, node, operation) for operation in json.loads(operations)]
    if warm:
        for operation in begun:
            await operation()
    else:
        async with asyncio.TaskGroup() as group:
            for operation in begun:
                group.create_task(operation())
    await node.volumes.close()


async def do(node: Node, operation: dict[str, Any]) -> None:
    name = operation.get("name", "a")
    if operation["do"] == "publish":
        size, medium = operation.get("limit") or (0, "")
        limit = Limit(size, Medium(medium)) if size else None
        await node.publish(StorePath.parse(operation["root"]), name, writable=operation["writable"], limit=limit)
    elif operation["do"] == "unpublish":
        await node.unpublish(name)
    else:
        await node.volumes.forget_unused()
