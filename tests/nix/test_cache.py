"""The cache with real Nix on both sides: Nix fills the store, and Nix is the client that believes or refuses."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cknix_csi.api.closure import PathInfo
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.cache import base32, nar
from cknix_csi.nix.cache.narinfo import nar_url
from cknix_csi.nix.cache.signing import KeyPair, fingerprint, generate_key, sign
from cknix_csi.nix.database import path_info, register
from cknix_csi.nix.store import Store
from tests import nixes
from tests.nix.cache_process import Served, cache_process
from tests.nix.cache_relay import relay
from tests.nixes import NixEnv, NixVersion

KEY = generate_key("cknix-cache-1")
# What a node sets; see the module docstring of cknix_csi/nix/cache/server.py.
NODE = {
    "require_sigs": "true",
    "narinfo_cache_negative_ttl": "0",
    "narinfo_cache_positive_ttl": "0",
    "connect_timeout": "2",
    "stalled_download_timeout": "30",
    "download_attempts": "2",
    "max_jobs": "0",
}
MEBIBYTE = 1024 * 1024


@dataclass(frozen=True)
class Source:
    """A store with two results in it: *result* is small, *shapes* has every kind of object and refers to *result*."""

    env: NixEnv
    result: str
    shapes: str

    @property
    def store(self) -> Store:
        return Store.chroot(self.env.root)

    def closure(self, path: str) -> list[str]:
        return sorted(self.env.lines("nix-store", "--query", "--requisites", path))

    def library(self) -> Path:
        """A file in the path that everything refers to."""
        (path,) = (path for path in self.closure(self.result) if path.endswith("-library"))
        return self.env.physical(path) / "lib/data"


@pytest.fixture(scope="module")
def source(nix: NixVersion, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    env = NixEnv(nix, tmp_path_factory.mktemp("source"))
    env.configure(sandbox_paths=f"/bin/busybox={nixes.host_busybox()}")
    result, shapes = env.lines("nix-build", "--no-out-link", Path(__file__).with_name("cache_source.nix"))
    yield Source(env, result, shapes)
    env.destroy()


@pytest.fixture(scope="module")
def cache(source: Source) -> Iterator[Served]:
    with cache_process(source.env.root, KEY) as served:
        yield served


MakeClient = Callable[..., NixEnv]


@pytest.fixture
def client(nix: NixVersion, tmp_path: Path) -> Iterator[MakeClient]:
    """Makes nodes: each with an empty store, its own memory of caches, and the settings of a node."""
    made: list[NixEnv] = []

    def make(url: str, key: str = KEY.public, **options: str) -> NixEnv:
        env = NixEnv(nix, tmp_path / f"client-{len(made)}")
        env.configure(substituters=url, trusted_public_keys=key, **{**NODE, **options})
        made.append(env)
        return env

    yield make
    for env in made:
        env.destroy()


def fetch(node: NixEnv, path: str) -> subprocess.CompletedProcess[str]:
    return node.run("nix-store", "--realise", path, check=False)


def registered(node: NixEnv) -> set[str]:
    """All valid paths, by Nix."""
    return set(node.lines("nix", "path-info", "--all"))


def assert_whole(node: NixEnv, source: Source, path: str) -> None:
    """*node* has exactly the closure of *path*, every byte of it as it was registered where it was built."""
    assert registered(node) == set(source.closure(path))
    node.run("nix-store", "--verify", "--check-contents")
    for each in source.closure(path):
        hashes = [env.lines("nix-store", "--query", "--hash", each) for env in (node, source.env)]
        assert hashes[0] == hashes[1]


@pytest.fixture
def damaged(source: Source) -> Iterator[Path]:
    """The library's file, writable for the test and restored after it."""
    file = source.library()
    content = file.read_bytes()
    file.chmod(0o644)
    yield file
    file.write_bytes(content)
    file.chmod(0o444)


# -- what arrives


def test_a_closure_is_substituted_whole(client: MakeClient, cache: Served, source: Source) -> None:
    node = client(cache.url)
    assert fetch(node, source.result).returncode == 0
    assert_whole(node, source, source.result)
    assert node.physical(f"{source.result}/bin/program").is_symlink()


def test_a_closure_is_copied_whole(client: MakeClient, cache: Served, source: Source) -> None:
    node = client("")
    node.run("nix", "copy", "--from", cache.url, source.result, store=None, environ={"NIX_REMOTE": node.store})
    assert_whole(node, source, source.result)


