"""What can go wrong, in one table: every failure's reason, its gRPC code, where it is told, and what helps.

Codes are those of the CSI specification's "Error Scheme".  What follows from a code is kubelet's rule
(pkg/volume/csi/csi_client.go, ``isFinalError``), and nobody else in this program says a code.
"""

from __future__ import annotations

import enum


class Code(enum.Enum):
    """The canonical gRPC codes this driver answers with."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    ABORTED = "ABORTED"
    UNAVAILABLE = "UNAVAILABLE"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"

    @property
    def transient(self) -> bool:
        """True when kubelet keeps the volume as "uncertain" after a publish that failed so.

        It asks again, and unpublishes when the pod goes away: what is there may stay until then.  After any other code
        it asks again as well, but forgets the volume when the pod goes: whatever the call created must be gone before
        the answer is sent.
        """
        return self in {Code.ABORTED, Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED}


class Told(enum.Flag):
    """Where people meet a failure."""

    POD = enum.auto()
    """In kubelet's own Event ``FailedMount``, which holds the message, once the call has ended."""
    WAITING = enum.auto()
    """In an Event of the driver on the pod, with this reason, while the call still waits."""
    EXPRESSION = enum.auto()
    """In an Event with this reason on the Expression, and in its conditions."""
    CLAIM = enum.auto()
    """In the provisioner's Event on the claim, which holds the message."""
    LOG = enum.auto()
    """In the process's log, or on the terminal of the command."""


