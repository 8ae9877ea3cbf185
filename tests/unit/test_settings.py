"""Settings from the environment."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cknix_csi.api.errors import Invalid
from cknix_csi.api.limits import SizePolicy
from cknix_csi.api.policies import StorePaths
from cknix_csi.api.watermarks import Watermark, Watermarks
from cknix_csi.settings import (
    ControllerSettings,
    NixSettings,
    NodeSettings,
    ProvisionerSettings,
    controller_settings,
    node_settings,
    provisioner_settings,
    run_settings,
)

SYSTEMS = {"x86_64": "x86_64-linux", "aarch64": "aarch64-linux"}


def problems(environment: Mapping[str, str]) -> set[str]:
    """Whatever any of the three roles says."""
    found: set[str] = set()
    for read in (node_settings, controller_settings, lambda env: run_settings(env, None)):
        try:
            read(environment)
        except Invalid as error:
            found.update(map(str, error.problems))
    return found


def nix(data_root: str, *, restrict_eval: bool = True) -> NixSettings:
    system = SYSTEMS.get(platform.machine(), "x86_64-linux")
    return NixSettings(Path(data_root), system, 300.0, 3600.0, 1800.0, restrict_eval)


def test_a_node_needs_no_settings() -> None:
    assert node_settings({}) == NodeSettings(
        nix=nix("/var/lib/cknix"),
        endpoint=Path("/var/lib/kubelet/plugins/csi.cknix.cool/csi.sock"),
        node_name=platform.node(),
        kubelet_root=Path("/var/lib/kubelet"),
        namespace="cknix-system",
        rpc_budget=100.0,
        sizes=SizePolicy(default=None, maximum=None),
        store_paths=StorePaths.ALLOW,
        keep_warm=16,
        keep_warm_seconds=600.0,
        abandoned_seconds=604_800.0,
        watermarks=Watermarks(Watermark(percent=15.0), Watermark(percent=20.0)),
        keep_capabilities=False,
        metrics=("::", 9808),
        log_level="info",
        log_format="text",
    )


def test_the_controller_needs_no_settings() -> None:
    assert controller_settings({}) == ControllerSettings(
        nix=nix("/var/lib/cknix/controller"),
        namespace="cknix-system",
        cache_url="http://cknix-cache.cknix-system.svc",
        cache_host="::",
        cache_port=8080,
        max_builds=4,
        watermarks=Watermarks(Watermark(percent=15.0), Watermark(percent=20.0)),
        node_name=platform.node(),
        keep_capabilities=False,
        log_level="info",
        log_format="text",
    )


def test_the_provisioner_needs_no_settings() -> None:
    assert provisioner_settings({}) == ProvisionerSettings(
        endpoint=Path("/run/csi/csi.sock"),
        namespace="cknix-volumes",
        metrics=("::", 9808),
        log_level="info",
        log_format="text",
    )


def test_run_needs_no_settings_and_trusts_its_user() -> None:
    assert run_settings({}, None) == nix("/var/lib/cknix", restrict_eval=False)


def test_run_can_be_restricted_as_the_controller_is() -> None:
    assert run_settings({"CKNIX_RESTRICT_EVAL": "no"}, None, restricted=True).restrict_eval
    assert run_settings({"CKNIX_RESTRICT_EVAL": "yes"}, None).restrict_eval


def test_the_command_line_comes_before_the_environment() -> None:
    environment = {"CKNIX_DATA_ROOT": "/a"}
    assert run_settings(environment, None).data_root == Path("/a")
    assert run_settings(environment, Path("/b")).data_root == Path("/b")


def test_the_cache_is_found_in_the_drivers_namespace() -> None:
    assert controller_settings({"CKNIX_NAMESPACE": "infra"}).cache_url == "http://cknix-cache.infra.svc"


@pytest.mark.parametrize("blank", ["", "  ", "\n"])
def test_a_blank_variable_is_as_good_as_none(blank: str) -> None:
    names = ["CKNIX_DATA_ROOT", "CKNIX_RPC_BUDGET", "CSI_ENDPOINT", "CKNIX_LOG_LEVEL", "CKNIX_SYSTEM", "KUBE_NODE_NAME"]
    assert node_settings(dict.fromkeys(names, blank)) == node_settings({})


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("CKNIX_DATA_ROOT", " /data ", "nix.data_root", Path("/data")),
        ("CKNIX_SYSTEM", "aarch64-linux", "nix.system", "aarch64-linux"),
        ("CKNIX_EVAL_TIMEOUT", "90", "nix.eval_timeout", 90.0),
        ("CKNIX_EVAL_TIMEOUT", "0.5", "nix.eval_timeout", 0.5),
        ("CKNIX_BUILD_TIMEOUT", "1h30m", "nix.build_timeout", 5400.0),
        ("CKNIX_FETCH_TIMEOUT", "1d", "nix.fetch_timeout", 86_400.0),
        ("CKNIX_RESTRICT_EVAL", "No", "nix.restrict_eval", False),
        ("CKNIX_RESTRICT_EVAL", "1", "nix.restrict_eval", True),
        ("CSI_ENDPOINT", "unix:///csi/csi.sock", "endpoint", Path("/csi/csi.sock")),
        ("CSI_ENDPOINT", "unix:/csi/csi.sock", "endpoint", Path("/csi/csi.sock")),
        ("CSI_ENDPOINT", "/csi/csi.sock", "endpoint", Path("/csi/csi.sock")),
        ("KUBE_NODE_NAME", "node-1", "node_name", "node-1"),
        ("CKNIX_KUBELET_ROOT", "/k", "kubelet_root", Path("/k")),
        ("CKNIX_NAMESPACE", "infra", "namespace", "infra"),
        ("CKNIX_RPC_BUDGET", "20s", "rpc_budget", 20.0),
        ("CKNIX_SIZE_LIMIT_DEFAULT", "1Gi", "sizes", SizePolicy(default=1 << 30)),
        ("CKNIX_SIZE_LIMIT_MAX", "10G", "sizes", SizePolicy(maximum=10**10)),
        ("CKNIX_METRICS_LISTEN", "127.0.0.1:9000", "metrics", ("127.0.0.1", 9000)),
        ("CKNIX_METRICS_LISTEN", "Off", "metrics", None),
        ("CKNIX_KEEP_WARM", "16", "keep_warm", 16),
        ("CKNIX_KEEP_WARM", "0", "keep_warm", 0),
        ("CKNIX_KEEP_WARM_TIME", "1h", "keep_warm_seconds", 3600.0),
        ("CKNIX_ABANDONED_STORE_TIME", "30d", "abandoned_seconds", 2_592_000.0),
        ("CKNIX_ABANDONED_STORE_TIME", "0", "abandoned_seconds", 0.0),
        ("CKNIX_GC_LOW", "5Gi", "watermarks.low", Watermark(size=5 << 30)),
        ("CKNIX_GC_LOW", "0", "watermarks.low", Watermark(size=0)),
        ("CKNIX_GC_HIGH", "50%", "watermarks.high", Watermark(percent=50.0)),
        ("CKNIX_LOG_LEVEL", "DEBUG", "log_level", "debug"),
        ("CKNIX_LOG_FORMAT", "Json", "log_format", "json"),
    ],
)
def test_a_node_reads_its_variables(name: str, text: str, field: str, value: Any) -> None:
    found: Any = node_settings({name: text})
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("CKNIX_CACHE_URL", "https://cache.example/nix/", "cache_url", "https://cache.example/nix"),
        ("CKNIX_MAX_BUILDS", "12", "max_builds", 12),
        ("CKNIX_CACHE_LISTEN", "127.0.0.1:0", "cache_port", 0),
        ("CKNIX_CACHE_LISTEN", "127.0.0.1:80", "cache_host", "127.0.0.1"),
        ("CKNIX_CACHE_LISTEN", "[::1]:80", "cache_host", "::1"),
        ("CKNIX_CACHE_LISTEN", ":80", "cache_host", "::"),
    ],
)
def test_the_controller_reads_its_variables(name: str, text: str, field: str, value: Any) -> None:
    assert getattr(controller_settings({name: text}), field) == value


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("CKNIX_DATA_ROOT", "data", "is not an absolute path"),
        ("CKNIX_DATA_ROOT", "/data/../etc", "is not an absolute path"),
        ("CKNIX_DATA_ROOT", "/", "must be a directory below /"),
        ("CKNIX_DATA_ROOT", "//", "must be a directory below /"),
        ("CKNIX_SYSTEM", "x86_64-darwin", "is not a known system; known are x86_64-linux"),
        ("CKNIX_EVAL_TIMEOUT", "soon", "is not a time; write seconds, or for example 15m or 1h30m"),
        ("CKNIX_EVAL_TIMEOUT", "0", "must be longer than nothing"),
        ("CKNIX_BUILD_TIMEOUT", "-1", "must be longer than nothing"),
        ("CKNIX_BUILD_TIMEOUT", "0s", "must be longer than nothing"),
        ("CKNIX_FETCH_TIMEOUT", "nan", "must be longer than nothing"),
        ("CKNIX_FETCH_TIMEOUT", "inf", "not longer than a year"),
        ("CKNIX_FETCH_TIMEOUT", "9" * 400 + "s", "not longer than a year"),
        ("CKNIX_RESTRICT_EVAL", "maybe", "must be true or false"),
        ("CSI_ENDPOINT", "tcp://127.0.0.1:1", "is not a unix socket; write for example unix:///csi/csi.sock"),
        ("CSI_ENDPOINT", "csi.sock", "must be an absolute path that ends in .sock"),
        ("CSI_ENDPOINT", "unix://csi/csi.sock", "must be an absolute path that ends in .sock"),
        ("CSI_ENDPOINT", "unix:///csi/csi", "must be an absolute path that ends in .sock"),
        ("CSI_ENDPOINT", f"unix:///{'x' * 102}.sock", "is longer than the 107 bytes that a socket's path may have"),
        ("CKNIX_KUBELET_ROOT", "kubelet", "is not an absolute path"),
        ("CKNIX_NAMESPACE", "Infra", "is not the name of a namespace"),
        ("CKNIX_NAMESPACE", "x" * 64, "is not the name of a namespace"),
        ("CKNIX_RPC_BUDGET", "2m", "must be shorter than the 120 s that kubelet gives an RPC"),
        ("CKNIX_LOG_LEVEL", "loud", "is not one of debug, info, warning, error"),
        ("CKNIX_LOG_FORMAT", "xml", "is not one of text, json"),
        ("CKNIX_CACHE_URL", "cache.example", "is not a URL; write for example http://cknix-cache.cknix-system.svc"),
        ("CKNIX_CACHE_URL", "http://a b", "is not a URL"),
        ("CKNIX_CACHE_LISTEN", "8080", "must be host:port, for example 0.0.0.0:8080"),
        ("CKNIX_CACHE_LISTEN", "0.0.0.0:65536", "must be host:port"),
        ("CKNIX_CACHE_LISTEN", "0.0.0.0:http", "must be host:port"),
        ("CKNIX_MAX_BUILDS", "0", "must be a whole number of at least 1"),
        ("CKNIX_MAX_BUILDS", "1.5", "must be a whole number of at least 1"),
        ("CKNIX_MAX_BUILDS", "-1", "must be a whole number of at least 1"),
        ("CKNIX_SIZE_LIMIT_DEFAULT", "10GB", "is not an amount of bytes; write for example 10Gi, 500Mi, 1.5G or 1e9"),
        ("CKNIX_SIZE_LIMIT_MAX", "1Ki", "is too small; the limit is from 1Mi to 1Ti"),
        ("CKNIX_GC_LOW", "little", "is neither a share of the disk, such as 10%, nor a size, such as 5Gi"),
        ("CKNIX_GC_HIGH", "100%", "must be less than 100%"),
        ("CKNIX_METRICS_LISTEN", "9808", "must be host:port, for example 0.0.0.0:8080, or off"),
        ("CKNIX_KEEP_WARM", "-1", "must be a whole number, at least 0"),
        ("CKNIX_KEEP_WARM", "many", "must be a whole number, at least 0"),
        ("CKNIX_KEEP_WARM_TIME", "0", "must be longer than nothing"),
        ("CKNIX_ABANDONED_STORE_TIME", "-1", "must be longer than nothing"),
    ],
)
def test_a_bad_variable_is_refused_with_its_reason(name: str, text: str, problem: str) -> None:
    [found] = problems({name: text})
    assert found.startswith(f"environment variable {name}: {text!r} ")
    assert problem in found


def test_a_default_size_above_the_largest_is_refused_naming_both() -> None:
    assert problems({"CKNIX_SIZE_LIMIT_DEFAULT": "2Gi", "CKNIX_SIZE_LIMIT_MAX": "1Gi"}) == {
        "environment variable CKNIX_SIZE_LIMIT_DEFAULT: 2Gi is more than CKNIX_SIZE_LIMIT_MAX, which is 1Gi"
    }


@pytest.mark.parametrize(
    ("environment", "low", "high"),
    [
        ({"CKNIX_GC_LOW": "30%", "CKNIX_GC_HIGH": "25%"}, "30%", "25%"),
        ({"CKNIX_GC_LOW": "1Gi", "CKNIX_GC_HIGH": "1024Mi"}, "1Gi", "1Gi"),
        ({"CKNIX_GC_LOW": "20%"}, "20%", "20%"),
        ({"CKNIX_GC_HIGH": "10%"}, "15%", "10%"),
    ],
)
def test_a_low_mark_that_is_not_below_the_high_one_is_refused_naming_both(
    environment: dict[str, str], low: str, high: str
) -> None:
    assert problems(environment) == {
        f"environment variable CKNIX_GC_LOW: {low} is not less than CKNIX_GC_HIGH, which is {high}"
    }


def test_a_mark_that_cannot_be_read_is_not_compared_as_well() -> None:
    [problem] = problems({"CKNIX_GC_LOW": "lots", "CKNIX_GC_HIGH": "10%"})
    assert "'lots' is neither" in problem


def test_every_problem_is_told_at_once() -> None:
    environment = {
        "CKNIX_DATA_ROOT": "x",
        "CKNIX_EVAL_TIMEOUT": "x",
        "CSI_ENDPOINT": "x",
        "CKNIX_RPC_BUDGET": "x",
        "CKNIX_LOG_LEVEL": "x",
    }
    with pytest.raises(Invalid) as caught:
        node_settings(environment)
    assert {problem.field for problem in caught.value.problems} == {
        f"environment variable {name}" for name in environment
    }
    assert all(name in caught.value.message for name in environment)