def test_every_shape_of_file_arrives(client: MakeClient, cache: Served, source: Source) -> None:
    node = client(cache.url)
    assert fetch(node, source.shapes).returncode == 0
    assert_whole(node, source, source.shapes)
    difference = subprocess.run(
        ["diff", "--recursive", "--no-dereference", source.env.physical(source.shapes), node.physical(source.shapes)],
        capture_output=True,
        check=False,
    )
    assert (difference.returncode, difference.stdout) == (0, b"")


def test_nix_reads_in_the_narinfo_what_the_store_has(client: MakeClient, cache: Served, source: Source) -> None:
    node = client(cache.url)

    def described(store: str) -> dict[str, object]:
        text = node.run("nix", "path-info", "--json", source.result, store=store).stdout
        answer = json.loads(text)
        (info,) = answer if isinstance(answer, list) else answer.values()
        return {name: info.get(name) for name in ("path", "narHash", "narSize", "references", "deriver", "ca")}

    assert described(cache.url) == described(source.env.store)


def test_the_signature_stays_with_the_path_so_that_a_node_can_pass_it_on(
    client: MakeClient, cache: Served, source: Source
) -> None:
    first, second = client(cache.url), client("")
    assert fetch(first, source.result).returncode == 0
    first.run("nix", "store", "verify", "--recursive", "--sigs-needed", "1", source.result)
    second.run("nix", "copy", "--from", first.store, source.result, store=None, environ={"NIX_REMOTE": second.store})
    assert_whole(second, source, source.result)


@pytest.mark.one_nix
def test_twenty_nodes_at_once_get_it_whole(client: MakeClient, cache: Served, source: Source) -> None:
    nodes = [client(cache.url) for _ in range(20)]
    with ThreadPoolExecutor(len(nodes)) as threads:
        runs = list(threads.map(lambda node: fetch(node, source.result), nodes))
    assert [run.stderr for run in runs if run.returncode] == []
    for node in nodes:
        assert registered(node) == set(source.closure(source.result))
        node.run("nix-store", "--verify", "--check-contents")


# -- what is refused


@pytest.mark.parametrize("trusted", ["", generate_key(KEY.name).public], ids=["no key", "another key of that name"])
def test_a_path_without_a_trusted_signature_is_refused(
    client: MakeClient, cache: Served, source: Source, trusted: str
) -> None:
    node = client(cache.url, trusted)
    run = fetch(node, source.result)
    assert run.returncode != 0
    assert "signed by any of the keys in 'trusted-public-keys'" in run.stderr
    assert registered(node) == set()


def test_copying_without_a_trusted_signature_is_refused(client: MakeClient, cache: Served, source: Source) -> None:
    node = client("", "")
    run = node.run(
        "nix", "copy", "--from", cache.url, source.result, store=None, check=False, environ={"NIX_REMOTE": node.store}
    )
    assert run.returncode != 0
    assert "because it lacks a" in run.stderr
    assert registered(node) == set()


def test_a_flipped_bit_on_the_caches_disk_is_refused(
    client: MakeClient, cache: Served, source: Source, damaged: Path
) -> None:
    content = bytearray(damaged.read_bytes())
    content[0] ^= 1
    damaged.write_bytes(content)
    node = client(cache.url)
    run = fetch(node, source.result)
    assert run.returncode != 0
    assert "hash mismatch importing path" in run.stderr
    assert registered(node) == set()


@pytest.mark.parametrize("content", [b"", b"x" * 1000], ids=["shorter", "longer"])
def test_a_file_of_another_size_on_the_caches_disk_is_refused(
    client: MakeClient, cache: Served, source: Source, damaged: Path, content: bytes
) -> None:
    damaged.write_bytes(content)
    node = client(cache.url)
    run = fetch(node, source.result)
    assert run.returncode != 0
    # A NAR that is well formed but too short is whole for Nix's parser, which is faster than the broken connection.
    assert "hash mismatch" in run.stderr or "unable to download" in run.stderr
    assert registered(node) == set()


def test_derivations_are_not_served(client: MakeClient, cache: Served, source: Source) -> None:
    (derivation,) = source.env.lines("nix-store", "--query", "--deriver", source.result)
    assert path_info(source.store, StorePath.parse(derivation).hash) is not None
    node = client(cache.url)
    assert fetch(node, derivation).returncode != 0
    assert registered(node) == set()


# -- what goes wrong on the way


def test_a_path_that_the_cache_does_not_have_is_told_so(client: MakeClient, cache: Served) -> None:
    run = fetch(client(cache.url), f"/nix/store/{'z' * 32}-missing")
    assert run.returncode != 0
    assert f"{'z' * 32}-missing" in run.stderr
    assert "unable to download" not in run.stderr


