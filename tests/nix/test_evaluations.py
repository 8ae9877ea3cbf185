"""What was evaluated and is still to be built outlives every garbage collection, with every supported Nix."""

from __future__ import annotations

import asyncio
import os

import pytest

from cknix_csi.api.errors import BuildFailed, CknixError, OutOfSpace
from cknix_csi.api.expression import Data
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import evaluations
from cknix_csi.nix.evaluations import HeldEvaluations
from cknix_csi.nix.nix import Evaluation, Nix
from tests.nix.room import SYSTEM, Room
from tests.nixes import NixEnv


@pytest.fixture
def room(nix_env: NixEnv, monkeypatch: pytest.MonkeyPatch) -> Room:
    return Room(nix_env, monkeypatch)


def greeting() -> Data:
    """New to every store."""
    return Data("expr", f'(import <cknix-demo> {{ }}).greet "{os.urandom(8).hex()}"')


def roots(room: Room) -> list[str]:
    return [path.name for path in (room.store.gcroots / "evaluations").glob("*")]


async def test_what_waits_for_its_build_survives_a_collection_and_is_let_go_after_it(room: Room) -> None:
    held = HeldEvaluations(room.nix())
    await held.start()
    evaluation = await held.evaluate(greeting(), SYSTEM)
    again = await held.evaluate(greeting(), SYSTEM)
    room.env.run("nix-store", "--gc")
    await held.build(evaluation, progress=lambda _: None)
    assert room.is_valid(evaluation.result)
    room.env.run("nix-store", "--gc")
    await held.build(again, progress=lambda _: None)
    assert room.is_valid(again.result)
    assert roots(room) == []


async def test_two_that_wait_for_one_build_both_hold_it(room: Room) -> None:
    held, data = HeldEvaluations(room.nix()), greeting()
    first, second = await held.evaluate(data, SYSTEM), await held.evaluate(data, SYSTEM)
    assert first == second
    await held.build(first, progress=lambda _: None)
    assert roots(room) != []
    room.env.run("nix-store", "--gc")
    assert not room.is_valid(first.result), "nothing holds a result here"
    await held.build(second, progress=lambda _: None)
    assert roots(room) == []


async def test_a_substituter_of_nix_conf_gives_back_what_the_store_has_lost_if_it_is_signed(room: Room) -> None:
    held = HeldEvaluations(room.nix())
    evaluation = await held.evaluate(greeting(), SYSTEM)
    await held.build(evaluation, progress=lambda _: None)
    path = evaluation.result
    cache, secret, public = (room.env.directory / name for name in ("substituter", "secret", "public"))
    room.env.run("nix-store", "--generate-binary-cache-key", "elsewhere-1", secret, public, store=None)
    room.env.run("nix", "copy", "--to", f"file://{cache}?secret-key={secret}", str(path))
    room.env.run("nix-store", "--gc")
    assert not room.is_valid(path)
    with pytest.raises(BuildFailed, match="no substituter has it"):
        await held.substitute(path)
    room.env.configure(substituters=f"file://{cache}", require_sigs="true")
    with pytest.raises(BuildFailed, match="no substituter has it"):
        await held.substitute(path)
    assert not room.is_valid(path)
    room.env.configure(trusted_public_keys=public.read_text().strip())
    await held.substitute(path)
    assert room.is_valid(path)
    assert roots(room) == []


class Overtaken(Nix):
    """A collection comes right after each of the first *times* evaluations."""

    def __init__(self, room: Room, times: int) -> None:
        super().__init__(room.store, room.nix()._options)
        self.room = room
        self.times = times

    async def evaluate(self, data: Data, system: str) -> Evaluation:
        evaluation = await super().evaluate(data, system)
        if self.times:
            self.times -= 1
            await asyncio.to_thread(self.room.env.run, "nix-store", "--gc")
        return evaluation


async def test_what_is_collected_before_it_can_be_held_is_evaluated_again(room: Room) -> None:
    held = HeldEvaluations(Overtaken(room, 2))
    evaluation = await held.evaluate(greeting(), SYSTEM)
    await held.build(evaluation, progress=lambda _: None)
    assert room.is_valid(evaluation.result)


async def test_what_a_collection_that_ran_already_takes_is_waited_for_and_evaluated_again(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    new: list[list[str]] = []

    async def overtaken(_store: object, *paths: StorePath) -> None:
        """It has not seen the new roots."""
        new.append([path.basename for path in paths])
        if len(new) == 1:
            for name in roots(room):
                (room.store.gcroots / "evaluations" / name).unlink()
            await asyncio.to_thread(room.env.run, "nix-store", "--gc")

    monkeypatch.setattr(evaluations, "outlast_collector", overtaken)
    held, data = HeldEvaluations(room.nix()), greeting()
    evaluation = await held.evaluate(data, SYSTEM)
    again = await held.evaluate(data, SYSTEM)
    assert new == [roots(room), roots(room), []], "what is held already is in no danger"
    await held.build(evaluation, progress=lambda _: None)
    await held.build(again, progress=lambda _: None)
    assert room.is_valid(evaluation.result)
    assert roots(room) == []


async def test_what_is_collected_each_time_is_said_and_leaves_no_root(room: Room) -> None:
    with pytest.raises(CknixError, match=r"^what is to be built for .* was collected as garbage again and again$"):
        await HeldEvaluations(Overtaken(room, 1000)).evaluate(greeting(), SYSTEM)
    assert roots(room) == []


async def test_a_process_that_ended_holds_nothing_in_the_next(room: Room) -> None:
    await HeldEvaluations(room.nix()).evaluate(greeting(), SYSTEM)
    assert roots(room) != []
    await HeldEvaluations(room.nix()).start()
    assert roots(room) == []


async def test_a_build_that_fails_holds_nothing_and_a_full_disk_is_told(room: Room) -> None:
    told = []

    class Full(Nix):
        async def build(self, evaluation: Evaluation, *, progress: object) -> None:
            raise OutOfSpace("the disk is full")

    held = HeldEvaluations(Full(room.store, room.nix()._options), lambda: told.append("full"))
    evaluation = await held.evaluate(greeting(), SYSTEM)
    with pytest.raises(OutOfSpace):
        await held.build(evaluation, progress=lambda _: None)
    assert told == ["full"]
    assert roots(room) == []
