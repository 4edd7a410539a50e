"""The installed operator, a namespace for each module, and a report on the cluster under each failure."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.cluster.host import KUBECONFIG, REPOSITORY
from tests.e2e.cluster import OPERATOR, SYSTEM, Cluster, operator_pod

DELETE_SECONDS = 240


def readme_lines() -> list[str]:
    """The kubectl lines of README's section on clusters, in order."""
    section = (REPOSITORY / "README.md").read_text().split("## On a cluster")[1].split("\n## ")[0]
    block = section.split("```bash\n")[1].split("```")[0]
    return [line.split("  #")[0].rstrip() for line in block.splitlines() if line.startswith("kubectl ")]


@pytest.fixture(scope="session")
def readme() -> dict[str, str]:
    """README's kubectl lines by what they do: install, ready, apply, watch, logs. No other line is known."""
    steps = {
        "install": r"kubectl apply -f manifests/install\.yaml",
        "ready": r"kubectl rollout status .*",
        "apply": r"kubectl apply -f manifests/samples/grpo-copy\.yaml",
        "watch": r"kubectl get otj -w",
        "logs": r"kubectl logs .*",
    }
    lines = readme_lines()
    assert len(lines) == len(steps), f"README's lines changed: {lines}"
    for pattern, line in zip(steps.values(), lines, strict=True):
        assert re.fullmatch(pattern, line), f"README's line {line!r} is not {pattern}"
    return dict(zip(steps, lines, strict=True))


@pytest.fixture(scope="session")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The cluster, with the namespace `default`."""
    assert KUBECONFIG.exists(), "no cluster: `make e2e` starts it, puts the images into it and runs these tests"
    return Cluster(tmp_path_factory.mktemp("admin"), namespace="default")


@pytest.fixture(scope="session")
def installed(admin: Cluster, readme: dict[str, str]) -> Iterator[None]:
    """The operator of this checkout, installed with README's lines; one that runs already is replaced. It must survive the tests."""
    before = admin.kubectl("get", "deployment", OPERATOR, "-n", SYSTEM, "-o", "name", "--ignore-not-found")
    admin.shell(readme["install"])
    if before:  # the images have a fixed tag: only a new pod runs the new one
        admin.kubectl("rollout", "restart", f"deployment/{OPERATOR}", "-n", SYSTEM)
    admin.shell(readme["ready"], seconds=300)
    yield
    restarts = [status["restartCount"] for status in operator_pod(admin)["status"]["containerStatuses"]]
    assert restarts == [0], f"the operator was restarted: {restarts}\n{admin.report()}"


@pytest.fixture(scope="module")
def cluster(installed: None, admin: Cluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The cluster with a new namespace that enforces `restricted`; removed at the end, with all that the tests left in it."""
    name = "e2e-" + request.module.__name__.rsplit(".test_", 1)[-1].replace("_", "-")
    delete = ("delete", "namespace", name, "--ignore-not-found", f"--timeout={DELETE_SECONDS}s")
    admin.kubectl(*delete, seconds=DELETE_SECONDS + 30)
    admin.kubectl("create", "namespace", name)
    admin.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    yield Cluster(tmp_path_factory.mktemp(name), namespace=name)
    admin.kubectl(*delete, seconds=DELETE_SECONDS + 30)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """Under a failure, show what the namespace looked like."""
    outcome = yield
    report = outcome.get_result()
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(cluster, Cluster):
        report.sections.append((f"namespace {cluster.namespace}", cluster.report()))
