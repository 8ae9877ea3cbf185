"""Writes the status of one Expression: the newest wins, progress at most once a second, an outage is waited out."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from cknix_csi.kube.api import JSON_PATCH, NOT_FOUND, UNPROCESSABLE, Api, ApiError, Json, expressions
from cknix_csi.kube.backoff import Backoff
from cknix_csi.kube.events import Subject

PROGRESS_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Superseded(Exception):
    """The object is gone, is another one of the same name, or has a newer generation: this status is nobody's."""


class StatusWriter:
    """The only writer of the status of *subject* while it is at *generation*."""

    def __init__(self, api: Api, subject: Subject, generation: int) -> None:
        self._api = api
        self._subject = subject
        self._generation = generation
        self._wanted: Json | None = None
        self._urgent = asyncio.Event()
        self._any = asyncio.Event()
        self._written = asyncio.Event()

    def put(self, status: Json, *, urgent: bool = True) -> None:
        """Have *status* written, soon; what is not *urgent* may be skipped for something newer."""
        self._wanted = status
        self._written.clear()
        self._any.set()
        if urgent:
            self._urgent.set()

    async def flush(self) -> None:
        """Wait until what was put last is written."""
        if self._wanted is not None:
            await self._written.wait()

    async def run(self) -> None:
        """Write until cancelled.  Raises :class:`Superseded`."""
        backoff = Backoff(first=0.5, cap=30.0)
        while True:
            await self._any.wait()
            self._any.clear()
            self._urgent.clear()
            status = self._wanted
            assert status is not None
            try:
                await self._write(status)
            except ApiError as error:
                _log.warning("status of %s: %s", self._subject, error.message)
                self._any.set()
                await asyncio.sleep(backoff.next())
                continue
            backoff.reset()
            if self._wanted is status:
                self._written.set()
            try:
                async with asyncio.timeout(PROGRESS_SECONDS):
                    await self._urgent.wait()
            except TimeoutError:
                pass

    async def _write(self, status: Json) -> None:
        namespace, name = self._subject.namespace, self._subject.name
        # A JSON patch replaces the whole status, and its tests keep a late write from landing on a newer object.
        patch: list[dict[str, Any]] = [
            {"op": "test", "path": "/metadata/uid", "value": self._subject.uid},
            {"op": "test", "path": "/metadata/generation", "value": self._generation},
            {"op": "add", "path": "/status", "value": status},
        ]
        try:
            await self._api.patch(expressions(namespace, name, status=True), patch, kind=JSON_PATCH)
        except ApiError as error:
            if error.status == NOT_FOUND:
                raise Superseded from None
            if error.status != UNPROCESSABLE:
                raise
            # A failed test and a status that the schema refuses have the same code.
            if await self._changed():
                raise Superseded from None
            raise

    async def _changed(self) -> bool:
        try:
            found = await self._api.get(expressions(self._subject.namespace, self._subject.name))
        except ApiError as error:
            if error.status == NOT_FOUND:
                return True
            raise
        metadata = found.get("metadata") or {}
        return metadata.get("uid") != self._subject.uid or metadata.get("generation") != self._generation