def test_a_path_asked_for_too_early_is_found_as_soon_as_it_is_there(
    nix: NixVersion, client: MakeClient, tmp_path: Path
) -> None:
    env = NixEnv(nix, tmp_path / "source")
    (tmp_path / "hello").write_text("hello")
    (path,) = env.lines("nix-store", "--add", tmp_path / "hello")
    env.run("nix-store", "--delete", path)
    with cache_process(env.root, KEY) as cache:
        node = client(cache.url)
        assert fetch(node, path).returncode != 0
        env.run("nix-store", "--add", tmp_path / "hello")
        assert fetch(node, path).returncode == 0
    env.destroy()


def test_a_path_collected_after_its_narinfo_was_read_is_gone_and_not_served_wrong(
    nix: NixVersion, tmp_path: Path
) -> None:
    env = NixEnv(nix, tmp_path / "source")
    (tmp_path / "hello").write_text("hello")
    (path,) = env.lines("nix-store", "--add", tmp_path / "hello")
    info = path_info(Store.chroot(env.root), StorePath.parse(path).hash)
    assert info is not None
    with cache_process(env.root, KEY) as cache:

        async def status() -> int:
            async with aiohttp.ClientSession() as session, session.get(f"{cache.url}/{nar_url(info)}") as answer:
                return answer.status

        assert asyncio.run(status()) == 200
        env.run("nix-store", "--delete", path)
        assert asyncio.run(status()) == 404
    env.destroy()


def test_a_cache_that_is_down_fails_within_seconds_and_by_name(client: MakeClient, source: Source) -> None:
    with socket.socket() as held:  # bound, so that nobody else can listen there
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        run = fetch(client(url), source.result)
    assert run.returncode != 0
    assert f"unable to download '{url}/nix-cache-info'" in run.stderr


@pytest.mark.one_nix
def test_a_cache_that_was_killed_is_used_again_once_it_is_back(
    client: MakeClient, source: Source, tmp_path: Path
) -> None:
    with cache_process(source.env.root, KEY) as first:
        node = client(first.url)
        (library,) = (path for path in source.closure(source.result) if path.endswith("-library"))
        assert fetch(node, library).returncode == 0
    run = fetch(node, source.result)
    assert run.returncode != 0
    assert f"unable to download '{first.url}/" in run.stderr
    assert ".narinfo" in run.stderr  # the node remembers nix-cache-info, so that is not where it fails
    with cache_process(source.env.root, KEY, port=first.port):
        assert fetch(node, source.result).returncode == 0
    assert_whole(node, source, source.result)


def test_a_line_that_breaks_in_the_middle_registers_nothing_and_the_next_try_succeeds(
    client: MakeClient, cache: Served, source: Source
) -> None:
    with relay(cache.port, after=20 * MEBIBYTE) as url:
        node = client(url)
        run = fetch(node, source.shapes)
        assert run.returncode != 0
        assert f"unable to download '{url}/nar/" in run.stderr
        assert source.shapes not in registered(node)
        node.run("nix-store", "--verify", "--check-contents")
    node.configure(substituters=cache.url)
    assert fetch(node, source.shapes).returncode == 0
    assert_whole(node, source, source.shapes)


# -- what it costs


def test_a_big_path_is_never_held_in_memory(tmp_path: Path) -> None:
    store = Store.chroot(tmp_path)
    path = StorePath("0" * 32, "big")
    store.physical.mkdir(parents=True)
    store.database.parent.mkdir(parents=True)
    block = os.urandom(MEBIBYTE)
    with store.physical_path(path).open("wb") as file:
        for _ in range(200):
            file.write(block)
    digest = hashlib.sha256()
    for piece in nar.dump(store.physical_path(path)):
        digest.update(piece)
    info = PathInfo(path, f"sha256:{digest.hexdigest()}", 200 * MEBIBYTE + 112, ())
    register(store, [info])

    async def download(url: str) -> str:
        digest = hashlib.sha256()
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            async for received in answer.content.iter_any():
                digest.update(received)
        return f"sha256:{digest.hexdigest()}"

    async def downloads(url: str) -> list[str]:
        return await asyncio.gather(*(download(url) for _ in range(4)))

    with cache_process(tmp_path, KEY) as cache:
        before = cache.resident_bytes()
        assert asyncio.run(downloads(f"{cache.url}/{nar_url(info)}")) == [info.nar_hash] * 4
        assert cache.resident_bytes("VmHWM") - before < 32 * MEBIBYTE


