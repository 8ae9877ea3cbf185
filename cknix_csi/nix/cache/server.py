"""The HTTP side of the binary cache: narinfos signed as they are asked for, NARs made on the fly.

What is served is decided in one place, :data:`Policy`.  Whoever can reach the cache and knows a path's hash can read
the path; that is how every binary cache works, and 160 bits cannot be guessed.  From one hash a reader can go on only
along ``References``, which is the run-time closure that the holder of the path has anyway.  The one way from a result
back to its sources is its derivation, so the default refuses derivations: it serves what programs run from, not what
they were built from, nor the environment of their build (where people do put passwords).

A node's store must believe the cluster's key and must not remember what was missing a moment ago::

    --option substituters http://<cache>/ --option trusted-public-keys <name>:<base64> --option require-sigs true
    --option narinfo-cache-negative-ttl 0 --option narinfo-cache-positive-ttl 0
    --option connect-timeout 5 --option stalled-download-timeout 30 --option download-attempts 2
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from aiohttp import web

from cknix_csi.api.closure import PathInfo
from cknix_csi.api.errors import CknixError
from cknix_csi.api.storepath import STORE_DIR, StorePath
from cknix_csi.listening import Bounds, listening
from cknix_csi.nix.cache import nar
from cknix_csi.nix.cache.narinfo import CONTENT_TYPE, format_narinfo
from cknix_csi.nix.cache.signing import KeyPair, fingerprint, nar_hash_base32, sign
from cknix_csi.nix.database import path_info
from cknix_csi.nix.store import Store

Policy = Callable[[StorePath], bool]
"""Whether a valid path may be served.  Called in a worker thread, for every narinfo and every NAR."""

MAX_STREAMS = 128
"""NARs sent at once; the others wait their turn in silence, which their clients bear for ``stalled-download-timeout``.
That is why it is high: a shared line is slow but not silent.  Each holds up to three pieces of ``nar.CHUNK`` bytes.
"""
STALL_SECONDS = 60.0
"""How long a client may leave one piece unread before its connection is dropped, so that it cannot keep its turn."""

_READERS = 8  # threads that read files; none of them is held by a slow client
_LOOKUPS = 2  # threads that ask the database, so that narinfos do not queue behind a slow disk
_CONNECTIONS = 2048  # Nix has up to 25 of a node, and keeps them while it looks at what it got
_PATIENCE_SECONDS = 30.0  # for a request, and for the rest of an answer that its client has not taken yet
_DRAIN_SECONDS = 5.0  # what running transfers get at shutdown; their clients begin again elsewhere or later

_DIGIT = "[0-9a-df-np-sv-z]"
_FRESH = {"Cache-Control": "no-store"}  # "not found" is true only until the next build ends; no proxy may keep it

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Observer(Protocol):
    """Told of what the cache does; satisfied by ``metrics.ports.CacheMetrics``."""

    def answered(self, kind: str, code: int) -> None:
        """A request for *kind* was answered with HTTP status *code*."""

    def sent(self, size: int) -> None:
        """So many bytes of a NAR have gone out."""


class _Nobody:
    def answered(self, kind: str, code: int) -> None: ...

    def sent(self, size: int) -> None: ...


_NOBODY = _Nobody()
_CLIENT_LEFT = 499
"""nginx's; nobody hears it."""


class _BrokenOff(Exception):
    """*response* has begun and could not be ended; *code* is the status that would have been the true one."""

    def __init__(self, response: web.StreamResponse, code: int) -> None:
        super().__init__(code)
        self.response = response
        self.code = code


def runtime_paths(path: StorePath) -> bool:
    """The default policy: everything but derivations."""
    return not path.is_derivation


