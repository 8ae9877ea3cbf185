"""What README and docs say is true: snippets parse, names exist, defaults and messages are the program's own."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from cknix_csi import cli
from cknix_csi.api.attributes import EPHEMERAL, KNOWN_KEYS, POD_NAME, POD_NAMESPACE, parse_source
from cknix_csi.api.claims import EXPRESSION_ANNOTATION, volume_attributes
from cknix_csi.api.errors import Invalid, Problem
from cknix_csi.api.expression import KIND, parse_manifest
from cknix_csi.api.options import parse_options
from cknix_csi.api.systems import KNOWN_SYSTEMS
from cknix_csi.settings import (
    DRIVER_NAME,
    controller_settings,
    node_settings,
    provisioner_settings,
    run_settings,
)

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "nix/demo/README.md"]
MANIFESTS = sorted((REPOSITORY / "yaml").rglob("*.yaml"))
ROLES: Mapping[str, Callable[[Mapping[str, str]], object]] = {
    "controller": controller_settings,
    "node": node_settings,
    "provisioner": provisioner_settings,
    "run": lambda environment: run_settings(environment, None),
}


def _name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def _code(page: Path) -> Iterator[str]:
    """Lines of shell blocks, without comments, and what stands in backticks."""
    for block in _blocks(page, "sh"):
        for line in block.splitlines():
            yield line.partition(" #")[0].strip()
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`([^`]+)`", prose)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping within a YAML value."""
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from _objects(part)
    elif isinstance(value, list):
        for part in value:
            yield from _objects(part)


def _classes() -> set[str]:
    """Names of the classes among the examples."""
    documents = yaml.safe_load_all((REPOSITORY / "yaml/test/storageclass.yaml").read_text())
    return {body["metadata"]["name"] for body in documents}


def _check_yaml(text: str) -> int:
    """Parse every Expression, volume, class and claim of ours in *text*, and count them."""
    found = 0
    for mapping in _objects(list(yaml.safe_load_all(text))):
        annotations = (mapping.get("metadata") or {}).get("annotations") or {}
        if mapping.get("provisioner") == DRIVER_NAME:
            # A class may leave its Expression to the claim.
            parameters = mapping.get("parameters", {})
            volume_attributes(parameters, {} if parameters else {EXPRESSION_ANNOTATION: "hello"}, requested=1 << 30)
            found += 1
        elif mapping.get("storageClassName") in _classes():
            found += 1
        elif mapping.get("kind") == "PersistentVolumeClaim" and annotations:
            volume_attributes({}, annotations, requested=1 << 30)
            found += 1
        if mapping.get("kind") == KIND:
            parse_manifest(mapping)
            found += 1
        if mapping.get("driver") == DRIVER_NAME:
            pod = {POD_NAME: "p", POD_NAMESPACE: "default"}
            inline = {} if "volumeHandle" in mapping else {EPHEMERAL: "true"}
            attributes = {**mapping["volumeAttributes"], **pod, **inline}
            parse_source(attributes, system="x86_64-linux")
            parse_options(attributes, writable=not mapping.get("readOnly", False))
            found += 1
    return found


def _table(page: str, first_header: str) -> list[list[str]]:
    """The cells of the table of *page* whose first column is headed so."""
    lines = (REPOSITORY / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_header} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page, "yaml")], ids=_name)
def test_yaml_in_the_documentation_is_what_the_program_accepts(page: Path) -> None:
    for block in _blocks(page, "yaml"):
        assert _check_yaml(block) > 0, f"nothing of ours in:\n{block}"


def test_the_readme_shows_an_expression_and_a_pod() -> None:
    assert sum(map(_check_yaml, _blocks(REPOSITORY / "README.md", "yaml"))) >= 2


@pytest.mark.parametrize("file", [file for file in MANIFESTS if file.parent.name == "test"], ids=_name)
def test_examples_are_what_the_program_accepts(file: Path) -> None:
    assert _check_yaml(file.read_text()) > 0


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match("https?:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = page if not file else (page.parent / file).resolve()
        assert linked.exists(), target
        assert linked.is_relative_to(REPOSITORY), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


def test_every_page_of_the_documentation_can_be_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)", (REPOSITORY / "README.md").read_text()))
    assert linked == {_name(page) for page in PAGES if page.parent.name == "docs"}


