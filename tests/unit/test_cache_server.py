"""The cache over real HTTP, on a store made by hand; ``tests/nix/test_cache.py`` has real Nix on both sides."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Literal

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from cknix_csi.api.closure import PathInfo
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.cache import nar, server
from cknix_csi.nix.cache.narinfo import nar_url
from cknix_csi.nix.cache.server import cache_app, running_cache, serve_cache
from cknix_csi.nix.cache.signing import fingerprint, generate_key, sign
from cknix_csi.nix.database import register
from cknix_csi.nix.store import Store

KEY = generate_key("cknix-cache-1")
BIG = 64 * 1024 * 1024  # more than the sockets' buffers and the server's read-ahead hold
LIMIT = 20.0


class Shelf:
    """A store whose paths are written by the test: name -> bytes of a file, or a size for a sparse one."""

    def __init__(self, root: Path, **contents: bytes | int) -> None:
        self.store = Store.chroot(root)
        self.store.physical.mkdir(parents=True)
        (self.store.state / "db").mkdir(parents=True)
        self.infos: dict[str, PathInfo] = {}
        for number, (name, content) in enumerate(sorted(contents.items())):
            path = StorePath(f"{number:032d}", name.replace("_", "."))
            file = self.store.physical_path(path)
            if isinstance(content, int):
                file.touch()
                os.truncate(file, content)
            else:
                file.write_bytes(content)
            digest, size = hashlib.sha256(), 0
            for piece in nar.dump(file):
                digest.update(piece)
                size += len(piece)
            self.infos[name] = PathInfo(path, f"sha256:{digest.hexdigest()}", size, (path,), signatures=("other:AAAA",))
        register(self.store, self.infos.values())

    def file(self, name: str) -> Path:
        return self.store.physical_path(self.infos[name].path)

    def nar(self, name: str) -> str:
        return nar_url(self.infos[name])

    def narinfo(self, name: str) -> str:
        return f"{self.infos[name].path.hash}.narinfo"

    def open_files(self) -> list[str]:
        targets = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return [target for target in targets if target.startswith(str(self.store.physical))]


@asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of *app*, which runs as `running_cache` runs it."""
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    base = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    try:
        async with aiohttp.ClientSession(base, timeout=aiohttp.ClientTimeout(LIMIT)) as client:
            yield client
    finally:
        await runner.cleanup()


async def until_closed(shelf: Shelf) -> None:
    async with asyncio.timeout(LIMIT):
        while shelf.open_files():
            await asyncio.sleep(0.01)


async def test_a_path_is_described_signed_and_sent(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, hello=b"hello\n")
    async with served(cache_app(shelf.store, KEY)) as client:
        async with client.get(shelf.narinfo("hello")) as answer:
            text = await answer.text()
            assert answer.status == 200
            assert answer.content_type == "text/x-nix-narinfo"
        info = shelf.infos["hello"]
        assert f"Sig: {sign(KEY.secret, fingerprint(info))}\nSig: other:AAAA\n" in text
        assert f"URL: {shelf.nar('hello')}\n" in text
        async with client.get(shelf.nar("hello")) as answer:
            assert await answer.read() == b"".join(nar.dump(shelf.file("hello")))


async def test_a_signature_that_the_store_already_has_is_not_repeated(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, hello=b"hello\n")
    own = sign(KEY.secret, fingerprint(shelf.infos["hello"]))
    with closing(sqlite3.connect(shelf.store.database)) as database, database:
        database.execute("UPDATE ValidPaths SET sigs = ?", (f"{own} other:AAAA",))
    async with served(cache_app(shelf.store, KEY)) as client, client.get(shelf.narinfo("hello")) as answer:
        assert [line for line in (await answer.text()).splitlines() if line.startswith("Sig")] == [
            f"Sig: {own}",
            "Sig: other:AAAA",
        ]


