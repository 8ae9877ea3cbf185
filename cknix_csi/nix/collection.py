"""Making room in a store: garbage is deleted until enough space is free, what was used least recently first.

``nix-store --gc`` deletes in no order that means anything, so here it only says what is dead (``--print-dead``), and
``nix-store --delete`` takes that in small portions.  Nix checks each portion against the roots of that moment, and
serves whoever announces a new root meanwhile; liveness is never ignored, so nothing that is in use, being fetched or
just coming into use can go.  What Nix 2.8 to 2.34 do alike with ``--delete``:

* a path is refused while a path outside of the portion refers to it, even a dead one: referrers go first;
* at the first refusal it stops, with some of the portion deleted; names that are gone already are no error;
* hard links of an optimised store are counted and freed at the end of each command that succeeds.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cknix_csi.api.errors import CknixError, OutOfSpace
from cknix_csi.api.progress import humanise
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.nix import database, process
from cknix_csi.nix.recovery import StoreUnreadable, shown
from cknix_csi.nix.store import Store
from cknix_csi.nix.unsynced import Unsynced
from cknix_csi.nix.wants import Wants

log = logging.getLogger(__name__)

_MAX_ERROR_CHARACTERS = 500
_TRIES = 3
_STRANGER = "symlink: File name too long"
"""Nix looks at the open files of all processes, and fails when one of them has a path that is too long for it."""
_STRANGER_SECONDS = 2.0
_LITTLE = 1024 * 1024
"""Bytes; with less than a part of this Nix cannot even open its database."""
_FEW = 64
"""Inodes; the same."""
# Nix keeps 8 MiB for the day on which a collection finds the disk full.  It would first fill them again, and then not
# be able to open its database (Nix 2.8).
_NO_RESERVE = ("--option", "gc-reserved-space", "0")


class CollectionFailed(CknixError):
    """Nix could not say what is garbage, or could not delete it for another reason than that it is in use."""

    situation = Situation.COLLECTION_FAILED


@dataclass(frozen=True, slots=True)
class Space:
    """Of a file system, in bytes."""

    free: int
    """For others than root: what kubelet counts as available."""
    total: int


@dataclass(frozen=True, slots=True)
class Collected:
    """What one collection did."""

    bytes_freed: int
    """By how much the free space has grown, whoever else wrote or deleted meanwhile; never negative.  In it are the
    8 MiB that Nix keeps for collections, until it is started next."""
    paths: int
    closures: tuple[StorePath, ...]
    """Of those given in order of use: which have lost paths, the least recently used first."""
    spared: tuple[StorePath, ...] = ()
    """Closures that would be garbage, but that somebody waits for."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How gently a collection goes about it."""

    paths: int = 100
    """At most so many in one command: it holds the collector's lock, and deletes without looking at the space."""
    pause: float = 0.2
    """Seconds between two commands, in which others have the disk."""
    deadline: float = 900.0
    """Seconds for one command."""


@dataclass(frozen=True, slots=True)
class Graph:
    """What a store's database says of its valid paths."""

    nar_sizes: Mapping[str, int]
    """Bytes by path."""
    references: Mapping[str, Sequence[str]]
    """What each path refers to, itself left out, and its derivation, which Nix keeps as long as the path
    (``keep-derivations``); paths without any may be missing."""
    registered: Mapping[str, float] = field(default_factory=dict)
    """Seconds since the epoch by path."""


@dataclass(frozen=True, slots=True)
class Portion:
    """Dead paths that go together, referrers before what they refer to; *closure* is None for those of no closure."""

    closure: StorePath | None
    paths: tuple[str, ...]


