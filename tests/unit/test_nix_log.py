"""Reading Nix's internal-json log.

Real logs are read by tests/nix/test_build.py, with every supported Nix.  Here is what no real run is sure to give:
lines that are cut, malformed, hostile or interleaved.
"""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cknix_csi.api.progress import Progress
from cknix_csi.nix.log import MAX_HEADLINE_CHARACTERS, MAX_TAIL_CHARACTERS, Log, headline, plain
from cknix_csi.nix.process import MAX_LINE

STORE = "/nix/store/6c1vlf6kyyl0x5cjdhvr3bymgxa74fjb-"


def line(action: str, **fields: Any) -> bytes:
    # As Nix writes it: keys in alphabetical order, no spaces.
    text = json.dumps({"action": action, **fields}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return b"@nix " + text.encode()


def error(text: str) -> bytes:
    return line("msg", level=0, msg=text, raw_msg=text)


def build(number: int, name: str) -> bytes:
    return line("start", id=number, type=105, level=3, text="building", fields=[f"{STORE}{name}.drv", "", 1, 1])


def said(number: int, text: str) -> bytes:
    return line("result", id=number, type=101, fields=[text])


def counts(number: int, *fields: int) -> bytes:
    return line("result", id=number, type=105, fields=list(fields))


def read(*lines: bytes) -> tuple[Log, list[Progress]]:
    seen: list[Progress] = []
    log = Log(seen.append)
    for one in lines:
        log.feed(one)
    return log, seen


def test_progress_counts_builds_and_downloads_and_names_what_is_worked_on() -> None:
    _, seen = read(
        line("start", id=1, type=104),
        line("start", id=2, type=103),
        counts(1, 0, 2, 0, 0),
        counts(2, 0, 1, 0, 0),
        line("start", id=3, type=108, fields=[f"{STORE}zlib-1.3", "http://cache"]),
        counts(2, 0, 1, 1, 0),
        line("stop", id=3),
        counts(2, 1, 1, 0, 0),
        build(4, "hello"),
        counts(1, 0, 2, 1, 0),
    )
    assert seen == [
        Progress(0, 2),
        Progress(0, 3),
        Progress(0, 3, ("zlib-1.3",)),
        Progress(0, 3),
        Progress(1, 3),
        Progress(1, 3, ("hello",)),
    ]


def test_between_two_builds_the_total_stays() -> None:
    """Nix 2.34 says [1,6,0,0] and then [1,5,1,0] for the second of five."""
    events = [(0, 5, 0, 0), (0, 5, 1, 0), (1, 6, 0, 0), (1, 5, 1, 0), (2, 6, 0, 0)]
    _, seen = read(line("start", id=1, type=104), *(counts(1, *event) for event in events))
    assert seen == [Progress(0, 5), Progress(1, 5), Progress(2, 5)]


def test_a_failure_does_not_take_the_count_back() -> None:
    """Nix 2.8 says [0,0,0,1] when the only build failed."""
    events = [(0, 1, 0, 0), (0, 1, 1, 0), (0, 0, 0, 1)]
    _, seen = read(line("start", id=1, type=104), *(counts(1, *event) for event in events))
    assert seen == [Progress(0, 1)]


def test_no_more_than_four_are_named() -> None:
    _, seen = read(*(build(number, f"p{number}") for number in range(9)))
    assert seen[-1].building == ("p0", "p1", "p2", "p3")


def test_what_a_failure_says_is_the_failed_builders_end_and_nixs_error() -> None:
    log, _ = read(
        build(1, "chatty"),
        build(2, "broken"),
        said(2, "compiling"),
        said(2, "cc: no such file"),
        *(said(1, f"noise {number}") for number in range(500)),
        error(f"error: builder for '{STORE}broken.drv' failed with exit code 1"),
    )
    assert log.failure.splitlines() == [
        "compiling",
        "cc: no such file",
        f"error: builder for '{STORE}broken.drv' failed with exit code 1",
    ]


def test_lines_that_nix_repeats_are_told_once() -> None:
    log, _ = read(
        build(1, "broken"),
        said(1, "1"),
        said(1, "failed"),
        said(1, "line two"),
        error(
            f"error: builder for '{STORE}broken.drv' failed with exit code 1;\n"
            "       last 1 log lines:\n       > line two"
        ),
    )
    assert log.failure.splitlines()[:2] == ["1", "failed"], "a part of Nix's own sentence is no repetition"
    assert log.failure.count("line two") == 1


def test_a_cache_that_nix_does_without_is_not_what_failed() -> None:
    away = "disabling binary cache 'https://cache.example' for 60 seconds"
    broke = f"error: builder for '{STORE}a.drv' failed with exit code 3"
    log, _ = read(build(1, "a"), said(1, "trouble"), error(away), error(broke))
    assert headline(log.failure) == f"builder for '{STORE}a.drv' failed with exit code 3: trouble"
    assert log.warnings == [away]


def test_without_a_failed_builder_all_lines_count() -> None:
    log, _ = read(build(1, "a"), said(1, "one"), said(7, "two"))
    assert log.failure == "one\ntwo"


def test_text_that_is_not_json_is_a_message() -> None:
    log, _ = read(b"unshare: unshare failed: Operation not permitted", b"  ", b"\xff\xfe broken")
    assert log.failure == "unshare: unshare failed: Operation not permitted\n�� broken"


def test_an_event_behind_another_programs_unfinished_line_is_no_text() -> None:
    log, _ = read(b"remote: Counting objects: 12%\r" + error("error: no"), b"done @nix " + b'{"action":"stop","id":1}')
    assert log.failure == "remote: Counting objects: 12%\nerror: no\ndone"


def test_what_a_builder_tells_nix_is_not_shown() -> None:
    log, _ = read(build(1, "a"), said(1, '@nix { "action": "unheard-of" }'), said(1, "real"))
    assert log.failure == "real"


@pytest.mark.parametrize("tail", ["", "\\", "\\u", "\\u00", "\\u001", '\\"', "\\\\"])
def test_an_error_that_was_cut_is_still_told(tail: str) -> None:
    whole = error("error: " + "x" * (MAX_LINE - 1000))
    log, _ = read(whole[: MAX_LINE - 1000] + tail.encode())
    assert log.error.startswith("error: xxx")
    assert "xxx" in log.error[-4:] or log.error[-1] in '"\\'


def test_messages_of_lower_importance_are_not_errors() -> None:
    log, _ = read(line("msg", level=1, msg="warning: x"), line("msg", level=3, msg="building"))
    assert log.error == ""


@given(st.lists(st.text(max_size=9000), max_size=60), st.lists(st.text(max_size=9000), max_size=60))
def test_a_failure_is_bounded_and_printable(errors: list[str], said_lines: list[str]) -> None:
    log, _ = read(build(1, "b"), *(said(1, text) for text in said_lines), *(error(text) for text in errors))
    assert len(log.failure) <= 2 * MAX_TAIL_CHARACTERS
    assert all(character.isprintable() or character in "\n\t" or ord(character) > 0x9F for character in log.failure)
    log.failure.encode()


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("\x1b[1;31merror:\x1b[0m no", "error: no"),
        ("\x1b[38:5:1mred", "red"),
        ("\x1b]8;;http://x\x07link\x1b]8;;\x1b\\", "link"),
        ("a\x00b\x07", "ab"),
        ("12%\r50%\r100%\r", "12%\n50%\n100%"),
        ("one\r\ntwo\r\r\n", "one\ntwo\n"),
        ("\x9b31mcsi", "31mcsi"),
        ("safe\u202etxt", "safetxt"),
        ("\ud800x", "x"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("Grüße 日本 🙂", "Grüße 日本 🙂"),
    ],
)
def test_no_escapes_reach_a_terminal(text: str, seen: str) -> None:
    assert plain(text) == seen


