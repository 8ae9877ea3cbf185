"""The rights of controller, nodes and provisioner: those of yaml/, so that what is tested is installed."""

from __future__ import annotations

from cknix_csi.kube.api import core
from tests.api.server import DRIVER_NAMESPACE, REPOSITORY, Server

CONTROLLER = "cknix-controller"
NODE = "cknix-node"
PROVISIONER = "cknix-provisioner"


def install(server: Server) -> None:
    """Namespace, CRD and rights, as ``kubectl apply -f yaml/`` would."""
    for name in ("00-namespace.yaml", "10-crd.yaml", "20-rbac.yaml", "55-provisioner.yaml"):
        server.kubectl("apply", "--server-side", "-f", str(REPOSITORY / "yaml" / name))
    server.kubectl("wait", "--for=condition=Established", "crd/expressions.cknix.cool", "--timeout=30s")


def token(server: Server, account: str) -> str:
    """A bearer token of the ServiceAccount *account*, for an hour."""
    answer = server.ask("POST", f"{core('serviceaccounts', DRIVER_NAMESPACE, account)}/token", {"spec": {}})
    return str(answer["status"]["token"])