class Collector:
    """Collects garbage in *store*; *home* is a directory of this program's own.

    *unsynced* is asked and told of what a power cut could do; None: one of this object's own, never closed.
    """

    def __init__(self, store: Store, home: Path, pace: Pace | None = None, *, unsynced: Unsynced | None = None) -> None:
        self._store = store
        self._unsynced = Unsynced(store) if unsynced is None else unsynced
        self._home = home
        self._pace = pace or Pace()

    async def collect(self, want: int, order: Sequence[StorePath], wants: Callable[[], Wants] = Wants) -> Collected:
        """Delete garbage until *want* bytes are free for others than root, or none is left.

        First goes what belongs to no closure of *order*, then the closures of *order* one by one, the first first: of
        each what no later one contains.  *wants*, asked when it is known what is garbage, tells what stays all the same
        and what goes last.  To be cancelled at any time; what is deleted then is deleted whole as far as Nix knows.
        Raises :class:`CollectionFailed`; and, before anything is deleted, what reading the store's database
        raises and what :func:`recover` does, when nobody can say what the views show.
        """
        before = measured = (await self.space()).free
        deleted = 0
        closures: list[StorePath] = []
        if before >= want or not self._store.database.exists():
            return Collected(0, 0, ())
        # Before the dead are listed: what is registered in between is left for another time.
        graph, kept = await self._graph()
        dead = await self._dead()
        expected = 0
        # Only now: who has let go of a closure for want of space has said so by the time that it counts as dead.
        wanted = wants()
        garbage = {path for path in dead if path in graph.nar_sizes}
        spared = tuple(sorted(closure for closure in wanted.closures if str(closure) in garbage))
        kept.update(_referrers_first(map(str, spared), graph.references, set()))
        garbage -= kept
        # Nix lists as well what is on the disk and not registered.  Of that nobody knows what it is: a lock that
        # somebody waits for, or what an interrupted fetch left, which the next fetch looks after.  Only what a process
        # that was killed had begun to delete is known.
        begun = await asyncio.to_thread(self._begun)
        halves = tuple(path for path in dead if path in begun and path not in graph.nar_sizes and path not in kept)
        late = [path for path in garbage if wanted.since is not None and graph.registered.get(path, 0) >= wanted.since]
        portions = plan(garbage, graph, order, late)
        for portion in (Portion(None, halves), *portions):
            rest = list(portion.paths)
            while rest and measured < want:
                batch = _batch(rest, graph.nar_sizes, want - measured - expected, self._pace.paths)
                del rest[: len(batch)]
                if deleted:
                    await asyncio.sleep(self._pace.pause)
                gone = await self._delete(batch)
                deleted += len(gone)
                expected += sum(graph.nar_sizes.get(path, 0) for path in gone)
                if gone and portion.closure is not None and portion.closure not in closures:
                    closures.append(portion.closure)
                measured, expected = await self._measure(measured, expected, want)
            if measured >= want:
                break
        return Collected(max(measured - before, 0), deleted, tuple(closures), spared)

    async def space(self) -> Space:
        """The store's file system now; where the store will be, when it is not there yet.  Raises OSError."""

        def space() -> Space:
            directory = self._store.physical
            while not directory.exists() and directory != directory.parent:
                directory = directory.parent
            state = os.statvfs(directory)
            return Space(state.f_bavail * state.f_frsize, state.f_blocks * state.f_frsize)

        return await asyncio.to_thread(space)

    async def _measure(self, before: int, expected: int, want: int) -> tuple[int, int]:
        """The free space now, and what of *expected* is still to be seen; *before*: the free space last time."""
        now = (await self.space()).free
        if now >= want or before + expected < want:
            return now, max(expected - (now - before), 0)
        # Some file systems (btrfs) give space back only with their next transaction.  Without this, everything would
        # be deleted before any of it shows.
        await self._run(["sync", "--file-system", str(self._store.physical)], [])
        return (await self.space()).free, 0

    async def _graph(self) -> tuple[Graph, set[str]]:
        """What is registered, and what must stay whatever becomes of the GC roots."""

        def graph() -> tuple[Graph, set[str]]:
            # What a view shows and the database has lost would be garbage to Nix, and so would what has lost its root.
            self._unsynced.recover()
            return read_graph(self._store), shown(self._store)

        async def survived_graph() -> tuple[Graph, set[str]]:
            await self._unsynced.survived()
            return await asyncio.to_thread(graph)

        try:
            return await survived_graph()
        except OutOfSpace:
            self._give_up_reserve()
            return await survived_graph()

    async def _dead(self) -> list[str]:
        errors: list[bytes] = []
        completed = await self._nix_store(["--gc", "--print-dead"], errors)
        if completed.code != 0:
            raise CollectionFailed(f"nix-store --gc --print-dead failed in {self._store.uri}: {_text(errors)}")
        return os.fsdecode(completed.stdout).splitlines()

    async def _delete(self, batch: Sequence[str]) -> list[str]:
        """Delete what of *batch* is still garbage; returns what is gone."""
        await asyncio.to_thread(self._begin, batch)
        async with AsyncExitStack() as kept:
            # A power cut could leave a path registered whose files are gone.
            if await asyncio.to_thread(self._can_note):
                with suppress(OutOfSpace, StoreUnreadable):  # as in _begin
                    await kept.enter_async_context(self._unsynced.noted(batch))
            await self._delete_noted(list(batch))
        return await asyncio.to_thread(self._end, batch)

    async def _delete_noted(self, rest: list[str]) -> None:
        for _ in range(_TRIES):
            errors: list[bytes] = []
            completed = await self._nix_store(["--delete", *rest], errors)
            if completed.code == 0:
                return
            said = _text(errors)
            if "still alive" not in said:
                raise CollectionFailed(f"nix-store --delete failed in {self._store.uri}: {said}")
            # Somebody began to use it; with a path comes all that it refers to.
            still_dead = set(await self._dead())
            rest = [path for path in rest if path in still_dead and path not in said]
            if not rest:
                return

    def _can_note(self) -> bool:
        """False where the note would take the last bytes or inodes, without which Nix deletes nothing."""

        def is_full() -> bool:
            state = os.statvfs(self._store.state)
            few = state.f_files > 0 and state.f_ffree < _FEW
            return few or state.f_bfree * state.f_frsize < _LITTLE

        if is_full():
            self._give_up_reserve()
        return not is_full()

    def _give_up_reserve(self) -> None:
        """Nix's, which is for this moment."""
        (self._store.state / "db/reserved").unlink(missing_ok=True)

    def _begin(self, batch: Sequence[str]) -> None:
        """Remember what is deleted now, for a process to come: Nix forgets a path before it deletes it."""
        with suppress(OSError):  # on a disk that is full nothing can be remembered, and all the more must be deleted
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._batch_file.write_text("\n".join(batch))

    def _end(self, batch: Sequence[str]) -> list[str]:
        """What of *batch* is gone."""
        self._batch_file.unlink(missing_ok=True)
        return [path for path in batch if not os.path.lexists(self._physical(path))]

    def _begun(self) -> set[str]:
        try:
            return set(self._batch_file.read_text().splitlines())
        except FileNotFoundError:
            return set()

    @property
    def _batch_file(self) -> Path:
        return self._home / "being-deleted"

    def _physical(self, path: str) -> str:
        return str(self._store.physical / os.path.basename(path))

    async def _nix_store(self, arguments: Sequence[str], errors: list[bytes]) -> process.Completed:
        command = ["nix-store", *arguments, "--store", self._store.uri, *_NO_RESERVE]
        for _ in range(_TRIES - 1):
            completed = await self._run(command, errors)
            if completed.code == 0 or _STRANGER not in _text(errors):
                return completed
            await asyncio.sleep(_STRANGER_SECONDS)
            errors.clear()
        return await self._run(command, errors)

    async def _run(self, argv: Sequence[str], errors: list[bytes]) -> process.Completed:
        def keep(line: bytes) -> None:
            errors.append(line)
            del errors[:-20]  # it names every path that it deletes

        deadline = self._pace.deadline
        try:
            return await process.run(
                [*_gently(), *argv], env=self._environment(), deadline=deadline, on_line=keep, cwd=Path("/")
            )
        except TimeoutError:
            raise CollectionFailed(f"{argv[0]} {argv[1]} did not end within {humanise(deadline)}") from None
        except FileNotFoundError as error:
            raise CollectionFailed(f"{error.filename} was not found; is Nix on PATH?") from None
        except process.OutputTooLarge as error:
            raise CollectionFailed(f"{argv[0]} {argv[1]} wrote {error}") from None

    def _environment(self) -> dict[str, str]:
        names = ("PATH", "NIX_CONF_DIR", "LANG")
        kept = {name: os.environ[name] for name in names if name in os.environ}
        return {**kept, "HOME": str(self._home)}


