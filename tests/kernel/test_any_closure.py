"""Any closure, as any kind of volume: a pod sees the store's content and metadata, and nothing more."""

from __future__ import annotations

import asyncio
import os
import shutil
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cknix_csi.api.storepath import StorePath
from tests.kernel.kinds import KINDS, require_same
from tests.kernel.node import Node, run
from tests.kernel.store import FakeStore, seal
from tests.kernel.trees import Entry, directories, files, links, make_object

EXAMPLES = int(os.environ.get("CKNIX_TEST_EXAMPLES", "6"))
"""Random closures to try."""
RSYNC = pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is the independent eye: apt-get install rsync")

path_names = st.text(string.ascii_letters + string.digits + "+-._?=", min_size=1, max_size=211).filter(
    lambda name: not name.startswith(".")
)


@dataclass(frozen=True)
class Object:
    """One object of a store: its name, its content, and which others it refers to, by their numbers (modulo)."""

    name: str
    entry: Entry
    references: Sequence[int]


objects = st.builds(Object, path_names, st.one_of(directories, files, links), st.lists(st.integers(0, 20), max_size=3))
stores = st.lists(objects, min_size=1, max_size=8, unique_by=lambda one: one.name)


def make_store(store: FakeStore, made: Sequence[Object]) -> tuple[StorePath, set[StorePath]]:
    """A store of these objects; the first one's path, and all that can be reached from it, by a search of our own."""
    paths = [store.add(one.name)[0] for one in made]
    references = {
        path: {paths[number % len(paths)] for number in one.references} for path, one in zip(paths, made, strict=True)
    }
    for path, one in zip(paths, made, strict=True):
        store.add(one.name, sorted(references[path]))
        at = store.store_dir / path.basename
        make_object(os.fsencode(at), one.entry)
        seal(at)
    reached: set[StorePath] = {paths[0]}
    while found := {reference for path in reached for reference in references[path]} - reached:
        reached |= found
    return paths[0], reached


@RSYNC
@given(made=stores)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_closure_is_shown_as_it_is_by_every_kind_of_volume(scratch: Path, made: Sequence[Object]) -> None:
    async def example() -> None:
        run("rm", "--recursive", "--force", scratch / "example")
        (scratch / "example").mkdir()
        node = Node(scratch / "example")
        root, reached = make_store(node.store, made)
        closure = await node.store.query(root)
        assert {info.path for info in closure.paths} == reached
        for number, arguments in enumerate(KINDS.values()):
            require_same(await node.publish(root, f"p{number}", **arguments), node.store.store_dir, closure)
        for number in range(len(KINDS)):
            await node.unpublish(f"p{number}")
        assert await node.left() == []

    asyncio.run(example())


@RSYNC
@pytest.mark.parametrize("kind", ["view", "farm"])
async def test_2500_paths_of_all_types_are_shown_as_they_are(node: Node, kind: str) -> None:
    """A chain, so that the closure is as deep as it is wide."""
    below: list[StorePath] = []
    for number in range(2500):
        path, at = node.store.add(f"path-{number}", below)
        if number % 3 == 0:
            at.mkdir(mode=0o555)
        elif number % 3 == 1:
            at.write_text(str(number))
        else:
            at.symlink_to("nowhere")
        seal(at)
        below = [path]
    closure = await node.store.query(below[0])
    assert len(closure.paths) == 2500
    require_same(await node.publish(below[0], **KINDS[kind]), node.store.store_dir, closure)
