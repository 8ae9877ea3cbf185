"""The grammar of store paths."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cknix_csi.api.storepath import PATTERN, InvalidStorePath, StorePath

HASH = "6c1vlf6kyyl0x5cjdhvr3bymgxa74fjb"
# "The alphabet is 0-9 a-z without e, o, t and u" (Nix manual, "Nix32").
BASE32 = sorted(set(string.digits + string.ascii_lowercase) - set("eotu"))
NAME_CHARACTERS = string.ascii_letters + string.digits + "+-._?="

hashes = st.text(st.sampled_from(BASE32), min_size=32, max_size=32)
names = st.text(st.sampled_from(NAME_CHARACTERS), min_size=1, max_size=211).filter(
    lambda name: name not in {".", ".."} and not name.startswith((".-", "..-"))
)
paths = st.builds(StorePath, hashes, names)


@given(paths)
def test_every_path_is_read_as_it_is_written(path: StorePath) -> None:
    assert StorePath.parse(str(path)) == path
    assert StorePath.from_basename(path.basename) == path


@given(st.lists(paths, max_size=8))
def test_many_paths_are_read_as_one_by_one(some: list[StorePath]) -> None:
    assert StorePath.parse_all([str(path) for path in some]) == some


@pytest.mark.parametrize(
    "bad", ["", "/nix/store", f"/nix/store/{HASH}-a\n", f"/nix/store/{HASH}-a\n/nix/store/{HASH}-b"]
)
def test_one_bad_path_of_many_is_refused(bad: str) -> None:
    good = f"/nix/store/{HASH}-good"
    with pytest.raises(InvalidStorePath):
        StorePath.parse_all([good, bad, good])


@given(paths)
def test_the_pattern_of_the_crd_accepts_every_path(path: StorePath) -> None:
    assert re.fullmatch(PATTERN, str(path))


@given(st.one_of(st.text(), st.text(st.sampled_from("/nixstore.-" + HASH[:8])).map("/nix/store/".__add__)))
def test_whatever_is_accepted_is_written_as_it_was_read(text: str) -> None:
    try:
        path = StorePath.parse(text)
    except InvalidStorePath as error:
        assert repr(text)[:40] in error.message
    else:
        assert str(path) == text


@given(st.lists(paths, max_size=8))
def test_paths_sort_as_their_texts_do(some: list[StorePath]) -> None:
    assert [str(path) for path in sorted(some)] == sorted(str(path) for path in some)


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        ("", "it must begin with /nix/store/"),
        ("hello", "it must begin with /nix/store/"),
        (f"/gnu/store/{HASH}-hello", "it must begin with /nix/store/"),
        (f"nix/store/{HASH}-hello", "it must begin with /nix/store/"),
        (f" /nix/store/{HASH}-hello", "it must begin with /nix/store/"),
        ("/nix/store", "it must begin with /nix/store/"),
        ("/nix/store/", "the hash must be 32 characters"),
        ("/nix/store/.", "the hash must be 32 characters"),
        ("/nix/store/..", "the hash must be 32 characters"),
        ("/nix/store/./", "with no further /"),
        ("/nix/store//", "with no further /"),
        ("/nix/store/../../etc/passwd", "with no further /"),
        (f"/nix/store/{HASH}-hello/bin/hello", f"inside a store path; use /nix/store/{HASH}-hello"),
        (f"/nix/store/{HASH}-hello/", f"inside a store path; use /nix/store/{HASH}-hello"),
        (f"/nix/store/{HASH[:-1]}-hello", "the hash must be 32 characters"),
        (f"/nix/store/{HASH}0-hello", "the hash must be 32 characters"),
        (f"/nix/store/{HASH[:-1]}e-hello", "without e o t u"),
        (f"/nix/store/{HASH.upper()}-hello", "the hash must be 32 characters"),
        (f"/nix/store/{HASH}", "the name after the hash is missing"),
        (f"/nix/store/{HASH}-", "the name after the hash is missing"),
        (f"/nix/store/{HASH}-{'x' * 212}", "the name is 212 characters long, the limit is 211"),
        (f"/nix/store/{HASH}-hello world", "may hold only letters, digits and + - . _ ? ="),
        (f"/nix/store/{HASH}-hello\n", "may hold only letters"),
        (f"/nix/store/{HASH}-hëllo", "may hold only letters"),
        (f"/nix/store/{HASH}-٣", "may hold only letters"),
        (f"/nix/store/{HASH}-.", "may not begin with . or .."),
        (f"/nix/store/{HASH}-..", "may not begin with . or .."),
        (f"/nix/store/{HASH}-.-a", "may not begin with . or .."),
        (f"/nix/store/{HASH}-..-a", "may not begin with . or .."),
    ],
)
def test_a_malformed_path_is_refused_with_its_reason(text: str, explanation: str) -> None:
    with pytest.raises(InvalidStorePath) as caught:
        StorePath.parse(text)
    assert caught.value.message.startswith(f"{text!r} is not a store path: ")
    assert explanation in caught.value.message


@pytest.mark.parametrize("name", [".a", "..a", "...", ".config", "-", "-rf", "x" * 211, "?", "a.drv.x"])
def test_unusual_names_are_names(name: str) -> None:
    assert StorePath.parse(f"/nix/store/{HASH}-{name}").name == name


def test_a_message_about_a_very_long_text_stays_short() -> None:
    with pytest.raises(InvalidStorePath) as caught:
        StorePath.parse("/nix/store/" + "x" * 10_000_000)
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(("name", "derivation"), [("hello.drv", True), ("hello", False), ("hello.drv.txt", False)])
def test_a_derivation_is_known_by_its_name(name: str, derivation: bool) -> None:
    assert StorePath(HASH, name).is_derivation == derivation
