"""The narinfo text, read back by the rules of Nix's own parser."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from cknix_csi.api.closure import PathInfo
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.cache import base32
from cknix_csi.nix.cache.narinfo import format_narinfo, nar_url

_paths = st.builds(
    StorePath,
    hash=st.text(base32.ALPHABET, min_size=32, max_size=32),
    name=st.from_regex(r"[0-9A-Za-z+\-_?=][0-9A-Za-z+\-._?=]{0,30}", fullmatch=True),
)
_infos = st.builds(
    PathInfo,
    path=_paths,
    nar_hash=st.binary(min_size=32, max_size=32).map(lambda digest: f"sha256:{digest.hex()}"),
    nar_size=st.integers(1, 2**63),
    references=st.lists(_paths, max_size=4, unique=True).map(tuple),
    deriver=st.none() | _paths.map(lambda path: f"{path}.drv"),
    content_address=st.none() | st.just("fixed:r:sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"),
)


def parse(text: str) -> dict[str, list[str]]:
    """As nar-info.cc: every line is ``key: value`` and ends in a newline."""
    assert text.endswith("\n")
    fields: dict[str, list[str]] = defaultdict(list)
    for line in text.removesuffix("\n").split("\n"):
        key, colon, value = line.partition(": ")
        assert colon, line
        fields[key].append(value)
    return fields


@given(_infos, st.lists(st.just("k:c2ln") | st.just("l:c2ln"), max_size=3))
def test_a_narinfo_says_all_that_the_database_knows_and_each_thing_once(info: PathInfo, signatures: list[str]) -> None:
    fields = parse(format_narinfo(info, signatures))
    assert fields.pop("Sig", []) == signatures
    assert all(len(values) == 1 for values in fields.values())
    one = {key: values[0] for key, values in fields.items()}
    assert one["StorePath"] == str(info.path)
    assert one["NarHash"] == "sha256:" + base32.encode(bytes.fromhex(info.nar_hash.partition(":")[2]))
    assert one["NarSize"] == str(info.nar_size)
    assert {f"/nix/store/{name}" for name in one["References"].split()} == set(map(str, info.references))
    assert one["Compression"] == "none"
    assert one.get("Deriver") == (info.deriver and info.deriver.removeprefix("/nix/store/"))
    assert one.get("CA") == info.content_address
    assert one["URL"] == nar_url(info)


@given(_infos, st.binary(min_size=32, max_size=32))
def test_other_content_has_another_address(info: PathInfo, digest: bytes) -> None:
    other = PathInfo(info.path, f"sha256:{digest.hex()}", info.nar_size, info.references)
    assert (nar_url(other) == nar_url(info)) == (other.nar_hash == info.nar_hash)
