"""What a volume uses and what is wrong with it, on the wire."""

from __future__ import annotations

from cknix_csi.csi.stats import stats_response
from cknix_csi.proto.csi_pb2 import NodeGetVolumeStatsResponse, VolumeCondition, VolumeUsage
from cknix_csi.volumes.usage import NOTHING, Amount, Measured


def sent(measured: Measured) -> NodeGetVolumeStatsResponse:
    """As it arrives."""
    return NodeGetVolumeStatsResponse.FromString(stats_response(measured).SerializeToString())


def test_bytes_and_inodes_are_told_apart_and_a_healthy_volume_has_words_too() -> None:
    measured = Measured(Amount(total=1 << 62, used=20, available=10), Amount(total=3, used=2, available=1))
    assert sent(measured) == NodeGetVolumeStatsResponse(
        usage=[
            VolumeUsage(unit=VolumeUsage.BYTES, total=1 << 62, used=20, available=10),
            VolumeUsage(unit=VolumeUsage.INODES, total=3, used=2, available=1),
        ],
        volume_condition=VolumeCondition(abnormal=False, message="mounted, with all of its store paths"),
    )


def test_inodes_that_nobody_counts_are_left_out() -> None:
    assert [usage.unit for usage in sent(Measured(Amount(1, 1, 0), None)).usage] == [VolumeUsage.BYTES]


def test_there_are_bytes_also_where_there_is_nothing_left() -> None:
    # kubelet drops an answer without (pkg/volume/csi, NodeGetVolumeStats), and the condition with it.
    answer = sent(Measured(NOTHING, None, "it is gone"))
    assert answer.usage == [VolumeUsage(unit=VolumeUsage.BYTES)]
    assert answer.volume_condition == VolumeCondition(abnormal=True, message="it is gone")


def test_words_keep_to_the_128_bytes_of_the_specification_and_are_utf_8() -> None:
    for problem, message in (
        ("a" * 128, "a" * 128),
        ("a" * 129, "a" * 125 + "…"),
        ("é" * 100, "é" * 62 + "…"),
        ("lost \udcff", "lost ?"),
    ):
        answer = sent(Measured(NOTHING, None, problem)).volume_condition
        assert answer.message == message
        assert len(answer.message.encode()) <= 128
