"""What must not be left on a node, or in the cluster, once the last pod and the last Expression have gone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.chaos.parts import DAEMON, Part, helpers, parts, process
from tests.cluster import driver
from tests.cluster.harness import Cluster, WaitTimeout
from tests.cluster.harness.node import Node

DATA_ROOT = "/var/lib/cknix"
PATIENCE = 60.0
OBJECTS = "pods,expressions.cknix.cool,persistentvolumeclaims,persistentvolumes"
STATE = {"ledger.sqlite", "ledger.sqlite-shm", "ledger.sqlite-wal", "results.json", "cache.json"}
QUERY = """
import os, sqlite3, sys
for first, *_ in sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True, timeout=10).execute(sys.argv[2]):
    print(first if isinstance(first, str) else os.fsdecode(first))
"""


def require_none(cluster: Cluster) -> None:
    """Nothing is left; what takes a moment (deletions in the background, the ledger's next write) is waited for."""
    found: list[str] = []

    def clean() -> bool:
        found[:] = all_of(cluster)
        return not found

    try:
        cluster.wait("nothing is left", clean, timeout=PATIENCE)
    except WaitTimeout as error:
        listed = "\n".join(found)
        raise AssertionError(f"left:\n{listed}\n{error}") from None


def all_of(cluster: Cluster) -> list[str]:
    """Everything that is left, a line each."""
    found = parts(cluster)
    return [*objects(cluster), *(thing for node in cluster.nodes for thing in on(node, found))]


def objects(cluster: Cluster) -> list[str]:
    """Objects of users, also those that only a finalizer keeps, and records of volumes of claims."""
    items = [
        *cluster.get(OBJECTS, "--all-namespaces")["items"],
        *cluster.get("configmaps", "--all-namespaces", "--selector", "cknix.cool/volume")["items"],
    ]
    return [
        f"{item['kind']} {item['metadata'].get('namespace', '')}/{item['metadata']['name']}, "
        f"finalizers {item['metadata'].get('finalizers', [])}"
        for item in items
        if item["metadata"].get("namespace") != driver.SYSTEM
    ]


def on(node: Node, found: list[Part]) -> list[str]:
    """What of volumes and fetches is on *node*."""
    left = driver.left_on(node)
    daemon = process(found, DAEMON, node)
    things = [
        *(f"mount {target}" for target in left.mounts),
        *(f"mount {target}, in the daemon's namespace" for target in mounts_of(daemon) if target not in left.mounts),
        *(f"directory {path}" for path in left.directories),
        *(f"GC root {path}" for path in left.roots),
        *(f"volume of kubelet {path}" for path in driver.volume_directories(node)),
        *(f"file {path}" for path in stray_files(node)),
        *(f"process {process}" for process in helpers(found, node)),
        *(f"row of the ledger {row}" for row in ledger(node)),
    ]
    return [f"{node.name}: {thing}" for thing in things]


def mounts_of(pid: int) -> list[str]:
    """Mount points of overlays of ours that process *pid* sees."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return [line.split(" ")[4] for line in lines if " cknix:" in line]


def stray_files(node: Node) -> list[str]:
    """What is beside the files that a data root has, and what is in its stores without being registered there."""
    state = node.inside(f"{DATA_ROOT}/state")
    strange = [
        str(path)
        for path in (state.iterdir() if state.is_dir() else ())
        # What a later version has left is kept on purpose.
        if path.name not in STATE and not path.name.startswith("ledger.sqlite.schema-")
    ]
    return [*strange, *(path for store in (DATA_ROOT, f"{DATA_ROOT}/controller") for path in unregistered(node, store))]


def unregistered(node: Node, root: str) -> list[str]:
    """Store paths of the store below *root* that its database does not know."""
    store, database = f"{root}/nix/store", f"{root}/nix/var/nix/db/db.sqlite"
    if not node.inside(store).exists():
        return []
    present = {name for name in os.listdir(node.inside(store)) if name[0] != "." and not name.endswith(".lock")}
    known = {os.path.basename(path) for path in rows(node, database, "SELECT path FROM ValidPaths")}
    return [f"{store}/{name}" for name in sorted(present - known)]


def ledger(node: Node) -> list[str]:
    """What the ledger says is published."""
    return rows(node, f"{DATA_ROOT}/state/ledger.sqlite", "SELECT target FROM publications")


def rows(node: Node, database: str, query: str) -> list[str]:
    """The first column of what *query* finds in an SQLite *database* of *node*; nothing where there is none.

    On the node: SQLite follows links by itself, and does not get through from here to what is inside.
    """
    if not node.inside(database).exists():
        return []
    return node.exec([sys.executable, "-c", QUERY, database, query]).splitlines()
