"""Clients that are many, slow or no HTTP clients at all, over real sockets."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from cknix_csi.listening import Bounds, listening
from cknix_csi.settings import ANY

LIMIT = 20.0
LONG = 3600.0
HALF = b"GET / HTTP/1.1\r\nHost: x\r\n"
WHOLE = HALF + b"\r\n"
BIG = 16 << 20


def bounds(connections: int = 100, patience: float = LONG) -> Bounds:
    return Bounds(connections=connections, patience=patience, drain=0.1)


@asynccontextmanager
async def served(given: Bounds, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """``/`` answers at once, ``/slow`` after a second, ``/big`` with more than any buffer holds; ``/bug`` fails."""

    async def ok(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(1.0)
        return web.Response(text="ok")

    async def big(_: web.Request) -> web.Response:
        return web.Response(body=bytes(BIG))

    async def bug(_: web.Request) -> web.Response:
        raise KeyError("kind")

    app = web.Application()
    for path, handler in (("/", ok), ("/slow", slow), ("/big", big), ("/bug", bug)):
        app.router.add_get(path, handler)
    async with asyncio.timeout(LIMIT), listening(app, host, 0, given) as port:
        yield port


async def opened(
    port: int, sent: bytes = b"", *, source: str = "127.0.0.1"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    writer.write(sent)
    return reader, writer


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What still comes until the other side has closed."""
    found = b""
    try:
        while piece := await reader.read(1 << 16):
            found += piece
    except ConnectionResetError:
        pass
    return found


def sockets() -> int:
    """How many this process has open."""
    links = (os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
    return sum(link.startswith("socket:") for link in links)


@pytest.mark.parametrize("sent", [b"", b"G", HALF], ids=["nothing", "a letter", "half"])
async def test_who_does_not_ask_in_time_is_gone(sent: bytes) -> None:
    async with served(bounds(patience=0.2)) as port:
        before = sockets()
        clients = [await opened(port, sent) for _ in range(30)]
        for reader, writer in clients:
            assert await rest(reader) == b""
            writer.close()
            await writer.wait_closed()
        assert sockets() == before


async def test_headers_that_come_in_drops_do_not_gain_time() -> None:
    async with served(bounds(patience=0.5)) as port:
        reader, writer = await opened(port, HALF)

        async def drop() -> None:
            while True:
                writer.write(b"a: b\r\n")
                await asyncio.sleep(0.05)

        dropping = asyncio.create_task(drop())
        assert await rest(reader) == b""
        dropping.cancel()
        writer.close()


async def test_a_connection_may_be_used_again_and_does_not_stay_for_ever() -> None:
    async with served(bounds(patience=0.5)) as port:
        reader, writer = await opened(port, WHOLE)
        assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200")
        writer.write(WHOLE)
        assert (await rest(reader)).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_an_answer_may_take_as_long_as_it_takes() -> None:
    async with served(bounds(patience=0.2)) as port:
        reader, writer = await opened(port, WHOLE.replace(b"/ ", b"/slow ", 1))
        assert (await rest(reader)).endswith(b"\r\n\r\nok")
        writer.close()


async def test_an_answer_that_nobody_takes_is_broken_off() -> None:
    async with served(bounds(patience=0.5)) as port:
        before = sockets()
        _, writer = await opened(port, WHOLE.replace(b"/ ", b"/big ", 1))
        transport = writer.transport
        assert isinstance(transport, asyncio.ReadTransport)
        transport.pause_reading()
        for expected in (before + 2, before + 1):  # first the server's and ours, then only ours
            while sockets() != expected:
                await asyncio.sleep(0.01)
        writer.transport.abort()


async def test_one_too_many_takes_the_place_of_one_that_has_not_asked() -> None:
    async with served(bounds(connections=8)) as port:
        before = sockets()
        clients = [await opened(port, HALF) for _ in range(40)]
        reader, writer = await opened(port, WHOLE)
        assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200")
        assert [len(await rest(reader)) for reader, _ in clients[:33]] == [0] * 33
        assert sockets() <= before + 41 + 8
        for _, writer in clients:
            writer.transport.abort()


async def test_a_flood_from_one_address_takes_no_place_of_another() -> None:
    async with served(bounds(connections=8)) as port:
        reader, writer = await opened(port, source="127.0.0.2")
        clients = [await opened(port, WHOLE.replace(b"/ ", b"/slow ", 1)) for _ in range(40)]
        writer.write(WHOLE)
        assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200")
        answers = [await asyncio.create_task(reader.read(4)) for reader, _ in clients if not reader.at_eof()]
        assert answers.count(b"HTTP") == 7
        for _, each in clients:
            each.transport.abort()


async def test_never_more_than_half_of_the_descriptors_are_for_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10, 20))
    async with served(bounds(connections=100)) as port:
        clients = [await opened(port, HALF) for _ in range(6)]
        assert await rest(clients[0][0]) == b""
        clients[1][1].write(b"\r\n")
        assert (await clients[1][0].readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200")
        for _, writer in clients:
            writer.transport.abort()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\na: " + b"x" * 20_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        WHOLE + b"\x00\x01\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_refused_and_not_logged(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with served(bounds(patience=1.0)) as port:
        reader, writer = await opened(port, sent)
        assert b"HTTP/1." in await rest(reader)
        writer.close()
        async with aiohttp.ClientSession() as client, client.get(f"http://127.0.0.1:{port}/") as answer:
            assert answer.status == 200
    assert [record.getMessage() for record in caplog.records] == []


async def test_a_bug_of_ours_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        served(bounds()) as port,
        aiohttp.ClientSession() as client,
        client.get(f"http://127.0.0.1:{port}/bug") as answer,
    ):
        assert answer.status == 500
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize("both", [True, False])
async def test_any_is_ipv6_and_ipv4_or_what_there_is(both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not both:
        monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    elif not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    async with served(bounds(), ANY) as port, aiohttp.ClientSession() as client:
        for address in ("127.0.0.1", "[::1]")[: 1 + both]:
            async with client.get(f"http://{address}:{port}/") as answer:
                assert answer.status == 200


async def test_a_port_that_is_taken_is_an_error_also_for_any() -> None:
    async with served(bounds(), ANY) as port:
        with pytest.raises(OSError, match="ddress already in use"):
            async with listening(web.Application(), ANY, port, bounds()):
                pass
