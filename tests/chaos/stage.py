"""What a scenario has at hand: a cluster with pods on it that run, and a short way to more of everything."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from tests.chaos import expressions, workload
from tests.chaos.bystanders import Bystanders
from tests.chaos.parts import CONTROLLER, DAEMON, parts, process
from tests.chaos.workload import Pod
from tests.cluster import driver
from tests.cluster.harness import Cluster, CommandFailed
from tests.cluster.harness.node import Node

T = TypeVar("T")
POLL = 0.0005
STEADY = "steady"


class Stage:
    """Of one scenario; what is made through it is removed by `clear`."""

    def __init__(self, cluster: Cluster, *, short: bool) -> None:
        self.cluster = cluster
        self.short = short
        self.victim = cluster.nodes[1]
        """Where things fail; the cluster's own programs, and the controller, are on the other one."""
        self.pods: dict[str, Pod] = {}
        self._expressions: dict[str, str] = {}
        """Names, and results as far as they are known."""
        self._before: Bystanders | None = None
        self._run = secrets.token_hex(3)
        self._count = 0

    def choose(self, *, short: T, full: T) -> T:
        return short if self.short else full

    # Expressions and pods

    def apply(self, text: str, name: str) -> str:
        """An Expression called *name*; returns its name."""
        self._expressions[name] = ""
        self.cluster.apply(driver.expression(name, text))
        return name

    def tag(self, prefix: str) -> str:
        """A name that nothing in this cluster has had."""
        self._count += 1
        return f"{prefix}-{self._run}-{self._count}"

    def built(self, prefix: str = "new", *, kibibytes: int = 0, paths: int = 0) -> str:
        """Name of a new Expression whose closure is built, and on no node yet."""
        tag = self.tag(prefix)
        self.apply(expressions.program(tag, kibibytes=kibibytes, paths=paths), tag)
        self._expressions[tag] = driver.built(self.cluster, tag, timeout=120)
        return tag

    def result(self, expression: str) -> str:
        """The store path that is the result of *expression*."""
        return self._expressions[expression] or driver.result(self.cluster, expression)

    def new(
        self, expression: str, count: int = 1, *, node: Node | None = None, read_only: bool = True, command: str = ""
    ) -> list[Pod]:
        """Descriptions of so many new pods, on the victim unless another *node* is named."""
        where = (node or self.victim).name
        pods = [Pod(self.tag("pod"), where, expression, read_only) for _ in range(count)]
        return [replace(pod, command=command) if command else pod for pod in pods]

    def create(self, pods: Sequence[Pod]) -> None:
        """Make *pods*; they are deleted at the scenario's end at the latest."""
        self.pods.update({pod.name: pod for pod in pods})
        workload.create(self.cluster, pods)

    def started(self, pods: Sequence[Pod], timeout: float = 90) -> None:
        """Wait until *pods* run and have said hello from where their Expressions' results are."""
        workload.running(self.cluster, pods, timeout)
        for expression in {pod.expression for pod in pods}:
            mine = [pod for pod in pods if pod.expression == expression]
            workload.said(self.cluster, mine, f"Hello from {self.result(expression)}")

    def delete(self, pods: Sequence[Pod], *, wait: bool = True, timeout: float = 90) -> None:
        workload.delete(self.cluster, pods, timeout, wait=wait)
        if wait:
            self.forget(pods)

    def forget(self, pods: Sequence[Pod]) -> None:
        """*pods* are deleted, or about to be."""
        for pod in pods:
            self.pods.pop(pod.name, None)

    def told(self, pods: Sequence[Pod], words: str, timeout: float = 60) -> None:
        """Wait until the Events of each of *pods* hold *words*."""
        for pod in pods:
            self.cluster.wait(
                f"the Events of {pod.name} say {words!r}",
                lambda: words in driver.events(self.cluster, pod.name),  # noqa: B023
                timeout,
            )

    def start_bystanders(self) -> None:
        """Start `before`, pods of a closure of their own."""
        self.apply(expressions.program(STEADY), STEADY)
        self._expressions[STEADY] = driver.built(self.cluster, STEADY)
        pods = Bystanders(self.cluster, STEADY)
        self.pods.update({pod.name: pod for pod in pods.pods})
        pods.start()
        self._before = pods

    @property
    def before(self) -> Bystanders:
        """The pods that are to outlast the scenario; they run."""
        assert self._before is not None, "they are not started"
        return self._before

    def clear(self) -> None:
        """Delete all pods and Expressions; returns when they have gone."""
        self.delete(list(self.pods.values()), timeout=120)
        if self._expressions:
            self.cluster.kubectl("delete", "expr", "--ignore-not-found", *self._expressions, timeout=120)
        self._expressions.clear()

    # Processes of the driver

    def daemon(self, node: Node | None = None) -> int:
        """The node daemon, as a process; raises `CommandFailed` while none runs."""
        return process(parts(self.cluster), DAEMON, node or self.victim)

    def controller(self) -> int:
        """The controller, as a process."""
        return process(parts(self.cluster), CONTROLLER)

    def kill(self, pid: int) -> None:
        """End a process at once; returns when it has gone, with all that was in its PID namespace."""
        os.kill(pid, signal.SIGKILL)
        self.poll("the killed process is gone", lambda: not os.path.exists(f"/proc/{pid}"), timeout=30)

    def successor(self, find: Callable[[], int], killed: int) -> int:
        """The process that follows the one that was *killed*."""

        def found() -> int:
            return pid if (pid := find()) != killed else 0

        return self.cluster.wait(f"there is a process after {killed}", found, timeout=60)

    def well(self) -> None:
        """Wait until both workloads are ready."""

        def rolled_out() -> bool:
            driver.rolled_out(self.cluster)
            return True

        self.cluster.wait("the driver is well", rolled_out, timeout=120)

    def poll(self, description: str, predicate: Callable[[], T], timeout: float = 60) -> T:
        """The first true value of *predicate*, which is asked all the time: for what lasts milliseconds."""
        deadline = time.monotonic() + timeout
        while True:
            if value := predicate():
                return value
            if time.monotonic() > deadline:
                raise CommandFailed(["poll"], f"not within {timeout:g} s: {description}", "")
            time.sleep(POLL)
