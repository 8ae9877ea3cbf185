"""One node of a test cluster: a set of namespaces with containerd, kubelet and kube-proxy in it."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import cgroups
from .command import Argument, run
from .components import CNI, GO_SETTINGS, PAUSE, RUNC, program_path
from .credentials import Credentials
from .namespaces import Machine, Process
from .network import CLUSTER_DOMAIN, DNS_SERVICE_ADDRESS, POD_NETWORK, node_address, pod_network
from .waiting import wait

PAUSE_IMAGE = "docker.io/cknix-test/pause:1"
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
CNI_CONFIG = "/var/lib/cni/net.d"
PROXY_USER = "system:kube-proxy"

#: Directories of the machine that a node has its own of.
OWN_DIRECTORIES = ("/var/lib", "/var/log")

#: Settings of the whole machine that kubelet insists on.  It finds them as files of its own, so the machine keeps its.
KERNEL_SETTINGS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}

CONTAINERD_CONFIG = """\
version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.internal.v1.tracing"]

[grpc]
address = "{socket}"

[plugins."io.containerd.internal.v1.opt"]
path = "/var/lib/containerd/opt"

[plugins."io.containerd.metadata.v1.bolt"]
no_sync = true

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{pause_image}"

[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{cni}"]
conf_dir = "{cni_config}"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{runc}"
"""


#: A program of a node and its arguments; it is known by its own name.
Program = Sequence[str]


class Node:
    """A node.  What tests use is `exec`, `path`, `mountinfo`, and `start`, `kill`, `restart` of its programs."""

    def __init__(
        self,
        cluster: str,
        index: int,
        directory: Path,
        *,
        disks: Mapping[str, int] | None = None,
        kubelet: Mapping[str, object] | None = None,
    ) -> None:
        """*disks*: directories below /var/lib that are file systems of their own, and their sizes in MiB; *kubelet*:
        settings of kubelet beside, or instead of, those that every node has.
        """
        self.index = index
        self._disks = disks or {}
        self._kubelet = kubelet or {}
        self.name = f"node-{index}"
        self.address = node_address(index)
        self.directory = directory / self.name
        self._cgroup = f"{cluster}-{self.name}"
        self._logs = self.directory / "logs"
        self._machine: Machine | None = None
        self._programs: dict[str, Program] = {}
        self._processes: dict[str, Process] = {}

    @property
    def machine(self) -> Machine:
        """The namespaces; only of a node that was booted."""
        assert self._machine is not None, f"{self.name} is not running"
        return self._machine

    @property
    def pid(self) -> int:
        """The node's first process, as the test sees it: `nsenter --target` takes it."""
        return self.machine.pid

    def exec(self, argv: Sequence[Argument], *, stdin: str | None = None, timeout: float = 120) -> str:
        """Run a command on the node and return what it printed; raises `CommandFailed`."""
        return self.machine.run(argv, stdin=stdin, env=environment(), timeout=timeout)

    def path(self, inside: str) -> Path:
        """A file below the node's /var/lib or /var/log as the test sees it, without what is mounted there."""
        return self.directory / "root" / inside.lstrip("/")

    def inside(self, path: str) -> Path:
        """A file as the node sees it, with all that is mounted there; while the node runs."""
        return Path(f"/proc/{self.pid}/root") / path.lstrip("/")

    def pod_processes(self, uid: str) -> set[int]:
        """Ids, as the test sees them, of the processes of the pod with that *uid*, its sandbox's among them."""
        return cgroups.processes(self._cgroup, f"pod{uid}")

    def mountinfo(self) -> str:
        """The node's mount table."""
        return self.machine.mountinfo()

    def log(self, program: str) -> Path:
        """What a program of the node printed."""
        return self._logs / f"{program}.log"

    @property
    def programs(self) -> list[str]:
        """Names of the programs that were started here."""
        return list(self._programs)

    def process(self, name: str) -> Process:
        """The process that a program runs as, or last ran as."""
        return self._processes[name]

    def start(self, name: str) -> None:
        """Start a program again that was killed."""
        self.launch(self._programs[name])

    def kill(self, name: str, signal_number: int = signal.SIGKILL) -> None:
        """End a program; returns when it is gone.  Pods go on without kubelet and containerd, as in life."""
        self._processes[name].kill(signal_number)

    def restart(self, name: str, signal_number: int = signal.SIGTERM) -> None:
        """End a program and start it again."""
        self.kill(name, signal_number)
        self.start(name)

    def restart_kubelet(self) -> None:
        """What an upgrade or a crash of kubelet does to a node."""
        self.restart("kubelet")

    def boot(self) -> None:
        """Make the node's namespaces and mounts, for the first time or again; it has no network yet."""
        for directory in OWN_DIRECTORIES:
            self.path(directory).mkdir(parents=True, exist_ok=True)
        self._logs.mkdir(exist_ok=True)
        cgroups.remove(self._cgroup)
        cgroups.create(self._cgroup)
        self._machine = Machine(PAUSE.programs / "pause", self.log("init"))
        self._mount()

    def discard(self, directory: str) -> None:
        """Throw away what is on a disk of its own, while the node is off; the next boot finds an empty one."""
        assert self._machine is None, f"{self.name} is running"
        self._disk(directory).unlink()

    def launch(self, program: Program) -> None:
        """Start a program on the node and remember it by its name."""
        name = program[0]
        self._programs[name] = program
        self._processes[name] = self.machine.start(program, self.log(name), environment())

    def start_runtime(self) -> None:
        """Start containerd, with the network that its pods will be on; returns when it answers."""
        network = self.path(CNI_CONFIG)
        network.mkdir(parents=True, exist_ok=True)
        (network / "10-pods.conflist").write_text(json.dumps(pod_network_config(self.index)))
        for setting in ("net/ipv4/ip_forward", "net/bridge/bridge-nf-call-iptables"):
            self.exec(["tee", f"/proc/sys/{setting}"], stdin="1")
        config = self.directory / "containerd.toml"
        config.write_text(
            CONTAINERD_CONFIG.format(
                socket=CONTAINERD_SOCKET,
                pause_image=PAUSE_IMAGE,
                cni=CNI.programs,
                cni_config=CNI_CONFIG,
                runc=RUNC.programs / "runc",
            )
        )
        self.launch(("containerd", f"--config={config}"))
        log = self.log("containerd")
        answers = ["ctr", "--address", CONTAINERD_SOCKET, "version"]
        wait(f"containerd on {self.name} answers", lambda: self.exec(answers), timeout=60, seen=log.read_text)

    def start_agents(self, credentials: Credentials) -> None:
        """Start kubelet and kube-proxy, which need the API server."""
        config = self.directory / "kubelet.json"
        config.write_text(json.dumps({**kubelet_config(credentials.authority, self._cgroup), **self._kubelet}))
        kubelet: Program = (
            "kubelet",
            f"--config={config}",
            f"--kubeconfig={credentials.kubeconfig(self.user)}",
            f"--hostname-override={self.name}",
            f"--node-ip={self.address}",
        )
        proxy: Program = (
            "kube-proxy",
            f"--kubeconfig={credentials.kubeconfig(PROXY_USER)}",
            f"--hostname-override={self.name}",
            "--proxy-mode=iptables",
            f"--cluster-cidr={POD_NETWORK}",
            "--conntrack-max-per-core=0",  # these are the machine's to set
            "--conntrack-tcp-timeout-established=0",
            "--conntrack-tcp-timeout-close-wait=0",
        )
        self.launch(kubelet)
        self.launch(proxy)

    @property
    def user(self) -> str:
        """Whom kubelet is to the API server."""
        return f"system:node:{self.name}"

    def import_image(self, archive: Path) -> None:
        """Load a docker-archive into containerd, as if it had been pulled."""
        ctr = ["ctr", "--address", CONTAINERD_SOCKET, "--namespace", "k8s.io"]
        self.exec([*ctr, "images", "import", "--local", archive], timeout=300)

    def halt(self) -> None:
        """End every process of the node; its mounts, network and pods go with them."""
        if self._machine is None:
            return
        self._machine.kill()
        for process in self._processes.values():
            process.wait(10)
        self._machine = None

    def _mount(self) -> None:
        settings = self.directory / "sysctl"
        self.machine.run(["mount", "-t", "proc", "proc", "/proc"])
        for directory in OWN_DIRECTORIES:
            self.machine.run(["mount", "--bind", self.path(directory), directory])
        for directory, mebibytes in self._disks.items():
            self._mount_disk(directory, mebibytes)
        self.machine.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"])
        # A pod with a user namespace may only mount /proc where a whole one can be seen already.
        self.machine.run(["mkdir", "-p", "/run/cknix-test/proc"])
        self.machine.run(["mount", "-t", "proc", "proc", "/run/cknix-test/proc"])
        for name, value in KERNEL_SETTINGS.items():
            setting = settings / name
            setting.parent.mkdir(parents=True, exist_ok=True)
            setting.write_text(f"{value}\n")
            self.machine.run(["mount", "--bind", setting, Path("/proc/sys") / name])
        self.machine.run(["hostname", self.name])
        self.machine.run(["mount", "--make-rshared", "/"])

    def _mount_disk(self, directory: str, mebibytes: int) -> None:
        image = self._disk(directory)
        if not image.exists():
            with image.open("wb") as file:
                file.truncate(mebibytes << 20)
            run(["mkfs.ext4", "-q", "-F", image])
            self.path(directory).mkdir(parents=True, exist_ok=True)
        self.machine.run(["mount", "-o", "loop", image, directory])

    def _disk(self, directory: str) -> Path:
        return self.directory / f"disk-{Path(directory).name}"


def environment() -> dict[str, str]:
    """What programs of a node find in their environment: none of the machine's proxies, no use for its /tmp."""
    basics = {"PATH": program_path(), "HOME": "/root", "LANG": "C.UTF-8", "TMPDIR": "/run"}
    return {**basics, **GO_SETTINGS, "NO_PROXY": "*", "no_proxy": "*"}


def pod_network_config(index: int) -> Mapping[str, object]:
    """CNI: a bridge on the node, an address of the node's own range for each pod, and host ports."""
    addresses = {"type": "host-local", "ranges": [[{"subnet": pod_network(index)}]], "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "hairpinMode": True, "ipam": addresses}
    return {
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}],
    }


def kubelet_config(authority: Path, cgroup: str) -> Mapping[str, object]:
    """kubelet's settings: a real cluster's, but for what one small machine shared by all nodes demands."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"x509": {"clientCAFile": str(authority)}},
        "clusterDNS": [DNS_SERVICE_ADDRESS],
        "clusterDomain": CLUSTER_DOMAIN,
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        "resolvConf": "/dev/null",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cgroup}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "volumeStatsAggPeriod": "5s",  # no test waits for a minute
    }