def read_graph(store: Store) -> Graph:
    """All valid paths of *store*.  Raises what reading the database raises."""
    with database.reading(store) as connection:
        if connection is None:
            return Graph({}, {})
        rows = connection.execute("SELECT id, path, narSize, deriver, registrationTime FROM ValidPaths").fetchall()
        paths = {number: path for number, path, *_ in rows}
        sizes = {path: size or 0 for _, path, size, *_ in rows}
        references = {path: [deriver] for _, path, _, deriver, _ in rows if deriver in sizes}
        for referrer, reference in connection.execute("SELECT referrer, reference FROM Refs"):
            if referrer != reference:
                references.setdefault(paths[referrer], []).append(paths[reference])
        return Graph(sizes, references, {path: time for _, path, *_, time in rows})


def plan(dead: Iterable[str], graph: Graph, order: Sequence[StorePath], late: Collection[str] = ()) -> list[Portion]:
    """In which order *dead* paths are to go: those of no closure, then those of the closures of *order*, in turn.

    Those of *late*, with what they refer to, come after all others, whether they are in a closure or not.
    A path in several closures goes with the last of them.  Within a portion referrers come first; across portions they
    do as well, since what refers to a path of a closure is in a closure at least as recently used, or in none.
    """
    left = set(dead)
    portions: list[Portion] = []
    seen: set[str] = set()
    for root in (None, *reversed(order)):
        # What a later closure has seen, it has seen with all that it refers to.
        roots = [str(root)] if root is not None else sorted(late)
        mine = _referrers_first(roots, graph.references, seen)
        if found := tuple(path for path in mine if path in left):
            portions.append(Portion(root, found))
            left.difference_update(found)
    if left:
        unknown = [path for path in _referrers_first(sorted(left), graph.references, set()) if path in left]
        portions.append(Portion(None, tuple(unknown)))
    return portions[::-1]