# -- the formats, against Nix's own tools


_names = st.binary(min_size=1, max_size=12).filter(
    lambda name: name not in {b".", b".."} and not set(name) & set(b"/\0")
)
_leaves = st.one_of(
    st.tuples(st.just("file"), st.binary(max_size=40) | st.integers(nar.CHUNK - 9, nar.CHUNK + 9), st.booleans()),
    st.tuples(st.just("link"), st.binary(min_size=1, max_size=40).filter(lambda target: b"\0" not in target)),
)
_trees = st.recursive(_leaves, lambda below: st.dictionaries(_names, below, max_size=5), max_leaves=12)


# Python sorts text by code point, and a byte that is not UTF-8 as one below U+E000; Nix sorts bytes.
_SORTED_BY_BYTES = [b"a", b"B", b"a b", b"a.b", b"a-", b"\xff", "\ue000".encode(), "\U00010000".encode(), b"\xc3"]


def plant(tree: object, at: bytes) -> None:
    match tree:
        case dict():
            os.mkdir(at)
            for name, below in tree.items():
                plant(below, at + b"/" + name)
        case ("link", bytes(target)):
            os.symlink(target, at)
        case ("file", content, executable):
            with open(at, "wb") as file:
                if isinstance(content, int):
                    file.truncate(content)
                elif isinstance(content, bytes):
                    file.write(content)
            os.chmod(at, 0o755 if executable else 0o644)


@pytest.mark.one_nix
def test_a_dump_is_nixs_dump_byte_for_byte(nix: NixVersion, tmp_path: Path) -> None:
    env = NixEnv(nix, tmp_path / "env")
    count = 0

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(_trees)
    @example({name: ("file", name, False) for name in _SORTED_BY_BYTES})
    def same(tree: object) -> None:
        nonlocal count
        count += 1
        path = tmp_path / f"tree-{count}"
        plant(tree, os.fsencode(path))
        oracle = subprocess.run(
            [nix.program("nix-store"), "--dump", path], capture_output=True, check=True, env=env.environ
        )
        assert b"".join(nar.dump(path)) == oracle.stdout

    same()
    assert count >= 60


@pytest.mark.one_nix
def test_a_dump_of_all_modes_of_a_file_is_nixs(nix: NixVersion, tmp_path: Path) -> None:
    env = NixEnv(nix, tmp_path / "env")
    tree = tmp_path / "tree"
    tree.mkdir()
    for mode in (0o444, 0o555, 0o600, 0o611, 0o700, 0o4755, 0o100, 0o010, 0o001):
        (tree / f"{mode:o}").touch()
        (tree / f"{mode:o}").chmod(mode)
    oracle = subprocess.run(
        [nix.program("nix-store"), "--dump", tree], capture_output=True, check=True, env=env.environ
    )
    assert b"".join(nar.dump(tree)) == oracle.stdout


@pytest.mark.one_nix
def test_base32_is_nixs_for_the_lengths_that_nix_has(nix_env: NixEnv) -> None:
    for algorithm in ("md5", "sha1", "sha256", "sha512"):
        for data in (b"", b"a", b"cknix"):
            digest = hashlib.new(algorithm, data, usedforsecurity=False).digest()
            (text,) = nix_env.run(
                "nix-hash", "--type", algorithm, "--to-base32", digest.hex(), store=None
            ).stdout.split()
            assert base32.encode(digest) == text
            assert base32.decode(text) == digest


def test_a_key_that_nix_made_is_read_and_its_public_half_agrees(nix_env: NixEnv) -> None:
    secret, public = nix_env.directory / "secret", nix_env.directory / "public"
    nix_env.run("nix-store", "--generate-binary-cache-key", "from-nix-1", secret, public, store=None)
    assert KeyPair.from_secret(secret.read_text()).public == public.read_text()


def test_a_key_of_ours_is_used_by_nix_and_both_sign_alike(source: Source, nix: NixVersion, tmp_path: Path) -> None:
    key = generate_key("from-cknix-1")
    secret = tmp_path / "secret"
    secret.write_text(key.secret)
    source.env.run("nix", "store", "sign", "--recursive", "--key-file", secret, source.result)
    paths = source.closure(source.result)
    assert len(paths) == 4
    for path in paths:
        info = path_info(source.store, StorePath.parse(path).hash)
        assert info is not None
        assert sign(key.secret, fingerprint(info)) in info.signatures
