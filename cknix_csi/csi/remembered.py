"""Last known results of Expressions, for the time when no API server answers and this process has not seen them yet.

Kept in one small file below the data root, for the Expressions that volumes of this node have used::

    {"version": 1, "system": "x86_64-linux", "results": {"default/hello": "/nix/store/…-hello"}}

A file that cannot be read, or is of another version or system, is as good as none.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from cknix_csi.api.attributes import FromExpression
from cknix_csi.api.storepath import InvalidStorePath, StorePath
from cknix_csi.finishing import finish

log = logging.getLogger(__name__)

_VERSION = 1
_MOST = 1000
"""Results that are kept; the longest known go first."""


class RememberedResults:
    """Results by Expression, in memory and in *file*; reads and changes in memory cost nothing."""

    def __init__(self, file: Path, system: str) -> None:
        self._file = file
        self._system = system
        self._results: dict[str, StorePath] = {}
        self._changed = asyncio.Event()

    def get(self, expression: FromExpression) -> StorePath | None:
        """The last result that was kept."""
        return self._results.get(str(expression))

    def keep(self, expression: FromExpression, result: StorePath) -> None:
        """*result* is what the API server says now."""
        key = str(expression)
        if self._results.get(key) == result:
            return
        self._results.pop(key, None)
        self._results[key] = result
        while len(self._results) > _MOST:
            del self._results[next(iter(self._results))]
        self._changed.set()

    def forget(self, expression: FromExpression) -> None:
        """The API server says that there is no such Expression."""
        if self._results.pop(str(expression), None) is not None:
            self._changed.set()

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """The file is read before the block, and follows every change inside it."""
        self._results = await asyncio.to_thread(self._load)
        writing = asyncio.create_task(self._write_changes(), name="remembered results")
        try:
            yield
        finally:
            writing.cancel()
            await asyncio.wait({writing})
            if self._changed.is_set():
                await self._write()

    async def _write_changes(self) -> None:
        while True:
            await self._changed.wait()
            await self._write()

    async def _write(self) -> None:
        self._changed.clear()
        await finish(asyncio.to_thread(self._save, {key: str(path) for key, path in self._results.items()}))

    def _load(self) -> dict[str, StorePath]:
        try:
            content = json.loads(self._file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read: %s", self._file, error)
            return {}
        if not isinstance(content, dict) or content.get("version") != _VERSION or content.get("system") != self._system:
            return {}
        kept = content.get("results")
        results: dict[str, StorePath] = {}
        for key, path in kept.items() if isinstance(kept, dict) else ():
            with suppress(InvalidStorePath):
                results[str(key)] = StorePath.parse(str(path))
        return results

    def _save(self, results: dict[str, str]) -> None:
        content = json.dumps({"version": _VERSION, "system": self._system, "results": results}, indent=1)
        beside = self._file.with_name(f"{self._file.name}.new")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "w", encoding="utf-8", opener=_private) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._file)
        except OSError as error:
            # Only the next outage would miss it.
            log.warning("%s cannot be written: %s", self._file, error)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
