"""The Helm chart: the same objects as install.yaml, and a release's life on a real API server beside a running job."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from otj_operator.crd.chart import FOLDER, KEEP
from otj_operator.crd.install import NAMESPACE, install_manifests
from tests.cluster.binaries import helm
from tests.cluster.host import REPOSITORY, ClusterError, run
from tests.contract.apiserver import ApiServer, api_server
from tests.contract.operator_process import running_operator
from tests.contract.runs import Run

pytestmark = pytest.mark.integration

Object = dict[str, Any]
Helm = Callable[..., str]

CHART = str(REPOSITORY / FOLDER)
WITHOUT_A_CLUSTER = ("--kube-version", "1.34")
"""What helm knows of Kubernetes by itself is a release of years ago."""


def identity(manifest: Object) -> tuple[str, str, str]:
    return manifest["kind"], manifest["metadata"].get("namespace", ""), manifest["metadata"]["name"]


def templated(*options: str) -> dict[tuple[str, str, str], Object]:
    text = run(helm(), "template", "release", CHART, "--namespace", NAMESPACE, *WITHOUT_A_CLUSTER, *options)
    return {identity(manifest): manifest for manifest in yaml.safe_load_all(text) if manifest}


def installed(namespaces: tuple[str, ...] = ()) -> dict[tuple[str, str, str], Object]:
    """What install.yaml brings beside the namespace, which is Helm's --create-namespace."""
    return {identity(manifest): manifest for manifest in install_manifests(namespaces) if manifest["kind"] != "Namespace"}


@pytest.mark.parametrize(("options", "namespaces"), [([], ()), (["--set", "namespaces={team-a,team-b}"], ("team-a", "team-b"))])
def test_the_chart_brings_what_install_yaml_brings(options: list[str], namespaces: tuple[str, ...]) -> None:
    found, expected = templated(*options), installed(namespaces)
    crd = next(manifest for manifest in found.values() if manifest["kind"] == "CustomResourceDefinition")
    assert crd["metadata"].pop("annotations") == KEEP
    assert found.keys() == expected.keys()
    assert found == expected


def test_every_value_reaches_the_operator() -> None:
    given = {
        "image": "registry.example/operator:1",
        "runtimeImage": "registry.example/runtime:1",
        "imagePullPolicy": "Always",
        "replicas": 2,
        "leaseSeconds": 30,
        "log": {"format": "text", "verbose": True},
        "resources": {"limits": {"memory": "1Gi", "cpu": None}, "requests": {"memory": None, "cpu": "1"}},
        "imagePullSecrets": [{"name": "pull"}],
        "nodeSelector": {"pool": "system"},
        "priorityClassName": "high",
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "crds": {"install": False},
        "networkPolicy": {"enabled": False},
    }
    found = templated(*(word for name, value in given.items() for word in ("--set-json", f"{name}={json.dumps(value)}")))
    assert not {kind for kind, _, _ in found} & {"CustomResourceDefinition", "NetworkPolicy"}
    deployment = found["Deployment", NAMESPACE, "online-training-operator"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    assert (deployment["replicas"], container["image"], container["imagePullPolicy"]) == (2, given["image"], "Always")
    assert container["env"][0] == {"name": "OTJ_RUNTIME_IMAGE", "value": given["runtimeImage"]}
    assert container["args"] == ["--port=8080", "--log-format=text", "--lease-seconds=30", "--verbose"]
    assert container["resources"] == {"limits": {"memory": "1Gi"}, "requests": {"cpu": "1"}}
    for field in ("imagePullSecrets", "nodeSelector", "priorityClassName", "tolerations", "affinity"):
        assert pod[field] == given[field]


@pytest.mark.parametrize("option", ["replica=2", "replicas=many", "log.format=xml", "namespaces={Team_A}", "leaseSeconds=1", "image="])
def test_a_value_that_is_misspelt_or_impossible_is_refused(option: str) -> None:
    with pytest.raises(ClusterError, match=option.split("=")[0].split(".")[0]):
        templated("--set", option)


def test_the_chart_passes_helms_own_lint() -> None:
    assert "0 chart(s) failed" in run(helm(), "lint", CHART, *WITHOUT_A_CLUSTER)


def test_a_release_comes_changes_and_goes_beside_a_running_job(tmp_path: Path) -> None:
    with api_server(tmp_path) as server:
        release = _release(server)
        release("install", CHART, "--create-namespace")
        server.kubectl("wait", "--for=condition=Established", "crd/onlinetrainingjobs.onlinetraining.dev", "--timeout=20s")
        with running_operator(server, name="helm"):
            run_before = Run(server, "helm-run").created()
        release("upgrade", CHART, "--set", "replicas=2")
        assert server.kubectl("get", "deploy", "-n", NAMESPACE, "-o", "jsonpath={.items[*].spec.replicas}") == "2"
        release("uninstall")
        assert json.loads(server.kubectl("get", "job", "helm-run", "-o", "json"))["metadata"] == run_before["metadata"]
        assert server.kubectl("get", "otj", "-o", "name").strip() == "onlinetrainingjob.onlinetraining.dev/helm-run"
        assert server.kubectl("get", "deploy", "-n", NAMESPACE, "-o", "name") == ""
        release("install", CHART)
        assert server.kubectl("get", "otj", "-o", "name").strip() == "onlinetrainingjob.onlinetraining.dev/helm-run"


def _release(server: ApiServer) -> Helm:
    environment = {"KUBECONFIG": str(server.admin), "NO_PROXY": "127.0.0.1", "HELM_CACHE_HOME": str(server.folder / "helm")}

    def command(verb: str, *words: str) -> str:
        return run(helm(), verb, "online-training", *words, "--namespace", NAMESPACE, env={**os.environ, **environment})

    return command
