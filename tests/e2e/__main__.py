"""`python -m tests.e2e [--short]`: upstream's end-to-end tests of storage drivers, on a two-node cluster."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.cluster import driver
from tests.cluster.harness import Cluster
from tests.cluster.harness.__main__ import standard_images
from tests.cluster.harness.cache import built_beside, cache_root, progress
from tests.cluster.harness.components import build_components
from tests.cluster.harness.requirements import missing
from tests.e2e import images, report
from tests.e2e.suite import OF_EXTERNAL_DRIVERS, Run, Spec, Verdict, perform

EXPRESSION = "e2e"
STORAGE_CLASS = "cknix-e2e"

OF_TOPOLOGY = r"\] topology "
ALL = (
    Run("all", OF_EXTERNAL_DRIVERS, skip=(OF_TOPOLOGY,)),
    # Not for all others, since the suite leaves out what is bound at once where there is topology.
    Run("topology", f"{OF_EXTERNAL_DRIVERS}.*{OF_TOPOLOGY}", topology=True),
)
ALL_PASSED = 40
"""Fewer are a failure: the suite has left out what used to be tested."""
SHORT = tuple(replace(each, skip=(*each.skip, r"\[Slow\]")) for each in ALL)
SHORT_PASSED = 26


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when all that applies passed and it was enough, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e", description=__doc__)
    parser.add_argument("--short", action="store_true", help="without those that upstream calls slow")
    parser.add_argument("--focus", metavar="REGEX", help="only the specs whose names have this")
    options = parser.parse_args(arguments)
    if reasons := missing():
        print(*reasons, sep="\n", file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    if options.focus:
        return run((Run("focus", rf"{OF_EXTERNAL_DRIVERS}.*{options.focus}"),), at_least=1)
    return run(SHORT, at_least=SHORT_PASSED) if options.short else run(ALL, at_least=ALL_PASSED)


def run(runs: Sequence[Run], *, at_least: int) -> int:
    """Perform *runs* in one new cluster and print what came of them."""
    build_components()
    image, others = images.build_image(), standard_images()
    began = time.monotonic()
    specs: list[Spec] = []
    with Cluster(nodes=2, images=others) as cluster:
        cluster.import_image(image)
        store_path = prepare(cluster)
        progress(f"e2e: the cluster is ready after {time.monotonic() - began:.0f} s")
        directory = cluster.directory / "e2e"
        try:
            for each in runs:
                specs += perform(cluster, each, store_path, directory / each.name)
        finally:
            kept = keep(directory)
        print(f"\n{report.text(specs)}\n\nreports and output are in {kept}", flush=True)
        require_nothing_left(cluster)
    print(f"in {time.monotonic() - began:.0f} s")
    return conclude(specs, at_least=at_least)


def conclude(specs: Sequence[Spec], *, at_least: int) -> int:
    """Say how many there were of each kind; 0 when none failed and *at_least* so many passed, 1 otherwise."""
    counts = Counter(spec.verdict for spec in specs)
    passed, failed = counts[Verdict.PASSED], counts[Verdict.FAILED]
    if passed < at_least:
        print(f"{at_least} specs or more ought to pass")
    print(f"{passed} passed, {failed} failed, {counts[Verdict.SKIPPED]} skipped, {counts[Verdict.EXCLUDED]} excluded")
    return 1 if failed or passed < at_least else 0


def prepare(cluster: Cluster) -> str:
    """Install cknix and what the specs' volumes show; returns its store path."""
    cluster.kubectl("apply", "-f", str(driver.MANIFESTS))
    driver.rolled_out(cluster)
    cluster.apply(driver.expression(EXPRESSION, driver.demo("hello")))
    store_path = driver.built(cluster, EXPRESSION)
    cluster.apply(storage_class(system_of(cluster), store_path))
    return store_path


def keep(directory: Path) -> Path:
    """Copy what is to be read after the cluster has gone, in place of what an earlier run kept."""
    kept = cache_root() / "e2e"
    with built_beside(kept) as partial:
        shutil.copytree(directory, partial, dirs_exist_ok=True)
    return kept


def require_nothing_left(cluster: Cluster) -> None:
    """Wait until nothing of any volume is left anywhere, and the driver is well."""
    cluster.wait(
        "the specs' namespaces are gone", lambda: not cluster.get("namespace", "-l", "e2e-framework")["items"], 180
    )
    cluster.kubectl("delete", "expr", EXPRESSION)
    driver.assert_nothing_left(cluster)
    for query in (("persistentvolume",), ("configmap", "-n", "cknix-volumes", "-l", "cknix.cool/volume")):
        cluster.wait(f"there is no {query[0]} left", lambda: not cluster.get(*query)["items"], 60)  # noqa: B023
    driver.rolled_out(cluster)


def system_of(cluster: Cluster) -> str:
    """The Nix system of the cluster's nodes."""
    label = "jsonpath={.metadata.labels.cknix\\.cool/system}"
    return cluster.kubectl("get", "node", cluster.nodes[0].name, "-o", label)


def storage_class(system: str, store_path: str) -> str:
    """The specs' namespaces are their own, so it names no Expression."""
    return f"""\
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {{name: {STORAGE_CLASS}}}
provisioner: csi.cknix.cool
parameters: {{{system}: {store_path}}}
"""


if __name__ == "__main__":
    sys.exit(main())
