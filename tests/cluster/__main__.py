"""`python -m tests.cluster up | down | images`."""

from __future__ import annotations

import argparse
import fcntl
import sys
import time

from tests.cluster import images, providers
from tests.cluster.host import CACHE, KUBECONFIG, ClusterError, say


def main() -> int:
    """Run one command; two at a time would build or start the same things, so they queue on a lock of this machine."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description="The Kubernetes cluster of the tests.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start it, or find it")
    commands.add_parser("down", help="end it and clean up")
    commands.add_parser("images", help="build the project's images and put them into it")
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        with (CACHE / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _perform(options)
    except ClusterError as error:
        print(f"cluster: error: {error}", file=sys.stderr)
        return 1
    return 0


def _perform(options: argparse.Namespace) -> None:
    started = time.monotonic()
    if options.command == "up":
        providers.up()
        say(f"ready after {time.monotonic() - started:.1f} s. To use it:\n\n    export KUBECONFIG={KUBECONFIG}\n")
    elif options.command == "down":
        providers.down()
        say("down")
    else:
        images.make()


if __name__ == "__main__":
    sys.exit(main())