def _referrers_first(roots: Iterable[str], references: Mapping[str, Sequence[str]], seen: set[str]) -> list[str]:
    """All that *roots* lead to and that is not in *seen*, which grows by it; each path before what it refers to.

    Paths that refer to each other in a circle (Nix makes none) come in any order.
    """
    finished: list[str] = []
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack: list[tuple[str, Iterator[str]]] = [(root, iter(references.get(root, ())))]
        while stack:
            path, rest = stack[-1]
            for reference in rest:
                if reference not in seen:
                    seen.add(reference)
                    stack.append((reference, iter(references.get(reference, ()))))
                    break
            else:
                finished.append(path)
                stack.pop()
    return finished[::-1]


def _batch(paths: Sequence[str], sizes: Mapping[str, int], need: int, most: int) -> list[str]:
    """The beginning of *paths* that makes *need* bytes free, at least one and at most *most* paths."""
    batch: list[str] = []
    size = 0
    for path in paths[:most]:
        batch.append(path)
        size += sizes.get(path, 0)
        if size >= need:
            break
    return batch


def _text(errors: Iterable[bytes]) -> str:
    lines = [os.fsdecode(line).strip() for line in errors]
    said = "; ".join(line for line in lines if line.startswith("error:")) or "; ".join(lines)
    return said[-_MAX_ERROR_CHARACTERS:] or "it gave no reason"


@cache
def _gently() -> tuple[str, ...]:
    """Behind others, for processor and disk; but no idle class: whoever announces a root waits for the collector."""
    words: list[str] = []
    if shutil.which("nice"):
        words += ["nice", "-n", "10"]
    if shutil.which("ionice"):
        words += ["ionice", "-c", "2", "-n", "7", "-t"]
    return tuple(words)
