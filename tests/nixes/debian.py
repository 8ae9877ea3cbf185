"""Nix as a Debian suite packages it, unpacked into a cache, runnable on this host whatever the host's own release is.

`mmdebstrap --variant=extract` downloads and unpacks nix-bin with its libraries in about six seconds: no maintainer
script runs and nothing has to be bootable.  What needs a root of its own is then only the dynamic linker and the
libraries, and an ELF file can name both itself: `patchelf` (from the same suite, run through that suite's own linker)
writes the absolute paths into the programs.  A chroot would have to carry every mount of the caller along, would cost
more per call than Nix itself, and would forbid Nix the user namespaces of its sandbox.

What is cached can be deleted at any time and is never changed in place: a version is built beside its place, under a
lock, and renamed.  `RECIPE` is part of the path, so an old cache never serves a newer recipe.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RECIPE = "1"
PACKAGES = ("nix-bin", "bash-static", "base-files", "patchelf")
KEPT = (  # bookworm still has its C library and bash-static outside /usr
    "bin/bash-static",
    "lib",
    "lib64",
    "usr/bin/bash-static",
    "usr/bin/nix*",
    "usr/bin/patchelf",
    "usr/lib/*-linux-gnu",
    "usr/lib/nix",
    "usr/lib64",
    "usr/libexec/nix",
)
ARCHIVES = {"oldstable", "stable", "testing", "unstable", "sid", "bullseye", "bookworm", "trixie", "forky"}


class NixUnavailable(Exception):
    """A supported Nix cannot be had on this machine; the message says what is missing and what helps."""


@dataclass(frozen=True)
class Suite:
    """A Debian suite and the series of Nix that it is expected to have."""

    name: str
    series: str


SUITES = (Suite("bookworm", "2.8"), Suite("trixie", "2.26"), Suite("sid", "2.34"))


@dataclass(frozen=True)
class NixVersion:
    """One real Nix: ``bin_dir`` has nix, nix-store, nix-build and the others, for a PATH or to be called directly."""

    name: str
    version: str
    bin_dir: Path
    sandbox_shell: Path
    """The suite's static bash, for ``sandbox-paths = /bin/sh=…``.  Debian's 2.26 and newer have that setting built in
    with /usr/bin/bash-static, and build nothing on a host that lacks this file unless the setting is given."""

    def program(self, name: str) -> str:
        return str(self.bin_dir / name)

    @property
    def release(self) -> tuple[int, ...]:
        """``(2, 26, 3)``: for the few places where versions truly differ."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:3])


def cached(suite: Suite) -> NixVersion | None:
    """What is in the cache for *suite*; None when it has to be built first."""
    home = _home(suite)
    try:
        version = (home / "version").read_text().strip()
    except FileNotFoundError:
        return None
    shells = (home / "root" / place / "bash-static" for place in ("usr/bin", "bin"))
    return NixVersion(f"nix-{version}", version, home / "bin", next(filter(Path.exists, shells)))


def provide(suite: Suite) -> NixVersion:
    """The Nix of *suite*, from the cache or built now."""
    if version := cached(suite):
        return version
    home = _home(suite)
    home.parent.mkdir(parents=True, exist_ok=True)
    with _lock(home.parent / "lock"):
        if version := cached(suite):
            return version
        started = time.monotonic()
        _say(f"{suite.name}: unpacking Debian's Nix into {home} (once)")
        _build(suite, home)
        version = cached(suite)
        if version is None:
            raise NixUnavailable(f"{home} was built and is gone again: who cleans the cache while tests run?")
        _check(version, home)
        _say(f"{suite.name}: {version.name} is ready after {time.monotonic() - started:.1f} s")
        if not version.version.startswith(suite.series + "."):
            _say(f"{suite.name}: WARNING: expected {suite.series}, this suite has moved on to {version.version}")
        return version


def _home(suite: Suite) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    return base / "cknix-test" / f"nix-{suite.name}" / f"{sysconfig.get_platform()}-{RECIPE}"


def _build(suite: Suite, home: Path) -> None:
    stage = home.with_name(f".{home.name}.{os.getpid()}")
    shutil.rmtree(home, ignore_errors=True)  # without `version`: left by a crash between two renames
    try:
        stage.mkdir()
        _unpack(suite, stage / "root")
        _prune(stage / "root")
        version = _relocate(stage / "root", home / "root")
        _write_programs(stage / "root", stage / "bin", home / "root")
        (stage / "version").write_text(version + "\n")
        stage.rename(home)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _unpack(suite: Suite, root: Path) -> None:
    if not shutil.which("mmdebstrap"):
        raise NixUnavailable(f"Nix of Debian {suite.name} needs mmdebstrap: apt-get install mmdebstrap")
    command = ["mmdebstrap", "--variant=extract", "--include=" + ",".join(PACKAGES)]
    command += [f"--aptopt={option}" for option in _apt_options()]
    command += [suite.name, str(root), f"deb {_mirror()} {suite.name} main"]
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            lines.append(line.rstrip())
            if line.startswith("I: "):
                _say(f"{suite.name}: {line[3:].rstrip()}")
    if run.returncode != 0:
        tail = "\n".join(lines[-15:])
        raise NixUnavailable(f"mmdebstrap could not unpack Nix of Debian {suite.name}:\n{tail}")


