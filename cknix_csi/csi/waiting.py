"""What a publish waits for, told to its pod while it waits: kubelet's own first Event comes when the call has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cknix_csi import logs
from cknix_csi.api.errors import CknixError
from cknix_csi.api.situations import Situation
from cknix_csi.csi.pods import PodEvents
from cknix_csi.csi.requests import PublishCall

TELL_AFTER_SECONDS = 2.0
"""Who waits no longer than this needs to tell nobody."""

OnWait = Callable[[Situation, Callable[[], str]], None]
"""Called with what is waited for from now on, and with what says how far that has come."""


def untold(situation: Situation, words: Callable[[], str]) -> None:
    """An :data:`OnWait` for those whom nobody listens to."""


class Waits:
    """Posts one Event per publish and thing that it waits for, however often kubelet asks again."""

    def __init__(self, events: PodEvents | None) -> None:
        """*events* is None where there is no Kubernetes."""
        self._events = events
        self._told: dict[tuple[str, Path], set[Situation]] = {}

    @contextmanager
    def of(self, call: PublishCall) -> Iterator[OnWait]:
        """What *call* waits for inside the block is told while it waits."""
        loop = asyncio.get_running_loop()
        volume = logs.fields().get("volume") or call.volume_id
        waiting: Situation | None = None
        said: Callable[[], str] = str
        timer: asyncio.TimerHandle | None = None

        def tell(situation: Situation) -> None:
            if self._events is not None:
                self._told.setdefault((call.volume_id, call.target), set()).add(situation)
                self._events.post(call.pod, situation.reason, f'volume "{volume}" has to wait: {said()}')

        def on_wait(situation: Situation, words: Callable[[], str]) -> None:
            nonlocal waiting, said, timer
            said = words
            if situation is waiting:
                return
            waiting = situation
            if timer is not None:
                timer.cancel()
            if situation in self._told.get((call.volume_id, call.target), ()):
                return
            timer = loop.call_later(TELL_AFTER_SECONDS, tell, situation)

        try:
            yield on_wait
            self.over(call.volume_id, call.target)
        except CknixError as error:
            if not error.code.transient:  # else kubelet asks again, or unpublishes
                self.over(call.volume_id, call.target)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def over(self, volume_id: str, target: Path) -> None:
        """Nobody asks for this volume any more, or it is there: who asks next is told anew."""
        self._told.pop((volume_id, target), None)
