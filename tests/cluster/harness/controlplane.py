"""The programs that run on the first node only: etcd, the API server and its controllers, the cluster's DNS."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .credentials import ADMIN, API_PORT, Credentials
from .network import CLUSTER_DOMAIN, DNS_SERVICE_ADDRESS, POD_NETWORK, SERVICE_NETWORK
from .node import PROXY_USER, Program

CONTROLLER_MANAGER = "system:kube-controller-manager"
SCHEDULER = "system:kube-scheduler"
DNS = "cknix-test:dns"

DNS_READY = "127.0.0.1:8181"  # in the first node's network; path /ready

USERS: Mapping[str, Sequence[str]] = {
    ADMIN: ("system:masters",),
    CONTROLLER_MANAGER: (),
    SCHEDULER: (),
    PROXY_USER: (),
    DNS: (),
}

#: Answers for services and pods; any other name does not exist, and is said not to at once.
COREFILE = """\
{domain}:53 in-addr.arpa:53 ip6.arpa:53 {{
    bind {address}
    errors
    ready {ready}
    kubernetes {domain} in-addr.arpa ip6.arpa {{
        kubeconfig {kubeconfig}
        pods insecure
    }}
}}
.:53 {{
    bind {address}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""


def storage(directory: Path) -> Program:
    """etcd, which here may forget everything when the machine stops."""
    return "etcd", f"--data-dir={directory}", "--unsafe-no-fsync", "--log-level=warn"


def api_server(credentials: Credentials, address: str) -> Program:
    """The API server, with the authorization that a real cluster has."""
    certificate, key = credentials.certificate("kube-apiserver")
    kubelet_certificate, kubelet_key = credentials.certificate("kubelet-client")
    return (
        "kube-apiserver",
        "--etcd-servers=http://127.0.0.1:2379",
        f"--advertise-address={address}",
        f"--secure-port={API_PORT}",
        f"--service-cluster-ip-range={SERVICE_NETWORK}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        f"--token-auth-file={credentials.tokens}",
        f"--client-ca-file={credentials.authority}",
        f"--tls-cert-file={certificate}",
        f"--tls-private-key-file={key}",
        f"--kubelet-client-certificate={kubelet_certificate}",
        f"--kubelet-client-key={kubelet_key}",
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={credentials.service_account_key}",
        f"--service-account-signing-key-file={credentials.service_account_key}",
    )


def controllers(credentials: Credentials) -> list[Program]:
    """Controller manager and scheduler."""
    alone = ("--leader-elect=false", "--secure-port=0")
    manager = credentials.kubeconfig(CONTROLLER_MANAGER)
    scheduler = credentials.kubeconfig(SCHEDULER)
    return [
        (
            "kube-controller-manager",
            f"--kubeconfig={manager}",
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={credentials.service_account_key}",
            f"--root-ca-file={credentials.authority}",
            f"--service-cluster-ip-range={SERVICE_NETWORK}",
            f"--cluster-cidr={POD_NETWORK}",
            *alone,
        ),
        ("kube-scheduler", f"--kubeconfig={scheduler}", *alone),
    ]


def dns(credentials: Credentials, address: str, corefile: Path) -> Program:
    """CoreDNS as a process of the first node; `dns_objects` makes it the cluster's DNS service."""
    kubeconfig = credentials.kubeconfig(DNS)
    corefile.write_text(COREFILE.format(address=address, ready=DNS_READY, domain=CLUSTER_DOMAIN, kubeconfig=kubeconfig))
    return "coredns", "-conf", str(corefile)


def dns_objects(address: str) -> str:
    """The service that leads to `dns`, and what CoreDNS may read."""
    service = {"name": "kube-dns", "namespace": "kube-system"}
    ports = [("dns", "UDP"), ("dns-tcp", "TCP")]
    objects = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": service,
            "spec": {
                "clusterIP": DNS_SERVICE_ADDRESS,
                "ports": [{"name": name, "port": 53, "protocol": protocol} for name, protocol in ports],
            },
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**service, "labels": {"kubernetes.io/service-name": service["name"]}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [address]}],
            "ports": [{"name": name, "port": 53, "protocol": protocol} for name, protocol in ports],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": DNS},
            "rules": [
                {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"]},
                {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": DNS},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": DNS},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": DNS}],
        },
    ]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
