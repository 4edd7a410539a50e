"""An operator that serves some namespaces: it works there, with rights that it has nowhere else, and asks for nothing beyond them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from otj_operator.crd.__main__ import rendered
from tests.contract.apiserver import ApiServer, api_server
from tests.contract.operator_process import eventually, running_operator
from tests.unit.api.specs import changed

pytestmark = pytest.mark.integration

SERVED, OTHER = ("team-a", "team-b"), "team-c"


def test_jobs_of_the_served_namespaces_run_and_others_are_left_alone(tmp_path: Path) -> None:
    with api_server(tmp_path) as server:
        for namespace in (*SERVED, OTHER):
            server.kubectl("create", "namespace", namespace)
        server.kubectl("apply", "-f", "-", stdin=rendered(SERVED)["manifests/install.yaml"])
        server.kubectl("wait", "--for=condition=Established", "crd/onlinetrainingjobs.onlinetraining.dev", "--timeout=20s")
        for namespace in (OTHER, SERVED[0]):
            _create(server, "before", namespace)
        with running_operator(server, name="some", namespaces=",".join(SERVED)):
            eventually("what was there is taken up", lambda: _job(server, "before", SERVED[0]))
            _create(server, "while", OTHER)
            _create(server, "while", SERVED[1])
            eventually("what comes is taken up", lambda: _job(server, "while", SERVED[1]))
            server.kubectl("delete", "job", "while", "-n", SERVED[1], "--cascade=background")
            eventually("a change of a child is seen", lambda: "Failed" in server.kubectl("get", "otj", "while", "-n", SERVED[1]))
        assert server.kubectl("get", "jobs", "-n", OTHER, "-o", "name") == ""
        assert [run.get("status") for run in json.loads(server.kubectl("get", "otj", "-n", OTHER, "-o", "json"))["items"]] == [None, None]
        eventually("the audit log is written", lambda: [r for r in server.requests() if r.get("objectRef", {}).get("name") == "while"])
        assert [r["requestURI"] for r in server.requests() if r["responseStatus"].get("code") == 403] == []


def _create(server: ApiServer, name: str, namespace: str) -> None:
    document = changed({}, name=name)
    document["metadata"]["namespace"] = namespace
    server.kubectl("create", "-f", "-", stdin=yaml.safe_dump(document))


def _job(server: ApiServer, name: str, namespace: str) -> str:
    return server.kubectl("get", "job", name, "-n", namespace, "--ignore-not-found", "-o", "name")
