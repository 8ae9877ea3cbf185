"""What this kernel and these file systems can do, found out by doing it once with a store of two paths.

A version number says little: distributions port features back and switch them off, and what is under the data root
counts as much as the kernel.  So each property that a presentation relies on is tried with the code that will rely on
it, and what does not hold is a finding in words, not an error.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cknix_csi.api.closure import Closure, PathInfo
from cknix_csi.api.errors import CknixError
from cknix_csi.api.limits import MINIMUM_BYTES, Limit
from cknix_csi.api.storepath import StorePath
from cknix_csi.volumes import loop, syscalls
from cknix_csi.volumes.failures import DataRootTaken, explained
from cknix_csi.volumes.locks import ProcessLock
from cknix_csi.volumes.mounts import Mounts, Upper
from cknix_csi.volumes.sized import SPACE, KernelSizedStorage
from cknix_csi.volumes.trash import Trash, delete_tree
from cknix_csi.volumes.view import Views

log = logging.getLogger(__name__)

_SOURCE = "cknix-probe"
_SIZE = 256 << 10
"""Bytes of the file that is to keep its blocks in the store; far above what any file system keeps in an inode."""
_MAX_LOOKS = 1000
"""Directories of the store that are looked at for a regular file."""
_FIRST_ID = 100_000
"""What the probe's user namespace maps 0 to; any would do."""
_NAMESPACE_DEADLINE = 10.0
"""Seconds for a child process to be in a user namespace of its own."""
_NAMESPACE_CODE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x10000000) != 0:
    sys.exit(os.strerror(ctypes.get_errno()))
