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
from collections.abc import Mapping, Sequence
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

    controller = commands.add_parser(
        "controller",
        allow_abbrev=False,
        help="evaluate and build Expressions, and serve the binary cache (in a Deployment)",
        description="Watches Expressions, evaluates and builds them, and serves the results as a signed binary cache.",
    )
    node = commands.add_parser(
        "node",
        allow_abbrev=False,
        help="mount closures for the pods of this node (in a DaemonSet)",
        description="The CSI node plugin csi.cknix.cool: fetches exact store paths and mounts them for kubelet.",
    )
    provisioner = commands.add_parser(
        "provisioner",
        allow_abbrev=False,
        help="make volumes for PersistentVolumeClaims (in a Deployment, beside external-provisioner)",
        description="The CSI controller plugin csi.cknix.cool: volumes of StorageClasses, which are a record each.",
    )
    for role in (controller, node, provisioner):
        role.add_argument(
            "--log-format",
            choices=("text", "json"),
            help="lines for people, or one JSON object each (default: CKNIX_LOG_FORMAT, else text)",
        )
    run = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="build an Expression and run a command in its closure, without Kubernetes",
        description=(
            "Evaluates and builds an Expression on this machine, publishes it through the CSI node service, and runs "
            "COMMAND with the volume at /nix and /nix/var/result/bin first on PATH.  Needs root and Nix.  The exit "
            "code is the command's own; what it leaves running is ended with it.  SIGINT, SIGQUIT, SIGTERM and SIGHUP "
            "are passed on to it; the third SIGTERM kills it, and so does the end of cknix-csi itself."
        ),
    )
    source = run.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "-f", "--file", type=Path, metavar="FILE", help="YAML file with an Expression, - for standard input"
    )
    source.add_argument("--expr", metavar="TEXT", help="Nix source text")
    source.add_argument("--flake", metavar="REF", help="flake reference, for example path:.#hello")
    source.add_argument("--store-path", metavar="PATH", help="exact store path")
    run.add_argument("--name", metavar="NAME", help="which Expression of FILE, where it holds several")
    run.add_argument("--writable", action="store_true", help="let the command write below /nix (discarded afterwards)")
    run.add_argument(
        "--restricted",
        action="store_true",
        help="evaluate as the controller of a cluster does, which sees nothing of its machine",
    )
    _data_root(run, what="where the managed store is")
    run.add_argument("-q", "--quiet", action="store_true", help="no progress, only errors and the command's own output")
    run.add_argument(
        "argv", nargs="*", metavar="COMMAND", help="command and arguments (default: a shell); put -- first"
    )
    probe = commands.add_parser(
        "probe",
        allow_abbrev=False,
        help="tell what this node's kernel and disk can do, and what volumes are made of here",
        description=(
            "Tries everything that volumes rely on, in a scratch directory of the data root, and prints what works and "
            "what follows for volumes.  Leaves nothing; needs root.  The exit code is 0 where read-only and writable "
            "volumes can be had, else 1."
        ),
    )
    probe.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    _data_root(probe, what="where volumes are made")
    volumes = commands.add_parser(
        "volumes",
        allow_abbrev=False,
        help="list what is published on this node, and since when",
        description="Lists what the node daemon has noted of its volumes, the oldest first.  Changes nothing.",
    )
    volumes.add_argument("--json", action="store_true", help="a JSON array instead of a table")
    _data_root(volumes, what="the daemon's data root")
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return top


def _data_root(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument(
        "--data-root",
        type=_directory,
        metavar="DIR",
        help=f"{what} (default: CKNIX_DATA_ROOT, else /var/lib/cknix)",
    )


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
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}{remedy}")
    return options


def _environment(options: argparse.Namespace) -> Mapping[str, str]:
    """The environment of a role; the command line comes before it."""
    return {**os.environ, **({"CKNIX_LOG_FORMAT": options.log_format} if options.log_format else {})}


def _run(options: argparse.Namespace) -> int:
    """Import a role and run it; returns the exit code."""
    if options.command == "controller":
        from cknix_csi.serve import controller  # noqa: PLC0415

        return controller(_environment(options))
    if options.command == "node":
        from cknix_csi.serve import node  # noqa: PLC0415

        return node(_environment(options))
    if options.command == "provisioner":
        from cknix_csi.serve import provisioner  # noqa: PLC0415

        return provisioner(_environment(options))
    if options.command == "probe":
        from cknix_csi.run import probing  # noqa: PLC0415

        return probing.run(os.environ, options.data_root, as_json=options.json)
    if options.command == "volumes":
        from cknix_csi.run import listing  # noqa: PLC0415

        return listing.run(os.environ, options.data_root, as_json=options.json)
    from cknix_csi.run import command  # noqa: PLC0415

    return command.run(
        command.Options(
            file=options.file,
            name=options.name,
            expr=options.expr,
            flake=options.flake,
            store_path=options.store_path,
            writable=options.writable,
            restricted=options.restricted,
            data_root=options.data_root,
            quiet=options.quiet,
            argv=tuple(options.argv),
        ),
        os.environ,
    )


def _told(problem: str) -> str:
    """*problem*; before a log of many lines the one that says why."""
    from cknix_csi.nix.log import headline  # noqa: PLC0415

    if "\n" not in problem.strip():
        return problem
    first = headline(problem)
    return problem if problem.startswith(first) else f"{first}\n\n{problem}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = _parse(arguments)
    from cknix_csi.api.errors import CknixError  # noqa: PLC0415

    try:
        return _run(options)
    except KeyboardInterrupt:
        print(f"cknix-csi {options.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except CknixError as error:
        logging.getLogger("cknix").debug("stopped", exc_info=True)
        problems = getattr(error, "problems", None) or [error.message]
        for problem in problems:
            print(f"cknix-csi {options.command}: {_told(str(problem))}", file=sys.stderr)
        return EXIT_USAGE if error.reason.startswith("Invalid") else 1


if __name__ == "__main__":
    sys.exit(main())
