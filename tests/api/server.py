"""etcd and kube-apiserver as child processes on loopback, with RBAC; they can be killed and started again."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.cluster.harness.components import GO_SETTINGS, KUBERNETES

REPOSITORY = Path(__file__).parents[2]
DRIVER_NAMESPACE = "cknix-system"
VOLUMES_NAMESPACE = "cknix-volumes"
START_SECONDS = 90.0
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "userGroups": [f"system:serviceaccounts:{DRIVER_NAMESPACE}"]}, {"level": "None"}],
}


class Server:
    """One API server with its own etcd, all of its files below *directory*."""

    def __init__(self, directory: Path) -> None:
        KUBERNETES.build()
        self._directory = directory
        self._etcd_port, self._peer_port, self._port = _free_ports(3)
        self._admin_token = secrets.token_hex(16)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.url = f"https://127.0.0.1:{self._port}"
        self.authority = directory / "certificates/apiserver.crt"
        key = ec.generate_private_key(ec.SECP256R1())
        (directory / "service-accounts.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
            )
        )
        (directory / "tokens.csv").write_text(f'{self._admin_token},admin,admin,"system:masters"\n')
        (directory / "audit-policy.json").write_text(json.dumps(_AUDIT_POLICY))

    def start(self) -> None:
        self._spawn(
            "etcd",
            f"--data-dir={self._directory / 'etcd'}",
            f"--listen-client-urls=http://127.0.0.1:{self._etcd_port}",
            f"--advertise-client-urls=http://127.0.0.1:{self._etcd_port}",
            f"--listen-peer-urls=http://127.0.0.1:{self._peer_port}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{self._peer_port}",
            f"--initial-cluster=default=http://127.0.0.1:{self._peer_port}",
            "--unsafe-no-fsync",
            "--log-level=error",
        )
        self.start_api_server()

    def start_api_server(self) -> None:
        """Start it and wait until it is ready."""
        key = self._directory / "service-accounts.key"
        self._spawn(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            f"--secure-port={self._port}",
            f"--cert-dir={self._directory / 'certificates'}",
            "--authorization-mode=Node,RBAC",
            "--allow-privileged=true",
            f"--token-auth-file={self._directory / 'tokens.csv'}",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            f"--audit-policy-file={self._directory / 'audit-policy.json'}",
            f"--audit-log-path={self._directory / 'audit.log'}",
        )
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            self._require_running("kube-apiserver")
            if time.monotonic() > deadline:
                raise AssertionError(f"kube-apiserver is not ready:\n{self.log('kube-apiserver')}")
            time.sleep(0.1)

    def kill_api_server(self) -> None:
        """Take it away as a crash would; etcd keeps what it has."""
        self._end("kube-apiserver", signal.SIGKILL)

    def stop(self) -> None:
        for name in ("kube-apiserver", "etcd"):
            self._end(name, signal.SIGKILL)

    @property
    def running(self) -> bool:
        process = self._processes.get("kube-apiserver")
        return process is not None and process.poll() is None

    def log(self, name: str) -> str:
        return (self._directory / f"{name}.log").read_text(errors="replace")[-4000:]

    def audited(self) -> list[dict[str, Any]]:
        """Audit events of all that the driver's ServiceAccounts have asked for so far, the oldest first."""
        log = self._directory / "audit.log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def kubeconfig(self, name: str, token: str | None = None) -> Path:
        """A kubeconfig file for the bearer of *token*; the administrator's without one."""
        path = self._directory / f"{name}.kubeconfig"
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [
                        {"name": "test", "cluster": {"server": self.url, "certificate-authority": str(self.authority)}}
                    ],
                    "users": [{"name": name, "user": {"token": token or self._admin_token}}],
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
                    "current-context": "test",
                }
            )
        )
        path.chmod(0o600)
        return path

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """What ``kubectl`` prints for the administrator; raises with what it said when it fails."""
        done = subprocess.run(
            [KUBERNETES.programs / "kubectl", "--kubeconfig", self.kubeconfig("admin"), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=self._environment(),
        )
        if done.returncode != 0:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """What the administrator is answered, parsed; None when nothing is there.  Many times cheaper than `kubectl`.

        Raises HTTPError for any other failure.
        """
        try:
            return json.loads(self._answer(method, path, json.dumps(body).encode() if body else None))
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.NOT_FOUND:
                raise
            return None

    def _answer(self, method: str, path: str, body: bytes | None = None) -> bytes:
        headers = {"Authorization": f"Bearer {self._admin_token}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", body, headers, method=method)
        context = ssl.create_default_context(cafile=str(self.authority))
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            return bytes(answer.read())

    def _ready(self) -> bool:
        try:
            return self.authority.exists() and self._answer("GET", "/readyz") == b"ok"
        except OSError:
            return False

    def _spawn(self, name: str, *arguments: str) -> None:
        log = (self._directory / f"{name}.log").open("ab")
        with log:
            self._processes[name] = subprocess.Popen(
                [KUBERNETES.programs / name, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        return {"HOME": str(self._directory), "PATH": os.environ["PATH"], **GO_SETTINGS}

    def _require_running(self, name: str) -> None:
        code = self._processes[name].poll()
        if code is not None:
            raise AssertionError(f"{name} ended with code {code}:\n{self.log(name)}")

    def _end(self, name: str, number: signal.Signals) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            process.send_signal(number)
            process.wait()


def _free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports
