"""Signatures of store paths, as Nix makes and checks them (Ed25519).

A key is written ``<name>:<base64>``: 32 bytes of public key, or 64 bytes of secret key, which are the seed and the
public key in a row (libsodium's form; Nix manual, ``nix key generate-secret``).  Not the NAR is signed but a
*fingerprint* of what Nix's database knows of the path (``ValidPathInfo::fingerprint``), so size costs nothing.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cknix_csi.api.closure import PathInfo
from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation
from cknix_csi.nix.cache import base32

_NAME = re.compile(r"[^\s:]+")  # trusted-public-keys is split at white space, a key at its first colon
_SEED = 32
_SECRET = 64


class InvalidKey(CknixError, ValueError):
    """Text that is not a signing key.  The message never holds the key."""

    situation = Situation.INVALID_SIGNING_KEY


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A signing key in Nix's text form."""

    secret: str = field(repr=False)
    public: str

    @property
    def name(self) -> str:
        """What stands before the colon; clients choose the public key of a signature by it."""
        return self.public.partition(":")[0]

    @classmethod
    def from_secret(cls, secret: str) -> KeyPair:
        """The pair of a secret key as read from a file or Secret; white space around it is dropped.

        Raises :class:`InvalidKey`.
        """
        name, seed = _parse_secret(secret)
        return _pair(name, Ed25519PrivateKey.from_private_bytes(seed))


def generate_key(name: str) -> KeyPair:
    """A new key pair.  *name* is chosen once per key: after a rotation the new key needs a new name.

    Raises :class:`InvalidKey` for a name that a Nix configuration could not hold.
    """
    if not _NAME.fullmatch(name):
        raise InvalidKey(f"{name!r} cannot name a signing key: it must not be empty nor hold white space or a colon")
    return _pair(name, Ed25519PrivateKey.generate())


def nar_hash_base32(info: PathInfo) -> str:
    """The 52 characters of *info*'s NAR hash.  Raises ValueError when the hash is not ``sha256:<64 hex digits>``."""
    algorithm, _, digits = info.nar_hash.partition(":")
    if algorithm != "sha256" or len(digits) != 64:
        raise ValueError(f"{info.path} has NAR hash {info.nar_hash!r}, which is not sha256:<64 hex digits>")
    return base32.encode(bytes.fromhex(digits))


def fingerprint(info: PathInfo) -> str:
    """What a signature of *info* covers: path, NAR hash, NAR size and references, and nothing else (no deriver)."""
    references = ",".join(str(reference) for reference in sorted(info.references))
    return f"1;{info.path};sha256:{nar_hash_base32(info)};{info.nar_size};{references}"


def sign(secret: str, text: str) -> str:
    """The detached signature ``<name>:<base64>`` of *text*.  Raises :class:`InvalidKey`."""
    name, seed = _parse_secret(secret)
    return _written(name, Ed25519PrivateKey.from_private_bytes(seed).sign(text.encode()))


def _parse_secret(secret: str) -> tuple[str, bytes]:
    """Name and seed."""
    name, _, encoded = secret.strip().partition(":")
    if not _NAME.fullmatch(name):
        raise InvalidKey("a secret signing key is <name>:<base64>; this text has no name before a colon")
    try:
        key = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise InvalidKey(f"the secret signing key {name!r} is not base64 after the colon") from error
    if len(key) != _SECRET:
        raise InvalidKey(f"the secret signing key {name!r} has {len(key)} bytes, not {_SECRET}; is it the public key?")
    seed, public = key[:_SEED], key[_SEED:]
    if Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw() != public:
        raise InvalidKey(f"the two halves of the secret signing key {name!r} do not belong together")
    return name, seed


def _pair(name: str, key: Ed25519PrivateKey) -> KeyPair:
    public = key.public_key().public_bytes_raw()
    return KeyPair(secret=_written(name, key.private_bytes_raw() + public), public=_written(name, public))


def _written(name: str, data: bytes) -> str:
    return f"{name}:{base64.b64encode(data).decode()}"
