"""What a process tells Prometheus and kubelet's probes."""

from __future__ import annotations

import asyncio
import socket

import aiohttp
from prometheus_client.core import Sample
from prometheus_client.parser import text_string_to_metric_families

SECOND = 1.0
"""What kubelet gives a probe."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


class Asked:
    """The HTTP side of a process at *port*."""

    def __init__(self, client: aiohttp.ClientSession, port: int) -> None:
        self._client = client
        self._url = f"http://127.0.0.1:{port}"

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text; status 0 while nobody listens."""
        try:
            async with asyncio.timeout(SECOND), self._client.get(self._url + path) as answer:
                return answer.status, await answer.text()
        except aiohttp.ClientConnectionError:
            return 0, ""

    async def becomes(self, path: str, status: int) -> str:
        """Wait until *path* is answered with *status*; gives the text."""
        async with asyncio.timeout(30):
            while (answer := await self.get(path))[0] != status:
                await asyncio.sleep(0.01)
        return answer[1]

    async def samples(self) -> list[Sample]:
        status, text = await self.get("/metrics")
        assert status == 200
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    async def values(self, name: str) -> dict[tuple[str, ...], float]:
        """Samples that are not 0, by the values of their labels in alphabetical order."""
        found = [each for each in await self.samples() if each.name == name and each.value]
        return {tuple(each.labels.values()): each.value for each in found}

    async def value(self, name: str) -> float:
        return (await self.values(name)).get((), 0.0)
