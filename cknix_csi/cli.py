"""``cknix-csi``: one program, one subcommand per role.

Only the standard library is imported here: ``cknix-csi --help`` must answer at once, and a Kubernetes client alone
takes longer to import than a volume takes to mount.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cknix_csi import __version__

EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


def parser() -> argparse.ArgumentParser:
    """The command line, also used by the documentation's tests."""
    top = argparse.ArgumentParser(
        prog="cknix-csi", description="Nix closures as Kubernetes volumes.", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser(
        "controller",
        help="evaluate and build Expressions, and serve the binary cache (in a Deployment)",
        description="Watches Expressions, evaluates and builds them, and serves the results as a signed binary cache.",
    )
    commands.add_parser(
        "node",
        help="mount closures for the pods of this node (in a DaemonSet)",
        description="The CSI node plugin csi.cknix.cool: fetches exact store paths and mounts them for kubelet.",
    )
    run = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="build an Expression and run a command in its closure, without Kubernetes",
        description=(
            "Evaluates and builds an Expression on this machine, publishes it through the CSI node service, and runs "
            "COMMAND with the volume at /nix and /nix/var/result/bin first on PATH.  Needs root and Nix.  The exit "
            "code is the command's own; what it leaves running is ended with it."
        ),
    )
    source = run.add_mutually_exclusive_group(required=True)
    source.add_argument("-f", "--file", type=Path, metavar="FILE", help="YAML file with an Expression")
    source.add_argument("--expr", metavar="TEXT", help="Nix source text")
    source.add_argument("--flake", metavar="REF", help="flake reference, for example path:.#hello")
    source.add_argument("--store-path", metavar="PATH", help="exact store path")
    run.add_argument("--writable", action="store_true", help="let the command write below /nix (discarded afterwards)")
    run.add_argument(
        "--data-root",
        type=_directory,
        metavar="DIR",
        help="where the managed store is (default: CKNIX_DATA_ROOT, else /var/lib/cknix)",
    )
    run.add_argument("-q", "--quiet", action="store_true", help="no progress, only errors and the command's own output")
    run.add_argument(
        "argv", nargs="*", metavar="COMMAND", help="command and arguments (default: a shell); put -- first"
    )
    return top


def _directory(text: str) -> Path:
    # An empty one would be the current directory, and is an unset variable.
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a directory on a real disk")
    return Path(text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    top = parser()
    options, unknown = top.parse_known_args(arguments)
    if unknown:
        # An option of the command, taken for one of ours.
        remedy = "; put -- before the command" if getattr(options, "argv", None) else ""
        top.error(f"unrecognized arguments: {' '.join(unknown)}{remedy}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = _parse(arguments)
    from cknix_csi.api.errors import CknixError  # noqa: PLC0415

    try:
        if options.command == "controller":
            from cknix_csi.serve import controller  # noqa: PLC0415

            return controller(os.environ)
        if options.command == "node":
            from cknix_csi.serve import node  # noqa: PLC0415

            return node(os.environ)
        from cknix_csi.run import command  # noqa: PLC0415

        return command.run(
            command.Options(
                file=options.file,
                expr=options.expr,
                flake=options.flake,
                store_path=options.store_path,
                writable=options.writable,
                data_root=options.data_root,
                quiet=options.quiet,
                argv=tuple(options.argv),
            ),
            os.environ,
        )
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except CknixError as error:
        logging.getLogger("cknix").debug("stopped", exc_info=True)
        problems = getattr(error, "problems", None) or [error.message]
        for problem in problems:
            print(f"cknix-csi {options.command}: {problem}", file=sys.stderr)
        return EXIT_USAGE if error.reason.startswith("Invalid") else 1


if __name__ == "__main__":
    sys.exit(main())
