"""What the other modules ask of this machine: commands, deadlines, paths, packages, and daemons that are found again.

A daemon is recognised by a marker in its environment, not by a recorded process id. So nothing has to be written down
before it starts, a process id that was given to somebody else is never signalled, and what an unclean end of the last run
left behind is found all the same. containerd hands its environment on to its shims, and so its marker too.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
STATE = REPOSITORY / "build" / "cluster"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "otj" / "cluster"
KUBECONFIG = STATE / "kubeconfig"
LOGS = STATE / "log"
MARKER = "OTJ_TEST_CLUSTER"
START_SECONDS = 240.0
"""How long a part of a cluster may take to come up: far more than it needs, because a test machine may be several times slower than its neighbour."""


class ClusterError(RuntimeError):
    """The cluster cannot be made, found or ended; the message says what to do about it."""


def say(text: str) -> None:
    """Print one line of progress at once, also into a pipe."""
    print(f"cluster: {text}", flush=True)


def tool(name: str) -> str:
    """The path of a command: the virtual environment's (kubectl, etcd come from PyPI) before the machine's."""
    own = Path(sys.prefix) / "bin" / name
    found = str(own) if own.exists() else shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise ClusterError(f"the command {name} is missing: `uv sync` installs kubectl and etcd, Debian packages the others")
    return found


def run(
    *command: str | Path,
    stdin: str | None = None,
    timeout_s: float = 60,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a command to its end and return what it printed.

    Raises:
        ClusterError: It failed (its output is in the message) or took longer than `timeout_s` seconds.
    """
    words = [tool(str(command[0])), *map(str, command[1:])]
    shown = " ".join([str(command[0]), *words[1:]])[:200]
    try:
        done = subprocess.run(
            words, input=stdin, text=True, capture_output=True, timeout=timeout_s, env={**os.environ, **(env or {})}, cwd=cwd
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"`{shown}` took longer than {timeout_s:.0f} s") from None
    if done.returncode:
        raise ClusterError(f"`{shown}` failed with {done.returncode}:\n{(done.stdout + done.stderr).strip()[-3000:]}")
    return done.stdout


def kubectl(*arguments: str, stdin: str | None = None, timeout_s: float = 30) -> str:
    """Run kubectl against the cluster of `make cluster`."""
    return run("kubectl", *arguments, stdin=stdin, timeout_s=timeout_s, env={"KUBECONFIG": str(KUBECONFIG)})


def succeeds(check: Callable[[], object]) -> bool:
    """Whether `check` gives anything but False; a failing command counts as no."""
    try:
        return check() is not False
    except ClusterError:
        return False


def wait_until(what: str, check: Callable[[], object], *, timeout_s: float, log: Path | None = None) -> None:
    """Ask every quarter of a second until `check` succeeds.

    Raises:
        ClusterError: It did not within `timeout_s` seconds; names `what` and the end of `log`.
    """
    deadline = time.monotonic() + timeout_s
    while not succeeds(check):
        if time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:]) if log and log.exists() else ""
            raise ClusterError(f"no {what} after {timeout_s:.0f} s" + (f"; see {log}, which ends with:\n{tail}" if log else ""))
        time.sleep(0.25)


def need_root(purpose: str) -> None:
    """Refuse early where a later step would fail half way."""
    if os.geteuid():
        raise ClusterError(f"{purpose} needs root; without it, set OTJ_KUBECONFIG to a cluster of your own or start Docker for kind")


def install_packages(packages: Mapping[str, str]) -> None:
    """Install the Debian packages of the files or commands that are missing (`{file or command: package}`)."""
    missing = sorted({package for wanted, package in packages.items() if not _present(wanted)})
    if not missing:
        return
    line = f"apt-get install -y --no-install-recommends {' '.join(missing)}"
    if os.geteuid() or not shutil.which("apt-get"):
        raise ClusterError(f"missing: {', '.join(missing)}. As root on Debian or Ubuntu: {line}")
    say(f"installing {', '.join(missing)}")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    with suppress(ClusterError):  # a source that cannot be reached matters only if the package is not found elsewhere
        run("apt-get", "update", "-q", timeout_s=180, env=quiet)
    run(*line.split(), timeout_s=600, env=quiet)


def _present(wanted: str) -> bool:
    return Path(wanted).exists() if "/" in wanted else succeeds(lambda: tool(wanted))


def start_daemon(name: str, *command: str | Path, cwd: Path | None = None) -> None:
    """Start a process that outlives this one, in a session of its own, its output in `LOGS/<name>.log`."""
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{name}.log").open("wb") as log:
        subprocess.Popen(
            [tool(str(command[0])), *map(str, command[1:])],
            cwd=cwd or STATE,
            env={**os.environ, MARKER: f"{name} {STATE}"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def daemons() -> dict[int, tuple[str, Path]]:
    """Every running daemon of any test cluster on this machine: process id -> (name, state folder)."""
    prefix = f"{MARKER}=".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # it ended meanwhile, or belongs to somebody else
                for item in (entry / "environ").read_bytes().split(b"\0"):
                    if item.startswith(prefix):
                        name, state = item.removeprefix(prefix).decode().split(" ", 1)
                        found[int(entry.name)] = (name, Path(state))
    return found


def daemon_ids(*names: str) -> list[int]:
    """Process ids of the daemons with these names."""
    return [process for process, (name, _) in daemons().items() if name in names]


def stop(find: Callable[[], Iterable[int]], *, grace_s: float) -> None:
    """End every process that `find` names: ask, wait up to `grace_s` seconds, then kill."""
    for process in find():
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    with suppress(ClusterError):
        wait_until("end", lambda: not list(find()), timeout_s=grace_s)
    for process in find():
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    wait_until("end of killed processes", lambda: not list(find()), timeout_s=10)
