"""Expressions for the suite: programs that say hello, as large or as many-pathed as a scenario wants them."""

from __future__ import annotations


def program(tag: str, *, kibibytes: int = 0, paths: int = 0) -> str:
    """Nix text of a program `bin/hello` that says where it is; another *tag* is another closure.

    *kibibytes* of it do not compress; it refers to *paths* store paths more, each a small file of its own.
    """
    return f"""\
let demo = import <cknix-demo> {{}}; in derivation {{
  name = "{tag}";
  inherit (demo.hello) system;
  builder = "${{demo.busybox}}/bin/sh";
  PATH = "${{demo.busybox}}/bin";
  references = toString (builtins.genList (i: builtins.toFile "leaf-${{toString i}}" "{tag} ${{toString i}}") {paths});
  passAsFile = [ "references" ];
  args = [ "-euc" ''
    mkdir -p $out/bin $out/share
    cp $referencesPath $out/share/references
    head -c {kibibytes << 10} /dev/urandom > $out/share/bytes
    printf '#!%s\\necho Hello from %s\\n' ${{demo.busybox}}/bin/sh $out > $out/bin/hello
    chmod +x $out/bin/hello
  '' ];
}}"""


def slow(tag: str, seconds: int) -> str:
    """Nix text of a program `bin/hello` that takes its time to build."""
    return f"""\
let demo = import <cknix-demo> {{}}; in derivation {{
  name = "{tag}";
  inherit (demo.hello) system;
  builder = "${{demo.busybox}}/bin/sh";
  PATH = "${{demo.busybox}}/bin";
  args = [ "-euc" ''
    for second in $(seq {seconds}); do echo $second; sleep 1; done
    mkdir -p $out/bin
    printf '#!%s\\necho Hello from %s\\n' ${{demo.busybox}}/bin/sh $out > $out/bin/hello
    chmod +x $out/bin/hello
  '' ];
}}"""
