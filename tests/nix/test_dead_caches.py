"""Caches of nix.conf that are dead, broken or slow beside the cluster's own: it alone decides, and soon."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.cache.signing import generate_key
from cknix_csi.nix.substituters import CacheEndpoint
from tests.nix.cache_process import cache_process
from tests.nix.room import Room
from tests.nixes import NixEnv, NixVersion

KEY = generate_key("cknix-cache-1")
SLOW = 1.0
"""Seconds that a slow cache takes for each answer."""


@contextmanager
def web_server(answer: Callable[[str], tuple[int, str]]) -> Iterator[str]:
    """The URL of a server that gives *answer* (code and body) to each path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = answer(self.path)
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def nobody() -> Iterator[str]:
    """Where nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def failing(path: str) -> tuple[int, str]:
    return 503, path


def half(path: str) -> tuple[int, str]:
    """It says what it is, and fails after that."""
    if path.endswith("nix-cache-info"):
        return 200, "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n"
    return 503, path


def slow(path: str) -> tuple[int, str]:
    time.sleep(SLOW)
    return half(path) if path.endswith("nix-cache-info") else (404, path)


@contextmanager
def named(url: str) -> Iterator[str]:
    yield url


NEIGHBOURS: dict[str, Callable[[], AbstractContextManager[str]]] = {
    "nobody listens": nobody,
    "every answer is 503": lambda: web_server(failing),
    "503 after its greeting": lambda: web_server(half),
    "slow": lambda: web_server(slow),
    "ssh to nobody": lambda: named("ssh://no-such-cache.invalid"),
}


@pytest.fixture(scope="module")
def source(nix: NixVersion, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NixEnv, str]]:
    """A store behind the cluster's cache, and what is fetched from it."""
    env = NixEnv(nix, tmp_path_factory.mktemp("source"))
    expression = 'builtins.toFile "top" "refers to ${builtins.toFile "below" "nothing"}"'
    text = env.run("nix-instantiate", "--eval", "--read-write-mode", "--expr", expression).stdout
    yield env, text.strip().strip('"')
    env.destroy()


@pytest.mark.parametrize("neighbour", NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
async def test_a_cache_of_nix_conf_that_fails_keeps_no_closure_of_the_cluster_away(
    nix_env: NixEnv,
    monkeypatch: pytest.MonkeyPatch,
    source: tuple[NixEnv, str],
    tmp_path: Path,
    neighbour: Callable[[], AbstractContextManager[str]],
) -> None:
    env, path = source
    with cache_process(env.root, KEY) as cache, neighbour() as url:
        nix_env.configure(substituters=url)
        room = Room(nix_env, monkeypatch)
        began = time.monotonic()
        await room.nix().substitute(
            StorePath.parse(path), [CacheEndpoint(cache.url, cache.public_key)], progress=lambda _: None
        )
        took = time.monotonic() - began
        print(f"{took:.1f} s")
        assert room.closure(path) == sorted(env.lines("nix-store", "-qR", path))
    assert took < 20
