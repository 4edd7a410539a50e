"""Fixtures of the contract tests: one API server for the whole run with install.yaml applied, and the operator on it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.cluster.host import REPOSITORY, ClusterError
from tests.contract.apiserver import ApiServer, api_server, controllers
from tests.contract.kubelet import Kubelet
from tests.contract.operator_process import eventually, running_operator
from tests.unit.api.specs import changed


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server on which the operator was installed as the README says."""
    with api_server(tmp_path_factory.mktemp("apiserver")) as started:
        install(started)
        yield started


@pytest.fixture(scope="module")
def managed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """Another one, with the real Job controller and garbage collector, and the operator."""
    with api_server(tmp_path_factory.mktemp("managed")) as started, controllers(started):
        install(started)
        with running_operator(started, name="managed"):
            yield started


def install(server: ApiServer) -> None:
    """Do what the README says."""
    server.kubectl("apply", "-f", str(REPOSITORY / "manifests" / "install.yaml"))
    server.kubectl("wait", "--for=condition=Established", "crd/onlinetrainingjobs.onlinetraining.dev", "--timeout=20s")
    eventually("the admission policies, which the API server takes up once a second, are in force", lambda: not _takes_a_secret(server))


def _takes_a_secret(server: ApiServer) -> bool:
    try:
        server.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(changed({"dataset.args": {"token": "abc"}})))
    except ClusterError:
        return False
    return True


@pytest.fixture(scope="module")
def operator(server: ApiServer, request: pytest.FixtureRequest) -> Iterator[None]:
    """The operator, for the tests of one module."""
    with running_operator(server, name=request.module.__name__.rsplit(".", 1)[-1].replace("_", "-")):
        yield


@pytest.fixture
def kubelet(server: ApiServer) -> Kubelet:
    """Whoever acts on Jobs and pods in the namespace default."""
    return Kubelet(server)
