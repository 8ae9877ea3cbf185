"""Settings: the environment, read once, validated as a whole and frozen.

Every variable has the prefix ``CKNIX_``, but for the two that CSI and Kubernetes name: ``CSI_ENDPOINT`` (CSI spec,
"Configuration and Operation") and ``KUBE_NODE_NAME``.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cknix_csi import logs
from cknix_csi.api.durations import parse_duration
from cknix_csi.api.errors import Invalid, Problem
from cknix_csi.api.limits import Limit, SizePolicy
from cknix_csi.api.policies import StorePaths
from cknix_csi.api.quantity import format_quantity, parse_quantity
from cknix_csi.api.systems import KNOWN_SYSTEMS, system_of_machine
from cknix_csi.api.watermarks import Watermark, Watermarks

T = TypeVar("T")

ANY = "::"
"""The host that stands for all addresses of the machine: of IPv6 and of IPv4, or of IPv4 where that is all it has."""
DRIVER_NAME = "csi.cknix.cool"
DATA_ROOT = Path("/var/lib/cknix")
CONTROLLER = "controller"
"""Below a node's data root: the controller's, while it runs on that node."""
LOG_LEVELS = ("debug", "info", "warning", "error")

_STORE_PATHS = tuple(policy.value for policy in StorePaths)
_METRICS: tuple[str, int] | None = (ANY, 9808)  # in a pod's own network namespace
_KUBELET_SECONDS = 120
_MAX_SECONDS = 366 * 86_400
# sizeof(sockaddr_un.sun_path) without the final NUL: unix(7).
_MAX_SOCKET_PATH = 107


@dataclass(frozen=True, slots=True)
class NixSettings:
    """How Nix is run; times are seconds."""

    data_root: Path
    system: str
    eval_timeout: float
    build_timeout: float
    fetch_timeout: float
    restrict_eval: bool


@dataclass(frozen=True, slots=True)
class NodeSettings:
    nix: NixSettings
    endpoint: Path
    """The CSI socket as this process sees it, and as kubelet sees it: the same path."""
    node_name: str
    kubelet_root: Path
    namespace: str
    """Where the driver itself is installed."""
    rpc_budget: float
    """Seconds an RPC waits for work before it answers "in progress"; kubelet gives it 120."""
    sizes: SizePolicy
    """How much writable volumes may hold."""
    store_paths: StorePaths
    """Which ones pods may name."""
    keep_warm: int
    """How many views stay when their last pod is gone; 0 for none."""
    keep_warm_seconds: float
    abandoned_seconds: float
    """How long the store of a controller that has moved to another node is kept."""
    watermarks: Watermarks
    """Of the data root's disk."""
    keep_capabilities: bool
    """Give up none of root's powers, where those that are needed may be others than we know."""
    metrics: tuple[str, int] | None
    """Host and port of metrics and health; None for nowhere."""
    log_level: str
    log_format: str


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    nix: NixSettings
    namespace: str
    node_name: str
    cache_url: str
    cache_host: str
    cache_port: int
    max_builds: int
    watermarks: Watermarks
    """Of the data root's disk."""
    keep_capabilities: bool
    """Give up none of root's powers, where those that are needed may be others than we know."""
    log_level: str
    log_format: str


@dataclass(frozen=True, slots=True)
class ProvisionerSettings:
    endpoint: Path
    """The CSI socket that external-provisioner looks for."""
    namespace: str
    """Where the records of volumes are, and nothing else."""
    metrics: tuple[str, int] | None
    """Host and port of metrics and health; None for nowhere."""
    log_level: str
    log_format: str


def node_settings(environment: Mapping[str, str]) -> NodeSettings:
    """Raises :class:`Invalid` with every problem."""
    read = _Reader(environment)
    settings = NodeSettings(
        nix=_nix(read, DATA_ROOT),
        endpoint=read("CSI_ENDPOINT", _endpoint, Path(f"/var/lib/kubelet/plugins/{DRIVER_NAME}/csi.sock")),
        node_name=read("KUBE_NODE_NAME", _text, platform.node()),
        kubelet_root=read("CKNIX_KUBELET_ROOT", _absolute, Path("/var/lib/kubelet")),
        namespace=read("CKNIX_NAMESPACE", _namespace, "cknix-system"),
        rpc_budget=read("CKNIX_RPC_BUDGET", _rpc_budget, 100.0),
        sizes=_sizes(read),
        store_paths=StorePaths(read("CKNIX_STORE_PATHS", _choice(_STORE_PATHS), StorePaths.ALLOW.value)),
        keep_warm=read("CKNIX_KEEP_WARM", _count, 16),
        keep_warm_seconds=read("CKNIX_KEEP_WARM_TIME", _seconds, 600.0),
        abandoned_seconds=read("CKNIX_ABANDONED_STORE_TIME", _seconds_or_none, 604_800.0),
        watermarks=_watermarks(read),
        keep_capabilities=_keep_capabilities(read),
        metrics=read("CKNIX_METRICS_LISTEN", _listen_or_off, _METRICS),
        log_level=_log_level(read),
        log_format=_log_format(read),
    )
    read.finish()
    return settings


