"""Addresses of a test cluster and the links between its nodes.

Every cluster uses the same addresses: each has network namespaces of its own, and none is connected to anything else.
The nodes meet on a bridge in the first node's namespace.  What has no route is refused at once: no test hangs on an
address of the outside world.
"""

from __future__ import annotations

import contextlib

from .command import CommandFailed, run
from .namespaces import Machine

POD_NETWORK = "10.244.0.0/16"
SERVICE_NETWORK = "10.96.0.0/16"
API_SERVICE_ADDRESS = "10.96.0.1"
DNS_SERVICE_ADDRESS = "10.96.0.10"
CLUSTER_DOMAIN = "cluster.local"
BRIDGE = "nodes"


def node_address(index: int) -> str:
    """Address of a node, on the network that the nodes share."""
    return f"10.240.0.{index + 2}"


def pod_network(index: int) -> str:
    """The pods of one node: each node has a network of its own, and the others a route to it."""
    return f"10.244.{index}.0/24"


def connect(machines: list[Machine]) -> None:
    """Give every machine its address and the routes to the others' pods."""
    ip(machines[0], f"link add {BRIDGE} type bridge", f"link set {BRIDGE} up")
    for index in range(len(machines)):
        join(machines, index)


def join(machines: list[Machine], index: int) -> None:
    """Connect one machine, which is new, to the first one's bridge."""
    first, machine = machines[0], machines[index]
    if machine is not first:
        link = f"node{index}"
        ip(
            first,
            f"link add {link} type veth peer name {BRIDGE} netns {machine.pid}",
            f"link set {link} master {BRIDGE} up",
        )
    peers = [peer for peer in range(len(machines)) if peer != index]
    ip(
        machine,
        "link set lo up",
        f"link set {BRIDGE} up",
        f"address add {node_address(index)}/24 dev {BRIDGE}",
        f"route add {SERVICE_NETWORK} dev {BRIDGE}",  # only a way out: kube-proxy rewrites what goes there
        "route add unreachable default",
        *(f"route add {pod_network(peer)} via {node_address(peer)}" for peer in peers),
    )


def part(first: Machine, index: int) -> None:
    """Remove what is left at the first machine of the link to one that has ended."""
    with contextlib.suppress(CommandFailed):  # the kernel removes it too, a moment after the other end
        ip(first, f"link delete node{index}")


def ip(machine: Machine, *commands: str) -> None:
    """Run `ip` commands in the network of *machine*; processes are named as the caller sees them."""
    run(machine.network_command(["ip", "-batch", "-"]), stdin="\n".join(commands) + "\n")
