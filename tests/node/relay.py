"""A TCP relay on loopback that a test watches and breaks: it counts what goes through, goes away, or falls silent."""

from __future__ import annotations

import re
import socket
import threading
import time
from contextlib import suppress

_BLOCK = 65536
_REQUEST = re.compile(rb"^(?:GET|HEAD) (\S+) HTTP/1", re.MULTILINE)


class Relay:
    """Stands before 127.0.0.1:*port* from :meth:`open` to :meth:`close`."""

    def __init__(self, port: int) -> None:
        self._far = port
        self._listener: socket.socket | None = None
        self._near = 0
        self._flowing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.sent = 0
        """Bytes that clients have sent."""
        self.requests: list[str] = []
        """What plain HTTP clients have asked for."""
        self.pace = 0.0
        """Seconds of rest after each block that comes back."""

    @property
    def port(self) -> int:
        return self._near

    def open(self) -> None:
        """Take connections, and pass everything on; again after :meth:`close` or :meth:`stall`."""
        self._flowing.set()
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self._near), backlog=256)
            self._near = self._listener.getsockname()[1]
            self._begin(self._accept, self._listener)

    def stall(self) -> None:
        """Take connections and keep those there are, but pass nothing on in either direction."""
        self._flowing.clear()

    def close(self) -> None:
        """End all connections and refuse new ones."""
        self._flowing.set()
        with self._lock:
            if self._listener is not None:
                self._listener.shutdown(socket.SHUT_RDWR)
                self._listener.close()
                self._listener = None
            for end in self._sockets:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def forget(self) -> None:
        """Count from nothing again."""
        self.sent = 0
        self.requests.clear()

    def _begin(self, work: object, *arguments: object) -> None:
        assert callable(work)
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                self._begin(self._serve, near)

    def _serve(self, near: socket.socket) -> None:
        with near, suppress(OSError), socket.create_connection(("127.0.0.1", self._far)) as far:
            with self._lock:
                if self._listener is None:
                    return
                self._sockets |= {near, far}
            back = threading.Thread(target=self._pass_on, args=(far, near, False))
            back.start()
            self._pass_on(near, far, True)
            back.join()
            with self._lock:
                self._sockets -= {near, far}

    def _pass_on(self, source: socket.socket, sink: socket.socket, outward: bool) -> None:
        with suppress(OSError):
            while block := source.recv(_BLOCK):
                self._flowing.wait()
                if outward:
                    self.sent += len(block)
                    self.requests += [path.decode() for path in _REQUEST.findall(block)]
                elif self.pace:
                    time.sleep(self.pace)
                sink.sendall(block)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
