"""A fetch of which a garbage collection takes a part begins again, with every supported Nix."""

from __future__ import annotations

import os
import re
import sqlite3
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import pytest_asyncio

from cknix_csi.api.errors import NotFound
from cknix_csi.api.situations import Code
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import fetcher as fetcher_module
from cknix_csi.nix.cache.signing import generate_key
from cknix_csi.nix.fetcher import StoreFetcher
from cknix_csi.nix.fetcherrors import PathCollected
from cknix_csi.nix.recovery import missing
from cknix_csi.nix.store import Store
from cknix_csi.nix.substituters import CacheEndpoint
from tests.nix.cache_process import cache_process
from tests.nix.disks import fill
from tests.nix.room import Room
from tests.nixes import NixEnv, NixVersion

KEY = generate_key("cknix-cache-1")


@dataclass
class Front:
    """In front of a cache: counts what is asked for, and does something before it answers with a certain NAR."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    before_nar_of: dict[str, Callable[[], None]] = field(default_factory=dict)
    """By the hash of the store path."""
    _nars: dict[str, str] = field(default_factory=dict)

    def passing(self, path: str, body: bytes) -> None:
        self.asked.append(path)
        if path.endswith(".narinfo") and (url := re.search(rb"^URL: (\S+)$", body, re.MULTILINE)):
            self._nars["/" + url[1].decode()] = path.removeprefix("/").removesuffix(".narinfo")
        self.before_nar_of.get(self._nars.get(path, ""), lambda: None)()


@contextmanager
def front_of(cache: str) -> Iterator[Front]:
    front = Front()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                with urllib.request.urlopen(cache + self.path) as answer:
                    code, body = answer.status, answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    code, body = error.code, error.read()
            front.passing(self.path, body)
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        front.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield front
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Node:
    """A store that has *there* already, of *wanted*, which refers to it and to *other*."""

    room: Room
    front: Front
    fetcher: StoreFetcher
    wanted: StorePath
    there: StorePath
    other: StorePath
    disturbed: int = 0

    def collect(self, path: StorePath) -> None:
        """What Nix's collector does when it has begun with *path*, whatever comes into use meanwhile."""
        self.disturbed += 1
        with closing(sqlite3.connect(self.room.store.database, timeout=10)) as database, database:
            database.execute("PRAGMA foreign_keys = ON")
            database.execute(
                "DELETE FROM Refs WHERE referrer = (SELECT id FROM ValidPaths WHERE path = ?)", (str(path),)
            )
            database.execute("DELETE FROM ValidPaths WHERE path = ?", (str(path),))
        self.room.store.physical_path(path).unlink()

    def once(self, path: StorePath) -> Callable[[], None]:
        return lambda: None if self.disturbed else self.collect(path)

    def attempts(self) -> int:
        return len([path for path in self.front.asked if path == f"/{self.wanted.hash}.narinfo"])


@pytest.fixture(scope="module")
def source(nix: NixVersion, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, StorePath]]]:
    """The URL of a cache, and what it has by name."""
    env = NixEnv(nix, tmp_path_factory.mktemp("source"))
    paths = fill(env, {"wanted": ["there", "other"]}, {"there": 1000, "other": 1000})
    with cache_process(env.root, KEY) as cache:
        yield cache.url, paths
    env.destroy()


@pytest_asyncio.fixture
async def node(
    nix_env: NixEnv, monkeypatch: pytest.MonkeyPatch, source: tuple[str, dict[str, StorePath]]
) -> AsyncIterator[Node]:
    url, paths = source
    room = Room(nix_env, monkeypatch)
    with front_of(url) as front:

        async def endpoints() -> list[CacheEndpoint]:
            return [CacheEndpoint(front.url, KEY.public)]

        fetcher = StoreFetcher(room.nix(), endpoints)
        await fetcher.fetch(paths["there"], lambda _: None)
        await fetcher.hold(paths["wanted"])
        yield Node(room, front, fetcher, paths["wanted"], paths["there"], paths["other"])


def while_another_reference_comes(node: Node, _: pytest.MonkeyPatch) -> None:
    node.front.before_nar_of[node.other.hash] = node.once(node.there)


def while_the_path_itself_comes(node: Node, _: pytest.MonkeyPatch) -> None:
    node.front.before_nar_of[node.wanted.hash] = node.once(node.there)


def before_its_files_are_looked_at(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = node.once(node.wanted)

    def late(store: Store, path: StorePath) -> list[StorePath]:
        collect()
        return missing(store, path)

    monkeypatch.setattr(fetcher_module, "missing", late)


MOMENTS = (while_another_reference_comes, while_the_path_itself_comes, before_its_files_are_looked_at)


@pytest.mark.parametrize("disturb", MOMENTS, ids=lambda moment: moment.__name__)
async def test_what_a_collection_takes_from_a_fetch_is_fetched_again(
    node: Node, monkeypatch: pytest.MonkeyPatch, disturb: Callable[[Node, pytest.MonkeyPatch], None]
) -> None:
    disturb(node, monkeypatch)
    await node.fetcher.fetch(node.wanted, lambda _: None)
    assert node.disturbed == 1
    assert set(node.room.closure(node.wanted)) == {str(path) for path in (node.wanted, node.there, node.other)}
    check = node.room.env.run("nix-store", "--verify", "--check-contents")
    assert "error" not in check.stderr


async def test_a_fetch_that_collections_disturb_each_time_is_given_up_in_the_end(node: Node) -> None:
    def bring_and_collect() -> None:
        if os.path.lexists(node.room.store.physical_path(node.there)):
            node.collect(node.there)

    node.front.before_nar_of[node.wanted.hash] = bring_and_collect
    with pytest.raises(PathCollected, match="a garbage collection came in between while") as e:
        await node.fetcher.fetch(node.wanted, lambda _: None)
    assert e.value.code is Code.UNAVAILABLE
    assert node.disturbed == fetcher_module.TRIES


async def test_what_the_cache_does_not_have_is_not_asked_for_again(node: Node) -> None:
    unknown = StorePath.parse("/nix/store/00000000000000000000000000000000-nobody-has-it")
    with pytest.raises(NotFound):
        await node.room.nix().substitute(unknown, await node.fetcher._endpoints(), progress=lambda _: None)
    asked = node.front.asked.count(f"/{unknown.hash}.narinfo")
    assert asked > 0
    node.front.asked.clear()
    with pytest.raises(NotFound):
        await node.fetcher.fetch(unknown, lambda _: None)
    assert node.front.asked.count(f"/{unknown.hash}.narinfo") == asked
