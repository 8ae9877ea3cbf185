"""`python -m tests.cluster.harness`: build what the cluster tests need, or have a cluster to play with."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from ..image import recipe
from ..image.build import PROJECT, build_busybox_image, build_image, build_pause_image, build_provisioner_image
from .cache import progress
from .cluster import Cluster
from .command import CommandFailed
from .components import KUBERNETES, build_components
from .imagestore import imported
from .requirements import DEBIAN_PACKAGES, missing

MANIFESTS = PROJECT / "yaml"
APPLY_ATTEMPTS = 3
WELCOME = """
{installed}

  kubectl get nodes                            what there is
  kubectl run hello --image busybox:1.37 -it --rm -- sh
  nsenter -t {pid} -m -n -p -u -i                a shell on the first node
  ls {directory}/node-0/logs   logs of the node's programs
"""
SHELL_HELP = "This shell is in the first node's network, with the machine's own files.  `exit` takes everything down."
UP_HELP = """\
To talk to it:  export KUBECONFIG={kubeconfig}
                nsenter -t {pid} -n {kubectl} get nodes
Ctrl-C takes everything down."""


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.harness", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("packages", help="print the Debian packages that are needed")
    commands.add_parser("build", help="build all components and images that are not built yet")
    image = commands.add_parser("image", help="build our image from the tree, and print where it is")
    image.add_argument("references", nargs="*", default=[recipe.REFERENCE], help="names that it gets")
    runs = {"up": "run a cluster until interrupted", "shell": "run a cluster for as long as a shell in it"}
    for name, text in runs.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--nodes", type=int, default=2)
        command.add_argument("--bare", action="store_true", help="without our image and the manifests in yaml/")
    arguments = parser.parse_args()

    if arguments.command == "packages":
        print(*DEBIAN_PACKAGES)
        return 0
    if reasons := missing():
        print(*reasons, sep="\n", file=sys.stderr)
        return 1
    if arguments.command == "build":
        build_components()
        imported(standard_images())
    elif arguments.command == "image":
        print(build_image(*arguments.references))
    else:
        run_cluster(arguments.nodes, bare=arguments.bare, shell=arguments.command == "shell")
    return 0


def standard_images(*, ours: bool = True) -> list[Path]:
    """The images that a cluster starts with."""
    images = [build_pause_image(), build_busybox_image()]
    if not ours:
        return images
    return [*images, build_provisioner_image(), build_image(recipe.REFERENCE, *names_in_manifests())]


def names_in_manifests() -> list[str]:
    """Names under which the manifests want our image."""
    texts = (path.read_text() for path in MANIFESTS.glob("*.yaml"))
    names = {name for text in texts for name in re.findall(r"image: *[\"']?([^\s\"']*cknix-csi[^\s\"']*)", text)}
    return sorted(names)


def run_cluster(nodes: int, *, bare: bool, shell: bool) -> None:
    """Have a cluster until the shell ends, or somebody ends this program."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    build_components()
    images = standard_images(ours=not bare)
    started = time.monotonic()
    with Cluster(nodes=nodes, images=images) as cluster:
        installed = "Nothing is installed." if bare else install(cluster)
        progress(f"a Kubernetes cluster of {nodes} node(s) is up after {time.monotonic() - started:.0f} s")
        print(WELCOME.format(installed=installed, pid=cluster.node(0).pid, directory=cluster.directory), flush=True)
        if shell:
            print(SHELL_HELP, flush=True)
            signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for what runs in the shell
            argv = cluster.network_command([os.environ.get("SHELL", "/bin/sh")])
            subprocess.run(argv, check=False, env={**os.environ, **cluster.environment()})
        else:
            kubectl = KUBERNETES.programs / "kubectl"
            print(UP_HELP.format(kubeconfig=cluster.kubeconfig, pid=cluster.node(0).pid, kubectl=kubectl), flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()


def install(cluster: Cluster) -> str:
    """Apply the manifests, again if need be: some are of kinds that others define.  Returns what to tell."""
    if not any(MANIFESTS.glob("*.yaml")):
        return "There are no manifests in yaml/."
    failure = ""
    for _ in range(APPLY_ATTEMPTS):
        try:
            cluster.apply(MANIFESTS)
            return "The manifests in yaml/ are applied."
        except CommandFailed as failed:
            failure = str(failed)
            time.sleep(1)
    return f"The manifests in yaml/ do not apply.  {failure}"


if __name__ == "__main__":
    sys.exit(main())
