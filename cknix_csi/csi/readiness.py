"""Whether kubelet can publish volumes here, and what it lacks if not."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable

from cknix_csi.metrics.looking import Looking
from cknix_csi.metrics.pages import Answer
from cknix_csi.volumes.failures import NodeUnusable

LOOK_SECONDS = 0.8
"""For a look at disk and mount table; who asks, such as kubelet, waits for a second."""


class Step(enum.Enum):
    """What a daemon does before kubelet can publish with it; the value says what is then so."""

    RECONCILED = "what an earlier daemon left is in order"
    SERVED = "the CSI socket is served"
    REGISTERED = "the driver is registered with kubelet"


class Readiness:
    """What has been reached of *steps*, and whether this process can still work."""

    def __init__(self, steps: Iterable[Step] = Step, check: Callable[[], None] | None = None) -> None:
        """*check* raises NodeUnusable, and may block; None: this process needs neither disk nor mounts."""
        self._reached = dict.fromkeys(steps, False)
        self._why: dict[Step, str] = {}
        self._looking = None if check is None else Looking(check)

    def reach(self, step: Step) -> None:
        """*step* is done."""
        if step in self._reached:
            self._reached[step] = True
            self._why.pop(step, None)

    def leave(self, step: Step, why: str = "") -> None:
        """What *step* did is undone, or was tried in vain."""
        if step in self._reached:
            self._reached[step] = False
            self._why[step] = why

    async def check(self) -> None:
        """Raises NodeUnusable, within a second, for what breaks the node, or what only a restart of this process mends.

        What is elsewhere and down is not looked at: API server, controller and caches come back by themselves, and
        volumes of closures that are here need none of them.
        """
        if self._looking is None:
            return
        try:
            await self._looking.within(LOOK_SECONDS)
        except TimeoutError:
            raise NodeUnusable(
                f"the disk of the data root has not answered for {LOOK_SECONDS:g} s; see the node's kernel log"
            ) from None

    async def page(self, accept: str) -> Answer:
        """Each condition on a line, as the API server's ``/readyz?verbose`` has them; 503 unless all hold."""
        lines = [self._line(step) for step in self._reached]
        ready = all(self._reached.values())
        if self._looking is not None:
            try:
                await self.check()
                lines.append("[+] disk and mount table can be used")
            except NodeUnusable as error:
                ready = False
                lines.append(f"[-] disk and mount table can be used: {error.message}")
        return Answer("".join(f"{line}\n" for line in lines).encode(), status=200 if ready else 503)

    def _line(self, step: Step) -> str:
        if self._reached[step]:
            return f"[+] {step.value}"
        why = " ".join(self._why.get(step, "").split())  # each condition has one line
        return f"[-] {step.value}: {why}" if why else f"[-] {step.value}"
