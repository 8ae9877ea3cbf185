"""Volume attributes: what a pod or a PersistentVolume may ask for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cknix_csi.api.attributes import (
    FromExpression,
    FromSource,
    FromStorePath,
    PodInfo,
    VolumeSource,
    excessive,
    parse_source,
    user_attributes,
)
from cknix_csi.api.errors import Invalid
from cknix_csi.api.situations import Code
from cknix_csi.api.storepath import StorePath

SYSTEM = "x86_64-linux"
OTHER = "aarch64-linux"
HELLO = "/nix/store/6c1vlf6kyyl0x5cjdhvr3bymgxa74fjb-hello"
MULTI = "/nix/store/p4f6sq02wj7dpvjf0fnmbp7xbck7brsn-multi"
POD = {
    "csi.storage.k8s.io/pod.name": "web-0",
    "csi.storage.k8s.io/pod.namespace": "shop",
    "csi.storage.k8s.io/pod.uid": "5d0f7f4a",
    "csi.storage.k8s.io/serviceAccount.name": "default",
}
INLINE = {**POD, "csi.storage.k8s.io/ephemeral": "true"}
PERSISTENT = {**POD, "csi.storage.k8s.io/ephemeral": "false"}


def problems(attributes: dict[str, str], context: dict[str, str] = INLINE) -> list[str]:
    with pytest.raises(Invalid) as caught:
        parse_source({**context, **attributes}, system=SYSTEM)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert caught.value.message == "; ".join(map(str, caught.value.problems))
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("attributes", "source"),
    [
        pytest.param(
            {"expression": "hello"}, FromExpression("shop", "hello"), id="an Expression of the pod's namespace"
        ),
        pytest.param({"expression": "a.b-c.0"}, FromExpression("shop", "a.b-c.0"), id="a name with dots"),
        pytest.param({"expression": "x" * 253}, FromExpression("shop", "x" * 253), id="the longest name"),
        pytest.param(
            {"expression": "hello", "namespace": "shop"},
            FromExpression("shop", "hello"),
            id="its own namespace by name",
        ),
        pytest.param({"storePath": HELLO}, FromStorePath(StorePath.parse(HELLO)), id="a store path"),
        pytest.param({SYSTEM: HELLO}, FromStorePath(StorePath.parse(HELLO)), id="a store path for this system"),
        pytest.param(
            {SYSTEM: HELLO, OTHER: MULTI}, FromStorePath(StorePath.parse(HELLO)), id="this system's path of several"
        ),
        pytest.param(
            {SYSTEM: HELLO, "storePath": MULTI},
            FromStorePath(StorePath.parse(HELLO)),
            id="this system before storePath",
        ),
        pytest.param(
            {SYSTEM: HELLO, "expression": "x"},
            FromStorePath(StorePath.parse(HELLO)),
            id="this system before expression",
        ),
        pytest.param({SYSTEM: HELLO, "expr": "1"}, FromStorePath(StorePath.parse(HELLO)), id="this system before expr"),
        pytest.param({OTHER: HELLO, "expression": "x"}, FromExpression("shop", "x"), id="another system: the fallback"),
        pytest.param(
            {OTHER: HELLO, "storePath": MULTI}, FromStorePath(StorePath.parse(MULTI)), id="another system: storePath"
        ),
        pytest.param({"flakeRef": "github:a/b#c"}, FromSource("shop", "flakeRef", "github:a/b#c"), id="a flake"),
        pytest.param({"expr": " 1 \n"}, FromSource("shop", "expr", " 1 \n"), id="source text, as it is"),
    ],
)
def test_a_source_is_chosen(attributes: dict[str, str], source: VolumeSource) -> None:
    assert parse_source({**INLINE, **attributes}, system=SYSTEM) == source


def test_a_persistent_volume_may_name_another_namespace() -> None:
    wanted = {"expression": "hello", "namespace": "platform"}
    assert parse_source({**PERSISTENT, **wanted}, system=SYSTEM) == FromExpression("platform", "hello")


def test_a_store_path_needs_no_pod() -> None:
    assert parse_source({"storePath": HELLO}, system=SYSTEM) == FromStorePath(StorePath.parse(HELLO))


@pytest.mark.parametrize(
    ("attributes", "problem"),
    [
        pytest.param(
            {"expresion": "hello"},
            'volume attribute "expresion": is not known; did you mean "expression"?',
            id="a typo",
        ),
        pytest.param(
            {"storepath": HELLO},
            'volume attribute "storepath": is not known; did you mean "storePath"?',
            id="wrong case",
        ),
        pytest.param(
            {"x86_64_linux": HELLO},
            'volume attribute "x86_64_linux": is not known; did you mean "x86_64-linux"?',
            id="almost a system",
        ),
        pytest.param(
            {"image": "nginx"},
            'volume attribute "image": is not known; known are storePath, expression, flakeRef, expr, namespace, '
            "sizeLimit, medium, presentation, or a system such as x86_64-linux",
            id="something else",
        ),
        pytest.param(
            {"expression": "a", "storePath": HELLO},
            'volume attribute "expression": cannot stand beside "storePath"; a volume has one source, remove all but '
            'one of "storePath", "expression"',
            id="two sources",
        ),
        pytest.param(
            {"expr": "1", "flakeRef": "x", "expression": "a"},
            'volume attribute "flakeRef": cannot stand beside "expression"; a volume has one source, remove all but '
            'one of "expression", "flakeRef", "expr"',
            id="three sources",
        ),
        pytest.param(
            {"expression": ""}, 'volume attribute "expression": is empty; give it a value or remove it', id="empty"
        ),
        pytest.param({"expr": " \n"}, 'volume attribute "expr": is empty; give it a value or remove it', id="blank"),
        pytest.param(
            {SYSTEM: " "}, f'volume attribute "{SYSTEM}": is empty; give it a value or remove it', id="blank path"
        ),
        pytest.param(
            {"storePath": "hello"},
            "volume attribute \"storePath\": 'hello' is not a store path: it must begin with /nix/store/, as in "
            "/nix/store/<hash>-<name>",
            id="a malformed store path",
        ),
        pytest.param(
            {OTHER: f"{HELLO}/bin", "expression": "a"},
            f"volume attribute \"{OTHER}\": '{HELLO}/bin' is not a store path: it names something inside a store path; "
            f"use {HELLO}",
            id="a malformed path for another system",
        ),
        pytest.param(
            {"storePath": f"{HELLO}.drv"},
            f'volume attribute "storePath": {HELLO}.drv is a derivation; name its output path instead',
            id="a derivation",
        ),
        pytest.param(
            {},
            'volume attributes: no source given; set one of "expression", "storePath" or a store path per system, for '
            'example x86_64-linux: "/nix/store/…"',
            id="nothing",
        ),
        pytest.param(
            {OTHER: HELLO, "riscv64-linux": HELLO},
            f'volume attribute "{SYSTEM}": missing: this node\'s system is {SYSTEM}, but there are store paths only '
            f'for {OTHER}, riscv64-linux; add "{SYSTEM}", or a fallback such as "expression"',
            id="only other systems",
        ),
        pytest.param(
            {"expression": "a", "namespace": "platform"},
            "volume attribute \"namespace\": 'platform' is not the pod's namespace 'shop'; an inline volume can only "
            "use an Expression of its own namespace",
            id="another namespace from an inline volume",
        ),
        pytest.param(
            {"storePath": HELLO, "namespace": "shop"},
            'volume attribute "namespace": has a meaning only beside "expression"; remove it',
            id="a namespace for nothing",
        ),
        pytest.param(
            {"expression": "platform/hello"},
            "volume attribute \"expression\": 'platform/hello' is not the name of an Expression: lower-case letters, "
            "digits, '-' and '.' (an Expression of another namespace cannot be named)",
            id="an Expression with its namespace",
        ),
        pytest.param(
            {"expression": "Hello"},
            "volume attribute \"expression\": 'Hello' is not the name of an Expression: lower-case letters, digits, "
            "'-' and '.'",
            id="a name that Kubernetes would refuse",
        ),
    ],
)
def test_a_bad_attribute_is_refused_with_its_reason(attributes: dict[str, str], problem: str) -> None:
    assert problems(attributes) == [problem]


@pytest.mark.parametrize("name", ["-a", "a-", "a..b", ".a", "a.", "a_b", "a b", "x" * 254, "a\n", "ä"])
def test_names_that_the_api_server_refuses_are_refused(name: str) -> None:
    assert len(problems({"expression": name})) == 1


@pytest.mark.parametrize("name", ["a.b", "A", "-a", "x" * 64, "a/b"])
def test_namespaces_that_the_api_server_refuses_are_refused(name: str) -> None:
    [problem] = problems({"expression": "a", "namespace": name}, PERSISTENT)
    assert problem == f'volume attribute "namespace": {name!r} is not the name of a namespace'


def test_every_problem_is_told_at_once() -> None:
    found = problems({"expression": "A", "storePath": "x", "expresion": "b", "namespace": "", OTHER: f"{HELLO}.drv"})
    assert [problem.split(":")[0] for problem in found] == [
        'volume attribute "expresion"',
        'volume attribute "namespace"',
        'volume attribute "storePath"',
        f'volume attribute "{OTHER}"',
        'volume attribute "expression"',
        'volume attribute "expression"',
    ]


def test_an_unknown_pod_is_told_with_the_two_remedies() -> None:
    [problem] = problems({"expression": "a"}, {})
    assert problem.startswith('volume attribute "expression": the namespace is not known')
    assert "podInfoOnMount: true" in problem
    assert problem.endswith('set the attribute "namespace"')


@pytest.mark.parametrize("kind", ["expr", "flakeRef"])
def test_an_unknown_pod_is_no_reason_to_advise_what_would_be_refused(kind: str) -> None:
    [problem] = problems({kind: "x"}, {})
    assert problem.startswith(f'volume attribute "{kind}": the namespace is not known')
    assert '"namespace"' not in problem


def test_what_kubelet_and_the_provisioner_add_is_not_the_users() -> None:
    added = {**INLINE, "storage.kubernetes.io/csiProvisionerIdentity": "1-csi", "csi.storage.k8s.io/new.key": "x"}
    assert user_attributes({**added, "expression": "a"}) == {"expression": "a"}
    assert parse_source({**added, "expression": "a"}, system=SYSTEM) == FromExpression("shop", "a")


@pytest.mark.parametrize(("context", "ephemeral"), [(INLINE, True), (PERSISTENT, False), (POD, None)])
def test_kubelet_tells_of_the_pod(context: dict[str, str], ephemeral: bool | None) -> None:
    assert PodInfo.parse(context) == PodInfo("web-0", "shop", "5d0f7f4a", "default", ephemeral)
    assert PodInfo.parse({}) == PodInfo()


@given(
    st.dictionaries(
        st.sampled_from(["expression", "storePath", "flakeRef", "expr", "namespace", SYSTEM, OTHER])
        | st.text(max_size=9),
        st.sampled_from(["", "hello", "shop", HELLO, f"{HELLO}.drv"]) | st.text(max_size=20),
    )
)
def test_any_attributes_give_a_source_or_problems_that_name_their_attribute(attributes: dict[str, str]) -> None:
    try:
        source = parse_source({**INLINE, **attributes}, system=SYSTEM)
    except Invalid as error:
        assert error.problems
        for problem in error.problems:
            assert problem.field == "volume attributes" or problem.field.startswith('volume attribute "')
    else:
        # One namespace for all: an inline volume never reaches into another.
        assert isinstance(source, FromStorePath) or source.namespace == "shop"


@pytest.mark.parametrize(
    ("context", "problem"),
    [
        ({f"expres{number}": "" for number in range(20_000)}, "volume attributes: are 20000, and at most 64"),
        ({"sizeLimit": "1" * 1_000_000}, 'volume attribute "sizeLimit": has 1000000 characters, and at most 4096'),
        ({"k" * 300: "v"}, 'volume attributes: have a key of 300 characters, and at most 256 can be given: "kkk'),
        ({"expr": "x" * 200_000}, 'volume attribute "expr": has 200000 characters, and at most 131072'),
    ],
)
def test_what_is_too_much_is_told_without_a_look_at_all_of_it(context: dict[str, str], problem: str) -> None:
    [found] = excessive(context)
    assert str(found).startswith(problem)
    assert len(str(found)) < 200


def test_what_kubelet_adds_is_never_too_much() -> None:
    assert excessive({"expr": "x" * 100_000, "csi.storage.k8s.io/serviceAccount.tokens": "t" * 1_000_000}) == []


def test_a_terminal_obeys_nothing_that_a_key_says() -> None:
    [problem] = problems({"expression": "hello", "\x1b[2J\n": "x"})
    assert problem.startswith('volume attribute "\\x1b[2J\\n": is not known')
