"""Nix commands: evaluate an expression, build a derivation, fetch a path.

Plain commands and their exit codes, since they are what stays the same from Nix 2.8 to 2.34.
"""

from __future__ import annotations

import asyncio
import grp
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from cknix_csi.api.errors import (
    BuildFailed,
    BuildKilled,
    CacheUnavailable,
    CknixError,
    DeadlineExceeded,
    EvaluationFailed,
    NotFound,
    OutOfSpace,
    SourceUnavailable,
)
from cknix_csi.api.expression import FLAKE_REF_PATTERN, Data
from cknix_csi.api.progress import Progress, humanise
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import STORE_DIR, InvalidStorePath, StorePath
from cknix_csi.boot import boot_id
from cknix_csi.nix import database, localflakes, process
from cknix_csi.nix.confine import confined, contained
from cknix_csi.nix.database import DatabaseUnreadable
from cknix_csi.nix.fetcherrors import (
    PathCollected,
    busy_database,
    fetch_error,
    killed_builder,
    met_collector,
    unreachable,
)
from cknix_csi.nix.log import Log
from cknix_csi.nix.readable import readable
from cknix_csi.nix.recovery import missing
from cknix_csi.nix.store import Store
from cknix_csi.nix.substituters import CacheEndpoint
from cknix_csi.nix.unsynced import Unsynced

