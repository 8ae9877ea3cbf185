"""A driver process that ends by SIGKILL: ``python -m tests.kernel.victim SCRATCH OPERATIONS STEP before|after``.

OPERATIONS is a JSON list of {do: publish|unpublish, name, root, writable}, all begun at once.  STEP 0 kills nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from cknix_csi.api.storepath import StorePath
from tests.kernel.node import Node
from tests.kernel.steps import Stepped, SteppedClosures, SteppedMounts


async def main(scratch: str, operations: str, step: str, when: str) -> None:
    def die(number: int, _: str) -> None:
        if number == int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    def live(_number: int, _name: str) -> None:
        pass

    node = Node(Path(scratch))
    steps = Stepped(die, live) if when == "before" else Stepped(live, die)
    await node.restart(closures=SteppedClosures(node.store, steps), mounts=SteppedMounts(steps))
    print("begin", flush=True)
    async with asyncio.TaskGroup() as group:
        for operation in json.loads(operations):
            name = operation.get("name", "a")
            if operation["do"] == "publish":
                root = StorePath.parse(operation["root"])
                group.create_task(node.publish(root, name, writable=operation["writable"]))
            else:
                group.create_task(node.unpublish(name))
    await node.volumes.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