def test_every_field_of_an_expression_is_explained_with_its_default() -> None:
    crd = yaml.safe_load((REPOSITORY / "yaml/10-crd.yaml").read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    spec, status = schema["spec"]["properties"], schema["status"]["properties"]
    rows = {name.strip("`"): default for name, default, _ in _table("docs/expression.md", "field | default")}
    assert set(rows) == {f"spec.{name}" for name in spec} | {f"spec.data.{name}" for name in spec["data"]["properties"]}
    assert rows["spec.historyLimit"] == str(spec["historyLimit"]["default"])
    assert {name.strip("`") for name, _ in _table("docs/expression.md", "field | value")} == {
        f"status.{name}" for name in status
    }


def test_make_targets_that_are_named_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9]+):", makefile, re.MULTILINE))
    named = {word for page in PAGES for code in _code(page) for word in re.findall(r"^make ([a-z0-9]+)", code)}
    assert {"demo", "test", "cluster"} <= named <= targets
    helped = set(re.findall(r'echo "make ([a-z0-9]+)', makefile))
    assert helped == targets - {"help"}


def _commands() -> list[str]:
    return sorted(
        {code for page in PAGES for code in _code(page) if re.match("cknix-csi ", code) and "…" not in code}
        | set(re.findall(r"\$\(VENV\)/(cknix-csi .*)", (REPOSITORY / "Makefile").read_text()))
    )


@pytest.mark.parametrize("command", _commands())
def test_commands_that_are_shown_are_understood(command: str) -> None:
    words = shlex.split(command)[1:]
    if words[0] == "run" and not {"-f", "--expr", "--flake", "--store-path"}.intersection(words):
        words += ["--expr", "1"]  # prose that leaves the source out
    options = cli.parser().parse_args(words)
    if getattr(options, "file", None) is not None:
        assert (REPOSITORY / options.file).exists()


def test_there_are_commands_to_check() -> None:
    assert len([command for command in _commands() if command.startswith("cknix-csi run")]) >= 3


def test_arguments_in_the_manifests_are_understood() -> None:
    found = set()
    for file in MANIFESTS:
        for mapping in _objects(list(yaml.safe_load_all(file.read_text()))):
            if "args" in mapping and "cknix-csi" in str(mapping.get("image")):
                found.add(cli.parser().parse_args(mapping["args"]).command)
    assert found == {"controller", "node", "provisioner"}


def test_files_that_commands_apply_exist() -> None:
    for page in PAGES:
        for code in _code(page):
            for file in re.findall(r"(?:-f|--file) (yaml/\S*)", code):
                assert (REPOSITORY / file).exists(), code
            for file in re.findall(r"^(?:yaml|tests|docs|nix|cknix_csi|\.ci)/[\w./-]+$", code):
                assert (REPOSITORY / file).exists(), code


def _settings() -> list[list[str]]:
    return [[name.strip("`"), *rest] for name, *rest in _table("docs/operations.md", "variable")]


def test_the_table_of_settings_names_all_of_them_and_no_others() -> None:
    source = (REPOSITORY / "cknix_csi/settings.py").read_text()
    read = set(re.findall(r'read\(\s*"([A-Z_]+)"', source))
    assert len(read) > 10
    assert {name for name, *_ in _settings()} == read


def test_variables_that_are_named_anywhere_exist() -> None:
    known = {name for name, *_ in _settings()}
    for file in (*PAGES, *MANIFESTS):
        named = set(re.findall(r"\bCKNIX_[A-Z_]*[A-Z]\b", file.read_text()))
        assert named <= known, file


@pytest.mark.parametrize("setting", _settings(), ids=lambda setting: str(setting[0]))
def test_a_documented_default_is_the_programs(setting: list[str]) -> None:
    name, roles, default, _ = setting
    concerned = list(ROLES) if roles == "all" else roles.split(", ")
    assert set(concerned) <= set(ROLES)
    values = dict.fromkeys(concerned, default)
    if other := re.fullmatch(r"(`[^`]+`), (\w+) (`[^`]+`)", default):
        values = {role: other[3] if role == other[2] else other[1] for role in concerned}
    for role, value in values.items():
        if value.startswith("`"):
            literal = value.strip("`").replace("<namespace>", "cknix-system")
            assert ROLES[role]({name: literal}) == ROLES[role]({})


