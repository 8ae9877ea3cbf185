"""The socket: whole as soon as it can be seen, taken from nobody who lives, and gone afterwards."""

import asyncio
import os
import signal
import socket
import stat
import sys
from pathlib import Path

import pytest
from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.exceptions import GRPCError

from cknix_csi.csi.identity import Identity
from cknix_csi.csi.server import serve
from cknix_csi.csi.sockets import SocketUnavailable
from cknix_csi.proto.csi_grpc import IdentityStub
from cknix_csi.proto.csi_pb2 import GetPluginInfoRequest, ProbeRequest, ProbeResponse
from cknix_csi.volumes.failures import NodeUnusable
from tests.node.conftest import LIMIT, exists

SERVE_FOR_EVER = """
import asyncio, sys
from pathlib import Path
from cknix_csi.csi.identity import Identity
from cknix_csi.csi.server import serve

async def main():
    async with serve([Identity()], Path(sys.argv[1]), grace=1):
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def answers(path: Path) -> bool:
    async with Channel(path=str(path)) as channel:
        return (await IdentityStub(channel).Probe(ProbeRequest())).ready.value


async def test_a_socket_answers_from_the_moment_it_can_be_seen(scratch: Path) -> None:
    path = scratch / "csi.sock"

    async def first_look() -> bool:
        await exists(path)
        return await answers(path)

    look = asyncio.create_task(first_look())
    async with serve([Identity()], path, grace=1):
        assert await look


async def test_only_root_may_connect(scratch: Path) -> None:
    previous = os.umask(0)
    try:
        async with serve([Identity()], scratch / "csi.sock", grace=1):
            assert stat.S_IMODE((scratch / "csi.sock").stat().st_mode) == 0o600
    finally:
        os.umask(previous)


async def test_nothing_stands_beside_the_socket_and_nothing_is_left(scratch: Path) -> None:
    async with serve([Identity()], scratch / "csi.sock", grace=1):
        assert os.listdir(scratch) == ["csi.sock"]
    assert os.listdir(scratch) == []


async def test_the_socket_of_a_killed_process_is_replaced(scratch: Path) -> None:
    path = scratch / "csi.sock"
    (scratch / ".csi.sock").touch()  # as if another had been killed while it made its own
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVE_FOR_EVER, str(path))
    try:
        await exists(path)
        assert await answers(path)
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    assert path.exists()
    async with serve([Identity()], path, grace=1):
        assert await answers(path)


async def test_the_socket_of_a_live_process_is_not_stolen(scratch: Path) -> None:
    path = scratch / "csi.sock"
    async with serve([Identity()], path, grace=1):
        identity = path.stat().st_ino
        with pytest.raises(SocketUnavailable) as raised:
            async with serve([Identity()], path, grace=1):
                pass
        assert raised.value.message == (
            f"another process serves at {path}; stop it first (two node daemons cannot share a node)"
        )
        assert path.stat().st_ino == identity
        assert await answers(path)


async def test_the_socket_of_a_live_process_that_does_not_answer_is_not_stolen(scratch: Path) -> None:
    path = scratch / "csi.sock"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(str(path))
        busy.listen(0)
        first.connect(str(path))  # now the queue of connections that nobody accepts is full
        with pytest.raises(SocketUnavailable):
            async with serve([Identity()], path, grace=1):
                pass


async def test_of_two_daemons_that_start_at_once_exactly_one_serves(scratch: Path) -> None:
    path = scratch / "csi.sock"
    done = asyncio.Event()

    async def daemon() -> None:
        async with serve([Identity()], path, grace=1):
            await done.wait()

    daemons = [asyncio.create_task(daemon()) for _ in range(5)]
    async with asyncio.timeout(LIMIT):
        while sum(task.done() for task in daemons) < 4:
            await asyncio.sleep(0.002)
    assert await answers(path)
    done.set()
    outcomes = await asyncio.gather(*daemons, return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType"] + 4 * ["SocketUnavailable"]


async def test_a_socket_that_is_another_process_s_by_now_is_left_alone(scratch: Path) -> None:
    path = scratch / "csi.sock"
    async with serve([Identity()], path, grace=1):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            theirs = path.stat().st_ino
    assert path.stat().st_ino == theirs


async def test_a_file_in_the_socket_s_place_is_not_deleted(scratch: Path) -> None:
    path = scratch / "csi.sock"
    path.write_text("precious")
    with pytest.raises(SocketUnavailable, match="is not a socket"):
        async with serve([Identity()], path, grace=1):
            pass
    assert path.read_text() == "precious"


async def test_a_directory_that_is_missing_is_named(scratch: Path) -> None:
    with pytest.raises(SocketUnavailable, match=f"directory {scratch}/none for a socket: No such file or directory"):
        async with serve([Identity()], scratch / "none/csi.sock", grace=1):
            pass


async def test_a_path_that_is_too_long_is_refused_and_one_that_just_fits_is_served(scratch: Path) -> None:
    room = 107 - len(os.fsencode(scratch)) - len("/.") - len(".sock")
    with pytest.raises(SocketUnavailable, match="is 1 bytes too long"):
        async with serve([Identity()], scratch / ("s" * (room + 1) + ".sock"), grace=1):
            pass
    path = scratch / ("s" * room + ".sock")
    async with serve([Identity()], path, grace=1):
        assert await answers(path)


async def test_every_call_is_observed_by_a_name_that_no_client_can_make_up(scratch: Path) -> None:
    seen: list[tuple[str, str, str]] = []
    path = scratch / "csi.sock"

    async def sick() -> None:
        raise NodeUnusable("the disk is gone")

    serving = serve([Identity(sick)], path, grace=1, observe=lambda *call: seen.append(call[:3]))
    async with serving, Channel(path=str(path)) as channel:
        await IdentityStub(channel).GetPluginInfo(GetPluginInfoRequest())
        made_up = UnaryUnaryMethod(channel, "/csi.v1.Identity/Nonsense", ProbeRequest, ProbeResponse)
        for call in (IdentityStub(channel).Probe, made_up):
            with pytest.raises(GRPCError):
                await call(ProbeRequest())
    assert seen == [
        ("/csi.v1.Identity/GetPluginInfo", "OK", "OK"),
        ("/csi.v1.Identity/Probe", "FAILED_PRECONDITION", "NodeUnusable"),
        ("unknown", "UNIMPLEMENTED", "NotSupported"),
    ]
