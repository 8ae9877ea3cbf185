"""What kubelet asks a controller that may be waiting for its turn."""

from __future__ import annotations

import socket

import aiohttp
import pytest

from cknix_csi.controller.health import alive


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


async def test_it_lives_for_as_long_as_the_block() -> None:
    port = free_port()
    async with aiohttp.ClientSession() as client:
        async with alive(("127.0.0.1", port)), client.get(f"http://127.0.0.1:{port}/livez") as answer:
            assert answer.status == 200
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.get(f"http://127.0.0.1:{port}/livez")


async def test_a_port_that_is_taken_is_an_error_and_not_silence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="address already in use"):
        async with alive(("127.0.0.1", taken.getsockname()[1])):
            pass
