"""What ``cknix-csi --help`` must not pay for."""

import subprocess
import sys

HEAVY = {
    "kopf",
    "kubernetes_asyncio",
    "aiohttp",
    "grpclib",
    "google.protobuf",
    "cryptography",
    "yaml",
    "sqlite3",
    "asyncio",
}


def test_the_command_line_is_there_before_anything_heavy_is_imported() -> None:
    script = "import sys; from cknix_csi import cli; cli.parser().format_help(); print('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "argparse" in loaded
    assert not loaded & HEAVY
