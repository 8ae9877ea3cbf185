"""The text a binary cache answers for one path (``NarInfo::to_string`` and its parser in Nix's nar-info.cc)."""

from __future__ import annotations

from collections.abc import Iterable

from cknix_csi.api.closure import PathInfo
from cknix_csi.api.storepath import STORE_DIR
from cknix_csi.nix.cache.signing import nar_hash_base32

CONTENT_TYPE = "text/x-nix-narinfo"


def nar_url(info: PathInfo) -> str:
    """Where *info*'s NAR is, relative to the root of the cache.

    The NAR's hash is part of the address: a client that still holds an old narinfo must get "not found" once the path
    was collected and made again with other content, and not bytes that fail their check.
    """
    return f"nar/{info.path.hash}-{nar_hash_base32(info)}.nar"


def format_narinfo(info: PathInfo, signatures: Iterable[str]) -> str:
    """The narinfo of *info*, its NAR uncompressed, with exactly *signatures*.

    ``Compression`` must be said: Nix takes a missing one for bzip2.  ``FileHash`` and ``FileSize`` describe the file
    as it is sent and would only repeat ``NarHash`` and ``NarSize``.
    """
    lines = [
        ("StorePath", str(info.path)),
        ("URL", nar_url(info)),
        ("Compression", "none"),
        ("NarHash", f"sha256:{nar_hash_base32(info)}"),
        ("NarSize", str(info.nar_size)),
        ("References", " ".join(reference.basename for reference in sorted(info.references))),
    ]
    if info.deriver:
        lines.append(("Deriver", info.deriver.removeprefix(f"{STORE_DIR}/")))
    lines.extend(("Sig", signature) for signature in signatures)
    if info.content_address:
        lines.append(("CA", info.content_address))
    return "".join(f"{key}: {value}\n" for key, value in lines)
