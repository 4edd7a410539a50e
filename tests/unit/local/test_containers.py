"""A pod's containers become commands of this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from otj_runtime.local.containers import local_folders, localize, machine_caches, path_map, rewrite
from otj_runtime.local.options import UsageError

PATHS = {"/models": "/home/me/models", "/models/big": "/disk", "/data": "/home/me/data"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/models", "/home/me/models"),
        ("/models/a/config.json", "/home/me/models/a/config.json"),
        ("/models/big/x", "/disk/x"),
        ("/models/bigger/x", "/home/me/models/bigger/x"),
        ("--path=/data/x.jsonl", "--path=/home/me/data/x.jsonl"),
        ("/models:/data:/usr", "/home/me/models:/home/me/data:/usr"),
        ("/modelstore/x", "/modelstore/x"),
        ("/srv/models/x", "/srv/models/x"),
        ("./data", "./data"),
        ("no path", "no path"),
    ],
)
def test_paths_below_a_mount_move_below_its_folder(text: str, expected: str) -> None:
    assert rewrite(text, PATHS) == expected


def container(**fields: Any) -> dict[str, Any]:
    """A container of a pod."""
    return {"name": "trainer", "command": ["python", "-m", "x"], **fields}


def test_python_is_this_python_and_arguments_are_moved() -> None:
    found = localize(container(command=["python", "-m", "x", "/data/a"]), paths=PATHS, given_env={}, extra_env={})
    assert found.command == [sys.executable, "-m", "x", "/home/me/data/a"]


def test_paths_inside_the_configuration_are_moved() -> None:
    entry = {"name": "OTJ_CONFIG", "value": json.dumps({"dataset": {"path": "/data/x"}, "lines": ["/models"], "n": 1})}
    found = localize(container(env=[entry]), paths=PATHS, given_env={}, extra_env={})
    assert json.loads(found.env["OTJ_CONFIG"]) == {"dataset": {"path": "/home/me/data/x"}, "lines": ["/home/me/models"], "n": 1}


def test_of_two_entries_the_later_counts_then_the_machines_then_the_users() -> None:
    env = [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}, {"name": "B", "value": "1"}, {"name": "C", "value": "1"}]
    found = localize(container(env=env), paths={}, given_env={"C": "user"}, extra_env={"B": "machine"})
    assert found.env == {"A": "2", "B": "machine", "C": "user"}


@pytest.mark.parametrize("source", ["secretKeyRef", "configMapKeyRef", "fieldRef"])
def test_a_value_that_only_a_cluster_has_must_be_given(source: str) -> None:
    env = [{"name": "HF_TOKEN", "valueFrom": {source: {"name": "hub", "key": "token"}}}]
    with pytest.raises(UsageError, match=rf"HF_TOKEN: its value comes from a {source}.*--env HF_TOKEN=VALUE"):
        localize(container(env=env), paths={}, given_env={}, extra_env={})
    assert localize(container(env=env), paths={}, given_env={"HF_TOKEN": "x"}, extra_env={}).env == {"HF_TOKEN": "x"}


@pytest.mark.parametrize(
    ("environment", "hub", "vllm"),
    [
        ({}, "/home/me/.cache/huggingface", "/home/me/.cache/vllm"),
        ({"XDG_CACHE_HOME": "/c", "VLLM_CACHE_ROOT": "/v"}, "/c/huggingface", "/v"),
    ],
)
def test_caches_are_this_users(environment: dict[str, str], hub: str, vllm: str) -> None:
    assert machine_caches(environment, home=Path("/home/me")) == {"HF_HOME": hub, "VLLM_CACHE_ROOT": vllm}


def test_volumes_become_folders(tmp_path: Path) -> None:
    volumes = [
        {"name": "models", "persistentVolumeClaim": {"claimName": "m"}},
        {"name": "host", "hostPath": {"path": "/srv"}},
        {"name": "cache", "emptyDir": {}},
        {"name": "settings", "configMap": {"name": "s"}},
    ]
    folders = local_folders(volumes, given={"settings": tmp_path}, home=Path("/run/volumes"))
    assert folders == {
        "models": Path("/run/volumes/models"),
        "host": Path("/srv"),
        "cache": Path("/run/volumes/cache"),
        "settings": tmp_path,
    }
    mounts = [{"name": "models", "mountPath": "/models/", "subPath": "a"}, {"name": "host", "mountPath": "/srv"}]
    assert path_map(mounts, folders) == {"/models": "/run/volumes/models/a", "/srv": "/srv"}


@pytest.mark.parametrize(
    ("volumes", "given", "message"),
    [
        ([{"name": "s", "secret": {"secretName": "x"}}], {}, "volume s: its secret exists in a cluster only; give --volume s=DIR"),
        ([{"name": "a", "emptyDir": {}}], {"b": Path("/")}, "--volume b: the job has no such volume; it has a"),
        ([{"name": "a", "emptyDir": {}}], {"a": Path("/no/such")}, "--volume a: /no/such is no folder"),
    ],
)
def test_a_volume_that_cannot_be_had_is_named(volumes: list[dict[str, Any]], given: dict[str, Path], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        local_folders(volumes, given=given, home=Path("/run"))


def test_a_mount_of_no_volume_is_named() -> None:
    with pytest.raises(UsageError, match="/x mounts volume nothing"):
        path_map([{"name": "nothing", "mountPath": "/x"}], {})
