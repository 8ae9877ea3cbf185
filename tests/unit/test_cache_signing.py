"""Keys and signatures by Nix's rules; ``tests/nix/test_cache.py`` has Nix check them."""

from __future__ import annotations

import base64

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cknix_csi.api.closure import PathInfo
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix.cache.signing import InvalidKey, KeyPair, fingerprint, generate_key, sign

GLIBC = StorePath("0c80hzzm3akxm7d38z5hz5lvlrs9ivs6", "glibc")
HELLO = StorePath("1c80hzzm3akxm7d38z5hz5lvlrs9ivs6", "hello")
EMPTY_SHA256 = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_fingerprint_names_path_hash_size_and_sorted_references() -> None:
    info = PathInfo(HELLO, EMPTY_SHA256, 7, references=(HELLO, GLIBC), deriver="/nix/store/x.drv")
    assert fingerprint(info) == (
        f"1;{HELLO};sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73;7;{GLIBC},{HELLO}"
    )


def test_a_fingerprint_without_references_ends_in_a_semicolon() -> None:
    assert fingerprint(PathInfo(HELLO, EMPTY_SHA256, 7, references=())).endswith(";7;")


@pytest.mark.parametrize("nar_hash", ["sha256:00", "sha1:" + "0" * 64, "0" * 64, "sha256:" + "g" * 64])
def test_a_hash_that_nix_would_not_have_stored_is_never_signed(nar_hash: str) -> None:
    with pytest.raises(ValueError):
        fingerprint(PathInfo(HELLO, nar_hash, 7, references=()))


def test_a_signature_is_checked_by_the_public_key_and_covers_every_byte() -> None:
    key = generate_key("cknix-cache-1")
    name, _, signature = sign(key.secret, "text").partition(":")
    assert name == key.name == "cknix-cache-1"
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(key.public.partition(":")[2]))
    public.verify(base64.b64decode(signature), b"text")
    with pytest.raises(InvalidSignature):
        public.verify(base64.b64decode(signature), b"texT")


def test_the_pair_comes_back_from_its_secret_as_it_stands_in_a_file() -> None:
    key = generate_key("a")
    assert KeyPair.from_secret(f"{key.secret}\n") == key


def test_a_secret_is_not_shown_when_the_pair_is_printed() -> None:
    key = generate_key("a")
    assert key.secret.partition(":")[2] not in repr(key)


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a\n"])
def test_a_name_that_nix_conf_could_not_hold_is_refused(name: str) -> None:
    with pytest.raises(InvalidKey, match="cannot name a signing key"):
        generate_key(name)


def _halves_of_two_keys() -> str:
    one, other = (base64.b64decode(generate_key("k").secret.partition(":")[2]) for _ in range(2))
    return "k:" + base64.b64encode(one[:32] + other[32:]).decode()


@pytest.mark.parametrize(
    ("secret", "problem"),
    [
        ("", "no name"),
        ("AAAA", "not base64|has 0 bytes"),
        ("k:@@@", "not base64"),
        (generate_key("k").public, "is it the public key"),
        (_halves_of_two_keys(), "do not belong together"),
    ],
)
def test_a_broken_secret_is_refused_without_being_repeated(secret: str, problem: str) -> None:
    with pytest.raises(InvalidKey, match=problem) as caught:
        sign(secret, "text")
    assert len(secret) < 5 or secret.partition(":")[2] not in str(caught.value)
