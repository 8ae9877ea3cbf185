"""A process killed at any step of making room: nothing in use is lost, the store is sound, and the next one finishes.

Its steps are the calls by which it changes something (see ``tests.kernel.points``), and for each Nix command that it
starts also two moments in its middle: it ends together with the process, as all of a container does, or it lives on.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
from itertools import count

import pytest

from cknix_csi.api.storepath import StorePath
from cknix_csi.api.watermarks import Watermark, Watermarks
from cknix_csi.csi.housekeeping import Housekeeping
from cknix_csi.nix.closures import StoreClosures
from cknix_csi.nix.collection import Collector, Pace
from cknix_csi.nix.database import query_closure, registered
from cknix_csi.volumes.ledger import ClosureUse
from tests import nixes
from tests.kernel.points import killed_at
from tests.nix.disks import fill
from tests.nix.room import Room, processes_of
from tests.nixes import NixEnv

EVERY = bool(os.environ.get("CKNIX_TEST_EVERY"))
"""Whether each step is tried, with each Nix; some 30 s for one."""
APART = 8
"""Steps from one that is tried to the next, otherwise."""
# What is run as nix-store: it ends its parent, and with it itself, in the middle of the command of a certain number.
WRAPPER = """#!/bin/sh
echo "$1" >> {directory}/calls
[ "$(wc -l < {directory}/calls)" = "$(cat {directory}/dies-at)" ] || exec {real} "$@"
[ "$(cat {directory}/how)" = together ] || {{ kill -KILL $PPID; exec {real} "$@"; }}
cd {store}
names() {{ there=$#; }}
names *
before=$there
{{ {real} "$@"; : > {directory}/ended; }} &
until [ -e {directory}/ended ]; do
  names *
  [ $there -ge $before ] || break
done
kill -KILL $PPID 0
"""


class Node:
    """A store with garbage, a closure kept for no user, and one that a view shows; all is to go but the last."""

    def __init__(self, env: NixEnv, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = Room(env, monkeypatch)
        self.env, self.store = env, self.room.store
        self.closures = StoreClosures(self.store)
        self.directory = env.directory / "wrapped"
        self.directory.mkdir()
        real = env.nix.program("nix-store")
        text = WRAPPER.format(directory=self.directory, real=real, store=self.store.physical)
        (self.directory / "nix-store").write_text(text)
        (self.directory / "nix-store").chmod(0o755)
        monkeypatch.setenv("PATH", f"{self.directory}:{os.environ['PATH']}")
        self.shown = fill(env, {"shown": ["onlyShown"]}, {"onlyShown": 1000})["shown"]
        self.paths: dict[str, StorePath] = {}
        view = env.root / "views" / self.shown.basename
        asyncio.run(self.closures.write_state(query_closure(self.store, self.shown), view / "meta"))
        self.whole = self.contents()

    def contents(self) -> dict[str, str]:
        """What is registered and there of what the view shows."""
        paths = [str(member.path) for member in query_closure(self.store, self.shown).paths]
        return {path: self.env.physical(path).read_text(errors="replace") for path in paths}

    def begin(self, *, command: int = 0, how: str = "") -> None:
        """Garbage anew; the root of what is shown has been removed by somebody."""
        self.paths = fill(
            self.env,
            {"A": ["onlyA", "common"], "B": ["onlyB", "common"], "warm": ["onlyWarm"]},
            dict.fromkeys(("onlyA", "onlyB", "common", "nobodys", "onlyWarm"), 1000),
        )
        asyncio.run(self.closures.hold(self.paths["warm"].basename, self.paths["warm"]))
        asyncio.run(self.closures.release(self.shown.basename))
        (self.directory / "ended").unlink(missing_ok=True)
        (self.directory / "calls").write_text("")
        (self.directory / "dies-at").write_text(str(command))
        (self.directory / "how").write_text(how)

    def closures_by_last_use(self) -> list[ClosureUse]:
        return [ClosureUse(self.paths[name].basename, 1.0, 1.0, 1) for name in ("A", "B")]

    async def hold_mounted(self) -> None:
        await self.closures.hold(self.shown.basename, self.shown)

    async def forget_unused(self) -> list[str]:
        unused = [name for name in await self.closures.held() if name != self.shown.basename]
        for name in unused:
            await self.closures.release(name)
        return unused

    async def emptied(self) -> None:
        """Nothing is thrown away here."""

    async def make_room(self) -> None:
        """What a daemon does when it looks at its disk and finds it too full, whatever is there."""
        store = Collector(self.store, self.env.directory / "home", Pace(pause=0.0))
        marks = Watermarks(Watermark(size=1 << 60), Watermark(size=1 << 61))
        await Housekeeping(store=store, watermarks=marks, uses=self, volumes=self)._look()

    def require_recovered(self, moment: str) -> None:
        """What is shown is there; the next process makes all the room there is, and nothing else is left."""
        assert self.contents() == self.whole, moment
        (self.directory / "dies-at").write_text("never")
        asyncio.run(self.make_room())
        assert self.contents() == self.whole, moment
        assert registered(self.store) == set(self.whole), moment
        assert {f"/nix/store/{name}" for name in os.listdir(self.store.physical)} - {"/nix/store/.links"} == set(
            self.whole
        ), moment
        assert asyncio.run(self.closures.held()) == {self.shown.basename: self.shown}, moment
        assert processes_of(self.store.uri) == [], moment
        assert os.listdir(self.store.state / "temproots") == [], moment
        with (self.store.state / "gc.lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def require_sound(self) -> None:
        check = self.env.run("nix-store", "--verify", "--check-contents")
        assert "error" not in check.stderr
        assert "warning" not in check.stderr


@pytest.fixture
def node(nix_env: NixEnv, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(nix_env, monkeypatch)


@pytest.mark.one_nix
def test_a_process_killed_before_any_step_of_making_room_is_followed_by_one_that_finishes(node: Node) -> None:
    first = 1 if EVERY else random.randint(1, APART)
    for point in count(first, 1 if EVERY else APART):
        node.begin()
        killed = killed_at(point, node.make_room)
        node.require_recovered(f"killed at {point}")
        if not killed:
            break
    node.require_sound()
    assert point > 20


@pytest.mark.one_nix
def test_a_process_killed_in_the_middle_of_any_command_is_followed_by_one_that_finishes(node: Node) -> None:
    """The commands are shared out among the versions of Nix."""
    series = [suite.series for suite in nixes.selected()]
    mine = next(index for index, one in enumerate(series) if node.env.nix.version.startswith(f"{one}."))
    for command in count(1 if EVERY else 1 + mine, 1 if EVERY else len(series)):
        killed = False
        for how in ("together", "alone") if EVERY else ("together", "alone")[command % 2 :][:1]:
            node.begin(command=command, how=how)
            killed = killed_at(0, node.make_room)
            node.require_recovered(f"killed {how} at command {command}")
        if not killed:
            break
    node.require_sound()
    assert command > 6
