"""What administrators of a cluster allow beyond what Kubernetes' own rights can say."""

from __future__ import annotations

import enum


class StorePaths(enum.Enum):
    """Which store paths an inline volume may name; values are those of the setting.

    PersistentVolumes may name any: who may make those, is an administrator.
    """

    ALLOW = "allow"
    """Any."""
    PUBLISHED = "published"
    """Results of Expressions of the pod's namespace."""
    DENY = "deny"
    """None."""
