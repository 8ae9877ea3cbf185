"""Which presentation a volume gets, and why: a pure function of what the probe found and what is asked for.

Redirect where nothing speaks against it, else a farm.  A private copy only for who asks, since it costs the closure's
size; and what somebody asks for he gets, or is told why not: never something else in its place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cknix_csi.api.errors import CknixError
from cknix_csi.api.presentation import Presentation
from cknix_csi.api.situations import Situation
from cknix_csi.volumes.probe import TITLES, Finding, ProbeResult

_VIEW = ("listing", "directory_content", "stub_content", "read_only", "store_layer")
_WRITABLE_VIEW = (*_VIEW, "write_apart", "chmod_apart")
_UNASKED = (Presentation.REDIRECT, Presentation.HARDLINK)
"""What a volume can get that asks for nothing, best first."""
_NO_IDMAPPED_OVERLAY = "the pod has `hostUsers: false`, and the kernel does not id-map overlays"
_NEVER_WRITABLE = (
    "the pod has `hostUsers: false`, and it never gets a writable farm of hard links, since the files are the store's"
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a volume request says that decides its presentation."""

    writable: bool
    host_users: bool = True
    """False for a pod of a user namespace of its own (``hostUsers: false``): its runtime id-maps the volume's mount."""
    asked: Presentation | None = None
    size_limit: int | None = None
    """Bytes of a file system image to keep what is written in; None where none is needed."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How to make the volume."""

    presentation: Presentation
    overlay: bool
    """True: the volume is an overlay; False: it is the files' own file system, which can be id-mapped."""
    reason: str
    """One sentence without its end, for logs and Events."""


class PresentationUnavailable(CknixError):
    """This node has no way to make the volume as it is asked for."""

    situation = Situation.PRESENTATION_UNAVAILABLE


def choose(probe: ProbeResult, request: Wish) -> Choice:
    """The presentation for *request* on the node of *probe*.

    Raises PresentationUnavailable, of the situation PRESENTATION_IMPOSSIBLE for what no node could do, naming every
    property that stands in the way, and what helps.
    """
    if request.writable and request.size_limit is not None and (obstacle := _failing(probe, "loop")):
        raise PresentationUnavailable(f"a size limit cannot be kept on this node: {obstacle}; leave the limit out")
    wanted = _UNASKED if request.asked is None else (request.asked,)
    obstacles: dict[Presentation, str] = {}
    for presentation in wanted:
        if not (obstacle := _obstacle(presentation, probe, request)):
            reason = "asked for" if request.asked else "; ".join(obstacles.values()) or "the default"
            return Choice(presentation, _is_overlay(presentation, probe, request), reason)
        obstacles[presentation] = obstacle
    said = "; ".join(f"not `{presentation.value}`: {obstacle}" for presentation, obstacle in obstacles.items())
    raise PresentationUnavailable(
        f"a {'writable' if request.writable else 'read-only'} volume cannot be had this way: {said}"
        + _ways_out(probe, request),
        Situation.PRESENTATION_IMPOSSIBLE if all(_hopeless(each, request) for each in wanted) else None,
    )


@dataclass(frozen=True, slots=True)
class Prospect:
    """What volumes of one kind are made of on a node, when nothing is asked for."""

    kind: str
    ordinary: bool
    """True when a node without it is of little use."""
    choice: Choice | None
    """None: such a volume cannot be had."""
    reason: str


_KINDS = (
    ("read-only", True, Wish(writable=False)),
    ("writable", True, Wish(writable=True)),
    ("writable, with sizeLimit", False, Wish(writable=True, size_limit=1 << 30)),
    ("read-only, hostUsers: false", False, Wish(writable=False, host_users=False)),
    ("writable, hostUsers: false", False, Wish(writable=True, host_users=False)),
)


def prospects(probe: ProbeResult) -> list[Prospect]:
    """What can be had on the node of *probe*, for people."""
    found = []
    for kind, ordinary, wish in _KINDS:
        try:
            choice = choose(probe, wish)
        except PresentationUnavailable as error:
            found.append(Prospect(kind, ordinary, None, error.message))
        else:
            found.append(Prospect(kind, ordinary, choice, choice.reason))
    return found


def _is_overlay(presentation: Presentation, probe: ProbeResult, request: Wish) -> bool:
    # A farm through an overlay even where a plain mount would do: a privileged pod can make that one writable.
    return presentation is Presentation.REDIRECT or (
        presentation is Presentation.HARDLINK and not _overlay_obstacle(probe, request)
    )


def _obstacle(presentation: Presentation, probe: ProbeResult, request: Wish) -> str:
    """What keeps *request* from that presentation on this node; empty when nothing does."""
    if _hopeless(presentation, request):
        return _NO_IDMAPPED_OVERLAY if presentation is Presentation.REDIRECT else _NEVER_WRITABLE
    return _failing(probe, *_needs(presentation, request))


def _needs(presentation: Presentation, request: Wish) -> tuple[str, ...]:
    """The properties without which *request* cannot have that presentation."""
    # A copy is where it may grow to: its own file system, where it has one.
    limited = request.writable and request.size_limit is not None and presentation is Presentation.COPY
    idmap = () if request.host_users else ("idmap_sized" if limited else "idmap",)
    match presentation:
        case Presentation.REDIRECT:
            return _WRITABLE_VIEW if request.writable else _VIEW
        case Presentation.HARDLINK:
            return ("hardlink", *idmap, *(("overlay_writable",) if request.writable else ()))
        case Presentation.COPY:
            return idmap


def _overlay_obstacle(probe: ProbeResult, request: Wish) -> str:
    """What keeps a farm from being shown through an overlay."""
    if not request.host_users:
        return _NO_IDMAPPED_OVERLAY
    return _failing(probe, "overlay_writable" if request.writable else "overlay_read_only")


def _hopeless(presentation: Presentation, request: Wish) -> bool:
    """True when no node can give *request* that presentation."""
    if request.host_users:
        return False
    return presentation is Presentation.REDIRECT or (presentation is Presentation.HARDLINK and request.writable)


def _ways_out(probe: ProbeResult, request: Wish) -> str:
    """What could be asked for instead, as the end of a message."""
    words = {
        Presentation.REDIRECT: "`presentation: redirect`",
        Presentation.HARDLINK: "`presentation: hardlink`",
        Presentation.COPY: "`presentation: copy` (a private copy, which costs the size of the closure)",
    }
    ways = [text for presentation, text in words.items() if not _obstacle(presentation, probe, request)]
    read_only = replace(request, writable=False)
    if request.writable and any(not _obstacle(presentation, probe, read_only) for presentation in _UNASKED):
        ways.append("a read-only volume")
    return f"; what this node can do: {', or '.join(ways)}" if ways else ""


def _failing(probe: ProbeResult, *properties: str) -> str:
    """Those of *properties* that do not hold on this node, in words."""
    words = []
    for name in properties:
        finding: Finding = getattr(probe, name)
        if not finding.ok:
            words.append(f"{TITLES[name]}: no ({finding.detail})")
    return ", ".join(words)
