"""Generate the Python beside the ``.proto`` files: ``python -m cknix_csi.proto.generate [--check]``.

For developers: needs ``grpcio-tools`` (protoc with its Python plugins); the plugin for services is grpclib's own.  The
output is committed, so that installing the package needs neither.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import sysconfig
import tempfile
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent.parent
_PROTOS = ("csi", "pluginregistration")
_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_grpc.py")


def generate(directory: Path) -> dict[str, bytes]:
    """Run protoc with *directory* (empty) as its output; returns content by file name.

    protoc sees the files by their path inside the package, which makes the imports in its output absolute.
    """
    protoc = importlib.import_module("grpc_tools.protoc")
    well_known = Path(str(protoc.__file__)).parent / "_proto"
    plugin = Path(sysconfig.get_path("scripts")) / "protoc-gen-grpclib_python"
    status: int = protoc.main(
        [
            "protoc",
            f"--proto_path={_ROOT}",
            f"--proto_path={well_known}",
            f"--plugin=protoc-gen-grpclib_python={plugin}",
            f"--python_out={directory}",
            f"--pyi_out={directory}",
            f"--grpclib_python_out={directory}",
            *(str((_HERE / f"{name}.proto").relative_to(_ROOT)) for name in _PROTOS),
        ]
    )
    if status != 0:
        raise SystemExit(status)
    output = directory / _HERE.relative_to(_ROOT)
    return {name: _typed(output / name) for name in generated_names()}


def _typed(path: Path) -> bytes:
    content = path.read_bytes()
    # protoc's stubs say Mapping without its arguments and ClassVar outside of classes, which strict mypy refuses.
    return b'# mypy: disable-error-code="type-arg,misc"\n' + content if path.suffix == ".pyi" else content


def generated_names() -> list[str]:
    """Names of the files that :func:`generate` makes."""
    return [name + suffix for name in _PROTOS for suffix in _SUFFIXES]


def outdated(wanted: dict[str, bytes]) -> list[str]:
    """Names of the committed files that are missing or differ from *wanted*."""
    return [
        name
        for name, content in wanted.items()
        if not (_HERE / name).is_file() or (_HERE / name).read_bytes() != content
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cknix_csi.proto.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a file is not current")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="cknix-proto-") as scratch:
        wanted = generate(Path(scratch))
    stale = outdated(wanted)
    if options.check:
        for name in stale:
            print(f"{name} is not what its .proto file gives; run: python -m cknix_csi.proto.generate", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (_HERE / name).write_bytes(wanted[name])
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
