"""Who may talk to the API server of a test cluster, and how each proves it: one CA, and a token for every client."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from .command import Argument, run
from .network import API_SERVICE_ADDRESS, CLUSTER_DOMAIN

API_PORT = 6443
ADMIN = "admin"
CURVE = "prime256v1"


class Credentials:
    """Files in *directory*: certificates, the token file, a kubeconfig for every user."""

    def __init__(self, directory: Path, address: str, users: Mapping[str, Sequence[str]]) -> None:
        """*users* maps a user's name to the groups it is in."""
        directory.mkdir(mode=0o700)
        self._directory = directory
        self.server = f"https://{address}:{API_PORT}"
        self.authority = directory / "ca.crt"
        self.tokens = directory / "tokens.csv"
        self.service_account_key = directory / "service-accounts.key"
        self._make_certificates(address)
        self._make_users(users)

    def certificate(self, name: str) -> tuple[Path, Path]:
        """Certificate and key called *name*."""
        return self._directory / f"{name}.crt", self._directory / f"{name}.key"

    def kubeconfig(self, user: str) -> Path:
        """The kubeconfig of *user*."""
        return self._directory / f"{user.replace(':', '-')}.kubeconfig"

    def _make_certificates(self, address: str) -> None:
        name = "kubernetes.default"
        names = [f"DNS:{known}" for known in (name, f"{name}.svc", f"{name}.svc.{CLUSTER_DOMAIN}")]
        served = [*names, *(f"IP:{known}" for known in (address, API_SERVICE_ADDRESS, "127.0.0.1"))]
        self._issue("ca", "/CN=cknix-test", "keyUsage=critical,keyCertSign,digitalSignature")
        self._issue("kube-apiserver", "/CN=kube-apiserver", f"subjectAltName={','.join(served)}", signer="ca")
        self._issue("kubelet-client", "/O=system:masters/CN=kube-apiserver", "extendedKeyUsage=clientAuth", signer="ca")
        run(["openssl", "ecparam", "-name", CURVE, "-genkey", "-noout", "-out", self.service_account_key])

    def _issue(self, name: str, subject: str, extension: str, *, signer: str | None = None) -> None:
        certificate, key = self.certificate(name)
        argv: list[Argument] = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", f"ec_paramgen_curve:{CURVE}"]
        argv += ["-nodes", "-days", "3", "-subj", subject, "-keyout", key, "-out", certificate, "-addext", extension]
        if signer:
            signer_certificate, signer_key = self.certificate(signer)
            argv += ["-CA", signer_certificate, "-CAkey", signer_key, "-addext", "basicConstraints=critical,CA:FALSE"]
        run(argv)

    def _make_users(self, users: Mapping[str, Sequence[str]]) -> None:
        lines = []
        for user, groups in users.items():
            token = secrets.token_hex(16)
            lines.append(f'{token},{user},{user},"{",".join(groups)}"\n')
            cluster = {"server": self.server, "certificate-authority": str(self.authority)}
            config = {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "test", "cluster": cluster}],
                "users": [{"name": user, "user": {"token": token}}],
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
                "current-context": "test",
            }
            self.kubeconfig(user).write_text(json.dumps(config))
        self.tokens.write_text("".join(lines))
