"""The whole daemon does, shows and allows no more than it must: rights, powers, files, logs, store paths."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from typing import Any

from cknix_csi.kube.events import EventRecorder, Subject
from cknix_csi.privileges import NODE_KEEPS
from tests.api import rbac
from tests.api.conftest import connected
from tests.api.rights import granted, used
from tests.node.whole import Cluster, Source, WholeNode

MASK = f"{sum(1 << each for each in NODE_KEEPS):016x}"
SECRETS = ("s3cret-of-the-volume", "t0ken-of-the-pod", "s3cret-of-the-publish-context", "mistaken-f0r-an-attribute")


def status(process: Path) -> dict[str, str]:
    """Fields of proc_pid_status(5)."""
    return dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())


async def test_a_node_needs_every_right_it_has_and_asks_for_no_other(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    before = len(cluster.server.audited())

    def unused() -> list[str]:
        return sorted(map(str, granted(rbac.NODE) - used(rbac.NODE, cluster.server.audited()[before:])))

    await cluster.schedule("copied")
    await whole.start()
    await whole.refused(expression="unheard-of")
    await cluster.apply("deployed")
    await cluster.report("deployed", "Succeeded", x86_64_linux=source.hello)
    await whole.publish("copied", expression="deployed", presentation="copy")
    # News that come a second time make no Event but are counted; what a volume tells is mostly new.
    async with connected(cluster.server.kubeconfig("again", rbac.token(cluster.server, rbac.NODE))) as api:
        recorder = EventRecorder(api, component="test", instance="node-1")
        for _ in range(2):
            recorder.post(Subject("default", "pod-copied", "copied", "v1", "Pod"), "Normal", "Again", "the same")
        sending = asyncio.create_task(recorder.run())
        await whole.eventually("all rights are used", lambda: not unused(), lambda: "\n".join(unused()))
        sending.cancel()


async def test_the_daemon_and_its_children_have_no_power_that_is_not_needed(whole: WholeNode, source: Source) -> None:
    seen = whole.directory / "nix-status"
    program = whole.nix.nix.program("nix-store")
    whole.wrap("nix-store", f'cp /proc/self/status {seen}.new && mv {seen}.new {seen}\nexec {program} "$@"')
    await whole.start()
    await whole.publish(storePath=source.hello)
    assert whole.daemon is not None
    for thread in Path(f"/proc/{whole.daemon.pid}/task").iterdir():
        found = status(thread)
        assert {found[name] for name in ("CapPrm", "CapEff", "CapBnd")} == {MASK}
        assert {found[name] for name in ("CapInh", "CapAmb")} == {"0" * 16}
        assert found["NoNewPrivs"] == "1"
    child = dict(line.split(":\t", 1) for line in seen.read_text().splitlines())
    assert (child["CapEff"], child["CapBnd"], child["NoNewPrivs"]) == (MASK, MASK, "1")


async def test_an_administrator_can_keep_all_of_them(whole: WholeNode) -> None:
    await whole.start(CKNIX_KEEP_CAPABILITIES="true")
    assert whole.daemon is not None
    assert status(Path(f"/proc/{whole.daemon.pid}"))["CapBnd"] == status(Path("/proc/self"))["CapBnd"]


async def test_what_is_not_for_others_is_closed_to_them(whole: WholeNode, source: Source) -> None:
    await whole.start()
    await whole.publish("written", writable=True, storePath=source.hello)
    await whole.publish("limited", writable=True, storePath=source.hello, sizeLimit="64Mi")
    await whole.publish("copied", storePath=source.hello, presentation="copy")
    data = whole.namespace.see(whole.data)
    private = [whole.endpoint, whole.registration, data / "state", data / "home", data / "trash"]
    private += (data / "volumes").glob("*/*")
    assert len(private) == 8
    assert {str(path): stat.filemode(path.lstat().st_mode)[4:] for path in private} == {
        str(path): "------" for path in private
    }


async def test_secrets_that_kubelet_passes_on_are_written_nowhere(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await cluster.apply("deployed")
    await cluster.report("deployed", "Succeeded", x86_64_linux=source.hello)
    await whole.start(CKNIX_LOG_LEVEL="debug")

    def with_secrets(volume: str, **attributes: str) -> Any:
        request = whole.publish_request(volume, writable=False, **attributes)
        request.secrets["password"] = SECRETS[0]
        request.volume_context["csi.storage.k8s.io/serviceAccount.tokens"] = f'{{"":{{"token":"{SECRETS[1]}"}}}}'
        request.publish_context["key"] = SECRETS[2]
        return request

    await whole.call(with_secrets("good", expression="deployed"))
    _, told = await whole.refusal(with_secrets("bad", password=SECRETS[3]))
    await whole.unpublish("good")
    assert whole.terminate() == 0
    # The token of the daemon's own account, with which it has asked the API server.
    mine = cluster.kubeconfig["users"][0]["user"]["token"]
    kept = [path for path in (whole.data / "state").iterdir() if path.is_file()]
    assert {path.name for path in kept} >= {"ledger.sqlite", "cache.json"}
    log = (whole.directory / "daemon.log").read_bytes()
    assert b"NodePublishVolume" in log
    for secret in (*SECRETS, mine):
        assert secret not in told
        assert secret.encode() not in log
        assert not [path for path in kept if secret.encode() in path.read_bytes()]


async def test_an_administrator_can_keep_pods_from_store_paths_of_other_namespaces(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await cluster.apply("deployed")
    await cluster.report("deployed", "Succeeded", x86_64_linux=source.hello)
    await whole.start(CKNIX_STORE_PATHS="published")
    await whole.publish_retrying("mine", storePath=source.hello)
    code, message = await whole.refused("theirs", storePath=source.other)
    assert code == "FAILED_PRECONDITION"
    assert message.startswith(f'{source.other} is no result of an Expression of namespace "default", and pods may name')
    persistent = whole.publish_request("of-an-administrator", storePath=source.other)
    persistent.volume_context["csi.storage.k8s.io/ephemeral"] = "false"
    await whole.call(persistent)
    # What is mounted already stays so under another rule.
    whole.terminate()
    await whole.start(CKNIX_STORE_PATHS="deny")
    await whole.publish("mine", storePath=source.hello)
    code, message = await whole.refused("late", storePath=source.hello)
    assert (code, "CKNIX_STORE_PATHS=deny" in message) == ("FAILED_PRECONDITION", True)