@enum.unique
class Situation(enum.Enum):
    """A row: the stable reason (CamelCase: people filter by it), code, where it is told, what it means, what helps."""

    def __init__(self, reason: str, code: Code, told: Told, meaning: str, remedy: str) -> None:
        self.reason = reason
        self.code = code
        self.told = told
        self.meaning = meaning
        self.remedy = remedy

    # fmt: off
    INVALID_INPUT = (
        "InvalidInput", Code.INVALID_ARGUMENT, Told.POD | Told.EXPRESSION | Told.CLAIM | Told.LOG,
        "a request, an Expression or a setting has fields that are missing or wrong; the message names all of them",
        "correct the fields",
    )
    INVALID_STORE_PATH = (
        "InvalidStorePath", Code.INVALID_ARGUMENT, Told.POD | Told.EXPRESSION | Told.LOG,
        "text that should be a store path is none",
        "write the whole path, `/nix/store/<32 characters>-<name>`",
    )
    PRESENTATION_IMPOSSIBLE = (
        "PresentationImpossible", Code.INVALID_ARGUMENT, Told.POD,
        "no node could make the volume as the attributes and the pod ask for it",
        "change the attribute `presentation`, or the pod, as the message says",
    )
    PRESENTATION_UNAVAILABLE = (
        "PresentationUnavailable", Code.FAILED_PRECONDITION, Told.POD,
        "this node cannot make the volume as it is asked for",
        "run the pod on another node, or ask for another `presentation`; `cknix-csi probe` tells what a node can do",
    )
    UNSUPPORTED_SOURCE = (
        "UnsupportedSource", Code.FAILED_PRECONDITION, Told.POD,
        "the volume names its content in a way that this driver does not serve here",
        "name an Expression, or a store path, as the message says",
    )
    STORE_PATH_FORBIDDEN = (
        "StorePathForbidden", Code.FAILED_PRECONDITION, Told.POD,
        "the setting `CKNIX_STORE_PATHS` does not allow the pod to name this store path",
        "name an Expression of the pod's namespace",
    )
    EXPRESSION_NOT_FOUND = (
        "ExpressionNotFound", Code.NOT_FOUND, Told.POD,
        "no Expression of this name is in the pod's namespace",
        "apply it, or correct the name; the pod starts by itself then",
    )
    EXPRESSION_FAILED = (
        "ExpressionFailed", Code.FAILED_PRECONDITION, Told.POD,
        "the Expression could not be built and has no earlier result",
        "correct the Expression; `kubectl describe expr` shows the log",
    )
    WRONG_SYSTEM = (
        "WrongSystem", Code.FAILED_PRECONDITION, Told.POD,
        "the Expression has results, but none for this node's system",
        "add the system to `spec.systems`, or run the pod on another node",
    )
    NO_FITTING_NODE = (
        "NoFittingNode", Code.RESOURCE_EXHAUSTED, Told.CLAIM,
        "the nodes that a claim's volume may be on are of other systems than its content",
        "add a system to the Expression, or allow other nodes: by the class, or in what the pod asks for",
    )
    WAITING_FOR_EXPRESSION = (
        "WaitingForExpression", Code.ABORTED, Told.POD | Told.WAITING,
        "the Expression has no result yet",
        "wait; `kubectl get expr` shows how far it is",
    )
    FETCHING = (
        "Fetching", Code.ABORTED, Told.POD | Told.WAITING,
        "the closure is still being fetched to the node",
        "wait; the fetch goes on between kubelet's calls",
    )
    COPYING = (
        "Copying", Code.ABORTED, Told.POD | Told.WAITING,
        "the volume's private copy is still being made",
        "wait; the copy goes on between kubelet's calls",
    )
    VOLUME_BUSY = (
        "VolumeBusy", Code.ABORTED, Told.POD,
        "another call for the same volume is under way",
        "wait; kubelet asks again",
    )
    VOLUME_CONFLICT = (
        "VolumeConflict", Code.ALREADY_EXISTS, Told.POD | Told.CLAIM,
        "another volume, or the same one made with other arguments, is there already",
        "end what the message names first",
    )
    CLAIM_NOT_FOUND = (
        "ClaimNotFound", Code.NOT_FOUND, Told.LOG,
        "a claim was deleted before its volume was made",
        "nothing: nobody wants the volume",
    )
    VOLUME_RECORD_DAMAGED = (
        "VolumeRecordDamaged", Code.INTERNAL, Told.CLAIM | Told.LOG,
        "the ConfigMap that is a claim's volume was written by somebody else",
        "restore it, or delete it together with the claim and its PersistentVolume",
    )
    LIST_EXPIRED = (
        "ListExpired", Code.ABORTED, Told.LOG,
        "volumes were listed from a place that is unknown, or too old to go on from",
        "the caller lists from the beginning",
    )
    ALREADY_PUBLISHED = (
        "AlreadyPublished", Code.FAILED_PRECONDITION, Told.POD,
        "another pod on the node has the volume, whose access mode allows one pod",
        "use `accessModes: [ReadWriteOnce]` or `[ReadOnlyMany]`",
    )
    VOLUME_NOT_FOUND = (
        "VolumeNotFound", Code.NOT_FOUND, Told.LOG,
        "something was asked of what is no volume of this driver",
        "nothing: kubelet asks while a volume comes or goes",
    )
    TARGET_UNUSABLE = (
        "TargetUnusable", Code.FAILED_PRECONDITION, Told.POD,
        "something that this driver did not make is at the volume's target path",
        "remove on the node what the message names",
    )
    SHUTTING_DOWN = (
        "ShuttingDown", Code.UNAVAILABLE, Told.POD,
        "the node daemon is being stopped",
        "wait for the next one; kubelet asks again",
    )
    KUBERNETES_UNAVAILABLE = (
        "KubernetesUnavailable", Code.UNAVAILABLE, Told.POD | Told.CLAIM | Told.LOG,
        "the API server could not be asked, or refused",
        "see to the API server or, where it says `forbidden`, to the RBAC: `kubectl apply -f yaml/`",
    )
    OBJECT_NOT_FOUND = (
        "ObjectNotFound", Code.NOT_FOUND, Told.LOG,
        "the API server does not have an object that was asked for",
        "nothing: whoever asked says what is missing",
    )
    POD_NOT_FOUND = (
        "PodNotFound", Code.NOT_FOUND, Told.LOG,
        "the pod of a volume is gone",
        "nothing: its volume ends with it",
    )
    POD_ENDING = (
        "PodEnding", Code.ABORTED, Told.LOG,
        "the pod is being deleted, and what its volume waited for is not waited for any more",
        "nothing: its volume ends with it",
    )
    CACHE_UNAVAILABLE = (
        "CacheUnavailable", Code.UNAVAILABLE, Told.POD | Told.EXPRESSION,
        "a binary cache could not be reached, for a path that is not on this machine",
        "see to the cache: the controller's pod, its Service, DNS on the node; it is tried again",
    )
    PATH_NOT_FOUND = (
        "PathNotFound", Code.NOT_FOUND, Told.POD,
        "every cache has answered, and none has the path",
        "build it where a cache has it, or correct `storePath`",
    )
    PATH_UNTRUSTED = (
        "PathUntrusted", Code.FAILED_PRECONDITION, Told.POD | Told.EXPRESSION,
        "a cache offered a path whose signature or content does not hold",
        "compare the ConfigMap `cknix-cache` and the Secret `cknix-cache-key`; was the cache tampered with?",
    )
    PATH_COLLECTED = (
        "PathCollected", Code.UNAVAILABLE, Told.POD | Told.EXPRESSION,
        "garbage collections took parts of what was being fetched, again and again",
        "wait; it is tried again",
    )
    PATH_NOT_VALID = (
        "PathNotValid", Code.NOT_FOUND, Told.POD | Told.EXPRESSION,
        "a path was collected as garbage before it could be used, again and again",
        "end what collects garbage on the machine; it is tried again",
    )
    COLLECTION_RUNS = (
        "CollectionRuns", Code.UNAVAILABLE, Told.POD,
        "somebody collects garbage on the node, and may be about to delete the closure",
        "wait for its end; kubelet asks again",
    )
    COLLECTION_FAILED = (
        "CollectionFailed", Code.INTERNAL, Told.LOG,
        "Nix could not collect garbage",
        "the message holds Nix's words; it is tried again",
    )
    OUT_OF_SPACE = (
        "OutOfSpace", Code.RESOURCE_EXHAUSTED, Told.POD | Told.EXPRESSION | Told.LOG,
        "a file system that is written to is full, or a volume's size limit is too small",
        "free space or inodes, or raise `sizeLimit`; garbage is collected meanwhile",
    )
    MOUNT_FAILED = (
        "MountFailed", Code.INTERNAL, Told.POD | Told.LOG,
        "the kernel refused to mount or to unmount",
        "the message says what the kernel said, and often what helps",
    )
    VOLUME_FAILED = (
        "VolumeFailed", Code.INTERNAL, Told.POD | Told.LOG,
        "a file operation in the driver's own directories failed",
        "the message says which and why: look at the disk and the kernel's log",
    )
    NOT_UNDONE = (
        "NotUndone", Code.UNAVAILABLE, Told.POD,
        "a publish failed, and so did undoing it",
        "nothing is lost: kubelet asks again, or unpublishes; the message says what stood in the way",
    )
    STORE_DAMAGED = (
        "StoreDamaged", Code.FAILED_PRECONDITION, Told.POD,
        "files of the node's store are gone or are none of Nix's, and fetching them again did not help",
        "look at the disk; `nix-store --verify --check-contents` on the node's store tells more",
    )
    VIEW_DAMAGED = (
        "ViewDamaged", Code.FAILED_PRECONDITION, Told.POD,
        "what other pods are shown of the closure was damaged on disk",
        "end the pods that use it on this node; it is built anew then",
    )
    DATA_ROOT_TAKEN = (
        "DataRootTaken", Code.UNAVAILABLE, Told.POD | Told.LOG,
        "another process works on the same data root",
        "end it; kubelet asks again",
    )
    DATA_ROOT_OCCUPIED = (
        "DataRootOccupied", Code.FAILED_PRECONDITION, Told.LOG,
        "the process cannot start: another one works on the same data root",
        "end that one",
    )
    MOUNT_TABLE_UNREADABLE = (
        "MountTableUnreadable", Code.UNAVAILABLE, Told.POD | Told.LOG,
        "what is mounted cannot be told, and nothing is touched until it can",
        "look at `/proc/self/mountinfo` in the daemon's container; kubelet asks again",
    )
    STORE_UNREADABLE = (
        "StoreUnreadable", Code.UNAVAILABLE, Told.POD | Told.EXPRESSION | Told.LOG,
        "the store's database cannot be brought to agree with what pods are shown",
        "the message says why; it is tried again",
    )
    NIX_DATABASE_UNREADABLE = (
        "NixDatabaseUnreadable", Code.UNAVAILABLE, Told.POD | Told.EXPRESSION,
        "Nix's database is locked or out of reach",
        "wait, or end what locks it; it is tried again",
    )
    NIX_DATABASE_DAMAGED = (
        "NixDatabaseDamaged", Code.UNAVAILABLE, Told.POD | Told.EXPRESSION,
        "Nix's database is damaged",
        "nothing: it is set aside and made anew before the next fetch; look at the disk",
    )
    UNKNOWN_NIX_SCHEMA = (
        "UnknownNixSchema", Code.INTERNAL, Told.POD | Told.EXPRESSION,
        "another version of Nix has changed the store's database",
        "use a version of the driver that knows it, or a new data root",
    )
    NIX_NOT_FOUND = (
        "NixNotFound", Code.INTERNAL, Told.POD | Told.EXPRESSION | Told.LOG,
        "a Nix command is not on the process's PATH",
        "install Nix, or repair the image",
    )
    EVALUATION_FAILED = (
        "EvaluationFailed", Code.FAILED_PRECONDITION, Told.EXPRESSION | Told.LOG,
        "Nix rejects the Expression, or its value cannot be mounted",
        "correct the Expression; the message holds the end of Nix's log",
    )
    NO_BUILDABLE_SYSTEM = (
        "NoBuildableSystem", Code.FAILED_PRECONDITION, Told.EXPRESSION,
        "the controller builds for none of the systems the Expression names",
        "change `spec.systems`",
    )
    BUILD_FAILED = (
        "BuildFailed", Code.FAILED_PRECONDITION, Told.EXPRESSION | Told.LOG,
        "a derivation did not build",
        "correct the Expression; the message holds the end of the build's log",
    )
    RESULT_LOST = (
        "ResultLost", Code.NOT_FOUND, Told.POD | Told.EXPRESSION | Told.LOG,
        "the controller's store has lost a result, most often by a move to another node, and no substituter has it",
        "move the controller back, correct the Expression, or have it built anew; nodes that have it go on using it",
    )
    BUILD_KILLED = (
        "BuildKilled", Code.UNAVAILABLE, Told.EXPRESSION | Told.LOG,
        "the kernel or somebody killed a build, most often for want of memory",
        "give the controller more memory, or less to build at once (`CKNIX_MAX_BUILDS`); it is tried again by itself",
    )
    DEADLINE_EXCEEDED = (
        "DeadlineExceeded", Code.FAILED_PRECONDITION, Told.POD | Told.EXPRESSION | Told.LOG,
        "work ran longer than its setting allows, and was stopped",
        "raise the setting that the message names",
    )
    SOURCE_UNAVAILABLE = (
        "SourceUnavailable", Code.UNAVAILABLE, Told.EXPRESSION | Told.LOG,
        "a server that an evaluation needs something from could not be asked",
        "see to that server; it is tried again",
    )
    NAR_UNREADABLE = (
        "NarUnreadable", Code.INTERNAL, Told.LOG,
        "the cache could not read a path it was asked for",
        "the message says why: look at the controller's disk",
    )
    INVALID_SIGNING_KEY = (
        "InvalidSigningKey", Code.FAILED_PRECONDITION, Told.LOG,
        "the cache's signing key is not one",
        "repair the Secret, or delete it: a new key is made",
    )
    MALFORMED_KEY = (
        "MalformedKey", Code.FAILED_PRECONDITION, Told.LOG,
        "the Secret of the cache's key does not hold what it should",
        "repair the Secret as the message says, or delete it",
    )
    NODE_UNUSABLE = (
        "NodeUnusable", Code.FAILED_PRECONDITION, Told.LOG,
        "nothing can be mounted: the data root is gone, read-only or silent, or the mount table cannot be read",
        "do as the message says; `Probe` and `/readyz` answer so until it is mended",
    )
    LEDGER_UNREADABLE = (
        "LedgerUnreadable", Code.INTERNAL, Told.LOG,
        "the node's record of volumes cannot be read; volumes do not need it",
        "the message says why; a damaged record is begun anew",
    )
    REGISTRATION_REFUSED = (
        "RegistrationRefused", Code.FAILED_PRECONDITION, Told.LOG,
        "kubelet does not take the driver",
        "the message says why, often that kubelet has no API server; the daemon offers itself until it is taken",
    )
    SOCKET_UNAVAILABLE = (
        "SocketUnavailable", Code.FAILED_PRECONDITION, Told.LOG,
        "the daemon cannot listen at its socket",
        "end the other process that serves there, or do as the message says",
    )
    VOLUME_REFUSED = (
        "VolumeRefused", Code.FAILED_PRECONDITION, Told.LOG,
        "`cknix-csi run` could not have its volume",
        "the message is the node service's own",
    )
    NOT_PRIVILEGED = (
        "NotPrivileged", Code.FAILED_PRECONDITION, Told.LOG,
        "`cknix-csi run` may not mount",
        "run it as root, or in a container with CAP_SYS_ADMIN",
    )
    NOT_SUPPORTED = (
        "NotSupported", Code.UNIMPLEMENTED, Told.LOG,
        "a method was called that the driver does not offer",
        "nothing: it says so in its capabilities",
    )
    UNREADABLE_REQUEST = (
        "UnreadableRequest", Code.INTERNAL, Told.LOG,
        "a request is not of the protocol",
        "the caller is none of Kubernetes' own, or broken",
    )
    INTERNAL_ERROR = (
        "InternalError", Code.INTERNAL, Told.POD | Told.EXPRESSION | Told.CLAIM | Told.LOG,
        "the driver met something it does not expect",
        "report it with the log, which has the traceback",
    )
    # fmt: on
