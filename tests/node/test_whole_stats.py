"""The whole daemon tells what volumes use and what is wrong with them, as kubelet asks every minute."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from grpclib.client import Channel
from grpclib.exceptions import GRPCError

from cknix_csi.proto.csi_grpc import NodeStub
from cknix_csi.proto.csi_pb2 import (
    NodeGetVolumeStatsRequest,
    NodeGetVolumeStatsResponse,
    VolumeUsage,
)
from tests.node.whole import LIMIT, Cluster, Source, WholeNode

VOLUMES: Mapping[str, tuple[bool, Mapping[str, str]]] = {
    "ro": (False, {}),
    "ro-farm": (False, {"presentation": "hardlink"}),
    "ro-copy": (False, {"presentation": "copy"}),
    "rw": (True, {}),
    "rw-farm": (True, {"presentation": "hardlink"}),
    "rw-copy": (True, {"presentation": "copy"}),
    "rw-limit": (True, {"sizeLimit": "64Mi"}),
    "rw-memory": (True, {"sizeLimit": "16Mi", "medium": "Memory"}),
    "rw-copy-limit": (True, {"presentation": "copy", "sizeLimit": "64Mi"}),
}


async def stats(node: WholeNode, volume: str = "v1", path: Path | None = None) -> NodeGetVolumeStatsResponse:
    request = NodeGetVolumeStatsRequest(volume_id=volume, volume_path=str(path or node.target(volume)))
    async with Channel(path=str(node.endpoint)) as channel:
        return await NodeStub(channel).NodeGetVolumeStats(request, timeout=LIMIT)


def figures(answer: NodeGetVolumeStatsResponse) -> dict[str, tuple[int, int, int]]:
    """Total, used and available, by unit."""
    names = {VolumeUsage.BYTES: "bytes", VolumeUsage.INODES: "inodes"}
    return {names[each.unit]: (each.total, each.used, each.available) for each in answer.usage}


def df(node: WholeNode, path: Path) -> dict[str, tuple[int, int, int]]:
    """What df says of the file system that *path* is on."""
    words = node.namespace.run(
        "df", "--block-size=1", "--output=size,used,avail,itotal,iused,iavail", path
    ).splitlines()[1]
    size, used, available, *inodes = map(int, words.split())
    return {"bytes": (size, used, available), "inodes": (inodes[0], inodes[1], inodes[2])}


def du(node: WholeNode, path: str) -> tuple[int, int]:
    """Bytes on disk and inodes of a directory of the data root, as du counts them."""
    node.namespace.run("sync", "--file-system", node.data)
    found = [node.namespace.run("du", "-s", unit, node.data / path).split()[0] for unit in ("-B1", "--inodes")]
    return int(found[0]), int(found[1])


def closure_size(node: WholeNode, path: str) -> int:
    """What Nix says."""
    told = json.loads("".join(node.admin("nix", "path-info", "--json", "--closure-size", path)))
    [info] = told if isinstance(told, list) else told.values()
    return int(info["closureSize"])


async def test_what_the_volumes_of_a_killed_daemon_use_is_what_nix_du_and_df_say(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await whole.start()
    for volume, (writable, attributes) in VOLUMES.items():
        shown = await whole.publish(volume, writable=writable, storePath=source.hello, **attributes)
        if writable:
            (shown / "store/new").write_bytes(os.urandom(5_000_000))
    whole.kill()
    await whole.start()
    closure = closure_size(whole, source.hello)
    calls, faults = whole.nix_calls(), whole.descendants_faults()
    cluster.cache.forget()
    for volume, (_, attributes) in VOLUMES.items():
        answer = await stats(whole, volume)
        found = figures(answer)
        assert (answer.volume_condition.abnormal, answer.volume_condition.message) == (
            False,
            "mounted, with all of its store paths",
        )
        if volume in {"ro", "ro-farm"}:
            assert found == {"bytes": (closure, closure, 0)}
            continue
        private = f"volumes/{volume}/{os.listdir(whole.namespace.see(whole.data / 'volumes' / volume))[0]}"
        if volume == "ro-copy":
            size, inodes = du(whole, f"{private}/copy")
            assert found == {"bytes": (size, size, 0), "inodes": (inodes, inodes, 0)}
            continue
        assert found["bytes"][1] > 5_000_000
        if "sizeLimit" in attributes:
            assert found == df(whole, whole.data / private / "space")
        else:
            used = du(whole, f"{private}/{'copy' if 'copy' in volume else 'upper'}")
            assert (found["bytes"][1], found["inodes"][1]) == used
            disk = df(whole, whole.data)
            assert [found[unit][0] for unit in disk] == [disk[unit][0] for unit in disk]
    assert (whole.nix_calls(), whole.descendants_faults(), cluster.cache.requests) == (calls, faults, [])


async def test_what_is_wrong_with_a_volume_is_told_to_kubelet_and_in_the_log(whole: WholeNode, source: Source) -> None:
    await whole.start()
    for volume, path in (("root", source.hello), ("path", source.file), ("mount", source.link)):
        await whole.publish(volume, storePath=path)
    see = whole.namespace.see
    (see(whole.data / "nix/var/nix/gcroots/cknix/closures") / os.path.basename(source.hello)).unlink()
    physical = see(whole.data) / source.file.removeprefix("/")
    physical.rename(see(whole.data / "aside"))
    whole.namespace.run("umount", whole.target("mount"))
    said = {
        "root": "its GC root is gone, so Nix may delete its files: restart the node daemon",
        "path": f"{source.file} is in the store's database but not in the store",
        "mount": "nothing is mounted at the volume's path any more: delete the pod, and make it anew",
    }
    for volume, words in said.items():
        answer = await stats(whole, volume)
        assert answer.volume_condition.abnormal
        assert answer.volume_condition.message.startswith(words[:100])
        assert words in whole.log()
    see(whole.data / "aside").rename(physical)
    whole.terminate()
    await whole.start()
    assert not (await stats(whole, "root")).volume_condition.abnormal
    assert not (await stats(whole, "path")).volume_condition.abnormal


async def test_volumes_that_are_not_there_are_not_found(whole: WholeNode, source: Source) -> None:
    await whole.start()
    await whole.publish(writable=True, storePath=source.hello)
    for volume, path in (("v1", whole.target("v2")), ("v2", whole.target("v1")), ("v1", Path("some/path"))):
        with pytest.raises(GRPCError) as raised:
            await stats(whole, volume, path)
        assert raised.value.status.name == "NOT_FOUND"
    await whole.unpublish()
    with pytest.raises(GRPCError) as raised:
        await stats(whole)
    assert raised.value.status.name == "NOT_FOUND"
