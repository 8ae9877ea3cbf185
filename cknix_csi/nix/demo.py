"""Where the demo package set is: what ``<cknix-demo>`` means in an expression."""

from __future__ import annotations

import shutil
from pathlib import Path


def search_path() -> dict[str, Path]:
    """``<cknix-demo>`` and the static busybox it is made from; empty where either is missing.

    In an installed package the set is ``cknix_csi/demo``, in a source tree ``nix/demo``.
    """
    package = Path(__file__).resolve().parent.parent
    directory = next((path for path in (package / "demo", package.parent / "nix/demo") if path.is_dir()), None)
    busybox = shutil.which("busybox")
    if directory is None or busybox is None:
        return {}
    return {"cknix-demo": directory, "cknix-demo-busybox": Path(busybox).resolve()}
