"""``cknix-csi probe``: what this node can do, tried with the code that relies on it, and what follows for volumes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from cknix_csi.nix.store import Store
from cknix_csi.run.namespace import enter_private_mounts
from cknix_csi.settings import run_settings
from cknix_csi.volumes.choose import Prospect, prospects
from cknix_csi.volumes.failures import explained
from cknix_csi.volumes.mounts import KernelMounts
from cknix_csi.volumes.probe import TITLES, Finding, ProbeResult, probe, table


def run(environment: Mapping[str, str], data_root: Path | None, *, as_json: bool) -> int:
    """Print what was found; returns 0 where read-only and writable volumes can be had, else 1.

    The data root is left as it was, one that is missing too, and no mount is ever seen by others.  Raises
    :class:`Invalid` for bad settings, and :class:`CknixError` when nothing can be tried there.
    """
    root = run_settings(environment, data_root.resolve() if data_root else None).data_root
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="cknix: %(levelname)s %(name)s: %(message)s")
    with explained("enter a mount namespace"):
        enter_private_mounts()
    with explained(f"work in the data root {root}"), _made(root / "probe") as scratch:
        result = probe(scratch, Store.chroot(root).physical, KernelMounts())
    found = prospects(result)
    print(_json(root, result, found) if as_json else _text(root, result, found), end="")
    return 0 if all(prospect.choice for prospect in found if prospect.ordinary) else 1


@contextlib.contextmanager
def _made(directory: Path) -> Iterator[Path]:
    """*directory*; what of its path is missing is made, and removed again where it is empty."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(0o700, parents=True, exist_ok=True)
    try:
        yield directory
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def _text(root: Path, result: ProbeResult, found: list[Prospect]) -> str:
    width = max(len(prospect.kind) for prospect in found)
    lines = [f"{'volumes':{width}}  made as   because"]
    for prospect in found:
        made = prospect.choice.presentation.value if prospect.choice else "none"
        lines.append(f"{prospect.kind:{width}}  {made:8}  {prospect.reason}")
    return f"data root {root}\n\n{table(result)}\n" + "".join(f"{line}\n" for line in lines)


def _json(root: Path, result: ProbeResult, found: list[Prospect]) -> str:
    properties = {}
    for name, title in TITLES.items():
        finding: Finding = getattr(result, name)
        properties[name] = {"title": title, **asdict(finding)}
    volumes = [
        {
            "kind": prospect.kind,
            "presentation": prospect.choice.presentation.value if prospect.choice else None,
            "overlay": prospect.choice.overlay if prospect.choice else None,
            "reason": prospect.reason,
        }
        for prospect in found
    ]
    told = {"dataRoot": os.fspath(root), "kernel": result.kernel, "properties": properties, "volumes": volumes}
    return json.dumps(told, indent=2) + "\n"