def cache_app(
    store: Store,
    key: KeyPair,
    *,
    allowed: Policy = runtime_paths,
    max_streams: int = MAX_STREAMS,
    stall_seconds: float = STALL_SECONDS,
    observer: Observer = _NOBODY,
) -> web.Application:
    """The cache of *store* as an application; every narinfo is signed by *key*, beside the signatures the store has."""
    readers = ThreadPoolExecutor(_READERS, thread_name_prefix="nar")
    lookups = ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="narinfo")
    cache = _Cache(
        store=store,
        key=key,
        allowed=allowed,
        readers=readers,
        lookups=lookups,
        turns=asyncio.Semaphore(max_streams),
        stall_seconds=stall_seconds,
        observer=observer,
    )

    async def stop_threads(_: web.Application) -> None:
        readers.shutdown(wait=False, cancel_futures=True)
        lookups.shutdown(wait=False, cancel_futures=True)

    app = web.Application()
    app.on_cleanup.append(stop_threads)
    for kind, path, answer in (
        ("healthz", "/healthz", cache.healthy),
        ("info", "/nix-cache-info", cache.about),
        ("narinfo", f"/{{hash:{_DIGIT}{{32}}}}.narinfo", cache.narinfo),
        ("nar", f"/nar/{{hash:{_DIGIT}{{32}}}}-{{nar_hash:{_DIGIT}{{52}}}}.nar", cache.nar),
        ("other", "/{anything:.*}", cache.nothing),
    ):
        app.router.add_get(path, _observed(observer, kind, answer))
    return app


