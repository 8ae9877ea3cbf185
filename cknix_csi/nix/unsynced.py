"""What of a store is not on its disk yet, noted there for whoever comes after a power cut.

Syncing each path before it is registered, as Nix can (``fsync-store-paths``), would make every fetch wait for the disk.
So what may register paths, or delete some, is noted beforehand, and synced in the background afterwards; then the note
goes.  Who finds a note of another boot knows which paths to mistrust, and :mod:`powercut` looks through them: usually
none, since hardly a second passes between the end of a fetch and the beginning of its sync.

    nix/var/nix/cknix/unsynced/<random>   {"boot": the kernel's boot id,
                                          "newest": the number of the path registered last,
                                          "touched": [registered paths that may be changed or deleted]}

A note is locked for as long as its process lives, and each process has its own: several may work on one store.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cknix_csi.api.errors import CknixError
from cknix_csi.api.storepath import StorePath
from cknix_csi.boot import boot_id
from cknix_csi.finishing import finish, in_thread
from cknix_csi.nix import database, powercut
from cknix_csi.nix.durable import make_directory, sync_directory, sync_file_systems
from cknix_csi.nix.recovery import recover, told
from cknix_csi.nix.store import Store

_DIRECTORY = "cknix/unsynced"
# Whoever waits for a fetch goes on to make a view of it: the disk is theirs first.
_DELAY_SECONDS = 1.0
_POLL_SECONDS = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Note:
    """What may not be on the disk when the machine goes down."""

    boot: str
    newest: int
    """Of what was registered later than the path of this number nothing is known."""
    touched: frozenset[str] = frozenset()
    """Neither of these, though registered earlier."""

    def written(self) -> bytes:
        return json.dumps({"boot": self.boot, "newest": self.newest, "touched": sorted(self.touched)}).encode()

    @classmethod
    def parse(cls, data: bytes) -> Note:
        """One that cannot be read mistrusts everything: it was synced before it got its name, so it is not a power cut
        that has damaged it, and nobody knows what has."""
        try:
            content = json.loads(data)
            return cls(str(content["boot"]), int(content["newest"]), frozenset(map(str, content["touched"])))
        except (ValueError, KeyError, TypeError):
            return cls("", 0)


@dataclass(slots=True, eq=False)
class _Held:
    """A note whose lock is held."""

    file: Path
    descriptor: int
    note: Note

    def drop(self) -> None:
        """Remove the note, for good: one that came back would cost whoever finds it a look at what is whole."""
        self.file.unlink(missing_ok=True)
        sync_directory(self.file.parent)
        self.let_go()

    def let_go(self) -> None:
        os.close(self.descriptor)


@dataclass(slots=True, eq=False)
class _Operation:
    touched: frozenset[str]
    ended: bool = False


class Unsynced:
    """Keeps the note of one process on one store, and acts on those that it finds; :meth:`close` it in the end."""

    def __init__(
        self,
        store: Store,
        *,
        boot_id: Callable[[], str] = boot_id,
        after_cut: Callable[[], None] = lambda: None,
        delay: float = _DELAY_SECONDS,
    ) -> None:
        """*after_cut* is called in a thread when the note of another boot was found.

        *delay*: seconds from the end of an operation to the beginning of its sync, which serves all that have ended.
        """
        self._store = store
        self._boot_id = boot_id
        self._after_cut = after_cut
        self._delay = delay
        self._directory = store.state / _DIRECTORY
        # For threads: who waits for one may be cancelled while it works on.
        self._lock = threading.Lock()
        self._held: _Held | None = None
        self._operations: list[_Operation] = []
        """That run, or have ended and are not synced."""
        self._abandoned: list[_Held] = []
        """Notes of this boot of processes that have ended."""
        self._survived = False
        self._checking: asyncio.Task[None] | None = None
        self._syncing: asyncio.Task[None] | None = None
        self._closed = False

    async def survived(self) -> None:
        """Return when nothing registered is in doubt any more: at once, but for the first time in a process.

        To be called before anything is believed to be whole because it is registered.
        Raises :class:`OutOfSpace`, :class:`StoreUnreadable` and what the database raises; the next call tries again.
        """
        if not self._survived:
            await asyncio.shield(self.begin())

    def begin(self) -> asyncio.Task[None]:
        """Begin what :meth:`survived` waits for."""
        if self._checking is None or (self._checking.done() and not self._survived):
            self._checking = asyncio.create_task(self._check(), name="look for what a power cut has damaged")
            self._checking.add_done_callback(_tell)
        return self._checking

    async def recovered(self) -> None:
        """:meth:`survived`, and then :meth:`recover` in a thread."""
        await self.survived()
        await asyncio.to_thread(self.recover)

    def recover(self) -> None:
        """:func:`recovery.recover`.  Blocks."""
        if recover(self._store):
            # The numbers of the new database are not those of the old one.
            with self._lock, told(self._store):
                if self._held is not None:
                    self._put(replace(self._held.note, newest=0))

    @asynccontextmanager
    async def noted(self, touched: Iterable[StorePath | str] = ()) -> AsyncIterator[None]:
        """Around whatever may register paths, or change or delete *touched*: it is noted when the block begins.

        After the block it is synced in the background.  Raises what :meth:`survived` raises.
        """
        await self.survived()
        operation = _Operation(frozenset(map(str, touched)))
        self._operations.append(operation)
        try:
            await asyncio.to_thread(self._cover)
            yield
        finally:
            operation.ended = True
            self._wake()

    async def close(self) -> None:
        """End what goes on in the background; of what is not synced by then the next process finds the note."""
        self._closed = True
        tasks = {task for task in (self._checking, self._syncing) if task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            for held in filter(None, (self._held, *self._abandoned)):
                held.let_go()
            self._held, self._abandoned = None, []

    def _cover(self) -> None:
        """Note all operations, unless they are."""
        with self._lock, told(self._store):
            touched = _touched(self._operations)
            if not self._operations:  # a cancelled one
                return
            if self._held is None:
                self._put(Note(self._boot_id(), self._newest() or 0, touched))
            elif not touched <= self._held.note.touched:
                self._put(replace(self._held.note, touched=self._held.note.touched | touched))

    def _put(self, note: Note) -> None:
        before = self._held
        self._held = _place(self._directory / uuid.uuid4().hex if before is None else before.file, note)
        if before is not None:
            before.let_go()

    def _newest(self) -> int | None:
        """None when that cannot be told now."""
        with suppress(CknixError):
            return database.newest(self._store)
        return None

    def _wake(self) -> None:
        if not self._closed and (self._syncing is None or self._syncing.done()):
            self._syncing = asyncio.create_task(self._sync(), name="sync the store")

    async def _sync(self) -> None:
        while self._abandoned or any(operation.ended for operation in self._operations):
            try:
                await asyncio.sleep(self._delay)
                ended = [operation for operation in self._operations if operation.ended]
                await in_thread(self._settle, ended)
            except asyncio.CancelledError:
                # The process ends: the notes are for the next one.
                self._let_go()
                raise
            except (CknixError, OSError) as error:
                _log.warning("what was fetched or built last is not synced, and stays noted: %s", error)
                return

    def _settle(self, ended: Sequence[_Operation]) -> None:
        """Sync what *ended* operations have done, and note only what is left to note."""
        newest, abandoned = self._newest(), list(self._abandoned)
        noted = None if self._held is None else self._held.note
        if abandoned or (noted is not None and (newest != noted.newest or _touched(ended))):
            self._sync_disks()
        # Operations are begun and ended meanwhile; what was registered before the sync began is on the disk.
        with self._lock:
            for held in abandoned:
                if held in self._abandoned:
                    held.drop()
                    self._abandoned.remove(held)
            for operation in ended:
                self._operations.remove(operation)
            if self._held is None:
                return
            if not self._operations:
                self._held.drop()
                self._held = None
            elif newest is not None:
                left = Note(self._held.note.boot, newest, _touched(self._operations))
                if left != self._held.note:
                    self._put(left)

    def _sync_disks(self) -> None:
        sync_file_systems(filter(Path.is_dir, (self._store.physical, self._store.state)))

    async def _check(self) -> None:
        while (found := await asyncio.to_thread(self._look)) is None:  # noqa: ASYNC110 - it is another process's event
            await asyncio.sleep(_POLL_SECONDS)
        cut, self._abandoned = found
        if cut:
            stop = threading.Event()
            await finish(asyncio.to_thread(self._mend, cut, stop), on_cancel=stop.set)
        self._survived = True
        if self._abandoned:
            self._wake()

    def _look(self) -> tuple[list[_Held], list[_Held]] | None:
        """The notes whose processes have ended, of other boots and of this one; None while somebody acts on the first.

        Raises StoreUnreadable.
        """
        cut: list[_Held] = []
        abandoned: list[_Held] = []
        busy = False
        with told(self._store):
            boot = self._boot_id()
            for file in _files(self._directory):
                if (held := _open(file)) is None:
                    continue
                of_this_boot, is_beside = held.note.boot == boot, file.name.startswith(".")
                if not _is_locked(held.descriptor, file):
                    held.let_go()
                    busy = busy or (not of_this_boot and not is_beside)
                elif is_beside:
                    held.drop()
                else:
                    (abandoned if of_this_boot else cut).append(held)
        if not busy:
            return cut, abandoned
        for held in (*cut, *abandoned):
            held.let_go()
        return None

    def _mend(self, cut: list[_Held], stop: threading.Event) -> None:
        """Act on the notes *cut*, which are gone or at least let go of afterwards."""
        newest = min(held.note.newest for held in cut)
        touched = frozenset[str]().union(*(held.note.touched for held in cut))
        certain = all(held.note.boot for held in cut)

        def passed(number: int) -> None:
            # For a process to come, should this one not get to the end; a full disk is no reason not to.
            with suppress(OSError):
                for index, held in enumerate(cut):
                    cut[index] = _place(held.file, Note(held.note.boot, number))
                    held.let_go()

        try:
            with told(self._store):
                if recover(self._store):
                    newest = 0
                    passed(newest)
                powercut.mend(self._store, newest, touched, certain=certain, passed=passed, stop=stop)
                self._after_cut()
                self._sync_disks()
                while cut:
                    cut[-1].drop()
                    cut.pop()
        finally:
            for held in cut:
                held.let_go()


def _touched(operations: Iterable[_Operation]) -> frozenset[str]:
    return frozenset[str]().union(*(operation.touched for operation in list(operations)))


def _place(file: Path, note: Note) -> _Held:
    """Write *note* to *file*, locked and durable.  Raises OSError."""
    make_directory(file.parent)
    beside = file.with_name(f".{file.name}")
    while True:
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        if _is_locked(descriptor, beside):
            break
        os.close(descriptor)  # somebody has just taken it for a leftover
    try:
        with open(descriptor, "wb", closefd=False) as stream:
            stream.write(note.written())
        os.fsync(descriptor)
        beside.replace(file)
        sync_directory(file.parent)
    except BaseException:
        os.close(descriptor)
        beside.unlink(missing_ok=True)
        raise
    return _Held(file, descriptor, note)


def _open(file: Path) -> _Held | None:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb", closefd=False) as stream:
        return _Held(file, descriptor, Note.parse(stream.read()))


def _is_locked(descriptor: int, file: Path) -> bool:
    """Take the lock; False when somebody else has it, and when *file* is another one by now, or none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except (BlockingIOError, FileNotFoundError):
        return False


def _files(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []


def _tell(check: asyncio.Task[None]) -> None:
    if not check.cancelled() and (error := check.exception()) is not None:
        _log.warning("what a power cut may have damaged could not be looked for: %s", error)
