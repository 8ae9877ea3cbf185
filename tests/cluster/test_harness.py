"""The test cluster itself: is it a real one, and does it leave nothing behind?"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.cluster import driver
from tests.cluster.harness import Cluster, CommandFailed, WaitTimeout, cgroups
from tests.cluster.harness.command import run
from tests.cluster.harness.scratch import reap, scratch_base
from tests.cluster.image import recipe
from tests.cluster.image.build import BUSYBOX_IMAGE, PROJECT, build_busybox_image, build_pause_image


def pod(name: str, node: str, command: str, *, image: str = BUSYBOX_IMAGE, spec: str = "") -> str:
    """A pod on a given node that runs a shell command; *spec* is more of its specification."""
    return textwrap.dedent(f"""\
        ---
        apiVersion: v1
        kind: Pod
        metadata: {{name: {name}, labels: {{app: {name}}}}}
        spec:
          nodeName: {node}
          restartPolicy: Never
          terminationGracePeriodSeconds: 0
          {spec}
          containers:
          - {{name: main, image: "{image}", command: [sh, -c, '{command}']}}
        """)


def service(name: str, port: int) -> str:
    """A service in front of the pod of the same name, which listens on *port*."""
    return textwrap.dedent(f"""\
        ---
        apiVersion: v1
        kind: Service
        metadata: {{name: {name}}}
        spec: {{selector: {{app: {name}}}, ports: [{{port: 80, targetPort: {port}}}]}}
        """)


def printed_by(cluster: Cluster, name: str) -> str:
    """What a pod printed, once it has ended well."""
    cluster.wait(f"pod {name} succeeds", lambda: cluster.phase(name) == "Succeeded", timeout=60)
    return cluster.logs(name)


def test_two_nodes_are_ready_and_know_themselves_by_different_addresses(cluster: Cluster) -> None:
    nodes = cluster.get("nodes")["items"]
    conditions = [condition for node in nodes for condition in node["status"]["conditions"]]
    ready = [condition["status"] for condition in conditions if condition["type"] == "Ready"]
    addresses = {node["status"]["addresses"][0]["address"] for node in nodes}
    assert ready == ["True", "True"]
    assert addresses == {node.address for node in cluster.nodes}


def test_a_pod_on_each_node_runs_and_prints(cluster: Cluster, applied: driver.Apply) -> None:
    for node in cluster.nodes:
        applied(pod(f"hello-{node.index}", node.name, "echo hello from $(cat /proc/sys/kernel/hostname)"))
    for node in cluster.nodes:
        assert printed_by(cluster, f"hello-{node.index}") == f"hello from hello-{node.index}\n"


def test_a_pod_reaches_a_pod_of_the_other_node_through_a_service_by_name(
    cluster: Cluster, applied: driver.Apply
) -> None:
    applied(service("greeter", 8080))
    applied(pod("greeter", "node-1", "while true; do echo welcome | nc -l -p 8080; done"))
    call = "until nc -w 2 {} 80 </dev/null 2>/dev/null | grep welcome; do sleep 0.2; done"
    applied(pod("near", "node-1", call.format("greeter")))
    applied(pod("far", "node-0", call.format("greeter.default.svc")))
    assert printed_by(cluster, "near") == "welcome\n"
    assert printed_by(cluster, "far") == "welcome\n"


def test_a_name_of_the_outside_world_fails_at_once(cluster: Cluster, applied: driver.Apply) -> None:
    applied(pod("outside", "node-1", "nc -w 20 www.example.com 80; echo status $?"))
    started = time.monotonic()
    assert "status 1" in printed_by(cluster, "outside")
    assert time.monotonic() - started < 10


def test_our_image_runs_our_program_and_nix(cluster: Cluster, applied: driver.Apply) -> None:
    applied(pod("ours", "node-1", "cknix-csi --version && nix --version && git --version", image=recipe.REFERENCE))
    assert re.fullmatch(r"cknix-csi \S+\nnix \(Nix\) \S+\ngit version \S+\n", printed_by(cluster, "ours"))


API_FROM_A_POD = """
import ssl, urllib.error, urllib.request
account = "/var/run/secrets/kubernetes.io/serviceaccount"
trusted = ssl.create_default_context(cafile=f"{account}/ca.crt")
token = open(f"{account}/token").read()
for path in ("/api", "/api/v1/nodes"):
    request = urllib.request.Request(f"https://kubernetes.default.svc{path}")
    request.add_header("Authorization", f"Bearer {token}")
    try:
        print(path, urllib.request.urlopen(request, context=trusted).status)
    except urllib.error.HTTPError as refused:
        print(path, refused.code)
