"""Lines of the log: two formats, and what the work at hand is about on each of them."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from datetime import datetime

import pytest

from cknix_csi import logs
from cknix_csi.csi.rpc import names_in
from cknix_csi.proto.csi_pb2 import NodePublishVolumeRequest, NodeUnpublishVolumeRequest

log = logging.getLogger("cknix_csi.test_logs")


class Lines(logging.Handler):
    """What a formatter makes of each record, at the moment it is logged."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def _lines(formatter: logging.Formatter) -> Iterator[list[str]]:
    handler = Lines(formatter)
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield handler.lines
    log.removeHandler(handler)


@pytest.fixture
def text() -> Iterator[list[str]]:
    yield from _lines(logs.TextFormatter())


@pytest.fixture
def objects() -> Iterator[list[str]]:
    yield from _lines(logs.JsonFormatter())


def test_a_line_of_text_ends_with_what_it_is_about(text: list[str]) -> None:
    with logs.about({"pod": "default/web", "pod_uid": "u-1", "volume": "nix", "closure": ""}):
        log.info("mounted %s", "it")
        logs.note(closure="abc-hello")
        log.info("more")
    log.info("and nothing")
    head = r" INFO cknix_csi.test_logs: "
    assert [line.partition(head)[2] for line in text] == [
        "mounted it [pod=default/web volume=nix]",
        "more [pod=default/web volume=nix closure=abc-hello]",
        "and nothing",
    ]


def test_fields_stand_in_one_order_whenever_they_became_known(text: list[str]) -> None:
    with logs.about({"other": "x", "closure": "c", "volume": "v"}):
        logs.note(pod="a/b")
        log.info("y")
    assert text[0].endswith(": y [pod=a/b volume=v closure=c other=x]")


def test_a_uid_stands_for_a_pod_without_a_name(text: list[str]) -> None:
    with logs.about({"pod_uid": "u-1"}):
        log.info("unmounted")
    assert text[0].endswith(": unmounted [pod_uid=u-1]")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a b", '"a b"'),
        ("a=b", '"a=b"'),
        ("a]", '"a]"'),
        ('a"', r'"a\""'),
        ("a\n2026 INFO forged", r'"a\n2026 INFO forged"'),
        ("x" * 1000, "x" * 256),
    ],
)
def test_a_value_can_neither_end_its_line_nor_fill_the_log(text: list[str], value: str, shown: str) -> None:
    with logs.about({"volume_id": value}):
        log.info("x")
    assert text[0].endswith(f": x [volume_id={shown}]")
    assert "\n" not in text[0]


def test_an_object_has_time_level_logger_message_and_what_it_is_about(objects: list[str]) -> None:
    with logs.about({"pod": "default/web", "pod_uid": "u-1", "message": "no name of ours"}):
        log.warning("two\nlines of %s", "Grüße \udcff")
    line = json.loads(objects[0])
    moment = datetime.fromisoformat(line.pop("time"))
    assert moment.utcoffset() is not None
    assert line == {
        "level": "warning",
        "logger": "cknix_csi.test_logs",
        "message": "two\nlines of Grüße \udcff",
        "pod": "default/web",
        "pod_uid": "u-1",
    }
    assert "\n" not in objects[0]
    assert objects[0].isascii()


def test_a_traceback_is_part_of_the_line(objects: list[str], text: list[str]) -> None:
    try:
        raise ZeroDivisionError("in the middle")
    except ZeroDivisionError:
        with logs.about({"pod": "a/b"}):
            log.exception("failed")
    assert json.loads(objects[0])["exception"].endswith("ZeroDivisionError: in the middle")
    assert "failed [pod=a/b]\nTraceback" in text[0]


def test_what_kopf_says_of_an_object_is_told_with_its_name(objects: list[str]) -> None:
    adapter = logging.LoggerAdapter(log, {"k8s_ref": {"namespace": "default", "name": "hello", "uid": "u"}})
    adapter.info("handler failed")
    assert json.loads(objects[0])["object"] == "default/hello"


async def test_tasks_and_threads_tell_what_their_beginner_is_about_and_no_others(text: list[str]) -> None:
    both = asyncio.Barrier(2)

    async def work(pod: str) -> None:
        with logs.about({"pod": pod}):
            await both.wait()
            task = asyncio.create_task(asyncio.to_thread(log.info, "working for %s", pod))
        await task

    await asyncio.gather(work("a/1"), work("a/2"))
    assert sorted(line.partition(": ")[2] for line in text) == [
        "working for a/1 [pod=a/1]",
        "working for a/2 [pod=a/2]",
    ]


async def test_what_a_task_finds_out_is_told_by_its_beginner_as_well(text: list[str]) -> None:
    async def find_out() -> None:
        logs.note(closure="abc-hello")

    with logs.about({"pod": "a/b"}):
        await asyncio.create_task(find_out())
        log.info("done")
    assert text[0].endswith(": done [pod=a/b closure=abc-hello]")


@pytest.mark.parametrize(("form", "kind"), [("text", logs.TextFormatter), ("json", logs.JsonFormatter)])
def test_the_whole_program_logs_in_one_format(form: str, kind: type[logging.Formatter]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        logs.set_up("warning", form)
        [handler] = root.handlers
        assert isinstance(handler, logging.StreamHandler)
        assert handler.stream is sys.stderr
        assert isinstance(handler.formatter, kind)
        assert root.level == logging.WARNING
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


_TARGET = "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/tools/mount"


def test_a_publish_names_its_pod_and_volume_and_no_other_attribute() -> None:
    request = NodePublishVolumeRequest(
        volume_id="csi-1",
        target_path=_TARGET,
        secrets={"a": "s3cret"},
        volume_context={
            "csi.storage.k8s.io/pod.name": "web",
            "csi.storage.k8s.io/pod.namespace": "default",
            "csi.storage.k8s.io/serviceAccount.tokens": "t0ken",
            "expresion": "hello",
        },
    )
    assert names_in(request) == {"pod": "default/web", "pod_uid": "u-1", "volume": "tools", "volume_id": "csi-1"}


def test_an_unpublish_names_what_its_target_tells() -> None:
    request = NodeUnpublishVolumeRequest(volume_id="csi-1", target_path=_TARGET)
    assert names_in(request) == {"pod": "", "pod_uid": "u-1", "volume": "tools", "volume_id": "csi-1"}
    elsewhere = NodeUnpublishVolumeRequest(volume_id="csi-1", target_path="/anywhere")
    assert names_in(elsewhere) == {"pod": "", "pod_uid": "", "volume": "", "volume_id": "csi-1"}
    assert not any(names_in(object()).values())


def test_a_terminal_obeys_nothing_that_a_line_of_text_holds(text: list[str]) -> None:
    log.info("a \x1b]0;owned\x07\x1b[2J b\x9b2J\u202e c\td é")
    [line] = text
    assert line.endswith(r"a \x1b]0;owned\x07\x1b[2J b\x9b2J\u202e c" + "\td é")
