"""Nix's base32: its own alphabet and its own bit order (``printHash32`` in Nix's hash.cc).

The bytes are one little-endian number, written with the most significant digit first.  RFC 4648 agrees with this in
nothing, so the standard library is no help.
"""

from __future__ import annotations

ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"
_BITS = 5
_VALUES = {character: value for value, character in enumerate(ALPHABET)}


def encoded_length(size: int) -> int:
    """Characters that *size* bytes take: 32 for a store path's 20 bytes, 52 for a SHA-256."""
    return -(-size * 8 // _BITS)


def encode(data: bytes) -> str:
    """*data* in Nix base32."""
    number = int.from_bytes(data, "little")
    return "".join(ALPHABET[number >> _BITS * n & 31] for n in reversed(range(encoded_length(len(data)))))


def decode(text: str) -> bytes:
    """The bytes that *text* stands for.

    Raises ValueError for a character outside the alphabet, for a length that no number of bytes has, and for bits
    beyond the last byte: every accepted text is the only spelling of its bytes.
    """
    size = len(text) * _BITS // 8
    if encoded_length(size) != len(text):
        raise ValueError(f"{text!r} is not Nix base32: no number of bytes takes {len(text)} characters")
    number = 0
    for character in text:
        if character not in _VALUES:
            raise ValueError(f"{text!r} is not Nix base32: {character!r} is not one of {ALPHABET}")
        number = number << _BITS | _VALUES[character]
    if number >> size * 8:
        raise ValueError(f"{text!r} is not Nix base32: its first character stands for more bits than there are")
    return number.to_bytes(size, "little")
