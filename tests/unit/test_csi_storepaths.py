"""Which store paths a pod may name, by the administrator's setting."""

from __future__ import annotations

import pytest

from cknix_csi.api.attributes import FromExpression, FromStorePath, PodInfo, VolumeSource
from cknix_csi.api.errors import CknixError
from cknix_csi.api.policies import StorePaths
from cknix_csi.api.situations import Situation
from cknix_csi.api.storepath import StorePath
from cknix_csi.csi.storepaths import StorePathRule

MINE = StorePath.parse("/nix/store/" + "1" * 32 + "-mine")
THEIRS = StorePath.parse("/nix/store/" + "2" * 32 + "-theirs")
POD = PodInfo("pod", "default", "uid", ephemeral=True)
OF_A_VOLUME = PodInfo("pod", "default", "uid", ephemeral=False)
UNTOLD = PodInfo()


class Published:
    def publishes(self, namespace: str, path: StorePath) -> bool:
        return (namespace, path) in {("default", MINE), ("other", THEIRS)}


def situation(policy: StorePaths, source: VolumeSource, pod: PodInfo) -> Situation | None:
    try:
        StorePathRule(policy, Published()).require(source, pod)
    except CknixError as error:
        return error.situation
    return None


@pytest.mark.parametrize(
    ("path", "pod", "refused_by"),
    [
        pytest.param(MINE, POD, {StorePaths.DENY}, id="a result of the pod's namespace"),
        pytest.param(THEIRS, POD, {StorePaths.DENY, StorePaths.PUBLISHED}, id="a result of another namespace"),
        pytest.param(THEIRS, OF_A_VOLUME, set(), id="a PersistentVolume"),
        pytest.param(MINE, UNTOLD, {StorePaths.DENY, StorePaths.PUBLISHED}, id="a pod that kubelet does not name"),
    ],
)
@pytest.mark.parametrize("policy", StorePaths)
def test_a_store_path_is_refused_where_the_setting_says_so(
    policy: StorePaths, path: StorePath, pod: PodInfo, refused_by: set[StorePaths]
) -> None:
    expected = Situation.STORE_PATH_FORBIDDEN if policy in refused_by else None
    assert situation(policy, FromStorePath(path), pod) is expected


@pytest.mark.parametrize("policy", StorePaths)
def test_an_expression_is_always_allowed(policy: StorePaths) -> None:
    assert situation(policy, FromExpression("default", "hello"), POD) is None


def test_without_kubernetes_nothing_is_published() -> None:
    with pytest.raises(CknixError, match="is no result of an Expression of namespace"):
        StorePathRule(StorePaths.PUBLISHED).require(FromStorePath(MINE), POD)
