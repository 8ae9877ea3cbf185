"""The whole daemon and presentations: asked for by attribute, or chosen for a pod with a user namespace of its own."""

from __future__ import annotations

import subprocess

from tests.node.whole import Cluster, Source, WholeNode, require_exactly


def fstype(node: WholeNode, volume: str) -> str:
    """What the kernel says is mounted at the target."""
    target = node.target(volume)
    return node.namespace.run("findmnt", "--noheadings", "--output", "FSTYPE", "--mountpoint", target).strip()


def digest(node: WholeNode) -> str:
    """Of metadata and content of the node's store."""
    script = "(find . -printf '%p %y %m %U:%G %T@ %l\\n'; find . -type f -exec sha256sum {} +) | sort | sha256sum"
    where = node.namespace.see(node.data / "nix/store")
    return subprocess.run(["sh", "-c", script], cwd=where, capture_output=True, text=True, check=True).stdout


async def test_each_presentation_is_had_by_its_attribute_and_leaves_nothing(whole: WholeNode, source: Source) -> None:
    await whole.start()
    for name in ("redirect", "hardlink", "copy"):
        for writable in (False, True):
            volume = f"{name}-{writable}"
            shown = await whole.publish(volume, writable=writable, storePath=source.hello, presentation=name)
            require_exactly(shown, source, source.hello)
            assert (fstype(whole, volume) == "overlay") == (name != "copy")
            assert f"Hello from {source.hello}:" in whole.run_in(volume, "hello")
    before = digest(whole)
    for name in ("redirect", "hardlink", "copy"):
        program = whole.shown(f"{name}-True") / f"store/{source.hello.removeprefix('/nix/store/')}/bin/hello"
        program.chmod(0o755)
        program.write_text("changed")
        (whole.shown(f"{name}-True") / "store/new").mkdir()
    assert digest(whole) == before
    whole.kill()
    await whole.start()
    for name in ("redirect", "hardlink", "copy"):
        code, message = await whole.refused(
            f"{name}-False", storePath=source.hello, presentation="copy" if name == "redirect" else "redirect"
        )
        assert code == "ALREADY_EXISTS"
        assert f"it is presented as {name}, asked for is" in message
        for writable in (False, True):
            await whole.publish(f"{name}-{writable}", writable=writable, storePath=source.hello, presentation=name)
            await whole.unpublish(f"{name}-{writable}")
    await whole.left_nothing()


async def test_a_copys_pod_is_told_what_it_cost(whole: WholeNode, cluster: Cluster, source: Source) -> None:
    await cluster.schedule("dear")
    await whole.start()
    await whole.publish("dear", writable=True, storePath=source.hello, presentation="copy", sizeLimit="64Mi")

    def events() -> str:
        template = '{range .items[*]}{.reason}: {.message}{"\\n"}{end}'
        selector = "involvedObject.kind=Pod,involvedObject.uid=dear"
        return cluster.server.kubectl("get", "events", "--field-selector", selector, "-o", f"jsonpath={template}")

    await whole.eventually("the event is there", lambda: "VolumeCopied" in events())
    files = [path for path in (whole.shown("dear") / "store").rglob("*") if path.is_file() and not path.is_symlink()]
    assert f'VolumeCopied: volume "nix" is a private copy of {source.hello}, as it asks for; files: ' in events()
    assert f"{len(files)} copied" in events() or f"{len(files)} reflinked" in events()


async def test_a_pod_with_a_user_namespace_gets_what_can_be_id_mapped(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    for volume in ("plain", "writer", "copier"):
        await cluster.schedule(volume, hostUsers=False)
    await whole.start()
    require_exactly(await whole.publish("plain", storePath=source.hello), source, source.hello)
    assert fstype(whole, "plain") != "overlay"
    code, message = await whole.refused("writer", writable=True, storePath=source.hello)
    assert code == "INVALID_ARGUMENT"
    assert "`hostUsers: false`" in message
    assert "what this node can do: `presentation: copy`" in message
    shown = await whole.publish("copier", writable=True, storePath=source.hello, presentation="copy")
    require_exactly(shown, source, source.hello)
    assert fstype(whole, "copier") != "overlay"


async def test_without_an_api_server_a_pod_that_nobody_knows_gets_what_nearly_all_want(
    whole: WholeNode, cluster: Cluster, source: Source
) -> None:
    await cluster.schedule("known", hostUsers=False)
    await whole.start()
    await whole.publish("known", storePath=source.hello)
    await whole.unpublish("known")
    cluster.api.close()
    await whole.publish("stranger", storePath=source.hello)
    assert fstype(whole, "stranger") == "overlay"
    assert "taken for a pod without `hostUsers: false`" in whole.log()
    cluster.api.open()
