"""What must not be left on a node, or in the cluster, once the last pod and the last Expression have gone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.chaos.workload import main_process
from tests.cluster import driver
from tests.cluster.harness import Cluster, CommandFailed, WaitTimeout
from tests.cluster.harness.node import Node

DATA_ROOT = "/var/lib/cknix"
PATIENCE = 60.0
OBJECTS = "pods,expressions.cknix.cool,persistentvolumeclaims"
STATE = {"ledger.sqlite", "ledger.sqlite-shm", "ledger.sqlite-wal", "results.json", "cache.json"}
VALID_PATHS = """
import sqlite3, sys
for row in sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True, timeout=10).execute("SELECT path FROM ValidPaths"):
    print(*row)
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
    return [*objects(cluster), *(thing for node in cluster.nodes for thing in on(cluster, node))]


def objects(cluster: Cluster) -> list[str]:
    """Objects of users, also those that only a finalizer keeps."""
    items = cluster.get(OBJECTS, "--all-namespaces")["items"]
    volumes = cluster.get("persistentvolumes")["items"]
    return [
        f"{item['kind']} {item['metadata'].get('namespace', '')}/{item['metadata']['name']}, "
        f"finalizers {item['metadata'].get('finalizers', [])}"
        for item in (*items, *volumes)
        if item["metadata"].get("namespace") != driver.SYSTEM
    ]


def on(cluster: Cluster, node: Node) -> list[str]:
    """What of volumes and fetches is on *node*."""
    left = driver.left_on(node)
    daemon = process_of(cluster, node, driver.daemon_pod(cluster, node))
    found = [
        *(f"mount {target}" for target in left.mounts),
        *(f"mount {target}, in the daemon's namespace" for target in mounts_of(daemon) if target not in left.mounts),
        *(f"directory {path}" for path in left.directories),
        *(f"GC root {path}" for path in left.roots),
        *(f"volume of kubelet {path}" for path in driver.volume_directories(node)),
        *(f"file {path}" for path in stray_files(node)),
        *(f"process {process}" for process in helpers(cluster, node)),
        *(f"row of the ledger {row}" for row in ledger(cluster, node)),
    ]
    return [f"{node.name}: {thing}" for thing in found]


def process_of(cluster: Cluster, node: Node, pod: str) -> int:
    return main_process(node, uid_of(cluster, pod))


def uid_of(cluster: Cluster, pod: str) -> str:
    return cluster.kubectl("get", "pod", pod, "-n", driver.SYSTEM, "-o", "jsonpath={.metadata.uid}")


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
    if not node.inside(database).exists():
        return []
    present = {name for name in os.listdir(node.inside(store)) if name[0] != "." and not name.endswith(".lock")}
    # On the node: SQLite follows links by itself, and does not get through to what is inside from here.
    known = node.exec([sys.executable, "-c", VALID_PATHS, database]).split()
    return [f"{store}/{name}" for name in sorted(present - {os.path.basename(path) for path in known})]


def helpers(cluster: Cluster, node: Node) -> list[str]:
    """Processes of the daemon's and the controller's pods on *node* besides the programs themselves."""
    pods = cluster.get("pods", "-n", driver.SYSTEM, "--field-selector", f"spec.nodeName={node.name}")["items"]
    programs = ("cknix-csi", "/pause", "csi-provisioner")
    found = []
    for pod in pods:
        for pid in node.pod_processes(pod["metadata"]["uid"]):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if not any(program in command for program in (*programs, "relay.py")):
                found.append(f"{pid} of {pod['metadata']['name']}: {command or 'a zombie'}")
    return found


def ledger(cluster: Cluster, node: Node) -> list[str]:
    """What the ledger says is published."""
    try:
        listed = json.loads(driver.on_daemon(cluster, node, "cknix-csi", "volumes", "--json"))
    except CommandFailed as failed:
        return [str(failed)]
    return [json.dumps(row) for row in listed]
