"""The operator's rights are exactly what it uses: the roles on the API server against the API server's audit log, both ways.

The log has every request of every operator that ran on this server before, so rights that only rare paths need count as used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.host import ClusterError
from tests.contract.apiserver import OPERATOR_ACCOUNT, ApiServer, api_server
from tests.contract.conftest import install
from tests.contract.kubelet import Kubelet
from tests.contract.operator_process import eventually, running_operator
from tests.contract.runs import Run

pytestmark = pytest.mark.integration

Right = tuple[str, str, str]
"""API group, resource with subresource, verb."""

CHECKED_AT_ADMISSION: set[Right] = {("onlinetraining.dev", "onlinetrainingjobs/finalizers", "update")}
"""Asked for by OwnerReferencesPermissionEnforcement when a Job is created, and never requested: the second test shows that it is needed."""

OF_CLIENTS: set[Right] = {("", "", "get")}
"""kopf reads which kinds there are (/api, /apis), which every service account may."""


def test_every_right_is_used_and_nothing_else_was_asked_for(server: ApiServer, kubelet: Kubelet) -> None:
    with running_operator(server, name="rights"):
        run = Run(server, "rights")
        run.created()
        kubelet.start_pod("rights", name="rights-1")
        run.wait("Running")
        eventually("an event", run.events)
        server.kubectl("delete", "job", "rights", "--cascade=background")
        server.kubectl("delete", "pod", "rights-1", "--grace-period=0", "--force")
        run.wait("Failed", reason="JobLost")
    requests = eventually("the audit log is written", lambda: [r for r in server.requests() if _names(r, "rights")])
    assert requests
    asked, granted = _asked(server), _granted(server)
    assert [r["requestURI"] for r in server.requests() if r["responseStatus"].get("code") == 403] == []
    assert asked - granted - OF_CLIENTS == set()
    assert granted - asked - CHECKED_AT_ADMISSION == set(), "rights that nothing uses"


def test_a_strict_cluster_wants_the_right_to_the_owners_finalizers(tmp_path: Path) -> None:
    with api_server(tmp_path, plugins=["OwnerReferencesPermissionEnforcement"]) as strict:
        install(strict)
        _without_and_with_the_right(strict)


def _without_and_with_the_right(server: ApiServer) -> None:
    role = json.loads(server.kubectl("get", "clusterrole", "online-training-operator", "-o", "json"))
    rules = [rule for rule in role["rules"] if not any(resource.endswith("/finalizers") for resource in rule["resources"])]
    lesser = {"apiVersion": role["apiVersion"], "kind": "ClusterRole", "metadata": {"name": "lesser"}, "rules": rules}
    server.kubectl("create", "-f", "-", stdin=json.dumps(lesser))
    server.kubectl("create", "clusterrolebinding", "lesser", "--clusterrole=lesser", "--user=lesser")
    owner = Run(server, "finalizers").object()
    reference = {k: owner[k] for k in ("apiVersion", "kind")} | {k: owner["metadata"][k] for k in ("name", "uid")}
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "x"}]}}
    metadata = {"name": "blocked", "ownerReferences": [reference | {"controller": True, "blockOwnerDeletion": True}]}
    job = json.dumps({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"template": template}})
    with pytest.raises(ClusterError, match="cannot set blockOwnerDeletion"):
        server.kubectl("create", "--as=lesser", "--dry-run=server", "-f", "-", stdin=job)
    server.kubectl("create", f"--as={OPERATOR_ACCOUNT}", "--dry-run=server", "-f", "-", stdin=job)


def _names(request: dict[str, Any], name: str) -> bool:
    return bool(request.get("objectRef", {}).get("name") == name and request["verb"] == "patch")


def _asked(server: ApiServer) -> set[Right]:
    found = set()
    for request in server.requests():
        target = request.get("objectRef", {})
        resource = "/".join(part for part in (target.get("resource", ""), target.get("subresource", "")) if part)
        found.add((target.get("apiGroup", ""), resource, request["verb"]))
    return found


def _granted(server: ApiServer) -> set[Right]:
    roles = json.loads(
        server.kubectl("get", "clusterroles,roles", "-A", "-l", "app.kubernetes.io/name=online-training-operator", "-o", "json")
    )
    return {
        (group, resource, verb)
        for role in roles["items"]
        if role["metadata"]["name"] not in ("online-training-edit", "online-training-view")  # rights of users
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
