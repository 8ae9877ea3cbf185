"""A TCP relay that breaks or falls silent in the middle, as networks and machines do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

_BLOCK = 65536


@contextmanager
def relay(port: int, *, after: int, then: Literal["cut", "stall"]) -> Iterator[str]:
    """The URL of a relay to 127.0.0.1:*port*; a connection that got *after* bytes is closed, or stays open in silence."""
    done = threading.Event()
    threads: list[threading.Thread] = []

    def upstream(near: socket.socket, far: socket.socket) -> None:
        try:
            while block := near.recv(_BLOCK):
                far.sendall(block)
            far.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def downstream(near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", port)) as far:
            sender = threading.Thread(target=upstream, args=(near, far))
            sender.start()
            left = after
            while left and (block := far.recv(min(left, _BLOCK))):
                near.sendall(block)
                left -= len(block)
            if then == "stall" and not left:
                done.wait()
            for end in (near, far):
                end.shutdown(socket.SHUT_RDWR)
            sender.join()

    def accept() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=_quietly, args=(downstream, near))
            threads.append(thread)
            thread.start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            done.set()
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()
            for thread in threads:
                thread.join()


def _quietly(function: object, near: socket.socket) -> None:
    """Either side may go away first."""
    assert callable(function)
    try:
        function(near)
    except OSError:
        near.close()
