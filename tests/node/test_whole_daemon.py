"""The whole daemon's life: start, restart under live volumes, SIGTERM, a rival; and what it clears away."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from tests.node.whole import LIMIT, Cluster, Source, WholeNode, require_exactly


async def test_a_restart_disturbs_no_volume_and_the_next_daemon_takes_over(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await cluster.apply("deployed")
    await cluster.report("deployed", "Succeeded", x86_64_linux=source.hello)
    await whole.start()
    volumes = {"ro": False, "rw": True, "other": True}
    for volume, writable in volumes.items():
        await whole.publish(volume, writable=writable, expression="deployed")
    (whole.shown("rw") / "store/mark").write_text("written before the restart")
    before = {volume: whole.mount_id(volume) for volume in volumes}
    for end in (whole.terminate, whole.kill):
        end()
        require_exactly(whole.shown("ro"), source, source.hello)
        await whole.start()
        await cluster.report("deployed", "Succeeded", x86_64_linux=source.other)
        for volume, writable in volumes.items():
            await whole.publish(volume, writable=writable, expression="deployed")
        assert {volume: whole.mount_id(volume) for volume in volumes} == before
        require_exactly(whole.shown("ro"), source, source.hello)
        assert (whole.shown("rw") / "store/mark").read_text() == "written before the restart"
    assert "Hello" in whole.run_in("rw", "hello")
    for volume in volumes:
        await whole.unpublish(volume)
    await whole.left_nothing()


async def test_sigterm_ends_waiting_calls_and_fetches_at_once_and_leaves_mounts(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await whole.start()
    await whole.publish("resident", storePath=source.hello)
    mounted, before = whole.mount_id("resident"), whole.traces()
    cluster.cache.stall()
    waiting = asyncio.create_task(whole.publish(storePath=source.toolbox))
    await whole.eventually("Nix fetches", whole.children)
    assert whole.terminate() == 0
    with pytest.raises(GRPCError) as raised:
        await waiting
    assert raised.value.status is Status.UNAVAILABLE
    assert raised.value.message == (
        "publishing volume v1 was interrupted: the node daemon is shutting down; kubelet will retry"
    )
    assert whole.children() == []
    assert not whole.endpoint.exists()
    assert not whole.registration.exists()
    assert whole.mount_id("resident") == mounted
    assert whole.traces() == before
    cluster.cache.open()
    await whole.start()
    require_exactly(await whole.publish(storePath=source.toolbox), source, source.toolbox)


async def test_the_command_ends_with_code_0_on_sigterm(whole: WholeNode) -> None:
    whole.daemon = whole.spawn()
    await whole.registered()
    assert whole.terminate() == 0
    assert whole.log().rstrip().endswith("stopped")


async def test_a_second_daemon_on_a_data_root_is_refused_and_harms_nothing(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await whole.start()
    await whole.publish("resident", storePath=source.hello)
    cluster.cache.stall()
    fetching = asyncio.create_task(whole.publish(storePath=source.toolbox))
    await whole.eventually("Nix fetches", whole.children)
    before = whole.traces()
    rival = whole.spawn(
        CSI_ENDPOINT=f"unix://{whole.directory}/rival.sock", CKNIX_KUBELET_ROOT=str(whole.directory / "rival")
    )
    assert await asyncio.to_thread(rival.wait, LIMIT) == 1
    assert (
        f"cknix-csi node: another cknix-csi process works on the data root {whole.data}; "
        "give this one another, or end that one"
    ) in whole.log()
    assert whole.traces() == before
    cluster.cache.open()
    await fetching
    require_exactly(whole.shown(), source, source.toolbox)


async def test_a_second_daemon_on_a_socket_is_refused_and_harms_nothing(whole: WholeNode, source: Source) -> None:
    await whole.start()
    rival = whole.spawn(CKNIX_DATA_ROOT=str(whole.directory / "rival"))
    assert await asyncio.to_thread(rival.wait, LIMIT) == 1
    assert (
        f"cknix-csi node: another process serves at {whole.endpoint}; stop it first "
        "(two node daemons cannot share a node)"
    ) in whole.log()
    require_exactly(await whole.publish(storePath=source.file), source, source.file)


@pytest.mark.parametrize("setting", ["CKNIX_RPC_BUDGET", "CSI_ENDPOINT", "CKNIX_DATA_ROOT"])
async def test_a_setting_that_cannot_work_is_named(whole: WholeNode, setting: str) -> None:
    daemon = whole.spawn(**{setting: "nonsense"})
    assert await asyncio.to_thread(daemon.wait, LIMIT) == 2
    assert f"cknix-csi node: environment variable {setting}: 'nonsense' " in whole.log()


async def test_a_store_that_the_controller_left_on_this_node_is_removed_when_it_has_moved(
    whole: WholeNode, cluster: Cluster
) -> None:
    store = whole.data / "controller"
    left = store / "nix/store/something"
    left.mkdir(parents=True)
    (store / ".lock").touch()
    await cluster.use_cache(node="node-1")
    await whole.start(CKNIX_ABANDONED_STORE_TIME="0")
    await asyncio.sleep(0.5)
    assert left.is_dir()  # the controller lives here
    await cluster.use_cache(node="node-2")
    await whole.eventually("the store is gone", lambda: os.listdir(store) == [".lock"])


async def test_the_log_as_objects_names_pod_volume_and_closure(whole: WholeNode, source: Source) -> None:
    await whole.start(CKNIX_LOG_FORMAT="json")
    await whole.publish(storePath=source.hello)
    await whole.unpublish()
    for _ in range(3):
        await whole.refused(expresion="hello")
    lines = [json.loads(line) for line in whole.log().splitlines()]
    about = {
        "pod": "default/pod-v1",
        "pod_uid": "v1",
        "volume": "nix",
        "volume_id": "v1",
        "closure": source.hello.removeprefix("/nix/store/"),
    }
    for word in ("mounted", "unmounted"):
        [line] = [line for line in lines if line["message"].startswith(f"{word} ")]
        assert about.items() <= line.items()
    [warning] = [line for line in lines if line["level"] == "warning"]
    assert 'did you mean "expression"?' in warning["message"]
    assert warning["pod"] == "default/pod-v1"