async def test_head_answers_as_get_does_without_the_body(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, hello=b"hello\n")
    async with served(cache_app(shelf.store, KEY)) as client:
        for url in (shelf.narinfo("hello"), shelf.nar("hello"), "nix-cache-info", "0" * 32 + "x.narinfo"):
            async with client.get(url) as got, client.head(url) as head:
                assert head.status == got.status
                assert head.headers["Content-Length"] == got.headers["Content-Length"]
                assert head.content_type == got.content_type
                assert await head.read() == b""


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nothing",
        "z" * 32 + ".narinfo",  # well formed, not valid
        "0" * 31 + ".narinfo",
        "0" * 33 + ".narinfo",
        "e" * 32 + ".narinfo",  # not in Nix's alphabet
        "0" * 31 + "%00.narinfo",
        "0" * 31 + "%25.narinfo",  # LIKE's wildcard
        "0" * 32 + ".narinfo/",
        "nar/" + "0" * 32 + ".nar",
        "nar/" + "0" * 32 + "-" + "0" * 52 + ".nar",  # valid path, other content
        "nar/" + "0" * 32 + "-" + "0" * 52 + ".nar.xz",
        "nar/..%2f..%2f..%2fetc%2fpasswd",
        "realisations/sha256:00!out.doi",
        "log/" + "0" * 32 + "-x.drv",
    ],
)
async def test_what_is_not_there_or_not_well_formed_is_404_in_words_and_never_cached(tmp_path: Path, url: str) -> None:
    shelf = Shelf(tmp_path, hello=b"hello\n")
    async with (
        served(cache_app(shelf.store, KEY)) as client,
        client.get(URL(url, encoded=True), allow_redirects=False) as answer,
    ):
        assert answer.status == 404
        assert answer.headers["Cache-Control"] == "no-store"
        assert len(await answer.text()) > 20


async def test_a_derivation_is_served_only_when_the_policy_says_so(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, hello_drv=b"Derive()", hello=b"hello")
    async with served(cache_app(shelf.store, KEY)) as client:
        for url in (shelf.narinfo("hello_drv"), shelf.nar("hello_drv")):
            async with client.get(url) as answer:
                assert answer.status == 404
    async with served(cache_app(shelf.store, KEY, allowed=lambda path: path.is_derivation)) as client:
        for url in (shelf.narinfo("hello_drv"), shelf.nar("hello_drv")):
            async with client.get(url) as answer:
                assert answer.status == 200
        for url in (shelf.narinfo("hello"), shelf.nar("hello")):
            async with client.get(url) as answer:
                assert answer.status == 404


async def test_a_valid_path_whose_files_were_removed_is_not_offered(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, hello=b"hello")
    shelf.file("hello").unlink()
    async with served(cache_app(shelf.store, KEY)) as client:
        for url in (shelf.narinfo("hello"), shelf.nar("hello")):
            async with client.get(url) as answer:
                assert answer.status == 404
                assert "its files are gone" in await answer.text()


async def test_a_path_that_cannot_be_read_is_an_error_in_words(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, hello=b"hello")
    shelf.file("hello").unlink()
    os.mkfifo(shelf.file("hello"))
    async with served(cache_app(shelf.store, KEY)) as client, client.get(shelf.nar("hello")) as answer:
        assert answer.status == 500
        assert "a NAR holds only" in await answer.text()


