"""Expressions change, fail and are late: running pods notice nothing, new ones get what is right or hear why not."""

from __future__ import annotations

import time

from tests.cluster import driver
from tests.cluster.harness import Cluster


def test_an_update_reaches_new_pods_and_leaves_old_ones_alone(installed: Cluster, applied: driver.Apply) -> None:
    cluster = installed
    applied(driver.expression("changing", driver.demo('greet "first"')))
    first = driver.built(cluster, "changing")
    applied(driver.pod("old", {"expression": "changing"}, node="node-0"))
    driver.running(cluster, "old")

    cluster.apply(driver.expression("changing", driver.demo('greet "second"')))
    second = cluster.wait(
        "the result changes", lambda: (path := driver.result(cluster, "changing")) != first and path, timeout=60
    )
    applied(driver.pod("new", {"expression": "changing"}, node="node-0"))
    driver.running(cluster, "new")

    assert driver.in_pod(cluster, "old", "readlink", "/nix/var/result").strip() == first
    assert driver.in_pod(cluster, "new", "readlink", "/nix/var/result").strip() == second
    assert "first" in driver.in_pod(cluster, "old", "/nix/var/result/bin/hello")
    assert "second" in driver.in_pod(cluster, "new", "/nix/var/result/bin/hello")


def test_a_failed_rebuild_keeps_the_last_good_result(installed: Cluster, applied: driver.Apply) -> None:
    cluster = installed
    applied(driver.expression("fragile", driver.demo("hello")))
    good = driver.built(cluster, "fragile")
    cluster.apply(driver.expression("fragile", driver.demo("broken")))
    cluster.wait("it fails", lambda: driver.phase(cluster, "fragile") == "Failed", timeout=60)

    assert driver.result(cluster, "fragile") == good
    described = cluster.kubectl("describe", "expr", "fragile")
    assert "cknix-demo: this package is broken on purpose" in described
    ready = 'jsonpath={.status.conditions[?(@.type=="Ready")].status}'
    assert cluster.kubectl("get", "expr", "fragile", "-o", ready) == "True"
    applied(driver.pod("still", {"expression": "fragile"}, "/nix/var/result/bin/hello"))
    assert driver.printed(cluster, "still").startswith(f"Hello from {good}")


def test_a_pod_of_a_broken_expression_hears_nixs_own_words(installed: Cluster, applied: driver.Apply) -> None:
    cluster = installed
    applied(driver.expression("typo", "(import <cknix-demo> {}).helo"))
    cluster.wait("it fails", lambda: driver.phase(cluster, "typo") == "Failed", timeout=60)
    assert "attribute 'helo' missing" in cluster.kubectl("describe", "expr", "typo")

    applied(driver.pod("waits-in-vain", {"expression": "typo"}))
    said = cluster.wait(
        "the pod's Events say why",
        lambda: text if "FailedMount" in (text := driver.events(cluster, "waits-in-vain")) else "",
        timeout=60,
    )
    assert "default/typo" in said
    assert "attribute 'helo' missing" in said

    # Mended, the pod that has been waiting starts by itself.
    cluster.apply(driver.expression("typo", "(import <cknix-demo> {}).hello"))
    driver.running(cluster, "waits-in-vain", timeout=120)


def test_a_pod_that_was_there_first_starts_within_3_s_of_the_builds_end(
    installed: Cluster, applied: driver.Apply
) -> None:
    cluster = installed
    applied(driver.expression("late", driver.demo('slow { seconds = 8; tag = "late"; }')))
    applied(driver.pod("early", {"expression": "late"}, node="node-1"))
    cluster.wait("the build goes on", lambda: driver.phase(cluster, "late") == "Running", timeout=30)
    assert cluster.phase("early") == "Pending"
    cluster.wait("the build ends", lambda: driver.phase(cluster, "late") == "Succeeded", timeout=60)
    ended = time.monotonic()
    driver.running(cluster, "early", timeout=30)
    took = time.monotonic() - ended
    assert took < 3, f"the pod ran {took:.1f} s after the build"
    assert "WaitingForExpression: " in driver.events(cluster, "early"), "it was not told meanwhile what it waits for"


def test_deleting_an_expression_in_the_middle_of_its_build_leaves_nothing(installed: Cluster) -> None:
    cluster = installed
    manifest = driver.expression("gone", driver.demo('slow { seconds = 600; tag = "gone"; }'))
    cluster.apply(manifest)
    cluster.wait("the build goes on", lambda: driver.phase(cluster, "gone") == "Running", timeout=30)
    cluster.delete(manifest)
    assert cluster.get("expr")["items"] == []
    pod = driver.controller_pod(cluster)

    def builders() -> str:
        script = 'for c in /proc/[0-9]*/comm; do cat $c; done 2>/dev/null | grep -E "^(nix|busybox|sleep)" || true'
        return cluster.kubectl("exec", "-n", driver.SYSTEM, pod, "--", "sh", "-c", script)

    cluster.wait("no process of the build is left", lambda: builders().strip() == "", timeout=20)
