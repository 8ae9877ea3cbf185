"""Whether a pod may name a store path: any path that a cache has could be another namespace's result."""

from __future__ import annotations

from typing import Protocol

from cknix_csi.api.attributes import FromStorePath, PodInfo, VolumeSource
from cknix_csi.api.errors import CknixError
from cknix_csi.api.policies import StorePaths
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath


class Published(Protocol):
    """What Expressions have come to; satisfied by ``kube.expressions.ExpressionWatch``."""

    def publishes(self, namespace: str, path: StorePath) -> bool:
        """Whether *path* is a result of an Expression of *namespace*.

        Raises a :class:`CknixError` that kubelet retries while that cannot be told.
        """


class StorePathRule:
    """The administrator's *policy*; *published* is None where there is no Kubernetes."""

    def __init__(self, policy: StorePaths = StorePaths.ALLOW, published: Published | None = None) -> None:
        self._policy = policy
        self._published = published

    def require(self, source: VolumeSource, pod: PodInfo) -> None:
        """Raises :class:`CknixError` when *pod* may not have *source*."""
        if self._policy is StorePaths.ALLOW or not isinstance(source, FromStorePath) or pod.ephemeral is False:
            return
        if self._policy is StorePaths.DENY:
            raise CknixError(
                f"pods of this cluster may not name store paths, such as {source.path} (CKNIX_STORE_PATHS=deny); apply "
                'an Expression and name it with the attribute "expression"',
                Situation.STORE_PATH_FORBIDDEN,
            )
        if self._published is None or not self._published.publishes(pod.namespace, source.path):
            raise CknixError(
                f'{source.path} is no result of an Expression of namespace "{pod.namespace}", and pods may name no '
                'others (CKNIX_STORE_PATHS=published); apply an Expression with "storePath", or correct the path',
                Situation.STORE_PATH_FORBIDDEN,
            )