@pytest.mark.parametrize("setting", _settings(), ids=lambda setting: str(setting[0]))
def test_a_setting_is_read_by_the_roles_that_the_table_names(setting: list[str]) -> None:
    name, roles, *_ = setting
    if name == "KUBE_NODE_NAME":
        return  # any text will do
    for role in ROLES if roles == "all" else roles.split(", "):
        with pytest.raises(Invalid, match=name):
            ROLES[role]({name: "\x7f no good value"})


def test_the_table_of_attributes_names_all_of_them() -> None:
    for page in ("README.md", "docs/attributes.md"):
        named = {word for name, *_ in _table(page, "attribute") for word in re.findall(r"`([\w-]+)`", name)}
        assert named <= KNOWN_KEYS
        assert {"expression", "storePath", "namespace", "x86_64-linux"} <= named


def test_the_list_of_systems_is_complete() -> None:
    text = (REPOSITORY / "docs/attributes.md").read_text()
    match = re.search(r"Known systems: `([^`]+)`", text)
    assert match is not None
    assert set(match[1].split()) == set(KNOWN_SYSTEMS)


_MISTAKES: list[dict[str, str]] = [
    {"expresion": "hello"},
    {"expression": "hello", "storePath": f"/nix/store/{'0' * 32}-hello"},
    {"storePath": "/nix/store/hello"},
    {"expression": "hello", "namespace": "other"},
    {},
    {"expression": "hello", "sizeLimit": "10GB"},
    {"expression": "hello", "sizeLimit": "10Gi"},
    {"expression": "hello", "medium": "Memory"},
    {"expression": "hello", "sizeLimit": "10Gi", "medium": "Ram"},
    {"expression": "hello", "presentation": "copi"},
]


@pytest.mark.parametrize(
    ("row", "attributes"), list(zip(_table("docs/attributes.md", "message begins"), _MISTAKES, strict=True))
)
def test_messages_about_attributes_begin_as_documented(row: list[str], attributes: dict[str, str]) -> None:
    pattern = re.escape(row[0].strip("`")).replace("…", ".*?")
    pod = {POD_NAME: "p", POD_NAMESPACE: "default", EPHEMERAL: "true"}
    problems: list[Problem] = []
    context = {**attributes, **pod}
    for parse in (partial(parse_source, system="x86_64-linux"), partial(parse_options, writable=False)):
        try:
            parse(context)
        except Invalid as error:
            problems += error.problems
    assert any(re.match(pattern, str(problem)) for problem in problems), problems


def test_messages_that_troubleshooting_explains_are_ones_the_program_has() -> None:
    source = "\n".join(path.read_text() for path in sorted((REPOSITORY / "cknix_csi").rglob("*.py")))
    checked = 0
    for message, _ in _table("docs/troubleshooting.md", "the FailedMount event says"):
        for text in re.findall(r"`([^`]+)`", message):
            if text.startswith("driver name"):
                continue  # kubelet's own words
            words = [part.strip(' "') for part in text.split("…") if part.strip(' "')]
            assert all(part in source for part in words), text
            checked += 1
    assert checked >= 5


def _committed() -> list[Path]:
    command = [
        "git",
        "-c",
        f"safe.directory={REPOSITORY}",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout
    return [path for name in listed.decode().split("\0") if name and (path := REPOSITORY / name).is_file()]


def test_no_file_names_a_package_registry_or_a_place_on_somebodys_machine() -> None:
    hosts = ["pypi.org", "files.pythonhosted.org", "deb.debian.org", "proxy.golang.org", "registry.npmjs.org"]
    hosts += ["crates.io", "repo.maven.apache.org", "repo1.maven.org"]
    forbidden = [host.encode() for host in hosts] + [b"/work/" + b"main", b".." + b"/shared/", b"/root/" + b".pyenv"]
    files = _committed()
    assert len(files) > 50
    for file in files:
        if file == Path(__file__).resolve():
            continue
        content = file.read_bytes()
        assert [word for word in forbidden if word in content] == [], file
