"""Whatever a publish answers, by kubelet's own rule nothing is left in the end: the table of situations, row by row."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from grpclib.const import Status

from cknix_csi.api.attributes import FromStorePath, PodInfo
from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation, Told
from cknix_csi.csi.closures import ClosureService
from cknix_csi.csi.errors import grpc_error
from cknix_csi.csi.publisher import Publisher
from cknix_csi.csi.requests import AccessMode, PublishCall, UnpublishCall
from cknix_csi.csi.resolve import Resolver
from tests.kernel.node import Node, require_shows
from tests.kernel.steps import Stepped, SteppedMounts
from tests.node.fakes import SYSTEM, FakeFetcher

# pkg/volume/csi/csi_client.go, isFinalError.
UNCERTAIN = {
    Status.CANCELLED,
    Status.DEADLINE_EXCEEDED,
    Status.UNAVAILABLE,
    Status.RESOURCE_EXHAUSTED,
    Status.ABORTED,
}


class Kubelet:
    """What kubelet remembers of one volume, and the calls that follow from it (SetUpAt in csi_mounter.go)."""

    def __init__(self, publisher: Publisher, call: PublishCall) -> None:
        self._publisher = publisher
        self._call = call
        self.may_be_mounted = False

    async def sync_pod(self) -> Status:
        """One try of a pod that is to run."""
        try:
            await self._publisher.publish(self._call)
        except CknixError as error:
            status = grpc_error(error).status
            self.may_be_mounted = status in UNCERTAIN
            return status
        self.may_be_mounted = True
        return Status.OK

    async def end_pod(self) -> None:
        """The pod has been deleted: what is not known to be mounted is not unmounted."""
        if self.may_be_mounted:
            await self._publisher.unpublish(UnpublishCall(self._call.volume_id, self._call.target))


class Scene:
    """A node on which a publish fails, in the fetch or when all but the volume's own mount is made."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._in_fetch: CknixError | None = None
        self._in_mount: CknixError | None = None
        self._fetcher = FakeFetcher()
        self._closures = ClosureService(self._fetcher)
        self.where = {"clone"}
        """Steps of the mount that fail."""

    async def kubelet(self) -> Kubelet:
        """One that has just heard of a pod, and a daemon that has just started."""
        await self.node.restart(mounts=SteppedMounts(Stepped(self._step)))
        publisher = Publisher(
            volumes=self.node.volumes,
            closures=self._closures,
            resolver=Resolver(SYSTEM, None, None),
            budget=10,
        )
        source, pod = FromStorePath(self.node.small), PodInfo("web", "default", "u-1")
        target = self.node.pods / "a"
        return Kubelet(publisher, PublishCall("v", target, source, True, AccessMode.SINGLE_NODE_WRITER, pod))

    def fail(self, situation: Situation | None, *, in_fetch: bool = False) -> None:
        failure = None if situation is None else CknixError("as the test wants it", situation)
        self._fetcher.failure = failure if in_fetch else None
        self._in_mount = None if in_fetch else failure

    def _step(self, _number: int, name: str) -> None:
        if self._in_mount is not None and name in self.where:
            raise self._in_mount

    async def left(self) -> list[str]:
        return [*await self.node.left(), *(f"fetch of {path}" for path in self._fetcher.held)]


@pytest.fixture
async def scene(node: Node) -> AsyncIterator[Scene]:
    scene = Scene(node)
    yield scene
    await scene._closures.close()


async def test_a_pod_that_meets_any_situation_and_goes_leaves_nothing(scene: Scene) -> None:
    kubelet = await scene.kubelet()
    for situation in (each for each in Situation if Told.POD in each.told):
        scene.fail(situation)
        for _ in range(2):
            assert (await kubelet.sync_pod()).name == situation.code.value
            if not kubelet.may_be_mounted:
                assert await scene.left() == [], f"kubelet has forgotten the volume after {situation}"
        await kubelet.end_pod()
        assert await scene.left() == [], situation


@pytest.mark.parametrize("in_fetch", [True, False], ids=["in the fetch", "in the mount"])
async def test_a_pod_that_meets_any_code_and_stays_has_its_volume_as_soon_as_it_is_over(
    scene: Scene, in_fetch: bool
) -> None:
    for situation in {each.code: each for each in Situation}.values():
        kubelet = await scene.kubelet()
        scene.fail(situation, in_fetch=in_fetch)
        scene._fetcher.valid.clear()
        assert (await kubelet.sync_pod()).name == situation.code.value
        scene.fail(None)
        assert await kubelet.sync_pod() is Status.OK
        require_shows(scene.node.pods / "a", scene.node.store, [scene.node.small])
        await kubelet.end_pod()
        assert await scene.left() == [], situation


async def test_what_could_not_be_undone_is_undone_before_kubelet_forgets_the_volume(scene: Scene) -> None:
    kubelet = await scene.kubelet()
    scene.where |= {"unmount", "unmount_one"}
    scene.fail(Situation.MOUNT_FAILED)
    assert await kubelet.sync_pod() is Status.UNAVAILABLE
    assert await scene.left() != []
    scene.fail(Situation.EXPRESSION_NOT_FOUND, in_fetch=True)
    scene._fetcher.valid.clear()
    assert await kubelet.sync_pod() is Status.NOT_FOUND
    assert await scene.left() == []
    await kubelet.end_pod()
    assert await scene.left() == []


async def test_as_long_as_it_cannot_be_undone_kubelet_keeps_the_volume(scene: Scene) -> None:
    kubelet = await scene.kubelet()
    scene.where |= {"unmount", "unmount_one"}
    scene.fail(Situation.MOUNT_FAILED)
    for _ in range(3):
        assert await kubelet.sync_pod() is Status.UNAVAILABLE
    scene.fail(None)
    await kubelet.end_pod()
    assert await scene.left() == []
