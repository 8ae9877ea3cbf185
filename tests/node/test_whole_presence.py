"""The whole daemon stays within kubelet's reach: its sockets are taken away, and kubelet refuses it for a while."""

from __future__ import annotations

import aiohttp

from tests.node.asked import Asked, free_port
from tests.node.pluginmanager import PluginManager
from tests.node.whole import Source, WholeNode, require_exactly

DRIVER = "csi.cknix.cool"
AWAY = "error updating Node object: dial tcp 127.0.0.1:6443: connect: connection refused"


async def test_neither_lost_sockets_nor_refusals_need_a_restart(whole: WholeNode, source: Source) -> None:
    port = free_port()
    settings = {"CKNIX_METRICS_LISTEN": f"127.0.0.1:{port}"}
    async with aiohttp.ClientSession() as client, PluginManager(whole.registration.parent).running() as kubelet:
        asked = Asked(client, port)
        whole.launch(**settings)
        await asked.becomes("/readyz", 200)
        require_exactly(await whole.publish("first", storePath=source.hello), source, source.hello)
        mounted = whole.mount_id("first")

        kubelet.refusal = AWAY
        whole.registration.unlink()
        whole.endpoint.unlink()
        await whole.eventually("it is refused", lambda: AWAY in whole.log())
        # All else is well again: the CSI socket is back.
        assert [line for line in (await asked.becomes("/readyz", 503)).splitlines() if line.startswith("[-]")] == [
            "[-] the driver is registered with kubelet: "
            f"kubelet refused the driver {DRIVER} at {whole.endpoint}: {AWAY}"
        ]
        kubelet.refusal = ""
        await asked.becomes("/readyz", 200)
        require_exactly(await whole.publish("second", storePath=source.hello), source, source.hello)

        whole.kill()
        kubelet.refusal = AWAY
        whole.launch(**settings)
        running = whole.daemon
        before = kubelet.asked
        await whole.eventually("it is refused again and again", lambda: kubelet.asked >= before + 3)
        kubelet.refusal = ""
        await whole.eventually("kubelet has it", lambda: kubelet.drivers == {DRIVER: str(whole.endpoint)})
        await asked.becomes("/readyz", 200)
        assert running is not None
        assert running.poll() is None
        assert whole.mount_id("first") == mounted
        await whole.unpublish("first")
        await whole.unpublish("second")
