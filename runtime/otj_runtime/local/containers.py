"""From the containers of a pod to commands of this machine. Pure, but for looking up folders.

A path below a mount becomes the same path below the volume's folder, wherever it stands: in commands, in environment values and
in the configuration. A value that only a cluster has (a Secret's) must be given, or the run is refused.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otj_runtime.local.options import UsageError
from otj_runtime.pod.commands import PYTHON
from otj_runtime.pod.config import CONFIG_ENV

Piece = Mapping[str, Any]

_EMPTY_AT_FIRST = {"emptyDir", "persistentVolumeClaim", "ephemeral"}
"""Kinds of volumes that a folder can stand for, because the cluster does not fill them."""


@dataclass(frozen=True)
class Container:
    """One container as a process: its whole command, and its environment besides this machine's."""

    name: str
    command: list[str]
    env: dict[str, str]


def local_folders(volumes: list[dict[str, Any]], *, given: Mapping[str, Path], home: Path) -> dict[str, Path]:
    """The folder of each of the job's volumes: the one given, a hostPath's own, else one below `home`.

    Raises:
        UsageError: if a volume's content comes from the cluster, or a given one is unknown or no folder.
    """
    names = [volume["name"] for volume in volumes]
    for name, folder in given.items():
        if name not in names:
            raise UsageError(f"--volume {name}: the job has no such volume; it has {', '.join(names) or 'none'}")
        if not folder.is_dir():
            raise UsageError(f"--volume {name}: {folder} is no folder")
    return {volume["name"]: _folder(volume, given=given, home=home) for volume in volumes}


def _folder(volume: Piece, *, given: Mapping[str, Path], home: Path) -> Path:
    name: str = volume["name"]
    if name in given:
        return given[name].absolute()
    if "hostPath" in volume:
        return Path(volume["hostPath"]["path"])
    if _EMPTY_AT_FIRST & volume.keys():
        return home / name
    kind = next((key for key in volume if key != "name"), "nothing")
    raise UsageError(f"volume {name}: its {kind} exists in a cluster only; give --volume {name}=DIR")


def path_map(mounts: list[dict[str, Any]], folders: Mapping[str, Path]) -> dict[str, str]:
    """The folder behind each mount path.

    Raises:
        UsageError: if a mount names no volume.
    """
    found = {}
    for mount in mounts:
        if mount["name"] not in folders:
            raise UsageError(f"spec.volumeMounts: {mount['mountPath']} mounts volume {mount['name']}, which spec.volumes does not have")
        found[mount["mountPath"].rstrip("/")] = str(folders[mount["name"]] / mount.get("subPath", ""))
    return found


def rewrite(text: str, paths: Mapping[str, str]) -> str:
    """`text` with every path below a key of `paths` moved below its value; of two keys that fit, the longer one counts."""
    if not paths:
        return text
    keys = "|".join(re.escape(path) for path in sorted(paths, key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])({keys})(?=/|$|[^\w.-])", lambda found: paths[found[1]], text)


def machine_caches(environment: Mapping[str, str], *, home: Path) -> dict[str, str]:
    """The caches of this machine's user, in place of those that a pod keeps on its volumes: vLLM starts in half the time with what
    it learned of a model's class before, and the hub's files and token are found."""
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    found = {"HF_HOME": cache / "huggingface", "VLLM_CACHE_ROOT": cache / "vllm"}
    return {name: environment.get(name) or str(path) for name, path in found.items()}


def localize(container: Piece, *, paths: Mapping[str, str], given_env: Mapping[str, str], extra_env: Mapping[str, str]) -> Container:
    """A container of the pod as a process.

    Args:
        given_env: what the user gave: it wins over everything, and stands for values that only a cluster has.
        extra_env: what this machine needs (devices, caches); it wins over the container's own.

    Raises:
        UsageError: naming the variable whose value only a cluster has.
    """
    env: dict[str, str] = {}
    for entry in container.get("env", []):
        name = entry["name"]
        if name in given_env:
            continue
        if "valueFrom" in entry:
            source = next(iter(entry["valueFrom"]), "valueFrom")
            raise UsageError(f"spec.env {name}: its value comes from a {source}, which exists in a cluster only; give --env {name}=VALUE")
        value = entry.get("value", "")
        env[name] = _rewrite_json(value, paths) if name == CONFIG_ENV else rewrite(value, paths)
    program, *arguments = container["command"]
    program = sys.executable if program == PYTHON else program
    command = [program, *(rewrite(part, paths) for part in arguments)]
    return Container(name=container["name"], command=command, env=env | dict(extra_env) | dict(given_env))


def _rewrite_json(text: str, paths: Mapping[str, str]) -> str:
    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return rewrite(value, paths) if isinstance(value, str) else value

    return json.dumps(walk(json.loads(text)))
