"""The edges of the process: events, logs, health, the fence, the check of the CRD, the manifest's rights."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

import aiohttp
import pytest
from kubernetes.aio import client

from otj_operator.crd.install import install_manifests
from otj_operator.health import health_server
from otj_operator.kube import JOBS, ONLINE_TRAINING_JOBS, ApiError, Cluster, FencedError
from otj_operator.logs import JsonFormatter, TextFormatter
from otj_operator.main import check_crd, patiently
from otj_operator.metrics import Metrics
from otj_operator.plan import Key
from otj_operator.plan.events import Event, event_object
from otj_runtime.api import API_VERSION, KIND
from otj_runtime.pod.ports import free_port
from tests.unit.operator.virtual_time import run_virtually

Object = dict[str, Any]

INVOLVED = {"kind": "OnlineTrainingJob", "namespace": "default", "name": "run", "uid": "1"}
EVENT = Event(type="Normal", reason="Training", message="Steps are made.", time="2026-01-01T12:00:00Z")


def test_the_same_event_has_the_same_name_so_that_it_is_told_once() -> None:
    name = event_object(EVENT, involved=INVOLVED, component="x")["metadata"]["name"]
    assert name == event_object(EVENT, involved=INVOLVED, component="x")["metadata"]["name"]
    later = Event(type="Normal", reason="Training", message="Steps are made.", time="2026-01-01T13:00:00Z")
    assert name != event_object(later, involved=INVOLVED, component="x")["metadata"]["name"]


def test_a_log_line_is_one_json_object_that_names_the_job() -> None:
    try:
        raise ValueError("bad\nluck")
    except ValueError:
        record = logging.LogRecord("otj", logging.WARNING, "f", 1, "failed in %s", ("x",), sys.exc_info())
    record.job = Key("default", "run")
    line = JsonFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["level"], found["message"]) == ("warning", "failed in x")
    assert found["object"] == {"apiVersion": API_VERSION, "kind": KIND, "namespace": "default", "name": "run"}
    assert "ValueError: bad" in found["error"]
    assert " default/run failed in x" in TextFormatter().format(record)


@pytest.mark.parametrize(("troubles", "status", "text"), [([], 200, "ok"), (["the watch of jobs has stalled"], 503, "of jobs has stalled")])
async def test_probes_tell_whether_the_process_is_well(troubles: list[str], status: int, text: str) -> None:
    port = free_port()
    async with health_server(port, troubles=lambda: troubles, metrics=Metrics()), aiohttp.ClientSession() as session:
        for path in ("healthz", "readyz"):
            async with session.get(f"http://127.0.0.1:{port}/{path}") as response:
                assert response.status == status
                assert text in await response.text()


async def test_a_process_that_may_not_lead_any_more_writes_nothing() -> None:
    async with Cluster(client.Configuration(host="http://127.0.0.1:1")) as cluster:
        cluster.may_write = lambda: False
        with pytest.raises(FencedError, match="POST /apis/batch/v1/namespaces/default/jobs"):
            await cluster.create(JOBS, {"metadata": {"namespace": "default"}})
        with pytest.raises(FencedError, match="onlinetrainingjobs/run/status"):
            await cluster.set_status(ONLINE_TRAINING_JOBS, namespace="default", name="run", status={}, resource_version="1")


class _Empty(Cluster):
    """A cluster in which nothing was installed."""

    async def get(self, *_: Any, **__: Any) -> None:
        return None


async def test_an_operator_on_a_cluster_without_the_crd_says_what_to_apply() -> None:
    async with _Empty(client.Configuration(host="http://127.0.0.1:1")) as cluster:
        with pytest.raises(SystemExit, match=r"does not serve onlinetrainingjobs.*apply manifests/crd.yaml first"):
            await check_crd(cluster)


def test_an_api_server_that_is_away_at_the_start_is_waited_for() -> None:
    answers = [ApiError("GET", status=status, reason="x", message="y") for status in (0, 503, 429)]

    async def ask() -> str:
        if answers:
            raise answers.pop(0)
        return "there"

    async def scenario() -> None:
        assert await patiently("asking", ask) == "there"

    run_virtually(scenario())


@pytest.mark.parametrize(("status", "at_once"), [(403, True), (404, True), (503, False)])
def test_what_time_does_not_heal_is_not_waited_for_and_nothing_for_ever(status: int, at_once: bool) -> None:
    asked = 0

    async def ask() -> None:
        nonlocal asked
        asked += 1
        raise ApiError("GET", status=status, reason="x", message="y")

    async def scenario() -> None:
        with pytest.raises(ApiError):
            await patiently("asking", ask, seconds=0.5, first_pause=0.2)

    asyncio.run(scenario())
    assert (asked == 1) is at_once


def test_an_operator_for_some_namespaces_has_rights_there_and_nowhere_else() -> None:
    manifests = install_manifests(("team-a", "team-b"))
    bindings = {(m["roleRef"]["name"], m["metadata"].get("namespace")) for m in manifests if m["kind"].endswith("RoleBinding")}
    assert bindings == {
        ("online-training-operator", "team-a"),
        ("online-training-operator", "team-b"),
        ("online-training-operator-crd", None),
        ("online-training-operator-leader", "online-training-system"),
    }
    (deployment,) = (m for m in manifests if m["kind"] == "Deployment")
    assert "--namespaces=team-a,team-b" in deployment["spec"]["template"]["spec"]["containers"][0]["args"]


def test_the_operator_may_not_read_secrets_nor_touch_pods() -> None:
    (role,) = (m for m in install_manifests() if m["kind"] == "ClusterRole" and m["metadata"]["name"] == "online-training-operator")
    rights = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert not [right for right in rights if right[0] in ("secrets", "configmaps", "*") or right[1] == "*"]
    assert {verb for resource, verb in rights if resource == "pods"} == {"list", "watch"}
    assert {verb for resource, verb in rights if resource == "onlinetrainingjobs"} == {"list", "watch"}


def test_the_deployment_passes_the_restricted_pod_security_standard() -> None:
    deployment = next(m for m in install_manifests() if m["kind"] == "Deployment")
    pod: Object = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert {"livenessProbe", "readinessProbe", "resources"} <= container.keys()
