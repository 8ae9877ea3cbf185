"""What is in our image, as a Containerfile would say it (and `Containerfile`, beside this, does say it).

| FROM | Debian SUITE, essential packages + PACKAGES | kept until this table changes                    |
| RUN  | pip install requirements.lock → PREFIX      | kept until the lock file changes                 |
| COPY | our wheel → PREFIX                          | seconds: this is what a change of the code costs |
"""

from __future__ import annotations

SUITE = "trixie"
PYTHON = "3.13"  # the suite's
PACKAGES = (
    "busybox-static",  # the demo package set's shell
    "ca-certificates",
    "e2fsprogs",  # size limits of writable volumes
    "git",  # flakes
    "mount",
    "nix-bin",
    "openssh-client",  # flakes, remote builders
    "python3",
    "rsync",
    "util-linux",
)
#: Left out of the file system; nothing that runs reads them.
EXCLUDED = ("/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/man/*")

PREFIX = "/opt/cknix"
SITE = f"/usr/local/lib/python{PYTHON}/dist-packages"  # where Debian's Python looks first
PROGRAM = "/usr/bin/cknix-csi"
PROGRAM_TEXT = """\
#!/usr/bin/python3
import sys

from cknix_csi.cli import main

sys.exit(main())
"""
DIRECTORIES = ("/nix", "/var/lib/cknix")

BUILD_GROUP = "nixbld"  # what Nix builds as: users who own nothing
BUILD_GROUP_ID = 30000
BUILD_USERS = 32

REFERENCE = "docker.io/library/cknix-csi:dev"
CONFIG = {
    "Entrypoint": ["cknix-csi"],
    "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
}