"""


def test_a_pod_talks_to_the_api_server_and_may_only_do_what_its_roles_say(
    cluster: Cluster, applied: driver.Apply
) -> None:
    applied(pod("client", "node-1", "sleep 1000", image=recipe.REFERENCE))
    cluster.wait("the client runs", lambda: cluster.phase("client") == "Running")
    said = cluster.kubectl("exec", "client", "-i", "--", "python3", "-", stdin=API_FROM_A_POD)
    assert said == "/api 200\n/api/v1/nodes 403\n"


def test_a_pod_can_have_a_user_namespace(cluster: Cluster, applied: driver.Apply) -> None:
    applied(pod("shifted", "node-0", "cat /proc/self/uid_map", spec="hostUsers: false"))
    inside, outside, _ = printed_by(cluster, "shifted").split()
    assert inside == "0"
    assert outside != "0"


def test_a_kubelet_may_only_change_its_own_node_and_not_all_of_that(cluster: Cluster) -> None:
    kubelets = str(cluster.directory / "credentials" / "system-node-node-0.kubeconfig")
    cluster.kubectl("--kubeconfig", kubelets, "label", "node", "node-0", "own=yes")
    with pytest.raises(CommandFailed, match="only its own Node object"):
        cluster.kubectl("--kubeconfig", kubelets, "label", "node", "node-1", "own=no")
    with pytest.raises(CommandFailed, match="is not allowed to modify labels"):
        cluster.kubectl("--kubeconfig", kubelets, "label", "node", "node-0", "node-restriction.kubernetes.io/own=no")


def test_pods_survive_a_restart_of_kubelet(cluster: Cluster, applied: driver.Apply) -> None:
    applied(pod("resident", "node-1", "sleep 1000"))
    cluster.wait("the pod runs", lambda: cluster.phase("resident") == "Running")
    node = cluster.node(1)
    before = node.process("kubelet").pid
    node.restart_kubelet()
    assert node.process("kubelet").pid != before
    applied(pod("newcomer", "node-1", "echo here"))
    assert printed_by(cluster, "newcomer") == "here\n"
    assert cluster.phase("resident") == "Running"


def test_what_a_node_keeps_under_var_lib_is_its_own(cluster: Cluster) -> None:
    for node in cluster.nodes:
        node.exec(["sh", "-c", f"mkdir -p /var/lib/whose && echo {node.name} > /var/lib/whose/name"])
    for node in cluster.nodes:
        assert (node.path("/var/lib/whose/name")).read_text() == f"{node.name}\n"
        node.exec(["rm", "-r", "/var/lib/whose"])


def test_a_wait_in_vain_tells_what_there_is_to_see(cluster: Cluster, applied: driver.Apply) -> None:
    applied(pod("lost", "node-0", "true", image="docker.io/library/nowhere:1"))
    cluster.wait("the pod is known", lambda: cluster.phase("lost") == "Pending")
    with pytest.raises(WaitTimeout) as failure:
        cluster.wait("the impossible", lambda: False, timeout=2)
    said = str(failure.value)
    for seen in (
        "the impossible",
        "describe pod default/lost",
        "nowhere:1",
        "kubelet on node-1 (running)",
        "mounts on",
    ):
        assert seen in said


def test_a_second_cluster_lives_beside_the_first_and_leaves_nothing(cluster: Cluster) -> None:
    links = run(["ip", "-oneline", "link"])
    mounts = Path("/proc/self/mountinfo").read_text()
    with ExitStack() as held:
        with Cluster(nodes=2, images=[build_pause_image(), build_busybox_image()]) as second:
            second.apply(pod("leftover", "node-1", "sleep 1000"))
            second.wait("the pod runs", lambda: second.phase("leftover") == "Running")
            namespaces = held.enter_context(namespaces_of(node.pid for node in second.nodes))
            assert second.name != cluster.name
        assert processes_in(namespaces) == []
    assert_gone(second.name)
    assert run(["ip", "-oneline", "link"]) == links
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert len(cluster.get("nodes")["items"]) == 2


RUN_TO_BE_KILLED = """
from tests.cluster.harness import Cluster
cluster = Cluster(nodes=1)
cluster.start()
print(cluster.name, cluster.node(0).pid, flush=True)
input()
"""


def test_a_killed_run_takes_its_processes_with_it_and_the_next_removes_its_files(cluster_machine: None) -> None:
    argv = [sys.executable, "-c", RUN_TO_BE_KILLED]
    with ExitStack() as held:
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT) as victim:
            assert victim.stdout is not None
            name, pid = victim.stdout.readline().split()
            namespaces = held.enter_context(namespaces_of([int(pid)]))
            os.kill(victim.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while processes_in(namespaces) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_in(namespaces) == []
    reap(scratch_base())
    assert_gone(name)


def assert_gone(name: str) -> None:
    """Nothing on this machine is called after the cluster *name* any more."""
    assert list(scratch_base().glob(f"{name}*")) == []
    assert cgroups.remaining(name) == []
    mentioning = [table for table in Path("/proc").glob("[0-9]*/mountinfo") if name in text_of(table)]
    assert mentioning == []


@contextmanager
def namespaces_of(pids: Iterable[int]) -> Iterator[set[int]]:
    """The numbers of nodes' namespaces, which the kernel gives to no others inside this block."""
    with ExitStack() as held:
        files = [held.enter_context(open(f"/proc/{pid}/ns/{kind}")) for pid in pids for kind in ("mnt", "pid")]
        yield {os.fstat(file.fileno()).st_ino for file in files}


def processes_in(namespaces: set[int]) -> list[str]:
    """Processes that are in any of *namespaces*."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            inside = {os.stat(process / "ns" / kind).st_ino for kind in ("mnt", "pid")}
        except OSError:
            continue  # it has just ended
        if inside & namespaces:
            found.append(f"{process.name}: {text_of(process / 'cmdline')}")
    return found


def text_of(path: Path) -> str:
    """A file of a process that may end at any time."""
    try:
        return path.read_text()
    except OSError:
        return ""


def test_the_containerfile_says_what_the_recipe_says() -> None:
    said = (PROJECT / "tests" / "cluster" / "image" / "Containerfile").read_text()
    assert re.findall(r"^    (\S+) \\$", said, re.MULTILINE) == list(recipe.PACKAGES)
    assert f"debian:{recipe.SUITE}-slim\n" in said
    assert f"--target {recipe.PREFIX} " in said
    assert f"> {recipe.SITE}/cknix.pth" in said
    assert f"{recipe.PROGRAM}\n{recipe.PROGRAM_TEXT}EOF\n" in said
    assert f"mkdir -p {' '.join(recipe.DIRECTORIES)}\n" in said