def _observed(
    observer: Observer, kind: str, answer: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        code = web.HTTPInternalServerError.status_code
        try:
            response = await answer(request)
            code = response.status
        except _BrokenOff as broken:
            response, code = broken.response, broken.code
        except web.HTTPException as refusal:
            code = refusal.status
            raise
        except asyncio.CancelledError:
            code = _CLIENT_LEFT
            raise
        finally:
            observer.answered(kind, code)
        return response

    return handle


@asynccontextmanager
async def running_cache(
    store: Store,
    key: KeyPair,
    *,
    host: str,
    port: int,
    allowed: Policy = runtime_paths,
    observer: Observer = _NOBODY,
) -> AsyncIterator[int]:
    """Serve *store* while the block runs; gives the bound port (another than *port* when that is 0).

    Raises OSError when the address cannot be had.
    """
    app = cache_app(store, key, allowed=allowed, observer=observer)
    bounds = Bounds(connections=_CONNECTIONS, patience=_PATIENCE_SECONDS, drain=_DRAIN_SECONDS)
    # A client that is gone gives its turn back at once.
    async with listening(app, host, port, bounds, handler_cancellation=True) as bound:
        _log.info("binary cache listens on %s port %d, key %s", host, bound, key.name)
        yield bound


async def serve_cache(
    store: Store,
    key: KeyPair,
    *,
    host: str,
    port: int,
    allowed: Policy = runtime_paths,
    listening: Callable[[int], None] | None = None,
    observer: Observer = _NOBODY,
) -> None:
    """Serve until cancelled; *listening* gets the bound port once connections are taken.  Raises OSError."""
    async with running_cache(store, key, host=host, port=port, allowed=allowed, observer=observer) as bound:
        if listening is not None:
            listening(bound)
        await asyncio.get_running_loop().create_future()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cache:
    store: Store
    key: KeyPair
    allowed: Policy
    readers: ThreadPoolExecutor
    lookups: ThreadPoolExecutor
    turns: asyncio.Semaphore
    """First come, first served, as asyncio's semaphore is."""
    stall_seconds: float
    observer: Observer

    async def healthy(self, _: web.Request) -> web.Response:
        """Ready when the store's database answers."""
        await self._ask(lambda: path_info(self.store, "0" * 32))
        return web.Response(text="ok\n", headers=_FRESH)

    async def about(self, _: web.Request) -> web.Response:
        """Priority 30: asked before cache.nixos.org, which says 40."""
        return web.Response(
            text=f"StoreDir: {STORE_DIR}\nWantMassQuery: 1\nPriority: 30\n", content_type="text/x-nix-cache-info"
        )

    async def narinfo(self, request: web.Request) -> web.Response:
        text = await self._ask(partial(self._signed, request.match_info["hash"]))
        return web.Response(text=text, content_type=CONTENT_TYPE, headers=_FRESH)

    async def nar(self, request: web.Request) -> web.StreamResponse:
        info = await self._ask(partial(self._named, request.match_info["hash"], request.match_info["nar_hash"]))
        response = web.StreamResponse(headers={"Content-Type": "application/x-nix-nar"})
        response.content_length = info.nar_size
        if request.method == "HEAD":
            return response
        async with self.turns:
            await self._send(info, request, response)
        return response

    async def nothing(self, request: web.Request) -> web.Response:
        raise _not_found(
            f"{request.path} is not here; this cache answers /nix-cache-info, /<hash>.narinfo and a narinfo's URL"
        )

    def _signed(self, hash_part: str) -> str:
        info = self._found(hash_part)
        own = sign(self.key.secret, fingerprint(info))
        return format_narinfo(info, dict.fromkeys((own, *info.signatures)))

    def _named(self, hash_part: str, nar_hash: str) -> PathInfo:
        info = self._found(hash_part)
        if nar_hash_base32(info) != nar_hash:
            raise _not_found(f"{info.path} has other content now; ask for {hash_part}.narinfo again")
        return info

    def _found(self, hash_part: str) -> PathInfo:
        """What the database says now.  Raises the answer "not found"; the file system is asked too, in case that
        somebody removed files behind Nix's back: a client can still turn to another cache as long as it has no narinfo.
        """
        info = path_info(self.store, hash_part)
        if info is None or not self.allowed(info.path):
            raise _not_found(f"no path with hash {hash_part} is valid in this cache's store, or it is not served")
        try:
            self.store.physical_path(info.path).lstat()
        except FileNotFoundError:
            raise _not_found(f"{info.path} is valid in this cache's store, but its files are gone") from None
        return info

    async def _ask(self, question: Callable[[], _T]) -> _T:
        """Run *question* in a worker thread."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.lookups, question)
        except (CknixError, sqlite3.Error, OSError, ValueError) as error:
            _log.error("the store %s cannot be read: %s", self.store.uri, error)
            raise web.HTTPServiceUnavailable(text=f"the store cannot be read: {error}\n", headers=_FRESH) from error

    async def _send(self, info: PathInfo, request: web.Request, response: web.StreamResponse) -> None:
        """Send exactly ``nar_size`` bytes, or break the connection: no client may take a part for the whole.

        Raises _BrokenOff then, and HTTPInternalServerError where nothing has been sent yet.
        """
        try:
            async with aclosing(self._pieces(info)) as pieces:
                async for piece in pieces:
                    if not response.prepared:  # as late as this, since an error after it cannot be a status any more
                        await response.prepare(request)
                    async with asyncio.timeout(self.stall_seconds):
                        await response.write(piece)
                    self.observer.sent(len(piece))
        except nar.NarUnreadable as error:
            _log.error("cannot serve %s: %s", info.path, error)
            if not response.prepared:
                raise web.HTTPInternalServerError(text=f"{error}\n", headers=_FRESH) from error
            _break(request)
            raise _BrokenOff(response, web.HTTPInternalServerError.status_code) from error
        except TimeoutError:
            _log.warning("%s took nothing of %s for %g s", request.remote, info.path, self.stall_seconds)
            _break(request)
            raise _BrokenOff(response, web.HTTPRequestTimeout.status_code) from None
        except ConnectionError:
            _log.debug("%s went away from %s", request.remote, info.path)
            raise _BrokenOff(response, _CLIENT_LEFT) from None

    async def _pieces(self, info: PathInfo) -> AsyncGenerator[bytes, None]:
        """The NAR of *info*, read in worker threads one piece ahead of what the client has taken.

        A thread is used for the time of one read only: a slow client holds none, and transfers get their reads in turn.
        Ends only when the last read has ended and every file is closed.
        """
        loop = asyncio.get_running_loop()
        dump = nar.dump_of_size(self.store.physical_path(info.path), info.nar_size)
        ahead = loop.run_in_executor(self.readers, next, dump, b"")
        try:
            # Shielded, since cancelling the future would not stop the thread, only hide when it is done.
            while piece := await asyncio.shield(ahead):
                ahead = loop.run_in_executor(self.readers, next, dump, b"")
                yield piece
        finally:
            await asyncio.wait([ahead])
            if not ahead.cancelled():
                ahead.exception()  # seen: whoever ends this early does not want it
            dump.close()


def _not_found(text: str) -> web.HTTPNotFound:
    return web.HTTPNotFound(text=f"{text}\n", headers=_FRESH)


def _break(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
