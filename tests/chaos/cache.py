"""The way from the nodes to the binary cache, which a scenario breaks: the Service leads to a relay, or nowhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster import driver
from tests.cluster.harness import Cluster
from tests.cluster.image import recipe

RELAY = "chaos-relay"
ORIGIN = "chaos-origin"
SCRIPT = Path(__file__).with_name("relay.py")
SERVICE = ("service", "cknix-cache", "-n", driver.SYSTEM)
OBJECTS = f"""\
apiVersion: v1
kind: Service
metadata: {{name: {ORIGIN}, namespace: {driver.SYSTEM}}}
spec:
  selector: {{app.kubernetes.io/name: cknix, app.kubernetes.io/component: controller}}
  ports: [{{port: 80, targetPort: cache}}]
---
apiVersion: v1
kind: Pod
metadata: {{name: {RELAY}, namespace: {driver.SYSTEM}, labels: {{app: {RELAY}}}}}
spec:
  nodeName: node-0
  terminationGracePeriodSeconds: 0
  containers:
  - name: relay
    image: {recipe.REFERENCE}
    command: [sh, -c, "echo pass > /mode; exec python3 /chaos/relay.py http://{ORIGIN}.{driver.SYSTEM}.svc"]
    ports: [{{name: cache, containerPort: 8080}}]
    readinessProbe: {{tcpSocket: {{port: cache}}, periodSeconds: 1}}
    volumeMounts: [{{name: script, mountPath: /chaos}}]
  volumes: [{{name: script, configMap: {{name: {RELAY}}}}}]
"""


def install(cluster: Cluster) -> None:
    """Put the relay into the cluster; nothing leads to it yet.  `ready` says when it works."""
    cluster.kubectl("create", "configmap", RELAY, "-n", driver.SYSTEM, f"--from-file={SCRIPT}")
    cluster.apply(OBJECTS)


def ready(cluster: Cluster) -> None:
    cluster.kubectl("wait", "-n", driver.SYSTEM, "--for=condition=Ready", f"pod/{RELAY}", "--timeout=60s", timeout=70)


@contextmanager
def gone(cluster: Cluster) -> Iterator[None]:
    """Whoever connects to the cache is refused."""
    with _led_to(cluster, {"app": "nothing"}):
        yield


@contextmanager
def treated(cluster: Cluster, mode: str) -> Iterator[None]:
    """What the cache answers goes through the relay, which treats it as *mode* says."""
    _tell(cluster, mode)
    try:
        with _led_to(cluster, {"app": RELAY}):
            yield
    finally:
        _tell(cluster, "pass")


def _tell(cluster: Cluster, mode: str) -> None:
    cluster.kubectl("exec", "-n", driver.SYSTEM, RELAY, "--", "sh", "-c", f"echo {mode} > /mode")


@contextmanager
def _led_to(cluster: Cluster, selector: dict[str, str]) -> Iterator[None]:
    before = cluster.get(*SERVICE)["spec"]["selector"]
    _select(cluster, {**dict.fromkeys(before), **selector})
    try:
        yield
    finally:
        _select(cluster, {**dict.fromkeys(selector), **before})


def _select(cluster: Cluster, selector: dict[str, str | None]) -> None:
    """Returns when the rules of all nodes follow: each connects to what is behind the Service, or is refused."""
    cluster.kubectl("patch", *SERVICE, "--type=merge", "-p", json.dumps({"spec": {"selector": selector}}))
    wanted = ",".join(f"{key}={value}" for key, value in selector.items() if value)
    pods = cluster.get("pods", "-n", driver.SYSTEM, "-l", wanted)["items"]
    expected = {pod["status"].get("podIP", "") for pod in pods}
    address = cluster.get(*SERVICE)["spec"]["clusterIP"]

    def led() -> bool:
        return all(_behind(node.exec(["iptables-save", "-t", "nat"]), address) == expected for node in cluster.nodes)

    cluster.wait(f"the cache's Service leads to {wanted}", led, timeout=60)


def _behind(rules: str, address: str) -> set[str]:
    """Addresses of the pods to which kube-proxy leads connections to the Service at *address*, by its own rules."""
    named = '"cknix-system/cknix-cache:http'
    mine = [line for line in rules.splitlines() if named in line and "--to-destination" in line]
    return {line.rpartition("--to-destination ")[2].partition(":")[0] for line in mine}
