"""Pods in a user namespace of their own: their runtime id-maps the volume, which no overlay survives."""

from __future__ import annotations

import json

from tests.cluster import driver
from tests.cluster.harness import Cluster


def shown(cluster: Cluster, name: str) -> dict[str, str]:
    """What is mounted at /nix in a pod: its type, its options there, and what part of its file system it is."""
    lines = driver.in_pod(cluster, name, "cat", "/proc/self/mountinfo").splitlines()
    fields = next(line.split() for line in lines if line.split()[4] == "/nix")
    return {"root": fields[3], "options": fields[5], "type": fields[fields.index("-") + 1]}


def digest(cluster: Cluster, name: str) -> str:
    """Of metadata and content of all store paths on the node of a pod, but for access times."""
    node = driver.node_of(cluster, name)
    metadata = "find . -printf '%p %y %m %U:%G %T@ %l\\n'"
    content = "find . -type f -exec sha256sum {} +"
    return node.exec(["sh", "-c", f"cd /var/lib/cknix/nix/store && ({metadata}; {content}) | sort | sha256sum"])


def test_a_pod_with_a_user_namespace_gets_a_farm_without_asking_and_runs_from_it(
    installed: Cluster, applied: driver.Apply
) -> None:
    cluster = installed
    applied(driver.expression("hello", driver.demo("hello")))
    path = driver.built(cluster, "hello")
    applied(driver.pod("shifted", {"expression": "hello"}, host_users=False))
    driver.running(cluster, "shifted")

    inside, outside, _ = driver.in_pod(cluster, "shifted", "cat", "/proc/self/uid_map").split()
    assert (inside, outside) != ("0", "0"), "a pod of the host's users shows nothing"
    mount = shown(cluster, "shifted")
    assert mount["root"].endswith(f"/farms/{path.removeprefix('/nix/store/')}/tree/nix")
    assert mount["type"] != "overlay"
    assert {"ro", "nosuid", "nodev"} <= set(mount["options"].split(","))
    assert driver.in_pod(cluster, "shifted", "/nix/var/result/bin/hello").startswith(f"Hello from {path}")
    # The node's root, whose files these are, is the pod's root, and still may not write.
    assert driver.in_pod(cluster, "shifted", "stat", "-c", "%u:%g", "/nix/store").split() == ["0:0"]
    listed = driver.in_pod(cluster, "shifted", "ls", "/nix/store").split()
    node = driver.node_of(cluster, "shifted")
    assert {f"/nix/store/{name}" for name in listed} == driver.closure(cluster, node, path)
    writes = "touch /nix/store/x 2>&1; chmod 777 /nix/store 2>&1; true"
    refused = driver.in_pod(cluster, "shifted", "sh", "-c", writes)
    assert refused.count("Read-only file system") == 2

    told = json.loads(driver.on_daemon(cluster, node, "cknix-csi", "probe", "--json"))
    assert {"kind": "read-only, hostUsers: false", "presentation": "hardlink"}.items() <= told["volumes"][3].items()
    assert driver.in_pod(cluster, "shifted", "/nix/var/result/bin/hello").startswith(f"Hello from {path}")

    applied(driver.pod("privileged", {"expression": "hello"}, host_users=False, privileged=True))
    driver.running(cluster, "privileged")
    before = digest(cluster, "privileged")
    attack = (
        "mkdir /y && mount --bind /nix /y; for at in /nix /y; do mount -o remount,bind,rw $at; touch $at/store/x; done"
    )
    refused = driver.in_pod(cluster, "privileged", "sh", "-c", f"({attack}) 2>&1; true")
    assert refused.count("permission denied") == refused.count("Read-only file system") == 2
    assert digest(cluster, "privileged") == before


def test_a_writable_volume_in_a_user_namespace_is_refused_and_the_way_out_works(
    installed: Cluster, applied: driver.Apply
) -> None:
    cluster = installed
    applied(driver.expression("hello", driver.demo("hello")))
    path = driver.built(cluster, "hello")
    applied(driver.pod("refused", {"expression": "hello"}, read_only=False, host_users=False))
    cluster.wait("the refusal is told", lambda: "FailedMount" in driver.events(cluster, "refused"), timeout=60)
    told = cluster.kubectl("describe", "pod", "refused")
    assert "a writable volume cannot be had this way" in told
    assert "`hostUsers: false`" in told
    assert "`presentation: copy`" in told

    attributes = {"expression": "hello", "presentation": "copy"}
    applied(driver.pod("writer", attributes, read_only=False, host_users=False))
    driver.running(cluster, "writer")
    before = digest(cluster, "writer")
    program = f"{path}/bin/hello"
    driver.in_pod(
        cluster, "writer", "sh", "-c", f"chmod u+w {program} && echo echo changed > {program} && touch /nix/store/x"
    )
    assert driver.in_pod(cluster, "writer", "sh", "/nix/var/result/bin/hello") == "changed\n"
    assert driver.in_pod(cluster, "writer", "stat", "-c", "%u:%g", "/nix/store/x") == "0:0\n"
    assert digest(cluster, "writer") == before
    cluster.wait("the cost is told", lambda: "VolumeCopied" in driver.events(cluster, "writer"), timeout=30)
    event = next(line for line in driver.events(cluster, "writer").splitlines() if line.startswith("VolumeCopied"))
    assert f'volume "nix" is a private copy of {path}' in event
    assert "copied (" in event or "shared with the store)" in event

    cluster.kubectl("delete", "pod", "writer", "refused", "--now")
    cluster.kubectl("delete", "expr", "hello")
    driver.assert_nothing_left(cluster)


def test_the_examples_work(installed: Cluster) -> None:
    cluster = installed
    for example in ("expression.yaml", "hostusers.yaml", "sizelimit.yaml"):
        cluster.apply(driver.EXAMPLES / example)
    path = driver.built(cluster, "hello")
    assert driver.printed(cluster, "hello-hostusers").startswith(f"Hello from {path}")
    said = driver.printed(cluster, "hello-sizelimit").splitlines()
    assert "No space left on device" in said[0]
    assert 15 << 10 < int(said[1].split()[0]) <= 17 << 10
    assert said[2].startswith(f"Hello from {path}")
    for example in ("sizelimit.yaml", "hostusers.yaml", "expression.yaml"):
        cluster.delete(driver.EXAMPLES / example)
    driver.assert_nothing_left(cluster)