# --- the line to read first; real messages are in tests/nix/test_messages.py ---


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("", ""),
        ("\n \n", ""),
        ("expr evaluates to a value of type int", "expr evaluates to a value of type int"),
        ("the build did not end within 3s\nworking\nerror: interrupted by the user", "the build did not end within 3s"),
        ("error:", "error:"),
        ("\x1b[31;1merror:\x1b[0m no\r", "no"),
        # A builder has errors of its own.
        (
            "error: could not compile `x`\nmake: stopping\n"
            "error: builder for '/nix/store/x.drv' failed with exit code 2;\n       last 2 log lines:\n"
            "       > error: could not compile `x`\n       > make: stopping\n"
            "       For full logs, run 'nix log /nix/store/x.drv'.",
            "builder for '/nix/store/x.drv' failed with exit code 2: make: stopping",
        ),
        (
            "error: a builder's\nmake: stop\nerror: hash mismatch in derivation 'x':\n   specified: a\n   got: b",
            "hash mismatch in derivation 'x': specified: a, got: b",
        ),
        ("error: builder for 'x' failed with exit code 1", "builder for 'x' failed with exit code 1"),
        ("error:\n       … while calling\n\n       error: inner\nerror: build of 'x' failed", "inner"),
        # A message that was too long has a mark for what is left out, and then half a line.
        ("error: the cause\n       more\n[…]\nlf a line\n       the end", "the cause"),
        ("error:\n       … while\n[…]\nalf a line\n       error: the cause", "the cause"),
    ],
)
def test_the_line_to_read_first(log: str, line: str) -> None:
    assert headline(log) == line


@given(
    st.text(max_size=2000) | st.lists(st.sampled_from(["error:", " error: x:", "[…]", " > a", "b", ""])).map("\n".join)
)
def test_a_headline_is_one_printable_line(log: str) -> None:
    line = headline(log)
    assert len(line) <= MAX_HEADLINE_CHARACTERS
    assert line.splitlines() in ([], [line])
    assert line == plain(line)


values = (
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.text(max_size=5)
    | st.lists(st.integers(-5, 300) | st.text(max_size=5), max_size=5)
)
keys = st.sampled_from(["action", "id", "type", "fields", "level", "msg"])
events = st.dictionaries(keys, values).flatmap(
    lambda event: st.sampled_from(["start", "stop", "result", "msg"]).map(lambda action: {"action": action, **event})
)


@given(st.lists(events | st.lists(values)))
def test_no_event_is_so_malformed_that_it_ends_the_run(hostile: list[Any]) -> None:
    log, seen = read(*(b"@nix " + json.dumps(event).encode() for event in hostile))
    assert isinstance(log.failure, str)
    assert all(progress.done >= 0 and progress.expected >= 0 for progress in seen)


@given(st.lists(st.binary(max_size=50).map(b"@nix ".__add__) | st.binary(max_size=50)))
def test_no_bytes_end_the_run(lines: list[bytes]) -> None:
    log, _ = read(*lines, b"@nix " + b"[" * 50_000)
    assert isinstance(log.failure, str)


def test_a_builder_that_starts_endless_activities_does_not_fill_the_memory() -> None:
    log, _ = read(*(build(number, f"p{number}") for number in range(2000)), *(said(n, "x" * 5000) for n in range(2000)))
    assert len(log._running) <= 256
    assert len(log._builds) <= 256
