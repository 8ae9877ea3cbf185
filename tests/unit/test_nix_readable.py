"""Nix's messages in the reader's terms.  The samples are what Nix 2.8 and 2.34 said."""

from cknix_csi.nix.readable import readable

TMP = "/tmp/cknix-eval-1/expr"
RENAMES = {f"{TMP}/expr.nix": "expr", TMP: "expr", "/data/nix/store": "/nix/store"}


def test_the_file_that_the_user_never_saw_is_called_expr() -> None:
    assert readable(f"error: undefined variable 'x'\n       at {TMP}/expr.nix:1:1:", RENAMES) == (
        "error: undefined variable 'x'\n       at expr:1:1:"
    )


def test_physical_paths_are_told_as_logical_ones() -> None:
    assert readable("error: at /data/nix/store/abc-source/flake.nix:1:1", RENAMES) == (
        "error: at /nix/store/abc-source/flake.nix:1:1"
    )


def test_frames_of_describe_nix_are_left_out() -> None:
    message = f"""error:
       … while evaluating attribute 'derivations'
         at «string»:26:5:
           25|     path = text;
             |     ^

       … while calling the 'throw' builtin
         at {TMP}/expr.nix:1:1:
            1| throw "no"

       error: no"""
    assert readable(message, RENAMES) == (
        "error:\n       … while calling the 'throw' builtin\n         at expr:1:1:\n"
        '            1| throw "no"\n\n       error: no'
    )


def test_a_trace_of_nothing_else_leaves_only_the_error() -> None:
    message = f"error:\n       … while evaluating the file '{TMP}/expr.nix':\n\n       error: attribute 'helo' missing"
    assert readable(message, RENAMES) == "error: attribute 'helo' missing"


def test_hints_at_options_are_left_out() -> None:
    old = "error: attribute 'x' missing\n(use '--show-trace' to show detailed location information)"
    hint = "(stack trace truncated; use '--show-trace' to show the full, detailed trace)"
    new = f"error:\n       … a\n\n       {hint}\n\n       error: b"
    assert readable(old, {}) == "error: attribute 'x' missing"
    assert "show-trace" not in readable(new, {})
    assert readable(new, {}).endswith("error: b")


def test_the_first_lines_of_a_builder_stay() -> None:
    assert readable("configuring\n\nerror: builder failed", {}) == "configuring\n\nerror: builder failed"


def test_a_hint_stands_on_a_line_of_its_own() -> None:
    """Nix 2.8 leaves out the line's end, since it may not read the file to show it."""
    glued = "error: attribute 'helo' missing\n\n       at /x/expr.nix:2:3:Did you mean hello?"
    assert readable(glued, {}).endswith("expr.nix:2:3:\n       Did you mean hello?")