os.write(1, b"ready")
os.read(0, 1)
"""

_DIRECTORY = StorePath("0" * 32, "directory")
_FILE = StorePath("1" * 32, "file")
_OUTSIDE = StorePath("2" * 32, "outside")


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether a property holds; *detail* says what was seen, and in full when it does not."""

    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One finding per property."""

    kernel: str
    """``uname -r``."""
    listing: Finding
    directory_content: Finding
    stub_content: Finding
    read_only: Finding
    write_apart: Finding
    chmod_apart: Finding
    store_layer: Finding
    overlay_read_only: Finding
    overlay_writable: Finding
    layer_options: Finding
    detached_copy: Finding
    hardlink: Finding
    reflink: Finding
    loop: Finding
    idmap: Finding
    idmap_sized: Finding
    idmapped_overlay: Finding


TITLES = {
    "listing": "redirect view lists exactly the closure",
    "directory_content": "redirect view shows a directory's files",
    "stub_content": "redirect view shows a path that is a file",
    "read_only": "read-only view refuses writes with EROFS",
    "write_apart": "writes to a writable view stay out of the store",
    "chmod_apart": "chmod in a writable view stays out, and copies no data",
    "store_layer": "the node's store can be a layer of an overlay",
    "overlay_read_only": "overlay without redirects, read-only",
    "overlay_writable": "overlay without redirects, writable",
    "layer_options": "mount API: layers one by one (Linux 6.7)",
    "detached_copy": "mount API: copy of a detached mount (Linux 6.15)",
    "hardlink": "hard links from the store to the data root",
    "reflink": "reflinks from the store to the data root",
    "loop": "loop devices, for size limits",
    "idmap": "id-mapped mounts of the data root",
    "idmap_sized": "id-mapped mounts of a place of limited size",
    "idmapped_overlay": "id-mapped mounts of an overlay",
}
"""The properties in words, by the names of their fields."""


def table(result: ProbeResult) -> str:
    """*result* for people: a line per property."""
    width = max(map(len, TITLES.values()))
    lines = [f"{'kernel':{width}}       {result.kernel}"]
    for name, title in TITLES.items():
        finding: Finding = getattr(result, name)
        lines.append(f"{title:{width}}  {'yes' if finding.ok else 'no ':3}  {finding.detail}".rstrip())
    return "\n".join(lines) + "\n"


def probe(scratch: Path, store_dir: Path, mounts: Mounts) -> ProbeResult:
    """Try every property, below *scratch* (made when missing, and the probe's alone), for the store in *store_dir*.

    A store that does not exist yet, as on a new node, is taken for one that is empty and on the mount of *scratch*.
    Call it in a worker thread, and wait for its end: it takes some 100 ms.  However it ends, it leaves no mount and no
    file, nor what a killed one left.  Raises DataRootTaken while another probe works there, OutOfSpace, VolumeFailed
    for a *scratch* that cannot be written to; what else fails is a finding.
    """
    top = os.path.realpath(scratch)
    with explained(f"probe in {top}"):
        os.makedirs(top, 0o700, exist_ok=True)
        lock = ProcessLock(top)
        if not lock.take():
            raise DataRootTaken(f"another probe works in {top}; try again when it has ended")
        try:
            _clean(top, mounts)
            try:
                return _Probe(top, _existing(store_dir, f"{top}/new-store"), mounts).run()
            finally:
                _clean(top, mounts)
        finally:
            lock.release()


class _Unlike(Exception):
    """What was seen is not what should be there."""


_Check = Callable[[], str]
_SIZED = "sized"
_MOUNT_POINTS = ("view", "view-pod", "writable", "writable-pod", "layer", "plain", "plain-writable")


def _clean(top: str, mounts: Mounts) -> None:
    """Unmount and remove everything in *top*; what cannot be is logged and left to the next probe."""
    try:
        for name in reversed(_MOUNT_POINTS):
            if mounts.mounted(f"{top}/{name}"):
                mounts.unmount(f"{top}/{name}")
        if os.path.lexists(f"{top}/{_SIZED}"):
            KernelSizedStorage(mounts).release(f"{top}/{_SIZED}")
        for name in os.listdir(top):
            delete_tree(f"{top}/{name}")
    except (OSError, CknixError) as error:
        log.warning("cannot clean up after the probe in %s: %s", top, error)


def _found(check: _Check) -> Finding:
    try:
        return Finding(True, check())
    except OSError as error:
        about = f" ({os.fsdecode(error.filename)})" if error.filename is not None else ""
        return Finding(False, f"{error.strerror or error}{about}")
    except (CknixError, _Unlike) as error:
        return Finding(False, str(error))


class _Probe:
    """One probe in the empty directory *top*."""

    def __init__(self, top: str, store_dir: str, mounts: Mounts) -> None:
        self._top = top
        self._store_dir = store_dir
        self._mounts = mounts
        self._store = f"{top}/store"
        self._content = os.urandom(_SIZE)

    def run(self) -> ProbeResult:
        self._make_store()
        view = self._when(self._view, "view-pod")
        plain = self._when(self._plain, "plain")
        plain_writable = self._when(self._plain_writable, "plain-writable")
        writable = self._when(self._writable_view, "writable-pod")
        return ProbeResult(
            kernel=os.uname().release,
            listing=view(self._listing),
            directory_content=view(self._directory_content),
            stub_content=view(self._stub_content),
            read_only=view(self._read_only),
            store_layer=_found(self._store_layer),
            overlay_read_only=plain(self._plain_shows),
            overlay_writable=plain_writable(self._plain_apart),
            layer_options=_found(self._layer_options),
            detached_copy=_found(self._detached_copy),
            hardlink=_found(self._hardlink),
            reflink=_found(self._reflink),
            loop=_found(self._loop),
            idmap=_found(functools.partial(self._idmap, self._store)),
            idmap_sized=_found(self._idmap_sized),
            idmapped_overlay=plain(self._idmap),
            # Last, since a write that does reach the store would spoil the others; chmod before what copies the file.
            chmod_apart=writable(self._chmod_apart),
            write_apart=writable(self._write_apart),
        )

    def _when(self, prepare: Callable[[str], None], name: str) -> Callable[[Callable[[str], str]], Finding]:
        """What runs a check in the directory *name*, if it could be prepared."""
        target = f"{self._top}/{name}"

        def prepared() -> str:
            os.mkdir(target)
            prepare(target)
            return ""

        ready = _found(prepared)
        return lambda check: _found(lambda: check(target)) if ready.ok else ready

    # Redirect views

    def _make_store(self) -> None:
        os.mkdir(self._store, 0o755)
        for path in (_DIRECTORY, _OUTSIDE):
            os.mkdir(f"{self._store}/{path.basename}", 0o755)
        for name in (f"{_DIRECTORY.basename}/large", f"{_DIRECTORY.basename}/written", _FILE.basename):
            with open(f"{self._store}/{name}", "xb") as file:
                os.fchmod(file.fileno(), 0o444)
                file.write(self._content)

    def _make_view(self, name: str) -> tuple[str, str]:
        """The layers of a view, made as all views are."""
        directory = f"{self._top}/{name}-layers"
        os.mkdir(directory)
        paths = tuple(PathInfo(path, f"sha256:{'0' * 64}", _SIZE, ()) for path in (_DIRECTORY, _FILE))
        views = Views(directory, Path(self._store), Trash(f"{directory}/trash"))
        building = f"{directory}/{_DIRECTORY.basename}"
        views.begin(building, Closure(_DIRECTORY, paths))
        return views.layers(_DIRECTORY.basename)

    def _view(self, target: str) -> None:
        hidden = f"{self._top}/view"
        os.mkdir(hidden)
        self._mounts.overlay(hidden, source=_SOURCE, lower=self._make_view("view"), upper=None)
        self._mounts.clone(f"{hidden}/nix", target, writable=False)

    def _writable_view(self, target: str) -> None:
        hidden = f"{self._top}/writable"
        os.mkdir(hidden)
        lower, upper = self._make_view("writable"), self._upper("writable")
        self._mounts.overlay(hidden, source=_SOURCE, lower=lower, upper=upper)
        self._mounts.clone(f"{hidden}/nix", target, writable=True)

    def _upper(self, name: str) -> Upper:
        layers = Upper(f"{self._top}/{name}-upper", f"{self._top}/{name}-work")
        for directory in (layers.upper, layers.work):
            os.mkdir(directory)
        return layers

    def _listing(self, shown: str) -> str:
        _require_listing(shown, {"store", "var"})
        _require_listing(f"{shown}/store", {_DIRECTORY.basename, _FILE.basename, ".links"})
        _require_listing(f"{shown}/store/{_DIRECTORY.basename}", {"large", "written"})
        if os.path.lexists(f"{shown}/store/{_OUTSIDE.basename}"):
            raise _Unlike("a store path that is not in the closure can be reached by its name")
        return ""

    def _directory_content(self, shown: str) -> str:
        return self._require_content(f"{shown}/store/{_DIRECTORY.basename}/large")

    def _stub_content(self, shown: str) -> str:
        return self._require_content(f"{shown}/store/{_FILE.basename}")

    def _require_content(self, path: str) -> str:
        with open(path, "rb") as file:
            if (found := file.read()) != self._content:
                raise _Unlike(f"a file shows other content than in the store ({len(found)} bytes, not {_SIZE})")
        return ""

    def _read_only(self, shown: str) -> str:
        store, directory = f"{shown}/store", f"{shown}/store/{_DIRECTORY.basename}"
        _require_refused(lambda: os.mkdir(f"{store}/new"), "a new store path")
        _require_refused(lambda: os.close(os.open(f"{directory}/large", os.O_WRONLY)), "a write to a file")
        _require_refused(lambda: os.chmod(f"{store}/{_FILE.basename}", 0o644), "a change of mode")
        _require_refused(lambda: os.unlink(f"{directory}/large"), "a removal")
        return ""

    def _chmod_apart(self, shown: str) -> str:
        inside = f"store/{_DIRECTORY.basename}/large"
        before = _metadata_of(self._store)
        os.chmod(f"{shown}/{inside}", 0o600)
        if stat.S_IMODE(os.stat(f"{shown}/{inside}").st_mode) != 0o600:
            raise _Unlike("a change of mode has no effect")
        self._require_unchanged(before)
        self._require_content(f"{shown}/{inside}")
        written = os.stat(f"{self._top}/writable-upper/nix/{inside}").st_blocks * 512
        if written >= _SIZE:
            raise _Unlike(f"a change of mode copies the file ({written} bytes of {_SIZE})")
        return f"{written} bytes for a file of {_SIZE}"

    def _write_apart(self, shown: str) -> str:
        store, directory = f"{shown}/store", f"{shown}/store/{_DIRECTORY.basename}"
        before = _metadata_of(self._store)
        for path in (f"{directory}/written", f"{store}/{_FILE.basename}", f"{directory}/new", f"{store}/new"):
            _append(path)
        os.unlink(f"{directory}/large")
        _require_listing(store, {_DIRECTORY.basename, _FILE.basename, ".links", "new"})
        _require_listing(directory, {"written", "new"})
        self._require_unchanged(before)
        return ""

    def _require_unchanged(self, before: list[tuple[str, int, int, int]]) -> None:
        if (after := _metadata_of(self._store)) != before:
            changed = sorted(name for name, *_ in {*before} ^ {*after})
            raise _Unlike(f"a write reached the store: {changed[0]}")
        for name in (f"{_DIRECTORY.basename}/large", f"{_DIRECTORY.basename}/written", _FILE.basename):
            self._require_content(f"{self._store}/{name}")

    def _store_layer(self) -> str:
        target, empty = f"{self._top}/layer", f"{self._top}/layer-empty"
        for directory in (target, empty):
            os.mkdir(directory)
        self._mounts.overlay(target, source=_SOURCE, lower=(empty, self._store_dir), upper=None)
        with os.scandir(self._store_dir) as entries:
            name = next((entry.name for entry in entries), None)
        if name is None:
            return "the store is empty"
        original, shown = os.lstat(f"{self._store_dir}/{name}"), os.lstat(f"{target}/{name}")
        if (original.st_mode, original.st_mtime_ns) != (shown.st_mode, shown.st_mtime_ns):
            raise _Unlike(f"an overlay shows {name} with another mode or time than the store")
        return ""

    # Overlays without redirects

    def _plain(self, target: str) -> None:
        empty = f"{self._top}/plain-empty"
        os.mkdir(empty)
        self._mounts.overlay(target, source=_SOURCE, lower=(self._store, empty), upper=None)

    def _plain_writable(self, target: str) -> None:
        empty = f"{self._top}/plain-writable-empty"
        os.mkdir(empty)
        upper = self._upper("plain-writable")
        self._mounts.overlay(target, source=_SOURCE, lower=(self._store, empty), upper=upper)

    def _plain_shows(self, shown: str) -> str:
        _require_listing(shown, {path.basename for path in (_DIRECTORY, _FILE, _OUTSIDE)})
        self._require_content(f"{shown}/{_DIRECTORY.basename}/large")
        _require_refused(lambda: os.mkdir(f"{shown}/new"), "a new store path")
        return ""

    def _plain_apart(self, shown: str) -> str:
        before = _metadata_of(self._store)
        self._require_content(f"{shown}/{_FILE.basename}")
        os.chmod(f"{shown}/{_DIRECTORY.basename}/large", 0o600)
        for path in (f"{shown}/{_DIRECTORY.basename}/written", f"{shown}/{_FILE.basename}", f"{shown}/new"):
            _append(path)
        self._require_unchanged(before)
        return ""

    # What else may be there

    def _layer_options(self) -> str:
        with syscalls.owned(syscalls.fsopen("overlay")) as context:
            syscalls.fsconfig_string(context, "lowerdir+", self._store)
        return ""

    def _detached_copy(self) -> str:
        flags = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC
        with syscalls.owned(syscalls.open_tree(self._store, flags)) as tree:
            os.close(syscalls.open_tree_at(tree, _DIRECTORY.basename, flags))
        return ""

    def _hardlink(self) -> str:
        sample = _regular_file(self._store_dir)
        if sample is None:
            mounts = [syscalls.statx_mount_id(syscalls.AT_FDCWD, path) for path in (self._store_dir, self._top)]
            if mounts[0] != mounts[1]:
                raise _Unlike("the store and the data root are different mounts")
        link = f"{self._top}/hardlink"
        original = sample or f"{self._store}/{_FILE.basename}"
        os.link(original, link, follow_symlinks=False)
        if not os.path.samefile(original, link):
            raise _Unlike("a hard link is another file")
        return "" if sample else "the store is empty: tried beside it"

    def _reflink(self) -> str:
        sample = _regular_file(self._store_dir)
        with (
            open(sample or f"{self._store}/{_FILE.basename}", "rb") as original,
            open(f"{self._top}/reflink", "xb") as clone,
        ):
            syscalls.clone_file(original.fileno(), clone.fileno())
        return "" if sample else "the store is empty: tried beside it"

    def _loop(self) -> str:
        with open(f"{self._top}/disk", "x+b") as image:
            image.truncate(1 << 20)
            with loop.attached(image.fileno(), name=_SOURCE, scratch=self._top) as device:
                return device

    def _idmap_sized(self) -> str:
        at = f"{self._top}/{_SIZED}"
        os.mkdir(at)
        storage = KernelSizedStorage(self._mounts)
        try:
            storage.make(at, Limit(MINIMUM_BYTES))
            return self._idmap(f"{at}/{SPACE}")
        finally:
            storage.release(at)

    def _idmap(self, directory: str) -> str:
        owner = os.stat(directory).st_uid
        flags = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC
        with _user_namespace() as namespace, syscalls.owned(syscalls.open_tree(directory, flags)) as tree:
            syscalls.idmap_mount(tree, namespace)
            shown = os.stat(".", dir_fd=tree).st_uid
        if shown != owner + _FIRST_ID:
            raise _Unlike(f"what belongs to {owner} is shown as {shown}, not as {owner + _FIRST_ID}")
        return ""


@contextlib.contextmanager
def _user_namespace() -> Iterator[int]:
    """A descriptor of a user namespace that maps ids from 0 to those from _FIRST_ID.

    By a child process: no process with threads can enter one.
    """
    command = (sys.executable, "-I", "-S", "-c", _NAMESPACE_CODE)
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert child.stdout is not None
        assert child.stderr is not None
        if not select.select([child.stdout], [], [], _NAMESPACE_DEADLINE)[0]:
            raise _Unlike(f"no user namespace within {_NAMESPACE_DEADLINE:g} s")
        if os.read(child.stdout.fileno(), 16) != b"ready":
            said = os.fsdecode(os.read(child.stderr.fileno(), 1024)).strip()
            raise _Unlike(f"no user namespace: {said or 'the child process ended'}")
        for kind in ("uid", "gid"):
            with open(f"/proc/{child.pid}/{kind}_map", "w", encoding="ascii") as ids:
                ids.write(f"0 {_FIRST_ID} 65536")
        with syscalls.owned(os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)) as namespace:
            yield namespace
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def _existing(store_dir: Path, stand_in: str) -> str:
    """The path of the store, or of the empty directory *stand_in*, which is made."""
    if os.path.isdir(store_dir):
        return os.path.realpath(store_dir)
    os.mkdir(stand_in, 0o755)
    return stand_in


def _require_listing(directory: str, expected: set[str]) -> None:
    found = set(os.listdir(directory))
    if found == expected:
        return
    missing, extra = sorted(expected - found), sorted(found - expected)
    words = [f"{what} {', '.join(names[:3])}" for what, names in (("lacks", missing), ("also shows", extra)) if names]
    raise _Unlike(f"a directory {' and '.join(words)}")


def _require_refused(write: Callable[[], None], what: str) -> None:
    try:
        write()
    except OSError as error:
        if error.errno == errno.EROFS:
            return
        raise _Unlike(f"{what} is refused, but with: {error.strerror}") from error
    raise _Unlike(f"{what} is not refused")


def _append(path: str) -> None:
    with open(path, "ab") as file:
        file.write(b"written by a pod")


def _metadata_of(directory: str) -> list[tuple[str, int, int, int]]:
    """Path, mode, size and time of change of all below *directory*."""
    found = []
    for top, directories, files in os.walk(directory):
        for name in (*directories, *files):
            entry = os.lstat(f"{top}/{name}")
            found.append((os.path.relpath(f"{top}/{name}", directory), entry.st_mode, entry.st_size, entry.st_ctime_ns))
    return sorted(found)


def _regular_file(directory: str) -> str | None:
    """Some regular file of the store."""
    for looks, (top, _, files) in enumerate(os.walk(directory)):
        for name in files:
            if stat.S_ISREG(os.lstat(f"{top}/{name}").st_mode):
                return f"{top}/{name}"
        if looks == _MAX_LOOKS:
            break
    return None
