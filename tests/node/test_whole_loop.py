"""Closures as large as a desktop's: also with them no operation keeps all the others waiting (see ``blocking``)."""

from __future__ import annotations

import asyncio
import os

from tests.nixes import demo_search_path
from tests.node.test_whole_collection import EVERYTHING
from tests.node.test_whole_stats import VOLUMES, figures, stats
from tests.node.whole import REPOSITORY, WholeNode

PATHS = 2443
MORE = 30


async def test_every_operation_with_thousands_of_paths(whole: WholeNode) -> None:
    text = f"(import <cknix-demo> {{ }}).wideFast {PATHS}"
    search_path = demo_search_path(REPOSITORY / "nix/demo")
    desktop = whole.admin("nix-build", "--no-out-link", *search_path, "-E", text)[0]
    closure = set(whole.admin("nix-store", "--query", "--requisites", desktop))
    assert len(closure) == PATHS
    more = [f"more-{number}" for number in range(MORE)]
    await whole.start()
    for volume, (writable, attributes) in VOLUMES.items():
        shown = await whole.publish(volume, writable=writable, storePath=desktop, **attributes)
        assert len(os.listdir(shown / "store")) >= PATHS
        assert figures(await stats(whole, volume))
    await asyncio.gather(*(whole.publish(volume, storePath=desktop) for volume in more))

    whole.kill()
    await whole.start()  # which looks at all that is mounted, and adopts it
    assert not (await stats(whole, "ro")).volume_condition.abnormal
    await asyncio.gather(*(whole.unpublish(volume) for volume in (*VOLUMES, *more)))

    assert whole.terminate() == 0
    await whole.start(**EVERYTHING)
    await whole.eventually("the closure is collected", lambda: not closure & whole.registered_paths())
