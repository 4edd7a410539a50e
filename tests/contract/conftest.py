"""Fixtures of the contract tests: one API server for the whole run, with our CRD."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.host import REPOSITORY
from tests.contract.apiserver import ApiServer, api_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server that knows OnlineTrainingJob."""
    with api_server(tmp_path_factory.mktemp("apiserver")) as started:
        started.kubectl("apply", "-f", str(REPOSITORY / "manifests" / "crd.yaml"))
        started.kubectl("wait", "--for=condition=Established", "crd/onlinetrainingjobs.onlinetraining.dev", "--timeout=20s")
        yield started


@pytest.fixture
def samples() -> Path:
    """The folder of the samples that the README applies."""
    return REPOSITORY / "manifests" / "samples"
