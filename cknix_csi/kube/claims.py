"""What the provisioner asks the API server for a claim: its annotations, and where its Expression can run."""

from __future__ import annotations

from collections.abc import Mapping

from cknix_csi.api.claims import Claim
from cknix_csi.api.errors import NotFound
from cknix_csi.api.situations import Situation
from cknix_csi.api.topology import systems_of_expression
from cknix_csi.kube.api import NOT_FOUND, Api, ApiError, core, expressions


async def annotations_of(api: Api, claim: Claim) -> Mapping[str, str]:
    """The annotations of *claim*.  Raises :class:`NotFound` when it is gone, :class:`ApiError`."""
    try:
        body = await api.get(core("persistentvolumeclaims", claim.namespace, claim.name))
    except ApiError as error:
        if error.status == NOT_FOUND:
            raise NotFound(
                f"PersistentVolumeClaim {claim} does not exist any more", Situation.CLAIM_NOT_FOUND
            ) from None
        raise
    annotations = body["metadata"].get("annotations") or {}
    return {str(key): str(value) for key, value in annotations.items()}


async def systems_for(api: Api, namespace: str, name: str) -> tuple[str, ...]:
    """The systems of an Expression; none when it does not exist or does not say yet.  Raises :class:`ApiError`."""
    try:
        return systems_of_expression(await api.get(expressions(namespace, name)))
    except ApiError as error:
        if error.status == NOT_FOUND:
            return ()
        raise
