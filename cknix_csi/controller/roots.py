"""GC roots of Expressions: their names, and who may remove them when.

A root is named ``<namespace>/<name>/<uid>-<system>-<hash of the path>``: one root per result, found again by the uid,
and readable for a person who looks at the directory.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable

from cknix_csi.api.storepath import StorePath
from cknix_csi.controller.ports import Roots
from cknix_csi.finishing import in_thread
from cknix_csi.kube.api import Api, ApiError, expressions, list_all
from cknix_csi.kube.backoff import Backoff
from cknix_csi.kube.events import Subject

_NAME = re.compile(r"[^/]+/[^/]+/(?P<uid>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-[^/]+")

_log = logging.getLogger(__name__)


def root_name(subject: Subject, system: str, path: StorePath) -> str:
    return f"{subject.namespace}/{subject.name}/{subject.uid}-{system}-{path.hash}"


def owner(name: str) -> str | None:
    """The uid of the Expression that the root *name* belongs to; None for a root that is not an Expression's."""
    match = _NAME.fullmatch(name)
    return match["uid"] if match else None


async def add_all(roots: Roots, wanted: dict[str, StorePath]) -> None:
    """Make the roots *wanted*; those that are there stay as they are."""

    def work() -> None:
        for name, path in wanted.items():
            roots.add(name, path)

    await in_thread(work)


async def make_exactly(
    roots: Roots, uid: str, wanted: dict[str, StorePath]
) -> tuple[frozenset[StorePath], frozenset[StorePath]]:
    """Let the roots of the Expression *uid* be *wanted*; gives what had no root before, and what has none any more."""

    def work() -> tuple[frozenset[StorePath], frozenset[StorePath]]:
        before = {name: path for name, path in roots.list().items() if owner(name) == uid}
        made = {name: path for name, path in wanted.items() if before.get(name) != path}
        for name, path in made.items():
            roots.add(name, path)
        dropped = before.keys() - wanted.keys()
        for name in dropped:
            roots.remove(name)
        return frozenset(made.values()), frozenset(before[name] for name in dropped)

    return await in_thread(work)


async def keep_only(roots: Roots, uid: str, wanted: Iterable[str]) -> None:
    """Remove every root of the Expression *uid* whose name is not *wanted*."""
    keep = frozenset(wanted)

    def work() -> None:
        for name in roots.list():
            if owner(name) == uid and name not in keep:
                roots.remove(name)

    await in_thread(work)


async def release_orphans(api: Api, roots: Roots) -> frozenset[str]:
    """Remove the roots of Expressions that are gone: deleted by force, or while another controller's data were here.

    Gives the uids of all Expressions there are.

    The roots are read before the Expressions: one that is made meanwhile is not looked at.  Only a complete list of
    Expressions tells that one is gone, so this tries until it has one.
    """
    backoff = Backoff(first=1.0, cap=60.0)
    before = await in_thread(roots.list)
    while True:
        try:
            listing = await list_all(api, expressions(), metadata_only=True)
            break
        except ApiError as error:
            _log.warning("GC roots of vanished Expressions cannot be looked for yet: %s", error.message)
            await asyncio.sleep(backoff.next())
    alive = frozenset(str(item["metadata"]["uid"]) for item in listing.items)

    def work() -> list[str]:
        gone = [name for name in before if (uid := owner(name)) is not None and uid not in alive]
        for name in gone:
            roots.remove(name)
        return gone

    gone = await in_thread(work)
    if gone:
        _log.info("released %d GC roots of Expressions that no longer exist: %s", len(gone), ", ".join(gone[:10]))
    return alive
