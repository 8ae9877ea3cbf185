"""A clean place to run one Nix in: own home, own configuration, own chroot store, nothing of the host's."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.nixes.debian import NixUnavailable, NixVersion

SETTINGS: Mapping[str, str] = {
    "allowed-users": "*",
    "build-users-group": "",
    "experimental-features": "nix-command flakes",
    "flake-registry": "",
    "max-jobs": "2",
    "sandbox": "true",
    "sandbox-fallback": "false",
    "sandbox-paths": "",
    "substituters": "",
    "trusted-public-keys": "",
}


def host_busybox() -> Path:
    """The static busybox of this machine, as a path without symlinks: restricted evaluation follows none."""
    found = shutil.which("busybox")
    if found is None:
        raise NixUnavailable("the demo packages need a static busybox: apt-get install busybox-static")
    path = Path(found).resolve()
    if _is_dynamic(path):
        raise NixUnavailable(f"{path} is linked dynamically: apt-get install busybox-static")
    return path


@dataclass
class NixEnv:
    """One Nix with a directory of its own.  `run` runs any of its programs there, on the chroot store `store`."""

    nix: NixVersion
    directory: Path
    settings: dict[str, str] = field(default_factory=lambda: dict(SETTINGS))

    def __post_init__(self) -> None:
        self.directory = self.directory.resolve()
        for name in ("home", "conf", "root", "tmp"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        self.configure()

    @property
    def root(self) -> Path:
        """Where the store's `/nix` is on this machine."""
        return self.directory / "root"

    @property
    def store(self) -> str:
        return f"local?root={self.root}"

    @property
    def environ(self) -> dict[str, str]:
        """The whole environment of a process: nothing is inherited but the PATH behind this Nix."""
        return {
            "HOME": str(self.directory / "home"),
            "LC_ALL": "C.UTF-8",
            "NIX_CONF_DIR": str(self.directory / "conf"),
            "NIX_USER_CONF_FILES": "",
            "PATH": f"{self.nix.bin_dir}:{os.environ.get('PATH', os.defpath)}",
            "TMPDIR": str(self.directory / "tmp"),
        }

    def configure(self, **settings: str) -> None:
        """Write nix.conf anew with *settings* changed; ``restrict_eval="true"`` sets restrict-eval."""
        self.settings |= {name.replace("_", "-"): value for name, value in settings.items()}
        lines = [f"{name} = {value}\n" for name, value in sorted(self.settings.items())]
        (self.directory / "conf/nix.conf").write_text("".join(lines))

    def physical(self, path: str) -> Path:
        """Where *path*, as Nix calls it, is on this machine."""
        return self.root / path.lstrip("/")

    def run(
        self,
        program: str,
        *arguments: str | Path,
        store: str | None = "",
        check: bool = True,
        cwd: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run one of this Nix's programs; *store* is the chroot store by default, none of all with ``store=None``."""
        where = self.store if store == "" else store
        command = [self.nix.program(program), *map(str, arguments)]
        if where is not None:
            command += ["--store", where]
        run = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            cwd=cwd or self.directory,
            env=self.environ | dict(environ or {}),
            stdin=subprocess.DEVNULL,
        )
        if check and run.returncode != 0:
            raise AssertionError(f"{self.nix.name}: {' '.join(command)}\nexit {run.returncode}\n{run.stderr}")
        return run

    def lines(self, program: str, *arguments: str | Path) -> list[str]:
        return self.run(program, *arguments).stdout.splitlines()

    def destroy(self) -> None:
        remove(self.directory)


def demo_search_path(demo: Path, busybox: Path | None = None) -> Sequence[str]:
    """The arguments that let `import <cknix-demo> {}` work, also in restricted evaluation."""
    return ("-I", f"cknix-demo={demo}", "-I", f"cknix-demo-busybox={busybox or host_busybox()}")


def remove(directory: Path) -> None:
    """Remove a tree that may have read-only directories in it, as a store has: also for those who are not root."""
    for parent, names, _ in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            if not path.is_symlink():
                path.chmod(stat.S_IRWXU)
    shutil.rmtree(directory, ignore_errors=True)


def _is_dynamic(path: Path) -> bool:
    """Whether an ELF file names a dynamic linker (PT_INTERP)."""
    with path.open("rb") as file:
        header = file.read(64)
        if header[:5] != b"\x7fELF\x02":
            return True
        order: Literal["little", "big"] = "little" if header[5] == 1 else "big"
        offset = int.from_bytes(header[32:40], order)
        size = int.from_bytes(header[54:56], order)
        count = int.from_bytes(header[56:58], order)
        file.seek(offset)
        table = file.read(size * count)
    kinds = (int.from_bytes(table[i * size : i * size + 4], order) for i in range(count))
    return 3 in kinds
