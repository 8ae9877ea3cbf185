"""What a user sees of a mistake: a pod's Events and an Expression's description name it and say what to do."""

from __future__ import annotations

import pytest

from tests.cluster import driver
from tests.cluster.harness import Cluster, CommandFailed

ATTRIBUTES = {
    "a misspelt attribute": (
        {"expresion": "hello"},
        'volume attribute "expresion": is not known; did you mean "expression"?',
    ),
    "two sources": (
        {"expression": "hello", "storePath": "/nix/store/00000000000000000000000000000000-x"},
        'volume attribute "expression": cannot stand beside "storePath"',
    ),
    "a malformed store path": (
        {"storePath": "/nix/store/hello"},
        "volume attribute \"storePath\": '/nix/store/hello' is not a store path: the hash must be 32 characters",
    ),
    "no source": ({}, "volume attributes: no source given"),
    "another namespace": (
        {"expression": "hello", "namespace": "kube-system"},
        "an inline volume can only use an Expression of its own namespace",
    ),
    "an Expression that does not exist": (
        {"expression": "nowhere"},
        'Expression "default/nowhere" does not exist; create it or correct the volume attribute "expression"',
    ),
}

EXPRESSIONS = {
    "a syntax error": ("{ a = ", "syntax error, unexpected end of file"),
    "a number": (driver.demo("notAPackage"), "evaluates to a value of type int; it must evaluate to a derivation"),
    "a set": ("{ a = 1; b = 2; }", "evaluates to a set with the attributes a, b"),
    "a file of the controller": (
        "builtins.readFile /var/run/secrets/kubernetes.io/serviceaccount/token",
        "is forbidden in restricted mode",
    ),
    "a build that fails": (driver.demo("broken"), "this package is broken on purpose"),
}


@pytest.mark.parametrize("case", ATTRIBUTES)
def test_the_pod_says_what_is_wrong_with_its_volume(installed: Cluster, applied: driver.Apply, case: str) -> None:
    attributes, message = ATTRIBUTES[case]
    applied(driver.pod("mistaken", attributes, node="node-0"))
    installed.wait(f"the Events name {case}", lambda: message in driver.events(installed, "mistaken"), timeout=60)
    assert not driver.left_on(installed.node("node-0"))


@pytest.mark.parametrize("case", EXPRESSIONS)
def test_the_expression_says_what_is_wrong_with_it(installed: Cluster, applied: driver.Apply, case: str) -> None:
    text, message = EXPRESSIONS[case]
    applied(driver.expression("mistaken", text))
    installed.wait("it fails", lambda: driver.phase(installed, "mistaken") == "Failed", timeout=60)
    assert message in installed.kubectl("describe", "expr", "mistaken")
    assert driver.result(installed, "mistaken") == ""


def test_an_expression_with_two_sources_is_refused_at_once(installed: Cluster) -> None:
    manifest = driver.expression("mistaken", "1") + "    storePath: /nix/store/00000000000000000000000000000000-x\n"
    with pytest.raises(CommandFailed, match="exactly one of"):
        installed.apply(manifest)


def test_a_build_that_never_ends_is_stopped_and_says_so(installed: Cluster, applied: driver.Apply) -> None:
    cluster = installed
    deployment = ("-n", driver.SYSTEM, "deployment/cknix-controller")
    cluster.kubectl("set", "env", *deployment, "CKNIX_BUILD_TIMEOUT=5s")
    driver.rolled_out(cluster)
    try:
        applied(driver.expression("endless", driver.demo('slow { seconds = 3600; tag = "endless"; }')))
        cluster.wait("it fails", lambda: driver.phase(cluster, "endless") == "Failed", timeout=60)
        described = cluster.kubectl("describe", "expr", "endless")
        assert "did not end within 5s and was stopped" in described
        assert "CKNIX_BUILD_TIMEOUT" in described
    finally:
        cluster.kubectl("set", "env", *deployment, "CKNIX_BUILD_TIMEOUT-")
        driver.rolled_out(cluster)


def test_a_cache_that_is_down_is_named_and_recovery_needs_nobody(installed: Cluster, applied: driver.Apply) -> None:
    cluster = installed
    applied(driver.expression("unreachable", driver.demo('greet "from a cache that was down"')))
    driver.built(cluster, "unreachable")
    deployment = ("-n", driver.SYSTEM, "deployment/cknix-controller")
    cluster.kubectl("scale", *deployment, "--replicas=0")
    cluster.kubectl(
        "wait", "-n", driver.SYSTEM, "--for=delete", f"pod/{driver.controller_pod(cluster)}", "--timeout=60s"
    )
    try:
        applied(driver.pod("thirsty", {"expression": "unreachable"}, "/nix/var/result/bin/hello", node="node-0"))
        cluster.wait(
            "the Events name the cache",
            lambda: "http://cknix-cache.cknix-system.svc could not deliver it" in driver.events(cluster, "thirsty"),
            timeout=90,
        )
    finally:
        cluster.kubectl("scale", *deployment, "--replicas=1")
    assert "from a cache that was down" in driver.printed(cluster, "thirsty", timeout=150)