def controller_settings(environment: Mapping[str, str]) -> ControllerSettings:
    """Raises :class:`Invalid` with every problem."""
    read = _Reader(environment)
    namespace = read("CKNIX_NAMESPACE", _namespace, "cknix-system")
    host, port = read("CKNIX_CACHE_LISTEN", _listen, (ANY, 8080))  # in a pod's own network namespace
    settings = ControllerSettings(
        nix=_nix(read, DATA_ROOT / CONTROLLER),
        namespace=namespace,
        node_name=read("KUBE_NODE_NAME", _text, platform.node()),
        cache_url=read("CKNIX_CACHE_URL", _url, f"http://cknix-cache.{namespace}.svc"),
        cache_host=host,
        cache_port=port,
        max_builds=read("CKNIX_MAX_BUILDS", _positive, 4),
        watermarks=_watermarks(read),
        keep_capabilities=_keep_capabilities(read),
        log_level=_log_level(read),
        log_format=_log_format(read),
    )
    read.finish()
    return settings


def provisioner_settings(environment: Mapping[str, str]) -> ProvisionerSettings:
    """Raises :class:`Invalid` with every problem."""
    read = _Reader(environment)
    settings = ProvisionerSettings(
        endpoint=read("CSI_ENDPOINT", _endpoint, Path("/run/csi/csi.sock")),
        namespace=read("CKNIX_VOLUMES_NAMESPACE", _namespace, "cknix-volumes"),
        metrics=read("CKNIX_METRICS_LISTEN", _listen_or_off, _METRICS),
        log_level=_log_level(read),
        log_format=_log_format(read),
    )
    read.finish()
    return settings


def run_settings(environment: Mapping[str, str], data_root: Path | None, *, restricted: bool = False) -> NixSettings:
    """For ``cknix-csi run``; what the command line says comes before *environment*.

    The caller is root on this machine already, so evaluation is restricted only when they want that.  Raises
    :class:`Invalid` with every problem.
    """
    told = {"CKNIX_DATA_ROOT": str(data_root or ""), "CKNIX_RESTRICT_EVAL": "true" if restricted else ""}
    read = _Reader({**environment, **{name: text for name, text in told.items() if text}})
    settings = _nix(read, DATA_ROOT, restrict_eval=False)
    read.finish()
    return settings


