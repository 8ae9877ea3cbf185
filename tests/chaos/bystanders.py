"""Pods that run before anything fails: read-only and writable, on every node.  What happens to them is what counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.workload import HELLO, RESULT, Pod, create, in_container, main_process, running, uids
from tests.cluster.harness import Cluster, CommandFailed
from tests.cluster.harness.node import Node

#: All names, and the content of all files; in a read-only volume neither can change, in a writable one nobody has.
FINGERPRINT = (
    "cd /nix/store; find . | sort | sha256sum; find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum"
)
KEPT = "/nix/var/kept"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a bystander is at one moment; two of these are equal if nothing has happened to it."""

    container: tuple[int, str]
    """Process id and start time of its first process."""
    outside: str
    """Id of the mount at the volume's target."""
    inside: str
    """Id of the mount at /nix in the container."""
    result: str
    content: str
    kept: str
    """What it has written, where it may."""


class Bystanders:
    """The pods of one Expression, which is built; call `start` first."""

    def __init__(self, cluster: Cluster, expression: str) -> None:
        self._cluster = cluster
        self.pods = [
            Pod(f"{kind}-{node.index}", node.name, expression, read_only=kind == "reader")
            for node in cluster.nodes
            for kind in ("reader", "writer")
        ]
        self._uids: dict[str, str] = {}
        self._before: dict[str, Seen] = {}

    def start(self) -> None:
        """Returns when all of them run and have written what they are to keep."""
        create(self._cluster, self.pods)
        running(self._cluster, self.pods)
        self._uids = uids(self._cluster, *(pod.name for pod in self.pods))
        for pod in self.pods:
            if not pod.read_only:
                self._shell(pod, f"echo {pod.name} > {KEPT}")
        self._before = self._look()

    def require_untouched(self) -> None:
        """The same processes see the same mounts with the same content, and can still do all they could."""
        now = self._look()
        changed = [
            f"{name}: {field} was {getattr(before, field)!r}, is {getattr(now[name], field)!r}"
            for name, before in self._before.items()
            for field in Seen.__slots__
            if getattr(before, field) != getattr(now[name], field)
        ]
        assert not changed, "\n".join(changed)
        self._require_working()

    def require_readable(self) -> None:
        """They still run what is in their volumes."""
        for pod in self.pods:
            assert self._shell(pod, HELLO).startswith(f"Hello from {self._before[pod.name].result}"), pod.name

    def require_again(self, rebooted: Node) -> None:
        """Those on *rebooted* have started anew with the same content, but for what they had written; the others are
        untouched.
        """
        # kubelet first believes that what was running still is.
        self._cluster.wait("the containers run again", lambda: self._restarted(rebooted), timeout=180)
        now = self._look()
        for pod in self.pods:
            if pod.node != rebooted.name:
                assert now[pod.name] == self._before[pod.name], pod.name
                continue
            seen, before = now[pod.name], self._before[pod.name]
            assert seen.container != before.container, f"{pod.name} has not started anew"
            assert (seen.result, seen.content) == (before.result, before.content), pod.name
            assert seen.kept == "", f"{pod.name}: what was written outlasted the reboot"
        self._require_working()

    def _restarted(self, node: Node) -> bool:
        mine = [pod for pod in self.pods if pod.node == node.name]
        anew = all(self._identity(pod) != self._before[pod.name].container for pod in mine)
        return anew and all("Hello from" in self._shell(pod, HELLO) for pod in mine)

    def _require_working(self) -> None:
        self.require_readable()
        for pod in self.pods:
            probe = "/nix/store/written-now"
            script = f"(echo x > {probe} && cat {probe} && rm {probe}) 2>/dev/null || echo refused"
            wrote = self._shell(pod, script).strip()
            assert wrote == ("refused" if pod.read_only else "x"), f"{pod.name}: a write: {wrote}"

    def _look(self) -> dict[str, Seen]:
        return {pod.name: self._seen(pod) for pod in self.pods}

    def _seen(self, pod: Pod) -> Seen:
        node, pid = self._process(pod)
        target = f"/pods/{self._uids[pod.name]}/volumes/kubernetes.io~csi/nix/mount"
        return Seen(
            container=self._identity(pod),
            outside=mount_id(node.mountinfo(), lambda point: point.endswith(target)),
            inside=mount_id(Path(f"/proc/{pid}/mountinfo").read_text(), lambda point: point == "/nix"),
            result=self._shell(pod, f"readlink {RESULT}").strip(),
            content=self._shell(pod, FINGERPRINT),
            kept=self._shell(pod, f"cat {KEPT} 2>/dev/null || true").strip(),
        )

    def _process(self, pod: Pod) -> tuple[Node, int]:
        node = self._cluster.node(pod.node)
        return node, main_process(node, self._uids[pod.name])

    def _identity(self, pod: Pod) -> tuple[int, str]:
        _, pid = self._process(pod)
        try:
            # The 22nd field, counted behind the name, which may hold anything.
            return pid, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        except OSError as error:
            raise CommandFailed(["stat of the first process of", pod.name], str(error), "") from None

    def _shell(self, pod: Pod, script: str) -> str:
        return in_container(self._process(pod)[1], "sh", "-c", script)


def mount_id(mountinfo: str, is_it: Callable[[str], bool]) -> str:
    """Id of the topmost mount at a mount point, "none" where there is none."""
    ids = [fields[0] for line in mountinfo.splitlines() if is_it((fields := line.split(" "))[4])]
    return ids[-1] if ids else "none"