OnProgress = Callable[[Progress], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NixOptions:
    """How Nix is run.  Times are seconds."""

    home: Path
    """Nix's own caches and temporary files; private to this program."""
    search_path: Mapping[str, Path] = field(default_factory=dict)
    """Added to ``NIX_PATH``: what ``<name>`` means in an expression."""
    restrict_eval: bool = True
    """Evaluation may read the search path, the store and ``allowed-uris``, but not the rest of this machine's files;
    what is *hidden* is out of reach for flakes as well."""
    hidden: tuple[Path, ...] = (Path("/var/run/secrets"), Path("/run/secrets"))
    """Directories that nothing evaluated may see: the service account's token."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Options of Nix for evaluation and builds, over those of nix.conf."""
    eval_timeout: float = 300.0
    build_timeout: float = 3600.0
    fetch_timeout: float = 1800.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an expression came to: the store path, and what must be built for it."""

    result: StorePath
    derivations: tuple[str, ...] = ()
    """For ``nix-store --realise``: ``/nix/store/….drv!out,lib``, or ``/nix/store/….drv`` for all outputs; none when the
    path is there already or must be substituted."""


class Nix:
    """The Nix of this machine, working on one store; to be closed in the end."""

    def __init__(self, store: Store, options: NixOptions, *, boot_id: Callable[[], str] = boot_id) -> None:
        self.store = store
        self.unsynced = Unsynced(store, boot_id=boot_id, after_cut=self._forget_downloads)
        self._options = options

    async def close(self) -> None:
        """End what goes on in the background."""
        await self.unsynced.close()

    async def evaluate(self, data: Data, system: str) -> Evaluation:
        """Evaluate *data* for *system*; derivations are instantiated in the store, nothing is built for them.

        Raises :class:`EvaluationFailed` with Nix's own words, or :class:`DeadlineExceeded`.
        """
        if data.kind == "storePath":
            return Evaluation(StorePath.parse(data.text))
        await self.unsynced.recovered()
        if data.kind == "flakeRef":
            _require_flake_ref(data.text)
            arguments = ["--no-write-lock-file"]
            if self._options.restrict_eval:
                # An input that the lock file does not pin could name any file of this machine.
                arguments = ["--no-update-lock-file"]
                if reason := localflakes.refused(data.text, [self._options.home, self.store.state.parents[2]]):
                    raise EvaluationFailed(f"flakeRef {data.text!r} is refused: {reason}")
            # Nothing that follows "--" can be an option.
            description = await self._describe(arguments, ["--", data.text], system, {})
        else:
            scratch = await asyncio.to_thread(self._scratch)
            with tempfile.TemporaryDirectory(prefix="cknix-eval-", dir=scratch) as temporary:
                # A path such as ./. becomes a store path with the directory's name, which must always be the same.
                directory = Path(temporary) / "expr"
                file = directory / "expr.nix"
                await asyncio.to_thread(_write_expression, file, data.text)
                arguments = ["--file", str(file), "--impure", "-I", f"cknix-expr={directory}"]
                for name, path in self._options.search_path.items():
                    arguments += ["-I", f"{name}={path}"]
                if self._options.restrict_eval:
                    # getFlake and fetchTree copy files of this machine to the store before they are refused.
                    arguments += ["--option", "restrict-eval", "true", "--option", "experimental-features", ""]
                    renames = {str(file): "expr", str(directory): "expr"}
                    description = await self._describe(arguments, [], system, renames)
                else:
                    # Relative paths are those of the directory this program was started in, as to `nix-build --expr`.
                    arguments[1] = "-"
                    description = await self._describe(arguments, [], system, {"«stdin»": "expr"}, file)
        return _evaluation(data, description)

    async def build(self, evaluation: Evaluation, *, progress: OnProgress) -> None:
        """Make the result of *evaluation* valid, and make anew what its closure lacks on disk.

        Raises :class:`BuildFailed`, :class:`BuildKilled`, :class:`DeadlineExceeded`, :class:`OutOfSpace`.
        """
        await self.unsynced.recovered()
        targets = evaluation.derivations or (str(evaluation.result),)
        await self._realise("--realise", targets, evaluation, progress)
        if gone := await asyncio.to_thread(lambda: missing(self.store, evaluation.result)):
            # To Nix they are there, and so it has done nothing.
            _log.warning("%d registered paths of %s are not on disk", len(gone), evaluation.result)
            await self._realise(_REPAIR, [str(path) for path in gone], evaluation, progress)

    async def _realise(
        self, operation: str, targets: Sequence[str], evaluation: Evaluation, progress: OnProgress
    ) -> None:
        log = Log(progress)
        timeout = self._options.build_timeout
        try:
            command = self._on_this_store(
                ["nix-store", operation, *targets, *_LOGGING, *_as_arguments(self._options.settings)]
            )
            async with self.unsynced.noted(targets if operation == _REPAIR else ()):
                completed = await self._run(contained(command), log, timeout)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the build of {evaluation.result} did not end within {humanise(timeout)} and was stopped; "
                f"raise CKNIX_BUILD_TIMEOUT if it needs longer\n{self._readable(log.failure)}".rstrip()
            ) from None
        if completed.code == 0 and await asyncio.to_thread(database.is_valid, self.store, evaluation.result):
            return
        _raise_if_full(log.error, self.store)
        if met_collector(log.errors):
            raise PathCollected(evaluation.result)
        if not evaluation.derivations:
            if why := unreachable(log.errors, log.warnings):
                raise CacheUnavailable(f"{evaluation.result} is not in the store, and a substituter is away: {why}")
            raise BuildFailed(f"{evaluation.result} is not in the store and no substituter has it{_after(log.error)}")
        said = self._readable(log.failure) or f"nix-store {operation} ended with code {completed.code}"
        raise (BuildKilled if killed_builder(log.errors) else BuildFailed)(said)

    async def substitute(self, path: StorePath, caches: Sequence[CacheEndpoint], *, progress: OnProgress) -> None:
        """Fetch the closure of *path* from *caches* (and those of nix.conf), believing only their signatures.

        Raises :class:`CacheUnavailable`, :class:`PathUntrusted`, :class:`NotFound`, :class:`OutOfSpace` or
        :class:`DeadlineExceeded`; and :class:`PathCollected` when a garbage collection came in between.
        """
        await self._fetch("--realise", [path], caches, progress)
        if not await asyncio.to_thread(database.is_valid, self.store, path):
            # A collector that read the roots before the path was valid has skipped the one that waits for it.
            raise PathCollected(path)

    async def repair(
        self, paths: Sequence[StorePath], caches: Sequence[CacheEndpoint], *, progress: OnProgress
    ) -> None:
        """Fetch the valid *paths* again, these alone, over whatever is there: only for those that nothing uses.

        Raises what :meth:`substitute` raises.
        """
        # `--realise --repair` leaves out what the path refers to, and `--delete` refuses what others refer to.
        await self._fetch(_REPAIR, paths, caches, progress)

    async def _fetch(
        self, operation: str, paths: Sequence[StorePath], caches: Sequence[CacheEndpoint], progress: OnProgress
    ) -> None:
        """Let ``nix-store`` do *operation* on *paths*, with *caches* and those of nix.conf."""
        log = Log(progress)
        urls = [cache.url for cache in caches]
        timeout = self._options.fetch_timeout
        options = {
            "extra-substituters": " ".join(urls),
            "extra-trusted-public-keys": " ".join(cache.public_key for cache in caches),
            "require-sigs": "true",
            # A path asked for too early must be found as soon as it is published.
            "narinfo-cache-negative-ttl": "0",
            # What a cache had a minute ago it may have lost with its node.
            "narinfo-cache-positive-ttl": "0",
            "connect-timeout": "5",
            "stalled-download-timeout": "30",
            "download-attempts": "2",
            "max-jobs": "0",
            # Nothing is built with no jobs; but without it one cache that fails, fails what another one has.
            "fallback": "true",
        }
        names = [str(path) for path in paths]
        try:
            command = self._on_this_store(["nix-store", operation, *names, *_LOGGING, *_as_arguments(options)])
            async with self.unsynced.noted(names if operation == _REPAIR else ()):
                completed = await self._run(command, log, timeout)
        except TimeoutError:
            raise DeadlineExceeded(
                f"fetching {paths[0]} from {', '.join(urls) or 'the substituters of nix.conf'} did not end within "
                f"{humanise(timeout)} and was stopped; "
                "raise CKNIX_FETCH_TIMEOUT if it needs longer"
            ) from None
        if completed.code == 0:
            return
        _raise_if_full(log.error, self.store)
        blamed = next((path for path in paths if str(path) in log.error), paths[0])
        error = fetch_error(blamed, urls, log.errors, log.warnings)
        if isinstance(error, NotFound):
            # Its words are for the reader of a pod's events, who needs none of Nix's; the administrator may.
            said = " | ".join(" ".join(message.split()) for message in (*log.warnings, *log.errors))
            _log.warning("Nix could not fetch %s: %s", blamed, _shortened(said, _MAX_LOGGED))
        raise error

    async def _describe(
        self,
        arguments: list[str],
        installables: list[str],
        system: str,
        renames: Mapping[str, str],
        standard_input: Path | None = None,
    ) -> dict[str, Any]:
        log = Log()
        timeout = self._options.eval_timeout
        apply = resources.files("cknix_csi.nix").joinpath("describe.nix").read_text()
        options = {
            "system": system,
            # Mutable references are looked up anew: evaluation happens only when a change or a refresh is due.
            "tarball-ttl": "0",
            # A flake's own nixConfig could name another sandbox or a hook.
            "accept-flake-config": "false",
            **self._options.settings,
        }
        command = ["nix", "eval", "--json", "--apply", apply, "--log-format", "internal-json", *arguments]
        features = "nix-command" if self._options.restrict_eval and not installables else "nix-command flakes"
        command = [*self._on_this_store(command, features), *_as_arguments(options), *installables]
        if standard_input is not None:
            command = ["sh", "-c", 'exec "$@" <"$0"', str(standard_input), *command]
        directory = None
        if self._options.restrict_eval:
            command = confined(command, self._options.hidden)
            # What a relative flake reference means: nothing.
            directory = self._options.home / "empty"
        try:
            async with self.unsynced.noted():
                completed = await self._run(command, log, timeout, directory)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the evaluation did not end within {humanise(timeout)} and was stopped; "
                "raise CKNIX_EVAL_TIMEOUT if it needs longer"
            ) from None
        except process.OutputTooLarge as error:
            raise EvaluationFailed(f"the evaluation wrote {error}") from None
        if completed.code != 0:
            message = readable(self._readable(log.failure), renames)
            if self._options.restrict_eval:
                # Whoever knew the path could mount it, whatever of this machine was copied there.
                message = _SOURCE.sub(f"{STORE_DIR}/…-source", message)
            message = message or f"nix eval ended with code {completed.code}"
            _raise_if_full(message, self.store)
            # An entry of the search path that cannot be downloaded is left out with a warning.
            warnings = log.warnings if "was not found in the Nix search path" in message else []
            if why := unreachable(log.errors, warnings):
                raise SourceUnavailable(f"what the evaluation reads cannot be downloaded now: {why}")
            raise EvaluationFailed(message)
        description = json.loads(completed.stdout)
        assert isinstance(description, dict)
        return description

    def _on_this_store(self, command: list[str], features: str = "nix-command flakes") -> list[str]:
        argv = [*command, "--store", self.store.uri, "--extra-experimental-features", features]
        return argv if has_build_users() else [*argv, "--option", "build-users-group", ""]

    async def _run(
        self, argv: list[str], log: Log, deadline: float, directory: Path | None = None
    ) -> process.Completed:
        """Run *argv* in *directory*, which is made, or where this program was started.

        When the database was busy it is run again.  Raises :class:`DatabaseUnreadable` when it still is.
        """
        clock = asyncio.get_running_loop().time
        ends = clock() + deadline
        try:
            await asyncio.to_thread(self._scratch)
            await asyncio.to_thread(self.store.prepare)
            if directory is not None:
                await asyncio.to_thread(directory.mkdir, mode=0o700, parents=True, exist_ok=True)
            for pause in (*_BUSY_PAUSES, None):
                completed = await process.run(
                    argv, env=self._environment(), deadline=ends - clock(), on_line=log.feed, cwd=directory
                )
                if completed.code == 0 or not (said := busy_database(log.errors)):
                    return completed
                if pause is not None:
                    log.forget_messages()
                    await asyncio.sleep(pause)
            raise DatabaseUnreadable(f"{said}, again and again; it is tried again")
        except FileNotFoundError as error:
            raise CknixError(f"{error.filename} was not found; is Nix on PATH?", Situation.NIX_NOT_FOUND) from None

    def _forget_downloads(self) -> None:
        """Nix's caches of repositories and archives are not synced either, and it believes what it finds there."""
        shutil.rmtree(self._options.home / "cache", ignore_errors=True)

    def _scratch(self) -> Path:
        """Where Nix and we keep temporary files: what others build is not for everybody in ``/tmp``."""
        self._options.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch = self._options.home / "tmp"
        scratch.mkdir(mode=0o700, exist_ok=True)
        return scratch

    def _readable(self, message: str) -> str:
        return readable(message, {str(self.store.physical): STORE_DIR})

    def _environment(self) -> dict[str, str]:
        inherited = ("PATH", "NIX_PATH", "NIX_CONF_DIR", "NIX_SSL_CERT_FILE", "SSL_CERT_FILE", "LANG")
        proxies = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")
        names = (*inherited, *proxies, *(name.upper() for name in proxies))
        environment = {name: os.environ[name] for name in names if name in os.environ}
        return {
            **environment,
            "HOME": str(self._options.home),
            "TMPDIR": str(self._options.home / "tmp"),
            "XDG_CACHE_HOME": str(self._options.home / "cache"),
            "XDG_CONFIG_HOME": str(self._options.home / "config"),
            "XDG_DATA_HOME": str(self._options.home / "data"),
            "XDG_STATE_HOME": str(self._options.home / "state"),
        }


def installed() -> bool:
    """True when the Nix commands are on PATH."""
    return shutil.which("nix") is not None and shutil.which("nix-store") is not None


_MAX_FULL_CHARACTERS = 240
_MAX_LOGGED = 2000
# Bytes; with less than this SQLite cannot even map its -shm file.
_LITTLE = 64 * 1024
_SOURCE = re.compile(rf"{STORE_DIR}/[0-9a-z]{{32}}-source")
_REPAIR = "--repair-path"
# Nix waits for who holds its database, but not where SQLite says "busy" without having waited, as it does to some of
# those who open it while the last of the others closes it.
_BUSY_PAUSES = (0.1, 0.2, 0.5, 1.0)
_LOGGING = ("--log-format", "internal-json", "-v")


def _as_arguments(options: Mapping[str, str]) -> list[str]:
    return [word for name, value in options.items() for word in ("--option", name, value)]


@cache
def has_build_users() -> bool:
    """Root builds as the members of ``nixbld`` where they exist; Nix refuses to build when the group is missing."""
    try:
        return bool(grp.getgrnam("nixbld").gr_mem)
    except KeyError:
        return False


def _require_flake_ref(text: str) -> None:
    """What Nix would take for something else than a flake, or read only half of.  Raises :class:`EvaluationFailed`."""
    if not re.fullmatch(FLAKE_REF_PATTERN, text):
        raise EvaluationFailed(f"flakeRef {text!r} is not a flake reference: it may not hold spaces or begin with '-'")
    if "^" in text:
        reference, _, outputs = text.partition("^")
        raise EvaluationFailed(
            f"flakeRef {text!r} selects outputs with '^', which is not supported; name one as an attribute, "
            f"for example {reference}.{outputs.partition(',')[0].strip('*') or 'out'}"
        )


def _write_expression(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)


def _shortened(text: str, limit: int = 500) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"


def _evaluation(data: Data, description: Mapping[str, Any]) -> Evaluation:
    kind = description["kind"]
    wanted = "it must evaluate to a derivation or a store path"
    if kind == "function":
        missing = _shortened(", ".join(description["missing"]))
        needs = f" that needs the arguments {missing}" if missing else ""
        raise EvaluationFailed(f"{data.kind} evaluates to a function{needs}; {wanted} (give the arguments defaults)")
    if kind == "set":
        names = _shortened(", ".join(description["names"]))
        raise EvaluationFailed(
            f"{data.kind} evaluates to a set with the attributes {names or '(none)'}; {wanted}, so select one of them"
        )
    if kind not in {"derivation", "path"}:
        raise EvaluationFailed(f"{data.kind} evaluates to a value of type {kind}; {wanted}")
    try:
        result = StorePath.parse(description["path"])
    except InvalidStorePath as error:
        raise EvaluationFailed(f"{data.kind} evaluates to text that is no store path: {error.message}") from None
    if result.is_derivation:
        raise EvaluationFailed(f"{data.kind} evaluates to the file {result}; {wanted}, so leave out .drvPath")
    return Evaluation(
        result,
        tuple(
            "!".join(filter(None, (entry["path"], ",".join(entry["outputs"])))) for entry in description["derivations"]
        ),
    )


def _raise_if_full(text: str, store: Store) -> None:
    words = ["No space left on device", "database or disk is full"]
    if _nothing_free(store.state):
        # SQLite's word for any failed write.
        words.append("disk I/O error")
    for line in text.splitlines():
        if any(word in line for word in words):
            # The end names the file; before it may stand a whole SQL statement.
            said = line if len(line) <= _MAX_FULL_CHARACTERS else f"…{line[-_MAX_FULL_CHARACTERS:]}"
            raise OutOfSpace(
                f"a file system that Nix writes to is full ({said}); the store is in {store.physical}, free space or "
                "inodes there"
            )


def _nothing_free(directory: Path) -> bool:
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    state = os.statvfs(directory)
    return state.f_bavail * state.f_frsize < _LITTLE


def _after(text: str) -> str:
    return f": {text}" if text else ""
