"""Which cluster the tests use, and how each kind is started, checked, fed with images and ended.

`external` is a cluster that somebody else runs: it is looked at, never changed. `kind` and `own` are started here, and get the
fake GPUs from the same device plugin, a process of this machine that reaches the kubelet's socket folder.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from tests.cluster import cleanup, node, volumes
from tests.cluster.binaries import go
from tests.cluster.cleanup import PLUGINS
from tests.cluster.host import (
    CACHE,
    KUBECONFIG,
    LOGS,
    REPOSITORY,
    START_SECONDS,
    STATE,
    ClusterError,
    daemon_ids,
    kubectl,
    run,
    say,
    start_daemon,
    stop,
    succeeds,
    wait_until,
)

KIND_NAME, KIND_VERSION = "otj", "v0.30.0"  # its default node image is Kubernetes 1.34
GPUS = 4


def choose() -> str:
    """`external`, `kind` or `own`."""
    if os.environ.get("OTJ_KUBECONFIG"):
        return "external"
    return "kind" if docker_answers() else "own"


def docker_answers() -> bool:
    """Whether a Docker engine can be used; the client alone is not enough."""
    return shutil.which("docker") is not None and succeeds(lambda: run("docker", "info", timeout_s=10))


def up() -> None:
    """Make the cluster ready, whatever it lacks; does nothing but look when it is up.

    Raises:
        ClusterError: It cannot be had; the message says why.
    """
    provider = choose()
    if provider == "external":
        _check_external()
        return
    if provider == "kind":
        _start_kind()
    elif node.is_up():
        say("already up")
    else:
        node.up()
    _start_device_plugin(STATE / "device-plugins" if provider == "kind" else PLUGINS)
    if provider == "own":
        volumes.refresh()


def down() -> None:
    """End the cluster if it is one of ours, and leave nothing of it but logs and the image store."""
    provider = choose()
    if provider == "external":
        say("OTJ_KUBECONFIG names a cluster of yours: nothing to end")
    elif provider == "kind":
        stop(lambda: daemon_ids("device-plugin"), grace_s=5)
        run(kind(), "delete", "cluster", "--name", KIND_NAME, timeout_s=120)
        KUBECONFIG.unlink(missing_ok=True)
    else:
        cleanup.refuse_others()
        cleanup.clean()


def _check_external() -> None:
    config = Path(os.environ["OTJ_KUBECONFIG"]).expanduser().resolve()
    if not config.is_file():
        raise ClusterError(f"OTJ_KUBECONFIG={config} is not a file")
    STATE.mkdir(parents=True, exist_ok=True)
    KUBECONFIG.unlink(missing_ok=True)
    KUBECONFIG.symlink_to(config)
    version = json.loads(kubectl("version", "-o", "json", "--request-timeout=10s"))["serverVersion"]
    if int("".join(filter(str.isdigit, version["minor"]))) < 29:
        raise ClusterError(f"the cluster runs Kubernetes {version['gitVersion']}; native sidecars need 1.29 or newer")
    say(f"OTJ_KUBECONFIG answers: Kubernetes {version['gitVersion']}, {_gpus()} nvidia.com/gpu to give")


def kind() -> str:
    """The kind command; built from its Go module where it is not installed."""
    if not shutil.which("kind") and not (CACHE / "bin" / "kind").exists():
        run(go(), "install", f"sigs.k8s.io/kind@{KIND_VERSION}", timeout_s=600, env={"GOBIN": str(CACHE / "bin")})
    return shutil.which("kind") or str(CACHE / "bin" / "kind")


def _start_kind() -> None:
    if KIND_NAME in run(kind(), "get", "clusters").split():
        say("already up")
        return
    plugins = STATE / "device-plugins"
    plugins.mkdir(parents=True, exist_ok=True)
    mount = {"hostPath": str(plugins), "containerPath": str(PLUGINS)}
    nodes = [{"role": "control-plane", "extraMounts": [mount]}]
    config = json.dumps({"apiVersion": "kind.x-k8s.io/v1alpha4", "kind": "Cluster", "nodes": nodes})
    create = ["create", "cluster", "--name", KIND_NAME, "--kubeconfig", str(KUBECONFIG), "--config", "-", "--wait", "180s"]
    KUBECONFIG.unlink(missing_ok=True)
    run(kind(), *create, stdin=config, timeout_s=600)


def _start_device_plugin(folder: Path) -> None:
    if not daemon_ids("device-plugin"):
        program = (sys.executable, "-m", "tests.cluster.device_plugin", "--folder", folder, "--count", str(GPUS))
        start_daemon("device-plugin", *program, cwd=REPOSITORY)
    wait_until(f"{GPUS} GPUs in the node's status", lambda: _gpus() == GPUS, timeout_s=START_SECONDS, log=LOGS / "device-plugin.log")


def _gpus() -> int:
    allocatable = r"jsonpath={.items[*].status.allocatable.nvidia\.com/gpu}"
    return sum(map(int, kubectl("get", "nodes", "-o", allocatable, "--request-timeout=3s").split()))
