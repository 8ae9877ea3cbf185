"""Closures of any shape: what the database says is reachable is what a plain search finds, and so is what is copied."""

from __future__ import annotations

import itertools
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cknix_csi.api.closure import PathInfo
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import database
from cknix_csi.nix.store import Store

BASE32 = "0123456789abcdfghijklmnpqrsvwxyz"

Graph = dict[StorePath, set[StorePath]]

graphs = st.integers(1, 12).flatmap(
    lambda count: st.lists(
        st.sets(st.integers(0, count - 1), max_size=4), min_size=count, max_size=count
    )  # what each refers to, itself and others in a circle included
)
details: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "nar_hash": st.text("0123456789abcdef", min_size=64, max_size=64).map(lambda digest: f"sha256:{digest}"),
        "nar_size": st.integers(0, 2**60),
        "deriver": st.none() | st.just("/nix/store/00000000000000000000000000000000-x.drv"),
        "registration_time": st.integers(0, 2**40),
        "ultimate": st.booleans(),
        "signatures": st.lists(st.sampled_from(["a-1:c2ln", "b:c2ln", "cache.example.org-1:c2ln"]), unique=True).map(
            tuple
        ),
        "content_address": st.none() | st.just("fixed:r:sha256:" + "0" * 52),
    }
)


def path(number: int) -> StorePath:
    digits = "".join(BASE32[number // 32**place % 32] for place in range(4))
    return StorePath("0" * 28 + digits, f"path-{number}")


def reachable(graph: Graph, root: StorePath) -> set[StorePath]:
    found, pending = {root}, [root]
    while pending:
        new = graph[pending.pop()] - found
        found |= new
        pending += new
    return found


def require_copied(store: Store, graph: Graph, root: StorePath, infos: dict[StorePath, PathInfo]) -> None:
    """The closure and its own database are what they must be, row by row."""
    expected = reachable(graph, root)
    closure = database.query_closure(store, root)
    assert [member.path for member in closure.paths] == sorted(expected)
    assert closure.nar_size == sum(infos[each].nar_size for each in expected)
    with tempfile.TemporaryDirectory() as copied:
        database.write_database(store, closure, Path(copied))
        with closing(sqlite3.connect(f"file:{copied}/db.sqlite?mode=ro", uri=True)) as opened:
            rows = opened.execute(
                "SELECT path, hash, narSize, deriver, ultimate, sigs, ca FROM ValidPaths ORDER BY path"
            ).fetchall()
            edges = opened.execute(
                "SELECT a.path, b.path FROM Refs, ValidPaths a, ValidPaths b WHERE a.id = referrer AND b.id = reference"
            ).fetchall()
            assert opened.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert opened.execute("PRAGMA foreign_key_check").fetchall() == []
    assert [row[0] for row in rows] == [str(each) for each in sorted(expected)]
    for name, nar_hash, size, deriver, ultimate, signatures, content_address in rows:
        info = infos[StorePath.parse(name)]
        assert (nar_hash, size or 0, deriver, bool(ultimate), content_address) == (
            info.nar_hash,
            info.nar_size,
            info.deriver,
            info.ultimate,
            info.content_address,
        )
        assert tuple((signatures or "").split()) == info.signatures
    assert sorted(edges) == sorted((str(a), str(b)) for a in expected for b in graph[a])


@given(edges=graphs, data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_closure_is_what_can_be_reached_and_its_database_holds_that_alone(
    edges: list[set[int]], data: st.DataObject
) -> None:
    graph = {path(number): {path(other) for other in others} for number, others in enumerate(edges)}
    infos = {
        each: PathInfo(each, references=tuple(sorted(references)), **data.draw(details))
        for each, references in graph.items()
    }
    with tempfile.TemporaryDirectory() as directory:
        store = Store.chroot(Path(directory))
        database.register(store, list(infos.values()))
        for root in graph:
            require_copied(store, graph, root, infos)


@pytest.mark.parametrize("shape", ["chain", "fan", "all with all of 60"])
def test_2500_paths_are_one_closure_however_deep_or_wide(tmp_path: Path, shape: str) -> None:
    count = 60 if shape.startswith("all") else 2500
    every = [path(number) for number in range(count)]
    graph: Graph
    if shape == "chain":
        graph = {each: {below} for each, below in itertools.pairwise(every)} | {every[-1]: set()}
    elif shape == "fan":
        graph = {each: set() for each in every} | {every[0]: set(every[1:])}
    else:
        graph = {each: set(every) for each in every}
    infos = {
        each: PathInfo(each, f"sha256:{'0' * 64}", number + 1, tuple(sorted(graph[each])))
        for number, each in enumerate(every)
    }
    store = Store.chroot(tmp_path)
    database.register(store, list(infos.values()))
    require_copied(store, graph, every[0], infos)
