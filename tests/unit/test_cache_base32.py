"""Nix base32 by its rules; ``tests/nix/test_cache.py`` asks Nix itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cknix_csi.nix.cache import base32


@given(st.binary(max_size=64))
def test_what_is_encoded_decodes_to_itself(data: bytes) -> None:
    text = base32.encode(data)
    assert len(text) == base32.encoded_length(len(data))
    assert base32.decode(text) == data


@given(st.text(alphabet=base32.ALPHABET + "eotuE/ ", max_size=60))
def test_a_text_that_decodes_is_the_only_spelling_of_its_bytes(text: str) -> None:
    try:
        data = base32.decode(text)
    except ValueError:
        return
    assert base32.encode(data) == text


def test_the_empty_strings_sha256_is_spelled_as_in_nixs_own_tests() -> None:
    digest = bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    assert base32.encode(digest) == "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"


@pytest.mark.parametrize(
    ("text", "problem"),
    [("e0", "'e' is not one of"), ("0", "takes 1 characters"), ("z" * 52, "more bits"), ("00A", "takes 3 characters")],
)
def test_what_is_not_base32_is_refused_with_the_reason(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        base32.decode(text)
