"""A Nix that tells how long it took and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from cknix_csi.api.expression import Data
from cknix_csi.api.progress import Progress
from cknix_csi.api.storepath import StorePath
from cknix_csi.controller.ports import Nix
from cknix_csi.metrics.ports import ControllerMetrics, Work
from cknix_csi.metrics.timing import timed
from cknix_csi.nix.nix import Evaluation


class MeasuredNix:
    """A :class:`Nix` that is *inner*."""

    def __init__(self, inner: Nix, metrics: ControllerMetrics) -> None:
        self._inner = inner
        self._metrics = metrics

    async def evaluate(self, data: Data, system: str) -> Evaluation:
        with self._measured("evaluation"):
            return await self._inner.evaluate(data, system)

    async def build(self, evaluation: Evaluation, *, progress: Callable[[Progress], None]) -> None:
        with self._measured("build"):
            await self._inner.build(evaluation, progress=progress)

    async def substitute(self, path: StorePath) -> None:
        await self._inner.substitute(path)

    @contextmanager
    def _measured(self, work: Work) -> Iterator[None]:
        self._metrics.begin(work)
        with timed(partial(self._metrics.end, work)):
            yield
