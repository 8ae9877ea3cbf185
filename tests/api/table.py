"""Specs that are good and specs that are not: one table for the CRD and for ``Spec.parse``, which must agree.

The names are sentences; *field* is what the refusal must name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STORE_PATH = "/nix/store/7rnmpbv8c4lpfzvq6v5x5i7m1y1a7cpb-hello-2.12.1"
HASH = "7rnmpbv8c4lpfzvq6v5x5i7m1y1a7cpb"


@dataclass(frozen=True, slots=True)
class Good:
    name: str
    spec: Any


@dataclass(frozen=True, slots=True)
class Bad:
    name: str
    spec: Any
    field: str


def data(**fields: Any) -> dict[str, Any]:
    return {"data": fields}


def expr(**fields: Any) -> dict[str, Any]:
    """A good spec with *fields* beside ``data``."""
    return {"data": {"expr": "1"}, **fields}


GOOD = [
    Good("an expression alone", data(expr="(import <nixpkgs> {}).hello")),
    Good("an expression of several lines", data(expr="let\n  a = 1;\nin\n\ta\n")),
    Good("an expression of one character", data(expr="x")),
    Good("an expression as long as allowed", data(expr="x" * 131_072)),
    Good("an expression whose characters need four bytes, as long as allowed", data(expr="😀" * 131_072)),
    Good("an expression of what only Unicode calls blank", data(expr="\u00a0")),
    Good("a flake reference", data(flakeRef="github:owner/repo#hello")),
    Good("a flake reference with a query", data(flakeRef="git+https://example.org/r?ref=main&dir=a%20b#x.y")),
    Good("a flake reference to a path", data(flakeRef="path:/etc/flakes/größe")),
    Good("a flake reference as long as allowed", data(flakeRef="x" * 2048)),
    Good("a flake reference with a dash inside", data(flakeRef="a-b")),
    Good("a store path", data(storePath=STORE_PATH)),
    Good("a store path with every character a name may have", data(storePath=f"/nix/store/{HASH}-aZ09+-._?=")),
    Good("a store path with the longest name", data(storePath=f"/nix/store/{HASH}-{'n' * 211}")),
    Good("a store path whose name begins with a dot", data(storePath=f"/nix/store/{HASH}-.hidden")),
    Good("a store path whose name begins with two dots and more", data(storePath=f"/nix/store/{HASH}-..x")),
    Good("a store path with drv inside its name", data(storePath=f"/nix/store/{HASH}-a.drv.out")),
    Good("a source beside one that is null", data(expr="1", flakeRef=None)),
    Good("one system", expr(systems=["x86_64-linux"])),
    Good("two systems", expr(systems=["aarch64-linux", "x86_64-linux"])),
    Good("no system named", expr(systems=[])),
    Good("the shortest history", expr(historyLimit=1)),
    Good("the longest history", expr(historyLimit=64)),
    Good("the shortest refresh in seconds", expr(refresh="60s")),
    Good("the shortest refresh in minutes", expr(refresh="1m")),
    Good("a refresh of hours and minutes", expr(refresh="1h30m")),
    Good("a refresh of everything", expr(refresh="1d2h3m4s")),
    Good("a refresh of days", expr(refresh="7d")),
    Good("a refresh of days and seconds", expr(refresh="1d1s")),
    Good("a refresh with leading zeros", expr(refresh="0090s")),
    Good("a refresh with a zero part", expr(refresh="0d1h0m")),
    Good("the longest refresh", expr(refresh="365d")),
    Good("the longest refresh in hours", expr(refresh="8760h")),
    Good("everything", expr(systems=["x86_64-linux"], historyLimit=5, refresh="1h")),
]

BAD = [
    Bad("no data", {}, "spec.data"),
    Bad("data that is text", {"data": "1"}, "spec.data"),
    Bad("data that is a list", {"data": []}, "spec.data"),
    Bad("no source", data(), "spec.data"),
    Bad("a source that is null alone", data(expr=None), "spec.data"),
    Bad("two sources", data(expr="1", flakeRef="a"), "spec.data"),
    Bad("three sources", data(expr="1", flakeRef="a", storePath=STORE_PATH), "spec.data"),
    Bad("a misspelt source", data(exp="1"), "spec.data"),
    Bad("a source and a misspelt one", data(expr="1", flakeref="a"), "spec.data.flakeref"),
    Bad("an unknown field", expr(system="x86_64-linux"), "spec.system"),
    Bad("an empty expression", data(expr=""), "spec.data.expr"),
    Bad("a blank expression", data(expr=" \t\r\n\f"), "spec.data.expr"),
    Bad("an expression with NUL", data(expr="1\x00"), "spec.data.expr"),
    Bad("an expression that is a number", data(expr=1), "spec.data.expr"),
    Bad("an expression that is too long", data(expr="x" * 131_073), "spec.data.expr"),
    Bad("an empty flake reference", data(flakeRef=""), "spec.data.flakeRef"),
    Bad("a flake reference with a space", data(flakeRef="a b"), "spec.data.flakeRef"),
    Bad("a flake reference with a line end", data(flakeRef="a\n"), "spec.data.flakeRef"),
    Bad("a flake reference with a vertical tab", data(flakeRef="a\x0b"), "spec.data.flakeRef"),
    Bad("a flake reference with NUL", data(flakeRef="a\x00"), "spec.data.flakeRef"),
    Bad("a flake reference that looks like an option", data(flakeRef="--impure"), "spec.data.flakeRef"),
    Bad("a flake reference that is too long", data(flakeRef="x" * 2049), "spec.data.flakeRef"),
    Bad("a store path that is empty", data(storePath=""), "spec.data.storePath"),
    Bad("a store path elsewhere", data(storePath=f"/gnu/store/{HASH}-a"), "spec.data.storePath"),
    Bad("a store path without a name", data(storePath=f"/nix/store/{HASH}"), "spec.data.storePath"),
    Bad("a store path with an empty name", data(storePath=f"/nix/store/{HASH}-"), "spec.data.storePath"),
    Bad("a store path with a short hash", data(storePath=f"/nix/store/{HASH[1:]}-a"), "spec.data.storePath"),
    Bad(
        "a store path with a letter Nix base32 lacks",
        data(storePath=f"/nix/store/e{HASH[1:]}-a"),
        "spec.data.storePath",
    ),
    Bad("a store path with a capital in its hash", data(storePath=f"/nix/store/A{HASH[1:]}-a"), "spec.data.storePath"),
    Bad("a file in a store path", data(storePath=f"{STORE_PATH}/bin/hello"), "spec.data.storePath"),
    Bad("a store path with a slash at its end", data(storePath=f"{STORE_PATH}/"), "spec.data.storePath"),
    Bad("a store path with a line end", data(storePath=f"{STORE_PATH}\n"), "spec.data.storePath"),
    Bad("a store path with a space before it", data(storePath=f" {STORE_PATH}"), "spec.data.storePath"),
    Bad("a store path with too long a name", data(storePath=f"/nix/store/{HASH}-{'n' * 212}"), "spec.data.storePath"),
    Bad("a store path with a letter beyond ASCII", data(storePath=f"/nix/store/{HASH}-ä"), "spec.data.storePath"),
    Bad("a store path called .", data(storePath=f"/nix/store/{HASH}-."), "spec.data.storePath"),
    Bad("a store path called ..", data(storePath=f"/nix/store/{HASH}-.."), "spec.data.storePath"),
    Bad("a store path whose name begins with .-", data(storePath=f"/nix/store/{HASH}-.-a"), "spec.data.storePath"),
    Bad("a store path whose name begins with ..-", data(storePath=f"/nix/store/{HASH}-..-a"), "spec.data.storePath"),
    Bad("a derivation", data(storePath=f"{STORE_PATH}.drv"), "spec.data.storePath"),
    Bad("an unknown system", expr(systems=["x86-linux"]), "spec.systems"),
    Bad("a system of another kernel", expr(systems=["aarch64-darwin"]), "spec.systems"),
    Bad("a system named twice", expr(systems=["x86_64-linux", "x86_64-linux"]), "spec.systems"),
    Bad("systems that are text", expr(systems="x86_64-linux"), "spec.systems"),
    Bad("a system that is a number", expr(systems=[1]), "spec.systems"),
    Bad("no history", expr(historyLimit=0), "spec.historyLimit"),
    Bad("a negative history", expr(historyLimit=-1), "spec.historyLimit"),
    Bad("a history that is too long", expr(historyLimit=65), "spec.historyLimit"),
    Bad("a history that is text", expr(historyLimit="3"), "spec.historyLimit"),
    Bad("a history that is a truth value", expr(historyLimit=True), "spec.historyLimit"),
    Bad("a history of a half", expr(historyLimit=1.5), "spec.historyLimit"),
    Bad("an empty refresh", expr(refresh=""), "spec.refresh"),
    Bad("a refresh without a unit", expr(refresh="3600"), "spec.refresh"),
    Bad("a refresh that is a number", expr(refresh=3600), "spec.refresh"),
    Bad("a refresh in the wrong order", expr(refresh="30m1h"), "spec.refresh"),
    Bad("a refresh in another language's digits", expr(refresh="\u0669\u0660s"), "spec.refresh"),
    Bad("a refresh with a fraction", expr(refresh="1.5h"), "spec.refresh"),
    Bad("a refresh with a sign", expr(refresh="-1h"), "spec.refresh"),
    Bad("a refresh with a space", expr(refresh="1h 30m"), "spec.refresh"),
    Bad("a refresh in weeks", expr(refresh="1w"), "spec.refresh"),
    Bad("a refresh that is too short", expr(refresh="59s"), "spec.refresh"),
    Bad("a refresh of nothing", expr(refresh="0s"), "spec.refresh"),
    Bad("a refresh of no days", expr(refresh="0d"), "spec.refresh"),
    Bad("a refresh one second too long", expr(refresh="365d1s"), "spec.refresh"),
    Bad("a refresh beyond any machine's numbers", expr(refresh="99999999999999999999d"), "spec.refresh"),
    Bad("a refresh beyond any machine's hours", expr(refresh="99999999999999999h"), "spec.refresh"),
    Bad("a refresh that is too long a text", expr(refresh="0" * 31 + "60s"), "spec.refresh"),
]

assert len({case.name for case in GOOD} | {case.name for case in BAD}) == len(GOOD) + len(BAD)
