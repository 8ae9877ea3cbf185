"""The pods of one node as its daemon sees them: of each only what decides how its volumes are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from cknix_csi.api.attributes import PodInfo
from cknix_csi.api.errors import NotFound
from cknix_csi.api.situations import Situation
from cknix_csi.kube.api import NOT_FOUND, Api, ApiError, Json, core
from cknix_csi.kube.events import EventRecorder, Subject
from cknix_csi.kube.listwatch import list_and_watch

_STATIC_UID = "kubernetes.io/config.mirror"
"""Annotation of the API's image of a static pod: the uid by which kubelet knows that one."""
_PAGE = 50
"""A whole pod is tens of kilobytes, and of a list all pages but the last have been made small when that is read."""

_Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class _Known:
    uid: str
    host_users: bool
    ends: bool
    """Somebody has deleted it.  Of a static pod the API server knows no more than an image, and that may come back."""


class PodWatch:
    """Keeps what is needed of each pod of *node*, so that a publish for a known pod makes no API call."""

    def __init__(self, api: Api, node: str) -> None:
        self._api = api
        self._node = node
        self._known: dict[_Key, _Known] = {}
        self._tell_ending: Callable[[str], None] = lambda uid: None

    async def run(self) -> NoReturn:
        """Follow the node's pods until cancelled; an API server that is away is waited for."""
        await list_and_watch(
            self._api,
            core("pods"),
            listed=self._listed,
            changed=self._changed,
            query={"fieldSelector": f"spec.nodeName={self._node}"},
            trim=_trimmed,
            page=_PAGE,
        )

    async def host_users(self, pod: PodInfo) -> bool:
        """False when *pod* has a user namespace of its own; one that the watch has not shown yet is asked for once.

        Raises :class:`NotFound` when there is no such pod (any more), :class:`ApiError` when nobody can tell.
        """
        known = self._known.get((pod.namespace, pod.name))
        if known is None or known.uid != pod.uid:
            known = await self._ask(pod)
        return known.host_users

    def ending(self, pod: PodInfo) -> bool:
        """True when *pod* is being deleted, as far as the watch has shown."""
        known = self._known.get((pod.namespace, pod.name))
        return known is not None and known.uid == pod.uid and known.ends

    def on_ending(self, tell: Callable[[str], None]) -> None:
        """From now on call *tell* with the uid of each pod that is deleted or gone: once or more."""
        self._tell_ending = tell

    async def _ask(self, pod: PodInfo) -> _Known:
        try:
            known = _parse(await self._api.get(core("pods", pod.namespace, pod.name)))
        except ApiError as error:
            if error.status != NOT_FOUND:
                raise
            known = None
        if known is None or known.uid != pod.uid:
            raise NotFound(f"pod {pod.namespace}/{pod.name} with uid {pod.uid} does not exist", Situation.POD_NOT_FOUND)
        return known

    def _listed(self, items: list[Json]) -> None:
        before, self._known = self._known, {_key(item): _parse(item) for item in items}
        gone = {known.uid for known in before.values()} - {known.uid for known in self._known.values()}
        for uid in (*gone, *(known.uid for known in self._known.values() if known.ends)):
            self._tell_ending(uid)

    def _changed(self, kind: str, body: Json) -> None:
        key, found = _key(body), _parse(body)
        if kind != "DELETED":
            self._known[key] = found
        elif self._known.get(key, found).uid == found.uid:
            self._known.pop(key, None)
        if found.ends:
            self._tell_ending(found.uid)


class PodEvents:
    """Events on pods, by *recorder*."""

    def __init__(self, recorder: EventRecorder) -> None:
        self._recorder = recorder

    def post(self, pod: PodInfo, reason: str, message: str) -> None:
        """Returns at once and never fails; a pod that kubelet did not name gets none."""
        if pod.name and pod.namespace and pod.uid:
            subject = Subject(pod.namespace, pod.name, pod.uid, api_version="v1", kind="Pod")
            self._recorder.post(subject, "Normal", reason, message)


def _key(body: Json) -> _Key:
    return body["metadata"]["namespace"], body["metadata"]["name"]


def _parse(body: Json) -> _Known:
    metadata = body["metadata"]
    static = (metadata.get("annotations") or {}).get(_STATIC_UID)
    ends = static is None and metadata.get("deletionTimestamp") is not None
    return _Known(str(static or metadata["uid"]), (body.get("spec") or {}).get("hostUsers") is not False, ends)


def _trimmed(body: Json) -> Json:
    """All of a pod that :func:`_key` and :func:`_parse` look at."""
    metadata = body["metadata"]
    kept = {name: metadata.get(name) for name in ("namespace", "name", "uid", "deletionTimestamp")}
    static = (metadata.get("annotations") or {}).get(_STATIC_UID)
    annotations = {"annotations": {_STATIC_UID: static}} if static else {}
    return {"metadata": {**kept, **annotations}, "spec": {"hostUsers": (body.get("spec") or {}).get("hostUsers")}}
