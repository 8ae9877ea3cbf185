"""The cache as a process of its own: what it uses can be measured, and it can be killed and started again.

python cache_process.py STORE-ROOT PORT < secret-key
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cknix_csi.nix.cache.server import serve_cache
from cknix_csi.nix.cache.signing import KeyPair
from cknix_csi.nix.store import Store


@dataclass(frozen=True)
class Served:
    """A running cache."""

    port: int
    pid: int
    public_key: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def resident_bytes(self, field: str = "VmRSS") -> int:
        """Memory of the process now, or at most so far (``VmHWM``)."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"no {field} in /proc/{self.pid}/status")


@contextmanager
def cache_process(root: Path, key: KeyPair, *, port: int = 0) -> Iterator[Served]:
    """A cache of the chroot store below *root*; killed at the end of the block, as a node's power failure would."""
    with subprocess.Popen(
        [sys.executable, __file__, str(root), str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(key.secret)
            process.stdin.close()
            bound = process.stdout.readline()
            assert bound, "the cache did not start; its message is above"
            yield Served(int(bound), process.pid, key.public)
        finally:
            process.kill()


def main() -> None:
    root, port = sys.argv[1:]
    asyncio.run(
        serve_cache(
            Store.chroot(Path(root)),
            KeyPair.from_secret(sys.stdin.read()),
            host="127.0.0.1",
            port=int(port),
            listening=lambda bound: print(bound, flush=True),
        )
    )


if __name__ == "__main__":
    main()
