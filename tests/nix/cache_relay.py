"""A TCP relay whose connections break in the middle, as they do when a machine or a network goes down."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_BLOCK = 65536


@contextmanager
def relay(port: int, *, after: int) -> Iterator[str]:
    """The URL of a relay to 127.0.0.1:*port* that closes each connection once *after* bytes came back through it."""
    threads: list[threading.Thread] = []

    def accept() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return  # the block has ended
            thread = threading.Thread(target=_serve, args=(near, port, after))
            threads.append(thread)
            thread.start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for thread in (acceptor, *threads):
                thread.join()


def _serve(near: socket.socket, port: int, after: int) -> None:
    with near, socket.create_connection(("127.0.0.1", port)) as far:
        requests = threading.Thread(target=_pass_on, args=(near, far, None))
        requests.start()
        _pass_on(far, near, after)
        requests.join()


def _pass_on(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
    """Until either side ends or *limit* is reached; then both ends are shut, which wakes the other direction."""
    with suppress(OSError):
        while (limit is None or limit > 0) and (block := source.recv(_BLOCK)):
            sink.sendall(block)
            if limit is not None:
                limit -= len(block)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
