"""What kubelet is told of a volume's use and condition (CSI specification, "NodeGetVolumeStats")."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cknix_csi.proto.csi_pb2 import NodeGetVolumeStatsResponse, VolumeCondition, VolumeUsage
from cknix_csi.volumes.usage import WELL, Amount, Measured


class Measures(Protocol):
    """What measures volumes; satisfied by ``volumes.volumes.Volumes``."""

    async def measure(self, volume_id: str, target: Path) -> Measured:
        """What the volume at *target* uses, and whether it is well.  Raises NotFound when it is not there."""


MAX_MESSAGE = 128
"""Bytes of a string for which the CSI specification names no other limit ("Size Limits")."""
_CUT = "…"


def stats_response(measured: Measured) -> NodeGetVolumeStatsResponse:
    """There are always bytes, without which kubelet drops the whole answer, and words, also when all is well."""
    usage = [_usage(VolumeUsage.BYTES, measured.bytes)]
    if measured.inodes is not None:
        usage.append(_usage(VolumeUsage.INODES, measured.inodes))
    condition = VolumeCondition(abnormal=measured.problem is not None, message=_fitting(measured.problem or WELL))
    return NodeGetVolumeStatsResponse(usage=usage, volume_condition=condition)


def _fitting(message: str) -> str:
    # File names may hold bytes that are no UTF-8; they come as lone surrogates.
    encoded = message.encode("utf-8", "replace")
    if len(encoded) > MAX_MESSAGE:
        return encoded[: MAX_MESSAGE - len(_CUT.encode())].decode("utf-8", "ignore") + _CUT
    return encoded.decode()


def _usage(unit: VolumeUsage.Unit, amount: Amount) -> VolumeUsage:
    return VolumeUsage(unit=unit, total=amount.total, used=amount.used, available=amount.available)