def _apt_options() -> list[str]:
    """What the private apt of mmdebstrap must know.

    Release files are verified by the Debian archive keyring of this host, always.  Only their expiry is not: sid's are
    valid for a week, and a mirror that stands still, or a machine whose clock runs ahead, is no reason to test less.
    """
    options = ['APT::Install-Recommends "false"', 'Acquire::Check-Valid-Until "false"']
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False).stdout
    wanted = re.compile(r"Acquire::https?::(Proxy|CaInfo|Verify-Peer|Verify-Host)\b")
    return options + [line.rstrip(";") for line in dump.splitlines() if wanted.match(line)]


def _mirror() -> str:
    """Where this machine's own apt gets Debian from: the archive itself, not its updates, not its security fixes."""
    try:
        listing = subprocess.run(
            ["apt-get", "--print-uris", "update"], capture_output=True, text=True, check=False
        ).stdout
    except FileNotFoundError:
        raise NixUnavailable("Nix for tests comes from Debian's packages, and this machine has no apt-get") from None
    found = re.findall(r"^'(\S+)/dists/([^/']+)/InRelease'", listing, flags=re.MULTILINE)
    for base, name in found:
        if name in ARCHIVES:
            return str(base)
    raise NixUnavailable(
        f"apt is not configured with a Debian archive; it knows only {sorted(set(found)) or 'nothing'}"
    )


def _prune(root: Path) -> None:
    """Keep what Nix loads and runs: the rest (documentation, perl, setuid programs) only takes space in a cache."""
    kept = {path for pattern in KEPT for path in root.glob(pattern)}
    parents = {parent for path in kept for parent in path.parents}
    for directory in (root, root / "bin", root / "usr", root / "usr/bin", root / "usr/lib"):
        for path in [] if directory.is_symlink() else list(directory.glob("*")):
            if path in kept or path in parents:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _relocate(stage: Path, final: Path) -> str:
    """Make the programs under *stage* run from *final*; return their version."""
    libraries = [
        path.relative_to(stage)
        for pattern in ("usr/lib/nix", "usr/lib/*-linux-gnu", "lib/*-linux-gnu")
        for path in stage.glob(pattern)
    ]
    linker = next((path.relative_to(stage) for path in stage.glob("lib/*-linux-gnu/ld-linux*.so.*")), None)
    if linker is None:
        raise NixUnavailable(f"no dynamic linker was unpacked below {stage}")
    search = ":".join(str(stage / path) for path in libraries)
    run = [str(stage / linker), "--library-path", search]

    version = _output([*run, str(stage / "usr/bin/nix"), "--version"]).split()[-1]
    patchelf = [*run, str(stage / "usr/bin/patchelf")]
    program = stage / "usr/bin/nix"
    # An rpath that is inherited (DT_RPATH, not DT_RUNPATH): it must also hold for the libraries' own libraries.
    rpath = ["--force-rpath", "--set-rpath", ":".join(str(final / path) for path in libraries)]
    for elf in (program, *stage.glob("usr/lib/nix/*.so")):
        _output([*patchelf, *rpath, str(elf)])
    _output([*patchelf, "--set-interpreter", str(final / linker), str(program)])
    (stage / "usr/bin/patchelf").unlink()
    return version


def _write_programs(stage: Path, bin_dir: Path, final: Path) -> None:
    """One wrapper for each program: Nix 2.8 finds its build hook only by a path compiled in, or by this variable."""
    bin_dir.mkdir()
    for program in sorted(stage.glob("usr/bin/nix*")):
        wrapper = bin_dir / program.name
        wrapper.write_text(
            "#!/bin/sh\n"
            f"export NIX_BIN_DIR='{final}/usr/bin' NIX_LIBEXEC_DIR='{final}/usr/libexec'\n"
            f"exec '{final}/usr/bin/{program.name}' \"$@\"\n"
        )
        wrapper.chmod(0o755)


def _check(version: NixVersion, home: Path) -> None:
    try:
        answer = _output([version.program("nix"), "--version"])
    except NixUnavailable:
        shutil.rmtree(home, ignore_errors=True)
        raise
    if version.version not in answer:
        shutil.rmtree(home, ignore_errors=True)
        raise NixUnavailable(f"{version.program('nix')} says {answer.strip()!r}, expected {version.version}")


def _output(command: list[str]) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise NixUnavailable(
            f"{' '.join(command)} failed ({run.returncode}): {run.stderr.strip() or run.stdout.strip()}"
        )
    return run.stdout


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that builds {path.parent.name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(message: str) -> None:
    print(f"nixes: {message}", file=sys.stderr, flush=True)
