"""The controller keeps room on its disk as a node does; here with no API server that answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cknix_csi.nix.gcroots import GcRoots
from cknix_csi.nix.store import Store
from tests import nixes
from tests.nix.disks import fill
from tests.nixes import NixEnv

LIMIT = 30.0


def test_what_no_expression_holds_is_collected_when_the_disk_is_full(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a network namespace of its own: run as root")
    env = NixEnv(nixes.nix("trixie"), tmp_path / "nix")
    paths = fill(env, {"kept": ["k"], "old": ["o"]}, {"k": 1000, "o": 1000})
    GcRoots(Store.chroot(env.root), "expressions").add("default/hello/x", paths["kept"])
    GcRoots(Store.chroot(env.root), "evaluations").add("left", paths["old"])  # by a process that was killed
    kubeconfig = tmp_path / "kubeconfig"
    cluster = {"clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}], "current-context": "c"}
    context = {
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
    }
    kubeconfig.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **cluster, **context}))
    environment = {
        **env.environ,
        "KUBECONFIG": str(kubeconfig),
        "CKNIX_DATA_ROOT": str(env.root),
        "CKNIX_GC_LOW": "98%",
        "CKNIX_GC_HIGH": "99%",
    }
    log = tmp_path / "log"
    with log.open("wb") as output:
        command = ["unshare", "--net", sys.executable, "-m", "cknix_csi.cli", "controller"]
        controller = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + LIMIT
        while "collected " not in log.read_text() and time.monotonic() < deadline and controller.poll() is None:
            time.sleep(0.05)
        assert controller.poll() is None, log.read_text()
        controller.terminate()
        assert controller.wait(LIMIT) == 0
        valid = set(env.lines("nix", "path-info", "--all"))
        assert valid == {str(paths["kept"]), str(paths["k"])}, log.read_text()
    finally:
        controller.kill()
        controller.wait()
        env.destroy()
