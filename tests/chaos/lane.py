"""Scenarios one after the other in a cluster of their own, beside other lanes that do the same."""

from __future__ import annotations

import threading
import traceback
from collections import deque

from tests.chaos import play
from tests.chaos.room import Room
from tests.chaos.scenario import SCENARIOS
from tests.cluster.harness.cache import progress


class Lane(threading.Thread):
    """Takes names of scenarios from *waiting* until there are none; the program's end does not wait for it."""

    def __init__(self, room: Room, waiting: deque[str], outcomes: dict[str, play.Outcome], *, short: bool) -> None:
        super().__init__(daemon=True)
        self.room = room
        self._waiting = waiting
        self._outcomes = outcomes
        self._short = short

    def run(self) -> None:
        while self._waiting:
            try:
                name = self._waiting.popleft()
            except IndexError:  # another lane was faster
                return
            outcome = self._outcomes[name] = self._play(name)
            took = ", ".join(f"{act} {seconds:.0f} s" for act, seconds in outcome.took.items())
            progress(f"chaos: {name}: {'ok' if outcome.good else 'FAILED'} ({took})")
            if not outcome.good:
                self.room.abandon()  # whatever is wrong with it must not fail what comes next

    def _play(self, name: str) -> play.Outcome:
        try:
            return play.play(self.room.cluster(), SCENARIOS[name], short=self._short)
        except Exception:
            progress(f"chaos: {name}: there is no cluster to play it in\n{traceback.format_exc()}")
            return play.Outcome(name)