class _Reader:
    """Reads variables one by one and keeps what is wrong with them for :meth:`finish`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._problems: list[Problem] = []

    def __call__(self, name: str, parse: Callable[[str], T], default: T) -> T:
        text = self._environment.get(name, "")
        if not text.strip():
            return default
        try:
            return parse(text.strip())
        except ValueError as error:
            self.refuse(name, f"{text!r} {error}")
            return default

    def refuse(self, name: str, problem: str) -> None:
        """Keep *problem* of variable *name* too."""
        self._problems.append(Problem(f"environment variable {name}", problem))

    def refused(self, *names: str) -> bool:
        """True when one of the variables *names* has been read or kept as a problem."""
        return any(problem.field == f"environment variable {name}" for problem in self._problems for name in names)

    def finish(self) -> None:
        if self._problems:
            raise Invalid(self._problems)


def _nix(read: _Reader, data_root: Path, *, restrict_eval: bool = True) -> NixSettings:
    return NixSettings(
        data_root=read("CKNIX_DATA_ROOT", _absolute, data_root),
        system=read("CKNIX_SYSTEM", _system, system_of_machine(platform.machine()) or KNOWN_SYSTEMS[0]),
        eval_timeout=read("CKNIX_EVAL_TIMEOUT", _seconds, 300.0),
        build_timeout=read("CKNIX_BUILD_TIMEOUT", _seconds, 3600.0),
        fetch_timeout=read("CKNIX_FETCH_TIMEOUT", _seconds, 1800.0),
        restrict_eval=read("CKNIX_RESTRICT_EVAL", _boolean, restrict_eval),
    )


def _sizes(read: _Reader) -> SizePolicy:
    sizes = SizePolicy(
        default=read("CKNIX_SIZE_LIMIT_DEFAULT", _size, None), maximum=read("CKNIX_SIZE_LIMIT_MAX", _size, None)
    )
    if sizes.default is not None and sizes.maximum is not None and sizes.default > sizes.maximum:
        default, maximum = format_quantity(sizes.default), format_quantity(sizes.maximum)
        read.refuse("CKNIX_SIZE_LIMIT_DEFAULT", f"{default} is more than CKNIX_SIZE_LIMIT_MAX, which is {maximum}")
    return sizes


def _watermarks(read: _Reader) -> Watermarks:
    default = Watermarks()
    low = read("CKNIX_GC_LOW", Watermark.parse, default.low)
    high = read("CKNIX_GC_HIGH", Watermark.parse, default.high)
    if read.refused("CKNIX_GC_LOW", "CKNIX_GC_HIGH"):
        return default
    try:
        return Watermarks(low, high)
    except ValueError:
        read.refuse("CKNIX_GC_LOW", f"{low} is not less than CKNIX_GC_HIGH, which is {high}")
        return default


def _keep_capabilities(read: _Reader) -> bool:
    return read("CKNIX_KEEP_CAPABILITIES", _boolean, default=False)


def _log_level(read: _Reader) -> str:
    return read("CKNIX_LOG_LEVEL", _choice(LOG_LEVELS), "info")


def _log_format(read: _Reader) -> str:
    return read("CKNIX_LOG_FORMAT", _choice(logs.FORMATS), logs.TEXT)


def _text(text: str) -> str:
    return text


def _namespace(text: str) -> str:
    # RFC 1123 label, as the API server checks it.
    if not re.fullmatch("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", text):
        raise ValueError("is not the name of a namespace")
    return text


def _absolute(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError("is not an absolute path")
    if len(path.parts) < 2:
        raise ValueError("must be a directory below /")
    return path


def _endpoint(text: str) -> Path:
    if text.startswith("unix:"):
        text = text.removeprefix("unix:").removeprefix("//")
    elif "://" in text:
        raise ValueError("is not a unix socket; write for example unix:///csi/csi.sock")
    if not text.startswith("/") or not text.endswith(".sock"):
        raise ValueError("must be an absolute path that ends in .sock (CSI spec, Connectivity)")
    if len(os.fsencode(text)) > _MAX_SOCKET_PATH:
        raise ValueError(f"is longer than the {_MAX_SOCKET_PATH} bytes that a socket's path may have")
    return Path(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parse_duration(text)
        except ValueError:
            raise ValueError("is not a time; write seconds, or for example 15m or 1h30m") from None
    if not 0 < seconds <= _MAX_SECONDS:
        raise ValueError("must be longer than nothing and not longer than a year")
    return float(seconds)


def _seconds_or_none(text: str) -> float:
    return 0.0 if text in {"0", "0s"} else _seconds(text)


def _rpc_budget(text: str) -> float:
    seconds = _seconds(text)
    if seconds >= _KUBELET_SECONDS:
        raise ValueError(f"must be shorter than the {_KUBELET_SECONDS} s that kubelet gives an RPC")
    return seconds


def _positive(text: str) -> int:
    if not re.fullmatch("[0-9]+", text) or int(text) < 1:
        raise ValueError("must be a whole number of at least 1")
    return int(text)


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,6}", text):
        raise ValueError("must be a whole number, at least 0")
    return int(text)


def _size(text: str) -> int | None:
    try:
        return Limit(parse_quantity(text)).bytes
    except ValueError as error:
        raise ValueError(f"is refused: {error}") from None


def _boolean(text: str) -> bool:
    if text.lower() in {"true", "1", "yes"}:
        return True
    if text.lower() in {"false", "0", "no"}:
        return False
    raise ValueError("must be true or false")


def _system(text: str) -> str:
    if text not in KNOWN_SYSTEMS:
        raise ValueError(f"is not a known system; known are {', '.join(KNOWN_SYSTEMS)}")
    return text


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", text):
        raise ValueError("is not a URL; write for example http://cknix-cache.cknix-system.svc")
    return text.rstrip("/")


def _listen(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65_535:
        raise ValueError("must be host:port, for example 0.0.0.0:8080")
    return host.strip("[]") or ANY, int(port)


def _listen_or_off(text: str) -> tuple[str, int] | None:
    if text.lower() == "off":
        return None
    try:
        return _listen(text)
    except ValueError as error:
        raise ValueError(f"{error}, or off") from None


def _choice(known: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in known:
            raise ValueError(f"is not one of {', '.join(known)}")
        return text.lower()

    return parse
