"""Ends the own cluster and takes back all that it put into this machine, also after it was killed half way.

Each step looks at the machine, not at a record of what was started, and does nothing where there is nothing. The order
matters: the kubelet would restart containers, containerd's shims would outlive their containers, and a folder can only go
when nothing is mounted below it.
"""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

from tests.cluster.host import CACHE, STATE, ClusterError, daemon_ids, daemons, run, stop, succeeds, tool, wait_until

RUN = Path("/run/otj-cluster")
BRIDGE = "otj0"
PLUGINS = Path("/var/lib/kubelet/device-plugins")  # compiled into the kubelet, whatever its --root-dir
KEPT = "log"  # of the state folder: the next start overwrites it


def refuse_others() -> None:
    """Raise ClusterError where starting or cleaning would break a kubelet that is not this checkout's."""
    others = {str(state) for _, state in daemons().values() if state != STATE}
    if others:
        raise ClusterError(f"a test cluster runs from {', '.join(others)}: `make cluster-down` there ends it")
    if not daemon_ids("kubelet") and _answers(PLUGINS / "kubelet.sock"):
        raise ClusterError("this machine already runs a kubelet: set OTJ_KUBECONFIG to use its cluster")


def clean() -> None:
    """End every daemon and container of the cluster and remove its mounts, network, cgroups and state."""
    stop(lambda: daemon_ids("kubelet", "device-plugin"), grace_s=5)
    stop(_container_processes, grace_s=3)
    stop(lambda: daemon_ids("proxy", "scheduler", "controller-manager", "apiserver"), grace_s=3)
    stop(lambda: daemon_ids("containerd"), grace_s=5)  # with its shims
    stop(lambda: daemon_ids("etcd"), grace_s=3)
    _unmount()
    _remove_network()
    _remove_cgroups()
    _remove_records()
    shutil.rmtree(RUN, ignore_errors=True)
    for entry in STATE.iterdir() if STATE.exists() else ():
        if entry.name != KEPT:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _cgroups() -> list[Path]:
    """The kubelet's cgroups, deepest first: one tree per controller with cgroups v1, a single one with v2."""
    root = Path("/sys/fs/cgroup")
    tops = [*root.glob("kubepods"), *root.glob("*/kubepods")]
    return [path for top in tops for path in [*sorted(top.rglob("*/"), key=lambda path: -len(path.parts)), top]]


def _container_processes() -> set[int]:
    found = set()
    for group in _cgroups():
        with suppress(OSError):  # it went away while we looked
            found |= {int(line) for line in (group / "cgroup.procs").read_text().split()}
    return found


def _remove_cgroups() -> None:
    def removed() -> bool:
        for group in _cgroups():
            with suppress(OSError):
                group.rmdir()
        return not _cgroups()

    if os.geteuid() == 0:
        wait_until("removal of the kubelet's cgroups", removed, timeout_s=10)


def _unmount() -> None:
    below = tuple(f"{folder}/" for folder in (STATE, RUN, CACHE / "containerd"))
    points = [line.split()[4].encode().decode("unicode_escape") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    # Volumes of a checkout that is gone are recognised by the kubelet's layout of them.
    stale = [point for point in points if point.startswith(below) or "/build/cluster/kubelet/pods/" in point]
    for point in sorted(stale, reverse=True):
        run("umount", "--lazy", point)


def _remove_records() -> None:
    """Remove what the kubelet, containerd's shims and CNI keep in places that are not ours to choose, and only ours of it."""
    for name in ("kubelet.sock", "fake-gpu.sock", "kubelet_internal_checkpoint"):
        (PLUGINS / name).unlink(missing_ok=True)
    shims, records = Path("/run/containerd/s"), Path("/var/lib/cni/results")
    for path in shims.glob("*"):
        if not _answers(path):
            path.unlink()
    for own in list(records.glob(f"{BRIDGE}-*")):
        for record in records.glob(f"*-{own.name.split('-')[1]}-*"):  # also that of the same pod's loopback
            record.unlink()
    for folder in (PLUGINS, PLUGINS.parent, shims, shims.parent, records, records.parent):
        with suppress(OSError):  # it was not there, or something else lies in it
            folder.rmdir()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
        probe.connect(str(path))
        return True
    return False


def _remove_network() -> None:
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        run("ip", "link", "delete", BRIDGE)
    for family in ("iptables", "ip6tables"):
        if succeeds(lambda name=family: tool(f"{name}-save")):  # type: ignore[misc]
            rules = run(f"{family}-save").splitlines(keepends=True)
            others = [rule for rule in rules if "KUBE-" not in rule]
            if others != rules:
                run(f"{family}-restore", stdin="".join(others))
