"""The whole daemon and Expressions: it waits for results, serves the last good one, and outlives the API server."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.node.whole import LIMIT, Cluster, Source, WholeNode, require_exactly

GRACE_SECONDS = 3.0
"""What a pod may wait for its volume once its Expression has a result."""


async def test_a_pod_applied_before_its_expression_is_built_hears_what_it_waits_for_and_starts_when_it_is(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await cluster.apply("late")
    await whole.start()
    await whole.publish("warm", storePath=source.hello)
    await cluster.report("late", "Running", message="building 1 of 2")
    waiting = asyncio.create_task(whole.publish("early", expression="late"))
    while not (told := await cluster.events("pod-early")):
        assert not waiting.done()
        await asyncio.sleep(0.1)
    assert told == [
        (
            "WaitingForExpression",
            'volume "nix" has to wait: Expression default/late has no result yet (generation 1, Running): '
            "building 1 of 2",
        )
    ]
    await cluster.report("late", "Succeeded", x86_64_linux=source.hello)
    reported = time.monotonic()
    require_exactly(await waiting, source, source.hello)
    print(f"mounted {time.monotonic() - reported:.3f} s after the result")
    assert time.monotonic() - reported < GRACE_SECONDS


async def test_a_wait_longer_than_the_budget_says_how_far_it_is_and_a_retry_goes_on(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await cluster.apply("slow")
    await cluster.report("slow", "Running", message="building python3: 14 of 31")
    await whole.start(CKNIX_RPC_BUDGET="0.5")
    for _ in range(2):
        assert await whole.refused(expression="slow") == (
            "ABORTED",
            "Expression default/slow has no result yet (generation 1, Running): building python3: 14 of 31; "
            "kubelet will retry",
        )
        assert whole.traces() == []
    await cluster.report("slow", "Succeeded", x86_64_linux=source.file)
    require_exactly(await whole.publish_retrying(expression="slow"), source, source.file)


async def test_a_result_that_the_cache_has_lost_is_mounted_where_it_is_and_elsewhere_it_is_said_whose_it_is(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    path = "/nix/store/00000000000000000000000000000000-lost"
    await cluster.apply("lost")
    await cluster.report("lost", "Failed", x86_64_linux=path)
    await cluster.apply("here")
    await cluster.report("here", "Succeeded", x86_64_linux=source.hello)
    await whole.start()
    assert await whole.refused(expression="lost") == (
        "NOT_FOUND",
        f"{path}, the result of Expression default/lost, is not on this node, and the controller's cache does not have "
        "it; `kubectl -n default describe expr lost` tells whether it is being built again or lost, and what helps",
    )
    assert whole.traces() == []
    await whole.publish("v1", expression="here")
    with source.hidden(source.hello):
        target = await whole.publish("v2", expression="here")
    require_exactly(target, source, source.hello)


async def test_the_view_of_a_result_is_kept_for_the_next_pod_as_long_as_an_expression_has_it(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await cluster.delete_all()
    await cluster.apply("kept")
    await cluster.report("kept", "Succeeded", x86_64_linux=source.hello)
    await whole.start(CKNIX_KEEP_WARM="16")
    view = whole.namespace.see(whole.data / "views" / Path(source.hello).name)
    found = []
    for _ in range(3):
        require_exactly(await whole.publish(expression="kept"), source, source.hello)
        found.append(view.stat().st_ino)
        await whole.unpublish()
        assert whole.namespace.mounts(whole.directory) == []
    assert len(set(found)) == 1, "it was not built again"
    await cluster.delete("kept")
    await whole.left_nothing()
    # What nobody calls a result is not kept at all.
    await whole.publish(storePath=source.hello)
    await whole.unpublish()
    assert not view.exists()


async def test_an_expression_without_a_result_says_why(whole: WholeNode, cluster: Cluster, source: Source) -> None:
    for name in ("broken", "foreign"):
        await cluster.apply(name)
    await cluster.report("broken", "Failed", message="attribute 'helo' missing, at expr:1:25")
    await cluster.report("foreign", "Succeeded", aarch64_linux=source.hello)
    await whole.start()
    assert await whole.refused(expression="broken") == (
        "FAILED_PRECONDITION",
        "Expression default/broken failed (generation 1): attribute 'helo' missing, at expr:1:25",
    )
    assert await whole.refused(expression="nobody") == (
        "NOT_FOUND",
        'Expression "default/nobody" does not exist; create it or correct the volume attribute "expression" '
        "(an inline volume cannot name an Expression of another namespace)",
    )
    assert await whole.refused(expression="foreign") == (
        "FAILED_PRECONDITION",
        "Expression default/foreign has no result for this node's system x86_64-linux, only for aarch64-linux; "
        "add the system to spec.systems, or run the pod on another node",
    )
    assert whole.traces() == []
    assert whole.nix_calls() == []


async def test_a_newer_generation_that_fails_leaves_the_good_result_in_use(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await cluster.apply("updated")
    await cluster.report("updated", "Succeeded", x86_64_linux=source.hello)
    await whole.start()
    old = await whole.publish("old", expression="updated")
    await cluster.apply("updated")
    await whole.publish("while-it-builds", expression="updated")
    await cluster.report("updated", "Failed", message="generation 2 is broken", x86_64_linux=source.hello)
    for volume in ("after-the-failure", "once-more"):
        require_exactly(await whole.publish(volume, expression="updated"), source, source.hello)
    await cluster.apply("updated")
    await cluster.report("updated", "Succeeded", x86_64_linux=source.other)
    async with asyncio.timeout(LIMIT):
        while (await whole.publish("new", expression="updated") / "var/result").readlink() != Path(source.other):
            await whole.unpublish("new")  # the watch brings it in a moment
    require_exactly(old, source, source.hello)


@pytest.mark.parametrize("outage", ["refuses", "is silent"])
async def test_without_an_api_server_what_the_node_knows_still_mounts(
    whole: WholeNode, cluster: Cluster, source: Source, outage: str
) -> None:
    for name in ("seen", "unseen"):
        await cluster.apply(name)
    await whole.start(CKNIX_RPC_BUDGET="2")
    first = asyncio.create_task(whole.publish_retrying("first", expression="seen"))
    await cluster.report("seen", "Succeeded", x86_64_linux=source.hello)
    await first  # the result came by the watch, which is up from now on
    if outage == "refuses":
        cluster.api.close()
    else:
        cluster.api.stall()
    require_exactly(await whole.publish("known", expression="seen"), source, source.hello)
    code, message = await whole.refused("unknown", expression="never-heard-of")
    assert code == "UNAVAILABLE"
    assert "never-heard-of" in message
    assert "the API server did not answer" in message
    cluster.api.open()
    await cluster.report("unseen", "Succeeded", x86_64_linux=source.file)
    require_exactly(await whole.publish_retrying("now", expression="unseen"), source, source.file)


async def remember_seen(whole: WholeNode, cluster: Cluster, source: Source) -> None:
    """Two Expressions have results, of which the daemon has used and kept that of `seen`; then it is killed."""
    for name in ("seen", "unseen"):
        await cluster.apply(name)
        await cluster.report(name, "Succeeded", x86_64_linux=source.hello)
    await whole.start()
    await whole.publish("before", expression="seen")
    await whole.eventually("the result is kept", (whole.data / "state/results.json").exists)
    whole.kill()


async def test_a_daemon_that_starts_without_an_api_server_serves_what_it_can(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await remember_seen(whole, cluster, source)
    cluster.api.close()
    await whole.start()
    require_exactly(await whole.publish("known", storePath=source.hello), source, source.hello)
    # The cache's address and key were kept on this node.
    require_exactly(await whole.publish("fetched", storePath=source.wide), source, source.wide)
    require_exactly(await whole.publish("remembered", expression="seen"), source, source.hello)
    assert f"using the last known result of Expression default/seen, {source.hello}: " in whole.log()
    code, message = await whole.refused("v1", expression="unseen")
    assert code == "UNAVAILABLE"
    assert message.startswith("Expression default/unseen is not known here yet, and the API server did not answer GET")
    await whole.unpublish("before")
    cluster.api.open()
    require_exactly(await whole.publish("v1", expression="unseen"), source, source.hello)


async def test_a_daemon_that_starts_while_the_api_server_hangs_serves_what_it_can(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await remember_seen(whole, cluster, source)
    cluster.api.stall()
    await whole.start()
    await asyncio.gather(  # each waits for a while for the server, and no longer
        whole.publish("known", storePath=source.hello), whole.publish("remembered", expression="seen")
    )
    for volume in ("before", "known", "remembered"):
        require_exactly(whole.shown(volume), source, source.hello)
    await whole.unpublish("before")
    cluster.api.open()
    require_exactly(await whole.publish_retrying("unseen", expression="unseen"), source, source.hello)


async def test_an_api_server_that_is_back_is_believed_and_not_what_was_remembered(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    for name in ("updated", "deleted"):
        await cluster.apply(name)
        await cluster.report(name, "Succeeded", x86_64_linux=source.hello)
    await whole.start()
    for name in ("updated", "deleted"):
        await whole.publish(name, expression=name)
    remembered = whole.data / "state/results.json"
    await whole.eventually("the results are kept", lambda: remembered.exists() and "deleted" in remembered.read_text())
    whole.kill()
    await cluster.apply("updated")
    await cluster.report("updated", "Succeeded", x86_64_linux=source.other)
    await cluster.delete("deleted")
    cluster.api.close()
    await whole.start()
    require_exactly(await whole.publish("v1", expression="updated"), source, source.hello)
    cluster.api.open()
    async with asyncio.timeout(LIMIT):
        while (await whole.publish("v2", expression="updated") / "var/result").readlink() != Path(source.other):
            await whole.unpublish("v2")
            await asyncio.sleep(0.05)
    code, _ = await whole.refused("v3", expression="deleted")
    assert code == "NOT_FOUND"
    await whole.eventually("the deleted one is forgotten", lambda: "deleted" not in remembered.read_text())


async def test_the_real_api_server_may_crash_and_come_back(whole: WholeNode, cluster: Cluster, source: Source) -> None:
    await cluster.apply("crash")
    await whole.start()
    waiting = asyncio.create_task(whole.publish(expression="crash"))
    await asyncio.sleep(0.2)
    cluster.server.kill_api_server()
    try:
        await asyncio.sleep(0.5)
        assert not waiting.done()
    finally:
        await asyncio.to_thread(cluster.server.start_api_server)
    await cluster.report("crash", "Succeeded", x86_64_linux=source.hello)
    require_exactly(await waiting, source, source.hello)