@pytest.mark.parametrize("change", [-BIG // 2, -8, +8, +BIG])
async def test_a_file_of_another_size_than_registered_never_arrives_as_whole(tmp_path: Path, change: int) -> None:
    shelf = Shelf(tmp_path, big=BIG)
    os.truncate(shelf.file("big"), BIG + change)
    async with served(cache_app(shelf.store, KEY)) as client:
        with pytest.raises(aiohttp.ClientError):
            async with client.get(shelf.nar("big")) as answer:
                await answer.read()
        async with client.get("nix-cache-info") as answer:
            assert answer.status == 200
        await until_closed(shelf)


async def test_a_file_cut_while_it_is_sent_never_arrives_as_whole(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, big=BIG)
    async with served(cache_app(shelf.store, KEY)) as client, client.get(shelf.nar("big")) as answer:
        await answer.content.readexactly(1)
        os.truncate(shelf.file("big"), BIG // 2)
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()


async def test_a_client_that_goes_away_gives_its_turn_back_and_leaves_nothing_open(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, big=BIG)
    async with served(cache_app(shelf.store, KEY, max_streams=1)) as client:
        for _ in range(3):
            answer = await client.get(shelf.nar("big"))
            await answer.content.readexactly(1)
            assert len(shelf.open_files()) == 2  # the file and the directory it is in
            answer.close()
            await until_closed(shelf)
        async with client.get(shelf.nar("big")) as answer:
            assert len(await answer.read()) == shelf.infos["big"].nar_size


async def test_transfers_take_turns_in_order_while_narinfos_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(tmp_path, big=BIG, first=b"1", second=BIG)
    asked: list[asyncio.Event] = [asyncio.Event() for _ in ("big", "first", "second")]
    arrivals = iter(asked)

    class Turns(asyncio.Semaphore):
        async def acquire(self) -> Literal[True]:
            next(arrivals).set()
            return await super().acquire()

    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "Semaphore", Turns)
        app = cache_app(shelf.store, KEY, max_streams=1)
    async with served(app) as client:
        done: list[str] = []

        async def fetch(name: str) -> None:
            async with client.get(shelf.nar(name)) as answer:
                assert answer.status == 200
                await answer.read()
            done.append(name)

        async with asyncio.TaskGroup() as waiting, client.get(shelf.nar("big")) as answer:
            await answer.content.readexactly(1)
            for name, is_waiting in zip(("first", "second"), asked[1:], strict=True):
                waiting.create_task(fetch(name))
                await is_waiting.wait()
                async with client.get(shelf.narinfo(name)) as narinfo:
                    assert narinfo.status == 200
            assert done == []
            await answer.read()
        assert done == ["first", "second"]


async def test_a_client_that_stops_reading_loses_its_turn(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, big=BIG, small=b"x")
    async with served(cache_app(shelf.store, KEY, max_streams=1, stall_seconds=0.2)) as client:
        stuck = await client.get(shelf.nar("big"))
        async with client.get(shelf.nar("small")) as answer:
            assert answer.status == 200
        with pytest.raises(aiohttp.ClientError):
            await stuck.read()
        await until_closed(shelf)


async def test_a_locked_database_holds_up_narinfos_and_nothing_else(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, hello=b"hello")
    async with served(cache_app(shelf.store, KEY)) as client:
        with closing(sqlite3.connect(shelf.store.database, isolation_level=None)) as writer:
            writer.execute("BEGIN EXCLUSIVE")
            held_up = asyncio.create_task(client.get(shelf.narinfo("hello")))
            async with client.get("nix-cache-info") as answer:
                assert answer.status == 200
            assert not held_up.done()
            writer.execute("ROLLBACK")
            async with await held_up as answer:
                assert answer.status == 200


async def test_health_follows_the_database(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, hello=b"hello")
    async with served(cache_app(shelf.store, KEY)) as client:
        async with client.get("healthz") as answer:
            assert answer.status == 200
        (shelf.store.state / "db/schema").write_text("11")
        for url in ("healthz", shelf.narinfo("hello"), shelf.nar("hello")):
            async with client.get(url) as answer:
                assert answer.status == 503
                assert "schema '11'" in await answer.text()


async def test_a_path_of_a_store_that_is_not_there_yet_is_just_not_found(tmp_path: Path) -> None:
    app = cache_app(Store.chroot(tmp_path / "later"), KEY)
    async with served(app) as client, client.get("0" * 32 + ".narinfo") as answer:
        assert answer.status == 404


async def test_the_cache_runs_until_cancelled_and_tells_its_port(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, big=BIG)
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        serve_cache(shelf.store, KEY, host="127.0.0.1", port=0, listening=port.set_result),
    )
    async with aiohttp.ClientSession() as client, client.get(f"http://127.0.0.1:{await port}/healthz") as answer:
        assert answer.status == 200
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", await port)


async def test_an_end_in_the_middle_of_a_transfer_closes_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_DRAIN_SECONDS", 0.1)
    shelf = Shelf(tmp_path, big=BIG)
    async with aiohttp.ClientSession() as client:
        async with running_cache(shelf.store, KEY, host="127.0.0.1", port=0) as port:
            answer = await client.get(f"http://127.0.0.1:{port}/{shelf.nar('big')}")
            await answer.content.readexactly(1)
        with pytest.raises(aiohttp.ClientError):
            await answer.read()
    await until_closed(shelf)


async def test_an_address_in_use_is_an_error_at_once(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, hello=b"hello")
    async with running_cache(shelf.store, KEY, host="127.0.0.1", port=0) as port:
        with pytest.raises(OSError, match="address already in use"):
            async with running_cache(shelf.store, KEY, host="127.0.0.1", port=port):
                pass


def test_no_thread_outlives_its_cache(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, hello=b"hello")

    async def use() -> None:
        async with served(cache_app(shelf.store, KEY)) as client, client.get(shelf.nar("hello")) as answer:
            await answer.read()

    before = set(threading.enumerate())
    asyncio.run(use())
    for thread in set(threading.enumerate()) - before:
        thread.join(LIMIT)
    assert set(threading.enumerate()) - before == set()


class Seen:
    """An observer that keeps all it is told."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int]] = []
        self.bytes = 0

    def answered(self, kind: str, code: int) -> None:
        self.requests.append((kind, code))

    def sent(self, size: int) -> None:
        self.bytes += size


async def test_what_is_observed_is_what_was_asked_and_sent(tmp_path: Path) -> None:
    shelf, seen = Shelf(tmp_path, hello=b"hello\n"), Seen()
    async with served(cache_app(shelf.store, KEY, observer=seen)) as client:
        known = shelf.narinfo("hello"), shelf.nar("hello")
        for url in ("nix-cache-info", *known, f"{'1' * 32}.narinfo", "x", "healthz"):
            async with client.get(url) as answer:
                await answer.read()
        async with client.head(shelf.nar("hello")):
            pass
    found = [("info", 200), ("narinfo", 200), ("nar", 200), ("narinfo", 404), ("other", 404), ("healthz", 200)]
    assert seen.requests == [*found, ("nar", 200)]
    assert seen.bytes == shelf.infos["hello"].nar_size


async def test_an_answer_that_is_broken_off_is_not_observed_as_a_good_one(tmp_path: Path) -> None:
    shelf, seen = Shelf(tmp_path, big=BIG, cut=BIG), Seen()
    os.truncate(shelf.file("cut"), BIG // 2)
    async with served(cache_app(shelf.store, KEY, stall_seconds=0.2, observer=seen)) as client:
        async with client.get(shelf.nar("big")) as answer:
            await answer.content.readexactly(1)
            answer.close()
        while len(seen.requests) < 1:
            await asyncio.sleep(0.01)
        with pytest.raises(aiohttp.ClientError):
            async with client.get(shelf.nar("cut")) as answer:
                await answer.read()
        stuck = await client.get(shelf.nar("big"))
        while len(seen.requests) < 3:
            await asyncio.sleep(0.01)
        stuck.close()
    assert seen.requests == [("nar", 499), ("nar", 500), ("nar", 408)]
    assert 0 < seen.bytes < 2 * BIG


async def test_who_does_not_ask_is_gone_while_a_long_download_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_PATIENCE_SECONDS", 0.3)
    shelf = Shelf(tmp_path, big=BIG)
    async with (
        asyncio.timeout(LIMIT),
        running_cache(shelf.store, KEY, host="127.0.0.1", port=0) as port,
        aiohttp.ClientSession(f"http://127.0.0.1:{port}/") as client,
        client.get(shelf.nar("big")) as answer,
    ):
        first = await answer.content.readexactly(1)
        for _ in range(3):  # one after the other: the download lasts longer than any of them
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /nix-cache-info HTTP/1.1\r\nHost: x\r\n")
            assert await reader.read() == b""
            writer.close()
        rest = await answer.read()
        assert len(first + rest) == shelf.infos["big"].nar_size
