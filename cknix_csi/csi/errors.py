"""From our errors to gRPC's.

Codes are those of :mod:`cknix_csi.api.situations`: every failure has a canonical code and a message for people, and
never ``details`` (CSI specification, "Error Scheme").
"""

from __future__ import annotations

from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.metadata import encode_grpc_message

from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Code, Situation

MAX_ENCODED_MESSAGE = 6 * 1024
"""Bytes of a status message in a trailer, where gRPC percent-encodes it.  Some clients refuse trailers above 8 KiB."""


def status_of(code: Code) -> Status:
    """gRPC's status of the same name."""
    return Status[code.value]


class Refusal(GRPCError):
    """What gRPC sends of a failure, and its reason, which gRPC has no place for."""

    def __init__(self, error: CknixError) -> None:
        super().__init__(status_of(error.code), fitting(error.message or error.reason))
        self.reason = error.reason


def grpc_error(error: CknixError) -> GRPCError:
    """*error* as gRPC sends it; a message that would not fit loses its middle."""
    return Refusal(error)


def unimplemented(method: str, capability: str) -> CknixError:
    """For a method whose *capability* this driver does not advertise; callers must not retry."""
    return CknixError(f"{method} is not supported: this driver does not have {capability}", Situation.NOT_SUPPORTED)


def fitting(message: str) -> str:
    """*message* such that it fits into a trailer: its beginning says what it is about, its end why (a log's tail)."""
    # File names may hold bytes that are no UTF-8; they come as lone surrogates, which no trailer can carry.
    message = message.encode("utf-8", "replace").decode("utf-8")
    shortened, keep = message, MAX_ENCODED_MESSAGE
    while len(encode_grpc_message(shortened)) > MAX_ENCODED_MESSAGE:
        keep = keep * 3 // 4
        shortened = f"{message[: keep // 4]} … {message[-(keep - keep // 4) :]}"
    return shortened
