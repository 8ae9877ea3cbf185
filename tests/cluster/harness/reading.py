"""Reading from a cluster's API server without a program: who waits asks often, and each kubectl takes 0.1 s of CPU."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from .command import CommandFailed

_CLONE_NEWNET = 0x40000000
_SECONDS = 60.0


class Reader:
    """Asks as the user of a kubeconfig."""

    def __init__(self, kubeconfig: Path) -> None:
        settings = json.loads(kubeconfig.read_text())
        cluster, user = settings["clusters"][0]["cluster"], settings["users"][0]["user"]
        server = urlsplit(cluster["server"])
        self._address = (str(server.hostname), int(server.port or 443))
        self._headers = {"Authorization": f"Bearer {user['token']}"}
        self._context = ssl.create_default_context(cafile=cluster["certificate-authority"])
        self._lock = threading.Lock()
        self._connection: http.client.HTTPSConnection | None = None

    def get(self, path: str, pid: int) -> str:
        """What the API server answers, asked from the network of the process *pid*.

        Raises `CommandFailed` for anything but "200 OK".
        """
        try:
            with self._lock:
                status, text = self._answer(path, pid)
        except (OSError, http.client.HTTPException) as error:
            raise CommandFailed(["GET", path], "no answer", str(error)) from error
        if status != http.HTTPStatus.OK:
            raise CommandFailed(["GET", path], f"HTTP status {status}", text)
        return text

    def _answer(self, path: str, pid: int) -> tuple[int, str]:
        """By a connection that is kept, since its handshake costs more than all the rest of an answer."""
        known = self._connection is not None
        try:
            if self._connection is None:
                self._connection = self._connect(pid)
            self._connection.request("GET", path, headers=self._headers)
            answer = self._connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            self.close()
            if known:  # the server may have closed it meanwhile, or be another
                return self._answer(path, pid)
            raise

    def close(self) -> None:
        """Let go of the connection; the next question makes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self, pid: int) -> http.client.HTTPSConnection:
        # A thread that has entered the network ends with it; the connection stays there.
        with ThreadPoolExecutor(1) as thread:
            plain = thread.submit(self._connected, pid).result()
        connection = http.client.HTTPSConnection(*self._address, timeout=_SECONDS)
        connection.sock = self._context.wrap_socket(plain, server_hostname=self._address[0])
        return connection

    def _connected(self, pid: int) -> socket.socket:
        libc = ctypes.CDLL(None, use_errno=True)
        network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        try:
            if libc.setns(network, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(network)
        return socket.create_connection(self._address, _SECONDS)
